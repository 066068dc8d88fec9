"""``attncompile kernels``: build bundles of GPU kernels and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncompile import cli_options as opt
from attncompile.core.errors import BadArguments

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("op", "dtype", "dim", "arch", "tactic", "shared", "registers", "spills", "bytes")

app = typer.Typer(
    help="Compile GPU kernels ahead of time, on any machine.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.command("build", short_help="Compile the kernels that a model needs.")
def _build(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL|OUT", help="An ONNX file, or a folder that compile wrote.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", show_default=False,
                     help="The bundle. Default: MODEL.bundle here, or OUT/bundle."),
    ] = None,
    arch: opt.Arch = [],  # noqa: B006 - Typer makes a fresh list of each call's options
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="float16|bfloat16", show_default=False,
                     help="What nodes in float32 are compiled for. Default: float16."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Attention of the usual head dims and masks too; needs no MODEL.")
    ] = False,
    plan: opt.PlanFile = None,
    policy: opt.Policy = "exact",
    profile: opt.Profile = [],  # noqa: B006
    grid: opt.Grid = None,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:  # fmt: skip
    """Compile the GPU kernels of the ops of ours in MODEL into a bundle, without a GPU. A model that has none yet is
    planned as `compile` does, or by --plan. Compiled kernels are kept in $ATTNCOMPILE_CACHE, else in the user's cache.
    """
    as_json = opt.choice(format, ("table", "json"), "--format") == "json"
    if model is None and not everything:
        raise BadArguments("neither a MODEL nor --all was given", "attncompile kernels build MODEL")
    if model is not None and not model.exists():
        raise BadArguments(f"{model} does not exist", "check the path")

    from attncompile import console, kernel_bundle, pipeline
    from attncompile.core.kernel import ARCHITECTURES
    from attncompile.kernels import bundle
    from attncompile.kernels.calls import DTYPES

    if dtype is not None:
        opt.choice(dtype, DTYPES, "--dtype")
    opt.existing(plan, "--plan")
    options = pipeline.Options(
        policy=policy, profile=opt.parse_profile(profile), grid=opt.check_grid(grid), plan=plan, target="onnx"
    )  # fmt: skip
    request = kernel_bundle.Request(model, out, opt.architectures(arch) or ARCHITECTURES, dtype, everything, options)
    with console.progress(quiet) as progress, console.stdout_to_stderr():
        where, made = kernel_bundle.make(request, progress)
    opened = bundle.Bundle.open(where)
    _print(opened.index, opened.sizes(), as_json, console.data_console())
    for call in made.calls:
        for r in call.refused:
            what = f"{call.call.op} {call.call.dtype} {call.call.head_dim} {r.tactic}".strip()
            typer.echo(f"warning: {what} on sm_{r.architecture}: {r.reason}", err=True)
    if not quiet:
        typer.echo(f"wrote {where}", err=True)
    return 0


@app.command("list", short_help="Show what a bundle holds.")
def _list(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that build wrote.", show_default=False)],
    format: opt.Format = "table",
) -> int:
    """Check every file of BUNDLE and show its kernels."""
    as_json = opt.choice(format, ("table", "json"), "--format") == "json"

    from attncompile import console, kernel_bundle
    from attncompile.kernels import bundle

    inside = path / kernel_bundle.INSIDE
    opened = bundle.Bundle.open(inside if (inside / bundle.INDEX).is_file() else path)
    _print(opened.index, opened.sizes(), as_json, console.data_console())
    return 0


def _print(index: Any, sizes: Any, as_json: bool, console: Console) -> None:
    if as_json:
        import sys

        from attncompile.report import dumps

        sys.stdout.write(dumps(dict(index)))
        return
    from attncompile.report_text import print_table_of

    rows = [
        (e["op"], e["dtype"], _dim(e), f"sm_{e['architecture']}", e["tactic"], f"{e['shared']:,}",
         str(e["registers"]), str(e["spills"]), f"{sizes[e['id']]:,}")
        for e in sorted(index["entries"], key=_order)
    ]  # fmt: skip
    print_table_of(COLUMNS, rows, console)
    without = [(n["name"] or n["op"], n["op"], n["reason"]) for n in index["nodes"] if not n["call"]]
    if without:
        console.print()
        print_table_of(("without a kernel", "op", "why"), without, console)


def _dim(entry: Any) -> str:
    key, value = entry["head_dim"], entry["value_dim"]
    return str(key) if key == value else f"{key}/{value}"


def _order(entry: Any) -> tuple[Any, ...]:
    return (entry["op"], entry["dtype"], entry["head_dim"], entry["architecture"], entry["tactic"], entry["id"])
