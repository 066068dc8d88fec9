"""CLEAR's balls as what the search may choose: for a site as a whole, and as blocks of single heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile import gate, pipeline, plugins, report, whole
from attncompile.core import plan_toml
from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.errors import AttncompileError
from attncompile.core.grid import TokenGrid
from attncompile.core.mechanism import Lowering
from attncompile.core.pattern import GridWindow
from attncompile.core.plan import Decision, Plan
from attncompile.core.site import AttentionSite
from attncompile.gpu_cost import GpuCost, gpu_cost
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import World
from attncompile.passes.grid import parse_grid
from attncompile.passes.index import GraphIndex
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from attncompile.pipeline import Options
from attncompile.plugins import kernels, mechanisms
from attncompile.plugins.block_sparse.reference import reference
from attncompile.plugins.neighborhood import mechanism as neighborhood
from attncompile.policy import load_policy
from attncompile.search import executors, whole_sites
from attncompile.search.candidates import candidates
from tests.plugins.conftest import relative_error
from tests.search import constructed
from tests.test_gpu_cost import OnGpu

IMAGE = TokenGrid((27, 38))  # 1,026 tokens
VIDEO = TokenGrid((5, 9, 14))  # 630 tokens


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)
    monkeypatch.setattr(executors, "make", lambda name, jobs, threads: executors.Inline(1))
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())


def made(folder: Path, grid: TokenGrid, kinds: tuple[str, ...]) -> tuple[Path, Path]:
    model = constructed.build(grid.tokens, 1, causal=False, kinds=kinds, grid=grid.shape)
    return constructed.write(folder, model, constructed.feeds(6, grid.tokens, 16 * len(kinds)))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One layer whose two heads look at a round vicinity."""
    return made(tmp_path_factory.mktemp("image"), IMAGE, ("round", "round"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("video"), VIDEO, ("round", "round", "sink", "dense"))


def compiled(model: tuple[Path, Path], folder: Path, **more: Any) -> report.Report:
    given = {"policy": "neighborhood", "target": "onnx", "out": folder / "out", "inputs": model[1],
             "keep_slower": True, "max_error": 0.1}  # fmt: skip
    return pipeline.compile(model[0], Options(**{**given, **more}))


def chosen_time(found: report.Report) -> float:
    assert found.search is not None
    return next(p.time for p in found.search.points if p.chosen)


def site_of(path: Path, grid: str) -> tuple[AttentionSite, World]:
    model = load(path)
    (site,) = detect(model, profile_for(model, {}), grid=parse_grid(grid)).sites
    return site, World(GraphIndex(model), {})


def operands(written: Path, site: AttentionSite) -> list[np.ndarray]:
    """q, k, v and the output of the site in this model [B, N, H, D], for noise."""
    model = onnx.load(written)
    values = [x.value for x in (site.query, site.key, site.value, site.output)]
    known = {o.name for o in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(v, TensorProto.FLOAT, None) for v in values if v not in known
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    found = session.run(values, {"x": np.random.default_rng(5).standard_normal(shape).astype(np.float32)})
    layouts = [x.layout for x in (site.query, site.key, site.value, site.output)]
    return [v if layout == "BNHD" else v.transpose(0, 2, 1, 3) for v, layout in zip(found, layouts, strict=True)]


def test_heads_that_look_around_get_a_ball(image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the fastest within the budget; without balls the same search finds something slower."""
    found = compiled(image, tmp_path, grid="27x38")
    assert found.outcome == "replaced" and found.approximate and found.search is not None, found.warnings
    assert found.parity is not None and found.parity.passed and 0 < found.parity.value <= 0.1
    assert found.search.held and max(found.search.held) <= 0.1
    decision = found.sites[0].decision
    given = decision.parameters
    assert decision.mechanism == "NeighborhoodAttention" and decision.reason.startswith("a ball of 13x13")
    assert (given["shape"], given["border"], list(given["kernel_size"])) == ("ball", "truncate", [13, 13])
    jsonschema.validate(found.to_json(), report.schema())
    assert "a ball of 13x13" in (tmp_path / "out" / "report.html").read_text()
    # What the model computes is attention in that ball, by the definition of the mask, which knows nothing of the op.
    site, _ = site_of(image[0], "27x38")
    q, k, v, got = operands(tmp_path / "out" / "model.onnx", site)
    ball = GridWindow(IMAGE, (13, 13), (1, 1), (1, 1), (False, False), "truncate", "ball")
    want, box = (
        reference(q, k, v, seen.visible(IMAGE.tokens, IMAGE.tokens), scale=site.scale)
        for seen in (ball, replace(ball, shape="box"))
    )
    assert relative_error(got, want) < 1e-5 < 1e-3 < relative_error(want, box)  # scores are up to a hundred
    # The plan alone makes the same model; the grid stands in it.
    again = compiled(image, tmp_path / "again", plan=tmp_path / "out" / "plan.toml")
    assert again.outcome == "replaced"
    assert (tmp_path / "again/out/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()
    monkeypatch.setattr(neighborhood, "balls", lambda site: [])
    without = compiled(image, tmp_path / "without", grid="27x38")
    if without.approximate:
        assert "shape" not in without.sites[0].decision.parameters
        assert chosen_time(found) < 0.9 * chosen_time(without)
    else:
        assert any("no approximation keeps relative_l2 within 0.1" in w for w in without.warnings)


def offered(site: AttentionSite, world: World, gpu: GpuCost | None = None) -> tuple[int, int]:
    """Neighborhoods and balls that are scored."""
    edits = whole_sites.options_for(site, load_policy("neighborhood", mechanisms()), mechanisms(), [world], 18, gpu)
    shapes = [e.decision.parameters.get("shape", "box") for e in edits if len(e.decision.parameters["grid"]) > 1]
    return shapes.count("box"), shapes.count("ball")


def test_balls_that_save_nothing_are_not_tried(image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ball sees a part of its box: where that takes no longer, as on a GPU, whose kernels meet whole boxes, only the
    box is scored.
    """
    site, world = site_of(image[0], "27x38")
    assert offered(site, world) == (1, 2)
    monkeypatch.setattr(whole_sites, "LESS", 9.0)
    assert offered(site, world) == (1, 0)
    monkeypatch.undo()
    for dim in (64, 256):  # box: the kernel for sm_90, and that of every architecture
        model = constructed.build(45 * 60, 1, dim, causal=False, kinds=("round",) * 8, grid=(45, 60))
        path, _ = constructed.write(tmp_path, model, [])
        large, there = site_of(path, "45x60")
        gpu = gpu_cost(lambda binding, there=there: there, kernels(), "fp16", OnGpu())
        boxes, balls = offered(large, there, gpu)
        assert boxes > 1 and balls == 0
        ours, theirs = (gpu.gain(large, lowered(large, shape), {}) for shape in ("ball", "box"))
        assert ours < 1.05 * theirs
        assert offered(large, there)[1] > 1


def lowered(site: AttentionSite, shape: str) -> Lowering:
    """A neighborhood of 15x15 tokens."""
    assert site.grid is not None
    border = "truncate" if shape == "ball" else "clamp"
    given = {"kernel_size": [15, 15], "border": border, "shape": shape, "grid": list(site.grid.shape)}
    return plugins.mechanism("NeighborhoodAttention").lower(site, given, 18)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kernel_size": [12, 13]}, "odd kernel sizes"),
        ({"border": "clamp"}, "a ball is truncated"),
        ({"grid": [27, 39]}, "the grid has 1053 tokens"),
        ({"shape": "disc"}, "shape 'disc'"),
        ({"kernel_size": [13, 13, 13]}, "entries for 3 axes"),
    ],
    ids=str,
)
def test_plans_that_are_refused(changed, said, image, tmp_path: Path) -> None:
    given = {"kernel_size": [13, 13], "border": "truncate", "shape": "ball", "grid": [27, 38], **changed}
    decision = Decision("site0", "NeighborhoodAttention", "by hand", False, given)
    (tmp_path / "plan.toml").write_text(plan_toml.dumps(Plan(load(image[0]).hash, "neighborhood", (decision,))))
    with pytest.raises(AttncompileError) as refused:
        compiled(image, tmp_path, plan=tmp_path / "plan.toml", grid="27x38")
    assert said in f"{refused.value.message} {refused.value.hint}" and refused.value.hint
    assert not (tmp_path / "out").exists()


def test_candidates_of_heads_are_balls_where_blocks_differ() -> None:
    """Each has blocks that nothing simpler has, fewer than the box that holds it; of rows of an image there is none."""
    flat = BlockGeometry(32 * 32, 64, False, TokenGrid((32, 32)))  # two rows a block
    even = np.full((flat.count, flat.count), 1 / flat.count)
    assert not any(p.kind == "ball" for p in candidates(even, flat, True))
    for grid in (TokenGrid((9, 16, 16)), TokenGrid((8, 12, 16), prefix=1), TokenGrid((64, 90))):
        geometry = BlockGeometry(grid.tokens, 64, False, grid)
        even = np.full((geometry.count, geometry.count), 1 / geometry.count)
        found = candidates(even, geometry, True)
        balls = [p for p in found if p.kind == "ball"]
        assert 0 < len(balls) <= 6, grid
        for pattern in balls:
            sizes = [int(x) for x in pattern.text[5:].split("x")]
            held = "x".join(str(min(size, side)) for size, side in zip(sizes, grid.shape, strict=True))
            ball, box = pattern.blocks(geometry), BlockPattern(f"grid {held}").blocks(geometry)
            assert (box | ~ball).all() and ball.sum() <= box.sum()
            same = [p for p in found if np.array_equal(p.blocks(geometry), ball)]
            assert same == [pattern]
    causal = BlockGeometry(VIDEO.tokens, 64, True, VIDEO)
    assert not any(p.kind == "ball" for p in candidates(np.full((10, 10), 0.1), causal, True))


def test_a_plan_of_balls_for_heads(video, tmp_path: Path) -> None:
    """All blocks that the ball touches are seen whole, as those of a box are; against float64 pair by pair."""
    texts = ["ball 3x5x5", "ball 5x5x9", "sinks 1 window 0", "dense"]
    site, _ = site_of(video[0], "5x9x14")
    given = {"masked_rows": "zero", "edge": 64, "heads": texts}
    decision = Decision(site.id, "BlockSparseAttention", "by hand", False, given)
    (tmp_path / "plan.toml").write_text(plan_toml.dumps(Plan(load(video[0]).hash, "sparse", (decision,))))
    more = {"policy": "sparse", "plan": tmp_path / "plan.toml", "max_error": 9.0}
    assert compiled(video, tmp_path, grid="5x9x14", **more).outcome == "replaced"
    q, k, v, got = operands(tmp_path / "out" / "model.onnx", site)
    block = np.arange(VIDEO.tokens) // 64
    masks = []
    for kernel in ((3, 5, 5), (5, 5, 9)):
        ball = GridWindow(VIDEO, kernel, (1, 1, 1), (1, 1, 1), (False,) * 3, "truncate", "ball")
        touched = np.zeros((block[-1] + 1,) * 2, bool)
        np.logical_or.at(touched, (block[:, None], block[None, :]), ball.visible(VIDEO.tokens, VIDEO.tokens))
        masks.append(touched[block[:, None], block[None, :]])
        assert not touched.all()
    masks += [(block[:, None] == block[None, :]) | (block[None, :] == 0), np.ones_like(masks[0])]
    want = reference(q, k, v, np.stack(masks), scale=site.scale)
    assert relative_error(got, want) < 1e-6
    with pytest.raises(AttncompileError, match="needs a token grid of 3 axes") as refused:
        compiled(video, tmp_path / "gridless", **more)
    assert "--grid" in str(refused.value.hint)
    for wrong, said in (("ball 3x4x5", "a ball is around a token"), ("ball 5x5", "needs a token grid of 2 axes")):
        text = (tmp_path / "plan.toml").read_text().replace("ball 3x5x5", wrong)
        (tmp_path / "wrong.toml").write_text(text)
        with pytest.raises(AttncompileError, match=said):
            compiled(video, tmp_path / "wrong", grid="5x9x14", **{**more, "plan": tmp_path / "wrong.toml"})
