"""``attncompile.runtime.InferenceSession``: one clear error without what it needs, or the CPU where that is allowed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from attncompile.core.errors import MissingDependency, TargetError
from attncompile.runtime import InferenceSession, layout
from attncompile.runtime import session as sessions
from attncompile.runtime.session import exact_norms, options_has
from tests.runtime.conftest import Double, Made, Maker, needs_compiler, node_model

pytestmark = needs_compiler

SHAPES = {"query": ["b", "n", 4, 64], "key": ["b", "m", 4, 64], "value": ["b", "m", 4, 64]}


@pytest.fixture
def out(make: Maker, double: Double) -> Made:
    made = make(node_model("Attention", SHAPES, dict.fromkeys(SHAPES, "float16"), scale=0.125), (80,))
    (made.folder / layout.MODEL).write_bytes(made.model.SerializeToString())
    adds = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> portable (float[N] x) => (float[N] y) { y = Add(x, x) }'
    )
    (made.folder / layout.PORTABLE).write_bytes(adds.SerializeToString())
    double.expect(list(made.bundle.entries.values()))
    return made


def test_no_provider(out: Made) -> None:
    with pytest.raises(MissingDependency, match=r"this onnxruntime has no CUDA provider") as caught:
        InferenceSession(out.folder)
    assert "attncompile[cuda]" in caught.value.hint


def test_the_cpu_where_it_is_allowed(out: Made) -> None:
    with pytest.warns(RuntimeWarning, match=r"no CUDA provider: model.onnx runs on the CPU, through function bodies"):
        session = InferenceSession(out.folder, allow_cpu=True)
    assert session.get_providers() == ["CPUExecutionProvider"]
    (y,) = session.run(None, {"x": np.ones(3, np.float32)})
    assert y.tolist() == [2, 2, 2]


class Driver:
    def __init__(self, devices: int, code: int = 0) -> None:
        self._devices, self._code = devices, code

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._devices
        return 0


def test_no_driver_and_no_gpu(out: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.onnxruntime, "get_available_providers", lambda: [sessions.PROVIDER])
    monkeypatch.setattr(sessions.onnxruntime, "preload_dlls", lambda: None)

    def none(name: str) -> Any:
        raise OSError(name)

    for driver, device, said in (
        (none, 0, "there is no NVIDIA driver"), (lambda n: Driver(0), 0, "sees no GPU"),
        (lambda n: Driver(1, 100), 0, r"sees no GPU \(error 100\)"), (lambda n: Driver(2), 2, "no CUDA device 2, only"),
    ):  # fmt: skip
        monkeypatch.setattr(sessions.ctypes, "CDLL", driver)
        with pytest.raises(MissingDependency, match=said):
            InferenceSession(out.folder, device=device)


def test_a_session(out: Made, monkeypatch: pytest.MonkeyPatch, double: Double) -> None:
    """With the CPU in the place of the GPU."""
    monkeypatch.setattr(sessions, "missing", lambda device: None)
    monkeypatch.setattr(sessions, "PROVIDER", "CPUExecutionProvider")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a device id that the CPU does not know
        session = InferenceSession(out.folder)
    session.run(None, {n: np.zeros((1, 3, 4, 64), np.float16) for n in SHAPES})
    assert double.count("launched") == 1


def test_bad_folders(out: Made, tmp_path: Path) -> None:
    for name in (layout.MODEL, layout.LIBRARY, f"{layout.BUNDLE}/{layout.INDEX}"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out.folder, copy)
        (copy / name).unlink()
        with pytest.raises(TargetError, match=rf"holds no {name}"):
            InferenceSession(copy)
    shutil.copytree(out.folder, copy, dirs_exist_ok=True)
    index = copy / layout.BUNDLE / layout.INDEX
    whole = index.read_text(encoding="utf-8")
    index.write_text(whole[:100], encoding="utf-8")
    with pytest.raises(TargetError, match=r"bundle.json cannot be read"):
        InferenceSession(copy)
    key = next(iter(out.bundle.index["calls"]))["key"]
    index.write_text(whole.replace(key, "0" * 16), encoding="utf-8")
    with pytest.raises(TargetError, match=r"node 'site' of .* needs kernels that .*bundle does not have"):
        InferenceSession(copy)
    index.write_text(whole.replace('"threads": 128', '"threads": 64'), encoding="utf-8")
    with pytest.raises(TargetError, match=r"the kernels cannot be registered: .*was changed"):
        sessions.register(sessions.onnxruntime.SessionOptions(), copy)
    (copy / layout.MODEL).write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"model.onnxruntime-cuda.onnx cannot be read"):
        InferenceSession(copy)


def test_importing_the_runtime_imports_nothing_else() -> None:
    code = (
        "import sys, attncompile.runtime as runtime\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "runtime.InferenceSession\n"
        "assert 'onnxruntime' in sys.modules and not {'triton', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_double_is_no_driver() -> None:
    """These tests say nothing about a real one: where there is one, those marked gpu do."""
    assert not hasattr(ctypes.CDLL(None), "cuLaunchKernel")


@pytest.mark.parametrize(
    ("version", "given", "confirmed"),
    [
        ("1.26.0", {}, True), ("1.26.0", {"enable_skip_layer_norm_strict_mode": "0"}, False), ("1.27.0", {}, False),
        ("1.27.0", {"enable_skip_layer_norm_strict_mode": "1"}, True),
    ],
)  # fmt: skip
def test_strict_mode_is_confirmed_where_it_is_asked_for(
    out: Made, monkeypatch: pytest.MonkeyPatch, version: str, given: dict[str, str], confirmed: bool
) -> None:
    """Before the library is registered, and only where the provider gets the option: else the library may refuse."""
    monkeypatch.setattr(sessions, "missing", lambda device: None)
    monkeypatch.setattr(sessions, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(sessions.onnxruntime, "__version__", version)
    seen: list[bool] = []

    class Options(sessions.onnxruntime.SessionOptions):  # type: ignore[misc]  # a class without types
        def register_custom_ops_library(self, path: str) -> None:
            seen.append(options_has(self, layout.STRICT_KEY))
            super().register_custom_ops_library(path)

    options = Options()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        InferenceSession(out.folder, sess_options=options, provider_options=given)
    assert seen == [confirmed]
    if confirmed:
        assert options.get_session_config_entry(layout.STRICT_KEY) == "1"


@pytest.mark.parametrize(("version", "asked"), [("1.23.2", True), ("1.26.0", True), ("1.27.0", False), ("2.0", False)])
def test_norms_of_sums_add_up_in_float32(version: str, asked: bool) -> None:
    """Of fp16, which the CUDA provider of before 1.27 does not do by itself."""
    assert exact_norms(version) == ({"enable_skip_layer_norm_strict_mode": "1"} if asked else {})
