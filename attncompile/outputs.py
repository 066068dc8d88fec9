"""The folder ``OUT/``: where it may be, what targets add to it, and the files that describe it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from onnx import ModelProto

from attncompile import engine_profile, fusion_check, report_html, tensorrt_plugins, verify
from attncompile import report as reports
from attncompile.core import plan_toml
from attncompile.core.errors import AttncompileError, BadArguments, GateFailed, MissingDependency
from attncompile.core.folder import atomic_folder, check_replaceable
from attncompile.core.plan import Plan
from attncompile.env import default_target
from attncompile.kernel_kit import Kit, default_architectures
from attncompile.kernels.entry import digest
from attncompile.plugins import kernels
from attncompile.report import Report, TargetFile, TargetReport
from attncompile.targets import base
from attncompile.targets import onnx as onnx_target
from attncompile.targets.base import BuildResult, Target
from attncompile.targets.engine import METADATA, EngineOptions, EngineTarget
from attncompile.targets.kernels import Launching
from attncompile.targets.onnxruntime_cuda import OnnxRuntimeCuda
from attncompile.targets.ort_fusions import BIASES, ROUNDING
from attncompile.targets.tensorrt import TensorRT

if TYPE_CHECKING:
    from attncompile.console import Progress
    from attncompile.pipeline import Inspection, Options
    from attncompile.targets.base import Precision

Feed = Mapping[str, np.ndarray]

FP16_BUDGET = 1e-2
"""Relative L2 at the outputs that a conversion to fp16 may cost: ten times fp16's rounding unit."""


def target(name: str | None, precision: str | None, engine: EngineOptions | None = None) -> Target:
    """The target that was asked for, or the default one.

    Raises:
        BadArguments: no such target, or a precision or options of an ``engine`` for a target that has none.
        MissingDependency: it cannot be built here, and nothing is gained by writing the portable outputs alone.
    """
    chosen = name or default_target()
    if name is None and chosen not in base.names():
        chosen = "onnx"
    if chosen not in base.names():
        raise BadArguments(
            f"target {chosen} is not in this version of attncompile", f"targets: {', '.join(base.names())}"
        )
    found = base.get(chosen)
    if name is not None and not getattr(found, "portable_without", False):
        base.require(found)
    if precision is not None and chosen == "onnx":
        raise BadArguments(f"--{precision} is for other targets; onnx keeps the model's own types",
                           "add --target tensorrt-rtx or onnxruntime-cuda")  # fmt: skip
    if engine not in (None, EngineOptions()) and not isinstance(found, EngineTarget):
        raise BadArguments(f"target {chosen} builds no engine, and --workspace, --timing-cache, --weight-streaming, "
                           "--refit, --engine-level and --engine-profile are of one",
                           "leave them out, or add --target tensorrt-rtx or tensorrt")  # fmt: skip
    return found


def configured(target: Target, options: Options, plan: Plan) -> Target:
    """``target`` with what it needs of this run: the engine's options and metadata, and for TensorRT our kernels."""
    if not isinstance(target, EngineTarget):
        return target
    metadata = {"plan": f"sha256:{digest(plan_toml.dumps(plan).encode())}", "policy": plan.policy}
    if isinstance(target, TensorRT) and target.available().ok:
        plugins = tensorrt_plugins.for_this_gpu(kernels())
        return replace(target, options=options.engine, metadata=metadata, plugins=plugins)
    return replace(target, options=options.engine, metadata=metadata)


def check(out: Path, model: Path) -> None:
    """Refuse an output folder that would destroy something, before any work is done.

    Raises:
        BadArguments: ``out`` is a file, holds the input model, or holds files that are not ours.
    """
    folder, file = (Path(os.path.realpath(p)) for p in (out, model))  # resolve() fails on a link to itself
    if folder == file.parent or folder in file.parents:
        raise BadArguments(f"--out {out} is the folder of the input model", "name another folder")
    check_replaceable(out)


def staged(out: Path) -> AbstractContextManager[Path]:
    """A temporary folder beside ``out`` that takes its place when the block ends without an error."""
    return atomic_folder(out)


@dataclass(frozen=True, slots=True)
class Built:
    """What the targets wrote; ``problems`` are why one that was to be built was not, ``missing`` if it was because of a
    package that is not there.
    """

    reports: tuple[TargetReport, ...]
    problems: tuple[str, ...] = ()
    missing: bool = False


def build(
    found: Inspection, options: Options, target: Target, proto: ModelProto, folder: Path,
    evidence: Callable[[], Sequence[Feed]], progress: Progress,
) -> Built:  # fmt: skip
    """Builds the engine of ``target`` from ``proto``. ``model.onnx`` is a target of its own and stays whatever happens
    here.
    """
    portable = TargetReport("onnx", tuple(_file(folder, p) for p in _model_files(found, folder)), 0.0)
    if target.name == "onnx":
        return Built((portable,))
    progress.stage(f"build {target.name}")
    try:
        base.require(target)
        precision = cast("Precision | None", options.precision)
        if isinstance(target, Launching):
            architectures = options.architectures or default_architectures()
            target = target.equipped(Kit(architectures, progress, found.detection.sites))
        said: tuple[str, ...] = ()
        if isinstance(target, OnnxRuntimeCuda):
            fusing = target.fusing(options.fusions, options.half_norms)
            target, lowered, said = _fused(found, fusing, proto, precision, evidence)
        else:
            lowered = target.lower(proto, found.model, precision)
        result = target.build(lowered, found.model, found.profile, folder, found.detection.sites)
        notes = (*said, *_parity(found, target, result, evidence(), precision, proto))
    except AttncompileError as error:
        # A half-made engine, or one that failed its parity, must not be deployed by mistake.
        half_made = ("model*engine*", "model.layers.json", "model.onnxruntime-cuda.*")
        for left in (path for pattern in half_made for path in folder.glob(pattern)):
            left.unlink()
        hint = f" ({error.hint})" if error.hint else ""
        # What was missing says which target it was for.
        missing = isinstance(error, MissingDependency)
        why = error.message if missing else f"target {target.name}: {error.message}"
        return Built((portable,), (f"{why}{hint}",), missing)
    return Built((portable, _report(result, folder, notes)))


def _fused(
    found: Inspection, target: OnnxRuntimeCuda, proto: ModelProto, precision: Precision | None,
    evidence: Callable[[], Sequence[Feed]],
) -> tuple[OnnxRuntimeCuda, ModelProto, tuple[str, ...]]:  # fmt: skip
    """The lowered model, with fusions if those leave its outputs what they were; the target, and what to say. Those
    that round constants are left out where all together do not, and all that drop any where nothing compares them.
    """
    first: Mapping[str, int] = {}
    refused = ""
    for form in (target, *(target.fusing(True, target.half_norms, without) for without in (ROUNDING, BIASES))):
        lowered = form.lower(proto, found.model, precision)
        if not form.fused:
            return form, lowered, ()
        verdict = fusion_check.check(
            proto, found.model, precision, evidence(), form.fused, lowered, form.unlaunched, form.half_norms
        )
        first = first or form.fused
        if verdict.ok:
            dropped = ", ".join(n for n in BIASES if n in first and n not in form.fused)
            return form, lowered, ((f"without {dropped}: {refused}",) if dropped else ()) + (verdict.reason,)
        if not form.fused.keys() & set(BIASES):
            break
        refused = verdict.reason
    plain = target.fusing(False)
    return plain, plain.lower(proto, found.model, precision), (f"nothing was fused: {verdict.reason}",)


def _parity(
    found: Inspection, target: Target, result: BuildResult, feeds: Sequence[Feed], precision: Precision | None,
    proto: ModelProto,
) -> tuple[str, ...]:  # fmt: skip
    """The engine against the original where it runs here, else what was converted against it."""
    if isinstance(target, TensorRT) and result.engine is not None:
        return _engine_parity(found, result.engine, feeds, precision)
    return _precision_parity(found, result, feeds, precision, proto) if precision else ()


ENGINE_BUDGETS = {"fp16": FP16_BUDGET, "bf16": 8 * FP16_BUDGET, None: FP16_BUDGET}
"""Relative L2 at the outputs of an engine of TensorRT. It multiplies float32 in TF32, which rounds as fp16 does; bf16
has three bits less."""


def _engine_parity(
    found: Inspection, engine: Path, feeds: Sequence[Feed], precision: Precision | None
) -> tuple[str, ...]:
    """``model.onnx``, which was compared with the original, in ONNX Runtime against the engine.

    Raises:
        GateFailed: it is further away than rounding explains.
    """
    if verify.uses_bfloat16(found.model.proto):
        return ("the engine was compared with nothing: ONNX Runtime's CPU provider has no bfloat16 kernels",)
    budget = max(ENGINE_BUDGETS[precision], verify.exact_budget(found.model.proto))
    compared = verify.compare_models(engine.with_name("model.onnx"), engine, feeds, budget=budget)
    if not compared.passed:
        raise GateFailed(f"the engine is too far from model.onnx: {compared.verdict.reason}", "report this model")
    told = f"the engine against model.onnx in ONNX Runtime: relative L2 {compared.error:.1e}"
    return (told, _layer_times(engine, feeds))


def _layer_times(engine: Path, feeds: Sequence[Feed]) -> str:
    """Writes ``model.layers.json``, and says how much of the time plugins take."""
    known = json.loads(engine.with_name(METADATA).read_text(encoding="utf-8"))
    layers = engine_profile.profile(engine, feeds, known["module"], known["plugins"])
    text = json.dumps([asdict(layer) for layer in layers], indent=1)
    engine.with_name("model.layers.json").write_text(text + "\n", encoding="utf-8")
    whole, ours = (sum(x.microseconds for x in layers if x.plugin or every) for every in (True, False))
    return f"{len(layers)} layers take {whole / 1000:.3f} ms, our plugins {ours / 1000:.3f} ms of it: model.layers.json"


def _precision_parity(
    found: Inspection, result: BuildResult, feeds: Sequence[Feed], precision: Precision, proto: ModelProto
) -> tuple[str, ...]:
    """The converted model against the original in its own precision, both in ONNX Runtime: the engine cannot run here.
    Where kernels are launched, ``proto`` is converted with the bodies of its ops in their place. One with
    approximations is compared with itself before: those were judged by their own budget.

    Raises:
        GateFailed: it is further away than rounding to ``precision`` explains.
    """
    if precision == "bf16":
        return ("bf16 parity not measured: ONNX Runtime's CPU provider has no bfloat16 kernels",)
    approximate = any(p.key == "attncompile.approximate_sites" for p in proto.metadata_props)
    other = "the model before it was converted" if approximate else "the original"
    with tempfile.TemporaryDirectory(prefix="attncompile-parity-") as scratch:
        lowered, path = next(p for p in result.files if p.suffix == ".onnx"), found.model.path
        places = [Path(scratch) / name for name in ("converted", "before")]
        for place in places:
            place.mkdir()
        if result.launches:
            twin = onnx_target.TARGET.lower(proto, found.model, precision)
            lowered = onnx_target.write(twin, found.model, places[0])
        if approximate:
            path = onnx_target.write(proto, found.model, places[1])
        compared = verify.compare_models(path, lowered, feeds, budget=FP16_BUDGET)
    if not compared.passed:
        raise GateFailed(
            f"the {precision} model is too far from {other}: {compared.verdict.reason}", f"build without --{precision}"
        )
    return (f"{precision} against {other} in ONNX Runtime: relative L2 {compared.error:.1e}",)


def _report(result: BuildResult, folder: Path, parity: Sequence[str]) -> TargetReport:
    notes = [*result.notes, *([result.reason] if result.reason else []), *parity]
    return TargetReport(
        result.target, tuple(_file(folder, p) for p in result.files), round(result.seconds, 3), result.engine_size,
        result.attention_layers, result.attention_fused, tuple(notes),
    )  # fmt: skip


def _model_files(found: Inspection, folder: Path) -> list[Path]:
    return [folder / "model.onnx", *(folder / f.location for f in found.model.external_files)]


def _file(folder: Path, path: Path) -> TargetFile:
    return TargetFile(path.relative_to(folder).as_posix(), path.stat().st_size)


def write(folder: Path, report: Report, plan: Plan) -> None:
    """``plan.toml``, ``report.json`` and ``report.html``."""
    (folder / "plan.toml").write_text(plan_toml.dumps(plan), encoding="utf-8")
    (folder / "report.json").write_text(reports.dumps(report.to_json()), encoding="utf-8")
    (folder / "report.html").write_text(report_html.render(report), encoding="utf-8")
