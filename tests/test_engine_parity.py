"""Engines that run here are compared with ``model.onnx``; a double stands for Polygraphy's runner of engines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile import engine_profile, outputs
from attncompile.core.errors import GateFailed
from attncompile.engine_profile import EngineLayerTime
from attncompile.targets.base import BuildResult
from attncompile.targets.engine import METADATA
from attncompile.targets.tensorrt import TensorRT
from attncompile.verification import runners


def model(folder: Path) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return proto


def runner(error: float) -> Any:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Double(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata().add("x", np.float32, (4, 8))

        def infer_impl(self, feed_dict: Any) -> Any:
            self.inference_time = 0.0
            return {"y": np.maximum(feed_dict["x"], 0) * np.float32(1 + error)}

    return lambda path, name: Double(name=name)


@pytest.mark.parametrize(("error", "passes"), [(1e-3, True), (0.1, False), (float("nan"), False)])
def test_an_engine_is_compared(error: float, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = SimpleNamespace(model=SimpleNamespace(proto=model(tmp_path), path=tmp_path / "in.onnx"))
    result = BuildResult("tensorrt", (), 0.0, engine=tmp_path / "model.engine")
    (tmp_path / METADATA).write_text(json.dumps({"module": "tensorrt", "plugins": {"attn": "Attention_0"}}))
    layers = (EngineLayerTime("gemm", 30.0), EngineLayerTime("attn", 10.0, True))
    monkeypatch.setattr(engine_profile, "profile", lambda *_: layers)
    monkeypatch.setattr(runners, "_engine_runner", runner(error))
    feeds = [{"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}]
    if not passes:
        with pytest.raises(GateFailed, match=r"the engine is too far from model\.onnx"):
            outputs._parity(found, TensorRT(), result, feeds, None, onnx.ModelProto())
        return
    compared, times = outputs._parity(found, TensorRT(), result, feeds, None, onnx.ModelProto())
    assert "relative L2 1.0e-03" in compared
    assert times == "2 layers take 0.040 ms, our plugins 0.010 ms of it: model.layers.json"
    written = json.loads((tmp_path / "model.layers.json").read_text())
    assert written[1] == {"name": "attn", "microseconds": 10.0, "plugin": True}
