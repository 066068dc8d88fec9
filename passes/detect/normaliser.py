"""What turns scores into weights: the Softmax operator, or the same function written out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.sinks import Sink, joined, without_sink
from attncompile.passes.evaluate import GraphIndex, World


@dataclass(frozen=True, slots=True)
class Normaliser:
    """weights = softmax(scores) over the last axis.

    ``nodes`` make the weights from the scores. ``stable``: the row's maximum is subtracted before the exponential;
    without that a row whose keys are all hidden by a large negative number is 0 / 0, not an average.
    ``word`` names the form. ``sink`` is one more logit that takes part and whose weight is not among the ``weights``;
    ``logits`` is the value that the softmax itself reads.
    """

    scores: str
    weights: str
    nodes: tuple[NodeProto, ...]
    stable: bool = True
    word: str = "softmax"
    sink: Sink | None = None
    logits: str = ""


def softmax_operator(index: GraphIndex, world: World, node: NodeProto) -> Normaliser:
    """A ``Softmax`` node, with a subtraction of the row's maximum before it taken in: it changes nothing.

    Raises:
        Unsupported: it does not run over the last axis, or the shape of the scores is not known.
    """
    scores = node.input[0]
    shape = world.shapes.get(scores)
    if shape is None:
        raise Unsupported("shape-unknown", f"the shape of '{scores}' is not known")
    if not _axis_is_last(node, shape, index.model.opset):
        raise Unsupported("softmax-axis", "the softmax does not run over the last axis of the scores")
    source, nodes = _without_maximum(index, world, scores)
    nodes, weights = (*nodes, node), node.output[0]
    found = joined(index, world, source)
    if found is None:
        return Normaliser(source, weights, nodes, logits=scores)
    weights, after = without_sink(index, world, weights, found)
    return Normaliser(
        found.scores, weights, (*found.nodes, *nodes, *after), word="softmax-with-sink", sink=found.sink, logits=scores
    )  # fmt: skip


def written_out(index: GraphIndex, world: World, node: NodeProto) -> Normaliser | None:
    """A softmax that ends in ``node``, or None where ``node`` ends none.

    Forms: exp(x) / sum(exp(x)), exp(x - logsumexp(x)), exp(LogSoftmax(x)); x may be s - max(s). In the first the sum
    may have another term for a sink: exp(sink - m) where x is s - m and m = max(s) or max(max(s), sink), or 1 where x
    is s.
    """
    if node.op_type == "Div":
        return _quotient(index, world, node)
    if node.op_type == "Exp":
        return _exponential(index, world, node)
    return None


def reduces_last_axis(world: World, node: NodeProto, *, keeps: bool = True) -> bool:
    """Whether this Reduce node reduces the last axis alone and (``keeps``) keeps it as an axis of size 1."""
    shape = world.shapes.get(node.input[0])
    if shape is None:
        return False
    attributes = {a.name: a for a in node.attribute}
    if keeps and "keepdims" in attributes and not attributes["keepdims"].i:
        return False
    axes: list[int] = []
    if "axes" in attributes:
        axes = list(attributes["axes"].ints)
    elif len(node.input) > 1 and node.input[1]:
        try:
            axes = [int(a) for a in world.value(node.input[1]).reshape(-1)]
        except Unsupported:
            return False
    return [a % len(shape) for a in axes] == [len(shape) - 1]


def _producer(index: GraphIndex, value: str, kind: str) -> NodeProto | None:
    node = index.producer.get(value)
    return node if node is not None and node.domain in ("", "ai.onnx") and node.op_type == kind else None


def _without_maximum(index: GraphIndex, world: World, value: str) -> tuple[str, tuple[NodeProto, ...]]:
    """``s`` and the nodes on the way where ``value`` is s - max(s) over the last axis, else ``value`` and none."""
    subtract = _producer(index, value, "Sub")
    if subtract is None:
        return value, ()
    top = _producer(index, subtract.input[1], "ReduceMax")
    if top is None or top.input[0] != subtract.input[0] or not reduces_last_axis(world, top):
        return value, ()
    return subtract.input[0], (top, subtract)


def _quotient(index: GraphIndex, world: World, node: NodeProto) -> Normaliser | None:
    exponential = _producer(index, node.input[0], "Exp")
    total, others = _producer(index, node.input[1], "ReduceSum"), ""
    added = _producer(index, node.input[1], "Add")
    if added is not None:
        sums = [_producer(index, v, "ReduceSum") for v in added.input]
        total = next((t for t in sums if t is not None), None)
        others = added.input[1 - sums.index(total)] if total is not None else ""
    if exponential is None or total is None:
        return None
    if total.input[0] != exponential.output[0] or not reduces_last_axis(world, total):
        return None
    if world.shapes.get(node.output[0]) != world.shapes.get(exponential.output[0]):
        return None
    if added is not None:
        return _quotient_with_sink(index, world, (exponential, total, added, node), others)
    scores, nodes = _without_maximum(index, world, exponential.input[0])
    return Normaliser(
        scores, node.output[0], (*nodes, exponential, total, node), stable=bool(nodes), word="written-out-softmax",
        logits=scores,
    )  # fmt: skip


def _quotient_with_sink(
    index: GraphIndex, world: World, nodes: tuple[NodeProto, NodeProto, NodeProto, NodeProto], other: str
) -> Normaliser | None:
    """exp(x) / (sum(exp(x)) + other), or None where ``other`` is not the exponential of a sink, moved as x was."""
    logits = nodes[0].input[0]
    word = "written-out-softmax-with-sink"
    if world.scalar(other) == 1.0:
        return Normaliser(logits, nodes[3].output[0], nodes, False, word, Sink("", 0.0), logits)
    term = _producer(index, other, "Exp")
    if term is None or world.shapes.get(other, ())[-1:] != (1,):
        return None
    subtract = _producer(index, logits, "Sub")
    maximum = _row_maximum(index, world, subtract) if subtract is not None else ()
    if subtract is None or not maximum:
        if index.data_inputs(term.input[0]):
            return None
        return Normaliser(logits, nodes[3].output[0], (*nodes, term), False, word, Sink(term.input[0]), logits)
    moved, negative = _producer(index, term.input[0], "Sub"), _producer(index, term.input[0], "Neg")
    everything = (*maximum, subtract, *nodes, term)
    if negative is not None and negative.input[0] == subtract.input[1]:
        sink, everything = Sink("", 0.0), (*everything, negative)
    elif moved is not None and moved.input[1] == subtract.input[1]:
        sink, everything = Sink(moved.input[0]), (*everything, moved)
    else:
        return None
    return Normaliser(subtract.input[0], nodes[3].output[0], everything, True, word, sink, logits)


def _row_maximum(index: GraphIndex, world: World, subtract: NodeProto) -> tuple[NodeProto, ...]:
    """The nodes of max(s) over the last axis, or of its maximum with anything that has one value a row, where
    ``subtract`` is s minus that; else none. Taken off all logits of a row, it changes nothing.
    """
    top = _producer(index, subtract.input[1], "ReduceMax")
    larger = _producer(index, subtract.input[1], "Max")
    if larger is not None:
        top = next((t for t in (_producer(index, v, "ReduceMax") for v in larger.input) if t is not None), None)
    if top is None or top.input[0] != subtract.input[0] or not reduces_last_axis(world, top):
        return ()
    if world.shapes.get(subtract.input[1]) != world.shapes.get(top.output[0]):
        return ()
    return (top,) if larger is None else (top, larger)


def _exponential(index: GraphIndex, world: World, node: NodeProto) -> Normaliser | None:
    logarithm = _producer(index, node.input[0], "LogSoftmax")
    if logarithm is not None:
        shape = world.shapes.get(logarithm.input[0])
        if shape is None or not _axis_is_last(logarithm, shape, index.model.opset):
            return None
        scores, nodes = _without_maximum(index, world, logarithm.input[0])
        return Normaliser(scores, node.output[0], (*nodes, logarithm, node), word="exp-log-softmax", logits=scores)
    subtract = _producer(index, node.input[0], "Sub")
    if subtract is None:
        return None
    total = _producer(index, subtract.input[1], "ReduceLogSumExp")
    if total is None or total.input[0] != subtract.input[0] or not reduces_last_axis(world, total):
        return None
    scores, nodes = _without_maximum(index, world, subtract.input[0])
    # A row of one very large negative number gives 1 for every key here: no average.
    return Normaliser(
        scores, node.output[0], (*nodes, total, subtract, node), stable=False, word="exp-log-sum-exp", logits=scores
    )  # fmt: skip


def _axis_is_last(node: NodeProto, shape: tuple[int, ...], opset: int) -> bool:
    """Before opset 13 Softmax flattened its input from ``axis`` on."""
    rank = len(shape)
    axis = next((a.i for a in node.attribute if a.name == "axis"), -1 if opset >= 13 else 1)
    axis = axis + rank if axis < 0 else axis
    return axis == rank - 1 or (opset < 13 and prod(shape[axis:-1]) == 1)
