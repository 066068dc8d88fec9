"""Whole models that were measured: the picture, the docs and README say what the result says, and it can be read."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs/bench/e2e-h200.json"
PICTURE = RESULT.with_suffix(".svg")


@pytest.fixture(scope="module")
def drawing() -> Iterator[Any]:
    folder = str(ROOT / "tools/bench")
    sys.path.insert(0, folder)
    import e2e_plot

    yield e2e_plot
    sys.path.remove(folder)


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def shown(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text(encoding="utf-8"))


def contrast(colour: str, ground: str) -> float:
    """As WCAG 2 defines it."""

    def light(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(colour), light(ground)))
    return (high + 0.05) / (low + 0.05)


def test_bars(drawing: Any, result: dict[str, Any]) -> None:
    for case in result["cases"]:
        found = drawing.bars(case)
        assert [ours for *_, ours in found] == [True] * 4 + [False] * (len(found) - 4)
        peers = [t for _, t, ours in found if not ours]
        assert peers == sorted(peers) and {t for _, t, _ in found} <= set(case["ms"].values())
        assert len(peers) == sum(not n.startswith(("ours", "best")) for n in case["ms"])


def test_the_committed_picture_is_of_the_result(drawing: Any, result: dict[str, Any]) -> None:
    bars = [bar for case in result["cases"] for bar in drawing.bars(case)]
    wanted = Counter([c["name"] for c in result["cases"]] + [x for n, t, _ in bars for x in (n, f"{t:.1f}")])
    found = Counter(shown(PICTURE))
    assert not wanted - found
    (caption,) = found - wanted
    assert result["gpu"] in caption and result["when"] in caption
    assert PICTURE.stat().st_size < 60_000


def test_the_picture_is_read_on_light_and_on_dark(drawing: Any) -> None:
    text = PICTURE.read_text(encoding="utf-8")
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert used == {drawing.GREY, drawing.BLUE, drawing.ORANGE}
    for ground in ("#ffffff", "#0d1117"):
        assert all(contrast(colour, ground) >= 3.5 for colour in used), ground


def test_plot(drawing: Any, result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    failed = {"name": "broken", "failed": "stopped"}
    result["cases"] = [*result["cases"][:2], failed]
    drawing.plot(result, tmp_path / "a.svg")
    found = shown(tmp_path / "a.svg")
    assert "dinov2-l-518-b8" in found and "so400m-896-b2" in found and "broken" not in found
    assert "21.9" in found and "ours, half norms" in found and "ONNX Runtime onnxscript" in found


ROWS = {
    "DINOv2-L": "dinov2-l-518-b8", "SO400M, 896": "so400m-896-b2", "SO400M, neigh": "so400m-896-b2-na16",
    "Wan": "wan-8-na9x15x27", "Mistral": "mistral-8-32k-w4096",
}  # fmt: skip


def table(page: str, head: str) -> list[list[str]]:
    """The rows under the line that starts so; of a cell what is before a bracket."""
    lines = (ROOT / page).read_text(encoding="utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found.append([name, *(cell.split(" (")[0] for cell in cells)])
    return found


@pytest.mark.parametrize(
    ("page", "head"), [("docs/onnxruntime.md", "| model | ours |"), ("README.md", "| whole model |")]
)
def test_the_tables_are_of_the_result(page: str, head: str, result: dict[str, Any]) -> None:
    cases = {c["name"]: c for c in result["cases"]}
    rows = table(page, head)
    assert len(rows) == len(cases)
    for name, *cells in rows:
        (key,) = [k for start, k in ROWS.items() if name.startswith(start)]
        ms, ratios = cases[key]["ms"], cases[key]["ratios"]
        torch = "compile flex" if "compile flex" in ms else "compile"
        ort = "best onnxruntime"
        if page == "README.md":
            best = min(t for n, t in ms.items() if n.startswith("ours"))
            over = [f"{ratios[n]:.2f}" for n in (torch, ort) if n in ratios]
            wanted = [f"{best:.2f}", f"{ms[torch]:.2f}", f"{ms[ort]:.2f}" if ort in ms else "", ", ".join(over)]
        else:
            times = ("ours", "ours graph", "ours norms", "ours norms graph", torch, ort)
            wanted = [f"{ms[n]:.2f}" if n in ms else "" for n in times]
            wanted += [f"{ratios[n]:.2f}" if n in ratios else "" for n in (ort, torch)]
        assert cells == wanted, name
