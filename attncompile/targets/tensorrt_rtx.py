"""Engines of TensorRT-RTX (``tensorrt_rtx``), built on any machine; they run on GeForce and RTX GPUs only.

It takes no plugins: function bodies are inlined into standard ops, and a model with any other op is refused before the
parser sees it, because the parser aborts the process. Networks are strongly typed: precision comes from the model.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

from attncompile.core.errors import BadArguments, MissingDependency, TargetError
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.core.sums import size_of
from attncompile.core.verdict import Verdict
from attncompile.targets import fusion, precision
from attncompile.targets import graph as g
from attncompile.targets.base import BuildResult, Precision
from attncompile.targets.legalise import drop_unit_axes

ENGINE = "model.engine"
LOWERED = "model.tensorrt-rtx.onnx"
TIMEOUT_SECONDS = 1800.0
ARCHITECTURES = (75, 80, 86, 89, 120, 121)
"""Compute capabilities, times ten, that TensorRT-RTX 1.7 has kernels for (its ``ComputeCapability``)."""

_INSTALL = "pip install 'attncompile[rtx]'"
_INLINE_LIMIT = 1 << 30


class TensorRTRTX:
    """The target ``tensorrt-rtx``."""

    name = "tensorrt-rtx"
    fuses_dense = True
    runs_kernels = False
    least_gain = 0.0

    def available(self) -> Verdict:
        """Judged without importing it."""
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return Verdict.no("not_installed", "tensorrt_rtx is not installed", _INSTALL)
        return Verdict.yes("engines are built on the CPU and run on RTX GPUs")

    def supports(self, proto: ModelProto) -> Verdict:
        """Whether nothing but standard ops is left once the bodies are inlined."""
        inlined = g.inlined(proto)
        for node in (n for graph in g.graphs(inlined.graph) for n in graph.node):
            if _dropped(node):
                return Verdict.no(
                    "dropped",
                    f"the parser of TensorRT-RTX reads Attention '{g.label(node)}' but drops {_dropped(node)}: hidden "
                    "keys would be seen",
                    "export them as a boolean mask",
                )
        foreign = g.foreign_nodes(inlined)
        if not foreign:
            return Verdict.yes("standard ops only")
        node = foreign[0]
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        domain = node.domain or "ai.onnx"
        return Verdict.no(
            "foreign_op",
            f"TensorRT-RTX takes standard ONNX ops only: node '{g.label(node)}' is {domain}::{node.op_type}{more}",
            "leave this model to --target onnx, or export it without that op",
        )

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        """Bodies inlined, every node named; converted in the graph if ``precision`` is given.

        The external tensors of the result are still those of ``model`` unless it was converted.

        Raises:
            TargetError: an op is left that is not in the standard domain, or the conversion failed.
        """
        lowered = g.inlined(proto)
        g.name_nodes(lowered)
        verdict = self.supports(lowered)
        if not verdict.ok:
            raise TargetError(verdict.reason, verdict.hint)
        drop_unit_axes(lowered)
        if precision is not None:
            lowered = _convert(lowered, model.path.resolve().parent, precision)
        return lowered

    def build(
        self, lowered: ModelProto, model: Model, profile: ShapeProfile, folder: Path,
        sites: Sequence[AttentionSite] = (), *, timeout: float = TIMEOUT_SECONDS,
    ) -> BuildResult:  # fmt: skip
        """Write ``model.engine`` and the lowered model into ``folder``; external data of ``model`` must lie there.

        Raises:
            MissingDependency: tensorrt_rtx is not installed.
            TargetError: a non-standard op, or TensorRT-RTX refused, crashed or took longer than ``timeout`` seconds.
            BadArguments: ``profile`` has no range for a dynamic dimension.
        """
        available = self.available()
        if not available.ok:
            raise MissingDependency(f"target {self.name}: {available.reason}", available.hint)
        verdict = self.supports(lowered)
        if not verdict.ok:
            raise TargetError(verdict.reason, verdict.hint)
        source = folder / LOWERED
        files = save(lowered, source)
        engine = folder / ENGINE
        result = run_worker(source, engine, shapes(lowered, profile), timeout)
        layers = fusion.parse_layers(result["dump"])
        found = fusion.judge(lowered, layers)
        can_run = self.can_run()
        notes = [f"tensorrt_rtx {result['version']}, strongly typed"]
        if not layers:
            notes.append("the builder's log lists no layers: whether attention is fused is unknown")
        elif any(a.fused is False for a in found) and not _is_half(lowered):
            notes.append("TensorRT-RTX fuses fp16 and bf16 attention only: build with --fp16")
        return BuildResult(
            target=self.name, files=(engine, *files), seconds=result["seconds"], engine=engine,
            engine_size=engine.stat().st_size, layers=layers, attention=found,
            sites=fusion.by_site(lowered, sites, found), ran=False,
            reason="not executed: " + (can_run.reason if not can_run.ok else "the build does not run engines"),
            notes=tuple(notes),
        )  # fmt: skip

    def can_run(self) -> Verdict:
        """Whether engines of this target run on this machine."""
        capabilities = _capabilities()
        if not capabilities:
            return Verdict.no(
                "no_gpu", "this machine has no CUDA GPU; engines run on RTX GPUs", "copy model.engine there"
            )
        if not any(c in ARCHITECTURES for c in capabilities):
            here = ", ".join(f"{c // 10}.{c % 10}" for c in capabilities)
            return Verdict.no(
                "architecture", f"TensorRT-RTX has no kernels for compute capability {here}", "use an RTX GPU"
            )
        return Verdict.yes("a GPU that TensorRT-RTX has kernels for")

    def open(self, folder: Path) -> Any:
        """The engine in ``folder``, as a ``tensorrt_rtx.ICudaEngine``. Raises ``TargetError`` without a GPU."""
        can_run = self.can_run()
        if not can_run.ok:
            raise TargetError(f"the engine cannot be loaded here: {can_run.reason}", can_run.hint)
        if importlib.util.find_spec("tensorrt_rtx") is None:
            raise MissingDependency("tensorrt_rtx is not installed", _INSTALL)
        import tensorrt_rtx as trt

        logger = trt.Logger(trt.Logger.ERROR)
        engine = trt.Runtime(logger).deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if engine is None:
            raise TargetError(
                f"TensorRT-RTX cannot load {folder / ENGINE}", "build it again with the installed version"
            )
        return engine


def _dropped(node: NodeProto) -> str:
    """What hides keys in a standard Attention and is not in the network that the parser makes of it (1.7.1)."""
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
        return ""
    if any(a.name in ("left_window_size", "right_window_size") and a.i >= 0 for a in node.attribute):
        return "its window (opset 25)"
    return "nonpad_kv_seqlen" if len(node.input) > 6 and node.input[6] else ""


def shapes(proto: ModelProto, profile: ShapeProfile) -> dict[str, list[list[int]]]:
    """[min, usual, max] shape of every input with a dynamic dimension.

    A dimension without a name is called ``input:axis``, as in ``--profile``.
    """
    stored = {t.name for t in proto.graph.initializer}
    found: dict[str, list[list[int]]] = {}
    for info in proto.graph.input:
        if info.name in stored:
            continue
        dims = [_dimension(info, axis, profile) for axis in range(len(info.type.tensor_type.shape.dim))]
        if any(low != high for low, _, high in dims) or _is_dynamic(info):
            found[info.name] = [[d[i] for d in dims] for i in range(3)]
    return found


def _is_dynamic(info: ValueInfoProto) -> bool:
    return any(d.dim_value <= 0 for d in info.type.tensor_type.shape.dim)


def _dimension(info: ValueInfoProto, axis: int, profile: ShapeProfile) -> tuple[int, int, int]:
    dim = info.type.tensor_type.shape.dim[axis]
    if dim.dim_value > 0:
        return dim.dim_value, dim.dim_value, dim.dim_value
    symbol = dim.dim_param or f"{info.name}:{axis}"
    ranges = profile.ranges
    low, usual, high = (size_of(symbol, {n: int(getattr(r, field)) for n, r in ranges.items()})
                        for field in ("minimum", "usual", "maximum"))  # fmt: skip
    if low is None or usual is None or high is None:
        raise BadArguments(
            f"no range for dimension '{symbol}' of input '{info.name}'", f"give one: --profile {symbol}=MIN:USUAL:MAX"
        )
    return low, usual, high


def save(proto: ModelProto, path: Path) -> list[Path]:
    """Write ``proto``; weights that it holds itself go to a file beside it where they are too large for one message."""
    if proto.ByteSize() < _INLINE_LIMIT:
        path.write_bytes(proto.SerializeToString())
        return [path]
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    copy = ModelProto()
    copy.CopyFrom(proto)
    onnx.save_model(copy, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)
    return [path, data]


def run_worker(
    source: Path, engine: Path, profile: Mapping[str, Sequence[Sequence[int]]], timeout: float
) -> dict[str, Any]:
    """Build ``source`` in another process; returns the worker's result. Raises ``TargetError`` however that ends."""
    with tempfile.TemporaryDirectory(prefix="attncompile-rtx-") as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "result.json"
        wanted = {"model": str(source.resolve()), "engine": str(engine.resolve()), "result": str(answer)}
        request.write_text(json.dumps({**wanted, "profile": profile}), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "attncompile.targets.tensorrt_rtx_worker", str(request)]
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise TargetError(
                f"TensorRT-RTX did not finish within {timeout:.0f} s",
                "build with a smaller profile, or on a faster machine",
            ) from None
        if not answer.exists():
            raise TargetError(f"TensorRT-RTX {_ending(done.returncode)}: {_tail(done)}", "report the model to NVIDIA")
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if not result["ok"]:
        first = result["errors"][0] if result["errors"] else {"node": "", "op": "", "message": "no reason given"}
        where = f" at node '{first['node']}' ({first['op']})" if first["node"] else ""
        action = "cannot parse the model" if result["stage"] == "parse" else "cannot build the model"
        message = " ".join(first["message"].split())[:400]
        raise TargetError(f"TensorRT-RTX {action}{where}: {message}", "use --target onnx for this model")
    return result


def _ending(code: int) -> str:
    if code < 0:
        try:
            return f"crashed ({signal.Signals(-code).name})"
        except ValueError:
            return f"crashed (signal {-code})"
    return f"stopped with exit code {code}"


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _convert(lowered: ModelProto, folder: Path, wanted: Precision) -> ModelProto:
    return precision.convert(lowered, folder, wanted)


def _is_half(proto: ModelProto) -> bool:
    return any(t.data_type in (10, 16) for t in proto.graph.initializer)


def _capabilities() -> list[int]:
    """Compute capability, times ten, of every CUDA device; empty without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
            found.append(10 * major.value + minor.value)
    return found


TARGET = TensorRTRTX()
