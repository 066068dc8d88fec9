"""The standard ``Attention`` operator (opset 23 and later)."""

from __future__ import annotations

from dataclasses import replace
from math import isinf, sqrt

from onnx import AttributeProto, NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import KeyEnds, MaskFacts
from attncompile.core.site import AttentionSite, Cache
from attncompile.passes.detect.cache import find_cache
from attncompile.passes.detect.operators import Operands, Sizes, find_operands, find_sizes, number, with_frontier
from attncompile.passes.detect.repeated import before_repeats
from attncompile.passes.detect.softmax import MaskAnalysis, MaskFactor, MaskQuery, dtype_name
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

FORM = "attention-op"

_PRECISION = {
    int(TensorProto.FLOAT): "float32", int(TensorProto.FLOAT16): "float16", int(TensorProto.DOUBLE): "float64",
    int(TensorProto.BFLOAT16): "bfloat16",
}  # fmt: skip


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site that an ``Attention`` node is.

    Inputs: Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen; outputs: Y, present_key, present_value,
    qk_matmul_output.

    Raises:
        Unsupported: what a site cannot say: scores that are read, attributes or shapes that contradict one another,
            operands of rank 3 that are not reshaped from, and to, rank 4.
    """
    inputs = [*node.input, *([""] * 7)][:7]
    outputs = [*node.output, *([""] * 4)][:4]
    attributes = {a.name: a for a in node.attribute}
    if index.consumers.get(outputs[3]) or outputs[3] in index.outputs:
        raise Unsupported("scores-used", f"the scores or weights '{outputs[3]}' are given out and used")
    counts = _integer(attributes, "q_num_heads", 0), _integer(attributes, "kv_num_heads", 0)
    past = (inputs[4], inputs[5])
    if any(past) != all(past):
        raise Unsupported("kv-cache", "the node has one of past_key and past_value")
    operands = find_operands(index, world, node, counts)
    if not any((*past, outputs[1], outputs[2])):
        operands = before_repeats(index, world, node, operands)
    sizes = find_sizes(world, operands, past)
    cache = _cache(index, past, (outputs[1], outputs[2]))
    facts = _mask(world, node, inputs, analyse, operands, sizes)
    left, right = _integer(attributes, "left_window_size", -1), _integer(attributes, "right_window_size", -1)
    causal = bool(_integer(attributes, "is_causal", 0))
    ends = _ends(world, inputs, cache, sizes, moves=causal or left >= 0 or right >= 0)
    says = ", ".join(f"{a.name} = {a.i}" for a in node.attribute
                     if a.name in ("is_causal", "left_window_size", "right_window_size"))  # fmt: skip
    # Rows whose keys are all hidden by -inf are zero. What a float mask of the input hides with is not known.
    certain = all(isinf(f) for f in facts.fills) and not any(p.additive for p in facts.parts if p.kind != "bias")
    facts = replace(facts, masked_rows="zero" if certain else facts.masked_rows, ends=ends)
    facts = with_frontier(facts, sizes, left, 0 if causal else right, says)
    scale = attributes["scale"].f if "scale" in attributes else 1.0 / sqrt(sizes.head_dim)
    softcap = attributes["softcap"].f if "softcap" in attributes else 0.0
    if not softcap >= 0.0 or isinf(softcap):
        raise Unsupported("softcap", f"the attribute softcap is {softcap}")
    dtype = dtype_name(world, operands.query.value)
    precision = _integer(attributes, "softmax_precision", 0)
    kept = {operands.output.value, *((cache.present_key, cache.present_value) if cache else ())}
    return AttentionSite(
        id="", form=FORM, query=operands.query, key=operands.key, value=operands.value, output=operands.output,
        batch=sizes.batch, heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        value_dim=sizes.value_dim, query_length=sizes.queries, key_length=sizes.keys,
        scale=number("scale", scale), mask=facts, softcap=softcap, dtype=dtype,
        softmax_dtype=_PRECISION.get(precision, dtype) if precision else dtype,
        nodes=(node_name(node), *(node_name(n) for n in operands.around)),
        interior=tuple(o for n in (node, *operands.around) for o in n.output if o and o not in kept),
        cache=cache or find_cache(index, world, operands.key, operands.value),
    )  # fmt: skip


def _integer(attributes: dict[str, AttributeProto], name: str, default: int) -> int:
    return int(attributes[name].i) if name in attributes else default


def _cache(index: GraphIndex, past: tuple[str, str], present: tuple[str, str]) -> Cache | None:
    """The cache inside the node; None where it has neither past nor a present that somebody reads."""
    read = [p if p and (index.consumers.get(p) or p in index.outputs) else "" for p in present]
    return Cache("operator", past[0], past[1], read[0], read[1]) if any((*past, *read)) else None


def _mask(
    world: World, node: NodeProto, inputs: list[str], analyse: MaskAnalysis, operands: Operands, sizes: Sizes
) -> MaskFacts:
    """What ``attn_mask`` is."""
    mask = inputs[3]
    factors: tuple[MaskFactor, ...] = ()
    if mask:
        shape = world.shapes.get(mask)
        if shape is None:
            raise Unsupported("shape-unknown", f"the shape of the mask '{mask}' is not known")
        if len(shape) > 4:
            raise Unsupported("mask-shape", f"the mask '{mask}' has shape {list(shape)}")
        # Beside nonpad_kv_seqlen a shorter mask ends where the longest batch entry's keys end, or later.
        if shape and shape[-1] != sizes.keys and (shape[-1] == 1 or not inputs[6]):
            raise Unsupported("short-mask", f"the mask '{mask}' has {shape[-1]} columns for {sizes.keys} keys")
        factors = (MaskFactor("visible" if world.types.get(mask) == 9 else "add", mask, float("-inf"), True, 1.0),)
    return analyse(
        MaskQuery(
            factors, True, operands.query.value, operands.key.value,
            operands.query.layout.index("N"), operands.key.layout.index("N"), sizes.queries, sizes.keys,
        )
    )  # fmt: skip


def _ends(world: World, inputs: list[str], cache: Cache | None, sizes: Sizes, moves: bool) -> KeyEnds | None:
    """``nonpad_kv_seqlen``; ``moves``: an attribute's triangle or window is aligned at it."""
    lengths = inputs[6]
    if not lengths:
        return None
    if cache is not None:
        raise Unsupported("kv-cache", "nonpad_kv_seqlen beside a cache inside the node has no meaning")
    if world.shapes.get(lengths) != (sizes.batch,):
        raise Unsupported("mask-shape", f"nonpad_kv_seqlen '{lengths}' is not one number for each batch entry")
    return KeyEnds(lengths, 0, "ends" if moves else "sequence")
