"""Real TensorRT-RTX engines, built on the CPU in a process of their own. Nothing here executes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import BadArguments, MissingDependency, TargetError
from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.targets import engine
from attncompile.targets import tensorrt_rtx as rtx
from attncompile.targets.base import BuildResult
from attncompile.targets.legalise import drop_unit_axes

STATIC = ShapeProfile({})
Make = Callable[..., ModelProto]
AsModel = Callable[[ModelProto], Model]


@pytest.fixture
def needs_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def _build(proto: ModelProto, as_model: AsModel, folder: Path, profile: ShapeProfile = STATIC,
           precision: str | None = None) -> BuildResult:  # fmt: skip
    model = as_model(proto)
    lowered = rtx.TARGET.lower(proto, model, precision)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    return rtx.TARGET.build(lowered, model, profile, folder)


@pytest.mark.usefixtures("needs_rtx")
@pytest.mark.parametrize(
    ("dtype", "precision", "dim", "fused"),
    [
        (np.float16, None, 64, 1),
        (np.float32, "fp16", 64, 1),
        (np.float32, "bf16", 64, 1),
        (np.float32, None, 64, 0),
        (np.float16, None, 8, 0),
    ],
    ids=["fp16", "converted-fp16", "converted-bf16", "fp32", "fp16-d8"],
)
def test_static_engine(
    attention: Make, as_model: AsModel, tmp_path: Path, dtype: type, precision: str | None, dim: int, fused: int
) -> None:
    result = _build(attention(dtype, dim=dim), as_model, tmp_path / "out", STATIC, precision)
    assert result.engine == tmp_path / "out" / "model.engine"
    assert result.engine_size == result.engine.stat().st_size > 10_000
    assert (result.attention_layers, result.attention_fused) == (1, fused)
    assert any("mha" in layer.name for layer in result.layers) == bool(fused)
    assert result.seconds > 0
    assert not result.ran
    assert "not executed" in result.reason
    names = {"model.engine", "model.engine.json", "model.tensorrt-rtx.onnx", "network.py"}
    there = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {p.name for p in result.files} == there == names


@pytest.mark.usefixtures("needs_rtx")
def test_dynamic_engine_has_the_profile(attention: Make, as_model: AsModel, tmp_path: Path) -> None:
    profile = ShapeProfile({"N": Range(1, 100, 300)})
    result = _build(attention(np.float16, length="N"), as_model, tmp_path / "out", profile)
    assert result.attention_fused == 1
    lowered = onnx.load(tmp_path / "out" / "model.tensorrt-rtx.onnx")
    assert engine.shapes(lowered, profile) == {"x": [[1, 1, 256], [1, 100, 256], [1, 300, 256]]}


def test_dimension_without_a_range_is_named(attention: Make) -> None:
    with pytest.raises(BadArguments, match="dimension 'N' of input 'x'") as error:
        engine.shapes(attention(length="N"), STATIC)
    assert "--profile N=" in error.value.hint
    unnamed = attention()
    unnamed.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    assert engine.shapes(unnamed, ShapeProfile({"x:1": Range(2, 3, 4)}))["x"][2] == [1, 4, 256]


@pytest.mark.usefixtures("needs_rtx")
@pytest.mark.parametrize(("dtype", "fused"), [(np.float16, 1), (np.float32, 0)])
def test_standard_attention_op(as_model: AsModel, tmp_path: Path, dtype: type, fused: int) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    values = [helper.make_tensor_value_info(x, kind, [1, 4, 128, 64]) for x in "qkvy"]
    graph = helper.make_graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], "g", values[:3], values[3:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    result = _build(proto, as_model, tmp_path / "out")
    assert (result.attention_layers, result.attention_fused) == (1, fused)
    onnx.checker.check_model(onnx.load(tmp_path / "out" / "model.tensorrt-rtx.onnx"), full_check=True)


def _window_tail(as_output: str) -> ModelProto:
    """Blocked attention of [1, 4, 8 tiles, 64, 64] whose tiles are put together through a unit axis, then projected."""
    rng = np.random.default_rng(0)
    half = TensorProto.FLOAT16
    stored = {
        "wo": (rng.standard_normal((256, 256)) * 0.05).astype(np.float16),
        "apart": np.array([1, 4, 8, 1, 64, 64], np.int64), "together": np.array([0, -1, 4, 64], np.int64),
        "flat": np.array([1, 512, 256], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 2, 4, 3]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1), helper.make_node("MatMul", ["p", "v"], ["o"]),
        helper.make_node("Reshape", ["o", "apart"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", ["t", "together"], ["b"]), helper.make_node("Reshape", ["b", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "wo"], [as_output]),
    ]  # fmt: skip
    tiles = {"q": 64, "k": 128, "v": 128}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, half, [1, 4, 8, rows, 64]) for n, rows in tiles.items()],
        [helper.make_tensor_value_info(as_output, half, [1, 512, 256])],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.usefixtures("needs_rtx")
def test_transpose_through_a_unit_axis_builds(as_model: AsModel, tmp_path: Path) -> None:
    """It fails with "Inconsistent strides" as it stands."""
    result = _build(_window_tail("y"), as_model, tmp_path / "out")
    assert result.attention_fused == 1


def test_dropping_a_unit_axis_changes_nothing() -> None:
    ort = pytest.importorskip("onnxruntime")
    proto = _window_tail("y")
    changed = ModelProto()
    changed.CopyFrom(proto)
    assert drop_unit_axes(changed) == 1
    assert drop_unit_axes(changed) == 0
    onnx.checker.check_model(changed, full_check=True)
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal((1, 4, 8, r, 64)).astype(np.float16) for n, r in (("q", 64), ("k", 128), ("v", 128))}
    got, want = (ort.InferenceSession(m.SerializeToString()).run(None, feed)[0] for m in (changed, proto))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("apart", "together"), [([1, 0, 8, 1, 0, 64], [0, -1, 4, 64]), ([1, 4, 8, 1, 64, 64], [1, -1, 0, 0, 0, 64])]
)
def test_unit_axis_in_front_of_a_copied_dimension_stays(apart: list[int], together: list[int]) -> None:
    proto = _window_tail("y")
    for tensor in proto.graph.initializer:
        if tensor.name in ("apart", "together"):
            data = apart if tensor.name == "apart" else together
            tensor.CopyFrom(numpy_helper.from_array(np.array(data, np.int64), tensor.name))
    before = proto.SerializeToString()
    assert drop_unit_axes(proto) == 0
    assert proto.SerializeToString() == before


def _foreign(inside_branch: bool) -> ModelProto:
    node = helper.make_node(
        "FancyAttention", ["x"], ["z" if inside_branch else "y"], domain="com.example", name="fancy"
    )
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    nodes = [node]
    if inside_branch:
        out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])]
        other = helper.make_node("Identity", ["x"], ["z"])
        branches = {"then_branch": helper.make_graph([node], "then", [], out),
                    "else_branch": helper.make_graph([other], "else", [], out)}  # fmt: skip
        nodes = [helper.make_node("If", ["c"], ["y"], **branches)]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [value]), opset_imports=imports, ir_version=10)


@pytest.mark.parametrize("inside_branch", [False, True])
def test_foreign_op_is_refused_before_parsing(
    as_model: AsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside_branch: bool
) -> None:
    monkeypatch.setattr(engine, "run_worker", lambda *_: pytest.fail("the parser was started"))
    monkeypatch.setattr(rtx.TARGET.__class__, "available", lambda self: rtx.Verdict.yes())
    proto = _foreign(inside_branch)
    model = as_model(proto)
    verdict = rtx.TARGET.supports(proto)
    assert (verdict.ok, verdict.code) == (False, "foreign_op")
    for call in (
        lambda: rtx.TARGET.lower(proto, model),
        lambda: rtx.TARGET.build(proto, model, STATIC, tmp_path),
    ):
        with pytest.raises(TargetError) as error:
            call()
        assert "'fancy' is com.example::FancyAttention" in error.value.message
        assert error.value.hint


def test_unknown_standard_op_is_refused() -> None:
    graph = helper.make_graph([helper.make_node("Attention", ["x"], ["y"], name="a")], "g", [], [])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert "'a' is ai.onnx::Attention" in rtx.TARGET.supports(proto).reason


def test_bodies_are_inlined(as_model: AsModel) -> None:
    imports = [helper.make_opsetid("", 18)]
    body = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Neg", ["t"], ["b"])]
    function = helper.make_function("attncompile", "F", ["a"], ["b"], body, imports, overload="h1")
    calls = [
        helper.make_node("F", ["x"], ["m"], domain="attncompile", overload="h1", name="same"),
        helper.make_node("F", ["m"], ["y"], domain="attncompile", overload="h1", name="same"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    graph = helper.make_graph(calls, "g", values[:1], values[1:])
    proto = helper.make_model(
        graph, functions=[function], opset_imports=[*imports, helper.make_opsetid("attncompile", 1)], ir_version=10
    )
    lowered = rtx.TARGET.lower(proto, as_model(proto))
    assert [n.op_type for n in lowered.graph.node] == ["Relu", "Neg", "Relu", "Neg"]
    assert len({n.name for n in lowered.graph.node}) == 4
    assert [o.domain for o in lowered.opset_import] == [""]
    assert len(proto.functions) == 1


@pytest.mark.usefixtures("needs_rtx")
def test_parser_error_names_the_node(as_model: AsModel, tmp_path: Path) -> None:
    """A standard op that TensorRT-RTX does not take."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["d"], name="determinant"),
                               helper.make_node("Mul", ["x", "d"], ["y"])], "g", values[:1], values[1:])  # fmt: skip
    with pytest.raises(TargetError, match=r"cannot parse the model at node 'determinant' \(Det\)") as error:
        _build(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            as_model,
            tmp_path / "o",
        )
    assert error.value.hint
    assert not (tmp_path / "o" / "model.engine").exists()


@pytest.mark.usefixtures("needs_rtx")
def test_process_that_crashes_is_an_error_and_not_a_crash(
    attention: Make, as_model: AsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for tensorrt_rtx that aborts, as the real parser does on some graphs."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "tensorrt_rtx.py").write_text(
        "import os, sys\nsys.stderr.write('terminate called: bad graph\\n'); sys.stderr.flush(); os.abort()\n"
    )
    # The worker puts the project first and this after it; the real package comes after both.
    monkeypatch.setenv("PYTHONPATH", str(fake))
    with pytest.raises(TargetError, match=r"crashed \(SIGABRT\): terminate called: bad graph"):
        _build(attention(np.float16), as_model, tmp_path / "out")


@pytest.mark.usefixtures("needs_rtx")
def test_build_that_takes_too_long_is_stopped(
    attention: Make, as_model: AsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "tensorrt_rtx.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(fake))
    proto = attention(np.float16)
    model = as_model(proto)
    with pytest.raises(TargetError, match="did not finish within 1 s"):
        rtx.TARGET.build(rtx.TARGET.lower(proto, model), model, STATIC, tmp_path, timeout=1)


def test_engine_cannot_be_opened_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, word in (([], "no CUDA GPU"), ([90], "compute capability 9.0")):
        monkeypatch.setattr(engine, "capabilities", lambda found=capabilities: found)
        assert word in rtx.TARGET.can_run().reason
        with pytest.raises(TargetError, match="cannot be loaded here"):
            rtx.TARGET.open(tmp_path)
    monkeypatch.setattr(engine, "capabilities", lambda: [90, 120])
    assert rtx.TARGET.can_run().ok


def test_missing_package(attention: Make, as_model: AsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = attention()
    model = as_model(proto)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependency) as error:
        rtx.TARGET.build(proto, model, STATIC, tmp_path)
    assert "pip install 'attncompile[rtx]'" in error.value.hint


def test_large_models_are_saved_with_data_beside_them(
    attention: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_INLINE_LIMIT", 1000)
    proto = attention()
    before = proto.SerializeToString()
    files = engine.save(proto, tmp_path / "m.onnx")
    assert [f.name for f in files] == ["m.onnx", "m.onnx.data"]
    assert proto.SerializeToString() == before
    again = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    for tensor in proto.graph.initializer:
        np.testing.assert_array_equal(again[tensor.name], numpy_helper.to_array(tensor))


@pytest.mark.usefixtures("needs_rtx")
def test_external_weights_are_found_beside_the_model(as_model: AsModel, attention: Make, tmp_path: Path) -> None:
    """The engine of a model with external data has the weights in it."""
    inline = _build(attention(np.float16), as_model, tmp_path / "inline")
    folder = tmp_path / "out"
    folder.mkdir()
    proto = attention(np.float16)
    onnx.save(proto, tmp_path / "x.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    (folder / "w.data").write_bytes((tmp_path / "w.data").read_bytes())
    external = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    assert any(t.data_location == TensorProto.EXTERNAL for t in external.graph.initializer)
    model = as_model(external)
    result = rtx.TARGET.build(rtx.TARGET.lower(external, model), model, STATIC, folder)
    assert result.attention_fused == 1
    assert result.engine_size is not None
    assert inline.engine_size is not None
    assert abs(result.engine_size - inline.engine_size) < 4096


@pytest.mark.usefixtures("needs_rtx")
@pytest.mark.parametrize("name", ["vit", "dit", "mistral"])
def test_engines_of_exported_models(name: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    """ViT, DiT and Mistral, converted to fp16: every attention is one kernel."""
    path = exported(name)
    proto = onnx.load(path)
    model = Model(path=path, proto=proto, hash="", opset=18)
    lowered = rtx.TARGET.lower(proto, model, "fp16")
    result = rtx.TARGET.build(lowered, model, STATIC, tmp_path)
    assert result.attention_layers == sum(n.op_type == "Softmax" for n in proto.graph.node) > 0
    assert result.attention_fused == result.attention_layers
    json.dumps([layer.nodes for layer in result.layers])
