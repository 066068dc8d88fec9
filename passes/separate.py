"""Gives attention operands of other ranks, orders and types a value of their own: a Reshape, Transpose or Cast and its
inverse, which change nothing.

Exporters write [batch * heads, N, D] (``nn.MultiheadAttention``, SAM), [batch, N, D] (one head), five axes (groups of
query heads) and, for the standard operator, [batch, N, heads * D]. A site's operands are rank-4 values of the graph,
so such attention is found only after this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.passes.detect import detection_binding, form_of, worth_looking
from attncompile.passes.detect.fused import Fused
from attncompile.passes.detect.homes import NotSeparate, Separation, ShapeRead
from attncompile.passes.detect.sinks import NotStored
from attncompile.passes.detect.softmax import MaskQuery
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.index import graph_at, graphs_within, local_names
from attncompile.passes.written_out import DOMAIN, write_out

HELPED = frozenset({"layout", "shape-read", "not-stored", "fused-op"})
"""Codes of near misses that may become sites."""

_ROUNDS = 3
"""What hides one reason may hide another: operands are looked at before the scores' readers."""


def separate(model: Model, profile: ShapeProfile) -> Model:
    """``model`` unchanged, or a copy in which every operand that needs it has a rank-4 value; ``notes`` say how many.
    A key that exists only as [.., D, N] gets a Transpose and its inverse too, and so do operands whose four axes come
    in another order. Where values and output are of a wider float than queries and keys, these get a Cast and its
    inverse.

    Where nothing is dynamic, Shape nodes that read inside a site become constants too. A sink's logits that are written
    out for every query, or in no value at all, get an initializer of their own, which nobody reads yet. Run it where
    detection gave near misses with a code of ``HELPED``; opset 18 or later.
    """
    model = _written(model, profile)
    for _ in range(_ROUNDS):
        model = stored(model, profile)
        changed = _operands(model if profile.ranges else _without_shapes(model, profile), profile)
        if changed is model:
            break
        model = changed
    return model


def _written(model: Model, profile: ShapeProfile) -> Model:
    """``model`` with what operators of ``com.microsoft`` hold in nodes of its own."""
    proto, count = model.proto, 0
    if not any(n.domain == DOMAIN for graph in graphs_within(proto.graph) for n in graph.node):
        return model
    for world in _every(World(GraphIndex(model), detection_binding(profile))):
        wanted = {e.output for e in _failures(world.without_idle()) if isinstance(e, Fused)}
        if wanted:
            if proto is model.proto:
                proto = ModelProto()
                proto.CopyFrom(model.proto)
            write_out(proto, world, wanted)
            count += len(wanted)
    if proto is model.proto:
        return model
    note = f"{count} com.microsoft operators were written out; those of sites that are kept stay as they were"
    return replace(model, proto=proto, notes=(*model.notes, note))


def _operands(model: Model, profile: ShapeProfile) -> Model:
    proto, count = model.proto, 0
    for outside in _every(World(GraphIndex(model), detection_binding(profile))):
        world = outside.without_idle()
        found = [e for e in _failures(world) if isinstance(e, NotSeparate)]
        wanted = list(dict.fromkeys(s for e in found for s in e.separations))
        if not wanted:
            continue
        if proto is model.proto:
            proto = ModelProto()
            proto.CopyFrom(model.proto)
        editor = _Editor(proto, world.index.scope)
        for separation in wanted:
            if separation.reader:
                editor.operand(separation, len(world.shapes[separation.value]))
            else:
                editor.output(separation)
        editor.finish()
        count += len(wanted)
    if proto is model.proto:
        return model
    note = f"{count} attention operands were given a value of their own by a Reshape, Transpose or Cast and its inverse"
    return replace(model, proto=proto, notes=(*model.notes, note))


def _every(world: World) -> Iterator[World]:
    """The world of a graph, and those of the bodies in it that may hold attention."""
    yield world
    for body in (b for group in world.index.bodies.values() for b in group):
        if worth_looking(world.index, body):
            yield from _every(world.within(body.scope))


class _Silent:
    """Says nothing about masks: operands alone are looked at here."""

    def __call__(self, query: MaskQuery) -> MaskFacts:
        return MaskFacts()

    def of_tokens(
        self, visible: np.ndarray, how: Certificate, fills: tuple[float, ...], guarded: bool
    ) -> MaskFacts:  # fmt: skip
        return MaskFacts()

    def of_counts(self, counts: np.ndarray, how: Certificate) -> MaskFacts:
        return MaskFacts()


def _failures(world: World) -> Iterator[Unsupported]:
    """Why each candidate is not a site."""
    for node in world.index.own_order:
        family = form_of(node)
        if family is None:
            continue
        try:
            family[1](world.index, world, node, _Silent())
        except Unsupported as error:
            yield error


def stored(model: Model, profile: ShapeProfile) -> Model:
    """``model`` with an initializer for every array that a site needs and no value holds."""
    world = World(GraphIndex(model), detection_binding(profile)).without_idle()
    arrays = {(str(e.array.dtype), e.array.tobytes()): e.array for e in _failures(world) if isinstance(e, NotStored)}
    if not arrays:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    editor = _Editor(proto)
    for array in arrays.values():
        editor.constant(array)
    note = f"{len(arrays)} sets of sink logits, or biases of windows, were given a value of their own"
    return replace(model, proto=proto, notes=(*model.notes, note))


def _without_shapes(model: Model, profile: ShapeProfile) -> Model:
    """Shape nodes that read scores or weights for somebody outside, as constants."""
    world = World(GraphIndex(model), detection_binding(profile)).without_idle()
    outputs = {o for e in _failures(world) if isinstance(e, ShapeRead) for o in e.outputs}
    if not outputs:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    kept = [NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node if not outputs & set(n.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    proto.graph.initializer.extend(numpy_helper.from_array(world.value(o), o) for o in sorted(outputs))
    note = f"{len(outputs)} Shape nodes that read inside attention were replaced by their constant values"
    return replace(model, proto=proto, notes=(*model.notes, note))


def _inverse(perm: tuple[int, ...]) -> list[int]:
    return [perm.index(i) for i in range(len(perm))]


class _Editor:
    """Inserts pairs of Reshape nodes into the graph of ``proto`` that ``scope`` names."""

    def __init__(self, proto: ModelProto, scope: str = "") -> None:
        self._graph = graph_at(proto.graph, scope)
        self._names = {name for graph in graphs_within(proto.graph) for name in local_names(graph)}
        self._producer = {o: i for i, n in enumerate(self._graph.node) for o in n.output if o}
        self._before: dict[int, list[NodeProto]] = {}
        self._after: dict[int, list[NodeProto]] = {}

    def operand(self, s: Separation, rank: int) -> None:
        """``s.reader`` reads Reshape(Reshape(value, rank 4), shape of value) in place of the value."""
        at = self._producer[s.reader]
        reader = self._graph.node[at]
        made: list[NodeProto] = []
        if s.form == "permuted":
            back = self._op(made, "Transpose", [self._permuted(s, s.value, made)], perm=_inverse(s.perm))
        elif s.form == "wider":
            back = self._op(made, "Cast", [self._op(made, "Cast", [s.value], to=s.kinds[0])], to=s.kinds[1])
        else:
            back = self._reshaped_back(s, rank, made)
        for i, name in enumerate(reader.input):
            if self._behind_idle(name, s.value):
                reader.input[i] = back
        self._before.setdefault(at, []).extend(made)

    def _reshaped_back(self, s: Separation, rank: int, made: list[NodeProto]) -> str:
        swap = [*range(rank - 2), rank - 1, rank - 2]
        value = self._op(made, "Transpose", [s.value], perm=swap) if s.swapped else s.value
        split = self._split(s, value, rank, made)
        back = self._op(made, "Reshape", [split, self._op(made, "Shape", [value])])
        return self._op(made, "Transpose", [back], perm=swap) if s.swapped else back

    def _permuted(self, s: Separation, value: str, made: list[NodeProto]) -> str:
        return self._op(made, "Transpose", [value], perm=list(s.perm))

    def _behind_idle(self, name: str, value: str) -> bool:
        """Whether ``name`` is ``value``, or it after nodes that detection steps over."""
        while name != value and name in self._producer:
            node = self._graph.node[self._producer[name]]
            if node.op_type not in ("Identity", "Cast"):
                return False
            name = node.input[0]
        return name == value

    def output(self, s: Separation) -> None:
        """The node that made ``s.value`` makes a new value; Reshape to rank 4 and back make the old one."""
        at = self._producer[s.value]
        core = self._name(f"{s.value}/core")
        node = self._graph.node[at]
        for i, name in enumerate(node.output):
            if name == s.value:
                node.output[i] = core
        made: list[NodeProto] = []
        if s.form == "permuted":
            split = self._permuted(s, core, made)
            made.append(helper.make_node("Transpose", [split], [s.value], perm=_inverse(s.perm)))
            self._after.setdefault(at, []).extend(made)
            return
        rank = 2 if s.form == "matrix" else len(s.groups) + (2 if s.form == "outer" else 3)
        split = self._split(s, core, rank, made)
        # The shape is written without asking the core for it: a site's inner values are read by nobody else.
        if s.form == "matrix":
            shape = self._const([-1, s.dim])
        elif s.form == "outer":
            shape = self._const([0, 0, *s.groups])
        elif rank > 3:
            shape = self._const([0, *s.groups, -1, s.dim])
        else:
            length = self._op(made, "Shape", [split], start=2, end=3)
            shape = self._op(made, "Concat", [self._const([-1]), length, self._const([s.dim])], axis=0)
        made.append(helper.make_node("Reshape", [split, shape], [s.value]))
        self._after.setdefault(at, []).extend(made)

    def finish(self) -> None:
        nodes = []
        for i, node in enumerate(self._graph.node):
            nodes += [*self._before.get(i, []), NodeProto.FromString(node.SerializeToString()), *self._after.get(i, [])]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _split(self, s: Separation, value: str, rank: int, made: list[NodeProto]) -> str:
        if s.form == "matrix":  # one batch entry and one head
            return self._op(made, "Reshape", [value, self._const([1, 1, -1, s.dim])])
        if s.form == "outer":  # batch and sequence are the first two axes
            return self._op(made, "Reshape", [value, self._const([0, 0, s.heads, s.dim])])
        if rank > 3:  # batch is the first axis, and the sequence is what is left
            return self._op(made, "Reshape", [value, self._const([0, s.heads, -1, s.dim])])
        length = self._op(made, "Shape", [value], start=1, end=2)
        shape = self._op(made, "Concat", [self._const([-1, s.heads]), length, self._const([s.dim])], axis=0)
        return self._op(made, "Reshape", [value, shape])

    def _op(self, made: list[NodeProto], kind: str, inputs: list[str], **attributes: Any) -> str:
        out = self._name(f"separate/{kind}")
        made.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def _const(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64), "separate/shape")

    def constant(self, array: np.ndarray, wish: str = "separate/logits") -> str:
        tensor: TensorProto = numpy_helper.from_array(array, self._name(wish))
        self._graph.initializer.append(tensor)
        return str(tensor.name)

    def _name(self, wish: str) -> str:
        name, n = wish, 0
        while name in self._names:
            n += 1
            name = f"{wish}_{n}"
        self._names.add(name)
        return name
