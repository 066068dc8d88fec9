"""A model at concrete sizes: every shape, and every value that depends on nothing but constants and shapes.

Exporters compute scales, reshapes and masks in the graph from ``Shape`` nodes. Binding each dynamic dimension to a
number turns all of that into constants: shapes come from ONNX's own inference node by node, small values are
evaluated on the way, large ones (masks) on demand by ONNX Runtime on the slice of the graph that makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    defs,
    helper,
    numpy_helper,
    shape_inference,
)
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import Unsupported
from attncompile.core.model import Model
from attncompile.passes.load import node_inputs, tensor_value

SMALL = 64
"""Values of at most this many elements are evaluated eagerly: shapes, axes, scales."""

MAX_ELEMENTS = 1 << 27
"""A value above this (a mask of about 11,500 tokens squared) is not evaluated."""

_NOT_CONSTANT = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)

_GROWING = frozenset({"Expand", "ConstantOfShape", "Range", "Tile", "OneHot", "Pad", "Resize"})
"""Operators that can make something large out of something small."""


def symbol_of(value: str, axis: int, dim: TensorShapeProto.Dimension) -> str | None:
    """The name of a dynamic dimension of a graph input (``input:axis`` where the file gives none); None if fixed."""
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return None
    return dim.dim_param or f"{value}:{axis}"


def _without_idle(nodes: list[NodeProto], idle: frozenset[str]) -> list[NodeProto]:
    """The nodes, those that read an idle node's output copied so that they read its input (bodies keep their names)."""
    source = {n.output[0]: n.input[0] for n in nodes if n.output and n.output[0] in idle}

    def origin(value: str) -> str:
        while value in source:
            value = source[value]
        return value

    result = []
    for node in nodes:
        if any(i in source for i in node.input):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [origin(i) for i in node.input]
            node = copy
        result.append(node)
    return result


class GraphIndex:
    """Producers, consumers and constants of the main graph, by value name. Built once a model, independent of sizes.

    ``idle`` names outputs of nodes that only pass their input on: whoever reads them is shown reading the input.
    """

    def __init__(self, model: Model, idle: frozenset[str] = frozenset()) -> None:
        graph = model.proto.graph
        self.model = model
        self.nodes = _without_idle(list(graph.node), idle) if idle else list(graph.node)
        self.folder = model.path.parent
        self.outputs = {o.name for o in graph.output}
        self.initializers = {t.name: t for t in graph.initializer}
        self.inputs = {i.name: i for i in graph.input if i.name not in self.initializers}
        self.producer: dict[str, NodeProto] = {o: n for n in self.nodes for o in n.output if o}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node_inputs(node)):
                self.consumers.setdefault(value, []).append(node)
        for node in [n for n in self.nodes if idle and n.output[0] in idle]:
            if node.output[0] not in self.consumers and node.output[0] not in self.outputs:
                self.consumers[node.input[0]].remove(node)
        self._data_inputs: dict[str, frozenset[str]] = {}

    @cached_property
    def order(self) -> list[NodeProto]:
        """The nodes in topological order (files in the wild are not always sorted)."""
        nodes = self.nodes
        position = {id(n): i for i, n in enumerate(nodes)}
        done: set[str] = set(self.inputs) | set(self.initializers)
        result: list[NodeProto] = []
        seen: set[int] = set()
        for root in nodes:
            stack = [root]
            while stack:
                node = stack[-1]
                if position[id(node)] in seen:
                    stack.pop()
                    continue
                missing = [
                    self.producer[v]
                    for v in node_inputs(node)
                    if v in self.producer and position[id(self.producer[v])] not in seen
                ]
                if missing:
                    stack.extend(missing)
                    continue
                seen.add(position[id(node)])
                done.update(node.output)
                result.append(node)
                stack.pop()
        return result

    def data_inputs(self, value: str) -> frozenset[str]:
        """The graph inputs (or random nodes) whose data, not only whose shape, reaches ``value``."""
        stack = [value]
        while stack:
            name = stack[-1]
            if name in self._data_inputs:
                stack.pop()
                continue
            node = self.producer.get(name)
            if node is None:
                self._data_inputs[name] = frozenset({name}) if name in self.inputs else frozenset()
                continue
            if node.op_type in ("Shape", "Size"):
                self._data_inputs[name] = frozenset()
                continue
            if node.op_type in _NOT_CONSTANT:
                self._data_inputs[name] = frozenset({name})
                continue
            parents = list(node_inputs(node))
            missing = [p for p in parents if p not in self._data_inputs]
            if missing:
                stack.extend(missing)
                continue
            self._data_inputs[name] = frozenset[str]().union(*(self._data_inputs[p] for p in parents))
        return self._data_inputs[value]

    def slice_nodes(self, value: str) -> list[NodeProto]:
        """The nodes that ``value`` is made by, cut at ``Shape`` nodes (kept), in topological order."""
        wanted: set[int] = set()
        result: list[NodeProto] = []
        stack: list[tuple[str, bool]] = [(value, False)]
        while stack:
            name, expanded = stack.pop()
            node = self.producer.get(name)
            if node is None:
                continue
            if expanded:
                if id(node) not in wanted:
                    wanted.add(id(node))
                    result.append(node)
                continue
            if id(node) in wanted:
                continue
            stack.append((name, True))
            if node.op_type not in ("Shape", "Size"):
                stack.extend((v, False) for v in node_inputs(node))
        return result


class World:
    """The model with its symbolic dimensions bound to numbers.

    Attributes:
        shapes: value -> shape. Absent where inference cannot tell (values after unknown custom ops).
        types: value -> ONNX element type.
        traced: what the detector found out about a value, so that shared values are followed once.
    """

    def __init__(self, index: GraphIndex, binding: Mapping[str, int]) -> None:
        self.index = index
        self.binding = dict(binding)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, int] = {}
        self._known: dict[str, np.ndarray] = {}
        self._opsets = {o.domain: o.version for o in index.model.proto.opset_import}
        self._opset_ids = list(index.model.proto.opset_import)
        self._large: dict[str, np.ndarray] = {}
        self.traced: dict[str, object] = {}
        self._sweep()

    def without_idle(self) -> World:
        """The same sizes over an index in which nodes that change nothing are stepped over: Identity, and a Cast to the
        type that its input has.
        """
        idle = frozenset(n.output[0] for n in self.index.nodes if self._is_idle(n))
        return World.over(self, GraphIndex(self.index.model, idle)) if idle else self

    def _is_idle(self, node: NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Identity", "Cast") or not node.output[0]:
            return False
        kind, before = self.types.get(node.output[0]), self.types.get(node.input[0])
        return node.op_type == "Identity" or (kind is not None and kind == before)

    @staticmethod
    def over(world: World, index: GraphIndex) -> World:
        """``world`` as seen through another index of the same model."""
        other = object.__new__(World)
        other.__dict__.update(world.__dict__)
        other.index, other.traced = index, {}
        return other

    def value(self, name: str) -> np.ndarray:
        """The value of ``name``, which must depend on shapes and constants only.

        Raises:
            Unsupported: it depends on an input's data, is too large, or cannot be evaluated.
        """
        if name in self._known:
            return self._known[name]
        if name in self._large:
            return self._large[name]
        if name in self.index.initializers:
            return self._initializer(name)
        data = self.index.data_inputs(name)
        if data:
            raise Unsupported("data-dependent", f"'{name}' depends on the data of input {', '.join(sorted(data))}")
        self._large[name] = self._run_slice(name)
        return self._large[name]

    def scalar(self, name: str) -> float | None:
        """The value if it has exactly one element and is computed from constants and shapes, else None."""
        shape = self.shapes.get(name)
        if shape is None or int(np.prod(shape)) != 1 or self.index.data_inputs(name):
            return None
        array = self.value(name)
        return float(array.reshape(-1)[0]) if array.dtype.kind in "fiuV" else None

    def _initializer(self, name: str) -> np.ndarray:
        tensor = self.index.initializers[name]
        if int(np.prod(tensor.dims)) > MAX_ELEMENTS:
            raise Unsupported("too-large", f"constant '{name}' has {int(np.prod(tensor.dims))} elements")
        array = tensor_value(tensor, self.index.folder)
        self._large[name] = array
        return array

    def _sweep(self) -> None:
        proto = self.index.model.proto
        types: dict[str, TypeProto] = {}
        for name, tensor in self.index.initializers.items():
            types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if int(np.prod(tensor.dims)) <= SMALL:
                self._known[name] = tensor_value(tensor, self.index.folder)
        for info in self.index.inputs.values():
            bound = TypeProto()
            bound.CopyFrom(info.type)
            for axis, dim in enumerate(bound.tensor_type.shape.dim):
                symbol = symbol_of(info.name, axis, dim)
                if symbol in self.binding:
                    dim.dim_value = self.binding[symbol]
            types[info.name] = bound
        for name, kind in types.items():
            self._note(name, kind)
        declared = {v.name: v.type for v in proto.graph.value_info}
        for node in self.index.order:
            self._infer(node, types, declared)

    def _note(self, name: str, kind: TypeProto) -> None:
        tensor = kind.tensor_type
        self.types[name] = tensor.elem_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            self.shapes[name] = tuple(d.dim_value for d in tensor.shape.dim)

    def _infer(self, node: NodeProto, types: dict[str, TypeProto], declared: Mapping[str, TypeProto]) -> None:
        if self._evaluate_small(node):
            for output in node.output:
                array = self._known[output]
                types[output] = helper.make_tensor_type_proto(
                    helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape)
                )
                self._note(output, types[output])
            return
        inferred: Mapping[str, TypeProto] = {}
        if node.domain in self._opsets and defs.has(node.op_type, self._opsets[node.domain], node.domain):
            schema = defs.get_schema(node.op_type, self._opsets[node.domain], node.domain)
            given = {i: types[i] for i in node.input if i in types}
            data = {i: numpy_helper.from_array(self._known[i], i) for i in node.input if i in self._known}
            try:
                inferred = shape_inference.infer_node_outputs(
                    schema, node, given, data, opset_imports=self._opset_ids, ir_version=10
                )
            except (shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, KeyError):
                inferred = {}  # a wrong node, or an unknown operand shape; the values after it simply have none
        for output in node.output:
            kind = inferred.get(output)
            if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.elem_type:
                kind = declared.get(output)
            if kind is not None and kind.HasField("tensor_type"):
                types[output] = kind
                self._note(output, kind)

    def _evaluate_small(self, node: NodeProto) -> bool:
        if node.op_type == "Shape" and node.input[0] in self.shapes and not node.domain:
            shape = self.shapes[node.input[0]]
            attributes = {a.name: a.i for a in node.attribute}
            start, end = attributes.get("start", 0), attributes.get("end", len(shape))
            self._known[node.output[0]] = np.array(shape[slice(start, end)], dtype=np.int64)
            return True
        if node.op_type == "Constant":
            array = self._constant(node)
            if array.size <= SMALL:
                self._known[node.output[0]] = array
                return True
            return False
        if (
            node.domain not in ("", "ai.onnx")
            or not node.input
            or node.op_type in _NOT_CONSTANT
            or any(i and i not in self._known for i in node.input)
            or any(a.type in (5, 10) for a in node.attribute)
        ):
            return False
        if node.op_type in _GROWING and self._output_elements(node) > SMALL:
            return False
        try:
            results = self._reference(node)
        except Exception:
            return False
        arrays = [np.asarray(r) for r in results]
        if any(a.size > SMALL or a.dtype == object for a in arrays):
            return False
        self._known.update(zip(node.output, arrays, strict=False))
        return all(o in self._known for o in node.output)

    def _reference(self, node: NodeProto) -> list[Any]:
        """The node's outputs. The evaluator reads a lone node as one of the newest operator set, hence the model."""
        given = {i: self._known[i] for i in node.input if i}
        infos = [
            helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for i, x in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=o) for o in node.output if o]
        model = helper.make_model(helper.make_graph([node], "node", infos, outputs), opset_imports=self._opset_ids)
        return list(ReferenceEvaluator(model).run(None, given))

    def _output_elements(self, node: NodeProto) -> float:
        values = [self._known[i] for i in node.input if i]
        if node.op_type == "Range":
            start, limit, delta = (float(v.reshape(-1)[0]) for v in values)
            return (limit - start) / delta if delta else 0
        if node.op_type == "ConstantOfShape":
            return float(np.prod(values[0], dtype=np.float64))
        if node.op_type == "Expand":
            return float(values[0].size * np.prod(values[1], dtype=np.float64))
        if node.op_type == "Tile":
            return float(values[0].size * np.prod(values[1], dtype=np.float64))
        return float("inf")

    def _constant(self, node: NodeProto) -> np.ndarray:
        for attribute in node.attribute:
            if attribute.name == "value":
                return tensor_value(attribute.t, self.index.folder)
            if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
                kind = np.float32 if "float" in attribute.name else np.int64
                return np.array(helper.get_attribute_value(attribute), dtype=kind)
        return np.array(None, dtype=object).repeat(SMALL + 1)

    def _run_slice(self, name: str) -> np.ndarray:
        shape = self.shapes.get(name)
        if shape is not None and int(np.prod(shape)) > MAX_ELEMENTS:
            raise Unsupported("too-large", f"'{name}' has shape {list(shape)} at {self.binding}")
        model, _ = slice_model(self, [name])
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return np.asarray(session.run([name], {})[0])
        except Exception as first:  # ONNX Runtime raises its own untyped errors, and has no kernels for bfloat16
            try:
                return np.asarray(next(iter(ReferenceEvaluator(model).run([name], {}))))
            except Exception:
                reason = str(first)[:200]
        raise Unsupported("not-evaluated", f"'{name}' could not be evaluated: {reason}")

    def known_initializers(self, names: set[str]) -> list[TensorProto]:
        """Initializers (weights loaded) or evaluated small values, for the names that have one."""
        result = []
        for name in sorted(names):
            if name in self._known:
                result.append(numpy_helper.from_array(np.asarray(self._known[name], order="C"), name))
            elif name in self.index.initializers:
                tensor = TensorProto()
                tensor.CopyFrom(self.index.initializers[name])
                if tensor.data_location == TensorProto.EXTERNAL:
                    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.index.folder))
                    tensor.data_location = TensorProto.DEFAULT
                    del tensor.external_data[:]
                result.append(tensor)
        return result


def slice_model(world: World, outputs: list[str]) -> tuple[ModelProto, list[str]]:
    """A model that computes ``outputs`` from constants and shapes alone; values already known become initializers.

    Returns the model and the graph inputs it still needs (empty for shape-only values).
    """
    index = world.index
    nodes: list[NodeProto] = []
    taken: set[int] = set()
    for output in outputs:
        for node in index.slice_nodes(output):
            if id(node) not in taken and not all(o in world._known for o in node.output if o):
                taken.add(id(node))
                nodes.append(node)
    # Nodes needed only by values that are already known fall away.
    live = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if live & set(node.output):
            kept.append(node)
            live |= set(node_inputs(node))
    kept.reverse()
    made = {o for n in kept for o in n.output}
    reads = {v for n in kept for v in node_inputs(n)} | set(outputs)
    initializers = world.known_initializers(reads - made)
    missing = sorted(reads - made - {t.name for t in initializers})
    graph = helper.make_graph(
        kept,
        "slice",
        [index.inputs[m] for m in missing if m in index.inputs],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=index.model.proto.opset_import, ir_version=10)
    model.functions.extend(index.model.proto.functions)
    return model, missing
