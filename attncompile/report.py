"""What one run did, found and measured: as values, as JSON (``report.schema.json``), and as a table for people.

Times are seconds and sizes bytes, unless a name says otherwise. A *ratio* is ours / original (below 1: faster), a
*gain* is original / ours (2.0: twice as fast). JSON has no NaN or infinity: such numbers become null, and a gate that
needs one fails.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from attncompile.compare import Comparison, Profiled
    from attncompile.core.model import Model
    from attncompile.core.plan import Decision
    from attncompile.core.profile import Range
    from attncompile.core.site import AttentionSite, NearMiss
    from attncompile.core.verdict import Verdict
    from attncompile.env import Environment
    from attncompile.measure import Timing
    from attncompile.metrics import Metrics

REPORT_SCHEMA_VERSION = 1

SITE_COLUMNS = ("site", "kind", "tokens", "heads", "mask", "mechanism", "predicted", "measured", "error", "why")
TIMING_COLUMNS = ("shapes", "original", "ours", "gain", "95% interval")
TARGET_COLUMNS = ("target", "files", "size", "seconds", "attention fused")

_NUMBERS = frozenset(
    ("tokens", "heads", "head dim", "predicted", "measured", "error", "size", "seconds", "original", "ours", "time",
     "share")
)  # fmt: skip
"""Columns that are set to the right."""
_INLINED = re.compile(r"_inlfunc_(\w+?)_(?:token_\d+_)?@site\d+@")
"""How ONNX Runtime names a node of a function body that was tagged to be profiled."""

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
class Exactness:
    """The rewritten site against the original subgraph on random and adversarial inputs.

    ``rmse_ratio`` is the worst case's error against float64, ours / original's own; ``relative_l2`` the worst case's
    distance between the two. ``label`` says what was compared where it was not the model's own precision (the fp32
    twin of a bf16 site). ``reason`` says what failed.
    """

    passed: bool
    cases: int
    rmse_ratio: float | None = None
    relative_l2: float | None = None
    label: str = ""
    worst_case: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed, "cases": self.cases, "rmse_ratio": _number(self.rmse_ratio),
            "relative_l2": _number(self.relative_l2), "label": self.label, "worst_case": self.worst_case,
            "reason": self.reason,
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
            "passed": self.passed, "metric": self.metric, "budget": self.budget, "value": _number(self.value),
            "evidence": self.evidence, "comparisons": [c.to_json() for c in self.comparisons], "reason": self.reason,
        }  # fmt: skip


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
            "seconds": dict(self.seconds),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one node is, or is not, a site that is replaced. ``verdicts`` are (mechanism, verdict) in registry order."""

    node: str
    site: AttentionSite | None = None
    near_miss: NearMiss | None = None
    verdicts: tuple[tuple[str, Verdict], ...] = ()
    decision: Decision | None = None

    def to_json(self) -> dict[str, Any]:
        from attncompile.core.plan_toml import decision_json

        return {
            "node": self.node, "site": self.site.to_json() if self.site else None,
            "near_miss": self.near_miss.to_json() if self.near_miss else None,
            "verdicts": [
                {"mechanism": name, "ok": v.ok, "code": v.code, "reason": v.reason, "hint": v.hint}
                for name, v in self.verdicts
            ],
            "decision": decision_json(self.decision) if self.decision else None,
        }  # fmt: skip

    @property
    def lines(self) -> tuple[str, ...]:
        """The explanation for people."""
        if self.near_miss is not None:
            return (
                f"{self.node} is not taken as attention: {self.near_miss.reason}",
                f"  nearest form: {self.near_miss.nearest_form}",
            )
        if self.site is None:
            return (f"{self.node} is in no attention site and no near miss: nothing in it looks like attention",)
        site = self.site
        out = [
            f"{self.node} belongs to site {site.id} ({site.form}): {site.kind} attention, {_tokens(site)} tokens, "
            f"{_heads(site)} heads of {site.head_dim}, mask {mask_text(site)}",
            *(f"  mask: {p.kind}, shown by {p.certificate.method}: {p.certificate.detail}" for p in site.mask.parts),
        ]
        for name, verdict in self.verdicts:
            out.append(f"  {name}: {'can' if verdict.ok else 'cannot'}{_tail(verdict.reason)}")
            if verdict.hint:
                out.append(f"    hint: {verdict.hint}")
        if self.decision is not None:
            out.append(f"  decision: {self.decision.mechanism}{_tail(self.decision.reason)}")
        return tuple(out)


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


def print_sites(sites: Sequence[AttentionSite], near_misses: Sequence[NearMiss], console: Console) -> None:
    """The tables of ``inspect``: sites, equal ones in one row, then near misses."""
    if sites:
        rows = _grouped((s.id, (s.form, *_facts(s), str(s.head_dim), mask_text(s))) for s in sites)
        columns = ("site", "form", "kind", "tokens", "heads", "head dim", "mask")
        console.print(_table(columns, ((_ids(ids), *row) for ids, row in rows)))
        console.print()
    _print_near_misses(near_misses, console)
    text = f"{_count(len(sites), 'attention site')}, {_count(len(near_misses), 'near miss', 'near misses')}"
    console.print(text, highlight=False)


def print_plan(sites: Sequence[AttentionSite], decisions: Sequence[Decision], console: Console) -> None:
    """The table of ``plan``: what would be done to every site, equal rows in one, and why."""
    known = {s.id: s for s in sites}
    rows = []
    for d in decisions:
        site = known.get(d.site)
        facts = (*_facts(site), mask_text(site)) if site else ("", "", "", "")
        rows.append((d.site, (*facts, _mechanism(d), _gain(None if d.kept else d.predicted_gain), d.reason)))
    if rows:
        columns = ("site", "kind", "tokens", "heads", "mask", "mechanism", "predicted")
        _print_with_reasons(columns, [(_ids(ids), *row) for ids, row in _grouped(rows)], console)
    chosen = sum(not d.kept for d in decisions)
    console.print(f"{chosen} of {_count(len(decisions), 'attention site')} would be replaced", highlight=False)


def print_comparison(found: Comparison, console: Console) -> None:
    """The table of ``verify``, and its closing line."""
    rows = []
    for item, result in found.results:
        for o in result.outputs:
            m = o.metrics
            numbers = (
                ("", "", "", "")
                if m is None
                else (f"{m.relative_l2:.2e}", f"{m.max_abs:.2e}", f"{m.cosine:.6f}", f"{m.psnr:.1f} dB")
            )
            rows.append(
                (_shape(item.label, item.bindings), o.name, *numbers, "ok" if o.verdict.ok else o.verdict.reason)
            )
    if rows:
        columns = ("shapes", "output", "relative L2", "max abs", "cosine", "psnr", "verdict")
        console.print(_table(columns, rows))
        console.print()
    for item, result in found.results:
        if not result.passed:
            console.print(f"{item.label}: {result.verdict.reason}", markup=False, highlight=False, soft_wrap=True)
    on = "your inputs" if found.evidence == "inputs" else "seeded inputs"
    budgets = sorted({f"{c.metric} {c.budget:g}" for _, c in found.results})
    text = "equal within" if found.passed else "NOT equal within"
    console.print(f"{text} {', '.join(budgets)} on {on}", markup=False, highlight=False, soft_wrap=True)


def print_timings(timings: Sequence[ShapeTiming], console: Console) -> None:
    """The table of paired timings, one row a shape."""
    console.print(_table(TIMING_COLUMNS, timing_rows(timings)))


def print_profile(times: Profiled, top: int, console: Console) -> None:
    """The tables of ``profile``: sites, then the ``top`` slowest layers of each file, then the totals."""
    if times.sites and times.other is None:
        rows = [(s.site, _milliseconds(s.before), _share(s.before, times.before.total)) for s in times.sites]
        console.print(_table(("site", "time", "share"), rows))
        console.print()
    elif times.sites:
        pairs = [(s.site, _milliseconds(s.before), _milliseconds(s.after), _finite_gain(s.gain)) for s in times.sites]
        console.print(_table(("site", "original", "ours", "gain"), pairs))
        console.print()
    for path, side in ((times.model, times.before), (times.other, times.after)):
        if side is None or path is None or not top:
            continue
        layers = sorted(side.layers, key=lambda layer: -layer.microseconds)[:top]
        cells = (
            (_INLINED.sub(r"\1/", layer.name), layer.op_type, layer.site, _milliseconds(layer.microseconds),
             _share(layer.microseconds, side.total))
            for layer in layers
        )  # fmt: skip
        console.print(_table((f"layer of {path.name}", "op", "site", "time", "share"), cells))
        console.print()
    shape = _shape(times.feeds.label, times.feeds.bindings)
    text = f"{shape}; {times.before.threads} threads; {_milliseconds(times.before.total)} a run"
    if times.after is not None:
        text += f" -> {_milliseconds(times.after.total)}"
    console.print(text + ", profiler on", markup=False, highlight=False, soft_wrap=True)


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3f} ms" if isfinite(microseconds) else "?"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if isfinite(part) and whole > 0 else "?"


def _finite_gain(gain: float) -> str:
    return _gain(gain) if isfinite(gain) else "?"


def print_table(report: Report, console: Console) -> None:
    """The tables of a report and its closing line. Equal neighbouring sites share a row; report.json has each."""
    rows = list(site_rows(report.sites))
    if rows:
        _print_with_reasons(SITE_COLUMNS[:-1], rows, console)
    if report.timings:
        print_timings(report.timings, console)
        console.print()
    if report.targets:
        console.print(_table(TARGET_COLUMNS, target_rows(report.targets)))
        console.print()
    console.print(closing_line(report), markup=False, highlight=False, soft_wrap=True)


def closing_line(report: Report) -> str:
    """One line that says what the model written is, and whether it is approximate."""
    total = _count(len(report.sites), "attention site")
    if report.outcome == "unchanged":
        text = "no attention found" if not report.sites else f"nothing to win at {total}"
        return f"unchanged: {text}; model.onnx is the input file"
    if report.outcome == "rolled_back":
        return f"rolled back: no replacement at {total} held; model.onnx is the input file"
    exactly = "approximate" if report.approximate else "exact"
    text = f"replaced {len(report.replaced)} of {total} ({exactly})"
    if report.parity is not None:
        value = "nothing compared" if report.parity.value is None else f"{report.parity.value:.2g}"
        verdict = "within" if report.parity.passed else "OUTSIDE"
        text += f"; {report.parity.metric} {value}, {verdict} {report.parity.budget:g}"
        text += {"inputs": " on your inputs", "seeded": " on seeded inputs", "none": ""}[report.parity.evidence]
    usual = [t for t in report.timings if t.label in ("usual", "static")]
    if usual:
        t = usual[0].timing
        text += f"; {t.gain:.2f} times the speed ({t.original * 1e3:.4g} ms -> {t.ours * 1e3:.4g} ms)"
    return text


def mask_text(site: AttentionSite) -> str:
    """A mask in a few words: ``causal``, ``window -255..0``, ``causal + padding``."""
    words = []
    for part in site.mask.parts:
        if part.kind == "window":
            left, right = (("-∞" if part.left < 0 else f"-{part.left}"), ("∞" if part.right < 0 else str(part.right)))
            words.append(f"window {left}..{right}")
        else:
            words.append(part.kind)
    return " + ".join(words) or "none"


def site_rows(sites: Iterable[SiteReport]) -> Iterable[tuple[str, ...]]:
    """Cells under ``SITE_COLUMNS``; equal neighbouring sites share a row, with the range of their gains and their
    worst error.
    """
    groups: list[tuple[tuple[str, ...], list[SiteReport]]] = []
    for s in sites:
        why = s.rolled_back or s.decision.reason
        mechanism = f"rolled back: {s.decision.mechanism}" if s.rolled_back else _mechanism(s.decision)
        key = (*_facts(s.site), mask_text(s.site), mechanism, why)
        if groups and groups[-1][0] == key:
            groups[-1][1].append(s)
        else:
            groups.append((key, [s]))
    for (kind, tokens, heads, mask, mechanism, why), members in groups:
        predicted = [m.decision.predicted_gain for m in members if not m.decision.kept]
        measured = [m.measured_gain for m in members if m.measured_gain is not None]
        errors = [e for e in (_error(m) for m in members) if e is not None]
        yield (
            _ids([m.site.id for m in members]), kind, tokens, heads, mask, mechanism, _range(predicted),
            _range(measured), f"{max(errors):.1e}" if errors else "", why,
        )  # fmt: skip


def _error(site: SiteReport) -> float | None:
    if site.fidelity is not None:
        return site.fidelity.relative_l2
    return site.exactness.relative_l2 if site.exactness is not None else None


def timing_rows(timings: Iterable[ShapeTiming]) -> Iterable[tuple[str, ...]]:
    """Cells under ``TIMING_COLUMNS``."""
    for item in timings:
        t = item.timing
        # The interval is of the ratio ours / original; its inverse, ends swapped, is that of the gain.
        low = f"{1 / t.high:.2f}" if isfinite(t.high) and t.high > 0 else "?"
        high = f"{1 / t.low:.2f}" if t.low > 0 else "?"
        label = _shape(item.label, item.bindings)
        yield label, f"{t.original * 1e3:.4g} ms", f"{t.ours * 1e3:.4g} ms", f"{t.gain:.2f}x", f"{low}..{high}"


def _shape(label: str, bindings: Mapping[str, int]) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in bindings.items())
    return f"{label}: {sizes}" if sizes else label


def target_rows(targets: Iterable[TargetReport]) -> Iterable[tuple[str, ...]]:
    """Cells under ``TARGET_COLUMNS``."""
    for t in targets:
        fused = ""
        if t.attention_fused is not None:
            fused = f"{t.attention_fused} of {t.attention_layers}" if t.attention_layers else str(t.attention_fused)
        files = ", ".join(f.path for f in t.files)
        yield t.name, files, size_text(sum(f.size for f in t.files)), f"{t.seconds:.1f}", fused


def _print_with_reasons(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """The rows without their last cell as a table; then that cell, the reason, as a line of its own."""
    console.print(_table(columns, (row[:-1] for row in rows)))
    console.print()
    for row in rows:
        console.print(f"{row[0]}: {row[-1]}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _print_near_misses(near_misses: Sequence[NearMiss], console: Console) -> None:
    if near_misses:
        rows = _grouped((n.node, (n.nearest_form, n.reason)) for n in near_misses)
        console.print(_table(("near miss", "nearest form", "reason"), ((_ids(ids), *row) for ids, row in rows)))
        console.print()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        # Numbers stay whole on a narrow terminal; words fold.
        number = name in _NUMBERS
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _grouped(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[list[str], tuple[str, ...]]]:
    """Neighbouring rows that say the same become one."""
    out: list[tuple[list[str], tuple[str, ...]]] = []
    for name, row in rows:
        if out and out[-1][1] == row:
            out[-1][0].append(name)
        else:
            out.append(([name], row))
    return out


def _ids(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} .. {ids[-1]} ({len(ids)})"


def _facts(site: AttentionSite) -> tuple[str, str, str]:
    return site.kind, _tokens(site), _heads(site)


def _tokens(site: AttentionSite) -> str:
    if site.query_length == site.key_length:
        return str(site.query_length)
    return f"{site.query_length} x {site.key_length}"


def _heads(site: AttentionSite) -> str:
    return str(site.heads) if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"


def _mechanism(decision: Decision) -> str:
    return decision.mechanism if decision.exact else f"{decision.mechanism} (approximate)"


def _gain(gain: float | None) -> str:
    return "" if gain is None else f"{gain:.2f}x"


def _range(gains: Sequence[float]) -> str:
    if not gains:
        return ""
    low, high = _gain(min(gains)), _gain(max(gains))
    return low if low == high else f"{low[:-1]}-{high}"


def size_text(size: int) -> str:
    """Bytes for people: ``86.7 MB`` (decimal units)."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _tail(text: str) -> str:
    return f": {text}" if text else ""


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
