"""Body for a truncated 1-D window over a sequence of any length.

Queries go in blocks of a constant size (a block that follows N is not fused by TensorRT-RTX). Each block meets the
``left + block + right`` keys around it, taken by one Gather with clipped indices: padding and concatenating shifted
slices gives the same result and ran 5-20% slower in ONNX Runtime. Prefix and suffix keys ride in the same Gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attncompile.plugins.body import Body, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood import sinks as with_sink
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood


@dataclass(frozen=True, slots=True)
class Lengths:
    """Scalar int64 values: query length, key length, and the position of query 0 (None when it is 0). ``end`` is the
    query length as [1].
    """

    queries: str
    keys: str
    offset: str | None
    end: str


def sliding_body(
    body: Body, hood: Neighborhood, call: Call, query: str, key: str, value: str, key_mask: str, sinks: str
) -> str:
    """Append the whole computation; returns the output's name. ``key_mask`` and ``sinks`` are empty without one."""
    lengths = lengths_of(body, call, query, key)
    if call.sinks:
        call, (query, key, value) = with_sink.joined(body, call, query, key, value, sinks)
    if not call.dense_below:
        return blocked(body, hood, call, lengths, (query, key, value, key_mask))
    # Short sequences: a block of queries would be mostly padding, so N = 1 takes the formula itself.
    if call.self_attention:
        short = body.op("LessOrEqual", lengths.queries, body.scalar(call.dense_below))
    else:
        work = body.op("Mul", lengths.queries, lengths.keys)
        short = body.op("LessOrEqual", work, body.scalar(call.dense_below**2))
    branches = []
    for build in (_whole, blocked):
        branch = body.branch()
        out = build(branch, hood, call, lengths, (query, key, value, key_mask))
        branches.append(branch.graph(build.__name__.strip("_"), out, float_type(call.dtype)[0]))
    return body.op("If", short, then_branch=branches[0], else_branch=branches[1])


def lengths_of(body: Body, call: Call, query: str, key: str) -> Lengths:
    queries, end = _length(body, query, parts.sequence_axis(call.layouts[0]), call.query_length)
    if call.self_attention:
        return Lengths(queries, queries, None, end)
    keys, _ = _length(body, key, parts.sequence_axis(call.layouts[1]), call.key_length)
    return Lengths(queries, keys, body.op("Sub", keys, queries), end)


def _length(body: Body, value: str, axis: int, known: int | None) -> tuple[str, str]:
    """A sequence length as a scalar and as [1]."""
    if known is not None:
        return body.scalar(known), body.ints(known)
    shape = body.op("Shape", value, start=axis, end=axis + 1)
    return body.op("Squeeze", shape), shape


def _plus(body: Body, value: str, offset: str | None) -> str:
    return value if offset is None else body.op("Add", value, offset)


def arange(body: Body, end: str) -> str:
    return body.op("Range", body.scalar(0), end, body.scalar(1))


def _whole(body: Body, hood: Neighborhood, call: Call, lengths: Lengths, operands: tuple[str, str, str, str]) -> str:
    """All queries with all keys under the window's mask."""
    query, key, value = (
        parts.heads_first(body, x, layout) for x, layout in zip(operands[:3], call.layouts, strict=False)
    )
    rows = body.op("Unsqueeze", _plus(body, arange(body, lengths.queries), lengths.offset), body.ints(1))  # [n, 1]
    columns = arange(body, lengths.keys)
    visible = in_window(body, hood, body.op("Sub", columns, rows))  # [n, Nk]
    if hood.prefix or hood.suffix:
        everywhere = _is_extra(body, hood, lengths, columns)
        if hood.causal[0]:
            everywhere = body.op("And", everywhere, body.op("LessOrEqual", columns, rows))
        else:
            everywhere = body.op("Or", everywhere, _is_extra(body, hood, lengths, rows))
        visible = body.op("Or", visible, everywhere)
    if call.key_mask:
        visible = body.op("And", parts.key_mask_4d(body, operands[3]), visible)
    else:
        visible = body.op("Unsqueeze", visible, body.ints(0, 1))
    result = parts.dense(body, call, parts.scaled(body, call, query), key, value, visible, hood.masked_rows)
    return parts.heads_first(body, result, call.layouts[3])  # the same swap the other way round


def in_window(body: Body, hood: Neighborhood, relative: str) -> str:
    """-left <= j - i <= right."""
    not_before = body.op("GreaterOrEqual", relative, body.scalar(-hood.left[0]))
    return body.op("And", not_before, body.op("LessOrEqual", relative, body.scalar(hood.right[0])))


def _is_extra(body: Body, hood: Neighborhood, lengths: Lengths, index: str) -> str:
    """Whether a token is one of the prefix or of the suffix."""
    found = body.op("Less", index, body.scalar(hood.prefix))
    if hood.suffix:
        start = body.op("Sub", lengths.keys, body.scalar(hood.suffix))
        found = body.op("Or", found, body.op("GreaterOrEqual", index, start))
    return found


def blocked(body: Body, hood: Neighborhood, call: Call, lengths: Lengths, operands: tuple[str, str, str, str]) -> str:
    query, key, value, key_mask = operands
    block = call.block
    if call.query_length is not None:
        blocks = body.scalar(-(-call.query_length // block))  # T
    else:
        blocks = body.op("Div", body.op("Add", lengths.queries, body.scalar(block - 1)), body.scalar(block))
    axis = parts.sequence_axis(call.layouts[0])
    whole = call.query_length is not None and call.query_length % block == 0
    padded = query if whole else _pad(body, query, axis, lengths.end, blocks, block)
    tiles = parts.tiles_of_queries(body, call, parts.scaled(body, call, padded), block, call.layouts[0])

    first = body.op("Mul", arange(body, blocks), body.scalar(block))
    first = body.op("Unsqueeze", _plus(body, first, lengths.offset), body.ints(1))  # [T, 1] position of row 0
    index, visible = _keys_of_blocks(body, hood, call, lengths, first)  # [T, W], [T, R, W]
    key, value = (parts.heads_first(body, x, y) for x, y in ((key, call.layouts[1]), (value, call.layouts[2])))
    if call.key_mask:
        seen = body.op("Gather", parts.key_mask_4d(body, key_mask), index, axis=3)  # [b, 1, 1, T, W]
        seen = body.op("Transpose", seen, perm=[0, 1, 3, 2, 4])
        visible = body.op("And", seen, visible)  # [b, 1, T, R, W]
    mask = parts.additive(body, call, visible)
    if call.sinks:
        mask = with_sink.seen(body, mask, 5 if call.key_mask else 3)
        count = body.op("Concat", body.op("Shape", first, start=0, end=1), body.ints(1), axis=0)
        index = body.op("Concat", index, body.op("Expand", lengths.keys, count), axis=1)
    weights = parts.probabilities(
        body, call, tiles, body.op("Gather", key, index, axis=2), mask, [0, 1, 2, 4, 3]
    )  # [B, G, T, R, W]
    result = body.op("MatMul", weights, body.op("Gather", value, index, axis=2))
    result = parts.guarded(
        body, call, result, mask, hood.masked_rows,
        lambda: body.op("ReduceMean", body.op("Unsqueeze", value, body.ints(2)), body.ints(-2)),
    )  # fmt: skip
    result = parts.untile(body, call, result, block, call.layouts[3])
    out_axis = parts.sequence_axis(call.layouts[3])
    if hood.suffix or (hood.prefix and not hood.causal[0]):  # a causal prefix needs no more than its window
        inner = body.op("Sub", lengths.end, body.ints(hood.suffix))
        result = body.op("Slice", result, body.ints(hood.prefix), inner, body.ints(out_axis))
        return parts.with_extra_queries(body, hood, call, (query, key, value, key_mask), lengths.end, result)
    if whole:
        return result
    return body.op("Slice", result, body.ints(0), lengths.end, body.ints(out_axis))


def _pad(body: Body, value: str, axis: int, length: str, blocks: str, block: int) -> str:
    """Zeros after the last token up to a whole number of blocks. ``length`` is [1]."""
    missing = body.op("Sub", body.op("Mul", blocks, body.scalar(block)), length)
    before, after = body.ints(*[0] * (4 + axis)), body.ints(*[0] * (3 - axis))
    pads = body.op("Concat", before, missing, after, axis=0)
    return body.op("Pad", value, pads)


def _keys_of_blocks(body: Body, hood: Neighborhood, call: Call, lengths: Lengths, first: str) -> tuple[str, str]:
    """Key indices [T, W], clipped into range, and which of them each row sees [T, R, W].

    What depends on the block is one bool per (block, key); what depends on the row is the same for all blocks, made of
    constants, and folded by every runtime.
    """
    left, right, block = hood.left[0], hood.right[0], call.block
    steps = np.arange(left + block + right, dtype=np.int64) - left  # [W]
    index = body.op("Add", first, body.constant(steps))  # [T, W]
    low, high = body.scalar(hood.prefix), lengths.keys
    if hood.suffix:
        high = body.op("Sub", high, body.scalar(hood.suffix))
    inside = body.op("And", body.op("GreaterOrEqual", index, low), body.op("Less", index, high))
    row = np.tile(np.arange(block, dtype=np.int64), call.group)[:, None]  # [R, 1], group-major as the tiles are
    relative = body.op("Sub", body.constant(steps), body.constant(row))  # [R, W]
    visible = body.op("And", body.op("Unsqueeze", inside, body.ints(1)), in_window(body, hood, relative))  # [T, R, W]
    extra = _extra_keys(body, hood, lengths)
    if extra is not None:
        count = hood.prefix + hood.suffix
        shape = body.op("Concat", body.op("Shape", first, start=0, end=1), body.ints(count), axis=0)
        index = body.op("Concat", index, body.op("Expand", extra, shape), axis=1)
        position = body.op("Add", body.op("Unsqueeze", first, body.ints(1)), body.constant(row))  # [T, R, 1]
        # A causal row sees the prefix up to itself; any other sees all, rows of padding included.
        bound = position if hood.causal[0] else body.op("Max", position, lengths.keys)
        seen = body.op("LessOrEqual", extra, bound)  # [T, R, prefix + suffix]
        visible = body.op("Concat", visible, seen, axis=2)
    last = body.op("Sub", lengths.keys, body.scalar(1))
    return body.op("Min", body.op("Max", index, body.scalar(0)), last), visible


def _extra_keys(body: Body, hood: Neighborhood, lengths: Lengths) -> str | None:
    """Indices of the prefix and suffix tokens, [prefix + suffix]."""
    found = []
    if hood.prefix:
        found.append(body.constant(np.arange(hood.prefix, dtype=np.int64)))
    if hood.suffix:
        steps = body.constant(np.arange(-hood.suffix, 0, dtype=np.int64))
        found.append(body.op("Add", lengths.keys, steps))
    if not found:
        return None
    return found[0] if len(found) == 1 else body.op("Concat", *found, axis=0)
