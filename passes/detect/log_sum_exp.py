"""The log-sum-exp of the scores beside the weights, as split and ring attention give it out."""

from __future__ import annotations

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.normaliser import Normaliser, reduces_last_axis
from attncompile.passes.detect.walks import readers_of
from attncompile.passes.evaluate import GraphIndex, World

Found = tuple[str, tuple[NodeProto, ...]]


def log_sum_exp(index: GraphIndex, world: World, norm: Normaliser) -> Found:
    """The value [.., queries] or [.., queries, 1] and the nodes that make it; an empty name where there is none.

    Forms: ReduceLogSumExp(s), and m + log(sum(exp(s - m))) of a softmax that is written out, m the row's maximum.

    Raises:
        Unsupported: there are several.
    """
    inner = {id(n) for n in norm.nodes}
    found = [_reduced(world, n) for n in readers_of(index, norm.scores) if id(n) not in inner] if not norm.sink else []
    found += [_written_out(index, n, norm) for n in norm.nodes if n.op_type == "ReduceSum"] if not norm.sink else []
    results = [f for f in found if f is not None]
    if len(results) > 1:
        raise Unsupported("log-sum-exp", f"the log-sum-exp is given out twice: '{results[0][0]}', '{results[1][0]}'")
    return results[0] if results else ("", ())


def _reduced(world: World, node: NodeProto) -> Found | None:
    if node.domain not in ("", "ai.onnx") or node.op_type != "ReduceLogSumExp":
        return None
    return (node.output[0], (node,)) if reduces_last_axis(world, node, keeps=False) else None


def _written_out(index: GraphIndex, total: NodeProto, norm: Normaliser) -> Found | None:
    """Add(m, Log(total)), either or both squeezed before."""
    top = next((n.output[0] for n in norm.nodes if n.op_type == "ReduceMax"), "")
    maxima, nodes = {top}, []
    for node in index.consumers.get(top, []) if top else []:
        if node.op_type in ("Squeeze", "Reshape"):
            maxima.add(node.output[0])
            nodes.append(node)
    for logarithm in [n for n in index.consumers.get(total.output[0], []) if n.op_type == "Log"]:
        value, made = logarithm.output[0], [logarithm]
        if not norm.stable:
            return value, (logarithm,)
        readers = readers_of(index, value)
        if len(readers) == 1 and readers[0].op_type in ("Squeeze", "Reshape"):
            made.append(readers[0])
            value, readers = readers[0].output[0], readers_of(index, readers[0].output[0])
        if len(readers) == 1 and readers[0].op_type == "Add" and value not in index.outputs:
            (add,) = readers
            others = [v for v in add.input if v != value]
            if len(others) == 1 and others[0] in maxima:
                return add.output[0], (*made, *(n for n in nodes if n.output[0] == others[0]), add)
    return None
