"""Heads in other orders of the grid's axes: their maps and scores pair by pair, what is offered, what the search takes,
and plans that a person wrote.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile import gate, pipeline, report, whole
from attncompile.core import plan_toml
from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.plan import Decision, Plan
from attncompile.gpu_cost import MOVING, gpu_cost
from attncompile.kernels import cost
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import World
from attncompile.passes.grid import parse_grid
from attncompile.passes.index import GraphIndex
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from attncompile.pipeline import Options
from attncompile.plugins import kernels, mechanism
from attncompile.plugins.block_sparse import per_head
from attncompile.plugins.block_sparse.reference import reference
from attncompile.search import executors, heads, maps, orders, tasks
from tests.passes import attention_graphs
from tests.plugins.conftest import Case, relative_error
from tests.plugins.test_head_orders import ranks
from tests.search import constructed
from tests.test_gpu_cost import OnGpu

GRID = TokenGrid((5, 9, 14))  # 630 tokens
KINDS = ("local", "column", "place", "dense")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


SMALL = TokenGrid((3, 5, 7), prefix=1, suffix=3)
BLOCKS = BlockGeometry(SMALL.tokens, 16, False, SMALL)


@pytest.fixture
def operands() -> maps.Operands:
    rng = np.random.default_rng(0)
    return maps.Operands(
        *(rng.standard_normal((n, SMALL.tokens, d)).astype(np.float32) for n, d in ((4, 8), (2, 8), (2, 6))), 0.7,
        weights=rng.standard_normal((4, 6, 6)).astype(np.float32),
    )  # fmt: skip


def weights(operands: maps.Operands, head: int) -> np.ndarray:
    """[N, N] in float64, of tokens as they stand."""
    query, key = operands.query[head].astype(np.float64), operands.key[head // 2].astype(np.float64)
    raised = np.exp(query @ key.T * operands.scale)
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def test_maps_in_another_order(operands: maps.Operands) -> None:
    looked = [(), (0, 2, 1), (2, 0, 1), (1, 2, 0)]
    for head in range(4):
        found = maps.ordered_masses(operands, BLOCKS, head, [SMALL.ordered(order) for order in looked[1:]])
        share = weights(operands, head)
        for order, mass in zip(looked, found, strict=True):
            block = [place // BLOCKS.edge for place in ranks(SMALL, order)]
            want = np.zeros((BLOCKS.count, BLOCKS.count))
            for i in range(SMALL.tokens):
                for j in range(SMALL.tokens):
                    want[block[i], block[j]] += share[i, j] / block.count(block[i])
            np.testing.assert_allclose(mass, want, atol=2e-6)


def scores(operands: maps.Operands, texts: list[str], which: range) -> list[tuple[float, float, int]]:
    """Squared distance, share of the weight and blocks of each text, of its rows ``which``, pair by pair."""
    share, found = weights(operands, 2), []
    value = operands.value[1].astype(np.float64) @ operands.weights[2]  # type: ignore[index]
    for text in texts:
        pattern = BlockPattern(text)
        block = np.array([place // BLOCKS.edge for place in ranks(SMALL, pattern.order)])
        inner = BlockPattern(text.split(" ", 2)[2]) if pattern.order else pattern
        seen = inner.blocks(BLOCKS)
        kept = np.where(seen[block[:, None], block[None, :]], share, 0)
        away = (kept / kept.sum(axis=1, keepdims=True) - share) @ value
        rows = np.isin(block, which)
        found.append((np.square(away[rows]).sum(), kept[rows].sum(axis=1).mean(), seen[which].sum()))
    return found


TEXTS = ["dense", "sinks 1 window 0", "order 2,1,0 sinks 0 window 1", "order 0,2,1 columns 3", "dense"]


def test_scores_in_another_order(operands: maps.Operands) -> None:
    every = range(BLOCKS.count)
    found, blocks = tasks._scored(operands, BLOCKS, 2, TEXTS, every)
    error, kept, met = (np.array(column) for column in zip(*scores(operands, TEXTS, every), strict=True))
    np.testing.assert_allclose(found.error, error, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(found.kept, kept, rtol=1e-5)
    np.testing.assert_array_equal(blocks, met)
    value = operands.value[1].astype(np.float64) @ operands.weights[2]  # type: ignore[index]
    assert found.size == pytest.approx(np.square(weights(operands, 2) @ value).sum(), rel=1e-5)
    some = range(1, BLOCKS.count, 3)  # of long sequences: other rows in each order, so errors are relative to them
    part, blocks = tasks._scored(operands, BLOCKS, 2, TEXTS, some)
    error, kept, met = (np.array(column) for column in zip(*scores(operands, TEXTS, some), strict=True))
    np.testing.assert_allclose(part.kept, kept, rtol=1e-5)
    np.testing.assert_array_equal(blocks, met)
    output = np.square(weights(operands, 2) @ value).sum(axis=1)
    for k, text in enumerate(TEXTS):
        rows = np.isin([place // BLOCKS.edge for place in ranks(SMALL, BlockPattern(text).order)], some)
        assert part.error[k] / part.size == pytest.approx(error[k] / output[rows].sum(), rel=1e-4, abs=1e-9)


def test_means_beside_other_orders_change_no_score(operands: maps.Operands) -> None:
    """Means are offered for tokens as they stand: what heads in another order lose is told as without them."""
    plain, blocks = tasks._scored(operands, BLOCKS, 2, TEXTS, range(BLOCKS.count))
    more = [*TEXTS, "sinks 0 window 0 rest 8", "columns 1 rest 4"]
    found, met = tasks._scored(operands, BLOCKS, 2, more, range(BLOCKS.count))
    assert found.size == pytest.approx(plain.size) and plain.size > 0
    np.testing.assert_allclose(found.error[: len(TEXTS)], plain.error, rtol=1e-6)
    np.testing.assert_array_equal(met[: len(TEXTS)], blocks)


@pytest.mark.parametrize("wrong", ["keys", "queries"])
def test_a_planted_bug_in_scores_is_seen(wrong, operands: maps.Operands, monkeypatch: pytest.MonkeyPatch) -> None:
    right = maps.Operands.ordered

    def planted(self: maps.Operands, head: int, places: np.ndarray) -> maps.Operands:
        made = right(self, head, places)
        if wrong == "keys":
            return replace(made, key=self.key[head // 2 : head // 2 + 1])
        return replace(made, query=self.query[head : head + 1])

    monkeypatch.setattr(maps.Operands, "ordered", planted)
    with pytest.raises(AssertionError):
        test_scores_in_another_order(operands)


def test_which_orders_are_looked_at() -> None:
    def found(*shape: int, causal: bool = False) -> tuple[orders.Order, ...]:
        grid = TokenGrid(shape)
        return orders.axis_orders(BlockGeometry(grid.tokens, 64, causal, grid))

    assert found(5, 9) == ((1, 0),) and found(45) == () and found(5, 9, causal=True) == ()
    assert len(found(3, 5, 7)) == 5 and set(found(1, 5, 7)) == {(0, 2, 1)}, "orders that are the same are one"
    assert orders.axis_orders(BlockGeometry(45, 64, False)) == ()


def banded(count: int, width: int) -> np.ndarray:
    place = np.arange(count)
    mass = np.exp(-np.abs(place[:, None] - place[None, :]) / width).astype(np.float32)
    return np.asarray(mass / mass.sum(axis=1, keepdims=True), np.float32)


def test_only_orders_that_gather_the_weight_are_offered() -> None:
    geometry = BlockGeometry(GRID.tokens, 64, False, GRID)
    count = geometry.count
    even = np.full((count, count), 1 / count, np.float32)
    rng = np.random.default_rng(0)
    noisy = even * rng.uniform(0.95, 1.05, even.shape).astype(np.float32)
    assert orders.offered(even, {(2, 0, 1): noisy}, geometry) == []
    assert orders.offered(banded(count, 1), {(2, 0, 1): banded(count, 2)}, geometry) == []
    found = orders.offered(even, {(0, 2, 1): banded(count, 2), (2, 0, 1): banded(count, 1)}, geometry)
    assert {p.order for p in found} == {(2, 0, 1)} and 3 < len(found) < 30
    assert {p.kind for p in found} == {"streaming", "blocks"}
    total = [int(p.blocks(geometry).sum()) for p in found]
    assert total == sorted(total) and max(total) < count**2
    for pattern in found:  # each holds more than the same number of any blocks does of the map as it stands
        seen = pattern.blocks(geometry)
        assert banded(count, 1)[seen].sum() > np.sort(even.reshape(-1))[::-1][: seen.sum()].sum()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One layer on frames, rows and columns: heads near by, along a column through all frames, across frames."""
    made = constructed.build(GRID.tokens, 1, causal=False, kinds=KINDS, grid=GRID.shape)
    return constructed.write(tmp_path_factory.mktemp("video"), made, constructed.feeds(6, GRID.tokens))


def compiled(made: tuple[Path, Path], folder: Path, **more: Any) -> report.Report:
    given = {"policy": "sparse", "target": "onnx", "out": folder / "out", "inputs": made[1], "keep_slower": True,
             "max_error": 0.03}  # fmt: skip
    return pipeline.compile(made[0], Options(**{**given, **more}))


def test_the_search_takes_orders(video, tmp_path: Path) -> None:
    """Heads along other axes get them; the model keeps the budget and is predicted to be faster than without."""
    found = compiled(video, tmp_path, grid="5x9x14")
    assert found.outcome == "replaced" and found.search is not None, found.warnings
    assert found.parity is not None and found.parity.passed and 0 < found.parity.value <= 0.03
    near, column, place, _ = (BlockPattern(h.pattern) for h in found.search.sites["site0"])
    assert near.order == () and column.order[0] == 2 and place.order == (1, 2, 0)
    assert all(h.density < 0.35 and h.damage < 5e-3 for h in found.search.sites["site0"])
    for head in found.search.sites["site0"]:  # what is shown is the map in the head's own order
        assert head.kept == pytest.approx(head.mass[head.seen].sum() / len(head.mass), abs=0.01) or not head.kept
    without = compiled(video, tmp_path / "without")
    assert without.search is not None and all(h.density == 1 for h in without.search.sites["site0"][1:3])
    times = [next(p.time for p in r.search.points if p.chosen) for r in (found, without) if r.search is not None]
    assert times[0] < 0.8 * times[1]
    gains = [r.sites[0].decision.predicted_gain for r in (found, without)]
    assert gains[0] > 1.25 * gains[1]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert [n.op_type for n in model.graph.node if n.domain == "attncompile"] == ["BlockSparseAttention"]
    # The plan alone makes the same model, given the grid.
    plan = tmp_path / "out" / "plan.toml"
    again = compiled(video, tmp_path / "again", plan=plan, grid="5x9x14")
    assert again.outcome == "replaced"
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()
    with pytest.raises(AttncompileError, match="needs a token grid of 3 axes") as refused:
        compiled(video, tmp_path / "gridless", plan=plan)
    assert "--grid" in str(refused.value.hint)


def test_what_moving_takes_is_paid_for(video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where moving heads takes longer than all that it saves, no order is taken."""
    monkeypatch.setattr(per_head, "MOVE", {"BHND": 500.0, "BNHD": 500.0})
    found = compiled(video, tmp_path, grid="5x9x14")
    assert found.search is not None and found.search.sites
    assert not any(BlockPattern(h.pattern).order for h in found.search.sites["site0"])


def test_padded_sites_keep_their_order(tmp_path: Path) -> None:
    """Padding is said for tokens as they stand: none of their heads is offered another order."""
    spec = attention_graphs.Spec(batch=1, heads=2, kv_heads=1, length=500, head_dim=16, padding=True, mask_form="where",
                                 guard=True)  # fmt: skip
    path = attention_graphs.save(attention_graphs.build(spec), tmp_path)
    x = np.random.default_rng(0).standard_normal((1, 500, 32)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, pad=np.arange(500).reshape(1, 1, 1, 500) < 400)
    found = compiled((path, tmp_path / "in.npz"), tmp_path, grid="20x25", max_error=0.9)
    assert found.outcome == "replaced" and found.search is not None
    assert not any(BlockPattern(h.pattern).order for heads in found.search.sites.values() for h in heads)


GQA = attention_graphs.Spec(batch=2, heads=4, kv_heads=2, length=11 * 19, head_dim=8, scale=0.3)


@pytest.mark.parametrize("merged", [True, False], ids=["BNHD", "BHND"])
def test_a_plan_for_shared_key_heads(merged, tmp_path: Path) -> None:
    """Orders that a person wrote, through the whole pipeline, against attention pair by pair."""
    path = attention_graphs.save(attention_graphs.build(replace(GQA, merge_output=merged)), tmp_path)
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((2, GQA.length, 32)).astype(np.float32)} for _ in range(2)]
    from polygraphy.json import save_json

    save_json(feeds, str(tmp_path / "in.json"))
    turned = "order 1,0 sinks 0 window 1"
    texts = [turned, "sinks 1 window 0", turned, turned]
    model = load(path)
    given = {"masked_rows": "zero", "edge": 64, "heads": texts}
    (site,) = detect(model, profile_for(model, {}), grid=parse_grid("11x19")).sites
    assert (site.heads, site.kv_heads, site.output.layout) == (4, 2, "BNHD" if merged else "BHND")
    decision = Decision(site.id, "BlockSparseAttention", "by hand", False, given)
    (tmp_path / "plan.toml").write_text(plan_toml.dumps(Plan(model.hash, "sparse", (decision,))))
    more = {"plan": tmp_path / "plan.toml", "max_error": 9.0}
    made = (path, tmp_path / "in.json")
    assert compiled(made, tmp_path, grid="11x19", **more).outcome == "replaced"
    written = onnx.load(tmp_path / "out" / "model.onnx")
    operands = (site.query, site.key, site.value, site.output)
    known = {o.name for o in written.graph.output}
    written.graph.output.extend(
        helper.make_tensor_value_info(o.value, TensorProto.FLOAT, None) for o in operands if o.value not in known
    )
    session = ort.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run([o.value for o in operands], feeds[0])
    q, k, v, got = (x if o.layout == "BNHD" else x.transpose(0, 2, 1, 3) for x, o in zip(values, operands, strict=True))
    block = np.array([place // 64 for place in ranks(TokenGrid((11, 19)), (1, 0))])
    plain = np.arange(GQA.length) // 64
    near = np.abs(block[:, None] - block[None, :]) <= 1
    first = (plain[:, None] == plain[None, :]) | (plain[None, :] == 0)
    want = reference(q, k, v, np.stack([near, first, near, near]), scale=site.scale)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize(
    ("text", "grid", "said"),
    [
        ("order 1,0 sinks 0 window 1", None, "needs a token grid of 2 axes"),
        ("order 0,1 sinks 0 window 1", "11x19", "is no other order of the axes of the grid 11x19"),
        ("order 2,0,1 sinks 0 window 1", "11x19", "is no other order of the axes of the grid 11x19"),
        ("order 1,0 dense", "11x19", "dense is the same in every order"),
    ],
)
def test_plans_that_are_refused(text, grid, said, tmp_path: Path) -> None:
    path = attention_graphs.save(attention_graphs.build(replace(GQA, batch=1)), tmp_path)
    given = {"masked_rows": "zero", "edge": 64, "heads": ["dense", "dense", "dense", text]}
    decision = Decision("site0", "BlockSparseAttention", "by hand", False, given)
    (tmp_path / "plan.toml").write_text(plan_toml.dumps(Plan(load(path).hash, "sparse", (decision,))))
    np.savez(tmp_path / "in.npz", x=np.zeros((1, GQA.length, 32), np.float32))
    with pytest.raises(AttncompileError) as refused:
        compiled((path, tmp_path / "in.npz"), tmp_path, plan=tmp_path / "plan.toml", grid=grid)
    assert said in refused.value.message and refused.value.hint


def test_the_time_of_moving_heads_on_both_machines(tmp_path: Path) -> None:
    """By hand: bytes of queries, keys, values and outputs, each read and written; four launches."""
    subject = mechanism("BlockSparseAttention")
    at = Case(batch=2, queries=GRID.tokens, static=True, heads=4, kv_heads=2, head_dim=64, value_dim=32)
    site = at.site(grid=GRID)
    geometry = heads.geometry_of(subject, site)
    assert isinstance(geometry, BlockGeometry)
    time = heads.block_time(site, geometry, subject, {}, None)  # type: ignore[arg-type]
    moved = heads.ordered_time(site, geometry, subject, {}, None, time, (2, 0, 1))  # type: ignore[arg-type]
    assert (moved.block, moved.head, moved.dense) == (time.block, time.head, time.dense)
    rows = 2 * GRID.tokens * (4 + 4)  # key heads are copied where every second head has another order
    of_element = 2.0 * (64 + 32)
    want = of_element * (2 * per_head.MOVE["BHND"] * rows + per_head.LAUNCH)
    assert (moved.fixed - time.fixed) * (of_element + 40) == pytest.approx(want, rel=1e-6)

    def milliseconds(elements: int) -> float:
        return (4 * constants.launch + 2 * 2 * elements * MOVING / constants.bandwidth) * 1e-6

    constants = cost.constants("gluon-90")
    gpu = gpu_cost(lambda binding: None, kernels(), "fp16", OnGpu())  # type: ignore[arg-type, return-value]
    want = milliseconds(2 * GRID.tokens * 4 * (64 + 64 + 32 + 32))
    assert gpu.moving(site, heads.shape_of(site, {})) == pytest.approx(want)
    # Of a lowering that is there: what its gathers give.
    spec = replace(GQA, head_dim=64, scale=0.125)
    model = load(attention_graphs.save(attention_graphs.build(spec), tmp_path))
    (found,) = detect(model, profile_for(model, {}), grid=parse_grid("11x19")).sites
    world = World(GraphIndex(model), {})
    gpu = gpu_cost(lambda binding: world, kernels(), "fp16", OnGpu())
    plain, turned = (
        gpu.milliseconds(found, subject.lower(found, {"masked_rows": "zero", "edge": 64, "heads": [text] * 4}, 18), {})
        for text in ("sinks 0 window 1", "order 1,0 sinks 0 window 1")
    )
    assert turned - plain == pytest.approx(milliseconds(2 * GQA.length * 64 * (4 + 2 + 2 + 4)))
    with_means = {"masked_rows": "zero", "edge": 64, "heads": ["sinks 0 window 1 rest 16"] * 4}
    with pytest.raises(Unsupported, match="means beside blocks were not measured"):
        gpu.milliseconds(found, subject.lower(found, with_means, 18), {})
