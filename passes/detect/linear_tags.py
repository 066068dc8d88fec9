"""What each axis of a value is: batch, tokens or channels, read off the layers that made the value.

A product of two activations says nothing about its axes: (A B) C is attention over the axis that A and B share, or
over the one that B and C share, or none. Layers with weights do say it: a linear layer's last axis and a convolution's
second one are channels, and splits, merges and transposes of those keep what they are.
"""

from __future__ import annotations

from math import prod
from typing import Literal

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.contraction import contraction
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.evaluate import GraphIndex, World

Tag = Literal["batch", "token", "channel", "mixed"]

_Axis = tuple[tuple[int, Tag], ...]
"""A row-major product of sizes; an axis of size 1 is empty."""

_DEEPEST = 120
"""Values are followed at most this far; what lies before is read by its rank."""


class AxisTags:
    """The tags of every value of one world, each found once."""

    def __init__(self, index: GraphIndex, world: World) -> None:
        self._index, self._world = index, world
        self._known: dict[str, tuple[_Axis, ...]] = {}

    def tag(self, value: str, axis: int) -> Tag:
        """What ``axis`` of ``value`` is; ``mixed`` where it is a product of several, or of size 1."""
        kinds = {t for _, t in self._axes(value, 0)[axis]}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def _axes(self, value: str, depth: int) -> tuple[_Axis, ...]:
        if value not in self._known:
            shape = self._world.shapes.get(value, ())
            node = self._index.producer.get(value)
            axes = self._made_by(node, value, shape, depth) if node is not None and depth < _DEEPEST else None
            self._known[value] = axes if axes is not None else _by_rank(shape)
        return self._known[value]

    def _made_by(self, node: NodeProto, value: str, shape: tuple[int, ...], depth: int) -> tuple[_Axis, ...] | None:
        """None: what ``node`` does says nothing about the axes."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in ("Conv", "ConvTranspose"):
            tags: list[Tag] = ["batch", "channel", *(["token"] * (len(shape) - 2))]  # type: ignore[list-item]
            return tuple(_axis(n, t) for n, t in zip(shape, tags, strict=True))
        if node.op_type in ("MatMul", "Gemm", "Einsum"):
            return self._product(node, shape, depth)
        if node.op_type in VIEW_OPS:
            return self._view(node, shape, depth)
        source = next(
            (v for v in node.input if v and self._index.data_inputs(v) and v in self._world.shapes), None
        )  # fmt: skip
        if source is None:
            return None
        same = [v for v in node.input if v and self._world.shapes.get(v) == shape and self._index.data_inputs(v)]
        source = same[0] if same else source
        before = self._world.shapes[source]
        axes = self._axes(source, depth + 1)
        if node.op_type == "Gather" and len(before) == len(shape) + 1:
            dropped = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(before)
            axes, before = axes[:dropped] + axes[dropped + 1 :], before[:dropped] + before[dropped + 1 :]
        if len(before) != len(shape):
            return None
        return tuple(a if n == m else _resized(a, m) for a, n, m in zip(axes, before, shape, strict=True))

    def _product(self, node: NodeProto, shape: tuple[int, ...], depth: int) -> tuple[_Axis, ...] | None:
        left, right = node.input[:2]
        data = [bool(self._index.data_inputs(v)) for v in (left, right)]
        if data == [True, False] and node.op_type != "Einsum":  # a linear layer: what comes out are channels
            return _by_rank(shape)
        try:
            product = contraction(self._world, node)
        except Unsupported:
            return None
        if product is None:
            return None
        found: dict[str, _Axis] = {}
        for operand, labels, is_data in zip(
            (left, right), (product.left_labels, product.right_labels), data, strict=True
        ):  # fmt: skip
            if is_data:
                for label, axis in zip(labels, self._axes(operand, depth + 1), strict=True):
                    found[label] = found.get(label) or axis
        if not all(data):
            # Weights by activations: the axis that the weights bring in is what the summed one was.
            summed = [found[x] for x in product.summed if x in found]
            kinds = {t for axis in summed for _, t in axis}
            tag: Tag = kinds.pop() if len(kinds) == 1 else "mixed"
            for label, size in zip(product.out_labels, shape, strict=True):
                found.setdefault(label, _axis(size, tag))
        return tuple(found.get(x) or _axis(n, "mixed") for x, n in zip(product.out_labels, shape, strict=True))

    def _view(self, node: NodeProto, shape: tuple[int, ...], depth: int) -> tuple[_Axis, ...] | None:
        axes = self._axes(node.input[0], depth + 1)
        if node.op_type == "Identity":
            return axes
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(len(axes)))[::-1])
            return tuple(axes[p] for p in order)
        if node.op_type == "Expand":
            padded = ((),) * (len(shape) - len(axes)) + axes
            return tuple(a or _axis(n, "batch") for a, n in zip(padded, shape, strict=True))
        return _regroup(axes, shape)


def _axis(size: int, tag: Tag) -> _Axis:
    return ((size, tag),) if size > 1 else ()


def _by_rank(shape: tuple[int, ...]) -> tuple[_Axis, ...]:
    """[batch, tokens.., channels], and [tokens, channels] for two axes."""
    tags: list[Tag] = ["token"] * len(shape)
    if tags:
        tags[-1] = "channel"
    if len(shape) > 2:
        tags[0] = "batch"
    return tuple(_axis(n, t) for n, t in zip(shape, tags, strict=True))


def _resized(axis: _Axis, size: int) -> _Axis:
    """Part of an axis, or one that something was joined to."""
    kinds = {t for _, t in axis}
    return _axis(size, kinds.pop() if len(kinds) == 1 else "mixed")


def _regroup(axes: tuple[_Axis, ...], shape: tuple[int, ...]) -> tuple[_Axis, ...] | None:
    pending = [factor for axis in axes for factor in axis][::-1]
    if prod(n for n, _ in pending) != prod(shape):
        return None
    out: list[_Axis] = []
    for size in shape:
        rest, axis = size, []
        while rest > 1:
            have, tag = pending.pop()
            if rest % have == 0:
                axis.append((have, tag))
                rest //= have
            elif have % rest == 0:
                axis.append((rest, tag))
                pending.append((have // rest, tag))
                rest = 1
            else:
                return None
        out.append(tuple(axis))
    return tuple(out)
