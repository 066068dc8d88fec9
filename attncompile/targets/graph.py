"""Small questions and edits on protos that several targets share."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from attncompile.core.errors import TargetError

STANDARD_DOMAINS = ("", "ai.onnx")
PROTO_LIMIT = (1 << 31) - 1 - (1 << 20)
"""Bytes that protobuf serialises in one message, with room for what conversion adds."""


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and every graph inside its nodes' attributes, outer ones first."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def control_flow(graph: GraphProto) -> list[NodeProto]:
    """Nodes of ``graph`` that run graphs of their own: If, Loop, Scan."""
    return [node for node in graph.node if any(True for _ in subgraphs(node))]


def reads(node: NodeProto) -> Iterator[str]:
    """Values that ``node`` reads, those that its subgraphs take from outside included."""
    yield from (v for v in node.input if v)
    for graph in subgraphs(node):
        made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        made |= {v for n in graph.node for v in n.output}
        yield from (v for n in graph.node for v in reads(n) if v not in made)
        yield from (o.name for o in graph.output if o.name not in made)


def label(node: NodeProto) -> str:
    """The node's name, or ``op_type:output`` if it has none."""
    return node.name or f"{node.op_type}:{next((o for o in node.output if o), '')}"


def inlined(proto: ModelProto) -> ModelProto:
    """A copy of ``proto`` without model-local functions: every call is replaced by the function's body."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    if not copy.functions:
        return copy
    try:
        result = onnx.inliner.inline_local_functions(copy)
    except (RuntimeError, ValueError) as error:
        raise TargetError(f"the function bodies cannot be inlined: {error}", "report this model") from None
    used = {n.domain for g in graphs(result.graph) for n in g.node} | {""}
    kept = [o for o in result.opset_import if o.domain in used or o.domain in STANDARD_DOMAINS]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    return result


def name_nodes(proto: ModelProto) -> None:
    """Give every node a name of its own, in place: logs and profiles tell nodes apart by name only."""
    seen: set[str] = set()
    for graph in graphs(proto.graph):
        for node in graph.node:
            base = name = label(node)
            number = 1
            while name in seen:
                name = f"{base}_{number}"
                number += 1
            node.name = name
            seen.add(name)


def foreign_nodes(proto: ModelProto) -> list[NodeProto]:
    """Nodes that are no op of the standard domain at the opset which ``proto`` imports, subgraphs included."""
    opset = next((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), 0)
    newest = onnx.defs.onnx_opset_version()
    return [
        n
        for g in graphs(proto.graph)
        for n in g.node
        if n.domain not in STANDARD_DOMAINS or not onnx.defs.has(n.op_type, min(opset, newest), "")
    ]


def sort_nodes(graph: GraphProto) -> None:
    """Put the nodes of ``graph`` and of its subgraphs into an order in which each value is made before it is read."""
    for node in graph.node:
        for inner in subgraphs(node):
            sort_nodes(inner)
    maker = {o: i for i, n in enumerate(graph.node) for o in n.output if o}
    needs = [{maker[v] for v in reads(n) if v in maker} for n in graph.node]
    users: list[list[int]] = [[] for _ in needs]
    for i, before in enumerate(needs):
        for j in before:
            users[j].append(i)
    waiting = [len(before) for before in needs]
    ready = [i for i, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)  # the smallest index: what is in order already stays as it is
        order.append(i)
        for user in users[i]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    if order != list(range(len(order))):
        nodes = [NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(nodes)


def drop_nodes(graph: GraphProto, dead: Callable[[NodeProto], bool]) -> None:
    """Remove the nodes of ``graph`` for which ``dead`` holds, in place."""
    for i in reversed(range(len(graph.node))):
        if dead(graph.node[i]):
            del graph.node[i]
