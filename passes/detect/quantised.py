"""Attention between QuantizeLinear and DequantizeLinear, or on integers: recognised and kept, never moved.

Pairs of the two are stepped over, so that the other files here see the attention that was quantised. Products and
softmaxes on integers (``MatMulInteger``, ``QLinearMatMul``, ``QLinearSoftmax``) are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

Lift = Callable[[GraphIndex, World, NodeProto, MaskAnalysis], AttentionSite | None]

_DOMAINS = ("", "ai.onnx", "com.microsoft")
_PRODUCTS = frozenset({"MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"})
_NEAR = 14
"""Nodes between an integer product and a softmax: scales, casts, masks, guards."""

_WORDS = {
    int(TensorProto.INT8): "int8", int(TensorProto.UINT8): "int8", int(TensorProto.INT16): "int16",
    int(TensorProto.UINT16): "int16", int(TensorProto.INT4): "int4", int(TensorProto.UINT4): "int4",
    int(TensorProto.FLOAT8E4M3FN): "fp8", int(TensorProto.FLOAT8E4M3FNUZ): "fp8", int(TensorProto.FLOAT8E5M2): "fp8",
    int(TensorProto.FLOAT8E5M2FNUZ): "fp8", int(TensorProto.FLOAT4E2M1): "fp4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Through:
    """The graph without pairs of QuantizeLinear and DequantizeLinear; ``pairs``: output of the latter -> type word."""

    world: World
    analyse: MaskAnalysis
    pairs: dict[str, str]


def through(world: World, analyser: Callable[[World], MaskAnalysis]) -> Through | None:
    """``world`` seen through its quantisation, or None where it has none. ``world`` has its idle nodes still."""
    pairs: dict[str, str] = {}
    idle: set[str] = set()
    for node in world.index.nodes:
        first = world.index.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if first is None or first.op_type != "QuantizeLinear" or not {node.domain, first.domain} <= set(_DOMAINS):
            continue
        if _same(world, first, node):
            pairs[node.output[0]] = _WORDS.get(world.types.get(first.output[0], 0), "quantised")
            idle |= {node.output[0], first.output[0]}
    if not pairs:
        return None
    seen = world.without_idle(frozenset(idle))
    return Through(seen, analyser(seen), pairs)


def _same(world: World, first: NodeProto, second: NodeProto) -> bool:
    """Whether scale and zero point are the same: else the pair is a multiplication."""
    for a, b in zip([*first.input[1:], ""][:2], [*second.input[1:], ""][:2], strict=True):
        if a != b and (not a or not b or world.scalar(a) is None or world.scalar(a) != world.scalar(b)):
            return False
    return True


def lift(
    family: Lift, world: World, node: NodeProto, analyse: MaskAnalysis, seen: Callable[[], Through | None]
) -> AttentionSite | None:
    """What ``family`` says; where it says no, what it says of the same graph without its quantisation.

    Raises:
        Unsupported: neither is a site. A softmax between integer products says so.
    """
    try:
        site = family(world.index, world, node, analyse)
        return None if site is None else _with_quantised_operands(world, site)
    except Unsupported as error:
        first = error
    other = seen()
    if other is None:
        raise kept(world, node, first)
    try:
        site = family(other.world.index, other.world, other.world.index.producer[node.output[0]], other.analyse)
    except Unsupported as error:
        if error.code == first.code:
            raise kept(world, node, first) from None
        code = "quantised" if error.code in ("layout", "shape-read") else error.code
        words = "quantised: kept" if code == "quantised" else "behind its quantisation"
        raise Unsupported(code, f"{words} ({error.message})") from None
    if site is None:
        return None
    return _named(world, site, other)


def _with_quantised_operands(world: World, site: AttentionSite) -> AttentionSite:
    """``site``; where an operand comes dequantised to its product, saying so: the product is one of integers then."""
    words = {_dequantised(world, o.value) for o in (site.query, site.key, site.value)} - {""}
    if not words:
        return site
    return replace(site, form=f"{site.form} quantised", quantised="+".join(sorted(words)))


def _dequantised(world: World, value: str) -> str:
    """What an activation was stored as right before it became ``value``, views aside; empty where it was not."""
    for _ in range(_NEAR):
        node = world.index.producer.get(value)
        if node is None or node.domain not in _DOMAINS:
            return ""
        if node.op_type == "DequantizeLinear":
            return _WORDS.get(world.types.get(node.input[0], 0), "quantised")
        if node.op_type not in VIEW_OPS:
            return ""
        value = node.input[0]
    return ""


def _named(world: World, site: AttentionSite, other: Through) -> AttentionSite:
    """``site`` with the quantising nodes inside it, and what they quantise to.

    Raises:
        Unsupported: there are none: what made the difference lies elsewhere.
    """
    inside = [world.index.producer[o] for o in site.interior if o in world.index.producer]
    inside.append(world.index.producer[site.output.value])
    found: dict[str, NodeProto] = {}
    words: set[str] = set()
    for node in inside:
        for value in node.input:
            while value in other.pairs:
                second = world.index.producer[value]
                first = world.index.producer[second.input[0]]
                words.add(other.pairs[value])
                found |= {first.output[0]: first, second.output[0]: second}
                value = first.input[0]
    if not words:
        raise Unsupported("quantised", "quantised: kept (the attention's readers are quantised)")
    return replace(
        site, form=f"{site.form} quantised", quantised="+".join(sorted(words)),
        nodes=(*site.nodes, *(node_name(n) for n in found.values())), interior=(*site.interior, *found),
    )  # fmt: skip


def kept(world: World, node: NodeProto, error: Unsupported) -> Unsupported:
    """``error``, or, where an integer product stands on both sides of ``node``, that."""
    if node.op_type in ("Softmax", "QLinearSoftmax"):
        before = _reaches(world, node, _PRODUCTS, back=True)
        after = _reaches(world, node, _PRODUCTS, back=False)
        if before and after:
            return Unsupported("quantised", f"quantised: kept ({node.op_type} '{node_name(node)}' stands between "
                               "products of integers)")  # fmt: skip
        if before or after:
            return Unsupported(error.code, f"{error.message} (a product of integers is near: quantised, kept)")
    return error


def softmax_of_integers(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """com.microsoft.QLinearSoftmax: never a site.

    Raises:
        Unsupported: always, with what stands around it.
    """
    raise kept(world, node, Unsupported("quantised", "quantised: kept (a softmax of quantised values, without a "
                                        "product on both sides)"))  # fmt: skip


def _reaches(world: World, node: NodeProto, wanted: frozenset[str], back: bool) -> bool:
    """Whether an operator in ``wanted`` is near. Products and softmaxes of floats are not passed."""
    index = world.index
    pending: list[NodeProto] = [node]
    done = {id(node)}
    for _ in range(_NEAR):
        following: list[NodeProto] = []
        for at in pending:
            for neighbour in _neighbours(index, at, back):
                if id(neighbour) in done:
                    continue
                done.add(id(neighbour))
                if neighbour.op_type in wanted:
                    return True
                if neighbour.op_type not in ("MatMul", "Gemm", "Einsum", "Softmax", "LayerNormalization", *_PRODUCTS):
                    following.append(neighbour)
        pending = following
    return False


def _neighbours(index: GraphIndex, node: NodeProto, back: bool) -> Iterable[NodeProto]:
    if back:
        return [index.producer[v] for v in node.input if v in index.producer]
    return [n for o in node.output if o for n in index.consumers.get(o, [])]
