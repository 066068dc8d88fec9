"""The feature map before an operand of linear attention: relu, elu + 1, exp or softmax, however it is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import Unsupported
from attncompile.core.linear import FeatureMap
from attncompile.passes.evaluate import GraphIndex, World

_ELEMENTWISE = frozenset({
    "Relu", "Elu", "Exp", "Add", "Sub", "Mul", "Div", "Where", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "Max", "Min", "Clip", "Neg", "Not", "Identity",
})  # fmt: skip
_MOST_NODES = 8
_EPS = {int(TensorProto.FLOAT): 2.0**-23, int(TensorProto.FLOAT16): 2.0**-10, int(TensorProto.DOUBLE): 2.0**-52}


@dataclass(frozen=True, slots=True)
class Feature:
    """``value`` = map(``source``), made by ``nodes``; ``axis`` is the one that a softmax runs over."""

    kind: FeatureMap
    source: str
    nodes: tuple[NodeProto, ...]
    axis: int = -1


def feature_map(index: GraphIndex, world: World, value: str) -> Feature | None:
    """The map that ends at ``value``, or None where it is none that has a name.

    A map written in several nodes is known by what it computes: it is run at every breakpoint that its constants can
    make, beside them, and on a grid over the whole range.
    """
    node = index.producer.get(value)
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Softmax":
        axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
        rank = len(world.shapes.get(value, ()))
        known = rank and index.model.opset >= 13
        return Feature("softmax", node.input[0], (node,), axis % rank) if known else None
    if node.op_type == "Relu":
        return Feature("relu", node.input[0], (node,))
    if node.op_type == "Exp":
        return Feature("exp", node.input[0], (node,))
    if node.op_type not in _ELEMENTWISE or world.types.get(value) not in _EPS:
        return None
    shape, frontier = world.shapes.get(value), {value}
    taken: list[NodeProto] = []
    while len(taken) < _MOST_NODES:
        last = max(frontier, key=lambda v: index.position.get(id(index.producer.get(v)), -1))
        node = index.producer.get(last)
        if node is None or node.op_type not in _ELEMENTWISE or node.domain not in ("", "ai.onnx"):
            return None
        data = [v for v in node.input if v and index.data_inputs(v)]
        if any(world.shapes.get(v) != shape for v in data):
            return None
        if any(world.scalar(v) is None for v in node.input if v and v not in data):
            return None
        taken.append(node)
        frontier = (frontier - {last}) | set(data)
        if len(frontier) == 1:
            (source,) = frontier
            kind = _named(world, taken[::-1], source, value)
            if kind is not None:
                return Feature(kind, source, tuple(taken[::-1]))
    return None


def _named(world: World, nodes: list[NodeProto], source: str, value: str) -> FeatureMap | None:
    kind = world.types.get(source, 0)
    if kind not in _EPS or world.types.get(value) != kind:
        return None
    made = {o for n in nodes for o in n.output}
    stored = [
        numpy_helper.from_array(np.asarray(world.value(v)), v)
        for v in dict.fromkeys(v for n in nodes for v in n.input if v and v != source and v not in made)
    ]
    points = _points([float(numpy_helper.to_array(t).reshape(-1)[0]) for t in stored]).astype(
        helper.tensor_dtype_to_np_dtype(kind)
    )
    points = np.unique(points[np.isfinite(points)])
    graph = helper.make_graph(
        nodes, "map", [helper.make_tensor_value_info(source, kind, [len(points)])],
        [onnx.ValueInfoProto(name=value)], stored,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=world.index.model.proto.opset_import)
    with np.errstate(all="ignore"):
        try:
            (got,) = ReferenceEvaluator(model).run(None, {source: points})
        except Exception as error:
            raise Unsupported("feature-map", f"the map before '{value}' could not be evaluated: {error}") from None
        x, got = points.astype(np.float64), np.asarray(got, dtype=np.float64)
        eps, largest = _EPS[kind], float(np.finfo(points.dtype).max)
        if got.shape == x.shape:
            if np.array_equal(got, np.maximum(x, 0)):
                return "relu"
            wanted = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
            # Rounded twice at most; elu(0) + 1 is 1 exactly, and 1 + eps where something is added to the map.
            if bool(np.all(np.abs(got - wanted) <= eps * np.maximum(wanted, 1)) and np.all(got[x == 0] == 1)):
                return "elu+1"
            wanted = np.exp(x)
            normal = (wanted < largest) & (wanted > float(np.finfo(points.dtype).tiny))
            if bool(np.all(np.abs(got - wanted)[normal] <= 8 * eps * wanted[normal])) and not np.isnan(got).any():
                return "exp"
    return None


def _points(constants: list[float]) -> np.ndarray:
    """Every constant and its negative with their neighbours, and a grid of both signs from tiny to very large."""
    near = [sign * c * (1 + step) for c in constants for sign in (1, -1) for step in (-1e-3, 0.0, 1e-3)]
    sums = [a + b for a in constants for b in constants] + [a - b for a in constants for b in constants]
    wide = np.geomspace(1e-6, 6e4, 200)
    return np.array([0.0, *near, *sums, *wide, *-wide, *np.linspace(-30, 30, 241)], dtype=np.float64)
