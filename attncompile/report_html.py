"""The report as one HTML file: no script, nothing fetched, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from attncompile import html_parts, report_search
from attncompile.fit.found import COLUMNS as FIT_COLUMNS
from attncompile.fit.found import lines as fit_lines
from attncompile.fit.found import rows as fit_rows
from attncompile.html_parts import facts, listing, section, table
from attncompile.report import OutputComparison, Report
from attncompile.report_proof import ASSUMPTION_COLUMNS, CASE_COLUMNS, assumption_rows, case_rows
from attncompile.report_text import (
    SITE_COLUMNS,
    TARGET_COLUMNS,
    TIMING_COLUMNS,
    closing_line,
    site_rows,
    size_text,
    target_rows,
    timing_rows,
)


def render(report: Report) -> str:
    """The whole page. All text that comes from the model or the user is escaped."""
    colour = "bad" if report.failures else "good" if report.outcome == "replaced" else "plain"
    model = report.model
    run = (
        ("Model", f"{model.path}, {size_text(model.size)}, opset {model.opset}, {model.nodes} nodes"),
        ("Hash", model.hash),
        ("Policy", report.policy),
        ("Made", f"{report.created} by attncompile {report.environment.attncompile}"),
        ("Machine", f"{report.environment.cpu}, {report.environment.threads} threads"),
    )
    profile = [
        (name, str(r.minimum), str(r.usual), str(r.maximum), "assumed" if r.assumed else "given")
        for name, r in report.profile.items()
    ]
    comparisons = report.parity.comparisons if report.parity else ()
    seconds = [(name, f"{value:.1f}") for name, value in report.seconds.items()]
    near_misses = [(n.node, n.reason, n.code, n.nearest_form) for n in report.near_misses]
    notes = [f"{t.name}: {note}" for t in report.targets for note in t.notes]
    outputs = ("output", "shapes", "relative L2", "max abs", "cosine", "PSNR", "KL", "top-1")
    environment = f"<pre>{escape(json.dumps(report.environment.to_json(), indent=2))}</pre>"
    cases = "Sites: every case that they were checked on"
    body = [
        f"<h1>attncompile: {escape(model.path)}</h1>",
        f'<p class="lead {colour}">{escape(closing_line(report))}</p>',
        listing("Failed", report.failures),
        listing("Warnings", report.warnings),
        facts("Run", run),
        table("Attention sites", SITE_COLUMNS, site_rows(report.sites)),
        table(cases, CASE_COLUMNS, case_rows(report.sites), folded=True),
        table("What the replacements assume", ASSUMPTION_COLUMNS, assumption_rows(report.sites)),
        table("Whole model: time", TIMING_COLUMNS, timing_rows(report.timings)),
        *_fit(report),
        report_search.latency_bars(report.timings),
        *(report_search.sections(report.search) if report.search else ()),
        table("Whole model: outputs against the original", outputs, map(_comparison, comparisons)),
        table("Targets", TARGET_COLUMNS, target_rows(report.targets)),
        listing("Notes on the targets", notes),
        table("Dynamic dimensions", ("name", "min", "usual", "max", ""), profile),
        table("Near misses", ("node", "reason", "code", "nearest form"), near_misses),
        table("Time spent", ("stage", "seconds"), seconds),
        section("Environment", environment, folded=True),
    ]
    style = html_parts.STYLE + report_search.STYLE
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{style}</style>'
    title = f"<title>attncompile: {escape(model.path)}</title>"
    return f'<!doctype html>\n<html lang="en"><head>{head}{title}</head>\n<body><main>\n' + "\n".join(
        part for part in body if part
    ) + "\n</main></body></html>\n"  # fmt: skip


def _comparison(item: OutputComparison) -> tuple[str, ...]:
    m = item.metrics
    if m is None:
        return item.output, item.label, item.reason, "", "", "", "", ""
    return (
        item.output, item.label, f"{m.relative_l2:.2e}", f"{m.max_abs:.2e}", f"{m.cosine:.7f}", f"{m.psnr:.1f} dB",
        "" if m.kl is None else f"{m.kl:.2e}", "" if m.top1_agreement is None else f"{m.top1_agreement:.2%}",
    )  # fmt: skip


def _fit(report: Report) -> Iterable[str]:
    """How far fitted feature maps are."""
    if report.fit is not None:
        yield table("Linear attention with fitted feature maps", FIT_COLUMNS, fit_rows(report.fit))
        yield from (f"<p>{escape(line)}</p>" for line in fit_lines(report.fit))
