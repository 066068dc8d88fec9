"""The guard of the standard operators' own bodies: weights of a row whose mask is -inf throughout become zero."""

from __future__ import annotations

from math import inf

from onnx import NodeProto

from attncompile.passes.evaluate import GraphIndex, World


def row_guard(index: GraphIndex, world: World, weights: str) -> tuple[str, list[NodeProto]] | None:
    """The guarded weights and the nodes that make them, or None where the readers of ``weights`` are something else.

    Where(ReduceMax(mask, -1) == -inf, 0, weights), with the mask that was added to the scores right before the softmax:
    such rows are NaN without it, and no other row changes.
    """
    readers = [n for n in index.consumers.get(weights, []) if n.op_type != "Shape"]
    chooses = [n for n in readers if n.op_type == "Where"]
    typed = [n for n in readers if n.op_type == "CastLike" and n.input[1] == weights and n.input[0] != weights]
    if len(chooses) != 1 or len(readers) != 1 + len(typed) or weights in index.outputs:
        return None
    (where,) = chooses
    if where.input[2] != weights or world.shapes.get(where.output[0]) != world.shapes.get(weights):
        return None
    if any(index.consumers.get(n.output[0], []) != [where] or n.output[0] in index.outputs for n in typed):
        return None
    if _number(index, world, where.input[1]) != 0.0:
        return None
    test = _producer(index, where.input[0], "Equal")
    if test is None:
        return None
    for left, right in (tuple(test.input), tuple(test.input)[::-1]):
        top = _producer(index, left, "ReduceMax")
        if top is None or _number(index, world, right) != -inf or not _over_last_axis(world, top):
            continue
        if top.input[0] in _added(index, weights):
            return where.output[0], [*typed, where]
    return None


def _producer(index: GraphIndex, value: str, kind: str) -> NodeProto | None:
    node = index.producer.get(value)
    return node if node is not None and node.domain in ("", "ai.onnx") and node.op_type == kind else None


def _over_last_axis(world: World, node: NodeProto) -> bool:
    """Whether a Reduce node gives one number a row: its output is its input with a last axis of size 1."""
    shape = world.shapes.get(node.input[0])
    return bool(shape) and shape is not None and world.shapes.get(node.output[0]) == (*shape[:-1], 1)


def _number(index: GraphIndex, world: World, value: str) -> float | None:
    """A constant of one element, also one that takes its type from other data."""
    node = _producer(index, value, "CastLike")
    return world.scalar(node.input[0] if node is not None else value)


def _added(index: GraphIndex, weights: str) -> tuple[str, ...]:
    """The inputs of the Add right before the softmax that ``weights`` come from, casts aside."""
    value, found = weights, False
    while True:
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return ()
        if node.op_type == "Softmax" and not found:
            found = True
        elif node.op_type == "Add" and found:
            return tuple(node.input)
        elif node.op_type != "Cast":
            return ()
        value = node.input[0]
