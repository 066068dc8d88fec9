"""What a linear attention site means, in NumPy and float64: one query, one key at a time, no algebra."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attncompile.core.site import AttentionSite, Operand


def linear_output(site: AttentionSite, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of the linear attention ``site``, in its output's layout.

    ``values`` holds the site's operands (and gates, update weights and past state where it has them) by name.

    Raises:
        ValueError: the site is no linear attention, or its facts contradict its shapes.
    """
    return _run(site, values)[0]


def linear_state(site: AttentionSite, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The state [batch, kv_heads, head_dim, value_dim] after the last key of a causal ``site``."""
    return _run(site, values)[1]


def _run(site: AttentionSite, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    facts = site.linear
    if facts is None or site.kind != "linear":
        raise ValueError(f"{site.id} is not a linear attention site")
    query, key, value = (_bhnd(values[o.value], o) for o in (site.query, site.key, site.value))
    query, key = _features(query, facts.query_map, -1), _features(key, facts.key_map, -2)
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    if facts.causal and queries != keys:
        raise ValueError(f"a causal linear site has {queries} queries and {keys} keys")
    out = np.zeros((batch, heads, queries, value.shape[-1]))
    last = np.zeros((batch, kv_heads, key.shape[-1], value.shape[-1]))
    gates = _gates(site, values, batch, keys, kv_heads)
    beta = np.ones((batch, keys, kv_heads))
    if facts.update == "delta":
        beta = np.broadcast_to(values[facts.update_source].astype(np.float64), (batch, keys, kv_heads))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            rate = facts.decay_rates[h] if facts.decay_rates else 1.0
            state = np.zeros(last.shape[2:])
            if facts.past_state:
                state = values[facts.past_state][b, g].astype(np.float64)
            for i in range(queries):
                total = np.zeros(value.shape[-1])
                norm = 0.0
                if facts.causal and facts.form == "operator":
                    state = np.exp(gates[b, i, g])[:, None] * state
                    written = value[b, g, i]
                    if facts.update == "delta":
                        written = beta[b, i, g] * (written - state.T @ key[b, g, i])
                    state = state + np.outer(key[b, g, i], written)
                    total = state.T @ query[b, h, i]
                else:
                    for j in range(i + 1 if facts.causal else keys):
                        weight = float(query[b, h, i] @ key[b, g, j])
                        weight *= rate ** (i - j) if facts.causal else 1.0
                        total, norm = total + weight * value[b, g, j], norm + weight
                if facts.normaliser == "sum":
                    norm += facts.epsilon
                    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is what the site gives too
                        total = total / (norm if facts.floor is None else max(norm, facts.floor))
                out[b, h, i] = site.scale * total
            last[b, g] = state
    orders = {"BHND": (0, 1, 2, 3), "BNHD": (0, 2, 1, 3), "BHDN": (0, 1, 3, 2)}
    return out.transpose(orders[site.output.layout]), last


def _bhnd(array: np.ndarray, operand: Operand) -> np.ndarray:
    order = {"BHND": (0, 1, 2, 3), "BNHD": (0, 2, 1, 3), "BHDN": (0, 1, 3, 2)}[operand.layout]
    return array.astype(np.float64).transpose(order)


def _features(array: np.ndarray, kind: str, axis: int) -> np.ndarray:
    if kind == "identity":
        return array
    if kind == "relu":
        result = np.maximum(array, 0)
    elif kind == "elu+1":
        result = np.where(array > 0, array + 1, np.exp(np.minimum(array, 0)))
    elif kind == "exp":
        result = np.exp(array)
    elif kind == "softmax":
        top = np.exp(array - array.max(axis=axis, keepdims=True))
        result = top / top.sum(axis=axis, keepdims=True)
    else:
        raise ValueError(f"'{kind}' is not a feature map")
    return np.asarray(result)


def _gates(site: AttentionSite, values: Mapping[str, np.ndarray], batch: int, keys: int, kv_heads: int) -> np.ndarray:
    """The logarithms of the decays, [batch, keys, kv_heads, head_dim]."""
    facts = site.linear
    assert facts is not None
    gates = np.zeros((batch, keys, kv_heads, site.head_dim))
    if facts.decay_source:
        stored = values[facts.decay_source].astype(np.float64)
        gates += stored.reshape(batch, keys, kv_heads, -1)
    return gates
