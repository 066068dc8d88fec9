"""Reports, plans and sites as tables and lines for people. Everything here is printed on stdout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from attncompile.fit.found import COLUMNS as FIT_COLUMNS
from attncompile.fit.found import FitReport
from attncompile.fit.found import lines as fit_lines
from attncompile.fit.found import rows as fit_rows
from attncompile.report import (
    Report,
    ShapeTiming,
    SiteReport,
    TargetReport,
    beyond_text,
    heads_text,
    mask_text,
    tokens_text,
)
from attncompile.report_proof import assumption_lines, proof_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from attncompile.compare import Comparison, Profiled
    from attncompile.core.plan import Decision
    from attncompile.core.site import AttentionSite, NearMiss

SITE_COLUMNS = ("site", "kind", "tokens", "heads", "mask", "mechanism", "predicted", "measured", "error", "why")
TIMING_COLUMNS = ("shapes", "original", "ours", "gain", "95% interval")
TARGET_COLUMNS = ("target", "files", "size", "seconds", "attention fused")

_NUMBERS = frozenset(
    ("tokens", "heads", "head dim", "predicted", "measured", "error", "size", "seconds", "original", "ours", "time",
     "share", "dim", "shared", "registers", "spills", "bytes")
)  # fmt: skip
"""Columns that are set to the right."""
_INLINED = re.compile(r"_inlfunc_(\w+?)_(?:token_\d+_)?@site\d+@")
"""How ONNX Runtime names a node of a function body that was tagged to be profiled."""


def print_sites(sites: Sequence[AttentionSite], near_misses: Sequence[NearMiss], console: Console) -> None:
    """The tables of ``inspect``: sites, equal ones in one row, then near misses."""
    if sites:
        facts = ((s.id, (*_facts(s), str(s.head_dim), mask_text(s), beyond_text(s), _written(s))) for s in sites)
        rows = [(_ids(ids), *row) for ids, row in _grouped(facts)]
        columns = ["site", "kind", "tokens", "heads", "head dim", "mask", "also"]
        width = len(columns) if any(row[-2] for row in rows) else len(columns) - 1
        _print_with_reasons(columns[:width], [(*row[:width], row[-1]) for row in rows], console)
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


def print_table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Any table."""
    console.print(_table(columns, rows))


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
    for line in (*proof_lines(report.sites), *assumption_lines(report.sites)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report.fit is not None:
        print_fit(report.fit, console)
        console.print()
    if report.timings:
        print_timings(report.timings, console)
        console.print()
    if report.targets:
        console.print(_table(TARGET_COLUMNS, target_rows(report.targets)))
        for target in report.targets:
            for note in target.notes:
                console.print(f"{target.name}: {note}", markup=False, highlight=False)
        console.print()
    console.print(closing_line(report), markup=False, highlight=False, soft_wrap=True)


def print_fit(found: FitReport, console: Console) -> None:
    """How far fitted feature maps are, one row a map, and what the columns are of."""
    if found.sites:
        console.print(_table(FIT_COLUMNS, fit_rows(found)))
        console.print()
    for line in fit_lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def closing_line(report: Report) -> str:
    """One line that says what the model written is, and whether it is approximate."""
    total = _count(len(report.sites), "attention site")
    if report.outcome == "unchanged":
        text = "no attention found" if not report.sites else f"nothing to win at {total}"
        if not report.sites and report.near_misses:
            text += f", {_count(len(report.near_misses), 'near miss', 'near misses')} (see `attncompile inspect`)"
        return f"unchanged: {text}; model.onnx is the input file"
    if report.outcome == "rolled_back":
        return f"rolled back: no replacement at {total} held; model.onnx is the input file"
    exactly = "approximate" if report.approximate else "exact"
    text = f"replaced {len(report.replaced)} of {total} ({exactly})"
    if report.parity is not None:
        value = "nothing compared" if report.parity.value is None else f"{report.parity.value:.2g}"
        verdict = "within" if report.parity.passed else "OUTSIDE"
        limit = f", {verdict} {report.parity.budget:g}" if isfinite(report.parity.budget) else ", without a budget,"
        text += f"; {report.parity.metric} {value}{limit}"
        text += {"inputs": " on your inputs", "seeded": " on seeded inputs", "none": ""}[report.parity.evidence]
    rule = report.options.get("keep_dense") if report.approximate else None
    if rule:
        text += f"; dense where {rule}"
        if report.search is not None:
            text += f" ({report.search.set_aside} of {report.search.inputs} inputs, which the search set aside)"
    usual = [t for t in report.timings if t.label in ("usual", "static")]
    if usual:
        t = usual[0].timing
        text += "; elsewhere " if rule else "; "
        text += f"{t.gain:.2f} times the speed ({t.original * 1e3:.4g} ms -> {t.ours * 1e3:.4g} ms)"
    return text


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
        yield label, time_text(t.original), time_text(t.ours), f"{t.gain:.2f}x", f"{low}..{high}"


def time_text(seconds: float) -> str:
    """Milliseconds with four digits: ``0.2830 ms``."""
    return f"{f'{seconds * 1e3:#.4g}'.rstrip('.')} ms"


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
    """The rows without their last cell as a table; then that cell, the reason, as a line of its own. The column "kind"
    is left out where all sites are softmax attention: it would say nothing and cost width.
    """
    kind = columns.index("kind")
    shown = [i for i in range(len(columns)) if i != kind or any(row[kind] not in ("softmax", "") for row in rows)]
    console.print(_table([columns[i] for i in shown], ([row[i] for i in shown] for row in rows)))
    console.print()
    for row in rows:
        console.print(f"{row[0]}: {row[-1]}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _print_near_misses(near_misses: Sequence[NearMiss], console: Console) -> None:
    """A line each, not a table: names and reasons are both long."""
    for ids, (code, reason) in _grouped((n.node, (n.code, n.reason)) for n in near_misses):
        tail = f" [{code}]" if code else ""
        console.print(f"near miss {_ids(ids)}: {reason}{tail}", markup=False, highlight=False, soft_wrap=True)
    if near_misses:
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
    return site.kind, tokens_text(site), heads_text(site)


def _written(site: AttentionSite) -> str:
    """How the graph writes the site, and in which body."""
    return site.form + (f", in {site.scope}" if site.scope else "")


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
