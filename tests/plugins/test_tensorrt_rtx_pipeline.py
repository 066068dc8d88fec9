"""Models whose windows the compiler recovers, through its pipeline to TensorRT-RTX engines in half precision.

The engines are built on the CPU and not executed: what is shown is that nothing but standard operators is left, and
that the builder takes them. The replaced model itself is checked on the CPU, by the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile import pipeline
from attncompile.pipeline import Options
from tests.passes import windowed_graphs as graphs

pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("brief")

HEADS, DIM = 2, 64


def neighborhood(shape: tuple[int, ...], kernel: tuple[int, ...]) -> np.ndarray:
    """Bool [tokens, tokens]: the kernel's box, moved inward at the borders."""
    seen = np.ones((1, 1), bool)
    for size, width in zip(shape, kernel, strict=True):
        start = np.clip(np.arange(size) - width // 2, 0, size - width)[:, None]
        place = np.arange(size)[None, :]
        seen = np.kron(seen, (place >= start) & (place < start + width))
    return np.asarray(seen, bool)


def causal_window(tokens: int, window: int) -> np.ndarray:
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    return np.asarray((distance >= 0) & (distance < window))


def random_blocks(count: int, block: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.kron((rng.random((count, count)) < 0.3) | np.eye(count, dtype=bool), np.ones((block, block), bool))


def masked(visible: np.ndarray) -> onnx.ModelProto:
    """Dense attention with a stored mask that is added."""
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))[None, None]
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"]), helper.make_node("Mul", ["raw", "scale"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["sum"]), helper.make_node("Softmax", ["sum"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]  # fmt: skip
    shape = [1, HEADS, len(visible), DIM]
    graph = helper.make_graph(
        nodes, "masked", [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in "qkv"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(np.float32(DIM**-0.5), "scale")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def unfolded() -> onnx.ModelProto:
    return graphs.unfolded(18, 20, 5, border="clamp", batch=1).proto


FAMILIES: dict[str, tuple[Callable[[], onnx.ModelProto], str | None, str]] = {
    "unfold": (unfolded, None, "neighborhood"),
    "2-D": (lambda: masked(neighborhood((24, 24), (7, 7))), "24x24", "neighborhood"),
    "3-D": (lambda: masked(neighborhood((4, 12, 12), (3, 5, 5))), "4x12x12", "neighborhood"),
    "causal window": (lambda: masked(causal_window(768, 64)), None, "window"),
    "block-sparse": (lambda: masked(random_blocks(12, 64)), None, "block_sparse"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_recovered_models_build_as_half_engines(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(graphs, "HEADS", HEADS)
    monkeypatch.setattr(graphs, "DIM", DIM)
    make, grid, kind = FAMILIES[family]
    path, out = tmp_path / "in.onnx", tmp_path / "out"
    onnx.save(make(), path)
    report = pipeline.compile(
        path, Options(policy="exact", target="tensorrt-rtx", precision="fp16", out=out, grid=grid, keep_slower=True)
    )
    (site,) = report.sites
    assert site.replaced and site.site.mask.kind == kind, (site.site.mask.kind, site.rolled_back)
    lowered = onnx.load(out / "model.tensorrt-rtx.onnx")
    assert {n.domain for n in lowered.graph.node} == {""} and not lowered.functions
    assert not any(o.domain not in ("", "ai.onnx") for o in lowered.opset_import)
    casts = [a.i for n in lowered.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"]
    assert casts.count(TensorProto.FLOAT16) >= 3  # q, k and v
    built = next(t for t in report.targets if t.name == "tensorrt-rtx")
    assert built.attention_fused == built.attention_layers and built.attention_fused, built
    softmaxes = [n for n in lowered.graph.node if n.op_type == "Softmax"]
    assert softmaxes and (out / "model.engine").stat().st_size > 10_000
