"""The op ``attncompile::Attention`` (version 1), exact dense attention, and its body in standard ops.

Inputs: ``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv], each in the axis order that its
layout attribute says, and optionally ``key_mask`` bool, broadcastable to [B, 1, 1, Nk], True = visible. Output
[B, Nq, H, Dv] in ``o_layout``. With ``causal`` query i sees the keys up to i (as many queries as keys).

The body saves what exporters leave in: a causal site is done in chunks of queries, each of which meets the keys up to
its own end only, so that half of the scores are never computed; rows without a visible key are mended in the output,
not by a NaN guard over all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from onnx import FunctionProto, NodeProto, defs, helper
from onnx.defs import OpSchema

from attncompile.core.errors import Unsupported
from attncompile.plugins.body import DOMAIN, Body, attribute_names, float_type, overload_of
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import infer_output

OP_TYPE = "Attention"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """``chunks``: into how many pieces the queries of a causal site are cut (1: none)."""

    causal: bool
    masked_rows: str
    chunks: int

    def attributes(self) -> dict[str, Any]:
        """What the op says; the number of chunks is the body's own affair."""
        return {"causal": int(self.causal), "masked_rows": self.masked_rows}


def register() -> None:
    """Make the op known to onnx (checker and shape inference); later calls do nothing."""
    if defs.has(OP_TYPE, VERSION, DOMAIN):
        return
    operand = OpSchema.FormalParameter
    kinds = OpSchema.AttrType
    texts = (
        ("masked_rows", "nan", "what a query without any visible key gives: zero | uniform | nan"),
        *((f"{x}_layout", "BNHD", "axis order: BNHD | BHND") for x in "qkvo"),
    )
    schema = OpSchema(
        OP_TYPE, DOMAIN, VERSION, __doc__ or "",
        inputs=[
            *(operand(n, "T") for n in ("query", "key", "value")),
            operand("key_mask", "B", param_option=OpSchema.FormalParameterOption.Optional),
        ],
        outputs=[operand("output", "T")],
        type_constraints=[
            ("T", [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")], ""),
            ("B", ["tensor(bool)"], ""),
        ],
        attributes=[
            OpSchema.Attribute("scale", kinds.FLOAT, "of the products", required=True),
            OpSchema.Attribute("causal", helper.make_attribute("causal", 0), "1: keys up to the query only"),
            *(OpSchema.Attribute(name, helper.make_attribute(name, value), doc) for name, value, doc in texts),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(infer_output)
    defs.register_schema(schema)


def node(form: Dense, call: Call, inputs: tuple[str, ...], output: str, name: str) -> NodeProto:
    """The op; its attributes say all that a kernel needs."""
    layouts = dict(zip(("q_layout", "k_layout", "v_layout", "o_layout"), call.layouts, strict=True))
    made = helper.make_node(
        OP_TYPE, list(inputs), [output], name=name, domain=DOMAIN, scale=call.scale, **form.attributes(), **layouts
    )
    made.overload = overload_of({"op": OP_TYPE, "chunks": form.chunks, **form.attributes(), **call.configuration()})
    return made


def function(form: Dense, call: Call) -> FunctionProto:
    """The body of the node that ``node`` makes. Raises ``Unsupported`` where there is none."""
    body = Body(call.opset)
    names = ["query", "key", "value", *(["key_mask"] if call.key_mask else [])]
    output = _body(body, form, call)
    template = node(form, call, ("", "", ""), "", "")
    doc = f"dense attention in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads"
    return body.function(OP_TYPE, template.overload, names, output, attribute_names(template), doc)


def _body(body: Body, form: Dense, call: Call) -> str:
    if form.chunks == 1:
        return _whole(body, form, call)
    if form.masked_rows == "uniform" and call.key_mask:
        raise Unsupported("masked-rows", "rows without a visible key average values that their chunk does not meet")
    if call.query_length is not None:
        return _chunked(body, form, call)
    axis = parts.sequence_axis(call.layouts[0])
    length = body.op("Squeeze", body.op("Shape", "query", start=axis, end=axis + 1))
    short = body.op("LessOrEqual", length, body.scalar(call.dense_below))
    branches = []
    for build in (_whole, _chunked):
        branch = body.branch()
        branches.append(branch.graph(build.__name__.strip("_"), build(branch, form, call), float_type(call.dtype)[0]))
    return body.op("If", short, then_branch=branches[0], else_branch=branches[1])


def _operands(body: Body, call: Call) -> tuple[str, str, str]:
    """query scaled, key and value, all [B, heads, N, dim]."""
    query, key, value = (
        parts.heads_first(body, x, layout) for x, layout in zip(("query", "key", "value"), call.layouts, strict=False)
    )
    return parts.scaled(body, call, query), key, value


def _length(body: Body, call: Call, value: str, layout: int, known: int | None) -> str:
    """A sequence length as [1]."""
    if known is not None:
        return body.ints(known)
    axis = parts.sequence_axis(call.layouts[layout])
    return body.op("Shape", value, start=axis, end=axis + 1)


def _lower_triangle(body: Body, start: str, end: str) -> str:
    """[1, 1, end - start, end] bool: query start + i sees key j iff j <= start + i. ``start`` and ``end`` are [1]."""
    first, last = body.op("Squeeze", start), body.op("Squeeze", end)
    one = body.scalar(1)
    rows = body.op("Unsqueeze", body.op("Range", first, last, one), body.ints(0, 1, 3))
    columns = body.op("Unsqueeze", body.op("Range", body.scalar(0), last, one), body.ints(0, 1, 2))
    return body.op("LessOrEqual", columns, rows)


def _whole(body: Body, form: Dense, call: Call) -> str:
    query, key, value = _operands(body, call)
    visible = None
    if form.causal:
        visible = _lower_triangle(body, body.ints(0), _length(body, call, "query", 0, call.query_length))
    if call.key_mask:
        keys = parts.key_mask_4d(body, "key_mask")
        visible = keys if visible is None else body.op("And", keys, visible)
    result = parts.dense(body, call, query, key, value, visible, form.masked_rows)
    return parts.heads_first(body, result, call.layouts[3])


def _chunked(body: Body, form: Dense, call: Call) -> str:
    query, key, value = _operands(body, call)
    axis, zero = body.ints(2), body.ints(0)
    keys = parts.key_mask_4d(body, "key_mask") if call.key_mask else None
    pieces = []
    for start, end in _bounds(body, form, call):
        rows = body.op("Slice", query, start, end, axis)
        met = [body.op("Slice", x, zero, end, axis) for x in (key, value)]
        visible = _lower_triangle(body, start, end)
        if keys is not None:
            visible = body.op("And", body.op("Slice", keys, zero, end, body.ints(3)), visible)
        pieces.append(parts.dense(body, call, rows, met[0], met[1], visible, form.masked_rows))
    return parts.heads_first(body, body.op("Concat", *pieces, axis=2), call.layouts[3])


def _bounds(body: Body, form: Dense, call: Call) -> list[tuple[str, str]]:
    """First query and end of every chunk, each as [1]."""
    if call.query_length is not None:
        edges = [call.query_length * t // form.chunks for t in range(form.chunks + 1)]
        return [(body.ints(a), body.ints(b)) for a, b in pairwise(edges) if a < b]
    length = _length(body, call, "query", 0, None)
    step = body.op("Div", body.op("Add", length, body.ints(form.chunks - 1)), body.ints(form.chunks))
    edges_of = [body.op("Min", body.op("Mul", step, body.ints(t)), length) for t in range(form.chunks + 1)]
    return list(pairwise(edges_of))
