"""The folder ``OUT/``: where it may be, what targets add to it, and the files that describe it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from attncompile import report as reports
from attncompile.core import plan_toml
from attncompile.core.errors import BadArguments, TargetError
from attncompile.core.plan import Plan
from attncompile.env import default_target
from attncompile.report import Report, TargetFile, TargetReport
from attncompile.targets import base
from attncompile.targets.base import BuildResult, Target
from attncompile.targets.folder import atomic_folder, check_replaceable

if TYPE_CHECKING:
    from attncompile.console import Progress
    from attncompile.pipeline import Inspection, Options


def target(name: str | None, precision: str | None) -> Target:
    """The target that was asked for, or the default one.

    Raises:
        BadArguments: no such target, or a precision for a target without engines.
        MissingDependency: it cannot be built here.
    """
    chosen = name or default_target()
    if name is None and chosen not in base.names():
        chosen = "onnx"
    if chosen not in base.names():
        raise BadArguments(
            f"target {chosen} is not in this version of attncompile", f"targets: {', '.join(base.names())}"
        )
    found = base.get(chosen)
    if name is not None:
        base.require(found)
    if precision is not None and chosen == "onnx":
        raise BadArguments(f"--{precision} is for targets with engines; onnx keeps the model's own types",
                           "add --target tensorrt-rtx")  # fmt: skip
    return found


def check(out: Path, model: Path) -> None:
    """Refuse an output folder that would destroy something, before any work is done.

    Raises:
        BadArguments: ``out`` is a file, holds the input model, or holds files that are not ours.
    """
    if out.resolve() == model.resolve().parent or out.resolve() in model.resolve().parents:
        raise BadArguments(f"--out {out} is the folder of the input model", "name another folder")
    check_replaceable(out)


def staged(out: Path) -> AbstractContextManager[Path]:
    """A temporary folder beside ``out`` that takes its place when the block ends without an error."""
    return atomic_folder(out)


def build(
    found: Inspection, options: Options, target: Target, folder: Path, progress: Progress
) -> tuple[TargetReport, ...]:
    """Builds the engine of ``target`` from the written ``model.onnx``; the portable file is a target of its own.

    Raises:
        TargetError: the target refused the model or failed to build it.
    """
    portable = TargetReport("onnx", tuple(_file(folder, p) for p in _model_files(found, folder)), 0.0)
    if target.name == "onnx":
        return (portable,)
    progress.stage(f"build {target.name}")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    precision = options.precision
    if precision not in (None, "fp16", "bf16"):
        raise TargetError(f"there is no precision {precision}", "use --fp16 or --bf16")
    lowered = target.lower(proto, found.model, precision)  # type: ignore[arg-type]
    result = target.build(lowered, found.model, found.profile, folder, found.detection.sites)
    return (portable, _report(result, folder))


def _report(result: BuildResult, folder: Path) -> TargetReport:
    notes = [*result.notes, *([result.reason] if result.reason else [])]
    return TargetReport(
        result.target, tuple(_file(folder, p) for p in result.files), round(result.seconds, 3), result.engine_size,
        result.attention_layers, result.attention_fused, tuple(notes),
    )  # fmt: skip


def _model_files(found: Inspection, folder: Path) -> list[Path]:
    return [folder / "model.onnx", *(folder / f.location for f in found.model.external_files)]


def _file(folder: Path, path: Path) -> TargetFile:
    return TargetFile(path.relative_to(folder).as_posix(), path.stat().st_size)


def write(folder: Path, report: Report, plan: Plan) -> None:
    """``report.json`` and ``plan.toml``."""
    (folder / "plan.toml").write_text(plan_toml.dumps(plan), encoding="utf-8")
    (folder / "report.json").write_text(reports.dumps(report.to_json()), encoding="utf-8")
