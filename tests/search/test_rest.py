"""Heads that meet what they leave out by its means: where the search takes them, fixed and beside chosen blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from attncompile import gate, pipeline, report, whole
from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.block_selection import is_selection, rest_of
from attncompile.core.grid import TokenGrid
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from attncompile.pipeline import Options
from attncompile.plugins import mechanism
from attncompile.search import candidates, executors, heads, run
from tests.search import constructed

TOKENS = 1000
"""The last block is not whole."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


def compiled(made: tuple[Path, Path], folder: Path, **more: Any) -> report.Report:
    given = {"policy": "sparse", "target": "onnx", "out": folder / "out", "inputs": made[1], "keep_slower": True,
             "max_error": 0.02}  # fmt: skip
    return pipeline.compile(made[0], Options(**{**given, **more}))


def time_of(found: report.Report) -> float:
    assert found.search is not None
    return next((p.time for p in found.search.points if p.chosen), 1.0)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_look_far_get_means(causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the same budget they are predicted to take less time than any choice of blocks alone."""
    made = constructed.write(
        tmp_path, constructed.build(TOKENS, 1, causal=causal, kinds=("far", "far", "local")),
        slow(6),
    )  # fmt: skip
    found = compiled(made, tmp_path)
    assert found.outcome == "replaced" and found.search is not None, found.warnings
    assert found.parity is not None and found.parity.passed and 0 < found.parity.value <= 0.02
    assert all(e <= 0.02 for e in found.search.held) and found.search.held
    shown = found.search.sites["site0"]
    assert any(rest_of(h.pattern) for h in shown), [h.pattern for h in shown]
    for head in shown:
        assert 0 < head.density < 1 and (is_selection(head.pattern) or head.density == pytest.approx(
            BlockPattern(head.pattern).computed(geometry(causal)) / geometry(causal).all.sum(), abs=1e-6))  # fmt: skip
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert "BlockSparseAttention" in {n.op_type for n in model.graph.node if n.domain == "attncompile"}
    again = compiled(made, tmp_path / "again", plan=tmp_path / "out" / "plan.toml")
    assert again.outcome == "replaced"
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()
    monkeypatch.setattr(run, "selections_beside_means", lambda geometry: [])
    monkeypatch.setattr(run, "beside_means", lambda mass, geometry: [])
    without = compiled(made, tmp_path / "without")
    assert time_of(found) < 0.9 * time_of(without)


def slow(count: int) -> list[dict[str, np.ndarray]]:
    """Inputs that change slowly from token to token, so that what is far away has a mean that matters."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        knots = rng.standard_normal((9, 48))
        at = np.linspace(0, 8, TOKENS)
        smooth = np.stack([np.interp(at, np.arange(9), knot) for knot in knots.T], axis=1)
        found.append({"x": (smooth + 0.2 * rng.standard_normal(smooth.shape))[None].astype(np.float32)})
    return found


def geometry(causal: bool) -> BlockGeometry:
    return BlockGeometry(TOKENS, 64, causal)


def test_what_is_offered() -> None:
    at = BlockGeometry(1024, 64, False, TokenGrid((32, 32)))
    place = np.arange(16)
    mass = np.exp(-np.abs(place[:, None] - place[None, :]) / 2).astype(np.float32)
    found = candidates.beside_means(mass / mass.sum(axis=1, keepdims=True), at)
    assert {p.rest for p in found} == {16} and len({p.text for p in found}) == len(found) > 10
    met = [int(p.blocks(at).sum()) for p in found]
    assert met == sorted(met) and met[0] == 16 and met[-1] < 256
    for texts in candidates.selections_beside_means(at):
        assert {rest_of(t) for t in texts} == {64} and all(re.search(r"^(pooled|xattention|anchor) ", t) for t in texts)


def test_times_of_means(tmp_path: Path) -> None:
    """A block costs what it costs without them; that they are made and joined costs more."""
    onnx.save(constructed.build(1024, 1, causal=False, kinds=("far",) * 4), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    (site,) = detect(model, profile_for(model, {})).sites
    subject: Any = mechanism("BlockSparseAttention")
    at = subject.head_geometry(site)
    plain, coarse = (heads.block_time(site, at, subject, {}, None, rest) for rest in (0, 16))
    assert coarse.block == pytest.approx(plain.block, rel=0.1) and coarse.fixed > plain.fixed
    assert coarse.dense == plain.dense
