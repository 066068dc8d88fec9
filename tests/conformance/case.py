"""One comparison: a call with all its sizes, and the numbers that go in. Needs NumPy alone, so that it runs where
kernels run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from attncompile.core.kernel import OpCall
from attncompile.core.layout import part, unpacked
from tests.conformance.block_lists import Drawn

PARTS = 3
"""Of a packed tensor."""

Values = Literal["ordinary", "large", "dominant", "equal"]
Hiding = Literal["scattered", "left", "empty"]
ORDER = ("key_mask", "bias", "sinks", "mask", "key_lengths")
"""Optional inputs of ``Attention``, in their order; ``NeighborhoodAttention`` takes the first two,
``BlockSparseAttention`` the first three, beside its lists.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """``call`` has batch, lengths and the shapes of all optional inputs. ``layouts``: of query, key, value and output,
    as they are to lie in memory; ``BN1HD``: part 1 of ``PARTS``, the others NaN. ``call`` says whether any is.

    ``values``: standard normal operands; ``large``: scores of some hundreds; ``dominant``: one key a query scores far
    above the rest; ``equal``: all keys are the same. ``hiding``: what boolean inputs hide: single keys, the first half
    of them in the first batch entry, or single keys and all that the last batch entry has. ``routed``: the call of
    another op that a kernel is to take in place of ``call``, with the same inputs. ``lists``: of a call of
    ``BlockSparseAttention``.
    """

    name: str
    call: OpCall
    layouts: tuple[str, str, str, str] = ("BNHD", "BNHD", "BNHD", "BNHD")
    values: Values = "ordinary"
    hiding: Hiding = "scattered"
    seed: int = 0
    routed: OpCall | None = None
    lists: Drawn | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def packed(self) -> dict[str, str]:
        """Layouts of the operands that are parts, by name."""
        return {n: x for n, x in zip(("query", "key", "value"), self.layouts, strict=False) if part(x)}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, queries, keys."""
        call = self.call
        assert call.batch is not None and call.query_length is not None and call.key_length is not None
        return call.batch, call.query_length, call.key_length

    def inputs(self) -> dict[str, np.ndarray]:
        """``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv] and the optional inputs. Floats
        are float32 and exact in the type that the call has for them; ``layouts`` are not applied.
        """
        call, rng = self.call, np.random.default_rng(self.seed)
        batch, queries, keys = self.sizes
        found = {
            "query": rng.standard_normal((batch, queries, call.heads, call.head_dim)),
            "key": rng.standard_normal((batch, keys, call.kv_heads, call.head_dim)),
            "value": rng.standard_normal((batch, keys, call.kv_heads, call.value_dim)),
        }
        if self.values == "large":
            found["query"] *= 6
            found["key"] *= 6
        elif self.values == "dominant":
            found["key"][:, keys // 2] = 12 * found["query"].mean((1, 2), keepdims=True)[:, 0]
        elif self.values == "equal":
            found["key"][:] = found["key"][:, :1]
        found = {name: rounded(x.astype(np.float32), call.dtype) for name, x in found.items()}
        for name in ORDER:
            if name in call.inputs:
                found[name] = self._optional(name, rng)
        if self.lists is not None:
            found |= self.lists.arrays(queries, keys, call.attributes["block"], self.seed)
        return found

    def _optional(self, name: str, rng: np.random.Generator) -> np.ndarray:
        shape, kind = self.call.shapes[name], self.call.inputs[name]
        sizes = tuple(n for n in shape if n is not None)
        batch, _, keys = self.sizes
        if name == "key_lengths":
            # Every entry has its own, from no key at all to all of them.
            least = 0 if self.hiding == "empty" else (keys + 2) // 3
            lengths = np.linspace(keys, least, batch) if batch > 1 else np.array([least])
            return lengths.astype(kind)
        if name in ("key_mask", "mask"):
            seen = rng.random(sizes) > 0.4
            if self.hiding == "left" and sizes[-1] > 1:
                seen[:] = True
                seen.reshape(-1, sizes[-1])[0, : sizes[-1] // 2] = False
            elif self.hiding == "empty":
                if sizes[-1] > 1 and len(sizes) == 4:
                    seen[-1] = False
                else:
                    seen[:] = False
            return seen
        spread = 2.0 if name == "sinks" else 1.5
        return rounded((spread * rng.standard_normal(sizes)).astype(np.float32), kind)


def laid(array: np.ndarray, layout: str) -> np.ndarray:
    """[B, N, H, D] as it lies in ``layout``, whose other parts are NaN."""
    turned = array.transpose(["BNHD".index(axis) for axis in unpacked(layout)])
    chosen = part(layout)
    if chosen is None:
        return np.ascontiguousarray(turned)
    axis, number = chosen
    whole = np.full((*turned.shape[:axis], PARTS, *turned.shape[axis:]), np.nan, array.dtype)
    np.moveaxis(whole, axis, 0)[number] = turned
    return whole


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to the nearest of ``dtype``, ties to even, still as float32."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(np.float32)
