"""How far errors of inputs that were not seen may reach, from errors of those that were.

Errors spread by factors, so their logarithms are taken for normal. The bound is a prediction interval for the largest
of ``future`` more inputs of the same kind (Hahn and Meeker, Statistical Intervals, section 4.8, with Bonferroni's
inequality): mean + t(1 - (1 - confidence) / future, n - 1) * deviation * sqrt(1 + 1 / n).

A perplexity is that of a text as a whole: of its logarithm what counts is the mean over the inputs, and the bound is a
prediction interval for the mean of ``future`` more: mean + t(confidence, n - 1) * deviation * sqrt(1 / n + 1 / future).

A classifier's answer stays or changes: what counts is the share of inputs whose answer changes, and the bound is
Clopper and Pearson's for that share of all inputs (Biometrika 26, 1934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

FLOOR = 1e-12
"""Errors below this are rounding."""

SMALLEST = 0.02
"""Errors are taken for at least this share of the largest: that one input has none (its largest logits all stayed where
they were, say) does not mean that others may have any."""


def upper_bound(errors: Sequence[float], future: int, confidence: float) -> float:
    """A number that the errors of ``future`` more inputs stay below with this confidence. One error alone says nothing
    of a spread: it is its own bound.
    """
    if not errors:
        return math.inf
    if not all(math.isfinite(e) for e in errors):
        return math.inf
    if len(errors) == 1 or max(errors) <= FLOOR:
        return max(errors)
    logs = np.log(np.maximum(errors, SMALLEST * max(errors)))
    n = len(logs)
    factor = student(1 - (1 - confidence) / max(future, 1), n - 1) * math.sqrt(1 + 1 / n)
    return float(max(np.exp(logs.mean() + factor * logs.std(ddof=1)), max(errors)))


def mean_bound(errors: Sequence[float], future: int, confidence: float) -> float:
    """A number that the mean error of ``future`` more inputs stays below with this confidence, errors taken for normal;
    they may be negative. One error alone is its own bound.
    """
    if not errors or not all(math.isfinite(e) for e in errors):
        return math.inf
    n = len(errors)
    if n == 1:
        return errors[0]
    factor = student(confidence, n - 1) * math.sqrt(1 / n + 1 / max(future, 1))
    return float(np.mean(errors) + factor * np.std(errors, ddof=1))


def share_bound(changed: int, count: int, confidence: float) -> float:
    """The share of all inputs that change, which ``changed`` of ``count`` leave possible with this confidence: the
    largest p of which so few are not rarer than 1 - confidence.
    """
    if changed >= count:
        return 1.0
    low, high = changed / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(changed, count, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(changed: int, count: int, share: float) -> float:
    """The probability of at most so many changes, for 0 < share < 1."""
    term = count * math.log1p(-share)  # the logarithm: of many inputs the first terms are too small
    total = 0.0
    for k in range(changed + 1):
        total += math.exp(term)
        term += math.log((count - k) / (k + 1)) + math.log(share) - math.log1p(-share) if k < count else 0.0
    return total


@lru_cache(maxsize=256)
def student(probability: float, freedom: int) -> float:
    """The quantile of Student's t above the median, by bisection over its distribution function."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile {probability} of t with {freedom} degrees of freedom")
    low, high = 0.0, 2.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if _student_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_cdf(x: float, freedom: int) -> float:
    """For x >= 0, by the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(x / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= cosine * cosine * 2 * k / (2 * k + 1)
        share = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, freedom // 2 + 1):
            total += term
            term *= cosine * cosine * (2 * k - 1) / (2 * k)
        share = sine * total
    return 0.5 + share / 2
