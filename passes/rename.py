"""Values of bodies get names of their own where an outer graph has the same: then a name means one value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx import GraphProto, ModelProto, NodeProto

from attncompile.passes.index import graphs_within, local_names


def rename_inner(proto: ModelProto) -> ModelProto:
    """``proto`` itself, or a copy in which no graph inside a node has a value named like one of the graphs around it.

    Graphs beside one another, such as the branches of an If, keep the names that they share. Names of the model's
    inputs, outputs and initializers never change.
    """
    if not _clashes(proto.graph, frozenset()):
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    taken = {name for g in graphs_within(copy.graph) for name in local_names(g)}
    _rename(copy.graph, frozenset(), taken)
    return copy


def _inner(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type in (5, 10):
            yield from (attribute.g, *attribute.graphs)


def _clashes(graph: GraphProto, visible: frozenset[str]) -> bool:
    inner = [g for n in graph.node for g in _inner(n)]
    if not visible and not inner:
        return False
    local = local_names(graph)
    return bool(local & visible) or any(_clashes(g, visible | local) for g in inner)


def _rename(graph: GraphProto, visible: frozenset[str], taken: set[str]) -> None:
    names = {}
    for name in sorted(local_names(graph) & visible):
        number = 1
        while f"{name}_{number}" in taken:
            number += 1
        names[name] = f"{name}_{number}"
        taken.add(names[name])
    if names:
        rename_values(graph, names)
    visible |= local_names(graph)
    for node in graph.node:
        for inner in _inner(node):
            _rename(inner, visible, taken)


def rename_values(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Renames in ``graph``, and what graphs inside it read of it."""
    for node in graph.node:
        node.input[:] = [names.get(v, v) for v in node.input]
        node.output[:] = [names.get(v, v) for v in node.output]
        for inner in _inner(node):
            own = local_names(inner)
            rename_values(inner, {old: new for old, new in names.items() if old not in own})
    for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        item.name = names.get(item.name, item.name)
