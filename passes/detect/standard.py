"""The standard ``Attention`` operator (opset 23 and later)."""

from __future__ import annotations

from math import sqrt

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.detect.softmax import MaskAnalysis, MaskFactor, MaskQuery, dtype_name, node_name
from attncompile.passes.evaluate import GraphIndex, World


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site that an ``Attention`` node is.

    Raises:
        Unsupported: outputs or inputs that a site cannot say (the scores as an output, a KV cache inside the node),
            or operands of rank 3.
    """
    inputs = [*node.input, *([""] * 7)]
    attributes = {a.name: a for a in node.attribute}
    if len(node.output) > 3 and node.output[3]:
        raise Unsupported("scores-used", "the node also gives out its scores")
    if any(inputs[4:7]) or any(o for o in node.output[1:]):
        raise Unsupported("kv-cache", "the node holds its KV cache or per-row key lengths inside")
    for value in (*inputs[:3], node.output[0]):
        if len(world.shapes.get(value, ())) != 4:
            raise Unsupported("layout", f"operand '{value}' of the Attention node is not of rank 4")
    query, key, value = inputs[:3]
    batch, heads, query_length, head_dim = world.shapes[query]
    _, kv_heads, key_length, value_dim = world.shapes[value]
    if world.shapes[key][2] == 0 or heads % max(kv_heads, 1):
        raise Unsupported("layout", "the numbers of query and key heads do not divide")
    scale = attributes["scale"].f if "scale" in attributes else 1.0 / sqrt(head_dim)
    softcap = attributes["softcap"].f if "softcap" in attributes else 0.0
    factors: tuple[MaskFactor, ...] = ()
    if inputs[3]:
        kind = "visible" if world.types.get(inputs[3]) == 9 else "add"
        factors = (MaskFactor(kind, inputs[3], float("-inf"), True, 1.0),)
    facts = analyse(MaskQuery(factors, True, query, key, 2, 2, query_length, key_length))
    if "is_causal" in attributes and attributes["is_causal"].i:
        facts = _with_causal(facts, query_length, key_length)
    return AttentionSite(
        id="", form="attention-op",
        query=Operand(query, "BHND"), key=Operand(key, "BHND"), value=Operand(value, "BHND"),
        output=Operand(node.output[0], "BHND"),
        batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
        query_length=query_length, key_length=key_length, scale=scale, mask=facts, softcap=softcap,
        dtype=dtype_name(world, query), softmax_dtype=dtype_name(world, query),
        nodes=(node_name(node),), interior=(),
    )  # fmt: skip


def _with_causal(facts: MaskFacts, query_length: int, key_length: int) -> MaskFacts:
    if query_length != key_length:
        # The operator aligns its triangle at the first key, a site's window at the last.
        raise Unsupported("causal-offset", "is_causal with different numbers of queries and keys")
    certificate = Certificate("attribute", "is_causal = 1", general=True)
    window = facts.part("window")
    if window is not None and window.right == 0:
        return facts
    return MaskFacts((MaskPart("causal", certificate, -1, 0), *facts.parts), facts.masked_rows)
