"""A structure that a mask may have, to be compared with the mask element by element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attncompile.core.mask import MaskKind
from attncompile.core.pattern import Pattern

_SAMPLE = 16
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Proposal:
    """``pattern``, and a causal mask beside it where ``causal``."""

    kind: MaskKind
    pattern: Pattern
    causal: bool = False

    def holds(self, visible: np.ndarray) -> bool:
        """Whether it says exactly ``visible``, bool [queries, keys]."""
        queries, keys = visible.shape
        sample = np.unique(np.linspace(0, queries - 1, _SAMPLE).astype(np.int64))
        if not self._says(sample, visible):
            return False
        step = max(1, _CHUNK // keys)
        return all(
            self._says(np.arange(at, min(at + step, queries)), visible) for at in range(0, queries, step)
        )  # fmt: skip

    def _says(self, rows: np.ndarray, visible: np.ndarray) -> bool:
        queries, keys = visible.shape
        try:
            said = self.pattern.rows(rows, queries, keys)
        except ValueError:
            return False  # it has no meaning at these lengths
        if self.causal:
            said = said & (np.arange(keys)[None, :] <= rows[:, None] + (keys - queries))
        return bool(np.array_equal(said, visible[rows]))

    def words(self) -> str:
        """Kind and parameters, for people."""
        found = ", ".join(f"{name} {value}" for name, value in self.pattern.parameters().items())
        return f"{self.kind} ({found})" + (" and causal" if self.causal else "")
