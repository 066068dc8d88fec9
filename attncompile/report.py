"""What one run did, found and measured: as values, as JSON (``report.schema.json``), and as a table for people.

Times are seconds and sizes bytes, unless a name says otherwise. A *ratio* is ours / original (below 1: faster), a
*gain* is original / ours (2.0: twice as fast). JSON has no NaN or infinity: such numbers become null, and a gate that
needs one fails.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from attncompile.core.model import Model
    from attncompile.core.plan import Decision
    from attncompile.core.profile import Range
    from attncompile.core.site import AttentionSite, NearMiss
    from attncompile.env import Environment
    from attncompile.fit.found import FitReport
    from attncompile.measure import Timing
    from attncompile.metrics import Metrics
    from attncompile.search.found import SearchReport

REPORT_SCHEMA_VERSION = 1

Outcome = Literal["replaced", "unchanged", "rolled_back"]
"""``replaced``: at least one site is; ``rolled_back``: every replacement was undone; ``unchanged``: none was made."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The input file. ``size`` counts the proto and its external files."""

    path: str
    hash: str
    opset: int
    nodes: int
    size: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "hash": self.hash, "opset": self.opset, "nodes": self.nodes, "size_bytes": self.size,
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShapeTiming:
    """Paired timing at one shape; ``label`` is ``min``, ``usual``, ``max`` or ``static``."""

    label: str
    bindings: Mapping[str, int]
    timing: Timing

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "bindings": dict(self.bindings), **self.timing.to_json()}


@dataclass(frozen=True, slots=True)
class SiteCase:
    """One set of inputs at one shape on which a site was checked. Where ``judged`` is False nothing could be compared,
    and ``reason`` says why. ``error`` and ``original_error`` are RMSE against float64, relative to its RMS.
    """

    case: str
    shapes: str
    passed: bool
    judged: bool = True
    error: float | None = None
    original_error: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case, "shapes": self.shapes, "passed": self.passed, "judged": self.judged,
            "error": _number(self.error), "original_error": _number(self.original_error), "reason": self.reason,
        }  # fmt: skip


def not_judged(checks: Iterable[SiteCase]) -> dict[str, int]:
    """Why cases were not judged -> how many of them, in the order of the cases."""
    return dict(Counter(c.reason for c in checks if not c.judged))


@dataclass(frozen=True, slots=True)
class Exactness:
    """The rewritten site against the original subgraph on random and adversarial inputs.

    ``rmse_ratio`` is the worst case's error against float64, ours / original's own; ``relative_l2`` the worst error
    of ours against float64 in a case that is not extreme, relative to it. ``label`` says what was compared where it was
    not the model's own precision (the fp32 twin of a bf16 site). ``reason`` says what failed. ``checks`` are all cases
    at all shapes, as far as the check went.
    """

    passed: bool
    cases: int
    rmse_ratio: float | None = None
    relative_l2: float | None = None
    label: str = ""
    worst_case: str = ""
    reason: str = ""
    checks: tuple[SiteCase, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed, "cases": self.cases, "rmse_ratio": _number(self.rmse_ratio),
            "relative_l2": _number(self.relative_l2), "label": self.label, "worst_case": self.worst_case,
            "reason": self.reason, "checks": [c.to_json() for c in self.checks],
            "not_judged": [{"reason": why, "cases": n} for why, n in not_judged(self.checks).items()],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SiteFidelity:
    """What an approximation costs at its site, on the user's inputs."""

    relative_l2: float | None = None
    cosine: float | None = None
    retained_mass: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "relative_l2": _number(self.relative_l2), "cosine": _number(self.cosine),
            "retained_mass": _number(self.retained_mass),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One site: what it is, what was decided, what came of it. ``rolled_back`` is the reason for undoing, or empty."""

    site: AttentionSite
    decision: Decision
    exactness: Exactness | None = None
    fidelity: SiteFidelity | None = None
    timings: tuple[ShapeTiming, ...] = ()
    rolled_back: str = ""

    @property
    def replaced(self) -> bool:
        """Whether the site is replaced in the model that was written."""
        return not self.decision.kept and not self.rolled_back

    @property
    def measured_gain(self) -> float | None:
        """original / ours at the usual (or static, or first) shape."""
        usual = [t for t in self.timings if t.label in ("usual", "static")] or list(self.timings)
        return usual[0].timing.gain if usual else None

    def to_json(self) -> dict[str, Any]:
        from attncompile.core.plan_toml import decision_json

        decision = decision_json(self.decision)
        del decision["id"]
        return {
            "site": self.site.to_json(), "decision": decision, "replaced": self.replaced,
            "rolled_back": self.rolled_back, "exactness": self.exactness.to_json() if self.exactness else None,
            "fidelity": self.fidelity.to_json() if self.fidelity else None,
            "timings": [t.to_json() for t in self.timings],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """One output of the whole model, ours against the original, at one shape (``label``) or on the user's inputs.
    ``metrics`` is None where nothing could be computed; ``reason`` says what failed.
    """

    output: str
    label: str
    metrics: Metrics | None
    passed: bool = True
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output, "label": self.label, "passed": self.passed, "reason": self.reason,
            "metrics": self.metrics.to_json() if self.metrics else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parity:
    """The whole model's gate. ``evidence`` is ``inputs`` (the user's), ``seeded`` (random, exact replacements only) or
    ``none`` (nothing replaced: the output is the input). ``value`` is the worst ``metric`` found.
    """

    passed: bool
    metric: str
    budget: float
    value: float | None
    evidence: Literal["inputs", "seeded", "none"]
    comparisons: tuple[OutputComparison, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed, "metric": self.metric, "budget": _number(self.budget), "value": _number(self.value),
            "evidence": self.evidence, "comparisons": [c.to_json() for c in self.comparisons], "reason": self.reason,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bisection:
    """Sites restored because the whole model failed with them, though each passed alone. The sites of one of ``groups``
    fail together, and pass where any of them is left out. ``runs`` of the model, each on all inputs, were needed.
    """

    groups: tuple[tuple[str, ...], ...]
    candidates: int
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {"groups": [list(g) for g in self.groups], "candidates": self.candidates, "runs": self.runs}

    @property
    def text(self) -> str:
        """One line for people."""
        found = "; ".join(" with ".join(g) for g in self.groups)
        return (
            f"the model failed though its sites passed: {found} restored, found by bisection over {self.candidates} "
            f"replacements in {self.runs} model runs"
        )


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file in ``OUT/``; ``path`` is relative to it."""

    path: str
    size: int

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size_bytes": self.size}


@dataclass(frozen=True, slots=True)
class TargetReport:
    """What a target wrote. ``attention_fused`` of ``attention_layers`` attention layers are fused, as the builder's log
    says; None where it does not say. ``engine_size`` is None for a target without engines.
    """

    name: str
    files: tuple[TargetFile, ...]
    seconds: float
    engine_size: int | None = None
    attention_layers: int | None = None
    attention_fused: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "files": [f.to_json() for f in self.files], "seconds": self.seconds,
            "engine_size_bytes": self.engine_size, "attention_layers": self.attention_layers,
            "attention_fused": self.attention_fused, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one run of ``compile``. ``failures`` are the gates that failed (exit code 1)."""

    environment: Environment
    model: ModelInfo
    policy: str
    options: Mapping[str, Any]
    profile: Mapping[str, Range]
    sites: tuple[SiteReport, ...]
    near_misses: tuple[NearMiss, ...]
    outcome: Outcome
    parity: Parity | None = None
    timings: tuple[ShapeTiming, ...] = ()
    targets: tuple[TargetReport, ...] = ()
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    out: str = ""
    created: str = ""
    exit_code: int = 0
    bisection: Bisection | None = None
    search: SearchReport | None = None
    fit: FitReport | None = None

    @property
    def replaced(self) -> tuple[SiteReport, ...]:
        """The sites that are replaced in the written model."""
        return tuple(s for s in self.sites if s.replaced)

    @property
    def approximate(self) -> bool:
        """Whether the written model holds a replacement that is not exact."""
        return any(not s.decision.exact for s in self.replaced)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": REPORT_SCHEMA_VERSION, "created": self.created, "outcome": self.outcome,
            "approximate": self.approximate, "exit_code": self.exit_code, "failures": list(self.failures),
            "warnings": list(self.warnings), "out": self.out, "environment": self.environment.to_json(),
            "model": self.model.to_json(), "policy": self.policy, "options": dict(self.options),
            "profile": profile_json(self.profile), "sites": [s.to_json() for s in self.sites],
            "near_misses": [n.to_json() for n in self.near_misses],
            "parity": self.parity.to_json() if self.parity else None,
            "timings": [t.to_json() for t in self.timings], "targets": [t.to_json() for t in self.targets],
            "seconds": dict(self.seconds), "bisection": self.bisection.to_json() if self.bisection else None,
            "search": self.search.to_json() if self.search else None,
            "fit": self.fit.to_json() if self.fit else None,
        }  # fmt: skip


def model_info(model: Model) -> ModelInfo:
    """Facts about a loaded model. ``nodes`` counts those of the main graph."""
    size = model.path.stat().st_size + sum(f.size for f in model.external_files)
    return ModelInfo(str(model.path), model.hash, model.opset, len(model.proto.graph.node), size, model.notes)


def schema() -> dict[str, Any]:
    """The published JSON schema of ``report.json`` (draft 2020-12)."""
    text = importlib.resources.files("attncompile").joinpath("report.schema.json").read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text)
    return value


def dumps(value: Mapping[str, Any]) -> str:
    """JSON text, strict: a NaN or infinity that slipped through is an error, not invalid JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def profile_json(profile: Mapping[str, Range]) -> dict[str, Any]:
    """A range for every symbol, and whether the user gave it."""
    return {
        name: {"min": r.minimum, "usual": r.usual, "max": r.maximum, "assumed": r.assumed}
        for name, r in profile.items()
    }


def mask_text(site: AttentionSite) -> str:
    """A mask in a few words: ``causal``, ``window -255..0``, ``causal + padding``."""
    words = []
    for part in site.mask.parts:
        if part.kind == "window":
            left, right = (("-∞" if part.left < 0 else f"-{part.left}"), ("∞" if part.right < 0 else str(part.right)))
            words.append(f"window {left}..{right}")
        elif part.number:
            words.append(f"{part.number:g} across the ends")
        elif isinstance(kernel := part.parameters().get("kernel_size"), list):
            words.append(f"{part.kind} {'x'.join(map(str, kernel))}")
        elif isinstance(window := part.parameters().get("window"), list):
            shifted = any(part.parameters().get("shift") or ())
            words.append(f"{part.kind} {'x'.join(map(str, window))}" + ", shifted" * shifted)
        else:
            words.append(part.kind + " by place" * part.places)
    words += ["key ends"] * (site.mask.ends is not None)
    return " + ".join(words) or "none"


def beyond_text(site: AttentionSite) -> str:
    """What the site has beyond plain attention, in a few words: ``sinks, concat cache``."""
    words = [f"softcap {site.softcap:g}"] if site.softcap else []
    words += ["sinks"] * bool(site.sinks) + ["head scale"] * bool(site.head_scale)
    words += ["log-sum-exp"] * bool(site.log_sum_exp) + ["quantised"] * bool(site.quantised)
    if site.cache is not None:
        words.append(f"{site.cache.form} cache")
    if site.linear is not None:
        words += [site.linear.form, f"map {site.linear.key_map}"] + ["causal"] * site.linear.causal
        words += [f"{site.linear.decay} decay"] * (site.linear.decay != "none")
    return ", ".join(words)


def tokens_text(site: AttentionSite) -> str:
    """The number of tokens, or ``queries x keys`` where they differ."""
    if site.query_length == site.key_length:
        return str(site.query_length)
    return " x ".join(f"({n})" if " " in str(n) else str(n) for n in (site.query_length, site.key_length))


def heads_text(site: AttentionSite) -> str:
    """The number of heads, or ``heads/kv_heads`` for grouped queries."""
    return str(site.heads) if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
