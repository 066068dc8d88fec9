"""The HTML report in a real browser: nothing is fetched or said to the console, all is drawn, large enough and with
contrast, in the light and in the dark; what is wide scrolls by itself; the keyboard reaches and opens everything.

The checks are one function that lists complaints, and a page with every fault shows that it does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attncompile.report_html import render
from tests.browser import NoBrowser, View, Visit, look
from tests.report_samples import approximate, kept, report
from tests.search.test_report import found, head

NARROW, USUAL = 400, 1280

FOUND = """(() => {
  const all = s => [...document.querySelectorAll(s)];
  const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX);
  const inside = e => e && (scrolls(e) ? e : inside(e.parentElement));
  const place = e => {
    const r = e.getBoundingClientRect();
    const clip = inside(e.parentElement), c = clip && clip.getBoundingClientRect();
    return {
      name: `${e.tagName.toLowerCase()}.${e.getAttribute('class') || ''}`, text: e.textContent.trim().slice(0, 60),
      x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, visible: e.checkVisibility(),
      clipped: !!c && (r.right > c.right + 1 || r.bottom > c.bottom + 1),
    };
  };
  const worded = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return {
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    sideways: document.documentElement.scrollWidth - innerWidth,
    outside: all('main *').filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !inside(e.parentElement)
      && e.checkVisibility()).map(place),
    headings: all('h1, h2, h3').map(place),
    drawings: all('svg.map, svg.plot, .bars').map(place),
    marks: all('.plot circle, .plot .budget, .map .edge, .map .mass[fill-opacity="1.0"], .bar').map(place),
    words: all('main *').filter(e => worded(e) && e.checkVisibility()).map(place),
    stops: all('summary').length + all('.wide').filter(e => e.checkVisibility()).length,
    closed: all('details:not([open])').length,
  };
})()"""

FOCUSED = """(e => e === document.body ? null : {
  stop: e.matches('summary, .wide'), name: e.tagName.toLowerCase(),
  text: (e.getAttribute('aria-label') || e.textContent).slice(0, 60),
  ring: getComputedStyle(e).outlineStyle !== 'none' && parseFloat(getComputedStyle(e).outlineWidth) >= 1,
})(document.activeElement)"""


def visit(page: Path, scheme: str, widths: Sequence[int]) -> Visit:
    try:
        return look(page, scheme, widths, FOUND, FOCUSED, page.parent)
    except NoBrowser as error:
        if "CI" in os.environ:
            raise
        pytest.skip(f"no browser: {error}; pip install '.[browser]'")


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB uint8 [..., 3], as WCAG 2 defines it."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ [0.2126, 0.7152, 0.0722])


def contrast(view: View, box: dict[str, Any]) -> float:
    """The largest between the page and a pixel of the box."""
    paper = luminance(view.pixels[0, -1])
    y, x = max(int(box["y"]), 0), max(int(box["x"]), 0)
    crop = view.pixels[y : int(box["y"] + box["height"]) + 2, x : int(box["x"] + box["width"]) + 2]
    if not crop.size:
        return 1.0
    light = luminance(crop)
    return float(max((light.max() + 0.05) / (paper + 0.05), (paper + 0.05) / (light.min() + 0.05)))


def complaints(page: Path, seen: Visit, scheme: str) -> list[str]:
    """What is wrong with a page, one line each."""
    told = [f"console: {line}" for line in seen.console]
    told += [f"fetched: {address}" for address in seen.requests if address != page.as_uri()]
    for view in seen.views:
        told += [f"{scheme} {view.width}: {line}" for line in _of(view, scheme == "dark")]
    return told


def _of(view: View, dark: bool) -> list[str]:
    found = view.found
    told = [] if found["dark"] == dark else ["the wrong colour scheme"]
    paper = float(luminance(view.pixels[0, -1]))
    if not (paper < 0.1 if dark else paper > 0.8):
        told.append(f"paper of luminance {paper:.2f}")
    if found["sideways"] > 0:
        told.append(f"scrolls sideways by {found['sideways']} px")
    told += [f"outside: {e['name']} {e['text']}" for e in found["outside"]]
    told += [f"closed: {found['closed']} parts that the keyboard does not open"] if found["closed"] else []
    for e in (*found["headings"], *found["drawings"]):
        if not (e["visible"] and e["width"] >= 12 and e["height"] >= 12):
            told.append(f"not seen: {e['name']} {e['text']}")
    for limit, part in ((3.0, "marks"), (4.5, "words")):
        for e in found[part]:
            if not e["clipped"] and (ratio := contrast(view, e)) < limit:
                told.append(f"faint, {ratio:.2f}: {e['name']} {e['text']}")
    told += [f"small: {e['name']} {e['text']}" for e in found["words"] if e["height"] < 10]
    told += [f"focus not shown: {e['name']} {e['text']}" for e in view.focused if not e["ring"]]
    if (reached := len({(e["name"], e["text"]) for e in view.focused if e["stop"]})) != found["stops"]:
        told.append(f"reached: {reached} of {found['stops']} parts")
    return told


def hard() -> str:
    """A report with all sections, long names and many columns."""
    name = "model.decoder.transformer_blocks.0.self_attention.with_a_name_without_any_place_to_break"
    search = found()
    heads = [head(text) for text in ("sinks 1 window 3", "dense", "columns 0,9 diagonals 4", "sinks 2 window 1")]
    search = dataclasses.replace(search, sites={name: heads * 3, "layers.1": heads[:1]})
    sites = (*report().sites, approximate("layers.2"), kept(name, "predicted 0.98 times the speed, which is no gain"))
    return render(report(search=search, sites=sites, failures=("parity: relative_l2 2e-2 is above 1e-2 " + name,)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report(scheme: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(hard(), encoding="utf-8")
    seen = visit(page, scheme, (NARROW, USUAL))
    assert complaints(page, seen, scheme) == []
    assert seen.requests == (page.as_uri(),)
    narrow, usual = seen.views
    assert [view.pixels.shape[1] for view in seen.views] == [NARROW, USUAL]
    headings = [e["text"] for e in usual.found["headings"]]
    for title in (
        "Failed", "Warnings", "Run", "Attention sites", "Sites: every case that they were checked on",
        "What the replacements assume", "Whole model: time", "Whole model: time before and after",
        "Search for approximations", "Error against speed", "Every choice that was measured",
        "Attention maps and what each head computes", "Whole model: outputs against the original", "Targets",
        "Notes on the targets", "Dynamic dimensions", "Near misses", "Time spent", "Environment",
    ):  # fmt: skip
        assert title in headings
    kinds = [e["name"] for e in usual.found["drawings"]]
    assert kinds.count("svg.map") == 13 and kinds.count("svg.plot") == kinds.count("div.bars") == 1
    # All four circles of two points and the ring, the budget, four bars, an outline and dark squares of every map.
    marks = [e["name"] for e in usual.found["marks"]]
    assert marks.count("path.edge") == 13 and marks.count("circle.chosen") == 1 and len(marks) >= 5 + 1 + 4 + 2 * 13
    assert any(e["clipped"] for e in narrow.found["words"]), "no table is wider than the narrow page: nothing was tried"
    assert [e["name"] for e in usual.focused].count("summary") == 3


def test_every_fault_is_complained_of(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        """<!doctype html><body style="margin: 0"><main style="padding: 1rem">
        <h1 style="display: none">not shown</h1>
        <p style="color: #999; background: #fff">faint</p>
        <p style="font-size: 6px">tiny</p>
        <div style="width: 900px">too wide</div>
        <svg class="map" width="100" height="100"><path class="edge" fill="#eee" d="M0 0h50v50h-50z"></path></svg>
        <svg class="plot" width="0" height="50"></svg>
        <img src="picture.png" alt=""><script>console.error("said")</script>
        <details><summary tabindex="-1">cannot be reached</summary>folded</details>
        <a href="#x" style="outline: none">no ring</a>
        </main>""",
        encoding="utf-8",
    )
    told = complaints(page, visit(page, "dark", (NARROW,)), "dark")
    for words in (
        "console: ", "fetched: file:///", "dark 400: paper of", "scrolls sideways by", "outside: div. too wide",
        "closed: 1 ", "not seen: h1. not shown", "not seen: svg.plot", "path.edge", ": p. faint", "small: p. tiny",
        "focus not shown: a no ring", "reached: ",
    ):  # fmt: skip
        assert any(words in line for line in told), (words, told)
