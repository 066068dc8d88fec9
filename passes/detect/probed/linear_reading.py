"""Runs a region to learn what it is as linear attention, and to compare it with that on random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attncompile.core.errors import Unsupported

Feed = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The region: its three entries, float32 [B, H, N, width] each, in its own order -> [B, H, N, value_dim]."""

TOLERANCE = 2e-5
"""Largest difference of two outputs, relative to the largest value of their head."""

_WEIGHTS = 2e-4
"""Largest relative difference of one weight: a power of the decay is rounded at every step that makes it."""

_SMALLEST = 1e-30
"""Weights below this are not told from zero."""

_EPSILON_AT = (1e6, 1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
"""Products of query and key at which the sum is looked at: the first is far above what is added to it."""


@dataclass(frozen=True, slots=True)
class LinearReading:
    """out_i = scale * sum_j w_ij (q_i k_j) v_j, with ``normalised`` over sum_j w_ij (q_i k_j) + ``epsilon``; w_ij is
    ``rates``[h] ** (i - j), and 0 for j > i where ``causal``. ``order`` says which entries are queries, keys, values.
    """

    order: tuple[int, int, int]
    causal: bool
    rates: tuple[float, ...]
    scale: float
    normalised: bool
    epsilon: float
    error: float


def read_linear(feed: Feed, batch: int, heads: int, tokens: int, widths: tuple[int, int, int]) -> LinearReading:
    """What the region is, shown on random inputs.

    Raises:
        Unsupported: it is not linear attention.
    """
    if tokens < 3:
        raise Unsupported("probe", f"{tokens} tokens are too few to tell a decay")
    shapes = tuple((batch, heads, tokens, w) for w in widths)
    order = _order(feed, shapes)
    dims = [widths[i] for i in order]
    if dims[0] != dims[1]:
        raise Unsupported("probe", "queries and keys have different head dims")
    region = _Ordered(feed, order, (batch, heads, tokens), dims[0], dims[2])
    first, last = region.columns([0])[..., 0], region.columns([tokens - 1])[..., 0]
    causal = not bool(np.any(last[..., :-1]))
    normalised = _normalised(region, first)
    rates = _rates(region, causal)
    epsilon, scale = _epsilon(region, causal, rates) if normalised else (0.0, float(first[0, 0, 0]))
    if not np.isfinite(scale) or abs(scale) < 1e-20:
        raise Unsupported("probe", "the first query does not see the first key")
    scale = _snapped(scale, (1.0, dims[0] ** -0.5, 1.0 / dims[0]))
    found = LinearReading(order, causal, rates, scale, normalised, epsilon, 0.0)
    _check_weights(region, found)
    worst = max(_compare(region, found, seed) for seed in range(4))
    if not worst <= TOLERANCE:
        raise Unsupported("probe", f"it differs from linear attention by {worst:.1e}")
    return LinearReading(order, causal, rates, scale, normalised, epsilon, worst)


class _Ordered:
    """The region with its entries in the order query, key, value."""

    def __init__(
        self, feed: Feed, order: tuple[int, int, int], lead: tuple[int, int, int], dim: int, value_dim: int
    ) -> None:
        self._feed, self._order, self.lead, self.dim, self.value_dim = feed, order, lead, dim, value_dim

    def run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        entries: list[np.ndarray] = [q, q, q]
        for place, array in zip(self._order, (q, k, v), strict=True):
            entries[place] = array.astype(np.float32)
        return self._feed(entries[0], entries[1], entries[2]).astype(np.float64)

    def columns(self, tokens: list[int], query: float = 1.0) -> np.ndarray:
        """[B, H, N, len(tokens)]: the weights of these keys, all queries being ``query`` e1 and all keys e1."""
        out = np.zeros((*self.lead, len(tokens)))
        q, k, v = (np.zeros((*self.lead, n), np.float32) for n in (self.dim, self.dim, self.value_dim))
        q[..., 0], k[..., 0] = query, 1.0
        for start in range(0, len(tokens), self.value_dim):
            part = tokens[start : start + self.value_dim]
            v[:] = 0.0
            v[:, :, part, np.arange(len(part))] = 1.0
            out[..., start : start + len(part)] = self.run(q, k, v)[..., : len(part)]
        return out


def _order(feed: Feed, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, int, int]:
    """Queries change their own token alone; of the others, a channel of the values changes its own channel alone."""
    rng = np.random.default_rng(5)
    entries = [rng.uniform(0.5, 1.5, shape).astype(np.float32) for shape in shapes]

    def run(changed: int = -1) -> np.ndarray:
        arrays = [a.copy() for a in entries]
        if changed >= 0:
            arrays[changed][:, :, 0, 0] *= 2.0
        return feed(arrays[0], arrays[1], arrays[2]).astype(np.float64)

    base = run()
    changes = [np.abs(run(i) - base) > 1e-6 * np.abs(base).max() for i in range(3)]
    queries = [i for i in range(3) if not changes[i][:, :, 1:].any()]
    others = [i for i in range(3) if i not in queries]
    values = [i for i in others if not changes[i][..., 1:].any() and shapes[i][-1] == base.shape[-1]]
    if len(queries) != 1 or not values:
        raise Unsupported("probe", "its entries do not act as queries, keys and values")
    value = values[-1]
    return queries[0], next(i for i in others if i != value), value


def _normalised(region: _Ordered, first: np.ndarray) -> bool:
    """Whether a larger query leaves the weights as they are."""
    more = region.columns([0], query=2.0)[..., 0]
    if np.allclose(more, first, rtol=0.1, atol=0):
        return True
    if np.allclose(more, 2 * first, rtol=1e-4, atol=_SMALLEST):
        return False
    raise Unsupported("probe", "its output is neither proportional to the queries nor independent of their length")


def _rates(region: _Ordered, causal: bool) -> tuple[float, ...]:
    """The decay of each head, from the weight of the first key over that of a later one; none where all are 1."""
    heads, tokens = region.lead[1:]
    if not causal:
        return ()
    later = [1 << n for n in range((tokens - 1).bit_length()) if 1 << n < tokens]
    columns = region.columns([0, *later])[0]
    rates = []
    for head in range(heads):
        rate = 1.0
        for at, token in enumerate(later):
            if not columns[head, token, at + 1]:
                raise Unsupported("probe", f"query {token} does not see its own key")
            ratio = columns[head, token, 0] / columns[head, token, at + 1]
            if ratio > _SMALLEST:
                rate = float(ratio ** (1.0 / token))
        rates.append(_snapped(rate, (1.0,), 2e-6))
    return () if all(r == 1.0 for r in rates) else tuple(rates)


def _epsilon(region: _Ordered, causal: bool, rates: tuple[float, ...]) -> tuple[float, float]:
    """What is added to the sum, and the factor of the quotient, from ever shorter queries at the first token."""
    total = 1.0 if causal else float(region.lead[2])
    seen = [float(region.columns([0], query=x)[0, 0, 0, 0]) * total for x in _EPSILON_AT]
    scale = _snapped(seen[0], (1.0,), 1e-5)
    for x, weight in zip(_EPSILON_AT, seen, strict=True):
        if not weight > 0:
            break
        part = weight / scale
        if part < 0.9:
            epsilon = x * total * (1.0 / part - 1.0)
            return _snapped(epsilon, tuple(10.0**-n for n in range(2, 13)), 1e-2), scale
    return 0.0, scale


def _snapped(number: float, usual: tuple[float, ...], within: float = 1e-4) -> float:
    """The usual number that is as near as this, if there is one: the comparison says whether that was right."""
    return next((u for u in usual if abs(number - u) <= within * u), number)


def _check_weights(region: _Ordered, found: LinearReading) -> None:
    """Every weight, one key at a time: far ones under a strong decay do not show in a sum.

    Raises:
        Unsupported: one is not what ``found`` says.
    """
    heads, tokens = region.lead[1:]
    sums = np.stack([_weights(found, h, tokens, [0])[:, 0] for h in range(heads)]).cumsum(axis=1)
    if not found.causal:
        sums[:] = tokens
    step = max(region.value_dim, 64)
    for start in range(0, tokens, step):
        part = list(range(start, min(start + step, tokens)))
        got = region.columns(part)
        want = np.stack([_weights(found, h, tokens, part) for h in range(heads)])
        if found.normalised:
            want /= (sums + found.epsilon)[..., None]
        want *= found.scale
        bad = np.abs(got - want) > _WEIGHTS * np.abs(want) + _SMALLEST
        if bool(bad.any()) or not np.isfinite(got).all():
            raise Unsupported("probe", "the weight of a key is no power of its distance, or keys count differently")


def _weights(found: LinearReading, head: int, tokens: int, keys: list[int]) -> np.ndarray:
    """w [N, keys] of one head."""
    if not found.causal:
        return np.ones((tokens, len(keys)))
    distance = np.arange(tokens)[:, None] - np.asarray(keys)[None]
    rate = found.rates[head] if found.rates else 1.0
    return np.where(distance >= 0, rate ** np.maximum(distance, 0), 0.0)


_STRETCHED = (1.0, 1.0, 1e5, 1e-5)


def _compare(region: _Ordered, found: LinearReading, seed: int) -> float:
    """The largest difference from linear attention on random inputs, relative to the largest value of the head.

    A sum that is divided by must not come near zero: its features are positive. Two such functions are quotients of
    polynomials, which are one where they agree on an open set.
    """
    rng = np.random.default_rng(seed)
    batch, heads, tokens = region.lead
    q, k = (rng.normal(size=(*region.lead, region.dim)) for _ in range(2))
    v = rng.normal(size=(*region.lead, region.value_dim))
    if found.normalised:
        q, k = np.abs(q) + 0.1, np.abs(k) + 0.1
        if seed == 1 and found.epsilon:
            q *= found.epsilon
    # What is added to one of them alone shows where that one is small.
    q, k = q * _STRETCHED[seed], k / _STRETCHED[seed]
    q, k, v = (a.astype(np.float32).astype(np.float64) for a in (q, k, v))
    ours = region.run(q, k, v)
    if not np.isfinite(ours).all() or np.any(region.run(q, k, np.zeros_like(v))):
        return float("inf")  # not a number, or something beside the values
    worst = 0.0
    for h in range(heads):
        weights = _weights(found, h, tokens, list(range(tokens)))
        for b in range(batch):
            scores = (q[b, h] @ k[b, h].T) * weights
            if found.normalised:
                scores /= scores.sum(axis=-1, keepdims=True) + found.epsilon
            want = found.scale * (scores @ v[b, h])
            worst = max(worst, float(np.abs(ours[b, h] - want).max() / np.abs(want).max()))
    return worst if np.isfinite(worst) else float("inf")
