"""fp16 and bf16 conversion: correctly typed, accurate, masks still masks, positions still positions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import TargetError
from attncompile.targets import graph as g
from attncompile.targets import precision
from attncompile.targets.precision import to_bf16, to_fp16

BUDGET = 1e-2
OPSET = [helper.make_opsetid("", 18)]


def _run(proto: ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)


def _error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


def _types(proto: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    found = {}
    for graph in g.graphs(inferred.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            found[info.name] = info.type.tensor_type.elem_type
        found.update({t.name: t.data_type for t in graph.initializer})
    return found


def _computes_in(proto: ModelProto, op_type: str) -> set[int]:
    """Element types of the first inputs of all nodes of this type."""
    types = _types(proto)
    return {types[n.input[0]] for graph in g.graphs(proto.graph) for n in graph.node if n.op_type == op_type}


def _model(nodes: list[onnx.NodeProto], inputs: dict[str, list[int | str]], output: str, shape: list[int | str],
           stored: dict[str, np.ndarray], kind: int = TensorProto.FLOAT, **more: object) -> ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10, **more)


def test_attention_in_fp16(attention: Callable[..., ModelProto]) -> None:
    proto = attention(mask=-np.inf)
    before = proto.SerializeToString()
    half = to_fp16(proto, Path())
    assert proto.SerializeToString() == before, "the original was changed"
    assert _computes_in(half, "Softmax") == {TensorProto.FLOAT16}
    assert _computes_in(half, "MatMul") == {TensorProto.FLOAT16}
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    feed = {"x": np.random.default_rng(1).standard_normal((1, 128, 256)).astype(np.float32)}
    error = _error(_run(half, feed)[0], _run(proto, feed)[0])
    assert 0 < error < BUDGET


def test_inputs_and_outputs_can_be_converted_too(attention: Callable[..., ModelProto]) -> None:
    half = to_fp16(attention(), Path(), keep_io_types=False)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert not [n for n in half.graph.node if n.op_type == "Cast"]


@pytest.mark.parametrize("mask", [-np.inf, float(np.finfo(np.float32).min), -1e9, -1e4])
def test_masked_stays_masked(attention: Callable[..., ModelProto], mask: float) -> None:
    proto = attention(mask=mask)
    half = to_fp16(proto, Path())
    stored = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}["mask"]
    assert not np.isnan(stored).any()
    assert np.isneginf(stored).any() == np.isneginf(mask)
    feed = {"x": np.random.default_rng(1).standard_normal((1, 128, 256)).astype(np.float32)}
    changed = {"x": feed["x"].copy()}
    changed["x"][:, 64:] += 1
    first, second = _run(half, feed)[0], _run(half, changed)[0]
    np.testing.assert_array_equal(first[:, :64], second[:, :64], err_msg="a masked key was seen")
    assert _error(first, _run(proto, feed)[0]) < BUDGET


def test_two_masks_add_up_to_a_finite_number() -> None:
    least = np.full((1, 8), np.finfo(np.float32).min, np.float32)
    nodes = [
        helper.make_node("Add", ["x", "a"], ["t"]), helper.make_node("Add", ["t", "b"], ["u"]),
        helper.make_node("Softmax", ["u"], ["y"]),
    ]  # fmt: skip
    half = to_fp16(_model(nodes, {"x": [1, 8]}, "y", [1, 8], {"a": least, "b": least}), Path())
    assert np.isfinite(_run(half, {"x": np.zeros((1, 8), np.float32)})[0]).all()


def test_angles_of_positions_are_computed_in_float32() -> None:
    # 3,001 is no fp16 number, and the angle of the fastest frequency would be off by a radian.
    nodes = [
        helper.make_node("Cast", ["positions"], ["p"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["p", "frequencies"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["c"]),
        helper.make_node("Sin", ["angle"], ["s"]),
        helper.make_node("Add", ["c", "s"], ["y"]),
    ]
    frequencies = (10000.0 ** -(np.arange(32) / 32)).astype(np.float32)
    proto = _model(nodes, {"positions": ["N", 1]}, "y", ["N", 32], {"frequencies": frequencies}, TensorProto.INT64)
    half = to_fp16(proto, Path())
    assert _computes_in(half, "Cos") == {TensorProto.FLOAT}
    assert _computes_in(half, "Add") == {TensorProto.FLOAT16}
    feed = {"positions": np.array([[3001], [8191], [131071]], np.int64)}
    assert np.abs(_run(half, feed)[0] - _run(proto, feed)[0]).max() < 3e-3
    # No fp16 value anywhere between the integer and the cosine.
    types = _types(half)
    maker = {o: n for n in half.graph.node for o in n.output}
    cos = next(n for n in half.graph.node if n.op_type == "Cos")
    chain = [cos.input[0]]
    while chain[-1] in maker:
        chain.append(maker[chain[-1]].input[0])
    assert TensorProto.FLOAT16 not in {types[v] for v in chain}


def test_norm_of_large_activations_does_not_overflow() -> None:
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["sq"]), helper.make_node("ReduceMean", ["sq", "axis"], ["m"]),
        helper.make_node("Add", ["m", "eps"], ["me"]), helper.make_node("Sqrt", ["me"], ["root"]),
        helper.make_node("Div", ["one", "root"], ["r"]), helper.make_node("Mul", ["x", "r"], ["n"]),
        helper.make_node("Mul", ["n", "gain"], ["y"]),
    ]  # fmt: skip
    stored = {
        "two": np.array(2, np.float32), "axis": np.array([-1], np.int64), "eps": np.array(1e-6, np.float32),
        "one": np.array(1, np.float32), "gain": np.ones(64, np.float32),
    }  # fmt: skip
    proto = _model(nodes, {"x": [4, 64]}, "y", [4, 64], stored)
    half = to_fp16(proto, Path())
    feed = {"x": (np.random.default_rng(0).standard_normal((4, 64)) * [[2000], [1], [1e-3], [30]]).astype(np.float32)}
    got, want = _run(half, feed)[0], _run(proto, feed)[0]
    assert [_error(a, b) for a, b in zip(got, want, strict=True)] == pytest.approx([0] * 4, abs=1.5e-3)
    types = _types(half)
    eps = next(n for n in half.graph.node if n.op_type == "Add")
    assert {types[v] for v in eps.input} == {TensorProto.FLOAT}


@pytest.mark.parametrize("convert", [to_fp16, to_bf16])
def test_bodies_and_branches_are_converted(convert: Callable[..., ModelProto]) -> None:
    """A function whose body has an If, with float32-only ops inside the branches."""
    branches = {}
    for name, op in (("then_branch", "ReduceMean"), ("else_branch", "ReduceSum")):
        inner = [
            helper.make_node("Mul", ["a", f"{name}_c"], [f"{name}_m"]),
            helper.make_node(op, [f"{name}_m", f"{name}_axis"], [f"{name}_r"], keepdims=1),
            helper.make_node("Sub", ["a", f"{name}_r"], [f"{name}_o"]),
        ]
        stored = [
            numpy_helper.from_array(np.array([3.0], np.float32), f"{name}_c"),
            numpy_helper.from_array(np.array([-1], np.int64), f"{name}_axis"),
        ]
        out = [helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, None)]
        branches[name] = helper.make_graph(inner, name, [], out, stored)
    body = [
        helper.make_node("Shape", ["a"], ["shape"]), helper.make_node("Size", ["a"], ["size"]),
        helper.make_node("Constant", [], ["limit"], value_int=100),
        helper.make_node("Constant", [], ["shift"], value_float=0.5),
        helper.make_node("Less", ["size", "limit"], ["small"]),
        helper.make_node("If", ["small"], ["i"], **branches), helper.make_node("Add", ["i", "shift"], ["b"]),
    ]  # fmt: skip
    function = helper.make_function("attncompile", "F", ["a"], ["b"], body, OPSET)
    calls = [
        helper.make_node("F", ["x"], ["t"], domain="attncompile"),
        helper.make_node("F", ["t"], ["y"], domain="attncompile"),
    ]
    proto = _model(calls, {"x": ["N", 16]}, "y", ["N", 16], {}, functions=[function])
    proto.opset_import.append(helper.make_opsetid("attncompile", 1))
    low = convert(proto, Path())
    onnx.checker.check_model(low, full_check=True)
    assert not low.functions
    kind = TensorProto.FLOAT16 if convert is to_fp16 else TensorProto.BFLOAT16
    assert _computes_in(low, "Mul") == {kind}
    assert _computes_in(low, "ReduceSum") == _computes_in(low, "ReduceMean") == {TensorProto.FLOAT}
    if convert is to_fp16:
        for rows in (2, 20):
            feed = {"x": np.random.default_rng(0).standard_normal((rows, 16)).astype(np.float32)}
            assert _error(_run(low, feed)[0], _run(proto, feed)[0]) < BUDGET


def test_bf16_keeps_the_range_of_float32(attention: Callable[..., ModelProto]) -> None:
    """Constants are rounded from the original: through fp16 1e30 would become 32,752 and 1e-30 a subnormal."""
    proto = attention(mask=float(np.finfo(np.float32).min))
    proto.graph.node.append(helper.make_node("Mul", ["y", "big"], ["z"], name="last"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1e30] * 255 + [1e-30], np.float32), "big"))
    proto.graph.output[0].name = "z"
    low = to_bf16(proto, Path())
    stored = {t.name: t for t in low.graph.initializer}
    assert stored["wq"].data_type == stored["big"].data_type == TensorProto.BFLOAT16
    big = numpy_helper.to_array(stored["big"]).astype(np.float64)
    np.testing.assert_allclose(big, [1e30] * 255 + [1e-30], rtol=4e-3)
    mask = numpy_helper.to_array(stored["mask"]).astype(np.float64)
    assert np.isfinite(mask).all()
    assert mask.min() < -1e38
    wq = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}["wq"]
    assert _error(numpy_helper.to_array(stored["wq"]).astype(np.float64), wq) < 3e-3


def test_bf16_needs_opset_13_and_float32(attention: Callable[..., ModelProto]) -> None:
    old = _model([helper.make_node("Relu", ["x"], ["y"])], {"x": [2, 2]}, "y", [2, 2], {})
    old.opset_import[0].version = 11
    with pytest.raises(TargetError, match="opset 11"):
        to_bf16(old, Path())
    with pytest.raises(TargetError, match="fp16 tensors already"):
        to_bf16(attention(np.float16), Path())


def test_op_without_bf16_stays_in_float32() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 3, 4, 4)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], strides=[4, 4]), helper.make_node("Relu", ["c"], ["y"])]
    low = to_bf16(_model(nodes, {"x": [1, 3, 16, 16]}, "y", [1, 8, 4, 4], {"w": weight}), Path())
    assert _computes_in(low, "Conv") == {TensorProto.FLOAT}
    assert _computes_in(low, "Relu") == {TensorProto.BFLOAT16}


def test_external_weights_are_read_for_the_conversion(
    external_tensor: Callable[..., TensorProto], tmp_path: Path
) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    (tmp_path / "w.bin").write_bytes(bytes(128) + weight.tobytes())
    proto = _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 16]}, "y", [1, 16], {})
    proto.graph.initializer.append(external_tensor("w", [16, 16], "w.bin", 128))
    half = to_fp16(proto, tmp_path)
    assert half.graph.initializer[0].data_location == TensorProto.DEFAULT
    np.testing.assert_array_equal(numpy_helper.to_array(half.graph.initializer[0]), weight.astype(np.float16))
    assert proto.graph.initializer[0].data_location == TensorProto.EXTERNAL


def test_too_many_weights_are_refused_before_they_are_read(
    external_tensor: Callable[..., TensorProto], tmp_path: Path
) -> None:
    proto = _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 65536]}, "y", [1, 65536], {})
    proto.graph.initializer.append(external_tensor("w", [65536, 65536], "absent.bin", 0))
    with pytest.raises(TargetError, match=r"16\.0 GiB"):
        to_fp16(proto, tmp_path)


def test_importing_the_tool_leaves_the_path_alone() -> None:
    code = (
        "import sys; from attncompile.targets import precision; before = list(sys.path); precision._tool(); "
        "assert sys.path == before; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_op_kept_in_float32_has_a_reason() -> None:
    assert all(reason for reason in precision.KEPT_FLOAT32.values())
    assert all(onnx.defs.has(op) for op in precision.KEPT_FLOAT32)


@pytest.mark.parametrize("name", ["vit", "dit", "mistral"])
def test_parity_of_exported_models(name: str, exported: Callable[[str], Path]) -> None:
    """Exported ViT, DiT and Mistral: typed, and within the fp16 budget of the float32 original."""
    path = exported(name)
    proto = onnx.load(path)
    rng = np.random.default_rng(0)
    feed = {}
    for info in proto.graph.input:
        shape = [d.dim_value or 1 for d in info.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        data = rng.standard_normal(shape) if dtype == np.float32 else rng.integers(0, 9, shape)
        feed[info.name] = data.astype(dtype)
    half = to_fp16(proto, path.parent)
    for got, want in zip(_run(half, feed), _run(proto, feed), strict=True):
        assert 0 < _error(got, want) < BUDGET
    to_bf16(proto, path.parent)
