"""The builder that TensorRT and TensorRT-RTX share, on the real TensorRT-RTX: every option, several profiles."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from attncompile.core.errors import BadArguments
from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.targets import engine, engine_worker
from attncompile.targets import tensorrt_rtx as rtx
from attncompile.targets.base import BuildResult
from attncompile.targets.engine import EngineOptions

Make = Callable[..., ModelProto]
AsModel = Callable[[ModelProto], Model]
WHOLE = ShapeProfile({"N": Range(1, 100, 300)})


def build(attention: Make, as_model: AsModel, folder: Path, **options: Any) -> BuildResult:
    pytest.importorskip("tensorrt_rtx")
    proto = attention(np.float16, length="N")
    model = as_model(proto)
    metadata = {"plan": "sha256:0123456789abcdef"}
    target = replace(rtx.TARGET, options=EngineOptions(**options), metadata=metadata)
    folder.mkdir()
    return target.build(target.lower(proto, model), model, WHOLE, folder)


def test_all_options_at_once(attention: Make, as_model: AsModel, tmp_path: Path) -> None:
    """Two profiles, a workspace, a level and weight streaming, in one engine of real TensorRT code."""
    profiles = ({"N": Range(1, 1, 1)}, {"N": Range(2, 200, 300)})
    result = build(
        attention, as_model, tmp_path / "out", workspace=1 << 28, level=2, weight_streaming=True, profiles=profiles,
    )  # fmt: skip
    assert result.attention_layers == 1 and result.engine_size and result.engine_size > 10_000
    written = json.loads((tmp_path / "out" / engine.METADATA).read_text())
    assert written["profiles"] == [
        {"x": [[1, 1, 256], [1, 1, 256], [1, 1, 256]]}, {"x": [[1, 2, 256], [1, 200, 256], [1, 300, 256]]}
    ]  # fmt: skip
    assert written["options"] == {"workspace": 1 << 28, "level": 2, "refit": False, "weight_streaming": True}
    assert (written["plan"], written["model"]) == ("sha256:0123456789abcdef", "sha256:test")
    assert written["version"].startswith("1.") and written["target"] == "tensorrt-rtx"
    assert result.engine is not None and b"attncompile" in result.engine.read_bytes(), "the network's name"


def test_the_options_reach_the_builder() -> None:
    """Refit is looked at here: without a GPU TensorRT-RTX 1.7.1 fails to compile such an engine."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    for on in (True, False):
        request = {"workspace": 1 << 27, "level": 1, "refit": on, "weight_streaming": on, "timing_cache": None,
                   "profiles": [{"x": [[1], [2], [3]]}] * 2}  # fmt: skip
        config = engine_worker.configured(trt, builder, request)
        assert config.get_flag(trt.BuilderFlag.REFIT) == config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING) == on
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 27
        assert (config.builder_optimization_level, config.num_optimization_profiles) == (1, 2)


def test_a_timing_cache_is_kept(attention: Make, as_model: AsModel, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    build(attention, as_model, tmp_path / "first", timing_cache=cache)
    assert cache.stat().st_size > 0
    build(attention, as_model, tmp_path / "second", timing_cache=cache)


def test_profiles_stay_where_the_model_is_checked() -> None:
    given = EngineOptions(profiles=({"N": Range(1, 1, 1)},))
    (found,) = engine.engine_profiles(WHOLE, given)
    assert found.ranges["N"] == Range(1, 1, 1)
    assert engine.engine_profiles(WHOLE, EngineOptions()) == [WHOLE]
    two = ShapeProfile({**WHOLE.ranges, "B": Range(1, 2, 4)})
    assert engine.engine_profiles(two, given)[0].ranges["B"] == Range(1, 2, 4)
    with pytest.raises(BadArguments, match="leaves 1:300, in which the model is checked"):
        engine.engine_profiles(WHOLE, EngineOptions(profiles=({"N": Range(1, 1, 301)},)))
    with pytest.raises(BadArguments, match="sets 'M'") as error:
        engine.engine_profiles(WHOLE, EngineOptions(profiles=({"M": Range(1, 1, 1)},)))
    assert error.value.hint == "dynamic dimensions: N"


@pytest.mark.slow
def test_polygraphy_builds_from_the_network_script(attention: Make, as_model: AsModel, tmp_path: Path) -> None:
    """The command of docs/tensorrt.md, with TensorRT-RTX in the place of TensorRT."""
    build(attention, as_model, tmp_path / "out")
    command = [
        "convert", "polygraphy/network.py", "--model-type", "trt-network-script", "--trt-min-shapes", "x:[1,1,256]",
        "--trt-opt-shapes", "x:[1,100,256]", "--trt-max-shapes", "x:[1,300,256]", "-o", str(tmp_path / "again.engine"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from polygraphy.tools import main; import sys; sys.exit(main())", *command],
        cwd=tmp_path / "out", capture_output=True, text=True, check=False,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "again.engine").stat().st_size > 10_000


def test_a_network_script_that_cannot_be_parsed(attention: Make, as_model: AsModel, tmp_path: Path) -> None:
    build(attention, as_model, tmp_path / "out")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4] if n == "x" else []) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "g", values[:1], values[1:])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "out" / "model.tensorrt-rtx.onnx").write_bytes(other.SerializeToString())
    with pytest.raises(ValueError, match="Det"):
        engine_worker.load_network(tmp_path / "out")


# What differs between versions.


def flags(**values: int) -> Any:
    return SimpleNamespace(NetworkDefinitionCreationFlag=enum.IntEnum("Flag", values))


@pytest.mark.parametrize(
    ("known", "plugins", "wanted"),
    [
        ({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1, "PREFER_AOT_PYTHON_PLUGINS": 3}, True, 0b1010),
        ({"STRONGLY_TYPED": 0, "PREFER_AOT_PYTHON_PLUGINS": 2}, True, 0b101),
        ({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1, "PREFER_AOT_PYTHON_PLUGINS": 3}, False, 0b10),
        ({"STRONGLY_TYPED": 0}, True, 0b1),
    ],
    ids=["10.9", "11", "no plugins", "RTX"],
)  # fmt: skip
def test_flags_are_taken_by_name(known: dict[str, int], plugins: bool, wanted: int) -> None:
    assert engine_worker.network_flags(flags(**known), plugins) == wanted


def test_a_version_without_a_flag_says_so() -> None:
    trt = SimpleNamespace(
        ProfilingVerbosity=SimpleNamespace(DETAILED=2), BuilderFlag=SimpleNamespace(REFIT=1), __version__="9.9"
    )  # fmt: skip
    config = SimpleNamespace(set_flag=lambda _: None)
    builder = SimpleNamespace(create_builder_config=lambda: config)
    request = {"workspace": None, "level": None, "refit": True, "weight_streaming": True, "timing_cache": None,
               "profiles": []}  # fmt: skip
    with pytest.raises(engine_worker.Refused, match="has no WEIGHT_STREAMING"):
        engine_worker.configured(trt, builder, request)


def test_a_cache_or_profile_that_is_refused_says_so(tmp_path: Path) -> None:
    trt = SimpleNamespace(ProfilingVerbosity=SimpleNamespace(DETAILED=2), __version__="9.9")
    config = SimpleNamespace(
        create_timing_cache=lambda data: data, set_timing_cache=lambda cache, ignore_mismatch: ignore_mismatch,
        add_optimization_profile=lambda _: -1,
    )  # fmt: skip
    profile = SimpleNamespace(set_shape=lambda *_: None)
    builder = SimpleNamespace(
        create_builder_config=lambda: config, create_optimization_profile=lambda: profile
    )  # fmt: skip
    request: dict[str, Any] = {"workspace": None, "level": None, "refit": False, "weight_streaming": False}
    with pytest.raises(engine_worker.Refused, match="another version or GPU"):
        engine_worker.configured(trt, builder, {**request, "timing_cache": str(tmp_path / "c"), "profiles": []})
    with pytest.raises(engine_worker.Refused, match="does not take the profile"):
        engine_worker.configured(trt, builder, {**request, "timing_cache": None, "profiles": [{"x": [[1], [2], [1]]}]})


def test_nothing_that_11_removed_is_named() -> None:
    """Beside comments: explicit batch, precision flags and constraints, calibrators, layer precisions."""
    text = Path(engine_worker.__file__).read_text(encoding="utf-8") + Path(engine.__file__).read_text(encoding="utf-8")
    for gone in ("EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.BF16", "BuilderFlag.INT8", "OBEY_PRECISION",
                 "calibrator =", ".precision =", "get_plugin_creator"):  # fmt: skip
        assert gone not in text


# Whether an engine holds its plugins.


def information(*layers: dict[str, Any]) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": []})


@pytest.mark.parametrize(
    ("told", "missing"),
    [
        (information({"Name": "attn", "LayerType": "PluginV3", "Metadata": ""}), []),
        (information({"Name": "other", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: attn]"}), []),
        (information({"Name": "attn", "LayerType": "gemm", "Metadata": "[ONNX Layer: attn]"}), ["attn"]),
        (information({"Name": "attn2", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: attn2]"}), ["attn"]),
        (information(), ["attn"]),
        ("", ["attn"]),
        ("[]", ["attn"]),
        ("null", ["attn"]),
    ],
)
def test_plugins_that_an_engine_lacks(told: str, missing: list[str]) -> None:
    assert engine_worker.missing_plugins(told, {"attn": "Attention_0"}) == missing
