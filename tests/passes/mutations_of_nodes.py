"""Seeded mutations of any graph, which know nothing of attention: a constant, an attribute, an operator, an input.

Each is ``f(graph, rng) -> bool``: False where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import AttributeProto, numpy_helper

from tests.passes.mutations import Graph

Change = Callable[[Graph, np.random.Generator], bool]

_FAMILIES = (
    ("Add", "Sub", "Mul", "Div", "Max", "Min"),
    ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceLogSumExp", "ReduceL2"),
    ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"),
    ("And", "Or"),
    ("Exp", "Neg", "Tanh", "Log", "Abs", "Sigmoid"),
)
_NUMBERS = (AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.INTS)
_SMALL = 8


def _one(rng: np.random.Generator, count: int) -> int:
    return int(rng.integers(count))


def integer_constant(graph: Graph, rng: np.random.Generator) -> bool:
    """One number of an axis, a shape, a slice or a padding, a little larger or smaller."""
    near = [t for t in graph.stored.values() if t.data_type == 7 and 0 < int(np.prod(t.dims)) <= _SMALL]
    if not near:
        return False
    tensor = near[_one(rng, len(near))]
    array = numpy_helper.to_array(tensor).copy()
    at = _one(rng, array.size)
    array.reshape(-1)[at] += int(rng.choice([-2, -1, 1, 2]))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return True


def integers_exchanged(graph: Graph, rng: np.random.Generator) -> bool:
    """Two numbers of a shape: other axes of the same size in all."""
    near = [t for t in graph.stored.values() if t.data_type == 7 and 1 < int(np.prod(t.dims)) <= _SMALL]
    if not near:
        return False
    tensor = near[_one(rng, len(near))]
    array = numpy_helper.to_array(tensor).copy()
    a, b = rng.choice(array.size, 2, replace=False)
    if array.reshape(-1)[a] == array.reshape(-1)[b]:
        return False
    array.reshape(-1)[[a, b]] = array.reshape(-1)[[b, a]]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return True


def float_constant(graph: Graph, rng: np.random.Generator) -> bool:
    """A scale, a fill, a table: another number, another sign, or one element of it."""
    near = [t for t in graph.stored.values() if t.data_type == 1 and 0 < int(np.prod(t.dims)) <= 200]
    if not near:
        return False
    tensor = near[_one(rng, len(near))]
    array = numpy_helper.to_array(tensor).copy()
    with np.errstate(over="ignore"):
        if rng.random() < 0.5:
            array = (array * np.float32(rng.choice([-1.0, 0.5, 0.0, 3.0]))).astype(np.float32)
        else:
            array.reshape(-1)[_one(rng, array.size)] = np.float32(rng.choice([0.7, -np.inf, 1.0, -1e4]))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return True


def attribute(graph: Graph, rng: np.random.Generator) -> bool:
    near = [
        (n, a) for n in graph.nodes for a in n.attribute
        if a.type in _NUMBERS and a.name not in ("to", "num_outputs")
    ]  # fmt: skip
    if not near:
        return False
    _, found = near[_one(rng, len(near))]
    if found.type == AttributeProto.FLOAT:
        found.f *= float(rng.choice([0.5, -1.0, 2.0]))
    elif found.type == AttributeProto.INTS:
        order = rng.permutation(len(found.ints))
        found.ints[:] = [found.ints[i] for i in order]
    elif found.i in (0, 1) and found.name != "axis":
        found.i = 1 - found.i
    else:
        found.i = int(rng.integers(-3, 4))
    return True


def operator(graph: Graph, rng: np.random.Generator) -> bool:
    near = [(n, f) for n in graph.nodes for f in _FAMILIES if n.op_type in f]
    if not near:
        return False
    node, family = near[_one(rng, len(near))]
    node.op_type = str(rng.choice([k for k in family if k != node.op_type]))
    return True


def inputs_swapped(graph: Graph, rng: np.random.Generator) -> bool:
    """Past and new, minuend and subtrahend, both branches of a Where, scores and sink."""
    near = [n for n in graph.nodes if len(n.input) > 1 and len(set(n.input)) > 1 and n.op_type != "Reshape"]
    if not near:
        return False
    node = near[_one(rng, len(near))]
    first = 1 if node.op_type == "Where" else 0
    node.input[first], node.input[first + 1] = node.input[first + 1], node.input[first]
    return True


def input_of_the_same_shape(graph: Graph, rng: np.random.Generator) -> bool:
    """A node reads another value of the same shape and type that exists by then."""
    places = {o: i for i, n in enumerate(graph.nodes) for o in n.output}
    choices = []
    for at, node in enumerate(graph.nodes):
        for slot, value in enumerate(node.input):
            shape, kind = graph.shapes.get(value), graph.types.get(value)
            others = [
                v for v, s in graph.shapes.items()
                if v != value and s == shape and graph.types.get(v) == kind and shape and places.get(v, -1) < at
            ]  # fmt: skip
            choices += [(node, slot, others)] if others else []
    if not choices:
        return False
    node, slot, others = choices[_one(rng, len(choices))]
    node.input[slot] = others[_one(rng, len(others))]
    return True


def one_more_output(graph: Graph, rng: np.random.Generator) -> bool:
    """Somebody outside reads an inner value."""
    values = [o for n in graph.nodes for o in n.output if o]
    return graph.output(values[_one(rng, len(values))])


def node_left_out(graph: Graph, rng: np.random.Generator) -> bool:
    """Readers of a node that keeps its input's shape read that input."""
    near = [n for n in graph.nodes if n.input and graph.shapes.get(n.output[0]) == graph.shapes.get(n.input[0])
            and graph.types.get(n.output[0]) == graph.types.get(n.input[0])]  # fmt: skip
    if not near:
        return False
    node = near[_one(rng, len(near))]
    return graph.wrap(node.output[0], lambda v: str(node.input[0]))


def negated_or_doubled(graph: Graph, rng: np.random.Generator) -> bool:
    values = [o for n in graph.nodes for o in n.output if graph.types.get(o) == 1]
    if not values:
        return False
    value = values[_one(rng, len(values))]
    return graph.wrap(value, lambda v: graph.op("Neg", v) if rng.random() < 0.5 else graph.op("Add", v, v))


CHANGES: tuple[Change, ...] = (
    integer_constant, integers_exchanged, float_constant, attribute, operator, inputs_swapped, input_of_the_same_shape,
    one_more_output, node_left_out, negated_or_doubled,
)  # fmt: skip
