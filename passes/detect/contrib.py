"""Whole attention in one operator of ONNX Runtime's own domain, ``com.microsoft``.

Lifted where query, key and value are values of the graph and the operator does nothing to them; one that holds
projections, biases or packed operands is ``Fused``: a site once it is written out (``passes/written_out.py``). What
each does was read from its documentation and compared with ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, KeyEnds, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite, Cache
from attncompile.passes.detect.fused import Fused, check_attention, check_packed_groups, packed_or_biased
from attncompile.passes.detect.operators import Operands, Sizes, find_operands, find_sizes, number, with_frontier
from attncompile.passes.detect.softmax import MaskAnalysis, MaskFactor, MaskQuery, dtype_name
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

DOMAIN = "com.microsoft"

_PROJECTED = "its projections lie inside: its queries, keys and values are not values of the graph"
_PACKED = "its batch entries lie one after another without padding"

KEPT: Mapping[str, str] = {
    "DecoderAttention": _PROJECTED,
    "DecoderMaskedSelfAttention": _PROJECTED,
    "LongformerAttention": _PROJECTED,
    "QOrderedLongformerAttention": f"quantised, and {_PROJECTED}",
    "QAttention": f"quantised, and {_PROJECTED}",
    "QOrderedAttention": f"quantised, and {_PROJECTED}",
    "PackedAttention": f"{_PROJECTED}, and {_PACKED}",
    "PackedMultiHeadAttention": _PACKED,
    "PagedAttention": "its keys lie in pages of a cache",
    "SparsePagedAttention": "its keys lie in pages of a cache",
    "DynamicSparseAttention": "an input chooses the keys of each query",
    "SparseAttention": "its mask is a list of blocks for each head",
    "DecoderMaskedMultiHeadAttention": "it decodes one token over a cache that its past and its present share",
}
"""Operators that are kept, and why."""

NAMES = ("Attention", "MultiHeadAttention", "GroupQueryAttention", *KEPT)


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site that a ``MultiHeadAttention`` or ``GroupQueryAttention`` node is.

    Raises:
        Fused: it is one once it is written out, as ``Attention`` always is.
        Unsupported: every other operator, and what these do that a site cannot say.
    """
    if node.op_type == "Attention":
        return _Lifter(index, world, node, analyse).projected()
    if node.op_type == "MultiHeadAttention":
        return _Lifter(index, world, node, analyse).multi_head()
    if node.op_type == "GroupQueryAttention":
        return _Lifter(index, world, node, analyse).grouped()
    code = "quantised" if KEPT[node.op_type].startswith("quantised") else "fused-op"
    raise _kept(node, KEPT[node.op_type], code)


def _kept(node: NodeProto, reason: str, code: str = "fused-op") -> Unsupported:
    words = f"quantised: kept ({node.domain}.{node.op_type}: " if code == "quantised" else ""
    if words:
        return Unsupported(code, words + reason.removeprefix("quantised, and ") + ")")
    return Unsupported(code, f"kept: {reason} ({node.domain}.{node.op_type})")


class _Lifter:
    """One node and what it says."""

    def __init__(self, index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> None:
        self.index, self.world, self.node, self.analyse = index, world, node, analyse
        self.attributes = {a.name: a for a in node.attribute}
        self.input = [*node.input, *([""] * 20)]
        self.output = [*node.output, *([""] * 4)][:4]

    def projected(self) -> AttentionSite:
        """Always raises: ``Fused`` where the projections can be written out."""
        self._check(lambda: check_attention(self.world, self.node))
        raise self._fused(_PROJECTED)

    def _check(self, check: Callable[[], object]) -> None:
        """Runs ``check``; what stands against writing out is why the operator is kept."""
        try:
            check()
        except Unsupported as error:
            raise _kept(self.node, error.message, error.code) from None

    def _fused(self, reason: str) -> Fused:
        self._check_scores()
        return Fused(_kept(self.node, reason).message, next(o for o in self.output if o))

    def multi_head(self) -> AttentionSite:
        """Inputs: query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value, ..."""
        if any(self.input[8:]):
            raise _kept(self.node, "its past and present caches share one buffer, or an input chooses its beams")
        inside: list[str] = []
        self._check(lambda: inside.extend(packed_or_biased(self.world, self.node)))
        if inside:
            raise self._fused(", and ".join(inside))
        heads = self._int("num_heads", 0)
        operands, sizes, cache = self._operands((heads, heads), 6)
        facts = self._bias(self.input[5], operands, sizes)
        facts = self._key_padding(facts, sizes)
        if self._int("unidirectional", 0):
            if sizes.queries != sizes.new_keys:
                raise _kept(self.node, "unidirectional over more or fewer keys than queries is one thing in its "
                            "documentation and another in its kernels")  # fmt: skip
            facts = with_frontier(facts, sizes, -1, 0, "unidirectional = 1")
        return self._site(operands, sizes, cache, facts)

    def grouped(self) -> AttentionSite:
        """Inputs: query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache,
        position_ids, attention_bias, head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight, query_seqlens.
        """
        inside = (
            (self._int("do_rotary", 0), "it rotates queries and keys (RoPE) inside"),
            (self._int("smooth_softmax", 0), "its softmax has a sink of zero, which is no value of the graph"),
            (self._int("sliding_window_cache", 0), "its cache holds the last window only"),
            (self.input[12] or self.input[13], "quantised, and its cache is stored in fewer bits"),
            (self.input[14] or self.input[15], "it normalises queries and keys inside"),
            (self.input[16], "an input says how many of its queries are padding"),
        )
        for found, reason in inside:
            if found:
                raise _kept(self.node, reason, "quantised" if reason.startswith("quantised") else "fused-op")
        if not self.input[1] or not self.input[2]:
            self._check(lambda: check_packed_groups(self.world, self.node))
            raise self._fused("queries, keys and values lie in one packed tensor")
        operands, sizes, cache = self._operands((self._int("num_heads", 0), self._int("kv_num_heads", 0)), 3)
        if sizes.queries != sizes.new_keys:
            raise Unsupported("layout", "queries and new keys differ in number")
        if self.world.shapes.get(self.input[5]) not in ((sizes.batch,), (sizes.batch, 1)):
            raise Unsupported("mask-shape", f"seqlens_k '{self.input[5]}' is not one number for each batch entry")
        facts = self._bias(self.input[10], operands, sizes)
        ends = KeyEnds(self.input[5], 1, "ends-or-start")
        facts = replace(facts, ends=ends)
        window = self._int("local_window_size", -1)
        says = "causal" + (f", local_window_size = {window}" if window > 0 else "")
        bounds = (window - 1 if window > 0 else -1, 0) if self._int("causal", 1) else (-1, -1)
        facts = with_frontier(facts, sizes, *bounds, says)
        softcap = self.attributes["softcap"].f if "softcap" in self.attributes else 0.0
        site = self._site(operands, sizes, cache, facts)
        return replace(site, softcap=softcap, sinks=self.input[11])

    def _check_scores(self) -> None:
        if self.index.consumers.get(self.output[3]) or self.output[3] in self.index.outputs:
            raise Unsupported("scores-used", f"the scores or weights '{self.output[3]}' are given out and used")

    def _int(self, name: str, default: int) -> int:
        return int(self.attributes[name].i) if name in self.attributes else default

    def _operands(self, heads: tuple[int, int], past_at: int) -> tuple[Operands, Sizes, Cache | None]:
        self._check_scores()
        past = (self.input[past_at], self.input[past_at + 1])
        if any(past) != all(past):
            raise Unsupported("kv-cache", "the node has one of past_key and past_value")
        operands = find_operands(self.index, self.world, self.node, heads)
        sizes = find_sizes(self.world, operands, past)
        if (sizes.heads, sizes.kv_heads) != heads:
            raise Unsupported("layout", f"the operands have {sizes.heads} and {sizes.kv_heads} heads, not {heads}")
        present = [p if self.index.consumers.get(p) or p in self.index.outputs else "" for p in self.output[1:3]]
        found = any((*past, *present))
        return operands, sizes, Cache("operator", *past, *present) if found else None

    def _bias(self, bias: str, operands: Operands, sizes: Sizes) -> MaskFacts:
        """What ``attention_bias`` is: added to the scores."""
        shape = self.world.shapes.get(bias)
        if bias and (shape is None or len(shape) != 4 or shape[3] != sizes.keys):
            raise Unsupported("mask-shape", f"attention_bias '{bias}' {list(shape or ())} is not one number a score")
        factors = (MaskFactor("add", bias, float("-inf"), True, 1.0),) if bias else ()
        return self.analyse(
            MaskQuery(
                factors, False, operands.query.value, operands.key.value,
                operands.query.layout.index("N"), operands.key.layout.index("N"), sizes.queries, sizes.keys,
            )
        )  # fmt: skip

    def _key_padding(self, facts: MaskFacts, sizes: Sizes) -> MaskFacts:
        """MultiHeadAttention's mask of integers for each query: a number is added to the score where it is 0."""
        mask = self.input[4]
        if not mask:
            return facts
        filter_value = self.attributes["mask_filter_value"].f if "mask_filter_value" in self.attributes else -10000.0
        shape = self.world.shapes.get(mask)
        if shape != (sizes.batch, sizes.queries, sizes.keys):
            raise Unsupported("mask-shape", f"key_padding_mask '{mask}' has shape {list(shape or ())}")
        detail = f"integers [batch, queries, keys]: {filter_value} is added to the scores where they are 0"
        part = MaskPart("opaque", Certificate("structure", detail), source=mask)
        fills = (*facts.fills, filter_value)
        return replace(facts, parts=(*facts.parts, part), masked_rows="uniform", fills=fills)

    def _site(self, operands: Operands, sizes: Sizes, cache: Cache | None, facts: MaskFacts) -> AttentionSite:
        scale = self.attributes["scale"].f if "scale" in self.attributes else 0.0
        dtype = dtype_name(self.world, operands.query.value)
        kept = {operands.output.value, *((cache.present_key, cache.present_value) if cache else ())}
        nodes = (self.node, *operands.around)
        return AttentionSite(
            id="", form=f"attention-op {DOMAIN}.{self.node.op_type}", query=operands.query, key=operands.key,
            value=operands.value, output=operands.output, batch=sizes.batch, heads=sizes.heads,
            kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, value_dim=sizes.value_dim, query_length=sizes.queries,
            key_length=sizes.keys, scale=number("scale", scale or 1.0 / sqrt(sizes.head_dim)), mask=facts, dtype=dtype,
            softmax_dtype="float32" if dtype == "float16" else dtype, nodes=tuple(node_name(n) for n in nodes),
            interior=tuple(o for n in nodes for o in n.output if o and o not in kept), cache=cache,
        )  # fmt: skip
