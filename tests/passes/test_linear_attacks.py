"""Linear attention with one thing changed that the sizes do not show: refused, or what the facts say is what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.passes.linear_graphs import Spec, build, detected, error_of, feed_of
from tests.passes.mutations import Graph
from tests.passes.test_linear_causal import Graph as Written
from tests.passes.test_linear_causal import decay
from tests.passes.test_linear_mutants import BASES, _runs
from tests.passes.windowed_mutations import MOVED, Change, other_operand, other_order, scaled, shifted

CHANGES: tuple[Change, ...] = (*MOVED, *MOVED, *(other_operand,) * 4, scaled, shifted, other_order)
EACH = 16


def _right(proto: onnx.ModelProto, folder: Path, words: str = "") -> int:
    """How many linear sites are found; each gives the graph's own numbers."""
    model, found = detected(proto, folder)
    sites = [s for s in found.sites if s.kind == "linear"]
    for site in sites:
        for seed in range(2):
            error = error_of(model, site, feed_of(model, seed=seed))
            assert error < 1e-3, f"{words}: the facts are wrong: {error:.2g}, {site}"
    return len(sites)


@pytest.mark.parametrize("normaliser", ["sum", "pad", "mul", "reciprocal"])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_reversed_result_is_no_idle_slice(normaliser: str, axis: int, tmp_path: Path) -> None:
    """Its shape is the result's: heads, queries or channels stand the other way round before the division."""
    proto = build(Spec(normaliser=normaliser, epsilon=1e-3))
    graph = Graph(proto)
    value = next(
        n.output[0] for n in graph.nodes if graph.shapes[n.output[0]] in ((2, 3, 11, 7), (2, 3, 11, 8))
        and n.op_type == "MatMul"
    )  # fmt: skip
    numbers = [graph.const(np.array([x])) for x in (-1, -(1 << 40), axis, -1)]
    assert graph.wrap(value, lambda v: graph.op("Slice", v, *numbers))
    _right(graph.model(), tmp_path)


def _gathered(axis: int) -> Callable[[Graph, str], str]:
    def change(graph: Graph, value: str) -> str:
        order = np.roll(np.arange(graph.shapes[value][axis]), 1)
        return graph.op("Gather", value, graph.const(order), axis=axis)

    return change


def _factors(axis: int) -> Callable[[Graph, str], str]:
    def change(graph: Graph, value: str) -> str:
        shape = [1, 1, 1, 1]
        shape[axis] = graph.shapes[value][axis]
        numbers = np.linspace(1.0, 1.1, shape[axis], dtype=np.float32).reshape(shape)
        return graph.op("Mul", value, graph.const(numbers))

    return change


def _refused_or_without(graph: Graph, folder: Path) -> None:
    """No site has a normaliser; one without, the quotient's numerator, gives the graph's own numbers."""
    proto = graph.model()
    _right(proto, folder)
    _, found = detected(proto, folder)
    assert all(s.linear is None or s.linear.normaliser == "none" for s in found.sites)
    assert found.sites or "normaliser" in {m.code for m in found.near_misses}


TOTALS: dict[str, Callable[[Graph, str], str]] = {
    "sum of another batch entry": _gathered(0),
    "sum of another head": _gathered(1),
    "sum of another channel": _gathered(3),
    "sum with a number added": lambda g, v: g.op("Add", v, g.scalar(1e-3)),
    "sum with factors of heads": _factors(1),
    "sum with factors of channels": _factors(3),
    "sum with another map": lambda g, v: g.op("Exp", v),
    "sum of squares": lambda g, v: g.op("Mul", v, v),
    "sum without sign": lambda g, v: g.op("Abs", v),
    "bounded sum": lambda g, v: g.op("Max", v, g.scalar(0.5)),
}


@pytest.mark.parametrize("how", TOTALS)
@pytest.mark.parametrize("normaliser", ["sum", "mul", "reciprocal"])
def test_a_sum_of_something_else_is_refused(how: str, normaliser: str, tmp_path: Path) -> None:
    graph = Graph(build(Spec(normaliser=normaliser, epsilon=1e-3)))
    nodes = [n for n in graph.nodes if n.op_type == "ReduceSum"]
    value = str(nodes[0].output[0])
    assert graph.wrap(value, lambda v: TOTALS[how](graph, v))
    _refused_or_without(graph, tmp_path)


FEATURES: dict[str, Callable[[Graph, str], str]] = {
    "another map": lambda g, v: g.op("Exp", v),
    "a number added": lambda g, v: g.op("Add", v, g.scalar(1e-6)),
    "factors of tokens": _factors(2),
    "factors of channels": _factors(3),
    "other tokens": lambda g, v: g.op("Gather", v, g.const(np.array([0, 0, *range(2, 11)])), axis=2),
    "one token less": lambda g, v: g.op("Slice", v, *(g.const(np.array([n])) for n in (1, 11, 2))),
}


@pytest.mark.parametrize("how", FEATURES)
def test_a_sum_of_other_features_is_refused(how: str, tmp_path: Path) -> None:
    """The keys of the sum are not those that meet the values."""
    graph = Graph(build(Spec(normaliser="mul", epsilon=1e-3)))
    node = next(n for n in graph.nodes if n.op_type == "ReduceSum")
    assert graph.wrap(str(node.input[0]), lambda v: FEATURES[how](graph, v), [node])
    _refused_or_without(graph, tmp_path)


@pytest.mark.parametrize("how", sorted(set(FEATURES) - {"one token less"}))
def test_a_sum_for_other_queries_is_refused(how: str, tmp_path: Path) -> None:
    """The features that meet the sum are not those that meet the state."""
    graph = Graph(build(Spec(normaliser="mul", epsilon=1e-3)))
    total = next(n for n in graph.nodes if n.op_type == "ReduceSum").output[0]
    (product,) = graph.readers(total)
    (query,) = (v for v in product.input if v != total)
    assert graph.wrap(query, lambda v: FEATURES[how](graph, v), [product])
    _refused_or_without(graph, tmp_path)


def _dynamic(proto: onnx.ModelProto, axis: int) -> onnx.ModelProto:
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[axis].dim_param = "n"
    return proto


def test_sizes_that_contradict_one_another(tmp_path: Path) -> None:
    """A dynamic batch in a graph whose reshapes know one batch alone: a reason or a site, and no error."""
    g = Written()
    proto = g.model(g.op("MatMul", g.op("Mul", g.scores(), g.array(decay()[None])), g.v))
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.int64 and array.shape in ((3,), (4,)) and (array[:2] == 0).all():
            tensor.CopyFrom(numpy_helper.from_array(np.array([2, 11, *array[2:]]), tensor.name))
    _, found = detected(_dynamic(proto, 0), tmp_path)
    assert found.sites or found.near_misses


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("more", [0.0, 1.0, -0.5])
def test_one_more_rounding_is_another_map(kind: type, more: float, tmp_path: Path) -> None:
    """elu(x) + 1.001 in half precision is elu(x) and the next number after 1."""
    proto = build(Spec(query_map="elu+1", key_map="elu+1"))
    one = kind(1) + kind(more) * np.finfo(kind).eps
    for tensor in proto.graph.initializer:
        if tensor.data_type == 1:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                numpy_helper.from_array((array * 0 + one if array.size == 1 else array).astype(kind), tensor.name)
            )
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    _, found = detected(proto, tmp_path)
    maps = {(s.linear.query_map, s.linear.key_map) for s in found.sites if s.linear is not None}
    assert maps == ({("elu+1", "elu+1")} if more == 0 else {("identity", "identity")})


@pytest.mark.parametrize("name", BASES)
def test_moved_operands(name: str, tmp_path: Path) -> None:
    base, counts, rng = BASES[name](), Counter[str](), np.random.default_rng(11)
    while counts["ran"] < EACH:
        graph = Graph(base)
        change = CHANGES[int(rng.integers(len(CHANGES)))]
        proto = graph.model() if change(graph, rng) else None
        if proto is None or not _runs(proto):
            continue
        counts["ran"] += 1
        counts["taken"] += _right(proto, tmp_path, change.__name__)
    assert counts["taken"] > 0
