"""Other orders of the tokens for one head, of the grid's axes (PAROAttention, arXiv:2506.16054) and tile by tile
(sliding tile attention, arXiv:2502.04507): which are looked at, and what is offered in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from math import prod

import numpy as np

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, bitmap, ordered, streaming
from attncompile.search.candidates import KEPT, windows

Order = tuple[int, ...]

HELD = 0.9
"""Share of a head's weight whose blocks are counted to compare orders."""

FEWER = 0.9
"""An order is looked at further where it needs less than this of the blocks: maps of random numbers differ too."""

SINKS = (0, 1)
"""First blocks of keys that windows go with."""


def axis_orders(geometry: BlockGeometry) -> tuple[Order, ...]:
    """Orders in which the tokens of a site follow one another differently, in other ways than as they stand."""
    grid = geometry.grid
    if grid is None or geometry.causal:
        return ()
    known = {np.arange(grid.tokens).tobytes()}
    found = []
    for order in (*permutations(range(len(grid.shape))), *_tiles(geometry)):
        places = grid.ordered(order).tobytes()
        if places not in known:
            known.add(places)
            found.append(order)
    return tuple(found)


def _tiles(geometry: BlockGeometry) -> Iterator[Order]:
    """Sides of a tile that is one block of an image or of frames, as nearly equal as powers of two are."""
    grid = geometry.grid
    axes = len(grid.shape) if grid is not None else 0
    if grid is None or axes < 2:
        return
    sides, axis = [1] * axes, axes - 1
    while prod(sides) < geometry.edge:  # the last axis first: its tokens stand together anyway
        sides[axis] *= 2
        axis = (axis - 1) % axes
    if all(side <= have for side, have in zip(sides, grid.shape, strict=True)) and min(sides) > 1:
        yield tuple(sides)


def offered(mass: np.ndarray, masses: Mapping[Order, np.ndarray], geometry: BlockGeometry) -> list[BlockPattern]:
    """Patterns in the order that gathers a head's weight in the fewest blocks, the sparsest first; none where it needs
    about as many as tokens need as they stand. ``mass`` [R, R] is the head's map as they stand, ``masses`` by order.
    """
    if not masses:
        return []
    order = min(masses, key=lambda o: _needed(masses[o], HELD))
    there = masses[order]
    if _needed(there, HELD) >= FEWER * _needed(mass, HELD):
        return []
    total = max(float(there.sum()), 1e-30)
    known = {geometry.all.tobytes()}
    found: list[tuple[int, BlockPattern]] = []
    for pattern in _patterns(there, geometry):
        seen = pattern.blocks(geometry)
        blocks, held = int(seen.sum()), float(there[seen].sum()) / total
        if seen.tobytes() not in known and blocks < _needed(mass, held):
            known.add(seen.tobytes())
            found.append((blocks, ordered(order, pattern)))
    return [p for _, p in sorted(found, key=lambda x: x[0])]


def _patterns(mass: np.ndarray, geometry: BlockGeometry) -> Iterator[BlockPattern]:
    """Without a grid of their own: of equal blocks the first text stays."""
    for window in windows(geometry.count):
        for sinks in SINKS:
            yield streaming(sinks, window)
    for level in KEPT:
        seen = np.eye(len(mass), dtype=bool)
        seen.reshape(-1)[_heaviest(mass)[: _needed(mass, level) - len(mass)]] = True
        yield bitmap(seen)


def _heaviest(mass: np.ndarray) -> np.ndarray:
    """Blocks beside the diagonal, the heaviest first."""
    left = mass.astype(np.float64)
    np.fill_diagonal(left, -1)
    return np.argsort(-left.reshape(-1), kind="stable")[: mass.size - len(mass)]


def _needed(mass: np.ndarray, share: float) -> int:
    """The fewest blocks, the diagonal among them, that hold this share of the weight."""
    beside = mass.reshape(-1)[_heaviest(mass)].astype(np.float64)
    held = float(np.trace(mass)) + np.concatenate([[0.0], np.cumsum(beside)])
    enough = int(np.searchsorted(held, share * float(mass.sum()) * (1 - 1e-6)))
    return len(mass) + min(enough, len(beside))
