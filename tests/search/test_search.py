"""The search on whole models: heads with known patterns, budgets, held-out inputs, interruption, workers."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from attncompile import gate, pipeline, report, whole
from attncompile.core import plan_toml
from attncompile.core.block_selection import rest_of
from attncompile.core.errors import AttncompileError, BadArguments, MissingDependency
from attncompile.pipeline import Options
from attncompile.search import arrays, executors, run, split, state, tasks
from attncompile.search.executors import Inline
from attncompile.verification.next_token import next_token
from tests.search import constructed, language
from tests.search.sample import Sample

TOKENS = 600
CHECK, MAKE = gate.SiteGate.check, executors.make


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, and sites are not timed: what is fast here is another test's business."""
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One layer of full attention, six inputs."""
    folder = tmp_path_factory.mktemp("full")
    return constructed.write(folder, constructed.build(TOKENS, 1, causal=False), constructed.feeds(6, TOKENS))


def compiled(made: tuple[Path, Path], folder: Path, **more: Any) -> report.Report:
    given = {"policy": "sparse", "target": "onnx", "out": folder / "out", "inputs": made[1], "keep_slower": True}
    return pipeline.compile(made[0], Options(**{**given, **more}))


def test_heads_with_known_patterns(tmp_path: Path) -> None:
    full = constructed.write(tmp_path, constructed.build(TOKENS, causal=False), constructed.feeds(12, TOKENS))
    found = compiled(full, tmp_path, max_error=0.03)
    assert found.outcome == "replaced" and found.approximate, found.warnings
    assert found.parity is not None and found.parity.passed and 0 < found.parity.value <= 0.03
    assert found.search is not None and set(found.search.sites) == {"site0", "site1"}
    assert [s for s in found.seconds if s in ("approximate", "verify the model")] == ["approximate", "verify the model"]
    assert found.seconds["approximate"] > 0
    column = (TOKENS // 2 + 40) // 64
    for heads in found.search.sites.values():
        near, first, stripe, even = heads
        place = np.arange(len(near.seen))
        assert (np.abs(place[:, None] - place[None, :])[near.seen] <= 1).all(), near.pattern
        assert first.pattern == "sinks 1 window 0" and stripe.pattern == f"columns {column}"
        assert even.pattern == "mean" and max(h.density for h in heads) < 0.35
        assert max(h.damage for h in heads) < 0.02
    plan = plan_toml.loads((tmp_path / "out" / "plan.toml").read_text())
    assert [d.mechanism for d in plan.decisions] == ["BlockSparseAttention"] * 2
    assert not any(d.exact for d in plan.decisions)
    nodes = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert nodes.count("BlockSparseAttention") == 2 and "Softmax" not in nodes
    jsonschema.validate(found.to_json(), report.schema())
    assert "sinks 1 window 0" in (tmp_path / "out" / "report.html").read_text()
    # The plan alone makes the same model.
    again = compiled(full, tmp_path / "again", plan=tmp_path / "out" / "plan.toml", max_error=0.03)
    assert again.outcome == "replaced"
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()


def test_causal_heads(tmp_path: Path) -> None:
    """A causal head that looks at everything needs all of it, if only by means; above the diagonal is nobody's."""
    made = constructed.write(tmp_path, constructed.build(1000, layers=1), constructed.feeds(6, 1000))
    found = compiled(made, tmp_path, max_error=0.02)
    assert found.outcome == "replaced" and found.search is not None, found.warnings
    near, first, stripe, even = found.search.sites["site0"]
    assert near.density < 0.3 and first.pattern == "sinks 1 window 0" and stripe.density < 0.6
    assert even.density > 0.6 or rest_of(even.pattern) == 16, "everything, or means of what is far"
    assert all(np.array_equal(h.seen, np.tril(h.seen)) for h in found.search.sites["site0"])
    assert found.sites[0].decision.mechanism == "BlockSparseAttention"


def test_a_budget_of_nothing_is_the_policy_exact(tmp_path: Path) -> None:
    made = constructed.write(tmp_path, constructed.build(1000, layers=1), constructed.feeds(4, 1000))
    exact = compiled(made, tmp_path / "a", policy="exact")
    none = compiled(made, tmp_path / "b", max_error=0.0)
    assert exact.outcome == none.outcome == "replaced" and not none.approximate
    for made_of in (exact, none):
        assert [s.decision.mechanism for s in made_of.sites] == ["DenseAttention"]
    assert (tmp_path / "a/out/model.onnx").read_bytes() == (tmp_path / "b/out/model.onnx").read_bytes()
    assert none.search is None


def test_a_site_that_is_undone_is_not_shown(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = gate.SiteResult(rolled_back="not faster", slower=True)
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: slow)
    found = compiled(full, tmp_path, max_error=0.03)
    assert found.outcome == "rolled_back" and found.search is not None and not found.search.sites
    assert found.search.points and (tmp_path / "out/model.onnx").read_bytes() == full[0].read_bytes()
    assert not any(p.chosen for p in found.search.points), "no point is of the model that is there"
    assert found.search.density is None and not found.search.held


def test_what_does_not_fit_leaves_the_exact_replacement(tmp_path: Path) -> None:
    made = constructed.write(tmp_path, constructed.build(1000, layers=1), constructed.feeds(4, 1000))
    found = compiled(made, tmp_path, max_error=1e-9)
    assert found.outcome == "replaced" and not found.approximate
    assert found.sites[0].decision.mechanism == "DenseAttention"
    assert any("no approximation keeps relative_l2 within 1e-09" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("metric", "budget", "low"), [("cosine", 0.9995, False), ("psnr", 40.0, False), ("kl", 1e-3, True)]
)
def test_other_metrics(metric, budget, low, full, tmp_path: Path) -> None:
    found = compiled(full, tmp_path, metric=metric, max_error=budget)
    assert found.outcome == "replaced" and found.parity is not None and found.parity.passed, found.warnings
    assert found.parity.metric == metric and (found.parity.value <= budget) == low
    assert found.search is not None and all(e <= tasks.badness(metric, budget) for e in found.search.held)


def test_a_density_in_place_of_a_budget(full, tmp_path: Path) -> None:
    found = compiled(full, tmp_path, density=0.4)
    assert found.outcome == "replaced" and found.search is not None
    assert found.search.budget is None and 0.15 < found.search.density <= 0.4
    assert found.parity is not None and found.parity.passed and found.parity.value > 0
    text = report.dumps(found.to_json())
    assert '"budget": null' in text
    less = compiled(full, tmp_path / "less", density=0.1)
    assert less.search is not None and less.search.density <= 0.1 and less.parity.value > found.parity.value


def test_held_out_inputs_are_touched_last_and_refuse(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of other inputs are never run before there is a choice; what they refuse is made smaller."""
    asked: list[tuple[int, ...]] = []
    scale: list[float] = []
    right = run.Search.errors

    def errors(self: Any, choice: Any, spaces: Any, inputs: Sequence[int], metric: str) -> list[float]:
        asked.append(tuple(inputs))
        found = right(self, choice, spaces, inputs, metric)
        if set(inputs) != {1, 3, 5}:
            return found
        scale.append(1.5 * 0.03 / max(found))  # the first choice exceeds the budget by a half
        return [scale[0] * e for e in found]

    monkeypatch.setattr(run.Search, "errors", errors)
    found = compiled(full, tmp_path, max_error=0.03)
    assert found.outcome == "replaced" and found.search is not None
    first = asked.index((1, 3, 5))
    assert all(set(inputs) <= {0, 2, 4} for inputs in asked[:first])
    assert found.search.refused == asked.count((1, 3, 5)) - 1 > 0 and max(found.search.held) <= 0.03
    assert any("breaks it on held-out ones" in w for w in found.warnings)
    monkeypatch.setattr(run.Search, "errors", lambda *a: [np.inf] * len(a[3]) if 1 in a[3] else right(*a))
    nothing = compiled(full, tmp_path / "none", max_error=0.03)
    assert nothing.outcome == "unchanged" and nothing.search is not None and not nothing.search.sites
    assert (tmp_path / "none/out/model.onnx").read_bytes() == full[0].read_bytes()


def counting(called: list[str]) -> Callable[[float], Callable[..., Any]]:
    """``Inline.map`` that is interrupted after so many tasks, whose names go into ``called``."""

    def counted(limit: float) -> Callable[..., Any]:
        def call(self: Any, tasks_: Sequence[Any], done: Callable[[], None] = lambda: None) -> list[Any]:
            results = []
            for task in tasks_:
                if len(called) >= limit:
                    raise KeyboardInterrupt
                called.append(type(task).__name__)
                results.append(task(1))
                done()
            return results

        return call

    return counted


def test_an_interrupted_search_goes_on(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    counted = counting(called)
    plain = compiled(full, tmp_path / "plain", max_error=0.03)
    monkeypatch.setattr(Inline, "map", counted(np.inf))
    compiled(full, tmp_path / "counted", max_error=0.03)
    whole_run = list(called)
    called.clear()
    monkeypatch.setattr(Inline, "map", counted(len(whole_run) - 3))
    with pytest.raises(KeyboardInterrupt):
        compiled(full, tmp_path, max_error=0.03)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.search" / "key.txt").is_file()
    called.clear()
    monkeypatch.setattr(Inline, "map", counted(np.inf))
    found = compiled(full, tmp_path, max_error=0.03)
    assert "Masses" not in called and "Scores" not in called and called.count("Error") < whole_run.count("Error") / 2
    assert not (tmp_path / ".out.search").exists()
    assert found.search is not None and plain.search is not None
    assert found.search.to_json() == plain.search.to_json()
    # Another budget is another search.
    monkeypatch.setattr(Inline, "map", counted(3))
    called.clear()
    with pytest.raises(KeyboardInterrupt):
        compiled(full, tmp_path, max_error=0.03)
    called.clear()
    monkeypatch.setattr(Inline, "map", counted(np.inf))
    compiled(full, tmp_path, max_error=0.04)
    assert called.count("Masses") == whole_run.count("Masses")


@pytest.mark.parametrize("change", ["order", "fewer", "meaning"])
def test_other_candidates_are_scored_anew(full, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that offers others, as many in another order or fewer, takes up the maps alone of what was found before;
    code in which they mean something else takes up nothing.
    """
    called: list[str] = []
    counted, right, source = counting(called), run.candidates, state.source_of
    monkeypatch.setattr(Inline, "map", counted(np.inf))
    compiled(full, tmp_path / "before", max_error=0.03)
    before = list(called)
    called.clear()
    monkeypatch.setattr(Inline, "map", counted(len(before) - 1))
    with pytest.raises(KeyboardInterrupt):
        compiled(full, tmp_path, max_error=0.03)
    assert called.count("Scores") and called.count("Error")

    def changed(*given: Any) -> list[Any]:
        dense, *others = right(*given)
        return [dense, *reversed(others)] if change == "order" else [dense, *others[1:]]

    if change == "meaning":
        monkeypatch.setattr(state, "source_of", lambda name: source(name) + "# another")
    else:
        monkeypatch.setattr(run, "candidates", changed)
    monkeypatch.setattr(Inline, "map", counted(np.inf))
    called.clear()
    wanted = compiled(full, tmp_path / "wanted", max_error=0.03)
    whole_run = list(called)
    called.clear()
    found = compiled(full, tmp_path, max_error=0.03)
    assert called.count("Scores") == whole_run.count("Scores") > 0
    assert called.count("Masses") == (whole_run.count("Masses") if change == "meaning" else 0)
    assert found.search is not None and wanted.search is not None
    assert found.search.to_json() == wanted.search.to_json()
    assert [s.decision.parameters for s in found.sites] == [s.decision.parameters for s in wanted.sites]


def test_numbers_of_other_candidates_are_other_models(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that an interrupted search measured is not that of the same numbers in another list."""
    called: list[str] = []
    counted, offered, errors = counting(called), run.candidates, run.Search.errors
    tried: list[tuple[Any, Any, Any, list[float]]] = []

    def first(self: run.Search, choice: Any, spaces: Any, inputs: Any, metric: str) -> list[float]:
        if called.count("Error") == 0 and len(tried) == 1:
            choice, inputs, metric, _ = tried[0]
        found = errors(self, choice, spaces, inputs, metric)
        tried.append((choice, inputs, metric, found))
        if len(tried) > 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(run.Search, "errors", first)
    monkeypatch.setattr(Inline, "map", counted(np.inf))
    with pytest.raises(KeyboardInterrupt):
        compiled(full, tmp_path, max_error=0.03)
    assert called.count("Error") and len(tried) == 2
    monkeypatch.setattr(run, "candidates", lambda *given: [offered(*given)[0], *reversed(offered(*given)[1:])])
    found = []
    for out in (tmp_path, tmp_path / "fresh"):  # taken up, and without anything to take up
        del tried[1:]
        called.clear()
        with pytest.raises(KeyboardInterrupt):
            compiled(full, out, max_error=0.03)
        found.append(tried[1][3])
    assert tried[0][0], "a choice of nothing is the same in any list"
    assert found[0] == found[1] != tried[0][3]


def test_any_number_of_workers_finds_the_same(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline = compiled(full, tmp_path / "inline", max_error=0.03)
    monkeypatch.setattr(executors, "make", MAKE)
    found = compiled(full, tmp_path / "two", max_error=0.03, jobs=2)
    assert found.search is not None and inline.search is not None
    assert {n: [h.pattern for h in heads] for n, heads in found.search.sites.items()} == {
        n: [h.pattern for h in heads] for n, heads in inline.search.sites.items()
    }


def test_dynamic_lengths_get_windows(tmp_path: Path) -> None:
    made = constructed.write(
        tmp_path, constructed.build(TOKENS, layers=1, kinds=("dense", "dense"), dynamic=True, causal=False),
        constructed.feeds(12, TOKENS, 32),
    )  # fmt: skip
    found = compiled(made, tmp_path, max_error=0.15)
    assert found.outcome == "replaced" and found.approximate, found.warnings
    decision = found.sites[0].decision
    assert decision.mechanism == "NeighborhoodAttention" and decision.parameters["kernel_size"][0] < TOKENS
    assert found.parity is not None and 0.03 < found.parity.value <= 0.15
    tight = compiled(made, tmp_path / "tight", max_error=0.03)
    assert tight.outcome == "unchanged" and any("keeps relative_l2 within 0.03" in w for w in tight.warnings)


def test_padding(tmp_path: Path) -> None:
    """Keys that padding hides carry no weight."""
    from tests.passes.attention_graphs import Spec, build, save

    path = save(build(Spec(batch=1, heads=2, kv_heads=1, length=500, head_dim=16, padding=True, mask_form="where",
                           guard=True)), tmp_path)  # fmt: skip
    rng = np.random.default_rng(0)
    given = []
    for i in range(12):
        shown = np.ones((1, 1, 1, 500), bool)
        shown[..., 300 + 7 * i :] = False
        given.append({"x": rng.standard_normal((1, 500, 32)).astype(np.float32), "pad": shown})
    from polygraphy.json import save_json

    save_json(given, str(tmp_path / "in.json"))
    found = compiled((path, tmp_path / "in.json"), tmp_path, max_error=0.9)
    assert found.outcome == "replaced" and found.search is not None, found.warnings
    (heads,) = found.search.sites.values()
    assert all(h.mass[:, 6:].max() < 1e-6 and "mean" not in h.pattern for h in heads)


def test_every_other_input_is_held_out() -> None:
    assert split(5) == ([0, 2, 4], [1, 3]) and split(2) == ([0], [1]) and split(1) == ([0], [0])


def test_a_worker_that_dies_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    workers = MAKE("local", 2, 3)
    try:
        assert workers.map([Sample(3), Sample(4)]) == [(3, 1), (4, 1)], "threads are shared"
        with pytest.raises(AttncompileError, match="it is negative") as refused:
            workers.map([Sample(1), Sample(-1)])
        assert refused.value.hint == "give another"
        with pytest.raises(AttncompileError, match="a worker of the search ended with 9"):
            workers.map([Sample(0)])
    finally:
        workers.close()


def test_ray_is_asked_for_and_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match="not installed"):
        MAKE("ray", 1, 1)


def test_ray_does_the_tasks(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a double of the five calls that are made of Ray: tasks and results are pickled, results come in any
    order.
    """
    import pickle

    class Double(types.ModuleType):
        started = closed = 0

        def is_initialized(self) -> bool:
            return False

        def init(self, **given: Any) -> None:
            self.started += 1

        def shutdown(self) -> None:
            self.closed += 1

        def remote(self, function: Any) -> Any:
            def call(*given: Any) -> bytes:
                return pickle.dumps(function(*pickle.loads(pickle.dumps(given))))

            return types.SimpleNamespace(remote=call)

        def wait(self, references: list[bytes], num_returns: int) -> tuple[list[bytes], list[bytes]]:
            return references[-num_returns:], references[:-num_returns]

        def get(self, references: list[bytes]) -> list[Any]:
            return [pickle.loads(r) for r in references]

    double = Double("ray")
    monkeypatch.setitem(sys.modules, "ray", double)
    inline = compiled(full, tmp_path / "inline", max_error=0.03)
    monkeypatch.setattr(executors, "make", MAKE)
    found = compiled(full, tmp_path / "ray", max_error=0.03, executor="ray")
    assert (double.started, double.closed) == (1, 1)
    assert found.search is not None and inline.search is not None
    assert found.search.to_json() == inline.search.to_json()


def test_a_provider_that_is_not_there(full, tmp_path: Path) -> None:
    """Nothing runs on the CPU instead."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(MissingDependency, match="no CUDA provider"):
        compiled(full, tmp_path, provider="cuda")
    assert not (tmp_path / "out").exists()


def test_a_budget_of_perplexity(tmp_path: Path) -> None:
    """What counts is all inputs together: the bound is on their mean, and so is the check of the whole model."""
    model = language.build(1000)
    made = constructed.write(tmp_path, model, language.feeds(model, 8, 1000))
    found = compiled(made, tmp_path, metric="perplexity", max_error=0.01)
    assert found.outcome == "replaced" and found.approximate and found.search is not None, found.warnings
    assert found.search.density is not None and found.search.density < 0.8
    chosen = next(p for p in found.search.points if p.chosen)
    assert chosen.mean < chosen.bound <= np.log1p(0.01) and np.mean(found.search.held) <= np.log1p(0.01)
    assert found.parity is not None and found.parity.passed and found.parity.metric == "perplexity"
    assert 0 < found.parity.value <= 0.01
    rises = [c.metrics.perplexity for c in found.parity.comparisons if c.metrics]
    assert len(rises) == 8 and found.parity.value == pytest.approx(np.expm1(np.mean(np.log1p(rises))))
    jsonschema.validate(found.to_json(), report.schema())
    assert "of all together" in (tmp_path / "out" / "report.html").read_text()


def test_logits_are_kept_of_probed_inputs_alone(tmp_path: Path) -> None:
    model = language.build(300)
    path, _ = constructed.write(tmp_path, model, [])
    (feed,) = language.feeds(model, 1, 300)
    given, out = tmp_path / "in.npz", tmp_path / "out.npz"
    arrays.save(given, feed)
    told = next_token(model)
    tasks.Baseline(path, given, out, language=told, whole=False)(1)
    assert list(arrays.load(out)) == [tasks.LOSS]
    assert tasks.Error(path, "same", given, out, "perplexity", language=told)(1) == pytest.approx(0, abs=1e-6)
    tasks.Baseline(path, given, out, language=told)(1)
    assert list(arrays.load(out)) == ["logits", tasks.LOSS] and list(arrays.load(out, [tasks.LOSS])) == [tasks.LOSS]
    assert tasks.Error(path, "same", given, out, "kl", language=told)(1) == pytest.approx(0, abs=1e-9)


def test_a_choice_that_lost_is_not_measured_to_the_end(full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of workers the same inputs are looked at, and the budget is lost after the first two."""
    counts: list[int] = []
    errors = run.Search.errors

    def counted(self, choice, spaces, inputs, metric):
        found = errors(self, choice, spaces, inputs, metric)
        counts.append(len(found))
        return found

    monkeypatch.setattr(run.Search, "errors", counted)
    one = compiled(full, tmp_path / "a", max_error=0.005)
    assert counts[0] == 3 and 0 < counts.count(1) < counts.count(2), "two inputs; the third if it matters"
    counts.clear()
    three = compiled(full, tmp_path / "b", max_error=0.005, jobs=3)
    assert 3 in counts
    assert one.search is not None and three.search is not None
    assert one.search.points == three.search.points


def test_a_worker_keeps_two_sessions_on_a_cpu_and_one_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is kept is freed before the next is opened: all workers share the GPU's memory."""
    opened: list[str] = []
    alive: set[str] = set()

    class Session:
        def __init__(self, path: Path, threads: int, provider: str, lean: bool) -> None:
            assert lean and threads == 1
            self.name = f"{provider} {path}"
            opened.append(f"{self.name} beside {len(alive)}")
            alive.add(self.name)

        def __del__(self) -> None:
            alive.discard(self.name)

    monkeypatch.setattr(tasks, "_open", {})
    monkeypatch.setattr(tasks.measure, "open_session", Session)
    for path in "abaca":
        tasks._session(Path(path), "x", 1, "cpu")
    assert opened == ["cpu a beside 0", "cpu b beside 1", "cpu c beside 1"]  # of a and b the one that was used before
    tasks._open.clear()
    opened.clear()
    for path in "abba":
        tasks._session(Path(path), "x", 1, "cuda")
    assert opened == ["cuda a beside 0", "cuda b beside 0", "cuda a beside 0"]
    assert tasks._session(Path("a"), "y", 1, "cuda") is not tasks._session(Path("a"), "x", 1, "cuda")


def test_answers_are_counted_where_each_input_of_a_batch_has_one() -> None:
    def counted(output: tuple[int, ...] | None, *inputs: tuple[int, ...]) -> int:
        search = object.__new__(run.Search)
        search.feeds = [{f"x{i}": np.zeros(shape) for i, shape in enumerate(inputs)}] * 2
        search._worlds = [types.SimpleNamespace(shapes={"y": output} if output else {})] * 2  # type: ignore[list-item]
        graph = types.SimpleNamespace(output=[types.SimpleNamespace(name="y")])
        proto = types.SimpleNamespace(proto=types.SimpleNamespace(graph=graph))
        search._found = types.SimpleNamespace(model=proto)  # type: ignore[assignment]
        return search._answers()

    assert counted((4, 10), (4, 3, 8, 8)) == 4 and counted((1, 10), (1, 3, 8, 8), (1, 5)) == 1
    assert counted((4, 7, 10), (4, 7)) == 0, "a language model's tokens are not independent"
    assert counted((4, 10), (4, 3), (2, 3)) == counted((4, 10), (4, 3), ()) == counted((3, 10), (4, 3)) == 0
    assert counted(None, (4, 3)) == 0


def test_of_many_sequences_some_are_read_and_all_are_run(
    full: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    scores = tasks.Scores.__call__
    monkeypatch.setattr(run, "SEQUENCES", 2)
    monkeypatch.setattr(tasks.Scores, "__call__", lambda self, n: (read.append(self.number), scores(self, n))[1])
    found = compiled(full, tmp_path, max_error=0.03)
    assert set(read) == {0, 4} and found.search is not None and found.search.calibration == 3
    assert found.outcome == "replaced" and len(found.search.held) == 3
    heads = found.search.sites["site0"]
    assert all(h.density == pytest.approx(h.seen.mean()) for h in heads), "means over what was read"


def test_what_is_read_is_spread_and_counted_in_sequences() -> None:
    assert run.spread([0, 2, 4, 6, 8], 3) == [0, 4, 8] and run.spread([0, 2], 5) == [0, 2]
    assert run.spread([0, 2, 4], 1) == [0]
    one = np.zeros((3, 7))
    assert run.batch_of({"x": one, "y": one, "step": np.array(1.0)}) == 3
    assert run.batch_of({"input_ids": np.zeros((1, 4096)), "cache_position": np.zeros(4096)}) == 1
    assert run.batch_of({"hidden_states": np.zeros((1024, 11)), "lengths": np.zeros(1024)}) == 1
    assert run.batch_of({"x": np.array(1.0)}) == 1


@pytest.mark.parametrize(("known", "answers", "wanted"), [(100, 1, 459), (229, 2, 459), (230, 2, 0), (100, 0, 0)])
def test_a_classifier_with_too_few_answers_is_not_searched(known: int, answers: int, wanted: int) -> None:
    settings = run.Settings("top1_agreement", 0.99, None, 0.99, 1)
    search = types.SimpleNamespace(_settings=settings, _known=range(known), _answers=lambda: answers)
    said = run.Search._too_few(search)  # type: ignore[arg-type]
    assert (f"takes {wanted} answers" in said and f"there are {known * answers}," in said) if wanted else said == ""


def test_a_head_that_does_not_matter_is_skipped(tmp_path: Path) -> None:
    """Under a causal mask too, where no query may have the mean of all values; and its output is zero."""
    made = constructed.build(TOKENS, 1)
    (out,) = [t for t in made.graph.initializer if t.name == "o0"]
    matrix = onnx.numpy_helper.to_array(out).copy()
    matrix[48:] *= 1e-3  # the last head's rows
    out.CopyFrom(onnx.numpy_helper.from_array(matrix, "o0"))
    found = compiled(constructed.write(tmp_path, made, constructed.feeds(4, TOKENS)), tmp_path, max_error=0.02)
    assert found.outcome == "replaced" and found.search is not None, found.warnings
    heads = found.search.sites["site0"]
    assert [h.pattern == "skip" for h in heads] == [False, False, False, True]
    assert heads[3].density == heads[3].kept == 0 and not heads[3].seen.any() and heads[3].damage < 1e-5
    assert found.parity is not None and 0 < found.parity.value <= 0.02


def test_a_plan_is_judged_by_its_own_budget(full, tmp_path: Path) -> None:
    """Not by that of the policy that the command line happens to have."""
    found = compiled(full, tmp_path, metric="psnr", max_error=20.0)
    assert found.approximate and found.parity is not None, found.warnings
    plan = tmp_path / "out" / "plan.toml"
    bare = {"policy": "exact", "plan": plan}
    again = compiled(full, tmp_path / "again", **bare)
    assert again.parity is not None and (again.parity.metric, again.parity.budget) == ("psnr", 20.0)
    assert list(again.options.items()) == list(found.options.items()) == [("max_error", 20.0), ("metric", "psnr")]
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()

    tight = compiled(full, tmp_path / "tight", **bare, max_error=1000.0)
    assert tight.outcome == "rolled_back" and tight.options["max_error"] == 1000.0
    other = compiled(full, tmp_path / "other", **bare, metric="relative_l2", max_error=1e-9)
    assert other.outcome == "rolled_back" and other.options == {"metric": "relative_l2", "max_error": 1e-9}

    text = plan.read_text()
    free = tmp_path / "free.toml"
    free.write_text(text.replace("max_error = 20.0", "density = 0.5"))
    loose = compiled(full, tmp_path / "loose", policy="exact", plan=free)
    assert loose.outcome == "replaced" and loose.options == {"metric": "psnr", "density": 0.5}
    assert loose.parity is not None and loose.parity.budget == -math.inf, "the psnr may be any"
    wrong = {
        "": "psnr has no default budget", "max_error = 'much'": "not a number", "max_error = nan": "not an error",
        "max_error = true": "not a number", "density = 'some'": "not a number", "max_eror = 3": "have no 'max_eror'",
    }  # fmt: skip
    for line, said in wrong.items():
        free.write_text(text.replace("max_error = 20.0", line))
        with pytest.raises(BadArguments, match=said):
            compiled(full, tmp_path / "wrong", policy="exact", plan=free)
    free.write_text(text.replace('metric = "psnr"', 'metric = "speed"'))
    with pytest.raises(BadArguments, match="the plan's metric is 'speed'"):
        compiled(full, tmp_path / "wrong", policy="exact", plan=free)
    with pytest.raises(BadArguments, match="--density is for a search"):
        compiled(full, tmp_path / "wrong", plan=plan, density=0.5)


def test_inputs_that_are_not_finite_fail_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing replaced exactly too, where nothing else would tell."""
    feeds = constructed.feeds(4, TOKENS)
    feeds[2] = {name: value.copy() for name, value in feeds[2].items()}
    (name,) = feeds[2]
    feeds[2][name].flat[7] = np.nan
    made = constructed.write(tmp_path, constructed.build(TOKENS, 1, causal=False), feeds)
    monkeypatch.setattr(run.Search, "run", lambda *_: pytest.fail("hours of it"))
    found = compiled(made, tmp_path, max_error=0.03)
    assert found.exit_code == 1 and found.outcome == "unchanged"
    (failure,) = found.failures
    assert f"'{name}'" in failure and "set 2: 1 of" in failure and "NaN" in failure
    assert (tmp_path / "out/model.onnx").read_bytes() == made[0].read_bytes()
