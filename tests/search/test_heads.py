"""What a search reads of a site beside its operands: the matrix that its output is multiplied by; and the models that
it writes by the dozen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import World
from attncompile.passes.index import GraphIndex
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from attncompile.search.heads import projection
from attncompile.search.slim import WEIGHTS, SlimModel
from tests.search import constructed

HEADS, DIM, TOKENS = 3, 5, 11
WIDTH = HEADS * DIM


def model(way: str) -> onnx.ModelProto:
    """x [2, N, C] to attention and its projection, which is written in this ``way``."""
    rng = np.random.default_rng(0)
    stored = {n: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for n in ("q", "k", "v", "o")}
    numbers = {"split": [2, TOKENS, HEADS, DIM], "join": [2, TOKENS, WIDTH], "flat": [2 * TOKENS, WIDTH],
               "tokens": [2, HEADS, TOKENS * DIM], "odd": [2, TOKENS * DIM, HEADS]}  # fmt: skip
    nodes = []
    for n in "qkv":
        nodes += [("MatMul", ["x", n], f"{n}0", {}), ("Reshape", [f"{n}0", "split"], f"{n}1", {})]
        nodes += [("Transpose", [f"{n}1"], f"{n}2", {"perm": [0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]})]
    nodes += [
        ("MatMul", ["q2", "k2"], "s", {}),
        ("Softmax", ["s"], "p", {"axis": -1}),
        ("MatMul", ["p", "v2"], "a", {}),
    ]
    perm = {"interleaved": [0, 2, 3, 1]}.get(way, [0, 2, 1, 3])
    nodes += [("Transpose", ["a"], "b", {"perm": perm})]
    if way == "mixed":  # elements of several tokens in one row
        nodes[-1] = ("Transpose", ["a"], "b", {"perm": [0, 1, 3, 2]})
    nodes += [("Reshape", ["b", "flat" if way == "gemm" else "join"], "c", {})]
    product = ("Gemm", ["c", "o"], "y", {"transB": 1}) if way == "gemm" else ("MatMul", ["c", "o"], "y", {})
    if way == "none":
        product = ("Relu", ["c"], "y", {})
    nodes.append(product)
    tensors = [numpy_helper.from_array(v, n) for n, v in stored.items()]
    tensors += [numpy_helper.from_array(np.array(v), n) for n, v in numbers.items()]
    made = [helper.make_node(op, inputs, [out], **given) for op, inputs, out, given in nodes]
    shapes = {"x": [2, TOKENS, WIDTH], "y": [2 * TOKENS, WIDTH] if way == "gemm" else [2, TOKENS, WIDTH]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph(made, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def read(proto: onnx.ModelProto, folder: Path) -> tuple[AttentionSite, World]:
    onnx.save(proto, folder / "m.onnx")
    model = load(folder / "m.onnx")
    (site,) = detect(model, profile_for(model, {})).sites
    return site, World(GraphIndex(model), {})


@pytest.mark.parametrize("way", ["plain", "gemm", "interleaved"])
def test_projection_is_of_each_heads_rows(way: str, tmp_path: Path) -> None:
    """|x W| = |x M|: what a change of one head's output becomes behind the product, by running the graph's tail."""
    proto = model(way)
    site, world = read(proto, tmp_path)
    found = projection(site, world)
    assert found is not None and found.shape == (HEADS, DIM, DIM)
    from onnx.reference import ReferenceEvaluator

    tail = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(proto)).extract_model(["a"], ["y"])
    rng = np.random.default_rng(1)
    for head in range(HEADS):
        a = np.zeros((2, HEADS, TOKENS, DIM), np.float32)
        a[:, head] = rng.standard_normal((2, TOKENS, DIM))
        (out,) = ReferenceEvaluator(tail).run(None, {"a": a})
        want = np.linalg.norm(np.asarray(out).reshape(2, TOKENS, -1), axis=-1)
        np.testing.assert_allclose(np.linalg.norm(a[:, head] @ found[head], axis=-1), want, rtol=1e-4)


@pytest.mark.parametrize("way", ["mixed", "none"])
def test_no_projection(way: str, tmp_path: Path) -> None:
    assert projection(*read(model(way), tmp_path)) is None


def test_slim_models_share_one_file_of_weights(tmp_path: Path) -> None:
    """Aligned to pages, so that processes map it; the same outputs; written anew over one from before."""
    import onnxruntime as ort

    proto = constructed.build(96, 1)
    onnx.save(proto, tmp_path / "m.onnx")
    slim = tmp_path / "slim"
    slim.mkdir()
    (slim / WEIGHTS).write_bytes(b"left over" * 1000)
    path = SlimModel(load(tmp_path / "m.onnx"), slim).write([])
    written = onnx.load(path, load_external_data=False)
    large = {t.name for t in proto.graph.initializer if len(t.raw_data) >= 1024}
    outside = {t.name: {e.key: e.value for e in t.external_data} for t in written.graph.initializer if t.external_data}
    assert set(outside) == large and len(large) > 4
    assert all(int(e["offset"]) % 4096 == 0 and e["location"] == WEIGHTS for e in outside.values())
    ends = [int(e["offset"]) + int(e["length"]) for e in outside.values()]
    assert max(ends) == (slim / WEIGHTS).stat().st_size
    feed = constructed.feeds(1, 96)[0]
    first, second = (ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feed)[0]
                     for p in (tmp_path / "m.onnx", path))  # fmt: skip
    np.testing.assert_array_equal(first, second)
