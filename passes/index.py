"""Who makes and who reads each value of a graph, and the graphs inside its control flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, ValueInfoProto

from attncompile.core.model import Model
from attncompile.passes.infer import CONTROL, NOT_CONSTANT, GraphPlan, Inference, topological
from attncompile.passes.load import node_inputs


def symbol_of(value: str, axis: int, dim: TensorShapeProto.Dimension) -> str | None:
    """The name of a dynamic dimension of a graph input (``input:axis`` where the file gives none); None if fixed."""
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return None
    return dim.dim_param or f"{value}:{axis}"


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A graph inside an If, Loop or Scan node. ``scope`` names it in its model: ``If 'name'/then_branch``, after the
    scope of the body that holds the node, if any, and a slash. ``key`` is the node's first named output.
    """

    scope: str
    key: str
    attribute: str
    node: NodeProto
    graph: GraphProto


class Shared:
    """What all indices of one model share: its inference, its plan, and what was inferred at each binding."""

    def __init__(self, model: Model) -> None:
        self.inference = Inference(model.proto, model.path.parent)
        self.sweeps: dict[object, Any] = {}
        self._graph = model.proto.graph

    @cached_property
    def plan(self) -> GraphPlan:
        return self.inference.plan(self._graph)


class GraphIndex:
    """Producers, consumers and constants by value name, independent of sizes.

    Of the main graph; with ``body``, of that body as seen from inside: the graphs around it and its own nodes as one,
    its inputs among the inputs. ``idle`` names outputs of nodes that only pass their input on: whoever reads them is
    shown reading the input.
    """

    def __init__(
        self, model: Model, idle: frozenset[str] = frozenset(), *, outer: GraphIndex | None = None,
        body: Body | None = None, shared: Shared | None = None,
    ) -> None:  # fmt: skip
        graph = body.graph if body is not None else model.proto.graph
        self.model = model
        self.outer = outer
        self.body = body
        self.shared: Shared = shared or (outer.shared if outer is not None else Shared(model))
        around = outer.nodes if outer is not None else []
        own = list(graph.node)
        self.nodes: list[NodeProto] = _without_idle([*around, *own], idle)
        self.own = self.nodes[len(around) :]
        self.folder = model.path.parent
        stored = {t.name: t for t in graph.initializer}
        self.outputs: set[str] = {o.name for o in graph.output} | (outer.outputs if outer is not None else set())
        self.initializers: dict[str, TensorProto] = {**(outer.initializers if outer is not None else {}), **stored}
        self.inputs: dict[str, ValueInfoProto] = dict(outer.inputs) if outer is not None else {}
        self.inputs |= {i.name: i for i in graph.input if i.name not in stored}
        self.producer: dict[str, NodeProto] = {o: n for n in self.nodes for o in n.output if o}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node_inputs(node)):
                self.consumers.setdefault(value, []).append(node)
        for node in [n for n in self.nodes if idle and n.output[0] in idle]:
            if node.output[0] not in self.consumers and node.output[0] not in self.outputs:
                self.consumers[node.input[0]].remove(node)
        self._data_inputs: dict[str, frozenset[str]] = {}
        self._inside: dict[str, GraphIndex] = {}

    def stepping_over(self, idle: frozenset[str]) -> GraphIndex:
        """The same graph, the nodes that make ``idle`` stepped over."""
        return GraphIndex(self.model, idle, outer=self.outer, body=self.body, shared=self.shared)

    @cached_property
    def order(self) -> list[NodeProto]:
        """All nodes in topological order."""
        return topological(self.nodes)

    @cached_property
    def own_order(self) -> list[NodeProto]:
        """The nodes of this graph alone, without those around a body, in topological order."""
        return topological(self.own)

    @cached_property
    def position(self) -> dict[int, int]:
        """Where each node stands in ``order``, by the node's id."""
        return {id(n): i for i, n in enumerate(self.order)}

    # Bodies.

    @property
    def scope(self) -> str:
        return self.body.scope if self.body is not None else ""

    @cached_property
    def bodies(self) -> dict[str, list[Body]]:
        """The bodies of this graph's own If, Loop and Scan nodes, by the node's first named output."""
        found: dict[str, list[Body]] = {}
        graph = self.body.graph if self.body is not None else self.model.proto.graph
        for body in bodies_of(graph, self.scope):
            found.setdefault(body.key, []).append(body)
        return found

    def inside(self, body: Body) -> GraphIndex:
        """This graph as seen from one of its bodies."""
        if body.scope not in self._inside:
            self._inside[body.scope] = GraphIndex(self.model, outer=self, body=body)
        return self._inside[body.scope]

    def at(self, scope: str) -> GraphIndex:
        """The index of the body that ``scope`` names. Raises KeyError if there is none."""
        if scope == self.scope:
            return self
        for body in (b for group in self.bodies.values() for b in group):
            if scope == body.scope or scope.startswith(body.scope + "/"):
                return self.inside(body).at(scope)
        raise KeyError(scope)

    # Values.

    def data_inputs(self, value: str) -> frozenset[str]:
        """The graph inputs (or random nodes) whose data, not only whose shape, reaches ``value``."""
        stack = [value]
        while stack:
            name = stack[-1]
            if name in self._data_inputs:
                stack.pop()
                continue
            node = self.producer.get(name)
            if node is None:
                self._data_inputs[name] = frozenset({name}) if name in self.inputs else frozenset()
                continue
            if node.op_type in ("Shape", "Size"):
                self._data_inputs[name] = frozenset()
                continue
            if node.op_type in NOT_CONSTANT or _draws(node):
                self._data_inputs[name] = frozenset({name})
                continue
            parents = list(node_inputs(node))
            missing = [p for p in parents if p not in self._data_inputs]
            if missing:
                stack.extend(missing)
                continue
            self._data_inputs[name] = frozenset[str]().union(*(self._data_inputs[p] for p in parents))
        return self._data_inputs[value]

    def slice_nodes(self, value: str) -> list[NodeProto]:
        """The nodes that ``value`` is made by, cut at ``Shape`` nodes (kept), in topological order."""
        wanted: set[int] = set()
        result: list[NodeProto] = []
        stack: list[tuple[str, bool]] = [(value, False)]
        while stack:
            name, expanded = stack.pop()
            node = self.producer.get(name)
            if node is None:
                continue
            if expanded:
                if id(node) not in wanted:
                    wanted.add(id(node))
                    result.append(node)
                continue
            if id(node) in wanted:
                continue
            stack.append((name, True))
            if node.op_type not in ("Shape", "Size"):
                stack.extend((v, False) for v in node_inputs(node))
        return result


def bodies_of(graph: GraphProto, scope: str = "") -> list[Body]:
    """The bodies of the If, Loop and Scan nodes of a graph (not those inside them), which ``scope`` names."""
    found: list[Body] = []
    seen: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in CONTROL or node.domain not in ("", "ai.onnx"):
            continue
        key = next((o for o in node.output if o), "")
        name = (node.name or key).replace("\\", "\\\\").replace("'", "\\'")  # so that no two scopes read the same
        label = f"{node.op_type} '{name}'"
        seen[label] += 1
        label += f"#{seen[label]}" if seen[label] > 1 else ""
        prefix = f"{scope}/{label}" if scope else label
        found += [Body(f"{prefix}/{a.name}", key, a.name, node, a.g) for a in node.attribute if a.type == 5]
    return found


def graph_at(graph: GraphProto, scope: str) -> GraphProto:
    """The graph that ``scope`` names; ``graph`` itself for an empty one. Raises KeyError if there is none."""
    here = ""
    while here != scope:
        inside = [b for b in bodies_of(graph, here) if scope == b.scope or scope.startswith(b.scope + "/")]
        if not inside:
            raise KeyError(scope)
        graph, here = inside[0].graph, inside[0].scope
    return graph


def graphs_within(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and every graph inside its nodes' attributes, outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                yield from graphs_within(inner)


def visible_names(index: GraphIndex) -> set[str]:
    """The values that a body inside ``index`` can read from outside."""
    return {*index.producer, *index.initializers, *index.inputs}


def local_names(graph: GraphProto) -> set[str]:
    """The values that a graph makes or brings itself."""
    names = {o for n in graph.node for o in n.output if o}
    return names | {i.name for i in graph.input} | {t.name for t in graph.initializer}


def _draws(node: NodeProto) -> bool:
    """Whether a body of ``node`` draws random numbers."""
    inner = (a.g for a in node.attribute if a.type == AttributeProto.GRAPH)
    return any(n.op_type in NOT_CONSTANT for body in inner for g in graphs_within(body) for n in g.node)


def _without_idle(nodes: list[NodeProto], idle: frozenset[str]) -> list[NodeProto]:
    """The nodes, those that read an idle node's output copied so that they read its input (bodies keep their names)."""
    if not idle:
        return nodes
    source = {n.output[0]: n.input[0] for n in nodes if n.output and n.output[0] in idle}

    def origin(value: str) -> str:
        while value in source:
            value = source[value]
        return value

    result = []
    for node in nodes:
        if any(i in source for i in node.input):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [origin(i) for i in node.input]
            node = copy
        result.append(node)
    return result
