"""Nodes around the standard ``Attention`` op of opset 23 and later. It needs no body: runtimes of its opset know it.

Without a cache ``is_causal`` is a lower triangle aligned at the first key, so it is used only where there are as many
queries as keys. A boolean ``attn_mask`` says which keys are seen; ONNX Runtime 1.32 wants its query axis whole up to
opset 24, so a padding mask is expanded over the queries. The scale goes as sqrt(scale) on Q and on K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.site import AttentionSite

OP_TYPE = "Attention"
FIRST_OPSET = 23


class _Nodes:
    """A list of nodes whose value names start with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def op(self, op_type: str, inputs: list[str], tag: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{self.prefix}/{tag}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"{self.prefix}/{tag}", **attributes))
        return name

    def constant(self, tag: str, array: np.ndarray) -> str:
        name = f"{self.prefix}/{tag}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name


def nodes(site: AttentionSite, causal: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    """The op and what its operands need. When all four are [B, N, H, D] they pass packed as [B, N, H * D]: no
    transposes; else whatever is not [B, H, N, D] is transposed.
    """
    made = _Nodes(f"attncompile/{site.id or site.output.value}")
    attributes: dict[str, Any] = {"scale": site.scale, "is_causal": int(causal)}
    if site.softmax_dtype == "float32" and site.dtype != "float32":
        attributes["softmax_precision"] = TensorProto.FLOAT
    operands = {"query": site.query, "key": site.key, "value": site.value}
    packed = all(x.layout == "BNHD" for x in (*operands.values(), site.output))
    inputs = []
    packed_shape = made.constant("packed_shape", np.array([0, 0, -1])) if packed else ""
    for tag, operand in operands.items():
        value = operand.value
        if packed:
            value = made.op("Reshape", [value, packed_shape], f"{tag}_packed")
        elif operand.layout == "BNHD":
            value = made.op("Transpose", [value], f"{tag}_heads_first", perm=[0, 2, 1, 3])
        inputs.append(value)
    padding = site.mask.part("padding")
    if padding is not None:
        assert padding.source is not None
        inputs.append(_over_queries(made, site, padding.source))
    if packed:
        attributes |= {"q_num_heads": site.heads, "kv_num_heads": site.kv_heads}
        out = made.op(OP_TYPE, inputs, "attention", **attributes)
        shape = made.constant("output_shape", np.array([0, 0, site.heads, site.value_dim]))
        made.op("Reshape", [out, shape], "output", output=site.output.value)
    elif site.output.layout == "BNHD":
        out = made.op(OP_TYPE, inputs, "attention", **attributes)
        made.op("Transpose", [out], "output", output=site.output.value, perm=[0, 2, 1, 3])
    else:
        made.op(OP_TYPE, inputs, "attention", output=site.output.value, **attributes)
    return made.nodes, made.initializers


def _over_queries(made: _Nodes, site: AttentionSite, mask: str) -> str:
    """A padding mask [.., 1, Nk] expanded to [b, 1, Nq, Nk]; its rank may be anything up to 4."""
    axis = site.query.layout.index("N")
    length = made.op("Shape", [site.query.value], "query_length", start=axis, end=axis + 1)
    ones = made.constant("ones", np.ones(2, np.int64))
    one = made.constant("one", np.ones(1, np.int64))
    shape = made.op("Concat", [ones, length, one], "mask_shape", axis=0)
    return made.op("Expand", [mask, shape], "mask")
