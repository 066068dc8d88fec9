"""``LinearAttention``: linear attention as a state op and an op that reads it, exact for the site as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.body import float_type
from attncompile.plugins.linear_attention import causal
from attncompile.plugins.linear_attention.causal import CAUSAL_CHUNK, CHANNEL_CHUNK
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.linear_attention.function import function, node
from attncompile.plugins.linear_attention.kernel import CHANNEL_CHUNKS, preferred_chunk, whole_chunk
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES, register
from attncompile.plugins.linear_attention.reference import reference
from attncompile.plugins.linear_attention.site import facts_of, form_of, head_decays, sizes_of


class LinearAttention:
    """Parameters: ``chunk`` (int): tokens of a chunk. Without a triangle 0 makes the state in one piece; more pieces
    are for GPUs, where few heads would leave multiprocessors idle.
    """

    name = "LinearAttention"
    skips_keys = False
    understands: frozenset[Need] = frozenset({"linear", "body"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        if site.kind != "linear":
            return ()  # nothing that a reader of refusals would ask for
        try:
            parameters = {"chunk": chunk_of(site)}
        except Unsupported as error:
            return (Verdict.of(error),)
        exact = self.is_exact_for(site, parameters)
        if not exact.ok:
            return (exact,)
        return (Candidate(self.name, parameters, True, _reason(site, parameters)),)

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        return ()

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            form = _form(site, parameters)
            if form.decay == "head":
                head_decays(site)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("linear attention")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
        for part in site.mask.parts:
            if not part.certificate.general and not static:
                return Verdict.no(
                    "certificate", f"the {part.kind} mask was shown for some lengths only and the length is dynamic"
                )
        return Verdict.yes("the same products and sums, in the state's order")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Two products with the state for every token; in a triangle also scores inside of chunks."""
        form = _form(site, parameters)
        tokens = shape.batch * (shape.key_length * site.kv_heads + shape.query_length * site.heads)
        flops = 2.0 * tokens * site.head_dim * site.value_dim
        if not form.causal:
            return Cost(flops, 0.0, 0.0)
        scores = float(shape.batch * site.heads * shape.query_length * form.chunk)
        chunks = -(-shape.key_length // form.chunk)
        states = float(shape.batch * site.kv_heads * chunks * site.head_dim * site.value_dim)
        wide = site.head_dim if form.decay == "channel" else 1
        if form.delta:  # pairs of keys once more, their inverse by halves, and what it multiplies
            flops += 2.0 * scores * (site.head_dim + site.value_dim + 12 * form.tile)
        return Cost(flops + 2.0 * scores * (site.head_dim + site.value_dim), form.chunk, wide * scores + states)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        return reference(q, k, v, parameters, **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def for_kernels(self, site: AttentionSite, parameters: Parameters) -> Parameters:
        """Chunks as long as the kernels like them, under a triangle: how many tokens lie between two states says
        nothing about the result. Where the batch is not known it is taken for 1.
        """
        facts = facts_of(site)
        if not facts.causal or not isinstance(site.key_length, int):
            return parameters
        batch = site.batch if isinstance(site.batch, int) else 1
        chunk = preferred_chunk(facts.decay, batch * site.heads, site.key_length, site.value_dim)
        longest = max(chunk, parameters.get("chunk", 0))
        if facts.decay == "channel":  # a plan's may be longer than a tile
            longest = min(longest, CHANNEL_CHUNKS[-1])
        return {**parameters, "chunk": longest}

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no, or for an opset without a body."""
        register()
        form, sizes = _form(site, parameters), sizes_of(site, opset)
        writer = _Writer(site, form, sizes)
        return writer.causal() if form.causal else writer.plain()


def chunk_of(site: AttentionSite) -> int:
    """Tokens of a chunk: what a body likes under a triangle; else as many chunks as fill a GPU, of equal length."""
    facts = facts_of(site)
    if facts.causal:
        return causal.chunk_of(site.key_length, CHANNEL_CHUNK if facts.decay == "channel" else CAUSAL_CHUNK)
    if not isinstance(site.key_length, int) or not isinstance(site.batch, int):
        return 0
    return whole_chunk(site.batch, site.kv_heads, site.key_length, site.head_dim, site.value_dim)


def _form(site: AttentionSite, parameters: Parameters) -> Form:
    unknown = sorted(set(parameters) - {"chunk"})
    chunk = parameters.get("chunk", 0)
    if unknown or not isinstance(chunk, int) or isinstance(chunk, bool):
        raise Unsupported("parameters", f"LinearAttention has no parameter {', '.join(unknown) or repr(chunk)}",
                          "chunk, a number of tokens")  # fmt: skip
    return form_of(site, chunk)


def _reason(site: AttentionSite, parameters: Parameters) -> str:
    facts = facts_of(site)
    if not facts.causal:
        pieces = f", in chunks of {parameters['chunk']}" if parameters["chunk"] else ""
        return f"the state of all keys, read by each query{pieces}"
    decay = "" if facts.decay == "none" else f", one decay a {facts.decay}"
    return f"states between chunks of {parameters['chunk']}, scores inside{decay}"


class _Writer:
    """The nodes of one site, their functions and their constants."""

    def __init__(self, site: AttentionSite, form: Form, sizes: Sizes) -> None:
        self.site, self.form, self.sizes = site, form, sizes
        self.prefix = f"linear/{site.id or site.output.value}"
        self.nodes: list[NodeProto] = []
        self.functions: list[FunctionProto] = []
        self.stored: list[TensorProto] = []
        self.operands = {"query": site.query.value, "key": site.key.value, "value": site.value.value}

    def value(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def op(self, op_type: str, inputs: dict[str, str], outputs: dict[str, str], sizes: Sizes | None = None) -> None:
        name, sizes = f"{op_type}/{self.site.id or self.site.output.value}", sizes or self.sizes
        self.nodes.append(node(op_type, self.form, sizes, inputs, outputs, name))
        self.functions.append(function(op_type, self.form, sizes, inputs, outputs))

    def lowering(self) -> Lowering:
        return Lowering(tuple(self.nodes), tuple(self.functions), tuple(self.stored))

    def plain(self) -> Lowering:
        form = self.form
        kept = ["state", *(["total"] if form.sums or form.tops else []), *(["mean"] if form.means else [])]
        made = {n: self.value(n) for n in kept}
        # An output in the middle cannot be left out: the mean stands before the tops.
        tops = {n: self.value(n) for n in ("mean", "top")} if form.tops else {}
        self.op(STATE, {n: self.operands[n] for n in ("key", "value")}, made | tops)
        if form.combined:
            whole = {n: self.value(f"whole_{n}") for n in kept if not (form.tops and n == "total")}
            self.op(COMBINE, made | {n: v for n, v in tops.items() if n == "top"},
                    {f"whole_{n}": v for n, v in whole.items()})  # fmt: skip
            made = whole
        read = {n: v for n, v in made.items() if n != "total" or form.sums}
        self.op(APPLY, {"query": self.operands["query"], **read}, {"output": self.site.output.value})
        return self.lowering()

    def causal(self) -> Lowering:
        decay = self._decay()
        facts = facts_of(self.site)
        first = {}
        if facts.past_state:  # of any float type: states are wide
            first = {"initial_state": self.value("initial_state")}
            self.nodes.append(helper.make_node(
                "Cast", [facts.past_state], [first["initial_state"]], name=first["initial_state"],
                to=float_type(self.sizes.state_type)[0],
            ))  # fmt: skip
        if facts.update == "delta":
            return self._delta(decay, first)
        made = {n: self.value(n) for n in ("state", *(["total"] if self.form.sums else []))}
        self.op(STATES, {n: self.operands[n] for n in ("key", "value")} | decay | first, made)
        self.op(OUTPUT, {**self.operands, **made, **decay}, {"output": self.site.output.value})
        return self.lowering()

    def _delta(self, decay: dict[str, str], initial: dict[str, str]) -> Lowering:
        """What the keys write is the value of the op that reads, in a layout of its own."""
        made = {n: self.value(n) for n in ("written", "state")}
        solved = {"solved": self.value("solved")}
        self.op(SOLVE, {"key": self.operands["key"], "beta": facts_of(self.site).update_source} | decay, solved)
        self.op(DELTA, {n: self.operands[n] for n in ("key", "value")} | solved | decay | initial, made)
        q, k, _, o = self.sizes.layouts
        given = {**self.operands, "value": made["written"], "state": made["state"], **decay}
        self.op(OUTPUT, given, {"output": self.site.output.value}, replace(self.sizes, layouts=(q, k, "BNHD", o)))
        return self.lowering()

    def _decay(self) -> dict[str, str]:
        facts = facts_of(self.site)
        if self.form.decay == "none":
            return {}
        if self.form.decay == "head":
            name = self.value("log_decay")
            self.stored.append(
                numpy_helper.from_array(np.array(head_decays(self.site), float_type(self.sizes.state_type)[1]), name)
            )
            return {"log_decay": name}
        if self.form.decay == "token":
            return {"log_decay": facts.decay_source}
        name, shape = self.value("log_decay"), self.value("log_decay_shape")
        axes = np.array([0, 0, self.sizes.kv_heads, self.sizes.head_dim], np.int64)
        self.stored.append(numpy_helper.from_array(axes, shape))
        self.nodes.append(helper.make_node("Reshape", [facts.decay_source, shape], [name], name=name))
        return {"log_decay": name}
