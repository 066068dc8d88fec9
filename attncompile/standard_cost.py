"""What a graph of standard ops takes on a GPU at least: what its products multiply and its ops move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from attncompile.kernels.calls import inferred

VIEWS = frozenset({
    "Constant", "Expand", "Flatten", "Identity", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
"""Taken to cost nothing: where one moves something, the original takes longer than is said here."""
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
ELEMENT = 2
"""Bytes of an element: a model that kernels take is in half precision."""

Shapes = Mapping[str, tuple[int, ...]]


def milliseconds(model: ModelProto, bandwidth: float, products: float, pointwise: bool, launch: float = 0.0) -> float:
    """At least so long. ``bandwidth`` in bytes a nanosecond, ``products`` in flops a millisecond, ``launch`` in
    milliseconds; without ``pointwise`` all but products is taken to be fused away. What has no known shape is not
    counted, nor what functions do.
    """
    return _graph(inferred(model).graph, {}, bandwidth * 1e6, products, pointwise, launch)


def _graph(
    graph: GraphProto, outer: Shapes, bandwidth: float, products: float, pointwise: bool, launch: float
) -> float:  # fmt: skip
    shapes = {**outer, **dict(_shapes(graph))}
    total = 0.0
    for node in graph.node:
        bodies = [a.g for a in node.attribute if a.HasField("g")]
        if bodies:  # of two branches the shorter one
            each = [_graph(body, shapes, bandwidth, products, pointwise, launch) for body in bodies]
            total += _iterations(node, shapes) * min(each)
            continue
        flops = _flops(node, shapes)
        moved = sum(ELEMENT * math.prod(shapes[v]) for v in (*node.input, *node.output) if v in shapes) / bandwidth
        if flops is not None:
            total += launch + max(flops / products, moved)
        elif pointwise and not node.domain and node.op_type not in VIEWS:
            total += launch + moved
    return total


def _shapes(graph: GraphProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of values of a float type whose sizes are all known."""
    for tensor in graph.initializer:
        if tensor.data_type in FLOATS:
            yield tensor.name, tuple(tensor.dims)
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        sizes = tensor.shape.dim
        if tensor.elem_type in FLOATS and tensor.HasField("shape") and all(d.HasField("dim_value") for d in sizes):
            yield value.name, tuple(d.dim_value for d in sizes)


def _iterations(node: NodeProto, shapes: Shapes) -> int:
    """How often the body of a Scan runs; 1 where that is not known, and of an If and a Loop."""
    if node.op_type != "Scan":
        return 1
    count = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
    axes = next((list(a.ints) for a in node.attribute if a.name == "scan_input_axes"), [0] * count)
    known = (
        (shapes[v], axis) for v, axis in zip(node.input[len(node.input) - count :], axes, strict=True) if v in shapes
    )
    return next((shape[axis] for shape, axis in known), 1)


def _flops(node: NodeProto, shapes: Shapes) -> float | None:
    """Of a product, 2 a multiply-add; None of what is none, or has no known shapes."""
    if node.domain or any(v not in shapes for v in (*node.input[:2], node.output[0])):
        return None
    operands = [shapes[v] for v in node.input[:2]]
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMul":
        return 2.0 * math.prod(shapes[node.output[0]]) * operands[0][-1]
    if node.op_type == "Gemm":
        return 2.0 * math.prod(shapes[node.output[0]]) * operands[0][0 if given.get("transA") else 1]
    if node.op_type == "Einsum" and len(node.input) == 2:
        return _einsum(given["equation"].decode(), operands)
    return None


def _einsum(equation: str, operands: Sequence[tuple[int, ...]]) -> float | None:
    """One multiply-add for every choice of all letters; None with an ellipsis."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or any(len(t) != len(shape) for t, shape in zip(terms, operands, strict=True)):
        return None
    sizes = {letter: n for t, shape in zip(terms, operands, strict=True) for letter, n in zip(t, shape, strict=True)}
    return 2.0 * math.prod(sizes.values())
