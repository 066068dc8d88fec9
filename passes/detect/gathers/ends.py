"""The ends of a windowed core: the values that its operands are moved from, and the one its output is moved to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import Layout, Operand
from attncompile.passes.detect.gathers.origins import Coordinate, Mover, line, unify
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis
from attncompile.passes.detect.walks import dies, node_name, readers_of
from attncompile.passes.evaluate import GraphIndex, World

_LAYOUTS: tuple[Layout, Layout] = ("BHND", "BNHD")
_AFTER = (VIEW_OPS | {"Slice", "Gather"}) - {"Expand"}
"""What may stand between the windowed core and its output: nothing that repeats or adds."""


@dataclass(frozen=True, slots=True)
class Moved:
    """An operand of a product: the source, its layout and sizes, and from where there the product's axes come."""

    operand: Operand
    sizes: dict[str, int]
    coordinates: dict[str, Coordinate]
    nodes: tuple[NodeProto, ...]
    factor: float


def find_source(
    index: GraphIndex, world: World, atoms: Atoms, name: str, axes: Axes, dim: Axis, like: Moved | None = None
) -> Moved:
    """The deepest value with batch, tokens, heads and head dim apart that all of ``name`` is moved from.

    ``axes`` are those of ``name`` in the product, ``dim`` the one of the head dim; ``like``: another operand, whose
    batch entries and heads must be the same.

    Raises:
        Unsupported: there is none.
    """
    reason = Unsupported("gather-form", f"no value with tokens and heads apart holds all of '{name}'")
    for source in line(index, world, name):
        if len(world.shapes.get(source, ())) != 4 or world.types.get(source) not in FLOATS:
            continue
        for layout in _LAYOUTS:
            # A failed attempt must leave no trace in the axes that all operands share.
            trial = Atoms(list(atoms.sizes), dict(atoms.children))
            try:
                found = _from(index, world, trial, source, layout, name, axes, dim, like)
            except Unsupported as error:
                reason = error
                continue
            atoms.sizes, atoms.children = trial.sizes, trial.children
            return found
    raise reason


def _from(
    index: GraphIndex, world: World, atoms: Atoms, source: str, layout: Layout, name: str, axes: Axes, dim: Axis,
    like: Moved | None,
) -> Moved:  # fmt: skip
    shape = world.shapes[source]
    mover = Mover(index, world, atoms, source, tuple(atoms.new(size) for size in shape))
    origins = mover.origins(name)
    for wanted, have, size in zip(axes, origins.axes, world.shapes[name], strict=True):
        if size > 1:
            unify(atoms, wanted, have)
    coordinates = {x: c.on_leaves(atoms) for x, c in zip(layout, origins.coordinates, strict=True)}
    sizes = dict(zip(layout, shape, strict=True))
    if coordinates["D"].atoms != atoms.leaves(dim) or not _counts(coordinates["D"], sizes["D"]):
        raise Unsupported("gather-form", f"the head dim of '{name}' is moved")
    for x in "BH":
        if not _counts(coordinates[x], sizes[x]):
            raise Unsupported("gather-form", f"batch entries or heads of '{name}' are moved")
        other = like.coordinates[x].on_leaves(atoms) if like is not None else coordinates[x]
        if other.atoms != coordinates[x].atoms:
            raise Unsupported("gather-form", f"batch entries or heads of '{name}' are not those of the keys")
    if like is None and _counts(coordinates["N"], sizes["N"]):
        raise Unsupported("gather-form", "nothing is gathered")
    return Moved(Operand(source, layout), sizes, coordinates, tuple(mover.nodes.values()), mover.factor[name])


def _counts(coordinate: Coordinate, size: int) -> bool:
    """Whether the coordinate runs through 0 .. size - 1 in order."""
    return bool(np.array_equal(coordinate.array.reshape(-1), np.arange(size)))


class OutputPlace:
    """Where the output stands: the last rank-4 value whose tokens, heads and batch entries are those of the query."""

    def __init__(self, index: GraphIndex, world: World, atoms: Atoms, query: Moved, dim: Axis) -> None:
        self._index, self._world, self._atoms = index, world, atoms
        self._rows = {x: query.coordinates[x].on_leaves(atoms) for x in "BHN"}
        self._rows["D"] = Coordinate(atoms.leaves(dim), np.arange(atoms.size(dim)).reshape(
            [atoms.sizes[a] for a in atoms.leaves(dim)]))  # fmt: skip
        self._sizes = {**query.sizes, "D": atoms.size(dim)}

    def find(self, value: str, axes: Axes) -> tuple[Operand, list[NodeProto]]:
        """The operand, and the nodes from ``value``, the product with the values, to it.

        Raises:
            Unsupported: no such value.
        """
        index, atoms = self._index, self._atoms
        leaves = tuple(dict.fromkeys(a for axis in axes for a in atoms.leaves(axis)))
        mover = Mover(index, self._world, atoms, value, axes, tuple((a,) for a in leaves))
        nodes: list[NodeProto] = []
        found: tuple[Operand, list[NodeProto]] | None = None
        while True:
            origins = mover.origins(value)
            place = dict(zip(leaves, origins.coordinates, strict=True))
            layout = self._layout(value, origins.axes, place)
            if layout is not None and self._unasked(nodes, value):
                found = Operand(value, layout), list(nodes)
            readers = readers_of(index, value)
            if value in index.outputs or len(readers) != 1:
                break
            (node,) = readers
            if node.domain not in ("", "ai.onnx") or node.op_type not in _AFTER or node.input[0] != value:
                break
            nodes.append(node)
            value = node.output[0]
            try:
                mover.origins(value)
            except Unsupported:
                break
        if found is None:
            raise Unsupported("gather-form", "no value with tokens and heads apart holds the output")
        return found

    def _unasked(self, nodes: list[NodeProto], end: str) -> bool:
        """Whether nobody asks for the shape of a value that would go."""
        inside = {id(n) for n in nodes}
        gone = [n.input[0] for n in nodes if n.output[0] != end]
        asked = [n for v in gone for n in self._index.consumers.get(v, []) if n.op_type == "Shape"]
        return all(dies(self._index, n, inside) for n in asked)

    def _layout(self, value: str, axes: Axes, place: dict[int, Coordinate]) -> Layout | None:
        shape = self._world.shapes.get(value, ())
        for layout in _LAYOUTS:
            if len(shape) == 4 and shape == tuple(self._sizes[x] for x in layout):
                held = dict(zip(layout, axes, strict=True))
                if all(self._stands(x, held[x], place) for x in layout):
                    return layout
        return None

    def _stands(self, role: str, axis: Axis, place: dict[int, Coordinate]) -> bool:
        """Whether entry n of ``axis`` holds the output of entry n of the query (of the values, for the head dim)."""
        atoms, row = self._atoms, self._rows[role]
        if not row.atoms:
            return self._sizes[role] == 1
        if any(a not in place for a in row.atoms):
            return False
        own = [place[a].on_leaves(atoms) for a in row.atoms]
        wanted = atoms.leaves(axis)
        if any(a not in wanted for c in own for a in c.atoms) or any(int(c.array.min()) < 0 for c in own):
            return False
        entries = row.array[tuple(c.over(atoms, wanted) for c in own)]
        full = np.broadcast_to(entries, [atoms.sizes[a] for a in wanted])
        return bool(np.array_equal(full.reshape(-1), np.arange(self._sizes[role])))


def check_private(index: GraphIndex, core: list[NodeProto], allowed: list[NodeProto], end: str) -> None:
    """Scores and weights that someone else reads cannot disappear.

    Raises:
        Unsupported: someone does.
    """
    ids = {id(n) for n in allowed}
    for node in core:
        for output in (o for o in node.output if o and o != end):
            if output in index.outputs:
                raise Unsupported("scores-used", f"the scores or weights '{output}' are an output of the model")
            outside = [n for n in index.consumers.get(output, []) if not dies(index, n, ids)]
            if outside:
                raise Unsupported(
                    "scores-used", f"the scores or weights '{output}' are also read by '{node_name(outside[0])}'"
                )
