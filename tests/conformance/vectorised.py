"""The ops in float64 by whole matrices, in torch: fast enough for hundreds of configurations, on a GPU too. Shares no
code with kernels, bodies or the naive references; ``test_references.py`` compares it with those.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from attncompile.core.kernel import OpCall
from tests.conformance.block_lists import matrix

Arrays = Mapping[str, np.ndarray]


def expected(
    call: OpCall, inputs: Arrays, device: str = "cpu", half: str = "", scores: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(output [B, Nq, H, Dv], natural log-sum-exp [B, H, Nq]), both float64.

    With ``half`` (float16, bfloat16, float32): what that type makes of it at best. Products are summed in float32,
    weights are rounded to it before the second product, and so is the output; with ``scores`` the scaled query and the
    scores too, as in a graph of that type.
    """
    wide = torch.float32 if half else torch.float64
    small = getattr(torch, half) if half else torch.float64
    given = {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in inputs.items()}
    times = None
    if "rows" in inputs:
        counted = matrix(dict(inputs), call.query_length or 0, call.key_length or 0, call.attributes["block"])
        times = torch.from_numpy(counted).to(device)
    seen_by_place = visible(call, device)
    batch, queries, keys = call.batch or 0, call.query_length or 0, call.key_length or 0
    out = torch.empty(batch, queries, call.heads, call.value_dim, dtype=torch.float64, device=device)
    lse = torch.empty(batch, call.heads, queries, dtype=torch.float64, device=device)
    scale = call.attributes.get("scale")
    scale = call.head_dim**-0.5 if scale is None else scale
    softcap, rule = call.attributes.get("softcap", 0.0), call.attributes["masked_rows"]
    for b in range(batch):
        for h in range(call.heads):
            kv = h * call.kv_heads // call.heads
            query, key, value = given["query"][b, :, h], given["key"][b, :, kv], given["value"][b, :, kv]
            if scores:
                query = (query.to(wide) * scale).to(small)
                s = (query.to(wide) @ key.to(wide).T).to(small).to(wide)
            else:
                s = query.to(wide) @ key.to(wide).T * scale
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            if "bias" in given:
                s = s + _of(given["bias"], b, h).to(wide)
            seen = seen_by_place if times is None else _of(times, b, h) > 0
            for name in ("key_mask", "mask"):
                if name in given:
                    seen = seen & _of(given[name], b, h)
            if "key_lengths" in given:
                seen = seen & (torch.arange(keys, device=device) < given["key_lengths"][b])
            s = s.masked_fill(~seen, -torch.inf)
            if "sinks" in given:
                sink = given["sinks"].reshape(-1).to(wide)
                s = torch.cat([s, sink[h if len(sink) > 1 else 0].expand(queries, 1)], 1)
            top = s.amax(1, keepdim=True)
            alive = top[:, 0] > -torch.inf
            weights = torch.exp(s - torch.where(alive[:, None], top, torch.zeros_like(top)))
            if times is not None:
                weights[:, :keys] *= _of(times, b, h).to(wide)
            total = weights.sum(1, keepdim=True)
            weights = weights[:, :keys].to(small).to(wide)
            row = weights @ value.to(wide) / torch.where(alive[:, None], total, torch.ones_like(total))
            dead = {"zero": torch.zeros_like(row[0]), "nan": torch.full_like(row[0], torch.nan)}.get(rule)
            dead = value.to(wide).mean(0) if dead is None else dead
            out[b, :, h] = torch.where(alive[:, None], row, dead).to(small).double()
            lse[b, h] = (torch.log(total) + top)[:, 0].double()
    return out.cpu().numpy(), lse.cpu().numpy()


def _of(x: torch.Tensor, batch: int, head: int) -> torch.Tensor:
    """[Nq or 1, Nk or 1] of one batch entry and head of something broadcastable to [B, H, Nq, Nk]."""
    four = x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))
    return four[batch if len(four) > 1 else 0, head if four.shape[1] > 1 else 0]


def visible(call: OpCall, device: str) -> torch.Tensor:
    """Bool [Nq, Nk]: what attributes alone let through."""
    queries, keys = call.query_length or 0, call.key_length or 0
    at = torch.arange(queries, device=device)[:, None] + keys - queries
    if "kernel_size" in call.attributes:
        return _grid(call.attributes, at[:, 0], torch.arange(keys, device=device), keys)
    ahead = torch.arange(keys, device=device)[None] - at
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    left, right = call.attributes.get("left", -1), call.attributes.get("right", -1)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _grid(given: Mapping[str, Any], i: torch.Tensor, j: torch.Tensor, tokens: int) -> torch.Tensor:
    """Bool [len(i), len(j)] for token numbers ``i`` and ``j``."""
    size = given["kernel_size"]
    axes = range(len(size))
    causal = given.get("causal", [0 for _ in axes])
    left = given.get("left", [size[a] - 1 if causal[a] else size[a] // 2 for a in axes])
    stride, dilation = given.get("stride", [1 for _ in axes]), given.get("dilation", [1 for _ in axes])
    prefix, suffix = given.get("prefix", 0), given.get("suffix", 0)
    grid = given.get("grid", [-1])
    grid = [tokens - prefix - suffix] if grid == [-1] else grid
    inside = torch.ones(len(i), len(j), dtype=torch.bool, device=i.device)
    far = torch.zeros(len(i), len(j), dtype=torch.float64, device=i.device)
    for a in axes:
        after = prod(grid[a + 1 :])
        place = [(x - prefix).div(after, rounding_mode="floor") % grid[a] for x in (i, j)]
        line, step = [p % dilation[a] for p in place], [p // dilation[a] for p in place]
        inside &= line[0][:, None] == line[1][None]
        length = (grid[a] - line[0] + dilation[a] - 1) // dilation[a]
        q, k = step[0], step[1][None]
        head = q - q % stride[a]
        if causal[a]:
            leader = torch.minimum(head + stride[a] - 1, length - 1)
            inside &= (k > (leader - size[a])[:, None]) & (k <= q[:, None])
            continue
        centre = torch.minimum(head + stride[a] // 2, length - 1)
        right = size[a] - 1 - left[a]
        if given.get("border", "truncate") == "clamp":
            centre = torch.maximum(torch.minimum(centre, length - 1 - right), torch.full_like(centre, left[a]))
        distance = k - centre[:, None]
        inside &= (distance >= -left[a]) & (distance <= right)
        far += (distance.double() / max(left[a], 1)) ** 2
    if given.get("shape", "box") == "ball":
        inside &= far <= 1 + 1e-9
    apart = [(x < prefix) | (x >= tokens - suffix) for x in (i, j)]
    inside |= apart[0][:, None] | apart[1][None]
    if len(size) == 1 and causal[0]:
        inside &= j[None] <= i[:, None]
    return inside
