"""Dynamic dimensions that have to be sums of others: a mask of length ``total`` beside ``past`` and ``sequence``.

The file gives each a name of its own, but an addition of mask and scores says that they go together. Sizes that are
bound one by one would contradict the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import combinations

from onnx import ModelProto

from attncompile.core.model import Model
from attncompile.core.sums import size_of
from attncompile.passes.detect import worth_looking
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.index import symbol_of
from attncompile.passes.symbols import symbols

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where", "And", "Or", "Max", "Min", "Equal", "Less", "Greater"})
_SIZES = ((61, 127, 251, 499, 997, 1987, 3967), (67, 139, 283, 571, 1151, 2297, 4591))
"""Two sets of sizes in which no sum of two, and none with a small number, is another."""
_MORE = 8
"""The largest number that is added to a name: the tokens of one step."""


def with_sums(model: Model, given: Collection[str] = ()) -> Model:
    """``model`` unchanged, or a copy whose inputs say of such dimensions which sum they are (``past + sequence``); the
    ``notes`` name them. ``given``: dimensions that the user gave a range, which stay what they are.

    Sizes other than these sums are no sizes of the model: an elementwise operator fails there. A sum is one where two
    sets of sizes say so, and nothing is said unless no such contradiction is left then.
    """
    changed = model
    for _ in range(len(_SIZES[0])):
        names = sorted(symbols(changed))
        if not (2 if changed is model else 1) <= len(names) <= len(_SIZES[0]):
            return model
        bindings = [dict(zip(names, sizes, strict=False)) for sizes in _SIZES]
        index = GraphIndex(changed)
        found = set(_mismatches(World(index, bindings[0])))
        if not found:
            return changed
        again = set(_mismatches(World(index, bindings[1])))
        following = next(
            (_named(changed, target, wanted) for target in names if target not in given
             for wanted in _sums([n for n in names if n != target])
             if _pair(target, wanted, bindings[0]) in found and _pair(target, wanted, bindings[1]) in again), None,
        )  # fmt: skip
        if following is None:
            return model
        changed = following
    return model


def _pair(target: str, wanted: str, binding: Mapping[str, int]) -> tuple[int, int]:
    a, b = binding[target], size_of(wanted, binding) or 0
    return min(a, b), max(a, b)


def _mismatches(world: World) -> Iterator[tuple[int, int]]:
    """Pairs of sizes that meet in an elementwise operator and are neither equal nor 1."""
    for node in world.index.own_order:
        if node.op_type not in _ELEMENTWISE or node.domain not in ("", "ai.onnx") or node.output[0] in world.shapes:
            continue
        shapes = [world.shapes.get(v) for v in node.input]
        for a, b in combinations([s for s in shapes if s is not None], 2):
            for x, y in zip(a[::-1], b[::-1], strict=False):
                if x != y and 1 not in (x, y):
                    yield min(x, y), max(x, y)
    for body in (b for group in world.index.bodies.values() for b in group):
        if worth_looking(world.index, body):
            yield from _mismatches(world.within(body.scope))


def _sums(names: list[str]) -> Iterator[str]:
    yield from names
    yield from (f"{a} + {b}" for a, b in combinations(names, 2))
    yield from (f"{a} + {n}" for a in names for n in range(1, _MORE + 1))


def _named(model: Model, symbol: str, wanted: str) -> Model:
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for info in proto.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if symbol_of(info.name, axis, dim) == symbol:
                dim.dim_param = wanted
    note = f"dimension '{symbol}' has to be {wanted}: the graph contradicts itself at other sizes"
    return replace(model, proto=proto, notes=(*model.notes, note))
