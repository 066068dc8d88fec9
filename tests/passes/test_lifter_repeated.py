"""What exporters write once for every head: keys and values of groups before the operator, masks. Each is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.passes.operator_graphs import check_facts, model, only_site
from tests.passes.rebuild import found_in
from tests.passes.rebuild import only_site as rebuilt_site
from tests.passes.test_lifter_forms import F32, B, D, Graph, H, N, W

G, QUERIES, KEYS = 3, 5, 7
"""Key heads before they are repeated, each twice."""

Repeat = Callable[[Graph, str, int], str]


def expanded(b: Graph, x: str, dim: int) -> str:
    x = b.op("Expand", b.op("Unsqueeze", x, b.const([2])), b.const([B, G, 2, KEYS, dim]))
    return b.op("Reshape", x, b.const([B, 2 * G, KEYS, dim]))


def tiled(b: Graph, x: str, dim: int) -> str:
    x = b.op("Tile", b.op("Unsqueeze", x, b.const([2])), b.const([1, 1, 2, 1, 1]))
    return b.op("Reshape", x, b.const([0, -1, KEYS, dim]))


def gathered(b: Graph, x: str, dim: int) -> str:
    return b.op("Gather", x, b.const([0, 0, 1, 1, 2, 2]), axis=1)


def transposed(b: Graph, x: str, dim: int) -> str:
    """Repeated as [batch, keys, heads, dim]."""
    x = b.op("Unsqueeze", b.op("Transpose", x, perm=[0, 2, 1, 3]), b.const([3]))
    x = b.op("Reshape", b.op("Expand", x, b.const([B, KEYS, G, 2, dim])), b.const([0, 0, 2 * G, dim]))
    return b.op("Transpose", x, perm=[0, 2, 1, 3])


def whole(b: Graph, x: str, dim: int) -> str:
    """All heads, and all again: head i serves queries i and i + 3, which no group says."""
    return b.op("Tile", x, b.const([1, 2, 1, 1]))


def other_order(b: Graph, x: str, dim: int) -> str:
    return b.op("Gather", x, b.const([0, 0, 2, 2, 1, 1]), axis=1)


def once(b: Graph, x: str, dim: int) -> str:
    return x


def attention(
    key: Repeat, value: Repeat, heads: int = 2 * G, opset: int = 24, outputs: tuple[str, ...] = ("y",), width: int = G
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """q [B, heads, 5, 6], k [B, 3, 7, 6], v [B, 3, 7, 4]; a mask of all heads."""
    b = Graph()
    feeds = {
        "q": b.rng.standard_normal((B, heads, QUERIES, 6)).astype(F32),
        "k": b.rng.standard_normal((B, width, KEYS, 6)).astype(F32),
        "v": b.rng.standard_normal((B, width, KEYS, 4)).astype(F32),
    }
    mask = b.rng.random((B, 1, QUERIES, KEYS)) < 0.7
    mask[..., 0] = True
    feeds["m"] = mask
    k, v = key(b, "k", 6), value(b, "v", 4)
    b.nodes.append(helper.make_node("Attention", ["q", k, v, "m"], list(outputs), name="it"))
    infos = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
             for n, a in feeds.items()]  # fmt: skip
    graph = helper.make_graph(b.nodes, "g", infos, [onnx.ValueInfoProto(name=o) for o in outputs], b.stored)
    return model(graph, opset), feeds


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize("form", [expanded, tiled, gathered, transposed])
def test_keys_before_they_are_repeated(form: Repeat, opset: int) -> None:
    proto, feeds = attention(form, form, opset=opset)
    found, site = only_site(proto)
    assert (site.heads, site.kv_heads, site.key.value, site.value.value) == (2 * G, G, "k", "v")
    assert len(site.nodes) > 2
    check_facts(found, site, feeds)


@pytest.mark.parametrize("form", [expanded, gathered])
def test_the_operators_own_groups_come_on_top(form: Repeat) -> None:
    """12 query heads over 6 repeated ones of 3: four of each, consecutive."""
    proto, feeds = attention(form, form, heads=4 * G)
    found, site = only_site(proto)
    assert (site.heads, site.kv_heads) == (4 * G, G)
    check_facts(found, site, feeds)


@pytest.mark.parametrize(("key", "value"), [(expanded, transposed), (gathered, tiled)])
def test_key_and_value_may_differ_in_form(key: Repeat, value: Repeat) -> None:
    found, site = only_site(attention(key, value)[0])
    assert site.kv_heads == G
    check_facts(found, site, attention(key, value)[1])


@pytest.mark.parametrize("form", [whole, other_order])
def test_another_order_is_not_taken_back(form: Repeat) -> None:
    proto, feeds = attention(form, form)
    found, site = only_site(proto)
    assert (site.kv_heads, len(site.nodes)) == (2 * G, 1)
    check_facts(found, site, feeds)


@pytest.mark.parametrize(("key", "value"), [(expanded, whole), (whole, gathered)])
def test_both_or_none(key: Repeat, value: Repeat) -> None:
    proto, feeds = attention(key, value)
    found, site = only_site(proto)
    assert site.kv_heads == 2 * G
    check_facts(found, site, feeds)


def test_a_cache_that_the_operator_gives_out_holds_all_heads() -> None:
    proto, feeds = attention(expanded, expanded, outputs=("y", "ck", "cv"))
    found, site = only_site(proto)
    assert site.kv_heads == 2 * G
    check_facts(found, site, feeds)


def test_operands_of_rank_3() -> None:
    """[batch, keys, heads * dim] of heads that were repeated before they were joined."""
    b = Graph()
    feeds = {
        "q": b.rng.standard_normal((B, QUERIES, 2 * G * 6)).astype(F32),
        "k": b.rng.standard_normal((B, KEYS, G, 6)).astype(F32),
        "v": b.rng.standard_normal((B, KEYS, G, 4)).astype(F32),
    }

    def joined(x: str, dim: int) -> str:
        x = b.op("Expand", b.op("Unsqueeze", x, b.const([3])), b.const([B, KEYS, G, 2, dim]))
        return b.op("Reshape", x, b.const([B, KEYS, 2 * G * dim]))

    k, v = joined("k", 6), joined("v", 4)
    b.nodes.append(helper.make_node("Attention", ["q", k, v], ["y"], q_num_heads=2 * G, kv_num_heads=2 * G))
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in feeds.items()]
    proto = model(helper.make_graph(b.nodes, "g", infos, [onnx.ValueInfoProto(name="y")], b.stored), 24)
    found, site = only_site(proto)
    assert (site.heads, site.kv_heads, site.key.value, site.key.layout) == (2 * G, G, "k", "BNHD")
    check_facts(found, site, feeds)


def test_nothing_repeated_is_as_it_was() -> None:
    _, site = only_site(attention(once, once, heads=G)[0])
    assert (site.kv_heads, len(site.nodes), site.key.value) == (G, 1, "k")


def masked(mask: Callable[[Graph], str], three: bool = False) -> onnx.ModelProto:
    """Scores with the mask ``pad`` [B, N] of numbers added; ``three``: as [B * H, N, N]."""
    b = Graph()
    q, k, v = b.heads(), b.heads(transposed=True), b.heads()
    if three:
        q, v = (b.op("Reshape", x, b.const([B * H, N, D])) for x in (q, v))
        k = b.op("Reshape", k, b.const([B * H, D, N]))
    scores = b.op("Add", b.op("MatMul", q, k), mask(b))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    out = b.merge(b.op("Reshape", out, b.const([B, H, N, D])) if three else out)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, N, W]),
              helper.make_tensor_value_info("pad", TensorProto.FLOAT, [B, N])]  # fmt: skip
    outputs = [helper.make_tensor_value_info(b.op("Identity", out), TensorProto.FLOAT, [B, N, W])]
    graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _four(b: Graph) -> str:
    return b.op("Reshape", "pad", b.const([B, 1, 1, N]))


def tile(b: Graph) -> str:
    return b.op("Tile", _four(b), b.const([1, H, 1, 1]))


def tile_of_three(b: Graph) -> str:
    """diffusers: repeat_interleave over heads, [B * H, 1, N]."""
    return b.op("Reshape", tile(b), b.const([B * H, 1, N]))


def tile_to_three_and_back(b: Graph) -> str:
    return b.op("Reshape", tile_of_three(b), b.const([B, H, 1, N]))


def interleaved(b: Graph) -> str:
    """[B, 1, N] -> [B * H, 1, N] by Gather."""
    three = b.op("Reshape", "pad", b.const([B, 1, N]))
    return b.op("Gather", three, b.const(sorted(list(range(B)) * H)), axis=0)


def wrong_order(b: Graph) -> str:
    """Batch entries and heads mixed up: [H, B] where [B, H] belongs."""
    return b.op("Reshape", b.op("Tile", b.op("Reshape", "pad", b.const([B, 1, N])), b.const([H, 1, 1])),
                b.const([B * H, 1, N]))  # fmt: skip


def scaled_per_head(b: Graph) -> str:
    """As ALiBi: every head has its own."""
    return b.op("Mul", tile(b), b.const(np.arange(1, H + 1, dtype=F32).reshape(1, H, 1, 1)))


@pytest.mark.parametrize(
    ("mask", "three"),
    [(tile, False), (tile_to_three_and_back, False), (tile_of_three, True)],
)
def test_a_mask_of_all_heads_is_padding(mask: Callable[[Graph], str], three: bool, tmp_path: Path) -> None:
    _, site = rebuilt_site(masked(mask, three), tmp_path)
    (part,) = site.mask.parts
    assert (part.kind, part.additive) == ("padding", True)


def test_a_mask_of_its_own_for_each_head_stays_opaque(tmp_path: Path) -> None:
    _, site = rebuilt_site(masked(scaled_per_head), tmp_path)
    assert [p.kind for p in site.mask.parts] == ["opaque"]


@pytest.mark.parametrize("mask", [wrong_order, interleaved])
def test_a_mask_that_no_value_holds_once_stays_opaque(mask: Callable[[Graph], str], tmp_path: Path) -> None:
    """Batch entries and heads mixed up; [B, 1, N], which has no axis for heads."""
    _, found = found_in(masked(mask, True), tmp_path)
    (site,) = found.sites
    assert [p.kind for p in site.mask.parts] == ["opaque"]
