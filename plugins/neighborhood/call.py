"""What a function body is generated for: the sizes and types of one call site. Free of the site's place in a graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attncompile.core.site import AttentionSite, Layout


@dataclass(frozen=True, slots=True)
class Call:
    """``query_length``/``key_length`` are None when dynamic; ``self_attention`` says that they are always equal.

    ``layouts`` are those of query, key, value and output. ``block`` is the largest number of queries in one tile;
    sequences with Nq * Nk <= dense_below ** 2 take a dense branch (0: there is no such branch). ``bias`` says that
    something broadcastable to [B, H, Nq, Nk] is added to the scores, ``sinks`` that a logit for each head joins them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    dtype: str
    softmax_dtype: str
    layouts: tuple[Layout, Layout, Layout, Layout]
    query_length: int | None
    key_length: int | None
    self_attention: bool
    key_mask: bool
    block: int
    dense_below: int
    opset: int
    bias: bool = False
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    def configuration(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(site: AttentionSite, opset: int, block: int, dense_below: int) -> Call:
        nq, nk = site.query_length, site.key_length
        return Call(
            heads=site.heads,
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            value_dim=site.value_dim,
            scale=site.scale,
            dtype=site.dtype,
            softmax_dtype=site.softmax_dtype,
            layouts=(site.query.layout, site.key.layout, site.value.layout, site.output.layout),
            query_length=nq if isinstance(nq, int) else None,
            key_length=nk if isinstance(nk, int) else None,
            self_attention=nq == nk,
            key_mask=site.mask.part("padding") is not None,
            block=block,
            dense_below=dense_below,
            opset=opset,
            bias=any(p.kind == "bias" and p.counts is None for p in site.mask.parts),
            sinks=bool(site.sinks),
        )
