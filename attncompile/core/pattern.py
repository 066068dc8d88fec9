"""Which keys a query sees: one frozen dataclass a structure, each its own naive definition.

``visible(query_length, key_length)`` gives the bool array [query_length, key_length] that the structure means; it is
what a mask is compared with, element by element, before a site is said to have this structure. Where each head has a
mask of its own (``head_pattern.HeadMasks``), heads stand before both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
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

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        """The rows of ``visible`` for these query indices alone, [len(queries), key_length]. Raises like it."""
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

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        return np.asarray(self.visible(query_length, key_length)[queries])

    def parameters(self) -> dict[str, Any]:
        return {"block": self.block, "density": round(self.density, 6)}


@dataclass(frozen=True, slots=True)
class GridWindow:
    """A neighborhood on a token grid (kind ``neighborhood``; NATTEN, DiNAT, GNA, CLEAR).

    One entry an axis of ``grid.shape``. A kernel size k sees k // 2 tokens to the left and k - 1 - k // 2 to the right,
    in steps of ``dilation``; ``border``: clamp moves the window inward (NATTEN), truncate cuts it, circular wraps it.
    ``stride`` > 1: queries in groups of it share the window of the group's leader (GNA). ``causal`` axes see no token
    after the query: their window is the kernel_size tokens up to the group's last. ``shape`` ball keeps the tokens
    with sum(((d / (k // 2)) ** 2)) <= 1 (CLEAR). Prefix and suffix tokens of ``grid`` see and are seen by all.
    """

    grid: TokenGrid
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]
    border: Literal["clamp", "truncate", "circular"] = "clamp"
    shape: Literal["box", "ball"] = "box"

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        return self.rows(np.arange(query_length), query_length, key_length)

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        """Every query and key are tokens of the grid: both lengths are ``grid.tokens``.

        Neighborhood Attention, arXiv:2204.07143; dilation, arXiv:2209.15001; stride, arXiv:2504.16922; CLEAR,
        arXiv:2412.16112.
        """
        if (query_length, key_length) != (self.grid.tokens, self.grid.tokens):
            raise ValueError(f"the grid has {self.grid.tokens} tokens, the mask {query_length}x{key_length}")
        self._check()
        sizes, rank = self.grid.shape, len(self.grid.shape)
        first, last = self.grid.prefix, self.grid.prefix + prod(sizes)
        on_grid = (queries >= first) & (queries < last)
        coordinates = np.unravel_index(queries[on_grid] - first, sizes)
        inside: np.ndarray = np.ones((1,) * (rank + 1), dtype=bool)
        distance: np.ndarray = np.zeros((1,) * (rank + 1))
        for axis, size in enumerate(sizes):
            spread = (-1, *(size if other == axis else 1 for other in range(rank)))
            seen, away = self._axis(axis, np.asarray(coordinates[axis], dtype=np.int32)[:, None])
            inside = inside & seen.reshape(spread)
            if self.shape == "ball":
                distance = distance + away.reshape(spread) ** 2
        if self.shape == "ball":
            inside = inside & (distance <= 1 + 1e-9)
        out = np.ones((len(queries), key_length), dtype=bool)
        out[on_grid, first:last] = np.broadcast_to(inside, (int(on_grid.sum()), *sizes)).reshape(-1, last - first)
        return out

    def met(self, first: int, stop: int) -> np.ndarray:
        """Bool [grid.tokens]: the keys that some of the queries first .. stop - 1 sees, as ``rows`` says, but a row of
        the grid at a time: of the queries along a row the nearest on that axis decides for each key.
        """
        self._check()
        sizes, before = self.grid.shape, self.grid.prefix
        out = np.ones(self.grid.tokens, dtype=bool)
        if first < before or stop > before + prod(sizes):
            return out
        tables = _axes(self)
        near = np.zeros(sizes, dtype=bool)
        position, end = first - before, stop - before
        while position < end:
            *place, x = (int(c) for c in np.unravel_index(position, sizes))
            until = min(sizes[-1], x + end - position)
            lines = [*(table[c] for table, c in zip(tables, place, strict=False)), tables[-1][x:until].min(axis=0)]
            away: np.ndarray = np.zeros((1,) * len(sizes))
            for axis, line in enumerate(lines):
                away = away + line.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
            near |= away <= 1 + 1e-9 if self.shape == "ball" else np.isfinite(away)
            position += until - x
        out[before : before + near.size] = near.reshape(-1)
        return out

    def _check(self) -> None:
        sizes = {len(x) for x in (self.kernel_size, self.dilation, self.stride, self.causal, self.grid.shape)}
        if len(sizes) != 1 or min(*self.kernel_size, *self.dilation, *self.stride) < 1:
            raise ValueError("a neighborhood has one positive kernel size, dilation and stride an axis")
        if self.border == "circular" and any(self.causal):
            raise ValueError("nothing is causal on an axis that wraps around")
        for kernel, dilation, size in zip(self.kernel_size, self.dilation, self.grid.shape, strict=True):
            if self.border != "truncate" and kernel * dilation > size:
                raise ValueError(f"a window of {kernel} with dilation {dilation} does not fit into {size} tokens")

    def _axis(self, axis: int, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One axis of size s: what coordinates ``query`` [R, 1] see, [R, s], and how far that lies from the window's
        centre, in radii.

        Tokens with the same remainder modulo the dilation form a line; the window is on that line.
        """
        size, kernel = self.grid.shape[axis], self.kernel_size[axis]
        dilation, stride = self.dilation[axis], self.stride[axis]
        key = np.arange(size, dtype=np.int32)[None, :]
        line = -(-(size - query % dilation) // dilation)  # tokens on the query's line
        group = query // dilation // stride * stride
        left = kernel // 2
        if self.causal[axis]:
            leader = np.minimum(group + stride - 1, line - 1)
            step = key // dilation - leader
            seen = (step > -kernel) & (key <= query) & (query % dilation == key % dilation)
            return seen, step / max(left, 1)
        centre = np.minimum(group + stride // 2, line - 1)
        if self.border == "circular":
            ahead = (key - (centre * dilation + query % dilation)) % size
            behind = size - ahead
            right_seen = (ahead % dilation == 0) & (ahead // dilation <= kernel - 1 - left)
            left_seen = (behind % dilation == 0) & (behind // dilation <= left)
            steps = np.where(right_seen, ahead // dilation, behind // dilation)
            return right_seen | left_seen, steps / max(left, 1)
        if self.border == "clamp":
            centre = np.clip(centre, left, line - (kernel - left))
        step = key // dilation - centre
        seen = (step >= -left) & (step <= kernel - 1 - left) & (query % dilation == key % dilation)
        return seen, step / max(left, 1)

    def parameters(self) -> dict[str, Any]:
        return {
            "kernel_size": list(self.kernel_size), "dilation": list(self.dilation), "stride": list(self.stride),
            "causal": [bool(c) for c in self.causal], "border": self.border, "shape": self.shape,
            "grid": self.grid.to_json(),
        }  # fmt: skip


@lru_cache(maxsize=32)
def _axes(window: GridWindow) -> list[np.ndarray]:
    """Of each axis [s, s]: the squared distance of a key from the centre of a query's window, in radii, infinite where
    it is not seen.
    """
    found = []
    for axis, size in enumerate(window.grid.shape):
        seen, away = window._axis(axis, np.arange(size, dtype=np.int32)[:, None])
        found.append(np.where(seen, np.square(away, dtype=np.float64), np.inf))
    return found
