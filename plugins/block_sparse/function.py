"""The function body of ``BlockSparseAttention`` for one mask, and the node that calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, helper, numpy_helper

from attncompile.plugins.block_sparse.heads import through_heads
from attncompile.plugins.block_sparse.op import OP_TYPE
from attncompile.plugins.block_sparse.plan import Plan
from attncompile.plugins.body import DOMAIN, Body, attribute_names, overload_of
from attncompile.plugins.neighborhood import parts, tiled
from attncompile.plugins.neighborhood.call import Call


def function(plan: Plan, attributes: Mapping[str, Any], call: Call) -> FunctionProto:
    """A body in standard ops of ``call.opset``: each group of tiles alone, then all rows back in their order."""
    body = Body(call.opset)
    names = ["query", "key", "value", *(["key_mask"] if call.key_mask or call.bias else []), *["bias"] * call.bias]
    given = tiled.operands(body, call, "query", "key", "value", "key_mask" * call.key_mask, "bias" * call.bias)
    rows = str(attributes["masked_rows"])
    if plan.sets == 1:
        output = _attended(body, plan, call, given, rows)
    else:
        output = through_heads(body, plan, call, given, lambda p, c, g: _attended(body, p, c, g, rows))
    template = node(attributes, call, ("", "", ""), "", "")
    doc = f"{OP_TYPE} in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads"
    return body.function(OP_TYPE, template.overload, names, output, attribute_names(template), doc)


def _attended(body: Body, plan: Plan, call: Call, given: tiled.Operands, rows: str) -> str:
    pieces = [tiled.attend(body, call, tiles, given, rows) for tiles in plan.groups]
    axis = parts.sequence_axis(call.layouts[3])
    joined = pieces[0] if len(pieces) == 1 else body.op("Concat", *pieces, axis=axis)
    total = sum(t.query_index.size for t in plan.groups)
    return tiled.take(body, joined, plan.slots, total, axis)


def node(attributes: Mapping[str, Any], call: Call, inputs: tuple[str, ...], output: str, name: str) -> NodeProto:
    """The op itself; its attributes say all that a kernel needs."""
    layouts = dict(zip(("q_layout", "k_layout", "v_layout", "o_layout"), call.layouts, strict=True))
    made = helper.make_node(
        OP_TYPE, list(inputs), [output], name=name, domain=DOMAIN, scale=call.scale, **attributes, **layouts
    )
    made.overload = overload_of({"op": OP_TYPE, **_plain(attributes), **call.configuration()})
    return made


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes without the table of masks as a tensor: what can be written as JSON."""
    masks: np.ndarray = numpy_helper.to_array(attributes["masks"])
    return {**attributes, "masks": masks.tobytes().hex()}
