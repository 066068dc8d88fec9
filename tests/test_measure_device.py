"""Timing with inputs and outputs that stay on a device; ONNX Runtime's CPU stands in for it where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile import measure
from attncompile.cli import main
from attncompile.measure_device import OnDevice


@pytest.fixture
def model(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "exp", [x], [y])
    path = tmp_path / "exp.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )
    return path


def test_outputs_of_each_feed(model: Path) -> None:
    """Two feeds in turn: each gives its own output, also the second time."""
    session = OnDevice(ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]), "cpu")
    feeds = [{"x": np.full((n, 3), n, np.float32)} for n in (2, 5)]
    for feed in (*feeds, *feeds):
        (found,) = session.run(None, feed)
        np.testing.assert_allclose(found.numpy(), np.exp(feed["x"]), rtol=1e-6)
    timing = measure.paired(session, session, feeds, rounds=6)
    assert timing.rounds == 6 and timing.ours > 0


def test_without_a_gpu_one_line_says_so(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("has the CUDA provider")
    assert main(["bench", str(model), str(model), "--profile", "n=4", "--device", "cuda"]) == 2
    assert "error: this onnxruntime has no CUDA provider" in capfd.readouterr().err


def test_a_device_that_is_not_known(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model), str(model), "--device", "tpu"]) == 2
    assert "--device" in capfd.readouterr().err
