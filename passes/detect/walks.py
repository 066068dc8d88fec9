"""From the core of an attention outwards: its operands, its weights and its output, over nodes that only move data."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.contraction import Contraction, contraction
from attncompile.passes.detect.guards import guard
from attncompile.passes.detect.homes import BYTES, Stage, Walk
from attncompile.passes.detect.row_guard import row_guard
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import REPEAT_OPS, VIEW_OPS, Atoms, Axes, Axis, backward, forward
from attncompile.passes.evaluate import GraphIndex, World

_OF_SHAPES = frozenset({"Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast"})
"""What exporters compute a Reshape's shape with, after Shape."""


def node_name(node: NodeProto) -> str:
    """The node's name, or ``op_type:first output`` where the exporter gave none."""
    return node.name or f"{node.op_type}:{node.output[0]}"


def operand_axes(world: World, value: str, labels: tuple[str, ...], known: dict[str, Axis]) -> Axes:
    sizes = world.shapes[value]
    return tuple(() if size == 1 else known[label] for label, size in zip(labels, sizes, strict=True))


def walk(index: GraphIndex, world: World, atoms: Atoms, value: str, axes: Axes, scaled: bool, reader: str) -> Walk:
    """From the product back over views (and scalings): stages deepest first; ``nodes[i:]`` lead from stage i on."""
    stages = [Stage(value, axes, world.types.get(value, 0))]
    nodes: list[NodeProto] = []
    scales: list[float] = []
    while True:
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            break
        factor = 1.0
        if node.op_type in VIEW_OPS | REPEAT_OPS:
            try:
                axes = backward(world, atoms, node, axes)
            except Unsupported:
                break
            source = node.input[0]
        elif _widens(world, node) or _narrows_back(index, world, node):
            source = node.input[0]
        elif scaled and node.op_type in ("Mul", "Div") and (found := _scalar_factor(world, node)) is not None:
            source, factor = found
        else:
            break
        nodes.append(node)
        scales.append(factor)
        value = source
        stages.append(Stage(value, axes, world.types.get(value, 0)))
    return Walk(tuple(stages[::-1]), tuple(nodes[::-1]), tuple(scales[::-1]), reader)


def _widens(world: World, node: NodeProto) -> bool:
    """Whether ``node`` casts to a wider float: no information is lost, so the operand may be taken before it."""
    sizes = [BYTES.get(world.types.get(v, 0), 0) for v in (node.input[0], node.output[0])]
    return node.op_type == "Cast" and 0 < sizes[0] < sizes[1]


def _narrows_back(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether ``node`` casts back what a cast before it, views between them aside, made wider: nothing was changed."""
    if node.op_type != "Cast" or _widens(world, node):
        return False
    before = index.producer.get(node.input[0])
    while before is not None and before.domain in ("", "ai.onnx") and before.op_type in VIEW_OPS:
        before = index.producer.get(before.input[0])
    if before is None or before.domain not in ("", "ai.onnx") or not _widens(world, before):
        return False
    return world.types.get(before.input[0]) == world.types.get(node.output[0])


def _scalar_factor(world: World, node: NodeProto) -> tuple[str, float] | None:
    pairs = [(node.input[0], node.input[1])]
    if node.op_type == "Mul":
        pairs.append((node.input[1], node.input[0]))
    for source, other in pairs:
        factor = world.scalar(other)
        if factor and isfinite(factor) and world.shapes.get(source) == world.shapes.get(node.output[0]):
            return source, factor if node.op_type == "Mul" else 1.0 / factor
    return None


def walk_output(
    index: GraphIndex, world: World, atoms: Atoms, value: str, axes: Axes
) -> tuple[list[Stage], list[NodeProto]]:
    """From the product with the values on over views, and over casts to a narrower float.

    A stage where the site cannot end, because someone after it asks for the shape of a value before it, has dtype 0.
    """
    stages, nodes = [Stage(value, axes, world.types.get(value, 0))], []
    while value not in index.outputs:
        readers = readers_of(index, value)
        if len(readers) != 1 or readers[0].domain not in ("", "ai.onnx"):
            break
        (node,) = readers
        sizes = [BYTES.get(world.types.get(v, 0), 0) for v in (node.output[0], value)]
        narrows = node.op_type == "Cast" and 0 < sizes[0] < sizes[1]
        if not narrows and (node.op_type not in VIEW_OPS or node.op_type == "Expand" or node.input[0] != value):
            break
        if not narrows:
            try:
                axes = forward(world, atoms, node, axes)
            except Unsupported:
                break
        nodes.append(node)
        value = node.output[0]
        stages.append(Stage(value, axes, world.types.get(value, 0)))
    for end in range(1, len(stages)):
        inside = {id(n) for n in nodes[:end]}
        asked = [n for s in stages[:end] for n in index.consumers.get(s.value, []) if n.op_type == "Shape"]
        if not all(dies(index, n, inside) for n in asked):
            stages[end] = replace(stages[end], dtype=0)
    return stages, nodes


def after_softmax(
    index: GraphIndex, world: World, atoms: Atoms, value: str, axes: Axes
) -> tuple[str, Axes, list[NodeProto], bool]:
    """Over casts, views and NaN guards to the weights that meet the values."""
    nodes: list[NodeProto] = []
    guarded = False
    while True:
        readers = readers_of(index, value)
        rows = row_guard(index, world, value)
        if rows is not None:
            value, guarded = rows[0], True
            nodes += rows[1]
            continue
        found = guard(index, world, value)
        if found is not None:
            nodes += found.nodes
            value, guarded = found.value, guarded or found.zero
            continue
        if len(readers) != 1 or value in index.outputs:
            return value, axes, nodes, guarded
        (node,) = readers
        if node.op_type in VIEW_OPS and node.op_type != "Expand" and node.input[0] == value:
            axes = forward(world, atoms, node, axes)
        elif not is_idle_dropout(index, world, node) and not (
            node.op_type == "Cast" and world.types.get(node.output[0]) in FLOATS
        ):
            return value, axes, nodes, guarded
        nodes.append(node)
        value = node.output[0]


def readers_of(index: GraphIndex, value: str) -> list[NodeProto]:
    """Who reads the elements of ``value``; readers of its shape are looked at when the site is whole."""
    return [n for n in index.consumers.get(value, []) if n.op_type != "Shape"]


def is_idle_dropout(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """A Dropout that passes its input through: not in training mode, its mask unread."""
    if node.op_type != "Dropout" or any(index.consumers.get(o) or o in index.outputs for o in node.output[1:] if o):
        return False
    training = node.input[2] if len(node.input) > 2 else ""
    return not training or (not index.data_inputs(training) and not world.value(training).any())


def second_product(index: GraphIndex, world: World, weights: str) -> Contraction:
    readers = readers_of(index, weights)
    if weights in index.outputs:
        raise Unsupported("weights-used", f"the attention weights '{weights}' are an output of the model")
    if len(readers) != 1:
        names = ", ".join(node_name(n) for n in readers[:4])
        raise Unsupported("weights-used", f"the softmax's result is read by {len(readers)} nodes ({names})")
    product = contraction(world, readers[0])
    if product is None:
        raise Unsupported(
            "no-value-product", f"the softmax's result goes to {readers[0].op_type}, not to a product with values"
        )
    if product.left == product.right:
        raise Unsupported("value-product", "the weights are multiplied by themselves")
    if not index.data_inputs(product.right if product.left == weights else product.left):
        raise Unsupported(
            "constant-values", "the softmax's result meets a constant, not values computed from the input",
            "a router or a codebook: left alone",
        )  # fmt: skip
    return product


def dies(index: GraphIndex, node: NodeProto, removed: set[int]) -> bool:
    """Whether ``node`` goes with ``removed``: it is among them, or reads only a shape, and only for them."""
    if id(node) in removed:
        return True
    if node.op_type not in ("Shape", *_OF_SHAPES) or any(o in index.outputs for o in node.output):
        return False
    readers = [n for o in node.output for n in index.consumers.get(o, [])]
    return bool(readers) and all(dies(index, n, removed) for n in readers)
