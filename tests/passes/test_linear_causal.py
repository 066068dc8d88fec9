"""Causal linear attention: running sums, triangles and decays of the scores; and what differs in one thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from attncompile.core.linear import LinearFacts
from attncompile.core.site import AttentionSite
from tests.passes.attention_graphs import Builder
from tests.passes.linear_graphs import detected, error_of, feed_of

_BATCH, _HEADS, _LENGTH, _DIM = 2, 3, 11, 5


class Graph:
    """x [batch, length, 16] -> Q, K, V [batch, heads, length, 5] -> y."""

    def __init__(self, dynamic: bool = False) -> None:
        self.b, self.dynamic = Builder(), dynamic
        rng = np.random.default_rng(7)

        def project() -> str:
            weight = (rng.standard_normal((16, _HEADS * _DIM)) / 4).astype(np.float32)
            shape = [0, 0, _HEADS, _DIM]
            x = self.b.op("Reshape", self.b.op("MatMul", "x", self.b.const(weight)), self.b.const(shape))
            return self.b.op("Transpose", x, perm=[0, 2, 1, 3])

        self.q, self.k, self.v = project(), project(), project()

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        return self.b.op(kind, *inputs, **attributes)

    def array(self, value: object, kind: type = np.float32) -> str:
        return self.b.const(np.asarray(value, kind))

    def scores(self) -> str:
        return self.op("MatMul", self.q, self.op("Transpose", self.k, perm=[0, 1, 3, 2]))

    def model(self, out: str) -> onnx.ModelProto:
        out = self.op("Transpose", out, perm=[0, 2, 1, 3])
        out = self.op("Identity", self.op("Reshape", out, self.b.const([0, 0, _HEADS * _DIM])))
        length = "n" if self.dynamic else _LENGTH
        inputs = [helper.make_tensor_value_info("x", 1, [_BATCH, length, 16])]
        graph = helper.make_graph(
            self.b.nodes, "g", inputs, [helper.make_tensor_value_info(out, 1, None)], self.b.stored
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def found(graph: Graph, out: str, folder: Path) -> AttentionSite:
    model, detection = detected(graph.model(out), folder)
    assert detection.near_misses == ()
    (site,) = detection.sites
    assert (site.kind, site.heads, site.head_dim, site.value_dim) == ("linear", _HEADS, _DIM, _DIM)
    assert site.mask.kind == "causal"
    assert site.linear is not None
    assert site.linear.causal
    for n in (_LENGTH, 17) if graph.dynamic else (_LENGTH,):
        assert error_of(model, site, feed_of(model, sizes={"n": n})) < 3e-6
    return site


def said(site: AttentionSite) -> LinearFacts:
    assert site.linear is not None
    return site.linear


def refusal(graph: Graph, out: str, folder: Path) -> dict[str, str]:
    _, detection = detected(graph.model(out), folder)
    assert detection.sites == ()
    return {m.code: m.reason for m in detection.near_misses}


_RATES = np.array([0.9, 0.97, 0.5])


def decay(rates: np.ndarray = _RATES, n: int = _LENGTH) -> np.ndarray:
    distance = np.arange(n)[:, None] - np.arange(n)[None]
    return np.where(distance >= 0, rates[:, None, None] ** np.maximum(distance, 0), 0)


def test_decays_of_retention(tmp_path: Path) -> None:
    g = Graph()
    site = found(g, g.op("MatMul", g.op("Mul", g.scores(), g.array(decay()[None])), g.v), tmp_path)
    assert said(site).decay_rates == pytest.approx(tuple(_RATES), rel=1e-6)
    assert (said(site).form, said(site).decay, said(site).decay_source) == ("parallel", "head", "")
    assert site.mask.parts[0].certificate.method == "constant"
    assert not site.mask.parts[0].certificate.general


def test_one_decay_for_all_heads_and_numbers_before_and_after(tmp_path: Path) -> None:
    g = Graph()
    scores = g.op("Mul", g.op("Mul", g.scores(), g.array(0.5)), g.array(3.0 * decay(np.array([0.8]))[0]))
    site = found(g, g.op("MatMul", g.op("Div", scores, g.array(4.0)), g.v), tmp_path)
    assert said(site).decay_rates == pytest.approx((0.8, 0.8, 0.8), rel=1e-6)
    assert site.scale == pytest.approx(0.5 * 3.0 / 4.0)


def test_rates_of_one_are_a_triangle(tmp_path: Path) -> None:
    g = Graph()
    site = found(g, g.op("MatMul", g.op("Mul", g.scores(), g.array(decay(np.ones(3)))), g.v), tmp_path)
    assert (said(site).decay, said(site).decay_rates) == ("none", ())


@pytest.mark.parametrize("how", ["where", "hidden", "trilu", "mul"])
def test_triangles(how: str, tmp_path: Path) -> None:
    g = Graph()
    seen, scores = np.tri(_LENGTH, dtype=bool), g.scores()
    if how == "where":
        scores = g.op("Where", g.array(seen, bool), scores, g.array(0.0))
    elif how == "hidden":
        scores = g.op("Where", g.array(~seen, bool), g.array(0.0), scores)
    elif how == "trilu":
        scores = g.op("Trilu", scores, upper=0)
    else:
        scores = g.op("Mul", g.array(seen), scores)
    assert said(found(g, g.op("MatMul", scores, g.v), tmp_path)).normaliser == "none"


def _normal_rows(g: Graph, scores: str) -> str:
    total = g.op("Add", g.op("ReduceSum", scores, g.b.const([3]), keepdims=1), g.array(1e-3))
    return g.op("MatMul", g.op("Div", scores, total), g.v)


def test_rows_divided_by_their_sum(tmp_path: Path) -> None:
    g = Graph()
    g.q, g.k = g.op("Relu", g.q), g.op("Exp", g.k)
    site = found(g, _normal_rows(g, g.op("Mul", g.scores(), g.array(decay()))), tmp_path)
    facts = said(site)
    assert (facts.query_map, facts.key_map, facts.normaliser) == ("relu", "exp", "sum")
    assert facts.epsilon == pytest.approx(1e-3)


def test_the_sum_of_the_scores_after_the_last_product(tmp_path: Path) -> None:
    g = Graph()
    g.q, g.k = g.op("Exp", g.q), g.op("Exp", g.k)
    scores = g.op("Mul", g.op("Trilu", g.scores(), upper=0), g.array(0.25))
    total = g.op("Add", g.op("ReduceSum", scores, g.b.const([3]), keepdims=1), g.array(0.125))
    site = found(g, g.op("Div", g.op("MatMul", scores, g.v), total), tmp_path)
    assert said(site).epsilon == pytest.approx(0.5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_running_sums(dynamic: bool, tmp_path: Path) -> None:
    g = Graph(dynamic)
    q, k = (g.op("Add", g.op("Elu", x), g.array(1.0)) for x in (g.q, g.k))
    states = g.op("CumSum", g.op("Einsum", k, g.v, equation="bhnd,bhne->bhnde"), g.b.const(np.array(2)))
    top = g.op("Einsum", q, states, equation="bhnd,bhnde->bhne")
    total = g.op("ReduceSum", g.op("Mul", g.op("CumSum", k, g.b.const(np.array(-2))), q), g.b.const([-1]), keepdims=1)
    site = found(g, g.op("Div", top, g.op("Add", total, g.array(1e-2))), tmp_path)
    facts = said(site)
    assert (facts.form, facts.query_map, facts.key_map, facts.normaliser) == ("cumulative", "elu+1", "elu+1", "sum")
    assert site.mask.parts[0].certificate.general
    assert site.query_length == ("n" if dynamic else _LENGTH)


def _outer(g: Graph, **attributes: int) -> str:
    k, v = g.op("Unsqueeze", g.k, g.b.const([4])), g.op("Unsqueeze", g.v, g.b.const([3]))
    states = g.op("CumSum", g.op("Mul", k, v), g.b.const(np.array(2)), **attributes)
    q = g.op("Unsqueeze", g.q, g.b.const([3]))
    return g.op("Squeeze", g.op("MatMul", q, states), g.b.const([3]))


def test_outer_products_and_products_with_each_state(tmp_path: Path) -> None:
    g = Graph()
    assert said(found(g, _outer(g), tmp_path)).form == "cumulative"


def test_channels_of_ones_in_a_running_sum(tmp_path: Path) -> None:
    g = Graph()
    g.q, g.k = g.op("Relu", g.q), g.op("Relu", g.k)
    g.v = g.op("Pad", g.v, g.b.const([0] * 7 + [1]), g.array(1.0))
    out = _outer(g)
    top = g.op("Slice", out, g.b.const([0]), g.b.const([-1]), g.b.const([3]))
    total = g.op("Slice", out, g.b.const([-1]), g.b.const([99]), g.b.const([3]))
    facts = said(found(g, g.op("Div", top, g.op("Add", total, g.array(0.5))), tmp_path))
    assert (facts.normaliser, facts.epsilon) == ("sum", 0.5)


@pytest.mark.parametrize("attribute", ["exclusive", "reverse"])
def test_sums_that_are_not_up_to_the_query(attribute: str, tmp_path: Path) -> None:
    g = Graph()
    refusal(g, _outer(g, **{attribute: 1}), tmp_path)


def test_a_sum_that_runs_over_the_heads(tmp_path: Path) -> None:
    g = Graph()
    k, v = g.op("Unsqueeze", g.k, g.b.const([4])), g.op("Unsqueeze", g.v, g.b.const([3]))
    states = g.op("CumSum", g.op("Mul", k, v), g.b.const(np.array(1)))
    q = g.op("Unsqueeze", g.q, g.b.const([3]))
    assert "axis-roles" in refusal(g, g.op("Squeeze", g.op("MatMul", q, states), g.b.const([3])), tmp_path)


def test_a_full_sum_beside_a_running_one(tmp_path: Path) -> None:
    g = Graph()
    out = _outer(g)
    total = g.op("MatMul", g.q, g.op("Transpose", g.op("ReduceSum", g.k, g.b.const([2])), perm=[0, 1, 3, 2]))
    assert "normaliser" in refusal(g, g.op("Div", out, total), tmp_path)


def _flipped(change: tuple[int, int, int], factor: float) -> np.ndarray:
    array = decay()
    array[change] = array[change] * factor if array[change] else factor
    return array


@pytest.mark.parametrize(
    "array",
    [_flipped((1, 7, 3), 1.0001), _flipped((0, 3, 7), 1e-6), _flipped((2, 4, 4), 0.0), _flipped((0, 0, 0), 2.0),
     decay() - 1e-3, decay()[:, ::-1], decay().transpose(0, 2, 1), -decay(), np.full((3, 11, 11), np.nan),
     decay() / np.sqrt(decay().sum(-1, keepdims=True))],
)  # fmt: skip
def test_one_thing_off_in_a_decay(array: np.ndarray, tmp_path: Path) -> None:
    g = Graph()
    assert "mask" in refusal(g, g.op("MatMul", g.op("Mul", g.scores(), g.array(array)), g.v), tmp_path)


@pytest.mark.parametrize("diagonal", [-1, 1])
def test_triangles_beside_the_diagonal(diagonal: int, tmp_path: Path) -> None:
    g = Graph()
    scores = g.op("Mul", g.scores(), g.array(np.tri(_LENGTH, k=diagonal)))
    assert "mask" in refusal(g, g.op("MatMul", scores, g.v), tmp_path)


def test_a_gate_of_the_input(tmp_path: Path) -> None:
    g = Graph()
    gate = g.op("Sigmoid", g.op("ReduceSum", g.q, g.b.const([3]), keepdims=1))
    scores = g.op("Mul", g.scores(), g.op("Mul", gate, g.array(decay())))
    assert "data-mask" in refusal(g, g.op("MatMul", scores, g.v), tmp_path)


def test_a_mask_after_the_rows_are_divided(tmp_path: Path) -> None:
    g = Graph()
    scores = g.scores()
    rows = g.op("Div", scores, g.op("ReduceSum", scores, g.b.const([3]), keepdims=1))
    assert "mask" in refusal(g, g.op("MatMul", g.op("Mul", rows, g.array(decay())), g.v), tmp_path)


def test_rows_divided_by_the_sum_of_other_scores(tmp_path: Path) -> None:
    g = Graph()
    scores = g.scores()
    masked = g.op("Mul", scores, g.array(decay()))
    rows = g.op("Div", masked, g.op("ReduceSum", scores, g.b.const([3]), keepdims=1))
    assert "normaliser" in refusal(g, g.op("MatMul", rows, g.v), tmp_path)


def test_columns_divided_by_their_sum(tmp_path: Path) -> None:
    g = Graph()
    scores = g.op("Mul", g.scores(), g.array(decay()))
    rows = g.op("Div", scores, g.op("ReduceSum", scores, g.b.const([2]), keepdims=1))
    assert "normaliser" in refusal(g, g.op("MatMul", rows, g.v), tmp_path)


def test_scores_that_are_read_twice(tmp_path: Path) -> None:
    g = Graph()
    scores = g.op("Mul", g.scores(), g.array(decay()))
    out = g.op("Add", g.op("MatMul", scores, g.v), g.op("ReduceMax", scores, g.b.const([3]), keepdims=1))
    assert "state-used" in refusal(g, out, tmp_path)


def _computed(g: Graph, growing: bool) -> str:
    """A decay computed from the length; ``growing``: its rate changes with the length."""
    size = g.op("Squeeze", g.op("Shape", "x", start=1, end=2))
    index = g.op("Range", g.b.const(np.array(0)), size, g.b.const(np.array(1)))
    distance = g.op("Sub", g.op("Unsqueeze", index, g.b.const([1])), g.op("Unsqueeze", index, g.b.const([0])))
    power = g.op("Cast", g.op("Max", distance, g.b.const(np.array(0))), to=1)
    base = g.array(np.array([0.9, 0.8, 0.7]).reshape(3, 1, 1))
    if growing:
        base = g.op("Add", base, g.op("Div", g.array(1.0), g.op("Cast", size, to=1)))
    visible = g.op("GreaterOrEqual", distance, g.b.const(np.array(0)))
    return g.op("Where", visible, g.op("Pow", base, power), g.array(0.0))


def test_a_decay_computed_from_a_dynamic_length(tmp_path: Path) -> None:
    g = Graph(dynamic=True)
    mask = _computed(g, growing=False)
    site = found(g, g.op("MatMul", g.op("Mul", g.scores(), mask), g.v), tmp_path)
    certificate = site.mask.parts[0].certificate
    assert said(site).decay_rates == pytest.approx((0.9, 0.8, 0.7), rel=1e-5)
    assert (certificate.method, certificate.general, len(certificate.lengths)) == ("evaluated", True, 3)


def test_a_decay_that_changes_with_the_length(tmp_path: Path) -> None:
    g = Graph(dynamic=True)
    mask = _computed(g, growing=True)
    assert "mask" in refusal(g, g.op("MatMul", g.op("Mul", g.scores(), mask), g.v), tmp_path)


def test_a_scale_that_changes_with_the_length(tmp_path: Path) -> None:
    g = Graph(dynamic=True)
    size = g.op("Cast", g.op("Shape", "x", start=1, end=2), to=1)
    assert "dynamic-scale" in refusal(g, g.op("MatMul", g.op("Div", g.scores(), size), g.v), tmp_path)


def test_chunks(tmp_path: Path) -> None:
    """Two chunks of a length; a chunk's own part and what it reads from the state before it are one site together."""
    g = Graph()
    cut = [(0, 5), (5, 11)]
    parts = {x: [g.op("Slice", x, g.b.const([a]), g.b.const([b]), g.b.const([2])) for a, b in cut]
             for x in (g.q, g.k, g.v)}  # fmt: skip
    (q0, q1), (k0, k1), (v0, v1) = parts[g.q], parts[g.k], parts[g.v]
    key = [g.op("Transpose", x, perm=[0, 1, 3, 2]) for x in (k0, k1)]
    own = [g.op("MatMul", g.op("Trilu", g.op("MatMul", q, k), upper=0), v)
           for q, k, v in ((q0, key[0], v0), (q1, key[1], v1))]  # fmt: skip
    before = g.op("MatMul", q1, g.op("MatMul", key[0], v0))
    out = g.op("Concat", own[0], g.op("Add", before, own[1]), axis=2)
    model, detection = detected(g.model(out), tmp_path)
    assert not detection.near_misses
    (site,) = detection.sites
    assert site.linear is not None
    assert (site.linear.form, site.linear.causal, site.query_length) == ("chunked", True, 11)
    assert error_of(model, site, feed_of(model)) < 3e-6
