"""How far a result may be from float64: a few times what its element type costs at best, and a few rounding units.

An error of one key (a window one too wide, a wrong head, a softmax that is not rescaled) changes a row by percents;
three times the error of the type is a tenth of a percent in float16.
"""

from __future__ import annotations

import numpy as np

UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "sums": 2.0**-16}
"""The largest relative error of rounding a number to each type. ``sums``: float32 sums of a thousand products, which
tensor cores cut off instead of rounding them, and of exponentials that the hardware knows to 2^-22.
"""

TIMES = 3.0
"""How many times the error of the low-precision reference is allowed."""

FLOOR, FLOOR_OF_ROWS = 2.0, 4.0
"""Rounding units of the output's RMS, and of its largest element for a single row, that are allowed beside."""


def wrong_sums(got: np.ndarray, want: np.ndarray, low: np.ndarray, softcap: float) -> str:
    """``wrong`` of log-sum-exps [.., Nq], which are float32. A score under a softcap is known to a rounding unit of the
    softcap, however small it is.
    """
    return wrong(got[..., None], want[..., None], low[..., None], "float32", softcap)


def wrong(got: np.ndarray, want: np.ndarray, low: np.ndarray, dtype: str, least: float = 0.0) -> str:
    """Why ``got`` [.., Dv] is not ``want`` (float64) up to rounding; empty if it is. ``low``: the low-precision
    reference. Not-a-numbers and infinities must stand at the same places. ``least``: the output's size is taken for at
    least that when rounding units are allowed.
    """
    if got.shape != want.shape or got.size == 0:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    got = got.astype(np.float64)
    for what, is_so in (("NaN", np.isnan), ("infinite", np.isinf)):
        if not np.array_equal(is_so(got), is_so(want)):
            return f"{int((is_so(got) != is_so(want)).sum())} of {got.size} elements are {what} in one of both only"
    if np.isinf(want).any() and not np.array_equal(got[np.isinf(want)], want[np.isinf(want)]):
        return "infinities of another sign"
    finite = np.isfinite(want)
    if not finite.any():
        return ""
    size = np.where(finite, want, 0.0)
    ours, best, unit = np.where(finite, got, 0.0) - size, np.where(finite, low, 0.0) - size, UNITS[dtype]
    limits = (
        ("RMS", _rms(ours), TIMES * _rms(best) + FLOOR * unit * max(_rms(size), least)),
        (
            "of the worst row",
            _worst(ours),
            TIMES * _worst(best) + FLOOR_OF_ROWS * unit * max(float(np.abs(size).max()), least),
        ),
    )
    for name, error, limit in limits:
        if not error <= limit:
            return f"error {name} {error:.3g}, allowed are {limit:.3g}"
    return ""


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _worst(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean(axis=-1)).max())
