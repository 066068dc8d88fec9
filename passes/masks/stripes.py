"""Proposals of windows joined with something that all see or that comes again: global tokens, stripes, strides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attncompile.core.sequence_pattern import UNLIMITED, FixedStripes, GlobalLocal, Range, Strided, Stripes
from attncompile.passes.masks.picture import Look
from attncompile.passes.masks.proposal import Proposal

_MAX_RANGES = 32
"""A mask of more stripes than this is no longer said by them."""


def with_stripes(look: Look, causal: bool, fixed: bool) -> Iterator[Proposal]:
    """Simplest first. ``causal``: a causal mask stands beside the structure; ``fixed``: the length never changes."""
    if look.square:
        yield from _global(look, causal, fixed)
    columns = np.flatnonzero(look.full_columns(causal))
    diagonals = look.full_diagonals(causal)
    yield from _strided(diagonals, causal)
    if look.causal and not causal:
        yield from _strided(diagonals, True)  # simpler than all its diagonals one by one
    if causal:
        yield from _fixed_stripes(columns)
    yield from _stripes(look, columns, diagonals, causal)


def ranges(numbers: np.ndarray) -> tuple[Range, ...]:
    """Runs of neighbouring integers, of an ascending array."""
    if not len(numbers):
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    starts, ends = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
    return tuple((int(a), int(b)) for a, b in zip(starts, ends, strict=True))


# Global tokens.


def _global(look: Look, causal: bool, fixed: bool) -> Iterator[Proposal]:
    tokens = look.full_rows(causal) & look.full_columns(causal)
    if not tokens.any() or tokens.all():
        return
    rest = look.visible.copy()
    rest[tokens], rest[:, tokens] = False, False
    left_over = Look(rest)
    if left_over.filled.any():
        reach = _reach(left_over, causal)
        needed = tokens & ~_within(look, reach, causal)
        yield from _named(needed, reach, 1, look.keys, (), causal)
    block = _block(look) if not causal else 1
    if block > 1:
        yield from _global_blocks(look, block, fixed)


def _reach(rest: Look, causal: bool) -> Range:
    left = int((rest.position - rest.first)[rest.filled].max())
    right = 0 if causal else int((rest.last - rest.position)[rest.filled].max())
    return left, right


def _within(look: Look, reach: Range, causal: bool) -> np.ndarray:
    """Bool [tokens]: all that the token sees and is seen by lies in the window."""
    where, (left, right) = look.position, reach
    last = where if causal else np.full(look.keys, look.keys - 1)
    behind = (where <= left) & (causal | (last - where <= right))
    ahead = (look.keys - 1 - where <= left) & (causal | (where <= right))
    return np.asarray(behind & ahead)


def _named(
    tokens: np.ndarray, reach: Range, block: int, keys: int, random: tuple[tuple[int, ...], ...], causal: bool
) -> Iterator[Proposal]:
    runs = ranges(np.flatnonzero(tokens))
    if not runs or len(runs) > _MAX_RANGES or min(reach) < 0:
        return
    first = runs[0][1] + 1 if runs[0][0] == 0 else 0
    last = keys - runs[-1][0] if runs[-1][1] == keys - 1 else 0
    inner = tuple(r for r in runs if r[0] != 0 and r[1] != keys - 1)
    yield Proposal("global", GlobalLocal(*reach, block, first, last, inner, random), causal)


def _block(look: Look) -> int:
    """The edge of the blocks whose rows and columns are alike."""
    seen = look.visible
    rows = np.flatnonzero(np.any(seen[1:] != seen[:-1], axis=1)) + 1
    columns = np.flatnonzero(np.any(seen[:, 1:] != seen[:, :-1], axis=0)) + 1
    return int(np.gcd.reduce(np.concatenate([rows, columns]))) if len(rows) + len(columns) else 1


def _global_blocks(look: Look, block: int, fixed: bool) -> Iterator[Proposal]:
    small = Look(np.ascontiguousarray(look.visible[::block, ::block]))
    tokens = small.full_rows(False) & small.full_columns(False)
    if not tokens.any() or tokens.all():
        return
    others = np.flatnonzero(~tokens)
    local = small.visible[np.ix_(others, others)]
    apart = others[None, :] - others[:, None]
    sides = []
    for sign in (-1, 1):
        size = 0
        while np.any(apart == sign * (size + 1)) and bool(np.all(local[apart == sign * (size + 1)])):
            size += 1
        sides.append(size)
    left, right = sides
    further = local & ((apart < -left) | (apart > right))
    random: tuple[tuple[int, ...], ...] = ()
    if further.any():
        if not fixed:
            return
        chosen: list[tuple[int, ...]] = [()] * small.keys
        for row, line in zip(others, further, strict=True):
            chosen[int(row)] = tuple(int(x) for x in others[line])
        random = tuple(chosen)
    yield from _named(np.repeat(tokens, block)[: look.keys], (left, right), block, look.keys, random, False)


# Stripes.


def _strided(diagonals: np.ndarray, causal: bool) -> Iterator[Proposal]:
    runs = ranges(diagonals)
    own = next((r for r in runs if r[0] <= 0 <= r[1]), None)
    others = [x for r in runs if r != own for x in range(r[0], r[1] + 1)]
    if own is None or len(others) < 2:
        return
    period = int(np.gcd.reduce(np.array(others)))
    if period >= 2:
        # A window that ends with a stride's key is no longer than one that ends before it.
        left, right = (x - 1 if x and x % period == 0 else x for x in (-own[0], 0 if causal else own[1]))
        yield Proposal("stripe", Strided(period, left, right), causal)


def _fixed_stripes(columns: np.ndarray) -> Iterator[Proposal]:
    runs = ranges(columns)
    if len(runs) < 2:
        return
    period, summary = runs[1][0] - runs[0][0], runs[0][1] - runs[0][0] + 1
    if runs[0][0] == period - summary:
        yield Proposal("stripe", FixedStripes(period, summary), True)


def _stripes(look: Look, columns: np.ndarray, diagonals: np.ndarray, causal: bool) -> Iterator[Proposal]:
    low, high = -(look.keys - 1), look.queries - 1
    if causal:
        diagonals = diagonals[diagonals <= 0]
    whole, further = ranges(diagonals), _beyond_columns(look, columns, diagonals)
    for kept_columns, kept_diagonals in (
        (_beyond_diagonals(look, columns, further, causal), further),
        (columns, further),
        (_beyond_diagonals(look, columns, diagonals, causal), diagonals),
        (columns, diagonals),
    ):
        runs, stripes = ranges(kept_diagonals), ranges(kept_columns)
        if not 1 <= len(runs) + len(stripes) <= _MAX_RANGES:
            continue
        if stripes and look.causal and not causal:
            continue  # the first key alone is such a stripe too: it is said as the wider ones are, beside causal
        # What the columns explain at the far ends may belong to the diagonals all the same.
        lowest = whole[0][1] if whole and whole[0][0] == low else -UNLIMITED
        highest = whole[-1][0] if whole and whole[-1][1] == high else UNLIMITED
        ends = [(-UNLIMITED if a <= lowest else a, UNLIMITED if b >= highest else b) for a, b in runs]
        if causal:
            ends = [(a, b) for a, b in ends if a <= 0]
        yield Proposal("stripe", Stripes(tuple(ends), stripes), causal)


def _beyond_columns(look: Look, columns: np.ndarray, diagonals: np.ndarray) -> np.ndarray:
    """Diagonals with at least one pair outside of the columns."""
    outside = np.ones(look.keys, dtype=bool)
    outside[columns] = False
    counts = np.r_[0, np.cumsum(outside)]
    start = np.maximum(diagonals + look.keys - look.queries, 0)
    stop = np.minimum(diagonals + look.keys, look.keys)
    return np.asarray(diagonals[counts[stop] > counts[start]])


def _beyond_diagonals(look: Look, columns: np.ndarray, diagonals: np.ndarray, causal: bool) -> np.ndarray:
    """Columns with at least one pair outside of the diagonals."""
    off = np.ones(look.queries + look.keys - 1, dtype=bool)
    off[diagonals + look.keys - 1] = False
    counts = np.r_[0, np.cumsum(off)]
    # Column j meets the distances j - (keys - 1) .. j - (keys - queries), those up to 0 where causal.
    start, stop = columns, columns + look.queries
    if causal:
        stop = np.minimum(stop, look.keys)
    return np.asarray(columns[counts[stop] > counts[start]])
