"""A policy: which mechanisms may be used, how much they must win, and how much they may cost. Pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompile.core.errors import BadArguments

DEFAULT_MAX_ERROR = 0.01
DEFAULT_METRIC = "relative_l2"
METRICS = ("relative_l2", "max_abs", "cosine", "psnr", "kl", "top1_agreement", "perplexity")
_AT_MOST_ONE = ("cosine", "top1_agreement")


def check_budget(max_error: float, metric: str | None, said: str) -> None:
    """Raise ``BadArguments``, which begins with ``said``, unless ``max_error`` is a budget that ``metric`` can keep
    (None: whichever that is).
    """
    if not max_error >= 0:
        raise BadArguments(f"{said} {max_error} is not an error", "give a number of 0 or more")
    if math.isinf(max_error):
        raise BadArguments(f"{said} {max_error} bounds nothing", "give a finite number of 0 or more")
    if metric in _AT_MOST_ONE and max_error > 1:
        raise BadArguments(
            f"{said} {max_error}: no model has a {metric} above 1", "give the least that the outputs may have, 0 to 1"
        )


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
    metric: str = DEFAULT_METRIC
    keep_first: int = 0
    keep_last: int = 0
    keep_dense: str = ""
    confidence: float = 0.99
