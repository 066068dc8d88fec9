"""The ``attncompile`` command. stdout carries data only; progress, messages and errors go to stderr.

Exit codes: 0 done; 1 a gate failed; 2 could not run; 130 interrupted, 143 terminated. Heavy modules are imported inside
the verbs: ``attncompile --help`` loads neither onnx nor a framework.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from attncompile import __version__, cli_fit, cli_kernels
from attncompile import cli_options as opt
from attncompile.core.errors import AttncompileError, BadArguments, GateFailed
from attncompile.core.policy import METRICS, check_budget

if TYPE_CHECKING:
    from attncompile.compare import Feeds
    from attncompile.pipeline import Options

VERBS = ("compile", "inspect", "explain", "plan", "verify", "profile", "bench", "fit", "kernels", "env")

_UsageError = typer.BadParameter.__bases__[0]
"""Base of every complaint about a command line. Typer exports it under no name of its own in all its versions."""

_HELP = """Find the attention in an ONNX model, replace it, prove the replacement, emit what is deployed.

`attncompile MODEL [OPTIONS]` is short for `attncompile compile MODEL [OPTIONS]`; `attncompile compile --help` lists
the options.

Exit codes: 0 done, 1 a gate failed, 2 could not run.
"""

app = typer.Typer(
    name="attncompile",
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"attncompile {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Typer shows the help text given to Typer(); the option's callback does all there is to do.
    pass


@app.command("compile", short_help="Replace, verify and write (the default verb).")
def _compile(
    model: opt.ModelPath,
    policy: opt.Policy = "exact",
    target: opt.Target = None,
    out: opt.Out = None,
    inputs: opt.Inputs = None,
    profile: opt.Profile = [],  # noqa: B006 - Typer makes a fresh list of each call's options
    max_error: opt.MaxError = None,
    metric: opt.Metric = None,
    density: opt.Density = None,
    keep_dense: opt.KeepDense = None,
    jobs: opt.Jobs = None,
    executor: opt.Executor = "local",
    provider: opt.Provider = "cpu",
    plan: opt.PlanFile = None,
    fitted: opt.Fitted = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write plan.toml only, like `plan`.")] = False,
    require_sites: opt.RequireSites = None,
    strict: opt.Strict = False,
    keep_slower: opt.KeepSlower = False,
    fp16: opt.Fp16 = False,
    bf16: opt.Bf16 = False,
    arch: opt.Arch = [],  # noqa: B006
    no_fusions: opt.NoFusions = False,
    half_norms: opt.HalfNorms = True,
    engine_profile: opt.EngineProfiles = [],  # noqa: B006
    min_shapes: opt.MinShapes = [],  # noqa: B006
    opt_shapes: opt.OptShapes = [],  # noqa: B006
    max_shapes: opt.MaxShapes = [],  # noqa: B006
    workspace: opt.Workspace = None,
    timing_cache: opt.TimingCache = None,
    weight_streaming: opt.WeightStreaming = False,
    refit: opt.Refit = False,
    engine_level: opt.Level = None,
    grid: opt.Grid = None,
    site: opt.Sites = [],  # noqa: B006
    threads: opt.Threads = None,
    hash_weights: opt.HashWeights = False,
    seed: opt.Seed = 0,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """Replace the attention of MODEL, verify the result and write it to OUT (the default verb)."""
    from attncompile import engine_options

    options = _options(
        policy=policy, target=target, out=out, inputs=inputs, profile=profile, max_error=max_error, metric=metric,
        plan=plan, fitted=fitted, dry_run=dry_run, require_sites=require_sites, strict=strict,
        keep_slower=keep_slower, fp16=fp16, bf16=bf16, arch=arch, fusions=not no_fusions, half_norms=half_norms,
        grid=grid, sites=site, threads=threads, hash_weights=hash_weights, seed=seed, density=density, jobs=jobs,
        executor=executor, provider=provider, keep_dense=keep_dense,
        engine=engine_options.parse(workspace, timing_cache, weight_streaming, refit, engine_level, engine_profile),
        ranges=engine_options.ranges(model, min_shapes, opt_shapes, max_shapes),
    )  # fmt: skip
    as_json = _as_json(format)
    if dry_run:
        return _write_plan(model, options, out, as_json, quiet)

    from attncompile import console, pipeline, report_text

    with console.progress(quiet) as progress, console.stdout_to_stderr():
        result = pipeline.compile(model, options, progress)
    if as_json:
        _print_json(result.to_json())
    else:
        report_text.print_table(result, console.data_console())
    for warning in _together(result.warnings):
        _say(f"warning: {warning}")
    if not quiet:
        _say(f"wrote {result.out}")
    for failure in result.failures:
        _say(f"error: {failure}")
    return result.exit_code


@app.command("inspect", short_help="List attention sites and near misses.")
def _inspect(
    model: opt.ModelPath,
    profile: opt.Profile = [],  # noqa: B006
    grid: opt.Grid = None,
    hash_weights: opt.HashWeights = False,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """List the attention sites of MODEL, and what looked like attention and is not taken. Writes nothing."""
    from attncompile import console, pipeline, report, report_text

    options = _options(profile=profile, grid=grid, hash_weights=hash_weights)
    as_json = _as_json(format)
    with console.stdout_to_stderr():
        found = pipeline.inspect(model, options)
    detection = found.detection
    if as_json:
        _print_json(
            {
                "model": report.model_info(found.model).to_json(),
                "profile": report.profile_json(found.profile.ranges),
                "sites": [s.to_json() for s in detection.sites],
                "near_misses": [n.to_json() for n in detection.near_misses],
            }
        )
    else:
        report_text.print_sites(detection.sites, detection.near_misses, console.data_console())
    if not quiet:
        _say(f"inspected in {found.seconds:.{1 if found.seconds >= 1 else 2}f} s")
    return 0


@app.command("explain", short_help="Say what was understood, and why a node is or is not attention.")
def _explain(
    model: opt.ModelPath,
    node: Annotated[
        str | None, typer.Argument(metavar="NODE", help="The same as --node.", show_default=False)
    ] = None,
    node_option: Annotated[
        str | None,
        typer.Option(
            "--node", metavar="N", show_default=False,
            help="Only this one: a site's id, or a node's or value's name. Default: every candidate.",
        ),
    ] = None,
    policy: opt.Policy = "exact",
    profile: opt.Profile = [],  # noqa: B006
    grid: opt.Grid = None,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:  # fmt: skip
    """Say of each candidate in MODEL (attention sites, then near misses) what was understood, what every mechanism says
    to it, and which check failed first; or only of one node.
    """
    if node is not None and node_option is not None and node != node_option:
        raise BadArguments(f"two nodes were given: '{node}' and '{node_option}'", "keep one of them")
    options = _options(policy=policy, profile=profile, grid=grid)
    as_json = _as_json(format)
    wanted = node_option if node is None else node

    from attncompile import console, explain

    with console.progress(quiet) as progress, console.stdout_to_stderr():
        progress.stage("detect")
        found = explain.explain_all(model, options) if wanted is None else explain.explain(model, wanted, options)
    if as_json:
        _print_json(found.to_json())
    else:
        for line in found.lines:
            typer.echo(line)
    return 0


@app.command("plan", short_help="Write plan.toml, for editing.")
def _plan(
    model: opt.ModelPath,
    policy: opt.Policy = "exact",
    target: opt.Target = None,
    out: opt.PlanOut = None,
    inputs: opt.Inputs = None,
    profile: opt.Profile = [],  # noqa: B006
    max_error: opt.MaxError = None,
    metric: opt.Metric = None,
    require_sites: opt.RequireSites = None,
    grid: opt.Grid = None,
    site: opt.Sites = [],  # noqa: B006
    threads: opt.Threads = None,
    hash_weights: opt.HashWeights = False,
    seed: opt.Seed = 0,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """Decide what to do with each site of MODEL and write plan.toml for editing (`compile --dry-run`)."""
    options = _options(
        policy=policy, target=target, out=out, inputs=inputs, profile=profile, max_error=max_error, metric=metric,
        dry_run=True, require_sites=require_sites, grid=grid, sites=site, threads=threads, hash_weights=hash_weights,
        seed=seed,
    )  # fmt: skip
    return _write_plan(model, options, out, _as_json(format), quiet)


@app.command("verify", short_help="Compare the outputs of two files.")
def _verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL_A", help="The reference.")],
    other: Annotated[Path, typer.Argument(metavar="MODEL_B", help="What is judged.")],
    inputs: opt.PlainInputs = None,
    profile: opt.Profile = [],  # noqa: B006
    max_error: opt.AllowedError = None,
    metric: opt.Metric = None,
    seed: opt.Seed = 0,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """Run MODEL_A and MODEL_B on the same inputs and compare every output; exit code 1 if they differ too much.

    Without --inputs, seeded ones are made at the smallest, usual and largest shapes.
    """
    options = _options(inputs=inputs, profile=profile, max_error=max_error, metric=metric, seed=seed)
    as_json = _as_json(format)

    from attncompile import compare, console, report_text

    with console.progress(quiet) as progress, console.stdout_to_stderr():
        feeds = _feeds(model, options, seed)
        found = compare.compare(model, other, feeds, progress, budget=max_error, metric=metric or "relative_l2")
    if as_json:
        _print_json(found.to_json())
    else:
        report_text.print_comparison(found, console.data_console())
    return 0 if found.passed else GateFailed.exit_code


@app.command("profile", short_help="Show where the time goes, per site and layer.")
def _profile(
    model: opt.ModelPath,
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="A file made from MODEL, to be compared with it.", show_default=False),
    ] = None,
    inputs: opt.PlainInputs = None,
    profile: opt.Profile = [],  # noqa: B006
    grid: opt.Grid = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=0, help="How many layers the tables show.")] = 15,
    runs: Annotated[int, typer.Option("--runs", metavar="N", min=1, help="Runs that are averaged.")] = 10,
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """Time each attention site and layer of MODEL, and of OTHER beside it, with ONNX Runtime's profiler on the CPU.

    At the usual shapes of --profile, or on the first of --inputs. Profiling slows a model down: compare two files by
    `bench`.
    """
    options = _options(inputs=inputs, profile=profile, grid=grid, seed=seed, threads=threads)
    as_json = _as_json(format)

    from attncompile import compare, console, pipeline, report_text

    with console.progress(quiet) as progress, console.stdout_to_stderr():
        progress.stage("detect")
        found = pipeline.inspect(model, options)
        feeds = compare.feeds_for(found.model, found.profile, inputs, seed)[0]
        sites = found.detection.sites
        times = compare.profile_files(model, other, sites, feeds, progress, runs=runs, threads=threads)
    if as_json:
        _print_json(times.to_json())
    else:
        report_text.print_profile(times, top, console.data_console())
    return 0


@app.command("bench", short_help="Time two files against each other.")
def _bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL_A", help="The baseline.")],
    other: Annotated[Path, typer.Argument(metavar="MODEL_B", help="What is compared with it.")],
    inputs: opt.PlainInputs = None,
    profile: opt.Profile = [],  # noqa: B006
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", min=6, show_default=False, help="Rounds at each shape.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="Time for each shape.")] = 10.0,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where both run.")] = "cpu",
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
    format: opt.Format = "table",
    quiet: opt.Quiet = False,
) -> int:
    """Time MODEL_A and MODEL_B in paired rounds with ONNX Runtime, both fully optimised.

    With --device cuda either may be a folder that --target onnxruntime-cuda wrote; inputs and outputs stay on the GPU.
    """
    device = opt.choice(device, opt.PROVIDERS, "--device")
    if not 0 < seconds < float("inf"):
        raise BadArguments(f"--seconds {seconds} is no time to take", "give a number above 0, such as 10")
    options = _options(inputs=inputs, profile=profile, seed=seed, threads=threads)
    as_json = _as_json(format)

    from attncompile import compare, console, report_text

    with console.progress(quiet) as progress, console.stdout_to_stderr():
        feeds = _feeds(compare.portable(model), options, seed)
        timings = compare.bench(
            model, other, feeds, progress, rounds=rounds, seconds=seconds, threads=threads, device=device
        )
    if as_json:
        value = [t.to_json() for t in timings]
        _print_json({"original": str(model), "other": str(other), "shapes": value})
    else:
        report_text.print_timings(timings, console.data_console())
    return 0


app.command("fit", short_help="Fit linear attention to the attention of a model.")(cli_fit.run)
app.add_typer(cli_kernels.app, name="kernels")


@app.command("env", short_help="Print versions, hardware and usable targets.")
def _env(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Build, run and check an engine of TensorRT for every op of ours.")
    ] = False,
    format: opt.Format = "table",
) -> int:
    """Print versions, CPU, GPUs and which targets can be used here. Imports no framework without --selftest."""
    from attncompile import console, env

    if selftest:
        return _selftest(_as_json(format))
    found = env.environment()
    if _as_json(format):
        _print_json(found.to_json())
        return 0
    out = console.data_console()
    rows = [
        ("attncompile", found.attncompile),
        ("python", found.python),
        ("platform", found.platform),
        ("cpu", f"{found.cpu}, {found.threads} of {found.cores} cores usable"),
        ("memory", f"{found.memory / 2**30:.1f} GiB"),
        ("cuda driver", found.cuda_driver or "none"),
        *(("gpu", f"{g.name}, sm_{g.capability[0]}{g.capability[1]}, {g.memory / 2**30:.1f} GiB") for g in found.gpus),
        *found.packages.items(),
        *((f"target {n}", ("yes: " if v.ok else "no: ") + v.reason) for n, v in found.targets.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        out.print(f"{name:<{width}}  {text}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _selftest(as_json: bool) -> int:
    from attncompile import console, report_text, selftest

    with console.stdout_to_stderr():
        rows = selftest.run()
    if as_json:
        _print_json({"selftest": [dataclasses.asdict(r) for r in rows]})
    else:
        told = [
            (
                r.op,
                "passed" if r.ok else "failed",
                "" if r.error is None else f"{r.error:.1e}",
                f"{r.seconds:.1f}",
                r.said,
            )
            for r in rows
        ]
        report_text.print_table_of(("op", "engine", "relative L2", "seconds", ""), told, console.data_console())
    return 0 if all(r.ok for r in rows) else GateFailed.exit_code


def _options(**given: Any) -> Options:
    """``pipeline.Options`` of the command line's texts; whatever is wrong with them is a BadArguments."""
    from attncompile.pipeline import Options

    known = dict(given)
    if known.get("target") is not None:
        opt.choice(known["target"], opt.TARGETS, "--target")
    if known.get("metric") is not None:
        opt.choice(known["metric"], METRICS, "--metric")
    if known.get("max_error") is not None:
        check_budget(known["max_error"], known.get("metric"), "--max-error")
    if known.get("keep_dense") is not None:
        from attncompile.core.keep_dense import KeepDense

        KeepDense.parse(known["keep_dense"])
    if known.get("density") is not None:
        if not 0 < known["density"] <= 1:
            raise BadArguments(f"--density {known['density']} is no share", "give a number above 0, and at most 1")
        if known.get("max_error") is not None:
            raise BadArguments("--density and --max-error exclude each other", "keep one of the two")
    if "executor" in known:
        opt.choice(known["executor"], opt.EXECUTORS, "--executor")
        opt.choice(known["provider"], opt.PROVIDERS, "--provider")
    if known.get("require_sites") is not None and known["require_sites"] < 0:
        raise BadArguments("--require-sites is negative", "give the number of sites that must be found")
    if known.get("plan") is not None and known.get("dry_run"):
        raise BadArguments("--plan and --dry-run exclude each other", "--dry-run writes a plan, --plan applies one")
    opt.existing(known.get("inputs"), "--inputs")
    opt.existing(known.get("plan"), "--plan")
    opt.existing(known.get("fitted"), "--fitted")
    opt.check_grid(known.get("grid"))
    known["profile"] = opt.parse_profile(known.get("profile", ()))
    ranges = known.pop("ranges", {})  # in trtexec's spelling
    twice = sorted(set(ranges) & set(known["profile"]))
    if twice:
        raise BadArguments(f"'{twice[0]}' is set by --profile and by a shape", "keep one of the two")
    known["profile"] |= ranges
    if "fp16" in known:
        known["precision"] = opt.precision(known.pop("fp16"), known.pop("bf16"))
    if "arch" in known:
        known["architectures"] = opt.architectures(known.pop("arch"))
        if known["architectures"] and known.get("target") != "onnxruntime-cuda":
            raise BadArguments("--arch is for targets with kernels", "add --target onnxruntime-cuda")
    if "sites" in known:
        known["sites"] = tuple(known["sites"])
    return Options(**known)


def _together(warnings: Sequence[str]) -> list[str]:
    """Sites that were rolled back for the same reason in one warning."""
    said = " was rolled back: "
    sites: dict[str, list[str]] = {}
    for warning in warnings:
        site, found, reason = warning.partition(said)
        sites.setdefault(reason if found else warning, []).extend([site] if found else [])
    return [
        f"{', '.join(names)}{said if len(names) == 1 else ' were rolled back: '}{text}" if names else text
        for text, names in sites.items()
    ]


def _feeds(model: Path, options: Options, seed: int) -> Sequence[Feeds]:
    """Inputs for ``model``: the user's, or seeded ones at the shapes of the profile."""
    from attncompile.compare import feeds_for
    from attncompile.passes.equal_lengths import with_sums
    from attncompile.passes.load import load
    from attncompile.passes.symbols import profile_for

    loaded = with_sums(load(model), options.profile)
    return feeds_for(loaded, profile_for(loaded, options.profile), options.inputs, seed)


def _write_plan(model: Path, options: Options, out: Path | None, as_json: bool, quiet: bool) -> int:
    from attncompile import console, pipeline, report_text
    from attncompile.core import plan_toml
    from attncompile.core.folder import write_file

    path = _plan_path(model, out)
    with console.progress(quiet) as progress, console.stdout_to_stderr():
        progress.stage("detect")
        found = pipeline.inspect(model, options)
        plan = pipeline.plan(found, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, plan_toml.dumps(plan).encode())  # an edited plan is never half-overwritten
    if as_json:
        _print_json(plan_toml.to_json(plan))
    else:
        report_text.print_plan(found.detection.sites, plan.decisions, console.data_console())
    for note in plan.notes:
        _say(f"note: {note}")
    if not quiet:
        _say(f"wrote {path}; edit it, then: attncompile {model} --plan {path}")
    wanted = options.require_sites
    if wanted is not None and len(plan.decisions) < wanted:
        _say(f"error: {len(plan.decisions)} attention sites were found, --require-sites asks for {wanted}")
        return GateFailed.exit_code
    return 0


def _plan_path(model: Path, out: Path | None) -> Path:
    if out is None:
        return Path(f"{model.stem}.plan.toml")
    return out if out.suffix == ".toml" else out / "plan.toml"


def _as_json(format: str) -> bool:
    return opt.choice(format, ("table", "json"), "--format") == "json"


def _print_json(value: dict[str, Any]) -> None:
    from attncompile.report import dumps

    sys.stdout.write(dumps(value))


def _say(text: str) -> None:
    typer.echo(text, err=True)


class _Ended(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What a scheduler or a closed terminal sends ends the work as Ctrl-C does: workers stop, no half-made folder is
    left. A signal that is ignored (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise _Ended(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [getattr(signal, n) for n in names if signal.getsignal(getattr(signal, n)) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Bad input of any kind ends in two lines on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("ATTNCOMPILE_DEBUG", "") not in ("", "0")
    try:
        with warnings.catch_warnings(), _ended_by_signals():
            if not debug:  # NaN and infinity are looked at where they matter; NumPy's remarks about them are chatter
                warnings.simplefilter("ignore", RuntimeWarning)
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except _Ended as ended:
        _say("terminated")
        return 128 + ended.number
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        message, hint, code = _explained(error, arguments)
        _say("error: " + " ".join(message.splitlines()))
        if hint:
            _say("hint: " + " ".join(hint.splitlines()))
        return code


def _run(arguments: list[str]) -> int:
    command = get_command(app)
    if not arguments:
        with contextlib.redirect_stdout(sys.stderr):
            _invoke(command, ["--help"])
        return 2
    if arguments[0] not in (*VERBS, "--help", "-h", "--version"):
        first = arguments[0]
        if not first.startswith("-") and not Path(first).exists() and not Path(first).suffix:
            meant = difflib.get_close_matches(first, VERBS, 1)
            hint = f"did you mean 'attncompile {meant[0]}'?" if meant else f"the verbs are {', '.join(VERBS)}"
            raise BadArguments(f"'{first}' is neither a verb nor a file", hint)
        arguments = ["compile", *arguments]
    return _invoke(command, arguments)


def _invoke(command: Any, arguments: list[str]) -> int:
    # Not command.main(): it turns a closed pipe into exit code 1, which here says that a gate failed.
    try:
        with command.make_context("attncompile", list(arguments)) as context:
            code = command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    return code if isinstance(code, int) else 0


def _explained(error: Exception, arguments: Sequence[str]) -> tuple[str, str, int]:
    """What to tell the user about ``error``: (message, hint, exit code)."""
    if isinstance(error, AttncompileError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, _UsageError):
        return *_usage(error, arguments), 2
    if isinstance(error, typer.Abort):
        return "aborted", "", 130
    if isinstance(error, MemoryError):
        return "out of memory", "use smaller shapes (--profile SYM=MIN:USUAL:MAX) or a machine with more memory", 2
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("attncompile"):
        return f"the Python package '{error.name}' is not installed", f"pip install {error.name}", 2
    if isinstance(error, OSError) and error.errno in _USERS_OS_ERRORS:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}", "check the path, its permissions and the free space there", 2
    text = str(error).strip()
    return (
        f"{type(error).__name__}{': ' if text else ''}{text}; this is a bug in attncompile",
        "run it again with ATTNCOMPILE_DEBUG=1 for the traceback, and report it with the model's `inspect` output",
        2,
    )


_USERS_OS_ERRORS = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
     errno.ENAMETOOLONG, errno.EDQUOT, errno.EFBIG, errno.ENOTEMPTY)
)  # fmt: skip
"""What goes wrong with the user's paths and disk; other system errors are taken for bugs."""


def _usage(error: Any, arguments: Sequence[str]) -> tuple[str, str]:
    """(message, hint) of a command line that cannot be read."""
    possible = list(getattr(error, "possibilities", None) or ())
    message = (error.message if possible else error.format_message()).strip().rstrip(".")
    first = arguments[0] if arguments else ""
    verb = first if first in VERBS else "compile"
    if possible:
        close = difflib.get_close_matches(getattr(error, "option_name", ""), possible, 1) or sorted(possible)
        return message, f"did you mean {close[0]}?"
    meant = difflib.get_close_matches(first, VERBS, 1)
    if first not in VERBS and meant and not Path(first).exists():
        return message, f"did you mean 'attncompile {meant[0]}'?"
    return message, f"see 'attncompile {verb} --help'"
