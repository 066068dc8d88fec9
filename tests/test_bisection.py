"""Sites that pass alone and break the model: found by bisection, restored, reported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx import numpy_helper as nh

from attncompile import gate, pipeline, report, whole
from attncompile.core.mechanism import Lowering, Parameters
from attncompile.core.site import AttentionSite
from attncompile.pipeline import Options
from attncompile.plugins.neighborhood.mechanism import NeighborhoodAttention

pytestmark = pytest.mark.usefixtures("brief")

SITES, N, D = 12, 300, 8
RIGHT = NeighborhoodAttention.lower


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve windowed layers side by side: what one of them does wrong is seen in its part of the output alone."""
    rng = np.random.default_rng(0)
    distance = np.arange(N)[None] - np.arange(N)[:, None]
    mask = np.where((distance <= 0) & (distance > -16), 0.0, -np.inf).astype(np.float32)[None, None]
    nodes, stored = [], [nh.from_array(mask, "mask")]
    for i in range(SITES):
        for x in "qkv":
            stored.append(nh.from_array(rng.standard_normal((D, D)).astype(np.float32), f"w{x}{i}"))
            nodes.append(helper.make_node("MatMul", ["x", f"w{x}{i}"], [f"{x}{i}"]))
        nodes += [
            helper.make_node("Transpose", [f"k{i}"], [f"kt{i}"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [f"q{i}", f"kt{i}"], [f"raw{i}"]),
            helper.make_node("Add", [f"raw{i}", "mask"], [f"s{i}"]),
            helper.make_node("Softmax", [f"s{i}"], [f"p{i}"], axis=-1),
            helper.make_node("MatMul", [f"p{i}", f"v{i}"], [f"o{i}"]),
        ]
    nodes.append(helper.make_node("Concat", [f"o{i}" for i in range(SITES)], ["y"], axis=3))
    graph = helper.make_graph(
        nodes, "twelve", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, N, D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, N, SITES * D])], stored,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("twelve") / "twelve.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def compiled(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, planted: Mapping[str, float], **options: object
) -> report.Report:
    """Each planted site's output is that many times too large; the sites' own gate is asleep."""

    def lower(self: NeighborhoodAttention, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        good = RIGHT(self, site, parameters, opset)
        if site.id not in planted:
            return good
        name = site.output.value
        good.nodes[-1].output[0] = f"{name}/right"
        factor = nh.from_array(np.array(1 + planted[site.id], np.float32), f"{name}/factor")
        wrong = helper.make_node("Mul", [f"{name}/right", f"{name}/factor"], [name])
        return Lowering((*good.nodes, wrong), good.functions, (*good.initializers, factor))

    monkeypatch.setattr(NeighborhoodAttention, "lower", lower)
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    found = pipeline.compile(model, Options(target="onnx", out=out, keep_slower=True, **options))  # type: ignore[arg-type]
    jsonschema.validate(json.loads((out / "report.json").read_text()), report.schema())
    return found


def test_nothing_planted_needs_no_bisection(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(model, tmp_path / "out", monkeypatch, {})
    assert len(found.replaced) == SITES and found.bisection is None and found.parity is not None and found.parity.passed


@pytest.mark.parametrize("culprits", [("site7",), ("site0", "site10")])
def test_culprits_are_found_and_restored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprits: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    found = compiled(model, out, monkeypatch, dict.fromkeys(culprits, 0.01))
    assert {s.site.id for s in found.sites if s.rolled_back} == set(culprits) and len(found.replaced) == SITES - len(
        culprits
    )
    assert found.parity is not None and found.parity.passed and found.exit_code == 0
    assert found.bisection is not None and {g for (g,) in found.bisection.groups} == set(culprits)
    assert found.bisection.runs <= len(culprits) * (math.ceil(math.log2(SITES)) + 2)
    for s in found.sites:
        if s.rolled_back:
            assert "the outputs change" in s.rolled_back and f"{found.bisection.runs} model runs" in s.rolled_back
    assert any("found by bisection over 12 replacements" in w for w in found.warnings)
    written = json.loads((out / "report.json").read_text())["bisection"]
    assert written == {"groups": [[c] for c in written_order(found)], "candidates": 12, "runs": found.bisection.runs}
    assert "found by bisection" in (out / "report.html").read_text()
    made = onnx.load(out / "model.onnx")
    assert sum(n.op_type == "Softmax" for n in made.graph.node) == len(culprits)


def written_order(found: report.Report) -> list[str]:
    assert found.bisection is not None
    return [g for (g,) in found.bisection.groups]


def test_a_pair_that_fails_only_together(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone changes the output by 0.8e-5, within the budget of 1e-5; both by sqrt(2) times that."""
    x = np.random.default_rng(1).standard_normal((1, 2, N, D)).astype(np.float32)
    (y,) = ort.InferenceSession(model).run(None, {"x": x})
    share = [float(np.linalg.norm(y[..., i * D : (i + 1) * D]) / np.linalg.norm(y)) for i in range(SITES)]
    errors = {f"site{i}": 0.8e-5 / share[i] for i in (2, 9)}
    alone = compiled(model, tmp_path / "alone", monkeypatch, {"site2": errors["site2"]})
    assert len(alone.replaced) == SITES and alone.bisection is None
    found = compiled(model, tmp_path / "out", monkeypatch, errors)
    assert found.bisection is not None and found.bisection.groups == (("site2", "site9"),)
    assert found.bisection.runs <= 2 * (math.ceil(math.log2(SITES)) + 1) + 1
    rolled = {s.site.id: s.rolled_back for s in found.sites if s.rolled_back}
    assert set(rolled) == {"site2", "site9"} and "together with site9" in rolled["site2"]
    assert found.parity is not None and found.parity.passed


def test_a_replacement_that_does_not_run_is_found_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Reshape to a shape that cannot be fails when the model runs, not when it loads."""

    def lower(self: NeighborhoodAttention, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        good = RIGHT(self, site, parameters, opset)
        if site.id != "site4":
            return good
        name = site.output.value
        good.nodes[-1].output[0] = f"{name}/right"
        shape = nh.from_array(np.array([1, 2, 7, D]), f"{name}/shape")
        return Lowering(
            (*good.nodes, helper.make_node("Reshape", [f"{name}/right", f"{name}/shape"], [name])), good.functions,
            (*good.initializers, shape),
        )  # fmt: skip

    monkeypatch.setattr(NeighborhoodAttention, "lower", lower)
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    found = pipeline.compile(model, Options(target="onnx", out=tmp_path / "out", keep_slower=True))
    assert [s.site.id for s in found.sites if s.rolled_back] == ["site4"] and len(found.replaced) == SITES - 1


def test_strict_makes_a_restored_culprit_a_failure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compiled(model, tmp_path / "out", monkeypatch, {"site5": 0.01}, strict=True)
    assert found.exit_code == 1 and found.bisection is not None
