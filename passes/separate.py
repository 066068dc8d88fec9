"""Gives attention operands of other ranks a rank-4 value: a Reshape and its inverse, which change nothing.

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
from attncompile.core.mask import MaskFacts
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.passes.detect import FORMS, detection_binding
from attncompile.passes.detect.homes import NotSeparate, Separation, ShapeRead
from attncompile.passes.evaluate import GraphIndex, World

HELPED = frozenset({"layout", "shape-read"})
"""Codes of near misses that may become sites."""

_ROUNDS = 3
"""What hides one reason may hide another: operands are looked at before the scores' readers."""


def separate(model: Model, profile: ShapeProfile) -> Model:
    """``model`` unchanged, or a copy in which every operand that needs it has a rank-4 value; ``notes`` say how many.
    A key that exists only as [.., D, N] gets a Transpose and its inverse too.

    Where nothing is dynamic, Shape nodes that read inside a site become constants too. Run it where detection gave
    near misses with a code of ``HELPED``; opset 18 or later.
    """
    for _ in range(_ROUNDS):
        changed = _operands(model if profile.ranges else _without_shapes(model, profile), profile)
        if changed is model:
            break
        model = changed
    return model


def _operands(model: Model, profile: ShapeProfile) -> Model:
    world = World(GraphIndex(model), detection_binding(profile)).without_idle()
    found = [e for e in _failures(world) if isinstance(e, NotSeparate)]
    wanted = list(dict.fromkeys(s for e in found for s in e.separations))
    if not wanted:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    editor = _Editor(proto)
    for separation in wanted:
        if separation.reader:
            editor.operand(separation, len(world.shapes[separation.value]))
        else:
            editor.output(separation)
    editor.finish()
    note = f"{len(wanted)} attention operands were given rank 4 by a Reshape and its inverse"
    return replace(model, proto=proto, notes=(*model.notes, note))


def _failures(world: World) -> Iterator[Unsupported]:
    """Why each candidate is not a site."""
    for node in world.index.order:
        if node.domain not in ("", "ai.onnx") or node.op_type not in FORMS:
            continue
        try:
            FORMS[node.op_type][1](world.index, world, node, lambda query: MaskFacts())
        except Unsupported as error:
            yield error


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


class _Editor:
    """Inserts pairs of Reshape nodes into ``proto``."""

    def __init__(self, proto: ModelProto) -> None:
        self._graph = proto.graph
        self._names = {o for n in proto.graph.node for o in n.output} | {t.name for t in proto.graph.initializer}
        self._names |= {i.name for i in proto.graph.input}
        self._producer = {o: i for i, n in enumerate(proto.graph.node) for o in n.output if o}
        self._before: dict[int, list[NodeProto]] = {}
        self._after: dict[int, list[NodeProto]] = {}

    def operand(self, s: Separation, rank: int) -> None:
        """``s.reader`` reads Reshape(Reshape(value, rank 4), shape of value) in place of the value."""
        at = self._producer[s.reader]
        reader = self._graph.node[at]
        made: list[NodeProto] = []
        swap = [*range(rank - 2), rank - 1, rank - 2]
        value = self._op(made, "Transpose", [s.value], perm=swap) if s.swapped else s.value
        split = self._split(s, value, rank, made)
        back = self._op(made, "Reshape", [split, self._op(made, "Shape", [value])])
        back = self._op(made, "Transpose", [back], perm=swap) if s.swapped else back
        for i, name in enumerate(reader.input):
            if self._behind_idle(name, s.value):
                reader.input[i] = back
        self._before.setdefault(at, []).extend(made)

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
        rank = len(s.groups) + (2 if s.form == "outer" else 3)
        split = self._split(s, core, rank, made)
        # The shape is written without asking the core for it: a site's inner values are read by nobody else.
        if s.form == "outer":
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
        tensor: TensorProto = numpy_helper.from_array(np.array(values, np.int64), self._name("separate/shape"))
        self._graph.initializer.append(tensor)
        return str(tensor.name)

    def _name(self, wish: str) -> str:
        name, n = wish, 0
        while name in self._names:
            n += 1
            name = f"{wish}_{n}"
        self._names.add(name)
        return name
