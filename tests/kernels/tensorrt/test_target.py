"""The target ``tensorrt`` from a model to an engine. In its builder's process are doubles and the real ``plugin``.

Kernels are compiled for sm_80; no GPU is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from attncompile import kernel_bundle, pipeline, tensorrt_plugins
from attncompile.console import SilentProgress
from attncompile.core.errors import TargetError
from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.verdict import Verdict
from attncompile.kernels import calls
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.tensorrt import plugin
from attncompile.plugins import kernels
from attncompile.targets import engine
from attncompile.targets import tensorrt as target
from attncompile.targets.engine import EngineOptions
from tests.kernels.tensorrt.machine import as_package
from tests.passes.attention_graphs import Spec, save
from tests.passes.attention_graphs import build as graph_of

pytest.importorskip("triton")
SPEC = Spec(batch=1, heads=4, kv_heads=2, length=300, head_dim=32, mask="window", left=15, right=0, dynamic=True)


@pytest.fixture
def tensorrt_11(opened: Any, packages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tensorrt`` in the builder's process is the double, and this machine seems to have a GPU."""
    opened("11.4")  # skips without it
    place = as_package(tmp_path / "site", Path(packages["11.4"]), "11.4.0")
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setattr(target.TensorRT, "available", lambda _: Verdict.yes())
    monkeypatch.setattr(engine, "capabilities", lambda: [80])


@pytest.fixture
def windowed(tmp_path: Path) -> Model:
    """One site with a causal window, as the compiler replaces it, in float32."""
    path = save(graph_of(SPEC), tmp_path, "windowed.onnx")
    (proto,) = kernel_bundle._with_our_ops(path, pipeline.Options(), SilentProgress())
    path.write_bytes(proto.SerializeToString())
    return Model(path, proto, "sha256:0", 18)


def made() -> target.TensorRT:
    return target.TensorRT(plugins=tensorrt_plugins.KernelPlugins(kernels(), 80, 108))


def ours(proto: ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node if n.domain == calls.DOMAIN]


def profile_of(model: Model) -> ShapeProfile:
    names = {d.dim_param for v in model.proto.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    return ShapeProfile({n: Range(1, 100, 300) for n in names})


def test_a_model_becomes_an_engine(tensorrt_11: None, windowed: Model, tmp_path: Path) -> None:
    profiles = tuple(dict.fromkeys(profile_of(windowed).ranges, r) for r in (Range(1, 1, 1), Range(2, 100, 300)))
    chosen = replace(made(), options=EngineOptions(profiles=profiles), metadata={"plan": "sha256:00112233445566778899"})
    lowered = chosen.lower(windowed.proto, windowed, "fp16")
    (name,) = ours(lowered)
    assert name.startswith("NeighborhoodAttention_") and not lowered.functions
    onnx.checker.check_model(lowered)
    folder = tmp_path / "out"
    folder.mkdir()
    result = chosen.build(lowered, windowed, profile_of(windowed), folder)
    assert result.engine is not None
    built = json.loads(result.engine.read_text())
    (walked,) = built["walked"].values()
    assert [p for p, _, _ in walked] == [0, 1], "both profiles"
    assert all(len(tactics) >= 1 and min(shared) <= 48 << 10 for _, tactics, shared in walked)
    assert built["flags"] == 0b101, "strongly typed, ahead of time"
    assert built["name"].startswith("attncompile ") and "sha256:00112233" in built["name"]
    written = json.loads((folder / engine.METADATA).read_text())
    assert list(written["plugins"].values()) == [name] and written["version"] == "11.4.0"
    assert {p.name for p in plugin.read(folder / target.BUNDLE)} == {name}
    bundle = Bundle.open(folder / target.BUNDLE)
    assert {f["ptx"] for f in bundle.files.values()} == set(written["kernels"][name])
    assert any("1 nodes are plugins" in n for n in result.notes)


@pytest.mark.slow
def test_polygraphys_network_script_registers_the_plugins(
    tensorrt_11: None, windowed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = made()
    chosen.build(chosen.lower(windowed.proto, windowed, "fp16"), windowed, profile_of(windowed), tmp_path)
    code = (
        "import runpy; b, n, p = runpy.run_path('polygraphy/network.py')['load_network'](); "
        "print(n.flags, p.num_errors)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout == "5 0\n", done.stderr
    (tmp_path / target.BUNDLE / plugin.INDEX).unlink()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode and "plugins.json cannot be read" in done.stderr


def test_in_float32_bodies_stay(windowed: Model) -> None:
    """Kernels take half precision: without --fp16 there is nothing that they could compute."""
    lowered = made().lower(windowed.proto, windowed)
    assert ours(lowered) == [] and not lowered.functions
    assert "MatMul" in {n.op_type for n in lowered.graph.node}


def test_a_site_whose_gain_does_not_pay_for_a_plugin_is_kept(windowed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan decides, by what the target wants: 1.3 times the speed of the attention that TensorRT fuses."""
    assert (made().runs_kernels, made().least_gain, made().barrier) == (True, 1.3, 0.0)
    source = windowed.path.with_name("source.onnx")
    source.write_bytes(graph_of(SPEC).SerializeToString())
    found = pipeline.inspect(source, pipeline.Options())
    wanted = pipeline.Options(target="tensorrt", precision="fp16")
    for gain, kept in ((1.29, True), (1.31, False)):
        monkeypatch.setattr("attncompile.gpu_cost.GpuCost.gain", lambda *_, gain=gain: gain)
        (decision,) = pipeline.plan(found, wanted).decisions
        assert decision.kept == kept


def test_without_a_compiler_bodies_stay(windowed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    chosen = made().plugins
    assert chosen is not None
    (verdict,) = chosen.chosen(windowed.proto, "fp16").values()
    assert verdict.code == "no-compiler" and "Triton" in verdict.reason


def test_a_node_that_turns_out_to_have_no_kernel_keeps_its_body(
    windowed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_plugins.KernelPlugins, "_kernels", lambda *_: [])
    lowered = made().lower(windowed.proto, windowed, "fp16")
    assert ours(lowered) == [] and not lowered.functions


@pytest.mark.slow
def test_large_kernels_are_left_out_where_they_do_not_run(
    tensorrt_11: None, windowed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT may not raise the limit of shared memory: every plugin can do without, and the report says so."""
    chosen = made()
    assert chosen.plugins is not None
    lowered = chosen.lower(windowed.proto, windowed, "fp16")
    shared = sorted(k.entry.shared for k in chosen.plugins._built.compiled.values())  # type: ignore[attr-defined]
    assert len(shared) == 2 and shared[0] < shared[1] <= 48 << 10
    monkeypatch.setattr(target, "SMALL_SHARED", shared[0])
    monkeypatch.setattr(tensorrt_plugins, "SMALL_SHARED", shared[0])
    monkeypatch.setenv("DOUBLE_SHARED_LIMIT", str(shared[0]))
    result = chosen.build(lowered, windowed, profile_of(windowed), tmp_path)
    assert any("larger ones failed" in n and "CUDA_ERROR_INVALID_VALUE" in n for n in result.notes)
    assert result.engine is not None
    (walked,) = json.loads(result.engine.read_text())["walked"].values()
    assert walked[0][2] == [shared[0]]


@pytest.mark.slow
def test_an_engine_without_its_plugins_is_an_error(
    tensorrt_11: None, windowed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUBLE_LOSES_PLUGINS", "1")
    chosen = made()
    with pytest.raises(TargetError, match="the engine has no layer of the plugin of"):
        chosen.build(chosen.lower(windowed.proto, windowed, "fp16"), windowed, profile_of(windowed), tmp_path)
    assert not (tmp_path / "model.engine").exists()


def test_what_a_plugin_says_is_what_the_user_reads(tensorrt_11: None, windowed: Model, tmp_path: Path) -> None:
    chosen = made()
    lowered = chosen.lower(windowed.proto, windowed, "fp16")
    ranges = {n: Range(1, 100, 1 << 27) for n in profile_of(windowed).ranges}
    with pytest.raises(TargetError, match=r"plugin Neighborhood\w+: max shapes of the profile: .* CUDA has at most"):
        chosen.build(lowered, windowed, ShapeProfile(ranges), tmp_path)


@pytest.mark.parametrize(
    ("version", "ok"),
    [
        ("10.9.0.34", False), ("10.14.1.48", False), ("10.15.1.29", True), ("10.16.1.11", True), ("11.0.0.114", False),
        ("11.1.0.106", False), ("11.2.0.1", False), ("11.2.1.2", True), ("11.4.0.106", True), ("12.0.0", True),
    ],
)  # fmt: skip
def test_versions(version: str, ok: bool) -> None:
    assert target.supported(version).ok == ok


def test_a_stub_is_not_taken_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages on the public index install and do not load."""
    stub = tmp_path / "tensorrt.py"
    stub.write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    verdict = target.TARGET.available()
    assert verdict.code == "broken" and "libnvinfer.so.10" in verdict.reason
