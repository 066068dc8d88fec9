"""Tells attention over tokens from the same products over channels (cross-covariance attention, Restormer)."""

from __future__ import annotations

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.homes import Walk
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis, backward
from attncompile.passes.evaluate import GraphIndex, World

_ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Cast", "Relu", "Clip", "Tanh", "Sigmoid", "Identity", "Dropout",
    "LayerNormalization", "RMSNormalization", "InstanceNormalization", "BatchNormalization",
})  # fmt: skip
_MAX_STEPS = 32


def check_tokens(index: GraphIndex, world: World, atoms: Atoms, walks: tuple[Walk, Walk], sequences: tuple[Axis, Axis],
                 dims: Axis) -> None:  # fmt: skip
    """Nothing where the keys are tokens, or nothing is known of where they come from.

    Raises:
        Unsupported: queries and keys are both the channels of a projection, contracted over its rows: the weights say
            how channels mix.
    """
    for walk, sequence in zip(walks, sequences, strict=True):
        stage = walk.stages[0]
        channels = _channels(index, world, atoms, stage.value, stage.axes)
        if channels is None:
            return
        leaves = set(atoms.leaves(channels))
        own, summed = set(atoms.leaves(sequence)), set(atoms.leaves(dims))
        if not own or not own <= leaves or summed & leaves:
            return
    raise Unsupported(
        "channel-attention",
        "the softmax runs over channels of the projections, and the product sums over the tokens: it mixes channels, "
        "not tokens",
    )  # fmt: skip


def _channels(index: GraphIndex, world: World, atoms: Atoms, value: str, axes: Axes) -> Axis | None:
    """The axis of outputs of the projection (by a constant: a product or a convolution) that ``value`` is cut from."""
    for _ in range(_MAX_STEPS):
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in ("MatMul", "Gemm"):
            return None if index.data_inputs(node.input[1]) else axes[-1]
        if node.op_type == "Conv":
            return axes[1] if len(axes) > 1 and not index.data_inputs(node.input[1]) else None
        before = _before(index, world, atoms, node, value, axes)
        if before is None:
            return None
        value, axes = before
    return None


def _before(
    index: GraphIndex, world: World, atoms: Atoms, node: NodeProto, value: str, axes: Axes
) -> tuple[str, Axes] | None:  # fmt: skip
    shape = world.shapes.get(value)
    if node.op_type in _ELEMENTWISE:
        same = [v for v in node.input if v and world.shapes.get(v) == shape and index.data_inputs(v)]
        return (same[0], axes) if same else None
    source = node.input[0]
    size = world.shapes.get(source)
    if shape is None or size is None:
        return None
    if node.op_type in VIEW_OPS:
        try:
            return source, backward(world, atoms, node, axes)
        except Unsupported:
            return None
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % max(1, len(size))
    if node.op_type == "Gather" and len(size) == len(shape) + 1:
        return source, (*axes[:axis], atoms.new(size[axis]), *axes[axis:])
    if node.op_type in ("Slice", "Split") and len(size) == len(shape):
        cut = [i for i, (a, b) in enumerate(zip(size, shape, strict=True)) if a != b]
        if any(size[i] % shape[i] for i in cut):
            return None
        return source, tuple(
            atoms.new(size[i] // shape[i]) + axis if i in cut else axis for i, axis in enumerate(axes)
        )  # fmt: skip
    return None
