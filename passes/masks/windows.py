"""Swin's shifted windows where each window is a batch entry: one mask a window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from attncompile.core.grid_pattern import ShiftedWindows
from attncompile.passes.masks.on_grid import factorizations

_MAX_ELEMENTS = 1 << 26


def shifted_windows(seen: np.ndarray) -> ShiftedWindows | None:
    """The shifted windows that give exactly ``seen``, bool [nW, N, N]: fewest axes first, the most even cut first."""
    count, tokens = seen.shape[:2]
    if seen.shape != (count, tokens, tokens) or count < 2 or seen.size > _MAX_ELEMENTS or seen.all():
        return None
    for pattern in _proposals(seen[-1], count, tokens):
        if np.array_equal(pattern.visible_windows(), seen):
            return pattern
    return None


def _proposals(last: np.ndarray, count: int, tokens: int) -> Iterator[ShiftedWindows]:
    """``last`` [N, N]: in the last window all axes meet their other end."""
    for rank in (1, 2, 3):
        windows = [s for s in _cuts(count, rank) if len(s) == rank]
        for window, cut in product(factorizations(tokens, rank), windows):
            shift = _shift(last.reshape(window + window))
            if shift is not None and any(shift):
                yield ShiftedWindows(cut, window, shift)


def _cuts(count: int, rank: int) -> list[tuple[int, ...]]:
    """Ways to write ``count`` as a product of ``rank`` sizes of at least 1, the most even first."""
    if rank == 1:
        return [(count,)]
    found = [(a, *rest) for a in range(1, count + 1) if count % a == 0 for rest in _cuts(count // a, rank - 1)]
    return sorted(found, key=lambda shape: (max(shape) / min(shape), shape))


def _shift(seen: np.ndarray) -> tuple[int, ...] | None:
    """For each axis the size of the second of two cells, 0 where there is one."""
    rank, shifts = seen.ndim // 2, []
    for axis in range(rank):
        one = np.asarray(seen.any(axis=tuple(a for a in range(2 * rank) if a % rank != axis)))
        first = int(one[0].sum())
        size = len(one)
        cells = np.arange(size) >= first
        if not one[0, :first].all() or not np.array_equal(one, cells[:, None] == cells[None, :]):
            return None
        shifts.append(size - first)
    return tuple(shifts)
