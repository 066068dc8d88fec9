"""What a region does with tokens that an input hides, read by running it with masks that tell tokens apart.

Every number that is added to a score is a sum of terms of single tokens (``mask_paths``), so a score is hidden where
one of its tokens is. Each token is hidden in masks of its own, equally many for every token: a score that two tokens
hide is hidden in more of them, and where it is one token, the masks say which. Products of numbered keys say whose
score it is. What is set to zero behind the softmax are whole rows, each by one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskedRows
from attncompile.passes.detect.probed.reading import Reading, attention, check_scores, random_operands
from attncompile.passes.detect.probed.visible import Sizes, zeros
from attncompile.passes.detect.scores import HIDDEN

TOLERANCE = 2e-5
"""Largest difference relative to values of 1: a key more or less among 16,000 changes a mean by three times this."""

MaskedRun = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, list[np.ndarray]]]
"""The region: q, k, v with heads before tokens, and a mask [B, N] of zeros and ones -> [B, H, N, D], and what its
softmaxes read.
"""


@dataclass(frozen=True, slots=True)
class Padding:
    """``zeroed``: a query whose own token is hidden gives zero, whatever it sees. ``masked_rows``: what a query gives
    that sees no key.
    """

    zeroed: bool
    masked_rows: MaskedRows


def read_padding(run: MaskedRun, s: Sizes, reading: Reading, seed: int = 0) -> Padding:
    """What hidden tokens do, shown for every mask of zeros and ones. ``reading`` is what the region is where none is.

    Raises:
        Unsupported: they do not hide keys, the same for all queries and heads.
    """
    if s.queries != s.keys:
        raise Unsupported("padding-enters", f"the padding is of {s.keys} tokens for {s.queries} queries")
    rng = np.random.default_rng(seed)
    keys = _keys_of_scores(run, s, reading.scale)
    hidden = [np.zeros(numbers.shape, np.int32) for numbers in keys]  # bit n: hidden by mask n
    q, k, v = random_operands(s, rng)
    q[:], v[:] = 0.0, np.sign(v)
    same = bool(np.all(reading.counts == reading.counts[:1]))
    shared = reading.counts[:1] if same else reading.counts
    zeroed: bool | None = None
    codes = np.zeros(s.batch * s.keys, np.int64)
    for number, mask in enumerate(_masks(s)):
        codes |= (1 - mask.reshape(-1)) << number
        out, logits = run(q, k, v, mask)
        check_scores(logits)
        for bits, scores in zip(hidden, logits, strict=True):
            bits |= (scores <= HIDDEN).astype(np.int32) << number
        if zeroed is None:
            zeroed = _is_zeroed(out, reading.counts, mask)
        _check(out, _means(v, shared, mask), mask, zeroed)
    for bits, numbers in zip(hidden, keys, strict=True):
        shown = numbers >= 0
        if not np.array_equal(bits[shown], codes[numbers[shown]]):
            raise Unsupported("padding-enters", "a score is not hidden by its own key's token, or by another one too")
    assert zeroed is not None
    for mask in _usual(s, rng):
        q, k, v = random_operands(s, rng)
        q *= np.float32(1.0 / (abs(reading.scale) * s.dim**0.5))
        _check(run(q, k, v, mask)[0], attention(q, k, v, reading.counts, reading.scale, mask), mask, zeroed)
    return Padding(zeroed, _masked_rows(run, s, reading.counts, zeroed))


def _keys_of_scores(run: MaskedRun, s: Sizes, scale: float) -> list[np.ndarray]:
    """Of every number that a softmax reads the token of its key, counted through the batch; -1 where it is hidden
    though no token is.
    """
    number = np.arange(s.batch * s.keys, dtype=np.float32).reshape(s.batch, 1, s.keys)
    q, k, v = zeros(s)
    q[..., 0], k[..., 0] = 1.0 / scale, number
    _, logits = run(q, k, v, np.ones((s.batch, s.keys), np.int64))
    found = []
    for scores in logits:
        shown = scores > HIDDEN
        near = np.rint(np.where(shown, scores, -1.0))
        if bool((shown & ((np.abs(scores - near) > 0.1) | (near < 0) | (near >= number.size))).any()):
            raise Unsupported("padding-enters", "what a softmax reads is not one product of a query and a key each")
        found.append(near.astype(np.int32))
    return found


def _means(v: np.ndarray, counts: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What attention gives for equal scores: float32 [B, H, Nq, Dv] from v [B, H, Nk, Dv], ``counts`` [H or 1, Nq, Nk];
    NaN where no key is seen.
    """
    out = np.empty((v.shape[0], v.shape[1], counts.shape[1], v.shape[3]), np.float32)
    for b in range(len(v)):
        for at, times in enumerate(counts):
            heads = slice(None) if len(counts) == 1 else slice(at, at + 1)
            weights = times * (mask[b] > 0).astype(np.float32)
            total = weights.sum(axis=-1, keepdims=True)
            flat = v[b, heads].transpose(1, 0, 2).reshape(v.shape[2], -1)  # [Nk, heads * Dv]
            with np.errstate(invalid="ignore"):
                mean = (weights @ flat) / total
            out[b, heads] = mean.reshape(len(times), -1, v.shape[3]).transpose(1, 0, 2)
    return out


def _masks(s: Sizes) -> Iterator[np.ndarray]:
    """[B, N] of zeros and ones, in half of which (rounded down) each token is hidden: no two tokens in the same ones.

    Sets of equal size never hold one another (E. Sperner, 1928): 15 masks tell 6,435 tokens apart.
    """
    tokens = s.batch * s.keys
    count = next(n for n in range(2, 32) if comb(n, n // 2) >= tokens)
    hidden = np.array(list(islice(combinations(range(count), count // 2), tokens)))  # [tokens, count // 2]
    for number in range(count):
        yield (hidden != number).all(axis=1).astype(np.int64).reshape(s.batch, s.keys)


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
    out, _ = run(q, k, v, np.zeros((s.batch, s.keys), np.int64))
    if bool(np.isnan(out).all()):
        return "nan"
    if not out.any():
        return "zero"
    raise Unsupported(
        "padding-enters", "queries that see no key average some of the keys that are hidden",
        "export with a mask that gives them zero",
    )  # fmt: skip
