"""The window along one axis of a grid, fitted to the small matrix of which coordinates see which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from attncompile.core.grid import TokenGrid
from attncompile.core.pattern import GridWindow
from attncompile.passes.masks.picture import Look
from attncompile.passes.masks.proposal import Proposal

Border = Literal["clamp", "truncate", "circular"]
BORDERS: tuple[Border, ...] = ("clamp", "truncate", "circular")
"""In the order in which they are preferred where a mask does not tell."""

_MAX_STRIDES = 6


@dataclass(frozen=True, slots=True)
class AxisWindow:
    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False


def fit_axis(seen: np.ndarray, border: Border) -> AxisWindow | None:
    """The window with this border that gives exactly ``seen``, bool [size, size]: one that is not causal if there is
    one, then the smallest stride and kernel.
    """
    size = len(seen)
    if seen.all():
        return AxisWindow(2 * size - 1 if border == "truncate" else size)
    if not seen.diagonal().all():
        return None
    look = Look(seen)
    alone = bool(np.all(look.counts == 1))
    dilation = 1 if alone else _dilation(look, border)
    line = Look(np.ascontiguousarray(seen[::dilation, ::dilation]))
    for causal in (False, True) if look.causal and not alone and border != "circular" else (False,):
        for stride in _strides(line, causal, border):
            for kernel in _kernels(line, stride, causal, border):
                found = AxisWindow(kernel, dilation, stride, causal)
                if _gives(found, seen, border):
                    return found
    return None


def _gives(window: AxisWindow, seen: np.ndarray, border: Border) -> bool:
    pattern = GridWindow(
        TokenGrid((len(seen),)), (window.kernel,), (window.dilation,), (window.stride,), (window.causal,), border
    )
    return Proposal("neighborhood", pattern).holds(seen)


def _dilation(look: Look, border: Border) -> int:
    if border == "circular":
        ahead = np.flatnonzero(look.visible[0])
        apart = np.where(ahead <= look.keys // 2, ahead, ahead - look.keys)
    else:
        rows = sorted({0, look.queries // 3, look.queries // 2, look.queries - 1})
        apart = np.concatenate([np.flatnonzero(look.visible[row]) - row for row in rows])
    return max(1, int(np.gcd.reduce(apart)))


def _strides(line: Look, causal: bool, border: Border) -> list[int]:
    """1, and what divides all places where the window moves."""
    if border == "circular":
        moved = np.flatnonzero(np.any(line.visible[1:] != line.visible[:-1], axis=1)) + 1
    else:
        change = line.first[1:] != line.first[:-1]
        if not causal:
            change = change | (line.last[1:] != line.last[:-1])
        moved = np.flatnonzero(change) + 1
    common = int(np.gcd.reduce(moved)) if len(moved) else 1
    divisors = [d for d in range(2, common + 1) if common % d == 0]
    return [1, *divisors[:_MAX_STRIDES]]


def _kernels(line: Look, stride: int, causal: bool, border: Border) -> list[int]:
    where = np.arange(line.queries)
    if causal:
        leader = np.minimum(where // stride * stride + stride - 1, line.queries - 1)
        reach = (leader - line.first + 1)[line.first > 0]
        return [int(reach.max())] if len(reach) else [line.queries]
    most = int(line.counts.max())
    if border != "truncate":
        return [most]
    left, right = int((where - line.first).max()), int((line.last - where).max())
    return sorted({most, 2 * left + 1, 2 * left, 2 * right + 1, 2 * right + 2} - {0})
