"""Engines of TensorRT and of TensorRT-RTX: what is common to both targets. The build is a process of its own
(``engine_worker.py``), because parser and builder may abort it.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, ValueInfoProto

from attncompile import __version__
from attncompile.core.errors import BadArguments, MissingDependency, TargetError
from attncompile.core.folder import write_file
from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.core.sums import size_of
from attncompile.core.verdict import Verdict
from attncompile.targets import fusion
from attncompile.targets.base import BuildResult, Precision

ENGINE = "model.engine"
METADATA = "model.engine.json"
TIMEOUT_SECONDS = 1800.0
_INLINE_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is built. ``workspace`` in bytes (None: the builder's own limit), ``level`` 0 to 5 of optimisation.

    ``profiles``: one optimisation profile each, as ranges of the dimensions that it sets; the others have the run's.
    Empty: one profile, the run's. ``timing_cache``: a file that is read if it is there, and written.
    """

    workspace: int | None = None
    timing_cache: Path | None = None
    weight_streaming: bool = False
    refit: bool = False
    level: int | None = None
    profiles: tuple[Mapping[str, Range], ...] = ()


@dataclass(frozen=True, slots=True)
class PluginRequest:
    """What the worker registers before it parses: ``register`` is ``module:function``, which is called with ``folder``,
    the number of ``multiprocessors``, and a limit of shared memory. ``nodes``: the plugin of each node that has one;
    ``kernels``: the SHA-256 of the PTX of each plugin's tactics.
    """

    register: str
    folder: Path
    multiprocessors: int
    nodes: Mapping[str, str]
    kernels: Mapping[str, Sequence[str]]
    shared_limit: int | None = None


@dataclass(frozen=True)
class EngineTarget:
    """A target that is an engine. ``metadata`` is written beside it: TensorRT has no field for it."""

    options: EngineOptions = field(default_factory=EngineOptions)
    metadata: Mapping[str, str] = field(default_factory=dict)

    # No annotations: these are no fields of the dataclass.
    name = ""
    module = ""
    label = ""
    install = ""
    fuses_dense = True
    takes_branches = False
    runs_kernels = False
    least_gain = 0.0
    barrier = 0.0

    def available(self) -> Verdict:
        raise NotImplementedError

    def supports(self, proto: ModelProto) -> Verdict:
        raise NotImplementedError

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        raise NotImplementedError

    def can_run(self) -> Verdict:
        """Whether engines of this target run on this machine."""
        raise NotImplementedError

    def build(
        self, lowered: ModelProto, model: Model, profile: ShapeProfile, folder: Path,
        sites: Sequence[AttentionSite] = (), *, timeout: float = TIMEOUT_SECONDS,
    ) -> BuildResult:  # fmt: skip
        """Write ``model.engine``, its metadata and the lowered model into ``folder``; external data of ``model`` must
        lie there.

        Raises:
            MissingDependency: the package is not installed.
            TargetError: a node that cannot be taken, or the builder refused, crashed or took longer than ``timeout``.
            BadArguments: ``profile`` has no range for a dynamic dimension, or one of the options is wrong.
        """
        available = self.available()
        if not available.ok:
            raise MissingDependency(f"target {self.name}: {available.reason}", available.hint)
        verdict = self.supports(lowered)
        if not verdict.ok:
            raise TargetError(verdict.reason, verdict.hint)
        source, engine = folder / f"model.{self.name}.onnx", folder / ENGINE
        profiles = [shapes(lowered, p) for p in engine_profiles(profile, self.options)]
        files = save(lowered, source)
        plugins = self._plugins(lowered, folder)
        result, notes = self._run(source, engine, profiles, plugins, timeout)
        metadata = self._write_metadata(folder, model, profiles, plugins, result)
        script = _write_script(folder)
        layers = fusion.parse_layers(result["dump"])
        found = fusion.judge(lowered, layers)
        can_run = self.can_run()
        return BuildResult(
            target=self.name, files=(engine, metadata, script, *files), seconds=result["seconds"], engine=engine,
            engine_size=engine.stat().st_size, layers=layers, attention=found,
            sites=fusion.by_site(lowered, sites, found), ran=False,
            reason="" if can_run.ok else f"not executed: {can_run.reason}",
            notes=(f"{self.module} {result['version']}, strongly typed", *notes, *self._notes(lowered, layers, found)),
        )  # fmt: skip

    def _plugins(self, lowered: ModelProto, folder: Path) -> PluginRequest | None:
        """Written into ``folder`` where ``lowered`` has any."""
        return None

    def _run(
        self, source: Path, engine: Path, profiles: Sequence[Shapes], plugins: PluginRequest | None, timeout: float
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The worker's result, and notes on how it came about."""
        return run_worker(self, source, engine, profiles, timeout, plugins), ()

    def _notes(self, lowered: ModelProto, layers: Sequence[Any], found: Sequence[Any]) -> list[str]:
        if not layers:
            return ["the builder's log lists no layers: whether attention is fused is unknown"]
        return []

    def _write_metadata(
        self, folder: Path, model: Model, profiles: Sequence[Shapes], plugins: PluginRequest | None,
        result: Mapping[str, Any],
    ) -> Path:  # fmt: skip
        options = {k: v for k, v in asdict(self.options).items() if k not in ("profiles", "timing_cache")}
        value = {
            "attncompile": __version__, "target": self.name, "module": self.module, "version": result["version"],
            "name": self.network_name(), "model": model.hash, **self.metadata, "options": options,
            "profiles": list(profiles),
            "plugins": dict(plugins.nodes) if plugins else {},
            "kernels": {n: list(k) for n, k in plugins.kernels.items()} if plugins else {},
        }  # fmt: skip
        value["registered"] = None if plugins is None else {
            "register": plugins.register, "folder": plugins.folder.relative_to(folder).as_posix(),
            "multiprocessors": plugins.multiprocessors, "shared_limit": result["shared_limit"],
        }  # fmt: skip
        text = json.dumps(value, indent=1, sort_keys=True)
        write_file(folder / METADATA, text.encode() + b"\n")
        return folder / METADATA

    def network_name(self) -> str:
        """What the engine itself keeps of where it comes from."""
        return f"attncompile {__version__} {self.metadata.get('plan', '')[:19]}".strip()

    def open(self, folder: Path) -> Any:
        """The engine in ``folder``, as an ``ICudaEngine``. Raises ``TargetError`` where it cannot run."""
        can_run = self.can_run()
        if not can_run.ok:
            raise TargetError(f"the engine cannot be loaded here: {can_run.reason}", can_run.hint)
        if importlib.util.find_spec(self.module) is None:
            raise MissingDependency(f"{self.module} is not installed", self.install)
        trt = importlib.import_module(self.module)
        logger = trt.Logger(trt.Logger.ERROR)
        engine = trt.Runtime(logger).deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if engine is None:
            raise TargetError(
                f"{self.label} cannot load {folder / ENGINE}", "build it again with the installed version"
            )
        return engine


_SCRIPT = '''"""The network of ../model.engine, its plugins registered, for Polygraphy; see docs/tensorrt.md."""

from pathlib import Path

from attncompile.targets.engine_worker import load_network as _of


def load_network():
    return _of(Path(__file__).resolve().parent.parent)
'''


def _write_script(folder: Path) -> Path:
    path = folder / "polygraphy" / "network.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_SCRIPT, encoding="utf-8")
    return path


Shapes = Mapping[str, list[list[int]]]
"""[min, usual, max] shape of every input with a dynamic dimension."""


def engine_profiles(whole: ShapeProfile, options: EngineOptions) -> list[ShapeProfile]:
    """One ``ShapeProfile`` an optimisation profile.

    Raises:
        BadArguments: a profile names a dimension that is not there, or leaves the range in which the model was checked.
    """
    found = []
    for number, given in enumerate(options.profiles):
        for symbol, r in given.items():
            known = whole.ranges.get(symbol)
            if known is None:
                names = ", ".join(whole.ranges) or "none"
                raise BadArguments(f"profile {number} of the engine sets '{symbol}'", f"dynamic dimensions: {names}")
            if r.minimum < known.minimum or r.maximum > known.maximum:
                raise BadArguments(
                    f"profile {number} of the engine: {symbol}={r.minimum}:{r.usual}:{r.maximum} leaves "
                    f"{known.minimum}:{known.maximum}, in which the model is checked",
                    f"widen it: --profile {symbol}=MIN:USUAL:MAX",
                )
        found.append(ShapeProfile({**whole.ranges, **given}))
    return found or [whole]


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
    target: EngineTarget, source: Path, engine: Path, profiles: Sequence[Shapes], timeout: float,
    plugins: PluginRequest | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Build ``source`` in another process; returns the worker's result. Raises ``TargetError`` however that ends."""
    label, options = target.label, target.options
    wanted = {
        "module": target.module, "label": label, "model": str(source.resolve()), "engine": str(engine.resolve()),
        "profiles": list(profiles), "workspace": options.workspace, "weight_streaming": options.weight_streaming,
        "refit": options.refit, "level": options.level,
        "timing_cache": str(options.timing_cache.resolve()) if options.timing_cache else None,
        "name": target.network_name(),
        "plugins": {**asdict(plugins), "folder": str(plugins.folder.resolve())} if plugins else None,
    }  # fmt: skip
    result = _in_process("attncompile.targets.engine_worker", wanted, label, timeout)
    result["shared_limit"] = plugins.shared_limit if plugins else None
    if not result["ok"]:
        first = result["errors"][0] if result["errors"] else {"node": "", "op": "", "message": "no reason given"}
        where = f" at node '{first['node']}' ({first['op']})" if first["node"] else ""
        action = {"parse": "cannot parse the model", "options": "does not take the options"}.get(
            result["stage"], "cannot build the model"
        )
        message = " ".join(first["message"].split())[:400]
        raise TargetError(f"{label} {action}{where}: {message}", "use --target onnx for this model")
    return result


def _in_process(module: str, wanted: Mapping[str, Any], label: str, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="attncompile-engine-") as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "result.json"
        request.write_text(json.dumps({**wanted, "result": str(answer)}), encoding="utf-8")
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", module, str(request)], capture_output=True, text=True, errors="replace",
                timeout=timeout, env={**os.environ, "PYTHONPATH": path}, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TargetError(
                f"{label} did not finish within {timeout:.0f} s", "build with a smaller profile, or on a faster machine"
            ) from None
        if not answer.exists():
            raise TargetError(f"{label} {_ending(done.returncode)}: {_tail(done)}", "report the model to NVIDIA")
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
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


def capabilities() -> list[int]:
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
