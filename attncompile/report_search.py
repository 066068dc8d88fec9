"""What a search found, drawn for the HTML report: maps of heads with their patterns, errors against speed, times before
and after. SVG of the page's own, coloured by its style sheet, so that it is as well read in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from attncompile.report import ShapeTiming
from attncompile.search.found import CurvePoint, HeadFound, SearchReport

STYLE = """
:root { --ink: #1c1c1c; --mass: #1f5fa8; --seen: #d9822b; --budget: #c0392b; --before: #8a8f98; --after: #2a8f4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --mass: #7db4ec; --seen: #f0a04b; --budget: #ff7b6b; --before: #7a808a; --after: #58c27d; }
}
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; } figcaption { font-size: .75rem; }
.map { width: 8rem; height: 8rem; border: 1px solid #8886; display: block; } .map .mass { fill: var(--mass); }
.map .seen { fill: var(--seen); fill-opacity: .3; } .plot { width: 42rem; max-width: 100%; }
.plot text { fill: var(--ink); font: 11px system-ui, sans-serif; } .plot line { stroke: #8888; }
.plot .budget { stroke: var(--budget); stroke-dasharray: 5 4; } .plot .mean { fill: var(--mass); }
.plot .bound { fill: none; stroke: var(--mass); } .plot .chosen { fill: none; stroke: var(--after); stroke-width: 2; }
.before { fill: var(--before); } .after { fill: var(--after); }
"""

SIDE = 32
"""Squares a side of a map; more blocks than that are averaged."""

SHADES = (0.15, 0.35, 0.6, 1.0)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 260, 64, 34, 14


def search_section(found: SearchReport) -> str:
    """The search in numbers, its curve, and the heads."""
    budget = "none: a density was asked for" if found.budget is None else f"{found.metric} {found.budget:g}"
    held = f"{len(found.held)}, the worst error {max(found.held):.3g}" if found.held else "none"
    if found.held and found.metric == "perplexity":
        held += f", of all together {np.mean(found.held):.3g}"
    facts = [
        ("Budget", budget), ("Calibration inputs", str(found.calibration)),
        ("Held-out inputs", held + (f"; {found.refused} choices refused by them" if found.refused else "")),
        ("Confidence that others keep the budget", f"{found.confidence:.0%}"),
        *([("Blocks of full attention that are left", f"{found.density:.1%}")] if found.density is not None else []),
    ]  # fmt: skip
    rows = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in facts)
    parts = ["<h2>Search for approximations</h2>", f"<table><tbody>{rows}</tbody></table>"]
    if found.points:
        parts += ["<h2>Error against speed</h2>", curve(found.points, found.budget, found.metric)]
    if found.sites:
        parts.append("<h2>Attention maps and what each head computes</h2>")
        told = "Blue: where the weight lies, the mean over the calibration inputs; queries go down, keys to the right. "
        parts.append(f"<p>{told}Orange: blocks that are computed.</p>")
    for site, heads in found.sites.items():
        parts.append(f"<h3>{escape(site)}</h3><div>")
        parts += [head_figure(number, head) for number, head in enumerate(heads)]
        parts.append("</div>")
    return "\n".join(parts)


def head_figure(number: int, head: HeadFound) -> str:
    """One head's map with its pattern over it."""
    mass, seen = _shrunk(head.mass), _shrunk(head.seen.astype(np.float64)) > 0
    side = len(mass)
    # A square is as dark as its weight is large beside an even share of its row.
    share = mass * side
    shades = []
    for low, high, opacity in zip((0.3, 1.0, 3.0, 8.0), (1.0, 3.0, 8.0, math.inf), SHADES, strict=True):
        path = _squares((share >= low) & (share < high))
        if path:
            shades.append(f'<path class="mass" fill-opacity="{opacity}" d="{path}"></path>')
    over = f'<path class="seen" d="{_squares(seen)}"></path>' if seen.any() else ""
    text = head.pattern if head.kind != "blocks" else "blocks"
    lines = [f"head {number}: {text}", f"{head.density:.0%} of the blocks, {head.kept:.1%} of the weight"]
    title = f"head {number}: {head.kind}"
    return (
        f'<figure><svg class="map" viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}">'
        f"{''.join(shades)}{over}</svg><figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>"
    )


def _shrunk(values: np.ndarray) -> np.ndarray:
    """At most SIDE a side: sums along a row, means down a column, so that rows still sum up."""
    step = -(-len(values) // SIDE)
    starts = np.arange(0, len(values), step)
    rows = np.add.reduceat(values.astype(np.float64), starts, axis=0)
    rows /= np.diff([*starts, len(values)])[:, None]
    return np.asarray(np.add.reduceat(rows, starts, axis=1))


def _squares(which: np.ndarray) -> str:
    """A path of runs of squares."""
    found = []
    for y, row in enumerate(which):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        found += [f"M{a} {y}h{b - a}v1h{a - b}z" for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return "".join(found)


def curve(points: Sequence[CurvePoint], budget: float | None, metric: str) -> str:
    """Errors (logarithmic) against the speed of all attention relative to the sites as they are."""
    shown = [p for p in points if math.isfinite(p.mean) and p.mean > 0 and p.time > 0]
    if not shown:
        return "<p>No model that was measured gave a finite error.</p>"
    limit = None if budget is None else _badness(metric, budget)
    errors = [e for p in shown for e in (p.mean, p.bound) if math.isfinite(e) and e > 0]
    errors += [limit] if limit else []
    low, high = math.log10(min(errors)) - 0.1, math.log10(max(errors)) + 0.1
    fastest = max(1 / p.time for p in shown) * 1.05
    slowest = min(1.0, *(1 / p.time for p in shown))

    def at(speed: float, error: float) -> tuple[float, float]:
        x = _LEFT + (speed - slowest) / max(fastest - slowest, 1e-9) * (_WIDTH - _LEFT - 20)
        y = _TOP + (high - math.log10(error)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = at(1, 10.0**power)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    for step in range(5):
        speed = slowest + (fastest - slowest) * step / 4
        x = at(speed, errors[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{speed:.2f}x</text>')
    if limit:
        y = at(1, limit)[1]
        parts.append(f'<line class="budget" x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        parts.append(f'<text x="{_WIDTH - 24}" y="{y - 4:.1f}" text-anchor="end">budget</text>')
    for p in shown:
        x, y = at(1 / p.time, p.mean)
        parts.append(f'<circle class="mean" cx="{x:.1f}" cy="{y:.1f}" r="3.5"></circle>')
        if math.isfinite(p.bound) and p.bound > 0:
            parts.append(f'<circle class="bound" cx="{x:.1f}" cy="{at(1, p.bound)[1]:.1f}" r="3.5"></circle>')
        if p.chosen:
            parts.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8"></circle>')
    axis = "speed of all attention, predicted"
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{axis}</text>')
    told = {"cosine": "1 - cosine", "top1_agreement": "1 - top-1 agreement", "psnr": "noise relative to the peak",
            "perplexity": "logarithm of its rise"}  # fmt: skip
    legend = (
        f"{told.get(metric, metric)}: filled, the mean of the calibration inputs; open, what others stay below; "
        "ringed, the choice"
    )
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="error against speed">'
        f"{''.join(parts)}</svg><p>{escape(legend)}</p>"
    )


def _badness(metric: str, value: float) -> float:
    from attncompile.search.tasks import badness

    return badness(metric, value)


def latency_bars(timings: Sequence[ShapeTiming]) -> str:
    """Measured times of the whole model, before and after, a pair of bars for each shape."""
    if not timings:
        return ""
    longest = max(max(t.timing.original, t.timing.ours) for t in timings)
    height = 44 * len(timings) + 6
    parts = []
    for row, item in enumerate(timings):
        for place, (name, seconds) in enumerate((("before", item.timing.original), ("after", item.timing.ours))):
            y = row * 44 + place * 18 + 4
            width = seconds / longest * (_WIDTH - 260)
            parts.append(f'<rect class="{name}" x="150" y="{y}" width="{width:.1f}" height="15"></rect>')
            parts.append(f'<text x="{156 + width:.1f}" y="{y + 12}">{seconds * 1e3:#.4g} ms</text>')
            label = f"{item.label}, {name}"
            parts.append(f'<text x="144" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
    return (
        '<h2>Whole model: time before and after</h2><svg class="plot" role="img" aria-label="times before and after" '
        f'viewBox="0 0 {_WIDTH} {height}">{"".join(parts)}</svg>'
    )


def sections(found: SearchReport | None, timings: Sequence[ShapeTiming]) -> Iterable[str]:
    """What this module adds to the page."""
    if found is not None:
        yield search_section(found)
    yield latency_bars(timings)
