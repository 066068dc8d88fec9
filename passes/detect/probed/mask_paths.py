"""How an input that hides tokens enters a region: which of its elements each value depends on.

Masks are made of the input by comparisons, casts, arithmetic and moves; each of their elements must be made of one
element of the input. From there they go by moves and products with constants into sums with the scores, and as
conditions that set weights to zero. So the numbers added to the scores are sums of terms, each of one token, and what a
region does with two hidden tokens follows from what it does with each.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

_MOVES = VIEW_OPS | {"Slice", "Gather", "GatherND", "GatherElements", "Split", "Tile", "Flatten", "Concat"}
_ELEMENTWISE = frozenset({
    "Clip", "Cast", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Not", "And", "Or", "Where", "Mul",
    "Div", "Add", "Sub", "Neg", "Min", "Max", "Identity", "Sign", "Abs",
})  # fmt: skip

_FARTHEST = 64
"""Nodes between an input and a mask that is made of it."""

LARGEST = 1 << 25
"""Elements of a value whose origins are followed."""


def mask_input(index: GraphIndex, value: str) -> str | None:
    """The input that ``value`` alone is made of, by comparisons, casts, arithmetic and moves; None for others."""
    sources = index.data_inputs(value)
    if len(sources) != 1 or value in sources:
        return None
    compared = False
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        if name in seen or name in sources or not index.data_inputs(name):
            continue
        seen.add(name)
        node = index.producer.get(name)
        if node is None or len(seen) > _FARTHEST or node.op_type not in _MOVES | _ELEMENTWISE:
            return None
        if (
            node.op_type in _MOVES
            and node.op_type != "Concat"
            and any(index.data_inputs(v) for v in node.input[1:] if v)
        ):
            return None
        compared |= node.op_type in _ELEMENTWISE and node.op_type not in ("Mul", "Add", "Identity")
        stack += [v for v in node.input if v]
    return next(iter(sources)) if compared else None


def is_gate(index: GraphIndex, node: NodeProto) -> bool:
    """Whether ``node`` sets data to a constant where a mask made of one input says so."""
    if node.op_type != "Where" or node.domain not in ("", "ai.onnx"):
        return False
    branches = [bool(index.data_inputs(v)) for v in node.input[1:]]
    return sum(branches) == 1 and mask_input(index, node.input[0]) is not None


def check_paths(
    index: GraphIndex, world: World, nodes: tuple[NodeProto, ...], entries: set[str], masks: dict[str, str]
) -> None:
    """That what ``masks`` (value -> its input) do to a region is the sum of what each element does.

    ``nodes`` are those that queries, keys and values (``entries``) go through.

    Raises:
        Unsupported: a mask is joined with the scores in another way, or its elements are made of several tokens.
    """
    inside = entries | {o for n in nodes for o in n.output if o}
    weighed: set[str] = set()  # what depends on the result of a softmax
    for node in nodes:
        if node.op_type == "Softmax" or weighed & set(node.input):
            weighed.update(o for o in node.output if o)
    for node in nodes:
        outside = [v for v in node.input if v and v not in inside and index.data_inputs(v)]
        for value in outside:
            _check_join(index, world, node, value, bool(weighed & set(node.input)))
            _check_sums(index, value, set(masks))
    for value, source in masks.items():
        origins(index, world, value, source)


def _check_join(index: GraphIndex, world: World, node: NodeProto, value: str, weighed: bool) -> None:
    name = f"padding enters {node.op_type} '{node_name(node)}'"
    if node.op_type == "Where":
        other = next(v for v in node.input[1:] if not index.data_inputs(v))
        if node.input[0] == value and weighed and world.scalar(other) == 0.0 and _of_rows(index, world, node):
            return
        raise Unsupported("padding-enters", f"{name}, which does not set all weights of a query to zero")
    added = node.op_type == "Add" or (node.op_type == "Sub" and node.input[1] == value)
    if not added or weighed:
        raise Unsupported("padding-enters", f"{name}, where it is not added to the scores")


def _of_rows(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether the condition of ``node`` is one for each row of a softmax whose result it reads."""
    condition, data = world.shapes.get(node.input[0], ()), next(v for v in node.input[1:] if index.data_inputs(v))
    maker = index.producer.get(data)
    if maker is None or maker.op_type != "Softmax" or len(condition) != len(world.shapes[data]):
        return False
    axis = next((a.i for a in maker.attribute if a.name == "axis"), -1)
    return bool(condition[axis] == 1)


def _check_sums(index: GraphIndex, value: str, masks: set[str]) -> None:
    """``value`` is a sum of elements of ``masks`` with constant factors (by what a region is made of, beside this)."""
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        if name in seen or name in masks or not index.data_inputs(name):
            continue
        seen.add(name)
        node = index.producer[name]
        data = [v for v in node.input if v and index.data_inputs(v)]
        if node.op_type == "Softmax" or (node.op_type in ("MatMul", "Einsum", "Mul", "Div") and len(data) > 1):
            raise Unsupported("padding-enters", f"'{node_name(node)}' multiplies parts of the padding with one another")
        stack += data


def origins(index: GraphIndex, world: World, value: str, source: str) -> np.ndarray:
    """Int64 of the shape of ``value``: the position in the flat ``source`` of the one element that each element is made
    of; -1 where it is made of none.

    Raises:
        Unsupported: an element is made of several, or in a way that is not followed.
    """
    known: dict[str, np.ndarray] = {source: np.arange(prod(world.shapes[source])).reshape(world.shapes[source])}

    def of(name: str) -> np.ndarray:
        if name not in known:
            if not index.data_inputs(name):
                known[name] = np.full(world.shapes[name], -1, np.int64)
            else:
                node = index.producer[name]
                if prod(world.shapes.get(name, (LARGEST + 1,))) > LARGEST:
                    raise Unsupported("padding-enters", f"'{name}' of the padding is too large to be followed")
                known[name] = _moved(world, node, name, of) if node.op_type in _MOVES else _met(node, of)
        return known[name]

    return of(value)


def _met(node: NodeProto, of: object) -> np.ndarray:
    assert callable(of)
    found: np.ndarray | None = None
    for value in (v for v in node.input if v):
        other = of(value)
        if found is None:
            found = other
            continue
        mine, other = np.broadcast_arrays(found, other)
        if bool(((mine >= 0) & (other >= 0) & (mine != other)).any()):
            raise Unsupported("padding-enters", f"'{node_name(node)}' joins the padding of several tokens")
        found = np.maximum(mine, other)
    assert found is not None
    return found


def _moved(world: World, node: NodeProto, name: str, of: object) -> np.ndarray:
    """The node itself, run on origins in place of data."""
    assert callable(of)
    feed: dict[str, np.ndarray] = {}
    for at, value in enumerate(node.input):
        if value:
            feed[value] = of(value) if at == 0 or node.op_type == "Concat" else world.value(value)
    infos = [
        helper.make_tensor_value_info(v, helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape))
        for v, a in feed.items()
    ]
    out = helper.make_tensor_value_info(name, TensorProto.INT64, None)
    graph = helper.make_graph([node], "move", infos, [out])
    model = helper.make_model(graph, opset_imports=world.index.model.proto.opset_import, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run([name], feed)[0])
    except Exception as error:  # ONNX Runtime raises its own untyped errors
        reason = " ".join(str(error).split())[:200]
        raise Unsupported("not-evaluated", f"'{node_name(node)}' of the padding cannot be run: {reason}") from None
