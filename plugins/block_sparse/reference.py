"""BlockSparseAttention by its definition: one query at a time, in float64. Slow and plain on purpose."""

from __future__ import annotations

import numpy as np


def counts_of(
    lengths: tuple[int, int], block: int, rows: np.ndarray, columns: np.ndarray, kinds: np.ndarray, masks: np.ndarray,
    counts: np.ndarray | None = None, order: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Int [b, h, Nq, Nk]: how often each query counts each key, pair by pair, from the lists of the op. ``order`` says
    nothing of that.
    """
    queries, keys = lengths
    out = np.zeros((*rows.shape[:2], queries, keys), int)
    for b in range(rows.shape[0]):
        for h in range(rows.shape[1]):
            for i in range(queries):
                first, full, end = (int(x) for x in rows[b, h, i // block])
                for at in range(first, end):
                    times = 1 if counts is None else int(counts[at])
                    for j in range(int(columns[at]) * block, min((int(columns[at]) + 1) * block, keys)):
                        word = 0 if at >= full else int(masks[kinds[at], i % block, j % block // 32])
                        if at >= full or (word >> (j % 32)) & 1:
                            out[b, h, i, j] += times
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
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, Dv], visible [Nq, Nk], [H, Nq, Nk] or [b, h, Nq, Nk] with b 1 or
    B and h 1 or H, bool or how often each key counts, key_mask bool broadcastable to [B, 1, 1, Nk], bias broadcastable
    to [B, H, Nq, Nk], sinks [H] or [1] logits without a value -> [B, Nq, H, Dv] in float64.

    Sparse Transformers, arXiv:1904.10509; Longformer, arXiv:2004.05150; BigBird, arXiv:2007.14062.
    """
    return with_log_sum_exp(
        q, k, v, visible, masked_rows, scale=scale, key_mask=key_mask, bias=bias, sinks=sinks
    )[0]  # fmt: skip


def with_log_sum_exp(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, masked_rows: str = "nan", *,
    scale: float | None = None, key_mask: np.ndarray | None = None, bias: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What ``reference`` gives, and [B, H, Nq]: the natural logarithm of what the weights of a query are divided by,
    that of its sink included; -inf where there is nothing.
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
    visible = np.asarray(visible)
    visible = visible.reshape((1,) * (4 - visible.ndim) + visible.shape)
    out = np.zeros((batch, queries, heads, v.shape[3]))
    lse = np.full((batch, heads, queries), -np.inf)
    for b in range(batch):
        for i in range(queries):
            for h in range(heads):
                g = h // (heads // kv_heads)
                row = visible[b if len(visible) > 1 else 0, h if visible.shape[1] > 1 else 0, i]
                seen = np.flatnonzero((row != 0) & open_keys[b] & (added[b, h, i] > -np.inf))
                sink = -np.inf if sinks is None else float(sinks[h if len(sinks) > 1 else 0])
                if not len(seen) and sink == -np.inf:
                    out[b, i, h] = {"zero": 0.0, "uniform": v[b, :, g].mean(axis=0), "nan": np.nan}[masked_rows]
                    continue
                scores = scale * (k[b, seen, g] @ q[b, i, h]) + added[b, h, i, seen]
                top = scores.max(initial=sink)
                weights = row[seen] * np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                out[b, i, h] = (weights / total) @ v[b, seen, g]
                lse[b, h, i] = np.log(total) + top
    return out, lse
