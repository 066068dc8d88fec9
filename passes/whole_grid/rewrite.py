"""Writes the model in which operands of windowed sites, and what is made of their outputs, are in the tokens' order.

Between the source and an operand, and between the output and the end, nodes that work on each token alone are written
once more for all tokens at once; the windows stay right around the site, where they are a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.model import Model
from attncompile.passes.detect.gathers.origins import MOVES
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.evaluate import World
from attncompile.passes.index import graphs_within, local_names
from attncompile.passes.infer import topological
from attncompile.passes.load import node_inputs
from attncompile.passes.whole_grid.lifted import (
    Lifted,
    Side,
    channels,
    flat,
    formal,
    keeps_channels,
    moved_line,
    side_leaves,
)
from attncompile.passes.whole_grid.token_wise import sources_of


class Writer:
    """Collects what is to be changed in a copy of ``world``'s model."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._index = world.index
        self._proto = ModelProto()
        self._proto.CopyFrom(self._index.model.proto)
        self._names = {name for graph in graphs_within(self._proto.graph) for name in local_names(graph)}
        self._new: list[NodeProto] = []
        self._constants: dict[tuple[int, ...], str] = {}
        self._taken: set[str] = set()
        self._inside: set[str] = set()
        self._count = 0

    def lift(self, found: Lifted) -> None:
        """Adds the nodes that take the windows of ``found`` to its site.

        Raises:
            Unsupported: a node on the way cannot be written for all tokens at once.
        """
        before = (len(self._new), set(self._taken))
        try:
            made: dict[tuple[str, tuple[int, ...]], str] = {}
            for side in found.sides:
                if side.operand.value not in self._taken:
                    emitter = _Emitter(self, found, side, found.source, made)
                    self._into_windows(found, side, emitter.value(side.operand.value))
            self._out_of_windows(found)
            self._count += 1
            self._inside |= {*found.site.interior, found.site.output.value}
        except Unsupported:
            del self._new[before[0] :]
            self._taken = before[1]
            raise

    def finish(self) -> Model | None:
        """The model, without what nobody reads any more; None where nothing was changed."""
        if not self._taken:
            return None
        graph = self._proto.graph
        outputs = [o.name for o in graph.output]
        unread = _unread(graph.node, outputs)
        kept = [self._freed(n) for n in graph.node]
        nodes = topological([*self._new, *(n for n in kept if n is not None)])
        # What is computed from shapes stays, though nobody may read it: layers share it, and a site that is kept needs
        # its own nodes back whatever became of the others. ``fold_back`` clears up.
        data = self._index.data_inputs
        while gone := {v for v in _unread(nodes, outputs) - unread if v not in self._index.producer or data(v)}:
            nodes = [n for n in nodes if not gone & {*n.output}]
        nodes = self._without_shapes(nodes)
        copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        self._drop_unread(graph)
        made = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
        for i in reversed(range(len(graph.value_info))):
            if graph.value_info[i].name not in made:
                del graph.value_info[i]
        words = "the windows of {} attention sites were taken to the attention; sites that are kept stay as they were"
        model = self._index.model
        return replace(model, proto=self._proto, notes=(*model.notes, words.format(self._count)))

    # Nodes and names.

    def op(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        out = output or self.name(kind)
        if output:
            self._taken.add(output)
        self._new.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def add(self, node: NodeProto) -> None:
        self._new.append(node)

    def renamed(self, old: str, new: str) -> None:
        """``old``, made by a new node, is made as ``new``."""
        self._taken.add(new)
        for node in self._new:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new

    def ints(self, values: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(values, np.int64)
        key = (*array.shape, -1, *array.reshape(-1).tolist())
        if key not in self._constants:
            self._constants[key] = self.name("shape" if array.ndim == 1 else "order")
            self._proto.graph.initializer.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def name(self, wish: str) -> str:
        wish = f"whole_grid/{wish}"
        name, n = wish, 0
        while name in self._names:
            n += 1
            name = f"{wish}_{n}"
        self._names.add(name)
        return name

    # Windows.

    def _into_windows(self, found: Lifted, side: Side, value: str) -> None:
        """[B, N, H, D] (or [B, H, N, D]) -> the operand as it was, windows as batch entries, under its name."""
        shape, layout = self._world.shapes[side.operand.value], side.operand.layout
        axis = layout.index("N")
        wide = self.op("Gather", [value, self.ints(found.order)], axis=axis)
        if axis == 2:  # [B, H, windows, places, D]
            wide = self.op("Transpose", [wide], perm=[0, 2, 1, 3, 4])
        self.op("Reshape", [wide, self.ints(shape)], side.operand.value)

    def _out_of_windows(self, found: Lifted) -> None:
        """The site's output in the tokens' order, and from there on to the end."""
        side, world = found.output, self._world
        value, layout = side.operand.value, side.operand.layout
        windows, places = found.order.shape
        sizes = dict(zip(layout, world.shapes[value], strict=True))
        slots = np.empty(found.tokens, np.int64)
        slots[found.order.reshape(-1)] = np.arange(found.tokens)
        if layout == "BNHD":
            flat_shape = [found.batch, found.tokens, sizes["H"], sizes["D"]]
            whole = self.op("Reshape", [value, self.ints(flat_shape)])
        else:
            apart = self.op("Reshape", [value, self.ints([found.batch, windows, sizes["H"], places, sizes["D"]])])
            moved = self.op("Transpose", [apart], perm=[0, 2, 1, 3, 4])
            whole = self.op("Reshape", [moved, self.ints([found.batch, sizes["H"], found.tokens, sizes["D"]])])
        ordered = self.op("Gather", [whole, self.ints(slots)], axis=layout.index("N"))
        emitter = _Emitter(self, found, side, value, {}, ordered)
        last = emitter.value(found.last)
        wanted = world.shapes[found.end]
        if emitter.shape(found.last) == wanted:
            self.renamed(last, found.end)
        else:
            self.op("Reshape", [last, self.ints(wanted)], found.end)

    # What is left of the old nodes.

    def _freed(self, node: NodeProto) -> NodeProto | None:
        """An old node without the outputs that new ones make; None where it has no others."""
        if not self._taken & {*node.output}:
            return node
        if not {o for o in node.output if o} - self._taken:
            return None
        copy = NodeProto()
        copy.CopyFrom(node)
        for i, output in enumerate(copy.output):
            if output in self._taken:
                copy.output[i] = self.name("unread")
        return copy

    def _without_shapes(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """``nodes`` with constants in place of Shape nodes that read what is gone, or is part of a site now: all sizes
        are known.
        """
        made = {o for n in nodes for o in n.output} - self._taken - self._inside
        asked = [n for n in nodes if n.op_type == "Shape" and n.input[0] in self._index.producer.keys() - made]
        for node in asked:
            value = self._world.value(node.output[0])
            self._proto.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        return [n for n in nodes if not any(n is x for x in asked)]

    def _drop_unread(self, graph: GraphProto) -> None:
        """Constants of this class that are of no use after all."""
        old = {t.name for t in self._index.model.proto.graph.initializer}
        used = {v for n in graph.node for v in node_inputs(n)}
        for i in reversed(range(len(graph.initializer))):
            if graph.initializer[i].name not in used | old:
                del graph.initializer[i]


class _Emitter:
    """Writes values of one side once more, for all tokens at once: from ``start``, which ``given`` holds (the source
    itself where it is not given).
    """

    def __init__(
        self, writer: Writer, found: Lifted, side: Side, start: str, made: dict[tuple[str, tuple[int, ...]], str],
        given: str = "",
    ) -> None:  # fmt: skip
        self._writer, self._found, self._side = writer, found, side
        self._start, self._given, self._made = start, given, made
        self._world, self._index = writer._world, writer._index

    def shape(self, value: str) -> tuple[int, ...]:
        """The shape of ``value`` for all tokens at once.

        Raises:
            Unsupported: windows, or places in them, are taken apart there.
        """
        factors = formal(self._side, value)
        if factors is None:
            raise Unsupported("windows", f"windows and places are not apart in '{value}'")
        sizes = {"B": self._found.batch, "N": self._found.tokens}
        return tuple(prod(sizes[x] if isinstance(x, str) else x for x in axis) for axis in factors)

    def value(self, value: str) -> str:
        """The name of ``value`` for all tokens at once. Raises ``Unsupported`` as ``shape`` does, or for a node."""
        stack = [value]
        while stack:
            name = stack[-1]
            if self._key(name) in self._made:
                stack.pop()
                continue
            if self._base(name):
                stack.pop()
                continue
            missing = [v for v in self._data(name) if self._key(v) not in self._made]
            if missing:
                stack += missing
                continue
            stack.pop()
            self._copy(self._index.producer[name])
        return self._made[self._key(value)]

    def _key(self, value: str) -> tuple[str, tuple[int, ...]]:
        return value, self.shape(value)

    def _data(self, value: str) -> list[str]:
        found = sources_of(self._index, value)
        if not found:
            raise Unsupported("windows", f"'{value}' is not followed")
        return found

    def _base(self, value: str) -> bool:
        """Whether ``value`` is the start, or windows of a value in the source's order and nothing else: then it is
        written as a view of that.
        """
        key = self._key(value)
        if self._given:
            if value == self._start:
                self._made[key] = self._given
            return value == self._start
        if flat(self._side, value) != (*side_leaves(self._side), *channels(self._side, value)):
            return False
        for before in moved_line(self._index, value):
            if self._in_order(before) and self._same_channels(before, value):
                same = self._world.shapes[before] == key[1]
                written = before if same else self._writer.op("Reshape", [before, self._writer.ints(key[1])])
                self._made[key] = written
                return True
        return False

    def _in_order(self, value: str) -> bool:
        """Whether ``value`` has the tokens of the source in order, and its channels last."""
        side, sizes = self._side, self._world.shapes[self._start][:-1]
        try:
            coordinates = [c.on_leaves(side.atoms) for c in side.follower.origins(value).coordinates]
        except Unsupported:
            return False  # it lies before the source
        tokens = {a for c in coordinates for a in c.atoms}
        first = flat(side, value)[: len(tokens)]
        if set(first) != tokens or len(side.follower.leaves(value)[-1]) == 0:
            return False
        total = np.zeros([side.atoms.sizes[a] for a in first], np.int64)
        for coordinate, size in zip(coordinates, sizes, strict=True):
            total = total * size + coordinate.over(side.atoms, first)
        return bool(np.array_equal(total.reshape(-1), np.arange(prod(sizes))))

    def _same_channels(self, before: str, value: str) -> bool:
        """Whether the channels of ``value``, moved from ``before``, are those in order."""
        tokens = self._side.follower.tokens(before)
        leaves = self._side.follower.leaves(before)
        axes = [i for i, axis in enumerate(leaves) if axis and not tokens & {*axis}]
        if any(tokens & {*axis} and not tokens >= {*axis} for axis in leaves):
            return False  # an axis of both
        return keeps_channels(self._index, self._world, before, axes, value)

    def _copy(self, node: NodeProto) -> None:
        """Writes ``node`` for all tokens at once."""
        writer, data = self._writer, set(self._data(node.output[0]))
        inputs = [self._made[self._key(v)] if v in data else v for v in node.input]
        if node.op_type in VIEW_OPS - {"Transpose"}:
            kind, shape = ("Expand" if node.op_type == "Expand" else "Reshape"), self.shape(node.output[0])
            self._made[self._key(node.output[0])] = writer.op(kind, [inputs[0], writer.ints(shape)])
            return
        if node.op_type in MOVES - {"Transpose"} and not self._of_channels(node):
            raise Unsupported("windows", f"{node.op_type} '{node.output[0]}' takes tokens apart")
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = writer.name(node.op_type)
        copy.input[:] = inputs
        for i, output in enumerate(node.output):
            if output:
                copy.output[i] = writer.name(node.op_type)
                if self._index.consumers.get(output):
                    self._made[self._key(output)] = copy.output[i]
        writer.add(copy)

    def _of_channels(self, node: NodeProto) -> bool:
        """Whether a node that takes some of an axis' entries does so along axes that no tokens run over."""
        world, side = self._world, self._side
        axes = side.follower.leaves(node.input[0])
        tokens = side.follower.tokens(node.input[0])
        along = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type in ("Split", "Gather"):
            over = [along]
        elif node.op_type == "Slice" and len(node.input) > 3 and node.input[3]:
            over = [int(a) for a in world.value(node.input[3]).reshape(-1)]
        else:
            return False
        return not any(a in tokens for axis in over for a in axes[axis % len(axes)])


def _unread(nodes: Iterable[NodeProto], outputs: Iterable[str] = ()) -> set[str]:
    """The first outputs of nodes that nobody reads, except for their shape."""
    nodes = list(nodes)
    used = {v for n in nodes if n.op_type != "Shape" for v in node_inputs(n)} | {*outputs}
    return {n.output[0] for n in nodes if not used & {*n.output}}
