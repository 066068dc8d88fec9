"""Products that exporters write in other ways, other batches and other axes: rebuilt from the facts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.passes.rebuild import Unaligned, found_in, only_site, random_feeds, rebuilt, run_for
from tests.passes.test_lifter_forms import B, D, Graph, H, N, W, model_of

F32 = np.float32
Form = Callable[[Graph], str]


def einsum(b: Graph, first: str, second: str, keys: str = "bhkd") -> str:
    """Both products as Einsums; K in the layout that ``keys`` names."""
    perm = {"bhkd": [0, 2, 1, 3], "bhdk": [0, 2, 3, 1], "bkhd": [0, 1, 2, 3]}[keys]
    split = b.op("Reshape", b.linear("x", W), b.const([B, N, H, D]))
    key = b.op("Transpose", split, perm=perm)
    s = b.op("Mul", b.op("Einsum", b.heads(), key, equation=first), b.number(0.4))
    return b.merge(b.op("Einsum", b.op("Softmax", s, axis=-1), b.heads(), equation=second))


def fused(b: Graph, turned: str = "B", alpha: float = 0.4, value_alpha: float = 1.0) -> str:
    """FusedMatMul of ONNX Runtime: alpha and transposes inside."""
    q, k = b.heads(transposed="A" in turned), b.heads(transposed="B" not in turned)
    flags = {"transA": int("A" in turned), "transB": int("B" in turned)}
    s = b.op("FusedMatMul", q, k, domain="com.microsoft", alpha=alpha, **flags)
    p = b.op("Softmax", s, axis=-1)
    return b.merge(b.op("FusedMatMul", p, b.heads(), domain="com.microsoft", alpha=value_alpha))


def fused_over_batch_axes(b: Graph) -> str:
    """transBatchA: [N, B, H, D] read as [B, H, N, D]."""
    q = b.op("Transpose", b.heads(), perm=[2, 0, 1, 3])
    s = b.op("FusedMatMul", q, b.heads(), domain="com.microsoft", alpha=0.4, transBatchA=1, transB=1)
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def batched(b: Graph, beta: float) -> str:
    """torch.baddbmm over [B * H, N, D], whose addend is zeros or multiplied by 0."""
    flat = b.const([B * H, N, D])
    q, k, v = (b.op("Reshape", b.heads(), flat) for _ in range(3))
    s = b.op("Mul", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), b.number(0.4))
    addend = b.const(np.full((B * H, N, N), 0 if beta else 3, F32))
    s = b.op("Add", b.op("Mul", addend, b.number(beta)), s)
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    return b.merge(b.op("Reshape", out, b.const([B, H, N, D])))


def of_other_width(b: Graph) -> str:
    """Keys of one width, values of another (latent attention): q = nope and rope, k = nope and one rope for all."""
    nope, rope, value = 5, 4, 7

    def part(width: int, heads: int = H) -> str:
        split = b.op("Reshape", b.linear("x", heads * width), b.const([B, N, heads, width]))
        return b.op("Transpose", split, perm=[0, 2, 1, 3])

    latent = b.linear("x", 9)
    up = b.op("MatMul", latent, b.const((b.rng.standard_normal((9, H * (nope + value))) / 3).astype(F32)))
    up = b.op("Transpose", b.op("Reshape", up, b.const([B, N, H, nope + value])), perm=[0, 2, 1, 3])
    b.nodes.append(helper.make_node("Split", [up, b.const([nope, value])], ["k_nope", "v"], axis=-1))
    shared = b.op("Expand", part(rope, 1), b.const([B, H, N, rope]))
    query = b.op("Concat", part(nope), part(rope), axis=-1)
    key = b.op("Concat", "k_nope", shared, axis=-1)
    s = b.op("Mul", b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2])), b.number(0.3))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), "v")
    out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([B, N, H * value]))
    return b.op("MatMul", out, b.const((b.rng.standard_normal((H * value, W)) / 5).astype(F32)))


def latent_joined(b: Graph) -> str:
    """The absorbed form with both features joined: one key for all heads, whose first part is the value."""
    latent, rope = 9, 4
    c = b.linear("x", latent)
    queries = [b.op("Reshape", b.linear("x", H * w), b.const([B, N, H, w])) for w in (latent, rope)]
    query = b.op("Transpose", b.op("Concat", *queries, axis=-1), perm=[0, 2, 1, 3])
    key = b.op("Unsqueeze", b.op("Concat", c, b.linear("x", rope), axis=-1), b.const([1]))
    s = b.op("Mul", b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2])), b.number(0.3))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), b.op("Unsqueeze", c, b.const([1])))
    out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([B, N, H * latent]))
    return b.op("MatMul", out, b.const((b.rng.standard_normal((H * latent, W)) / 5).astype(F32)))


def latent_absorbed(b: Graph) -> str:
    """The absorbed form as two products that are added."""
    latent, rope = 9, 4
    c = b.op("Unsqueeze", b.linear("x", latent), b.const([1]))
    k_rope = b.op("Unsqueeze", b.linear("x", rope), b.const([1]))
    q_latent, q_rope = (
        b.op("Transpose", b.op("Reshape", b.linear("x", H * w), b.const([B, N, H, w])), perm=[0, 2, 1, 3])
        for w in (latent, rope)
    )
    s = b.op("MatMul", q_latent, b.op("Transpose", c, perm=[0, 1, 3, 2]))
    s = b.op("Add", s, b.op("MatMul", q_rope, b.op("Transpose", k_rope, perm=[0, 1, 3, 2])))
    out = b.op("MatMul", b.op("Softmax", b.op("Mul", s, b.number(0.3)), axis=-1), c)
    out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([B, N, H * latent]))
    return b.op("MatMul", out, b.const((b.rng.standard_normal((H * latent, W)) / 5).astype(F32)))


def joint(b: Graph) -> str:
    """Text before image in queries, keys and values; the image's part of the result."""
    text = [b.op("Slice", b.heads(), b.const([0]), b.const([3]), b.const([2])) for _ in range(3)]
    q, k, v = (b.op("Concat", t, b.heads(), axis=2) for t in text)
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    return b.merge(b.op("Slice", out, b.const([3]), b.const([N + 3]), b.const([2])))


def cross(b: Graph) -> str:
    """Keys and values of the first five tokens alone."""
    k, v = (b.op("Slice", b.heads(), b.const([0]), b.const([5]), b.const([2])) for _ in range(2))
    s = b.op("MatMul", b.op("Mul", b.heads(), b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), v))


def learned_queries(b: Graph) -> str:
    """Attention pooling: queries from the weights, keys and values from the input."""
    query = b.const(b.rng.standard_normal((1, H, N, D)).astype(F32))
    query = b.op("Expand", query, b.const([B, H, N, D]))
    s = b.op("MatMul", b.op("Mul", query, b.number(0.4)), b.heads(transposed=True))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


LIFTED: dict[str, tuple[Form, dict[str, object]]] = {
    "einsum-ellipsis": (lambda b: einsum(b, "...qd,...kd->...qk", "...qk,...kd->...qd"), {}),
    "einsum-ellipsis-in-the-middle": (lambda b: einsum(b, "b...qd,b...kd->b...qk", "bh...k,bhkd->bh...d"), {}),
    "einsum-ellipsis-without-result": (lambda b: einsum(b, "...cd,...ed", "...cd,...de"), {}),
    "einsum-other-layout": (lambda b: einsum(b, "bhqd,bkhd->bhqk", "bhqk,bhkd->bhqd", "bkhd"), {}),
    "fused": (fused, {}),
    "fused-both-turned": (lambda b: fused(b, "AB"), {}),
    "fused-query-turned": (lambda b: fused(b, "A"), {}),
    "fused-unturned": (lambda b: fused(b, ""), {}),
    "batched-by-0": (lambda b: batched(b, 0.0), {}),
    "batched-of-zeros": (lambda b: batched(b, 1.0), {}),
    "of-other-width": (of_other_width, {"head_dim": 9, "value_dim": 7, "scale": 0.3}),
    "latent-joined": (latent_joined, {"head_dim": 13, "value_dim": 9, "scale": 0.3, "kv_heads": 1}),
    "joint": (joint, {"query_length": N + 3, "key_length": N + 3}),
    "cross": (cross, {"key_length": 5}),
    "learned-queries": (learned_queries, {}),
}


def model(b: Graph, out: str) -> onnx.ModelProto:
    proto = model_of(b, out, 18, TensorProto.FLOAT)
    if any(n.domain for n in proto.graph.node):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


@pytest.mark.parametrize("name", LIFTED)
def test_lifted(name: str, tmp_path: Path) -> None:
    form, facts = LIFTED[name]
    b = Graph()
    _, site = only_site(model(b, form(b)), tmp_path)
    assert (site.batch, site.heads) == (B, H)
    for fact, default in (("query_length", N), ("key_length", N), ("head_dim", D), ("value_dim", D), ("kv_heads", H)):
        assert getattr(site, fact) == facts.get(fact, default), fact
    assert site.scale == pytest.approx(facts.get("scale", 0.4))
    assert site.mask.kind == "none" and not site.needs and site.cache is None


def einsum_over_two_axes(b: Graph) -> str:
    return einsum(b, "bhqd,bhkd->bqk", "bqk,bhkd->bhqd")


def key_turned_by_a_reshape(b: Graph) -> str:
    """[.., N, D] read as [.., D, N]: the same number of elements, other products."""
    key = b.op("Reshape", b.heads(), b.const([B, H, D, N]))
    s = b.op("Mul", b.op("MatMul", b.heads(), key), b.number(0.4))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def three_operands(b: Graph) -> str:
    s = b.op("Einsum", b.heads(), b.heads(), b.number(0.4), equation="bhqd,bhkd,->bhqk")
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def diagonal(b: Graph) -> str:
    """The weights of key i and query i alone."""
    s = b.op("MatMul", b.heads(), b.heads(transposed=True))
    return b.merge(b.op("Einsum", b.op("Softmax", s, axis=-1), b.heads(), equation="bhqq,bhqd->bhqd"))


REFUSED: dict[str, tuple[Form, str]] = {
    "latent-absorbed": (latent_absorbed, "sum-of-products"),
    "einsum-over-two-axes": (einsum_over_two_axes, "score-product"),
    "diagonal": (diagonal, "einsum"),
    "fused-over-batch-axes": (fused_over_batch_axes, "shape-unknown"),
    "fused-with-scaled-values": (lambda b: fused(b, value_alpha=0.5), "value-product"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    form, code = REFUSED[name]
    b = Graph()
    _, detection = found_in(model(b, form(b)), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == code and len(miss.reason) > 25


def test_a_product_of_three_operands(tmp_path: Path) -> None:
    """Q, K and the scale in one Einsum: named, or right."""
    b = Graph()
    model_, detection = found_in(model(b, three_operands(b)), tmp_path)
    for site in detection.sites:
        assert site.scale == pytest.approx(0.4, rel=1e-5)
        rebuilt(model_.proto, site, random_feeds(model_.proto)).check()
    assert detection.sites or {m.code for m in detection.near_misses} == {"einsum"}


def test_a_key_turned_by_a_reshape_is_another_key(tmp_path: Path) -> None:
    """Its product is one with whatever lies in [D, N] order: said so, or refused; never the key before the reshape."""
    b = Graph()
    model_, detection = found_in(model(b, key_turned_by_a_reshape(b)), tmp_path)
    for site in detection.sites:
        rebuilt(model_.proto, site, random_feeds(model_.proto)).check()
    assert detection.sites or detection.near_misses


def windows(b: Graph) -> str:
    """Five axes: windows of 3 rows of a 4-row image beside the batch."""
    split = [b.op("Reshape", b.linear("x", W), b.const([2, 1, N, H, D])) for _ in range(3)]
    q, k, v = (b.op("Transpose", s, perm=[0, 1, 3, 2, 4]) for s in split)
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
    out = b.op("Transpose", b.op("MatMul", b.op("Softmax", s, axis=-1), v), perm=[0, 1, 3, 2, 4])
    return b.op("Reshape", out, b.const([B, N, W]))


def over_frames(b: Graph, frames: bool) -> str:
    """Video [B, T * S, C]: attention of each place over its frames (or of each frame over its places)."""
    t, s = 5, 7
    x = b.op("Reshape", "x", b.const([B, t, s, W]))
    x = b.op("Transpose", x, perm=[0, 2, 1, 3]) if frames else x
    n, rest = (t, s) if frames else (s, t)
    x = b.op("Reshape", x, b.const([B * rest, n, W]))
    q, k, v = (b.op("Transpose", b.op("Reshape", b.linear(x, W), b.const([B * rest, n, H, D])), perm=[0, 2, 1, 3])
               for _ in range(3))  # fmt: skip
    scores = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([B, rest, n, W]))
    out = b.op("Transpose", out, perm=[0, 2, 1, 3]) if frames else out
    return b.op("Reshape", out, b.const([B, t * s, W]))


@pytest.mark.parametrize("frames", [False, True])
def test_over_one_axis_of_a_video(frames: bool, tmp_path: Path) -> None:
    b = Graph()
    out = b.op("Identity", over_frames(b, frames))
    info = [helper.make_tensor_value_info(n, 1, [B, 35, W]) for n in ("x", out)]
    graph = helper.make_graph(b.nodes, "g", info[:1], info[1:], b.stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    _, site = only_site(proto, tmp_path)
    assert (site.batch, site.heads, site.query_length) == ((14, H, 5) if frames else (10, H, 7))


def test_five_axes_of_windows(tmp_path: Path) -> None:
    b = Graph()
    _, site = only_site(model(b, windows(b)), tmp_path)
    assert (site.batch, site.heads, site.query_length) == (2, H, N)


def small(b: Graph, out: str, shape: list[int]) -> onnx.ModelProto:
    """x [1, N, W] -> ``shape``."""
    out = b.op("Identity", out)
    infos = [helper.make_tensor_value_info("x", 1, [1, N, W])], [helper.make_tensor_value_info(out, 1, shape)]
    graph = helper.make_graph(b.nodes, "g", *infos, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("gemm", [False, True])
def test_matrices_of_one_head(gemm: bool, tmp_path: Path) -> None:
    """[N, D] all the way, as MatMul or Gemm with alpha and a transposed operand."""
    b = Graph()
    x = b.op("Reshape", "x", b.const([N, W]))
    q, k, v = (b.linear(x, D) for _ in range(3))
    if gemm:
        s = b.op("Gemm", q, k, alpha=0.4, transB=1)
        out = b.op("Gemm", b.op("Softmax", s, axis=-1), v)
    else:
        s = b.op("Mul", b.op("MatMul", q, b.op("Transpose", k, perm=[1, 0])), b.number(0.4))
        out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    _, site = only_site(small(b, b.op("Reshape", out, b.const([1, N, D])), [1, N, D]), tmp_path)
    assert (site.batch, site.heads, site.query_length, site.head_dim) == (1, 1, N, D)
    assert site.scale == pytest.approx(0.4)


@pytest.mark.parametrize("how", ["gather", "slice", "split"])
def test_a_loop_over_the_heads(how: str, tmp_path: Path) -> None:
    """Each head its own products: sites of one head each, or one site of all where their results are joined."""
    b = Graph()
    q, k, v = b.heads(), b.heads(), b.heads()

    def head(x: str, at: int) -> str:
        if how == "gather":
            return b.op("Gather", x, b.const(np.array(at)), axis=1)
        if how == "slice":
            cut = b.op("Slice", x, b.const([at]), b.const([at + 1]), b.const([1]))
            return b.op("Squeeze", cut, b.const([1]))
        if f"{x}_0" not in {o for n in b.nodes for o in n.output}:
            b.nodes.append(helper.make_node("Split", [x], [f"{x}_{i}" for i in range(H)], axis=1, num_outputs=H))
        return b.op("Squeeze", f"{x}_{at}", b.const([1]))

    outs = []
    for at in range(H):
        s = b.op("MatMul", head(q, at), b.op("Transpose", head(k, at), perm=[0, 2, 1]))
        p = b.op("Softmax", b.op("Mul", s, b.number(0.4)), axis=-1)
        outs.append(b.op("Unsqueeze", b.op("MatMul", p, head(v, at)), b.const([1])))
    proto = model(b, b.merge(b.op("Concat", *outs, axis=1)))
    made, detection = found_in(proto, tmp_path)
    assert not detection.near_misses
    assert [s.heads for s in detection.sites] in ([1] * H, [H])  # one by one, or all of them where they are joined
    for site in detection.sites:
        assert (site.batch, site.query_length, site.head_dim) == (B, N, D)
        rebuilt(made.proto, site, random_feeds(made.proto)).check()


def decomposed_positions(b: Graph, five_axes: bool) -> str:
    """SAM on a 1 x 11 grid: rel_h and rel_w by two Einsums of the query, added on the scores or on their 5-D view."""
    query = b.heads()
    r_q = b.op("Reshape", query, b.const([B, H, 1, N, D]))
    rel_h = b.op("Einsum", r_q, b.const(b.rng.standard_normal((1, 1, D)).astype(F32)), equation="bnhwc,hkc->bnhwk")
    rel_w = b.op("Einsum", r_q, b.const(b.rng.standard_normal((N, N, D)).astype(F32)), equation="bnhwc,wkc->bnhwk")
    rel = b.op("Add", b.op("Unsqueeze", rel_h, b.const([5])), b.op("Unsqueeze", rel_w, b.const([4])))
    s = b.op("MatMul", b.op("Mul", query, b.number(0.4)), b.heads(transposed=True))
    if five_axes:
        s = b.op("Add", b.op("Reshape", s, b.const([B, H, 1, N, 1, N])), rel)
        s = b.op("Reshape", s, b.const([B, H, N, N]))
    else:
        s = b.op("Add", s, b.op("Reshape", rel, b.const([B, H, N, N])))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


@pytest.mark.parametrize("five_axes", [False, True])
def test_positions_by_two_products_of_the_query(five_axes: bool, tmp_path: Path) -> None:
    """A bias that depends on the queries: its part names it, and says where it is added."""
    b = Graph()
    made, detection = found_in(model(b, decomposed_positions(b, five_axes)), tmp_path)
    (site,) = detection.sites
    (part,) = site.mask.parts
    assert part.additive and part.source and part.kind in ("opaque", "bias")
    result = run_for(made.proto, random_feeds(made.proto), [part.source])[part.source]
    assert result.shape == ((B, H, 1, N, 1, N) if five_axes else (B, H, N, N))
    if five_axes:
        with pytest.raises(Unaligned):
            rebuilt(made.proto, site, random_feeds(made.proto))
    else:
        rebuilt(made.proto, site, random_feeds(made.proto)).check()


@pytest.mark.parametrize("masked", [False, True])
def test_the_heads_of_a_group_in_the_place_of_queries(masked: bool, tmp_path: Path) -> None:
    """One token: [B, H, 1, D] reshaped to [B, KV, H / KV, D], as exporters do where a cache is decoded."""
    b, kv = Graph(), 2
    first = b.op("Slice", "x", b.const([0]), b.const([1]), b.const([1]))
    query = b.op("Reshape", b.linear(first, W), b.const([B, 1, H, D]))
    query = b.op("Reshape", b.op("Transpose", query, perm=[0, 2, 1, 3]), b.const([B, kv, H // kv, D]))
    s = b.op("Mul", b.op("MatMul", query, b.heads(kv, transposed=True)), b.number(0.4))
    if masked:
        s = b.op("Add", s, b.const(np.where(np.arange(N) < 4, F32(-np.inf), F32(0))[None, None, None]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads(kv))
    out = b.op("Transpose", b.op("Reshape", out, b.const([B, H, 1, D])), perm=[0, 2, 1, 3])
    out = b.op("Add", "x", b.op("Reshape", out, b.const([B, 1, W])))
    _, site = only_site(model(b, out), tmp_path)
    assert (site.heads, site.kv_heads, site.query_length, site.key_length) == (H, kv, 1, N)
    assert (site.mask.kind != "none") == masked and all(
        "not [batch" not in p.certificate.detail for p in site.mask.parts
    )
