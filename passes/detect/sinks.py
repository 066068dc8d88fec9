"""Attention sinks: one more logit in the softmax that no value belongs to (gpt-oss, softmax with 1 in its sum)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from onnx import NodeProto, helper

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts
from attncompile.passes.detect.scores import FLOATS, trace
from attncompile.passes.detect.views import Atoms, Axes, Axis
from attncompile.passes.detect.walks import is_idle_dropout, readers_of, walk
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import tensor_value

_BELOW = 100.0
"""exp(-100) is nothing beside 1, in any of the types: a hidden score this far below the sink has no weight."""


@dataclass(frozen=True, slots=True)
class Sink:
    """The logit that joins the keys': ``column`` holds it with a last axis of size 1, the other axes as the scores' (or
    of size 1); ``number`` in its place where no value does.
    """

    column: str = ""
    number: float = 0.0


@dataclass(frozen=True, slots=True)
class Joined:
    """``scores`` with a sink behind (or, ``front``, before) the ``width`` keys, made by ``nodes``."""

    scores: str
    sink: Sink
    front: bool
    width: int
    nodes: tuple[NodeProto, ...]


class NotStored(Unsupported):
    """A site's number that no value of the graph holds: an initializer with ``array`` would."""

    def __init__(self, reason: str, array: np.ndarray) -> None:
        super().__init__("not-stored", reason)
        self.array = array


def joined(index: GraphIndex, world: World, value: str) -> Joined | None:
    """The Concat (or Pad by zeros) of scores and one more logit that ``value`` comes from, over casts; else None."""
    nodes: list[NodeProto] = []
    node = index.producer.get(value)
    while node is not None and node.op_type == "Cast" and world.types.get(node.input[0]) in FLOATS:
        nodes.insert(0, node)
        node = index.producer.get(node.input[0])
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in ("Concat", "Pad"):
        return None
    shape = world.shapes.get(node.output[0], ())
    if node.op_type == "Pad":
        return _padded(world, node, shape, nodes)
    sizes = [world.shapes.get(v, ())[-1:] for v in node.input]
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if not shape or axis % len(shape) != len(shape) - 1 or len(sizes) != 2 or (1,) not in sizes:
        return None
    ones = [i for i, size in enumerate(sizes) if size == (1,)]
    if len(ones) == 2:  # a single key: the sink is what is no product
        ones = [i for i in ones if not _is_product(index, world, node.input[i])]
        if len(ones) != 1:
            raise Unsupported("sinks", f"'{node.output[0]}' joins two logits, and it is not clear which is the key's")
    column, scores = node.input[ones[0]], node.input[1 - ones[0]]
    return Joined(scores, Sink(column), ones[0] == 0, shape[-1] - 1, (node, *nodes))


def _padded(world: World, node: NodeProto, shape: tuple[int, ...], nodes: list[NodeProto]) -> Joined | None:
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
    number = world.scalar(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
    if mode != b"constant" or number is None or (len(node.input) > 3 and node.input[3]) or not shape:
        return None
    try:
        pads = [int(p) for p in world.value(node.input[1]).reshape(-1)]
    except Unsupported:
        return None
    last = (pads[len(shape) - 1], pads[-1]) if len(pads) == 2 * len(shape) else (0, 0)
    if any(pads[: len(shape) - 1]) or any(pads[len(shape) : -1]) or sorted(last) != [0, 1]:
        return None
    return Joined(node.input[0], Sink("", number), last[0] == 1, shape[-1] - 1, (node, *nodes))


def _is_product(index: GraphIndex, world: World, value: str) -> bool:
    try:
        trace(index, world, value)
    except Unsupported:
        return False
    return True


def without_sink(index: GraphIndex, world: World, weights: str, scores: Joined) -> tuple[str, tuple[NodeProto, ...]]:
    """The weights of the keys alone, and the nodes that cut the sink's off.

    Raises:
        Unsupported: the sink's weight is not cut off, or something else is.
    """
    nodes: list[NodeProto] = []
    while True:
        readers = readers_of(index, weights)
        if len(readers) != 1 or weights in index.outputs:
            raise Unsupported(
                "sinks", f"the weights '{weights}', a sink's among them, are read by {len(readers)} nodes"
            )
        (node,) = readers
        casts = node.op_type == "Cast" and world.types.get(node.output[0]) in FLOATS
        if casts or is_idle_dropout(index, world, node):
            nodes.append(node)
            weights = node.output[0]
            continue
        kept = _cut(index, world, node, weights, scores)
        return kept, (*nodes, node)


def _cut(index: GraphIndex, world: World, node: NodeProto, weights: str, scores: Joined) -> str:
    rank, first = len(world.shapes[weights]), int(scores.front)
    reason = f"the sink's weight is not cut off by {node.op_type} '{node.output[0]}' behind the softmax"
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % rank
    outputs = [o for o in node.output if o]
    used = [o for o in outputs if index.consumers.get(o) or o in index.outputs]
    widths = {o: world.shapes.get(o, (0,))[-1] for o in outputs}
    if node.op_type == "Split" and axis == rank - 1 and len(outputs) == 2:
        if used == [outputs[first]] and widths[used[0]] == scores.width:
            return str(used[0])
    elif node.op_type == "Slice" and world.shapes.get(outputs[0], ())[:-1] == world.shapes[weights][:-1]:
        # The sizes say that only the last axis is cut; where it begins may not depend on a length.
        starts, axes, steps = (_integers(world, node, at) for at in (1, 3, 4))
        at = [a % rank for a in axes] if axes else list(range(len(starts)))
        if rank - 1 in at and all(s == 1 for s in steps) and not _from_shapes(index, node.input[1]):
            begin = starts[at.index(rank - 1)]
            begin += scores.width + 1 if begin < 0 else 0
            if begin == first and widths[outputs[0]] == scores.width:
                return str(outputs[0])
    elif node.op_type == "Gather" and axis == rank - 1 and len(world.shapes.get(node.input[1], ())) == 1:
        kept = [int(i) % (scores.width + 1) for i in world.value(node.input[1])]
        if kept == list(range(first, first + scores.width)):
            return str(outputs[0])
    raise Unsupported("sinks", reason)


def _integers(world: World, node: NodeProto, at: int) -> list[int]:
    if len(node.input) <= at or not node.input[at]:
        return []
    return [int(i) for i in world.value(node.input[at]).reshape(-1)]


def _from_shapes(index: GraphIndex, value: str) -> bool:
    return any(n.op_type in ("Shape", "Size") for n in index.slice_nodes(value))


def logits_of(
    index: GraphIndex, world: World, atoms: Atoms, sink: Sink, scores: str, axes: Axes, heads: Axis
) -> tuple[str, tuple[NodeProto, ...]]:  # fmt: skip
    """The value with one logit a head (or one for all) that ``sink`` is, given the axes of the scores; and the nodes
    that spread it to the column.

    Raises:
        Unsupported: it is not one logit a head.
        NotStored: it is, but no value of the graph holds these numbers alone.
    """
    kind = world.types.get(scores, 0)
    if not sink.column:
        return _stored(index, np.array([sink.number], helper.tensor_dtype_to_np_dtype(kind)), kind), ()
    shape = world.shapes[sink.column]
    near = ((),) * max(0, len(shape) - len(axes)) + axes[max(0, len(axes) - len(shape)) :]
    column: Axes = tuple(() if size == 1 else axis for size, axis in zip(shape, near, strict=True))
    wanted = atoms.leaves(heads)
    spread = walk(index, world, atoms, sink.column, column, False, "")
    for at, stage in enumerate(spread.stages):
        flat = tuple(leaf for axis in stage.axes for leaf in atoms.leaves(axis))
        if flat in (atoms.leaves(heads), ()) and prod(world.shapes[stage.value]) == atoms.size(flat):
            return stage.value, spread.nodes[at:]
    if index.data_inputs(sink.column):
        raise Unsupported("sinks", f"the sink '{sink.column}' is not one logit a head")
    array = world.value(sink.column)
    for position, axis in enumerate(column):
        if not set(atoms.leaves(axis)) <= set(wanted):
            first = array.take([0], axis=position)
            if not np.array_equal(array, np.broadcast_to(first, array.shape)):
                raise Unsupported("sinks", f"the sink '{sink.column}' differs between batch entries or queries")
            array = first
    return _stored(index, array.reshape(-1), world.types.get(sink.column, 0)), ()


def _stored(index: GraphIndex, array: np.ndarray, kind: int) -> str:
    """An initializer with exactly these numbers; names say nothing, so any will do."""
    for name, tensor in index.initializers.items():
        if tensor.data_type != kind or prod(tensor.dims) != array.size:
            continue
        if np.array_equal(tensor_value(tensor, index.folder).reshape(-1), array):
            return name
    raise NotStored("the sink's logits are written out for every query, or in no value at all", array)


def with_sinks(index: GraphIndex, world: World, facts: MaskFacts, sinks: str) -> MaskFacts:
    """What a row that sees no key gives beside a sink: 0, because the sink takes all of its weight.

    A logit that is computed from the input is taken for finite; a constant is looked at.

    Raises:
        Unsupported: hidden scores are finite, and the sink is not far above them: such a row would see both.
    """
    if not facts.fills:
        return facts
    highest = max(facts.fills)
    lowest = -np.inf if index.data_inputs(sinks) else float(world.value(sinks).astype(np.float64).min())
    if np.isfinite(lowest) and lowest - highest > _BELOW:
        return replace(facts, masked_rows="zero")
    if highest == -np.inf and index.data_inputs(sinks):
        return replace(facts, masked_rows="zero")
    raise Unsupported("sinks", f"hidden scores are {highest}, and the sink '{sinks}' may be no larger")
