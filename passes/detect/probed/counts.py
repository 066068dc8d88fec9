"""How often each key counts in a query's softmax, read off a region's outputs when all scores are equal.

Blocks that are gathered beside one another may hold a key twice (BigBird's random blocks): its weight is then twice
that of the others. Weights are known up to a common factor, which leaves a softmax as it is.
"""

from __future__ import annotations

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.visible import Run, Sizes, spread, whole_numbers, zeros

LARGEST = 15
"""The largest count that is read: with 16 as the base, the counts of three keys fit into one number below 4,096."""

_BASE, _KEYS = 16, 3


def counted_keys(run: Run, s: Sizes) -> np.ndarray:
    """uint8 [B, H, Nq, Nk], 0 where a key is not seen; the counts of a query have no common factor.

    Raises:
        Unsupported: with equal scores, the weights of the keys that a query sees are no small multiples of a number.
    """
    first = _first_weights(run, s)
    shares = _shares(run, s, first)
    counts = np.zeros((s.batch, s.heads, s.queries, s.keys), np.uint8)
    pending = first > 0
    for of_first in range(1, LARGEST + 1):  # how often the first key counts: unknown, and the same for a whole query
        at = np.nonzero(pending)
        found, right = _digits(shares[at] * np.float32(of_first), s.keys)
        right &= np.abs(found.sum(axis=-1) - of_first / first[at]) <= 0.1
        done = tuple(axis[right] for axis in at)
        counts[done], pending[done] = found[right], False
        if not pending.any():
            return counts
    raise Unsupported("unequal-weights", "keys that a query sees do not have equal weights for equal scores, nor whole "
                      "multiples of one")  # fmt: skip


def _first_weights(run: Run, s: Sizes) -> np.ndarray:
    """[B, H, Nq]: the weight of one of the keys that a query sees; 0 for a query that sees none."""
    weights = np.zeros((s.batch, s.heads, s.queries))
    q, k, v = zeros(s)
    for token in spread(s.keys, s.value_dim):
        v[:] = 0.0
        v[:, :, token, np.arange(len(token))] = 1.0
        best = run(q, k, v).max(axis=-1).astype(np.float64)
        found = (weights == 0) & (best > 0.5 / (LARGEST * s.keys))
        weights[found] = best[found]
        if weights.all():
            break
    return weights


def _shares(run: Run, s: Sizes, first: np.ndarray) -> np.ndarray:
    """float32 [B, H, Nq, ceil(Nk / 3)]: three keys' weights as digits, in units of the first key's weight."""
    out = np.zeros((s.batch, s.heads, s.queries, -(-s.keys // _KEYS)), np.float32)
    unit = np.where(first > 0, first, 1.0)[..., None]
    q, k, v = zeros(s)
    for start in range(0, s.keys, s.value_dim * _KEYS):
        token = np.arange(start, min(start + s.value_dim * _KEYS, s.keys))
        channel, digit = (token - start) // _KEYS, (token - start) % _KEYS
        v[:] = 0.0
        v[:, :, token, channel] = float(_BASE) ** digit
        many = int(channel[-1]) + 1
        out[..., start // _KEYS : start // _KEYS + many] = run(q, k, v)[..., :many] / unit
    return out


def _digits(numbers: np.ndarray, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [R, keys] digits of ``numbers`` [R, channels], and bool [R]: whether all of the row's are whole numbers."""
    whole, right = whole_numbers(numbers, _BASE**_KEYS - 1)
    codes = np.where(right[:, None], whole, 0).astype(np.uint16)
    digits = np.stack([(codes >> (4 * d)) & 15 for d in range(_KEYS)], axis=-1).astype(np.uint8)
    return digits.reshape(len(codes), -1)[:, :keys], right
