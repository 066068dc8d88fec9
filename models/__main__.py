"""``python -m attncompile.models NAME --out FILE``: export a recipe. ``--list`` names them all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from attncompile.core.errors import AttncompileError, BadArguments
from attncompile.models import NAMES, export, recipe
from attncompile.models.export import OPSETS

_OPTIONS = (
    "size",
    "exporter",
    "opset",
    "attention",
    "dtype",
    "tokens",
    "window",
    "layers",
    "kv_heads",
    "padding_mask",
    "batch",
    "seed",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise BadArguments(message, "python -m attncompile.models --help lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m attncompile.models", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of " + ", ".join(NAMES))
    parser.add_argument("--list", action="store_true", help="print the recipes with their sizes and exit")
    parser.add_argument("--out", metavar="FILE", help="where to write the ONNX file")
    parser.add_argument("--inputs", metavar="FILE", help="write real inputs for the model: .npz, or .json for several")
    parser.add_argument("--count", type=int, default=1, help="how many input sets (default 1)")
    parser.add_argument("--size", help="default: tiny")
    ranges = ", ".join(f"{name} {low}-{high}" for name, (low, high) in OPSETS.items())
    parser.add_argument("--opset", type=int, help=f"{ranges}; default: 18, 17")
    parser.add_argument("--exporter", help="dynamo (default) or torchscript")
    parser.add_argument("--attention", choices=("sdpa", "eager"), help="how the torch code writes attention")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--tokens", type=int, help="sequence length, or number of image patches (a square)")
    parser.add_argument("--window", type=int, help="keys that a query sees, itself included")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--padding-mask", action=argparse.BooleanOptionalAction, help="input attention_mask")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--dynamic", nargs="?", const="all", metavar="AXES", help="symbolic axes, e.g. batch,sequence (default: all)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 could not run)."""
    try:
        _run(_parser().parse_args(arguments))
    except AttncompileError as error:
        sys.stderr.write(f"error: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return error.exit_code
    return 0


def _run(parsed: argparse.Namespace) -> None:
    if parsed.list:
        for name in NAMES:
            found = recipe(name)
            sys.stdout.write(f"{name:<10}{found.description}\n{'':<10}sizes: {', '.join(found.sizes)}\n")
        return
    if parsed.name is None:
        raise BadArguments("no recipe given", "choose one of " + ", ".join(NAMES))
    if parsed.out is None and parsed.inputs is None:
        raise BadArguments("nothing to write", "add --out FILE.onnx, --inputs FILE.npz, or both")
    options = {name: getattr(parsed, name) for name in _OPTIONS if getattr(parsed, name) is not None}
    if parsed.dynamic is not None:
        axes = recipe(parsed.name).dynamic_axes if parsed.dynamic == "all" else parsed.dynamic.split(",")
        options["dynamic"] = tuple(axes)
    if parsed.out is not None:
        sys.stdout.write(f"{export(parsed.name, parsed.out, **options).path}\n")
    if parsed.inputs is not None:
        from attncompile.models.inputs import write

        sys.stdout.write(f"{write(parsed.name, parsed.inputs, parsed.count, **options)}\n")


if __name__ == "__main__":
    sys.exit(main())
