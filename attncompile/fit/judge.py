"""How far a fitted map is from the softmax: NumPy, from the definition. Shares no code with the fitting.

Features are taken in float32, as the ops take them: what overflows there is infinite here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attncompile.core.feature_map import EPSILON
from attncompile.fit.capture import Entry, Place, entries
from attncompile.fit.found import Distance

_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Distances of all query heads of one key head on some entries. ``arrays`` hold this key head's part of the maps:
    ``query_weight`` [heads, D, W], ``key_weight`` [D, W] and so on.
    """

    place: Place
    head: int
    numbers: tuple[int, ...]
    kind: str
    arrays: Mapping[str, np.ndarray]
    scale: float
    causal: bool

    def __call__(self, threads: int) -> list[Distance]:
        found = entries(self.place, self.head, self.numbers)
        return distances(found, self.kind, self.arrays, self.scale, self.causal)


def distances(
    found: Sequence[Entry], kind: str, arrays: Mapping[str, np.ndarray], scale: float, causal: bool
) -> list[Distance]:
    """One for each query head of ``found``."""
    heads = found[0].query.shape[0]
    totals = np.zeros((heads, 4))
    rows = 0
    for entry in found:
        rows += len(entry.rows)
        for h in range(heads):
            want = weights(entry, h, scale, causal)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                ours = fitted_weights(entry, h, kind, arrays, causal)
                value = entry.value.astype(np.float64)
                there, here = want @ value, ours @ value
                if not (np.isfinite(ours).all() and np.isfinite(here).all()):
                    totals[h] = np.inf
                    continue
                ratio = np.log(np.maximum(want, _TINY)) - np.log(np.maximum(ours, _TINY))
                totals[h] += (
                    np.nan if kind == "mala" else (want * ratio).sum(), np.abs(ours - want).sum(),
                    np.square(here - there).sum(), np.square(there).sum(),
                )  # fmt: skip
    return [
        Distance(kl / rows, l1 / rows, float(np.sqrt(error / max(size, _TINY))) if np.isfinite(error) else np.inf,
                 size if np.isfinite(size) else 0.0)
        for kl, l1, error, size in totals.tolist()
    ]  # fmt: skip


def weights(entry: Entry, head: int, scale: float, causal: bool) -> np.ndarray:
    """float64 [R, N]: the softmax."""
    scores = scale * entry.query[head].astype(np.float64) @ entry.key.astype(np.float64).T
    if causal:
        scores[np.arange(len(entry.key))[None, :] > entry.rows[:, None]] = -np.inf
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))


def fitted_weights(
    entry: Entry, head: int, kind: str, arrays: Mapping[str, np.ndarray], causal: bool
) -> np.ndarray:  # fmt: skip
    """float64 [R, N]: what every value counts with a fitted map; of ``mala`` numbers that may be negative."""
    query, key = entry.query[head], entry.key
    if kind == "mala":
        query, key = _elu(query) * np.float32(arrays["magnitude"][head]), _elu(key)
    else:
        query, key = query @ arrays["query_weight"][head], key @ arrays["key_weight"]
        if kind == "relu":
            query, key = np.maximum(query + arrays["query_bias"][head], 0), np.maximum(key + arrays["key_bias"], 0)
        else:
            query, key = (np.concatenate([np.exp(x), np.exp(-x)], axis=1) for x in (query, key))
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    if causal:
        scores[np.arange(len(key))[None, :] > entry.rows[:, None]] = 0.0
    total = scores.sum(axis=1, keepdims=True)
    if kind == "mala":
        return np.asarray((1 + 1 / total) * scores - total / len(key))
    return np.asarray(scores / (total + (EPSILON if kind == "relu" else 0.0)))


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))).astype(np.float32)
