"""Dense attention by its definition, in float64, one query at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    parameters: Mapping[str, Any],
    *,
    scale: float | None = None,
    key_mask: np.ndarray | None = None,
) -> np.ndarray:
    """q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, Dv], key_mask bool broadcastable to [B, 1, 1, Nk] or None
    -> [B, Nq, H, Dv] in float64. ``parameters``: ``causal`` (bool), ``masked_rows``: what a query
    without any visible key gives, zero (default), uniform (the mean of all values) or nan.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    open_keys = np.ones((batch, keys), bool)
    if key_mask is not None:
        open_keys = np.broadcast_to(np.asarray(key_mask, bool), (batch, 1, 1, keys))[:, 0, 0]
    out = np.zeros((batch, queries, heads, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(queries):
                seen = [j for j in range(keys) if open_keys[b, j] and (not parameters.get("causal") or j <= i)]
                if not seen:
                    rule = parameters.get("masked_rows", "zero")
                    out[b, i, h] = {"zero": 0.0, "uniform": v[b, :, g].mean(axis=0), "nan": np.nan}[rule]
                    continue
                scores = scale * (k[b, seen, g] @ q[b, i, h])
                weights = np.exp(scores - scores.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, seen, g]
    return out
