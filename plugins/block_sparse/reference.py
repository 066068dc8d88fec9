"""BlockSparseAttention by its definition: one query at a time, in float64. Slow and plain on purpose."""

from __future__ import annotations

import numpy as np


def counts_of(
    lengths: list[int], block: int, offsets: list[int], columns: list[int], kinds: list[int], masks: np.ndarray,
    lists: int = 1, counts: list[int] | None = None,
) -> np.ndarray:  # fmt: skip
    """Int [lists, Nq, Nk]: how often each query counts each key, pair by pair, from the attributes of the op."""
    queries, keys = lengths
    rows = -(-queries // block)
    out = np.zeros((lists, queries, keys), int)
    for s in range(lists):
        for i in range(queries):
            row = s * rows + i // block
            for at in range(offsets[row], offsets[row + 1]):
                times = counts[at] if counts else 1
                for j in range(columns[at] * block, min((columns[at] + 1) * block, keys)):
                    if kinds[at] == 0:
                        out[s, i, j] += times
                        continue
                    bit = i % block * block + j % block
                    out[s, i, j] += times * (int(masks[kinds[at] - 1][bit // 8]) >> (7 - bit % 8) & 1)
    return out


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    visible: np.ndarray,
    masked_rows: str = "nan",
    *,
    scale: float | None = None,
    key_mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, Dv], visible [Nq, Nk] or [H, Nq, Nk], bool or how often each key
    counts, key_mask bool broadcastable to [B, 1, 1, Nk], bias broadcastable to [B, H, Nq, Nk] -> [B, Nq, H, Dv] in
    float64.

    Sparse Transformers, arXiv:1904.10509; Longformer, arXiv:2004.05150; BigBird, arXiv:2007.14062.
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
    visible = np.asarray(visible).reshape((-1, queries, keys))
    out = np.zeros((batch, queries, heads, v.shape[3]))
    for b in range(batch):
        for i in range(queries):
            for h in range(heads):
                g = h // (heads // kv_heads)
                row = visible[h if len(visible) > 1 else 0, i]
                seen = [j for j in range(keys) if row[j] and open_keys[b, j]]
                if not seen:
                    out[b, i, h] = {"zero": 0.0, "uniform": v[b, :, g].mean(axis=0), "nan": np.nan}[masked_rows]
                    continue
                scores = scale * (k[b, seen, g] @ q[b, i, h]) + added[b, h, i, seen]
                weights = row[seen] * np.exp(scores - scores.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, seen, g]
    return out
