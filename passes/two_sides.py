"""One model of two: where they differ an If runs the nodes of the one or of the other, the rest is there once.

Both are made from one file: the model with its exact replacements, and the same with approximations. A rule on an input
of the call says which of them it is. An If stands around each difference (a site that is approximated) and not around
the whole: everything between the sites, its weights and what a runtime packs of them are shared, and optimisations of
what lies between sites do not see a branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.keep_dense import KeepDense
from attncompile.passes.fold_back import inner_graphs, shell_key
from attncompile.passes.index import graphs_within, local_names
from attncompile.passes.infer import topological
from attncompile.passes.load import node_inputs
from attncompile.passes.rename import rename_values

DENSE, SPARSE = "then_branch", "else_branch"
"""The branches of each If: where the rule holds, and where it does not."""

_PREFIX = "attncompile/keep_dense"


def joined(dense: ModelProto, sparse: ModelProto, rule: KeepDense) -> ModelProto:
    """``dense`` for calls that ``rule`` holds of, ``sparse`` for others. Inputs, outputs and metadata are those of
    ``sparse``; neither model is changed. ``sparse`` itself where both have the same nodes.

    Raises:
        Unsupported: the two cannot be joined: a value between them is made in two ways that are not apart.
    """
    result = ModelProto()
    result.CopyFrom(sparse)
    taken = {name for m in (dense, sparse) for g in graphs_within(m.graph) for name in local_names(g)}
    taken |= {v for m in (dense, sparse) for n in m.graph.node for v in node_inputs(n)}
    condition = _unused(f"{_PREFIX}/holds", taken)
    other = ModelProto()
    other.CopyFrom(dense)
    _tell_apart(result.graph, other.graph, taken)
    if not _join(result.graph, other.graph, condition, taken):
        return sparse
    nodes, stored = _condition(result, rule, condition, taken)
    ordered = [NodeProto.FromString(n.SerializeToString()) for n in (*nodes, *result.graph.node)]
    del result.graph.node[:]
    result.graph.node.extend(ordered)
    result.graph.initializer.extend(stored)
    known = {(f.domain, f.name, f.overload) for f in result.functions}
    result.functions.extend(f for f in dense.functions if (f.domain, f.name, f.overload) not in known)
    domains = {o.domain for o in result.opset_import}
    result.opset_import.extend(o for o in dense.opset_import if o.domain not in domains)
    result.ir_version = max(result.ir_version, dense.ir_version)
    return result


def _condition(
    model: ModelProto, rule: KeepDense, name: str, taken: set[str]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes that make the bool scalar ``name``. Of a batch one entry is enough."""
    kind = next(v.type.tensor_type for v in model.graph.input if v.name == rule.input)
    wide, number = rule.compared(kind.elem_type)
    limit = _unused(f"{_PREFIX}/number", taken)
    read, nodes = rule.input, []

    def op(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    if wide != kind.elem_type:
        read = op("Cast", [read], _unused(f"{_PREFIX}/input", taken), to=wide)
    one = op(rule.operator, [read, limit], _unused(f"{_PREFIX}/each", taken))
    count = op("Cast", [one], _unused(f"{_PREFIX}/each_int", taken), to=TensorProto.INT32)
    total = op("ReduceSum", [count], _unused(f"{_PREFIX}/count", taken), keepdims=0)  # ReduceMax takes no empty batch
    op("Cast", [total], name, to=TensorProto.BOOL)
    return nodes, [numpy_helper.from_array(number, limit)]


def _unused(name: str, taken: set[str]) -> str:
    found, number = name, 1
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def _tell_apart(sparse: GraphProto, dense: GraphProto, taken: set[str]) -> None:
    """Gives names of their own to constants and values of ``sparse`` that are called like others in ``dense``: those
    that only nodes read in which the two differ. Adds the constants of ``dense`` to ``sparse``.
    """
    ours, theirs = ({t.name: t for t in g.initializer} for g in (sparse, dense))
    names = {
        name: _unused(f"{name}/sparse", taken) for name, tensor in ours.items()
        if name in theirs and tensor != theirs[name]
    }  # fmt: skip
    only_sparse, only_dense = _differing(sparse, dense)
    apart = {id(n) for n in only_sparse}
    shared = {v for n in sparse.node if id(n) not in apart for v in node_inputs(n)} | {o.name for o in sparse.output}
    apart = {id(n) for n in only_dense}
    shared |= {v for n in dense.node if id(n) not in apart for v in node_inputs(n)}
    if lost := names.keys() & shared:
        raise Unsupported("two-sides", f"constant '{min(lost)}' differs with and without approximations")
    made = {o for n in only_dense for o in n.output if o} | set(theirs)
    names |= {
        o: _unused(f"{o}/sparse", taken) for n in only_sparse for o in n.output if o in made and o not in shared
    }  # fmt: skip
    rename_values(sparse, names)
    known = {t.name for t in sparse.initializer}
    sparse.initializer.extend(t for t in dense.initializer if t.name not in known)
    inside: Mapping[str, GraphProto] = dict(inner_graphs(dense))
    for place, body in inner_graphs(sparse):
        if place in inside:
            _tell_apart(body, inside[place], taken)


def _differing(sparse: GraphProto, dense: GraphProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Nodes that only one of the two has; what their bodies hold does not count."""
    ours, theirs = ({shell_key(n) for n in g.node} for g in (sparse, dense))
    return [n for n in sparse.node if shell_key(n) not in theirs], [n for n in dense.node if shell_key(n) not in ours]


def _join(sparse: GraphProto, dense: GraphProto, condition: str, taken: set[str]) -> bool:
    """Makes ``sparse`` the joined graph; whether anything differs."""
    found = False
    inside: Mapping[str, GraphProto] = dict(inner_graphs(dense))
    for place, body in inner_graphs(sparse):
        if place in inside:
            found |= _join(body, inside[place], condition, taken)
    only_sparse, only_dense = _differing(sparse, dense)
    if not only_sparse and not only_dense:
        return found
    sides = _Side(sparse, only_sparse), _Side(dense, only_dense)
    ifs: list[NodeProto] = []
    for values in _groups(*sides):
        moved = [side.take(values) for side in sides]
        ifs.append(_if(sparse, values, moved[1], moved[0], condition, taken))
    outside = [n for n in sparse.node if id(n) not in sides[0].moved]
    outside += [n for n in only_dense if id(n) not in sides[1].moved]
    outputs = {o.name for o in sparse.output}
    nodes = _read_ones([*outside, *ifs], outputs, {id(n) for n in (*only_sparse, *only_dense)})
    made = [o for n in nodes for o in n.output if o]
    hidden = {o for side in sides for n in side.only if id(n) in side.moved for o in n.output if o} - set(made)
    lost = hidden & ({v for n in nodes for v in node_inputs(n)} | outputs)
    if lost or len(made) != len(set(made)):
        value = min(lost, default="") or next(o for o in made if made.count(o) > 1)
        raise Unsupported("two-sides", f"'{value}' is made in two ways, with and without approximations")
    copies = [NodeProto.FromString(n.SerializeToString()) for n in topological(nodes)]
    gone = local_names(sparse) - set(made)
    del sparse.node[:]
    sparse.node.extend(copies)
    for i in reversed(range(len(sparse.value_info))):
        if sparse.value_info[i].name in gone:
            del sparse.value_info[i]
    return True


def _read_ones(nodes: list[NodeProto], outputs: set[str], ours: set[int]) -> list[NodeProto]:
    """Without those of ``ours`` that nobody reads."""
    while True:
        used = {v for n in nodes for v in node_inputs(n)} | outputs
        left = [n for n in nodes if id(n) not in ours or any(o in used for o in n.output)]
        if len(left) == len(nodes):
            return nodes
        nodes = left


class _Side:
    """One of the two graphs. ``moved`` are the ids of nodes that went into branches."""

    def __init__(self, graph: GraphProto, only: list[NodeProto]) -> None:
        self.only = only
        self.maker = {o: n for n in only for o in n.output if o}
        self.moved: set[int] = set()
        self.readers: dict[str, set[int]] = {}
        for node in graph.node:
            for value in node_inputs(node):
                self.readers.setdefault(value, set()).add(id(node))
        for output in graph.output:
            self.readers.setdefault(output.name, set()).add(0)

    def take(self, values: Iterable[str]) -> list[NodeProto]:
        """The nodes that make ``values``, and those that are there for these alone, in the graph's order. What others
        read too stays outside and is computed for both sides.
        """
        inside = {id(self.maker[v]): self.maker[v] for v in values}
        grown = True
        while grown:
            grown = False
            for value in [v for n in inside.values() for v in node_inputs(n)]:
                node = self.maker.get(value)
                if node is None or id(node) in inside or id(node) in self.moved:
                    continue
                if all(self.readers.get(o, set()) <= inside.keys() for o in node.output if o):
                    inside[id(node)] = node
                    grown = True
        self.moved |= inside.keys()
        return [n for n in self.only if id(n) in inside]


def _groups(sparse: _Side, dense: _Side) -> list[list[str]]:
    """Values that both sides make, each its own way; those of one node together."""
    groups: list[list[str]] = []
    for value in (v for v in dense.maker if v in sparse.maker):
        makers = {id(dense.maker[value]), id(sparse.maker[value])}
        near = [g for g in groups if any({id(dense.maker[v]), id(sparse.maker[v])} & makers for v in g)]
        groups = [g for g in groups if g not in near] + [[*(v for g in near for v in g), value]]
    return groups


def _if(
    graph: GraphProto, values: list[str], dense: list[NodeProto], sparse: list[NodeProto], condition: str,
    taken: set[str],
) -> NodeProto:  # fmt: skip
    kinds = {v.name: v for v in (*graph.value_info, *graph.output)}
    bodies = {}
    for branch, side, nodes in ((DENSE, "dense", dense), (SPARSE, "sparse", sparse)):
        names = {v: _unused(f"{v}/{side}", taken) for v in values}
        body = helper.make_graph(topological(nodes), f"{values[0]}/{side}", [], [])
        rename_values(body, names)
        for value in values:
            output = body.output.add()
            if value in kinds:
                output.CopyFrom(kinds[value])
            output.name = names[value]
        bodies[branch] = body
    return helper.make_node("If", [condition], values, name=_unused(f"{_PREFIX}/{values[0]}", taken), **bodies)


__all__ = ["DENSE", "SPARSE", "joined"]
