"""NaN guards behind a softmax: elementwise nodes between the weights and themselves, proved to change nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import GraphIndex, World

_PREDICATES: dict[str, Callable[..., Any]] = {
    "IsNaN": np.isnan, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal, "Equal": np.equal, "And": np.logical_and, "Or": np.logical_or,
    "Not": np.logical_not,
}  # fmt: skip
_OPS = frozenset({*_PREDICATES, "IsInf", "Where", "Cast"})
_MAX_NODES = 24
_KEPT_TYPES = (TensorProto.BOOL, TensorProto.FLOAT, TensorProto.DOUBLE)
"""Casts to these keep every weight as it is; a cast to half is not part of a guard."""


@dataclass(frozen=True, slots=True)
class Guard:
    """``value`` is the guarded weights, ``nodes`` make it; ``zero`` says whether NaN weights become 0."""

    value: str
    nodes: tuple[NodeProto, ...]
    zero: bool


def guard(index: GraphIndex, world: World, weights: str) -> Guard | None:
    """The guard that all readers of ``weights`` belong to, or None where they are something else.

    Its nodes compare the weights with numbers, test for NaN and infinities and choose between the weights and numbers
    (``torch.nan_to_num``, ``Where(IsNaN(p), 0, p)``). Such a function of one number is known when it is known at, just
    beside and between the numbers that it compares with; there it must give back every weight from 0 to 1.

    Raises:
        Unsupported: it does anything else to a weight, or replaces NaN by something that is not zero.
    """
    nodes = _region(index, world, weights)
    if not any(n.op_type == "Where" for n in nodes):
        return None
    inside = {id(n) for n in nodes}
    made = [n.output[0] for n in nodes]
    ends = [v for v in made if v in index.outputs or any(id(r) not in inside for r in _readers(index, v))]
    if len(ends) != 1 or weights in index.outputs or any(id(r) not in inside for r in _readers(index, weights)):
        return None
    end = next(n for n in nodes if n.output[0] == ends[0])
    if end.op_type != "Where":
        return None
    numbers = [x for n in nodes for v in n.input if v not in (*made, weights) for x in [world.scalar(v)]]
    points = _points([x for x in numbers if x is not None])
    result = _evaluate(world, nodes, weights, points)[ends[0]]
    if not np.array_equal(result[:-1], points[:-1]):
        raise Unsupported("guard", f"'{ends[0]}' replaces weights that are not NaN")
    if not np.isnan(result[-1]) and result[-1] != 0.0:
        raise Unsupported("guard", f"'{ends[0]}' replaces NaN weights by something that is not zero")
    return Guard(ends[0], tuple(nodes), bool(result[-1] == 0.0))


def _readers(index: GraphIndex, value: str) -> list[NodeProto]:
    return [n for n in index.consumers.get(value, []) if n.op_type != "Shape"]


def _region(index: GraphIndex, world: World, weights: str) -> list[NodeProto]:
    """Elementwise nodes that read the weights, each other and numbers alone, in topological order."""
    shape, made = world.shapes.get(weights), {weights}
    found: list[NodeProto] = []
    grown = True
    while grown and len(found) < _MAX_NODES:
        grown = False
        near = [n for v in list(made) for n in _readers(index, v) if n.output[0] not in made]
        for node in near:
            others = [v for v in node.input if v not in made]
            if (
                node.output[0] not in made and node.op_type in _OPS and node.domain in ("", "ai.onnx")
                and world.shapes.get(node.output[0]) == shape and all(world.scalar(v) is not None for v in others)
                and (node.op_type != "Cast" or world.types.get(node.output[0]) in _KEPT_TYPES)
            ):  # fmt: skip
                found.append(node)
                made.add(node.output[0])
                grown = True
    return found


def _points(numbers: list[float]) -> np.ndarray:
    """Weights to try in float64, NaN the last: 0, 1, every number, its neighbours and what lies between."""
    inner = sorted({0.0, 1.0, *(x for x in numbers if 0.0 <= x <= 1.0)})
    points = set(inner)
    for low, high in pairwise(inner):
        points |= {(low + high) / 2, np.nextafter(low, 1.0), np.nextafter(high, 0.0)}
    return np.array([*sorted(points), np.nan])


def _evaluate(world: World, nodes: list[NodeProto], weights: str, points: np.ndarray) -> dict[str, np.ndarray]:
    known: dict[str, np.ndarray] = {weights: points}

    def value(name: str) -> np.ndarray:
        number = world.scalar(name) if name not in known else None
        return known[name] if number is None else np.array(number)

    for node in nodes:
        given = [value(v) for v in node.input]
        if node.op_type == "Where":
            out = np.where(given[0].astype(bool), given[1], given[2])
        elif node.op_type == "Cast":
            out = given[0].astype(bool) if world.types.get(node.output[0]) == TensorProto.BOOL else given[0] * 1.0
        elif node.op_type == "IsInf":
            signs = {a.name: a.i for a in node.attribute}
            out = (np.isposinf(given[0]) & bool(signs.get("detect_positive", 1))) | (
                np.isneginf(given[0]) & bool(signs.get("detect_negative", 1))
            )
        else:
            out = _PREDICATES[node.op_type](*given)
        known[node.output[0]] = np.asarray(out)
    return known
