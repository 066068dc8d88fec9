"""Sites whose heads choose their blocks when the model runs, against the definition, and the sites that may not."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest

from attncompile.core.block_selection import Chooser
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Shape
from attncompile.kernels import calls
from attncompile.plugins import kernels, mechanism
from attncompile.plugins.block_select import function as select_body
from attncompile.plugins.block_select import reference as select
from attncompile.plugins.block_sparse import chosen
from attncompile.plugins.block_sparse.reference import reference
from attncompile.plugins.body import Body, in_graph
from attncompile.targets import precision
from tests.plugins.conftest import relative_error

SUBJECT = mechanism("BlockSparseAttention")
ONCE = Certificate("constant", "given by the test")


def expected(at: Any, texts: list[str], edge: int) -> np.ndarray:
    """Estimated, selected and attended to, all by the definition."""
    given, chooser = at.tensors(), Chooser.of(texts)
    q, k = given["q"], given["k"]
    if chooser.way == "pooled":
        scores, tiles = select.scores(*(select.pooled(x, edge) for x in (q, k)), 1, 1, at.causal, at.scale), 1
    elif chooser.way == "anchor":
        scores, tiles = select.scores(select.pooled(q, edge), k, 1, edge, at.causal, at.scale, "max", edge), 1
    else:
        scores, tiles = select.scores(q, k, chooser.stride, edge, at.causal, at.scale), edge // chooser.stride
    weights = scores if chooser.way == "anchor" else select.mass(scores, tiles)
    kept = select.kept(weights, np.array(chooser.amounts), chooser.rule, at.causal)
    assert not kept.all() or all(a >= 1 for a in chooser.amounts), "the test is to leave something out"
    token = np.arange(at.queries)
    seen = kept[:, :, token[:, None] // edge, token[None, :] // edge]
    if at.causal:
        seen = seen & (token[None, :] <= token[:, None])
    if not (size := chooser.rest):
        return reference(**given, visible=seen, masked_rows="zero", scale=at.scale)
    # Every mean of `size` keys counts so often where its block is left out, and on a causal site lies before the row's.
    whole = at.queries // edge * edge
    of = np.arange(0, whole, size) // edge
    left = ~kept[:, :, token // edge][..., of]
    if at.causal:
        left &= of[None, :] < token[:, None] // edge
    assert left.any()
    joined = {
        n: np.concatenate([given[n][:, :whole].reshape(len(q), -1, size, *given[n].shape[2:]).mean(2),
                           given[n]], axis=1)
        for n in "kv"
    }  # fmt: skip
    return reference(q, **joined, visible=np.concatenate([left * size, seen], axis=-1), masked_rows="zero",
                     scale=at.scale)  # fmt: skip


CASES: list[tuple[int, bool, int, int, tuple[str, str, str, str], list[str]]] = [
    (700, True, 4, 2, ("BNHD",) * 4, ["pooled 0.25", "pooled 0.5", "dense", "pooled 0.1"]),
    (500, False, 4, 4, ("BHND",) * 4, ["pooled 0.4"] * 4),
    (449, True, 2, 1, ("BHND", "BNHD", "BHND", "BNHD"), ["xattention 0.7", "xattention 0.5"]),
    (450, False, 4, 1, ("BNHD", "BHND", "BNHD", "BHND"), ["xattention 0.6 stride 8"] * 3 + ["dense"]),
    (70, True, 2, 2, ("BNHD",) * 4, ["xattention 0.3", "dense"]),
    (700, True, 4, 2, ("BNHD", "BHND", "BNHD", "BNHD"), ["anchor 0.3", "anchor 0", "dense", "anchor 0.7"]),
    (450, False, 2, 1, ("BHND",) * 4, ["anchor 0.5"] * 2),
]
WITH_REST: list[tuple[int, bool, int, int, tuple[str, str, str, str], list[str]]] = [
    (700, True, 4, 2, ("BNHD",) * 4, ["pooled 0.25 rest 16", "pooled 0.5 rest 16", "dense", "pooled 0.1 rest 16"]),
    (512, False, 4, 4, ("BHND",) * 4, ["pooled 0.4 rest 64"] * 4),
    (449, True, 2, 1, ("BHND", "BNHD", "BHND", "BNHD"), ["xattention 0.7 rest 8", "xattention 0.5 rest 8"]),
    (450, False, 4, 1, ("BNHD", "BHND", "BNHD", "BHND"), ["xattention 0.6 stride 8 rest 32"] * 3 + ["dense"]),
    (199, False, 2, 2, ("BNHD",) * 4, ["anchor 0 rest 16", "dense"]),
    (
        700,
        True,
        4,
        2,
        ("BNHD", "BHND", "BNHD", "BNHD"),
        ["anchor 0.3 rest 4", "anchor 0 rest 4", "dense", "anchor 0.7 rest 4"],
    ),
]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("case_", CASES, ids=range(len(CASES)))
def test_a_site_is_the_definition(case_, static, case, tolerance) -> None:
    tokens, causal, heads, kv_heads, layouts, texts = case_
    at = case(batch=2, queries=tokens, static=static, heads=heads, kv_heads=kv_heads, layouts=layouts, causal=causal,
              scale=0.9)  # fmt: skip
    parameters = {"masked_rows": "zero", "edge": 64, "heads": texts}
    assert SUBJECT.supports(at.site(), parameters).ok
    assert SUBJECT.is_exact_for(at.site(), parameters).code == "approximate"
    assert relative_error(at.run(SUBJECT, parameters), expected(at, texts, 64)) < tolerance["float32"]
    model = at.model(SUBJECT, parameters)
    ours = [n.op_type for n in model.graph.node if n.domain == "attncompile"]
    assert ours == ["BlockScores", "BlockSelect", "BlockSparseAttention"]
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case_", WITH_REST, ids=range(len(WITH_REST)))
def test_with_means_of_what_is_not_chosen(case_, case, tolerance) -> None:
    tokens, causal, heads, kv_heads, layouts, texts = case_
    at = case(batch=2, queries=tokens, static=True, heads=heads, kv_heads=kv_heads, layouts=layouts, causal=causal,
              scale=0.9)  # fmt: skip
    parameters = {"masked_rows": "zero", "edge": 64, "heads": texts}
    assert SUBJECT.supports(at.site(), parameters).ok
    assert relative_error(at.run(SUBJECT, parameters), expected(at, texts, 64)) < tolerance["float32"]
    without = [text.split(" rest")[0] for text in texts]
    assert relative_error(at.run(SUBJECT, {**parameters, "heads": without}), expected(at, texts, 64)) > 1e-3
    cost, less = (
        SUBJECT.cost(at.site(), {**parameters, "heads": t}, Shape(2, tokens, tokens)) for t in (texts, without)
    )
    assert cost.elements > less.elements and cost.flops > less.flops
    names = [n.name for n in at.model(SUBJECT, parameters).graph.node]
    assert len(set(names)) == len(names)


def test_means_need_a_fixed_length(case) -> None:
    at = case(queries=256, heads=2, kv_heads=2, causal=True)
    found = SUBJECT.supports(at.site(), {"edge": 64, "heads": ["pooled 0.4 rest 16"] * 2})
    assert not found.ok and "one length only" in found.reason
    at = case(queries=256, static=True, heads=2, kv_heads=2, causal=True)
    for texts, told in (
        (["pooled 0.4 rest 16", "pooled 0.4"], "different ways"),
        (["pooled 0.4 rest 24"] * 2, "divide"),
    ):
        found = SUBJECT.supports(at.site(), {"edge": 64, "heads": texts})
        assert not found.ok and told in found.reason


def test_values_of_the_model_may_have_any_names() -> None:
    """Also those that a body would give its own."""
    body, sizes = Body(18), select_body.Sizes(1, 1, 8, "float32", ("BHND", "BHND"), 18)
    made = select_body.pool(body, "k", "BHND", 64, sizes, 1)
    taken = next(o for n in body.nodes for o in n.output)
    found = in_graph(body, "site/pooled", {"k": taken})
    written = [o for n in found for o in n.output]
    assert taken not in written and f"site/pooled/{made}" in written
    assert any(taken in n.input for n in found)


def test_one_model_for_all_lengths(case, tolerance) -> None:
    at = case(batch=1, queries=900, causal=True, scale=0.9)
    texts = ["xattention 0.6"] * 4
    parameters = {"edge": 128, "heads": texts}
    session = ort.InferenceSession(
        at.model(SUBJECT, parameters).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for tokens in (900, 130, 127, 1, 512):
        now = case(batch=1, queries=tokens, causal=True, scale=0.9)
        got = session.run(None, now.feeds())[0].transpose(0, 2, 1, 3)
        token = np.arange(tokens)
        want = expected(now, texts, 128) if tokens > 128 else reference(
            **now.tensors(), visible=token[None, :] <= token[:, None], scale=0.9)  # fmt: skip
        assert relative_error(got, want) < tolerance["float32"], tokens


def test_half(case, tolerance) -> None:
    at = case(queries=400, causal=True, dtype="float16", softmax_dtype="float32", head_dim=16, scale=0.5)
    texts = ["xattention 0.6", "xattention 0.8", "dense", "xattention 0.4"]
    got = at.run(SUBJECT, {"edge": 64, "heads": texts}).astype(np.float64)
    want = expected(at, texts, 64)
    # A row whose weights sum to nearly what is asked may keep a block more or less.
    rows = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.quantile(rows, 0.95) < tolerance["float16"] and not np.isnan(got).any()


@pytest.mark.parametrize(
    ("wrong", "way"),
    [*((w, "xattention") for w in ("causal", "window", "amount")),
     *((w, "anchor") for w in ("causal", "window", "amount", "reduce", "span", "sinks"))],
)  # fmt: skip
def test_a_planted_bug_is_seen(wrong, way, case, monkeypatch) -> None:
    at = case(queries=449, causal=True, scale=0.9, heads=2)
    texts = [f"{way} {amount}" for amount in ((0.5, 0.7) if way == "xattention" else (0.1, 0.4))]
    want = expected(at, texts, 64)
    changed = {"causal": 0, "window": 1, "reduce": "sum", "span": 32, "sinks": 0}
    if wrong == "amount":
        texts.reverse()

    def planted(real: Any, kind: str, said: Any, *more: Any) -> Any:
        return real(kind, {**said, wrong: changed[wrong]} if wrong in said and wrong in changed else said, *more)

    for name in ("node", "function"):
        monkeypatch.setattr(chosen.select, name, partial(planted, getattr(chosen.select, name)))
    assert relative_error(at.run(SUBJECT, {"edge": 64, "heads": texts}), want) > 1e-3


def test_what_is_refused(case) -> None:
    good = {"edge": 64, "heads": ["pooled 0.2"] * 4}
    site = case(queries=200, causal=True).site()
    assert SUBJECT.supports(site, good).ok
    padded = MaskFacts((MaskPart("padding", ONCE, source="key_mask"),))
    for changes, code in (
        ({"mask": padded}, "mask"), ({"key_length": "M"}, "lengths"), ({"softcap": 3.0}, "softcap"),
        ({"sinks": "s"}, "needs"), ({"mask": MaskFacts((MaskPart("opaque", ONCE, source="x"),))}, "mask"),
    ):  # fmt: skip
        refused = SUBJECT.supports(case(queries=200, causal=True).site(**changes), good)
        assert (refused.ok, refused.code) == (False, code), changes
    for changes in ({"edge": 32}, {"edge": 64.0}, {"heads": ["pooled 0.2"] * 3},
                    {"heads": ["pooled 0.2", "xattention 0.2"] * 2},
                    {"heads": ["pooled 2"] * 4}, {"heads": ["anchor 4", "anchor 2", "dense", "pooled 0.2"]},
                    {"heads": ["anchor -4"] * 4}, {"masked_rows": "uniform"}, {"egde": 64},
                    {"heads": ["pooled 0.2"] * 3 + ["mean"]}):  # fmt: skip
        assert not SUBJECT.supports(site, {**good, **changes}).ok, changes
    assert chosen.edge_of(site) == 128, "of a length that is not known"


def test_fewer_blocks_cost_less(case) -> None:
    site, shape = case(queries=2048, static=True, causal=True).site(), Shape(1, 2048, 2048)
    costs = [SUBJECT.cost(site, {"edge": 64, "heads": [text] * 4}, shape).flops
             for text in ("pooled 0.1", "pooled 0.5", "pooled 1")]  # fmt: skip
    assert costs == sorted(costs) and costs[0] < costs[2] / 2


@pytest.mark.parametrize(("low", "kind"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_converted_model_asks_for_kernels(low, kind, case, tmp_path) -> None:
    """Scores, shares and weights stay in float32 where the operands become halves, so that every node has a kernel."""
    at = case(queries=512, static=True, heads=2, head_dim=64, value_dim=64, causal=True)
    for texts in (["pooled 0.25", "pooled 0.5"], ["xattention 0.8", "dense"], ["anchor 4", "dense"]):
        model = at.model(SUBJECT, {"edge": 64, "heads": texts})
        del model.functions[:]
        for node in model.graph.node:
            node.overload = ""
        found = calls.find(precision.convert(model, tmp_path, low), kernels())
        assert [(c.op, c.verdict.ok) for c in found] == [
            ("BlockScores", True), ("BlockSelect", True), ("BlockSparseAttention", True)
        ]  # fmt: skip
        assert [c.call.dtype for c in found if c.call] == [kind, "float32", kind]
        assert all(kernels()[c.call.op].supports(c.call, 90).ok for c in found if c.call)


def test_masks_of_means_where_a_runtime_adds_integers_as_floats(case, tolerance) -> None:
    """ONNX Runtime's CUDA provider sums int32 in float32: more than 24 bits of a mask would be rounded, a query of a
    causal site see what comes after it.
    """
    texts = ["pooled 0.25 rest 16", "pooled 0.1 rest 16"]
    at = case(queries=1024, static=True, heads=2, kv_heads=2, causal=True, scale=0.9)
    parameters = {"edge": 64, "heads": texts}
    model = at.model(SUBJECT, parameters)
    nodes = []
    sums = 0
    for node in model.graph.node:
        if node.op_type == "ReduceSum" and "chosen/rest" in node.name:
            sums += 1
            given, out = node.input[0], node.output[0]
            nodes.append(onnx.helper.make_node("Cast", [given], [f"{given}/float"], to=onnx.TensorProto.FLOAT))
            node.input[0], node.output[0] = f"{given}/float", f"{out}/float"
            nodes += [node, onnx.helper.make_node("Cast", [f"{out}/float"], [out], to=onnx.TensorProto.INT32)]
            continue
        nodes.append(node)
    assert sums == 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, at.feeds())[0]
    got = got if at.layouts[3] == "BNHD" else got.transpose(0, 2, 1, 3)
    assert relative_error(got, expected(at, texts, 64)) < tolerance["float32"]


@pytest.mark.parametrize("edge", [64, 128])
def test_means_in_half_and_at_any_batch(edge, case, tolerance) -> None:
    texts = ["pooled 0.3 rest 16", "pooled 0.5 rest 16", "dense", "pooled 0.2 rest 16"]
    at = case(batch=3, queries=700, static=True, causal=True, dtype="float16", softmax_dtype="float32", head_dim=16,
              scale=0.5)  # fmt: skip
    got, want = at.run(SUBJECT, {"edge": edge, "heads": texts}).astype(np.float64), expected(at, texts, edge)
    rows = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.quantile(rows, 0.95) < tolerance["float16"] and not np.isnan(got).any()


def test_masks_of_means_that_would_be_large_are_refused(case) -> None:
    at = case(queries=32768, static=True, heads=12, kv_heads=12, causal=True)
    given = {"edge": 128, "heads": ["pooled 0.1 rest 4"] * 12}
    found = SUBJECT.supports(at.site(), given)
    assert not found.ok and "masks of the means" in found.reason and "more keys" in found.hint
    assert SUBJECT.supports(at.site(), {**given, "heads": ["pooled 0.1 rest 128"] * 12}).ok


def test_fixed_patterns_do_not_go_with_chosen_ones(case) -> None:
    at = case(queries=256, static=True, heads=2, kv_heads=2)
    found = SUBJECT.supports(at.site(), {"edge": 64, "heads": ["pooled 0.4 rest 16", "sinks 0 window 1 rest 16"]})
    assert not found.ok and "beside heads of the same site that choose" in found.reason
