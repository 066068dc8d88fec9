"""What a site says that an operator computes, one batch entry and head at a time: caches and key ends included.

Shares no code with the lifter, the mechanisms or their references.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attncompile.core.mask import MaskPart
from attncompile.core.site import AttentionSite, Operand

Values = Mapping[str, np.ndarray]


def wanted(site: AttentionSite) -> list[str]:
    """The values of the graph that ``rebuild`` reads."""
    cache = site.cache if site.cache is not None and site.cache.form == "operator" else None
    found = [site.query.value, site.key.value, site.value.value, site.sinks, site.head_scale]
    found += [p.source or "" for p in site.mask.parts if p.pattern is None]
    found += [site.mask.ends.source] if site.mask.ends else []
    found += [cache.past_key, cache.past_value] if cache else []
    return list(dict.fromkeys(v for v in found if v))


def rebuild(site: AttentionSite, values: Values) -> np.ndarray:
    """The output [batch, heads, queries, dim] in float64; NaN where the facts do not say what a padded query gives."""
    q, k, v = (_heads_first(values[o.value], o) for o in (site.query, site.key, site.value))
    batch, heads, queries, _ = q.shape
    if site.cache is not None and site.cache.form == "operator" and site.cache.past_key:
        k, v = _with_past(site, values, k, v)
    out = np.zeros((batch, heads, queries, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // k.shape[1])
            scores = site.scale * (q[b, h] @ k[b, shared].T)
            if site.head_scale:
                scores *= float(values[site.head_scale].reshape(-1)[h])
            if site.softcap:
                scores = site.softcap * np.tanh(scores / site.softcap)
            seen, scores = _masked(site, values, scores, b, h)
            for i in range(queries):
                out[b, h, i] = _row(site, values, scores[i], seen[i], v[b, shared], h)
    ends = _ends(site, values)
    if site.mask.ends is not None and site.mask.ends.offset == "ends-or-start" and ends is not None:
        for b in range(batch):
            out[b, :, min(queries, ends[b]) :] = np.nan
    return out


def in_layout(site: AttentionSite, out: np.ndarray) -> np.ndarray:
    """[batch, heads, queries, dim] in the site's own layout."""
    return out if site.output.layout == "BHND" else out.transpose(0, 2, 1, 3)


def _heads_first(array: np.ndarray, operand: Operand) -> np.ndarray:
    return (array if operand.layout == "BHND" else array.transpose(0, 2, 1, 3)).astype(np.float64)


def _ends(site: AttentionSite, values: Values) -> list[int] | None:
    ends = site.mask.ends
    return None if ends is None else [int(n) + ends.plus for n in values[ends.source].reshape(-1)]


def _with_past(site: AttentionSite, values: Values, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Past and new keys: joined, or, where every batch entry has its own end, the new ones right before it."""
    assert site.cache is not None
    joined = []
    for past_name, new in ((site.cache.past_key, k), (site.cache.past_value, v)):
        past, ends = values[past_name].astype(np.float64), _ends(site, values)
        both = np.concatenate([past, new], axis=2)
        if ends is not None:
            for b, end in enumerate(ends):
                first = max(end - new.shape[2], 0)
                both[b, :, first : first + new.shape[2]] = new[b]
        joined.append(both)
    return joined[0], joined[1]


def _masked(site: AttentionSite, values: Values, scores: np.ndarray, b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = scores.shape
    seen = np.ones(scores.shape, bool)
    offset, ends = keys - queries, _ends(site, values)
    if ends is not None and site.mask.ends is not None:
        seen &= np.arange(keys)[None] < ends[b]
        if site.mask.ends.offset != "sequence":
            offset = ends[b] - queries
        if site.mask.ends.offset == "ends-or-start":
            offset = max(offset, 0)
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - offset
    for part in site.mask.parts:
        if part.pattern is not None:
            seen &= part.pattern.visible(queries, keys)
        elif part.kind in ("causal", "window"):
            seen &= (distance >= -part.left) | (part.left < 0)
            seen &= (distance <= part.right) | (part.right < 0)
        else:
            data = _source(part, values, b, h, scores.shape)
            if part.additive:
                scores = scores + data
            elif np.issubdtype(data.dtype, np.integer):
                scores = scores + np.where(data != 0, 0.0, site.mask.fills[-1])
            else:
                seen &= data
    return seen, scores


def _source(part: MaskPart, values: Values, b: int, h: int, shape: tuple[int, int]) -> np.ndarray:
    assert part.source is not None
    data = values[part.source]
    if np.issubdtype(data.dtype, np.integer):  # [batch, keys] or [batch, queries, keys]
        return np.broadcast_to(data[b], shape)
    data = data.reshape((1,) * (4 - data.ndim) + data.shape)
    data = data[b if data.shape[0] > 1 else 0, h if data.shape[1] > 1 else 0]
    if data.shape[1] not in (1, shape[1]):  # keys beyond a short mask are hidden
        nothing = False if data.dtype == np.bool_ else -np.inf
        data = np.pad(data, ((0, 0), (0, shape[1] - data.shape[1])), constant_values=nothing)
    return np.broadcast_to(data if data.dtype == np.bool_ else data.astype(np.float64), shape)


def _row(
    site: AttentionSite, values: Values, scores: np.ndarray, seen: np.ndarray, v: np.ndarray, h: int
) -> np.ndarray:
    sink = float(values[site.sinks].reshape(-1)[h]) if site.sinks else -np.inf
    live = seen & ~np.isneginf(scores)
    if not live.any() and not np.isnan(scores[seen]).any():
        guard = site.mask.guarded and all(np.isinf(f) for f in site.mask.fills)
        rows = "zero" if guard else site.mask.masked_rows
        nothing = np.full(v.shape[1], np.nan) if rows == "nan" else np.zeros(v.shape[1])
        return v.mean(axis=0) if rows == "uniform" else nothing
    top = max(scores[live].max(), sink)
    weights = np.where(live, np.exp(np.where(live, scores, top) - top), 0.0)
    return weights / (weights.sum() + np.exp(sink - top)) @ v
