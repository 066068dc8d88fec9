"""The standard Attention operator: every input, output and attribute is in the facts, or refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from attncompile.core.mask import KeyEnds
from attncompile.core.mechanism import Candidate, exact_candidates
from attncompile.core.profile import Range
from attncompile.core.site import Cache
from attncompile.core.verdict import Verdict
from attncompile.passes.replace import apply
from attncompile.plugins import mechanisms
from tests.passes.operator_graphs import Inputs, check_facts, find, model, one_node, only_miss, only_site, run

RNG = np.random.default_rng(7)
NONE: tuple[str, None] = ("", None)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def operands(queries: int = 5, keys: int = 5, heads: int = 4, shared: int = 2, batch: int = 2) -> list[Any]:
    """q [B, H, Nq, 6], k [B, G, Nk, 6], v [B, G, Nk, 7]."""
    return [("q", floats(batch, heads, queries, 6)), ("k", floats(batch, shared, keys, 6)),
            ("v", floats(batch, shared, keys, 7))]  # fmt: skip


def attention(inputs: Inputs, outputs: Sequence[str] = ("y",), opset: int = 24, **more: Any) -> ModelProto:
    return one_node("Attention", inputs, outputs, opset=opset, **more)


def feeds(inputs: Inputs) -> dict[str, np.ndarray]:
    return {n: a for n, a in inputs if a is not None}


def past(length: int, shared: int = 2, batch: int = 2) -> list[Any]:
    return [NONE, ("pk", floats(batch, shared, length, 6)), ("pv", floats(batch, shared, length, 7))]


BOOLS = RNG.random((2, 4, 5, 9)) < 0.6
BOOLS[..., 0] = True


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (operands(), {}),
        (operands(5, 9), {"scale": 0.3}),
        (operands(), {"softcap": 1.5}),
        (operands(), {"is_causal": 1}),
        (operands(5, 9), {"is_causal": 1}),
        (operands(9, 5), {"is_causal": 1}),
        ([*operands(5, 9), ("m", BOOLS)], {}),
        ([*operands(5, 9), ("m", BOOLS[:1, :1])], {"is_causal": 1}),
        ([*operands(5, 9), ("m", floats(5, 9))], {"softcap": 2.0, "is_causal": 1}),
        ([*operands(5, 9), ("m", np.where(BOOLS, 0, -np.inf).astype(np.float32))], {}),
        ([*operands(), *past(4)], {"is_causal": 1}),
        ([*operands(3, 6), *past(4)], {"is_causal": 1}),
        ([*operands(6, 3), *past(4)], {"is_causal": 1}),
        ([*operands(1, 1), *past(7)], {}),
    ],
)  # fmt: skip
def test_facts_are_what_the_operator_does(inputs: Inputs, attributes: dict[str, Any], opset: int) -> None:
    outputs = ("y", "ck", "cv") if len(inputs) > 4 else ("y",)
    found, site = only_site(attention(inputs, outputs, opset=opset, **attributes))
    check_facts(found, site, feeds(inputs))


@pytest.mark.parametrize(("left", "right"), [(2, -1), (-1, 1), (1, 2), (0, 0), (3, 0)])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("sizes", [(7, 7, 0), (4, 9, 0), (9, 4, 0), (4, 4, 5), (3, 5, 5)])
def test_windows_of_opset_25(left: int, right: int, causal: int, sizes: tuple[int, int, int]) -> None:
    inputs = [*operands(*sizes[:2]), *(past(sizes[2]) if sizes[2] else [])]
    outputs = ("y", "ck", "cv") if sizes[2] else ("y",)
    options = {"left_window_size": left, "right_window_size": right, "is_causal": causal}
    found, site = only_site(attention(inputs, outputs, opset=25, **options))
    assert site.mask.kind in ("window", "causal", "block_sparse")
    check_facts(found, site, feeds(inputs))


def test_a_window_of_as_many_queries_as_keys_is_that_window() -> None:
    _, site = only_site(attention(operands(9, 9), opset=25, left_window_size=2, right_window_size=1))
    (part,) = site.mask.parts
    assert (part.kind, part.left, part.right, part.certificate.general) == ("window", 2, 1, True)


@pytest.mark.parametrize("lengths", [[5, 5], [3, 5], [1, 4]])
@pytest.mark.parametrize("attributes", [{}, {"is_causal": 1}, {"is_causal": 1, "left_window_size": 1}])
@pytest.mark.parametrize("queries", [1, 3, 5])
def test_key_lengths_of_each_batch_entry(lengths: list[int], attributes: dict[str, int], queries: int) -> None:
    inputs = [*operands(queries, 5), NONE, NONE, NONE, ("n", np.array(lengths))]
    found, site = only_site(attention(inputs, opset=25, **attributes))
    assert site.mask.ends == KeyEnds("n", 0, "ends" if attributes else "sequence")
    assert "key-ends" in site.needs
    check_facts(found, site, feeds(inputs))
    for mechanism in mechanisms():
        (answer,) = exact_candidates(mechanism, site)
        if mechanism.name != "DenseAttention":
            assert isinstance(answer, Verdict) and (answer.ok, answer.code) == (False, "needs")
        elif attributes:  # aligned at each entry's last key
            assert isinstance(answer, Verdict) and (answer.ok, answer.code) == (False, "key-ends")
        else:
            assert isinstance(answer, Candidate)
            replaced = apply(found, [(site, mechanism.lower(site, answer.parameters, 24))])
            want, got = (run(proto, feeds(inputs), ["y"])["y"] for proto in (found.proto, replaced))
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_cache_inside_the_node_is_in_the_site() -> None:
    inputs = [*operands(1, 1), *past(6)]
    _, site = only_site(attention(inputs, ("y", "ck", "cv")))
    assert site.cache == Cache("operator", "pk", "pv", "ck", "cv")
    assert (site.key_length, site.query_length) == (7, 1)
    assert "cache" in site.needs
    assert not {"ck", "cv"} & set(site.interior)


def test_a_present_that_nobody_reads_is_no_cache() -> None:
    proto = attention(operands(), ("y", "ck", "cv"))
    del proto.graph.output[1:]
    _, site = only_site(proto)
    assert site.cache is None
    assert {"ck", "cv"} <= set(site.interior)


def test_softmax_precision_is_the_type_of_the_softmax() -> None:
    half = [(n, a.astype(np.float16)) for n, a in operands()]
    _, site = only_site(attention(half, softmax_precision=1))
    assert (site.dtype, site.softmax_dtype) == ("float16", "float32")
    _, site = only_site(attention(half))
    assert (site.dtype, site.softmax_dtype) == ("float16", "float16")


def test_operands_of_rank_3() -> None:
    inputs = [("q", floats(2, 5, 24)), ("k", floats(2, 5, 12)), ("v", floats(2, 5, 14))]
    found, site = only_site(attention(inputs, q_num_heads=4, kv_num_heads=2, is_causal=1))
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (4, 2, 6, 7)
    assert {o.layout for o in (site.query, site.key, site.value, site.output)} == {"BNHD"}
    check_facts(found, site, feeds(inputs))


DYNAMIC = {"n": Range(1, 8, 32), "m": Range(1, 8, 40)}


def dynamic(axes: dict[str, Sequence[int | str]], inputs: Inputs, **options: Any) -> ModelProto:
    return attention(inputs, options.pop("outputs", ("y",)), shapes=axes, **options)


def test_causal_holds_for_all_lengths_where_queries_and_keys_are_one_length() -> None:
    axes = {x: [2, h, "n", d] for x, h, d in (("q", 4, 6), ("k", 2, 6), ("v", 2, 7))}
    _, site = only_site(dynamic(axes, operands(), is_causal=1), {"n": DYNAMIC["n"]})
    (part,) = site.mask.parts
    assert (part.kind, part.certificate.general, site.key_length) == ("causal", True, "n")


def test_causal_is_refused_where_the_two_lengths_are_equal_by_chance() -> None:
    """Both are 8 at the usual size: one symbol more than the test above."""
    axes = {x: [2, h, s, d] for x, h, s, d in (("q", 4, "n", 6), ("k", 2, "m", 6), ("v", 2, "m", 7))}
    code, reason = only_miss(dynamic(axes, operands(), is_causal=1), DYNAMIC)
    assert code == "causal-offset"
    assert "8 queries over 8 new keys" in reason
    _, site = only_site(dynamic(axes, operands()), DYNAMIC)
    assert (site.query_length, site.key_length, site.mask.kind) == ("n", "m", "none")


def test_causal_with_a_cache_of_any_length() -> None:
    axes = {x: [2, h, s, d] for x, h, s, d in (("q", 4, "n", 6), ("k", 2, "n", 6), ("v", 2, "n", 7),
                                               ("pk", 2, "m", 6), ("pv", 2, "m", 7))}  # fmt: skip
    proto = dynamic(axes, [*operands(), *past(4)], is_causal=1, outputs=("y", "ck", "cv"))
    _, site = only_site(proto, DYNAMIC)
    assert (site.query_length, site.key_length) == ("n", "n + m")
    (part,) = site.mask.parts
    assert (part.kind, part.certificate.general) == ("causal", True)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_that_are_given_out_are_refused_and_unread_ones_are_not(mode: int) -> None:
    proto = attention(operands(), ("y", "", "", "scores"), qk_matmul_output_mode=mode)
    assert only_miss(proto)[0] == "scores-used"
    del proto.graph.output[1:]
    _, site = only_site(proto)
    assert "scores" in site.interior
    proto.graph.node.append(helper.make_node("Neg", ["scores"], ["z"]))
    proto.graph.output.append(helper.make_empty_tensor_value_info("z"))
    assert only_miss(proto)[0] == "scores-used"


def wide(name: str, *shape: int) -> tuple[str, np.ndarray]:
    return name, floats(*shape)


@pytest.mark.parametrize(
    ("inputs", "attributes", "code"),
    [
        ([*operands(5, 9), ("m", np.ones((5, 7), bool))], {}, "short-mask"),
        ([*operands(5, 9), ("m", np.ones((5, 1), bool))], {}, "short-mask"),
        (operands(), {"scale": 0.0}, "zero-scale"),
        (operands(), {"scale": float("inf")}, "zero-scale"),
        (operands(), {"softcap": -1.0}, "softcap"),
        (operands(heads=3, shared=2), {}, "layout"),
        ([wide("q", 2, 5, 24), wide("k", 2, 5, 24), wide("v", 2, 5, 24)], {}, "layout"),
        ([wide("q", 2, 5, 24), wide("k", 2, 5, 24), wide("v", 2, 5, 24)],
         {"q_num_heads": 5, "kv_num_heads": 5}, "layout"),
        ([*operands(), NONE, ("pk", floats(2, 2, 4, 6)), NONE], {}, "kv-cache"),
        ([*operands(), NONE, ("pk", floats(2, 2, 4, 6)), ("pv", floats(2, 2, 3, 7))], {}, "layout"),
        ([*operands(), *past(4), ("n", np.array([5, 5]))], {}, "kv-cache"),
        ([*operands(), NONE, NONE, NONE, ("n", np.array([5]))], {}, "mask-shape"),
    ],
)  # fmt: skip
def test_what_is_refused(inputs: Inputs, attributes: dict[str, Any], code: str) -> None:
    _, detection = find(attention(inputs, **attributes))
    assert [m.code for m in detection.near_misses] == [code]
    assert not detection.sites


@pytest.mark.parametrize("fill", [-np.inf, -1e9])
def test_rows_that_a_stored_mask_hides_whole(fill: float) -> None:
    """-inf gives zero, a finite number the mean of all values (ONNX Runtime 1.32 takes the lowest float for -inf)."""
    stored = np.where(np.arange(5)[:, None] == 2, fill, np.zeros((5, 5))).astype(np.float32)
    inputs = [*operands(), ("m", stored)]
    proto = attention(inputs)
    proto.graph.initializer.append(helper.make_tensor("m", 1, stored.shape, stored.tobytes(), raw=True))
    del proto.graph.input[3]
    found, site = only_site(proto)
    assert site.mask.masked_rows == ("zero" if np.isinf(fill) else "uniform")
    check_facts(found, site, feeds(inputs[:3]))


def test_a_stored_window_beside_ends_is_refused() -> None:
    """The mask is aligned at the last key, the operator's window at each batch entry's own."""
    stored = np.tril(np.ones((5, 5), bool))
    inputs = [*operands(), ("m", stored), NONE, NONE, ("n", np.array([5, 4]))]
    proto = attention(inputs, is_causal=1)
    graph = proto.graph
    graph.initializer.append(helper.make_tensor("m", 9, stored.shape, stored.tobytes(), raw=True))
    del graph.input[3]
    assert only_miss(proto)[0] == "mask-alignment"
    graph.node[0].attribute[0].i = 0
    found, site = only_site(proto)
    assert site.mask.ends == KeyEnds("n", 0, "sequence")
    assert site.mask.kind == "causal"
    check_facts(found, site, feeds([*inputs[:3], inputs[-1]]))


def test_flex_attention_is_its_body() -> None:
    """Modifiers that read values around the node, and two nodes beside one another."""
    scores = [helper.make_tensor_value_info(n, 1, ["B", "H", "L", "S"]) for n in ("s", "t")]
    body = helper.make_graph([helper.make_node("Add", ["s", "bias"], ["t"])], "m", scores[:1], scores[1:])
    nodes = [helper.make_node("Neg", ["b"], ["bias"])]
    for x, y in (("q", "o"), ("o", "z")):
        nodes.append(helper.make_node("FlexAttention", [x, "k", "v"], [y], domain="ai.onnx.preview", score_mod=body))
    values = {"q": floats(1, 2, 5, 4), "k": floats(1, 2, 5, 4), "v": floats(1, 2, 5, 4), "b": floats(1, 2, 5, 5)}
    infos = [helper.make_tensor_value_info(n, 1, a.shape) for n, a in values.items()]
    graph = helper.make_graph(nodes, "g", infos, [helper.make_tensor_value_info("z", 1, [1, 2, 5, 4])])
    found, detection = find(model(graph, 26, "ai.onnx.preview"))
    assert found.notes == ("FlexAttention operators were written out as their bodies",)
    assert [p.source for s in detection.sites for p in s.mask.parts] == ["bias", "bias"]
    for site in detection.sites:
        check_facts(found, site, values)
