"""Which patterns are offered for one head: from its mean map over the calibration inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attncompile.core.block_pattern import (
    DENSE,
    MEAN,
    SKIP,
    BlockGeometry,
    BlockPattern,
    bitmap,
    slash,
    streaming,
    with_rest,
)
from attncompile.core.errors import Unsupported

KEPT = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
"""Shares of the attention weight that chosen blocks are to hold."""

SINKS = (0, 1, 2)
"""First blocks of keys that windows go with."""

RADIAL = ("radial", "radial 0.5", "radial 0.25", "radial 2")
"""Radial attention over video, as in the paper, and with other windows."""

POOLED = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7)
"""Shares of blocks that are chosen by their means."""

HELD = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Shares of the estimated weight that blocks which are chosen by antidiagonals hold."""

THETAS = (0.5, 1, 2, 4, 6, 8, 12)
"""Distances from the anchor of blocks that are chosen by it, in logits."""

HELD_BESIDE_MEANS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9)
"""The same where what is not chosen is met by its means, so that less has to be."""

GRID_SHARES = (0.15, 0.25, 0.375, 0.5, 0.75)
"""Sides of neighborhoods, as shares of the grid's."""

BALL_SHARES = (*GRID_SHARES, 1.0)
"""Diameters of balls, likewise (``TokenGrid.ball``)."""


def candidates(mass: np.ndarray, geometry: BlockGeometry, average: bool) -> list[BlockPattern]:
    """Patterns with different blocks, dense first, then the sparsest first. ``mass`` [R, R] as of ``maps.masses``.
    ``average``: whether the mean of all values may be offered; else nothing is, zero.
    """
    dense = geometry.all
    known = {dense.tobytes()}
    found: list[tuple[int, BlockPattern]] = []
    for pattern in _offered(mass, geometry):
        try:
            seen = pattern.blocks(geometry)
        except Unsupported:
            continue  # a neighborhood that does not fit the grid
        if seen.tobytes() not in known:
            known.add(seen.tobytes())
            found.append((int(seen.sum()), pattern))
    ordered = [p for _, p in sorted(found, key=lambda x: x[0])]
    return [DENSE, MEAN if average and not geometry.causal else SKIP, *ordered]


def mean_size(geometry: BlockGeometry) -> int:
    """Keys of a mean beside patterns that are fixed: their blocks cannot follow what an input looks at, and finer means
    say more of it than blocks of the same cost.
    """
    return geometry.edge // 4


def beside_means(mass: np.ndarray, geometry: BlockGeometry) -> list[BlockPattern]:
    """Patterns that meet what they leave out by its means, the sparsest first; ``mass`` as of ``candidates``."""
    known: set[bytes] = set()
    found: list[tuple[int, BlockPattern]] = []
    near = (streaming(sinks, window) for window in windows(geometry.count) for sinks in SINKS[:2])
    for pattern in (*near, *_blocks(mass, geometry)):
        seen = pattern.blocks(geometry)
        if seen.tobytes() not in known and not seen[geometry.all].all():
            known.add(seen.tobytes())
            found.append((int(seen.sum()), with_rest(pattern, mean_size(geometry))))
    return [p for _, p in sorted(found, key=lambda x: x[0])]


def selections() -> list[list[str]]:
    """What heads may choose by when the model runs, a list for each way."""
    ways = (("pooled", POOLED), ("xattention", HELD), ("anchor", THETAS))
    return [[f"{way} {amount:g}" for amount in amounts] for way, amounts in ways]


def selections_beside_means(geometry: BlockGeometry) -> list[list[str]]:
    """The same with one mean of each block that is not chosen."""
    ways = (("pooled", POOLED), ("xattention", HELD_BESIDE_MEANS), ("anchor", THETAS))
    return [[f"{way} {amount:g} rest {geometry.edge}" for amount in amounts] for way, amounts in ways]


def _offered(mass: np.ndarray, geometry: BlockGeometry) -> Iterator[BlockPattern]:
    """Simple ones first: of equal blocks the first text stays."""
    for window in windows(geometry.count):
        for sinks in SINKS:
            yield streaming(sinks, window)
    if geometry.grid is not None and len(geometry.grid.shape) > 1 and not geometry.causal:
        for share in GRID_SHARES:
            kernel = [min(side, 2 * int(side * share / 2) + 1) for side in geometry.grid.shape]
            yield BlockPattern("grid " + "x".join(map(str, kernel)))
        for share in BALL_SHARES:
            yield BlockPattern("ball " + "x".join(map(str, geometry.grid.ball(share))))
        if len(geometry.grid.shape) == 3:
            yield from (BlockPattern(text) for text in RADIAL)
    yield from _lines(mass, geometry)
    yield from _blocks(mass, geometry)


def windows(count: int) -> list[int]:
    """Distances in blocks that windows reach, but for those that reach everything."""
    sizes, size = [0, 1, 2, 3, 4], 6
    while size < count:
        sizes.append(size)
        size = size * 4 // 3
    return [s for s in sizes if s < count - 1]


def _lines(mass: np.ndarray, geometry: BlockGeometry) -> Iterator[BlockPattern]:
    """Columns and diagonals: always the line with the most weight a block that is not covered yet, until enough is."""
    count = geometry.count
    left = np.where(geometry.all, mass, 0).astype(np.float64)
    free = geometry.all.astype(np.float64)
    place = np.arange(count)
    behind = (place[:, None] - place[None, :] + count - 1).reshape(-1)  # which diagonal, from 0
    total = left.sum()
    np.fill_diagonal(left, 0)
    np.fill_diagonal(free, 0)
    columns: list[int] = []
    diagonals: list[int] = []
    levels = list(KEPT)
    while levels and total > 0:
        covered = 1 - left.sum() / total
        while levels and covered >= levels[0]:
            levels.pop(0)
            if columns or diagonals:
                yield slash(columns, diagonals)
        sums = np.concatenate([left.sum(axis=0), np.bincount(behind, left.reshape(-1), 2 * count - 1)])
        sizes = np.concatenate([free.sum(axis=0), np.bincount(behind, free.reshape(-1), 2 * count - 1)])
        if not sizes.any():
            return
        best = int(np.argmax(sums / np.maximum(sizes, 1) - (sizes == 0)))
        if best < count:
            columns.append(best)
            left[:, best] = free[:, best] = 0
        else:
            diagonals.append(best - count - (count - 1))
            on = (behind == best - count).reshape(count, count)
            left[on] = free[on] = 0


def _blocks(mass: np.ndarray, geometry: BlockGeometry) -> Iterator[BlockPattern]:
    """The fewest blocks that hold so much of the weight, the diagonal among them."""
    left = np.where(geometry.all, mass, 0).astype(np.float64)
    total = left.sum()
    own = np.trace(left)
    np.fill_diagonal(left, -1)
    order = np.argsort(-left.reshape(-1), kind="stable")
    held = own + np.cumsum(np.maximum(left.reshape(-1)[order], 0))
    for level in KEPT:
        enough = int(np.searchsorted(held, level * total)) + 1
        seen = np.eye(geometry.count, dtype=bool)
        seen.reshape(-1)[order[:enough]] = True
        yield bitmap(seen & geometry.all)
