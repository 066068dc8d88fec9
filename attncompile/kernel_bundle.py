"""From a model file to the kernels that its nodes need: what ``attncompile kernels`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from attncompile import pipeline
from attncompile.console import Progress
from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.folder import check_replaceable
from attncompile.core.kernel import ARCHITECTURES, OpCall
from attncompile.kernels import build, bundle, calls, compiler
from attncompile.kernels.cache import Cache
from attncompile.kernels.records import Built, NodeCall
from attncompile.passes import replace
from attncompile.passes.load import graphs, load
from attncompile.plugins import kernels

MODEL = "model.onnx"
INSIDE = "bundle"
"""The bundle's folder in ``OUT/``."""


@dataclass(frozen=True, slots=True)
class Request:
    """``dtype`` None: float16 for nodes in float32, and both for the standard calls (``standard``)."""

    model: Path | None
    out: Path | None = None
    architectures: tuple[int, ...] = ARCHITECTURES
    dtype: str | None = None
    standard: bool = False
    options: pipeline.Options = field(default_factory=pipeline.Options)


def make(request: Request, progress: Progress) -> tuple[Path, Built]:
    """Compile and write a bundle; returns where it is and what is in it.

    Raises:
        MissingDependency: Triton is not there.
        BadArguments: the bundle cannot be written there, or no node of the model has a kernel (and why).
    """
    triton = compiler.require_triton()
    out = request.out or _default_out(request.model)
    check_replaceable(out)  # before minutes of work
    nodes = _nodes(request, progress) if request.model is not None else []
    further = _standard(request.dtype) if request.standard else []
    made = build.build(
        nodes, further, kernels(), request.architectures, Cache.default(),
        lambda total: progress.stage("compile kernels", total), progress.advance,
    )  # fmt: skip
    if not made.compiled:
        reasons = [f"{n.name or n.op}: {n.verdict.reason}" for n, _ in made.nodes if n.call is None]
        reasons += [r.reason for c in made.calls for r in c.refused]
        hint = next((n.verdict.hint for n, _ in made.nodes if n.verdict.hint), "")
        raise BadArguments(
            f"there is no kernel to compile: {reasons[0]}", hint or "nodes without one run through their bodies"
        )
    bundle.write(out, made, triton)
    return out, made


def _default_out(model: Path | None) -> Path:
    if model is None:
        return Path(f"standard.{INSIDE}")
    return model / INSIDE if model.is_dir() else Path(f"{model.stem}.{INSIDE}")


def _standard(dtype: str | None) -> list[OpCall]:
    wanted = calls.DTYPES if dtype is None else (dtype,)
    return [c for d in wanted for k in kernels().values() for c in k.standard(d)]


def _nodes(request: Request, progress: Progress) -> Sequence[NodeCall]:
    assert request.model is not None
    path = request.model
    if path.is_dir():
        path /= MODEL
        if not path.is_file():
            raise BadArguments(f"{request.model} holds no {MODEL}", "give an ONNX file, or a folder that compile wrote")
    dtype = request.dtype or calls.DTYPES[0]
    models = _with_our_ops(path, request.options, progress)
    found = [node for model in models for node in calls.find(model, kernels(), dtype)]
    if not found:
        raise BadArguments(
            f"no attention of {path} is replaced by an op of ours, so there is nothing to compile",
            f"see why: attncompile plan {path}; another --policy replaces more, --all needs no model",
        )
    return found


def _with_our_ops(path: Path, options: pipeline.Options, progress: Progress) -> list[ModelProto]:
    """The model of ``path`` where it has ops of ours, else what a plan makes of it; nothing is checked or timed. Of a
    plan with a rule for calls that stay dense also what it makes of the approximated sites there.
    """
    model = load(path)
    if any(node.domain == calls.DOMAIN for graph in graphs(model.proto) for node in graph.node):
        if options.plan is not None:
            raise BadArguments(f"{path} was compiled already, so --plan does not apply", "give the original model")
        return [model.proto]
    progress.stage("plan")
    found = pipeline.inspect(path, options)
    both = pipeline.sides(found, options)
    if isinstance(found.normal, Unsupported):
        return [model.proto]
    return [replace.apply(found.normal, [(e.site, e.lowering) for e in edits]) for edits in both if edits]
