"""Follows axes through Reshape, Transpose, Unsqueeze, Squeeze and Expand.

An axis is a tuple of atoms, a row-major product; a Reshape regroups atoms and splits them where it must. Size-1 atoms
are dropped, so an axis of size 1 is the empty tuple. Roles (batch, heads, sequence, dim) are then sets of atoms, and
two exporters' spellings of one layout give the same axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import World

REPEAT_OPS = frozenset({"Tile", "Gather", "Concat"})
"""Operators that may write one operand several times along an axis, as grouped-query exports do."""

Axis = tuple[int, ...]
Axes = tuple[Axis, ...]

VIEW_OPS = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Identity", "Flatten"})


@dataclass
class Atoms:
    """Sizes of atoms, and the children of those that were split."""

    sizes: list[int] = field(default_factory=list)
    children: dict[int, Axis] = field(default_factory=dict)

    def new(self, size: int) -> Axis:
        """A fresh axis of this size."""
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def leaves(self, axis: Axis) -> Axis:
        """The axis in terms of atoms that are not split any further."""
        out: list[int] = []
        for atom in axis:
            out.extend(self.leaves(self.children[atom]) if atom in self.children else (atom,))
        return tuple(out)

    def size(self, axis: Axis) -> int:
        return prod(self.sizes[a] for a in axis)

    def _split(self, atom: int, first: int) -> Axis:
        pair = self.new(first) + self.new(self.sizes[atom] // first)
        self.children[atom] = pair
        return pair

    def regroup(self, axes: Axes, shape: Sequence[int]) -> Axes:
        """The same elements seen under ``shape``.

        Raises:
            Unsupported: an output axis mixes parts of atoms that do not divide evenly.
        """
        pending = [a for axis in axes for a in self.leaves(axis)]
        pending.reverse()
        out: list[Axis] = []
        for size in shape:
            rest, axis = size, []
            while rest > 1:
                if not pending:
                    raise Unsupported("reshape", f"a reshape to {list(shape)} changes the number of elements")
                atom = pending.pop()
                have = self.sizes[atom]
                if have == 0:
                    raise Unsupported("reshape", f"a reshape to {list(shape)} of a tensor without elements")
                if rest % have == 0:
                    axis.append(atom)
                    rest //= have
                elif have % rest == 0:
                    head, *tail = self._split(atom, rest)
                    axis.append(head)
                    pending.extend(reversed(tail))
                    rest = 1
                else:
                    raise Unsupported("reshape", f"a reshape to {list(shape)} mixes axes")
            out.append(tuple(axis))
        if pending:
            raise Unsupported("reshape", f"a reshape to {list(shape)} changes the number of elements")
        return tuple(out)


def _shape(world: World, value: str) -> tuple[int, ...]:
    shape = world.shapes.get(value)
    if shape is None:
        raise Unsupported(
            "shape-unknown", f"the shape of '{value}' is not known", "run onnx shape inference or bind it"
        )
    return shape


def _permutation(node: NodeProto, rank: int) -> list[int]:
    for attribute in node.attribute:
        if attribute.name == "perm":
            return list(attribute.ints)
    return list(range(rank))[::-1]


def forward(world: World, atoms: Atoms, node: NodeProto, axes: Axes) -> Axes:
    """The axes of a view node's output from those of its input."""
    if node.op_type == "Identity":
        return axes
    if node.op_type == "Transpose":
        return tuple(axes[p] for p in _permutation(node, len(axes)))
    before, after = _shape(world, node.input[0]), _shape(world, node.output[0])
    if node.op_type == "Expand":
        padded: Axes = ((),) * (len(after) - len(before)) + axes
        return tuple(
            atoms.new(size) if not axis and size > 1 else axis for axis, size in zip(padded, after, strict=True)
        )
    return atoms.regroup(axes, after)


def backward(world: World, atoms: Atoms, node: NodeProto, axes: Axes) -> Axes:
    """The axes of a view node's input from those of its output; an expanded axis loses its atoms."""
    if node.op_type == "Identity":
        return axes
    if node.op_type == "Transpose":
        permutation = _permutation(node, len(axes))
        out: list[Axis] = [()] * len(axes)
        for position, source in enumerate(permutation):
            out[source] = axes[position]
        return tuple(out)
    before = _shape(world, node.input[0])
    if node.op_type in REPEAT_OPS:
        return _before_repeat(atoms, axes, before, _repeats(world, node))
    if node.op_type == "Expand":
        kept = axes[len(axes) - len(before) :]
        return tuple(() if size == 1 else axis for axis, size in zip(kept, before, strict=True))
    return atoms.regroup(axes, before)


def _repeats(world: World, node: NodeProto) -> list[tuple[int, int, bool]]:
    """(axis, times, inner) for each axis that ``node`` writes several times; ``inner``: element by element.

    Raises:
        Unsupported: ``node`` does anything else.
    """
    shape = _shape(world, node.input[0])
    if node.op_type == "Tile":
        counts = [int(n) for n in world.value(node.input[1]).reshape(-1)]
        return [(axis, n, False) for axis, n in enumerate(counts) if n != 1]
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(shape)
    if node.op_type == "Concat" and len(set(node.input)) == 1:
        return [(axis, len(node.input), False)]
    if node.op_type == "Gather" and len(world.shapes.get(node.input[1], ())) == 1:
        indices, size = [int(i) % shape[axis] for i in world.value(node.input[1])], shape[axis]
        times, rest = divmod(len(indices), size)
        if not rest and times > 0:
            if indices == [i for i in range(size) for _ in range(times)]:
                return [(axis, times, True)]
            if indices == [i for _ in range(times) for i in range(size)]:
                return [(axis, times, False)]
    raise Unsupported("view", f"{node.op_type} '{node.output[0]}' does more than repeat its input")


def _before_repeat(
    atoms: Atoms, axes: Axes, before: tuple[int, ...], repeats: list[tuple[int, int, bool]]
) -> Axes:  # fmt: skip
    out = list(axes)
    for axis, times, inner in repeats:
        sizes = (before[axis], times) if inner else (times, before[axis])
        pair = atoms.regroup((axes[axis],), sizes)
        out[axis] = pair[0] if inner else pair[1]
    return tuple(out)
