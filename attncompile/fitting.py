"""The way of ``attncompile fit``: detect, fit, judge. Nothing is replaced."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from attncompile import fit as fits
from attncompile import measure, verify
from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.feature_map import Kind
from attncompile.ledger_check import LedgerCheck
from attncompile.pipeline import Options, Worlds, inspect
from attncompile.shaped import binding_of

if TYPE_CHECKING:
    from attncompile.console import Progress


def fit(
    model: Path, options: Options, kinds: tuple[Kind, ...], steps: int, width: int | None, progress: Progress
) -> tuple[fits.Fitted, fits.FitReport]:
    """The maps of ``model``'s softmax sites (those of ``options.sites``, where it names any), and how far they are.

    Raises:
        AttncompileError: the model or the inputs cannot be read or run, or torch is missing.
    """
    progress.stage("detect")
    found = inspect(model, options)
    if isinstance(found.normal, Unsupported):
        raise BadArguments(f"{model} cannot be rewritten: {found.normal.message}", found.normal.hint)
    if verify.uses_bfloat16(found.model.proto):
        raise BadArguments(f"{model} is in bfloat16, which ONNX Runtime's CPU provider cannot run",
                           "fit a float32 export of it")  # fmt: skip
    sites = found.detection.sites
    unknown = [s for s in options.sites if s not in {site.id for site in sites}]
    if unknown:
        raise BadArguments(f"--site: the model has no site '{unknown[0]}'", "list its sites: attncompile inspect MODEL")
    chosen = [s for s in sites if s.id in (options.sites or {s.id})]
    worlds = Worlds(found.index)
    if options.inputs is not None:
        check = LedgerCheck(found.ledger, found.feeds, lambda feed: worlds(binding_of(found, feed)), options.inputs)
        for broken in check.of_any(chosen):
            raise BadArguments(
                f"nothing can be fitted: {broken.text}", "give inputs of finite numbers, of the sizes in --profile"
            )
    settings = fits.Settings(
        kinds, steps, width, options.seed, options.metric or "relative_l2", options.jobs or measure.default_threads(),
        options.threads, options.executor, options.provider,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        work = fits.Fit(found, found.feeds, [worlds(binding_of(found, feed)) for feed in found.feeds], Path(scratch),
                        settings, progress)  # fmt: skip
        return work.run(chosen)
