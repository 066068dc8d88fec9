"""From a file with masked dense attention to one with the op, through detection, gates and verification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile import pipeline
from attncompile.pipeline import Options
from tests.plugins.test_block_sparse import documents, windows
from tests.plugins.test_neighborhood_exact import window

pytestmark = pytest.mark.usefixtures("brief")

HEADS, DIM = 2, 16
GRID = window((24, 18), (5, 7)).visible(432, 432)
FRAMES = window((5, 9, 10), (3, 3, 5)).visible(450, 450)


def masked_dense(visible: np.ndarray, bias: str, batch: int | str) -> onnx.ModelProto:
    """``bias``: none, stored (an initializer), or a table that indices are looked up in."""
    tokens = len(visible)
    rng = np.random.default_rng(0)
    stored = {"scale": np.float32(0.25), "mask": np.where(visible, np.float32(0), np.float32(-np.inf))[None, None]}
    nodes = [
        helper.make_node("Mul", ["q", "scale"], ["qs"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["qs", "kt"], ["scores"]),
    ]
    if bias == "stored":
        stored["bias"] = rng.standard_normal((1, HEADS, tokens, tokens), np.float32)
    if bias == "table":
        i = np.arange(tokens)
        stored |= {"table": rng.standard_normal((2 * tokens, HEADS), np.float32),
                   "index": (i[:, None] - i[None, :] + tokens).reshape(-1), "lead": np.array([0]),
                   "shape": np.array([tokens, tokens, HEADS])}  # fmt: skip
        nodes += [
            helper.make_node("Gather", ["table", "index"], ["looked"], axis=0),
            helper.make_node("Reshape", ["looked", "shape"], ["square"]),
            helper.make_node("Transpose", ["square"], ["turned"], perm=[2, 0, 1]),
            helper.make_node("Unsqueeze", ["turned", "lead"], ["bias"]),
        ]
    if bias != "none":
        nodes.append(helper.make_node("Add", ["scores", "bias"], ["biased"]))
    nodes += [
        helper.make_node("Add", ["scores" if bias == "none" else "biased", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["o"]),
    ]
    shape = [batch, HEADS, tokens, DIM]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkvo"]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("mask", "bias", "grid", "op"),
    [
        (GRID, "none", "24x18", "NeighborhoodAttention"),
        (GRID, "stored", "24x18", "NeighborhoodAttention"),
        (GRID, "table", "24x18", "NeighborhoodAttention"),
        (FRAMES, "none", "5x9x10", "NeighborhoodAttention"),
        (documents(431, 5), "none", None, "BlockSparseAttention"),
        (documents(431, 5), "table", None, "BlockSparseAttention"),
        (windows(21, 21, 7, 3), "stored", None, "BlockSparseAttention"),
        (np.tril(documents(431, 5)), "none", None, "BlockSparseAttention"),
    ],
    ids=["grid", "grid, bias", "grid, bias from a table", "frames", "documents", "documents, bias from a table",
         "windows, bias", "causal documents"],
)  # fmt: skip
def test_masked_dense_becomes_the_op(mask, bias, grid, op, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(masked_dense(mask, bias, "batch"), path)
    report = pipeline.compile(
        path, Options(policy="exact", target="onnx", out=tmp_path / "out", grid=grid, keep_slower=True, threads=1)
    )
    assert report.outcome == "replaced", [(s.rolled_back, s.decision.reason, s.decision.refusals) for s in report.sites]
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert [n.op_type for n in made.graph.node if n.domain == "attncompile"] == [op]
    assert "mask" not in {t.name for t in made.graph.initializer}
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal((3, HEADS, len(mask), DIM), np.float32) for n in "qkv"}
    want, got = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for p in (path, tmp_path / "out" / "model.onnx")
    )
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_a_window_with_sink_logits(tmp_path: Path) -> None:
    """As gpt-oss is exported: the sink's column joins the scores before the softmax and is cut off behind it."""
    tokens = 700
    i = np.arange(tokens)
    near = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < 32)
    model = masked_dense(near, "none", 1)
    nodes = {n.output[0]: n for n in model.graph.node}
    nodes["weights"].input[0] = "joined"
    nodes["o"].input[0] = "kept"
    before = [
        helper.make_node("Reshape", ["sinks", "column"], ["spread"]),
        helper.make_node("Expand", ["spread", "sizes"], ["wide"]),
        helper.make_node("Concat", ["masked", "wide"], ["joined"], axis=-1),
    ]
    cut = helper.make_node("Slice", ["weights", "zero", "end", "last"], ["kept"])
    ordered = [*list(model.graph.node)[:-2], *before, nodes["weights"], cut, nodes["o"]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    stored = {
        "sinks": np.array([0.5, 2.0], np.float32), "column": np.array([1, HEADS, 1, 1]),
        "sizes": np.array([1, HEADS, tokens, 1]), "zero": np.array([0]), "end": np.array([tokens]),
        "last": np.array([3]),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in stored.items())
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    report = pipeline.compile(path, Options(policy="exact", target="onnx", out=tmp_path / "out", keep_slower=True))
    assert report.outcome == "replaced", ([s.rolled_back for s in report.sites], report.near_misses)
    assert [s.decision.mechanism for s in report.sites] == ["NeighborhoodAttention"]
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal((1, HEADS, tokens, DIM), np.float32) for n in "qkv"}
    want, got = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for p in (path, tmp_path / "out" / "model.onnx")
    )
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_one_flipped_bit_is_no_neighborhood(tmp_path: Path) -> None:
    """The nearest op that is still exact takes it, flipped bit and all."""
    wrong = GRID.copy()
    wrong[200, 100] ^= True
    path = tmp_path / "model.onnx"
    onnx.save(masked_dense(wrong, "none", 1), path)
    report = pipeline.compile(
        path, Options(policy="exact", target="onnx", out=tmp_path / "out", grid="24x18", keep_slower=True, threads=1)
    )
    (site,) = report.sites
    assert site.decision.mechanism != "NeighborhoodAttention"
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal((1, HEADS, 432, DIM), np.float32) for n in "qkv"}
    want, got = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for p in (path, tmp_path / "out" / "model.onnx")
    )
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
