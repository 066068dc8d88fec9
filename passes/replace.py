"""Applies replacements to a copy of the original proto. What no replacement touches stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from onnx import ModelProto, NodeProto

from attncompile.core.mechanism import Lowering
from attncompile.core.model import Model
from attncompile.core.site import AttentionSite
from attncompile.passes.extract import add_functions
from attncompile.passes.load import node_inputs


def apply(
    model: Model, edits: Iterable[tuple[AttentionSite, Lowering]], metadata: Mapping[str, str] | None = None
) -> ModelProto:
    """The model with each site's nodes replaced by its lowering; nodes and constants that only they used are removed.

    The lowering stands where the node that made the site's output stood. Names of inputs and outputs, and everything
    else in the file, are kept. ``metadata`` is added to ``metadata_props``.
    """
    result = ModelProto()
    result.CopyFrom(model.proto)
    graph = result.graph
    nodes: list[NodeProto | None] = list(graph.node)
    inserted: dict[int, list[NodeProto]] = {}
    producer = {o: i for i, n in enumerate(graph.node) for o in n.output if o}
    readers: Counter[str] = Counter(v for n in graph.node for v in node_inputs(n))
    readers.update(o.name for o in graph.output)
    used_before = set(readers)
    removed: set[str] = set()
    for site, lowering in edits:
        at = producer[site.output.value]
        inserted[at] = list(lowering.nodes)
        for node in lowering.nodes:
            readers.update(node_inputs(node))
        _remove(nodes, at, producer, readers, removed)
        graph.initializer.extend(lowering.initializers)
        add_functions(result, lowering)
    kept = [n for i, old in enumerate(nodes) for n in (*inserted.get(i, []), *([old] if old is not None else []))]
    made = {o for n in kept for o in n.output}
    copies = [NodeProto.FromString(n.SerializeToString()) for n in kept]
    del graph.node[:]
    graph.node.extend(copies)
    declared_inputs = {i.name for i in graph.input}
    for i in reversed(range(len(graph.initializer))):
        name = graph.initializer[i].name
        if name in used_before and readers[name] <= 0 and name not in declared_inputs:
            del graph.initializer[i]
    gone = removed - made
    for i in reversed(range(len(graph.value_info))):
        if graph.value_info[i].name in gone:
            del graph.value_info[i]
    for key, text in (metadata or {}).items():
        result.metadata_props.add(key=key, value=text)
    return result


def _remove(
    nodes: list[NodeProto | None], at: int, producer: Mapping[str, int], readers: Counter[str], removed: set[str]
) -> None:
    """Removes the node at ``at``, then every node whose outputs nobody reads any more because of that."""
    pending = [at]
    while pending:
        i = pending.pop()
        node = nodes[i]
        if node is None or (i != at and any(readers[o] > 0 for o in node.output if o)):
            continue
        nodes[i] = None
        removed.update(o for o in node.output if o)
        for value in node_inputs(node):
            readers[value] -= 1
            if readers[value] <= 0 and value in producer:
                pending.append(producer[value])
