"""Stored masks that differ between heads: recognised element by element, replaced, and never taken for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from attncompile import pipeline
from attncompile.core.head_pattern import HeadMasks
from attncompile.core.site import AttentionSite
from attncompile.pipeline import Options
from tests.passes.attention_graphs import Builder, save
from tests.passes.mask_graphs import attention, site_of


def stored(masks: np.ndarray, form: str, heads: int, batch: int = 2) -> AttentionSite:
    """The site whose mask has the axes of ``masks``, [heads, N, N] or [batch or 1, heads, N, N]."""
    b = Builder()

    def apply(scores: str) -> str:
        if form == "where":
            return b.op("Where", b.const(masks), scores, b.const(np.array(-np.inf, np.float32)))
        return b.op("Add", scores, b.const(np.where(masks, np.float32(0), np.float32(-1e9))))

    queries, keys = masks.shape[-2:]
    return site_of(b, apply, heads, queries, None if queries == keys else keys, batch)


def random_masks(seed: int) -> np.ndarray:
    """[heads, queries, keys] of bands, blocks and noise; every query sees a key."""
    rng = np.random.default_rng(seed)
    heads, queries = int(rng.integers(2, 6)), int(rng.integers(5, 60))
    keys = queries if seed % 2 else int(rng.integers(queries, 70))
    i, j = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
    out = []
    for h in range(heads):
        kind = (seed + h) % 4
        seen = [abs(i - j) <= h + 1, (i // 4 == j // 4) | (j < h), rng.random((queries, keys)) < 0.3, i >= j][kind]
        out.append(seen | (i == j))
    return np.stack(out)


@pytest.mark.parametrize("form", ["where", "add"])
@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_a_mask_for_each_head(seed: int, axes: int, form: str) -> None:
    masks = random_masks(seed)
    site = stored(masks[None] if axes == 4 else masks, form, len(masks))
    (part,) = site.mask.parts
    assert isinstance(part.pattern, HeadMasks) and site.mask.kind == "block_sparse" and site.mask.by_head
    np.testing.assert_array_equal(part.pattern.visible(*masks.shape[1:]), masks)
    assert part.certificate.method == "constant" and not part.certificate.general
    assert site.mask.masked_rows == ("nan" if form == "where" else "uniform")
    assert part.parameters()["heads"] == len(masks)


def test_one_element_of_one_head() -> None:
    """Equal masks are one structure; with one element flipped in one head they are masks of the heads."""
    window = abs(np.arange(31)[:, None] - np.arange(31)) <= 3
    masks = np.broadcast_to(window, (3, 31, 31)).copy()
    assert stored(masks[None], "where", 3).mask.kind == "window"
    masks[1, 20, 4] = True
    site = stored(masks[None], "where", 3)
    (part,) = site.mask.parts
    assert isinstance(part.pattern, HeadMasks) and len(part.pattern.patterns) == 2
    np.testing.assert_array_equal(part.pattern.visible(31, 31), masks)


def test_batch_entries_that_differ_stay_opaque() -> None:
    masks = np.stack([random_masks(1), ~random_masks(1) | np.eye(random_masks(1).shape[1], dtype=bool)])
    site = stored(masks, "where", masks.shape[1])
    assert [p.kind for p in site.mask.parts] == ["opaque"]


def blocks(heads: int, tokens: int) -> np.ndarray:
    """Documents of other lengths in each head."""
    i = np.arange(tokens)
    return np.stack([(i * (5 + h) // tokens)[:, None] == (i * (5 + h) // tokens)[None] for h in range(heads)])


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_replaced_and_proved(padded: bool, tmp_path: Path) -> None:
    b, masks = Builder(), blocks(4, 449)

    def apply(scores: str) -> str:
        mask = b.const(masks[None])
        if padded:
            mask = b.op("And", mask, "keys")
        return b.op("Where", mask, scores, b.const(np.array(-np.inf, np.float32)))

    out = attention(b, apply, 4, 449)
    inputs = [helper.make_tensor_value_info("x", 1, [2, 449, 16])]
    feed = {"x": np.random.default_rng(0).standard_normal((2, 449, 16)).astype(np.float32)}
    if padded:
        inputs.append(helper.make_tensor_value_info("keys", onnx.TensorProto.BOOL, [2, 1, 1, 449]))
        feed["keys"] = np.arange(449)[None, None, None] % 100 > np.array([3, 11])[:, None, None, None]
    graph = helper.make_graph(b.nodes, "g", inputs, [helper.make_tensor_value_info(out, 1, [None] * 4)], b.stored)
    path = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path)
    result = pipeline.compile(path, Options(target="onnx", out=tmp_path / "out", keep_slower=True))
    (site,) = result.sites
    assert result.outcome == "replaced" and site.decision.mechanism == "BlockSparseAttention"
    assert site.exactness is not None and site.exactness.passed and site.exactness.cases >= (12 if padded else 8)
    ours, theirs = (ort.InferenceSession(str(p)).run(None, feed)[0] for p in (tmp_path / "out" / "model.onnx", path))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.isfinite(ours).all()


def test_a_dense_mask_for_each_head_is_kept(tmp_path: Path) -> None:
    b, masks = Builder(), np.random.default_rng(0).random((4, 449, 449)) < 0.5

    def apply(scores: str) -> str:
        return b.op("Where", b.const(masks[None]), scores, b.const(np.array(-np.inf, np.float32)))

    out = attention(b, apply, 4, 449)
    inputs = [helper.make_tensor_value_info("x", 1, [2, 449, 16])]
    graph = helper.make_graph(b.nodes, "g", inputs, [helper.make_tensor_value_info(out, 1, [None] * 4)], b.stored)
    path = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path)
    result = pipeline.compile(path, Options(target="onnx", out=tmp_path / "out"))
    (site,) = result.sites
    assert result.outcome == "unchanged" and site.decision.mechanism == "keep"
    assert "50.0% of the keys are seen" in site.decision.reason
