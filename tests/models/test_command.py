"""``python -m attncompile.models``: stdout is data, errors are two lines and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from attncompile.models import NAMES
from attncompile.models.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attncompile.models", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_list_names_every_recipe() -> None:
    done = run("--list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(NAMES)
    assert all(line.strip().startswith("sizes: ") for line in lines[1::2])


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_export_prints_the_path_and_nothing_else(exporter: str, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    done = run("mistral", "--out", str(out), "--exporter", exporter, "--tokens", "40", "--window", "8", "--layers", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    model = onnx.load(out)
    onnx.checker.check_model(model)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [1, 40, 128]
    assert sum(node.op_type == "Softmax" for node in model.graph.node) == 1


def test_dynamic_leaves_all_axes_or_those_named_symbolic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.onnx"
    for argument, wanted in [(["--dynamic"], ["batch", "sequence"]), (["--dynamic", "sequence"], [1, "sequence"])]:
        assert main(["gpt2", "--out", str(out), "--exporter", "torchscript", *argument]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        dims = onnx.load(out).graph.input[0].type.tensor_type.shape.dim
        assert [dim.dim_param or dim.dim_value for dim in dims] == wanted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no recipe given"),
        (["vit"], "nothing to write"),
        (["nosuch", "--out", "x.onnx"], "no recipe is called 'nosuch'"),
        (["vit", "--out", "x.onnx", "--opset", "12"], "writes opsets 18 to"),
        (["vit", "--out", "x.onnx", "--exporter", "other"], "no exporter is called 'other'"),
        (["vit", "--out", "no/such/folder/x.onnx"], "is not a folder"),
        (["vit", "--wrong"], "unrecognized arguments"),
        (["vit", "--out", "x.onnx", "--tokens", "many"], "invalid int value"),
    ],
)
def test_errors_are_two_lines(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    streams = capsys.readouterr()
    first, second = streams.err.splitlines()
    assert streams.out == ""
    assert first.startswith("error: ")
    assert words in first
    assert second.startswith("hint: ")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["dit", "--out", "x.onnx"]) == 2
    assert "needs diffusers" in capsys.readouterr().err
