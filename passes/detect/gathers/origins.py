"""Where the elements of a tensor come from, through any operators that only move data.

A tensor that was sliced, padded, gathered and reshaped from one source is described by its axes (tuples of atoms, as in
``views``) and, for every axis of the source, by the coordinate there as an array over the few atoms it depends on; -1
is padding. A window of 15 x 15 over 64 x 64 tokens is two arrays of 64 x 15 numbers, whatever the heads and head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np
from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis, forward
from attncompile.passes.evaluate import GraphIndex, World

MOVES = VIEW_OPS | {"Slice", "Gather", "GatherND", "Pad", "Concat", "Split", "Tile"}
"""Operators that only move data (Concat: of parts of one source)."""

MAX_ELEMENTS = 1 << 25
"""Coordinates are arrays of at most this many numbers."""

_STEERED = frozenset({"Slice", "Pad", "Tile", "Gather", "GatherND"})
_PAD_MODES: Mapping[str, str] = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}


@dataclass(frozen=True, slots=True)
class Coordinate:
    """``array`` has one axis for each atom of ``atoms``, of its size: the index along one axis of the source, or -1."""

    atoms: Axis
    array: np.ndarray

    def over(self, atoms: Atoms, wanted: Axis) -> np.ndarray:
        """The array with one axis for each of ``wanted`` (leaves), size 1 where it does not depend on that atom.

        Raises:
            Unsupported: it depends on an atom that is not among ``wanted``.
        """
        own = self.on_leaves(atoms)
        if any(a not in wanted for a in own.atoms):
            raise Unsupported("gather-form", "the tokens depend on an axis that is neither query, key nor batch")
        order = sorted(range(len(own.atoms)), key=lambda i: wanted.index(own.atoms[i]))
        shape = [atoms.sizes[a] if a in own.atoms else 1 for a in wanted]
        return own.array.transpose(order).reshape(shape)

    def on_leaves(self, atoms: Atoms) -> Coordinate:
        """The same in terms of atoms that are not split any further.

        Raises:
            Unsupported: two of its atoms turned out to be one (a diagonal).
        """
        leaves = atoms.leaves(self.atoms)
        if leaves == self.atoms:
            return self
        if len(set(leaves)) < len(leaves):
            raise Unsupported("gather-form", "a diagonal is taken")
        return Coordinate(leaves, self.array.reshape([atoms.sizes[a] for a in leaves]))


@dataclass(frozen=True, slots=True)
class Origins:
    """A tensor as parts of a source: its ``axes``, and for each axis of the source the coordinate there."""

    axes: Axes
    coordinates: tuple[Coordinate, ...]

    @staticmethod
    def of(atoms: Atoms, axes: Axes, parts: Axes | None = None) -> Origins:
        """The source itself, with these axes; ``parts``: what to follow the coordinates along, the axes themselves
        where it is not given.
        """
        return Origins(axes, tuple(_itself(atoms, axis) for axis in parts or axes))


def _itself(atoms: Atoms, axis: Axis) -> Coordinate:
    leaves = atoms.leaves(axis)
    sizes = [atoms.sizes[a] for a in leaves]
    return Coordinate(leaves, np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes))


def line(index: GraphIndex, world: World, value: str) -> list[str]:
    """The values that everything in ``value`` comes from, the deepest first, ``value`` itself last: each holds all of
    what the later ones hold.
    """
    known: dict[str, list[str]] = {}
    stack = [value]
    while stack:
        name = stack[-1]
        if name in known:
            stack.pop()
            continue
        sources = _moved_from(index, world, name)
        missing = [s for s in sources if s not in known]
        if missing:
            stack += missing
            continue
        stack.pop()
        common = known[sources[0]] if sources else []
        for other in sources[1:]:
            shared = set(known[other])
            common = [v for v in common if v in shared]
        known[name] = [*common, name]
    return known[value]


def _moved_from(index: GraphIndex, world: World, value: str) -> list[str]:
    """The data that ``value`` is moved from; none where it is computed."""
    node = index.producer.get(value)
    if node is None or node.domain not in ("", "ai.onnx") or not index.data_inputs(value):
        return []
    if node.op_type == "Concat":
        return [v for v in dict.fromkeys(node.input) if index.data_inputs(v)]
    if node.op_type in MOVES and index.data_inputs(node.input[0]):
        return [node.input[0]]
    if scaled_from(index, world, node) is not None:
        return [node.input[0] if index.data_inputs(node.input[0]) else node.input[1]]
    return []


def scaled_from(index: GraphIndex, world: World, node: NodeProto) -> tuple[str, float] | None:
    """The tensor that ``node`` multiplies by one number, and the number."""
    if node.op_type not in ("Mul", "Div") or node.domain not in ("", "ai.onnx"):
        return None
    sides = [(node.input[0], node.input[1])] + [(node.input[1], node.input[0])] * (node.op_type == "Mul")
    for source, other in sides:
        factor = world.scalar(other)
        same = world.shapes.get(source) == world.shapes.get(node.output[0])
        if factor and isfinite(factor) and same and index.data_inputs(source):
            return source, factor if node.op_type == "Mul" else 1.0 / factor
    return None


class Mover:
    """Follows one source forward to values that are parts of it."""

    def __init__(
        self, index: GraphIndex, world: World, atoms: Atoms, source: str, axes: Axes, parts: Axes | None = None
    ) -> None:
        self._index, self._world, self._atoms = index, world, atoms
        self._known: dict[str, Origins] = {source: Origins.of(atoms, axes, parts)}
        self.nodes: dict[int, NodeProto] = {}
        self.factor: dict[str, float] = {source: 1.0}

    def origins(self, value: str) -> Origins:
        """Where ``value`` comes from.

        Raises:
            Unsupported: by an operator, or in a way, that is not followed.
        """
        stack = [value]
        while stack:
            name = stack[-1]
            if name in self._known:
                stack.pop()
                continue
            sources = self.sources(name)
            if not sources:
                raise Unsupported("gather-form", f"'{name}' is not a part of the source")
            if any(not prod(self._world.shapes.get(v, (0,))) for v in (*sources, name)):
                raise Unsupported("gather-form", f"'{name}' is made of parts without elements")
            missing = [s for s in sources if s not in self._known]
            if missing:
                stack += missing
                continue
            stack.pop()
            node = self._index.producer[name]
            self.nodes[id(node)] = node
            made = self.step(node, name)
            if tuple(self._atoms.size(self._atoms.leaves(a)) for a in made.axes) != self._world.shapes.get(name):
                raise Unsupported("gather-form", f"'{name}' has another shape than its parts")
            self._known[name] = made
            self.factor[name] = self.scaled(node, name, sources)
        return self._known[value]

    def sources(self, value: str) -> list[str]:
        """What ``value`` is made of, as far as it is followed; none where it is not."""
        return _moved_from(self._index, self._world, value)

    def scaled(self, node: NodeProto, output: str, sources: list[str]) -> float:
        """What the source was multiplied by on the way to ``output``.

        Raises:
            Unsupported: its parts were multiplied by different numbers.
        """
        found = scaled_from(self._index, self._world, node)
        factors = {self.factor[s] for s in sources}
        if len(factors) != 1:
            raise Unsupported("gather-form", f"'{output}' joins parts that are scaled differently")
        return factors.pop() * (found[1] if found else 1.0)

    def step(self, node: NodeProto, output: str) -> Origins:
        """The origins of one output of ``node``, those of its inputs being known."""
        kind = node.op_type
        if kind == "Concat":
            return self._concat(node)
        scaled = scaled_from(self._index, self._world, node)
        if scaled is not None:
            return self._known[scaled[0]]
        before = self._known[node.input[0]]
        if kind in VIEW_OPS:
            axes = forward(self._world, self._atoms, node, before.axes)
            return Origins(axes, before.coordinates)
        shape = self._world.shapes[node.input[0]]
        for axis, indices in self._selections(node, output, shape):
            before = self._select(before, axis, indices)
        return before

    def _selections(self, node: NodeProto, output: str, shape: tuple[int, ...]) -> list[tuple[int, np.ndarray]]:
        """(axis, which of its entries): what each axis of the input becomes; an array of rank 2 makes two axes."""
        kind, world = node.op_type, self._world
        attributes = {a.name: a for a in node.attribute}
        if kind in _STEERED and len(node.input) < 2:
            raise Unsupported("gather-form", f"{kind} '{output}' is written as before opset 13")
        if kind == "Gather":
            axis = (attributes["axis"].i if "axis" in attributes else 0) % len(shape)
            indices = world.value(node.input[1]).astype(np.int64)
            return [(axis, np.where(indices < 0, indices + shape[axis], indices))]
        if kind == "GatherND":
            return [self._gather_nd(node, shape)]
        if kind == "Slice":
            return self._slices(node, shape)
        if kind == "Pad":
            return self._pads(node, shape)
        if kind == "Tile":
            counts = [int(n) for n in world.value(node.input[1]).reshape(-1)]
            return [(a, np.tile(np.arange(shape[a]), n)) for a, n in enumerate(counts) if n != 1]
        if kind == "Split":
            axis = (attributes["axis"].i if "axis" in attributes else 0) % len(shape)
            ends = np.cumsum([world.shapes[o][axis] for o in node.output])
            at = list(node.output).index(output)
            size = world.shapes[output][axis]
            return [(axis, np.arange(int(ends[at]) - size, int(ends[at])))]
        raise Unsupported("gather-form", f"{kind} '{output}' is not followed")

    def _slices(self, node: NodeProto, shape: tuple[int, ...]) -> list[tuple[int, np.ndarray]]:
        rows = [[int(x) for x in self._world.value(v).reshape(-1)] if v else [] for v in node.input[1:]]
        starts, ends = rows[0], rows[1]
        axes = rows[2] if len(rows) > 2 and rows[2] else list(range(len(starts)))
        steps = rows[3] if len(rows) > 3 and rows[3] else [1] * len(starts)
        found = []
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = shape[axis % len(shape)]
            stop = None if step < 0 and end < -size else end
            chosen = np.arange(size)[slice(start, stop, step)]
            if len(chosen) != size or step != 1:
                found.append((axis % len(shape), chosen))
        return found

    def _pads(self, node: NodeProto, shape: tuple[int, ...]) -> list[tuple[int, np.ndarray]]:
        mode = next((a.s.decode() for a in node.attribute if a.name == "mode"), "constant")
        widths = [int(x) for x in self._world.value(node.input[1]).reshape(-1)]
        axes = list(range(len(shape)))
        if len(node.input) > 3 and node.input[3]:
            axes = [int(a) % len(shape) for a in self._world.value(node.input[3]).reshape(-1)]
        found = []
        for i, axis in enumerate(axes):
            left, right = widths[i], widths[i + len(axes)]
            if not left and not right:
                continue
            line_of = np.arange(shape[axis])[max(0, -left) : shape[axis] - max(0, -right)]
            width = (max(0, left), max(0, right))
            if mode == "constant":
                fill = self._world.scalar(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
                if fill is None or not isfinite(fill):
                    raise Unsupported(
                        "gather-form", f"Pad '{node.output[0]}' fills with something that is not a number"
                    )
                found.append((axis, np.pad(line_of, width, constant_values=-1)))
            else:
                found.append((axis, np.pad(line_of, width, mode=_PAD_MODES[mode])))  # type: ignore[call-overload]
        return found

    def _gather_nd(self, node: NodeProto, shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
        if any(a.name == "batch_dims" and a.i for a in node.attribute):
            raise Unsupported("gather-form", f"GatherND '{node.output[0]}' has batch dimensions")
        indices = self._world.value(node.input[1]).astype(np.int64)
        if indices.shape[-1] != 1:
            raise Unsupported("gather-form", f"GatherND '{node.output[0]}' indexes {indices.shape[-1]} axes at once")
        chosen = indices[..., 0]
        return 0, np.where(chosen < 0, chosen + shape[0], chosen)

    def _select(self, before: Origins, axis: int, indices: np.ndarray) -> Origins:
        """``before`` with one axis replaced by as many as ``indices`` has; -1 selects padding."""
        atoms = self._atoms
        old = atoms.leaves(before.axes[axis])
        new = tuple(atoms.new(size) for size in indices.shape)
        made = tuple(x for a in new for x in a)
        if bool(np.any(indices < 0)) and not old:
            raise Unsupported("gather-form", "an axis of one entry is padded")
        coordinates = tuple(self._reindexed(c, old, made, indices) for c in before.coordinates)
        return Origins((*before.axes[:axis], *new, *before.axes[axis + 1 :]), coordinates)

    def _reindexed(self, coordinate: Coordinate, old: Axis, made: Axis, indices: np.ndarray) -> Coordinate:
        atoms = self._atoms
        own = coordinate.on_leaves(atoms)
        if not any(a in old for a in own.atoms):
            return own
        rest = tuple(a for a in own.atoms if a not in old)
        sizes = [atoms.sizes[a] for a in rest]
        wide = np.broadcast_to(
            own.over(atoms, (*rest, *old)), (*sizes, *(atoms.sizes[a] for a in old))
        ).reshape(*sizes, -1)  # fmt: skip
        if int(np.prod(sizes, dtype=np.int64)) * indices.size > MAX_ELEMENTS:
            raise Unsupported("gather-form", "the gathered tokens are too many to follow")
        taken = np.where(indices < 0, -1, wide[..., np.maximum(indices, 0)])
        return Coordinate((*rest, *made), taken.reshape([*sizes, *(atoms.sizes[a] for a in made)]))

    def _concat(self, node: NodeProto) -> Origins:
        """Every part gets the same atoms along the axes that stay, and one of its own along the joined axis."""
        atoms, world = self._atoms, self._world
        shape = world.shapes[node.output[0]]
        axis = next(a.i for a in node.attribute if a.name == "axis") % len(shape)
        stay = [atoms.new(size) if i != axis else () for i, size in enumerate(shape)]
        parts: list[tuple[int, Axis, tuple[Coordinate, ...] | None]] = []
        for value in node.input:
            length = world.shapes[value][axis]
            if not self._index.data_inputs(value):
                if not bool(np.all(np.isfinite(world.value(value)))):
                    raise Unsupported("gather-form", f"Concat '{node.output[0]}' joins values that are not finite")
                parts.append((length, (), None))
                continue
            own = atoms.new(length)
            part = self._known[value]
            coordinates = part.coordinates
            for i, old in enumerate(part.axes):
                leaves = atoms.leaves(old)
                made = own if i == axis else stay[i]
                indices = np.arange(world.shapes[value][i])
                coordinates = tuple(self._reindexed(c, leaves, made, indices) for c in coordinates)
            parts.append((length, own, coordinates))
        known = [p for p in parts if p[2] is not None]
        joined = atoms.new(shape[axis])
        made_coordinates: list[Coordinate] = []
        padded = len(known) == len(parts)
        for s in range(len(known[0][2] or ())):
            seen = [p[2][s] for p in known if p[2] is not None]
            same = all(c.atoms == seen[0].atoms and np.array_equal(c.array, seen[0].array) for c in seen)
            if same and not any(a in p[1] for p, c in zip(known, seen, strict=True) for a in c.atoms):
                made_coordinates.append(seen[0])
                continue
            padded = True
            made_coordinates.append(self._joined(parts, s, joined))
        if not padded:
            raise Unsupported("gather-form", f"Concat '{node.output[0]}' joins constants along an axis of one entry")
        return Origins(tuple(joined if i == axis else stay[i] for i in range(len(shape))), tuple(made_coordinates))

    def _joined(
        self, parts: list[tuple[int, Axis, tuple[Coordinate, ...] | None]], source: int, joined: Axis
    ) -> Coordinate:
        atoms = self._atoms
        others: Axis = ()
        for _, own, coordinates in parts:
            if coordinates is not None:
                others += tuple(a for a in coordinates[source].atoms if a not in own and a not in others)
        sizes = [atoms.sizes[a] for a in others]
        arrays = []
        for length, own, coordinates in parts:
            if coordinates is None:
                arrays.append(np.full([*sizes, length], -1, dtype=np.int64))
            else:
                array = coordinates[source].over(atoms, (*others, *own))
                array = array.reshape((*array.shape[: len(others)], -1))
                arrays.append(np.broadcast_to(array, [*sizes, length]))
        return Coordinate((*others, *joined), np.concatenate(arrays, axis=-1))


def unify(atoms: Atoms, wanted: Axis, have: Axis) -> None:
    """Makes two axes of one size one: atoms are split where the other axis is, and those of ``have`` become the same.

    Raises:
        Unsupported: their atoms do not divide evenly.
    """
    left, right = list(atoms.leaves(wanted)), list(atoms.leaves(have))
    while left and right:
        a, b = left[0], right[0]
        if a == b:
            pass
        elif atoms.sizes[a] == atoms.sizes[b]:
            atoms.children[b] = (a,)
        else:
            big, small = (a, b) if atoms.sizes[a] > atoms.sizes[b] else (b, a)
            if atoms.sizes[big] % atoms.sizes[small]:
                raise Unsupported("gather-form", "the axes of the windows do not divide evenly")
            atoms.regroup(((big,),), (atoms.sizes[small], atoms.sizes[big] // atoms.sizes[small]))
            left, right = list(atoms.leaves(tuple(left))), list(atoms.leaves(tuple(right)))
            continue
        left.pop(0)
        right.pop(0)
    if left or right:
        raise Unsupported("gather-form", "axes of different sizes meet in a product")
