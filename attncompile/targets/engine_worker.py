"""Builds one engine in a process of its own: parser and builder of TensorRT may abort the process.

``python -m attncompile.targets.engine_worker REQUEST.json``. The result is JSON; without it the build crashed.
One code path for TensorRT 10.15 and later, 11 and TensorRT-RTX: flags are taken by name where they are, and what 11
removed (explicit batch, precision flags and constraints, calibrators) is never touched.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from attncompile.targets.legalise import allow_split_attention


class Refused(Exception):
    """The installed version has no such option."""


def main(request_file: str) -> int:
    request: dict[str, Any] = json.loads(Path(request_file).read_text(encoding="utf-8"))
    result = build(request)
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def build(request: Mapping[str, Any]) -> dict[str, Any]:
    """``{"ok": True, "seconds", "dump", "warnings", "version"}`` and the engine's file, or ``{"ok": False, "stage",
    "errors"}``.
    """
    trt = importlib.import_module(request["module"])
    log = _logger(trt)
    builder, network, parser, registered, parsed = parse(trt, request, log)
    if not parsed:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        found = [{"node": e.node_name(), "op": e.node_operator(), "message": e.desc().strip()} for e in errors]
        return _failed("parse", registered, found, log.bad)
    try:
        config = configured(trt, builder, request)
    except Refused as error:
        return _failed("options", None, [], [f"{request['label']} {trt.__version__} {error}"])
    log.bad.clear()
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        return _failed("build", registered, [], log.bad)
    with Path(request["engine"]).open("wb") as file:
        file.write(engine)
    if request["timing_cache"]:
        Path(request["timing_cache"]).write_bytes(bytes(config.get_timing_cache().serialize()))
    result = {"ok": True, "seconds": seconds, "dump": log.dump, "warnings": log.warnings, "version": trt.__version__}
    if request["plugins"]:
        missing = missing_plugins(_information(trt, log, request["engine"]), request["plugins"]["nodes"])
        if missing:
            Path(request["engine"]).unlink()
            message = f"the engine has no layer of the plugin of {', '.join(missing[:3])}"
            return _failed("build", None, [], [message])
    return result


def parse(trt: Any, request: Mapping[str, Any], log: Any) -> tuple[Any, Any, Any, Any, bool]:
    """Builder, network, parser, what was registered, and whether the model was parsed."""
    registered = _register(request["plugins"])
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt, bool(request["plugins"])))
    if hasattr(network, "name"):
        network.name = request["name"]
    parser = trt.OnnxParser(network, log)
    model = Path(request["model"])
    # The path lets the parser find external data, which lies beside the model.
    parsed = parser.parse(_contents(model, request["module"]), str(model))
    return builder, network, parser, registered, bool(parsed)


def load_network(out: Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser of the engine in ``out``, for Polygraphy's network scripts: with its plugins
    registered, in a network with the flags that it was built with.

    Raises:
        ValueError: the model cannot be parsed.
    """
    known = json.loads((out / "model.engine.json").read_text(encoding="utf-8"))
    trt = importlib.import_module(known["module"])
    plugins = known["registered"]
    if plugins is not None:
        plugins = {**plugins, "folder": str(out / plugins["folder"])}
    request = {
        "plugins": plugins, "name": known["name"], "module": known["module"],
        "model": str(out / f"model.{known['target']}.onnx"),
    }  # fmt: skip
    log = trt.Logger(trt.Logger.WARNING)
    builder, network, parser, _, parsed = parse(trt, request, log)
    if not parsed:
        first = parser.get_error(0) if parser.num_errors else None
        where = f" at {first.node_operator()} '{first.node_name()}': {first.desc()}" if first else ""
        raise ValueError(f"the model cannot be parsed{where}")
    return builder, network, parser


def _failed(stage: str, registered: Any, found: list[dict[str, str]], logged: list[str]) -> dict[str, Any]:
    """What a plugin said comes first: the log says only that a callback failed."""
    said = [{"node": "", "op": "", "message": m} for m in (registered.problems if registered else [])]
    return {
        "ok": False,
        "stage": stage,
        "errors": said + found + [{"node": "", "op": "", "message": m} for m in logged],
    }


def _register(plugins: Mapping[str, Any] | None) -> Any:
    """Calls the function that the request names. Its module belongs to whoever made the request."""
    if plugins is None:
        return None
    module, _, function = plugins["register"].partition(":")
    call = getattr(importlib.import_module(module), function)
    return call(Path(plugins["folder"]), plugins["multiprocessors"], plugins["shared_limit"])


def network_flags(trt: Any, plugins: bool) -> int:
    """By name: ``PREFER_AOT_PYTHON_PLUGINS`` is 3 in 10.9 and 2 in 11, and TensorRT 11 is always strongly typed."""
    known = trt.NetworkDefinitionCreationFlag
    wanted = ["STRONGLY_TYPED", *(["PREFER_AOT_PYTHON_PLUGINS"] if plugins else [])]
    return sum(1 << int(getattr(known, name)) for name in wanted if hasattr(known, name))


def configured(trt: Any, builder: Any, request: Mapping[str, Any]) -> Any:
    """The builder's configuration. Raises ``Refused`` for what the installed version lacks."""
    config = builder.create_builder_config()
    # Only a detailed log tells which ONNX nodes each kernel computes.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    for option, flag in (("weight_streaming", "WEIGHT_STREAMING"), ("refit", "REFIT")):
        if request[option]:
            if not hasattr(trt.BuilderFlag, flag):
                raise Refused(f"has no {flag}")
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if request["timing_cache"]:
        path = Path(request["timing_cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        # A cache of another GPU or version is refused rather than believed.
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise Refused(f"does not take the timing cache {path}: it is of another version or GPU")
    for shapes in request["profiles"]:
        if shapes:
            profile = builder.create_optimization_profile()
            for name, (low, usual, high) in shapes.items():
                profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
            if config.add_optimization_profile(profile) < 0:
                raise Refused(f"does not take the profile {shapes}")
    return config


def _information(trt: Any, log: Any, engine: str) -> str:
    loaded = trt.Runtime(log).deserialize_cuda_engine(Path(engine).read_bytes())
    if loaded is None:
        return ""
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def missing_plugins(information: str, nodes: Mapping[str, str]) -> list[str]:
    """Those of ``nodes`` without a layer of type plugin in the inspector's JSON.

    A layer belongs to a node if it is called like it or its metadata name it; a plugin's ``LayerType`` begins with
    ``Plugin``. Nothing that can be read means that all are missing.
    """
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return list(nodes)
    plugins = [x for x in layers if isinstance(x, dict) and str(x.get("LayerType", "")).startswith("Plugin")]
    told = [(str(x.get("Name", "")), str(x.get("Metadata", ""))) for x in plugins]
    return [n for n in nodes if not any(n == name or f"[ONNX Layer: {n}]" in metadata for name, metadata in told)]


def _contents(model: Path, module: str) -> bytes:
    proto = onnx.load(model, load_external_data=False)
    # TRT_decomposable is of TensorRT-RTX; see legalise.
    changed = module == "tensorrt_rtx" and allow_split_attention(proto)
    return proto.SerializeToString() if changed else model.read_bytes()


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, warnings and the dump of layers; the rest of a verbose log is thousands of lines."""

        def __init__(self) -> None:
            super().__init__()
            self.bad: list[str] = []
            self.warnings: list[str] = []
            self.dump: str | None = None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.bad.append(message.strip())
                sys.stderr.write(message.strip() + "\n")  # all that is left if the process is aborted
                sys.stderr.flush()
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message.strip())
            elif message.lstrip().startswith(("Layers:", "Engine Layer Information:")):
                self.dump = message

    return Log()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
