"""Cuts a static grid into tiles of queries and lists the keys that each tile meets.

A tile is a box of queries; the keys it meets are the box that holds all their windows, of balls without the corners
that no ball reaches. On each axis tokens are taken line by line of the dilation (a tile never mixes remainders), so
dilated windows are as dense as others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.plugins.neighborhood.op import Neighborhood

COPY = 14.0
"""Cost of gathering one key and its value, in score elements, measured with ONNX Runtime: keeps tiles from getting too
small.
"""

_LARGEST_TABLE = 1 << 26
"""Elements of the mask table beyond which a configuration is refused."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """``tiles`` tiles of ``queries`` queries and ``keys`` keys; edge tiles repeat a token to fill up.

    ``query_index`` [T, q] and ``key_index`` [T, k] count from the first token of the grid; ``slots`` [grid tokens] says
    where in T * q each token's result stands; ``kind`` [T] chooses each tile's mask among ``masks`` [U, q, k].
    """

    tiles: int
    queries: int
    keys: int
    query_index: np.ndarray
    key_index: np.ndarray
    slots: np.ndarray
    kind: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True, slots=True)
class _Axis:
    """Chunks of one axis: query positions [C, t], key positions [C, k], and per kind of chunk which keys are seen
    [U, t, k] and the distance from the window's centre.
    """

    queries: np.ndarray
    keys: np.ndarray
    kind: np.ndarray
    seen: np.ndarray
    distance: np.ndarray


@lru_cache(maxsize=64)
def tiling(hood: Neighborhood, block: int) -> Tiling:
    """The tiles with at most ``block`` queries that touch the fewest score elements. Raises ``Unsupported``."""
    if hood.dynamic:
        raise Unsupported("grid", "tiles need a static grid", "give the grid")
    rank = len(hood.grid)
    windows = [_windows(hood, axis) for axis in range(rank)]
    sizes = [_sizes(min(block, -(-hood.grid[a] // hood.dilation[a]))) for a in range(rank)]
    measured = [{t: _measure(hood, a, *windows[a], t) for t in sizes[a]} for a in range(rank)]

    def work(tile: tuple[int, ...]) -> float:
        counts = [measured[a][t] for a, t in enumerate(tile)]
        return prod(c for c, _ in counts) * _met(hood, [away for _, away in counts]) * (prod(tile) + COPY)

    best = min((t for t in product(*sizes) if prod(t) <= block), key=work)
    axes = [_cut(hood, a, *windows[a], best[a]) for a in range(rank)]
    return _assemble(hood, axes)


def _windows(hood: Neighborhood, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """For every query position of an axis which key positions it sees [n, n], and key minus window centre [n, n]."""
    n, k, left = hood.grid[axis], hood.kernel_size[axis], hood.left[axis]
    d, s = hood.dilation[axis], hood.stride[axis]
    position = np.arange(n)
    line, place = position % d, position // d
    length = (n - line + d - 1) // d  # of the line that a token is on
    group = place // s * s
    same = line[:, None] == line[None, :]
    if hood.causal[axis]:
        leader = np.minimum(group + s - 1, length - 1)[:, None]
        seen = same & (place[None, :] > leader - k) & (place[None, :] <= place[:, None])
        return seen, place[None, :] - leader
    centre = np.minimum(group + s // 2, length - 1)
    if hood.border == "clamp":
        centre = np.clip(centre, left, length - k + left)
    distance = place[None, :] - centre[:, None]
    return same & (distance >= -left) & (distance <= k - 1 - left), distance


def _sizes(most: int) -> list[int]:
    return [t for t in range(1, most + 1) if t <= 16 or t % 8 == 0 or t == most]


def _chunks(hood: Neighborhood, axis: int, size: int) -> list[np.ndarray]:
    """Query positions of each chunk: at most ``size`` neighbours on one line."""
    n, d = hood.grid[axis], hood.dilation[axis]
    lines = [np.arange(r, n, d) for r in range(min(d, n))]
    return [line[i : i + size] for line in lines for i in range(0, len(line), size)]


def _measure(
    hood: Neighborhood, axis: int, seen: np.ndarray, distance: np.ndarray, size: int
) -> tuple[int, np.ndarray]:
    """(number of chunks, of the keys of the largest how far each is from the next window's centre) for one chunk
    size.
    """
    chunks = _chunks(hood, axis, size)
    widest = max(chunks, key=lambda c: int(seen[c].any(axis=0).sum()))
    away = np.where(seen[widest], np.abs(distance[widest]), np.iinfo(np.int64).max).min(axis=0)
    return len(chunks), away[seen[widest].any(axis=0)]


def _met(hood: Neighborhood, away: list[np.ndarray]) -> int:
    """Keys that a tile meets whose keys are so far from the next centre on each axis: a tile is a product of axes, so
    the query that is the next on all of them is in it.
    """
    if hood.shape == "box":
        return prod(len(one) for one in away)
    total = np.zeros((1,) * len(away), np.int64)
    for axis, one in enumerate(away):
        total = total + (one**2 * _weight(hood, axis)).reshape([-1 if a == axis else 1 for a in range(len(away))])
    return int((total <= _reach(hood)).sum())


def _weight(hood: Neighborhood, axis: int) -> int:
    """What a squared distance on this axis counts for in a ball, in whole numbers."""
    return prod(max(left, 1) ** 2 for other, left in enumerate(hood.left) if other != axis)


def _reach(hood: Neighborhood) -> int:
    """The largest sum of such numbers that is in the ball."""
    return prod(max(left, 1) ** 2 for left in hood.left)


def _cut(hood: Neighborhood, axis: int, seen: np.ndarray, distance: np.ndarray, size: int) -> _Axis:
    chunks = _chunks(hood, axis, size)
    met = [np.flatnonzero(seen[c].any(axis=0)) for c in chunks]
    width = max(len(m) for m in met)
    queries = np.stack([np.pad(c, (0, size - len(c)), mode="edge") for c in chunks])
    keys = np.stack([np.append(m, np.repeat(m[-1:] if len(m) else [0], width - len(m))) for m in met])
    real = np.stack([np.arange(width) < len(m) for m in met])  # a repeated key counts once
    seen_of = seen[queries[:, :, None], keys[:, None, :]] & real[:, None, :]
    distance_of = np.where(seen_of, distance[queries[:, :, None], keys[:, None, :]], 0)
    both, kind = np.unique(np.stack([seen_of.astype(np.int64), distance_of], axis=1), axis=0, return_inverse=True)
    return _Axis(queries, keys, kind.reshape(-1), both[:, 0].astype(bool), both[:, 1])


def _assemble(hood: Neighborhood, axes: list[_Axis]) -> Tiling:
    grid = hood.grid
    queries, keys = prod(a.queries.shape[1] for a in axes), prod(a.keys.shape[1] for a in axes)
    tiles, kinds = prod(len(a.queries) for a in axes), prod(len(a.seen) for a in axes)
    if kinds * queries * keys > _LARGEST_TABLE:
        raise Unsupported("size", f"the mask table would have {kinds * queries * keys} elements", "a smaller window")
    query_index = _flatten([a.queries for a in axes], grid).reshape(tiles, queries)
    key_index = _flatten([a.keys for a in axes], grid).reshape(tiles, keys)
    kind = _flatten([a.kind[:, None] for a in axes], tuple(len(a.seen) for a in axes)).reshape(tiles)
    slots = np.empty(prod(grid), np.int64)
    # Written backwards, so that the first of repeated queries stays.
    slots[query_index.reshape(-1)[::-1]] = np.arange(tiles * queries, dtype=np.int64)[::-1]
    masks = _masks(hood, axes)
    if hood.shape == "ball":
        key_index, masks = _without_corners(key_index, kind, masks)
    return Tiling(tiles, queries, key_index.shape[1], query_index, key_index, slots, kind, masks)


def _without_corners(key_index: np.ndarray, kind: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Key tables and masks of the keys that some query of a tile sees; tiles that see fewer than others keep some that
    none does.
    """
    met = masks.any(axis=1)  # [U, k]
    kept = np.argsort(~met, axis=1, kind="stable")[:, : max(int(met.sum(axis=1).max()), 1)]
    return np.take_along_axis(key_index, kept[kind], axis=1), np.take_along_axis(masks, kept[:, None, :], axis=2)


def _flatten(parts: list[np.ndarray], sizes: tuple[int, ...]) -> np.ndarray:
    """Row-major index of every combination: axes of the result are all first axes, then all second axes."""
    rank = len(parts)
    total = np.zeros((1,) * (2 * rank), np.int64)
    for axis, part in enumerate(parts):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = part.shape
        total = total * sizes[axis] + part.reshape(shape)
    return total


def _masks(hood: Neighborhood, axes: list[_Axis]) -> np.ndarray:
    """[U, q, k] over the combinations of kinds."""
    rank = len(axes)
    seen = np.ones((1,) * (3 * rank), bool)
    distance = np.zeros((1,) * (3 * rank), np.int64)
    for axis, part in enumerate(axes):
        shape = [1] * (3 * rank)
        shape[axis], shape[rank + axis], shape[2 * rank + axis] = part.seen.shape
        seen = seen & part.seen.reshape(shape)
        distance = distance + part.distance.reshape(shape) ** 2 * _weight(hood, axis)
    if hood.shape == "ball":
        seen = seen & (distance <= _reach(hood))
    size = [prod(seen.shape[i * rank : (i + 1) * rank]) for i in range(3)]
    return np.ascontiguousarray(seen).reshape(size)
