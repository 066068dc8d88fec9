"""The numbers of one launch: int32 arguments and grid, from symbols. Nothing ever wraps."""

from __future__ import annotations

from collections.abc import Mapping

from attncompile.core.errors import KernelError
from attncompile.core.kernel import Argument
from attncompile.kernels.entry import Entry
from attncompile.kernels.expressions import evaluate

_GRID_LIMITS = (2**31 - 1, 65535, 65535)


def int32(argument: Argument, symbols: Mapping[str, int], where: str) -> int:
    """The value of an int32 argument. ``where`` names the node in errors."""
    value = evaluate(argument.expression, symbols)
    if not -(2**31) <= value < 2**31:
        raise KernelError(
            f"{where}: argument {argument.name} = {argument.expression} is {value}, which is no int32",
            "the tensors are too large for one launch: split the batch",
        )
    return value


def grid(entry: Entry, symbols: Mapping[str, int], where: str) -> tuple[int, int, int]:
    """Blocks an axis; any may be 0, and then there is nothing to launch."""
    sizes = [evaluate(expression, symbols) for expression in entry.grid]
    for axis, size, limit in zip("xyz", sizes, _GRID_LIMITS, strict=True):
        if not 0 <= size <= limit:
            raise KernelError(
                f"{where}: a grid of {size} blocks on axis {axis}; CUDA has at most {limit}", "split the batch"
            )
    return sizes[0], sizes[1], sizes[2]
