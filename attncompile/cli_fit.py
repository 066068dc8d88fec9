"""``attncompile fit``: fit feature maps of linear attention to a model's attention maps, and say how far they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncompile import cli_options as opt
from attncompile.core.errors import BadArguments
from attncompile.core.policy import METRICS

if TYPE_CHECKING:
    from attncompile.fit import FitReport

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE|DIR", show_default=False,
                 help="An .npz file, or a folder for fitted.npz and fit.json. Default: MODEL.fitted.npz here."),
]  # fmt: skip
Maps = Annotated[
    list[str],
    typer.Option("--map", metavar="KIND", show_default=False,
                 help="Only this map: hedgehog, relu or mala; repeat it for more. Default: all three."),
]  # fmt: skip
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=0, help="Steps of a learned map.")]
Width = Annotated[
    int | None,
    typer.Option("--width", metavar="W", min=1, max=512, show_default=False,
                 help="Columns of a learned map's weight; hedgehog has two features each. Default: the head dim."),
]  # fmt: skip


def run(
    model: opt.ModelPath,
    inputs: opt.Inputs = None,
    out: Out = None,
    map: Maps = [],  # noqa: B006 - Typer makes a fresh list of each call's options
    steps: Steps = 200,
    width: Width = None,
    metric: opt.Metric = None,
    site: opt.Sites = [],  # noqa: B006
    profile: opt.Profile = [],  # noqa: B006
    grid: opt.Grid = None,
    jobs: opt.Jobs = None,
    executor: opt.Executor = "local",
    provider: opt.Provider = "cpu",
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """Fit feature maps to every head of MODEL's softmax attention, on half of the inputs, and say how far linear
    attention with them is on the other half. `compile --policy linear --fitted FILE` takes them; without --fitted it
    fits itself.

    Nothing is replaced here.
    """
    as_json = opt.choice(format, ("table", "json"), "--format") == "json"
    if inputs is None:
        raise BadArguments("fit needs --inputs", "give real inputs: .npz, .json or a .py with load_data()")
    if not model.exists():
        raise BadArguments(f"{model} does not exist", "check the path")
    opt.existing(inputs, "--inputs")
    if metric is not None:
        opt.choice(metric, METRICS, "--metric")
    opt.choice(executor, opt.EXECUTORS, "--executor")
    opt.choice(provider, opt.PROVIDERS, "--provider")
    where = out or Path(f"{model.stem}.fitted.npz")
    folder = where if where.is_dir() or where.suffix != ".npz" else None

    from attncompile import console, fitting, pipeline, report, report_text
    from attncompile.core.feature_map import KINDS
    from attncompile.fit import fitted

    target = where if folder is None else folder / fitted.FILE
    _check_target(target, (model, inputs))
    kinds = [opt.choice(k, KINDS, "--map") for k in map] or list(KINDS)
    options = pipeline.Options(
        inputs=inputs, profile=opt.parse_profile(profile), grid=opt.check_grid(grid), sites=tuple(site), jobs=jobs,
        executor=executor, threads=threads, seed=seed, provider="cuda" if provider == "cuda" else "cpu",
        metric=metric,
    )  # fmt: skip
    with console.progress(quiet) as progress, console.stdout_to_stderr():
        made, found = fitting.fit(model, options, tuple(k for k in KINDS if k in kinds), steps, width, progress)
        fitted.save(target, made)
        if folder is not None:
            (folder / "fit.json").write_text(report.dumps(_json(model, target, found)), encoding="utf-8")
    if as_json:
        import sys

        sys.stdout.write(report.dumps(_json(model, target, found)))
    else:
        report_text.print_fit(found, console.data_console())
    if not quiet:
        typer.echo(f"wrote {target}; use it: attncompile {model} --policy linear --inputs FILE --fitted {target}",
                   err=True)  # fmt: skip
    return 0


def _check_target(target: Path, given: tuple[Path, ...]) -> None:
    """Makes the folder of ``target`` before any work is done. Raises ``BadArguments`` where it cannot be written."""
    if target.resolve() in {path.resolve() for path in given}:
        raise BadArguments(f"--out {target} would overwrite what is read", "name another file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArguments(f"cannot make the folder {target.parent}: {error.strerror}", "name another place") from None
    if not os.access(target.parent, os.W_OK) or target.is_dir():
        raise BadArguments(f"cannot write {target}", "name another place")


def _json(model: Path, target: Path, found: FitReport) -> dict[str, Any]:
    return {"model": str(model), "fitted": str(target), **found.to_json()}
