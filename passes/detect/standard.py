"""The standard ``Attention`` operator (opset 23 and later)."""

from __future__ import annotations

from math import sqrt

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.detect.homes import NotSeparate, Separation
from attncompile.passes.detect.softmax import MaskAnalysis, MaskFactor, MaskQuery, dtype_name
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site that an ``Attention`` node is.

    Raises:
        Unsupported: outputs or inputs that a site cannot say (the scores as an output, a KV cache inside the node),
            or operands of rank 3 that
            are not reshaped from, and to, rank 4.
    """
    inputs = [*node.input, *([""] * 7)]
    attributes = {a.name: a for a in node.attribute}
    if len(node.output) > 3 and node.output[3]:
        raise Unsupported("scores-used", "the node also gives out its scores")
    if any(inputs[4:7]) or any(o for o in node.output[1:]):
        raise Unsupported("kv-cache", "the node holds its KV cache or per-row key lengths inside")
    for value in (*inputs[:3], node.output[0]):
        if value not in world.shapes:
            raise Unsupported("shape-unknown", f"the shape of '{value}' is not known")
    ranks = {len(world.shapes[v]) for v in (*inputs[:3], node.output[0])}
    operands, around = _packed(index, world, node) if ranks == {3} else _separate(node, ranks)
    query, key, value = (o.value for o in operands[:3])
    sizes = [dict(zip(o.layout, world.shapes[o.value], strict=True)) for o in operands]
    batch, heads, query_length, head_dim = (sizes[0][a] for a in "BHND")
    kv_heads, key_length, value_dim = (sizes[2][a] for a in "HND")
    if sizes[1]["N"] == 0 or sizes[1]["H"] != kv_heads or heads % max(kv_heads, 1):
        raise Unsupported("layout", "the numbers of query and key heads do not divide")
    scale = attributes["scale"].f if "scale" in attributes else 1.0 / sqrt(head_dim)
    softcap = attributes["softcap"].f if "softcap" in attributes else 0.0
    factors: tuple[MaskFactor, ...] = ()
    if inputs[3]:
        kind = "visible" if world.types.get(inputs[3]) == 9 else "add"
        factors = (MaskFactor(kind, inputs[3], float("-inf"), True, 1.0),)
    facts = analyse(
        MaskQuery(
            factors,
            True,
            query,
            key,
            operands[0].layout.index("N"),
            operands[1].layout.index("N"),
            query_length,
            key_length,
        )
    )
    if "is_causal" in attributes and attributes["is_causal"].i:
        facts = _with_causal(facts, query_length, key_length)
    return AttentionSite(
        id="", form="attention-op",
        query=operands[0], key=operands[1], value=operands[2], output=operands[3],
        batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
        query_length=query_length, key_length=key_length, scale=scale, mask=facts, softcap=softcap,
        dtype=dtype_name(world, query), softmax_dtype=dtype_name(world, query),
        nodes=(node_name(node), *(node_name(n) for n in around)),
        interior=tuple(o for n in (node, *around) for o in n.output if o and o != operands[3].value),
    )  # fmt: skip


_Operands = tuple[Operand, Operand, Operand, Operand]


def _separate(node: NodeProto, ranks: set[int]) -> tuple[_Operands, tuple[NodeProto, ...]]:
    if ranks != {4}:
        raise Unsupported("layout", "the operands of the Attention node differ in rank")
    q, k, v, o = (Operand(x, "BHND") for x in (*node.input[:3], node.output[0]))
    return (q, k, v, o), ()


def _packed(index: GraphIndex, world: World, node: NodeProto) -> tuple[_Operands, tuple[NodeProto, ...]]:
    """Operands [batch, sequence, heads * dim]: the [batch, sequence, heads, dim] that a Reshape makes them from.

    Raises:
        NotSeparate: a value has no such Reshape.
    """
    counts = {a.name: a.i for a in node.attribute if a.name in ("q_num_heads", "kv_num_heads")}
    if len(counts) < 2:
        raise Unsupported("layout", "the Attention node has operands of rank 3 and does not say how many heads")
    heads = [counts["q_num_heads"], counts["kv_num_heads"], counts["kv_num_heads"], counts["q_num_heads"]]
    found: list[Operand] = []
    around: list[NodeProto] = []
    missing: list[Separation] = []
    for at, value in enumerate((*node.input[:3], node.output[0])):
        batch, length, width = world.shapes[value]
        dim = width // heads[at]
        if at < 3:
            near = index.producer.get(value)
            source = near.input[0] if near is not None and near.op_type == "Reshape" else ""
        else:
            readers = index.consumers.get(value, [])
            near = readers[0] if len(readers) == 1 and value not in index.outputs else None
            source = near.output[0] if near is not None and near.op_type == "Reshape" else ""
        if near is not None and world.shapes.get(source) == (batch, length, heads[at], dim):
            found.append(Operand(source, "BNHD"))
            around.append(near)
        else:
            reader = node.output[0] if at < 3 else ""
            missing.append(Separation(value, reader, "BNHD", heads[at], dim, "outer", (width,)))
    if missing:
        raise NotSeparate(f"operand '{missing[0].value}' of the Attention node is of rank 3", tuple(missing))
    q, k, v, o = found
    return (q, k, v, o), tuple(around)


def _with_causal(facts: MaskFacts, query_length: int, key_length: int) -> MaskFacts:
    if query_length != key_length:
        # The operator aligns its triangle at the first key, a site's window at the last.
        raise Unsupported("causal-offset", "is_causal with different numbers of queries and keys")
    certificate = Certificate("attribute", "is_causal = 1", general=True)
    window = facts.part("window")
    if window is not None and window.right == 0:
        return facts
    return MaskFacts((MaskPart("causal", certificate, -1, 0), *facts.parts), facts.masked_rows)
