"""How far two arrays are apart. Pure NumPy, computed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_PART = 1 << 20
"""Elements of logits that are looked at at once."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Distances of ``ours`` from ``reference``. ``kl`` and ``top1_agreement`` treat the last axis as logits and are
    None where it has fewer than two entries. ``elements`` is the number of values compared. ``perplexity`` is its
    relative rise, known only of the logits of a model whose input holds the next tokens.
    """

    relative_l2: float
    max_abs: float
    cosine: float
    psnr: float
    kl: float | None
    top1_agreement: float | None
    elements: int
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinities or NaN: they become None."""

        def clean(x: float | None) -> float | None:
            return x if x is not None and math.isfinite(x) else None

        return {
            "relative_l2": clean(self.relative_l2), "max_abs": clean(self.max_abs), "cosine": clean(self.cosine),
            "psnr": clean(self.psnr), "kl": clean(self.kl), "top1_agreement": clean(self.top1_agreement),
            "elements": self.elements, "perplexity": clean(self.perplexity),
        }  # fmt: skip


def compute(reference: np.ndarray, ours: np.ndarray) -> Metrics:
    """All metrics of two arrays of one shape. NaN anywhere gives NaN, never a good number; an empty array raises."""
    if reference.shape != ours.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {ours.shape}")
    if reference.size == 0:
        raise ValueError("nothing to compare: the arrays are empty")
    r, o = reference.astype(np.float64), ours.astype(np.float64)
    logits = r.ndim >= 1 and r.shape[-1] >= 2
    return Metrics(
        relative_l2=relative_l2(r, o), max_abs=max_abs(r, o), cosine=cosine(r, o), psnr=psnr(r, o),
        kl=kl_divergence(r, o) if logits else None, top1_agreement=top1_agreement(r, o) if logits else None,
        elements=r.size,
    )  # fmt: skip


def rms(x: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def relative_l2(reference: np.ndarray, ours: np.ndarray) -> float:
    """||ours - reference|| / ||reference||; 0 for two zero arrays, inf if only the reference is zero."""
    error = float(np.linalg.norm((ours.astype(np.float64) - reference.astype(np.float64)).ravel()))
    size = float(np.linalg.norm(reference.astype(np.float64).ravel()))
    if size == 0:
        return math.nan if math.isnan(error) else (0.0 if error == 0 else math.inf)
    return error / size


def max_abs(reference: np.ndarray, ours: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.max(np.abs(ours.astype(np.float64) - reference.astype(np.float64))))


def cosine(reference: np.ndarray, ours: np.ndarray) -> float:
    """Cosine of the angle between the flattened arrays; 1 for two zero arrays, 0 if only one is zero."""
    r, o = reference.astype(np.float64).ravel(), ours.astype(np.float64).ravel()
    nr, no = float(np.linalg.norm(r)), float(np.linalg.norm(o))
    if nr == 0 or no == 0:
        return math.nan if math.isnan(nr + no) else float(nr == no)
    return float(np.clip(np.dot(r / nr, o / no), -1.0, 1.0))


def psnr(reference: np.ndarray, ours: np.ndarray, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the reference's range (max - min) where none is given. inf for
    equal arrays.
    """
    r, o = reference.astype(np.float64), ours.astype(np.float64)
    noise = float(np.mean(np.square(o - r)))
    if noise == 0:
        return math.inf
    if not math.isfinite(noise):
        return math.nan
    peak = float(np.max(r) - np.min(r)) if peak is None else peak
    return -math.inf if peak == 0 else 10 * math.log10(peak * peak / noise)


def kl_divergence(reference: np.ndarray, ours: np.ndarray) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(ours)) along the last axis, in nats."""
    rows = []
    for r, o in zip(_parts(reference), _parts(ours), strict=True):
        p, q = _log_softmax(r), _log_softmax(o)
        with np.errstate(invalid="ignore"):
            terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))  # 0 * log 0 = 0: entries that p rules out
        rows.append(np.sum(terms, axis=-1))
    mean = float(np.mean(np.concatenate(rows)))
    return mean if math.isnan(mean) else max(0.0, mean)


def top1_agreement(reference: np.ndarray, ours: np.ndarray) -> float:
    """Share of rows (last axis) whose largest entry is at the same place; NaN where either array holds NaN."""
    if np.isnan(reference).any() or np.isnan(ours).any():
        return math.nan
    return float(np.mean(np.argmax(reference, axis=-1) == np.argmax(ours, axis=-1)))


def next_token_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood in nats that ``logits`` [..., N, vocabulary] give to the next of ``tokens``
    [..., N]. Raises ValueError for fewer than two tokens or shapes that do not match.
    """
    if logits.shape[:-1] != tokens.shape or tokens.shape[-1] < 2:
        raise ValueError(f"logits {logits.shape} and tokens {tokens.shape} do not give a next-token likelihood")
    following = tokens[..., 1:].reshape(-1, 1).astype(np.int64)
    total, start = 0.0, 0
    for part in _parts(logits[..., :-1, :]):
        log_p = _log_softmax(part)
        total -= float(np.take_along_axis(log_p, following[start : start + len(part)], axis=-1).sum())
        start += len(part)
    return total / len(following)


def _parts(x: np.ndarray) -> Iterator[np.ndarray]:
    """Rows [n, last axis] of ``x``, so many at a time that float64 copies of them are small."""
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, _PART // x.shape[-1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x64 = x.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: NaN is the answer and is reported as such
        shifted = x64 - np.max(x64, axis=-1, keepdims=True)
        result: np.ndarray = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return result
