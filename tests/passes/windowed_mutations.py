"""Seeded changes of graphs that move queries, keys and values before attention: one change each, without the lifter.

Each change is ``f(graph, rng) -> bool``: False where it does not apply. Whether the mutant is still attention is not
known here: the tests run it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import AttributeProto, NodeProto, helper, numpy_helper

from tests.passes.mutations import Graph

Change = Callable[[Graph, np.random.Generator], bool]


def _node(graph: Graph, rng: np.random.Generator, *kinds: str) -> NodeProto | None:
    nodes = [n for n in graph.nodes if n.op_type in kinds]
    return nodes[int(rng.integers(len(nodes)))] if nodes else None


def _value(graph: Graph, rng: np.random.Generator) -> str | None:
    """A float value of rank 3 or more that some node reads."""
    made = [o for n in graph.nodes for o in n.output]
    wanted = [v for v in ("q", "k", "v", *made) if len(graph.shapes.get(v, ())) >= 3 and graph.types.get(v) == 1]
    return wanted[int(rng.integers(len(wanted)))] if wanted else None


def _set(graph: Graph, name: str, array: np.ndarray) -> bool:
    graph.stored[name].CopyFrom(numpy_helper.from_array(array, name))
    return True


def _slice(graph: Graph, value: str, axis: int, start: int, end: int, step: int = 1) -> str:
    numbers = [graph.const(np.array([n], np.int64)) for n in (start, end, axis, step)]
    return graph.op("Slice", value, *numbers)


def _on_one_axis(make: Callable[[Graph, str, int, int, np.random.Generator], str]) -> Change:
    def change(graph: Graph, rng: np.random.Generator) -> bool:
        value = _value(graph, rng)
        if value is None:
            return False
        shape = graph.shapes[value]
        axes = [a for a, size in enumerate(shape) if size > 1]
        if not axes:
            return False
        axis = axes[int(rng.integers(len(axes)))]
        readers = graph.readers(value)
        if readers and rng.random() < 0.5:
            readers = [readers[int(rng.integers(len(readers)))]]
        return graph.wrap(value, lambda v: make(graph, v, axis, shape[axis], rng), readers)

    change.__name__ = make.__name__.strip("_")
    return change


def _rolled(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    by = int(rng.integers(1, size))
    return graph.op("Concat", _slice(graph, value, axis, by, 1 << 40), _slice(graph, value, axis, 0, by), axis=axis)


def _permuted(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    indices = rng.permutation(size)
    indices = np.where(rng.random(size) < 0.5, indices - size, indices)
    return graph.op("Gather", value, graph.const(indices.astype(np.int64)), axis=axis)


def _written_with_negative_indices(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    return graph.op("Gather", value, graph.const(np.arange(-size, 0)), axis=axis)


def _repeated(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    indices = np.arange(size)
    indices[int(rng.integers(size))] = int(rng.integers(size))
    return graph.op("Gather", value, graph.const(indices), axis=axis)


def _reversed(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    return _slice(graph, value, axis, -1, -(1 << 40), -1)


def _every_other(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    return graph.op("Concat", _slice(graph, value, axis, 0, size, 2), _slice(graph, value, axis, 1, size, 2), axis=axis)


def _swapped_parts(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    sizes = graph.const(np.array([1, size - 1], np.int64))
    node = helper.make_node("Split", [value, sizes], ["parts_a", "parts_b"], axis=axis)
    if any("parts_a" in n.output for n in graph.nodes):
        return value
    at = max((i for i, n in enumerate(graph.nodes) if value in n.output), default=-1)
    graph.nodes.insert(at + 1, node)
    order = ["parts_b", "parts_a"] if rng.random() < 0.7 else ["parts_a", "parts_b"]
    return graph.op("Concat", *order, axis=axis)


def _padded(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    """Padded by one or two in front and behind, and cut again, not always where it was padded."""
    rank = len(graph.shapes[value])
    pads = np.zeros(2 * rank, np.int64)
    pads[axis] = pads[rank + axis] = 1
    mode = ("constant", "edge", "reflect", "wrap")[int(rng.integers(4))]
    wide = graph.op("Pad", value, graph.const(pads), mode=mode)
    start = int(rng.integers(3))
    return _slice(graph, wide, axis, start, start + size)


def _one_zeroed(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    shape = list(graph.shapes[value])
    shape[axis] = 1
    zeros = graph.const(np.zeros(shape, np.float32))
    return graph.op("Concat", zeros, _slice(graph, value, axis, 1, size), axis=axis)


def _first_repeated(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    first = _slice(graph, value, axis, 0, 1)
    if rng.random() < 0.5:
        return graph.op("Expand", first, graph.const(np.array(graph.shapes[value], np.int64)))
    counts = np.ones(len(graph.shapes[value]), np.int64)
    counts[axis] = size
    return graph.op("Tile", first, graph.const(counts))


def _cut_to_nothing(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    """A roll by nothing: a part of no elements is joined."""
    return graph.op("Concat", _slice(graph, value, axis, size, 1 << 40), value, axis=axis)


def _partly_scaled(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    shape = [1] * len(graph.shapes[value])
    shape[axis] = size
    factors = np.ones(size, np.float32)
    factors[int(rng.integers(size)) :] = 1.5
    return graph.op("Mul", value, graph.const(factors.reshape(shape)))


def _one_part_scaled(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    at = int(rng.integers(1, size))
    first = graph.op("Mul", _slice(graph, value, axis, 0, at), graph.scalar(1.5))
    return graph.op("Concat", first, _slice(graph, value, axis, at, size), axis=axis)


def _turned(graph: Graph, value: str, axis: int, size: int, rng: np.random.Generator) -> str:
    """Rows and columns of two neighbouring axes written in the other order."""
    shape, rank = graph.shapes[value], len(graph.shapes[value])
    other = (axis + 1) % rank
    perm = list(range(rank))
    perm[axis], perm[other] = other, axis
    turned = graph.op("Transpose", value, perm=perm)
    return graph.op("Reshape", turned, graph.const(np.array(shape, np.int64)))


def scaled(graph: Graph, rng: np.random.Generator) -> bool:
    value = _value(graph, rng)
    kind = ("Mul", "Div")[int(rng.integers(2))]
    return value is not None and graph.wrap(value, lambda v: graph.op(kind, v, graph.scalar(1.25)))


def shifted(graph: Graph, rng: np.random.Generator) -> bool:
    value = _value(graph, rng)
    return value is not None and graph.wrap(value, lambda v: graph.op("Add", v, graph.scalar(0.125)))


def read_elsewhere(graph: Graph, rng: np.random.Generator) -> bool:
    value = _value(graph, rng)
    return value is not None and graph.output(value)


def other_constant(graph: Graph, rng: np.random.Generator) -> bool:
    """One number of an index table, shape or slice moved by one, or two of them exchanged, or the table turned."""
    names = [n for n, t in graph.stored.items() if t.data_type == 7 and np.prod(t.dims) > 0]
    if not names:
        return False
    name = names[int(rng.integers(len(names)))]
    array = numpy_helper.to_array(graph.stored[name]).copy()
    flat = array.reshape(-1)
    at, to = (int(x) for x in rng.integers(flat.size, size=2))
    how = int(rng.integers(5))
    if how == 0:
        flat[at] += int(rng.choice([-1, 1]))
    elif how == 1:
        flat[at], flat[to] = flat[to], flat[at]
    elif how == 2:
        array = np.roll(array, 1, axis=0)
    elif how == 3 and array.ndim == 2:
        array = np.ascontiguousarray(array.T).reshape(array.shape)
    elif how == 4 and array.ndim >= 2:
        array[int(rng.integers(len(array)))] = array[int(rng.integers(len(array)))]
    else:
        return False
    return _set(graph, name, array)


def other_mask(graph: Graph, rng: np.random.Generator) -> bool:
    """One slot of a mask opened, closed, moved, or given a number that hides nothing for certain."""
    names = [n for n, t in graph.stored.items() if t.data_type in (1, 9) and len(t.dims) > 2]
    if not names:
        return False
    name = names[int(rng.integers(len(names)))]
    array = numpy_helper.to_array(graph.stored[name]).copy()
    flat = array.reshape(-1)
    at = int(rng.integers(flat.size))
    how = int(rng.integers(4))
    if how == 0:
        array = np.roll(array, 1, axis=-1)
    elif how == 1:
        array = np.roll(array, 1, axis=int(np.argmax(array.shape)))
    elif array.dtype == np.bool_:
        flat[at] = not flat[at]
    else:
        flat[at] = (0.0, -np.inf, -20.0, 0.01, -1e4)[int(rng.integers(5))]
    return _set(graph, name, array)


def other_operand(graph: Graph, rng: np.random.Generator) -> bool:
    """A node reads a value of the same shape instead of its own."""
    node = graph.nodes[int(rng.integers(len(graph.nodes)))]
    at = int(rng.integers(len(node.input)))
    before = [o for n in graph.nodes[: graph.nodes.index(node)] for o in n.output]
    shape = graph.shapes.get(node.input[at])
    same = [v for v in ("q", "k", "v", *before) if shape and v != node.input[at] and graph.shapes.get(v) == shape]
    if not same:
        return False
    node.input[at] = same[int(rng.integers(len(same)))]
    return True


def other_order(graph: Graph, rng: np.random.Generator) -> bool:
    """Inputs of a Concat exchanged or repeated, axes of a Transpose exchanged."""
    node = _node(graph, rng, "Concat", "Transpose")
    if node is None:
        return False
    if node.op_type == "Transpose":
        perm = next(a for a in node.attribute if a.name == "perm")
        i, j = (int(x) for x in rng.choice(len(perm.ints), 2, replace=False))
        perm.ints[i], perm.ints[j] = perm.ints[j], perm.ints[i]
        return True
    i, j = (int(x) for x in rng.integers(len(node.input), size=2))
    if i == j:
        return False
    node.input[i], node.input[j] = node.input[j], (node.input[i] if rng.random() < 0.6 else node.input[j])
    return True


def other_attribute(graph: Graph, rng: np.random.Generator) -> bool:
    """Another axis, another mode of a Pad, other letters in an equation."""
    node = _node(graph, rng, "Softmax", "Gather", "Pad", "Einsum", "Concat")
    if node is None:
        return False
    if node.op_type == "Pad":
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("mode", ("constant", "edge", "reflect", "wrap")[rng.integers(4)]))
        return True
    attribute = node.attribute[0]
    if attribute.type == AttributeProto.INT:
        attribute.i += int(rng.choice([-1, 1]))
        return True
    text = attribute.s.decode()
    letters = sorted(set(text) - set(",->"))
    a, b = rng.choice(len(letters), 2, replace=False)
    place = int(rng.integers(len(text)))
    swap = {letters[a]: letters[b], letters[b]: letters[a]}
    start, end = (place, place + 1) if rng.random() < 0.5 else (0, text.index(","))
    attribute.s = (text[:start] + "".join(swap.get(x, x) for x in text[start:end]) + text[end:]).encode()
    return attribute.s.decode() != text


MOVED = tuple(_on_one_axis(m) for m in (
    _rolled, _permuted, _written_with_negative_indices, _repeated, _reversed, _every_other, _swapped_parts, _padded,
    _one_zeroed, _first_repeated, _cut_to_nothing, _partly_scaled, _one_part_scaled, _turned,
))  # fmt: skip
CHANGES: tuple[Change, ...] = (
    *MOVED, scaled, shifted, read_elsewhere, *(other_constant,) * 3, *(other_mask,) * 3, *(other_operand,) * 2,
    *(other_order,) * 2, *(other_attribute,) * 2,
)  # fmt: skip
