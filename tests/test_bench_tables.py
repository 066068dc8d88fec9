"""The tables of measurements in docs are what ``tools/bench table`` prints of the committed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]


def printed(name: str) -> list[list[str]]:
    """Cells of each row, without the head."""
    done = subprocess.run(
        [sys.executable, "tools/bench", "table", f"docs/bench/{name}-h200.json"], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize("name", ["kernels", "selection"])
def test_rows_of_the_docs(name: str) -> None:
    lines = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for row in printed(name):
        assert row in shown, row


def test_times_of_linear_attention() -> None:
    """There the docs name cases in words, in the same order within a kind."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    times = {row[0]: row[1] for row in printed("linear")}
    for case, words in (
        ("retention-8k", "retention, 8k"), ("retention-32k", "retention, 32k"), ("simple-gla-8k", "simple GLA, 8k"),
        ("simple-gla-32k", "simple GLA, 32k"), ("gla-8k", "GLA, 8k"), ("gla-32k", "GLA, 32k"),
        ("gated-delta-8k", "gated delta rule, 8k"), ("gated-delta-32k", "gated delta rule, 32k"),
        ("simple-gla-step", "simple GLA, a step of 64 sequences"), ("gated-delta-step", "gated delta rule, the same"),
        ("relu-d128-64k", "relu, 16 heads of 128, 64k"),
    ):  # fmt: skip
        assert f"| {words} | {times[case]} |" in text, case


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "bench").glob("search-*.json")), ids=lambda p: p.stem)
def test_rows_of_searches(path: Path) -> None:
    """Each choice of a committed comparison stands in docs/sparse.md with its gain, blocks, bound and errors."""
    found = json.loads(path.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "sparse.md").read_text(encoding="utf-8")
    rows = [{cell.strip() for cell in line.strip("|").split("|")} for line in text.splitlines() if line.startswith("|")]
    share = found["metric"] in ("perplexity", "top1_agreement")
    for row in found["rows"][1:]:
        cells = {f"{row['gain_over_file']:.2f}x", f"{row['density']:.1%}"}
        if found.get("density") is None:
            cells.add(f"{row['bound']:.2%}" if share else f"{row['bound']:.4f}")
        if found["metric"] == "psnr":
            cells |= {f"{row['held_mean']:.4f}", f"{max(row['held']):.4f}"}
        assert any(cells <= shown for shown in rows), (row["name"], cells)
