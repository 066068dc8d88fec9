"""What is measured, and what is asked of it: the ratio of a peer's time to ours that each case must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from lists import arrays, kept

from attncompile.core.kernel import OpCall


@dataclass(frozen=True)
class Case:
    """One call at one size. ``wanted``: least time of a peer over ours; ``flex`` is FlexAttention on tokens as they
    stand. ``bound``: at most this times the touched keys at our dense rate. ``density`` of a causal case of lists.
    """

    name: str
    op: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float16"
    bound: float | None = None
    density: float | None = None
    note: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Types of ``bias`` [H, N, N] and ``key_mask`` [B, 1, 1, N], whose values are drawn."""

    @property
    def grid(self) -> tuple[int, ...] | None:
        return tuple(self.attributes["grid"]) if "grid" in self.attributes else None

    @property
    def causal(self) -> bool:
        if self.op != "Attention":
            return self.density is not None
        return self.attributes.get("right") == 0 and self.attributes.get("left", -1) < 0

    @property
    def kept(self) -> np.ndarray | None:
        """Bool [heads, R, R], where lists say which blocks are met."""
        return None if self.density is None else kept(self.heads, self.tokens, self.attributes["block"], self.density)

    def lists(self) -> dict[str, np.ndarray]:
        """Inputs beside the operands, by their formal names."""
        return {} if self.kept is None else arrays(self.kept, self.attributes["block"])

    def drawn(self) -> dict[str, tuple[int, ...]]:
        """Shapes of ``inputs``."""
        known = {"bias": (self.heads, self.tokens, self.tokens), "key_mask": (self.batch, 1, 1, self.tokens)}
        return {name: known[name] for name in self.inputs}

    def call(self) -> OpCall:
        sizes = {"batch": self.batch, "query_length": self.tokens, "key_length": self.tokens}
        shapes = {name: x.shape for name, x in self.lists().items()}
        inputs = {**dict.fromkeys(shapes, "int32"), **self.inputs}
        return OpCall(
            self.op,
            self.dtype,
            self.heads,
            self.kv_heads,
            self.dim,
            self.dim,
            attributes=dict(self.attributes),
            inputs=inputs,
            shapes={**shapes, **self.drawn()},
            **sizes,
        )


def dense(name: str, b: int, h: int, n: int, d: int, wanted: float, note: str = "", **more: Any) -> Case:
    return Case(name, "Attention", b, h, more.pop("kv_heads", h), n, d, more, {"cudnn": wanted}, note=note)


def grid(
    name: str, b: int, h: int, d: int, shape: tuple[int, ...], kernel: tuple[int, ...], note: str = "",
    stride: tuple[int, ...] | None = None, bound: float | None = None, **wanted: float,
) -> Case:  # fmt: skip
    attributes = {"grid": list(shape), "kernel_size": list(kernel), "border": "clamp"}
    if stride is not None:
        attributes["stride"] = list(stride)
    return Case(name, "NeighborhoodAttention", b, h, h, prod(shape), d, attributes, wanted, bound=bound, note=note)


def listed(block: int, density: float, rate: float, **wanted: float) -> Case:
    """``rate``: the least share of our dense rate on the blocks that are kept."""
    attributes = {"block": block, "masked_rows": "zero", "scale": 128**-0.5}
    name = f"lists-{block}-causal-32768-{density:g}"
    return Case(
        name, "BlockSparseAttention", 1, 32, 32, 32768, 128, attributes, wanted, bound=1 / rate, density=density,
        note="each head its own blocks",
    )  # fmt: skip


CASES = (
    dense("dense-d128-4608", 1, 24, 4608, 128, 0.78, "FLUX at 1024 px"),
    dense("dense-d128-32760", 1, 12, 32760, 128, 0.85, "Wan 2.1 1.3B, 480p, 81 frames"),
    dense("causal-d128-32768", 1, 32, 32768, 128, 0.82, "Llama prefill", right=0),
    dense("dense-d64-1370", 8, 16, 1370, 64, 0.97, "ViT-L/14 at 518 px"),
    dense("dense-d72-4096", 2, 16, 4096, 72, 1.0, "DiT-XL at 1024 px"),
    grid("na-64x64-w16", 1, 24, 128, (64, 64), (16, 16), flex=2.4),
    grid("na-128x128-w32", 1, 24, 128, (128, 128), (32, 32), flex=3.5),
    grid("na-21x30x52-w9x15x27", 1, 12, 128, (21, 30, 52), (9, 15, 27), flex=3.0, cudnn=2.2),
    grid("na-32768-w4096", 1, 32, 128, (32768,), (4096,), flex=1.2),
    grid("strided-64x64-w16", 1, 24, 128, (64, 64), (16, 16), "stride = tile", (8, 16), 1.15),
    grid("strided-128x128-w32", 1, 24, 128, (128, 128), (32, 32), "stride = tile", (8, 16), 1.15),
    grid("strided-20x32x48-w8x16x24", 1, 12, 128, (20, 32, 48), (8, 16, 24), "stride = tile", (4, 4, 8), 1.15),
    listed(128, 0.1, 0.85, flex=1.25),
    listed(128, 0.25, 0.85, flex=1.25),
    listed(64, 0.1, 0.7),
    listed(64, 0.25, 0.7),
    grid("na-32x32-w7", 8, 12, 64, (32, 32), (7, 7), "a small grid"),
    grid("na-16x16-w7", 8, 12, 64, (16, 16), (7, 7), "too small: dense wins where it does"),
)
"""The sizes of the issue, and two where a neighborhood pays little or nothing."""
