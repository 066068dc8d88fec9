"""Masks of which every head has its own, and keys that count more than once in a softmax."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attncompile.core.pattern import BlockSparse


@dataclass(frozen=True, slots=True)
class HeadMasks:
    """A mask for each head at fixed lengths: head h has ``patterns[of_head[h]]``."""

    patterns: tuple[BlockSparse, ...]
    of_head: tuple[int, ...]

    @staticmethod
    def of(visible: np.ndarray, block: int) -> HeadMasks:
        """From a bool array [heads, query_length, key_length]; equal masks are held once."""
        known: dict[bytes, int] = {}
        patterns: list[BlockSparse] = []
        of_head = []
        for one in visible:
            pattern = BlockSparse.of(one, block)
            if pattern.bits not in known:
                known[pattern.bits] = len(patterns)
                patterns.append(pattern)
            of_head.append(known[pattern.bits])
        return HeadMasks(tuple(patterns), tuple(of_head))

    @property
    def heads(self) -> int:
        return len(self.of_head)

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        """Bool [heads, query_length, key_length]; raises ``ValueError`` at other lengths."""
        return self.rows(np.arange(query_length), query_length, key_length)

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        """Bool [heads, len(queries), key_length]; raises ``ValueError`` at other lengths."""
        rows = [p.rows(queries, query_length, key_length) for p in self.patterns]
        return np.stack([rows[i] for i in self.of_head])

    def parameters(self) -> dict[str, Any]:
        density = sum(self.patterns[i].density for i in self.of_head) / self.heads
        return {"block": self.patterns[0].block, "density": round(density, 6), "heads": self.heads,
                "different": len(self.patterns)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeyCounts:
    """How often each key counts in the softmax of a query: a bias of the count's logarithm, at fixed lengths.

    ``data``: uint8 [heads, query_length, key_length], compressed by zlib; ``heads`` is 1 where all share the counts.
    Keys that are not seen count 0 times. ``largest`` is the largest count.
    """

    query_length: int
    key_length: int
    heads: int
    largest: int
    data: bytes = field(repr=False)

    @staticmethod
    def of(counts: np.ndarray) -> KeyCounts:
        """From whole numbers [heads, query_length, key_length], at most 255; equal heads are held once."""
        small = counts.astype(np.uint8)
        if bool(np.all(small == small[:1])):
            small = small[:1]
        heads, queries, keys = small.shape
        return KeyCounts(queries, keys, heads, int(small.max()), zlib.compress(small.tobytes(), 1))

    def times(self, query_length: int, key_length: int) -> np.ndarray:
        """uint8 [heads, query_length, key_length]; raises ``ValueError`` at other lengths."""
        if (query_length, key_length) != (self.query_length, self.key_length):
            raise ValueError(f"the counts are known at {self.query_length}x{self.key_length} only")
        flat = np.frombuffer(zlib.decompress(self.data), np.uint8)
        return flat.reshape(self.heads, query_length, key_length)

    def parameters(self) -> dict[str, Any]:
        times = self.times(self.query_length, self.key_length)
        seen = np.count_nonzero(times)
        share = float(np.count_nonzero(times > 1) / seen) if seen else 0.0
        return {"largest_count": self.largest, "counted_share": round(share, 6), "lists": self.heads}
