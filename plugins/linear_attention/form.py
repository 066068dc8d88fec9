"""What a linear attention site asks of the ops, and what their bodies are generated for. Free of any graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from attncompile.core.site import Layout
from attncompile.plugins.linear_attention.op import LAYOUTS, MAPS, NORMALISERS, bad

Decay = Literal["none", "head", "token", "channel"]
"""``head``: [G]; ``token``: [B, N, G]; ``channel``: [B, N, G, F]."""

TILE = 64


@dataclass(frozen=True, slots=True)
class Form:
    """The mathematics: see ``op``. ``chunk`` 0: one chunk of all tokens; causal forms need one."""

    query_map: str = "none"
    key_map: str = "none"
    normaliser: str = "none"
    epsilon: float = 0.0
    floor: float = -inf
    scale: float = 1.0
    causal: bool = False
    decay: Decay = "none"
    delta: bool = False
    key_weight: bool = False
    initial: bool = False
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.query_map not in MAPS or self.key_map not in MAPS:
            raise bad(f"feature maps {self.query_map}, {self.key_map}", f"there are {', '.join(MAPS)}")
        if self.normaliser not in NORMALISERS:
            raise bad(f"normaliser {self.normaliser}", f"there are {', '.join(NORMALISERS)}")
        if self.chunk < 0 or (self.causal and not self.chunk):
            raise bad(f"chunk {self.chunk}", "a number of tokens; 0, one chunk, without a triangle only")
        if self.causal and ("softmax" in self.key_map or "hedgehog" in (self.query_map, self.key_map)):
            raise bad(f"key map {self.key_map} under a triangle", "map the keys before")
        if self.causal and (self.normaliser in ("mala", "inline") or self.key_weight):
            raise bad("MALA, InLine and key weights have no causal form")
        if not self.causal and (self.decay != "none" or self.delta or self.initial):
            raise bad("decays, the delta rule and a first state need a triangle")
        if self.delta and (self.decay == "channel" or self.normaliser != "none") and self.chunk > 1:
            raise bad("the delta rule in chunks has neither gates for every channel nor a normaliser")
        if self.delta and self.chunk % self.tile:
            raise bad(f"chunk {self.chunk} of the delta rule", f"whole tiles of {TILE} tokens, or at most {TILE}")
        if self.key_map == "softmax" and (self.normaliser != "none" or self.key_weight):
            raise bad("a softmax over the keys is normalised already")

    @property
    def sums(self) -> bool:
        """Whether the sum of the keys' features is needed."""
        return self.normaliser != "none"

    @property
    def means(self) -> bool:
        """Whether the mean of the values is."""
        return self.normaliser in ("mala", "inline")

    @property
    def tops(self) -> bool:
        return self.key_map == "softmax"

    @property
    def combined(self) -> bool:
        """Whether the chunks are made one by an op of its own: always where that is not a plain sum."""
        return not self.causal and (self.tops or self.chunk > 0)

    @property
    def tile(self) -> int:
        """Tokens whose dependence on one another the delta rule solves at once."""
        return min(self.chunk, TILE)

    def parameters(self) -> dict[str, Any]:
        """What plan.toml holds: the mathematics is the site's own, so it is not repeated there."""
        return {"chunk": self.chunk}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where the ops stand. ``layouts`` of query, key, value, output; lengths are None where dynamic; ``wide``: the
    element type of the original's products (a site in float16 may have them in float32).
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    layouts: tuple[Layout, Layout, Layout, Layout]
    queries: int | None
    keys: int | None
    opset: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise bad(f"{self.heads} query heads over {self.kv_heads} key heads")
        if any(x not in LAYOUTS for x in self.layouts):
            raise bad(f"layouts {self.layouts}", ", ".join(LAYOUTS))

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def state_type(self) -> str:
        """Element type of states, and of everything between the operands and the result."""
        return "double" if self.dtype in ("double", "float64") else "float32"

    def configuration(self) -> Mapping[str, Any]:
        """What bodies depend on beside the op's attributes."""
        return {
            "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "value_dim": self.value_dim,
            "dtype": self.dtype, "layouts": list(self.layouts), "queries": self.queries, "keys": self.keys,
            "opset": self.opset,
        }  # fmt: skip
