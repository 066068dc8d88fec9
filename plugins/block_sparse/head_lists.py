"""Blocks that each head meets, chosen and not read from a mask: their lists for the op, and how the body goes about
them.

``seen`` is bool [H, R, R] throughout: which of the R blocks of keys each block of queries of a head meets. A causal
site meets its diagonal in every row, and nothing above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attncompile.core.block_pattern import BlockGeometry
from attncompile.plugins.block_sparse.op import Lists, longest_first
from attncompile.plugins.block_sparse.plan import LAUNCH, grouped

_WORD = 32


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of blocks that are done together: ``rows`` [T] counts them through heads (h * R + r), ``columns`` [T, W] are
    the blocks of keys of each, -1 where a row has fewer. On a causal site the first column is the row's own.
    """

    rows: np.ndarray
    columns: np.ndarray


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

    @property
    def blocks(self) -> int:
        """Blocks that are computed, padding of rows included."""
        return sum(g.columns.size for g in self.groups) + len(self.whole) * self.geometry.count**2

    @property
    def copied(self) -> int:
        """Keys that are gathered."""
        return sum(g.columns.size for g in self.groups) * self.geometry.edge


def lists_of(seen: np.ndarray, geometry: BlockGeometry) -> Lists:
    """The lists of ``seen``, one set for all heads where they are equal. Partial are the diagonal of a causal site and
    a last block of keys that is not full.
    """
    if bool((seen == seen[:1]).all()):
        seen = seen[:1]
    heads, count, _ = seen.shape
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
    of = partial[at[:, 1], at[:, 2]]
    number = at[:, 0] * count + at[:, 1]
    at = at[np.lexsort((at[:, 2], ~of, number))]
    met = np.bincount(number, minlength=heads * count)
    end = np.cumsum(met)
    full = end - met + np.bincount(number, of, heads * count).astype(np.int64)
    spans = np.stack([end - met, full, end], axis=1).reshape(1, heads, count, 3)
    columns, kind = at[:, 2], kinds[at[:, 1], at[:, 2]]
    if not len(at):
        columns, kind = np.zeros(1, np.int64), np.zeros(1, np.int32)
    return Lists(
        edge, np.ascontiguousarray(spans, np.int32), np.ascontiguousarray(columns, np.int32),
        np.ascontiguousarray(kind, np.int32), masks, longest_first(spans),
    )  # fmt: skip


def plan_of(seen: np.ndarray, geometry: BlockGeometry) -> HeadPlan:
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
            groups.append(Rows(rows[members], columns))
            slots[rows[members]] = done + np.arange(len(members))
            done += len(members)
    for head in (*whole, *empty):
        slots[head * count : (head + 1) * count] = done + np.arange(count)
        done += count
    return HeadPlan(geometry, tuple(groups), whole, empty, slots)
