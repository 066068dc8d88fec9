"""Dense attention by its definition, in float64, one query at a time."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf, log, tanh
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
                scores = {}
                for j in range(keys):
                    if _sees(b, h, i, j, queries, keys, parameters, optional):
                        scores[j] = _score(scale * float(q[b, i, h] @ k[b, j, g]), b, h, i, j, parameters, optional)
                sinks = optional.get("sinks")
                sink = -inf if sinks is None else float(sinks[h if len(sinks) > 1 else 0])
                top = max([*scores.values(), sink])
                if top == -inf:
                    rule = parameters.get("masked_rows", "zero")
                    out[b, i, h] = {"zero": 0.0, "uniform": v[b, :, g].mean(axis=0), "nan": np.nan}[rule]
                    continue
                weights = {j: exp(score - top) for j, score in scores.items()}
                total = sum(weights.values()) + exp(sink - top)
                for j, weight in weights.items():
                    out[b, i, h] += weight / total * v[b, j, g]
                lse[b, h, i] = log(total) + top
    return out, lse


def _sees(
    b: int, h: int, i: int, j: int, queries: int, keys: int, parameters: Mapping[str, Any],
    optional: Mapping[str, np.ndarray | None],
) -> bool:  # fmt: skip
    distance = j - (i + keys - queries)
    left, right = int(parameters.get("left", -1)), int(parameters.get("right", -1))
    if (left >= 0 and distance < -left) or (right >= 0 and distance > right):
        return False
    lengths = optional.get("key_lengths")
    if lengths is not None and j >= int(lengths[b]):
        return False
    for name in ("key_mask", "mask"):
        given = optional.get(name)
        if given is not None and not _at(given, b, h, i, j):
            return False
    return True


def _score(
    score: float, b: int, h: int, i: int, j: int, parameters: Mapping[str, Any],
    optional: Mapping[str, np.ndarray | None],
) -> float:  # fmt: skip
    """The softcap comes before the bias."""
    softcap = float(parameters.get("softcap", 0.0))
    if softcap:
        score = softcap * tanh(score / softcap)
    bias = optional.get("bias")
    return score if bias is None else score + float(_at(bias, b, h, i, j))


def _at(given: np.ndarray, *place: int) -> Any:
    """The element of something broadcastable to [B, H, Nq, Nk]."""
    last = place[4 - given.ndim :]
    return given[tuple(0 if size == 1 else x for size, x in zip(given.shape, last, strict=True))]
