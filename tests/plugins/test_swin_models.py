"""Swin exported by both exporters: windows go, one op a layer is left, and the outputs stay."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from attncompile import pipeline
from attncompile.core.grid_pattern import Blocked
from attncompile.models.export import export_built, quiet
from attncompile.models.recipe import Built
from attncompile.models.recipe import Options as Recipe
from attncompile.models.weights import seed_weights
from attncompile.pipeline import Options, inspect
from attncompile.report import Report

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("brief")

_FOLDER = tempfile.TemporaryDirectory(prefix="attncompile-swin-")
EXPORTERS = [("dynamo", 18), ("torchscript", 17)]
SIZES: dict[str, dict[str, Any]] = {  # image, window: patches are 2x2, so that grids are half as large
    "14x14, window 7": {"image": (28, 28), "window": 7},
    "12x18, window 6, batch 2": {"image": (24, 36), "window": 6, "batch": 2},
    "eager": {"image": (28, 28), "window": 7, "attention": "eager"},
    "padded from 12x16": {"image": (24, 32), "window": 5},
    "two stages": {"image": (48, 72), "window": 6, "depths": (2, 2), "heads": (3, 6)},
    "SwinV2": {"image": (28, 28), "window": 7, "version": 2},
}


@functools.cache
def swin(name: str, exporter: str, opset: int) -> Path:
    """The file of a small Swin, 3 heads of 8, with seeded weights; the second layer of each stage is shifted."""
    import torch
    from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model

    size = {"batch": 1, "depths": (2,), "heads": (3,), "attention": "sdpa", "version": 1, **SIZES[name]}
    chosen = {"attn_implementation": size["attention"]} if size["version"] == 1 else {}
    config = (SwinConfig if size["version"] == 1 else Swinv2Config)(
        image_size=size["image"], patch_size=2, window_size=size["window"], embed_dim=24, depths=list(size["depths"]),
        num_heads=list(size["heads"]), **chosen,
    )  # fmt: skip
    model = seed_weights((SwinModel if size["version"] == 1 else Swinv2Model)(config), 0)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Any) -> Any:
            return self.model(pixels).last_hidden_state

    pixels = torch.from_numpy(_pixels((size["batch"], 3, *size["image"])))
    built = Built(Wrapped().eval(), {"pixels": pixels}, ("states",), {})
    path = Path(_FOLDER.name) / f"{name}-{exporter}.onnx".replace(" ", "_").replace(",", "")
    with quiet():
        export_built(built, Recipe(exporter=exporter, opset=opset), path)  # type: ignore[arg-type]
    return path


def _pixels(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def run(path: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixels": _pixels(tuple(session.get_inputs()[0].shape))})[0])


def compiled(path: Path, out: Path, **options: Any) -> tuple[Report, ModelProto]:
    report = pipeline.compile(path, Options(target="onnx", out=out, **options))
    return report, onnx.load(out / "model.onnx")


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "two stages")) for n in SIZES])
def test_one_op_a_layer_and_no_windows(name: str, exporter: str, opset: int, tmp_path: Path) -> None:
    path = swin(name, exporter, opset)
    report, proto = compiled(path, tmp_path / "out", keep_slower=True)
    assert report.outcome == "replaced" and report.exit_code == 0
    layers = sum(SIZES[name].get("depths", (2,)))
    assert [s.decision.mechanism for s in report.sites] == ["NeighborhoodAttention"] * layers
    assert all(s.replaced and s.exactness is not None and s.exactness.passed for s in report.sites)
    want = run(path)
    assert np.linalg.norm(run(tmp_path / "out" / "model.onnx") - want) <= 1e-5 * np.linalg.norm(want)

    kinds = Counter(n.op_type for n in proto.graph.node if n.domain in ("", "ai.onnx"))
    ops = [n for n in proto.graph.node if n.op_type == "NeighborhoodAttention"]
    assert len(ops) == layers
    assert not set(kinds) & {"Softmax", "Where", "ScatterND", "Equal", "Range"}
    stages = len(SIZES[name].get("depths", (2,)))
    padded = "padded" in name
    # The patch embedding and the merging of patches move tokens too: what is left is theirs, and the padding's.
    merging = 4 * (stages - 1)
    assert kinds["Slice"] <= 2 * merging + (4 * layers if padded else 0) + (exporter == "torchscript")
    assert kinds["Pad"] <= (layers if padded else 0) + stages - 1
    own = {n.output[0]: n for n in proto.graph.node if n.op_type in ("Transpose", "Slice", "Concat", "Gather", "Pad")}
    for op in ops:
        assert not between(proto, op, own)


def between(proto: ModelProto, op: onnx.NodeProto, moves: dict[str, onnx.NodeProto]) -> list[str]:
    """What moves tokens between the layer's norm (or padding) and the op, by going up from the op."""
    producer = {o: n for n in proto.graph.node for o in n.output}
    allowed = {"Transpose"} if any(n.op_type == "ReduceL2" for n in proto.graph.node) else set()  # of heads, in SwinV2
    found, pending, seen = [], list(op.input[:3]), set()
    while pending:
        value = pending.pop()
        node = producer.get(value)
        ends = node is None or (node.op_type in ("LayerNormalization", "Add", "Pad") and not _is_bias(node, producer))
        if value in seen or node is None or ends:
            continue
        seen.add(value)
        if value in moves and node.op_type not in allowed:
            found.append(node.op_type)
        pending += [v for v in node.input if v in producer]
    return found


def _is_bias(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> bool:
    """A projection's Add reads one computed value, a residual's two."""
    made = [v for v in node.input if v in producer and producer[v].op_type != "Constant"]
    return node.op_type == "Add" and len(made) == 1


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
def test_the_facts_of_the_sites(exporter: str, opset: int) -> None:
    found = inspect(swin("12x18, window 6, batch 2", exporter, opset), Options()).detection
    assert [s.batch for s in found.sites] == [2, 2]
    for site, shift in zip(found.sites, (0, 3), strict=True):
        shown = site.to_json()
        assert (shown["kind"], shown["query_length"], shown["key_length"]) == ("softmax", 216, 216)
        assert shown["mask"]["kind"] == "blocked"
        assert (shown["mask"]["window"], shown["mask"]["shift"]) == ([6, 6], [shift, shift])
        assert shown["mask"]["grid"]["shape"] == [12, 18]
        (blocked,) = (p.pattern for p in site.mask.parts if isinstance(p.pattern, Blocked) and p.kind == "blocked")
        assert blocked.cyclic == bool(shift)
        assert [p.number for p in site.mask.parts if p.number] == ([-100.0] if shift else [])
    assert not found.near_misses


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
def test_a_site_that_is_kept_has_its_own_nodes_back(exporter: str, opset: int, tmp_path: Path) -> None:
    path = swin("14x14, window 7", exporter, opset)
    before = onnx.load(path)
    report, proto = compiled(path, tmp_path / "one", keep_slower=True, sites=("site1",))
    assert [s.replaced for s in report.sites] == [False, True]
    assert Counter(n.op_type for n in proto.graph.node)["Softmax"] == 1
    names = {o for n in proto.graph.node for o in n.output}
    first = next(n for n in before.graph.node if n.op_type == "Softmax")
    assert first.output[0] in names
    made = [n for n in proto.graph.node if any(o.startswith("whole_grid/") for o in n.output)]
    assert not any(n.op_type in ("Gather", "Transpose") for n in made)
    want = run(path)
    assert np.linalg.norm(run(tmp_path / "one" / "model.onnx") - want) <= 1e-5 * np.linalg.norm(want)


def test_nothing_replaced_is_the_input_byte_by_byte(tmp_path: Path) -> None:
    path = swin("14x14, window 7", "dynamo", 18)
    plan = tmp_path / "plan.toml"
    report, _ = compiled(path, tmp_path / "first", keep_slower=True)
    text = (tmp_path / "first" / "plan.toml").read_text()
    plan.write_text(text.replace('mechanism = "NeighborhoodAttention"', 'mechanism = "keep"'))
    report, _ = compiled(path, tmp_path / "out", plan=plan)
    assert report.outcome == "unchanged"
    assert (tmp_path / "out" / "model.onnx").read_bytes() == path.read_bytes()
