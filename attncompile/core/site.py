"""An attention site: what the graph says, and nothing that was decided about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from attncompile.core.grid import TokenGrid
from attncompile.core.linear import LinearFacts
from attncompile.core.mask import MaskFacts

Dim = int | str
"""A dimension: a number, or the graph's symbol (or an expression of symbols) for a dynamic one."""

Layout = Literal["BNHD", "BHND", "BHDN"]
"""Axis order of a rank-4 operand: batch, sequence, heads, head dim. BHDN is found around linear attention alone."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A rank-4 graph value that holds Q, K, V or the output, and the order of its axes."""

    value: str
    layout: Layout


Need = Literal["sinks", "head-scale", "log-sum-exp", "cache", "linear", "quantised", "body", "key-ends",
               "head-mask", "key-counts", "token-padding"]  # fmt: skip
"""What a site may have beyond softmax(scale * Q K^T + mask) V in the main graph. A mechanism that does not say that it
understands a need is never offered a site with it."""

NEED_WORDS: dict[Need, str] = {
    "sinks": "attention sinks", "head-scale": "a scale for each head", "log-sum-exp": "a log-sum-exp output",
    "cache": "a KV cache inside the operator", "linear": "linear attention", "quantised": "quantised operands",
    "body": "the body of an If, Loop or Scan", "key-ends": "a number of keys for each batch entry",
    "head-mask": "a mask of its own in each head", "key-counts": "keys that count more than once",
    "token-padding": "padding of tokens, as an input says it",
}  # fmt: skip
"""Each need in words for people."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A KV cache. ``concat`` and ``scatter`` stand before the site, whose key and value operands are the whole cache;
    ``operator``: the operator that is the site joins ``past_key`` and ``past_value`` with its operands, which are
    the new keys and values alone. Names are graph values, empty where the graph does not have one.
    """

    form: Literal["concat", "scatter", "operator"]
    past_key: str = ""
    past_value: str = ""
    present_key: str = ""
    present_value: str = ""


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """softmax(scale * Q K^T + mask) V, found in the graph.

    Q has ``heads`` heads, K and V ``kv_heads`` (each serves heads / kv_heads consecutive query heads). ``scale``
    multiplies the product of the operands as named here, so scales that the exporter put on Q or K upstream of the
    operand are not in it. ``nodes`` are the names (``op_type:output`` for unnamed nodes) of all nodes between the
    operands and the output, which a replacement makes dead unless someone else reads them (never the scores or the
    weights); ``interior`` holds their output values, unique in the graph. ``dtype`` is the operands' ONNX element
    type in lower case (``float32``), ``softmax_dtype`` that of the softmax. ``query_length`` and ``key_length`` are
    numbers or the graph's symbols. ``scope`` names the body that holds the site (``If 'name'/then_branch``, outer ones
    first), empty for the main graph and for what local functions were inlined to; names of values are those seen there.
    """

    id: str
    form: str
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    batch: Dim
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    query_length: Dim
    key_length: Dim
    scale: float
    mask: MaskFacts
    dtype: str
    softmax_dtype: str
    nodes: tuple[str, ...]
    interior: tuple[str, ...]
    softcap: float = 0.0
    grid: TokenGrid | None = None
    scope: str = ""
    kind: Literal["softmax", "linear"] = "softmax"
    sinks: str = ""
    head_scale: str = ""
    log_sum_exp: str = ""
    cache: Cache | None = None
    linear: LinearFacts | None = None
    quantised: str = ""

    @property
    def needs(self) -> frozenset[Need]:
        """What a mechanism has to understand before it may take the site."""
        has: dict[Need, object] = {
            "sinks": self.sinks, "head-scale": self.head_scale, "log-sum-exp": self.log_sum_exp,
            "cache": self.cache is not None and self.cache.form == "operator", "linear": self.kind == "linear",
            "quantised": self.quantised, "body": self.scope, "key-ends": self.mask.ends,
            "head-mask": self.mask.by_head, "key-counts": self.mask.counts is not None,
            "token-padding": any(p.tokens for p in self.mask.parts),
        }  # fmt: skip
        return frozenset(need for need, present in has.items() if present)

    def to_json(self) -> dict[str, Any]:
        """The object of ``inspect --format json``; keys may be added, never renamed."""
        return {
            "id": self.id, "scope": self.scope, "kind": self.kind, "form": self.form, "heads": self.heads,
            "kv_heads": self.kv_heads, "head_dim": self.head_dim, "value_dim": self.value_dim, "batch": self.batch,
            "query_length": self.query_length, "key_length": self.key_length, "scale": self.scale,
            "softcap": self.softcap, "mask": self.mask.to_json(), "dtype": self.dtype,
            "softmax_dtype": self.softmax_dtype, "grid": self.grid.to_json() if self.grid else None,
            "query": self.query.value, "key": self.key.value, "value": self.value.value,
            "layouts": [self.query.layout, self.key.layout, self.value.layout, self.output.layout],
            "nodes": list(self.nodes), "output": self.output.value, "sinks": self.sinks or None,
            "head_scale": self.head_scale or None, "log_sum_exp": self.log_sum_exp or None,
            "cache": asdict(self.cache) if self.cache else None,
            "linear": self.linear.to_json() if self.linear else None, "quantised": self.quantised or None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A node that looked like attention and was not taken, with the reason."""

    node: str
    reason: str
    nearest_form: str
    code: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"node": self.node, "reason": self.reason, "nearest_form": self.nearest_form, "code": self.code}


@dataclass(frozen=True, slots=True)
class Detection:
    """What a detector found in one model."""

    sites: tuple[AttentionSite, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
