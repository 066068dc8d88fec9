"""What a search found, drawn for the HTML report: maps of heads with their patterns, errors against speed, times before
and after. SVG of the page's own, coloured by its style sheet, so that it is as well read in the dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

import numpy as np

from attncompile.html_parts import facts, section, table
from attncompile.report import ShapeTiming
from attncompile.report_text import time_text
from attncompile.search.found import CurvePoint, HeadFound, SearchReport

STYLE = """
:root { --ink: #1c1c1c; --mass: #1f5fa8; --seen: #b45309; --budget: #c0392b; --before: #7b808a; --after: #2a8f4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --mass: #7db4ec; --seen: #f0a04b; --budget: #ff7b6b; --before: #9096a0; --after: #58c27d; }
}
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .8rem; line-height: 1.4; margin-top: .3rem; }
.map { width: 10rem; height: 10rem; border: 1px solid var(--rule); display: block; } .mass { fill: var(--mass); }
.seen { fill: var(--seen); fill-opacity: .12; }
.edge { fill: none; stroke: var(--seen); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.plot { width: 100%; min-width: 30rem; max-width: 42rem; display: block; } line { stroke: #8888; }
.plot text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.budget { stroke: var(--budget); stroke-dasharray: 5 4; } .mean { fill: var(--mass); }
.bound { fill: none; stroke: var(--mass); stroke-width: 1.5; }
.chosen { fill: none; stroke: var(--after); stroke-width: 2; }
.key { width: .9em; height: .9em; margin: 0 .3em 0 .8em; vertical-align: -.1em; }
.key:first-child { margin-left: 0; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .2rem .7rem; max-width: 42rem; align-items: center; }
.bars .after { margin-bottom: .6rem; } .bars .name, .bars .time { white-space: nowrap; }
.bars .time { font-variant-numeric: tabular-nums; } .bar { height: .9rem; min-width: 1px; }
.bar.before { background: var(--before); } .bar.after { background: var(--after); }
"""

SIDE = 32
"""Squares a side of a map; more blocks than that are averaged."""

POINT_COLUMNS = ("speed of all attention, over exact", "mean error", "others stay below", "")

SHADES = (0.15, 0.35, 0.6, 1.0)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 280, 76, 40, 14


def sections(found: SearchReport) -> Iterable[str]:
    """The search in numbers, its curve, and the heads."""
    budget = "none: a density was asked for" if found.budget is None else f"{found.metric} {found.budget:g}"
    held = f"{len(found.held)}, the worst error {max(found.held):.3g}" if found.held else "none"
    if found.held and found.metric in ("perplexity", "top1_agreement"):
        said = "of all together" if found.metric == "perplexity" else "their mean"
        held += f", {said} {np.mean(found.held):.3g}"
    yield facts("Search for approximations", [
        ("Budget", budget), ("Calibration inputs", str(found.calibration)),
        ("Held-out inputs", held + (f"; choices that they refused: {found.refused}" if found.refused else "")),
        ("Confidence that others keep the budget", f"{found.confidence:.0%}"),
        *([("Blocks of full attention that are left", f"{found.density:.1%}")] if found.density is not None else []),
        *_set_aside(found),
    ])  # fmt: skip
    if found.points:
        yield section("Error against speed", curve(found.points, found.budget, found.metric))
        mean, bound = f"{_key('mean')}the mean of the calibration inputs", f"{_key('bound')}what others stay below"
        yield f"<p>{mean}{bound}{_key('chosen')}the choice</p>"
        yield table("Every choice that was measured", POINT_COLUMNS, map(_point, found.points), folded=True)
    if found.sites:
        yield "<h2>Attention maps and what each head computes</h2>"
        yield (
            f"<p>{_key('mass')}where the weight lies, the mean over the calibration inputs: queries go down, keys to "
            f"the right, tokens as they stand or in the order that a pattern names.{_key('seen')}blocks that are "
            "computed; a pattern with a rest meets the others by means of keys and values.</p>"
        )
    for site, heads in found.sites.items():
        figures = "".join(head_figure(number, head) for number, head in enumerate(heads))
        yield f'<h3>{escape(site)}</h3><div class="heads">{figures}</div>'


def _set_aside(found: SearchReport) -> Iterator[tuple[str, str]]:
    """What is said of a rule for calls that stay dense."""
    if not found.keep_dense:
        return
    yield "Nothing is approximated in calls with", found.keep_dense
    yield "Inputs of such calls", f"{found.set_aside} of {found.inputs}: they did not choose, and are no evidence"
    if found.density_of_inputs is not None:
        yield "Blocks that are left, mean over all inputs", f"{found.density_of_inputs:.1%}"


def _point(point: CurvePoint) -> tuple[str, ...]:
    choice = "chosen" if point.chosen else ""
    return f"{1 / point.time:.2f}x" if point.time > 0 else "", f"{point.mean:.3g}", f"{point.bound:.3g}", choice


_SQUARE = '<path class="{}" d="M1 1h12v12h-12z"></path>'
_CIRCLE = '<circle class="{}" cx="7" cy="7" r="{}"></circle>'
_KEYS = {
    "mass": _SQUARE.format("mass"), "seen": _SQUARE.format("seen") + _SQUARE.format("edge"),
    "mean": _CIRCLE.format("mean", 4), "bound": _CIRCLE.format("bound", 4), "chosen": _CIRCLE.format("chosen", 6),
}  # fmt: skip


def _key(kind: str) -> str:
    """What a legend explains, as it is drawn."""
    return f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{_KEYS[kind]}</svg>'


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
    over = ""
    if seen.any():
        over = f'<path class="seen" d="{_squares(seen)}"></path><path class="edge" d="{_outline(seen)}"></path>'
    text = re.sub(r"blocks \S+", "blocks", head.pattern)
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
        found += [f"M{a} {y}h{b - a}v1h{a - b}z" for a, b in _runs(row)]
    return "".join(found)


def _outline(which: np.ndarray) -> str:
    """A path of the lines between squares that are in and squares that are not."""
    padded = np.pad(which, 1).astype(np.int8)
    found = []
    for y, row in enumerate(np.diff(padded, axis=0)[:, 1:-1] != 0):
        found += [f"M{a} {y}h{b - a}" for a, b in _runs(row)]
    for x, column in enumerate(np.diff(padded, axis=1)[1:-1].T != 0):
        found += [f"M{x} {a}v{b - a}" for a, b in _runs(column)]
    return "".join(found)


def _runs(row: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where truths begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def curve(points: Sequence[CurvePoint], budget: float | None, metric: str) -> str:
    """Errors (logarithmic) against the speed of all attention relative to its exact form, as it is or replaced."""
    shown = [p for p in points if math.isfinite(p.mean) and p.mean > 0 and p.time > 0]
    if not shown:
        return "<p>No model that was measured gave a finite error.</p>"
    limit = None if budget is None or not math.isfinite(budget) else _badness(metric, budget)
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
    for tick in _ticks(low, high):
        y = at(1, tick)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.0e}</text>')
    for step in range(5):
        speed = slowest + (fastest - slowest) * step / 4
        x = at(speed, errors[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{speed:.2f}x</text>')
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
    told = {"cosine": "1 - cosine", "top1_agreement": "1 - top-1 agreement", "psnr": "noise relative to the peak",
            "perplexity": "logarithm of its rise"}  # fmt: skip
    up, right = escape(told.get(metric, metric)), "speed of all attention over its exact form, predicted"
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{right}</text>')
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    turned = f'x="12" y="{middle}" transform="rotate(-90 12 {middle})"'
    parts.append(f'<text {turned} text-anchor="middle">{up}</text>')
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="error against speed">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10^low to 10^high: powers of ten, and between them where these are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        found = [d * 10.0**p for p in powers for d in digits if low <= math.log10(d * 10.0**p) <= high]
        if len(found) >= 3:
            return found
    return found


def _badness(metric: str, value: float) -> float:
    from attncompile.search.tasks import badness

    return badness(metric, value)


def latency_bars(timings: Sequence[ShapeTiming]) -> str:
    """Measured times of the whole model, before and after, a pair of bars for each shape."""
    if not timings:
        return ""
    longest = max(max(t.timing.original, t.timing.ours) for t in timings)
    rows = []
    for item in timings:
        for name, seconds in (("before", item.timing.original), ("after", item.timing.ours)):
            rows.append(
                f'<span class="name {name}">{escape(item.label)}, {name}</span>'
                f'<span class="bar {name}" style="width: {seconds / longest:.1%}"></span>'
                f'<span class="time {name}">{time_text(seconds)}</span>'
            )
    return f'<h2>Whole model: time before and after</h2><div class="bars">{"".join(rows)}</div>'
