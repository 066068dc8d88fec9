"""An attention site: what the graph says, and nothing that was decided about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attncompile.core.grid import TokenGrid
from attncompile.core.mask import MaskFacts

Dim = int | str
"""A dimension: a number, or the graph's symbol (or an expression of symbols) for a dynamic one."""

Layout = Literal["BNHD", "BHND"]
"""Axis order of a rank-4 operand: batch, sequence, heads, head dim."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A rank-4 graph value that holds Q, K, V or the output, and the order of its axes."""

    value: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """softmax(scale * Q K^T + mask) V, found in the graph.

    Q has ``heads`` heads, K and V ``kv_heads`` (each serves heads / kv_heads consecutive query heads). ``scale``
    multiplies the product of the operands as named here, so scales that the exporter put on Q or K upstream of the
    operand are not in it. ``nodes`` are the names (``op_type:output`` for unnamed nodes) of all nodes between the
    operands and the output, which a replacement makes dead unless someone else reads them (never the scores or the
    weights); ``interior`` holds their output values, unique in the graph. ``dtype`` is the operands' ONNX element
    type in lower case (``float32``), ``softmax_dtype`` that of the softmax. ``query_length`` and ``key_length`` are
    numbers or the graph's symbols.
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
            "nodes": list(self.nodes), "output": self.output.value,
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
