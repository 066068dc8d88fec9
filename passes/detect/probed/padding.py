"""What a region does with tokens that an input hides, read by running it with masks that tell tokens apart.

Every number that is added to a score is a sum of terms of single tokens (``mask_paths``), so a score is hidden where
one of its tokens is. Mask t hides the tokens whose number has bit t, its complement the others. Were a score hidden by
another token than its key's, the two numbers would differ in a bit, and in one of these two masks the key would be
seen or missing where it must not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskedRows
from attncompile.passes.detect.probed.reading import Reading, attention, check_scores, random_operands
from attncompile.passes.detect.probed.visible import Sizes

TOLERANCE = 2e-5
"""Largest difference relative to values of 1: a key more or less among 16,000 changes a mean by three times this."""

MaskedRun = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The region: q, k, v with heads before tokens, and a mask [B, N] of zeros and ones -> [B, H, N, D]."""

MaskedLogits = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Padding:
    """``zeroed``: a query whose own token is hidden gives zero, whatever it sees. ``masked_rows``: what a query gives
    that sees no key.
    """

    zeroed: bool
    masked_rows: MaskedRows


def read_padding(run: MaskedRun, logits: MaskedLogits, s: Sizes, reading: Reading, seed: int = 0) -> Padding:
    """What hidden tokens do, shown for every mask of zeros and ones. ``reading`` is what the region is where none is.

    Raises:
        Unsupported: they do not hide keys, the same for all queries and heads.
    """
    if s.queries != s.keys:
        raise Unsupported("padding-enters", f"the padding is of {s.keys} tokens for {s.queries} queries")
    rng = np.random.default_rng(seed)
    q, k, v = random_operands(s, rng)
    q[:], v[:] = 0.0, np.sign(v)
    zeroed: bool | None = None
    for mask in _masks(s):
        check_scores(logits(q, k, v, mask))
        out = run(q, k, v, mask)
        if zeroed is None:
            zeroed = _is_zeroed(out, reading.counts, mask)
        _check(out, attention(q, k, v, reading.counts, 1.0, mask), mask, zeroed)
    assert zeroed is not None
    for mask in _usual(s, rng):
        q, k, v = random_operands(s, rng)
        q *= np.float32(1.0 / (abs(reading.scale) * s.dim**0.5))
        _check(run(q, k, v, mask), attention(q, k, v, reading.counts, reading.scale, mask), mask, zeroed)
    return Padding(zeroed, _masked_rows(run, s, reading.counts, zeroed))


def _masks(s: Sizes) -> Iterator[np.ndarray]:
    number = np.arange(s.batch * s.keys).reshape(s.batch, s.keys)
    for bit in range(max(1, int(number[-1, -1]).bit_length())):
        seen = number >> bit & 1
        yield seen
        yield 1 - seen


def _usual(s: Sizes, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Left, right and scattered padding, other keys in each batch entry."""
    cut = rng.integers(1, max(2, s.keys // 2), size=(s.batch, 1))
    place = np.arange(s.keys)[None]
    yield (place >= cut).astype(np.int64)
    yield (place < s.keys - cut).astype(np.int64)
    yield (rng.random((s.batch, s.keys)) < 0.7).astype(np.int64)


def _is_zeroed(out: np.ndarray, counts: np.ndarray, mask: np.ndarray) -> bool:
    """Whether queries whose own token is hidden give zero although they see a key."""
    sees = np.stack([(counts[:, :, row > 0] > 0).any(axis=-1) for row in mask])  # [B, H, Nq]
    hidden = sees & (mask == 0)[:, None]
    return bool(hidden.any()) and not out[hidden].any()


def _check(out: np.ndarray, expected: np.ndarray, mask: np.ndarray, zeroed: bool) -> None:
    """``out`` is attention (NaN in ``expected``: no key is seen); rows of hidden queries are zero if ``zeroed``."""
    told = ~np.isnan(expected).any(axis=-1)  # the other queries see no key
    want = expected
    if zeroed:
        hidden = np.broadcast_to((mask == 0)[:, None], told.shape)
        told, want = told | hidden, np.where(hidden[..., None], 0.0, expected)
    finite = bool(np.isfinite(out[told]).all())
    worst = float(np.abs(out[told] - want[told]).max(initial=0.0)) / 4.0 if finite else float("inf")
    if not worst <= TOLERANCE:
        raise Unsupported("padding-enters", "hidden tokens do not hide keys, the same for all queries and heads: the "
                          f"result differs by {worst:.1e}")  # fmt: skip


def _masked_rows(run: MaskedRun, s: Sizes, counts: np.ndarray, zeroed: bool) -> MaskedRows:
    own = np.arange(s.queries)
    if zeroed and bool(counts[:, own, own].all()):
        return "zero"  # who sees no key does not see itself, so is hidden
    q, k, v = random_operands(s, np.random.default_rng(1))
    out = run(q, k, v, np.zeros((s.batch, s.keys), np.int64))
    if bool(np.isnan(out).all()):
        return "nan"
    if not out.any():
        return "zero"
    raise Unsupported(
        "padding-enters", "queries that see no key average some of the keys that are hidden",
        "export with a mask that gives them zero",
    )  # fmt: skip
