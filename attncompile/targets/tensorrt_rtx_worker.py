"""Builds one TensorRT-RTX engine in a process of its own: the parser and the builder may abort the process.

``python -m attncompile.targets.tensorrt_rtx_worker REQUEST.json``; the request names a model, an engine file, a result
file and the optimisation profile (input -> [min, usual, max] shapes). The result is JSON; without it the build crashed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import onnx

from attncompile.targets.legalise import allow_split_attention


def main(request_file: str) -> int:
    request: dict[str, Any] = json.loads(Path(request_file).read_text(encoding="utf-8"))
    result = build(request)
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def build(request: dict[str, Any]) -> dict[str, Any]:
    """``{"ok": True, "seconds", "dump", "warnings"}`` and the engine's file, or ``{"ok": False, "errors": [...]}``."""
    import tensorrt_rtx as trt

    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = Path(request["model"])
    # The path lets the parser find external data, which lies beside the model.
    if not parser.parse(_contents(model), str(model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        found = [{"node": e.node_name(), "op": e.node_operator(), "message": e.desc().strip()} for e in errors]
        return {
            "ok": False,
            "stage": "parse",
            "errors": found or [{"node": "", "op": "", "message": m} for m in log.bad],
        }
    config = builder.create_builder_config()
    # Only a detailed log tells which ONNX nodes each kernel computes.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profile"].items():
            profile.set_shape(name, *(tuple(s) for s in shapes))
        config.add_optimization_profile(profile)
    log.bad.clear()
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        return {"ok": False, "stage": "build", "errors": [{"node": "", "op": "", "message": m} for m in log.bad]}
    with Path(request["engine"]).open("wb") as file:
        file.write(engine)
    return {"ok": True, "seconds": seconds, "dump": log.dump, "warnings": log.warnings, "version": trt.__version__}


def _contents(model: Path) -> bytes:
    proto = onnx.load(model, load_external_data=False)
    return proto.SerializeToString() if allow_split_attention(proto) else model.read_bytes()


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
