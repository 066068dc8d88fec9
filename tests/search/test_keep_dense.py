"""A rule for calls that stay dense, from the command line to the written model: its search, both sides, its plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from attncompile import gate, pipeline, report, whole
from attncompile.cli import main
from attncompile.core import plan_toml
from attncompile.core.errors import Unsupported
from attncompile.pipeline import Options
from attncompile.search import executors, run
from attncompile.search.executors import Inline
from tests.search import constructed

TOKENS = 600
KEPT = 3
"""Of twelve inputs, at t = 0, 1/12, ..., those with t >= 0.7."""

Feed = Mapping[str, np.ndarray]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, and sites are not timed: what is fast here is another test's business."""
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


def feeds(count: int = 12, tokens: int = TOKENS, batch: bool = False) -> list[dict[str, np.ndarray]]:
    times = [np.array([i / count] if batch else i / count, np.float32) for i in range(count)]
    return [{**feed, "t": t} for feed, t in zip(constructed.feeds(count, tokens), times, strict=True)]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two layers of full attention, and a scalar t."""
    folder = tmp_path_factory.mktemp("full")
    return constructed.write(folder, constructed.build(TOKENS, 2, causal=False, timed=""), feeds())


def compiled(made: tuple[Path, Path], folder: Path, **more: Any) -> report.Report:
    given = {"policy": "sparse", "target": "onnx", "out": folder / "out", "inputs": made[1], "keep_slower": True,
             "max_error": 0.03, "keep_dense": "t >= 0.7"}  # fmt: skip
    return pipeline.compile(made[0], Options(**{**given, **more}))


def outputs(path: Path, given: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(None, feed)[0] for feed in given]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_both_sides_of_a_model(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen: list[Feed] = []
    right = run.Search.__init__

    def init(self: Any, *given: Any) -> None:
        seen.extend(given[3])
        right(self, *given)

    monkeypatch.setattr(run.Search, "__init__", init)
    arguments = [str(full[0]), "--policy", "sparse", "--target", "onnx", "--inputs", str(full[1]),
                 "--max-error", "0.03", "--keep-dense", "t>=.7", "--keep-slower", "--quiet",
                 "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "dense where t >= 0.7 (3 of 12 inputs, which the search set aside); elsewhere" in said
    assert "chosen for each head; dense where t >= 0.7" in said
    assert len(seen) == 12 - KEPT and max(float(feed["t"]) for feed in seen) < 0.7, "what is exact chose nothing"
    told = json.loads((tmp_path / "out/report.json").read_text())
    search = told["search"]
    assert (search["keep_dense"], search["set_aside"], told["options"]["keep_dense"]) == ("t >= 0.7", KEPT, "t >= 0.7")
    assert (search["calibration"], len(search["held"])) == (5, 4)
    assert 0 < search["density"] < 0.5
    assert search["density_of_inputs"] == pytest.approx((KEPT + (12 - KEPT) * search["density"]) / 12)
    rows = told["parity"]["comparisons"]
    by_side = [[r for r in rows if r["label"].endswith("kept dense") == side] for side in (False, True)]
    assert len(by_side[0]) == 12 - KEPT and len(by_side[1]) == KEPT + 1, "seeded inputs are compared on the dense side"
    assert told["parity"]["passed"] and told["parity"]["budget"] == 0.03
    assert {t["label"] for t in told["timings"]} == {"static", "static, kept dense"}

    # The file itself, without this package's eyes.
    model = onnx.load(tmp_path / "out/model.onnx")
    onnx.checker.check_model(model)
    before = onnx.load(full[0])
    assert (model.graph.input, model.graph.output) == (before.graph.input, before.graph.output)
    assert {p.key: p.value for p in model.metadata_props}["attncompile.keep_dense"] == "t >= 0.7"
    assert (tmp_path / "out/model.onnx").stat().st_size < full[0].stat().st_size + 25_000
    given = feeds()
    errors = [distance(a, b) for a, b in zip(*(outputs(p, given) for p in (full[0], tmp_path / "out/model.onnx")),
                                             strict=True)]  # fmt: skip
    kept = [float(feed["t"]) >= 0.7 for feed in given]
    assert sum(kept) == KEPT and max(e for e, k in zip(errors, kept, strict=True) if k) < 1e-6
    assert all(1e-4 < e < 0.03 for e, k in zip(errors, kept, strict=True) if not k)
    assert "t &gt;= 0.7" in (tmp_path / "out/report.html").read_text()

    # The plan alone makes the same model.
    again = compiled(full, tmp_path / "again", plan=tmp_path / "out/plan.toml", keep_dense=None)
    assert again.outcome == "replaced" and again.options["keep_dense"] == "t >= 0.7"
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()


def test_exact_replacements_are_on_the_dense_side(tmp_path: Path) -> None:
    """What policy ``exact`` would make of a site is what it is in calls that stay dense; [batch] inputs do as well."""
    made = constructed.write(
        tmp_path, constructed.build(1000, 1, timed="batch"), feeds(tokens=1000, batch=True)
    )  # fmt: skip
    found = compiled(made, tmp_path)
    assert found.outcome == "replaced" and found.approximate, found.warnings
    plan = plan_toml.loads((tmp_path / "out/plan.toml").read_text())
    (decision,) = plan.decisions
    assert decision.mechanism == "BlockSparseAttention" and decision.dense is not None
    assert decision.dense.mechanism == "DenseAttention"
    (node,) = [n for n in onnx.load(tmp_path / "out/model.onnx").graph.node if n.op_type == "If"]
    bodies = {a.name: [n.op_type for n in a.g.node] for a in node.attribute}
    assert "Attention" in bodies["then_branch"] and "BlockSparseAttention" in bodies["else_branch"]
    again = compiled(made, tmp_path / "again", plan=tmp_path / "out/plan.toml", keep_dense=None)
    assert again.outcome == "replaced"
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()
    # As a plan's exact replacement must be one.
    text = (tmp_path / "out/plan.toml").read_text()
    edited = tmp_path / "edited.toml"
    edited.write_text(text.replace('mechanism = "DenseAttention"', 'mechanism = "NoSuch"'))
    assert main([str(made[0]), "--plan", str(edited), "--inputs", str(made[1]), "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_a_budget_of_nothing_is_the_policy_exact(tmp_path: Path) -> None:
    made = constructed.write(tmp_path, constructed.build(1000, 1, timed=""), feeds(4, 1000))
    exact = compiled(made, tmp_path / "a", policy="exact", keep_dense=None)
    none = compiled(made, tmp_path / "b", max_error=0.0)
    assert exact.outcome == none.outcome == "replaced" and not none.approximate
    assert (tmp_path / "a/out/model.onnx").read_bytes() == (tmp_path / "b/out/model.onnx").read_bytes()


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_a_side_that_is_wrong_is_found(side: str, full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The approximation where exactness was promised; or on its own side something that the search never saw."""
    right = whole.joined

    def wrong(dense: onnx.ModelProto, sparse: onnx.ModelProto, rule: Any) -> onnx.ModelProto:
        made = right(dense, sparse, rule)
        for node in (n for n in made.graph.node if n.op_type == "If"):
            bodies = {a.name: a.g for a in node.attribute}
            if side == "dense":  # both branches are the sparse one
                bodies["then_branch"].CopyFrom(bodies["else_branch"])
            else:
                broken = bodies["else_branch"]
                broken.node.append(onnx.helper.make_node("Abs", [broken.output[0].name], ["broken"]))
                broken.output[0].name = "broken"
        return made

    monkeypatch.setattr(whole, "joined", wrong)
    found = compiled(full, tmp_path)
    assert found.outcome == "rolled_back" and found.bisection is not None
    assert all("the outputs change" in s.rolled_back or "together" in s.rolled_back for s in found.sites)
    said = "calls that stay dense: output y" if side == "dense" else "output y"
    assert said in found.sites[0].rolled_back
    assert (tmp_path / "out/model.onnx").read_bytes() == full[0].read_bytes()


def test_inputs_that_are_all_on_one_side(full, tmp_path: Path) -> None:
    found = compiled(full, tmp_path, keep_dense="t >= 1.5")
    assert found.outcome == "replaced" and any("holds of none of the inputs" in w for w in found.warnings)
    assert found.parity is not None and [c.label for c in found.parity.comparisons if "kept" in c.label]
    errors = [distance(*pair) for pair in zip(
        *(outputs(p, [{**feeds(1)[0], "t": np.array(2, np.float32)}]) for p in (full[0], tmp_path / "out/model.onnx")),
        strict=True)]  # fmt: skip
    assert max(errors) < 1e-6


@pytest.mark.parametrize(
    ("rule", "more", "said"),
    [
        ("t >> 1", [], "not a rule"),
        ("s > 1", [], "no input 's'"),
        ("x > 1", [], "3 axes"),
        ("t >= 0", [], "holds of 12 of 12 inputs"),
        ("t >= 0.05", [], "holds of 11 of 12 inputs"),
        ("t >= 0.7", ["--policy", "exact"], "approximates nothing"),
        ("t >= 0.7", ["--target", "tensorrt-rtx"], "puts an If around each site"),
    ],
)
def test_what_is_refused(rule: str, more: list[str], said: str, full, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    arguments = [str(full[0]), "--policy", "sparse", "--target", "onnx", "--inputs", str(full[1]), "--out", str(out)]
    assert main([*arguments, "--keep-dense", rule, *more]) == 2
    told = capsys.readouterr().err
    assert f"error: {told.partition('error: ')[2]}" in told and said in told and "\nhint: " in told
    assert "Traceback" not in told and not out.exists()


def test_a_policy_may_say_it(full, tmp_path: Path) -> None:
    text = (Path(pipeline.__file__).with_name("policies") / "sparse.toml").read_text()
    policy = tmp_path / "mine.toml"
    policy.write_text(text.replace("[approximate]\n", '[approximate]\nkeep_dense = "t < 0.25"\n'))
    found = compiled(full, tmp_path, policy=str(policy), keep_dense=None)
    assert found.search is not None and (found.search.keep_dense, found.search.set_aside) == ("t < 0.25", 3)
    errors = [distance(*pair) for pair in zip(
        *(outputs(p, feeds()) for p in (full[0], tmp_path / "out/model.onnx")), strict=True)]  # fmt: skip
    assert max(errors[:3]) < 1e-6 < min(errors[3:])


def test_what_cannot_be_joined_is_undone(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> onnx.ModelProto:
        raise Unsupported("two-sides", "'v' is made in two ways")

    monkeypatch.setattr(whole, "joined", refused)
    found = compiled(full, tmp_path)
    assert found.outcome == "rolled_back" and {s.rolled_back for s in found.sites} == {"'v' is made in two ways"}
    assert (tmp_path / "out/model.onnx").read_bytes() == full[0].read_bytes()


def test_a_rule_in_a_policy_is_looked_at_before_anything_is_run(full, tmp_path: Path, capsys) -> None:
    text = (Path(pipeline.__file__).with_name("policies") / "sparse.toml").read_text()
    for rule, said in (('"s < 1"', "no input 's'"), ('"t == 1"', "not a rule"), ("1", "'keep_dense' must be a text")):
        policy = tmp_path / "mine.toml"
        policy.write_text(text.replace("[approximate]\n", f"[approximate]\nkeep_dense = {rule}\n"))
        for verb in (["plan"], []):
            assert main([*verb, str(full[0]), "--policy", str(policy), "--out", str(tmp_path / "o")]) == 2
            assert said in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_the_rule_is_offered_and_said(full, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where an input is another number from call to call; and by ``plan`` where a policy has a rule."""
    text = (Path(pipeline.__file__).with_name("policies") / "sparse.toml").read_text()
    policy = tmp_path / "mine.toml"
    policy.write_text(text.replace("[approximate]\n", '[approximate]\nkeep_dense = "t < 0.25"\n'))
    hint, said = "--keep-dense 't >= NUMBER' keeps those dense", "nothing is approximated in calls with t < 0.25"
    for name, more, shown in (
        ("sparse", ["--target", "onnx"], {hint}), ("sparse", ["--target", "tensorrt-rtx"], set()),
        ("exact", [], set()), (str(policy), ["--target", "onnx"], {said}),
    ):  # fmt: skip
        arguments = [
            "plan",
            str(full[0]),
            "--policy",
            name,
            "--inputs",
            str(full[1]),
            "--out",
            str(tmp_path / "p.toml"),
        ]
        assert main([*arguments, *more]) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert {text for text in (hint, said) if text in told} == shown, (name, more)
