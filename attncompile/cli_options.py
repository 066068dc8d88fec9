"""The command line's options, shared by its verbs, and how their texts are read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from attncompile.core.errors import BadArguments
from attncompile.core.profile import Range

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.", show_default=False)]
Policy = Annotated[
    str, typer.Option("--policy", metavar="P", help="exact, sparse, another policy's name, or a policy's .toml file.")
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="T", show_default=False,
        help="onnx, onnxruntime-cuda, tensorrt-rtx or tensorrt. Default: tensorrt if it loads and there is a GPU, else "
        "tensorrt-rtx if it is installed, else onnx. onnx is always written.",
    ),
]  # fmt: skip
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="OUT", show_default=False, help="Output folder. Default: MODEL.attncompile here."
    ),
]
PlanOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="OUT", show_default=False, help="A .toml file, or a folder for plan.toml."),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs", metavar="FILE", show_default=False,
        help="Real inputs: .npz, Polygraphy's .json, or a .py with load_data(). Approximations need them.",
    ),
]  # fmt: skip
Profile = Annotated[
    list[str],
    typer.Option(
        "--profile", "--shapes", metavar="SYM=MIN:USUAL:MAX", show_default=False,
        help="Sizes of a dynamic dimension, such as seq=1:512:4096 or batch=1. Repeat it, or use commas.",
    ),
]  # fmt: skip
PlainInputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs", metavar="FILE", show_default=False,
        help="Real inputs: .npz, Polygraphy's .json, or a .py with load_data(). Default: seeded ones.",
    ),
]  # fmt: skip
"""``--inputs`` of the verbs that run files as they are."""
AllowedError = Annotated[
    float | None,
    typer.Option(
        "--max-error", metavar="E", show_default=False,
        help="Largest error at the outputs. Default: what rounding may cost, 1e-5 in float32.",
    ),
]  # fmt: skip
"""``--max-error`` of ``verify``, which knows no policy."""
MaxError = Annotated[
    float | None,
    typer.Option("--max-error", metavar="E", show_default=False, help="Budget at the outputs. Default: the policy's."),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric", metavar="M", show_default=False,
        help="What --max-error is measured in: relative_l2, max_abs, cosine, psnr, kl, top1_agreement or perplexity "
        "(its relative rise). Default: the policy's, or relative_l2.",
    ),
]  # fmt: skip
Density = Annotated[
    float | None,
    typer.Option(
        "--density", metavar="D", show_default=False,
        help="In place of an error budget: this share of the blocks of full attention, 0 to 1; the error is reported.",
    ),
]  # fmt: skip
KeepDense = Annotated[
    str | None,
    typer.Option(
        "--keep-dense", metavar="RULE", show_default=False,
        help="Calls in which nothing is approximated, by an input that is a number, such as 'time >= 0.7' for the "
        "first steps of a sampler. Default: the policy's, or none.",
    ),
]  # fmt: skip
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", metavar="N", min=1, max=512, show_default=False,
        help="Processes that search for approximations. Default: one a usable core.",
    ),
]  # fmt: skip
Executor = Annotated[
    str, typer.Option("--executor", metavar="local|ray", help="Where they run; ray: the cluster of RAY_ADDRESS.")
]
Provider = Annotated[
    str, typer.Option("--provider", metavar="cpu|cuda", help="Where the search runs the model, in ONNX Runtime.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", show_default=False, help="Apply this (edited) plan.toml.")
]
Fitted = Annotated[
    Path | None,
    typer.Option(
        "--fitted", metavar="FILE", show_default=False,
        help="Feature maps that `fit` wrote, or the folder OUT of a run that used some. Default: policy linear fits.",
    ),
]  # fmt: skip
RequireSites = Annotated[
    int | None,
    typer.Option("--require-sites", metavar="N", show_default=False, help="Fail unless N sites or more are found."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if any replacement had to be rolled back.")]
KeepSlower = Annotated[bool, typer.Option("--keep-slower", help="Keep replacements that are measured to be slower.")]
HalfNorms = Annotated[
    bool,
    typer.Option(
        "--half-norms/--no-half-norms",
        help="Fuse residual sums into norms in fp16 too: onnxruntime-gpu before 1.27 needs strict mode for them.",
    ),
]
NoFusions = Annotated[
    bool,
    typer.Option("--no-fusions", help="Leave what lies between sites as it is, for onnxruntime-cuda."),
]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Build the engine, or the model for onnxruntime-cuda, in float16.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="The same in bfloat16.")]
Grid = Annotated[
    str | None,
    typer.Option(
        "--grid", metavar="HxW[+P]", show_default=False,
        help="How tokens lie in space, such as 14x14+1 (a class token before a 14 by 14 grid).",
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, max=512, show_default=False, help="CPU threads. Default: all usable."
    ),
]
HashWeights = Annotated[bool, typer.Option("--hash-weights", help="Hash the contents of external weights too.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of generated inputs.")]
Sites = Annotated[
    list[str],
    typer.Option(
        "--site", metavar="ID", show_default=False, help="Only this site; repeat it for more.",
    ),
]  # fmt: skip
Arch = Annotated[
    list[str],
    typer.Option(
        "--arch", metavar="CC", show_default=False,
        help="Compile kernels for this compute capability, such as 90; repeat it. Default: the GPUs here, else (and "
        "for `kernels build`) 80, 86, 89, 90, 100, 120.",
    ),
]  # fmt: skip
EngineProfiles = Annotated[
    list[str],
    typer.Option(
        "--engine-profile", metavar="SYM=MIN:USUAL:MAX", show_default=False,
        help="One optimisation profile of the engine, inside of --profile; repeat it for more.",
    ),
]  # fmt: skip
Workspace = Annotated[
    str | None,
    typer.Option("--workspace", metavar="SIZE", show_default=False, help="Memory for the engine's builder, as 4G."),
]
TimingCache = Annotated[
    Path | None,
    typer.Option("--timing-cache", metavar="FILE", show_default=False, help="Timings of the builder, kept there."),
]
WeightStreaming = Annotated[bool, typer.Option("--weight-streaming", help="Let the engine stream its weights.")]
Refit = Annotated[bool, typer.Option("--refit", help="Let the engine's weights be replaced later.")]
Level = Annotated[
    int | None,
    typer.Option(
        "--engine-level", metavar="0..5", min=0, max=5, show_default=False, help="How hard the builder tries."
    ),
]  # fmt: skip
MinShapes = Annotated[
    list[str],
    typer.Option("--minShapes", metavar="IN:1xN,...", show_default=False, help="As trtexec's, instead of --profile."),
]
OptShapes = Annotated[
    list[str],
    typer.Option("--optShapes", metavar="IN:1xN,...", show_default=False, help="As trtexec's, instead of --profile."),
]
MaxShapes = Annotated[
    list[str],
    typer.Option("--maxShapes", metavar="IN:1xN,...", show_default=False, help="As trtexec's, instead of --profile."),
]
Format = Annotated[str, typer.Option("--format", metavar="table|json", help="What goes to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]

TARGETS = ("onnx", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt")
EXECUTORS = ("local", "ray")
PROVIDERS = ("cpu", "cuda")

_GRID = re.compile(r"[1-9]\d*(x[1-9]\d*){0,2}(\+\d+){0,2}")


def choice(value: str, names: Sequence[str], option: str) -> str:
    """``value`` if it is one of ``names``; else BadArguments, with the name that was probably meant."""
    if value in names:
        return value
    close = difflib.get_close_matches(value, names, 1)
    hint = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(names)}"
    raise BadArguments(f"{option} does not know '{value}'", hint)


def parse_profile(texts: Iterable[str]) -> dict[str, Range]:
    """``["seq=1:512:4096", "batch=1"]`` as ranges. A single number fixes the dimension."""
    ranges: dict[str, Range] = {}
    for text in (part for item in texts for part in item.split(",") if part.strip()):
        symbol, equals, sizes = (piece.strip() for piece in text.partition("="))
        if not equals or not symbol:
            raise BadArguments(f"--profile '{text}' has no '='", "write SYMBOL=MIN:USUAL:MAX, such as seq=1:512:4096")
        pieces = sizes.split(":")
        if len(pieces) not in (1, 3) or not all(re.fullmatch(r"\s*\d+\s*", p) for p in pieces):
            raise BadArguments(
                f"--profile '{text}' is not one size, nor three", "write SYMBOL=MIN:USUAL:MAX, such as seq=1:512:4096"
            )
        if symbol in ranges:
            raise BadArguments(f"--profile gives '{symbol}' twice", "keep one of the two")
        numbers = [int(p) for p in pieces]
        ranges[symbol] = Range(numbers[0], numbers[len(numbers) // 2], numbers[-1])
    return ranges


def precision(fp16: bool, bf16: bool) -> str | None:
    """The engine's precision; BadArguments for both at once."""
    if fp16 and bf16:
        raise BadArguments("--fp16 and --bf16 exclude each other", "choose one of them")
    return "fp16" if fp16 else "bf16" if bf16 else None


def architectures(texts: Sequence[str]) -> tuple[int, ...]:
    """``["90", "sm_80"]`` as (80, 90); empty for none."""
    from attncompile.core.kernel import ARCHITECTURES

    names = {str(a): a for a in ARCHITECTURES}
    return tuple(
        sorted({names[choice(t.removeprefix("sm_").removesuffix("a"), tuple(names), "--arch")] for t in texts})
    )


def check_grid(text: str | None) -> str | None:
    """``text`` if it is written like ``4096``, ``14x14+1`` or ``8x14x14+1+0`` (prefix, then suffix tokens)."""
    if text is not None and not _GRID.fullmatch(text):
        raise BadArguments(f"--grid '{text}' is not a grid", "write HEIGHTxWIDTH+PREFIX, such as 14x14+1")
    return text


def existing(path: Path | None, option: str) -> Path | None:
    """``path`` if it is None or there."""
    if path is not None and not path.exists():
        raise BadArguments(f"{option}: {path} does not exist", "check the path")
    return path
