"""NeighborhoodAttention by its definition: one query and one key at a time, in float64. Slow and plain on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def sees(i: int, j: int, total: int, parameters: Mapping[str, Any]) -> bool:
    """Whether the token at position i sees the token at position j among ``total`` tokens."""
    kernel = list(parameters["kernel_size"])
    rank = len(kernel)
    causal = list(parameters.get("causal", [0] * rank))
    left = list(parameters.get("left", [k - 1 if c else k // 2 for k, c in zip(kernel, causal, strict=True)]))
    dilation = list(parameters.get("dilation", [1] * rank))
    stride = list(parameters.get("stride", [1] * rank))
    prefix, suffix = int(parameters.get("prefix", 0)), int(parameters.get("suffix", 0))
    grid = list(parameters.get("grid", [-1] * rank))
    if grid == [-1]:
        grid = [total - prefix - suffix]

    if any(causal) and rank == 1 and j > i:
        return False
    for token in (i, j):
        if token < prefix or token >= total - suffix:
            return True

    query, key = _place(i - prefix, grid), _place(j - prefix, grid)
    distance = 0.0
    for axis in range(rank):
        d, k, s, size = dilation[axis], kernel[axis], stride[axis], grid[axis]
        if parameters.get("border") == "circular":
            start = list(parameters.get("shift", [0] * rank))[axis]
            if (query[axis] - start) % size // k != (key[axis] - start) % size // k:
                return False
            continue
        if query[axis] % d != key[axis] % d:
            return False
        # Positions and length of the line of tokens that share this remainder.
        q, t = query[axis] // d, key[axis] // d
        length = len(range(query[axis] % d, size, d))
        if causal[axis]:
            leader = min(q // s * s + s - 1, length - 1)
            if not (leader - t < k and t <= q):
                return False
            continue
        centre = min(q // s * s + s // 2, length - 1)
        right = k - 1 - left[axis]
        if parameters.get("border", "truncate") == "clamp":
            centre = max(left[axis], min(centre, length - 1 - right))
        if not centre - left[axis] <= t <= centre + right:
            return False
        if left[axis]:
            distance += ((t - centre) / left[axis]) ** 2
    return parameters.get("shape", "box") == "box" or distance <= 1 + 1e-9


def _place(token: int, grid: Sequence[int]) -> list[int]:
    """Of a token, along each axis."""
    found = []
    for size in reversed(grid):
        token, x = divmod(token, size)
        found.append(x)
    return found[::-1]


def added_in_ring(i: int, j: int, h: int, parameters: Mapping[str, Any], window_bias: np.ndarray | None) -> float:
    """What border circular adds to the score that head h gives the tokens at i and j of one window."""
    kernel, grid = list(parameters["kernel_size"]), list(parameters["grid"])
    shift = list(parameters.get("shift", [0] * len(kernel)))
    total, crossed, places = 0.0, False, [0, 0]
    for axis, (a, b) in enumerate(zip(_place(i, grid), _place(j, grid), strict=True)):
        k, start = kernel[axis], shift[axis]
        crossed |= (a - start) // k != (b - start) // k
        for end, x in enumerate((a, b)):
            places[end] = places[end] * k + (x - start) % k
    if crossed:
        total += float(parameters.get("seam", 0.0))
    if window_bias is not None:
        total += float(window_bias[h if len(window_bias) > 1 else 0, places[0], places[1]])
    return total


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    parameters: Mapping[str, Any],
    *,
    scale: float | None = None,
    key_mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    window_bias: np.ndarray | None = None,
) -> np.ndarray:
    """q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, Dv], key_mask bool broadcastable to [B, 1, 1, Nk] or None,
    bias broadcastable to [B, H, Nq, Nk] or None, sinks [H] logits without a value or None, window_bias [H or 1, W, W]
    by places in the window or None (border circular) -> [B, Nq, H, Dv] in float64. Queries are the last Nq of the Nk
    tokens.

    Neighborhood Attention Transformer, arXiv:2204.07143; dilation, arXiv:2209.15001; stride, arXiv:2504.16922;
    ball, arXiv:2412.16112.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    open_keys = np.ones((batch, keys), bool)
    if key_mask is not None:
        open_keys = np.broadcast_to(np.asarray(key_mask, bool), (batch, 1, 1, keys))[:, 0, 0]
    added = np.zeros((batch, heads, queries, keys))
    if bias is not None:
        added = added + np.asarray(bias, np.float64)
    out = np.zeros((batch, queries, heads, v.shape[3]))
    for i in range(queries):
        window = [j for j in range(keys) if sees(i + keys - queries, j, keys, parameters)]
        for b in range(batch):
            seen = [j for j in window if open_keys[b, j]]
            for h in range(heads):
                g = h // (heads // kv_heads)
                if not seen:
                    rule = parameters.get("masked_rows", "zero")
                    out[b, i, h] = {"zero": 0.0, "uniform": v[b, :, g].mean(axis=0), "nan": np.nan}[rule]
                    continue
                scores = scale * (k[b, seen, g] @ q[b, i, h]) + added[b, h, i, seen]
                if parameters.get("border") == "circular":
                    scores = scores + [added_in_ring(i, j, h, parameters, window_bias) for j in seen]
                weights = np.exp(scores - scores.max())
                rest = 0.0 if sinks is None else float(np.exp(sinks[h] - scores.max()))
                out[b, i, h] = weights / (weights.sum() + rest) @ v[b, seen, g]
    return out
