"""What is at hand, with drivers and packages that are there, missing or broken."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attncompile import env


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    env.cuda.cache_clear()
    yield
    env.cuda.cache_clear()


def _module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setitem(sys.modules, name, sys)  # so that what the test imports is forgotten afterwards
    del sys.modules[name]
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what this machine may have."""
    real = env.installed
    monkeypatch.setattr(env, "installed", lambda m: m not in ("tensorrt", "tensorrt_rtx") and real(m))


def _gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    gpus = (env.Gpu("a GPU", (9, 0), 1 << 30),) if there else ()
    monkeypatch.setattr(env, "cuda", lambda: ("13.0" if there else "", gpus))


@pytest.mark.parametrize(
    ("gpu", "tensorrt", "rtx", "target"),
    [
        (True, "", "", "tensorrt"),
        (False, "", "", "tensorrt-rtx"),
        (True, "raise ImportError('libnvinfer.so.10')", "", "tensorrt-rtx"),
        (True, "raise RuntimeError('stub')", "raise OSError('no library')", "onnx"),
        (True, None, None, "onnx"),
        (False, "", None, "onnx"),
        (True, "", None, "tensorrt"),
    ],
)
def test_default_target(
    gpu: bool, tensorrt: str | None, rtx: str | None, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpu(monkeypatch, gpu)
    present = {"tensorrt": tensorrt, "tensorrt_rtx": rtx}
    for name, text in present.items():
        if text is not None:
            _module(tmp_path, name, text, monkeypatch)
    monkeypatch.setattr(env, "installed", lambda m: present[m] is not None)
    assert env.default_target() == target


def test_target_verdicts(no_engines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, False)
    verdicts = env.target_verdicts()
    assert verdicts["onnx"].ok
    for name in ("tensorrt", "tensorrt-rtx"):
        assert not verdicts[name].ok
        assert verdicts[name].code == "not_installed"
        assert "pip install 'attncompile[" in verdicts[name].hint
    monkeypatch.setattr(env, "installed", lambda m: True)
    assert env.target_verdicts()["tensorrt"].code == "no_gpu"
    assert env.target_verdicts()["tensorrt-rtx"].ok
    _gpu(monkeypatch, True)
    assert env.target_verdicts()["tensorrt"].ok


class Driver:
    """A double of libcuda; ``fails`` names the function that reports an error."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self._fails:
                return 100
            target = getattr(arguments[0], "_obj", None) if arguments else None
            if name == "cuDriverGetVersion":
                target.value = 13020
            elif name == "cuDeviceGetCount":
                target.value = 2
            elif name == "cuDeviceGet":
                target.value = arguments[1]
            elif name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA H200"
            elif name == "cuDeviceGetAttribute":
                target.value = {75: 9, 76: 0}[arguments[1]]
            elif name == "cuDeviceTotalMem_v2":
                target.value = 141 << 30
            return 0

        return call


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    gpu = env.Gpu("NVIDIA H200", (9, 0), 141 << 30)
    assert env.cuda() == ("13.2", (gpu, gpu))
    assert env.has_gpu()


@pytest.mark.parametrize(
    ("fails", "driver"),
    [("cuDriverGetVersion", ""), ("cuInit", "13.2"), ("cuDeviceGetCount", "13.2"), ("cuDeviceGetName", "13.2")],
)
def test_cuda_that_does_not_start(fails: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(fails))
    assert env.cuda() == (driver, ())
    assert not env.has_gpu()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert env.cuda() == ("", ())


def test_this_machine() -> None:
    found = env.environment()
    assert found.packages["onnx"]
    assert "numpy" in found.packages
    assert 1 <= found.threads <= found.cores
    assert found.cpu
    assert set(found.to_json()["targets"]) == {"onnx", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"}
    assert env.environment(threads=3).threads == 3
