"""Which keys each query sees, read off a region's outputs when all scores are equal: each is then a plain mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from attncompile.core.errors import Unsupported

Run = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The region: float32 q [B, H, Nq, D], k and v [B, H, Nk, D] -> [B, H, Nq, D]."""

BITS = 12
"""Keys that one channel of V tells apart, each by a power of two: a mean times the number of keys seen is then a whole
number below 4,096, and a rounding of float32 moves it by far less than a half.
"""

_WHOLE = 0.1
"""How far from a whole number a count may be read."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a region's operands."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int


def zeros(s: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v of nothing but zeros."""
    q = np.zeros((s.batch, s.heads, s.queries, s.dim), np.float32)
    k = np.zeros((s.batch, s.heads, s.keys, s.dim), np.float32)
    return q, k, np.zeros((s.batch, s.heads, s.keys, s.value_dim), np.float32)


def visible_keys(run: Run, s: Sizes) -> np.ndarray:
    """Bool [B, H, Nq, Nk].

    Raises:
        Unsupported: with equal scores, the keys that a query sees do not have equal weights.
    """
    counts = _counts(run, s)
    seen = np.zeros((s.batch, s.heads, s.queries, s.keys), dtype=bool)
    q, k, v = zeros(s)
    for start in range(0, s.keys, s.value_dim * BITS):
        token = np.arange(start, min(start + s.value_dim * BITS, s.keys))
        channel, bit = (token - start) // BITS, (token - start) % BITS
        v[:] = 0.0
        v[:, :, token, channel] = 2.0**bit
        codes = _whole(run(q, k, v).astype(np.float64) * counts[..., None], (1 << BITS) - 1).astype("<u2")
        bits = np.unpackbits(codes.view(np.uint8).reshape(*codes.shape, 2), axis=-1, bitorder="little")[..., :BITS]
        seen[..., start : start + len(token)] = bits.reshape(*codes.shape[:-1], -1)[..., : len(token)]
    if not np.array_equal(seen.sum(axis=-1), counts):
        raise Unsupported("unequal-weights", "keys that a query sees do not have equal weights for equal scores")
    return seen


def _counts(run: Run, s: Sizes) -> np.ndarray:
    """Int [B, H, Nq]: how many keys a query sees. One key alone in a channel of V gives one over that number to the
    queries that see it; keys far apart come first, so that most masks need one run.
    """
    counts = np.zeros((s.batch, s.heads, s.queries), dtype=np.int64)
    q, k, v = zeros(s)
    for token in spread(s.keys, s.value_dim):
        v[:] = 0.0
        v[:, :, token, np.arange(len(token))] = 1.0
        weight = run(q, k, v).max(axis=-1).astype(np.float64)
        found = (counts == 0) & (weight > 0.5 / s.keys)
        counts[found] = _whole(1.0 / weight[found], s.keys)
        if counts.all():
            break
    return counts


def spread(keys: int, channels: int) -> Iterator[np.ndarray]:
    """All keys in groups of at most ``channels``, the keys of a group far apart."""
    groups = -(-keys // channels)
    for first in range(groups):
        yield np.arange(first, keys, groups)


def whole_numbers(numbers: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest whole numbers, and whether all along the last axis are near them and in 0 .. ``largest``."""
    whole: np.ndarray = np.rint(numbers)
    near = (np.abs(numbers - whole) <= _WHOLE) & (whole >= 0) & (whole <= largest)
    return whole, np.asarray(near.all(axis=-1))


def _whole(numbers: np.ndarray, largest: int) -> np.ndarray:
    whole, near = whole_numbers(numbers, largest)
    if not bool(near.all()):
        raise Unsupported("unequal-weights", "keys that a query sees do not have equal weights for equal scores")
    return whole
