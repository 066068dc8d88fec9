"""What the nodes of a model ask of kernels: each node of our domain as an ``OpCall``, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, defs, helper, shape_inference

from attncompile.core.errors import BadModel, Unsupported
from attncompile.core.kernel import Kernel, OpCall
from attncompile.core.layout import part, unpacked
from attncompile.core.verdict import Verdict
from attncompile.kernels import node_tensors, symbols
from attncompile.kernels.expressions import text
from attncompile.kernels.records import NodeCall
from attncompile.kernels.symbols import OPERANDS, Sizes

DOMAIN = "attncompile"
DTYPES = ("float16", "bfloat16")
"""Element types that kernels are compiled for."""

_PLAIN = (
    AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING, AttributeProto.INTS, AttributeProto.FLOATS
)  # fmt: skip
WIDE = ("TState", "tensor(float)")
"""The types that schemas give to inputs in float32 beside half operands."""

_OF_A_RUNTIME = ("plugin_namespace", "plugin_version", "aot")
"""Attributes that only TensorRT's parser reads."""


def find(model: ModelProto, kernels: Mapping[str, Kernel], dtype: str = "float16") -> list[NodeCall]:
    """All nodes of our domain, in order. ``kernels`` by op. Nodes in float32 are taken for ``dtype``, their optional
    float inputs too: the model is to be converted before kernels run in it. ``model`` is not changed.

    Raises:
        BadModel: the shapes in the file contradict its ops.
    """
    for kernel in kernels.values():
        kernel.register()
    found: list[NodeCall] = []
    if any(node.domain == DOMAIN for node, _, _ in _nodes(model.graph, "", {})):
        described = inferred(model)
        opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        for node, scope, types in _nodes(described.graph, "", {}):
            if node.domain == DOMAIN:
                found.append(_call(node, scope, types, kernels, dtype, opset))
    reason = Verdict.no("function", "nodes inside of functions have no known shapes", "inline the model's functions")
    for function in model.functions:
        if function.domain != DOMAIN:
            found += [
                NodeCall(n.name, f"{function.domain}::{function.name}", n.op_type, reason)
                for n in function.node
                if n.domain == DOMAIN
            ]
    return found


def inferred(model: ModelProto) -> ModelProto:
    """A copy whose values are described as far as ONNX can tell. Raises ``BadModel``."""
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except (ValueError, RuntimeError) as error:  # what an op's own inference raises comes through as it is
        hint = "check the file with onnx.checker.check_model"
        raise BadModel(f"the model's shapes do not fit its ops: {' '.join(str(error).split())}", hint) from None


_Types = Mapping[str, tuple[int, Sizes | None]]
"""Element type and sizes of every value that can be seen."""


def _nodes(graph: GraphProto, scope: str, outer: _Types) -> Iterator[tuple[NodeProto, str, _Types]]:
    types = {**outer, **_types(graph)}
    for place, node in enumerate(graph.node):
        yield node, scope, types
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                inside = f"{node.name or f'{node.op_type}{place}'}.{attribute.name}"
                yield from _nodes(body, f"{scope}/{inside}" if scope else inside, types)


def _types(graph: GraphProto) -> dict[str, tuple[int, Sizes | None]]:
    found: dict[str, tuple[int, Sizes | None]] = {}
    for value in (*graph.value_info, *graph.output, *graph.input):
        tensor = value.type.tensor_type
        sizes = None
        if tensor.HasField("shape"):
            sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        found[value.name] = (tensor.elem_type, sizes)
    for stored in graph.initializer:
        found[stored.name] = (stored.data_type, tuple(stored.dims))
    return found


def _call(
    node: NodeProto, scope: str, types: _Types, kernels: Mapping[str, Kernel], dtype: str, opset: int
) -> NodeCall:
    try:
        if node.op_type not in kernels:
            raise Unsupported("no-kernel", f"there is no GPU kernel for {node.op_type}", "it runs through its body")
        schema = defs.get_schema(node.op_type, 1, DOMAIN)
        given, shapes, layouts = _given(node, schema, types, dtype)
        call = kernels[node.op_type].call(given)
        if call.op not in kernels:
            raise Unsupported("no-kernel", f"there is no GPU kernel for {call.op}")
        table = symbols.table(call, shapes, layouts)
        kinds = {schema.inputs[i].name: types[value][0] for i, value in enumerate(node.input) if value}
        tensors = node_tensors.of_node(node, schema, kinds, shapes, layouts, opset)
    except Unsupported as error:
        return NodeCall(node.name, scope, node.op_type, Verdict.of(error))
    written = {name: text(expression) for name, expression in table.items()}
    return NodeCall(node.name, scope, node.op_type, Verdict.yes(f"kernels of {call.op}"), call, written, tensors)


def _given(
    node: NodeProto, schema: defs.OpSchema, types: _Types, dtype: str
) -> tuple[OpCall, dict[str, Sizes], dict[str, str]]:
    """The node as its schema says it, with the sizes of its inputs and the layouts of its operands."""
    attributes = _attributes(node, schema)
    layouts = {name: str(attributes.pop(f"{name[0]}_layout", "BNHD")) for name in OPERANDS}
    formal = {p.name: p for p in schema.inputs}
    names = list(formal)
    present = {names[i]: value for i, value in enumerate(node.input) if value}
    shapes: dict[str, Sizes] = {}
    kinds: dict[str, str] = {}
    for name, value in present.items():
        kind, sizes = types.get(value, (TensorProto.UNDEFINED, None))
        if sizes is None:
            raise Unsupported("shapes", f"the number of axes of {name} is not known")
        shapes[name], kinds[name] = sizes, _type_name(kind)
    main = names[0]
    if kinds[main] == "float32":  # what is float32 whatever the operands are (states) stays so
        kinds = {
            name: dtype if kind == "float32" and formal[name].type_str not in WIDE else kind
            for name, kind in kinds.items()
        }
    dims = {n: dict(zip(layouts[n], shapes[n], strict=False)) for n in OPERANDS[:3] if n in shapes}
    if "state" in shapes:
        dims["state"] = dict(zip("BHCDE", shapes["state"], strict=False))
    if "scores" in shapes:  # an op without operands has no head dim
        dims["scores"] = {**dict(zip("BHTC", shapes["scores"], strict=False)), "D": 1, "E": 1}
    columns = [n for n in (*dims, "output") if unpacked(layouts.get(n, "")) == symbols.COLUMNS]
    if columns:
        attributes["columns"] = columns
    outputs = tuple(schema.outputs[i].name for i, value in enumerate(node.output) if value)
    keys = next(n for n in ("key", "state", "query", "scores") if n in dims)
    first = next(iter(dims))
    valued = next((n, axis) for n, axis in (("value", "D"), ("state", "E"), (first, "D")) if n in dims)
    return (
        OpCall(
            op=node.op_type, dtype=kinds[main],
            heads=_known(dims, first, "H"), kv_heads=_known(dims, keys, "H"), head_dim=_known(dims, first, "D"),
            value_dim=_known(dims, *valued),
            attributes=attributes,
            inputs={name: kind for name, kind in kinds.items() if name not in OPERANDS},
            shapes={name: sizes for name, sizes in shapes.items() if name not in OPERANDS}, outputs=outputs,
            batch=dims[first]["B"], query_length=dims["query"]["N"] if "query" in dims else None,
            key_length=dims["key"]["N"] if "key" in dims else None,
            packed=any(part(layouts[n]) for n in OPERANDS[:3] if n in shapes),
        ),
        shapes,
        layouts,
    )  # fmt: skip


def _known(dims: Mapping[str, Mapping[str, int | None]], name: str, axis: str) -> int:
    size = dims[name].get(axis)
    if size is None:
        what = {"H": "number of heads", "D": "head dim", "E": "value dim"}[axis]
        raise Unsupported("shapes", f"the {what} of {name} is not known", "kernels are compiled for it: fix it")
    return size


def _attributes(node: NodeProto, schema: defs.OpSchema) -> dict[str, Any]:
    """Values of the node's attributes, else the schema's defaults; tensors are left out: kernels get no such calls."""
    found: dict[str, Any] = {}
    given = {a.name: a for a in node.attribute}
    for name, formal in schema.attributes.items():
        attribute = given.get(name, formal.default_value)
        if name in _OF_A_RUNTIME or attribute.type not in _PLAIN:
            continue
        value = helper.get_attribute_value(attribute)
        found[name] = value.decode() if isinstance(value, bytes) else list(value) if _many(value) else value
    return found


def _many(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _type_name(kind: int) -> str:
    if kind == TensorProto.UNDEFINED:
        raise Unsupported("dtype", "an input's element type is not known")
    if kind == TensorProto.BFLOAT16:
        return "bfloat16"
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind))
