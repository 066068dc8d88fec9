"""The search where what matters lies elsewhere in each input: heads choose their blocks when the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile import gate, outputs, pipeline, report, whole
from attncompile.core import plan_toml
from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.errors import Unsupported
from attncompile.gpu_cost import gpu_cost
from attncompile.kernels import cost
from attncompile.pipeline import Options
from attncompile.plugins import kernels, mechanism
from attncompile.search import choose, executors, heads, run
from attncompile.search.candidates import selections
from attncompile.search.choose import SiteSpace, Unit
from attncompile.targets import base
from tests.plugins.conftest import Case
from tests.search import constructed
from tests.test_gpu_cost import OnGpu

TOKENS, HEADS, DIM = 1500, 2, 16


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


def moving(dynamic: bool) -> onnx.ModelProto:
    """x + attention(x) W: every query looks at the tokens whose first feature is 1."""
    rng = np.random.default_rng(2)
    width = HEADS * DIM
    spread = [rng.standard_normal((width, width)) * s / np.sqrt(width) for s in (0.2, 0.2, 1.0, 1.0)]
    spread[1][0] = 0
    spread[1][0, ::DIM] = 9.0
    bias = np.zeros(width)
    bias[::DIM] = 3.0
    constants = {f"w{i}": w for i, w in enumerate(spread)} | {"bias": bias, "root": np.array(DIM**-0.5)}
    stored = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in constants.items()]
    length: int | str = "n" if dynamic else TOKENS
    stored += [numpy_helper.from_array(np.array([0, 0, HEADS, DIM]), "cut"),
               numpy_helper.from_array(np.array([0, 0, width]), "back")]  # fmt: skip
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"p{i}"]) for i in range(3)]
    nodes.append(helper.make_node("Add", ["p0", "bias"], ["p0b"]))
    for i, source in enumerate(("p0b", "p1", "p2")):
        order = [0, 2, 3, 1] if i == 1 else [0, 2, 1, 3]
        nodes.append(helper.make_node("Reshape", [source, "cut"], [f"r{i}"]))
        nodes.append(helper.make_node("Transpose", [f"r{i}"], [f"t{i}"], perm=order))
    for kind, inputs, out, more in (
        ("MatMul", ["t0", "t1"], "s", {}), ("Mul", ["s", "root"], "z", {}), ("Softmax", ["z"], "a", {"axis": -1}),
        ("MatMul", ["a", "t2"], "o", {}), ("Transpose", ["o"], "ot", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["ot", "back"], "or", {}), ("MatMul", ["or", "w3"], "ow", {}), ("Add", ["x", "ow"], "y", {}),
    ):  # fmt: skip
        nodes.append(helper.make_node(kind, inputs, [out], **more))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, length, width]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "moving", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def feeds(lengths: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    found = []
    for tokens in lengths:
        x = rng.standard_normal((1, tokens, HEADS * DIM)).astype(np.float32)
        x[..., 0] = 0
        at = int(rng.integers(tokens - 20))
        x[0, at : at + 20, 0] = 1
        found.append({"x": x})
    return found


def compiled(made: tuple[Path, Path], folder: Path, **more: Any) -> report.Report:
    given = {"policy": "sparse", "target": "onnx", "out": folder / "out", "inputs": made[1], "keep_slower": True}
    return pipeline.compile(made[0], Options(**{**given, **more}))


def check(found: report.Report, folder: Path) -> list[str]:
    """The texts of the only site's heads."""
    assert found.outcome == "replaced" and found.approximate and found.search is not None, found.warnings
    shown = found.search.sites["site0"]
    assert {h.kind for h in shown} <= {"pooled", "xattention", "anchor", "dense"} and any(
        h.kind != "dense" for h in shown
    )
    for head in shown:
        assert head.seen.shape == head.mass.shape and head.seen.diagonal().all()
        if head.kind != "dense":
            assert head.density < 0.6 and head.kept > 0.9
    (decision,) = plan_toml.loads((folder / "out" / "plan.toml").read_text()).decisions
    assert decision.mechanism == "BlockSparseAttention" and not decision.exact
    assert "chosen for each input" in decision.reason
    nodes = [n.op_type for n in onnx.load(folder / "out" / "model.onnx").graph.node]
    assert [n for n in nodes if n.startswith("Block")] == ["BlockScores", "BlockSelect", "BlockSparseAttention"]
    jsonschema.validate(found.to_json(), report.schema())
    text = (folder / "out" / "report.html").read_text()
    assert any(head.pattern in text for head in shown)
    return list(decision.parameters["heads"])


def test_heads_follow_what_moves(tmp_path: Path) -> None:
    made = constructed.write(tmp_path, moving(False), feeds((TOKENS,) * 14))
    found = compiled(made, tmp_path, max_error=0.06)
    texts = check(found, tmp_path)
    assert found.parity is not None and found.parity.passed and 0 < found.parity.value <= 0.06
    # The plan alone makes the same model.
    again = compiled(made, tmp_path / "again", plan=tmp_path / "out" / "plan.toml", max_error=0.06)
    assert again.outcome == "replaced" and len(texts) == HEADS
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()


def test_by_an_anchor_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves draws every query as the first tokens do: it is near the anchor. A search that broke off after its
    scores takes them up.
    """
    monkeypatch.setattr(run, "selections", lambda: [[t for t in way if "anchor" in t] for way in selections()][-1:])
    given = feeds((TOKENS, 1410, 1450, 1490) * 3)
    for feed in given:
        feed["x"][0, :2, 0] = 1
    made = constructed.write(tmp_path, moving(True), given)

    def broken(search: Any, spaces: Any) -> Any:
        raise KeyboardInterrupt

    def scores() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.search").glob("score-*")}

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(run.Search, "_by_budget", broken)
        compiled(made, tmp_path, max_error=0.08)
    before, after = scores(), dict[str, int]()
    choose_by = run.Search._by_budget

    def watched(search: Any, spaces: Any) -> Any:
        after.update(scores())
        return choose_by(search, spaces)

    monkeypatch.setattr(run.Search, "_by_budget", watched)
    texts = check(compiled(made, tmp_path, max_error=0.08), tmp_path)
    assert all(t.startswith("anchor ") for t in texts)
    assert before == after and len(before) >= 4


def test_a_dynamic_length(tmp_path: Path) -> None:
    made = constructed.write(tmp_path, moving(True), feeds((TOKENS, TOKENS, 1450, 1500, 1410, 1490) * 2))
    found = compiled(made, tmp_path, max_error=0.03)
    check(found, tmp_path)


def test_a_gpu_of_unknown_cost_keeps_what_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that runs kernels, none of which that choose was measured: heads do not choose, and it is said why."""
    target = OnGpu()
    monkeypatch.setattr(base, "get", lambda name: target)
    monkeypatch.setattr(outputs, "target", lambda *asked: target)
    fixed_only = {k: v for k, v in cost.table().items() if not k.endswith(("-scores", "-select", "-highest", "-near"))}
    monkeypatch.setattr(cost, "table", lambda: fixed_only)
    made = constructed.write(tmp_path, moving(False), feeds((TOKENS,) * 4))
    found = compiled(made, tmp_path, max_error=0.3, target="on-gpu", precision="fp16")
    said = "no head chooses its blocks when the model runs: no cost was measured for triton kernels on sm_90"
    assert any(said in w for w in found.warnings), found.warnings
    assert found.search is not None
    kinds = {h.kind for heads in found.search.sites.values() for h in heads}
    assert not kinds & {"pooled", "xattention", "anchor"}
    # With constants, whatever they are, choosing takes longer than its lists alone.
    site = Case(batch=1, queries=4096, static=True, head_dim=64, value_dim=64).site()
    subject, gpu = mechanism("BlockSparseAttention"), gpu_cost(lambda b: pytest.fail(""), kernels(), "fp16", target)
    geometry = BlockGeometry(4096, 128, False)
    with pytest.raises(Unsupported, match="no cost was measured"):
        heads.choice_time(site, geometry, subject, {}, gpu, ("xattention", 16))
    known = cost.constants("gluon-90")
    monkeypatch.setattr(cost, "constants", lambda name: known)
    fixed = heads.block_time(site, geometry, subject, {}, gpu)
    for family in (("pooled", 0), ("xattention", 16), ("anchor", 0)):
        assert heads.choice_time(site, geometry, subject, {}, gpu, family).fixed > fixed.fixed


def test_an_anchor_has_a_cost_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that were never timed are not judged by the times of those that choose by weight."""
    target, known = OnGpu(), cost.constants("gluon-90")
    monkeypatch.setattr(base, "get", lambda name: target)
    monkeypatch.setattr(outputs, "target", lambda *asked: target)
    measured = {k: v for k, v in cost.table().items() if not k.endswith(("-highest", "-near"))}
    measured |= {"triton-90-scores": known, "triton-90-select": known}
    monkeypatch.setattr(cost, "table", lambda: measured)
    made = constructed.write(tmp_path, moving(False), feeds((TOKENS,) * 4))
    found = compiled(made, tmp_path, max_error=0.3, target="on-gpu", precision="fp16")
    (said,) = (w for w in found.warnings if "when the model runs" in w)
    assert said.startswith("no head chooses its blocks by anchor when the model runs: no cost was measured")
    assert "triton-90-highest" in said


def test_units_of_a_site_take_one_mode() -> None:
    """The best of each mode is found, never a mixture of two."""
    mode = np.array([0, 0, 1, 1])
    units = tuple(
        Unit(("dense", "a", "dense", "b"), np.array([10.0, 10 - 5 * n, 11.0, 3.0]), np.array([0, 1.0, 0, d]), mode)
        for n, d in ((1, 0.5), (1, 0.1))
    )  # fmt: skip
    space = SiteSpace("s", 20.0, 0.0, units, more=(5.0,))
    assert space.best(0.0) == (1, 1) and space.time((1, 1)) == 10 and space.time((3, 3)) == 11
    assert space.best(2.0) == (3, 3), "less damage is worth its fixed time"
    assert space.best(1e6) is None and space.near(0.1)[0] in (0, 1)
    for price in np.geomspace(0.01, 100, 20):
        picks = space.best(float(price))
        assert picks is None or len({int(mode[k]) for k in picks}) == 1
    assert choose.damage_of([space], {"s": (3, 3)}) == pytest.approx(0.6)
