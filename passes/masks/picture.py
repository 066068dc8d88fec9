"""A mask at one pair of lengths, and what its rows and columns say at a glance."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_SAMPLE = 128
"""Rows that a diagonal is looked for in before it is read from end to end."""


class Look:
    """Row and column summaries of ``visible``, bool [queries, keys].

    ``counts``, ``first`` and ``last`` describe the seen keys of each row (``first`` is 0 and ``last`` keys - 1 in an
    empty row), ``columns`` counts each key's queries; ``position`` is where a query stands among the keys. ``causal``:
    nobody sees a later key. ``single``: every row is one run of keys.
    """

    def __init__(self, visible: np.ndarray) -> None:
        self.visible = visible
        self.queries, self.keys = visible.shape
        self.position = np.arange(self.queries) + self.keys - self.queries
        self.counts: np.ndarray = np.count_nonzero(visible, axis=1)
        self.first = visible.argmax(axis=1)
        self.last = self.keys - 1 - visible[:, ::-1].argmax(axis=1)
        self.filled = self.counts > 0
        self.causal = bool(np.all(self.last[self.filled] <= self.position[self.filled]))
        self.single = bool(np.all(self.counts[self.filled] == (self.last - self.first + 1)[self.filled]))

    @cached_property
    def columns(self) -> np.ndarray:
        return np.asarray(np.count_nonzero(self.visible, axis=0))

    @cached_property
    def closure(self) -> Look:
        """The mask with what a causal mask may have taken from it put back: i sees j where j sees i (square only)."""
        return Look(self.visible | self.visible.T)

    @property
    def square(self) -> bool:
        return bool(self.queries == self.keys)

    def window(self) -> tuple[int, int] | None:
        """(left, right) where the mask is exactly the set -left <= key - query <= right, else None."""
        if not self.single or not self.filled.any():
            return None
        before, after = (self.position - self.first)[self.filled], (self.last - self.position)[self.filled]
        left, right = int(before.max()), int(after.max())
        if left < 0 or right < 0:  # a window without the query's own position: -1 = unlimited could not be told from it
            return None
        low, high = np.maximum(self.position - left, 0), np.minimum(self.position + right, self.keys - 1)
        filled = low <= high
        exact = np.array_equal(filled, self.filled) and np.array_equal(low[filled], self.first[filled])
        return (left, right) if exact and np.array_equal(high[filled], self.last[filled]) else None

    def full_columns(self, causal: bool) -> np.ndarray:
        """Bool [keys]: the keys that every query sees (every query from the key's own on, where ``causal``)."""
        wanted = np.minimum(self.queries, self.keys - np.arange(self.keys)) if causal else self.queries
        return np.asarray(self.columns == wanted)

    def full_rows(self, causal: bool) -> np.ndarray:
        """Bool [queries]: the queries that see every key (every key up to their own, where ``causal``)."""
        return np.asarray(self.counts == (np.maximum(self.position + 1, 0) if causal else self.keys))

    def full_diagonals(self, causal: bool) -> np.ndarray:
        """The distances key - query at which every pair is seen, ascending; those above 0 left out where ``causal``."""
        queries, keys = self.queries, self.keys
        likely = np.ones(queries + keys - 1, dtype=bool)  # by j - i + queries - 1
        for row in np.unique(np.linspace(0, queries - 1, _SAMPLE).astype(np.int64)):
            likely[queries - 1 - row : queries - 1 - row + keys] &= self.visible[row]
        apart = np.flatnonzero(likely) - (queries - 1)
        distance = apart - (keys - queries)
        if causal:
            apart, distance = apart[distance <= 0], distance[distance <= 0]
        full = [bool(self.visible.diagonal(int(offset)).all()) for offset in apart]
        return np.asarray(distance[np.array(full, dtype=bool)])


@dataclass(frozen=True, slots=True)
class Picture:
    """A mask at one pair of lengths: how far its window reaches to both sides, and how far it could; the rows of a mask
    that is no window are kept, packed by ``np.packbits``.
    """

    lengths: tuple[int, int]
    window: tuple[int, int] | None
    reach: tuple[int, int]
    density: float
    bits: bytes = field(default=b"", repr=False)

    @staticmethod
    def of(visible: np.ndarray, lengths: tuple[int, int]) -> Picture:
        """Bool, of the shape ``lengths``."""
        queries, keys = lengths
        look = Look(visible)
        density = float(look.counts.sum() / visible.size) if visible.size else 0.0
        window = look.window()
        bits = b"" if window is not None else np.packbits(visible, axis=1).tobytes()
        return Picture(lengths, window, (keys - 1, queries - 1), density, bits)

    def visible(self) -> np.ndarray:
        """Bool [queries, keys]."""
        queries, keys = self.lengths
        if self.window is None:
            rows = np.frombuffer(self.bits, dtype=np.uint8).reshape(queries, -(-keys // 8))
            return np.unpackbits(rows, axis=1, count=keys).view(bool)
        distance = np.arange(keys, dtype=np.int32)[None, :] - np.arange(queries, dtype=np.int32)[:, None]
        distance -= keys - queries
        return np.asarray((distance >= -self.window[0]) & (distance <= self.window[1]))
