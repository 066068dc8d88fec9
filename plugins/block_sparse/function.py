"""The function body of ``BlockSparseAttention`` for one mask, which it holds in tables of its own. For lists that only
the run knows ``listed.py`` has one.
"""

from __future__ import annotations

from onnx import FunctionProto, NodeProto

from attncompile.plugins.block_sparse.heads import through_heads
from attncompile.plugins.block_sparse.op import OP_TYPE, Form
from attncompile.plugins.block_sparse.plan import Plan
from attncompile.plugins.body import Body, attribute_names
from attncompile.plugins.neighborhood import parts, tiled
from attncompile.plugins.neighborhood.call import Call


def function(plan: Plan, template: NodeProto, form: Form, call: Call) -> FunctionProto:
    """A body in standard ops of ``call.opset`` of the node ``template``, whose lists are in ``plan``: each group of
    tiles alone, then all rows back in their order.
    """
    body = Body(call.opset)
    given = tiled.operands(body, call, "query", "key", "value", "key_mask" * call.key_mask, "bias" * call.bias)
    if plan.sets == 1:
        output = _attended(body, plan, call, given, form.masked_rows)
    else:
        output = through_heads(body, plan, call, given, lambda p, c, g: _attended(body, p, c, g, form.masked_rows))
    doc = f"{OP_TYPE} in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads and one set of lists"
    return body.function(OP_TYPE, template.overload, form.formal, output, attribute_names(template), doc)


def _attended(body: Body, plan: Plan, call: Call, given: tiled.Operands, rows: str) -> str:
    pieces = [tiled.attend(body, call, tiles, given, rows) for tiles in plan.groups]
    axis = parts.sequence_axis(call.layouts[3])
    joined = pieces[0] if len(pieces) == 1 else body.op("Concat", *pieces, axis=axis)
    total = sum(t.query_index.size for t in plan.groups)
    return tiled.take(body, joined, plan.slots, total, axis)
