"""Cutting a site's original subgraph to some query rows, so that its float64 reference fits in memory.

Softmax attention treats every query row alone. Starting at the query input, the axis that carries the rows is followed
through the graph; whatever is broadcast against it (a mask, a bias) is gathered at the same rows. Operators that are
not understood are refused (``Unsupported``); the caller also checks the cut graph against the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper
from onnx import numpy_helper as nh

from attncompile.core.errors import Unsupported
from attncompile.core.site import Operand

BORDER = 32
RANDOM = 256
MASKED = 64

_ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Cast", "CastLike", "Identity", "Neg", "Exp", "Sqrt",
    "Tanh", "Sigmoid", "IsNaN", "IsInf", "Not", "And", "Or", "Equal", "Less", "Greater", "LessOrEqual",
    "GreaterOrEqual", "Clip", "Abs",
}  # fmt: skip
_ROWS = "attncompile_sampled_rows"


@dataclass(frozen=True, slots=True)
class Rows:
    """``index``: the query positions, ascending; ``axis``: where they lie in the output (-1: not yet known)."""

    index: np.ndarray
    axis: int = -1

    def take(self, output: np.ndarray) -> np.ndarray:
        """The sampled rows of a whole output."""
        return np.take(output, self.index, axis=self.axis)


def query_axis(query: Operand) -> int:
    return 1 if query.layout == "BNHD" else 2


def choose_rows(model: ModelProto, query: Operand, output: np.ndarray, seed: int = 0) -> Rows:
    """Both borders, up to 64 rows that are fully masked in the original's ``output``, and 256 random ones."""
    inputs = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    shape = inputs.get(query.value, [])
    if len(shape) != 4 or 0 in shape:
        raise Unsupported("query_shape", f"the query {query.value} is not an input of static rank-4 shape")
    n = shape[query_axis(query)]
    rng = np.random.default_rng(seed)
    chosen = set(range(min(BORDER, n))) | set(range(max(0, n - BORDER), n))
    chosen |= {int(i) for i in rng.choice(n, min(RANDOM, n), replace=False)}
    axes = [i for i, d in enumerate(output.shape) if d == n]
    if len(axes) == 1:  # otherwise the row axis is only known after the cut; borders hold the usual masked rows
        other = tuple(i for i in range(output.ndim) if i != axes[0])
        masked = np.flatnonzero(np.isnan(output).any(axis=other) | (output == 0).all(axis=other))
        chosen |= {int(i) for i in masked[:: max(1, math.ceil(len(masked) / MASKED))]}
    return Rows(np.array(sorted(chosen), np.int64))


def sample_rows(model: ModelProto, query: Operand, rows: Rows) -> tuple[ModelProto, Rows]:
    """``model`` cut to ``rows`` of the query, and the rows with the output's axis. The inputs stay whole: the cut is a
    Gather behind each. Raises Unsupported for operators through which the row axis cannot be followed.
    """
    cut = ModelProto()
    cut.CopyFrom(model)
    del cut.graph.value_info[:]
    return _Cutter(model, cut, rows).cut(query)


class _Cutter:
    def __init__(self, model: ModelProto, cut: ModelProto, rows: Rows) -> None:
        self.cut_model = cut
        self.rows = rows
        self.shapes = _shapes(model)
        self.axis: dict[str, int] = {}
        self.nodes: list[NodeProto] = []
        self.gathered: dict[tuple[str, int], str] = {}
        self.made = {out: node for node in model.graph.node for out in node.output}

    def cut(self, query: Operand) -> tuple[ModelProto, Rows]:
        graph = self.cut_model.graph
        self._constant(_ROWS, self.rows.index)
        axis = query_axis(query)
        self.length = self._shape(query.value)[axis]
        start = self._gather(query.value, axis)
        originals = list(graph.node)
        for node in originals:
            for i, name in enumerate(node.input):
                if name == query.value:
                    node.input[i] = start
        self.axis[start] = axis
        self.shapes[start] = self._shape(query.value)
        for node in originals:
            if any(name in self.axis for name in node.input):
                self._node(node)
            self.nodes.append(node)
        (output,) = graph.output
        del graph.node[:]
        graph.node.extend(_needed(self.nodes, output.name))
        if output.name not in self.axis:
            raise Unsupported("rows_lost", "the output does not depend on the query rows")
        out_axis = self.axis[output.name]
        output.type.tensor_type.ClearField("shape")  # rank and other sizes follow from the nodes
        return self.cut_model, Rows(self.rows.index, out_axis)

    def _node(self, node: NodeProto) -> None:
        """Set the row axis of the node's output, adapting its other inputs."""
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        out = node.output[0]
        if op in _ELEMENTWISE:
            self._elementwise(node)
        elif op == "Softmax":
            axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
            rank = len(self._shape(node.input[0]))
            if axis % rank == self.axis[node.input[0]]:
                raise Unsupported("softmax_axis", "the softmax runs over the query rows")
            self.axis[out] = self.axis[node.input[0]]
        elif op == "Transpose":
            rank = len(self._shape(node.input[0]))
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(rank))[::-1])
            self.axis[out] = perm.index(self.axis[node.input[0]])
        elif op == "MatMul":
            self._matmul(node)
        elif op in ("Reshape", "Expand", "Unsqueeze", "Squeeze", "Flatten"):
            self._reshape(node, op)
        elif op == "Shape":
            value = np.array(self._shape(node.input[0]), np.int64)
            attributes = {a.name: a.i for a in node.attribute}
            value = value[attributes.get("start", 0) : attributes.get("end")]
            node.CopyFrom(helper.make_node("Constant", [], [out], value=nh.from_array(value)))
        elif op == "Attention":
            self._attention(node)
        else:
            raise Unsupported("operator", f"{op} is not followed")

    def _elementwise(self, node: NodeProto) -> None:
        tagged = {self.axis[n] - len(self._shape(n)) for n in node.input if n in self.axis}
        if len(tagged) != 1:
            raise Unsupported("axes_differ", f"{node.op_type} meets the rows on different axes")
        (from_end,) = tagged
        for i, name in enumerate(node.input):
            if name and name not in self.axis:
                shape = self._shape(name)
                if len(shape) >= -from_end and shape[from_end] != 1:
                    node.input[i] = self._gather(name, len(shape) + from_end)
        self.axis[node.output[0]] = len(self._shape(node.output[0])) + from_end

    def _matmul(self, node: NodeProto) -> None:
        left, right = node.input
        out_rank = len(self._shape(node.output[0]))
        if left in self.axis and right not in self.axis and self.axis[left] == len(self._shape(left)) - 2:
            self.axis[node.output[0]] = out_rank - 2
        elif right in self.axis and left not in self.axis and self.axis[right] == len(self._shape(right)) - 1:
            self.axis[node.output[0]] = out_rank - 1
        else:
            raise Unsupported("matmul", "a MatMul contracts or batches over the query rows")

    def _reshape(self, node: NodeProto, op: str) -> None:
        """The row axis is where the leading product and the size agree; the new shape is written as a constant."""
        source, out = node.input[0], node.output[0]
        if source not in self.axis:
            raise Unsupported("shape_operand", f"the shape operand of {op} depends on the query")
        before, after = self._shape(source), self._shape(out)
        a = self.axis[source]
        if op == "Expand":
            found = [len(after) + a - len(before)]
        else:
            lead = math.prod(before[:a])
            found = [j for j, d in enumerate(after) if d == before[a] and math.prod(after[:j]) == lead]
        # Axes of size 1 next to the row axis make several candidates only if there is one row.
        if len(found) != 1:
            raise Unsupported("reshape", f"{op} from {before} to {after} splits or merges the query rows")
        self.axis[out] = found[0]
        target = [len(self.rows.index) if j == found[0] else d for j, d in enumerate(after)]
        name = f"{out}_{_ROWS}_shape"
        self._constant(name, np.array(target, np.int64))
        node.CopyFrom(helper.make_node("Expand" if op == "Expand" else "Reshape", [source, name], [out]))

    def _attention(self, node: NodeProto) -> None:
        attributes = {a.name: a.i for a in node.attribute}
        rank = len(self._shape(node.input[0]))
        others = [n for n in node.input[1:] if n in self.axis]
        if others or attributes.get("is_causal", 0) or any(node.input[4:]) or len(node.output) > 1:
            raise Unsupported("attention", "an Attention whose rows depend on their position is not cut")
        if self.axis[node.input[0]] != (2 if rank == 4 else 1):
            raise Unsupported("attention", "the query rows are not on Attention's sequence axis")
        if len(node.input) > 3 and node.input[3]:
            shape = self._shape(node.input[3])
            if shape[-2] != 1:
                node.input[3] = self._gather(node.input[3], len(shape) - 2)
        self.axis[node.output[0]] = self.axis[node.input[0]]

    def _gather(self, name: str, axis: int) -> str:
        """The sampled rows of a value that does not depend on the query. What is elementwise is done again on the rows
        of its operands, so that a mask of all rows need not be held in float64 several times.
        """
        if self._shape(name)[axis] != self.length:
            raise Unsupported("broadcast", f"{name} has {self._shape(name)[axis]} entries for {self.length} rows")
        key = (name, axis)
        if key not in self.gathered:
            out = f"{name}_{_ROWS}_{axis}"
            source = self.made.get(name)
            known = source is not None and all(n in self.shapes for n in source.input if n)
            if source is not None and known and source.op_type in _ELEMENTWISE and source.domain in ("", "ai.onnx"):
                from_end = axis - len(self._shape(name))
                copy = NodeProto()
                copy.CopyFrom(source)
                copy.name, copy.output[0] = "", out
                for i, operand in enumerate(source.input):
                    shape = self._shape(operand) if operand else []
                    if len(shape) >= -from_end and shape[from_end] != 1:
                        copy.input[i] = self._gather(operand, len(shape) + from_end)
                self.nodes.append(copy)
            else:
                self.nodes.append(helper.make_node("Gather", [name, _ROWS], [out], axis=axis))
            self.gathered[key] = out
        return self.gathered[key]

    def _constant(self, name: str, value: np.ndarray) -> None:
        self.cut_model.graph.initializer.append(nh.from_array(value, name))

    def _shape(self, name: str) -> list[int]:
        if name not in self.shapes:
            raise Unsupported("shape_unknown", f"the shape of {name} is not known")
        return self.shapes[name]


def _needed(nodes: Sequence[NodeProto], output: str) -> list[NodeProto]:
    """``nodes`` without those that ``output`` does not depend on."""
    wanted, found = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            found.append(node)
    return found[::-1]


def _shapes(model: ModelProto) -> dict[str, list[int]]:
    """Static shapes by value name, of initializers too."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    for v in (*graph.input, *graph.output, *graph.value_info):
        dims = v.type.tensor_type.shape.dim
        if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[v.name] = [d.dim_value for d in dims]
    return shapes
