"""The HTML report is well formed, complete, self-contained, and shows hostile names as text."""

from __future__ import annotations

import importlib.util
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attncompile.report import ModelInfo
from attncompile.report_html import render
from attncompile.report_text import closing_line

_spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("report_samples.py"))
assert _spec is not None and _spec.loader is not None
samples: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags must nest; collects the text and the attributes that would fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sites": (), "near_misses": (), "outcome": "unchanged", "parity": None, "timings": (), "profile": {}},
        {"failures": ("parity: too far",), "warnings": (), "exit_code": 1},
    ],
)
def test_page(changes: dict[str, Any]) -> None:
    report = samples.report(**changes)
    page = Page(render(report))
    assert "tensorrt-rtx: fp16" in page.text
    assert closing_line(report) in page.text
    assert page.links == []
    assert "script" not in page.tags
    for site in report.sites:
        assert site.decision.mechanism in page.text
    for line in (*report.failures, *report.warnings):
        assert line in page.text
    assert ("logits" in page.text) == (report.parity is not None)


def test_hostile_names_are_text() -> None:
    bad = "<script>alert(1)</script>"
    model = ModelInfo(bad, "sha256:0", 18, 1, 1)
    page = Page(render(samples.report(model=model, sites=(samples.kept(bad, bad),), warnings=(bad,))))
    assert "script" not in page.tags
    assert bad in page.text
