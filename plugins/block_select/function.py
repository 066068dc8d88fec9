"""The bodies of ``BlockScores`` and ``BlockSelect`` in standard ops, and pooling, which is standard ops anyway.

Shapes in comments: B batch, H heads, G key heads, N tokens, D head dim; S tokens of a tile, T tiles, C blocks of keys,
R rows of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto

from attncompile.core.site import Layout
from attncompile.plugins.block_select import op
from attncompile.plugins.body import Body, attribute_names, float_type

_LARGER = 2.0
"""Above every weight: puts the blocks that are always kept before the others."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the bodies are written for; lengths and batch are free."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layouts: tuple[Layout, Layout]
    opset: int

    def configuration(self) -> dict[str, Any]:
        return asdict(self)


def node(kind: str, said: Mapping[str, Any], sizes: Sizes, inputs: tuple[str, ...], outputs: tuple[str, ...],
         name: str) -> NodeProto:  # fmt: skip
    """The op ``kind``; ``said`` are its attributes but for layouts."""
    layouts = dict(zip(("q_layout", "k_layout"), sizes.layouts, strict=True)) if kind == op.SCORES else {}
    return op.node(kind, {**said, **layouts}, inputs, outputs, name, sizes.configuration())


def function(kind: str, said: Mapping[str, Any], sizes: Sizes) -> FunctionProto:
    """The body of the node that ``node`` makes for the same arguments."""
    body = Body(sizes.opset)
    inputs, outputs, write = {
        op.SCORES: (("query", "key"), ("scores",), _scores),
        op.SELECT: (("scores", "amount"), (*op.LISTS, "mass"), _select),
    }[kind]
    template = node(kind, said, sizes, inputs, outputs, "")
    results = write(body, said, sizes)
    doc = f"{kind} in standard ops, for {sizes.dtype} and {sizes.heads}/{sizes.kv_heads} heads"
    return body.function(kind, template.overload, inputs, results, attribute_names(template), doc)


def pool(body: Body, value: str, layout: Layout, block: int, sizes: Sizes, heads: int) -> str:
    """The mean of each block's tokens, in the same layout: [.., ceil(N / block), ..]."""
    axis = layout.index("N")
    kind, numpy_kind = float_type(sizes.dtype)
    tokens = body.op("Shape", value, start=axis, end=axis + 1)
    blocks, filled = _filled(body, value, axis, tokens, block)
    shape = [body.ints(0), *([blocks, body.ints(block), body.ints(heads)] if axis == 1 else
                             [body.ints(heads), blocks, body.ints(block)]), body.ints(sizes.head_dim)]  # fmt: skip
    cut = body.op("Reshape", filled, body.op("Concat", *shape, axis=0))
    start = body.op("Mul", _range(body, blocks), body.scalar(block))
    there = body.op("Min", body.op("Sub", tokens, start), body.scalar(block))
    # A share of each token before the sum: a sum of half numbers may be too large for its type.
    share = body.op("Div", body.constant(np.array(1, numpy_kind)), body.op("Cast", there, to=kind))
    share = body.op("Reshape", share, body.ints(*((1, -1, 1, 1, 1) if axis == 1 else (1, 1, -1, 1, 1))))
    return body.op("ReduceSum", body.op("Mul", cut, share), body.ints(axis + 1), keepdims=0)


def _range(body: Body, count: str) -> str:
    """0 .. count - 1 for ``count`` [1]."""
    return body.op("Range", body.scalar(0), body.op("Squeeze", count), body.scalar(1))


def _filled(body: Body, value: str, axis: int, tokens: str, size: int) -> tuple[str, str]:
    """How many pieces of ``size`` tokens there are, [1], and ``value`` with zeros up to whole ones."""
    pieces = body.op("Div", body.op("Add", tokens, body.ints(size - 1)), body.ints(size))
    missing = body.op("Sub", body.op("Mul", pieces, body.ints(size)), tokens)
    ends = body.op("Concat", body.ints(*[0] * (4 + axis)), missing, body.ints(*[0] * (3 - axis)), axis=0)
    return pieces, body.op("Pad", value, ends)


def _scores(body: Body, said: Mapping[str, Any], sizes: Sizes) -> list[str]:
    stride, block, dim = int(said["stride"]), int(said["block"]), sizes.head_dim
    _, numpy_kind = float_type(sizes.dtype)
    wide = "double" if sizes.dtype == "double" else "float32"
    tiles = {}
    for name, layout, heads in zip(("query", "key"), sizes.layouts, (sizes.heads, sizes.kv_heads), strict=True):
        first = name if layout == "BHND" else body.op("Transpose", name, perm=[0, 2, 1, 3])
        if stride > 1:
            tokens = body.op("Shape", first, start=2, end=3)
            _, first = _filled(body, first, 2, tokens, stride)
        cut = body.op("Reshape", first, body.ints(0, heads, -1, stride, dim))
        if name == "query" and stride > 1:
            cut = body.op("Gather", cut, body.constant(np.arange(stride)[::-1].copy()), axis=3)
        tiles[name] = body.op("Reshape", cut, body.ints(0, heads, -1, stride * dim))  # [B, H, T, S * D]
    # The scale goes into the queries: a sum over stride * D products may be too large for a half.
    query = body.op("Mul", tiles["query"], body.constant(np.array(said["scale"] / stride, numpy_kind)))
    count = body.op("Shape", query, start=2, end=3)
    if sizes.heads != sizes.kv_heads:
        query = body.op("Reshape", query, body.ints(0, sizes.kv_heads, -1, stride * dim))
    scores = body.op("MatMul", query, body.op("Transpose", tiles["key"], perm=[0, 1, 3, 2]))
    across = body.op("Shape", scores, start=3, end=4)
    if sizes.heads != sizes.kv_heads:
        scores = body.op("Reshape", scores, body.op("Concat", body.ints(0, sizes.heads), count, across, axis=0))
    scores = body.op("Cast", scores, to=float_type(wide)[0])
    hidden = body.constant(np.array(-np.inf, float_type(wide)[1]))
    if said.get("causal"):
        row = body.op("Unsqueeze", _range(body, count), body.ints(1))
        if (span := int(said.get("span", 1))) > 1:  # the last key that a query stands for
            row = body.op("Add", body.op("Mul", row, body.scalar(span)), body.scalar(span - 1))
        later = body.op("Greater", _range(body, across), row)
        scores = body.op("Where", later, hidden, scores)
    members = block // stride
    if members > 1:
        blocks = body.op("Div", body.op("Add", across, body.ints(members - 1)), body.ints(members))
        missing = body.op("Sub", body.op("Mul", blocks, body.ints(members)), across)
        ends = body.op("Concat", body.ints(0, 0, 0, 0, 0, 0, 0), missing, axis=0)
        scores = body.op("Pad", scores, ends, hidden)
        scores = body.op("Reshape", scores, body.op(
            "Concat", body.ints(0, sizes.heads), count, blocks, body.ints(members), axis=0))  # fmt: skip
        top = body.op("ReduceMax", scores, body.ints(-1), keepdims=1)
        if said.get("reduce") != "max":
            alive = body.op("Greater", top, hidden)
            safe = body.op("Where", alive, top, body.constant(np.array(0, float_type(wide)[1])))
            total = body.op("ReduceSum", body.op("Exp", body.op("Sub", scores, safe)), body.ints(-1), keepdims=1)
            top = body.op("Add", body.op("Log", total), safe)  # log 0 = -inf
        scores = body.op("Squeeze", top, body.ints(-1))
    return [body.op("Cast", scores, to=TensorProto.FLOAT, output="scores")]


def _select(body: Body, said: Mapping[str, Any], sizes: Sizes) -> list[str]:
    tiles, causal = int(said["tiles"]), bool(said.get("causal"))
    columns = body.op("Shape", "scores", start=3, end=4)
    mass, rows = _mass(body, tiles, columns)
    place = _range(body, columns)  # [C]
    row = body.op("Unsqueeze", _range(body, rows), body.ints(1))  # [R, 1]
    away = body.op("Abs", body.op("Sub", place, row))
    always = body.op("Or", body.op("Less", place, body.scalar(int(said["sinks"]))),
                     body.op("LessOrEqual", away, body.scalar(int(said["window"]))))  # fmt: skip
    visible = body.op("Expand", columns, body.op("Concat", rows, body.ints(1), axis=0))  # [R, 1]
    if causal:
        always = body.op("And", always, body.op("LessOrEqual", place, row))
        visible = body.op("Min", body.op("Add", row, body.scalar(1)), columns)
    amount = body.op("Reshape", "amount", body.ints(-1, 1, 1))
    own = row if causal else body.op("Sub", columns, body.ints(1))
    if said["rule"] == "anchor":
        return _listed(body, columns, None, _near(body, amount, always, place, row if causal else None), own, mass)
    least = body.op("ReduceSum", body.op("Cast", always, to=TensorProto.INT64), body.ints(1), keepdims=1)  # [R, 1]
    ranked = body.op("Add", mass, body.op("Where", always, _float(body, _LARGER), _float(body, 0)))
    _, order = body.ops("TopK", (ranked, columns), 2, axis=-1, largest=1, sorted=1)  # [B, H, R, C]
    if said["rule"] == "mass":
        weights = body.op("GatherElements", mass, order, axis=3)
        before = body.op("CumSum", weights, body.constant(np.array(3, np.int64)), exclusive=1)
        wanted = body.op("ReduceSum", body.op("Cast", body.op("Less", before, amount), to=TensorProto.INT64),
                         body.ints(-1), keepdims=1)  # fmt: skip
    else:
        share = body.op("Mul", amount, body.op("Cast", visible, to=TensorProto.FLOAT))
        share = body.op("Ceil", body.op("Sub", share, _float(body, op.SLACK)))
        wanted = body.op("Cast", share, to=TensorProto.INT64)
    wanted = body.op("Min", body.op("Max", wanted, least), visible)  # [.., R, 1]
    return _listed(body, columns, order, body.op("Less", place, wanted), own, mass)


def _near(body: Body, amount: str, always: str, place: str, row: str | None) -> str:
    """Bool [B, H, R, C]: blocks within ``amount`` of the anchor. ``row``: the last that is seen, if not all are."""
    hidden = _float(body, -np.inf)
    anchor = body.op("ReduceMax", body.op("Where", always, "scores", hidden), body.ints(-1), keepdims=1)
    near = body.op("GreaterOrEqual", "scores", body.op("Sub", anchor, amount))
    if row is not None:
        near = body.op("And", near, body.op("LessOrEqual", place, row))
    return body.op("Or", near, always)


def _listed(body: Body, columns: str, order: str | None, taken: str, own: str, mass: str) -> list[str]:
    """The outputs. ``taken`` bool [B, H, R, C]: what is kept, by rank in ``order``, or without one by place; ``own``
    [R, 1] or [1]: partial blocks.
    """
    # Entries of a row: its partial block, then the others in rising order, then what is not listed.
    block = _range(body, columns) if order is None else order
    front = body.op("Equal", block, own)
    size = body.op("Mul", columns, body.ints(2))
    key = body.op("Where", front, size, body.op("Sub", columns, block))
    key = body.op("Where", taken, key, body.scalar(0))
    _, entry = body.ops("TopK", (key, columns), 2, axis=-1, largest=1, sorted=1)
    listed = entry if order is None else body.op("GatherElements", order, entry, axis=3)
    listed = body.op("Cast", listed, to=TensorProto.INT32)
    partial = body.op("ReduceMax", body.op("Cast", body.op("And", front, taken), to=TensorProto.INT64),
                      body.ints(-1), keepdims=1)  # fmt: skip
    wanted = body.op("ReduceSum", body.op("Cast", taken, to=TensorProto.INT64), body.ints(-1), keepdims=1)
    number = _range(body, body.op("Unsqueeze", body.op("Size", partial), body.ints(0)))
    start = body.op("Reshape", body.op("Mul", number, columns), body.op("Shape", partial))
    spans = body.op("Concat", start, body.op("Add", start, partial), body.op("Add", start, wanted), axis=3)
    flat = body.op("Reshape", listed, body.ints(-1), output="columns")
    zeros = body.op("Sub", flat, flat, output="kinds")
    return [body.op("Cast", spans, to=TensorProto.INT32, output="rows"), flat, zeros, mass]


def _float(body: Body, value: float) -> str:
    return body.constant(np.array(value, np.float32))


def _mass(body: Body, tiles: int, columns: str) -> tuple[str, str]:
    """Weights of blocks [B, H, R, C], and R [1]."""
    weights = body.op("Softmax", "scores", axis=-1)
    count = body.op("Shape", "scores", start=2, end=3)
    if tiles == 1:
        return body.op("Identity", weights, output="mass"), count
    rows, filled = _filled(body, weights, 2, count, tiles)
    head = body.op("Shape", "scores", start=0, end=2)
    cut = body.op("Reshape", filled, body.op("Concat", head, rows, body.ints(tiles), columns, axis=0))
    start = body.op("Mul", _range(body, rows), body.scalar(tiles))
    there = body.op("Cast", body.op("Min", body.op("Sub", count, start), body.scalar(tiles)), to=TensorProto.FLOAT)
    total = body.op("ReduceSum", cut, body.ints(3), keepdims=0)
    return body.op("Div", total, body.op("Unsqueeze", there, body.ints(1)), output="mass"), rows
