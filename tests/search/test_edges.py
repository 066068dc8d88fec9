"""Searches at the edges: operands that are the model's own inputs, sites of which nothing is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile import gate, pipeline, whole
from attncompile.core.block_pattern import BlockGeometry
from attncompile.fit.capture import Capture, Place
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from attncompile.pipeline import Options
from attncompile.plugins import mechanism
from attncompile.search import executors, heads
from attncompile.search.arrays import save
from tests.search import constructed

TOKENS = 300


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.05)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


def operator_alone() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """q, k, v [1, 2, N, 8] -> softmax(q k^T) v, and six inputs: what a benchmark of an attention kernel exports."""

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, TOKENS, 8])

    nodes = [
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "operator", [value(n) for n in "qkv"], [value("y")])
    rng = np.random.default_rng(0)
    feeds = [{n: rng.standard_normal((1, 2, TOKENS, 8)).astype(np.float32) for n in "qkv"} for _ in range(6)]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), feeds


def test_operands_that_are_inputs(tmp_path: Path) -> None:
    """Nothing is left to be captured, and heads are scored all the same."""
    made, feeds = operator_alone()
    path, inputs = constructed.write(tmp_path, made, feeds)
    found = pipeline.compile(path, Options(policy="sparse", target="onnx", out=tmp_path / "out", inputs=inputs,
                                           keep_slower=True, density=0.6))  # fmt: skip
    assert found.outcome == "replaced" and found.search is not None and found.search.density is not None
    assert 0 < found.search.density <= 0.6
    (got,) = ort.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(None, feeds[0])
    (want,) = ort.InferenceSession(str(path)).run(None, feeds[0])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert found.parity is not None and 0 < error < 1, "what no pattern fits is changed, as the report says"
    assert found.parity.comparisons[0].metrics.relative_l2 == pytest.approx(error, rel=1e-4)


def test_maps_are_fitted_to_operands_that_are_inputs(tmp_path: Path) -> None:
    made, feeds = operator_alone()
    path, _ = constructed.write(tmp_path, made, feeds)
    save(tmp_path / "feed.npz", feeds[0])
    place = Place(0, "site0", ("q", "k", "v"), ("BHND", "BHND", "BHND"), tmp_path)
    assert Capture(path, tmp_path / "feed.npz", (place,), 8, 0, 0, "stamp")(1) == 1
    assert place.file(0, 0).exists() and place.file(1, 0).exists()


def test_heads_that_meet_nothing_take_time(tmp_path: Path) -> None:
    """All heads of a causal site are skipped: the gain is a number, in the report and in plan.toml."""
    model = constructed.build(TOKENS, 1, causal=True, kinds=("local", "sink"))
    path, inputs = constructed.write(tmp_path, model, constructed.feeds(4, TOKENS, 32))
    found = pipeline.compile(path, Options(policy="sparse", target="onnx", out=tmp_path / "out", inputs=inputs,
                                           keep_slower=True, density=0.05))  # fmt: skip
    assert found.outcome == "replaced" and found.search is not None and found.search.density == 0
    assert [h.pattern for h in found.search.sites["site0"]] == ["skip", "skip"]
    assert 1 < found.sites[0].decision.predicted_gain < np.inf


@pytest.mark.parametrize("causal", [False, True])
def test_no_choice_is_predicted_to_take_no_time(causal: bool, tmp_path: Path) -> None:
    subject = mechanism("BlockSparseAttention")
    for tokens in (130, TOKENS, 1024):
        onnx.save(constructed.build(tokens, 1, causal=causal), tmp_path / "m.onnx")
        read = load(tmp_path / "m.onnx")
        (site,) = detect(read, profile_for(read, {})).sites
        geometry = heads.geometry_of(subject, site)
        assert isinstance(geometry, BlockGeometry)
        time = heads.block_time(site, geometry, subject, {}, None)  # type: ignore[arg-type]
        assert 0 < time.fixed < time.dense and time.block > 0
