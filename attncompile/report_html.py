"""The report as one HTML file: no script, nothing fetched, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from attncompile import report_search
from attncompile.fit.found import COLUMNS as FIT_COLUMNS
from attncompile.fit.found import lines as fit_lines
from attncompile.fit.found import rows as fit_rows
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

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
thead th { border-bottom: 1px solid currentColor; } td { font-variant-numeric: tabular-nums; }
.lead { font-size: 1.1rem; padding: .6rem .9rem; border-left: 4px solid; }
.good { border-color: #2a8f4f; } .plain { border-color: #888; } .bad { border-color: #c0392b; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid #8886; }
"""


def render(report: Report) -> str:
    """The whole page. All text that comes from the model or the user is escaped."""
    colour = "bad" if report.failures else "good" if report.outcome == "replaced" else "plain"
    model = report.model
    facts = (
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
    body = [
        f"<h1>attncompile: {escape(model.path)}</h1>",
        f'<p class="lead {colour}">{escape(closing_line(report))}</p>',
        _list("Failed", report.failures),
        _list("Warnings", report.warnings),
        _table("Run", (), facts),
        _table("Attention sites", SITE_COLUMNS, site_rows(report.sites)),
        _table("Sites: every case that they were checked on", CASE_COLUMNS, case_rows(report.sites)),
        _table("What the replacements assume", ASSUMPTION_COLUMNS, assumption_rows(report.sites)),
        _table("Whole model: time", TIMING_COLUMNS, timing_rows(report.timings)),
        *_fit(report),
        *report_search.sections(report.search, report.timings),
        _table("Whole model: outputs against the original", outputs, map(_comparison, comparisons)),
        _table("Targets", TARGET_COLUMNS, target_rows(report.targets)),
        _list("Notes on the targets", notes),
        _table("Dynamic dimensions", ("name", "min", "usual", "max", ""), profile),
        _table("Near misses", ("node", "reason", "code", "nearest form"), near_misses),
        _table("Time spent", ("stage", "seconds"), seconds),
        "<h2>Environment</h2>",
        f"<pre>{escape(json.dumps(report.environment.to_json(), indent=2))}</pre>",
    ]
    style = _STYLE + report_search.STYLE
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{style}</style>'
    title = f"<title>attncompile: {escape(model.path)}</title>"
    return f'<!doctype html>\n<html lang="en"><head>{head}{title}</head>\n<body>\n' + "\n".join(
        part for part in body if part
    ) + "\n</body></html>\n"  # fmt: skip


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
        yield _table("Linear attention with fitted feature maps", FIT_COLUMNS, fit_rows(report.fit))
        yield from (f"<p>{escape(line)}</p>" for line in fit_lines(report.fit))


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"<h2>{escape(title)}</h2><ul>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if not cells:
        return ""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    top = f"<thead><tr>{head}</tr></thead>" if columns else ""
    return f'<h2>{escape(title)}</h2><div class="wide"><table>{top}<tbody>' + "".join(cells) + "</tbody></table></div>"
