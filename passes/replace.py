"""Applies replacements to a copy of the original proto. What no replacement touches stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from onnx import GraphProto, ModelProto, NodeProto

from attncompile.core.mechanism import Lowering
from attncompile.core.model import Model
from attncompile.core.site import AttentionSite
from attncompile.passes.extract import add_functions
from attncompile.passes.index import bodies_of, local_names
from attncompile.passes.load import node_inputs


def apply(
    model: Model, edits: Iterable[tuple[AttentionSite, Lowering]], metadata: Mapping[str, str] | None = None
) -> ModelProto:
    """The model with each site's nodes replaced by its lowering; nodes and constants that only they used are removed.

    The lowering stands where the node that made the site's output stood, in the body that the site's scope names. Names
    of inputs and outputs, and everything else in the file, are kept. ``metadata`` is added to ``metadata_props``.
    """
    result = ModelProto()
    result.CopyFrom(model.proto)
    main = _Place(result.graph, "")
    places = {p.scope: p for p in main.all() if p.scope or p is main}
    for place in main.all():
        place.count()
    used_before = {id(p): set(p.readers) for p in main.all()}
    for site, lowering in edits:
        places[site.scope].put(site, lowering)
        add_functions(result, lowering)
    for place in reversed(list(main.all())):  # inner ones first: a node is copied with its bodies
        place.finish(used_before[id(place)])
    for key, text in (metadata or {}).items():
        result.metadata_props.add(key=key, value=text)
    return result


class _Place:
    """A graph under edit: the main graph, or one inside a node of ``parent``. Values are known by name and place, since
    bodies beside one another may use the same names.
    """

    def __init__(self, graph: GraphProto, scope: str, parent: _Place | None = None) -> None:
        self.graph = graph
        self.scope = scope
        self.parent = parent
        self.names = local_names(graph)
        self.nodes: list[NodeProto | None] = list(graph.node)
        self.producer = {o: i for i, n in enumerate(graph.node) for o in n.output if o}
        self.readers: Counter[str] = Counter()
        self.inserted: dict[int, list[NodeProto]] = {}
        self.removed: set[str] = set()
        self.inside: dict[int, list[_Place]] = {}
        scopes = {(b.key, b.attribute): b.scope for b in bodies_of(graph, scope)} if scope or parent is None else {}
        for i, node in enumerate(graph.node):
            key = next((o for o in node.output if o), "")
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                    name = scopes.get((key, attribute.name), "")
                    self.inside.setdefault(i, []).append(_Place(inner, name, self))

    def all(self) -> Iterator[_Place]:
        """This place and those inside it, outer ones first."""
        yield self
        for places in self.inside.values():
            for place in places:
                yield from place.all()

    @property
    def outermost(self) -> _Place:
        return self if self.parent is None else self.parent.outermost

    def home(self, value: str) -> _Place | None:
        """The place whose value a reader in this place means."""
        place: _Place | None = self
        while place is not None and value not in place.names:
            place = place.parent
        return place

    def read(self, value: str, times: int) -> _Place | None:
        home = self.home(value) if value else None
        if home is not None:
            home.readers[value] += times
        return home

    def count(self) -> None:
        """Counts what this graph's own nodes and outputs read."""
        for value in (*(v for n in self.graph.node for v in n.input), *(o.name for o in self.graph.output)):
            self.read(value, 1)

    def put(self, site: AttentionSite, lowering: Lowering) -> None:
        at = self.producer[site.output.value]
        self.inserted[at] = list(lowering.nodes)
        for node in lowering.nodes:
            for value in node_inputs(node):
                self.read(value, 1)
        if lowering.initializers:
            # In the outermost graph, once: lowerings name what they share alike, and bodies see it there.
            stored = self.outermost.graph.initializer
            known = {i.name for i in stored}
            stored.extend(i for i in lowering.initializers if i.name not in known)
        self.remove(at)

    def remove(self, at: int) -> None:
        """Removes the node at ``at``, then every node whose outputs nobody reads any more because of that."""
        pending: list[tuple[_Place, int]] = [(self, at)]
        forced = True
        while pending:
            place, i = pending.pop()
            node = place.nodes[i]
            if node is None or (not forced and any(place.readers[o] > 0 for o in node.output if o)):
                continue
            forced = False
            place.nodes[i] = None
            place.removed.update(o for o in node.output if o)
            for home, value in place.forget(i, node):
                if home.readers[value] <= 0 and value in home.producer:
                    pending.append((home, home.producer[value]))

    def forget(self, at: int, node: NodeProto) -> Iterator[tuple[_Place, str]]:
        """Takes back what the node, and what is left of its bodies, read; gives the values and their places."""
        for value in node.input:
            home = self.read(value, -1)
            if home is not None:
                yield home, value
        for place in self.inside.get(at, []):
            for i, inner in enumerate(place.nodes):
                for new in place.inserted.get(i, []):
                    yield from place.forget(-1, new)
                if inner is not None:
                    yield from place.forget(i, inner)
            for output in place.graph.output:
                home = place.read(output.name, -1)
                if home is not None:
                    yield home, output.name

    def finish(self, used_before: set[str]) -> None:
        """Writes the nodes back, without what nobody reads any more."""
        graph = self.graph
        if self.inserted or self.removed:
            groups = [(*self.inserted.get(i, []), old) for i, old in enumerate(self.nodes)]
            kept = [n for group in groups for n in group if n is not None]
            made = {o for n in kept for o in n.output}
            copies = [NodeProto.FromString(n.SerializeToString()) for n in kept]
            del graph.node[:]
            graph.node.extend(copies)
            gone = self.removed - made
            for i in reversed(range(len(graph.value_info))):
                if graph.value_info[i].name in gone:
                    del graph.value_info[i]
        declared_inputs = {i.name for i in graph.input}
        for i in reversed(range(len(graph.initializer))):
            name = graph.initializer[i].name
            if name in used_before and self.readers[name] <= 0 and name not in declared_inputs:
                del graph.initializer[i]
