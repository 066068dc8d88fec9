"""KV caches before the attention: joined, scattered, prefill and decode; the operands are the whole cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile.core.profile import Range
from attncompile.core.site import Cache
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import save
from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt
from tests.passes.test_lifter_forms import KV, B, D, Graph, H, W

F32 = np.float32
PAST, LONGEST = 7, 13


@dataclass(frozen=True)
class Step:
    """One call: ``new`` tokens after ``past`` ones; ``grouped`` keys; a past that the file stores in another shape."""

    new: int = 3
    grouped: bool = True
    packed: bool = False
    transposed: bool = False
    swapped: bool = False
    arithmetic: bool = False
    axis: int = 2


def heads(b: Graph, n: int, count: int) -> str:
    split = b.op("Reshape", b.linear("x", count * D), b.const([B, n, count, D]))
    return b.op("Transpose", split, perm=[0, 2, 1, 3])


def model_of(
    b: Graph, step: Step, out: str, present: tuple[str, ...], past: list[tuple[str, list[int]]]
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info("x", 1, [B, step.new, W])]
    infos += [helper.make_tensor_value_info(name, 1, shape) for name, shape in past]
    outputs = [helper.make_tensor_value_info(b.op("Identity", out), 1, None)]
    outputs += [helper.make_tensor_value_info(v, 1, None) for v in present]
    graph = helper.make_graph(b.nodes, "g", infos, outputs, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def attention(b: Graph, q: str, k: str, v: str, count: int, keys: int) -> str:
    def spread(x: str) -> str:
        if count == H:
            return x
        x = b.op("Expand", b.op("Unsqueeze", x, b.const([2])), b.const([B, count, H // count, keys, D]))
        return b.op("Reshape", x, b.const([B, H, keys, D]))

    k, v = spread(k), spread(v)
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    return b.op("MatMul", b.op("Softmax", s, axis=-1), v)


def joined(step: Step) -> onnx.ModelProto:
    """Concat(past, new) on keys and values, as DynamicCache."""
    b = Graph()
    count = KV if step.grouped else H
    shape = [B, count, PAST, D]
    past = [("k", shape), ("v", shape)]
    names = ["k", "v"]
    if step.packed:
        past = [("kv", [2, *shape])]
        names = [b.op("Gather", "kv", b.const(np.array(i)), axis=0) for i in range(2)]
    if step.transposed:
        past = [("k", [B, PAST, count, D]), ("v", [B, PAST, count, D])]
        names = [b.op("Transpose", n, perm=[0, 2, 1, 3]) for n in names]
    if step.arithmetic:
        names = [b.op("Mul", n, b.number(0.5)) for n in names]
    whole = []
    for name in names:
        pair = [name, heads(b, step.new, count)]
        whole.append(b.op("Concat", *(pair[::-1] if step.swapped else pair), axis=step.axis))
    out = attention(b, heads(b, step.new, H), *whole, count, PAST + step.new)
    return model_of(b, step, out, tuple(whole), past)


@pytest.mark.parametrize("new", [1, 3, 11])
@pytest.mark.parametrize("grouped", [False, True])
def test_past_joined_with_new(new: int, grouped: bool, tmp_path: Path) -> None:
    step = Step(new, grouped)
    model, site = only_site(joined(step), tmp_path)
    k, v = (o.name for o in model.proto.graph.output[1:])
    assert site.cache == Cache("concat", "k", "v", k, v)
    assert (site.key.value, site.value.value) == (k, v)  # the whole cache, before it is spread over the heads
    assert (site.query_length, site.key_length, site.heads) == (new, PAST + new, H)
    assert site.kv_heads == (KV if grouped else H) and not site.needs


def test_a_packed_and_a_transposed_past(tmp_path: Path) -> None:
    for step, names in ((Step(packed=True), None), (Step(transposed=True), ("k", "v"))):
        model, site = only_site(joined(step), tmp_path)
        assert site.cache is not None and site.cache.form == "concat"
        concats = [n for n in model.proto.graph.node if n.op_type == "Concat"]
        assert [site.cache.past_key, site.cache.past_value] == [n.input[0] for n in concats]
        assert names is None or site.cache.present_key


@pytest.mark.parametrize("step", [Step(swapped=True), Step(arithmetic=True)], ids=["new-before-past", "computed-past"])
def test_what_is_no_cache_is_attention_all_the_same(step: Step, tmp_path: Path) -> None:
    _, site = only_site(joined(step), tmp_path)
    assert site.cache is None and site.key_length == PAST + step.new


def test_heads_joined_are_no_cache(tmp_path: Path) -> None:
    """Concat over the heads: two sets of heads, the past's as long as the new ones."""
    b = Graph()
    n = 5
    names = [b.op("Concat", name, heads(b, n, KV), axis=1) for name in ("k", "v")]
    out = attention(b, heads(b, n, H), *names, H, n)
    past = [(name, [B, KV, n, D]) for name in ("k", "v")]
    _, site = only_site(model_of(b, Step(n), out, (), past), tmp_path)
    assert site.cache is None and site.heads == site.kv_heads == H


def scattered(kind: str, count: int = KV, swapped: bool = False) -> onnx.ModelProto:
    """New keys written into a cache of fixed length at ``at``, as StaticCache (index_copy)."""
    b, step = Graph(), Step(2)
    shape = [B, count, LONGEST, D]
    whole = []
    for name in ("k", "v"):
        new = heads(b, step.new, count)
        if kind == "elements":
            at = b.op("Expand", b.op("Reshape", "at", b.const([1, 1, -1, 1])), b.const([B, count, step.new, D]))
            made = b.op("ScatterElements", *((new, at, name) if swapped else (name, at, new)), axis=2)
        elif kind == "nd":
            first = b.op("Transpose", name, perm=[2, 0, 1, 3])
            update = b.op("Transpose", new, perm=[2, 0, 1, 3])
            made = b.op("ScatterND", first, b.op("Unsqueeze", "at", b.const([1])), update)
            made = b.op("Transpose", made, perm=[1, 2, 0, 3])
        else:
            first = b.op("Slice", name, b.const([0]), b.const([LONGEST - step.new]), b.const([2]))
            made = b.op("Concat", first, new, axis=2)
        whole.append(made)
    out = attention(b, heads(b, step.new, H), *whole, count, LONGEST)
    proto = model_of(b, step, out, tuple(whole), [("k", shape), ("v", shape)])
    if kind != "slice":
        proto.graph.input.append(helper.make_tensor_value_info("at", TensorProto.INT64, [step.new]))
    return proto


@pytest.mark.parametrize("kind", ["elements", "nd", "slice"])
@pytest.mark.parametrize("count", [KV, H])
def test_new_written_into_the_past(kind: str, count: int, tmp_path: Path) -> None:
    proto = scattered(kind, count)
    model, detection = found_in(proto, tmp_path)
    (site,) = detection.sites
    feeds = random_feeds(model.proto)
    if "at" in feeds:
        feeds["at"] = np.array([4, 5])
    rebuilt(model.proto, site, feeds).check()
    present = [o.name for o in proto.graph.output[1:]]
    assert site.cache is not None and (site.cache.present_key, site.cache.present_value) == tuple(present)
    assert site.cache.form == ("concat" if kind == "slice" else "scatter")
    assert (site.query_length, site.key_length, site.kv_heads) == (2, LONGEST, count)


def test_lengths_of_the_past_may_be_dynamic(tmp_path: Path) -> None:
    """One graph for prefill and decode: past of any length, 0 tokens among them, and any number of new ones."""
    b = Graph()
    split = [b.op("Reshape", b.linear("x", W), b.const([0, -1, H, D])) for _ in range(3)]
    q, k, v = (b.op("Transpose", s, perm=[0, 2, 1, 3]) for s in split)
    k, v = (b.op("Concat", past, new, axis=2) for past, new in (("k", k), ("v", v)))
    s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    past: list[tuple[str, list[int]]] = [("k", [B, H, PAST, D]), ("v", [B, H, PAST, D])]
    proto = model_of(b, Step(), out, (k, v), past)
    for value, name, axis in (("x", "n", 1), ("k", "p", 2), ("v", "p", 2)):
        (info,) = (i for i in proto.graph.input if i.name == value)
        info.type.tensor_type.shape.dim[axis].dim_param = name
    model = load(save(proto, tmp_path))
    (site,) = detect(model, profile_for(model, {"n": Range(1, 4, 9), "p": Range(1, 8, 20)})).sites
    assert (site.query_length, site.key_length) == ("n", "n + p") and site.cache == Cache("concat", "k", "v", k, v)
    for sizes in ({"n": 1, "p": 1}, {"n": 1, "p": 19}, {"n": 7, "p": 2}):
        rebuilt(model.proto, site, random_feeds(model.proto, 0, sizes)).check()


def llama(cache: str, attention_: str) -> Callable[[], object]:
    """A tiny Llama of two layers with this cache as inputs and outputs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=W, intermediate_size=16, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=KV, head_dim=D, max_position_embeddings=32, attn_implementation=attention_,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    class WithCache(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: object, at: object, *past: object) -> tuple[object, ...]:
            if cache == "dynamic":
                state = transformers.DynamicCache()
                for layer in range(2):
                    state.update(past[2 * layer], past[2 * layer + 1], layer)
            else:
                state = transformers.StaticCache(config=config, max_cache_len=LONGEST)
                state.early_initialization(B, KV, D, torch.float32, "cpu")
                for layer in range(2):
                    state.layers[layer].keys, state.layers[layer].values = past[2 * layer], past[2 * layer + 1]
            result = model(input_ids=ids, past_key_values=state, use_cache=True, position_ids=at[None])  # type: ignore[index]
            return result.logits, *(t for layer in state.layers for t in (layer.keys, layer.values))

    return WithCache


@pytest.mark.slow
@pytest.mark.parametrize("attention_", ["eager", "sdpa"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_transformers_dynamic_cache(attention_: str, new: int, exporter: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = llama("dynamic", attention_)()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    past = [torch.randn(B, KV, PAST, D, generator=generator) for _ in range(4)]
    ids = torch.randint(0, 32, (B, new), generator=generator)
    at = torch.arange(PAST, PAST + new)
    path = tmp_path / "cache.onnx"
    options: dict[str, object] = {"opset_version": 18} if exporter == "dynamo" else {"opset_version": 17}
    torch.onnx.export(model, (ids, at, *past), path, dynamo=exporter == "dynamo", **options)
    proto = onnx.load(path)
    found, detection = found_in(proto, tmp_path)
    assert not detection.near_misses and len(detection.sites) == 2
    feeds = random_feeds(found.proto)
    for name, value in feeds.items():
        if value.shape == (new,):
            feeds[name] = at.numpy()
    for site in detection.sites:
        assert (site.heads, site.query_length, site.key_length) == (H, new, PAST + new)
        assert site.cache is not None and site.cache.form == "concat"
        rebuilt(found.proto, site, feeds).check()
