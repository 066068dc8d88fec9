"""Runs a region to learn which keys each query sees, and to compare it with attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attncompile.core.errors import Unsupported

Run = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The region: float32 q [B, H, Nq, D], k and v [B, H, Nk, D] -> [B, H, Nq, D]."""

MARKS = np.array([1.06, 2.39, 5.17, 9.0, 19.15, 34.07, 67.63, 158.67])
"""Values of the keys that one channel of V tells apart: the means of no two sets of them are closer than 0.011."""

TOLERANCE = 2e-5
"""Largest difference of two outputs, relative to the largest value: a few roundings of float32. A single key more or
less among 4,096 changes an output by more than ten times that.
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """``visible``: bool [H, Nq, Nk], the same for every batch entry; ``error``: the largest difference, relative.
    ``swapped``: the first operand holds the keys and the second one the queries.
    """

    visible: np.ndarray
    scale: float
    error: float
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a region's operands."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int


def read(run: Run, sizes: Sizes, seed: int = 0) -> Reading:
    """What the region is as attention, shown on random inputs.

    Raises:
        Unsupported: it is not softmax attention with a fixed mask.
    """
    visible = _visible(run, sizes)
    if not visible.any(axis=-1).all():
        raise Unsupported("probe", "a query sees no key at all")
    if not np.array_equal(visible, np.broadcast_to(visible[:1], visible.shape)):
        raise Unsupported("probe", "the mask differs between batch entries")
    # Scores are the same whichever operand is called the query; whose rows the softmax runs over shows below.
    orders = [(run, False)]
    if sizes.queries == sizes.keys:
        orders.append((lambda q, k, v: run(k, q, v), True))
    reason: Unsupported | None = None
    for ordered, swapped in orders:
        try:
            scale = _scale(ordered, sizes, visible)
        except Unsupported as error:
            reason = reason or error
            continue
        worst = _compare(ordered, sizes, visible[0], scale, np.random.default_rng(seed))
        if worst <= TOLERANCE:
            return Reading(visible[0], scale, worst, swapped)
        reason = Unsupported("probe", f"it differs from attention over the keys that are seen by {worst:.1e}")
    assert reason is not None
    raise reason


def _zeros(s: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = np.zeros((s.batch, s.heads, s.queries, s.dim), np.float32)
    k = np.zeros((s.batch, s.heads, s.keys, s.dim), np.float32)
    return q, k, np.zeros((s.batch, s.heads, s.keys, s.value_dim), np.float32)


def _visible(run: Run, s: Sizes) -> np.ndarray:
    """Bool [B, H, Nq, Nk]: with all scores equal, an output is the mean of the values seen.

    A channel of V marks some keys by ``MARKS`` in one run, and by ones in another; the quotient is the mean of the
    marks of the keys seen, which no other set of keys has.
    """
    seen = np.zeros((s.batch, s.heads, s.queries, s.keys), dtype=bool)
    per_run = s.value_dim * len(MARKS)
    for start in range(0, s.keys, per_run):
        token = np.arange(start, min(start + per_run, s.keys))
        channel, mark = (token - start) // len(MARKS), (token - start) % len(MARKS)
        q, k, marks = _zeros(s)
        ones = marks.copy()
        marks[:, :, token, channel] = MARKS[mark]
        ones[:, :, token, channel] = 1.0
        sums, counts = (run(q, k, v).astype(np.float64) for v in (marks, ones))
        codes = _decode(sums, counts)
        seen[..., token] = (codes[..., channel] >> mark) & 1
    return seen


def _decode(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bits of the keys whose marks have the mean ``sums`` / ``counts``; no key where the count is zero."""
    sets = np.arange(1, 1 << len(MARKS))
    members = (sets[:, None] >> np.arange(len(MARKS))) & 1
    means = members @ MARKS / members.sum(axis=1)
    order = np.argsort(means)
    filled = np.abs(counts) > 1e-7
    mean = sums[filled] / counts[filled]
    at = np.clip(np.searchsorted(means[order], mean), 1, len(order) - 1)
    closer = np.where(mean - means[order][at - 1] < means[order][at] - mean, at - 1, at)
    out = np.zeros(sums.shape, dtype=np.int64)
    out[filled] = sets[order][closer]
    return out


def _scale(run: Run, s: Sizes, visible: np.ndarray) -> float:
    """Every query is one unit vector, every other key too: their share of the weights says what the unit counts."""
    q, k, v = _zeros(s)
    q[..., 0] = 1.0
    k[:, :, ::2, 0] = 1.0
    v[:, :, ::2, 0] = 1.0
    share = run(q, k, v)[..., 0].astype(np.float64)
    raised = visible[..., ::2].sum(axis=-1)
    others = visible.sum(axis=-1) - raised
    both = (raised > 0) & (others > 0) & (share > 0) & (share < 1)
    if not both.any():
        raise Unsupported("probe", "no query sees two keys, so the scale cannot be told")
    scale = float(np.median(np.log(share[both] * others[both] / ((1 - share[both]) * raised[both]))))
    usual = 1.0 / np.sqrt(s.dim)
    if not np.isfinite(scale) or abs(scale) < 1e-6:
        raise Unsupported("probe", "the weights do not depend on products of queries and keys")
    for known in (usual, 1.0):
        if abs(scale - known) < 1e-4 * known:
            return float(known)
    return scale


def _compare(run: Run, s: Sizes, visible: np.ndarray, scale: float, rng: np.random.Generator) -> float:
    """The largest difference from attention on two random inputs, relative to the largest value."""
    worst = 0.0
    for spread in (1.0, 3.0):
        q = rng.normal(0.0, spread / (abs(scale) * s.dim**0.5), (s.batch, s.heads, s.queries, s.dim)).astype(np.float32)
        k = rng.normal(0.0, 1.0, (s.batch, s.heads, s.keys, s.dim)).astype(np.float32)
        v = rng.normal(0.0, 1.0, (s.batch, s.heads, s.keys, s.value_dim)).astype(np.float32)
        ours = run(q, k, v)
        for b in range(s.batch):
            for h in range(s.heads):
                scores = np.where(visible[h], scale * (q[b, h] @ k[b, h].T).astype(np.float32), -np.inf)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                expected = (weights / weights.sum(axis=-1, keepdims=True)) @ v[b, h]
                worst = max(worst, float(np.abs(ours[b, h] - expected).max() / np.abs(v[b, h]).max()))
    return worst if np.isfinite(worst) else float("inf")
