"""Attention by its definition in float64 on sampled queries; shares nothing with kernels, bodies or references."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from cases import Case


def sample(tokens: int, count: int = 96) -> torch.Tensor:
    """Queries at both ends, around powers of two, and at random."""
    fixed = [0, 1, 63, 64, 127, 128, tokens // 2, tokens - 2, tokens - 1]
    rows = torch.cat([torch.tensor(fixed), torch.randint(0, tokens, (count,))])
    return torch.unique(rows.clamp(0, tokens - 1)).cuda()


def window(case: Case, axis: int, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last key on an axis of the queries at ``place``: NATTEN's clamped window, strided by groups."""
    size, kernel = case.attributes["grid"][axis], case.attributes["kernel_size"][axis]
    stride = case.attributes.get("stride", [1] * len(case.attributes["grid"]))[axis]
    centre = (place // stride * stride + stride // 2).clamp(max=size - 1)
    first = (centre - kernel // 2).clamp(0, size - kernel)
    return first, first + kernel - 1


def visible(case: Case, rows: torch.Tensor) -> torch.Tensor | None:
    """Bool [rows, tokens], or [heads, rows, tokens], or None where all see all."""
    keys = torch.arange(case.tokens, device=rows.device)
    if case.kept is not None:
        block = case.attributes["block"]
        blocks = torch.from_numpy(case.kept).to(rows.device)
        return blocks[:, rows // block][:, :, keys // block] & (keys <= rows[:, None])
    if case.grid is None:
        left, right = case.attributes.get("left", -1), case.attributes.get("right", -1)
        if left < 0 and right < 0:
            return None
        seen = torch.ones(len(rows), case.tokens, dtype=torch.bool, device=rows.device)
        if left >= 0:
            seen &= keys >= rows[:, None] - left
        if right >= 0:
            seen &= keys <= rows[:, None] + right
        return seen
    seen = torch.ones(len(rows), case.tokens, dtype=torch.bool, device=rows.device)
    for axis, size in enumerate(case.grid):
        step = prod(case.grid[axis + 1 :])
        first, last = window(case, axis, rows // step % size)
        place = keys // step % size
        seen &= (place >= first[:, None]) & (place <= last[:, None])
    return seen


def truth(
    case: Case, q: Any, k: Any, v: Any, rows: torch.Tensor, drawn: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> torch.Tensor:  # fmt: skip
    """[B, rows, H, D] float64, 0 of a query that sees nothing. ``drawn``: inputs beside operands and lists."""
    seen = visible(case, rows)
    group = case.heads // case.kv_heads
    out = []
    for head in range(case.heads):
        keys, values = k[:, :, head // group].double(), v[:, :, head // group].double()
        scores = torch.einsum("bid,bjd->bij", q[:, rows, head].double(), keys) * case.dim**-0.5
        softcap = case.attributes.get("softcap")
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if "bias" in drawn:
            scores = scores + drawn["bias"][head, rows].double()
        if "key_mask" in drawn:
            scores = scores.masked_fill(~drawn["key_mask"][:, 0], -torch.inf)
        if seen is not None:
            scores = scores.masked_fill(~(seen[head] if seen.ndim == 3 else seen), -torch.inf)
        blind = (scores == -torch.inf).all(-1, keepdim=True)  # of a head that is skipped; its softmax would be NaN
        out.append(torch.softmax(scores, -1).masked_fill(blind, 0.0) @ values)
    return torch.stack(out, 2)


def pairs(case: Case) -> float:
    """How many (query, key) pairs see one another, of one head and batch entry (their mean)."""
    if case.kept is not None:
        block, blocks = case.attributes["block"], case.kept.sum() / case.heads
        # Of blocks on the diagonal the upper half is hidden; a skipped head has none.
        halved = case.kept.trace(axis1=1, axis2=2).sum() / case.heads
        return float(blocks * block**2 - halved * block * (block - 1) / 2)
    if case.causal:
        return case.tokens * (case.tokens + 1) / 2
    if case.grid is not None:
        return float(case.tokens * prod(case.attributes["kernel_size"]))
    return float(case.tokens) ** 2
