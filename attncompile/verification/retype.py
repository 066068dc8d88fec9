"""A model in another floating-point type: the float64 reference of a site, and the float32 twin of a bfloat16 one.

Every tensor of a mapped type changes: graph inputs, outputs, value_info, initializers, tensor attributes, ``Cast``
targets, in nested graphs and in model-local functions. Values are converted exactly where the new type is wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx import numpy_helper as nh

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
TO_DOUBLE: Mapping[int, int] = {
    TensorProto.FLOAT: TensorProto.DOUBLE,
    TensorProto.FLOAT16: TensorProto.DOUBLE,
    TensorProto.BFLOAT16: TensorProto.DOUBLE,
}
TO_TWIN: Mapping[int, int] = {TensorProto.BFLOAT16: TensorProto.FLOAT}

_TYPE_ATTRIBUTES = {"to", "dtype", "softmax_precision", "output_dtype"}
"""Integer attributes that hold an element type (Cast, EyeLike, RandomNormal, Attention, DequantizeLinear, ...)."""


def retype(model: ModelProto, mapping: Mapping[int, int]) -> ModelProto:
    """A copy of ``model`` in which every element type in ``mapping`` is replaced. ``model`` is not changed."""
    out = ModelProto()
    out.CopyFrom(model)
    _graph(out.graph, mapping)
    for function in out.functions:
        _function(function, mapping)
    return out


def uses(model: ModelProto, elem_type: int) -> bool:
    """Whether a graph input, output, initializer or Cast target of the main graph has this element type."""
    graph = model.graph
    return (
        any(v.type.tensor_type.elem_type == elem_type for v in (*graph.input, *graph.output, *graph.value_info))
        or any(t.data_type == elem_type for t in graph.initializer)
        or any(a.name == "to" and a.i == elem_type for n in graph.node for a in n.attribute)
    )


def uses_bfloat16(model: ModelProto) -> bool:
    """Whether any tensor of ``model`` is of bfloat16, which ONNX Runtime's CPU provider cannot run."""
    return uses(model, TensorProto.BFLOAT16)


def convert_feed(feed: Mapping[str, np.ndarray], model: ModelProto) -> dict[str, np.ndarray]:
    """``feed`` cast to the element types that ``model`` declares for its inputs."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    return {k: v.astype(onnx.helper.tensor_dtype_to_np_dtype(types[k])) for k, v in feed.items() if k in types}


def _graph(graph: GraphProto, mapping: Mapping[int, int]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _value(value, mapping)
    for tensor in graph.initializer:
        _tensor(tensor, mapping)
    _nodes(graph.node, mapping)


def _function(function: FunctionProto, mapping: Mapping[int, int]) -> None:
    for value in function.value_info:
        _value(value, mapping)
    for default in function.attribute_proto:
        _attribute(default, mapping)
    _nodes(function.node, mapping)


def _nodes(nodes: Sequence[NodeProto], mapping: Mapping[int, int]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            _attribute(attribute, mapping)
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            _constant(node, mapping)
        elif node.op_type == "ConstantOfShape" and not node.attribute and TensorProto.FLOAT in mapping:
            zero = nh.from_array(np.zeros(1, onnx.helper.tensor_dtype_to_np_dtype(mapping[TensorProto.FLOAT])))
            node.attribute.append(onnx.helper.make_attribute("value", zero))  # its default is a float32 zero


def _attribute(attribute: AttributeProto, mapping: Mapping[int, int]) -> None:
    if attribute.type == AttributeProto.GRAPH:
        _graph(attribute.g, mapping)
    elif attribute.type == AttributeProto.TENSOR:
        _tensor(attribute.t, mapping)
    elif attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES and attribute.i in mapping:
        attribute.i = mapping[attribute.i]


def _constant(node: NodeProto, mapping: Mapping[int, int]) -> None:
    """``value_float(s)`` are float32 by definition; state the value as a tensor of the new type."""
    if TensorProto.FLOAT not in mapping:
        return
    dtype = onnx.helper.tensor_dtype_to_np_dtype(mapping[TensorProto.FLOAT])
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats") and not attribute.ref_attr_name:
            data = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = nh.from_array(np.asarray(data, np.float32).astype(dtype))
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _tensor(tensor: TensorProto, mapping: Mapping[int, int]) -> None:
    if tensor.data_type not in mapping:
        return
    dtype = onnx.helper.tensor_dtype_to_np_dtype(mapping[tensor.data_type])
    name = tensor.name
    tensor.CopyFrom(nh.from_array(nh.to_array(tensor).astype(dtype), name))


def _value(value: ValueInfoProto, mapping: Mapping[int, int]) -> None:
    if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type in mapping:
        value.type.tensor_type.elem_type = mapping[value.type.tensor_type.elem_type]
