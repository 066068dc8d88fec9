"""The reference that a site's facts give, where its graph is too large in float64 and cannot be cut to query rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.pattern import GridWindow
from attncompile.core.site import AttentionSite, Operand
from attncompile.verification.facts_reference import FactsReference, ordinary, site_rows
from attncompile.verify import SiteCheck, cases, check_site
from tests.passes import windowed_graphs as graphs

SIDE, KERNEL, SCALE = 18, 5, 0.4
TOKENS = SIDE * SIDE
HOW = Certificate("structure", "built here")
GRID = GridWindow(TokenGrid((SIDE, SIDE)), (KERNEL, KERNEL), (1, 1), (1, 1), (False, False))
SITE = AttentionSite(
    id="s", form="gathered matmul-softmax-matmul", query=Operand("q", "BHND"), key=Operand("k", "BHND"),
    value=Operand("v", "BHND"), output=Operand("y", "BNHD"), batch=1, heads=graphs.HEADS, kv_heads=graphs.HEADS,
    head_dim=graphs.DIM, value_dim=graphs.DIM, query_length=TOKENS, key_length=TOKENS, scale=SCALE,
    mask=MaskFacts((MaskPart("neighborhood", HOW, pattern=GRID),)), dtype="float32", softmax_dtype="float32", nodes=(),
    interior=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def windows() -> graphs.Windowed:
    return graphs.unfolded(SIDE, SIDE, KERNEL, border="clamp", batch=1)


def dense(visible: np.ndarray, scale: float = SCALE) -> onnx.ModelProto:
    """[B, N, H, D] out of masked attention over all tokens: a right replacement of the unfold export."""
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))[None, None]
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"]), helper.make_node("Mul", ["raw", "scale"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["p"], axis=-1), helper.make_node("MatMul", ["p", "v"], ["o"]),
        helper.make_node("Transpose", ["o"], ["y"], perm=[0, 2, 1, 3]),
    ]  # fmt: skip
    shape = [1, graphs.HEADS, TOKENS, graphs.DIM]
    graph = helper.make_graph(
        nodes, "dense", [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in "qkv"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(np.float32(scale), "scale")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def checked(original: onnx.ModelProto, replaced: onnx.ModelProto, site: AttentionSite, **given: Any) -> SiteCheck:
    shape = ((1, graphs.HEADS, TOKENS, graphs.DIM), TensorProto.FLOAT)
    made = cases(dict.fromkeys("qkv", shape), {}, {"query": "q", "key": "k", "value": "v"}, scale=SCALE)
    facts = FactsReference(site, original, made[0].feed)
    return check_site(original, replaced, made, query=site.query, facts=facts, memory_cap=1 << 16, **given)


def test_windows_are_judged_on_all_cases_by_the_facts(windows: graphs.Windowed) -> None:
    check = checked(windows.proto, dense(windows.visible), SITE)
    assert check.passed, check.verdict.reason
    assert len(check.checks) == 9 and all(c.verdict.ok for c in check.checks)
    assert all("the site's facts" in c.reference for c in check.checks)
    assert {c.rows for c in check.checks} <= set(range(graphs.HEADS * 256, graphs.HEADS * TOKENS + 1))
    assert any("cannot be cut" in x and "the site's facts written out in float64" in x for x in check.labels)


def test_one_wrong_key_anywhere_is_seen(windows: graphs.Windowed) -> None:
    """At a query that is not among the sampled ones too: ordinary cases compare all rows with the original."""
    for query in range(100, 120):
        visible = windows.visible.copy()
        visible[query, np.flatnonzero(visible[query])[0]] = False
        check = checked(windows.proto, dense(visible), SITE)
        assert check.verdict.code == "inexact" and "'random'" in check.verdict.reason, query


OTHERS = {
    "scale": replace(SITE, scale=0.4001),
    "one key more": replace(SITE, mask=MaskFacts((MaskPart(
        "neighborhood", HOW, pattern=replace(GRID, kernel_size=(KERNEL, KERNEL + 2))),))),
    "causal too": replace(SITE, mask=MaskFacts((*SITE.mask.parts, MaskPart("causal", HOW, -1, 0)))),
    "softcap": replace(SITE, softcap=30.0),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_facts_that_are_not_the_graphs_are_refused(what: str, windows: graphs.Windowed) -> None:
    """Even where the replacement equals the original."""
    check = checked(windows.proto, dense(windows.visible), OTHERS[what])
    assert check.verdict.code == "facts_differ"
    assert "case 'random': the facts do not describe the subgraph" in check.verdict.reason


def test_facts_that_differ_in_large_numbers_alone_are_refused(windows: graphs.Windowed) -> None:
    """A softcap of 4,000 leaves ordinary scores as they are, and those of 80 nearly."""
    check = checked(windows.proto, dense(windows.visible), replace(SITE, softcap=4e3))
    assert check.verdict.code == "facts_differ" and "case 'large logits'" in check.verdict.reason


def test_what_the_facts_do_not_say_is_compared_in_its_own_precision(windows: graphs.Windowed) -> None:
    check = checked(windows.proto, dense(windows.visible), replace(SITE, head_scale="per_head"))
    assert check.passed
    assert any("no float64 reference is made for head-scale" in x for x in check.labels)
    assert {c.case for c in check.checks if c.verdict.code == "not_judged"} == {
        c.case for c in check.checks if c.case not in ("random", "uniform", "fully masked")
    }


def one_by_one(site: AttentionSite, values: dict[str, np.ndarray], visible: np.ndarray, row: int) -> np.ndarray:
    """[H, Dv] of batch entry 0: one key at a time."""
    q, k, v = (values[x].astype(np.float64) for x in "qkv")
    out = np.zeros((q.shape[1], v.shape[-1]))
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        total = math.exp(float(values["sinks"][h])) if site.sinks else 0.0
        for j in np.flatnonzero(visible[row]):
            s = site.scale * float(q[0, h, row] @ k[0, g, j])
            s = site.softcap * math.tanh(s / site.softcap) if site.softcap else s
            w = math.exp(s + (float(values["bias"][0, h, row, j]) if "bias" in values else 0.0))
            total, out[h] = total + w, out[h] + w * v[0, g, j]
        out[h] /= total
    return out


def test_rows_are_softmax_attention() -> None:
    """Groups, a window aligned at the end, padding, bias, softcap, sinks; [B, N, H, D] output; odd sizes."""
    rng = np.random.default_rng(3)
    queries, keys = 7, 11
    values = {
        "q": rng.standard_normal((1, 6, queries, 5)), "k": rng.standard_normal((1, 3, keys, 5)),
        "v": rng.standard_normal((1, 3, keys, 4)), "pad": np.ones((1, 1, 1, keys), bool), "sinks": np.arange(6) / 3,
        "bias": rng.standard_normal((1, 6, queries, keys)),
    }  # fmt: skip
    values["pad"][..., 2] = values["pad"][..., 8] = False
    parts = (
        MaskPart("window", HOW, 4, 1), MaskPart("padding", HOW, source="pad"),
        MaskPart("bias", Certificate("evaluated", ""), source="bias", additive=True),
    )  # fmt: skip
    site = replace(SITE, mask=MaskFacts(parts), softcap=2.0, sinks="sinks", kv_heads=3, heads=6)
    distance = np.arange(keys)[None] - (np.arange(queries)[:, None] + keys - queries)
    visible = (distance >= -4) & (distance <= 1) & values["pad"][0, 0]
    rows = np.array([0, 3, 6])
    got = site_rows(site, values, rows)
    assert got.shape == (1, 3, 6, 4)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[0, i], one_by_one(site, values, visible, row), rtol=1e-12)


@pytest.mark.parametrize(("rule", "expected"), [("zero", 0.0), ("nan", np.nan), ("uniform", 2.0)])
def test_rows_that_see_nothing(rule: Any, expected: float) -> None:
    q, v = np.ones((1, 1, 3, 2)), np.full((1, 1, 3, 2), 2.0)
    pad = np.zeros((1, 1, 1, 3), bool)
    site = replace(SITE, heads=1, kv_heads=1, mask=MaskFacts((MaskPart("padding", HOW, source="pad"),), rule))
    np.testing.assert_array_equal(site_rows(site, {"q": q, "k": q, "v": v, "pad": pad}, np.array([1])), expected)


@pytest.mark.parametrize("part", [MaskPart("opaque", HOW, source="m"), MaskPart("bias", HOW, source="m", additive=True),
                                  MaskPart("radial", HOW)])  # fmt: skip
def test_masks_that_are_not_understood_are_refused(part: MaskPart) -> None:
    x = np.ones((1, 3, 4, 5))
    with pytest.raises(Unsupported):
        site_rows(replace(SITE, mask=MaskFacts((part,))), {"q": x, "k": x, "v": x, "m": np.zeros((1, 1, 4, 4))},
                  np.array([0]))  # fmt: skip


@pytest.mark.parametrize("scale, deviation", [(1.0, 1.0), (0.125, 1.0), (0.01, 0.08), (-1.0, 1.0)])
def test_a_witness_has_ordinary_scores(scale: float, deviation: float) -> None:
    """Whatever the exporter did with the scale before the site."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, 101, 64)).astype(np.float32) for _ in range(2))
    site = replace(SITE, scale=scale, head_dim=64)
    feed = ordinary({"q": q, "k": k}, site)
    scores = scale * np.einsum("bhnd,bhmd->bhnm", feed["q"], feed["k"])
    assert scores.std() == pytest.approx(deviation, rel=0.05)
    assert feed["k"] is k
