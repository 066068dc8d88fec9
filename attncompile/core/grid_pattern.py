"""Structures of a mask that cut the tokens into cells: blocked windows (Swin, chunks), and radial attention over video.

Each is its own naive definition; a causal mask beside one of them is a factor of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from attncompile.core.grid import TokenGrid
from attncompile.core.sequence_pattern import positions


@dataclass(frozen=True, slots=True)
class Blocked:
    """Tokens see their own window (kind ``blocked``): Swin's windows (arXiv:2103.14030), Llama 4's chunks.

    One entry an axis. Coordinate x is in window floor((x - shift) / window), so that ``shift`` > 0 leaves a smaller
    window at either end. ``grid`` None is a sequence of any length, whose queries are its last tokens; it may see the
    ``before`` windows before and the ``after`` windows after its own too. On a grid prefix and suffix tokens see and
    are seen by all. ``cyclic``: the first, smaller window is one with the last.
    """

    window: tuple[int, ...]
    shift: tuple[int, ...]
    grid: TokenGrid | None = None
    before: int = 0
    after: int = 0
    cyclic: bool = False

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        return self.rows(np.arange(query_length), query_length, key_length)

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        if self.grid is None:
            query, key = positions(queries, query_length, key_length)
            distance = self._cell(0, key, key_length) - self._cell(0, query, key_length)
            return np.asarray((distance >= -self.before) & (distance <= self.after))
        if (query_length, key_length) != (self.grid.tokens, self.grid.tokens):
            raise ValueError(f"the grid has {self.grid.tokens} tokens, the mask {query_length}x{key_length}")
        cells = np.zeros(prod(self.grid.shape), dtype=np.int32)
        for axis, where in enumerate(np.unravel_index(np.arange(len(cells)), self.grid.shape)):
            cell = self._cell(axis, where, self.grid.shape[axis])
            cells = cells * (self.grid.shape[axis] + 2) + cell + 1
        of_all = -1
        labels = np.full(key_length, of_all, dtype=np.int64)
        labels[self.grid.prefix : self.grid.prefix + len(cells)] = cells
        mine = labels[queries][:, None]
        return np.asarray((mine == labels[None, :]) | (mine == of_all) | (labels[None, :] == of_all))

    def _cell(self, axis: int, where: np.ndarray, size: int) -> np.ndarray:
        window, shift = self.window[axis], self.shift[axis]
        if not self.cyclic:
            return np.asarray((where - shift) // window)
        if size % window:
            raise ValueError(f"windows of {window} do not wrap around {size} tokens")
        return np.asarray((where - shift) % size // window)

    def parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {"window": list(self.window), "shift": list(self.shift)}
        if self.grid is not None:
            found["grid"] = self.grid.to_json()
        extra = {"before": self.before, "after": self.after, "cyclic": self.cyclic}
        return {**found, **{name: value for name, value in extra.items() if value}}


@dataclass(frozen=True, slots=True)
class ShiftedWindows:
    """Swin's shifted windows where the site's batch is windows: one mask a window, [nW, N, N] (kind ``blocked``).

    The grid of ``windows[axis] * window[axis]`` tokens an axis was rolled by -shift and cut into windows, row-major;
    batch entry b is window b mod nW. In the last window of an axis the last ``shift`` tokens come from the grid's
    other end: they and the others do not see one another. There is no one mask for all, so ``visible`` raises.
    """

    windows: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        raise ValueError("the mask differs between windows: see visible_windows")

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        raise ValueError("the mask differs between windows: see visible_windows")

    def visible_windows(self) -> np.ndarray:
        """Bool [prod(windows), prod(window), prod(window)]."""
        regions = np.zeros((prod(self.windows), prod(self.window)), dtype=np.int64)
        which = np.unravel_index(np.arange(prod(self.windows)), self.windows)
        inside = np.unravel_index(np.arange(prod(self.window)), self.window)
        for axis, (count, size, shift) in enumerate(zip(self.windows, self.window, self.shift, strict=True)):
            moved = (which[axis] == count - 1)[:, None] & (inside[axis] >= size - shift)[None, :]
            regions = 2 * regions + moved
        return np.asarray(regions[:, :, None] == regions[:, None, :])

    def parameters(self) -> dict[str, Any]:
        return {"window": list(self.window), "shift": list(self.shift), "windows": list(self.windows)}


@dataclass(frozen=True, slots=True)
class Radial:
    """Video tokens, ``tokens`` a frame: the window over space shrinks with the distance in time (arXiv:2506.19852).

    With g = 2 ** floor(log2(max(|distance in frames|, 1))) the token at place l of one frame is seen from place k of
    the other iff |k - l| + 1 <= width / g, or k = l and the distance is a multiple of ceil(g / width). The first
    ``sink`` frames are seen by all. The paper's ``width`` is the number of tokens a frame.
    """

    frames: int
    tokens: int
    width: int
    sink: int = 0

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        return self.rows(np.arange(query_length), query_length, key_length)

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        total = self.frames * self.tokens
        if (query_length, key_length) != (total, total):
            raise ValueError(f"{self.frames} frames of {self.tokens} tokens, the mask is {query_length}x{key_length}")
        query, key = positions(queries, query_length, key_length)
        distance = np.abs(key // self.tokens - query // self.tokens)
        octaves = np.array([1 << max(d, 1).bit_length() - 1 for d in range(self.frames)], dtype=np.int32)
        g = octaves[distance]
        apart = np.abs(key % self.tokens - query % self.tokens)
        near = (apart + 1) * g <= self.width
        sampled = (apart == 0) & (distance % -(-g // self.width) == 0)
        return np.asarray(near | sampled | (key < self.sink * self.tokens))

    def parameters(self) -> dict[str, Any]:
        return {"frames": self.frames, "tokens": self.tokens, "width": self.width, "sink": self.sink}
