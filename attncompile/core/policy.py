"""A policy: which mechanisms may be used, how much they must win, and how much they may cost. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MAX_ERROR = 0.01


@dataclass(frozen=True, slots=True)
class Policy:
    """``exact`` and ``approximate`` name mechanisms, in order of preference.

    ``min_gain`` is the least predicted gain (original / ours) worth a replacement. ``max_error`` bounds ``metric`` at
    the model's outputs for approximations; ``confidence``: how sure it has to be, from the spread of the calibration
    inputs, that the held-out ones keep it. ``keep_first`` and ``keep_last`` sites are never approximated, and none in
    calls that the rule ``keep_dense`` ("time >= 0.7"; empty for none) holds of.
    """

    name: str
    exact: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    min_gain: float = 1.15
    max_error: float = DEFAULT_MAX_ERROR
    metric: str = "relative_l2"
    keep_first: int = 0
    keep_last: int = 0
    keep_dense: str = ""
    confidence: float = 0.99
