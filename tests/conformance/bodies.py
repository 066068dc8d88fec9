"""Run the function body of a case in ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import FunctionProto, NodeProto, TensorProto, helper

from attncompile.core.layout import unpacked
from attncompile.plugins.attention import dense
from attncompile.plugins.attention import op as dense_op
from attncompile.plugins.block_sparse import listed
from attncompile.plugins.block_sparse import op as sparse_op
from attncompile.plugins.neighborhood import function as grid
from attncompile.plugins.neighborhood import op as grid_op
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.packed import packed
from tests.conformance.case import PARTS, Case, laid

TYPES = {"float32": np.float32, "float16": np.float16}
OPTIONAL = {"Attention": dense_op.OPTIONAL, "NeighborhoodAttention": ("key_mask", "bias")}


def call_of(case: Case, dtype: str, opset: int, dynamic: bool) -> Call:
    """Everything that a body is generated for; the softmax is in float32."""
    call, (_, queries, keys) = case.call, case.sizes
    return Call(
        heads=call.heads, kv_heads=call.kv_heads, head_dim=call.head_dim, value_dim=call.value_dim,
        scale=call.attributes["scale"], dtype=dtype, softmax_dtype="float32", layouts=case.layouts,  # type: ignore[arg-type]
        query_length=None if dynamic else queries, key_length=None if dynamic else keys, self_attention=queries == keys,
        key_mask="key_mask" in call.inputs, block=16, dense_below=0, opset=opset, bias="bias" in call.inputs,
        sinks="sinks" in call.inputs,
    )  # fmt: skip


def lowered(case: Case, call: Call, chunks: int, **changed: Any) -> tuple[NodeProto, FunctionProto]:
    """The node of the case, whose values are named as the schema names them, and its body. ``changed`` attributes."""
    if case.packed:
        bare = replace(case, layouts=tuple(map(unpacked, case.layouts)))  # type: ignore[arg-type]
        return packed(*lowered(bare, replace(call, layouts=bare.layouts), chunks, **changed), case.packed)
    given = {k: v for k, v in {**case.call.attributes, **changed}.items() if k != "scale"}
    outputs = case.call.outputs
    if case.call.op == "Attention":
        dense_op.register()
        inputs = tuple(n for n in dense_op.OPTIONAL if n in case.call.inputs)
        form = dense_op.Dense(**given, chunks=chunks, inputs=inputs, log_sum_exp=len(outputs) > 1)
        return dense_op.node(form, call, form.given, outputs, "attn"), dense.function(form, call)
    if case.call.op == "BlockSparseAttention":
        sparse_op.register()
        chosen = tuple(n for n in sparse_op.OPTIONAL if n in case.call.inputs)
        listing = sparse_op.Form(**given, inputs=chosen, log_sum_exp=len(outputs) > 1)
        made = sparse_op.node(listing, call, listing.given, outputs, "attn")
        return made, listed.function(made, listing, call)
    grid_op.register()
    hood = grid_op.Neighborhood.of(given)
    names = [n * (n in case.call.inputs) for n in OPTIONAL["NeighborhoodAttention"]]
    while names and not names[-1]:
        names.pop()
    made = grid.node(hood, call, ("query", "key", "value", *names), "output", "attn")
    return made, grid.function(hood, call)


def model(
    case: Case, dtype: str, opset: int = 18, chunks: int = 1, dynamic: bool = False, call: Call | None = None,
    **changed: Any,
) -> onnx.ModelProto:  # fmt: skip
    """A model of the one node."""
    node, body = lowered(case, call or call_of(case, dtype, opset, dynamic), chunks, **changed)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[dtype]))
    sizes = dict(zip(("B", "NQ", "NK"), case.sizes, strict=True))
    inputs, outputs = [], []
    for name, layout in zip(("query", "key", "value", "output"), case.layouts, strict=True):
        queries = name in ("query", "output")
        axes: dict[str, Any] = {
            "B": "batch" if dynamic else sizes["B"],
            "D": case.call.head_dim if name in ("query", "key") else case.call.value_dim,
            "H": case.call.heads if queries else case.call.kv_heads,
            **dict.fromkeys("0123456789", PARTS),
            "N": ("queries" if queries else "keys") if dynamic else sizes["NQ" if queries else "NK"],
        }  # fmt: skip
        info = helper.make_tensor_value_info(name, element, [axes[a] for a in layout])
        (outputs if name == "output" else inputs).append(info)
    for name, kind in case.call.inputs.items():
        stored = helper.np_dtype_to_tensor_dtype(np.dtype(_stored(kind, dtype)))
        shape = case.call.shapes[name]
        if dynamic and name in sparse_op.LISTS:
            shape = (None,) * len(shape)
        inputs.append(helper.make_tensor_value_info(name, stored, shape))
    if len(case.call.outputs) > 1:
        lengths = ["batch", case.call.heads, "queries"] if dynamic else [sizes["B"], case.call.heads, sizes["NQ"]]
        outputs.append(helper.make_tensor_value_info("log_sum_exp", TensorProto.FLOAT, lengths))
    graph = helper.make_graph([node], "case", inputs, outputs)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("attncompile", 1)]
    return helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)


def _stored(kind: str, dtype: str) -> Any:
    """NumPy type of an optional input: halves are given in the body's type."""
    return TYPES[dtype] if kind in ("float16", "bfloat16") else kind


def run(made: onnx.ModelProto, case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Outputs by name, float32 and with logical axes."""
    onnx.checker.check_model(made, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for name, array in case.inputs().items():
        if name in ("query", "key", "value"):
            feeds[name] = laid(array, case.layouts[("query", "key", "value").index(name)]).astype(TYPES[dtype])
        else:
            feeds[name] = array.astype(_stored(case.call.inputs[name], dtype))
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True))
    if case.layouts[3] == "BHND":
        found["output"] = found["output"].transpose(0, 2, 1, 3)
    return {name: x.astype(np.float32) for name, x in found.items()}
