"""Operators that hold projections, biases, packed operands or masks of integers, written out: what they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto
from onnx import helper as h

from attncompile.core.profile import Range
from attncompile.core.site import Cache
from attncompile.passes.replace import apply
from attncompile.plugins import mechanisms
from tests.passes.operator_graphs import Inputs, check_facts, find, model, only_miss, only_site, run
from tests.passes.test_detect_operators_contrib import (
    DOMAIN,
    NONE,
    B,
    D,
    H,
    L,
    S,
    contrib,
    cross,
    feeds,
    floats,
    grouped,
    ints,
    mask,
    own,
    past,
)
from tests.test_backend_nodes import tool


@pytest.fixture(autouse=True)
def own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's numbers do not depend on which tests ran before: some are too large for the tolerance."""
    monkeypatch.setattr("tests.passes.test_detect_operators_contrib.RNG", np.random.default_rng(11))


WIDTH = 10
"""Of what ``Attention`` projects: not that of the heads together."""


def projected(*, values: int = H * D, bias: bool = True) -> list[Any]:
    width = 2 * H * D + values
    return [("x", floats(B, S, WIDTH)), ("w", floats(WIDTH, width)), ("b", floats(width)) if bias else NONE]


def left_padded(batch: int, keys: int) -> np.ndarray:
    return (np.arange(keys)[None] >= np.arange(1, batch + 1)[:, None]).astype(np.int32)


def same_run(proto: ModelProto, written: ModelProto, given: Mapping[str, np.ndarray]) -> None:
    """All outputs of the model, before and after: a product in one call or another may round its sums in another
    order, and nothing else."""
    names = [o.name for o in proto.graph.output]
    assert [o.name for o in written.graph.output] == names
    before, after = run(proto, given, names), run(written, given, names)
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=2e-6, atol=2e-6)


ATTENTION: list[tuple[list[Any], dict[str, Any], str]] = [
    (projected(), {}, "none"),
    (projected(bias=False), {}, "none"),
    (projected(), {"scale": 0.3}, "none"),
    (projected(), {"unidirectional": 1}, "causal"),
    (projected(values=H * 6), {"qkv_hidden_sizes": [H * D, H * D, H * 6]}, "none"),
    ([*projected(), ("m", mask(B, S))], {}, "padding"),
    ([*projected(), ("m", left_padded(B, S))], {}, "padding"),
    ([*projected(), ("m", mask(B, S) * 7 - 3)], {}, "padding"),  # what is below 0 hides too
    ([*projected(), ("m", mask(B, S))], {"mask_filter_value": -60.0}, "padding"),
    ([*projected(), ("m", mask(B, S))], {"unidirectional": 1}, "causal"),
    ([*projected(), ("m", ints(2, 5))], {}, "padding"),
    ([*projected(), ("m", ints(4, 1))], {"unidirectional": 1}, "causal"),
    ([*projected(), ("m", mask(B, S, S))], {}, "opaque"),
    ([*projected(), NONE, NONE, ("a", floats(B, H, S, S))], {}, "opaque"),
    ([*projected(), NONE, NONE, ("a", floats(1, 1, S, S))], {"unidirectional": 1}, "causal"),
    ([*projected(), ("m", mask(B, S)), NONE, ("a", floats(1, H, S, S))], {}, "padding"),
    ([*projected(), NONE, ("p", floats(2, B, H, 3, D))], {}, "none"),
    ([*projected(), NONE, ("p", floats(2, B, H, 3, D))], {"unidirectional": 1}, "causal"),
    ([*projected(), ("m", mask(B, S + 3)), ("p", floats(2, B, H, 3, D))], {}, "padding"),
    ([*projected(), ("m", ints(6, 8)), ("p", floats(2, B, H, 3, D))], {"unidirectional": 1}, "causal"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "attributes", "kind"), ATTENTION)
def test_attention(inputs: Inputs, attributes: dict[str, Any], kind: str) -> None:
    outputs = ("y", "present") if any(n == "p" for n, _ in inputs) else ("y",)
    proto = contrib("Attention", inputs, outputs, num_heads=H, **attributes)
    found, site = only_site(proto)
    assert (site.heads, site.kv_heads, site.head_dim, site.query_length) == (H, H, D, S)
    assert kind in {site.mask.kind, *(p.kind for p in site.mask.parts)}
    assert (site.cache is not None) == (len(outputs) == 2)
    assert "it" in site.nodes
    assert not [n for n in found.proto.graph.node if n.op_type == "Attention"]
    same_run(proto, found.proto, feeds(inputs))
    check_facts(found, site, feeds(inputs))


def test_an_attention_without_past_may_give_its_present() -> None:
    proto = contrib("Attention", projected(), ("y", "present"), num_heads=H)
    found, site = only_site(proto)
    same_run(proto, found.proto, feeds(projected()))
    assert site.cache is not None and not site.cache.past_key


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        ([*own(), ("b", floats(3 * H * D))], {}),
        ([*own(), ("b", floats(3 * H * D))], {"unidirectional": 1, "scale": 0.4}),
        ([*cross(), ("b", floats(2 * H * D + H * 6))], {}),
        ([*cross(), ("b", floats(2 * H * D + H * 6)), ("m", mask(B, L)), ("a", floats(1, 1, S, L))], {}),
        ([*own(), ("b", floats(3 * H * D)), ("m", mask(B, S + 3)), NONE, *past(3)], {}),
        ([*own(), NONE, ("m", ints(6, 8)), NONE, *past(3)], {}),
        ([*cross(), NONE, ("m", ints(4, 7))], {}),
        ([*cross(), NONE, ("m", mask(B, L))], {"mask_filter_value": -50.0}),
        ([cross()[0], ("k", floats(B, H, L, D)), ("v", floats(B, H, L, D)), NONE, ("m", ints(4, 7))], {}),
    ],
)
def test_multi_head_attention(inputs: Inputs, attributes: dict[str, Any]) -> None:
    outputs = ("y", "ck", "cv") if len(inputs) > 6 else ("y",)
    proto = contrib("MultiHeadAttention", inputs, outputs, num_heads=H, **attributes)
    found, site = only_site(proto)
    (core,) = (n for n in found.proto.graph.node if n.op_type == "MultiHeadAttention")
    assert not [name for name in core.input[3:5] if name]
    assert (site.cache == Cache("operator", "pk", "pv", "ck", "cv")) == (len(outputs) == 3)
    same_run(proto, found.proto, feeds(inputs))
    check_facts(found, site, feeds(inputs))


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """softmax(scale * q k^T) v of [batch, sequence, heads, dim], one head at a time, in float64."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            scores = scale * q[b, :, i].astype(np.float64) @ k[b, :, i].astype(np.float64).T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, i] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, i]
    return out.reshape(*q.shape[:2], -1)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_queries_keys_and_values(bias: bool) -> None:
    """ONNX Runtime has no CPU kernel that reads them packed: against the operator's definition."""
    packed, added = floats(B, S, H, 3, D), floats(3 * H * D)
    inputs: list[Any] = [("q", packed), NONE, NONE, *([("b", added)] if bias else [])]
    found, site = only_site(contrib("MultiHeadAttention", inputs, num_heads=H))
    q, k, v = (packed[..., i, :] + bias * added.reshape(3, H, D)[i] for i in range(3))
    got = run(found.proto, feeds(inputs), ["y"])["y"]
    np.testing.assert_allclose(got, attended(q, k, v, D**-0.5), rtol=2e-5, atol=2e-5)
    check_facts(found, site, feeds(inputs))


@pytest.mark.parametrize("bias", [False, True])
def test_packed_keys_and_values(bias: bool) -> None:
    query, packed, added = floats(B, S, H * D), floats(B, L, H, 2, D), floats(3 * H * D)
    inputs: list[Any] = [("q", query), ("k", packed), NONE, *([("b", added)] if bias else [])]
    found, site = only_site(contrib("MultiHeadAttention", inputs, num_heads=H))
    parts = bias * added.reshape(3, H, D)
    q = query.reshape(B, S, H, D) + parts[0]
    got = run(found.proto, feeds(inputs), ["y"])["y"]
    expected = attended(q, packed[..., 0, :] + parts[1], packed[..., 1, :] + parts[2], D**-0.5)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert (site.query_length, site.key_length) == (S, L)
    check_facts(found, site, feeds(inputs))


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (grouped(2, 5, None, [5, 5]), {}),
        (grouped(2, 5, None, [3, 5]), {"local_window_size": 3, "softcap": 2.0}),
        (grouped(2, 1, 6, [4, 7]), {"scale": 0.7}),
    ],
)
def test_packed_group_query_attention(inputs: Inputs, attributes: dict[str, Any]) -> None:
    packed = [("q", np.concatenate([a for _, a in inputs[:3] if a is not None], axis=2)), NONE, NONE, *inputs[3:]]
    outputs = ("y", "ck", "cv")
    proto = contrib("GroupQueryAttention", packed, outputs, num_heads=4, kv_num_heads=2, **attributes)
    found, site = only_site(proto)
    assert (site.heads, site.kv_heads, site.head_dim) == (4, 2, 8)
    same_run(proto, found.proto, feeds(packed))
    check_facts(found, site, feeds(packed))


@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}])
def test_what_is_left_is_replaced(attributes: dict[str, Any]) -> None:
    """Every mechanism that says that it can replace the site gives what the fused operator gave."""
    inputs = [("x", floats(2, 261, WIDTH)), ("w", floats(WIDTH, 3 * H * D)), ("b", floats(3 * H * D))]
    proto = contrib("Attention", inputs, num_heads=H, **attributes)
    found, site = only_site(proto)
    expected = run(proto, feeds(inputs), ["y"])["y"]
    done = set()
    for mechanism, parameters in tool().ways(site, mechanisms()):
        if mechanism.name != "Attention":  # the standard operator comes with opset 23
            changed = apply(found, [(site, mechanism.lower(site, parameters, found.opset))])
            assert not [n for n in changed.graph.node if n.domain == DOMAIN]
            np.testing.assert_allclose(run(changed, feeds(inputs), ["y"])["y"], expected, rtol=5e-5, atol=5e-5)
            done.add(mechanism.name)
    assert "DenseAttention" in done


def test_dynamic_lengths() -> None:
    """The mask is made for as many queries and keys as a call brings."""
    inputs = [*projected(), ("m", ints(6, 8)), ("p", floats(2, B, H, 3, D))]
    axes: dict[str, Any] = {"x": ["b", "n", WIDTH], "m": ["b"], "p": [2, "b", H, "past", D]}
    proto = contrib("Attention", inputs, ("y", "present"), num_heads=H, shapes=axes)
    found, site = only_site(proto, {n: Range(1, 4, 9) for n in ("b", "n", "past")})
    assert (site.batch, site.query_length, site.key_length) == ("b", "n", "n + past")
    assert site.mask.kind == "padding"
    for batch, new, before in ((2, 5, 3), (1, 1, 9), (3, 7, 1)):
        given = feeds(inputs) | {
            "x": floats(batch, new, WIDTH), "p": floats(2, batch, H, before, D),
            "m": ints(*range(before, before + batch)),
        }  # fmt: skip
        same_run(proto, found.proto, given)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "words"),
    [
        ("Attention", projected(), {"do_rotary": 1}, "rotates"),
        ("Attention", [*projected(), NONE, ("p", floats(2, B, H, 9, D))], {"past_present_share_buffer": 1}, "buffer"),
        ("Attention", [*projected(), ("m", ints(5, 5, 0, 1))], {}, "mask_index"),
        ("Attention", [*projected(), ("m", mask(B, S + 1))], {}, "mask_index"),
        ("Attention", [*projected(), ("m", mask(B, 1, S, S))], {}, "mask_index"),
        ("Attention", projected(), {"qkv_hidden_sizes": [H * D, H * D, H * 6]}, "projections"),
        ("MultiHeadAttention", [("q", floats(B, S, H, 2, D))], {}, "dim"),
        ("MultiHeadAttention", [own()[0], ("k", floats(B, L, H, 3, D))], {}, "dim"),
        ("MultiHeadAttention", [own()[0], ("k", floats(B, H, L, D)), ("v", floats(B, H, L, D)), ("b", floats(36))],
         {}, "bias"),
        ("MultiHeadAttention", [*cross(), NONE, ("m", ints(4, 7, 3))], {}, "key_padding_mask"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_out_says_why(op: str, inputs: Inputs, attributes: dict[str, Any], words: str) -> None:
    _, reason = only_miss(contrib(op, inputs, num_heads=H, **attributes))
    assert reason.startswith("kept: ")
    assert words in reason


def test_scores_that_are_read_are_kept() -> None:
    inputs = [*own(), ("b", floats(3 * H * D))]
    assert only_miss(contrib("MultiHeadAttention", inputs, ("y", "", "", "qk"), num_heads=H))[0] == "scores-used"


def test_detection_leaves_the_model_alone() -> None:
    proto = contrib("Attention", projected(), num_heads=H)
    before = proto.SerializeToString(deterministic=True)
    find(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_names_do_not_clash() -> None:
    """A node without a name, and a value with a name that writing out wishes for."""
    nodes = [
        h.make_node("Identity", ["x"], ["it/projected"]),
        h.make_node("Attention", ["it/projected", "w", "b"], ["a"], domain=DOMAIN, name="it", num_heads=2),
        h.make_node("Attention", ["a", "w", "b"], ["y"], domain=DOMAIN, num_heads=2),
    ]
    values = {"x": floats(2, 5, 8), "w": floats(8, 24), "b": floats(24)}
    infos = [h.make_tensor_value_info(n, 1, a.shape) for n, a in values.items()]
    proto = model(h.make_graph(nodes, "g", infos, [h.make_tensor_value_info("y", 1, [2, 5, 8])]), 18, DOMAIN)
    found, detection = find(proto)
    assert [(s.heads, s.head_dim) for s in detection.sites] == [(2, 4), (2, 4)]
    same_run(proto, found.proto, values)


def test_half_precision_keeps_its_types() -> None:
    """ONNX Runtime has no CPU kernel for it: the written-out graph is checked for its types."""
    inputs = [(n, a.astype(np.float16) if a is not None and a.dtype == np.float32 else a)
              for n, a in [*projected(), ("m", mask(B, S))]]  # fmt: skip
    found, site = only_site(contrib("Attention", inputs, num_heads=H, unidirectional=1))
    assert (site.dtype, site.softmax_dtype) == ("float16", "float32")
    assert {p.kind for p in site.mask.parts} == {"causal", "padding"}
    added = [n for n in found.proto.graph.node if n.op_type == "Where"]
    stored = {t.name: t.data_type for t in found.proto.graph.initializer}
    assert [stored[v] for n in added for v in n.input[1:]] == [10, 10]
