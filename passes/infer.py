"""Shapes, element types and small values, node by node: ONNX's own inference, remembered by operator and operands.

The layers of a model are copies of one another, and so are the nodes of one model at several sizes: what a node gives
follows from its operator, its attributes and what is known of its inputs, so it is worked out once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TypeProto,
    ValueInfoProto,
    defs,
    helper,
    numpy_helper,
    shape_inference,
)
from onnx.reference import ReferenceEvaluator

from attncompile.passes import contrib_shapes
from attncompile.passes.load import node_inputs, tensor_value

SMALL = 64
"""Values of at most this many elements are evaluated eagerly: shapes, axes, scales."""

CONTROL = frozenset({"If", "Loop", "Scan"})
"""Standard operators whose bodies are understood."""

NOT_CONSTANT = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)

_GROWING = frozenset({"Expand", "ConstantOfShape", "Range", "Tile", "OneHot", "Pad", "Resize"})
"""Operators that can make something large out of something small."""


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of a value at one binding. Facts of one ``Inference`` that say the same are the same object.

    ``shape`` is None unless every dimension is known; ``known`` is the value itself where it is small and computed from
    constants and shapes.
    """

    kind: TypeProto
    shape: tuple[int, ...] | None
    known: np.ndarray | None

    @property
    def elem_type(self) -> int:
        return int(self.kind.tensor_type.elem_type)


@dataclass(frozen=True, slots=True)
class Step:
    """A node in its place. ``key`` is its first named output; ``signature`` stands for its operator and attributes."""

    node: NodeProto
    key: str
    signature: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bodies: tuple[tuple[str, GraphPlan], ...]


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """A graph, ready to be inferred at any binding."""

    steps: tuple[Step, ...]
    stored: Mapping[str, Facts]
    declared: Mapping[str, TypeProto]
    inputs: tuple[ValueInfoProto, ...]
    outputs: tuple[str, ...]


def topological(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes in an order in which each value is made before it is read (files in the wild are not always sorted)."""
    producer = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    needs: list[list[int] | None] = [None] * len(nodes)
    done = [False] * len(nodes)
    result: list[NodeProto] = []
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            at = stack[-1]
            if done[at]:
                stack.pop()
                continue
            before = needs[at]
            if before is None:
                before = needs[at] = [producer[v] for v in node_inputs(nodes[at]) if v in producer]
                missing = [i for i in before if not done[i]]
                if missing:
                    stack.extend(missing)
                    continue
            # Whatever it waited for was above it on the stack, so it is done (load refuses cycles).
            done[at] = True
            result.append(nodes[at])
            stack.pop()
    return result


class Inference:
    """Infers the nodes of one model."""

    def __init__(self, proto: ModelProto, folder: Path) -> None:
        self._folder = folder
        self._opsets = {_standard(o.domain): o.version for o in proto.opset_import}
        self._opset_ids = list(proto.opset_import)
        self._signatures: dict[object, int] = {}
        self._facts: dict[object, Facts] = {}
        self._results: dict[tuple[object, ...], tuple[Facts | None, ...]] = {}

    # Facts.

    def facts(self, kind: TypeProto, known: np.ndarray | None = None) -> Facts:
        """The facts of a value of this type, and of this value if it is known."""
        value = None if known is None else (known.dtype.str, known.shape, known.tobytes())
        key = (kind.SerializeToString(deterministic=True), value)
        found = self._facts.get(key)
        if found is None:
            tensor = kind.tensor_type
            shape = None
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
                shape = tuple(d.dim_value for d in tensor.shape.dim)
            found = self._facts[key] = Facts(kind, shape, known)
        return found

    def of_array(self, array: np.ndarray) -> Facts:
        kind = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape))
        return self.facts(kind, array)

    def of_type(self, elem_type: int, shape: Sequence[int | None] | None) -> Facts:
        """``shape`` None: of unknown rank; a dimension None: unknown."""
        return self.facts(helper.make_tensor_type_proto(elem_type, shape))

    def either(self, a: Facts | None, b: Facts | None) -> Facts | None:
        """What holds of a value that is one of two: None if nothing does."""
        if a is b or a is None or b is None or a.elem_type != b.elem_type:
            return a if a is b else None
        return self.of_type(a.elem_type, common(dimensions(a), dimensions(b)))

    # Plans.

    def plan(self, graph: GraphProto) -> GraphPlan:
        stored = {}
        for tensor in graph.initializer:
            kind = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            small = int(np.prod(tensor.dims, dtype=object)) <= SMALL
            stored[tensor.name] = self.facts(kind, tensor_value(tensor, self._folder) if small else None)
        steps = tuple(self._step(n) for n in topological(list(graph.node)))
        declared = {v.name: v.type for v in graph.value_info}
        inputs = tuple(i for i in graph.input if i.name not in stored)
        return GraphPlan(steps, stored, declared, inputs, tuple(o.name for o in graph.output))

    def _step(self, node: NodeProto) -> Step:
        bodies: tuple[tuple[str, GraphPlan], ...] = ()
        key = next((o for o in node.output if o), "")
        if any(a.type in (5, 10) for a in node.attribute):
            signature: object = id(node)
            if node.op_type in CONTROL and not _standard(node.domain):
                bodies = tuple((a.name, self.plan(a.g)) for a in node.attribute if a.type == 5)
        elif node.op_type == "Constant":
            signature = ("Constant", id(node))
        else:
            written = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
            present = (tuple(bool(i) for i in node.input), tuple(bool(o) for o in node.output))
            signature = (node.op_type, node.domain, node.overload, present, tuple(written))
        number = self._signatures.setdefault(signature, len(self._signatures))
        return Step(node, key, number, tuple(node.input), tuple(node.output), bodies)

    # Nodes.

    def results(self, step: Step, operands: tuple[Facts | None, ...]) -> tuple[Facts | None, ...]:
        """What is known of the outputs; None for one that inference says nothing about."""
        key = (step.signature, *operands)
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = self._infer(step, operands)
        return found

    def _infer(self, step: Step, operands: tuple[Facts | None, ...]) -> tuple[Facts | None, ...]:
        node = step.node
        arrays = self._evaluate(node, operands)
        if arrays is not None:
            return tuple(self.of_array(a) for a in arrays)
        domain = _standard(node.domain)
        if contrib_shapes.is_contrib(domain, node.op_type):
            given = {i: f.kind for i, f in zip(node.input, operands, strict=True) if f is not None}
            return self._of_kinds(node, contrib_shapes.infer(node, given))
        if domain not in self._opsets or not defs.has(node.op_type, self._opsets[domain], domain):
            return (None,) * len(node.output)
        schema = defs.get_schema(node.op_type, self._opsets[domain], domain)
        given = {i: f.kind for i, f in zip(node.input, operands, strict=True) if f is not None}
        data = {
            i: numpy_helper.from_array(f.known, i)
            for i, f in zip(node.input, operands, strict=True)
            if f is not None and f.known is not None
        }
        try:
            inferred: Mapping[str, TypeProto] = shape_inference.infer_node_outputs(
                schema, node, given, data, opset_imports=self._opset_ids, ir_version=10
            )
        except (shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, KeyError):
            inferred = {}  # a wrong node, or an unknown operand shape; the values after it simply have none
        return self._of_kinds(node, inferred)

    def _of_kinds(self, node: NodeProto, inferred: Mapping[str, TypeProto]) -> tuple[Facts | None, ...]:
        kinds = [inferred.get(o) for o in node.output]
        return tuple(
            self.facts(k) if k is not None and k.HasField("tensor_type") and k.tensor_type.elem_type else None
            for k in kinds
        )

    def _evaluate(self, node: NodeProto, operands: tuple[Facts | None, ...]) -> list[np.ndarray] | None:
        """The values of all outputs, where they are small and the inputs are known."""
        domain = _standard(node.domain)
        if node.op_type == "Shape" and not domain:
            shape = operands[0].shape if operands and operands[0] is not None else None
            attributes = {a.name: a.i for a in node.attribute}
            if shape is None:
                return None
            start, end = attributes.get("start", 0), attributes.get("end", len(shape))
            return [np.array(shape[slice(start, end)], dtype=np.int64)]
        if node.op_type == "Constant":
            array = self._constant(node)
            return [array] if array is not None and array.size <= SMALL else None
        known = [f.known if f is not None else None for i, f in zip(node.input, operands, strict=True) if i]
        values = [v for v in known if v is not None]
        if domain or not node.input or node.op_type in NOT_CONSTANT or len(values) < len(known):
            return None
        if any(a.type in (5, 10) for a in node.attribute):
            return None
        if node.op_type in _GROWING and _output_elements(node, values) > SMALL:
            return None
        try:
            results = self._reference(node, operands)
        except Exception:
            return None
        arrays = [np.asarray(r) for r in results]
        if any(a.size > SMALL or a.dtype == object for a in arrays) or len(arrays) < len(node.output):
            return None
        return arrays[: len(node.output)]

    def _reference(self, node: NodeProto, operands: tuple[Facts | None, ...]) -> list[Any]:
        """The node's outputs. The evaluator reads a lone node as one of the newest operator set, hence the model."""
        given = {i: f.known for i, f in zip(node.input, operands, strict=True) if i and f is not None}
        infos = [
            helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for i, x in given.items()
            if x is not None
        ]
        outputs = [onnx.ValueInfoProto(name=o) for o in node.output if o]
        model = helper.make_model(helper.make_graph([node], "node", infos, outputs), opset_imports=self._opset_ids)
        return list(ReferenceEvaluator(model).run(None, given))

    def _constant(self, node: NodeProto) -> np.ndarray | None:
        for attribute in node.attribute:
            if attribute.name == "value":
                return tensor_value(attribute.t, self._folder)
            if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
                kind = np.float32 if "float" in attribute.name else np.int64
                return np.array(helper.get_attribute_value(attribute), dtype=kind)
        return None


def dimensions(facts: Facts) -> list[int | None] | None:
    """The dimensions, None for one that is not known; None where the rank is not."""
    tensor = facts.kind.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]


def common(a: list[int | None] | None, b: list[int | None] | None) -> list[int | None] | None:
    """The dimensions in which two shapes agree."""
    if a is None or b is None or len(a) != len(b):
        return None
    return [x if x == y else None for x, y in zip(a, b, strict=True)]


def _standard(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _output_elements(node: NodeProto, values: list[np.ndarray]) -> float:
    if node.op_type == "Range":
        start, limit, delta = (float(v.reshape(-1)[0]) for v in values)
        return (limit - start) / delta if delta else 0
    if node.op_type == "ConstantOfShape":
        return float(np.prod(values[0], dtype=np.float64))
    if node.op_type in ("Expand", "Tile"):
        return float(values[0].size * np.prod(values[1], dtype=np.float64))
    return float("inf")
