"""ONNX Runtime's ``MultiHeadAttention`` in standard operators: its kernels have no float64, and a site needs a truth.

Only what a site leaves to it is written: no bias, nothing packed, no cache (``passes/written_out.py`` took them out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_DOMAIN = "com.microsoft"


def in_standard_operators(model: ModelProto) -> ModelProto:
    """``model`` itself, or a copy without ``MultiHeadAttention`` nodes; those with more than query, key, value and
    attention_bias stay. Shapes of their operands have to be inferable.
    """
    if not any(_understood(n) for n in model.graph.node):
        return model
    result = ModelProto()
    result.CopyFrom(model)
    ranks = {i.name: len(i.type.tensor_type.shape.dim) for i in result.graph.input}
    nodes: list[NodeProto] = []
    for at, node in enumerate(model.graph.node):
        nodes += _written(node, ranks, result, f"standard{at}") if _understood(node) else [node]
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def _understood(node: NodeProto) -> bool:
    given = [*node.input, *([""] * 8)]
    outputs = [o for o in node.output if o]
    known = (node.domain, node.op_type) == (_DOMAIN, "MultiHeadAttention") and len(outputs) == 1
    return known and all(given[:3]) and not any((given[3], given[4], *given[6:]))


def _written(node: NodeProto, ranks: dict[str, int], model: ModelProto, base: str) -> list[NodeProto]:
    """softmax(scale * Q K^T + attention_bias + triangle) V, heads first."""
    made: list[NodeProto] = []
    attributes = {a.name: a for a in node.attribute}
    heads = int(attributes["num_heads"].i)

    def op(kind: str, inputs: Sequence[str], **more: Any) -> str:
        made.append(helper.make_node(kind, list(inputs), [f"{base}/{len(made)}"], **more))
        return str(made[-1].output[0])

    def const(array: np.ndarray) -> str:
        tensor = numpy_helper.from_array(array, f"{base}/constant{len(model.graph.initializer)}")
        model.graph.initializer.append(tensor)
        return str(tensor.name)

    def split(value: str) -> str:
        if ranks.get(value) == 4:  # keys and values may come as [batch, heads, sequence, dim]
            return value
        apart = op("Reshape", [value, const(np.array([0, 0, heads, -1], np.int64))])
        return op("Transpose", [apart], perm=[0, 2, 1, 3])

    query, key, value = (split(v) for v in node.input[:3])
    scores = op("MatMul", [query, op("Transpose", [key], perm=[0, 1, 3, 2])])
    scale = attributes["scale"].f if "scale" in attributes else 0.0
    if scale:
        factor = op("CastLike", [const(np.array(scale, np.float32)), scores])
    else:
        dim = op("CastLike", [op("Shape", [query], start=3, end=4), scores])
        factor = op("Reciprocal", [op("Sqrt", [dim])])
    scores = op("Mul", [scores, factor])
    if len(node.input) > 5 and node.input[5]:
        scores = op("Add", [scores, node.input[5]])
    if "unidirectional" in attributes and attributes["unidirectional"].i:
        ones = op("ConstantOfShape", [op("Shape", [scores])], value=numpy_helper.from_array(np.ones(1, np.int64)))
        below = op("Cast", [op("Trilu", [ones], upper=0)], to=TensorProto.BOOL)
        lowest = op("CastLike", [const(np.array(-np.inf, np.float32)), scores])
        scores = op("Where", [below, scores, lowest])
    out = op("MatMul", [op("Softmax", [scores], axis=-1), value])
    rows = op("Transpose", [out], perm=[0, 2, 1, 3])
    flat = const(np.array([0, 0, -1], np.int64))
    made.append(helper.make_node("Reshape", [rows, flat], [node.output[0]]))
    return made
