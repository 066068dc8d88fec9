"""Hand-built graphs, one for each way of writing attention: facts, and the site read in NumPy equal to the run.

Every lifted form is built from the same projections of x [2, 11, 24]; every refused one says why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile.core.model import Model
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite, Detection
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.replace import apply
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import Builder, save
from tests.passes.test_lifter_properties import run_site
from tests.passes.test_replace import run, standard_attention

B, N, H, KV, D = 2, 11, 4, 2, 6
W = H * D
F32 = np.float32
SCALE = F32(0.4)


class Graph(Builder):
    """The projections that the forms share; ``x`` is the input."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def number(self, value: float, kind: type = F32) -> str:
        return self.const(np.array(value, kind))

    def linear(self, x: str, columns: int, kind: type = F32) -> str:
        return self.op("MatMul", x, self.const((self.rng.standard_normal((W, columns)) / np.sqrt(W)).astype(kind)))

    def heads(self, count: int = H, transposed: bool = False, x: str = "x", kind: type = F32) -> str:
        """[B, count, N, D], or [B, count, D, N]."""
        split = self.op("Reshape", self.linear(x, count * D, kind), self.const([B, N, count, D]))
        return self.op("Transpose", split, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])

    def scores(self) -> str:
        return self.op("Mul", self.op("MatMul", self.heads(), self.heads(transposed=True)), self.number(0.4))

    def merge(self, out: str) -> str:
        return self.op("Reshape", self.op("Transpose", out, perm=[0, 2, 1, 3]), self.const([B, N, W]))

    def mask(self) -> np.ndarray:
        """[1, 1, N, N]: causal, with one huge negative number."""
        return np.where(np.tril(np.ones((N, N), bool)), F32(0), np.finfo(F32).min)[None, None]


def model_of(b: Graph, out: str, opset: int, kind: int, others: tuple[str, ...] = ()) -> onnx.ModelProto:
    outputs = [helper.make_tensor_value_info(b.op("Identity", out), kind, [B, N, W])]
    outputs += [onnx.ValueInfoProto(name=v) for v in others]
    graph = helper.make_graph(b.nodes, "g", [helper.make_tensor_value_info("x", kind, [B, N, W])], outputs, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def look(model: onnx.ModelProto, folder: Path) -> tuple[Detection, GraphIndex]:
    loaded = load(save(model, folder))
    before = loaded.proto.SerializeToString()
    index = GraphIndex(loaded)
    found = detect(loaded, profile_for(loaded, {}), index=index)
    assert loaded.proto.SerializeToString() == before, "detection changed the model"
    return found, index


Form = Callable[[Graph], str]


def softmax(b: Graph) -> str:
    return b.merge(b.op("MatMul", b.op("Softmax", b.scores(), axis=-1), b.heads()))


def written_out(b: Graph, maximum: bool = True, masked: bool = False) -> str:
    s = b.scores()
    if masked:
        s = b.op("Add", s, b.const(b.mask()))
    if maximum:
        s = b.op("Sub", s, b.op("ReduceMax", s, b.const([-1]), keepdims=1))
    e = b.op("Exp", s)
    return b.merge(b.op("MatMul", b.op("Div", e, b.op("ReduceSum", e, b.const([-1]), keepdims=1)), b.heads()))


def exp_log_softmax(b: Graph) -> str:
    return b.merge(b.op("MatMul", b.op("Exp", b.op("LogSoftmax", b.scores(), axis=-1)), b.heads()))


def exp_log_sum_exp(b: Graph) -> str:
    s = b.scores()
    weights = b.op("Exp", b.op("Sub", s, b.op("ReduceLogSumExp", s, b.const([3]), keepdims=1)))
    return b.merge(b.op("MatMul", weights, b.heads()))


def maximum_before_softmax(b: Graph) -> str:
    s = b.op("Add", b.scores(), b.const(b.mask()))
    s = b.op("Sub", s, b.op("ReduceMax", s, b.const([-1]), keepdims=1))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def where(b: Graph, hidden: bool) -> str:
    seen = b.const(np.tril(np.ones((1, 1, N, N), bool)) ^ hidden)
    fill = b.number(np.finfo(F32).min)
    s = b.scores()
    s = b.op("Where", seen, fill, s) if hidden else b.op("Where", seen, s, fill)
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def softcap(b: Graph, masked: bool = False) -> str:
    s = b.op("Mul", b.op("Tanh", b.op("Div", b.scores(), b.number(5.0))), b.number(5.0))
    if masked:
        s = b.op("Add", s, b.const(b.mask()))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def grouped(b: Graph, how: str) -> str:
    """Keys and values of KV heads, written to all heads in one of the ways that exporters have."""

    def spread(x: str) -> str:
        if how == "gather":
            return b.op("Gather", x, b.const([0, 0, 1, 1]), axis=1)
        x = b.op("Unsqueeze", x, b.const([2]))
        x = b.op("Tile", x, b.const([1, 1, 2, 1, 1])) if how == "tile" else b.op("Concat", x, x, axis=2)
        return b.op("Reshape", x, b.const([B, H, N, D]))

    key, value = spread(b.heads(KV)), spread(b.heads(KV))
    s = b.op("MatMul", b.op("Mul", b.heads(), b.number(0.4)), b.op("Transpose", key, perm=[0, 1, 3, 2]))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), value))


def interleaved_groups(b: Graph) -> str:
    """Head h reads key head h mod KV: no grouping that a site can say, so keys are taken where all heads are."""
    times = b.const([1, 2, 1, 1])
    key, value = b.op("Tile", b.heads(KV), times), b.op("Tile", b.heads(KV), times)
    s = b.op("MatMul", b.op("Mul", b.heads(), b.number(0.4)), b.op("Transpose", key, perm=[0, 1, 3, 2]))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), value))


def five_axes(b: Graph) -> str:
    """[B, KV, H / KV, N, D] against [B, KV, 1, N, D]."""
    query = b.op("Reshape", b.heads(), b.const([B, KV, H // KV, N, D]))
    key = b.op("Unsqueeze", b.heads(KV, transposed=True), b.const([2]))
    value = b.op("Unsqueeze", b.heads(KV), b.const([2]))
    s = b.op("Mul", b.op("MatMul", query, key), b.number(0.4))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), value)
    return b.merge(b.op("Reshape", out, b.const([B, H, N, D])))


def three_axes(b: Graph) -> str:
    """[B * H, N, D] around the products, with four axes before and after."""
    flat = b.const([B * H, N, D])
    query, key, value = (b.op("Reshape", b.heads(), flat) for _ in range(3))
    s = b.op("MatMul", b.op("Mul", query, b.number(0.4)), b.op("Transpose", key, perm=[0, 2, 1]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), value)
    return b.merge(b.op("Reshape", out, b.const([B, H, N, D])))


def fused_projection(b: Graph, how: str) -> str:
    """One product for Q, K and V, cut in three."""
    x = b.op("Reshape", b.linear("x", 3 * W), b.const([B, N, 3, H, D]))
    x = b.op("Transpose", x, perm=[2, 0, 3, 1, 4])
    if how == "gather":
        q, k, v = (b.op("Gather", x, b.const(np.array(i)), axis=0) for i in range(3))
    elif how == "slice":
        q, k, v = (b.op("Squeeze", b.op("Slice", x, b.const([i]), b.const([i + 1]), b.const([0])), b.const([0]))
                   for i in range(3))  # fmt: skip
    else:
        names = [f"part{i}" for i in range(3)]
        b.nodes.append(helper.make_node("Split", [x], names, axis=0, num_outputs=3))
        q, k, v = (b.op("Squeeze", n, b.const([0])) for n in names)
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), v))


def half(b: Graph, cast: str) -> str:
    """fp16 projections; fp32 for the softmax only, for the scores, or for everything inside."""

    def up(x: str) -> str:
        return b.op("Cast", x, to=TensorProto.FLOAT)

    def down(x: str) -> str:
        return b.op("Cast", x, to=TensorProto.FLOAT16)

    q, k, v = b.heads(kind=np.float16), b.heads(transposed=True, kind=np.float16), b.heads(kind=np.float16)
    if cast != "softmax":
        q, k = up(q), up(k)
    s = b.op("MatMul", q, k)
    s = up(s) if cast == "softmax" else s
    weights = b.op("Softmax", b.op("Mul", s, b.number(0.4)), axis=-1)
    if cast == "all":
        return b.merge(down(b.op("MatMul", weights, up(v))))
    return b.merge(b.op("MatMul", down(weights), v))


def dropout(b: Graph) -> str:
    weights = b.op("Dropout", b.op("Softmax", b.scores(), axis=-1), b.number(0.5))
    return b.merge(b.op("MatMul", weights, b.heads()))


def position_bias_of_two_products(b: Graph) -> str:
    """SAM: attention over a 1 x N grid, with two biases that are products of the query with tables."""
    query = b.heads()
    s = b.op("MatMul", b.op("Mul", query, b.number(0.4)), b.heads(transposed=True))
    table = b.const(b.rng.standard_normal((N, D)).astype(F32))
    row = b.const(b.rng.standard_normal((N, N, D)).astype(F32))
    rel = b.op("Einsum", query, row, equation="bhqd,qkd->bhqk")
    other = b.op("Unsqueeze", b.op("Einsum", query, table, equation="bhqd,qd->bhq"), b.const([3]))
    s = b.op("Add", b.op("Add", other, rel), s)
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


LIFTED: dict[str, tuple[Form, dict[str, object]]] = {
    "softmax": (softmax, {}),
    "written-out": (written_out, {}),
    "written-out-without-maximum": (lambda b: written_out(b, maximum=False), {}),
    "written-out-masked": (lambda b: written_out(b, masked=True), {"kind": "causal", "masked_rows": "uniform"}),
    "written-out-masked-without-maximum": (
        lambda b: written_out(b, maximum=False, masked=True), {"kind": "causal", "masked_rows": "nan"}),
    "exp-log-softmax": (exp_log_softmax, {}),
    "exp-log-sum-exp": (exp_log_sum_exp, {}),
    "maximum-before-softmax": (maximum_before_softmax, {"kind": "causal"}),
    "where-visible": (lambda b: where(b, False), {"kind": "causal"}),
    "where-hidden": (lambda b: where(b, True), {"kind": "causal"}),
    "softcap": (softcap, {"softcap": 5.0}),
    "softcap-masked": (lambda b: softcap(b, True), {"softcap": 5.0, "kind": "causal"}),
    "grouped-tile": (lambda b: grouped(b, "tile"), {"kv_heads": KV}),
    "grouped-concat": (lambda b: grouped(b, "concat"), {"kv_heads": KV}),
    "grouped-gather": (lambda b: grouped(b, "gather"), {"kv_heads": KV}),
    "interleaved-groups": (interleaved_groups, {"kv_heads": H}),
    "five-axes": (five_axes, {"kv_heads": KV}),
    "three-axes": (three_axes, {}),
    "fused-gather": (lambda b: fused_projection(b, "gather"), {}),
    "fused-slice": (lambda b: fused_projection(b, "slice"), {}),
    "fused-split": (lambda b: fused_projection(b, "split"), {}),
    "half-softmax": (lambda b: half(b, "softmax"), {"dtype": "float16", "softmax_dtype": "float32"}),
    "half-scores": (lambda b: half(b, "scores"), {"dtype": "float16", "softmax_dtype": "float32"}),
    "half-all": (lambda b: half(b, "all"), {"dtype": "float16", "softmax_dtype": "float32"}),
    "dropout": (dropout, {}),
    "position-bias-of-two-products": (position_bias_of_two_products, {"kind": "opaque"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIFTED)
def test_lifted(name: str, tmp_path: Path) -> None:
    form, facts = LIFTED[name]
    b = Graph()
    out = form(b)
    kind = TensorProto.FLOAT16 if name.startswith("half") else TensorProto.FLOAT
    found, index = look(model_of(b, out, 18, kind), tmp_path)
    assert [m.reason for m in found.near_misses] == []
    (site,) = found.sites
    assert (site.batch, site.heads, site.query_length, site.key_length) == (B, H, N, N)
    assert (site.head_dim, site.value_dim) == (D, D)
    assert site.scale == pytest.approx(SCALE, rel=1e-3)
    assert site.kv_heads == facts.get("kv_heads", H)
    assert site.mask.kind == facts.get("kind", "none")
    assert site.softcap == facts.get("softcap", 0.0)
    assert site.dtype == facts.get("dtype", "float32")
    assert site.softmax_dtype == facts.get("softmax_dtype", site.dtype)
    if "masked_rows" in facts:
        assert site.mask.masked_rows == facts["masked_rows"]
    # The transposes and the reshapes around the core are inside the site: it starts and ends at [B, N, H, D].
    if not name.startswith("fused") and name != "interleaved-groups":
        assert {o.layout for o in (site.query, site.key, site.value, site.output)} == {"BNHD"}
    actual, read = run_site(site, World(index, {}), 0, pad=False)
    tolerance = 2e-2 if site.dtype == "float16" else 2e-5
    np.testing.assert_allclose(actual, read, rtol=tolerance, atol=tolerance)
    if site.dtype == "float32" and not site.softcap and site.mask.kind != "opaque":
        replaced_gives_the_same(index.model, site)


def replaced_gives_the_same(model: Model, site: AttentionSite, x: np.ndarray | None = None) -> None:
    """The whole model with the site's facts written out again in its place; none of its core is left."""
    x = np.random.default_rng(1).standard_normal((B, N, W)).astype(F32) if x is None else x
    result = apply(model, [(site, standard_attention(site))])
    onnx.checker.check_model(result)
    before, after = (run(m, {"x": x})[0] for m in (model.proto, result))
    np.testing.assert_allclose(after, before, rtol=2e-5, atol=2e-5)
    left = {o for n in result.graph.node for o in n.output}
    assert not left & set(site.interior)


def test_attention_in_a_local_function_is_inlined(tmp_path: Path) -> None:
    """And named where it is not."""
    b = Graph()
    q, k, v = b.heads(), b.heads(transposed=True), b.heads()
    body = [helper.make_node("MatMul", ["q", "k"], ["s"]), helper.make_node("Softmax", ["s"], ["p"], axis=-1),
            helper.make_node("MatMul", ["p", "v"], ["o"])]  # fmt: skip
    b.nodes.append(helper.make_node("Inner", [q, k, v], ["made"], domain="local"))
    model = model_of(b, b.merge("made"), 18, TensorProto.FLOAT)
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("local", "Inner", ["q", "k", "v"], ["o"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    found, _ = look(model, tmp_path)
    assert not found.sites
    assert [m.code for m in found.near_misses] == ["function"] and "Inner" in found.near_misses[0].reason
    inlined = normalise(load(save(model, tmp_path)))
    (site,) = detect(inlined, profile_for(inlined, {})).sites
    assert (site.heads, site.head_dim) == (H, D)


def test_attention_in_a_branch_says_where_it_is(tmp_path: Path) -> None:
    b = Graph()
    q, k, v = b.heads(), b.heads(transposed=True), b.heads()
    body = [helper.make_node("MatMul", [q, k], ["s"]), helper.make_node("Softmax", ["s"], ["p"], axis=-1),
            helper.make_node("MatMul", ["p", v], ["o"])]  # fmt: skip
    result = [onnx.ValueInfoProto(name="o")]
    yes = helper.make_graph(body, "yes", [], result)
    no = helper.make_graph([helper.make_node("Identity", [q], ["o2"])], "no", [], [onnx.ValueInfoProto(name="o2")])
    inner = helper.make_node("If", ["flag"], ["made"], then_branch=yes, else_branch=no, name="cached")
    b.stored.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    b.nodes.append(inner)
    found, _ = look(model_of(b, b.merge("made"), 18, TensorProto.FLOAT), tmp_path)
    (site,) = found.sites
    assert "cached" in site.scope and "then_branch" in site.scope and site.needs == {"body"}


def wrong_axis(b: Graph) -> str:
    return b.merge(b.op("MatMul", b.op("Softmax", b.scores(), axis=2), b.heads()))


def sum_with_a_constant(b: Graph) -> str:
    e = b.op("Exp", b.scores())
    total = b.op("Add", b.op("ReduceSum", e, b.const([-1]), keepdims=1), b.number(2.0))
    return b.merge(b.op("MatMul", b.op("Div", e, total), b.heads()))


def sum_over_queries(b: Graph) -> str:
    e = b.op("Exp", b.scores())
    return b.merge(b.op("MatMul", b.op("Div", e, b.op("ReduceSum", e, b.const([2]), keepdims=1)), b.heads()))


def router(b: Graph) -> str:
    return b.op(
        "MatMul", b.op("Softmax", b.linear("x", 5), axis=-1), b.const(b.rng.standard_normal((5, W)).astype(F32))
    )


def quantised(b: Graph) -> str:
    s = b.op("QuantizeLinear", b.scores(), b.number(0.1), b.const(np.array(0, np.int8)))
    s = b.op("DequantizeLinear", s, b.number(0.1), b.const(np.array(0, np.int8)))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def flat_heads(b: Graph) -> str:
    """SAM and ``nn.MultiheadAttention``: [B * H, N, D] cut from one projection, never of rank 4."""
    x = b.op("Reshape", b.linear("x", 3 * W), b.const([B, N, 3, H, D]))
    x = b.op("Reshape", b.op("Transpose", x, perm=[2, 0, 3, 1, 4]), b.const([3, B * H, N, D]))
    q, k, v = (b.op("Gather", x, b.const(np.array(i)), axis=0) for i in range(3))
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 2, 1]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    out = b.op("Reshape", out, b.const([B, H, N // 11, 11, D]))  # a grid of 1 x 11
    return b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 3, 1, 4]), b.const([B, N, W]))


def flat_heads_whose_scores_shape_is_read(b: Graph) -> str:
    """SAM through TorchScript: the bias is reshaped as the scores."""
    q, k, v = (b.op("Reshape", b.heads(), b.const([B * H, N, D])) for _ in range(3))
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 2, 1]))
    rel = b.op("Einsum", q, b.const(b.rng.standard_normal((N, N, D)).astype(F32)), equation="bqd,qkd->bqk")
    s = b.op("Add", s, b.op("Reshape", rel, b.op("Shape", s)))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    return b.merge(b.op("Reshape", out, b.const([B, H, N, D])))


def length_first(b: Graph) -> str:
    """``nn.MultiheadAttention`` with weights: [N, B * H, D], and the key straight to [B * H, D, N]."""
    first = b.op("Transpose", "x", perm=[1, 0, 2])
    q, k, v = (b.op("Reshape", b.linear(first, W), b.const([N, B * H, D])) for _ in range(3))
    q = b.op("Mul", b.op("Transpose", q, perm=[1, 0, 2]), b.number(0.4))
    s = b.op("MatMul", q, b.op("Transpose", k, perm=[1, 2, 0]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), b.op("Transpose", v, perm=[1, 0, 2]))
    out = b.op("Reshape", b.op("Transpose", out, perm=[1, 0, 2]), b.const([N, B, W]))
    return b.op("Transpose", out, perm=[1, 0, 2])


def one_head(b: Graph) -> str:
    """[B, N, W] all the way: one head."""
    s = b.op("MatMul", b.linear("x", W), b.op("Transpose", b.linear("x", W), perm=[0, 2, 1]))
    return b.op("MatMul", b.op("Softmax", b.op("Mul", s, b.number(0.4)), axis=-1), b.linear("x", W))


def five_axes_from_the_start(b: Graph) -> str:
    query = b.op("Reshape", b.linear("x", W), b.const([B, N, KV, H // KV, D]))
    query = b.op("Transpose", query, perm=[0, 2, 3, 1, 4])
    key = b.op("Unsqueeze", b.heads(KV, transposed=True), b.const([2]))
    value = b.op("Unsqueeze", b.heads(KV), b.const([2]))
    s = b.op("Mul", b.op("MatMul", query, key), b.number(0.4))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), value)
    return b.op("Reshape", b.op("Transpose", out, perm=[0, 3, 1, 2, 4]), b.const([B, N, W]))


def attention_of_three_axes(b: Graph) -> str:
    return b.op("Attention", *(b.linear("x", W) for _ in range(3)), q_num_heads=H, kv_num_heads=H, scale=0.4)


REFUSED: dict[str, tuple[Form, str]] = {
    "wrong-axis": (wrong_axis, "softmax-axis"),
    "router": (router, "constant-keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    form, code = REFUSED[name]
    b = Graph()
    out = form(b)
    found, _ = look(model_of(b, out, 23 if "attention" in name else 18, TensorProto.FLOAT), tmp_path)
    assert not found.sites
    (miss,) = found.near_misses
    assert miss.code == code and len(miss.reason) > 20


def test_quantised_scores_are_named(tmp_path: Path) -> None:
    """No mechanism that does not understand it is offered the site."""
    b = Graph()
    found, _ = look(model_of(b, quantised(b), 18, TensorProto.FLOAT), tmp_path)
    assert all(s.quantised and "quantised" in s.needs for s in found.sites)
    assert found.sites or {m.code for m in found.near_misses} == {"quantised"}


@pytest.mark.parametrize("form", [sum_with_a_constant, sum_over_queries])
def test_quotients_that_are_no_softmax(form: Form, tmp_path: Path) -> None:
    b = Graph()
    found, _ = look(model_of(b, form(b), 18, TensorProto.FLOAT), tmp_path)
    assert found == Detection()


@pytest.mark.parametrize("name", ["scores", "weights"])
def test_inner_values_that_are_outputs(name: str, tmp_path: Path) -> None:
    """The scores, and averaged weights of nn.MultiheadAttention: the core must stay."""
    b = Graph()
    s = b.scores()
    weights = b.op("Softmax", s, axis=-1)
    out = b.merge(b.op("MatMul", weights, b.heads()))
    other = s if name == "scores" else b.op("ReduceMean", weights, b.const([1]), keepdims=0)
    found, _ = look(model_of(b, out, 18, TensorProto.FLOAT, (other,)), tmp_path)
    assert not found.sites
    (miss,) = found.near_misses
    assert miss.code in ("weights-used", "scores-used")


SEPARATED: dict[str, tuple[Form, dict[str, object]]] = {
    "flat-heads": (flat_heads, {}),
    "flat-heads-whose-scores-shape-is-read": (flat_heads_whose_scores_shape_is_read, {"kind": "opaque"}),
    "length-first": (length_first, {}),
    "one-head": (one_head, {"heads": 1, "head_dim": W}),
    "five-axes-from-the-start": (five_axes_from_the_start, {"kv_heads": KV}),
    "attention-of-three-axes": (attention_of_three_axes, {}),
}


@pytest.mark.parametrize("name", SEPARATED)
def test_operands_of_other_ranks_are_separated(name: str, tmp_path: Path) -> None:
    """Near misses become sites by a Reshape and its inverse, which change no output."""
    form, facts = SEPARATED[name]
    b = Graph()
    out = form(b)
    proto = model_of(b, out, 23 if name.startswith("attention") else 18, TensorProto.FLOAT)
    found, index = look(proto, tmp_path)
    assert not found.sites and [m.code in HELPED for m in found.near_misses] == [True]
    profile = profile_for(index.model, {})
    model = separate(index.model, profile)
    assert len(model.notes) > 0 and index.model.proto.SerializeToString() == proto.SerializeToString()
    onnx.checker.check_model(model.proto)
    x = np.random.default_rng(1).standard_normal((B, N, W)).astype(F32)
    before, after = (run(m, {"x": x})[0] for m in (proto, model.proto))
    np.testing.assert_array_equal(before, after)
    index = GraphIndex(model)
    again = detect(model, profile, index=index)
    assert [m.reason for m in again.near_misses] == []
    (site,) = again.sites
    assert (site.heads, site.head_dim) == (facts.get("heads", H), facts.get("head_dim", D))
    assert (site.batch, site.query_length, site.key_length) == (B, N, N)
    assert site.kv_heads == facts.get("kv_heads", site.heads)
    assert site.scale == pytest.approx(SCALE, rel=1e-5)
    assert site.mask.kind == facts.get("kind", "none")
    if site.mask.kind == "none":
        actual, read = run_site(site, World(index, {}), 0, pad=False)
        np.testing.assert_allclose(actual, read, rtol=2e-5, atol=2e-5)
        replaced_gives_the_same(model, site)
    assert separate(model, profile) is model


def dynamic_flat_heads(b: Graph) -> str:
    length = b.op("Shape", "x", start=1, end=2)
    x = b.op("Transpose", b.op("Reshape", b.linear("x", 3 * W), b.const([0, 0, 3, H, D])), perm=[2, 0, 3, 1, 4])
    x = b.op("Reshape", x, b.op("Concat", b.const([3, -1]), length, b.const([D]), axis=0))
    q, k, v = (b.op("Gather", x, b.const(np.array(i)), axis=0) for i in range(3))
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 2, 1]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    out = b.op("Reshape", out, b.op("Concat", b.const([-1, H]), length, b.const([D]), axis=0))
    return b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([0, 0, W]))


@pytest.mark.parametrize("form, heads", [(one_head, 1), (dynamic_flat_heads, H)], ids=["one-head", "flat-heads"])
def test_separated_at_other_sizes(form: Form, heads: int, tmp_path: Path) -> None:
    """With batch and length dynamic an axis that changes with the batch is never taken for heads."""
    b = Graph()
    proto = model_of(b, form(b), 18, TensorProto.FLOAT)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        for axis, name in enumerate(("b", "n")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    model = load(save(proto, tmp_path))
    profile = profile_for(model, {"b": Range(1, 2, 3), "n": Range(1, N, 29)})
    separated = separate(model, profile)
    (site,) = detect(separated, profile).sites
    assert (site.batch, site.heads, site.query_length, site.key_length) == ("b", heads, "n", "n")
    for size in ((1, 1), (3, 29), (2, N)):
        x = np.random.default_rng(2).standard_normal((*size, W)).astype(F32)
        before, after = (run(m, {"x": x})[0] for m in (proto, separated.proto))
        np.testing.assert_array_equal(before, after)
        replaced_gives_the_same(separated, site, x)
