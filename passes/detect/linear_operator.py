"""The standard ``LinearAttention`` operator (opset 27)."""

from __future__ import annotations

from math import sqrt
from typing import Literal

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.linear import LinearFacts
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.operators import find_operands, find_sizes
from attncompile.passes.detect.softmax import MaskAnalysis, dtype_name
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

FORM = "linear-attention-op"

_RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}
"""update_rule -> (decays, takes off what the key reads out)."""


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site that a ``LinearAttention`` node is.

    Inputs: query, key, value [batch, length, heads * dim], past_state, decay, beta; outputs: output, present_state.

    Raises:
        Unsupported: attributes or inputs that contradict one another.
        NotSeparate: operands that are not reshaped from, and to, rank 4.
    """
    inputs, outputs = [*node.input, *([""] * 6)][:6], [*node.output, ""][:2]
    attributes = {a.name: a for a in node.attribute}
    rule = attributes["update_rule"].s.decode() if "update_rule" in attributes else "gated_delta"
    if rule not in _RULES:
        raise Unsupported("update-rule", f"the update rule '{rule}' is not known")
    decays, delta = _RULES[rule]
    if (decays and not inputs[4]) or (delta and not inputs[5]):
        raise Unsupported("update-rule", f"the update rule '{rule}' needs an input that is not there")
    counts = (attributes["q_num_heads"].i, attributes["kv_num_heads"].i)
    operands = find_operands(index, world, node, counts)
    sizes = find_sizes(world, operands, ("", ""))
    scale = attributes["scale"].f if "scale" in attributes else 0.0
    present = outputs[1] if index.consumers.get(outputs[1]) or outputs[1] in index.outputs else ""
    kept = {operands.output.value, present}
    certificate = Certificate("attribute", "LinearAttention is causal", general=True)
    dtype = dtype_name(world, operands.query.value)
    nodes = (node, *operands.around)
    return AttentionSite(
        id="", form=FORM, query=operands.query, key=operands.key, value=operands.value, output=operands.output,
        batch=sizes.batch, heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        value_dim=sizes.value_dim, query_length=sizes.queries, key_length=sizes.keys,
        scale=scale or 1.0 / sqrt(sizes.head_dim), kind="linear",
        mask=MaskFacts((MaskPart("causal", certificate, -1, 0),), "zero"), dtype=dtype, softmax_dtype=dtype,
        nodes=tuple(node_name(n) for n in nodes),
        interior=tuple(o for n in nodes for o in n.output if o and o not in kept),
        linear=LinearFacts(
            "identity", "identity", "none", 0.0, True, "operator",
            decay=_decay(world, inputs[4], sizes.kv_heads, sizes.head_dim) if decays else "none",
            decay_source=inputs[4] if decays else "", update="delta" if delta else "sum",
            update_source=inputs[5] if delta else "", past_state=inputs[3], present_state=present,
        ),
    )  # fmt: skip


def _decay(world: World, value: str, heads: int, dim: int) -> Literal["token", "channel"]:
    shape = world.shapes.get(value)
    if shape is None or len(shape) != 3 or shape[2] not in (heads, heads * dim):
        raise Unsupported("layout", f"the decay '{value}' {list(shape or ())} is not one number for each key head, or "
                          "for each of its channels")  # fmt: skip
    return "channel" if shape[2] == heads * dim and dim > 1 else "token"
