"""Attention of tiles of queries with a constant table of the keys that each tile meets: one batched softmax.

What a grid's neighborhoods and any other mask of fixed lengths come down to. Shapes as in ``parts``; q queries and
W keys a tile, R = g * q rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attncompile.plugins.body import Body, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Tables of T tiles of q queries and W keys: token numbers ``query_index`` [T, q] and ``key_index`` [T, W], where a
    tile that is not full repeats tokens; ``kind`` [T] chooses each tile's mask among ``masks`` [U, q, W], True = seen
    (a key that fills up is not seen).
    """

    query_index: np.ndarray
    key_index: np.ndarray
    kind: np.ndarray
    masks: np.ndarray

    @property
    def queries(self) -> int:
        return int(self.query_index.shape[1])

    def rows(self, key_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tile by tile the queries [q] and which of all keys they see, bool [q, key_length]."""
        for queries, keys, kind in zip(self.query_index, self.key_index, self.kind, strict=True):
            row, column = np.nonzero(self.masks[kind])
            seen = np.zeros((len(queries), key_length), bool)
            seen[row, keys[column]] = True
            yield queries, seen


@dataclass(frozen=True, slots=True)
class Operands:
    """Values of the body: query as it comes, key and value [B, G, N, D]; ``key_mask`` [b, 1, 1, Nk] bool and ``bias``
    [b, h, Nq * Nk] (grouped heads: [b, G, g, Nq * Nk]) are empty when there are none.
    """

    query: str
    key: str
    value: str
    key_mask: str = ""
    bias: str = ""


def operands(body: Body, call: Call, query: str, key: str, value: str, key_mask: str, bias: str) -> Operands:
    """The inputs of the op, brought into the form that ``attend`` takes."""
    return Operands(
        query,
        parts.heads_first(body, key, call.layouts[1]),
        parts.heads_first(body, value, call.layouts[2]),
        parts.key_mask_4d(body, key_mask) if call.key_mask else "",
        _flat_bias(body, call, bias) if call.bias else "",
    )


def attend(body: Body, call: Call, tiles: Tiles, given: Operands, masked_rows: str) -> str:
    """The T * q rows of ``tiles`` in the output's layout, in the order of ``query_index``."""
    rows = take(
        body, given.query, tiles.query_index.reshape(-1), call.query_length, parts.sequence_axis(call.layouts[0])
    )
    query = parts.tiles_of_queries(body, call, parts.scaled(body, call, rows), tiles.queries, call.layouts[0])
    key = _keys_of_tiles(body, call, given.key, tiles, call.head_dim)  # [B, G, T, W, D]
    value = _keys_of_tiles(body, call, given.value, tiles, call.value_dim)
    visible = _visible(body, call, tiles)  # [T, R, W], [1, R, W] or None
    if given.key_mask:
        seen = body.op("Gather", given.key_mask, body.constant(tiles.key_index), axis=3)  # [b, 1, 1, T, W]
        seen = body.op("Transpose", seen, perm=[0, 1, 3, 2, 4])
        visible = seen if visible is None else body.op("And", seen, visible)
    mask = None if visible is None else parts.additive(body, call, visible)
    added = mask
    if given.bias:
        added = _bias_of_tiles(body, call, given.bias, tiles)  # [b, h, T, R, W]
        if visible is not None:
            hidden = body.constant(np.array(-np.inf, float_type(parts.softmax_type(call))[1]))
            added = body.op("Where", visible, added, hidden)
    weights = parts.probabilities(body, call, query, key, added, [0, 1, 2, 4, 3])  # [B, G, T, R, W]
    result = parts.guarded(
        body, call, body.op("MatMul", weights, value), mask, masked_rows,
        lambda: body.op("ReduceMean", body.op("Unsqueeze", given.value, body.ints(2)), body.ints(-2)),
        always=not tiles.masks.any(axis=2).all(),
    )  # fmt: skip
    return parts.untile(body, call, result, tiles.queries, call.layouts[3])


def take(body: Body, value: str, index: np.ndarray, length: int | None, axis: int) -> str:
    """``value`` at constant positions of one axis: nothing, a Slice or a Gather, whichever does it."""
    start, count = int(index[0]), len(index)
    if not np.array_equal(index, np.arange(start, start + count)):
        return body.op("Gather", value, body.constant(index.astype(np.int64)), axis=axis)
    if start == 0 and count == length:
        return value
    return body.op("Slice", value, body.ints(start), body.ints(start + count), body.ints(axis))


def _keys_of_tiles(body: Body, call: Call, value: str, tiles: Tiles, dim: int) -> str:
    """[B, G, N, D] -> [B, G, T, W, D]; tiles whose keys follow one another are no more than a reshape."""
    flat = tiles.key_index.reshape(-1)
    if not np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))):
        return body.op("Gather", value, body.constant(tiles.key_index.astype(np.int64)), axis=2)
    taken = take(body, value, flat, call.key_length, 2)
    return body.op("Reshape", taken, body.ints(0, call.kv_heads, *tiles.key_index.shape, dim))


def _visible(body: Body, call: Call, tiles: Tiles) -> str | None:
    """Which keys each row sees; None when it is all of them. Stored once per kind of tile, spread by the runtime."""
    if tiles.masks.all():
        return None
    visible = body.constant(tiles.masks)
    if call.group > 1:
        visible = body.op("Tile", visible, body.ints(1, call.group, 1))  # group-major rows, as the tiles are
    if len(tiles.masks) == 1:
        return visible
    return body.op("Gather", visible, body.constant(tiles.kind.astype(np.int64)), axis=0)


def _flat_bias(body: Body, call: Call, bias: str) -> str:
    """A bias of any rank that broadcasts to the scores, with queries and keys in one axis."""
    assert call.query_length is not None and call.key_length is not None
    heads = call.heads if call.group > 1 else 1
    bias = body.op("Cast", bias, to=float_type(parts.softmax_type(call))[0])
    bias = body.op("Expand", bias, body.ints(1, heads, call.query_length, call.key_length))
    if call.group == 1:
        return body.op("Reshape", bias, body.ints(0, 0, -1))
    return body.op("Reshape", bias, body.ints(0, call.kv_heads, call.group, -1))


def _bias_of_tiles(body: Body, call: Call, bias: str, tiles: Tiles) -> str:
    """[b, h, T, R, W]. The table of positions is a sum of two small constants: the file does not hold it."""
    count, size = tiles.query_index.shape
    rows = body.constant((tiles.query_index * call.key_length)[:, :, None].astype(np.int64))
    index = body.op("Add", rows, body.constant(tiles.key_index[:, None, :].astype(np.int64)))  # [T, q, W]
    if call.group == 1:
        return body.op("Gather", bias, index, axis=2)
    wide = body.op("Gather", bias, index, axis=3)  # [b, G, g, T, q, W]
    wide = body.op("Transpose", wide, perm=[0, 1, 3, 2, 4, 5])
    return body.op("Reshape", wide, body.ints(0, call.kv_heads, count, call.group * size, -1))
