"""``--target tensorrt`` without TensorRT: one line, exit code 2, and the portable outputs are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attncompile import env
from attncompile.cli import main
from attncompile.targets import base
from attncompile.targets import tensorrt as target
from tests.passes.attention_graphs import Spec, save
from tests.passes.attention_graphs import build as graph_of

SPEC = Spec(batch=1, heads=2, kv_heads=2, length=16, head_dim=16)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(graph_of(SPEC), tmp_path, "m.onnx")


@pytest.mark.parametrize("stub", [False, True], ids=["absent", "stub"])
def test_one_line_exit_2_and_the_portable_outputs(
    stub: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if stub:
        (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10 is missing')\n")
        monkeypatch.syspath_prepend(str(tmp_path))
    elif env.installed("tensorrt"):
        pytest.skip("TensorRT is here")
    out = tmp_path / "out"
    assert main([str(model), "--target", "tensorrt", "--out", str(out), "--quiet"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    if stub:
        wanted = "tensorrt is installed and does not load: libnvinfer.so.10 is missing (install its libraries)"
    else:
        wanted = "tensorrt is not installed (pip install 'attncompile[tensorrt]')"
    assert said == [f"error: target tensorrt: {wanted}"]
    assert (out / "model.onnx").read_bytes() == model.read_bytes()
    assert not list(out.glob("*.engine*"))
    report = json.loads((out / "report.json").read_text())
    assert report["exit_code"] == 2 and [t["name"] for t in report["targets"]] == ["onnx"]


def test_it_is_a_target_and_not_taken_by_default_without_a_gpu() -> None:
    assert base.get("tensorrt") is target.TARGET
    assert env.has_gpu() or env.default_target() != "tensorrt"
