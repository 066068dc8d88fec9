"""The bodies must beat masked dense attention by far; measured here with wide margins, since CI machines are noisy."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile.plugins import mechanism


def masked_dense(at, visible: np.ndarray) -> bytes:
    """What exporters write: scale, MatMul, Add of a stored mask, Softmax, guard against NaN, MatMul. All BHND."""
    constants = {
        "scale": np.float32(at.scale),
        "mask": np.where(visible, 0, -np.inf).astype(np.float32),
        "zero": np.float32(0),
    }
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", ["q", "scale"], ["qs"]),
        helper.make_node("MatMul", ["qs", "kt"], ["s"]),
        helper.make_node("Add", ["s", "mask"], ["sm"]),
        helper.make_node("Softmax", ["sm"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "p"], ["pg"]),
        helper.make_node("MatMul", ["pg", "v"], ["o"]),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, at.heads, "N", at.head_dim)) for n in ("q", "k", "v")
    ]
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, (1, at.heads, "N", at.value_dim))
    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "dense", values, [out], initializers)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def speedup(slow: ort.InferenceSession, fast: ort.InferenceSession, feeds: dict, rounds: int) -> float:
    """Median over paired rounds of the CPU time of this thread: other workers of the suite take turns on the cores."""
    ratios = []
    for _ in range(rounds):
        took = []
        for one in (slow, fast):
            start = time.thread_time()
            one.run(None, feeds)
            took.append(time.thread_time() - start)
        ratios.append(took[0] / took[1])
    return float(np.median(ratios))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "floor"),
    [
        ({"kernel_size": [512], "causal": [1], "block": 64, "dense_below": 640}, 3.0),
        ({"kernel_size": [256], "causal": [1], "block": 64, "dense_below": 384}, 5.0),
        ({"kernel_size": [17, 17], "grid": [64, 64], "border": "clamp", "block": 64}, 3.0),
    ],
    ids=["window 512", "window 256", "17x17 of 64x64"],
)
def test_windows_of_4096_tokens(parameters, floor, case, capsys) -> None:
    at = case(queries=4096, heads=6, kv_heads=6, head_dim=64, value_dim=64, scale=0.125, static="grid" in parameters)
    i = np.arange(4096)
    if "grid" in parameters:
        y, x = np.divmod(i, 64)
        rows, columns = (np.clip(p, 8, 64 - 9) for p in (y, x))
        visible = (abs(y[None] - rows[:, None]) <= 8) & (abs(x[None] - columns[:, None]) <= 8)
    else:
        distance = i[:, None] - i[None, :]
        visible = (distance >= 0) & (distance < parameters["kernel_size"][0])
    body = session(at.model(mechanism("NeighborhoodAttention"), parameters).SerializeToString())
    dense = session(masked_dense(at, visible))
    feeds = at.feeds()
    want, got = dense.run(None, feeds)[0], body.run(None, feeds)[0]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-6
    ratio = speedup(dense, body, feeds, rounds=3)
    with capsys.disabled():
        print(f"\n  {parameters['kernel_size']}: masked dense / body = {ratio:.1f}")
    assert ratio >= floor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "kernel", "floor"),
    [((64, 64), (17, 17), 1.05), ((64, 64), (33, 33), 1.05), ((13, 20, 24), (7, 11, 13), 1.25)],
    ids=str,
)
def test_a_ball_beats_its_box(grid, kernel, floor, case, capsys) -> None:
    """Tiles of a ball hold no corners: without that both take the same time."""
    at = case(queries=int(np.prod(grid)), heads=4, kv_heads=4, head_dim=64, value_dim=64, scale=0.125, static=True)
    both = [
        {"kernel_size": list(kernel), "grid": list(grid), "shape": shape, "border": border, "block": 64}
        for shape, border in (("box", "clamp"), ("ball", "truncate"))
    ]
    box, ball = (session(at.model(mechanism("NeighborhoodAttention"), p).SerializeToString()) for p in both)
    ratio = speedup(box, ball, at.feeds(), rounds=9)
    with capsys.disabled():
        print(f"\n  {kernel} of {grid}: box / ball = {ratio:.2f}")
    assert ratio >= floor
