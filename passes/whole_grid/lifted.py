"""Where the tokens of a windowed site come from and go to: the values between which windows can be taken out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod

import numpy as np
from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.detect.gathers.origins import MOVES, Coordinate, Mover
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axis
from attncompile.passes.detect.walks import readers_of
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import node_inputs
from attncompile.passes.whole_grid.token_wise import Follower, sources_of, tokens_of

_MAX_VALUES = 400
"""Values that are looked at before the operands, and after the output, of one site."""
_MAX_SOURCES = 48


@dataclass(frozen=True, slots=True)
class Side:
    """A value of the site as made from ``source`` (the output: the other way round): ``follower`` knows the axes on the
    way; ``batch`` and ``places`` are the leaves of the windows and of the places in one.
    """

    operand: Operand
    follower: Follower
    atoms: Atoms
    batch: Axis
    places: Axis


@dataclass(frozen=True, slots=True)
class Lifted:
    """``site`` between ``source`` [.., channels], whose tokens in order are ``batch`` times those of a grid, and
    ``end``, which holds the output in the same order. ``order`` [windows, places] says which token stands where, for
    every batch entry alike. ``sides`` are query, key and value; ``last`` the value after which the output is brought
    into order.
    """

    site: AttentionSite
    source: str
    end: str
    last: str
    batch: int
    order: np.ndarray
    sides: tuple[Side, Side, Side]
    output: Side

    @property
    def tokens(self) -> int:
        return self.order.size


def lifted(index: GraphIndex, world: World, site: AttentionSite) -> Lifted | None:
    """How the windows of ``site`` are taken out; None where its operands are not made from one value by moving tokens
    and by working on each alone: its batch entries are then no windows.

    Raises:
        Unsupported: its output is not brought back into the order of that value.
    """
    reason: Unsupported | None = None
    for found in reversed(list(_sources(index, world, site))):
        try:
            end, last, output = _end(index, world, site, found.table)
        except Unsupported as error:
            reason = error
            continue
        return Lifted(site, found.value, end, last, found.batch, found.order, found.sides, output)
    if reason is not None:
        raise reason
    return None


@dataclass(frozen=True, slots=True)
class _Source:
    value: str
    table: np.ndarray
    batch: int
    order: np.ndarray
    sides: tuple[Side, Side, Side]


def _sources(index: GraphIndex, world: World, site: AttentionSite) -> Iterator[_Source]:
    """Values that query, key and value are made from with their tokens in another order: the nearest, and those that
    it is moved from.
    """
    found = False
    for value in _common(index, [o.value for o in (site.query, site.key, site.value)])[:_MAX_SOURCES]:
        try:
            made = _source(index, world, site, value)
        except Unsupported:
            if found:
                return
            continue
        if not np.array_equal(made.table.reshape(-1), np.arange(made.table.size)):
            found = True
            yield made
        node = index.producer.get(value)
        if found and (node is None or node.op_type not in MOVES):
            return


def _common(index: GraphIndex, values: list[str]) -> list[str]:
    """The values that everything in all of ``values`` is made from, the nearest first."""
    known: dict[str, list[str]] = {}
    stack = list(dict.fromkeys(values))
    while stack:
        name = stack[-1]
        if name in known:
            stack.pop()
            continue
        sources = sources_of(index, name) if len(known) + len(stack) < _MAX_VALUES else []
        missing = [s for s in sources if s not in known]
        if missing:
            stack += missing
            continue
        stack.pop()
        known[name] = [*_shared([known.get(s, []) for s in sources]), name]
    return _shared([known[v] for v in values])[::-1]


def _shared(lists: list[list[str]]) -> list[str]:
    common = lists[0] if lists else []
    for other in lists[1:]:
        members = set(other)
        common = [v for v in common if v in members]
    return common


def _source(index: GraphIndex, world: World, site: AttentionSite, value: str) -> _Source:
    """``value`` with its last axis as channels.

    Raises:
        Unsupported: the operands are not made from its tokens, one from one, all in the same order.
    """
    shape = world.shapes.get(value, ())
    if len(shape) < 2 or not prod(shape):
        raise Unsupported("windows", f"'{value}' has no tokens")
    atoms, axes = tokens_of(world, value)
    follower = Follower(index, world, atoms, value, axes, axes[:-1])
    sides: list[Side] = []
    tables = []
    for operand in (site.query, site.key, site.value):
        leaves = dict(zip(operand.layout, follower.leaves(operand.value), strict=True))
        tokens = follower.tokens(operand.value)
        if tokens - {*leaves["B"], *leaves["N"]} or {*leaves["B"], *leaves["N"]} - tokens:
            raise Unsupported("windows", f"heads and channels of '{operand.value}' are not apart from tokens")
        side = Side(operand, follower, atoms, leaves["B"], leaves["N"])
        sides.append(side)
        tables.append(_flat(side, follower.origins(operand.value).coordinates, shape[:-1]))
    if any(not np.array_equal(tables[0], t) for t in tables[1:]):
        raise Unsupported("windows", "query, key and value have their tokens in different orders")
    table = tables[0]
    total = prod(shape[:-1])
    if table.size != total or not np.array_equal(np.sort(table, axis=None), np.arange(total)):
        raise Unsupported("windows", f"the tokens of '{value}' are not in the windows once each")
    for batch in dict.fromkeys((shape[0] if len(shape) > 2 else 1, 1)):
        if not len(table) % batch and not total % batch:
            each = table.reshape(batch, len(table) // batch, -1) - (total // batch) * np.arange(batch)[:, None, None]
            if bool(np.all(each == each[:1])):
                return _Source(value, table, batch, each[0], (sides[0], sides[1], sides[2]))
    raise Unsupported("windows", "the windows differ between batch entries")


def _flat(side: Side, coordinates: tuple[Coordinate, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """[windows, places]: where each token stood among all tokens of the source; -1 for padding."""
    wanted = (*side.batch, *side.places)
    full = [side.atoms.sizes[a] for a in wanted]
    total = np.zeros(full, np.int64)
    for coordinate, size in zip(coordinates, sizes, strict=True):
        own = coordinate.over(side.atoms, wanted)
        total = np.where((own < 0) | (total < 0), -1, total * size + own)
    return total.reshape(side.atoms.size(side.batch), -1)


def _end(index: GraphIndex, world: World, site: AttentionSite, table: np.ndarray) -> tuple[str, str, Side]:
    """The value that holds the output's tokens as they were before ``table``, and the last one before they are moved.

    Raises:
        Unsupported: there is none, or somebody else reads what lies between.
    """
    atoms = Atoms()
    shape = world.shapes[site.output.value]
    axes = tuple(atoms.new(size) for size in shape)
    held = dict(zip(site.output.layout, axes, strict=True))
    follower = Follower(index, world, atoms, site.output.value, axes, (held["B"], held["N"]))
    side = Side(site.output, follower, atoms, held["B"], held["N"])
    ended = _Forward(index, side, table).ended()
    for value in reversed(moved_line(index, ended)):
        try:
            factors = formal(side, value)
            if factors is None or flat(side, value) != (*side_leaves(side), *channels(side, value)):
                continue
            if keeps_channels(index, world, value, [i for i, x in enumerate(factors) if not {*x} & {"B", "N"}], ended):
                return ended, value, side
        except Unsupported:
            continue
    raise Unsupported("windows", f"no value before '{ended}' holds its channels in windows")


class _Forward:
    """From the site's output on, until the tokens are in order."""

    def __init__(self, index: GraphIndex, side: Side, table: np.ndarray) -> None:
        self._index, self._side, self._table = index, side, table

    def ended(self) -> str:
        """The last value with the tokens in order.

        Raises:
            Unsupported: there is none, or another value on the way is read by others.
        """
        index, start = self._index, self._side.operand.value
        known = {start: False}
        inside: set[int] = set()
        pending: list[tuple[int, int]] = []
        nodes: dict[int, NodeProto] = {}

        def add(value: str) -> None:
            for node in readers_of(index, value):
                if id(node) not in nodes:
                    nodes[id(node)] = node
                    heappush(pending, (index.position[id(node)], id(node)))

        add(start)
        while pending and len(known) < _MAX_VALUES:
            node = nodes[heappop(pending)[1]]
            data = [v for v in dict.fromkeys(node_inputs(node)) if index.data_inputs(v)]
            if any(v not in known for v in data) or not self._follows(node, [known[v] for v in data]):
                continue
            try:
                made = {o: self._in_order(o) for o in node.output if o}
            except Unsupported:
                continue
            inside.add(id(node))
            known.update(made)
            for output in made:
                add(output)
        return self._only(known, inside)

    def _follows(self, node: NodeProto, in_order: list[bool]) -> bool:
        """Once the tokens are in order only views are followed, as long as nobody else reads what they view."""
        if not any(in_order):
            return True
        return node.op_type in VIEW_OPS - {"Expand", "Transpose"} and len(readers_of(self._index, node.input[0])) == 1

    def _only(self, known: dict[str, bool], inside: set[int]) -> str:
        read = [
            v for v in known
            if v in self._index.outputs or any(id(n) not in inside for n in readers_of(self._index, v))
        ]  # fmt: skip
        if len(read) != 1 or not known[read[0]]:
            words = ", ".join(f"'{v}'" for v in read[:3])
            raise Unsupported("windows", f"the output is not brought back into the order of the input before {words}")
        return read[0]

    def _in_order(self, value: str) -> bool:
        """Whether ``value`` holds the tokens as they were before the windows, channels last."""
        side = self._side
        coordinates = [c.on_leaves(side.atoms) for c in side.follower.origins(value).coordinates]
        tokens = {a for c in coordinates for a in c.atoms}
        leaves = flat(side, value)
        first = leaves[: len(tokens)]
        if set(first) != tokens:
            return False
        window, place = (c.over(side.atoms, first) for c in coordinates)
        if window.min() < 0 or place.min() < 0:
            return False
        sizes = [side.atoms.sizes[a] for a in first]
        found = np.broadcast_to(self._table[window, place], sizes).reshape(-1)
        return found.size == self._table.size and bool(np.array_equal(found, np.arange(found.size)))


def moved_line(index: GraphIndex, value: str) -> list[str]:
    """The values that ``value`` is moved from, and from nothing else, the deepest first, ``value`` last."""
    known: dict[str, list[str]] = {}
    stack = [value]
    while stack:
        name = stack[-1]
        node = index.producer.get(name)
        sources = sources_of(index, name) if node is not None and node.op_type in MOVES else []
        missing = [s for s in sources if s not in known]
        if missing and name not in known:
            stack += missing
            continue
        stack.pop()
        known.setdefault(name, [*_shared([known[s] for s in sources]), name])
    return known[value]


class _Moves(Mover):
    """Follows nodes that only move data."""

    def sources(self, value: str) -> list[str]:
        node = self._index.producer.get(value)
        return sources_of(self._index, value) if node is not None and node.op_type in MOVES else []


def keeps_channels(index: GraphIndex, world: World, start: str, axes: list[int], value: str) -> bool:
    """Whether ``value``, moved from ``start``, has the elements along these axes of ``start`` in order, last.

    Raises:
        Unsupported: it is more than moved.
    """
    atoms, own = tokens_of(world, start)
    found = _Moves(index, world, atoms, start, own).origins(value)
    leaves = tuple(a for axis in found.axes for a in atoms.leaves(axis))
    along = [(world.shapes[start][i], found.coordinates[i].on_leaves(atoms)) for i in axes]
    own_leaves = {a for _, c in along for a in c.atoms}
    last = leaves[len(leaves) - len(own_leaves) :]
    if set(last) != own_leaves:
        return False
    total = np.zeros([atoms.sizes[a] for a in last], np.int64)
    for size, coordinate in along:
        total = total * size + coordinate.over(atoms, last)
    return bool(np.array_equal(total.reshape(-1), np.arange(prod(size for size, _ in along))))


def side_leaves(side: Side) -> Axis:
    """The leaves of windows and places, as they are by now."""
    return (*side.atoms.leaves(side.batch), *side.atoms.leaves(side.places))


def flat(side: Side, value: str) -> Axis:
    """All leaves of ``value`` in order."""
    return tuple(a for axis in side.follower.leaves(value) for a in axis)


def channels(side: Side, value: str) -> Axis:
    """The leaves of ``value`` that its tokens do not run over, in order."""
    tokens = side.follower.tokens(value)
    return tuple(a for a in flat(side, value) if a not in tokens)


def formal(side: Side, value: str) -> tuple[tuple[str | int, ...], ...] | None:
    """Each axis of ``value`` as factors: "B" for all windows, "N" for all places in one, numbers for the rest; None
    where windows or places are cut or there are none.

    What is written in these terms means the same whatever the sizes of "B" and "N" are.
    """
    blocks = {"B": side.atoms.leaves(side.batch), "N": side.atoms.leaves(side.places)}
    tokens = side.follower.tokens(value)
    out: list[tuple[str | int, ...]] = []
    for leaves in side.follower.leaves(value):
        factors: list[str | int] = []
        at = 0
        while at < len(leaves):
            name = next((x for x, own in blocks.items() if leaves[at : at + len(own)] == own), None)
            if name is not None:
                factors.append(name)
                at += len(blocks[name])
                continue
            if leaves[at] in tokens:
                return None
            factors.append(side.atoms.sizes[leaves[at]])
            at += 1
        out.append(tuple(factors))
    named = sorted(x for axis in out for x in axis if isinstance(x, str))
    return tuple(out) if named == ["B", "N"] else None
