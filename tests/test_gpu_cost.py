"""Plans for a GPU that is not at hand: decided by the cost model of launches, however slow the CPU is with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from attncompile import gate, outputs, pipeline
from attncompile.core.errors import Unsupported
from attncompile.core.kernel import OpCall
from attncompile.core.mechanism import Shape
from attncompile.core.verdict import Verdict
from attncompile.gpu_cost import PRODUCTS, GpuCost, gpu_cost
from attncompile.kernels import cost
from attncompile.pipeline import Options
from attncompile.plugins import kernels
from attncompile.targets import base
from attncompile.targets.onnx import Onnx
from tests.passes.attention_graphs import Spec, build, save

pytestmark = pytest.mark.usefixtures("brief")
HEADS = 8
CAUSAL = Spec(batch=1, heads=HEADS, kv_heads=HEADS, length=1100, head_dim=64, mask="causal", scale=0.125)

WINDOWED = replace(CAUSAL, mask="window", left=63, right=0)


class OnGpu(Onnx):
    """Takes what the portable file is, and is judged as something that runs our kernels."""

    name = "on-gpu"
    runs_kernels = True

    def lower(self, proto, model, precision=None):  # type: ignore[no-untyped-def]
        return proto

    def build(self, lowered, model, profile, folder, sites=()):  # type: ignore[no-untyped-def]
        path = folder / "gpu.onnx"
        onnx.save(lowered, path)
        return base.BuildResult(self.name, (path,), 0.0)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    target = OnGpu()
    monkeypatch.setattr(base, "get", lambda name: target)
    monkeypatch.setattr(outputs, "target", lambda *asked: target)
    return target


def ops(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path).graph.node if n.domain == "attncompile"]


def options(tmp_path: Path, **more: object) -> Options:
    return Options(target="on-gpu", precision="fp16", out=tmp_path / "out", **more)  # type: ignore[arg-type]


def test_what_is_slow_here_is_replaced_there(
    tmp_path: Path, on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The CPU's verdict keeps model.onnx as it was; the GPU's model has the op; nothing is called rolled back."""
    monkeypatch.setattr("attncompile.measure.Timing.faster", property(lambda self: False))
    path = save(build(WINDOWED), tmp_path, "windowed.onnx")
    result = pipeline.compile(path, options(tmp_path, strict=True))
    (site,) = result.sites
    assert result.exit_code == 0 and result.outcome == "replaced" and not site.replaced
    assert site.exactness is not None and site.exactness.passed and "not faster" in site.rolled_back
    assert (tmp_path / "out" / "model.onnx").read_bytes() == path.read_bytes()
    assert ops(tmp_path / "out" / "gpu.onnx") == ["NeighborhoodAttention"]
    said = "\n".join(result.warnings)
    assert "relative_l2" in said and "through their bodies" in said
    assert "site0 is replaced for on-gpu only" in said and "not measured" in said and "rolled back" not in said


def test_what_is_wrong_is_replaced_nowhere(
    tmp_path: Path, on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from attncompile.plugins.neighborhood.mechanism import NeighborhoodAttention

    lower = NeighborhoodAttention.lower
    wrong = {"kernel_size": [63], "left": [62]}
    monkeypatch.setattr(
        NeighborhoodAttention, "lower",
        lambda self, site, parameters, opset: lower(self, site, {**parameters, **wrong}, opset),
    )  # fmt: skip
    path = save(build(WINDOWED), tmp_path, "windowed.onnx")
    policy = tmp_path / "policy.toml"
    policy.write_text('[exact]\nmechanisms = ["NeighborhoodAttention"]\nmin_gain = 1.0\n')
    result = pipeline.compile(path, options(tmp_path, policy=str(policy)))
    assert result.outcome == "rolled_back" and "not exact" in result.sites[0].rolled_back
    assert ops(tmp_path / "out" / "gpu.onnx") == []


def test_slower_ones_are_kept_where_that_is_asked_for(tmp_path: Path, on_gpu: OnGpu) -> None:
    """Also kernels without a measured cost: what is wanted then is that they are right."""
    on_gpu.least_gain = 1e9
    path = save(build(WINDOWED), tmp_path, "windowed.onnx")
    found = pipeline.inspect(path, Options())
    (kept,) = pipeline.plan(found, options(tmp_path)).decisions
    (made,) = pipeline.plan(found, options(tmp_path, keep_slower=True)).decisions
    assert kept.kept and made.mechanism == "NeighborhoodAttention"


def test_a_target_wants_more_than_the_policy(tmp_path: Path, on_gpu: OnGpu) -> None:
    path = save(build(WINDOWED), tmp_path, "windowed.onnx")
    found = pipeline.inspect(path, Options())
    (decision,) = pipeline.plan(found, options(tmp_path)).decisions
    assert decision.mechanism == "NeighborhoodAttention"
    on_gpu.least_gain = decision.predicted_gain * 1.01
    (kept,) = pipeline.plan(found, options(tmp_path)).decisions
    assert kept.kept
    assert any(f"below {on_gpu.least_gain:g}" in r.reason for r in kept.refusals if r.mechanism == decision.mechanism)


def test_the_plan_says_what_it_was_made_for(tmp_path: Path, on_gpu: OnGpu) -> None:
    path = save(build(CAUSAL), tmp_path, "causal.onnx")
    made = pipeline.plan(pipeline.inspect(path, Options()), options(tmp_path))
    assert any("sm_90" in n and "H200" in n for n in made.notes)


def model(fuses_dense: bool) -> GpuCost:
    target = OnGpu()
    target.fuses_dense = fuses_dense
    return gpu_cost(lambda binding: pytest.fail("not needed"), kernels(), "fp16", target)


def test_dense_attention_as_the_target_runs_it(tmp_path: Path) -> None:
    """Unfused it moves all scores, masks once more; fused it is our dense kernel, which no mask makes slower."""
    sites = {
        name: pipeline.inspect(save(build(spec), tmp_path, f"{name}.onnx"), Options()).detection.sites[0]
        for name, spec in {"none": replace(CAUSAL, mask="none"), "causal": CAUSAL}.items()
    }
    shape = Shape(1, 4096, 4096)
    scores, bandwidth = HEADS * 4096.0**2, cost.table()["gluon-90"].bandwidth
    unfused = {name: model(False).before(site, shape) for name, site in sites.items()}
    assert unfused["none"] == pytest.approx(scores * 8 / bandwidth * 1e-6 + scores * 256 / PRODUCTS)
    assert unfused["causal"] - unfused["none"] == pytest.approx(scores * 4 / bandwidth * 1e-6)
    fused = {name: model(True).before(site, shape) for name, site in sites.items()}
    assert fused["none"] == fused["causal"] < unfused["none"]


def test_a_call_without_a_measured_cost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {name: constants for name, constants in cost.table().items() if "softcap" not in name}
    monkeypatch.setattr(cost, "table", lambda: measured)
    call = OpCall("Attention", "float16", 4, 4, 64, 64, attributes={"left": -1, "right": -1, "softcap": 30.0},
                  batch=1, query_length=512, key_length=512)  # fmt: skip
    with pytest.raises(Unsupported, match="no cost was measured for triton kernels on sm_90"):
        model(True)._launch(call)


@pytest.mark.parametrize(
    ("blocks", "peak", "beside", "expected"),
    [
        (264, 1.0, 1, 2.0),
        (265, 1.0, 1, 3.0),
        (148, 1.0, 2, 1.5),
        (40, 1.8, 1, 1.8),  # the longest block
        (264, 1.5, 1, 1.5 + 1.0),  # the longest, and of the second half the longest: the average
        (198, 1.5, 2, (1.5 + 1.5 - 1 / 3 + 1.5 - 2 / 3) / 2),
        (198, 2.0, 1, 2.0 + 2 / 3),
        (198, 2.001, 1, 2.001 + 2 / 3),  # what few long blocks do goes on from there
        (264, 5.0, 1, 5.0),
    ],
)
def test_what_the_busiest_multiprocessor_does(blocks: int, peak: float, beside: int, expected: float) -> None:
    assert cost.busiest(blocks / 132, peak, beside) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("dims", "expected"), [((64, 64), False), ((128, 128), False), ((72, 72), True), ((64, 96), True)]
)
def test_head_dims_that_are_multiplied_in_two_parts(dims: tuple[int, int], expected: bool) -> None:
    call = OpCall("Attention", "float16", 4, 4, *dims, attributes={"left": -1, "right": -1},
                  batch=1, query_length=512, key_length=512)  # fmt: skip
    kernel = kernels()["Attention"]
    assert kernel.work(call, kernel.programs(kernel.general(call), 90)[0]).parted is expected


def test_predicted_times_are_those_of_the_benchmark(tmp_path: Path) -> None:
    """Dense, head dim 128, 24 heads of 4,608 tokens: 0.436 ms were measured (docs/bench/kernels-h200.json)."""
    call = OpCall("Attention", "float16", 24, 24, 128, 128, attributes={"left": -1, "right": -1},
                  batch=1, query_length=4608, key_length=4608)  # fmt: skip
    assert model(True)._launch(call) == pytest.approx(0.436, rel=0.25)


def test_verdicts_become_refusals() -> None:
    from attncompile.core.policy import Policy
    from attncompile.policy import decide
    from tests.test_policy import SITE, Fake

    made = decide(
        Policy("p", exact=("A",), min_gain=1.15), SITE, [Fake("A")], 18,  # type: ignore[list-item]
        lambda c: Verdict.no("no-kernel", "there is none"),
    )  # fmt: skip
    assert made.kept and made.reason == "there is none" and made.refusals[0].code == "no-kernel"


@pytest.mark.parametrize("measured", [True, False])
def test_heads_are_chosen_by_the_gpus_time(
    measured: bool, tmp_path: Path, on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of blocks for each head, by the cost of their kernels; where none was measured the site says so."""
    from attncompile.search import executors
    from attncompile.search.executors import Inline
    from tests.search import constructed

    known = {k: v for k, v in cost.table().items() if not k.endswith("-lists")}
    if measured:
        quick = replace(known["gluon-90"], launch=1000.0, block=100.0)
        known |= dict.fromkeys(("gluon-90-lists", "triton-90-lists"), quick)
    monkeypatch.setattr(cost, "table", lambda: known)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: Inline(1))
    slow = gate.SiteResult(rolled_back="not faster", slower=True)
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: slow)
    model = constructed.build(1100, 1, 64, causal=False)
    path, inputs = constructed.write(tmp_path, model, constructed.feeds(8, 1100, 256))
    result = pipeline.compile(path, options(tmp_path, policy="sparse", inputs=inputs, max_error=0.05))
    (site,) = result.sites
    if not measured:
        assert "no cost was measured" in site.decision.reason and "on sm_90" in site.decision.reason
        return
    assert result.search is not None and site.decision.mechanism == "BlockSparseAttention", result.warnings
    assert "mean" not in {h.pattern for h in result.search.sites["site0"]}, "no kernel of a known cost averages"
    assert ops(tmp_path / "out" / "gpu.onnx") == ["BlockSparseAttention"] and site.decision.predicted_gain > 1.15
    assert (tmp_path / "out" / "model.onnx").read_bytes() == path.read_bytes()
    assert result.parity is not None


def test_linear_attention_is_planned_by_its_launches(tmp_path: Path, on_gpu: OnGpu) -> None:
    """Of many tokens it gains over what its standard ops move, as a policy asks; without a cost it says so."""
    from tests.passes.linear_graphs import Spec as Linear
    from tests.passes.linear_graphs import build as linear

    spec = Linear(batch=1, heads=16, kv_heads=16, length=8192, dim=32, value_dim=32, normaliser="sum", epsilon=1e-6)
    found = pipeline.inspect(save(linear(spec), tmp_path, "linear.onnx"), Options())
    (decision,) = pipeline.plan(found, options(tmp_path, policy="linear")).decisions
    assert decision.mechanism == "LinearAttention" and decision.predicted_gain > 1.0, decision
