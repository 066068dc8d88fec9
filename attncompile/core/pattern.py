"""Which keys a query sees: one frozen dataclass a structure, each its own naive definition.

``visible(query_length, key_length)`` gives the bool array [query_length, key_length] that the structure means; it is
what a mask is compared with, element by element, before a site is said to have this structure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from attncompile.core.grid import TokenGrid


class Pattern(Protocol):
    """A structure of a mask, with its parameters."""

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        """Bool [query_length, key_length], True where the key is seen.

        Raises:
            ValueError: the structure has no meaning at these lengths (a grid has another number of tokens).
        """
        ...

    def parameters(self) -> dict[str, Any]:
        """What the CLI's JSON shows beside the kind: JSON values only."""
        ...


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Any mask at fixed lengths, held exactly: ``bits`` are the rows of ``visible``, packed by ``np.packbits``.

    ``block`` is the edge of the square blocks that ``density`` (the share of blocks with a visible key) was counted in.
    """

    query_length: int
    key_length: int
    block: int
    density: float
    bits: bytes = field(repr=False)

    @staticmethod
    def of(visible: np.ndarray, block: int) -> BlockSparse:
        """From a bool array [query_length, key_length]."""
        rows, columns = visible.shape
        padded = np.zeros((-(-rows // block) * block, -(-columns // block) * block), dtype=bool)
        padded[:rows, :columns] = visible
        blocks = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block).any(axis=(1, 3))
        packed = np.packbits(visible.astype(bool), axis=1).tobytes()
        return BlockSparse(rows, columns, block, float(blocks.mean()) if blocks.size else 0.0, packed)

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        if (query_length, key_length) != (self.query_length, self.key_length):
            raise ValueError(f"the mask is known at {self.query_length}x{self.key_length} only")
        rows = np.frombuffer(self.bits, dtype=np.uint8).reshape(query_length, -(-key_length // 8))
        return np.unpackbits(rows, axis=1, count=key_length).astype(bool)

    def parameters(self) -> dict[str, Any]:
        return {"block": self.block, "density": round(self.density, 6)}


@dataclass(frozen=True, slots=True)
class GridWindow:
    """A neighborhood on a token grid (kind ``neighborhood``; NATTEN, DiNAT, GNA, CLEAR).

    One entry an axis of ``grid.shape``. A kernel size k sees k // 2 tokens to the left and k - 1 - k // 2 to the right,
    in steps of ``dilation``; ``border``: clamp moves the window inward (NATTEN), truncate cuts it, circular wraps it.
    ``stride`` > 1: queries in groups of it share the window of the group's leader (GNA). ``causal`` axes see no token
    after the query. ``shape`` ball keeps the tokens with sum(((d / (k // 2)) ** 2)) <= 1 (CLEAR). Prefix and suffix
    tokens of ``grid`` see and are seen by all.
    """

    grid: TokenGrid
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]
    border: Literal["clamp", "truncate", "circular"] = "clamp"
    shape: Literal["box", "ball"] = "box"

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        return {
            "kernel_size": list(self.kernel_size), "dilation": list(self.dilation), "stride": list(self.stride),
            "causal": [bool(c) for c in self.causal], "border": self.border, "shape": self.shape,
            "grid": self.grid.to_json(),
        }  # fmt: skip
