"""What has to be fed so that a body of control flow runs: no run says anything about a body that it skips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.index import Body

ITERATIONS = 3
"""Rounds that a Loop is given whose number of rounds is an input: a first one, one in between and a last one."""

_PASSES_ON = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"})


def route(world: World, scope: str) -> dict[str, int]:
    """Values of graph inputs (every element) with which the body that ``scope`` names runs, at the sizes of ``world``.

    Empty for the main graph, and for a body that runs whatever is fed.

    Raises:
        Unsupported: whether the body runs depends on more than one number given as an input, or it never runs.
    """
    wanted: dict[str, int] = {}
    for index, body in _chain(world.index.at(scope)):
        here = world.within(index.scope)
        for name, value in _needs(here, body).items():
            if wanted.setdefault(name, value) != value:
                raise Unsupported("body", f"'{scope}' never runs: the conditions around it contradict one another")
    return wanted


def takes(feed: Mapping[str, np.ndarray], wanted: Mapping[str, int]) -> bool:
    """Whether a run with ``feed`` goes through a body whose route is ``wanted``."""
    return all(n in feed and bool(np.all(feed[n] >= 1 if v > 1 else feed[n] == v)) for n, v in wanted.items())


def beside(index: GraphIndex, scope: str) -> list[str]:
    """``scope`` and the other branches of every If around it."""
    found = []
    for outer, body in _chain(index.at(scope)):
        if body.node.op_type == "If":
            found += [b.scope for b in outer.bodies[body.key]]
    return [scope, *(s for s in found if s != scope)]


def _chain(index: GraphIndex) -> list[tuple[GraphIndex, Body]]:
    """The bodies around a graph, outer ones first, each with the index of the graph that holds its node."""
    found: list[tuple[GraphIndex, Body]] = []
    while index.outer is not None and index.body is not None:
        found.append((index.outer, index.body))
        index = index.outer
    return found[::-1]


def _needs(world: World, body: Body) -> dict[str, int]:
    node = body.node
    if node.op_type == "If":
        return _decided(world, node.input[0], int(body.attribute == "then_branch"), body)
    if node.op_type == "Loop":
        inputs = [*node.input, "", ""]
        found: dict[str, int] = {}
        if inputs[0]:
            found |= _decided(world, inputs[0], ITERATIONS, body)
        if inputs[1]:
            found |= _decided(world, inputs[1], 1, body)
        return found
    count = next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)
    axes = next((list(a.ints) for a in node.attribute if a.name == "scan_input_axes"), [0] * count)
    for value, axis in zip(node.input[len(node.input) - count :], axes, strict=False):
        shape = world.shapes.get(value)
        if shape is None or not -len(shape) <= axis < len(shape) or shape[axis] < 1:
            raise Unsupported("body", f"how often the body of '{body.scope}' runs is not known")
    return {}


def _decided(world: World, value: str, wanted: int, body: Body) -> dict[str, int]:
    """What makes ``value`` be ``wanted`` (a number of rounds: that or any number above 0, if it is a constant)."""
    rounds = wanted == ITERATIONS
    if not world.index.data_inputs(value):
        has = world.scalar(value) if world.types.get(value) != 9 else float(world.value(value).all())
        if has is None or (has < 1 if rounds else has != wanted):
            raise Unsupported("body", f"'{body.scope}' does not run at {world.binding}: '{value}' is {has}")
        return {}
    for name, flipped in _back(world, value):
        info = world.index.inputs.get(name)
        if info is None:
            continue
        if not _is_main_input(world.index, name):
            break
        dims = info.type.tensor_type.shape.dim if info.type.tensor_type.HasField("shape") else None
        if dims is None or int(np.prod(world.shapes.get(name, (0,)))) != 1:
            break
        return {name: (1 - wanted) if flipped else wanted}
    reason = f"whether '{body.scope}' runs depends on '{value}', which is not simply a number given as an input"
    raise Unsupported("body", f"{reason}, so no run can be made to go through it")


def _back(world: World, value: str) -> Iterator[tuple[str, bool]]:
    """``value`` and what it is a copy of (True: its negation), back to an input."""
    flipped = False
    while True:
        yield value, flipped
        node = world.index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return
        if node.op_type == "Not":
            flipped = not flipped
        elif node.op_type not in _PASSES_ON:
            return
        value = node.input[0]


def _is_main_input(index: GraphIndex, name: str) -> bool:
    """Whether ``name`` is an input of the model itself, not of a body on the way."""
    while index.outer is not None:
        index = index.outer
    return name in index.inputs
