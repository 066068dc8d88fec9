"""What blocks of one site's attention hold, and what leaving blocks out changes: NumPy, a row of blocks at a time.

Of a row of e queries only its scores with all keys are held (e * N numbers). From these come, for each block of keys,
the weight that the queries give it and what it adds to their outputs before division; any choice of blocks is then a
sum over few blocks: scoring forty choices costs little more than dense attention does once. Means of keys and values
(``PATTERN rest 16``) add the same two numbers for each block, from a few scores more.

Shapes: H heads, G key heads, N tokens, R blocks a side, e their edge, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.block_selection import with_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """One batch entry: query [H, N, D], key [G, N, D], value [G, N, Dv], float32; ``open`` bool [N], the keys that
    padding leaves visible, or None. ``weights`` [H, Dv, Dv]: what the heads' outputs are multiplied by before they are
    compared, so that they count as they do behind the output projection; None leaves them as they are.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale: float
    open: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def heads(self) -> int:
        return int(self.query.shape[0])

    def ordered(self, head: int, places: np.ndarray) -> Operands:
        """One head alone, with its tokens in this order [N]."""
        group = self.heads // self.key.shape[0]
        shared = slice(head // group, head // group + 1)
        query, key, value = self.query[head : head + 1], self.key[shared], self.value[shared]
        return Operands(
            query[:, places], key[:, places], value[:, places], self.scale,
            None if self.open is None else self.open[places],
            None if self.weights is None else self.weights[head : head + 1],
        )  # fmt: skip

    def geometry(self, known: BlockGeometry) -> BlockGeometry:
        """``known`` at the length of this input."""
        return with_tokens(known, int(self.query.shape[1]))


@dataclass(frozen=True, slots=True, eq=False)
class HeadScores:
    """Of one head's choices: squared distance from the dense output, and share of the attention weight that is kept
    [K]; the dense output's squared size. Sums over the rows that were looked at.
    """

    error: np.ndarray
    kept: np.ndarray
    size: float


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of blocks: ``mass`` [queries, C] and ``parts`` [C, queries, Dv] of C blocks of keys, those up to the
    diagonal on a causal site; ``coarse``: the same of their means, by how many keys have one. All are scaled by one
    number a query.
    """

    number: int
    mass: np.ndarray
    parts: np.ndarray
    coarse: Mapping[int, tuple[np.ndarray, np.ndarray]]


def rows(
    operands: Operands, geometry: BlockGeometry, head: int, which: Sequence[int], sizes: Sequence[int] = ()
) -> Iterator[Row]:  # fmt: skip
    """Each row of blocks in ``which``. ``sizes`` of means; blocks that are not whole have none."""
    edge, group = geometry.edge, operands.heads // operands.key.shape[0]
    value = operands.value[head // group]
    if operands.weights is not None:
        value = value @ operands.weights[head]
    whole = np.zeros((geometry.count * edge, value.shape[1]), np.float32)
    whole[: geometry.tokens] = value
    blocks = whole.reshape(geometry.count, edge, -1)
    full = geometry.tokens // edge
    key = operands.key[head // group]
    means = {
        size: (key[: full * edge].reshape(-1, size, key.shape[1]).mean(axis=1), blocks[:full].reshape(
            full, edge // size, size, -1).mean(axis=2)) for size in sizes
    }  # fmt: skip
    for r, weights, top in _weights(operands, geometry, head, which):
        cut = weights.reshape(len(weights), -1, edge)
        here = operands.query[head, r * edge : r * edge + len(weights)] * np.float32(operands.scale)
        known = min(cut.shape[1], full)
        coarse = {}
        for size, (of_keys, of_values) in means.items():
            counted = np.exp(here @ of_keys[: known * (edge // size)].T - top) * np.float32(size)
            counted = counted.reshape(len(weights), known, -1)
            mass = np.zeros(cut.shape[:2], np.float32)
            parts = np.zeros((cut.shape[1], len(weights), blocks.shape[2]), np.float32)
            mass[:, :known] = counted.sum(axis=2)
            parts[:known] = counted.transpose(1, 0, 2) @ of_values[:known]
            coarse[size] = mass, parts
        yield Row(r, cut.sum(axis=2), cut.transpose(1, 0, 2) @ blocks[: cut.shape[1]], coarse)


def _weights(
    operands: Operands, geometry: BlockGeometry, head: int, which: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each row of blocks in ``which``: (r, weights [queries, C * e], top [queries, 1]), the weights as exp(score -
    top).
    """
    edge, tokens = geometry.edge, geometry.tokens
    key = operands.key[head // (operands.heads // operands.key.shape[0])]
    for r in which:
        start, stop = r * edge, min((r + 1) * edge, tokens)
        count = r + 1 if geometry.causal else geometry.count
        end = min(count * edge, tokens)
        scores = np.full((stop - start, count * edge), -np.inf, np.float32)
        scores[:, :end] = (operands.query[head, start:stop] * np.float32(operands.scale)) @ key[:end].T
        if operands.open is not None:
            scores[:, :end][:, ~operands.open[:end]] = -np.inf
        if geometry.causal:
            own = scores[:, start : start + edge]
            own[np.arange(edge)[None, :] > np.arange(stop - start)[:, None]] = -np.inf
        top = scores.max(axis=1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        np.subtract(scores, top, out=scores)
        yield r, np.exp(scores, out=scores), top


def masses(operands: Operands, geometry: BlockGeometry, head: int) -> np.ndarray:
    """float32 [R, R]: the share of their weight that a row's queries give to each block of keys, on average."""
    (found,) = ordered_masses(operands, geometry, head, [])
    return np.asarray(found)


def ordered_masses(
    operands: Operands, geometry: BlockGeometry, head: int, orders: Sequence[np.ndarray]
) -> np.ndarray:  # fmt: skip
    """float32 [1 + O, R, R]: ``masses``, and what they are with the tokens in each of ``orders`` [N] of a site that is
    not causal. Scores are computed once.
    """
    edge, tokens, count = geometry.edge, geometry.tokens, geometry.count
    starts = np.arange(0, tokens, edge)
    sizes = np.minimum(edge, tokens - starts).astype(np.float32)
    rows_of = [np.argsort(places) // edge for places in orders]  # the row of each token
    out = np.zeros((1 + len(orders), count, count), np.float32)
    for r, weights, _ in _weights(operands, geometry, head, range(count)):
        mass = weights.reshape(len(weights), -1, edge).sum(axis=2)
        total = mass.sum(axis=1, keepdims=True)
        total[total <= 0] = 1
        out[0, r, : mass.shape[1]] = (mass / total).sum(axis=0)
        if orders:
            weights /= total
        here = slice(r * edge, r * edge + len(weights))
        for of_order, places, rows in zip(out[1:], orders, rows_of, strict=True):
            np.add.at(of_order, rows[here], np.add.reduceat(weights[:, places], starts, axis=1))
    return np.asarray(out / sizes[:, None])


def score(
    operands: Operands, geometry: BlockGeometry, head: int, choices: np.ndarray, which: Sequence[int],
    averaged: Sequence[int] = (), rests: Sequence[int] = (),
) -> HeadScores:  # fmt: skip
    """``choices`` bool [K, R, R]. Those numbered in ``averaged`` give the mean of all values (pattern ``mean``); a
    query without a block, or whose blocks are all padding, gives zero. ``rests`` [K]: of how many keys there are means
    where a choice leaves blocks out, 0 where there is nothing. What is kept is of the choice's own blocks.
    """
    count = len(choices)
    error, kept = np.zeros(count), np.zeros(count)
    size, looked = 0.0, 0
    group = operands.heads // operands.key.shape[0]
    mean = operands.value[head // group].mean(axis=0)
    if operands.weights is not None:
        mean = mean @ operands.weights[head]
    allowed, of = geometry.averaged, np.array(rests or [0] * count)
    for row in rows(operands, geometry, head, which, sorted(set(rests) - {0})):
        r, mass, parts = row.number, row.mass, row.parts
        blocks, queries, dim = parts.shape
        total = mass.sum(axis=1)
        alive = total > 0
        safe = np.where(alive, total, 1)
        dense = parts.sum(axis=0) / safe[:, None]  # [queries, Dv]
        taken = choices[:, r, :blocks].astype(np.float32)
        weight = taken @ mass.T  # [K, queries]
        out = (taken @ parts.reshape(blocks, -1)).reshape(count, queries, dim)
        kept += (weight / safe).sum(axis=1)
        for keys, (coarse_mass, coarse_parts) in row.coarse.items():
            left = np.where((of == keys)[:, None], allowed[r, :blocks] & ~choices[:, r, :blocks], False)
            left = left.astype(np.float32)
            weight = weight + left @ coarse_mass.T
            out += (left @ coarse_parts.reshape(blocks, -1)).reshape(count, queries, dim)
        np.divide(out, np.where(weight > 0, weight, 1)[..., None], out=out)
        out[list(averaged)] = mean
        out -= dense
        error += np.square(out, dtype=np.float64).sum(axis=(1, 2))
        looked += int(alive.sum())
        size += float(np.square(dense, dtype=np.float64).sum())
    return HeadScores(error, kept / max(looked, 1), size)
