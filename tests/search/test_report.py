"""The search in the report: its JSON follows the schema, its drawings say what was found, and nothing is fetched."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from attncompile import html_parts, report_html, report_search
from attncompile import report as reports
from attncompile.core.block_pattern import BlockGeometry, BlockPattern, bitmap
from attncompile.measure import Timing
from attncompile.report import ShapeTiming
from attncompile.search import CurvePoint, HeadFound, SearchReport
from tests.test_report_html import Page, samples

GEOMETRY = BlockGeometry(64 * 70, 64, True)


def head(text: str, damage: float = 0.01) -> HeadFound:
    pattern = BlockPattern(text)
    seen = pattern.blocks(GEOMETRY)
    mass = np.where(GEOMETRY.all, 1.0, 0.0)
    mass[:, 0] += 20
    mass /= mass.sum(axis=1, keepdims=True)
    return HeadFound(pattern.text, pattern.kind, float(seen.mean()), damage, 0.9, mass, seen)


def found(**changes: Any) -> SearchReport:
    points = (CurvePoint(0.5, 0.02, 0.04), CurvePoint(0.7, 0.005, 0.009, True), CurvePoint(0.2, np.inf, np.inf))
    sites = {"layers.0<&>": (head("sinks 1 window 3"), head("dense"), head("columns 0,9 diagonals 4"))}
    given = SearchReport("relative_l2", 0.01, 0.99, 4, points, (0.006, 0.008), 1, 0.4, sites)
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize(
    "search", [found(), found(budget=None, points=(), held=(), sites={}), found(metric="cosine", budget=0.99), None]
)
def test_json_and_page(search: SearchReport | None) -> None:
    made = samples.report(search=search)
    jsonschema.validate(made.to_json(), reports.schema())
    reports.dumps(made.to_json())
    page = Page(report_html.render(made))
    assert not page.links and "script" not in page.tags
    assert ("Search for approximations" in page.text) == (search is not None)
    if search is not None and search.sites:
        assert "layers.0<&>" in page.text and "head 2: columns 0,9 diagonals 4" in page.text
        assert page.tags.count("figure") == 3 and "Error against speed" in page.text


def test_a_map_shows_the_pattern() -> None:
    """Every square of the drawing is met by some block of the pattern, and the other way round."""
    one = head("sinks 1 window 3")
    text = report_search.head_figure(0, one)
    (path,) = re.findall(r'class="seen" d="([^"]*)"', text)
    step = -(-70 // report_search.SIDE)
    side = -(-70 // step)
    shown = np.zeros((side, side), bool)
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
        shown[int(y), int(x) : int(x) + int(width)] = True
    padded = np.zeros((side * step, side * step), bool)
    padded[:70, :70] = one.seen
    np.testing.assert_array_equal(shown, padded.reshape(side, step, side, step).any(axis=(1, 3)))
    assert f'viewBox="0 0 {side} {side}"' in text
    # The first column holds most of the weight, so it is the darkest.
    dark = re.findall(r'fill-opacity="1.0" d="([^"]*)"', text)
    assert len(dark) == 1 and all(x == "0" for x, _ in re.findall(r"M(\d+) (\d+)h1", dark[0]))


def test_a_bitmap_is_not_spelled_out() -> None:
    pattern = bitmap(GEOMETRY.all).text
    for text in (pattern, f"{pattern} rest 16", f"order 8x8 {pattern}"):
        one = dataclasses.replace(head("dense"), pattern=text)
        caption = report_search.head_figure(0, one)
        assert pattern.split()[1] not in caption and ("rest 16" in caption) == ("rest" in text)


def test_the_curve_has_every_point_that_is_finite() -> None:
    drawn = report_search.curve(found().points, 0.01, "relative_l2")
    assert drawn.count('class="mean"') == 2 and drawn.count('class="chosen"') == 1 and "budget" in drawn
    places = {float(x): float(y) for x, y in re.findall(r'class="mean" cx="([\d.]+)" cy="([\d.]+)"', drawn)}
    left, right = sorted(places)
    assert places[left] > places[right], "the slower point has the smaller error, which is further down"
    assert "No model" in report_search.curve(found().points[2:], None, "relative_l2")


def test_bars_are_as_long_as_times() -> None:
    timing = Timing(0.4, 0.1, 0.25, 0.2, 0.3, 9, (0.25,) * 9, 2)
    drawn = report_search.latency_bars([ShapeTiming("usual", {}, timing)])
    before, after = (float(w) for w in re.findall(r'class="bar \w+" style="width: ([\d.]+)%"', drawn))
    assert before == pytest.approx(4 * after, rel=0.01) and "400.0 ms" in drawn and "100.0 ms" in drawn
    assert report_search.latency_bars([]) == ""


def test_both_colour_schemes_are_there() -> None:
    known = set()
    for style in (html_parts.STYLE, report_search.STYLE):
        light, dark = style.split("@media (prefers-color-scheme: dark)")
        names = set(re.findall(r"(--\w+):", light))
        assert names and names - {"--rule"} == set(re.findall(r"(--\w+):", dark.split("}")[0]))
        known |= names
        assert known >= set(re.findall(r"var\((--\w+)\)", style))
