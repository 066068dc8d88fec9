"""How a site's tokens lie in space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np


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

    def ordered(self, order: Sequence[int]) -> np.ndarray:
        """int64 [tokens]: the tokens with the grid row-major over its axes in this ``order``, the slowest first; or
        where it holds no 0, tile by tile of these sides, row-major over tiles and in each, those at the ends of an axis
        shorter where they must be. Prefix and suffix stay where they are.
        """
        if 0 in order:
            inner = np.arange(prod(self.shape), dtype=np.int64).reshape(self.shape).transpose(order).reshape(-1)
        else:
            places = np.indices(self.shape).reshape(len(self.shape), -1)
            sides = np.array(order)[:, None]
            inner = np.lexsort((*(places % sides)[::-1], *(places // sides)[::-1]))
        out = np.arange(self.tokens, dtype=np.int64)
        out[self.prefix : self.prefix + len(inner)] = self.prefix + inner
        return out

    def ball(self, share: float) -> tuple[int, ...]:
        """Odd diameters of a ball that takes this share of the grid on each axis: the last two, height and width, whose
        tokens are equally far apart, get the one of a square of their size. They may be longer than an axis.
        """
        flat = self.shape[-2:]
        across = prod(flat) ** (1 / len(flat))
        sides = (*self.shape[:-2], *[across] * len(flat))
        return tuple(2 * int(side * share / 2 + 1e-9) + 1 for side in sides)  # a root may be a little short

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape), "prefix": self.prefix, "suffix": self.suffix, "evidence": self.evidence,
        }  # fmt: skip
