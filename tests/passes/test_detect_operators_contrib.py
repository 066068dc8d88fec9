"""com.microsoft operators: what is lifted equals ONNX Runtime's CPU kernels, what is not says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto
from onnx import helper as h

from attncompile.core.mask import KeyEnds
from attncompile.core.profile import Range
from attncompile.core.site import Cache
from attncompile.passes.detect.contrib import DOMAIN, KEPT
from attncompile.passes.replace import apply
from attncompile.plugins import mechanisms
from tests.passes.operator_graphs import Inputs, check_facts, find, model, one_node, only_miss, only_site, run
from tests.test_backend_nodes import tool

RNG = np.random.default_rng(11)
NONE: tuple[str, None] = ("", None)
B, S, L, H, D = 2, 5, 7, 3, 4


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def contrib(op: str, inputs: Inputs, outputs: tuple[str, ...] = ("y",), **more: Any) -> ModelProto:
    return one_node(op, inputs, outputs, domain=DOMAIN, opset=18, **more)


def feeds(inputs: Inputs) -> dict[str, np.ndarray]:
    return {n: a for n, a in inputs if a is not None}


def cross() -> list[Any]:
    return [("q", floats(B, S, H * D)), ("k", floats(B, L, H * D)), ("v", floats(B, L, H * 6))]


def own() -> list[Any]:
    return [(x, floats(B, S, H * D)) for x in "qkv"]


def past(length: int) -> list[Any]:
    return [(x, floats(B, H, length, D)) for x in ("pk", "pv")]


def mask(*shape: int) -> np.ndarray:
    found = (RNG.random(shape) < 0.6).astype(np.int32)
    found[..., 0] = 1
    return found


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (cross(), {}),
        (cross(), {"scale": 0.3}),
        (own(), {"unidirectional": 1}),
        ([cross()[0], ("k", floats(B, H, L, D)), ("v", floats(B, H, L, D))], {}),
        ([*cross(), NONE, NONE, ("b", floats(B, H, S, L))], {}),
        ([*cross(), NONE, NONE, ("b", floats(1, 1, S, L))], {}),
        ([*own(), NONE, NONE, ("b", floats(1, H, S, S))], {"unidirectional": 1}),
        ([*cross(), NONE, ("m", ints(4, 7))], {}),
        ([*cross(), NONE, ("m", mask(B, L))], {}),
        ([*cross(), NONE, ("m", mask(B, S, L))], {"mask_filter_value": -50.0}),
        ([*cross(), NONE, ("m", mask(B, L)), ("b", floats(B, H, S, L))], {}),
        ([*own(), NONE, ("m", mask(B, S))], {"unidirectional": 1}),
        ([*own(), NONE, NONE, NONE, *past(3)], {}),
        ([*own(), NONE, NONE, NONE, *past(3)], {"unidirectional": 1}),
        ([*own(), NONE, ("m", mask(B, S + 3)), ("b", floats(B, H, S, S + 3)), *past(3)], {}),
    ],
)
def test_multi_head_attention(inputs: Inputs, attributes: dict[str, Any]) -> None:
    outputs = ("y", "ck", "cv") if len(inputs) > 6 else ("y",)
    found, site = only_site(contrib("MultiHeadAttention", inputs, outputs, num_heads=H, **attributes))
    assert site.form == "attention-op com.microsoft.MultiHeadAttention"
    assert (site.cache == Cache("operator", "pk", "pv", "ck", "cv")) == (len(inputs) > 6)
    check_facts(found, site, feeds(inputs))


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1, "scale": 0.4}])
def test_rewrites_of_multi_head_attention(attributes: dict[str, Any], opset: int) -> None:
    """Every mechanism that says that it can replace the operator gives what the operator gave."""
    inputs = [(x, floats(2, 261, H * D)) for x in "qkv"]
    proto = contrib("MultiHeadAttention", inputs, num_heads=H, **attributes)
    proto.opset_import[0].version = opset
    found, site = only_site(proto)
    expected = run(proto, feeds(inputs), ["y"])["y"]
    done = set()
    for mechanism, parameters in tool().ways(site, mechanisms()):
        if mechanism.name == "Attention" and opset < 23:
            continue
        changed = apply(found, [(site, mechanism.lower(site, parameters, found.opset))])
        assert not [n for n in changed.graph.node if n.op_type == "MultiHeadAttention"]
        np.testing.assert_allclose(run(changed, feeds(inputs), ["y"])["y"], expected, rtol=2e-5, atol=2e-5)
        done.add(mechanism.name)
    assert done >= {"DenseAttention"} | ({"Attention"} if opset == 23 else set())


@pytest.mark.parametrize(
    ("inputs", "attributes", "words"),
    [
        (cross(), {"unidirectional": 1}, "unidirectional"),
        ([*own(), NONE, NONE, NONE, *past(9), ("n", ints(4))], {}, "share one buffer"),
    ],
)
def test_multi_head_attention_that_is_kept(inputs: Inputs, attributes: dict[str, Any], words: str) -> None:
    code, reason = only_miss(contrib("MultiHeadAttention", inputs, num_heads=H, **attributes))
    assert code == "fused-op"
    assert reason.startswith("kept: ")
    assert words in reason


def test_multi_head_attention_whose_scores_are_read_is_kept() -> None:
    assert only_miss(contrib("MultiHeadAttention", own(), ("y", "", "", "qk"), num_heads=H))[0] == "scores-used"


def grouped(batch: int, length: int, before: int | None, ends: list[int], extra: Inputs = ()) -> list[Any]:
    cache = [NONE, NONE] if before is None else [(x, floats(batch, 2, before, 8)) for x in ("pk", "pv")]
    return [("q", floats(batch, length, 32)), ("k", floats(batch, length, 16)), ("v", floats(batch, length, 16)),
            *cache, ("ends", ints(*(e - 1 for e in ends))), ("total", np.array(max(ends), np.int32)),
            *extra]  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (grouped(2, 5, None, [5, 5]), {}),
        (grouped(2, 5, None, [3, 5]), {}),
        (grouped(2, 5, 0, [5, 4]), {}),
        (grouped(2, 1, 6, [7, 7]), {}),
        (grouped(2, 1, 6, [4, 7]), {}),
        (grouped(1, 3, 6, [9]), {}),
        (grouped(2, 1, 10, [7, 5]), {}),
        (grouped(2, 5, 10, [5, 3]), {}),
        (grouped(2, 5, None, [5, 4]), {"causal": 0}),
        (grouped(2, 5, None, [5, 5]), {"local_window_size": 3}),
        (grouped(2, 1, 6, [7, 5]), {"local_window_size": 3}),
        (grouped(2, 5, None, [5, 5]), {"softcap": 2.0, "scale": 0.7}),
        (grouped(2, 5, None, [5, 4], [NONE, NONE, NONE, ("b", floats(2, 4, 5, 5))]), {}),
        (grouped(2, 5, None, [5, 4], [NONE, NONE, NONE, NONE, ("sinks", floats(4))]), {}),
        (grouped(2, 1, 6, [7, 3], [NONE, NONE, NONE, NONE, ("sinks", floats(4))]), {"local_window_size": 2}),
    ],
)
def test_group_query_attention(inputs: Inputs, attributes: dict[str, Any]) -> None:
    """Prompts and decode steps, ragged batches, caches that their present shares with their past."""
    proto = contrib("GroupQueryAttention", inputs, ("y", "ck", "cv"), num_heads=4, kv_num_heads=2, **attributes)
    found, site = only_site(proto)
    assert (site.heads, site.kv_heads, site.head_dim) == (4, 2, 8)
    assert site.mask.ends == KeyEnds("ends", 1, "ends-or-start")
    assert {"cache", "key-ends"} <= site.needs
    check_facts(found, site, feeds(inputs))


ROTARY = [("cos", floats(16, 4)), ("sin", floats(16, 4))]


@pytest.mark.parametrize(
    ("inputs", "attributes", "words"),
    [
        (grouped(2, 5, None, [5, 5], ROTARY), {"do_rotary": 1}, "rotates"),
        (grouped(2, 5, None, [5, 5]), {"smooth_softmax": 1}, "sink of zero"),
        (grouped(2, 1, 6, [7, 7]), {"sliding_window_cache": 1, "local_window_size": 6}, "last window only"),
        (
            [("q", floats(2, 5, 64)), NONE, NONE, NONE, NONE, ("e", ints(4, 4)), ("t", ints(5)), *ROTARY],
            {"do_rotary": 1},
            "rotates",
        ),
        (grouped(2, 5, None, [5, 5], [NONE] * 7 + [("nq", floats(8)), ("nk", floats(8))]), {}, "normalises"),
        (grouped(2, 5, None, [5, 5], [NONE] * 9 + [("ql", ints(4, 5))]), {}, "padding"),
    ],
)
def test_group_query_attention_that_is_kept(inputs: Inputs, attributes: dict[str, Any], words: str) -> None:
    proto = contrib("GroupQueryAttention", inputs, ("y", "ck", "cv"), num_heads=4, kv_num_heads=2, **attributes)
    code, reason = only_miss(proto)
    assert code == "fused-op"
    assert reason.startswith("kept: ")
    assert words in reason


@pytest.mark.parametrize("name", sorted(KEPT))
def test_every_other_operator_says_why_it_is_kept(name: str) -> None:
    code, reason = only_miss(contrib(name, [("x", floats(1, 4, 8)), ("w", floats(8, 24)), ("b", floats(24))]))
    assert "kept" in reason
    assert name in reason
    assert code == ("quantised" if KEPT[name].startswith("quantised") else "fused-op")


def test_dynamic_lengths_have_names() -> None:
    axes: dict[str, Any] = {x: ["b", "n", 12] for x in "qkv"}
    axes |= {x: ["b", H, "past", D] for x in ("pk", "pv")}
    inputs = [*own(), NONE, NONE, NONE, *past(3)]
    proto = contrib("MultiHeadAttention", inputs, ("y", "ck", "cv"), num_heads=H, shapes=axes, unidirectional=1)
    _, site = only_site(proto, {n: Range(1, 4, 9) for n in ("b", "n", "past")})
    assert (site.batch, site.query_length, site.key_length) == ("b", "n", "n + past")
    assert site.mask.parts[0].certificate.general


def test_shapes_behind_a_fused_operator_are_known() -> None:
    """A second attention behind the first, with the normalisation that the optimiser fuses between them."""
    nodes = [
        h.make_node("MultiHeadAttention", ["x", "x", "x"], ["a"], domain=DOMAIN, num_heads=2),
        h.make_node("SkipLayerNormalization", ["a", "x", "g"], ["n", "", "", "r"], domain=DOMAIN),
        h.make_node("FastGelu", ["n"], ["f"], domain=DOMAIN),
        h.make_node("FusedMatMul", ["f", "w"], ["p"], domain=DOMAIN, transB=1),
        h.make_node("MultiHeadAttention", ["p", "r", "r"], ["y"], domain=DOMAIN, num_heads=2),
    ]
    values = {"x": floats(2, 5, 8), "g": floats(8), "w": floats(8, 8)}
    infos = [h.make_tensor_value_info(n, 1, a.shape) for n, a in values.items()]
    graph = h.make_graph(nodes, "g", infos, [h.make_tensor_value_info("y", 1, [2, 5, 8])])
    found, detection = find(model(graph, 18, DOMAIN))
    assert not detection.near_misses
    assert [(s.heads, s.head_dim) for s in detection.sites] == [(2, 4), (2, 4)]
    for site in detection.sites:
        check_facts(found, site, values, 1e-4)
