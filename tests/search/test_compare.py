"""tools/search_compare.py: the search against single mechanisms, on heads with known patterns."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from attncompile.search import executors
from attncompile.search.choose import Unit
from tests.plugins.conftest import Case
from tests.search import constructed

_spec = importlib.util.spec_from_file_location(
    "search_compare", Path(__file__).parents[2] / "tools" / "search_compare.py"
)
assert _spec is not None and _spec.loader is not None
compare: Any = importlib.util.module_from_spec(_spec)
sys.modules["search_compare"] = compare
_spec.loader.exec_module(compare)


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))


def compared(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    made = constructed.build(600, 2, causal=False, kinds=("local", "sink", "stripe", "local"))
    model, inputs = constructed.write(folder, made, constructed.feeds(6, 600))
    given = [str(model), "--inputs", str(inputs), "--max-error", "0.03", "--json", str(folder / "found.json"), *more]
    monkeypatch.setattr(sys, "argv", ["search_compare.py", *given])
    compare.main()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_each_head_its_own_beats_what_is_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads that want different things: no single mechanism serves them."""
    found = compared(tmp_path, monkeypatch, "--write", str(tmp_path / "models"))
    rows = {r["name"]: r for r in found["rows"]}
    exact, best, equal = (rows.pop(n) for n in (compare.EXACT, compare.EACH, compare.EQUAL))
    assert exact["predicted"] == 1.0 and exact["density"] == 1.0 and exact["errors"] == [0.0] * 3
    assert rows and all(r["bound"] <= 0.03 and best["predicted"] < r["predicted"] < 1 for r in rows.values())
    fastest = min(rows.values(), key=lambda r: r["predicted"])
    assert equal["mean"] <= fastest["mean"] and equal["predicted"] < fastest["predicted"]
    assert (
        len(best["held"]) == 3
        and all(max(r["held"]) <= 0.03 for r in found["rows"])
        and best["held_mean"] == np.mean(best["held"])
    )
    assert found["calibration"] == found["held_out"] == 3 and found["confidence"] == 0.99
    out = capsys.readouterr().out
    assert "times as fast as the best single mechanism" in out and "| each head its own |" in out
    models = sorted(p.parent.name for p in (tmp_path / "models").rglob("model.onnx"))
    assert models[:2] == ["0-exact-replacements-only", "1-each-head-its-own"] and len(models) == len(found["rows"])


def test_late_nothing_more_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is tried first is what is strongest, and what was written says which patterns the heads have."""
    found = compared(tmp_path, monkeypatch, "--limit", "0", "--write", str(tmp_path / "models"))
    assert [r["name"] for r in found["rows"]] == [compare.EXACT, compare.EACH]
    assert "not tried for lack of time: blocks, slash, sinks 1 + window, pooled" in capsys.readouterr().out
    texts = json.loads((tmp_path / "models" / "1-each-head-its-own" / "patterns.json").read_text())
    assert [len(heads) for heads in texts.values()] == [4, 4] and found["warnings"] == []
    assert all(compare.BlockPattern(t).text == t for heads in texts.values() for t in heads)
    nodes = onnx.load(tmp_path / "models" / "1-each-head-its-own" / "model.onnx").graph.node
    assert sum(n.op_type == "BlockSparseAttention" for n in nodes) == len(texts)


def test_what_is_said_of_the_best_single_mechanism() -> None:
    """Of a classifier it may change no answer that it is chosen on: then there is no row at equal error, and all
    inputs say who is nearer.
    """

    def row(name: str, predicted: float, errors: list[float], held: list[float]) -> Any:
        return compare.Row(name, "x", predicted, 1 / predicted, 0.5, 0.0, errors, held, {})

    own = row(compare.EACH, 0.5, [0.25, 0.0], [0.25, 0.0])
    rows = [row(compare.EXACT, 1.0, [0.0] * 2, [0.0] * 2), own, row("slash", 0.8, [0.0] * 2, [0.5, 0.0])]
    fastest = "chosen for each head 1.60 times as fast as the best single mechanism"
    assert compare.verdict(rows) == f"{fastest} and no further from the original over all inputs (slash x)"
    own.held[1] = 0.25
    assert compare.verdict(rows) == f"{fastest} (slash x)"
    equal = row(compare.EQUAL, 0.64, [0.0] * 2, [0.0] * 2)
    assert compare.verdict([*rows, equal]) == f"{fastest}, 1.25 times at no larger an error (slash x)"
    assert compare.verdict(rows[:2]) == "no single mechanism keeps it"
    assert compare.verdict(rows[::2]) == "the search found nothing that keeps it"


def test_only_what_is_named_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(tmp_path, monkeypatch, "--only", "slash")
    assert [r["name"] for r in found["rows"]] == [compare.EXACT, compare.EACH, "slash", compare.EQUAL]
    assert found["only"] == ["slash"] and found["not_tried"] == found["did_not_keep_it"] == []
    with pytest.raises(SystemExit):
        compared(tmp_path, monkeypatch, "--only", "slashes")
    assert "--only slashes: not offered here; there are blocks, slash," in capsys.readouterr().err


def test_at_one_density_errors_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(tmp_path, monkeypatch, "--density", "0.4", "--also", "onnxruntime-cuda")
    rows = {r["name"]: r for r in found["rows"]}
    assert found["budget"] is None and found["max_error"] is None and "sm_90" in found["also"]
    exact, best = rows.pop(compare.EXACT), rows.pop(compare.EACH)
    assert {"blocks", "slash", "sinks 1 + window", f"blocks{compare.MEANS}"} <= set(rows) and exact[
        "gpu_over_exact"
    ] == 1.0
    for row in rows.values():
        assert row["density"] <= 0.4 and best["mean"] < row["mean"] and best["held_mean"] < row["held_mean"]
        priced = row["name"] not in ("pooled", "xattention", "anchor") and compare.MEANS not in row["name"]
        assert row["gpu"] > 0 if priced else row["gpu"] is None


def test_a_policys_fields_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``confidence`` and the sites at the ends that stay dense."""
    policy = tmp_path / "mine.toml"
    policy.write_text(
        '[exact]\nmechanisms = ["DenseAttention"]\n[approximate]\nmechanisms = ["BlockSparseAttention"]\n'
        "confidence = 0.8\nkeep_first = 1\n"
    )
    found = compared(tmp_path, monkeypatch, "--policy", str(policy), "--write", str(tmp_path / "models"))
    assert found["confidence"] == 0.8 and found["rows"][1]["name"] == compare.EACH
    nodes = onnx.load(tmp_path / "models" / "1-each-head-its-own" / "model.onnx").graph.node
    assert [n.op_type for n in nodes if n.domain == "attncompile" or n.op_type == "Softmax"] == [
        "Softmax", "BlockSparseAttention"
    ]  # fmt: skip


def test_moving_heads_to_their_orders_is_priced() -> None:
    """What is added to the launch of a site some of whose heads have another order."""
    gpu = SimpleNamespace(before=lambda *a: 8.0, lists=lambda *a: 1.0, moving=lambda *a: 0.6)
    sites = [Case(queries=128, static=True).site(id=name) for name in ("a", "b")]
    plan = SimpleNamespace(
        offered=[["dense", "sinks 0 window 0", "order 1,0 sinks 0 window 0"]] * 2, modes=[[0, 0, 1]] * 2
    )
    search = object.__new__(compare.Search)
    search._heads = {"a": plan, "b": plan}
    row = compare.Row("x", "", 1.0, 1.0, 1.0, 0.0, [0.0], [0.0], {"a": (1, 1), "b": (1, 2)})
    assert search.turned(row.choice) == {"b"}
    known = SimpleNamespace(turned=search.turned, patterns=search.patterns)
    known.blocks = lambda choice: {"a": (64, 4), "b": (64, 4)}
    compare.priced(row, known, sites, [], gpu, {})
    assert row.gpu == pytest.approx(16 / 2.6)
    chosen = compare.Row("x", "", 1.0, 1.0, 1.0, 0.0, [0.0], [0.0], {"a": (1, 1), "b": (1, 2)})
    known.blocks = lambda choice: {"a": (64, 4)}  # b chooses when the model runs
    compare.priced(chosen, known, sites, [], gpu, {})
    assert chosen.gpu is None and chosen.gpu_over_exact is None
    known.blocks = lambda choice: {"a": (64, 4), "b": (64, 4)}
    plan.offered[1][1] = "mean"
    compare.priced(chosen, known, sites, [], gpu, {})
    assert chosen.gpu is None


def test_the_sparsest_candidate_of_a_kind_that_keeps_enough() -> None:
    labels = ("dense", "sinks 0 window 1", "columns 0 diagonals 1", "columns 0,1 diagonals 1,2")
    unit = Unit(labels, np.array([1.0, 0.1, 0.2, 0.4]), np.zeros(4))
    kept = np.array([1.0, 0.99, 0.9, 0.97])
    assert [compare.pick(unit, kept, "slash", s) for s in (0.5, 0.9, 0.95, 0.98)] == [2, 2, 3, 0]
    assert (
        compare.pick(unit, kept, "", "sinks 0 window 1") == 1 and compare.pick(unit, kept, "", "sinks 1 window 1") == 0
    )


def test_bisection_takes_the_sparsest_strength_that_keeps_the_budget() -> None:
    def judge(strength: float) -> Any:
        return compare.Row("x", str(strength), 1 - strength, 1.0, 0.5, 0.1 / strength, [0.0], [], {"a": (1,)})

    strengths = [0.1, 0.2, 0.3, 0.4, 0.5]
    for budget, want in ((1.0, "0.1"), (0.34, "0.3"), (0.2, "0.5")):
        found = compare.first_fitting(strengths, judge, budget, lambda row: True)
        assert [r.strength for r in found] == [want]
    assert compare.first_fitting(strengths, judge, 0.1, lambda row: True) == []
    # What held-out inputs refuse is made denser.
    (row,) = compare.first_fitting(strengths, judge, 0.34, lambda row: row.strength > "0.35")
    assert row.strength == "0.4" and compare.first_fitting(strengths, judge, 0.34, lambda row: False) == []


def test_inputs_of_calls_that_stay_dense_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of eight: the numbers of the comparison are of the other five."""
    made = constructed.build(600, 1, causal=False, timed="")
    given = [{**f, "t": np.array(i / 8, np.float32)} for i, f in enumerate(constructed.feeds(8, 600))]
    model, inputs = constructed.write(tmp_path, made, given)
    told = tmp_path / "found.json"
    arguments = [str(model), "--inputs", str(inputs), "--max-error", "0.03", "--json", str(told), "--limit", "0"]
    monkeypatch.setattr(sys, "argv", ["search_compare.py", *arguments, "--keep-dense", "t > 0.5"])
    compare.main()
    found = json.loads(told.read_text())
    assert (found["keep_dense"], found["set_aside"], found["calibration"], found["held_out"]) == ("t > 0.5", 3, 3, 2)
    assert [len(r["held"]) for r in found["rows"]] == [2, 2] and min(found["rows"][1]["errors"]) > 0
