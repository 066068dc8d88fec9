"""Where keys and values come from a KV cache: past joined with new (Concat), or new written into it (Scatter*)."""

from __future__ import annotations

from onnx import NodeProto

from attncompile.core.site import Cache, Operand
from attncompile.passes.evaluate import GraphIndex, World

_SCATTERS = frozenset({"ScatterND", "ScatterElements", "TensorScatter"})
_VIEWS = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Cast"})
_CUTS = frozenset({"Slice", "Gather", "Split"})
_MAX_STEPS = 8


def find_cache(index: GraphIndex, world: World, key: Operand, value: Operand) -> Cache | None:
    """The cache that both operands hold, or None.

    The past is a graph input that only moves on its way: a text joined with an image is no cache. It comes first: the
    other order is another sequence, for which no cache is claimed.
    """
    keys, values = _of(index, world, key), _of(index, world, value)
    if keys is None or values is None or keys[0] != values[0]:
        return None
    (form, past_key, present_key), (_, past_value, present_value) = keys, values
    if past_key == past_value and past_key in index.inputs:
        return None
    return Cache("concat" if form == "concat" else "scatter", past_key, past_value, present_key, present_value)


def _of(index: GraphIndex, world: World, operand: Operand) -> tuple[str, str, str] | None:
    """(form, past, present) of one operand; present is the whole cache where it is an output of the graph."""
    value = operand.value
    node = index.producer.get(value)
    for _ in range(_MAX_STEPS):
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _VIEWS:
            break
        value = node.input[0]
        node = index.producer.get(value)
    if node is None or node.domain not in ("", "ai.onnx") or not _is_past(index, node.input[0]):
        return None
    present = next((v for v in (value, operand.value) if v in index.outputs), "")
    if node.op_type in _SCATTERS:
        new = node.input[1 if node.op_type == "TensorScatter" else 2]
        return None if _is_past(index, new) else ("scatter", node.input[0], present)
    if node.op_type != "Concat" or len(node.input) != 2 or _is_past(index, node.input[1]):
        return None
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if value not in world.shapes or axis % len(world.shapes[value]) != _sequence(world, value, operand):
        return None
    return "concat", node.input[0], present


def _sequence(world: World, value: str, operand: Operand) -> int:
    """The axis of the keys in ``value``: that of the operand, found by its size where views lie between."""
    at = operand.layout.index("N")
    if value == operand.value:
        return at
    length = world.shapes[operand.value][at]
    places = [i for i, size in enumerate(world.shapes[value]) if size == length]
    return places[0] if len(places) == 1 else -1


def _moves(node: NodeProto) -> bool:
    return node.op_type in _VIEWS | _CUTS or (node.op_type == "Concat" and len(node.input) == 1)


def _is_past(index: GraphIndex, value: str) -> bool:
    """Whether ``value`` is an input of the graph, moved or cut but not computed with."""
    for _ in range(_MAX_STEPS):
        if value in index.inputs:
            return True
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx") or not _moves(node):
            return False
        value = node.input[0]
    return False
