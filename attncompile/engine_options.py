"""How the command line says how an engine is built, in our spelling and in trtexec's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attncompile import cli_options as opt
from attncompile.core.errors import BadArguments
from attncompile.core.profile import Range
from attncompile.targets.engine import EngineOptions

_UNITS = {"": 20, "B": 0, "K": 10, "M": 20, "G": 30}
"""A number alone is in MiB, as trtexec has it."""


def parse(
    workspace: str | None, timing_cache: Path | None, weight_streaming: bool, refit: bool, level: int | None,
    profiles: Sequence[str],
) -> EngineOptions:  # fmt: skip
    """The options. Each of ``profiles`` is one text in the syntax of ``--profile``. Raises BadArguments."""
    return EngineOptions(
        workspace=None if workspace is None else size(workspace), timing_cache=timing_cache,
        weight_streaming=weight_streaming, refit=refit, level=level,
        profiles=tuple(opt.parse_profile([text]) for text in profiles),
    )  # fmt: skip


def size(text: str) -> int:
    """``512M``, ``4G`` or ``1024`` (MiB) in bytes."""
    match = re.fullmatch(r"(\d+)([KMGB]?)", text.strip().upper())
    if match is None:
        raise BadArguments(f"--workspace '{text}' is no size", "write 512M or 4G")
    return int(match[1]) << _UNITS[match[2]]


def ranges(model: Path, minimum: Sequence[str], usual: Sequence[str], maximum: Sequence[str]) -> dict[str, Range]:
    """What trtexec's ``--minShapes``, ``--optShapes`` and ``--maxShapes`` (``x:1x64,y:1x2``) say of the dynamic
    dimensions of ``model``. One that is left out is as ``--optShapes``, else as the others.

    Raises:
        BadArguments: an input, its number of axes or a fixed size is not the model's, or two shapes contradict.
    """
    given = [_shapes(texts) for texts in (minimum, usual, maximum)]
    names = {name for shapes in given for name in shapes}
    if not names:
        return {}
    dims = _dims(model)
    found: dict[str, Range] = {}
    for name in sorted(names):
        if name not in dims:
            raise BadArguments(f"the model has no input '{name}'", f"its inputs: {', '.join(dims)}")
        low, mid, high = (shapes.get(name) for shapes in given)
        mid = mid or low or high
        assert mid is not None
        bounds = (low or mid, mid, high or mid)
        if any(len(b) != len(dims[name]) for b in bounds):
            shown = "x".join(str(n) for n in mid)
            raise BadArguments(
                f"input '{name}' has {len(dims[name])} axes, not those of {shown}", "give all of its axes"
            )
        for axis, symbol in enumerate(dims[name]):
            _take(found, symbol if symbol != "" else f"{name}:{axis}", tuple(b[axis] for b in bounds), name)
    return found


def _shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in (part for item in texts for part in item.split(",") if part.strip()):
        name, _, sizes = text.strip().rpartition(":")
        if not name or not re.fullmatch(r"\d+(x\d+)*", sizes):
            raise BadArguments(f"'{text}' is no shape of an input", "write NAME:1x64, as for trtexec")
        found[name] = tuple(int(n) for n in sizes.split("x"))
    return found


def _dims(model: Path) -> dict[str, list[str | int]]:
    """Sizes of every input: a number, the name of a dynamic one, or "" where it has none."""
    from attncompile.passes.load import load

    graph = load(model).proto.graph
    stored = {t.name for t in graph.initializer}
    return {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in graph.input
        if v.name not in stored
    }


def _take(found: dict[str, Range], symbol: str | int, sizes: tuple[int, ...], name: str) -> None:
    if isinstance(symbol, int):
        if set(sizes) != {symbol}:
            raise BadArguments(
                f"input '{name}' has a fixed size {symbol} where {sizes[1]} was given", "give its own size"
            )
        return
    if not re.fullmatch(r"[A-Za-z_][\w.:]*", symbol):
        return  # computed from others, such as past + sequence
    low, usual, high = sizes
    wanted = Range(low, usual, high)
    if found.setdefault(symbol, wanted) != wanted:
        raise BadArguments(f"'{symbol}' has two ranges", f"input '{name}' contradicts another one")
