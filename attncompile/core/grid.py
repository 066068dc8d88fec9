"""How a site's tokens lie in space."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """``prefix`` tokens (class, register), then a 1-D, 2-D or 3-D grid in row-major order, then ``suffix`` tokens.

    ``evidence`` says what it was read from: the patch embedding's node, or the user's ``--grid``.
    """

    shape: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    evidence: str = ""

    @property
    def tokens(self) -> int:
        return self.prefix + prod(self.shape) + self.suffix

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape), "prefix": self.prefix, "suffix": self.suffix, "evidence": self.evidence,
        }  # fmt: skip
