"""Feature maps that were fitted to one softmax site, so that linear attention comes near it. Free of any graph."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Kind = Literal["hedgehog", "relu", "mala"]
KINDS: tuple[Kind, ...] = ("hedgehog", "relu", "mala")

ARRAYS: Mapping[str, tuple[str, ...]] = {
    "hedgehog": ("query_weight", "key_weight"),
    "relu": ("query_weight", "key_weight", "query_bias", "key_bias"),
    "mala": ("magnitude",),
}
"""What each kind has, float32; H query heads, G key heads, D head dim, W width: ``query_weight`` [H, D, W],
``key_weight`` [G, D, W], ``query_bias`` [H, W], ``key_bias`` [G, W], ``magnitude`` [H]."""

EPSILON = 1e-6
"""Added to the sum of a query's weights under ``relu``, which may be zero."""


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The maps of all heads of one site.

    - ``hedgehog``: phi(x) = [exp(x W), exp(-x W)], weights divided by their sum (arXiv:2402.04347, without the biases);
    - ``relu``: phi(x) = relu(x W + b), weights divided by their sum + ``EPSILON`` (the map of arXiv:2103.13076);
    - ``mala``: phi(x) = elu(x) + 1, the queries' times ``magnitude``, weights (1 + 1 / s) phi(q) phi(k) - s / N where s
      is their plain sum (arXiv:2507.00698).
    """

    kind: Kind
    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if set(self.arrays) != set(ARRAYS[self.kind]):
            raise ValueError(f"{self.kind} has {sorted(ARRAYS[self.kind])}, not {sorted(self.arrays)}")

    @property
    def width(self) -> int:
        """W; of ``mala`` 0: as many features as channels."""
        return int(self.arrays["query_weight"].shape[2]) if "query_weight" in self.arrays else 0

    def shapes(self, heads: int, kv_heads: int, head_dim: int) -> Mapping[str, tuple[int, ...]]:
        """The shapes that the arrays must have at such a site."""
        w = self.width
        known = {
            "query_weight": (heads, head_dim, w), "key_weight": (kv_heads, head_dim, w), "query_bias": (heads, w),
            "key_bias": (kv_heads, w), "magnitude": (heads,),
        }  # fmt: skip
        return {name: known[name] for name in self.arrays}

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits over kind and arrays."""
        found = hashlib.sha256(self.kind.encode())
        for name in ARRAYS[self.kind]:
            array = np.ascontiguousarray(self.arrays[name], np.float32)
            found.update(repr(array.shape).encode() + array.tobytes())
        return found.hexdigest()[:16]
