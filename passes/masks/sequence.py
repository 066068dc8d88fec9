"""Proposals along a sequence, read from the ends of the rows: prefix, dilated, blocked, documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attncompile.core.grid_pattern import Blocked
from attncompile.core.sequence_pattern import Dilated, Documents, Prefix
from attncompile.passes.masks.picture import Look
from attncompile.passes.masks.proposal import Proposal


def along_sequence(look: Look, causal: bool, fixed: bool) -> Iterator[Proposal]:
    """Simplest first. ``causal``: a causal mask stands beside the structure; ``fixed``: the length never changes."""
    if not look.filled.all():
        return
    if not causal:
        if not look.causal and look.single:
            yield from _prefix(look)
        yield from _dilated(look)
    if look.single:
        yield from _blocked(look, causal)
        if fixed and look.square:
            yield from _documents(look, causal)


def _prefix(look: Look) -> Iterator[Proposal]:
    tokens = int(look.last[look.last > look.position].max()) + 1
    if tokens < look.keys and not look.first.any():
        yield Proposal("prefix", Prefix(tokens))


def _dilated(look: Look) -> Iterator[Proposal]:
    rows = sorted({0, look.queries // 2, look.queries - 1})
    apart = [np.flatnonzero(look.visible[row]) - look.position[row] for row in rows]
    dilation = int(np.gcd.reduce(np.concatenate(apart)))
    left, right = int((look.position - look.first).max()), int((look.last - look.position).max())
    if dilation < 2 or left < 0 or right < 0:
        return
    reach = [(size - 1) // dilation * dilation for size in (look.keys, look.queries)]
    yield Proposal("dilated", Dilated(dilation, -1 if left >= reach[0] else left, -1 if right >= reach[1] else right))


def _blocked(look: Look, causal: bool) -> Iterator[Proposal]:
    for window, shift in _cells(look, causal):
        mine, low, high = ((x - shift) // window for x in (look.position, look.first, look.last))
        before, after = int((mine - low).max()), 0 if causal else int((high - mine).max())
        if before >= 0 and after >= 0:
            yield Proposal("blocked", Blocked((window,), (shift,), before=before, after=after), causal)


def _cells(look: Look, causal: bool) -> list[tuple[int, int]]:
    """(window, shift) of cells of one size: rows change where a cell begins, and begin and end where cells do."""
    change = look.first[1:] != look.first[:-1]
    if not causal:
        change = change | (look.last[1:] != look.last[:-1])
    ends = [] if causal else [look.last + 1]
    starts = np.unique(np.concatenate([look.position[1:][change], look.first, *ends]))
    starts = starts[(starts > 0) & (starts < look.keys)]
    if len(starts) >= 2:
        window = int(np.diff(starts).min())
        return [(window, int(starts[0]) % window)]
    if len(starts) == 0:
        return []
    start, rest = int(starts[0]), look.keys - int(starts[0])
    return [(start, 0)] if rest <= start else [(rest, start)]


def _documents(look: Look, causal: bool) -> Iterator[Proposal]:
    starts = np.flatnonzero(look.first[1:] != look.first[:-1]) + 1
    if len(starts):
        lengths = np.diff([0, *starts.tolist(), look.keys])
        yield Proposal("document", Documents(tuple(int(n) for n in lengths)), causal)
