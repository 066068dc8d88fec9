"""Windows taken from around projections to their attention: one site over the grid, and what is not lifted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from attncompile.core.grid_pattern import Blocked
from attncompile.core.mask import in_windows, seam
from attncompile.core.model import Model
from attncompile.core.site import AttentionSite, Detection
from attncompile.passes.detect import detect
from attncompile.passes.fold_back import Folds
from attncompile.passes.load import load
from attncompile.passes.replace import apply
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from attncompile.passes.whole_grid import whole_grid
from attncompile.plugins import mechanism
from tests.passes.attention_graphs import save
from tests.passes.swin_graphs import Layer

SUBJECT = mechanism("NeighborhoodAttention")
HIDDEN = float("-inf")
FORMS = {
    "Swin": Layer(),
    "not shifted": Layer(shift=(0, 0)),
    "14x14, 7": Layer((14, 14), (7, 7), (3, 3)),
    "12x18, 6": Layer((12, 18), (6, 6), (3, 3), batch=2),
    "one axis shifted": Layer((6, 10), (3, 5), (0, 2)),
    "one window on an axis": Layer((4, 12), (4, 4), (0, 2)),
    "rolls that gather": Layer(roll="gather"),
    "fused qkv": Layer(qkv="fused", batch=2),
    "Gemm": Layer(qkv="gemm"),
    "merged mask": Layer(mask="merged", batch=2),
    "bool mask": Layer(mask="bool", fill=HIDDEN),
    "hidden by -inf": Layer(fill=HIDDEN),
    "hidden by -1e4": Layer(fill=-1e4, mask="merged"),
    "small number": Layer(fill=-1.5),
    "no bias": Layer(bias=False),
    "no bias, not shifted": Layer(bias=False, shift=(0, 0)),
    "cosine": Layer(cosine=True),
    "projected first": Layer(late=True),
    "projected first, Gemm": Layer(late=True, qkv="gemm", batch=2),
    "from the input itself": Layer(twist="no-op"),
}


def read(layer: Layer, folder: Path) -> tuple[Model, Model, Detection]:
    """The model, the copy that its sites are found in, and these."""
    model = load(save(layer.model(), folder))
    profile = profile_for(model, {})
    found, working = detect(model, profile), model
    if any(m.code in HELPED for m in found.near_misses):
        working = separate(model, profile)
        found = detect(working, profile)
    return model, *whole_grid(working, profile, found)


def run(proto: ModelProto, layer: Layer) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], layer.feed())[0])


def replaced(model: Model, working: Model, sites: list[AttentionSite]) -> ModelProto:
    edits = []
    for site in sites:
        parameters = SUBJECT._exact_parameters(site)[0]
        assert SUBJECT.is_exact_for(site, parameters).ok
        edits.append((site, SUBJECT.lower(site, parameters, working.opset)))
    proto = apply(working, edits)
    Folds(model.proto, working.proto).undo(proto)
    return proto


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_facts(site: AttentionSite, layer: Layer) -> None:
    assert site.form.startswith("windowed ")
    assert (site.batch, site.heads, site.head_dim) == (layer.batch, layer.heads, layer.dim)
    assert site.query_length == site.key_length == layer.tokens
    (blocked,) = (p for p in site.mask.parts if p.kind == "blocked")
    assert isinstance(blocked.pattern, Blocked) and blocked.pattern.grid is not None
    assert blocked.pattern.grid.shape == layer.grid
    assert (blocked.pattern.window, blocked.pattern.shift) == (layer.window, layer.shift)
    assert blocked.pattern.cyclic == (any(layer.shift) and layer.fill > -9000)
    number = seam(site.mask)
    assert (number.number if number else 0.0) == (layer.fill if blocked.pattern.cyclic else 0.0)
    assert (in_windows(site.mask) is not None) == layer.bias


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_one_site_over_the_grid(form: str, tmp_path: Path) -> None:
    layer = FORMS[form]
    model, working, found = read(layer, tmp_path)
    (site,) = found.sites
    check_facts(site, layer)
    want = run(model.proto, layer)
    assert distance(run(working.proto, layer), want) <= 1e-6
    proto = replaced(model, working, [site])
    assert distance(run(proto, layer), want) <= 1e-5
    kinds = Counter(n.op_type for n in proto.graph.node)
    # What is left is heads put apart and joined: nothing of windows, rolls or masks.
    assert not set(kinds) & {"Slice", "Concat", "Gather", "Softmax", "Where"}
    assert kinds["Transpose"] == (layer.qkv == "fused") + 2 * layer.cosine
    assert kinds["Reshape"] <= (12 if layer.qkv == "gemm" else 5)


def test_random_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(25):
        window = tuple(int(x) for x in rng.integers(1, 6, 2))
        counts = [int(x) for x in rng.integers(1, 4, 2)]
        if window == (1, 1) or counts == [1, 1]:
            continue
        shift = tuple(int(rng.integers(0, w)) if n > 1 else 0 for w, n in zip(window, counts, strict=True))
        layer = Layer(
            (window[0] * counts[0], window[1] * counts[1]), (window[0], window[1]), (shift[0], shift[1]),
            heads=int(rng.integers(1, 4)), dim=int(rng.integers(2, 6)), batch=int(rng.integers(1, 3)),
            fill=float(rng.choice([-100.0, HIDDEN, -3.0])), roll=str(rng.choice(["slices", "gather"])),
            qkv=str(rng.choice(["apart", "fused", "gemm"])), mask=str(rng.choice(["five axes", "merged"])),
            cosine=bool(rng.random() < 0.3), seed=seed,
        )  # fmt: skip
        if layer.mask == "merged" and layer.fill == HIDDEN:
            layer = replace(layer, fill=-1e4)
        model, working, found = read(layer, tmp_path)
        (site,) = found.sites
        want = run(model.proto, layer)
        assert site.form.startswith("windowed "), layer
        blocked = next(p.pattern for p in site.mask.parts if p.kind == "blocked")
        seen = np.zeros((layer.tokens, layer.tokens), bool)
        seen[:] = blocked.visible(layer.tokens, layer.tokens)
        assert int(seen.sum(axis=1).max()) == layer.places
        assert distance(run(working.proto, layer), want) <= 1e-6, layer
        assert distance(run(replaced(model, working, [site]), layer), want) <= 1e-5, layer


TWINS = [
    "rolled back by more", "rolled on", "reversed by another window", "norm over a window", "positions in a window",
    "mean of the outputs", "windows are an output", "one element of the mask", "the mask of another window",
    "a bias for each window",
]  # fmt: skip


@pytest.mark.parametrize("fill", [-100.0, HIDDEN])
@pytest.mark.parametrize("twist", TWINS)
def test_twins_stay_as_they_are(twist: str, fill: float, tmp_path: Path) -> None:
    """The windowed site is reported, once, and the file is not touched."""
    layer = Layer((6, 12), (3, 4), (1, 2), twist=twist, fill=fill)
    model, working, found = read(layer, tmp_path)
    assert working.proto is model.proto or working.proto == model.proto, twist
    (site,) = found.sites
    assert not site.form.startswith("windowed ")
    assert (site.query_length, site.batch) == (layer.places, layer.windows)
    # What is done to a window as a whole hides that the tokens were moved at all; of the others the reason is told.
    silent = {"norm over a window", "positions in a window"}
    assert [m.code for m in found.near_misses] == ([] if twist in silent else ["windows"])


def test_a_window_that_is_square_can_be_reversed_by_its_transpose_only_where_that_is_the_same(tmp_path: Path) -> None:
    layer = Layer((9, 9), (3, 3), (1, 1), twist="reversed by another window")
    _, _, found = read(layer, tmp_path)
    assert found.sites[0].form.startswith("windowed ")  # 3x3 by 3x3: nothing was changed


@pytest.mark.parametrize("form", ["Swin", "fused qkv", "merged mask", "projected first"])
def test_names_and_idle_nodes_mean_nothing(form: str, tmp_path: Path) -> None:
    """Every value renamed, an Identity on every edge, the nodes written in another order of the same graph."""
    layer = FORMS[form]
    proto = layer.model()
    want = run(proto, layer)
    rng = np.random.default_rng(0)
    names = {o for n in proto.graph.node for o in n.output} - {"y"}
    fresh = {name: f"v{i}" for name, i in zip(sorted(names), rng.permutation(len(names)), strict=True)}
    nodes = []
    for node in proto.graph.node:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name = ""
        for i, value in enumerate(node.input):
            if value in fresh:
                nodes.append(onnx.helper.make_node("Identity", [fresh[value]], [f"{fresh[value]}_{len(nodes)}"]))
                made.input[i] = nodes[-1].output[0]
        for i, value in enumerate(node.output):
            made.output[i] = fresh.get(value, value)
        nodes.append(made)
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    model = load(save(proto, tmp_path))
    profile = profile_for(model, {})
    working, found = whole_grid(model, profile, detect(model, profile))
    (site,) = found.sites
    check_facts(site, layer)
    assert distance(run(replaced(model, working, [site]), layer), want) <= 1e-5
    assert distance(run(replaced(model, working, []), layer), want) <= 1e-6


def test_what_is_not_replaced_is_folded_back(tmp_path: Path) -> None:
    for layer in FORMS.values():
        model, working, _ = read(layer, tmp_path)
        if working.proto is model.proto:
            continue
        proto = replaced(model, working, [])
        assert sorted(n.SerializeToString() for n in proto.graph.node) == sorted(
            n.SerializeToString() for n in model.proto.graph.node
        )
        assert {t.name for t in proto.graph.initializer} == {t.name for t in model.proto.graph.initializer}


def test_detection_does_not_change_the_model(tmp_path: Path) -> None:
    model = load(save(Layer().model(), tmp_path))
    before = model.proto.SerializeToString(deterministic=True)
    profile = profile_for(model, {})
    working, _ = whole_grid(model, profile, detect(model, profile))
    assert working is not model
    assert model.proto.SerializeToString(deterministic=True) == before


def test_ordinary_attention_is_left_alone(tmp_path: Path) -> None:
    """Batch entries that are a batch: no window, so the same model comes back."""
    layer = Layer((6, 9), (6, 9), (0, 0), batch=3)
    model, working, found = read(layer, tmp_path)
    assert working is model
    assert [s.batch for s in found.sites] == [3]
