"""Runs a region to learn which keys each query sees and how often each counts, and to compare it with attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.counts import counted_keys
from attncompile.passes.detect.probed.visible import Run, Sizes, visible_keys, zeros
from attncompile.passes.detect.scores import HIDDEN

TOLERANCE = 2e-5
"""Largest difference of two outputs, relative to the largest value: a few roundings of float32."""

LEVER = 8.0
"""The score that tells the scale: the weights of two keys are then e ** 8 apart."""

SCALE_TOLERANCE = 2e-6
"""Largest difference of the scales of two queries, relative."""


@dataclass(frozen=True, slots=True)
class Reading:
    """``counts``: uint8 [H, Nq, Nk], how often a key counts, 0 where it is not seen, the same for every batch entry;
    ``error``: the largest difference, relative. ``swapped``: the first operand holds the keys and the second one the
    queries.
    """

    counts: np.ndarray
    scale: float
    error: float
    swapped: bool = False


def read(run: Run, sizes: Sizes, seed: int = 0) -> Reading:
    """What the region is as attention, shown on random inputs.

    Raises:
        Unsupported: it is not softmax attention with a fixed mask.
    """
    q, k, _ = random_operands(sizes, np.random.default_rng(seed))
    if np.any(run(q, k, zeros(sizes)[2])):
        raise Unsupported("probe", "the output of values that are zero is not zero")
    try:
        counts = visible_keys(run, sizes).view(np.uint8)
    except Unsupported as error:
        if error.code != "unequal-weights":
            raise
        counts = counted_keys(run, sizes)
    if not counts.any(axis=-1).all():
        raise Unsupported("probe", "a query sees no key at all")
    if not np.array_equal(counts, np.broadcast_to(counts[:1], counts.shape)):
        raise Unsupported("probe", "the mask differs between batch entries")
    # Scores are the same whichever operand is called the query; whose rows the softmax runs over shows below.
    orders = [(run, False)]
    if sizes.queries == sizes.keys:
        orders.append((lambda q, k, v: run(k, q, v), True))
    reason: Unsupported | None = None
    for ordered, swapped in orders:
        try:
            scale = _scale(ordered, sizes, counts)
        except Unsupported as error:
            reason = reason or error
            continue
        worst = _compare(ordered, sizes, counts[0], scale, np.random.default_rng(seed))
        if worst <= TOLERANCE:
            return Reading(counts[0], scale, worst, swapped)
        reason = Unsupported("probe", f"it differs from attention over the keys that are seen by {worst:.1e}")
    assert reason is not None
    raise reason


def check_logits(logits: Callable[[np.ndarray, np.ndarray, np.ndarray], list[np.ndarray]], sizes: Sizes) -> None:
    """What softmaxes read is a product of queries and keys: nothing, or a number that hides, where one of them is zero.

    A mask that adds -20 looks like one that hides, until logits are large.

    Raises:
        Unsupported: it is something else.
    """
    q, k, v = random_operands(sizes, np.random.default_rng(0))
    for a, b in ((q, np.zeros_like(k)), (np.zeros_like(q), k)):
        check_scores(logits(a, b, v))


def check_scores(logits: list[np.ndarray]) -> None:
    """That every number is zero or hides. Raises ``Unsupported``."""
    for array in logits:
        if not bool(np.all((array == 0) | (array <= HIDDEN))):
            raise Unsupported("probe", "more than a product of queries and keys, or a number that hides, goes into "
                              "the softmax")  # fmt: skip


def random_operands(s: Sizes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard normal q, k and v."""
    q, k, v = zeros(s)
    return rng.normal(size=q.shape).astype(np.float32), rng.normal(size=k.shape).astype(np.float32), (
        rng.normal(size=v.shape).astype(np.float32)
    )  # fmt: skip


def _scale(run: Run, s: Sizes, counts: np.ndarray) -> float:
    """Every query has one channel, every other key has them all: how their weights differ says what a unit counts."""
    raised = counts[..., ::2].sum(axis=-1, dtype=np.int64)
    others = counts.sum(axis=-1, dtype=np.int64) - raised

    def logarithms(length: float) -> np.ndarray:
        """Of each query that sees both: by how much a unit more raises the score."""
        q, k, v = zeros(s)
        q[:, :, np.arange(s.queries), np.arange(s.queries) % s.dim] = length
        k[:, :, ::2] = 1.0
        v[:, :, ::2, 0], v[:, :, 1::2, -1] = 1.0, 1.0
        out = run(q, k, v).astype(np.float64)
        high, low = out[..., 0], out[..., -1]
        if s.value_dim == 1:  # one channel holds both
            v[:, :, 1::2] = 0.0
            high, low = (run(q, k, x)[..., 0].astype(np.float64) for x in (v, 1.0 - v))
        both = (raised > 0) & (others > 0) & (high > 0) & (low > 0)
        if not both.any():
            raise Unsupported("probe", "no query sees two keys, so the scale cannot be told")
        return np.asarray(np.log(high[both] * others[both] / (low[both] * raised[both])))

    rough = float(np.median(logarithms(1.0)))
    if not np.isfinite(rough) or abs(rough) < 1e-6:
        raise Unsupported("probe", "the weights do not depend on products of queries and keys")
    length = float(np.float32(LEVER / abs(rough)))
    found = logarithms(length) / length
    scale = float(np.median(found))
    if not bool(np.all(np.abs(found - scale) <= SCALE_TOLERANCE * abs(scale))):
        raise Unsupported("probe", "the scale differs between queries, heads or channels")
    usual = float(1.0 / np.sqrt(s.dim))
    return next((x for x in (usual, 1.0) if abs(scale - x) <= SCALE_TOLERANCE * x), scale)


def _compare(run: Run, s: Sizes, counts: np.ndarray, scale: float, rng: np.random.Generator) -> float:
    """The largest difference from attention on two random inputs, relative to the largest value."""
    worst = 0.0
    for spread in (1.0, 3.0):
        q, k, v = random_operands(s, rng)
        q *= np.float32(spread / (abs(scale) * s.dim**0.5))
        ours = run(q, k, v)
        if not bool(np.all(np.isfinite(ours))):
            return float("inf")
        difference = np.abs(ours - attention(q, k, v, counts, scale)).max(axis=(2, 3))
        worst = max(worst, float((difference / np.abs(v).max(axis=(2, 3))).max()))
    return worst


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, counts: np.ndarray, scale: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """float32 [B, H, Nq, Dv] of q, k, v with heads before tokens, where keys count ``counts`` [H, Nq, Nk] times; those
    that ``mask`` [B, Nk] hides not at all. NaN in the rows of queries that see no key.
    """
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float32)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            times = counts[h] if mask is None else counts[h] * (mask[b] > 0)
            scores = np.where(times > 0, scale * (q[b, h] @ k[b, h].T).astype(np.float32), -np.inf)
            with np.errstate(invalid="ignore"):
                weights = times * np.exp(scores - scores.max(axis=-1, keepdims=True))
                out[b, h] = (weights / weights.sum(axis=-1, keepdims=True)) @ v[b, h]
    return out
