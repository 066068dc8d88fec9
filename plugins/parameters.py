"""A mechanism's parameters as a person may have edited them in plan.toml: of their types, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Parameters

LARGEST = 2**31 - 1
"""No number of tokens is larger; NumPy and ONNX hold sums and products of a few of them."""


def check_names(op: str, given: Parameters, known: Collection[str]) -> None:
    """Raises ``Unsupported`` for a parameter that nothing reads: for a misspelt one its default would be taken."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise Unsupported("parameters", f"{op} has no parameter {', '.join(unknown)} here",
                          f"it has {', '.join(known)}")  # fmt: skip


def whole(op: str, given: Parameters, name: str, default: int) -> int:
    """A whole number. Raises ``Unsupported`` for anything else, and for one that no sequence has."""
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST:
        raise _wrong(op, name, value, "a whole number")
    return value


def wholes(op: str, given: Parameters, name: str, default: Sequence[int] | None) -> tuple[int, ...]:
    """A list of whole numbers, flags among them. Raises ``Unsupported`` for anything else; ``default`` None: for
    nothing, too.
    """
    value: Any = given.get(name, default)
    if value is None:
        raise Unsupported("parameters", f"{op}: {name} is missing", f"{name} is a list of whole numbers")
    if not isinstance(value, list | tuple) or not all(isinstance(v, int) and abs(v) <= LARGEST for v in value):
        raise _wrong(op, name, value, "a list of whole numbers")
    return tuple(int(v) for v in value)


def number(op: str, given: Parameters, name: str, default: float) -> float:
    """A number, NaN and infinities among them. Raises ``Unsupported`` for anything else."""
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(op, name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _wrong(op, name, value, "a number that a double holds") from None


def flag(op: str, given: Parameters, name: str, default: bool = False) -> bool:
    """True or False, 1 or 0. Raises ``Unsupported`` for anything else, such as a text."""
    value = given.get(name, default)
    if not isinstance(value, int) or value not in (0, 1):
        raise _wrong(op, name, value, "true or false")
    return bool(value)


def _wrong(op: str, name: str, value: object, wanted: str) -> Unsupported:
    try:
        said = repr(value)
    except ValueError:  # more digits than Python writes
        said = "a number without end"
    return Unsupported("parameters", f"{op}: {name} = {said[:60]}", f"{name} is {wanted}")
