"""Linear attention by its definition, in float64: one query and one key at a time, no states before they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf
from typing import Any

import numpy as np


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    parameters: Mapping[str, Any],
    *,
    log_decay: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    key_weight: np.ndarray | None = None,
    feature_weight: np.ndarray | None = None,
    query_weight: np.ndarray | None = None,
    initial_state: np.ndarray | None = None,
    initial_total: np.ndarray | None = None,
) -> np.ndarray:
    """q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, E] -> [B, Nq, H, E] in float64.

    ``parameters``: ``query_map``, ``key_map``, ``normaliser``, ``epsilon``, ``floor``, ``scale``, ``causal`` as the ops
    have them. ``log_decay`` [G], [B, Nk, G] or [B, Nk, G, D]; ``beta`` [B, Nk, G or 1] is the delta rule's;
    ``key_weight`` [B, Nk, G]; ``feature_weight`` [G, D, W] and ``query_weight`` [H, D, W] are Hedgehog's;
    ``initial_state`` [B, G, F, E] and ``initial_total`` [B, G, F] stand before the first key.
    """
    return with_state(
        q, k, v, parameters, log_decay=log_decay, beta=beta, key_weight=key_weight, feature_weight=feature_weight,
        query_weight=query_weight, initial_state=initial_state, initial_total=initial_total,
    )[0]  # fmt: skip


def with_state(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Mapping[str, Any], **given: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``reference`` gives, the state [B, G, F, E] after the last key, and the sum of features [B, G, F] there."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, _ = q.shape
    keys, groups = k.shape[1], k.shape[2]
    causal = bool(parameters.get("causal", False))
    if causal and queries != keys:
        raise ValueError(f"{queries} queries and {keys} keys under a triangle")
    out = np.zeros((batch, queries, heads, v.shape[3]))
    states, totals = [], []
    for b in range(batch):
        for g in range(groups):
            fk = _features(k[b, :, g], str(parameters.get("key_map", "none")), 0, _at(given.get("feature_weight"), g))
            decay = _decays(given.get("log_decay"), b, g, keys, fk.shape[1])
            state = np.zeros((fk.shape[1], v.shape[3]))
            total = np.zeros(fk.shape[1])
            for name, start in (("initial_state", state), ("initial_total", total)):
                first = given.get(name)
                if first is not None:
                    start += np.asarray(first, np.float64)[b, g]
            mean = v[b, :, g].mean(axis=0)
            mine = [h for h in range(heads) if h // (heads // groups) == g]
            fq = {
                h: _features(q[b, :, h], str(parameters.get("query_map", "none")), 1, _at(given.get("query_weight"), h))
                for h in mine
            }
            for j in range(keys):
                kept = np.exp(decay[j])
                state, total = kept[:, None] * state, kept * total
                written = v[b, j, g].copy()
                rate = given.get("beta")
                if rate is not None:
                    written = float(rate[b, j, g if rate.shape[2] > 1 else 0]) * (written - fk[j] @ state)
                weight = given.get("key_weight")
                times = 1.0 if weight is None else float(weight[b, j, g])
                state += times * np.outer(fk[j], written)
                total += fk[j]
                if causal:
                    for h in mine:
                        out[b, j, h] = _read(fq[h][j], state, total, mean, parameters)
            if not causal:
                for h in mine:
                    for i in range(queries):
                        out[b, i, h] = _read(fq[h][i], state, total, mean, parameters)
            states.append(state)
            totals.append(total)
    shape = (batch, groups)
    return out, np.array(states).reshape(*shape, *states[0].shape), np.array(totals).reshape(*shape, -1)


def _read(
    q: np.ndarray, state: np.ndarray, total: np.ndarray, mean: np.ndarray, parameters: Mapping[str, Any]
) -> np.ndarray:
    """What a query of features ``q`` gets."""
    found, s = q @ state, float(q @ total)
    scale, kind = float(parameters.get("scale", 1.0)), parameters.get("normaliser", "none")
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "none":
            return np.asarray(scale * found)
        if kind == "sum":
            floor = float(parameters.get("floor", -inf))
            below = s + float(parameters.get("epsilon", 0.0))
            return np.asarray(scale * found / np.float64(max(below, floor) if below == below else below))
        if kind == "mala":
            return np.asarray((1.0 + 1.0 / np.float64(s)) * found - s * mean)
        if kind == "inline":
            return np.asarray(found - s * mean + mean)
    raise ValueError(f"'{kind}' is no normaliser")


def _features(x: np.ndarray, kind: str, axis: int, weight: np.ndarray | None) -> np.ndarray:
    """Features of the rows of ``x`` [N, D]; a softmax runs over ``axis``."""
    if kind == "none":
        return x
    if kind == "relu":
        return np.asarray(np.where(x < 0, 0.0, x))
    if kind == "elu+1":
        return np.array([[1 + z if z > 0 else exp(z) for z in row] for row in x])
    if kind == "exp":
        return np.asarray(np.exp(x))
    if kind == "softmax":
        if axis == 0:
            return _features(x.T, kind, 1, None).T
        rows = []
        for row in x:
            top = [exp(z - row.max()) for z in row]
            rows.append([z / sum(top) for z in top])
        return np.array(rows)
    if kind == "hedgehog":
        assert weight is not None
        inner = x @ np.asarray(weight, np.float64)
        return np.array([[exp(z) for z in row] + [exp(-z) for z in row] for row in inner])
    raise ValueError(f"'{kind}' is not a feature map")


def _at(weight: np.ndarray | None, head: int) -> np.ndarray | None:
    return None if weight is None else weight[head]


def _decays(given: np.ndarray | None, b: int, g: int, keys: int, features: int) -> np.ndarray:
    """Logarithms of the decays [keys, features]."""
    if given is None:
        return np.zeros((keys, features))
    x = np.asarray(given, np.float64)
    if x.ndim == 1:
        return np.full((keys, features), x[g])
    return np.broadcast_to(x[b, :, g].reshape(keys, -1), (keys, features))
