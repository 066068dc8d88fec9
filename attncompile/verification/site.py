"""Exactness of one replaced site: the original subgraph against the replacement, judged by a float64 reference.

The rule: RMSE of the replacement against float64 at most 3 times
that of the original in its own precision, with a floor of a few rounding units of the output's type. NaN and infinity
patterns must agree row by row; in extreme cases the original decides: where it is not finite, nothing is compared. The
reference is the *original* subgraph converted to float64, so it shares no code with our operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from attncompile.core.errors import AttncompileError
from attncompile.core.site import Operand
from attncompile.core.verdict import Verdict
from attncompile.measure import Session, open_session, run_session
from attncompile.verification.cases import Case
from attncompile.verification.facts_reference import FactsReference
from attncompile.verification.judge import (
    LARGE_ROW_FLOOR_UNITS,
    ROW_FLOOR_UNITS,
    CaseCheck,
    compare_output,
    compare_patterns,
    where_finite,
)
from attncompile.verification.reference import FactsDiffer, Reference
from attncompile.verification.retype import TO_TWIN, convert_feed, retype, uses

MEMORY_CAP = 1 << 30

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """The verdict on a site, all its comparisons, and ``labels``: what a reader must know about how it was checked."""

    verdict: Verdict
    checks: tuple[CaseCheck, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict.ok

    @property
    def error(self) -> float:
        """The largest relative error against the reference; NaN if nothing was compared."""
        return max((c.error for c in self.checks if not math.isnan(c.error)), default=math.nan)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.verdict.ok, "code": self.verdict.code, "reason": self.verdict.reason,
            "error": None if math.isnan(self.error) or math.isinf(self.error) else self.error,
            "labels": list(self.labels), "checks": [c.to_json() for c in self.checks],
        }  # fmt: skip


def check_site(
    original: ModelProto,
    replaced: ModelProto,
    cases: Sequence[Case | Feed],
    *,
    query: Operand | None = None,
    facts: FactsReference | None = None,
    memory_cap: int = MEMORY_CAP,
    threads: int | None = None,
) -> SiteCheck:
    """Check ``replaced`` against ``original``: standalone models with the same inputs and outputs.

    Where the float64 reference would hold an intermediate larger than ``memory_cap`` bytes, sampled query rows are
    evaluated instead (``query`` says which input carries them); where the subgraph cannot be cut to rows, ``facts``
    are the reference for these rows, and without them the original in its own precision. Any of it is said in
    ``labels``. Failures of any kind are verdicts: only a bug raises.
    """
    labels: list[str] = []
    if uses(original, TensorProto.BFLOAT16) or uses(replaced, TensorProto.BFLOAT16):
        original, replaced = retype(original, TO_TWIN), retype(replaced, TO_TWIN)
        labels.append("checked on a float32 twin: ONNX Runtime's CPU provider has no bfloat16 kernels")
    named = [c if isinstance(c, Case) else Case(f"case {i}", c) for i, c in enumerate(cases)]
    if not named:
        return SiteCheck(Verdict.no("nothing_compared", "there were no cases to compare"))
    names = [o.name for o in original.graph.output]
    if not names or names != [o.name for o in replaced.graph.output]:
        return SiteCheck(Verdict.no("outputs_differ", "original and replacement do not have the same outputs"))
    sessions: list[Session] = []
    for model, code in ((original, "original_failed"), (replaced, "replaced_failed")):
        try:
            sessions.append(open_session(model.SerializeToString(), threads, lean=True))
        except AttncompileError as error:
            return SiteCheck(Verdict.no(code, error.message), labels=tuple(labels))
    reference = Reference(original, query, memory_cap, threads, sessions[0], facts)
    checks: list[CaseCheck] = []
    for case in named:
        checks.extend(_check_case(case, names, original, sessions[0], sessions[1], reference))
    labels.extend(reference.labels)
    return SiteCheck(_overall(checks, labels), tuple(checks), tuple(labels))


def _overall(checks: Sequence[CaseCheck], labels: list[str]) -> Verdict:
    failed = [c for c in checks if not c.verdict.ok and c.verdict.code != "not_judged"]
    if failed:
        worst = failed[0]
        return Verdict.no(worst.verdict.code, f"case '{worst.case}': {worst.verdict.reason}")
    passed = [c for c in checks if c.verdict.ok]
    labels.extend(f"case '{c.case}' not judged: {c.verdict.reason}" for c in checks if not c.verdict.ok)
    labels.extend(f"case '{c.case}': {c.note}, and compared there" for c in passed if c.note)
    if not passed:
        return Verdict.no("nothing_compared", "no case gave anything to compare")
    worst_error = max(c.error for c in passed)
    return Verdict.yes(f"{len(passed)} comparisons, largest relative error {worst_error:.2g}")


def _check_case(
    case: Case, names: Sequence[str], original: ModelProto, ours: Session, theirs: Session, reference: Reference
) -> list[CaseCheck]:
    feed = convert_feed(case.feed, original)
    try:
        outputs = run_session(ours, feed, names)
    except AttncompileError as error:
        return [CaseCheck(case.name, names[0], Verdict.no("original_failed", error.message))]
    try:
        replaced = run_session(theirs, feed, names)
    except AttncompileError as error:
        return [CaseCheck(case.name, names[0], Verdict.no("replaced_failed", error.message))]
    try:
        truths = reference.run(feed, outputs, names)
    except FactsDiffer as error:
        return [CaseCheck(case.name, names[0], Verdict.no("facts_differ", error.message))]
    except AttncompileError as error:
        return [CaseCheck(case.name, names[0], Verdict.no("no_reference", error.message))]
    checks = []
    for name, a, b, truth in zip(names, outputs, replaced, truths, strict=True):
        note = ""
        if case.extreme:
            a, b, note = where_finite(a, b)
        if truth is None and case.large:
            why = "large logits amplify rounding and need a float64 reference, which is above the memory cap"
            checks.append(CaseCheck(case.name, name, Verdict.no("not_judged", why)))
            continue
        a_rows, b_rows = (a, b) if truth is None or truth.rows is None else (truth.rows.take(a), truth.rows.take(b))
        pattern = compare_patterns(a, b)  # on all rows, also those that are not sampled
        if pattern.ok and a.dtype.kind == "f" and not np.isfinite(a_rows).any():
            why = "the original gives no finite value to compare with"
            checks.append(CaseCheck(case.name, name, Verdict.no("not_judged", why), note=note))
            continue
        units = LARGE_ROW_FLOOR_UNITS if case.large else ROW_FLOOR_UNITS
        check = compare_output(a_rows, b_rows, None if truth is None else truth.value, units)
        verdict = check.verdict if pattern.ok else pattern
        if verdict.ok and truth is not None and truth.facts:
            verdict = truth.contradicted(a_rows)
            if verdict.ok and not case.large:  # facts are known at some rows, the original at all
                verdict = compare_output(a, b, None, units).verdict
        checks.append(
            CaseCheck(
                case.name, name, verdict, "original in its own precision" if truth is None else truth.kind,
                check.error, check.original_error, check.budget, check.rows, check.masked, note,
                case.extreme,
            )
        )  # fmt: skip
    return checks
