"""Run one of torch's two ONNX exporters on a recipe, quietly, and write the file when it is whole."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncompile.core.errors import AttncompileError, BadArguments, MissingDependency
from attncompile.models.recipe import Built, Options
from attncompile.models.registry import recipe

if TYPE_CHECKING:
    import torch

# What torch 2.13 and onnxscript 0.7 can write. TorchScript stops at 20; dynamo's op library starts at 18.
OPSETS = {"dynamo": (18, 25), "torchscript": (9, 20)}
_DEFAULT_OPSET = {"dynamo": 18, "torchscript": 17}


class ExportFailed(AttncompileError):
    """torch's exporter refused the model."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The file written and what it was made from; ``built`` still holds the torch module and its example inputs."""

    path: Path
    options: Options
    built: Built


def export(name: str, out: str | Path, **options: Any) -> Exported:
    """Exports recipe ``name`` to the file ``out``; where it would pass 2 GB, weights go to files beside it.

    ``options`` are the fields of ``Options``. Raises ``BadArguments`` for options that do not fit the recipe or the
    exporter, ``MissingDependency`` without torch, transformers or diffusers, ``ExportFailed`` where torch refuses.
    """
    chosen = resolve(name, Options(**options))
    out = Path(out)
    if not out.parent.is_dir():
        raise BadArguments(f"{out.parent} is not a folder", "create it first, or choose another --out")
    with quiet():
        built = build(name, chosen)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            whole = Path(folder) / out.name
            try:
                export_built(built, chosen, whole)
            except Exception as error:  # torch raises dozens of types; each becomes one line here
                raise ExportFailed(
                    f"{name}: the {chosen.exporter} exporter failed at opset {chosen.opset}: {_first_line(error)}",
                    "try the other --exporter, another --opset, or --attention eager",
                ) from error
            for file in sorted(Path(folder).iterdir(), reverse=True):  # data first, so that the model is never alone
                shutil.move(file, out.parent / file.name)
    return Exported(out, chosen, built)


def resolve(name: str, options: Options) -> Options:
    """``options`` with the opset filled in, checked against the recipe and the exporter."""
    recipe(name).check(options)
    if options.exporter not in OPSETS:
        raise BadArguments(f"no exporter is called {options.exporter!r}", f"choose one of {', '.join(OPSETS)}")
    if options.opset is None:
        options = replace(options, opset=_DEFAULT_OPSET[options.exporter])
    low, high = OPSETS[options.exporter]
    opset = options.opset
    assert opset is not None
    if not low <= opset <= high:
        other = "torchscript" if options.exporter == "dynamo" else "dynamo"
        raise BadArguments(
            f"the {options.exporter} exporter writes opsets {low} to {high}, not {opset}",
            f"choose another --opset, or --exporter {other}",
        )
    if options.exporter == "torchscript" and opset < 14 and options.attention == "sdpa":
        raise BadArguments(
            f"the TorchScript exporter has no scaled_dot_product_attention at opset {opset}",
            "add --attention eager, or use --opset 14 or higher",
        )
    if options.dynamic and options.batch == 1 and "batch" in options.dynamic:
        # torch.export takes an example extent of 1 as a constant.
        options = replace(options, batch=2)
    return options


def build(name: str, options: Options) -> Built:
    """The torch module of a recipe with example inputs, in the dtype asked for."""
    try:
        import torch

        with torch.random.fork_rng(devices=[]):  # libraries draw their initial weights from the global generator
            torch.manual_seed(options.seed)
            built = recipe(name).build(options)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"the recipe {name} needs {error.name}", "install the extra: pip install 'attncompile[models]'"
        ) from error
    # The wrapper too: TorchScript's exporter gives every submodule the outermost one's mode back when it is done.
    built.module.eval()
    return cast(built, options)


def cast(built: Built, options: Options) -> Built:
    """``built`` in the element type that ``options`` ask for."""
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    if dtype is torch.float32:
        return built
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in built.inputs.items()}
    return replace(built, module=built.module.to(dtype), inputs=inputs)


def export_built(built: Built, options: Options, out: Path) -> None:
    """Runs the exporter; its exceptions pass through. ``options.opset`` must be set."""
    import torch

    axes = {
        name: {axis: label for axis, label in labels.items() if label in options.dynamic}
        for name, labels in ((name, built.axes.get(name, {})) for name in built.inputs)
    }
    names = list(built.inputs)
    arguments: tuple[torch.Tensor, ...] = tuple(built.inputs.values())
    with torch.no_grad():
        if options.exporter == "torchscript":
            torch.onnx.export(
                built.module,
                arguments,
                str(out),
                dynamo=False,
                opset_version=options.opset,
                input_names=names,
                output_names=list(built.outputs),
                dynamic_axes=axes,
                verbose=False,
            )
            return
        # One symbol an axis name, shared by all inputs: equal lengths are equal from the start of the trace.
        symbols = {label: torch.export.Dim(label) for label in options.dynamic}
        dynamic = tuple({axis: symbols[label] for axis, label in axes[name].items()} for name in names)
        program = torch.onnx.export(
            built.module,
            arguments,
            dynamo=True,
            opset_version=options.opset,
            input_names=names,
            output_names=list(built.outputs),
            dynamic_shapes=dynamic if options.dynamic else None,
            verbose=False,
        )
        assert program is not None
        program.save(str(out), include_initializers=True)


def _first_line(error: BaseException) -> str:
    """The line that says why: the deepest cause's first line that is not empty."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:400] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' prints, warnings and log lines off both streams: stdout carries data only.

    Below Python's streams the two file descriptors are redirected too: TorchScript dumps its graph from C++.
    """
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with (
        _no_descriptors(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _no_descriptors() -> Iterator[None]:
    """File descriptors 1 and 2 lead nowhere while this is open."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, nowhere):
            os.close(descriptor)
