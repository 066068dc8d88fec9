"""Pieces that both bodies (sliding windows, tiles of a grid) are made of.

Shapes in comments: B batch, H heads, G kv heads, g = H / G, N tokens, T tiles, R = g * (queries per tile) rows,
W keys per tile, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attncompile.core.site import Layout
from attncompile.plugins.body import Body, float_type
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood


def sequence_axis(layout: Layout) -> int:
    return layout.index("N")


def heads_first(body: Body, value: str, layout: Layout) -> str:
    """[B, G, N, D] of an operand in any layout."""
    return value if layout == "BHND" else body.op("Transpose", value, perm=[0, 2, 1, 3])


def scaled(body: Body, call: Call, query: str) -> str:
    """The scale goes into Q: N * D products instead of N * W."""
    if call.scale == 1.0:
        return query
    return body.op("Mul", query, body.constant(np.array(call.scale, float_type(call.dtype)[1])))


def additive(body: Body, call: Call, visible: str) -> str:
    """0 where ``visible``, else -inf, in the softmax's element type."""
    _, numpy_type = float_type(softmax_type(call))
    zero, masked = (body.constant(np.array(x, numpy_type)) for x in (0.0, -np.inf))
    return body.op("Where", visible, zero, masked)


def softmax_type(call: Call) -> str:
    """The softmax runs in float32 where the source's did; a softmax narrower than the operands is not kept narrow."""
    return "float32" if call.softmax_dtype == "float32" and call.dtype in ("float16", "bfloat16") else call.dtype


def probabilities(body: Body, call: Call, query: str, key: str, mask: str | None, transpose: list[int]) -> str:
    """softmax(query key^T + mask) over the last axis, back in the operands' type. ``query`` is scaled already."""
    scores = body.op("MatMul", query, body.op("Transpose", key, perm=transpose))
    wide = softmax_type(call) != call.dtype
    if wide:
        scores = body.op("Cast", scores, to=float_type(softmax_type(call))[0])
    if mask is not None:
        scores = body.op("Add", scores, mask)
    result = body.op("Softmax", scores, axis=-1)
    return body.op("Cast", result, to=float_type(call.dtype)[0]) if wide else result


def guarded(
    body: Body, call: Call, result: str, mask: str | None, masked_rows: str, mean: Callable[[], str],
    always: bool = False,
) -> str:  # fmt: skip
    """What the source gives in the rows of ``result`` whose keys are all masked; without a key mask there are none,
    unless ``always`` says so.

    ``mean`` writes the mean of all values, for rows where the source's softmax saw only equal scores. Decided from the
    mask and not from NaN in ``result``: a NaN of the operands must stay visible.
    """
    if masked_rows == "nan" or not (call.key_mask or always) or mask is None or call.sinks:  # a sink gives 0 by itself
        return result
    best = body.op("ReduceMax", mask, body.ints(-1), keepdims=1)
    dead = body.op("Less", best, body.constant(np.array(-1.0, float_type(softmax_type(call))[1])))
    instead = body.constant(np.array(0.0, float_type(call.dtype)[1])) if masked_rows == "zero" else mean()
    return body.op("Where", dead, instead, result)


def key_mask_4d(body: Body, value: str) -> str:
    """[b, 1, 1, Nk] whatever the rank of the mask input: a logical and with a rank-4 True only adds axes."""
    return body.op("And", value, body.constant(np.ones((1, 1, 1, 1), np.bool_)))


def tiles_of_queries(body: Body, call: Call, query: str, size: int, layout: Layout) -> str:
    """Q of T * size tokens in ``layout`` -> [B, G, T, g * size, D]: query heads of a group become rows."""
    heads, group = call.kv_heads, call.group
    if layout == "BNHD":
        query = body.op("Reshape", query, body.ints(0, -1, size, heads, group, call.head_dim))
        query = body.op("Transpose", query, perm=[0, 3, 1, 4, 2, 5])
    else:
        if group == 1:
            return body.op("Reshape", query, body.ints(0, heads, -1, size, call.head_dim))
        query = body.op("Reshape", query, body.ints(0, heads, group, -1, size, call.head_dim))
        query = body.op("Transpose", query, perm=[0, 1, 3, 2, 4, 5])
    return body.op("Reshape", query, body.ints(0, heads, -1, group * size, call.head_dim))


def untile(body: Body, call: Call, value: str, size: int, layout: Layout) -> str:
    """[B, G, T, g * size, Dv] -> T * size tokens in ``layout``."""
    heads, group, dim = call.kv_heads, call.group, call.value_dim
    if group == 1:  # merging the tiles before the transpose: TensorRT-RTX fails on the transpose of all axes
        merged = body.op("Reshape", value, body.ints(0, heads, -1, dim))
        return merged if layout == "BHND" else body.op("Transpose", merged, perm=[0, 2, 1, 3])
    value = body.op("Reshape", value, body.ints(0, heads, -1, group, size, dim))
    if layout == "BHND":
        value = body.op("Transpose", value, perm=[0, 1, 3, 2, 4, 5])
        return body.op("Reshape", value, body.ints(0, call.heads, -1, dim))
    value = body.op("Transpose", value, perm=[0, 2, 4, 1, 3, 5])
    return body.op("Reshape", value, body.ints(0, -1, call.heads, dim))


def dense(body: Body, call: Call, query: str, key: str, value: str, visible: str | None, masked_rows: str) -> str:
    """Exact attention of few queries with all keys. query [B, H, n, D] scaled, key and value [B, G, Nk, D],
    visible broadcastable to [B, 1, n, Nk] -> [B, H, n, Dv].
    """
    if call.group > 1:  # a product that broadcasts heads is not fused by TensorRT-RTX; copied keys are
        key = repeat_heads(body, call, key, call.head_dim)
        value = repeat_heads(body, call, value, call.value_dim)
    mask = additive(body, call, visible) if visible is not None else None
    if call.sinks and mask is not None:
        mask = body.op("Pad", mask, body.ints(*[0] * 7, 1))  # nothing hides the sink, the last key
    result = body.op("MatMul", probabilities(body, call, query, key, mask, [0, 1, 3, 2]), value)
    return guarded(body, call, result, mask, masked_rows, lambda: body.op("ReduceMean", value, body.ints(-2)))


def repeat_heads(body: Body, call: Call, value: str, dim: int) -> str:
    """[B, G, N, dim] -> [B, H, N, dim], each head g times in a row."""
    wide = body.op("Expand", body.op("Unsqueeze", value, body.ints(2)), body.ints(1, 1, call.group, 1, 1))
    return body.op("Reshape", wide, body.ints(0, call.heads, -1, dim))


def with_extra_queries(
    body: Body, hood: Neighborhood, call: Call, operands: tuple[str, str, str, str], end: str, inner: str
) -> str:
    """Put the rows of prefix and suffix queries, which see every key, around ``inner``, the rows of the grid.

    query as it comes, key and value [B, G, N, D], key_mask or an empty string; ``end`` is N as [1] -> N tokens in the
    output's layout.
    """
    query, key, value, key_mask = operands
    axis, out_axis = sequence_axis(call.layouts[0]), sequence_axis(call.layouts[3])
    pieces = []
    if hood.prefix:
        pieces.append(body.op("Slice", query, body.ints(0), body.ints(hood.prefix), body.ints(axis)))
    if hood.suffix:
        tail = body.op("Sub", end, body.ints(hood.suffix))
        pieces.append(body.op("Slice", query, tail, end, body.ints(axis)))
    rows = pieces[0] if len(pieces) == 1 else body.op("Concat", *pieces, axis=axis)
    rows = scaled(body, call, heads_first(body, rows, call.layouts[0]))
    visible = key_mask_4d(body, key_mask) if call.key_mask else None
    result = heads_first(body, dense(body, call, rows, key, value, visible, hood.masked_rows), call.layouts[3])
    ordered = [inner]
    if hood.prefix:
        ordered.insert(0, body.op("Slice", result, body.ints(0), body.ints(hood.prefix), body.ints(out_axis)))
    if hood.suffix:
        last = body.ints(hood.prefix + hood.suffix)
        ordered.append(body.op("Slice", result, body.ints(hood.prefix), last, body.ints(out_axis)))
    return body.op("Concat", *ordered, axis=out_axis)
