"""The portable file: byte-identical where nothing was replaced, external data beside it under its own name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import BadArguments, MissingDependency, TargetError
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.verdict import Verdict
from attncompile.targets import base
from attncompile.targets import onnx as portable

AsModel = Callable[..., Model]


def _with_external(external_tensor: Callable[..., TensorProto], folder: Path) -> ModelProto:
    folder.mkdir(parents=True)
    data = np.arange(16, dtype=np.float32).reshape(4, 4)
    (folder / "sub").mkdir()
    (folder / "sub" / "weights.bin").write_bytes(bytes(64) + data.tobytes())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [external_tensor("w", [4, 4], "sub/weights.bin", 64)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_unchanged_model_is_byte_identical(
    attention: Callable[..., ModelProto], as_model: AsModel, tmp_path: Path
) -> None:
    model = as_model(attention())
    # A field that protobuf does not know survives a copy of bytes only.
    model.path.write_bytes(model.path.read_bytes() + b"\xfa\x3f\x03abc")
    out = tmp_path / "out"
    out.mkdir()
    written = portable.write(model.proto, model, out)
    assert written == out / "model.onnx"
    assert written.read_bytes() == model.path.read_bytes()


def test_external_data_keeps_its_place_and_runs(
    external_tensor: Callable[..., TensorProto], as_model: AsModel, tmp_path: Path
) -> None:
    proto = _with_external(external_tensor, tmp_path / "input")
    model = as_model(proto, ("sub/weights.bin",))
    changed = ModelProto()
    changed.CopyFrom(proto)
    changed.graph.node.append(helper.make_node("Add", ["y", "one"], ["z"]))
    changed.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "one"))
    changed.graph.output[0].name = "z"
    out = tmp_path / "out"
    out.mkdir()
    path = portable.write(changed, model, out)
    assert (out / "sub" / "weights.bin").read_bytes() == (tmp_path / "input" / "sub" / "weights.bin").read_bytes()
    stored = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    assert stored["w"].data_location == TensorProto.EXTERNAL
    assert stored["one"].data_location == TensorProto.DEFAULT
    got = ort.InferenceSession(str(path)).run(None, {"x": np.eye(4, dtype=np.float32)[:1]})[0]
    np.testing.assert_array_equal(got, [[1, 2, 3, 4]])


def test_second_write_does_not_copy_the_weights_again(
    external_tensor: Callable[..., TensorProto], as_model: AsModel, tmp_path: Path
) -> None:
    model = as_model(_with_external(external_tensor, tmp_path / "input"), ("sub/weights.bin",))
    out = tmp_path / "out"
    out.mkdir()
    portable.write(model.proto, model, out)
    first = (out / "sub" / "weights.bin").stat().st_ino
    portable.write(model.proto, model, out)
    assert (out / "sub" / "weights.bin").stat().st_ino == first
    model.external_files[0].path.write_bytes(bytes(128))
    portable.write(model.proto, model, out)
    assert (out / "sub" / "weights.bin").read_bytes() == bytes(128)


def test_external_data_called_like_the_model_is_refused(
    external_tensor: Callable[..., TensorProto], as_model: AsModel, tmp_path: Path
) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "model.onnx").write_bytes(bytes(64))
    graph = helper.make_graph([], "g", [], [], [external_tensor("w", [4, 4], "model.onnx", 0)])
    model = as_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), ("model.onnx",))
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetError, match=r"itself called model\.onnx"):
        portable.write(model.proto, model, tmp_path / "out")


def test_build_and_open(attention: Callable[..., ModelProto], as_model: AsModel, tmp_path: Path) -> None:
    model = as_model(attention())
    target = base.get("onnx")
    lowered = target.lower(model.proto, model)
    result = target.build(lowered, model, ShapeProfile({}), tmp_path)
    assert result.files == (tmp_path / "model.onnx",)
    assert result.attention_layers is None
    assert target.open(tmp_path).run(None, {"x": np.zeros((1, 128, 256), np.float32)})[0].shape == (1, 128, 256)


def test_registry() -> None:
    assert base.names() == ("onnx", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt")
    with pytest.raises(BadArguments, match="no target 'tensorrt9'"):
        base.get("tensorrt9")
    for name in base.names():
        assert base.get(name).name == name
        assert isinstance(base.get(name).available(), Verdict)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependency) as error:
        base.require(base.get("tensorrt-rtx"))
    assert "attncompile[rtx]" in error.value.hint
