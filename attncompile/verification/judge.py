"""The rule by which one output of a replaced site is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from attncompile.core.verdict import Verdict
from attncompile.metrics import rms

TIMES_ORIGINAL = 3.0
FLOOR_UNITS = 4.0
"""The floor in rounding units (machine epsilon of the output's type times the RMS of the reference, and the type's
smallest number, which is what denormals are rounded to)."""
ROW_FLOOR_UNITS = 8.0
"""The same for the worst row. The rule is applied to the worst row too, because one wrong border row among thousands
hides in the RMSE of a float16 output. Measured on ONNX Runtime over 2,000 pairs of right formulations (1 to 513 tokens,
scale on Q or on the scores, softmax fused or spelled out): no false alarm."""

LARGE_ROW_FLOOR_UNITS = 24.0
"""The same where scores of about 80 are rounded to 80 units before exp sees them: in a single row either side may
be the lucky one. A mistake in the mask or the scale changes such a row by thousands of units."""


@dataclass(frozen=True, slots=True)
class CaseCheck:
    """One output in one case. ``error``, ``original_error`` and ``budget`` are RMSE against the reference, relative to
    the reference's RMS (absolute where that is 0). ``rows`` counts the rows compared, ``masked`` those where both
    sides give NaN or the same infinity. ``reference`` names what served as the truth; ``note`` says what was left
    out; ``extreme``: the inputs are of no ordinary size.
    """

    case: str
    output: str
    verdict: Verdict
    reference: str = ""
    error: float = math.nan
    original_error: float = math.nan
    budget: float = math.nan
    rows: int = 0
    masked: int = 0
    note: str = ""
    extreme: bool = False

    def to_json(self) -> dict[str, Any]:
        def clean(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "case": self.case, "output": self.output, "passed": self.verdict.ok, "code": self.verdict.code,
            "reason": self.verdict.reason, "reference": self.reference, "error": clean(self.error),
            "original_error": clean(self.original_error), "budget": clean(self.budget), "rows": self.rows,
            "masked_rows": self.masked, "note": self.note,
        }  # fmt: skip


def compare_patterns(original: np.ndarray, ours: np.ndarray) -> Verdict:
    """Whether shapes and types agree, and NaN and infinities stand at the same places."""
    if original.shape != ours.shape or original.dtype != ours.dtype:
        return Verdict.no(
            "shape_differs", f"{original.dtype}{list(original.shape)} became {ours.dtype}{list(ours.shape)}"
        )
    if original.size == 0:
        return Verdict.no("nothing_compared", f"the output is empty: shape {list(original.shape)}")
    for what, a, b in (
        ("NaN", np.isnan(original), np.isnan(ours)),
        ("+inf", np.isposinf(original), np.isposinf(ours)),
        ("-inf", np.isneginf(original), np.isneginf(ours)),
    ):
        if (a != b).any():
            row = tuple(int(i) for i in np.argwhere(a != b)[0][:-1])
            side = "the replacement" if bool((b & ~a).any()) else "the original"
            return Verdict.no("nan_pattern", f"{what} only in {side}, first in row {row}")
    return Verdict.yes()


def where_finite(original: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Both with NaN wherever the original is not finite, and what to say about it (nothing if it is everywhere)."""
    finite = np.isfinite(original)
    if finite.all() or original.shape != ours.shape:
        return original, ours, ""
    share = f"{float(finite.mean()):.0%}" if finite.any() else "none"
    hidden = np.array(np.nan, original.dtype)
    return (
        np.where(finite, original, hidden),
        np.where(finite, ours, hidden),
        f"the original is finite in {share} of it",
    )


def compare_output(
    original: np.ndarray, ours: np.ndarray, truth: np.ndarray | None, row_units: float = ROW_FLOOR_UNITS
) -> CaseCheck:  # fmt: skip
    """Judge one output. ``truth`` is float64 of the same shape; None judges ``ours`` by ``original`` alone, with a
    budget of (3 + 1) floors: by the triangle inequality no replacement that keeps the rule differs by more, if the
    original's own error is within a floor.
    """
    pattern = compare_patterns(original, ours)
    if not pattern.ok:
        return CaseCheck("", "", pattern)
    a, b = original.astype(np.float64), ours.astype(np.float64)
    t = a if truth is None else truth.astype(np.float64)
    if t.shape != a.shape:
        return CaseCheck("", "", Verdict.no("no_reference", f"the reference has shape {list(t.shape)}"))
    finite = np.isfinite(a)
    rows_finite = finite.reshape(-1, a.shape[-1] if a.ndim else 1).all(axis=1)
    masked = int((~rows_finite).sum())
    if not finite.any():
        return CaseCheck("", "", Verdict.no("nothing_compared", "no finite value to compare"), masked=masked)
    if not np.isfinite(t[finite]).all():
        why = "the float64 reference is not finite where the original is"
        return CaseCheck("", "", Verdict.no("no_reference", why), masked=masked)
    reference = np.where(finite, t, np.nan)
    a, b, t = a[finite], b[finite], t[finite]
    size = rms(t)
    unit = size if size > 0 else 1.0
    limits = np.finfo(original.dtype)
    floor = FLOOR_UNITS * (float(limits.eps) * size + float(limits.smallest_subnormal))
    mine, theirs = rms(b - t), rms(a - t)
    budget = max(TIMES_ORIGINAL * theirs, floor) if truth is not None else (TIMES_ORIGINAL + 1) * floor
    row, row_mine = _worst_row(ours, reference)
    row_floor = row_units / FLOOR_UNITS * floor
    row_theirs = _worst_row(original, reference)[1]
    row_budget = max(TIMES_ORIGINAL * row_theirs, row_floor) if truth is not None else (TIMES_ORIGINAL + 1) * row_floor
    if mine <= budget and row_mine <= row_budget:  # False for NaN
        verdict = Verdict.yes()
    elif mine <= budget:
        verdict = Verdict.no(
            "inexact",
            f"row {row} has relative RMSE {row_mine / unit:.2g} against the reference, above the budget for the worst"
            f" row {row_budget / unit:.2g} (original {row_theirs / unit:.2g})",
        )
    else:
        verdict = Verdict.no(
            "inexact",
            f"relative RMSE {mine / unit:.2g} against the reference is above the budget {budget / unit:.2g}"
            f" (original {theirs / unit:.2g})",
        )
    return CaseCheck(
        "", "", verdict, "", mine / unit, theirs / unit, budget / unit, rows=int(rows_finite.sum()), masked=masked
    )


def _worst_row(values: np.ndarray, reference: np.ndarray) -> tuple[tuple[int, ...], float]:
    """Place and RMSE of the row (last axis) that is farthest from ``reference``, whose NaN entries do not count."""
    error = np.square(np.where(np.isnan(reference), 0.0, values.astype(np.float64) - reference))
    count = np.maximum(1, (~np.isnan(reference)).sum(axis=-1))
    rows = np.sqrt(np.atleast_1d(error.sum(axis=-1) / count))
    place = np.unravel_index(int(np.argmax(rows)), rows.shape)
    return tuple(int(i) for i in place), float(rows[place])
