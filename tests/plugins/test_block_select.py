"""Selection of blocks: the bodies of its ops against the definition, and what whole sites give with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile.core import block_selection
from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.block_selection import BlockSelection, Chooser
from attncompile.core.errors import Unsupported
from attncompile.plugins.block_select import function, op, reference
from attncompile.plugins.block_select.function import Sizes
from attncompile.plugins.body import Body
from tests.conformance.selection import Selection, wrong_lists

FLAT = ("columns", "kinds")
KINDS = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16),
         "double": (TensorProto.DOUBLE, np.float64)}  # fmt: skip


def run_model(
    nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto], inputs: Mapping[str, tuple[int, Any, np.ndarray]],
    outputs: Mapping[str, int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """``inputs``: element type, declared shape, value."""
    op.register()
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info(n, t, s) for n, (t, s, _) in inputs.items()],
        [helper.make_tensor_value_info(n, t, [None] * (1 if n in FLAT else 4)) for n, t in outputs.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("attncompile", 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(list(outputs), {n: x for n, (_, _, x) in inputs.items()})
    return dict(zip(outputs, found, strict=True))


def drawn(seed: int, tokens: tuple[int, int], heads: tuple[int, int], dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, tokens[0], heads[0], dim)), rng.standard_normal((2, tokens[1], heads[1], dim)))


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "BNHD" else np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def scores_of(
    q: np.ndarray, k: np.ndarray, said: Mapping[str, Any], layouts: tuple[str, str], dtype: str = "float32"
) -> np.ndarray:
    sizes = Sizes(q.shape[2], k.shape[2], q.shape[3], dtype, layouts, 18)
    element, kind = KINDS[dtype]
    made = function.node(op.SCORES, said, sizes, ("query", "key"), ("scores",), "scores")
    inputs = {}
    for name, x, layout, n in (("query", q, layouts[0], "N"), ("key", k, layouts[1], "M")):
        dims = {"B": "batch", "N": n, "H": x.shape[2], "D": x.shape[3]}
        inputs[name] = (element, [dims[a] for a in layout], laid(x, layout).astype(kind))
    return run_model(
        [made], [function.function(op.SCORES, said, sizes)], inputs, {"scores": TensorProto.FLOAT}
    )["scores"]  # fmt: skip


@pytest.mark.parametrize(
    ("stride", "block", "causal", "tokens", "heads", "layouts", "more"),
    [
        (4, 16, True, (83, 83), (4, 2), ("BNHD", "BHND"), {}), (8, 8, False, (37, 61), (2, 2), ("BHND", "BNHD"), {}),
        (4, 16, False, (64, 30), (4, 1), ("BNHD", "BNHD"), {}), (1, 1, True, (9, 9), (2, 1), ("BHND", "BHND"), {}),
        (16, 64, True, (129, 129), (2, 2), ("BNHD", "BNHD"), {}),
        (1, 16, True, (6, 83), (4, 2), ("BHND", "BNHD"), {"reduce": "max", "span": 16}),
        (1, 64, False, (3, 149), (2, 1), ("BNHD", "BNHD"), {"reduce": "max", "span": 64}),
        (8, 32, True, (75, 75), (2, 2), ("BNHD", "BHND"), {"reduce": "max"}),
        (1, 16, True, (5, 77), (2, 2), ("BNHD", "BNHD"), {"span": 16}),
    ],
)  # fmt: skip
def test_scores_are_the_definition(stride, block, causal, tokens, heads, layouts, more) -> None:
    q, k = drawn(stride + tokens[0], tokens, heads)
    said = {"scale": 0.7, "stride": stride, "block": block, "causal": int(causal), **more}
    want = reference.scores(q.astype(np.float32), k.astype(np.float32), stride, block, causal, 0.7, **more)
    got = scores_of(q, k, said, layouts)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    there = np.isfinite(want)
    np.testing.assert_allclose(got[there], want[there], atol=3e-5)


def test_scores_of_half_numbers() -> None:
    q, k = (30 * x for x in drawn(3, (70, 70), (2, 2), 16))  # sums of products are beyond a half's range
    said = {"scale": 0.25, "stride": 16, "block": 32, "causal": 1}
    q, k = (x.astype(np.float16) for x in (q, k))
    want = reference.scores(q, k, 16, 32, True, 0.25)
    got = scores_of(q, k, said, ("BNHD", "BNHD"), "float16")
    there = np.isfinite(want)
    assert np.isfinite(got[there]).all() and np.abs(got[there] - want[there]).max() < 4e-3 * np.abs(want[there]).max()


def test_pooled_tokens_are_their_mean() -> None:
    x = drawn(5, (50, 1), (3, 1))[0].astype(np.float32)
    for layout in ("BNHD", "BHND"):
        for block in (16, 25, 64):
            body = Body(18)
            sizes = Sizes(3, 3, 8, "float32", (layout, layout), 18)
            made = function.pool(body, "x", layout, block, sizes, 3)
            dims = {"B": 2, "N": "N", "H": 3, "D": 8}
            given = {"x": (TensorProto.FLOAT, [dims[a] for a in layout], laid(x, layout))}
            got = run_model(body.nodes, [], given, {made: TensorProto.FLOAT})[made]
            np.testing.assert_allclose(got, laid(reference.pooled(x, block), layout), atol=1e-6)


def select_of(scores: np.ndarray, amount: np.ndarray, said: Mapping[str, Any]) -> dict[str, np.ndarray]:
    heads = scores.shape[1]
    sizes = Sizes(heads, heads, 1, "float32", ("BNHD", "BNHD"), 18)
    made = function.node(op.SELECT, said, sizes, ("scores", "amount"), (*op.LISTS, "mass"), "select")
    given = {"scores": (TensorProto.FLOAT, ["b", heads, "T", "C"], scores.astype(np.float32)),
             "amount": (TensorProto.FLOAT, amount.shape, amount.astype(np.float32))}  # fmt: skip
    outputs = {**dict.fromkeys(op.LISTS, TensorProto.INT32), "mass": TensorProto.FLOAT}
    return run_model([made], [function.function(op.SELECT, said, sizes)], given, outputs)


def score_map(seed: int, rows: int, columns: int, tiles: int, causal: bool, heads: int = 3) -> np.ndarray:
    """Random scores [2, heads, T, C] with equal ones among them; later blocks are -inf."""
    rng = np.random.default_rng(seed)
    found = np.round(rng.standard_normal((2, heads, rows, columns)) * 2, 1).astype(np.float32)
    found[0, 0] = 0.5
    if causal:
        hidden = np.arange(columns)[None, :] > (np.arange(rows) // tiles)[:, None]
        found[..., hidden] = -np.inf
    return found


SELECTIONS = [
    (1, "share", True, 1, 0, 13, 13, [0.25, 0.5, 1.0]), (4, "mass", True, 1, 0, 26, 7, [0.6, 0.9, 2.0]),
    (4, "mass", False, 1, 1, 30, 11, [0.5]), (1, "share", False, 0, 0, 9, 10, [0.1]),
    (3, "mass", True, 2, 1, 21, 7, [0.0]), (8, "mass", False, 0, 0, 17, 40, [0.3, 0.95, 0.999]),
    (1, "anchor", True, 1, 0, 13, 13, [0.0, 1.5, math.inf]), (1, "anchor", False, 2, 1, 15, 11, [0.5]),
    (1, "anchor", False, 0, -1, 6, 9, [0.5, 1.0, 2.0]), (1, "anchor", True, 0, 2, 21, 21, [1.0]),
    (1, "anchor", True, 1, -1, 15, 15, [0.5]),
]  # fmt: skip


@pytest.mark.parametrize(("tiles", "rule", "causal", "sinks", "window", "rows", "columns", "amount"), SELECTIONS)
def test_lists_are_the_definition(tiles, rule, causal, sinks, window, rows, columns, amount) -> None:
    scores, asked = score_map(rows, rows, columns, tiles, causal), np.array(amount, np.float32)
    said = {"tiles": tiles, "rule": rule, "causal": int(causal), "sinks": sinks, "window": window}
    got = select_of(scores, asked, said)
    mass = reference.mass(scores, tiles)
    np.testing.assert_allclose(got["mass"], mass, atol=1e-6)
    case = Selection(
        "", rule=rule, causal=causal, amount=tuple(amount), sinks=sinks, window=window, stride=1, block=tiles
    )
    assert wrong_lists(case, scores, got) == ""
    assert (got["kinds"] == 0).all() and got["columns"].shape == got["kinds"].shape == (mass.size,)
    for name in op.LISTS:
        assert got[name].dtype == np.int32


@pytest.mark.parametrize("name", ["sinks", "window", "amount", "causal", "rule"])
def test_a_planted_anchor_is_seen(name) -> None:
    """Lists of the body with one attribute or input that is not the case's."""
    scores = score_map(5, 14, 14, 1, True)
    said = {"tiles": 1, "rule": "anchor", "causal": 1, "sinks": 1, "window": 1}
    case = Selection("", rule="anchor", amount=(0.8,), sinks=1, window=1, stride=1, block=1)
    wrong = {"sinks": 2, "window": 0, "causal": 0, "rule": "share"}
    assert wrong_lists(case, scores, select_of(scores, np.array([0.8]), said)) == ""
    changed = said | ({name: wrong[name]} if name in wrong else {})
    got = select_of(scores, np.array([0.7 if name == "amount" else 0.8]), changed)
    assert wrong_lists(case, scores, got) != ""


def test_a_stripe_of_one_key_is_found() -> None:
    """A key that every query looks at, among ones that it avoids: of its block's mean or sum nothing is left."""
    tokens, edge, dim, hot = 640, 64, 16, 200
    rng = np.random.default_rng(3)
    q, k = (0.1 * rng.standard_normal((tokens, dim)).astype(np.float32) for _ in "qk")
    q[:, 0] += 4.0
    k[:, 0] = 1.0  # 4 with every query
    k[192:256, 0], k[hot, 0] = -1.0, 3.0
    geometry, far = BlockGeometry(tokens, edge, True), {}
    for text in ("anchor 1", "pooled 0.5", "xattention 0.5"):
        selection = BlockSelection(text)
        scores = block_selection.weights(q, k, 1.0, geometry, selection.family)
        kept = block_selection.kept(scores, selection.amount, selection.rule, True)
        far[text] = kept[4:, hot // edge]
    assert far["anchor 1"].all() and not far["pooled 0.5"].any() and not far["xattention 0.5"].any()


@pytest.mark.parametrize("wrong", ["order", "partial", "ties", "rounding"])
def test_planted_bugs_are_seen(wrong, monkeypatch) -> None:
    """Lists with one error each are not what the definition says."""
    causal = wrong != "partial"
    said = {"tiles": 1, "rule": "share", "causal": int(causal), "sinks": 1, "window": 0}
    scores, amount = score_map(3, 12, 12, 1, causal), np.array([0.4], np.float32)
    if wrong == "rounding":
        monkeypatch.setattr(op, "SLACK", 1.0)
    got = select_of(scores, amount, said)
    rows, columns = got["rows"].copy(), got["columns"].copy()
    _, full, end = rows[0, 0, 10]
    if wrong == "order":
        columns[full:end] = columns[full:end][::-1]
    elif wrong == "partial":
        rows[..., 1] = rows[..., 0]
    elif wrong == "ties":
        columns[end - 1] += 1
    case = Selection("", rule="share", causal=causal, amount=(0.4,), stride=1, block=1)
    assert wrong_lists(case, scores, {**got, "rows": rows, "columns": columns}) != ""


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "text", ["pooled 0.4", "xattention 0.7", "xattention 0.9 stride 8", "xattention 1", "anchor 0.3", "anchor 1"]
)
def test_the_estimate_of_the_search_is_the_definition(text, causal) -> None:
    tokens, edge = 300, 64
    q, k = (x.astype(np.float32) for x in drawn(8, (tokens, tokens), (2, 1), 16))
    geometry, selection = BlockGeometry(tokens, edge, causal), BlockSelection(text)
    k[:, edge - 1 :: edge] *= 6
    if selection.way == "pooled":
        scores = reference.scores(*(reference.pooled(x, edge) for x in (q, k)), 1, 1, causal, 0.6)
    elif selection.way == "anchor":
        scores = reference.scores(reference.pooled(q, edge), k, 1, edge, causal, 0.6, "max", edge)
    else:
        scores = reference.scores(q, k, selection.stride, edge, causal, 0.6)
    mass = reference.mass(scores, edge // selection.stride if selection.stride else 1)
    mass = scores if selection.way == "anchor" else mass
    want = reference.kept(mass, np.array([selection.amount]), selection.rule, causal)
    for h in range(2):
        got = block_selection.weights(q[0, :, h], k[0, :, 0], 0.6, geometry, selection.family)
        np.testing.assert_allclose(got, mass[0, h], atol=2e-6, rtol=2e-6)
        seen = block_selection.kept(got, selection.amount, selection.rule, causal)
        np.testing.assert_array_equal(seen, want[0, h])
        assert selection.way != "anchor" or (not seen.all() and seen[2:, 1].any())
        part = block_selection.weights(q[0, :, h], k[0, :, 0], 0.6, geometry, selection.family, [1, 4])
        np.testing.assert_allclose(part[[1, 4]], got[[1, 4]], atol=1e-7)


def test_texts_of_selections() -> None:
    assert BlockSelection("xattention 0.9").family == ("xattention", 16)
    assert BlockSelection("pooled 0.25").rule == "share" and BlockSelection("xattention 0.9 stride 8").stride == 8
    assert BlockSelection("anchor 12").family == ("anchor", 0) and BlockSelection("anchor 0").amount == 0
    for text in ("pooled", "pooled 0", "pooled 1.5", "xattention -1", "xattention 0.9 stride 7", "pooled 0.5 stride 8",
                 "anchor", "anchor -1", "anchor 1001", "anchor 4 stride 8", "anchor 1e3", "anchor inf"):  # fmt: skip
        assert block_selection.is_selection(text)
        with pytest.raises(Unsupported, match="chooses no blocks"):
            BlockSelection(text)
    assert not block_selection.is_selection("sinks 1 window 2")
    chooser = Chooser.of(["dense", "xattention 0.8", "xattention 0.9"])
    assert chooser.amounts == (block_selection.EVERYTHING, 0.8, 0.9) and chooser.rule == "mass"
    chooser = Chooser.of(["anchor 4", "dense", "anchor 7.5"])
    assert chooser.amounts == (4.0, math.inf, 7.5) and chooser.rule == "anchor"
    for texts in (
        ["pooled 0.3", "xattention 0.8"],
        ["xattention 0.8", "xattention 0.8 stride 8"],
        ["pooled 0.2", "mean"],
        ["anchor 4", "pooled 0.2"],
    ):
        with pytest.raises(Unsupported):
            Chooser.of(texts)
