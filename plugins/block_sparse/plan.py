"""Cuts a mask into tiles: which queries are done together, and the keys that any of them sees.

Queries are taken in an order in which neighbours see the same keys (as they come, by equal rows of the mask, by
remainder, by boxes of a grid; whichever is cheapest). Neighbouring pieces are joined while that saves more copied keys
than it adds scores. Tiles of like sizes then become one group, padded to its largest: one batched product each.

A key that counts several times stands in a tile so often: adding the logarithm to its score would round it away where
scores are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.plugins.neighborhood.tiled import Tiles
from attncompile.plugins.neighborhood.tiles import COPY

LAUNCH = 20_000.0
"""Cost of a group's dozen nodes, in score elements; over all heads, so a plan is made for a number of them."""

MASK = 0.06
"""What adding a mask costs a score element."""

MAX_GROUPS = 16
LARGEST_TABLE = 1 << 25
"""Bytes of mask tables in the file beyond which a mask is refused."""

LARGEST_PLAN = 1 << 27
"""Score elements of one head beyond which a mask is refused: what is left is too much to be sparse."""

_PIECE = 32
_HEAVY = 4
_REMAINDERS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
_SIZES = 48
_BITS = np.array([bin(i).count("1") for i in range(256)], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """``groups`` in the order of their results; ``slots`` [Nq] says where each query's result stands. ``elements`` are
    the scores of one head, ``copied`` the keys that are gathered for it, both with padding.

    Where ``sets`` is above 1, each head has its own mask: tokens are then counted through all heads (query i of head h
    is h * Nq + i, key j of the key head g is g * Nk + j), and ``slots`` is [sets * Nq].
    """

    groups: tuple[Tiles, ...]
    slots: np.ndarray
    elements: int
    copied: int
    sets: int = 1


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Sets of queries, and the columns [P, Nc / 8] (bits) that any query of each sees."""

    queries: list[np.ndarray]
    keys: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """[P, 2]: queries and keys of each; a piece without keys still takes one, which is masked."""
        return np.stack([np.array([len(q) for q in self.queries]), np.maximum(_BITS[self.keys].sum(axis=1), 1)], axis=1)


def plan(counts: np.ndarray, heads: int, grids: tuple[TokenGrid, ...] = (), group: int = 1) -> Plan:
    """The cheapest plan found for ``counts`` ([Nq, Nk] or [sets, Nq, Nk], at least one query and key; sets is 1 or
    ``heads``): how often each key counts, 0 or False where it is hidden. ``group`` query heads share a key head.

    Raises:
        Unsupported: the tables would be too large.
    """
    sets = counts.reshape((-1, *counts.shape[-2:]))
    masks, of_column = _columns(sets)
    if len(sets) == 1:
        _, pieces, groups = _cheapest(masks[0], LAUNCH / heads, grids)
        owner = np.zeros(len(pieces.queries), np.int64)
        return _assemble(_Cut(masks, of_column, pieces, owner, 1, sets.shape[2]), groups)
    known: dict[bytes, _Pieces] = {}
    of_head: list[_Pieces] = []
    for mask in masks:
        bits = np.packbits(mask, axis=1).tobytes()
        if bits not in known:
            known[bits] = _cheapest(mask, LAUNCH / heads, grids)[1]
        of_head.append(known[bits])
    pieces = _Pieces([q for p in of_head for q in p.queries], np.concatenate([p.keys for p in of_head]))
    owner = np.repeat(np.arange(len(sets)), [len(p.queries) for p in of_head])
    return _assemble(_Cut(masks, of_column, pieces, owner, group, sets.shape[2]), grouped(pieces.sizes, LAUNCH)[0])


def _columns(sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bool [sets, Nq, Nc] and the key [Nc] of each column: one a key, and one more each time that it counts again."""
    if sets.dtype == bool:
        return sets, np.arange(sets.shape[2])
    masks, of_column = [sets > 0], [np.arange(sets.shape[2])]
    for times in range(1, int(sets.max())):
        again = np.flatnonzero((sets > times).any(axis=(0, 1)))
        masks.append(sets[:, :, again] > times)
        of_column.append(again)
    return np.concatenate(masks, axis=2), np.concatenate(of_column)


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """``masks`` bool [sets, Nq, Nc], cut into ``pieces``, each of the set ``owner`` [P]; columns are those of the keys
    ``of_column`` [Nc] of ``keys``. ``group`` sets share keys.
    """

    masks: np.ndarray
    of_column: np.ndarray
    pieces: _Pieces
    owner: np.ndarray
    group: int
    keys: int


def _cheapest(
    visible: np.ndarray, launch: float, grids: tuple[TokenGrid, ...]
) -> tuple[float, _Pieces, list[np.ndarray]]:
    """What it costs, its pieces, and which of them go together."""
    bits = np.packbits(visible, axis=1)
    best: tuple[float, _Pieces, list[np.ndarray]] | None = None
    for queries in _orders(visible, bits, grids):
        pieces = _Pieces(queries, _unions(bits, queries))
        for made in (pieces, _joined(pieces)):
            groups, cost = grouped(made.sizes, launch)
            if best is None or cost < best[0]:
                best = cost, made, groups
    assert best is not None
    return best


def _orders(visible: np.ndarray, bits: np.ndarray, grids: tuple[TokenGrid, ...]) -> Iterator[list[np.ndarray]]:
    """Ways to cut the queries into pieces. Queries that see far more than most stand apart in every second one."""
    everything = np.arange(len(bits))
    counts = _BITS[bits].sum(axis=1)
    heavy = counts > _HEAVY * max(float(np.median(counts)), 1.0)
    splits = [(everything, everything[:0])]
    if heavy.any() and not heavy.all():
        splits.append((everything[~heavy], everything[heavy]))
    for light, apart in splits:
        rest = _by_rows(bits, apart) if len(apart) else []
        yield _chunks(light) + rest
        yield _by_rows(bits, light) + rest
        for step in _REMAINDERS:
            if step * _PIECE <= len(light):
                yield [piece for r in range(step) for piece in _chunks(light[light % step == r])] + rest
        for grid in grids:
            for side in (4, 8):
                if grid.tokens == len(bits):
                    yield _by_boxes(light, grid, side) + rest


def _chunks(queries: np.ndarray) -> list[np.ndarray]:
    return [queries[i : i + _PIECE] for i in range(0, len(queries), _PIECE)]


def _by_rows(bits: np.ndarray, queries: np.ndarray) -> list[np.ndarray]:
    """Queries with equal rows together; small sets of them share a piece."""
    _, first, inverse = np.unique(bits[queries], axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.lexsort((queries, first[inverse]))
    sets = np.split(queries[order], np.flatnonzero(np.diff(first[inverse][order])) + 1)
    out: list[np.ndarray] = []
    small: list[np.ndarray] = []
    for one in sets:
        if len(one) >= _PIECE // 4:
            out.append(one)
        else:
            small.append(one)
    return out + (_chunks(np.concatenate(small)) if small else [])


def _by_boxes(queries: np.ndarray, grid: TokenGrid, side: int) -> list[np.ndarray]:
    """Boxes of ``side`` tokens on the last two axes of a grid; prefix and suffix tokens after them."""
    inner = (queries >= grid.prefix) & (queries < grid.prefix + prod(grid.shape))
    place = np.stack(np.unravel_index(queries[inner] - grid.prefix, grid.shape), axis=1)
    place[:, -2:] //= side
    box = np.ravel_multi_index(tuple(place.T), grid.shape)
    order = np.argsort(box, kind="stable")
    pieces = np.split(queries[inner][order], np.flatnonzero(np.diff(box[order])) + 1) if inner.any() else []
    return pieces + _chunks(queries[~inner])


def _unions(bits: np.ndarray, queries: list[np.ndarray]) -> np.ndarray:
    starts = np.cumsum([0, *(len(q) for q in queries[:-1])])
    return np.asarray(np.bitwise_or.reduceat(bits[np.concatenate(queries)], starts, axis=0))


def _cost(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.asarray((1 + MASK) * queries * keys + COPY * keys)


def _joined(pieces: _Pieces) -> _Pieces:
    """Neighbours joined, pair by pair, as long as it pays."""
    while len(pieces.queries) > 1:
        sizes = pieces.sizes
        together = pieces.keys[:-1] | pieces.keys[1:]
        separate = _cost(sizes[:, 0], sizes[:, 1])
        saved = separate[:-1] + separate[1:] - _cost(sizes[:-1, 0] + sizes[1:, 0], _BITS[together].sum(axis=1))
        taken = np.zeros(len(sizes), bool)
        pairs = []
        for i in np.argsort(-saved, kind="stable"):
            if saved[i] <= 0:
                break
            if not (taken[i] or taken[i + 1]):
                taken[i] = taken[i + 1] = True
                pairs.append(int(i))
        if not pairs:
            break
        first = set(pairs)
        keep = [i for i in range(len(sizes)) if i - 1 not in first]
        keys = pieces.keys[keep]
        for place, i in enumerate(keep):
            if i in first:
                keys[place] = together[i]
        queries = [
            np.concatenate(pieces.queries[i : i + 2]) if i in first else pieces.queries[i] for i in keep
        ]  # fmt: skip
        pieces = _Pieces(queries, keys)
    return pieces


def grouped(sizes: np.ndarray, launch: float) -> tuple[list[np.ndarray], float]:
    """Pieces with like sizes in one group, and what all groups cost."""
    rounded = sizes if len(np.unique(sizes, axis=0)) <= _SIZES else _rounded(sizes)
    distinct, member, count = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
    member = member.reshape(-1)
    names = np.arange(len(distinct))  # the group of each distinct size
    size, number = distinct.astype(np.float64), count.astype(np.float64)
    alive = np.ones(len(distinct), bool)

    def cost(s: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.asarray(n * _cost(s[..., 0], s[..., 1]) + launch)

    while alive.sum() > 1:
        live = np.flatnonzero(alive)
        s, n = size[live], number[live]
        alone = cost(s, n)
        pair = cost(np.maximum(s[:, None], s[None, :]), n[:, None] + n[None, :])
        saved = alone[:, None] + alone[None, :] - pair
        np.fill_diagonal(saved, -np.inf)
        a, b = np.unravel_index(int(np.argmax(saved)), saved.shape)
        if saved[a, b] <= 0 and len(live) <= MAX_GROUPS:
            break
        i, j = int(live[a]), int(live[b])
        size[i], number[i], alive[j] = np.maximum(size[i], size[j]), number[i] + number[j], False
        names[names == j] = i
    groups = [np.flatnonzero(names[member] == g) for g in np.flatnonzero(alive)]
    total = sum(float(cost(sizes[g].max(axis=0).astype(np.float64), np.array(float(len(g))))) for g in groups)
    return groups, total


def _rounded(sizes: np.ndarray) -> np.ndarray:
    """So many different sizes that only rough ones are told apart: steps of an eighth of their power of two."""
    step = 2 ** np.maximum(np.floor(np.log2(np.maximum(sizes, 1))).astype(np.int64) - 2, 0)
    return np.asarray(-(-sizes // step) * step)


def _assemble(cut: _Cut, groups: list[np.ndarray]) -> Plan:
    sizes, (sets, height, _) = cut.pieces.sizes, cut.masks.shape
    elements = sum(len(g) * int(prod(sizes[g].max(axis=0))) for g in groups)
    if elements > LARGEST_PLAN:
        raise Unsupported("size", f"{elements // sets} scores a head would still be computed")
    slots = np.empty(sets * height, np.int64)
    made: list[Tiles] = []
    done = copied = 0
    for members in groups:
        tiles = _tiles(cut, members)
        flat = tiles.query_index.reshape(-1)
        # Written backwards, so that the first of repeated queries stays.
        slots[flat[::-1]] = done + np.arange(len(flat), dtype=np.int64)[::-1]
        done += len(flat)
        made.append(tiles)
        keys = tiles.key_index.reshape(-1)
        copied += 0 if np.array_equal(keys, np.arange(keys[0], keys[0] + len(keys))) else len(keys)
    table = sum(t.masks.size for t in made if not t.masks.all())
    if table > LARGEST_TABLE:
        raise Unsupported("size", f"the masks of its tiles would take {table >> 20} MiB")
    return Plan(tuple(made), slots, elements // sets, copied // sets, sets)


def _tiles(cut: _Cut, members: np.ndarray) -> Tiles:
    pieces, (_, height, width) = cut.pieces, cut.masks.shape
    most_queries, most_keys = (int(n) for n in pieces.sizes[members].max(axis=0))
    queries, keys = [], []
    masks = np.zeros((len(members), most_queries, most_keys), bool)
    for place, piece in enumerate(members):
        owner = int(cut.owner[piece])
        rows = np.pad(pieces.queries[piece], (0, most_queries - len(pieces.queries[piece])), mode="edge")
        columns = np.flatnonzero(np.unpackbits(pieces.keys[piece], count=width))
        masks[place, :, : len(columns)] = cut.masks[owner][np.ix_(rows, columns)]
        if not len(columns):
            columns = np.zeros(1, np.int64)
        of_column = np.pad(cut.of_column[columns], (0, most_keys - len(columns)), mode="edge")
        queries.append(rows + owner * height)
        keys.append(of_column + owner // cut.group * cut.keys)
    packed = np.packbits(masks.reshape(len(members), -1), axis=1)
    _, first, kind = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return Tiles(np.stack(queries), np.stack(keys), kind.reshape(-1), masks[first])
