"""Dense attention by its definition, in float64, one query at a time."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf, log
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
    bias: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    key_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, Dv] -> [B, Nq, H, Dv] in float64. Optional, None where absent:
    key_mask bool broadcastable to [B, 1, 1, Nk], bias and bool mask to [B, H, Nq, Nk], sinks [H] or [1] logits without
    a value, key_lengths [B].

    ``parameters``: ``left`` and ``right`` (int, -1: unlimited; query i stands at i + Nk - Nq), ``softcap`` (0: none),
    ``masked_rows``: what a query without any visible key gives, zero (default), uniform (the mean of all values) or
    nan; a query that has a sink gives zero then, since the sink takes all the weight.
    """
    return with_log_sum_exp(
        q, k, v, parameters, scale=scale, key_mask=key_mask, bias=bias, sinks=sinks, mask=mask, key_lengths=key_lengths
    )[0]


def with_log_sum_exp(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Mapping[str, Any], *, scale: float | None = None,
    **optional: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What ``reference`` gives, and [B, H, Nq]: the natural logarithm of what the weights of a query are divided by,
    that of its sink included; -inf where there is nothing.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros((batch, queries, heads, v.shape[3]))
    lse = np.full((batch, heads, queries), -inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(queries):
                seen = np.flatnonzero(_seen(b, h, i, queries, keys, parameters, optional))
                scores = _scores(scale * (k[b, seen, g] @ q[b, i, h]), b, h, i, keys, seen, parameters, optional)
                sinks = optional.get("sinks")
                sink = -inf if sinks is None else float(sinks[h if len(sinks) > 1 else 0])
                top = scores.max(initial=sink)
                if top == -inf:
                    rule = parameters.get("masked_rows", "zero")
                    out[b, i, h] = {"zero": 0.0, "uniform": v[b, :, g].mean(axis=0), "nan": np.nan}[rule]
                    continue
                weights = np.exp(scores - top)
                total = float(weights.sum()) + exp(sink - top)
                out[b, i, h] = weights / total @ v[b, seen, g]
                lse[b, h, i] = log(total) + top
    return out, lse


def _seen(
    b: int, h: int, i: int, queries: int, keys: int, parameters: Mapping[str, Any],
    optional: Mapping[str, np.ndarray | None],
) -> np.ndarray:  # fmt: skip
    """Bool [Nk]: the keys that a query sees."""
    place = np.arange(keys)
    distance = place - (i + keys - queries)
    left, right = int(parameters.get("left", -1)), int(parameters.get("right", -1))
    seen = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    lengths = optional.get("key_lengths")
    if lengths is not None:
        seen &= place < int(lengths[b])
    for name in ("key_mask", "mask"):
        given = optional.get(name)
        if given is not None:
            seen &= _row(given, keys, b, h, i).astype(bool)
    return seen


def _scores(
    scores: np.ndarray, b: int, h: int, i: int, keys: int, seen: np.ndarray, parameters: Mapping[str, Any],
    optional: Mapping[str, np.ndarray | None],
) -> np.ndarray:  # fmt: skip
    """The softcap comes before the bias."""
    softcap = float(parameters.get("softcap", 0.0))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    bias = optional.get("bias")
    return scores if bias is None else scores + _row(bias, keys, b, h, i)[seen]


def _row(given: np.ndarray, keys: int, *place: int) -> np.ndarray:
    """The row [Nk] of a query in something broadcastable to [B, H, Nq, Nk]."""
    rest = given.shape[:-1]
    last = place[3 - len(rest) :]
    row = given[tuple(0 if size == 1 else x for size, x in zip(rest, last, strict=True))]
    return np.broadcast_to(row, (keys,))
