"""Blocks that each head meets, chosen and not read from a mask: their lists for the op, and how the body goes about
them.

``seen`` is bool [H, R, R] throughout: which of the R blocks of keys each block of queries of a head meets. A causal
site meets its diagonal in every row, and nothing above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.errors import Unsupported
from attncompile.plugins.block_sparse.op import Lists, longest_first
from attncompile.plugins.block_sparse.plan import LAUNCH, grouped
from attncompile.plugins.block_sparse.rest import Rest

_WORD = 32
LARGEST_MASKS = 32 << 20
"""Bytes of masks of means beyond which a site is refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of blocks that are done together: ``rows`` [T] counts them through heads (h * R + r), ``columns`` [T, W] are
    the blocks of keys of each, -1 where a row has fewer. On a causal site the first column is the row's own.
    ``averaged`` bool [T, R]: the blocks of which a row meets the means, None where no row of the group does.
    """

    rows: np.ndarray
    columns: np.ndarray
    averaged: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HeadPlan:
    """``groups`` of rows, heads that are done whole because they meet everything, and heads that meet nothing; in this
    order their results follow one another, and ``slots`` [H * R] says where each row's stands.
    """

    geometry: BlockGeometry
    groups: tuple[Rows, ...]
    whole: tuple[int, ...]
    empty: tuple[int, ...]
    slots: np.ndarray
    rest: Rest | None = None

    @property
    def blocks(self) -> float:
        """Blocks that are computed, padding of rows and means included."""
        return self.copied / self.geometry.edge + len(self.whole) * self.geometry.count**2

    @property
    def copied(self) -> int:
        """Keys and means that are gathered."""
        means = sum(len(g.rows) for g in self.groups if g.averaged is not None) * (self.rest.means if self.rest else 0)
        return sum(g.columns.size for g in self.groups) * self.geometry.edge + means


def lists_of(
    seen: np.ndarray, geometry: BlockGeometry, averaged: np.ndarray | None = None, rest: Rest | None = None
) -> Lists:
    """The lists of ``seen``, one set for all heads where they are equal. Partial are the diagonal of a causal site, a
    last block of keys that is not full, and blocks of means: entries of those come first in a row.

    Raises:
        Unsupported: the masks of the means would be large.
    """
    if averaged is None or rest is None:
        averaged, rest = np.zeros_like(seen), None
    if bool((seen == seen[:1]).all() and (averaged == averaged[:1]).all()):
        seen, averaged = seen[:1], averaged[:1]
    heads, count, _ = seen.shape
    tiles = rest.tiles if rest else 0
    edge = geometry.edge
    partial = np.zeros((count, count), bool)
    kinds = np.zeros((count, count), np.int32)
    if geometry.tokens % edge:
        partial[:, -1] = True
    if geometry.causal:
        np.fill_diagonal(partial, True)
        np.fill_diagonal(kinds, 1)
    bits = np.ones((2, edge, edge), bool)
    bits[1] = np.tril(bits[1])
    packed = np.packbits(bits.reshape(2, edge, edge), axis=2, bitorder="little")
    masks = packed.view("<u4").astype(np.uint32).view(np.int32).reshape(2, edge, edge // _WORD)
    at = np.argwhere(seen)  # head, row, column, in this order
    of, kind = partial[at[:, 1], at[:, 2]], kinds[at[:, 1], at[:, 2]]
    at[:, 2] += tiles
    times = np.ones(len(at), np.int64)
    if rest is not None:
        shown = rest.shown(averaged)  # [h, R, tiles, edge]
        means = np.argwhere(shown.any(axis=3))
        bits, kind_of = np.unique(np.packbits(shown[tuple(means.T)], axis=1, bitorder="little"), axis=0,
                                  return_inverse=True)  # fmt: skip
        if len(bits) * edge * edge // 8 > LARGEST_MASKS:
            raise Unsupported("size", f"{len(bits)} masks of means are too many to be stored",
                              "use blocks without a rest, or means of more keys")  # fmt: skip
        words = bits.view("<u4").astype(np.uint32).view(np.int32)
        masks = np.concatenate([masks, np.repeat(words[:, None], edge, axis=1)])
        at, of = np.concatenate([means, at]), np.concatenate([np.ones(len(means), bool), of])
        kind = np.concatenate([2 + kind_of.reshape(-1), kind])
        times = np.concatenate([np.full(len(means), rest.size), times])
    number = at[:, 0] * count + at[:, 1]
    by_row = np.lexsort((at[:, 2], ~of, number))
    at, of, kind, times, number = at[by_row], of[by_row], kind[by_row], times[by_row], number[by_row]
    met = np.bincount(number, minlength=heads * count)
    end = np.cumsum(met)
    full = end - met + np.bincount(number, of, heads * count).astype(np.int64)
    spans = np.stack([end - met, full, end], axis=1).reshape(1, heads, count, 3)
    columns = at[:, 2]
    if not len(at):
        columns, kind, times = np.zeros(1, np.int64), np.zeros(1, np.int32), np.ones(1, np.int64)
    return Lists(
        edge, np.ascontiguousarray(spans, np.int32), np.ascontiguousarray(columns, np.int32),
        np.ascontiguousarray(kind, np.int32), masks, longest_first(spans),
        np.ascontiguousarray(times, np.int32) if rest is not None else None,
    )  # fmt: skip


def plan_of(
    seen: np.ndarray, geometry: BlockGeometry, averaged: np.ndarray | None = None, rest: Rest | None = None
) -> HeadPlan:
    """How the body does ``seen``: rows of like lengths together, padded to the longest."""
    heads, count, _ = seen.shape
    per_head = seen.sum(axis=(1, 2))
    whole = tuple(int(h) for h in np.flatnonzero(per_head == count * count)) if not geometry.causal else ()
    empty = tuple(int(h) for h in np.flatnonzero(per_head == 0))
    mixed = np.array([h for h in range(heads) if h not in (*whole, *empty)], np.int64)
    groups: list[Rows] = []
    slots = np.empty(heads * count, np.int64)
    done = 0
    if len(mixed):
        rows = (mixed[:, None] * count + np.arange(count)).reshape(-1)
        flat = seen.reshape(heads * count, count)[rows]
        length = flat.sum(axis=1)
        sizes = np.stack([np.full(len(rows), geometry.edge), length * geometry.edge], axis=1)
        for members in grouped(sizes, LAUNCH)[0]:
            columns = np.full((len(members), int(length[members].max())), -1, np.int64)
            for place, member in enumerate(members):
                found = np.flatnonzero(flat[member])
                if geometry.causal:
                    found = found[::-1]  # the diagonal is the last one
                columns[place, : len(found)] = found
            means = averaged.reshape(heads * count, count)[rows[members]] if averaged is not None else None
            groups.append(Rows(rows[members], columns, means if means is not None and means.any() else None))
            slots[rows[members]] = done + np.arange(len(members))
            done += len(members)
    for head in (*whole, *empty):
        slots[head * count : (head + 1) * count] = done + np.arange(count)
        done += count
    return HeadPlan(geometry, tuple(groups), whole, empty, slots, rest)
