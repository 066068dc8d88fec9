"""Masks of several factors: biases merged with masks, padding from inputs, heads that differ, one mask a window."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked, ShiftedWindows
from attncompile.core.pattern import GridWindow, Pattern
from attncompile.core.profile import Range
from attncompile.core.sequence_pattern import Dilated, GlobalLocal, Strided
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import Builder, save
from tests.passes.mask_graphs import BOOL, Positions, computed, drawn, read, site_of

N = 31
TRI = np.tri(N, dtype=bool)


def added(mask: np.ndarray, heads: int = 3) -> tuple[AttentionSite, str]:
    """The site to whose scores ``mask`` is added, and the name of that tensor."""
    b = Builder()
    name = b.const(mask.astype(np.float32))
    return site_of(b, lambda scores: b.op("Add", scores, name), heads, mask.shape[-1]), name


def alibi(slopes: list[float], n: int = N) -> np.ndarray:
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    return np.array(slopes)[:, None, None] * np.minimum(distance, 0)[None]


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min, -1e4])
def test_a_bias_merged_with_a_causal_mask(low: float) -> None:
    site, name = added(np.where(TRI, alibi([0.5, 0.25, 0.125]), low)[None])
    assert [p.kind for p in site.mask.parts] == ["causal", "bias"]
    causal, bias = site.mask.parts
    assert causal.certificate.method == "constant" and bias.source == name and bias.additive
    assert causal.source is None  # the tensor is added once, as the bias
    assert "at the keys that are seen" in bias.certificate.detail
    assert site.mask.fills == (pytest.approx(low, rel=1e-6),)
    assert site.mask.masked_rows == ("nan" if np.isinf(low) else "uniform")


def test_a_position_bias_merged_with_windows() -> None:
    rng = np.random.default_rng(0)
    seen = Blocked((4,), (2,)).visible(N, N)
    site, name = added(np.where(seen, rng.standard_normal((1, 3, N, N)), -np.inf))
    assert [p.kind for p in site.mask.parts] == ["blocked", "bias"] and site.mask.parts[1].source == name
    assert site.mask.parts[0].source is None
    np.testing.assert_array_equal(read(site, N, N), seen)


def test_a_bias_merged_with_masks_that_differ_between_heads_stays_a_bias() -> None:
    """Adding the tensor is all there is to say: no structure is claimed, and nothing is added twice."""
    seen = np.stack([TRI, np.eye(N, dtype=bool), np.ones((N, N), dtype=bool)])
    site, name = added(np.where(seen, alibi([0.5, 0.25, 0.125]), -np.inf)[None])
    assert [(p.kind, p.source) for p in site.mask.parts] == [("bias", name)]


@pytest.mark.parametrize("slopes", [[400.0, 350.0, 300.0], [1000.0, 900.0, 800.0]])
def test_a_steep_bias_that_runs_below_the_hidden_is_no_mask(slopes: list[float]) -> None:
    """400 * 30 = 12,000: the far keys are as good as hidden, but nothing separates them from the others."""
    site, _ = added(alibi(slopes)[None])
    assert [p.kind for p in site.mask.parts] == ["bias"]


def test_numbers_that_hide_differently_are_all_named() -> None:
    mask = np.where(TRI, 0.0, -np.inf)
    mask[0, 5] = -1e9
    site, _ = added(mask[None, None])
    assert [p.kind for p in site.mask.parts] == ["causal"] and set(site.mask.fills) == {-np.inf, -1e9}


def test_heads_that_differ_have_masks_of_their_own() -> None:
    seen = np.stack([TRI, np.eye(N, dtype=bool), np.ones((N, N), dtype=bool)])
    site, name = added(np.where(seen, 0.0, -np.inf)[None])
    (part,) = site.mask.parts
    assert part.kind == "block_sparse" and part.source == name and part.pattern is not None
    np.testing.assert_array_equal(part.pattern.visible(N, N), seen)


@pytest.mark.parametrize("form", ["and", "two"])
def test_a_pattern_and_padding_from_an_input(form: str) -> None:
    seen = drawn(N, N, lambda i, j: j <= i and i // 8 == j // 8)
    b = Builder()
    low = b.const(np.array(-np.inf, np.float32))

    def apply(scores: str) -> str:
        if form == "and":
            return b.op("Where", b.op("And", b.const(seen[None, None]), "pad"), scores, low)
        return b.op("Where", b.const(seen[None, None]), b.op("Where", "pad", scores, low), low)

    pad = helper.make_tensor_value_info("pad", BOOL, [2, 1, 1, N])
    site = site_of(b, apply, 2, N, extra=(pad,))
    assert {p.kind for p in site.mask.parts} == {"blocked", "causal", "padding"} and site.mask.kind == "blocked"
    padding = site.mask.part("padding")
    assert padding is not None and padding.source == "pad"
    shown = site.mask.to_json()
    assert {p["kind"] for p in shown["parts"]} == {"blocked", "causal", "padding"}
    assert next(p for p in shown["parts"] if p["kind"] == "blocked")["window"] == [8]


def test_a_union_with_an_input_is_opaque() -> None:
    b = Builder()
    low = b.const(np.array(-np.inf, np.float32))
    pad = helper.make_tensor_value_info("pad", BOOL, [2, 1, 1, N])
    site = site_of(
        b, lambda s: b.op("Where", b.op("Or", b.const(TRI[None, None]), "pad"), s, low), 2, N, extra=(pad,)
    )  # fmt: skip
    assert [p.kind for p in site.mask.parts] == ["opaque"] and "'pad'" not in site.mask.kind
    assert "depends on the data of input pad" in site.mask.parts[0].certificate.detail


def test_factors_that_have_no_common_structure_are_said_one_by_one() -> None:
    """Diagonals and documents: together no kind of their own."""
    stripes = drawn(N, N, lambda i, j: abs(i - j) in (0, 1, 5, 6))
    documents = drawn(N, N, lambda i, j: (i < 13) == (j < 13) and (i < 22) == (j < 22))
    b = Builder()
    low = b.const(np.array(-np.inf, np.float32))
    both = b.op("And", b.const(stripes[None, None]), b.const(documents[None, None]))
    site = site_of(b, lambda scores: b.op("Where", both, scores, low), 2, N)
    assert {p.kind for p in site.mask.parts} == {"stripe", "document"} and site.mask.kind == "stripe"
    np.testing.assert_array_equal(read(site, N, N), stripes & documents)


def test_a_structure_that_changes_with_the_length_is_opaque() -> None:
    """Chunks of 8 up to 40 tokens, of 6 above."""

    def make(p: Positions) -> str:
        size = p.b.op("Where", p.b.op("Less", p.size, p.number(41)), p.number(8), p.number(6))
        return p.b.op("Equal", p.b.op("Div", p.query, size), p.b.op("Div", p.key, size))

    (part,) = computed(make, Range(1, 23, 61)).mask.parts
    assert part.kind == "opaque"
    assert "it is blocked (window [6]" in part.certificate.detail and "it is not" in part.certificate.detail


def test_a_number_as_large_as_the_lengths_is_not_believed_for_others() -> None:
    """All of the first 100 keys are seen: the profile's lengths do not show what a length of 300 has."""

    def make(p: Positions) -> str:
        last = p.b.op("Sub", p.size, p.number(3))  # the prefix is the length less 3
        return p.b.op("Or", p.causal(), p.b.op("Less", p.key, last))

    (part,) = computed(make, Range(1, 23, 61)).mask.parts
    assert part.kind == "opaque" or not part.certificate.general


@pytest.mark.parametrize(
    "pattern",
    [
        Blocked((7,), (3,)),
        Dilated(3, 9, 6),
        GlobalLocal(2, 1, first=2),
        Strided(6, 2, 1),
        GridWindow(TokenGrid((5, 6), 1), (3, 3), (1, 1), (1, 1), (False, False)),
        GridWindow(TokenGrid((31,)), (5,), (2,), (1,), (False,), "circular"),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_the_model_computes_what_the_facts_say(pattern: Pattern, merged: bool) -> None:
    """ONNX Runtime against NumPy, which knows the structure and the bias alone."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((1, 2, N, N)) * merged
    b = Builder()
    mask = b.const(np.where(pattern.visible(N, N), bias, -np.inf).astype(np.float32))
    models: list[onnx.ModelProto] = []
    site = site_of(b, lambda scores: b.op("Add", scores, mask), 2, N, models=models)
    assert [p.kind for p in site.mask.parts][1:] == ["bias"] * merged and site.mask.parts[0].pattern is not None
    x = rng.standard_normal((2, N, 8)).astype(np.float32)
    session = ort.InferenceSession(models[0].SerializeToString(), providers=["CPUExecutionProvider"])
    truth = session.run(None, {"x": x})[0]
    heads = x.astype(np.float64).reshape(2, N, 2, 4).transpose(0, 2, 1, 3)
    scores = np.where(read(site, N, N), heads @ heads.transpose(0, 1, 3, 2) + bias, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    ours = weights / weights.sum(-1, keepdims=True) @ heads
    np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)


# Swin: batch entries are windows.


def swin(seen: np.ndarray, low: float, batch: int | str, form: str) -> tuple[AttentionSite, onnx.ModelProto]:
    """Scores [b * nW, 2, n, n], to which a mask of [nW, n, n] is added on five axes, or on four for one image."""
    windows, n = seen.shape[:2]
    b = Builder()
    shape = b.const([-1, n, 2, 4])
    query = b.op("Transpose", b.op("Reshape", "x", shape), perm=[0, 2, 1, 3])
    key = b.op("Transpose", b.op("Reshape", "x", shape), perm=[0, 2, 3, 1])
    value = b.op("Transpose", b.op("Reshape", "x", shape), perm=[0, 2, 1, 3])
    scores = b.op("MatMul", query, key)
    mask = np.where(seen, np.float32(0), np.float32(low))
    if form == "five":
        scores = b.op("Reshape", scores, b.const([-1, windows, 2, n, n]))
        scores = b.op("Add", scores, b.const(mask[None, :, None]))
        scores = b.op("Reshape", scores, b.const([-1, 2, n, n]))
    elif form == "bool":
        scores = b.op("Reshape", scores, b.const([-1, windows, 2, n, n]))
        scores = b.op("Where", b.const(~seen[None, :, None]), b.const(np.array(low, np.float32)), scores)
        scores = b.op("Reshape", scores, b.const([-1, 2, n, n]))
    else:
        scores = b.op("Add", scores, b.const(mask[:, None]))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), value)
    graph = helper.make_graph(
        b.nodes, "g", [helper.make_tensor_value_info("x", 1, [batch, n, 8])],
        [helper.make_tensor_value_info(out, 1, [None] * 4)], b.stored,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(save(model, Path(folder)))
        (site,) = detect(loaded, profile_for(loaded, {})).sites
    return site, model


@pytest.mark.parametrize(
    "windows, window, shift",
    [
        ((3, 3), (4, 4), (2, 2)),
        ((2, 3), (3, 3), (1, 1)),
        ((4,), (6,), (3,)),
        ((2, 2), (5, 5), (2, 2)),
        ((1, 4), (4, 4), (0, 2)),
    ],
)
@pytest.mark.parametrize("form, low", [
    ("five", -np.inf), ("five", -1e4), ("five", -100.0), ("four", -np.inf), ("four", -100.0), ("bool", -1e9),
])  # fmt: skip
def test_shifted_windows_as_batch_entries(
    windows: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], low: float, form: str
) -> None:
    pattern = ShiftedWindows(windows, window, shift)
    seen = pattern.visible_windows()
    site, _ = swin(seen, low, len(seen) * (1 if form == "four" else 2), form)
    (part,) = site.mask.parts
    if low == -100.0:  # exp(-100) is no zero: a bias, of which its shape is known
        assert part.kind == "bias" or form == "four"
    else:
        assert part.kind == "blocked" and site.mask.kind == "blocked"
    if low != -100.0 or form == "five":
        assert isinstance(part.pattern, ShiftedWindows)
        np.testing.assert_array_equal(part.pattern.visible_windows(), seen)
        found = site.mask.to_json()
        assert found["shift"] == [s for s, w in zip(shift, window, strict=True)] or len(windows) != len(found["shift"])
    other = seen.copy()
    other[-1, 1, 2] ^= True
    again, _ = swin(other, low, len(seen) * (1 if form == "four" else 2), form)
    assert again.mask.parts[0].kind in ("bias", "opaque") and again.mask.parts[0].pattern is None


def test_what_the_windows_hide_is_hidden() -> None:
    """The model run with and without the keys that the pattern hides: the same."""
    pattern = ShiftedWindows((2, 3), (3, 3), (1, 2))
    seen = pattern.visible_windows()
    site, model = swin(seen, -np.inf, 12, "five")
    assert isinstance(site.mask.parts[0].pattern, ShiftedWindows)
    x = np.random.default_rng(0).standard_normal((12, 9, 8)).astype(np.float32)
    run = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    heads = x.astype(np.float64).reshape(12, 9, 2, 4).transpose(0, 2, 1, 3)
    scores = heads @ heads.transpose(0, 1, 3, 2)
    known = np.tile(site.mask.parts[0].pattern.visible_windows(), (2, 1, 1))
    weights = np.where(known[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True) @ heads, run, rtol=1e-4, atol=1e-5)
