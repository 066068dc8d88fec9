"""Heads that meet what they leave out by means of keys and values: lists and body against the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, bitmap, density
from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import MaskPart
from attncompile.core.mechanism import Shape
from attncompile.core.site import AttentionSite
from attncompile.plugins import mechanism
from attncompile.plugins.block_sparse import head_lists
from attncompile.plugins.block_sparse.op import Lists
from attncompile.plugins.block_sparse.reference import counts_of, reference
from attncompile.plugins.block_sparse.rest import Rest
from tests.plugins.conftest import relative_error

SUBJECT = mechanism("BlockSparseAttention")


def counted(patterns: list[BlockPattern], geometry: BlockGeometry) -> tuple[np.ndarray, int]:
    """Int [H, N, F + N] by the definition, query by query: how often it counts each of the F means and each key; and
    the keys of a mean.
    """
    tokens, edge = geometry.tokens, geometry.edge
    size = max(p.rest for p in patterns)
    blocks = tokens // edge
    means = blocks * edge // size
    out = np.zeros((len(patterns), tokens, means + tokens), int)
    for h, pattern in enumerate(patterns):
        met = pattern.blocks(geometry)
        for i in range(tokens):
            for c in range(geometry.count):
                keys = range(c * edge, min((c + 1) * edge, tokens))
                if met[i // edge, c]:
                    for j in keys:
                        out[h, i, means + j] = not geometry.causal or j <= i
                elif pattern.rest and c < blocks and (not geometry.causal or c < i // edge):
                    out[h, i, c * edge // size : (c + 1) * edge // size] = size
    return out, size


def with_means(x: np.ndarray, geometry: BlockGeometry, size: int) -> np.ndarray:
    """[B, N, G, D] -> [B, F + N, G, D]."""
    whole = geometry.tokens // geometry.edge * geometry.edge
    means = x[:, :whole].reshape(len(x), whole // size, size, *x.shape[2:]).mean(axis=2)
    return np.concatenate([means, x], axis=1)


CASES: list[tuple[int, bool, int, int, tuple[str, str, str, str], list[str]]] = [
    (256, False, 4, 4, ("BNHD",) * 4, ["sinks 0 window 0 rest 16"] * 4),
    (256, False, 2, 2, ("BHND",) * 4, ["sinks 1 window 0 rest 64", "columns 3 diagonals 1 rest 64"]),
    (333, False, 4, 2, ("BNHD", "BHND", "BNHD", "BHND"),
     ["dense", "sinks 1 window 0 rest 16", "sinks 0 window 1", "skip"]),
    (333, True, 4, 2, ("BNHD",) * 4, ["columns 1 rest 8", "dense", "sinks 0 window 0 rest 8", "sinks 0 window 0"]),
    (200, True, 4, 1, ("BHND", "BNHD", "BHND", "BNHD"),
     ["skip", "sinks 0 window 0 rest 32", "sinks 1 window 0", "skip"]),
    (64 * 5, True, 2, 2, ("BNHD",) * 4, ["sinks 0 window 0 rest 4", "sinks 0 window 1 rest 4"]),
]  # fmt: skip


@pytest.mark.parametrize("case_", CASES, ids=range(len(CASES)))
def test_the_body_is_the_definition(case_, case, tolerance) -> None:
    tokens, causal, heads, kv_heads, layouts, texts = case_
    at = case(batch=2, queries=tokens, static=True, heads=heads, kv_heads=kv_heads, layouts=layouts, causal=causal)
    geometry = BlockGeometry(tokens, 64, causal)
    patterns = [BlockPattern(t) for t in texts]
    parameters = SUBJECT.head_parameters(geometry, patterns)
    assert SUBJECT.supports(at.site(), parameters).ok
    visible, size = counted(patterns, geometry)
    given = at.tensors()
    joined = {"q": given["q"], **{n: with_means(given[n], geometry, size) for n in "kv"}}
    want = reference(**joined, visible=visible, masked_rows="zero", scale=at.scale)
    got = at.run(SUBJECT, parameters)
    assert got.shape == want.shape and relative_error(got, want) < tolerance["float32"]
    model = at.model(SUBJECT, parameters)
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}
    (made,) = [n for n in model.graph.node if n.op_type == "BlockSparseAttention"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    arrays = {n: stored[made.input[3 + i]] for i, n in enumerate(("rows", "columns", "kinds", "masks"))}
    rest = Rest.of(size, geometry)
    said = counts_of((tokens, rest.keys + tokens), 64, **arrays, counts=stored[made.input[-1]])[0]
    assert not said[..., rest.means : rest.keys].any()  # what fills a block of means up
    said = np.delete(said, np.s_[rest.means : rest.keys], axis=2)
    np.testing.assert_array_equal(np.broadcast_to(said, visible.shape), visible)


def test_half(case, tolerance) -> None:
    at = case(queries=200, static=True, causal=True, dtype="float16", softmax_dtype="float32", head_dim=16)
    geometry = BlockGeometry(200, 64, True)
    patterns = [BlockPattern(t) for t in ("dense", "sinks 0 window 0 rest 16", "sinks 0 window 1", "columns 2 rest 16")]
    parameters = SUBJECT.head_parameters(geometry, patterns)
    visible, size = counted(patterns, geometry)
    given = at.tensors()
    joined = {"q": given["q"], **{n: with_means(given[n], geometry, size) for n in "kv"}}
    want = reference(**joined, visible=visible, scale=at.scale)
    assert relative_error(at.run(SUBJECT, parameters).astype(np.float64), want) < tolerance["float16"]


@pytest.mark.parametrize("causal", [False, True])
def test_means_of_one_key_are_dense_attention(causal, case, tolerance) -> None:
    at = case(queries=256, static=True, causal=causal)
    geometry = BlockGeometry(256, 64, causal)
    one = SUBJECT.head_parameters(geometry, [BlockPattern("sinks 0 window 0 rest 1")] * 4)
    want = at.run(SUBJECT, SUBJECT.head_parameters(geometry, [BlockPattern("dense")] * 4))
    assert relative_error(at.run(SUBJECT, one), want.astype(np.float64)) < tolerance["float32"]


def test_in_another_order_of_the_tokens(case, tolerance) -> None:
    """The means are of keys that follow one another in the head's order."""
    grid = TokenGrid((8, 32))

    class Gridded(case):  # type: ignore[misc]
        def site(self, **changes: Any) -> AttentionSite:
            return super().site(**{"grid": grid, **changes})

    at = Gridded(queries=256, static=True)
    geometry = BlockGeometry(256, 64, False, grid)
    texts = ["order 1,0 sinks 0 window 0 rest 16", "sinks 0 window 0 rest 16", "dense", "order 1,0 sinks 1 window 0"]
    patterns = [BlockPattern(t) for t in texts]
    given = at.tensors()
    want = np.zeros((*given["q"].shape[:3], given["v"].shape[3]))
    group = given["q"].shape[2] // given["k"].shape[2]
    for h, pattern in enumerate(patterns):
        places = pattern.places(geometry)
        q = given["q"][:, places, h : h + 1]
        k, v = (given[n][:, places, h // group : h // group + 1] for n in "kv")
        usual = [
            BlockPattern(pattern.listed.removeprefix("order 1,0 ") + (f" rest {pattern.rest}" if pattern.rest else ""))
        ]
        if pattern.rest:
            visible, size = counted(usual, geometry)
            k, v = (with_means(x, geometry, size) for x in (k, v))
        else:
            visible = np.repeat(np.repeat(usual[0].blocks(geometry), 64, 0), 64, 1)[None]
        want[:, places, h : h + 1] = reference(q, k, v, visible, "zero", scale=at.scale)
    got = at.run(SUBJECT, SUBJECT.head_parameters(geometry, patterns))
    assert relative_error(got, want) < tolerance["float32"]


def test_what_is_counted(case) -> None:
    """Density and cost count the means of all whole blocks for every row."""
    geometry = BlockGeometry(64 * 8, 64, False)
    pattern = BlockPattern("sinks 0 window 0 rest 16")
    assert pattern.computed(geometry) == 8 + 8 * 8 / 16 and density([pattern], geometry) == 12 / 64
    at = case(queries=geometry.tokens, static=True)
    said = SUBJECT.supports(at.site(), SUBJECT.head_parameters(geometry, [pattern, BlockPattern("dense")] * 2))
    assert said.ok and said.reason == "59.4% of the blocks", "a mean of 18.75% and 100%"
    plain, with_rest = (
        SUBJECT.cost(at.site(), SUBJECT.head_parameters(geometry, [BlockPattern(t)] * 4), Shape(1, 512, 512))
        for t in ("sinks 0 window 0", pattern.text)
    )
    assert with_rest.elements == pytest.approx(1.5 * plain.elements) and with_rest.flops > plain.flops


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["sinks 0 window 0 rest 16", "sinks 0 window 0 rest 32"], "means of 16 and 32 keys"),
        (["sinks 0 window 0 rest 48", "dense"], "does not divide a block of 64"),
        (["sinks 0 window 0 rest 16", "mean"], "averages all values beside heads with means"),
        (["dense rest 16", "dense"], "dense has no blocks to go with a rest"),
        (["sinks 0 window 0 rest 0", "dense"], "a mean of no keys"),
        (["rest 16", "dense"], "no pattern of a head"),
    ],
)
def test_refused(texts, told, case) -> None:
    at = case(queries=256, static=True, heads=2, kv_heads=2)
    found = SUBJECT.supports(at.site(), {"masked_rows": "zero", "edge": 64, "heads": texts})
    assert not found.ok and told in found.reason


def test_not_beside_padding(case) -> None:
    shown = np.ones((2, 1, 1, 256), bool)
    at = case(batch=2, queries=256, static=True, heads=2, kv_heads=2, key_mask=shown)
    site = at.site()
    assert any(isinstance(p, MaskPart) and p.kind == "padding" for p in site.mask.parts)
    found = SUBJECT.supports(site, {"masked_rows": "zero", "edge": 64, "heads": ["sinks 0 window 0 rest 16"] * 2})
    assert not found.ok and "beside padding" in found.reason


def test_large_masks_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(head_lists, "LARGEST_MASKS", 4096)
    geometry = BlockGeometry(64 * 24, 64, False)
    seen = np.random.default_rng(0).random((2, 24, 24)) < 0.5
    seen[:, range(24), range(24)] = True
    averaged = geometry.averaged & ~seen
    with pytest.raises(Unsupported, match="masks of means"):
        head_lists.lists_of(seen, geometry, averaged, Rest.of(16, geometry))


@pytest.mark.parametrize("wrong", ["counts", "masks", "columns"])
def test_a_planted_bug_of_the_lists_is_seen(wrong) -> None:
    """The comparison of lists and definition above would show each of these."""
    geometry = BlockGeometry(333, 64, True)
    patterns = [BlockPattern("columns 1 rest 8"), BlockPattern("sinks 0 window 0 rest 8")]
    rest = Rest(8, 5, 64)
    seen, averaged = (np.stack([getattr(p, what)(geometry) for p in patterns]) for what in ("blocks", "averaged"))
    right = head_lists.lists_of(seen, geometry, averaged, rest)
    visible, _ = counted(patterns, geometry)

    def shown(said: Lists) -> np.ndarray:
        arrays = said.arrays()
        out = counts_of((333, rest.keys + 333), 64, **arrays)[0]
        return np.delete(out, np.s_[rest.means : rest.keys], axis=2)

    np.testing.assert_array_equal(shown(right), visible)
    array = right.arrays()[wrong].copy()
    if wrong == "masks":
        array[2] ^= 2
    elif wrong == "counts":
        array[array == 8] = 7
    else:
        array[array == array.max()] -= 1
    assert (shown(replace(right, **{wrong: array})) != visible).any()


def test_bitmaps(case, tolerance) -> None:
    """Rows of many lengths, some of which leave nothing out."""
    geometry = BlockGeometry(64 * 9 - 31, 64, False)
    rng = np.random.default_rng(5)
    seen = rng.random((4, 9, 9)) < rng.random((4, 9, 1))
    seen[:, range(9), range(9)] = True
    seen[:, 3] = True
    patterns = [BlockPattern(bitmap(s).text + " rest 16") for s in seen]
    at = case(queries=geometry.tokens, static=True, layouts=("BNHD",) * 4)
    visible, size = counted(patterns, geometry)
    given = at.tensors()
    joined = {"q": given["q"], **{n: with_means(given[n], geometry, size) for n in "kv"}}
    want = reference(**joined, visible=visible, scale=at.scale)
    assert relative_error(at.run(SUBJECT, SUBJECT.head_parameters(geometry, patterns)), want) < tolerance["float32"]
