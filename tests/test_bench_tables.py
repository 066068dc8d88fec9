"""The tables of measurements in docs are what ``tools/bench table`` prints of the committed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
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


def test_rows_of_samplings() -> None:
    text = (ROOT / "docs" / "sparse.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    for row in json.loads((ROOT / "docs" / "bench" / "sampling-dit.json").read_text(encoding="utf-8"))["rows"]:
        cells = [
            f"{row['max_error']:.0f} dB", f"{row['density']:.1%}", f"{row['density_of_steps']:.1%}",
            ", ".join(f"{x:.1f}" for x in row["psnr"]), f"{row['predicted_gain_of_steps']:.2f}x",
            f"{row['gain_of_steps']:.2f}x",
        ]  # fmt: skip
        assert any(shown[1:] == cells for shown in rows), cells


@pytest.mark.parametrize(
    ("sweep", "withheld", "within"),
    [
        ("linear-sweep-h200", "linear-sweep-h200-seed1", "528 of 553"),
        ("sweep-h200", "sweep-h200-seed1", "245 of 252"),
        ("sweep-h200", "sweep-h200-seed2", "121 of 126"),
    ],
)
def test_costs_are_fitted_to_the_sweeps(sweep: str, withheld: str, within: str) -> None:
    """What ``fit`` makes of the committed sweeps stands in cost.toml, and how many launches are near in the docs."""
    files = [f"docs/bench/{name}.json" for name in (sweep, withheld)]
    done = subprocess.run(
        [sys.executable, "tools/bench", "fit", files[0], "--withheld", files[1]], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert f"# {within} withheld launches within 25%" in done.stdout
    assert within in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    known = tomllib.loads((ROOT / "attncompile" / "kernels" / "cost.toml").read_text(encoding="utf-8"))
    made = tomllib.loads(done.stdout)
    assert len(made) >= 8
    for name, constants in made.items():
        if name == "triton-90-bias":  # of the second seed alone
            continue
        for key in set(constants) - {"withheld", "measured_on"}:
            assert known[name][key] == pytest.approx(constants[key], rel=1e-4), (name, key)
