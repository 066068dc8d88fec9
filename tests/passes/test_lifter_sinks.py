"""Sinks: one more logit in the softmax that no value belongs to, in every spelling; rebuilt from the facts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import save
from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt, run_for
from tests.passes.test_lifter_forms import KV, B, D, Graph, H, N, grouped, model_of

F32 = np.float32
LAST = [-1]


def logits(b: Graph, shape: tuple[int, ...] = (1, H, 1, 1)) -> np.ndarray:
    return b.rng.standard_normal(shape).astype(F32)


def column(b: Graph) -> str:
    """As gpt-oss: one logit a head, repeated for every batch entry and query."""
    sinks = b.op("Reshape", b.const(logits(b, (H,))), b.const([1, -1, 1, 1]))
    return b.op("Expand", sinks, b.const([B, H, N, 1]))


def stored_column(b: Graph) -> str:
    return b.const(np.broadcast_to(logits(b), (B, H, N, 1)).copy())


def joined(b: Graph, sink: Callable[[Graph], str] = column, front: bool = False, shift: bool = False) -> str:
    """The logits of the keys and the sink; ``shift``: less the row's maximum."""
    pair = [b.scores(), sink(b)]
    s = b.op("Concat", *(pair[::-1] if front else pair), axis=-1)
    return b.op("Sub", s, b.op("ReduceMax", s, b.const(LAST), keepdims=1)) if shift else s


def sliced(b: Graph, weights: str, start: int, end: int) -> str:
    return b.op("Slice", weights, b.const([start]), b.const([end]), b.const(LAST))


def concat_and_slice(b: Graph, front: bool = False, shift: bool = False) -> str:
    weights = b.op("Softmax", joined(b, front=front, shift=shift), axis=-1)
    kept = sliced(b, weights, 1, 2**62) if front else sliced(b, weights, 0, -1)
    return b.merge(b.op("MatMul", kept, b.heads()))


def stored(b: Graph) -> str:
    weights = b.op("Softmax", joined(b, stored_column), axis=-1)
    return b.merge(b.op("MatMul", sliced(b, weights, 0, N), b.heads()))


def split(b: Graph) -> str:
    b.nodes.append(helper.make_node(
        "Split", [b.op("Softmax", joined(b), axis=-1), b.const([N, 1])], ["kept", "rest"], axis=-1))  # fmt: skip
    return b.merge(b.op("MatMul", "kept", b.heads()))


def gathered(b: Graph) -> str:
    weights = b.op("Softmax", joined(b, front=True), axis=-1)
    return b.merge(b.op("MatMul", b.op("Gather", weights, b.const(list(range(1, N + 1))), axis=-1), b.heads()))


def masked(b: Graph, low: float, guard: bool = False) -> str:
    """With rows that see no key at all: the sink takes everything, so they give 0."""
    seen = np.tril(np.ones((N, N), bool))
    seen[4] = False
    s = b.op("Add", b.scores(), b.const(np.where(seen, F32(0), F32(low))[None, None]))
    weights = b.op("Softmax", b.op("Concat", s, column(b), axis=-1), axis=-1)
    weights = sliced(b, weights, 0, -1)
    if guard:
        weights = b.op("Where", b.op("IsNaN", weights), b.number(0.0), weights)
    return b.merge(b.op("MatMul", weights, b.heads()))


def one_for_all_heads(b: Graph) -> str:
    sink = b.op("Expand", b.const(logits(b, (1, 1, 1, 1))), b.const([B, H, N, 1]))
    weights = b.op("Softmax", b.op("Concat", b.scores(), sink, axis=3), axis=3)
    return b.merge(b.op("MatMul", sliced(b, weights, 0, -1), b.heads()))


def padded_with_zero(b: Graph) -> str:
    s = b.op("Pad", b.scores(), b.const([0, 0, 0, 1, 0, 0, 0, 0]))
    return b.merge(b.op("MatMul", sliced(b, b.op("Softmax", s, axis=-1), 1, 2**62), b.heads()))


def softmax_one(b: Graph, form: str) -> str:
    """exp(s) / (1 + sum(exp(s))), plain, or with the maximum taken off."""
    s = b.scores()
    if form == "plain":
        e = b.op("Exp", s)
        one = b.number(1.0)
    else:
        top = b.op("ReduceMax", s, b.const(LAST), keepdims=1)
        top = b.op("Max", top, b.number(0.0)) if form == "clamped" else top
        e, one = b.op("Exp", b.op("Sub", s, top)), b.op("Exp", b.op("Neg", top))
    total = b.op("Add", b.op("ReduceSum", e, b.const(LAST), keepdims=1), one)
    return b.merge(b.op("MatMul", b.op("Div", e, total), b.heads()))


def written_out(b: Graph, of_sink: bool = True, wrong: bool = False) -> str:
    """exp(sink - max) in the denominator."""
    s, sink = b.scores(), b.const(logits(b, (H, 1, 1)))
    top = b.op("ReduceMax", s, b.const(LAST), keepdims=1)
    top = b.op("Max", top, sink) if of_sink else top
    e = b.op("Exp", b.op("Sub", s, top))
    other = b.op("ReduceMax", s, b.const(LAST), keepdims=1) if wrong else top
    total = b.op("Add", b.op("Exp", b.op("Sub", sink, other)), b.op("ReduceSum", e, b.const(LAST), keepdims=1))
    return b.merge(b.op("MatMul", b.op("Div", e, total), b.heads()))


def five_axes(b: Graph) -> str:
    """Groups of query heads: logits [KV, H / KV, 1, 1]."""
    query = b.op("Reshape", b.heads(), b.const([B, KV, H // KV, N, D]))
    key, value = (b.op("Unsqueeze", b.heads(KV, transposed=t), b.const([2])) for t in (True, False))
    s = b.op("Mul", b.op("MatMul", query, key), b.number(0.4))
    sink = b.op("Expand", b.const(logits(b, (KV, H // KV, 1, 1))), b.const([B, KV, H // KV, N, 1]))
    weights = b.op("Softmax", b.op("Concat", s, sink, axis=-1), axis=-1)
    out = b.op("MatMul", sliced(b, weights, 0, -1), value)
    return b.merge(b.op("Reshape", out, b.const([B, H, N, D])))


def half(b: Graph) -> str:
    """fp16 scores and logits, the softmax in fp32."""
    kind = np.float16
    s = b.op("Mul", b.op("MatMul", b.heads(kind=kind), b.heads(transposed=True, kind=kind)), b.number(0.4, kind))
    sink = b.op("Expand", b.const(logits(b).astype(kind)), b.const([B, H, N, 1]))
    s = b.op("Cast", b.op("Concat", s, sink, axis=-1), to=TensorProto.FLOAT)
    weights = b.op("Cast", b.op("Softmax", s, axis=-1), to=TensorProto.FLOAT16)
    return b.merge(b.op("MatMul", sliced(b, weights, 0, -1), b.heads(kind=kind)))


LIFTED: dict[str, Callable[[Graph], str]] = {
    "concat-slice": concat_and_slice,
    "front": lambda b: concat_and_slice(b, front=True),
    "shifted": lambda b: concat_and_slice(b, shift=True),
    "stored": stored,
    "split": split,
    "gathered": gathered,
    "one-for-all-heads": one_for_all_heads,
    "padded-with-zero": padded_with_zero,
    "softmax-one": lambda b: softmax_one(b, "plain"),
    "softmax-one-shifted": lambda b: softmax_one(b, "shifted"),
    "softmax-one-clamped": lambda b: softmax_one(b, "clamped"),
    "written-out": written_out,
    "written-out-maximum-of-keys": lambda b: written_out(b, of_sink=False),
    "five-axes": five_axes,
}


@pytest.mark.parametrize("name", LIFTED)
def test_lifted(name: str, tmp_path: Path) -> None:
    b = Graph()
    model, site = only_site(model_of(b, LIFTED[name](b), 18, TensorProto.FLOAT), tmp_path)
    assert (site.heads, site.query_length, site.key_length, site.head_dim) == (H, N, N, D)
    assert site.scale == pytest.approx(0.4) and site.mask.kind == "none"
    assert site.needs == {"sinks"} and site.sinks not in site.interior
    (size,) = {int(np.prod(t.dims)) for t in model.proto.graph.initializer if t.name == site.sinks} or {H}
    assert size == (1 if "zero" in name or "one" in name else H)


@pytest.mark.parametrize("low", [-np.inf, np.finfo(F32).min, -1e4])
@pytest.mark.parametrize("guard", [False, True])
def test_rows_that_see_no_key_give_zero(low: float, guard: bool, tmp_path: Path) -> None:
    b = Graph()
    model, site = only_site(model_of(b, masked(b, low, guard), 18, TensorProto.FLOAT), tmp_path)
    assert site.mask.masked_rows == "zero"
    values = run_for(model.proto, random_feeds(model.proto), [site.output.value])[site.output.value]
    row = values[:, 4] if site.output.layout == "BNHD" else values[:, :, 4]
    assert not row.any()


def test_a_sink_below_the_fill_is_refused(tmp_path: Path) -> None:
    """A logit of -2e4 beside a fill of -1e4: in a row that sees no key the hidden keys share the weight."""
    b = Graph()
    out = masked(b, -1e4)
    for tensor in b.stored:
        if list(tensor.dims) == [H] and tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(np.full(H, -2e4, F32), tensor.name))
    _, detection = found_in(model_of(b, out, 18, TensorProto.FLOAT), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == "sinks" and "-10000" in miss.reason


def test_half_precision_around_a_softmax_in_single(tmp_path: Path) -> None:
    b = Graph()
    _, site = only_site(model_of(b, half(b), 18, TensorProto.FLOAT16), tmp_path, tolerance=2e-2)
    assert (site.dtype, site.softmax_dtype) == ("float16", "float32") and site.sinks


def test_the_length_of_the_keys_may_be_dynamic(tmp_path: Path) -> None:
    """The same slice at other lengths, with a column expanded to a shape that the graph computes."""
    b = Graph()
    parts = [b.op("Reshape", "x", b.const([0, -1, H, D])) for _ in range(3)]
    query, value = (b.op("Transpose", p, perm=[0, 2, 1, 3]) for p in parts[:2])
    s = b.op("MatMul", query, b.op("Transpose", parts[2], perm=[0, 2, 3, 1]))
    shape = b.op("Concat", b.op("Shape", s, end=3), b.const([1]), axis=0)
    s = b.op("Concat", s, b.op("Expand", b.const(logits(b)), shape), axis=-1)
    out = b.op("MatMul", sliced(b, b.op("Softmax", s, axis=-1), 0, -1), value)
    proto = model_of(b, out, 18, TensorProto.FLOAT)
    for axis, name in enumerate(("b", "n")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = load(save(proto, tmp_path))
    (site,) = detect(model, profile_for(model, {})).sites
    assert (site.batch, site.query_length) == ("b", "n") and site.sinks
    for sizes in ({"b": 1, "n": 1}, {"b": 3, "n": 17}):
        rebuilt(model.proto, site, random_feeds(model.proto, 0, sizes)).check()


def sink_kept(b: Graph) -> str:
    """The sink has a value: an attention to one more token whose key is nowhere."""
    weights = b.op("Softmax", joined(b), axis=-1)
    zeros = b.const(np.ones((B, H, 1, D), F32))
    return b.merge(b.op("MatMul", weights, b.op("Concat", b.heads(), zeros, axis=2)))


def cut_wrongly(b: Graph, start: int, end: int, front: bool = False) -> str:
    return b.merge(b.op("MatMul", sliced(b, b.op("Softmax", joined(b, front=front), axis=-1), start, end), b.heads()))


def two_sinks(b: Graph) -> str:
    sinks = b.op("Expand", b.const(logits(b, (1, H, 1, 2))), b.const([B, H, N, 2]))
    weights = b.op("Softmax", b.op("Concat", b.scores(), sinks, axis=-1), axis=-1)
    return b.merge(b.op("MatMul", sliced(b, weights, 0, N), b.heads()))


def sink_of_each_query(b: Graph, stored: bool) -> str:
    sink = b.const(logits(b, (B, H, N, 1)) if stored else logits(b, (1, 1, N, 1)))
    sink = sink if stored else b.op("Expand", sink, b.const([B, H, N, 1]))
    weights = b.op("Softmax", b.op("Concat", b.scores(), sink, axis=-1), axis=-1)
    return b.merge(b.op("MatMul", sliced(b, weights, 0, -1), b.heads()))


def sink_from_the_input(b: Graph) -> str:
    sink = b.op("ReduceMean", b.heads(), b.const([3]), keepdims=1)
    weights = b.op("Softmax", b.op("Concat", b.scores(), sink, axis=-1), axis=-1)
    return b.merge(b.op("MatMul", sliced(b, weights, 0, -1), b.heads()))


def weights_read_twice(b: Graph) -> str:
    weights = b.op("Softmax", joined(b), axis=-1)
    out = b.merge(b.op("MatMul", sliced(b, weights, 0, -1), b.heads()))
    return b.op("Add", out, b.op("ReduceMax", weights, keepdims=0))


def scaled_after_joining(b: Graph) -> str:
    s = b.op("Mul", joined(b), b.number(0.5))
    return b.merge(b.op("MatMul", sliced(b, b.op("Softmax", s, axis=-1), 0, -1), b.heads()))


REFUSED: dict[str, tuple[Callable[[Graph], str], str]] = {
    "kept-for-the-values": (sink_kept, "sinks"),
    "cut-at-the-wrong-end": (lambda b: cut_wrongly(b, 1, 2**62), "sinks"),
    "cut-at-the-wrong-end-of-a-front": (lambda b: cut_wrongly(b, 0, -1, front=True), "sinks"),
    "two-sinks": (two_sinks, "joined-scores"),
    "one-a-query": (lambda b: sink_of_each_query(b, False), "sinks"),
    "one-a-query-stored": (lambda b: sink_of_each_query(b, True), "sinks"),
    "from-the-input": (sink_from_the_input, "sinks"),
    "weights-read-twice": (weights_read_twice, "sinks"),
    "scaled-after-joining": (scaled_after_joining, "sinks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    form, code = REFUSED[name]
    b = Graph()
    proto = model_of(b, form(b), 18, TensorProto.FLOAT)
    run_for(proto, random_feeds(proto), [proto.graph.output[0].name])  # it is a valid model
    _, detection = found_in(proto, tmp_path)
    assert not detection.sites
    assert code in {m.code for m in detection.near_misses}
    assert all(len(m.reason) > 20 for m in detection.near_misses)


def test_another_maximum_in_the_sinks_term_is_refused_or_the_same(tmp_path: Path) -> None:
    """exp(sink - max(keys)) with exp(s - max(keys, sink)): not a softmax. Nothing is claimed."""
    b = Graph()
    _, detection = found_in(model_of(b, written_out(b, wrong=True), 18, TensorProto.FLOAT), tmp_path)
    assert not detection.sites


def test_grouped_keys_with_sinks(tmp_path: Path) -> None:
    b = Graph()
    out = grouped(b, "tile")
    for node in b.nodes:
        if node.op_type == "Softmax":
            at, s = b.nodes.index(node), node.input[0]
            node.input[0] = "with_sink"
            made = node.output[0]
            node.output[0] = "all"
            sink = b.const(logits(b))
            ends = [b.const(v) for v in ([0], [-1], [-1])]
            b.nodes[at:at] = [helper.make_node("Expand", [sink, b.const([B, H, N, 1])], ["column"]),
                              helper.make_node("Concat", [s, "column"], ["with_sink"], axis=-1)]  # fmt: skip
            b.nodes.insert(at + 3, helper.make_node("Slice", ["all", *ends], [made]))
            break
    _, site = only_site(model_of(b, out, 18, TensorProto.FLOAT), tmp_path)
    assert site.kv_heads == KV and site.sinks
