"""A graph that fusions read and change: who makes and reads a value, what is constant, types and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from attncompile.targets import graph as g

CONTRIB = "com.microsoft"
OURS = "attncompile"
KINDS = (TensorProto.FLOAT, TensorProto.FLOAT16)
"""Element types that ONNX Runtime's fused ops were run in."""
_LARGEST = 1 << 20
"""Elements of a constant that is read; weights are larger, and may lie in external files of gigabytes."""
TABLE = 1 << 26
"""The same of a table of sines: 128 of each of half a million tokens."""
_STANDARD = ("", "ai.onnx")

Dims = tuple[int | str, ...]


class View:
    """The main graph of ``proto``, whose external data lies in ``folder``. ``proto`` changes at ``finish`` only.
    ``half_norms``: residual sums may go into norms in fp16 (``skip``).
    """

    def __init__(self, proto: ModelProto, folder: Path, half_norms: bool = True) -> None:
        self._proto, self._folder, self.half_norms = proto, folder, half_norms
        inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
        described = (*inferred.input, *inferred.output, *inferred.value_info)
        self._types = {v.name: v for v in described}
        self._tensors: dict[str, TensorProto] = {t.name: t for t in proto.graph.initializer}
        self._outputs = {o.name for o in proto.graph.output}
        self._nodes: dict[int, NodeProto] = {}
        self._new: list[str] = []
        self._names = {t.name for t in proto.graph.initializer} | {i.name for i in proto.graph.input}
        self._maker: dict[str, NodeProto] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in proto.graph.node:
            self._enter(NodeProto.FromString(node.SerializeToString()))

    # What there is.

    def nodes(self, *op_types: str, domain: str = "") -> Iterator[NodeProto]:
        """Nodes of these types as they are when asked for; those that went meanwhile are left out."""
        for key, node in list(self._nodes.items()):
            known = node.domain == domain or (not domain and node.domain in _STANDARD)
            if key in self._nodes and known and node.op_type in op_types:
                yield node

    def all(self) -> list[NodeProto]:
        """Nodes of all domains."""
        return list(self._nodes.values())

    def maker(self, value: str, *op_types: str) -> NodeProto | None:
        """The node of the standard domain that makes ``value``, if it is of these types."""
        node = self._maker.get(value)
        if node is None or node.domain not in _STANDARD or (op_types and node.op_type not in op_types):
            return None
        return node

    def readers(self, value: str) -> list[NodeProto]:
        return self._readers.get(value, [])

    def only(self, value: str, *op_types: str) -> NodeProto | None:
        """The one reader of ``value``, if it is of these types and ``value`` is no output of the model."""
        readers = self.readers(value)
        if len(readers) != 1 or value in self._outputs or readers[0].domain not in _STANDARD:
            return None
        return readers[0] if not op_types or readers[0].op_type in op_types else None

    def is_read(self, value: str) -> bool:
        return value in self._outputs or bool(self.readers(value))

    def is_output(self, value: str) -> bool:
        return value in self._outputs

    def kind(self, value: str) -> int:
        """The element type; 0 where it is unknown."""
        if value in self._tensors:
            return int(self._tensors[value].data_type)
        return int(self._types[value].type.tensor_type.elem_type) if value in self._types else 0

    def shape(self, value: str) -> Dims | None:
        """Sizes, or names of those that are not static; None where one is neither."""
        if value in self._tensors:
            return tuple(self._tensors[value].dims)
        info = self._types.get(value)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return None
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in info.type.tensor_type.shape.dim]
        return None if any(d == "" for d in dims) else tuple(dims)

    def constant(self, value: str, most: int = _LARGEST) -> np.ndarray | None:
        """The value of a constant of moderate size, ``most`` elements."""
        tensor = self._tensors.get(value)
        node = self.maker(value, "Constant")
        if tensor is None and node is not None:
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if tensor is None or prod(tensor.dims) > most:
            return None
        return numpy_helper.to_array(tensor, str(self._folder))

    def scalar(self, value: str) -> float | None:
        """The value of a constant of one element."""
        found = self.constant(value)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    def is_constant(self, value: str) -> bool:
        return value in self._tensors or self.maker(value, "Constant") is not None

    def row(self, value: str, width: int | str, kind: int) -> bool:
        """Whether ``value`` is a constant of shape [width] and of this type."""
        return self.is_constant(value) and self.shape(value) == (width,) and self.kind(value) == kind

    def sides(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        """The two operands of a commutative node, either way round."""
        a, b = node.input
        yield a, b
        yield b, a

    def uncast(self, value: str) -> str | None:
        """What ``value``, in float32, was in fp16."""
        node = self.maker(value, "Cast")
        if node is None or self.kind(value) != TensorProto.FLOAT:
            return None
        return node.input[0] if self.kind(node.input[0]) == TensorProto.FLOAT16 else None

    # What changes.

    def put(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "",
            **attributes: Any) -> None:  # fmt: skip
        """A node; those that made its outputs go."""
        for output in outputs:
            if output in self._maker:
                self._leave(self._maker[output])
        base = f"{outputs[0]}/{op_type}"
        self._enter(helper.make_node(op_type, inputs, outputs, name=base, domain=domain, **attributes))

    def value(self, base: str, kind: int, shape: Dims) -> str:
        """A new name, described."""
        name, number = base, 1
        while name in self._names or name in self._maker or name in self._types:
            name, number = f"{base}_{number}", number + 1
        self._names.add(name)
        self._types[name] = helper.make_tensor_value_info(name, kind, shape)
        self._new.append(name)
        return name

    def tensor(self, base: str, array: np.ndarray) -> str:
        """A new constant; one that is there already is used again."""
        made = numpy_helper.from_array(np.ascontiguousarray(array), "")
        for name, tensor in self._tensors.items():
            same = tensor.data_type == made.data_type and tensor.dims == made.dims
            if same and name.startswith(base) and tensor.raw_data == made.raw_data:
                return name
        made.name = self.value(base, made.data_type, array.shape)
        self._new.remove(made.name)
        self._tensors[made.name] = self._proto.graph.initializer.add()
        self._tensors[made.name].CopyFrom(made)
        return str(made.name)

    def node(self, op_type: str, inputs: Sequence[str], kind: int, shape: Dims, **attributes: Any) -> str:
        """A new node of the standard domain and the name of its output; an equal one that is there is used again."""
        for other in self.readers(inputs[0]):
            same = other.op_type == op_type and list(other.input) == list(inputs) and not other.domain
            if same and {a.name: helper.get_attribute_value(a) for a in other.attribute} == attributes:
                return str(other.output[0])
        name = self.value(f"{inputs[0]}/{op_type.lower()}", kind, shape)
        self.put(op_type, inputs, [name], **attributes)
        return name

    def reshaped(self, value: str, kind: int, dims: Dims) -> str | None:
        """``value`` in other sizes; None where these cannot be written down for every run."""
        target = reshape_target(dims, self.shape(value) or ())
        if target is None:
            return None
        return self.node("Reshape", [value, self.tensor("fusions/shape", target)], kind, dims)

    def flat(self, value: str, width: int | str) -> str:
        """``value``, of which all sizes but the last are 1, as [width]."""
        if self.shape(value) == (width,):
            return value
        target = self.tensor("fusions/row", np.array([-1], np.int64))
        return self.node("Reshape", [value, target], self.kind(value), (width,))

    def set_inputs(self, node: NodeProto, inputs: Sequence[str]) -> None:
        self._leave(node)
        node.input[:] = inputs
        self._enter(node)

    def pass_by(self, value: str, other: str) -> bool:
        """Whether all that read ``value`` could be given ``other`` in its place."""
        readers = self.readers(value)
        if self.is_output(value) or not readers or any(value not in r.input for r in readers):
            return False
        for reader in {id(r): r for r in readers}.values():
            self.set_inputs(reader, [other if v == value else v for v in reader.input])
        return True

    def set_outputs(self, node: NodeProto, outputs: Sequence[str]) -> None:
        self._leave(node)
        node.output[:] = outputs
        self._enter(node)

    def sweep(self) -> None:
        """Drops what nobody reads any more."""
        pending = list(self._nodes.values())
        while pending:
            node = pending.pop()
            if id(node) in self._nodes and not any(self.is_read(o) for o in node.output if o):
                self._leave(node)
                pending.extend(self._maker[v] for v in g.reads(node) if v in self._maker)

    def finish(self) -> None:
        """Writes the graph back, in an order in which it can run."""
        self.sweep()
        graph = self._proto.graph
        described = {v.name for v in graph.value_info}
        made = {o for n in self._nodes.values() if n.domain not in _STANDARD or n.op_type in UNKNOWN for o in n.output}
        wanted = sorted((made | set(self._new)) & self._types.keys() - described - self._outputs)
        nodes = list(self._nodes.values())
        del graph.node[:]
        graph.node.extend(nodes)
        read = {v for n in nodes for v in g.reads(n)} | self._outputs | {i.name for i in graph.input}
        left = [t for t in graph.initializer if t.name in read]
        if len(left) != len(graph.initializer):
            kept = [TensorProto.FromString(t.SerializeToString()) for t in left]
            del graph.initializer[:]
            graph.initializer.extend(kept)
        alive = {o for n in nodes for o in n.output}
        graph.value_info.extend(self._types[name] for name in wanted if name in alive)
        if any(n.domain == CONTRIB for n in nodes) and all(o.domain != CONTRIB for o in self._proto.opset_import):
            self._proto.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        g.sort_nodes(graph)
        g.name_nodes(self._proto)

    def _enter(self, node: NodeProto) -> None:
        self._nodes[id(node)] = node
        for value in node.output:
            if value:
                self._maker[value] = node
        for value in g.reads(node):
            self._readers.setdefault(value, []).append(node)

    def _leave(self, node: NodeProto) -> None:
        del self._nodes[id(node)]
        for value in node.output:
            self._maker.pop(value, None)
        for value in g.reads(node):
            readers = self._readers[value]
            del readers[next(i for i, r in enumerate(readers) if r is node)]


def reshape_target(dims: Dims, source: Dims = ()) -> np.ndarray | None:
    """The second input of Reshape. Of the sizes that are not static those that ``source`` has at the same place are
    copied, and one more is what is left; None if there are others.
    """
    there = (*source, *[""] * len(dims))
    found = [0 if isinstance(d, str) and d == s else d for d, s in zip(dims, there, strict=False)]
    if sum(isinstance(d, str) for d in found) > 1 or 0 in dims:
        return None
    return np.array([-1 if isinstance(d, str) else d for d in found], np.int64)


UNKNOWN = ("SimplifiedLayerNormalization",)
"""Ops that ONNX Runtime has in the standard domain and ONNX has not."""


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
