"""``--keep-dense`` for onnxruntime-cuda: launches in the branches of an If, on the CPU with a double of the driver."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from attncompile import gate, kernel_bundle, kernel_kit, outputs, pipeline, report, whole
from attncompile.cli import main
from attncompile.core.errors import TargetError
from attncompile.kernels import build
from attncompile.kernels.bundle import Bundle
from attncompile.pipeline import Options
from attncompile.runtime import InferenceSession, layout
from attncompile.runtime import session as sessions
from attncompile.search import executors
from attncompile.targets import onnx as onnx_target
from attncompile.targets import ort_fusions
from attncompile.targets.ort_fusions.view import View
from tests.runtime.conftest import Double, needs_compiler, uncompiled
from tests.runtime.two_sides import BELOW, EDGE, RULE, Planned, planned
from tests.search import constructed

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_times(monkeypatch)


def _without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites are not timed and nothing is compiled: neither is what is tested here."""
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())
    monkeypatch.setattr(build, "compile_all", lambda jobs, *_: [uncompiled(job) for job in jobs])
    monkeypatch.setattr(kernel_kit.compiler, "require_triton", lambda: "none")


@dataclass
class Made:
    planned: Planned
    report: report.Report
    out: Path

    @property
    def lowered(self) -> onnx.ModelProto:
        return onnx.load(self.out / layout.MODEL)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.report.targets[1].notes


def compiled(given: Planned, out: Path, precision: str = "fp16", **more: Any) -> Made:
    options = replace(given.options(out, precision, (80, 90)), **more)
    return Made(given, pipeline.compile(given.model, options), out)


@pytest.fixture(scope="module", params=["scalar", "batch"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("two_sides")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _without_times(monkeypatch)
        yield compiled(planned(folder, request.param == "batch"), folder / "out")


def branches(proto: onnx.ModelProto) -> list[dict[str, list[onnx.NodeProto]]]:
    """Nodes of each If's branches."""
    return [
        {a.name: list(a.g.node) for a in node.attribute} for node in proto.graph.node if node.op_type == "If"
    ]  # fmt: skip


def launched(nodes: list[onnx.NodeProto]) -> list[str]:
    return [n.op_type.partition("_")[0] for n in nodes if n.domain == layout.DOMAIN]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_launches_in_both_branches_are_in_the_bundle(made: Made) -> None:
    assert made.report.exit_code == 0 and made.report.outcome == "replaced", made.report.failures
    first, second = branches(made.lowered)
    assert launched(first["then_branch"]) == ["Attention"] and launched(first["else_branch"]) == [
        "BlockSparseAttention"
    ]
    assert not launched(second["then_branch"]) and "Softmax" in {n.op_type for n in second["then_branch"]}
    assert launched(second["else_branch"]) == ["BlockSparseAttention"]
    assert launched(list(made.lowered.graph.node)) == ["Attention"]
    bundle = Bundle.open(made.out / layout.BUNDLE)
    calls = {c["key"]: c for c in bundle.index["calls"]}
    nodes = sessions.calls_of(made.out / layout.MODEL)
    assert len(nodes) == 4 and {key for _, key in nodes} == calls.keys()
    for call in calls.values():
        architectures = {bundle.entries[kernel["entry"]].architecture for kernel in call["kernels"]}
        assert architectures == {80, 90} and not call["refused"]


def test_what_the_report_says(made: Made) -> None:
    assert any("launched as kernels: 4 nodes, compiled for sm_80, sm_90" in n for n in made.notes)
    (said,) = [n for n in made.notes if "CUDA graph" in n]
    assert said.startswith("2 nodes with branches or loops (If), which hold 3 of these")
    assert any(n.startswith("fp16 against the model before it was converted in ONNX Runtime") for n in made.notes)
    assert made.report.options["keep_dense"] == RULE
    assert made.report.parity is not None and made.report.parity.passed
    labels = [c.label for c in made.report.parity.comparisons]
    assert labels.count("inputs") == labels.count("inputs, kept dense") == 2
    seeded = {"usual", "max"} if made.planned.batched else {"static"}
    assert {label for label in labels if not label.startswith("inputs")} == {f"{s}, kept dense" for s in seeded}
    assert {t.label for t in made.report.timings} == {*seeded, *(f"{s}, kept dense" for s in seeded)}


def test_each_side_launches_its_own(made: Made, double: Double) -> None:
    """One ulp below the edge of the rule, which is the edge in fp16, is another side."""
    bundle = Bundle.open(made.out / layout.BUNDLE)
    double.expect(list(bundle.entries.values()))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(made.out / layout.LIBRARY))
    session = onnxruntime.InferenceSession(str(made.out / layout.MODEL), options, providers=["CPUExecutionProvider"])
    assert np.float16(EDGE) == np.float16(BELOW)
    for t, count in ((EDGE, 2), (BELOW, 3), (np.float32(1), 2), (np.float32(0), 3), (np.float32(np.nan), 3)):
        before = double.count("launched")
        session.run(None, made.planned.feed(t))
        assert double.count("launched") - before == count, t


def test_the_rule_is_asked_in_the_types_of_the_input(made: Made) -> None:
    nodes = list(made.lowered.graph.node)
    (compare,) = [n for n in nodes if n.op_type == "GreaterOrEqual"]
    (number,) = [t for t in made.lowered.graph.initializer if t.name == compare.input[1]]
    assert compare.input[0] == "t" and number.data_type == TensorProto.FLOAT
    assert numpy_helper.to_array(number) == EDGE


def test_bodies_where_there_is_no_gpu(made: Made) -> None:
    with pytest.warns(RuntimeWarning, match="model.onnx runs on the CPU, through function bodies"):
        ours = InferenceSession(made.out, allow_cpu=True)
    original = onnxruntime.InferenceSession(str(made.planned.model), providers=["CPUExecutionProvider"])
    for t, kept in ((EDGE, True), (BELOW, False)):
        feed = made.planned.feed(t)
        error = distance(original.run(None, feed)[0], ours.run(None, feed)[0])
        assert (error < 1e-6) if kept else (0.05 < error < 1)


def test_no_cuda_graph(made: Made, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    double.expect(list(Bundle.open(made.out / layout.BUNDLE).entries.values()))
    monkeypatch.setattr(sessions, "missing", lambda device: None)
    monkeypatch.setattr(sessions, "PROVIDER", "CPUExecutionProvider")
    for value in ("1", "true", "True"):
        with pytest.raises(
            TargetError, match=r"node 'attncompile/keep_dense/.*' of .* is control flow \(If\)"
        ) as caught:
            InferenceSession(made.out, provider_options={"enable_cuda_graph": value})
        assert "leave enable_cuda_graph out" in caught.value.hint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of options that the CPU does not know
        session = InferenceSession(made.out, provider_options={"enable_cuda_graph": "0"})
    session.run(None, made.planned.feed(BELOW))
    assert double.count("launched") == 3


def test_bf16(tmp_path: Path) -> None:
    found = compiled(planned(tmp_path), tmp_path / "out", "bf16")
    assert found.report.exit_code == 0, found.report.failures
    first, second = branches(found.lowered)
    assert launched(first["then_branch"]) == ["Attention"]
    assert launched(first["else_branch"]) == launched(second["else_branch"]) == ["BlockSparseAttention"]
    (compare,) = [n for n in found.lowered.graph.node if n.op_type == "GreaterOrEqual"]
    (number,) = [t for t in found.lowered.graph.initializer if t.name == compare.input[1]]
    assert compare.input[0] == "t" and number.data_type == TensorProto.FLOAT


@pytest.mark.parametrize("times", [(0.0, 0.4), (0.0, 0.8)])
@pytest.mark.parametrize("side", ["then_branch", "else_branch"])
def test_a_conversion_that_is_wrong_on_one_side_is_found(
    times: tuple[float, ...], side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the user's inputs be all on the other one."""
    right = onnx_target.Onnx.lower

    def wrong(self: Any, proto: Any, model: Any, precision: Any = None) -> onnx.ModelProto:
        result = right(self, proto, model, precision)
        body = next(a.g for n in result.graph.node if n.op_type == "If" for a in n.attribute if a.name == side)
        body.node.append(onnx.helper.make_node("Abs", [body.output[0].name], ["broken"], name="broken"))
        body.output[0].name = "broken"
        return result

    given = planned(tmp_path, times=times)
    monkeypatch.setattr(onnx_target.Onnx, "lower", wrong)
    found = compiled(given, tmp_path / "out", fusions=False)
    assert found.report.exit_code == 1
    (said,) = found.report.failures
    assert "the fp16 model is too far from the model before it was converted" in said
    assert (found.out / "model.onnx").is_file() and not (found.out / layout.MODEL).exists()


def test_a_fusion_that_is_wrong_in_a_branch_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes in branches are compared with their bodies too."""

    def swapped(view: View) -> int:
        """Keys for values."""
        for node in (n for n in view.all() if n.op_type == "If"):
            body = next(a.g for a in node.attribute if a.name == "else_branch")
            for ours in (n for n in body.node if n.op_type == "BlockSparseAttention"):
                ours.input[1], ours.input[2] = ours.input[2], ours.input[1]
        return 1

    monkeypatch.setattr(ort_fusions, "FUSIONS", (("operands", swapped),))
    found = compiled(planned(tmp_path), tmp_path / "out")
    assert found.report.exit_code == 0, found.report.failures
    assert any(n.startswith("nothing was fused: ") for n in found.notes)
    assert not any("operands" in n for n in found.notes)


def test_what_only_the_gpu_is_fast_at_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exact replacement that is slow on this CPU is on the dense side there, and not in model.onnx."""

    def slow(self: Any, edit: gate.Edit) -> gate.SiteResult:
        if edit.site.id == "site0" and edit.decision.exact:
            return gate.SiteResult(rolled_back="not faster", slower=True)
        return gate.SiteResult()

    monkeypatch.setattr(gate.SiteGate, "check", slow)
    found = compiled(planned(tmp_path), tmp_path / "out")
    assert found.report.exit_code == 0, found.report.failures
    (said,) = [w for w in found.report.warnings if w.startswith("site0")]
    assert "model.onnx has the site as it was, which DenseAttention is slower than here" in said
    portable = branches(onnx.load(found.out / "model.onnx"))[0]
    assert "Softmax" in {n.op_type for n in portable["then_branch"]}
    assert {n.op_type for n in portable["else_branch"]} == {"BlockSparseAttention"}
    assert launched(branches(found.lowered)[0]["then_branch"]) == ["Attention"]


def test_the_kernels_of_a_plan(tmp_path: Path, brief: None) -> None:
    """``attncompile kernels`` compiles those of both sides."""
    from attncompile.console import SilentProgress

    given = planned(tmp_path)
    options = Options(plan=given.plan, inputs=given.inputs)
    for source, more in ((given.model, options), (compiled(given, tmp_path / "out").out, Options())):
        request = kernel_bundle.Request(source, tmp_path / f"{source.stem}.bundle", (80,), options=more)
        _, built = kernel_bundle.make(request, SilentProgress())
        names = sorted(n.name for n, _ in built.nodes)
        wanted = ["Attention/site0", "Attention/site2", "BlockSparseAttention/site0", "BlockSparseAttention/site1"]
        assert sorted(set(names)) == wanted and all(key for _, key in built.nodes)
        assert len({key for _, key in built.nodes}) == 2


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_engines_are_refused(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = planned(tmp_path), tmp_path / "out"
    monkeypatch.setattr(outputs.base, "require", lambda found: None)
    assert main([str(given.model), "--plan", str(given.plan), "--target", target, "--out", str(out)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"error: target {target}: '{RULE}' puts an If around each site, and no engine with one was tried" in told
    assert "hint: build for --target onnx or onnxruntime-cuda" in told and not out.exists()


def test_a_search_by_the_prices_of_the_gpu(tmp_path: Path) -> None:
    """At 3,000 tokens lists of blocks are predicted to gain; the same command without ``--plan``."""
    tokens = 3000
    feeds = [{**f, "t": np.array(i / 12, np.float32)} for i, f in enumerate(constructed.feeds(12, tokens))]
    given = constructed.write(tmp_path, constructed.build(tokens, 1, causal=False, timed=""), feeds)
    options = Options(
        policy="sparse", target="onnxruntime-cuda", out=tmp_path / "out", inputs=given[1], max_error=0.1,
        keep_dense=RULE, precision="fp16", architectures=(90,),
    )  # fmt: skip
    found = pipeline.compile(given[0], options)
    assert found.exit_code == 0, found.failures
    (site,) = found.sites
    assert site.decision.mechanism == "BlockSparseAttention" and site.decision.predicted_gain > 1.15
    assert site.decision.dense is not None and site.decision.dense.mechanism == "DenseAttention"
    assert "dense where t >= 0.7" in site.decision.reason
    assert found.search is not None and (found.search.keep_dense, found.search.set_aside) == (RULE, 3)
    (nodes,) = branches(onnx.load(tmp_path / "out" / layout.MODEL))
    assert launched(nodes["then_branch"]) == ["Attention"] and launched(nodes["else_branch"])
    assert any("gains are predicted for kernels on sm_90" in w for w in found.warnings)
