"""The dynamic dimensions of a model's inputs, and the profile that gives each a range."""

from __future__ import annotations

from collections.abc import Mapping

from attncompile.core.errors import BadArguments
from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.sums import terms_of
from attncompile.passes.index import symbol_of

BATCH = Range(1, 1, 4, assumed=True)
LENGTH = Range(1, 128, 512, assumed=True)
"""Ranges assumed for dimensions that the user gave none for: 512 positions are what the smallest tables hold."""


def symbols(model: Model) -> dict[str, int]:
    """Every dynamic dimension's name, with the first axis that it is found on. A sum of others (``past + sequence``) is
    none of them: its size follows.
    """
    found: dict[str, int] = {}
    stored = {t.name for t in model.proto.graph.initializer}
    for info in model.proto.graph.input:
        if info.name in stored:
            continue
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            symbol = symbol_of(info.name, axis, dim)
            if symbol is not None:
                found.setdefault(symbol, axis)
    sums = {s: terms[0].keys() for s in found if (terms := terms_of(s)) is not None}
    plain = found.keys() - sums.keys()
    return {s: axis for s, axis in found.items() if s in plain or not sums[s] <= plain}


def profile_for(model: Model, given: Mapping[str, Range]) -> ShapeProfile:
    """The user's ranges, and assumed ones for the dimensions that were not given.

    Raises:
        BadArguments: a range for a dimension that the model does not have.
    """
    known = symbols(model)
    for name in given:
        if name not in known:
            names = ", ".join(known) or "none: every shape is fixed"
            raise BadArguments(f"the model has no dynamic dimension '{name}'", f"its dynamic dimensions: {names}")
    return ShapeProfile({name: given.get(name) or (BATCH if axis == 0 else LENGTH) for name, axis in known.items()})
