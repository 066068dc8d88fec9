"""Structures of a mask along a sequence. Query i stands at position i + key_length - query_length among the keys.

Each is its own naive definition; a causal mask beside one of them is a factor of its own. Kinds: ``prefix``,
``dilated``, ``document``, ``global`` and ``stripe``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

UNLIMITED = 1 << 30
"""A distance that no sequence has."""

Range = tuple[int, int]
"""First and last, both included."""


def positions(queries: np.ndarray, query_length: int, key_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of these queries [R, 1] and of all keys [1, key_length]."""
    where = np.asarray(queries, dtype=np.int32)[:, None] + np.int32(key_length - query_length)
    return where, np.arange(key_length, dtype=np.int32)[None, :]


class _Sequence(ABC):
    """``visible`` is all rows."""

    __slots__ = ()

    def visible(self, query_length: int, key_length: int) -> np.ndarray:
        return self.rows(np.arange(query_length), query_length, key_length)

    @abstractmethod
    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        """Bool [len(queries), key_length]: which keys these queries see."""


@dataclass(frozen=True, slots=True)
class Prefix(_Sequence):
    """Causal, but the first ``tokens`` keys are seen by all (prefix language model, arXiv:1910.10683)."""

    tokens: int

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        query, key = positions(queries, query_length, key_length)
        return np.asarray((key <= query) | (key < self.tokens))

    def parameters(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Dilated(_Sequence):
    """Every ``dilation``-th key from ``left`` before the query to ``right`` after it, in tokens; -1 is unlimited."""

    dilation: int
    left: int
    right: int

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        query, key = positions(queries, query_length, key_length)
        distance = key - query
        seen = distance % self.dilation == 0
        if self.left >= 0:
            seen &= distance >= -self.left
        if self.right >= 0:
            seen &= distance <= self.right
        return np.asarray(seen)

    def parameters(self) -> dict[str, Any]:
        return {"dilation": self.dilation, "left": self.left, "right": self.right}


@dataclass(frozen=True, slots=True)
class Documents(_Sequence):
    """Documents one after another; a token sees its own. ``lengths`` add up to the only length this mask has."""

    lengths: tuple[int, ...]

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        if query_length != key_length or key_length != sum(self.lengths):
            raise ValueError(f"the documents have {sum(self.lengths)} tokens, the mask {query_length}x{key_length}")
        document = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)
        return np.asarray(document[queries][:, None] == document[None, :])

    def parameters(self) -> dict[str, Any]:
        return {"lengths": list(self.lengths)}


@dataclass(frozen=True, slots=True)
class GlobalLocal(_Sequence):
    """A window, and global tokens that see and are seen by all (Longformer, arXiv:2004.05150; BigBird, 2007.14062).

    The window is counted in blocks of ``block`` tokens: blocks -left .. right of the query's own. ``first`` and
    ``last`` tokens are global, and the ranges ``tokens``. ``random`` holds for each query block the further key blocks
    that it sees; empty where there are none.
    """

    left: int
    right: int
    block: int = 1
    first: int = 0
    last: int = 0
    tokens: tuple[Range, ...] = ()
    random: tuple[tuple[int, ...], ...] = ()

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        query, key = positions(queries, query_length, key_length)
        distance = key // self.block - query // self.block
        seen = (distance >= -self.left) & (distance <= self.right)
        for where in (query, key):
            of_all = (where < self.first) | (where >= key_length - self.last)
            for low, high in self.tokens:
                of_all |= (where >= low) & (where <= high)
            seen |= of_all
        if self.random:
            blocks = -(-key_length // self.block)
            if len(self.random) != blocks:
                raise ValueError(f"random blocks are known for {len(self.random)} blocks, not for {blocks}")
            chosen = np.zeros((blocks, blocks), dtype=bool)
            for row, columns in enumerate(self.random):
                chosen[row, list(columns)] = True
            seen |= chosen[query[:, 0] // self.block][:, key[0] // self.block]
        return np.asarray(seen)

    def parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {"left": self.left, "right": self.right, "block": self.block, "first": self.first,
                                 "last": self.last, "tokens": [list(r) for r in self.tokens]}  # fmt: skip
        if self.random:
            found["random_blocks"] = sum(map(len, self.random))
        return found


@dataclass(frozen=True, slots=True)
class Stripes(_Sequence):
    """Diagonals (ranges of key - query) and vertical stripes (ranges of keys): a key in any of them is seen.

    Multi-diagonal masks, attention sinks with a window (arXiv:2309.17453), vertical-slash (MInference,
    arXiv:2407.02490). A range of diagonals that begins at -UNLIMITED or ends at UNLIMITED goes to the end.
    """

    diagonals: tuple[Range, ...]
    columns: tuple[Range, ...]

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        query, key = positions(queries, query_length, key_length)
        distance = key - query
        seen = np.zeros(distance.shape, dtype=bool)
        for low, high in self.diagonals:
            seen |= (distance >= low) & (distance <= high)
        for low, high in self.columns:
            seen |= (key >= low) & (key <= high)
        return np.asarray(seen)

    def parameters(self) -> dict[str, Any]:
        ends = [[None if abs(x) >= UNLIMITED else x for x in r] for r in self.diagonals]
        return {"diagonals": ends, "columns": [list(r) for r in self.columns]}


@dataclass(frozen=True, slots=True)
class Strided(_Sequence):
    """A window and every ``period``-th key counted from the query (strided Sparse Transformer, arXiv:1904.10509)."""

    period: int
    left: int
    right: int

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        query, key = positions(queries, query_length, key_length)
        distance = key - query
        return np.asarray(((distance >= -self.left) & (distance <= self.right)) | (distance % self.period == 0))

    def parameters(self) -> dict[str, Any]:
        return {"period": self.period, "left": self.left, "right": self.right}


@dataclass(frozen=True, slots=True)
class FixedStripes(_Sequence):
    """The query's own cell of ``period`` tokens, and the last ``summary`` tokens of every cell (fixed Sparse
    Transformer, arXiv:1904.10509).
    """

    period: int
    summary: int

    def rows(self, queries: np.ndarray, query_length: int, key_length: int) -> np.ndarray:
        query, key = positions(queries, query_length, key_length)
        same, last = query // self.period == key // self.period, key % self.period >= self.period - self.summary
        return np.asarray(same | last)

    def parameters(self) -> dict[str, Any]:
        return {"period": self.period, "summary": self.summary}
