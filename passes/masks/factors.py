"""Separates what is applied to the scores into leaves: bools, masks among numbers, and biases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.scores import HIDDEN
from attncompile.passes.detect.softmax import MaskFactor
from attncompile.passes.evaluate import GraphIndex, World

_MAX_STEPS = 256
"""Nodes of a sum of masks that are looked through."""

_GAP = 4.0
"""Numbers that hide lie this many times below the lowest that does not: a bias that runs on into them is no mask."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A factor that cannot be separated further. ``visible``: bool, True = seen; else added to the scores, which are
    then multiplied by ``factor``.
    """

    value: str
    visible: bool
    negated: bool = False
    factor: float = 1.0

    def seen(self, array: np.ndarray) -> np.ndarray:
        """Bool, True where the leaf's value ``array`` hides nothing."""
        if self.visible:
            return np.asarray(array.astype(bool) ^ self.negated)
        return np.asarray(self.added(array) > HIDDEN)

    def added(self, array: np.ndarray) -> np.ndarray:
        """What ``array`` adds to the scores in the end."""
        numbers = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
        with np.errstate(over="ignore"):
            return numbers if self.factor == 1.0 else numbers * np.float32(self.factor)


def scaled(fill: float, factor: float) -> float:
    """The fill after a multiplication in float32, where the lowest number times 8 is -inf."""
    with np.errstate(over="ignore"):
        return float(np.float32(fill) * np.float32(factor))


def separate(index: GraphIndex, world: World, factor: MaskFactor, leaves: list[Leaf], fills: list[float]) -> None:
    """Splits conjunctions of bools and sums of biases into leaves whose axes still mean the scores' axes."""
    if factor.kind != "add":
        fill = scaled(factor.fill, factor.factor)
        if not fill <= HIDDEN:
            raise Unsupported("mask-scale", f"scores filled with {factor.fill} are multiplied by {factor.factor}")
        fills.append(fill)
        _split_bool(index, world, factor.value, factor.kind == "hidden", leaves)
        return
    _split_sum(index, world, factor, leaves, fills)


def _split_sum(index: GraphIndex, world: World, factor: MaskFactor, leaves: list[Leaf], fills: list[float]) -> None:
    pending, steps = [factor.value], 0
    while pending:
        value, steps = pending.pop(), steps + 1
        if steps > _MAX_STEPS:
            raise Unsupported("mask-form", f"the mask is a sum of more than {_MAX_STEPS} values")
        node = index.producer.get(value)
        op = node.op_type if node is not None and node.domain in ("", "ai.onnx") else ""
        if node is not None and op in ("Identity", "Expand", "Cast"):
            if op != "Cast" or world.types.get(node.input[0]) in (1, 10, 11, 16):
                pending.append(node.input[0])
                continue
        elif node is not None and op == "Add" and node.input[0] != node.input[1]:
            pending += [node.input[1], node.input[0]]
            continue
        elif node is not None and op == "Where":
            on, off = (world.scalar(i) for i in node.input[1:])
            if on == 0.0 and off is not None and scaled(off, factor.factor) <= HIDDEN:
                fills.append(scaled(off, factor.factor))
                _split_bool(index, world, node.input[0], False, leaves)
                continue
            if off == 0.0 and on is not None and scaled(on, factor.factor) <= HIDDEN:
                fills.append(scaled(on, factor.factor))
                _split_bool(index, world, node.input[0], True, leaves)
                continue
        leaves.append(Leaf(value, visible=False, factor=factor.factor))


def _split_bool(index: GraphIndex, world: World, value: str, negated: bool, leaves: list[Leaf]) -> None:
    pending, seen = [(value, negated)], set()
    while pending:
        value, negated = pending.pop()
        if (value, negated) in seen:
            continue
        seen.add((value, negated))
        node = index.producer.get(value)
        op = node.op_type if node is not None and node.domain in ("", "ai.onnx") else ""
        if node is not None and op == "Not":
            pending.append((node.input[0], not negated))
        elif node is not None and (
            op in ("Identity", "Expand")
            or (op == "Cast" and world.types.get(node.input[0]) == TensorProto.BOOL)
        ):  # fmt: skip
            pending.append((node.input[0], negated))
        elif node is not None and op == ("Or" if negated else "And"):
            pending += [(node.input[1], negated), (node.input[0], negated)]
        else:
            leaves.append(Leaf(value, visible=True, negated=negated))


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a stored tensor that is added to the scores does. ``hides``: some keys; ``biases``: adds to others."""

    hides: bool
    biases: bool
    fills: tuple[float, ...]
    words: str

    @staticmethod
    def of(added: np.ndarray) -> Numbers:
        """Numbers at or below -9000 hide their key and the others are a bias, where there is a gap between the two."""
        shape = list(added.shape)
        if not added.size:
            return Numbers(False, False, (), f"{shape} values")
        lowest, highest = float(added.min()), float(added.max())
        words = f"{shape} values from {lowest:.3g} to {highest:.3g}"
        if not lowest <= HIDDEN:  # NaN included
            return Numbers(False, lowest != 0.0 or highest != 0.0, (), words)
        hidden = added <= HIDDEN
        if hidden.all():
            top, weakest, strongest = highest, 0.0, 0.0
        else:
            top = float(added.max(where=hidden, initial=-np.inf))
            weakest, strongest = float(added.min(where=~hidden, initial=np.inf)), highest
        if np.isnan(strongest) or top > _GAP * weakest:
            return Numbers(False, True, (), words)
        fills = (lowest,) if top == lowest else (lowest, top)
        if weakest == strongest == 0.0:
            return Numbers(True, False, fills, words)
        return Numbers(True, True, fills, f"{shape} values from {weakest:.3g} to {strongest:.3g} at the keys that are "
                       f"seen, up to {top:.3g} at the others")  # fmt: skip
