"""Takes back, in a written model, what was done for detection and of no use: sites that are kept stay as they were.

Detection works on a copy of the model in which operands have values of rank 4, fused operators are written out and
windows stand right around their attention.
Where the nodes in which that copy differs from the model are all still there and nobody else reads what they make, the
model's own nodes come back in their place. It asks for the difference alone, not for who made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto

from attncompile.passes.index import local_names
from attncompile.passes.infer import topological
from attncompile.passes.load import node_inputs

_GRAPHS = (5, 10)
"""Attribute types that hold graphs."""


@dataclass(frozen=True, slots=True)
class _Region:
    """Nodes of the working copy (by ``shell_key``), the values that they alone make, and the model's nodes for them."""

    made: frozenset[bytes]
    fresh: frozenset[str]
    old: tuple[NodeProto, ...]


class Folds:
    """Where ``working`` differs from ``plain``, of which it is a copy: found once, taken back in any number of models
    that edits of ``working`` gave.
    """

    def __init__(self, plain: ModelProto, working: ModelProto) -> None:
        self._regions: dict[str, list[_Region]] = {}
        self._stored: dict[str, frozenset[str]] = {}  # constants that go where nobody reads them
        self._unread: dict[str, frozenset[str]] = {}  # values that nobody reads in the model either
        for place, own, copy in _pairs(plain.graph, working.graph):
            regions = _regions(own, copy)
            if regions:
                self._regions[place] = regions
            self._stored[place] = frozenset(t.name for t in copy.initializer) - {t.name for t in own.initializer}
            self._unread[place] = frozenset(_unread(own))
            used = {v for n in own.node for v in node_inputs(n)} - {i.name for i in own.input}
            self._stored[place] |= {t.name for t in own.initializer} & used

    def undo(self, proto: ModelProto) -> None:
        """Folds ``proto`` back, in place. Nodes and constants that were there to be read, and are read no more, go."""
        if not self._regions and not any(self._stored.values()):
            return
        pending = [("", proto.graph, frozenset[str]())]
        while pending:
            place, graph, around = pending.pop()
            _fold(graph, self._regions.get(place, []), around)
            _clear(graph, self._unread.get(place, frozenset()))
            _drop(graph, self._stored.get(place, frozenset()))
            inside = around | local_names(graph)
            pending += [(place + at, inner, inside) for at, inner in inner_graphs(graph)]


def shell_key(node: NodeProto) -> bytes:
    """What tells a node from all others in its graph: all of it but the bodies that it holds."""
    if any(a.type in _GRAPHS for a in node.attribute):
        shell = NodeProto()
        shell.CopyFrom(node)
        for attribute in shell.attribute:
            attribute.ClearField("g")
            attribute.ClearField("graphs")
        node = shell
    return hashlib.blake2b(node.SerializeToString(deterministic=True)).digest()


def inner_graphs(graph: GraphProto) -> Iterator[tuple[str, GraphProto]]:
    """The bodies in a graph, named by what their node makes."""
    for node in graph.node:
        for attribute in node.attribute:
            bodies = (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ()
            for i, body in enumerate(bodies):
                yield f"/{','.join(node.output)}.{attribute.name}{i}", body


def _pairs(plain: GraphProto, working: GraphProto) -> Iterator[tuple[str, GraphProto, GraphProto]]:
    """The same graphs of two models."""
    pending = [("", plain, working)]
    while pending:
        place, own, copy = pending.pop()
        yield place, own, copy
        others: Mapping[str, GraphProto] = dict(inner_graphs(copy))
        pending += [(place + at, body, others[at]) for at, body in inner_graphs(own) if at in others]


def _regions(own: GraphProto, copy: GraphProto) -> list[_Region]:
    keys_own, keys_copy = ({shell_key(n): n for n in graph.node} for graph in (own, copy))
    old = [n for k, n in keys_own.items() if k not in keys_copy]
    new = [n for k, n in keys_copy.items() if k not in keys_own]
    names = local_names(own)
    parent = list(range(len(old) + len(new)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(group: Iterable[int]) -> None:
        first, *rest = group
        for i in rest:
            parent[root(i)] = root(first)

    touching: dict[str, list[int]] = {}
    makes = {o for n in new for o in n.output if o}
    gone = {o for n in old for o in n.output if o} - local_names(copy)
    for i, node in enumerate([*old, *new]):
        inputs = node_inputs(node)
        reads = (v for v in inputs if (v in gone if i < len(old) else v in makes and v not in names))
        for value in {*(o for o in node.output if o), *reads}:
            touching.setdefault(value, []).append(i)
    for group in touching.values():
        join(group)
    members: dict[int, list[int]] = {}
    for i in range(len(parent)):
        members.setdefault(root(i), []).append(i)
    found = []
    for group in members.values():
        mine = [new[i - len(old)] for i in group if i >= len(old)]
        theirs = tuple(old[i] for i in group if i < len(old))
        fresh = frozenset(o for n in mine for o in n.output if o and o not in names)
        if theirs and not any(a.type in _GRAPHS for n in (*mine, *theirs) for a in n.attribute):
            found.append(_Region(frozenset(shell_key(n) for n in mine), fresh, theirs))
    return found


def _fold(graph: GraphProto, regions: list[_Region], around: frozenset[str]) -> None:
    if not regions:
        return
    keys = {shell_key(n): i for i, n in enumerate(graph.node)}
    names = local_names(graph) | around
    readers: dict[str, set[int]] = {}
    for i, node in enumerate(graph.node):
        for value in node_inputs(node):
            readers.setdefault(value, set()).add(i)
    for output in graph.output:
        readers.setdefault(output.name, set()).add(-1)
    gone: set[int] = set()
    back: list[NodeProto] = []
    constants: set[str] = set()
    for region in regions:
        if not region.made <= keys.keys():
            continue
        at = {keys[k] for k in region.made}
        makes = {o for n in region.old for o in n.output if o}
        read = {v for n in region.old for v in n.input if v and v not in makes}
        if any(readers.get(v, set()) - at for v in region.fresh) or not read <= names:
            continue
        if not any(readers.get(o) for o in makes):  # it went with a site that was replaced
            continue
        gone |= at
        back += region.old
        constants |= makes
    if not back:
        return
    kept = [n for i, n in enumerate(graph.node) if i not in gone]
    copies = [NodeProto.FromString(n.SerializeToString()) for n in topological([*kept, *back])]
    del graph.node[:]
    graph.node.extend(copies)
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name in constants:  # a constant in place of a Shape node
            del graph.initializer[i]


def _unread(graph: GraphProto) -> set[str]:
    """The first outputs of nodes that nobody reads."""
    used = {v for n in graph.node for v in node_inputs(n)} | {o.name for o in graph.output}
    return {n.output[0] for n in graph.node if not used & {*n.output}}


def _clear(graph: GraphProto, unread: frozenset[str]) -> None:
    """Removes nodes that nobody reads, except those that nobody read before."""
    while gone := _unread(graph) - unread:
        left = [NodeProto.FromString(n.SerializeToString()) for n in graph.node if not gone & {*n.output}]
        del graph.node[:]
        graph.node.extend(left)


def _drop(graph: GraphProto, stored: frozenset[str]) -> None:
    """Removes those of ``stored`` that nobody reads."""
    used = {v for n in graph.node for v in node_inputs(n)} | {o.name for o in graph.output}
    for i in reversed(range(len(graph.initializer))):
        name = graph.initializer[i].name
        if name in stored and name not in used:
            del graph.initializer[i]
