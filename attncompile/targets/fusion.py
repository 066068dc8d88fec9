"""Which attention of a model became one kernel of an engine, told from the builder's list of layers.

TensorRT-RTX 1.7.1, built with detailed verbosity, logs one line a kernel that ends in ``Metadata: [ONNX Layer: a][ONNX
Layer: b]...`` (separated by a unit separator, 0x1f), the ONNX nodes that it computes. A fused attention is a line that
names a softmax and both its products (the kernel is called ``_gemm_mha_v2``); otherwise the products are ``gemm`` lines
of their own. Seen without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto

from attncompile.core.site import AttentionSite
from attncompile.targets import graph as g
from attncompile.targets.base import EngineLayer, FusedAttention

_LINE = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>[^,]+),.*?(?:, Metadata: (?P<nodes>.*))?$")
_SEPARATOR = "\x1f"
_NODE = re.compile(r"^\[ONNX Layer: (.*?)(?: \| .*)?\]$")
"""A node in a branch is called ``node | branch (then_branch) | if_node (If)``."""
_PRODUCTS = ("MatMul", "Einsum", "Gemm")
_AFTER_PRODUCT = frozenset(
    ("Mul", "Div", "Add", "Sub", "Where", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Tanh",
     "Expand", "Slice", "Concat", "Max", "Min", "Clip", "Dropout", "IsNaN", "Pad")
)  # fmt: skip
"""Ops that may stand between a product and its softmax: scale, mask, softcap, changes of shape and type."""


def parse_layers(dump: str | None) -> tuple[EngineLayer, ...]:
    """The layers of the log's ``Layers:`` message; empty if there is none, or none with metadata."""
    layers = []
    for line in (dump or "").splitlines():
        match = _LINE.match(line.strip())
        if match and match["nodes"] is not None:
            named = (_NODE.match(part) for part in match["nodes"].split(_SEPARATOR))
            layers.append(EngineLayer(match["name"], match["kind"].strip(), tuple(m[1] for m in named if m)))
    return tuple(layers)


class _Index:
    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = [n for inner in g.graphs(graph) for n in inner.node]
        self.maker = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def before(self, node: NodeProto) -> list[NodeProto]:
        """The products from which ``node`` takes its data."""
        return self._walk([v for v in node.input if v], lambda n: list(n.input), self._made)

    def after(self, node: NodeProto) -> list[NodeProto]:
        """The products that take the data of ``node``."""
        return self._walk(list(node.output), lambda n: list(n.output), lambda v: self.readers.get(v, []))

    def _made(self, value: str) -> list[NodeProto]:
        return [self.maker[value]] if value in self.maker else []

    def _walk(self, start, follow, step) -> list[NodeProto]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        found, pending, seen = [], list(start), set()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            for node in step(value):
                if node.op_type in _PRODUCTS:
                    found.append(node)
                elif node.op_type in _AFTER_PRODUCT:
                    pending.extend(v for v in follow(node) if v)
        return found


def attentions(lowered: ModelProto) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Node name of every attention -> names of the products before and after its softmax (empty for ``Attention``).

    A softmax counts if it takes from a product and gives to one; the softmax of a classifier does not.
    """
    index = _Index(lowered.graph)
    found: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
    for node in index.nodes:
        if node.domain not in g.STANDARD_DOMAINS:
            continue
        if node.op_type == "Attention":
            found[node.name] = (frozenset(), frozenset())
        elif node.op_type == "Softmax":
            before = frozenset(n.name for n in index.before(node))
            after = frozenset(n.name for n in index.after(node))
            if before and after:
                found[node.name] = (before, after)
    return found


def judge(lowered: ModelProto, layers: Sequence[EngineLayer]) -> tuple[FusedAttention, ...]:
    """For every attention of ``lowered`` whether one layer computes all of it."""
    return tuple(_judge(node, *products, layers) for node, products in attentions(lowered).items())


def _judge(node: str, before: frozenset[str], after: frozenset[str], layers: Sequence[EngineLayer]) -> FusedAttention:
    if not layers:
        return FusedAttention(node, None, "", "the builder's log lists no layers")
    holding = [layer for layer in layers if node in layer.nodes]
    if not holding:
        return FusedAttention(node, None, "", "no layer of the builder's log names this node")
    if not before:  # the Attention op: the log names the node at each of the kernels that it became
        fused = next((layer for layer in holding if "mha" in layer.name.lower()), None)
        if fused is not None:
            return FusedAttention(node, True, fused.name, "an mha kernel of the log names this node")
        return FusedAttention(
            node, False, holding[0].name, f"the log shows it as {len(holding)} kernels, none of them mha"
        )
    for layer in holding:
        names = set(layer.nodes)
        if names & before and names & after:
            return FusedAttention(node, True, layer.name, "one kernel of the log names both products and the softmax")
    return FusedAttention(node, False, holding[0].name, "its products are kernels of their own in the log")


def by_site(
    lowered: ModelProto, sites: Iterable[AttentionSite], found: Sequence[FusedAttention]
) -> Mapping[str, bool | None]:
    """Site -> whether all attentions between its operands and its output are fused (None: unknown).

    Operands and output keep their names when a site is replaced, so they delimit it in the lowered model too.
    """
    index = _Index(lowered.graph)
    verdicts = {a.node: a.fused for a in found}
    result: dict[str, bool | None] = {}
    for site in sites:
        stop = {site.query.value, site.key.value, site.value.value}
        inside = [verdicts[n] for n in _nodes_behind(index, site.output.value, stop) if n in verdicts]
        result[site.id] = None if not inside or None in inside else all(inside)
    return result


def _nodes_behind(index: _Index, output: str, stop: set[str]) -> list[str]:
    found, pending, seen = [], [output], set(stop)
    while pending:
        value = pending.pop()
        node = index.maker.get(value)
        if value in seen or node is None:
            continue
        seen.add(value)
        found.append(node.name)
        pending.extend(v for v in node.input if v)
        pending.extend(o.name for inner in g.subgraphs(node) for o in inner.output)
    return found
