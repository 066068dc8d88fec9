"""Errors and weights of blocks against attention written out pair by pair in float64."""

from __future__ import annotations

import numpy as np
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.search import maps
from attncompile.search.candidates import KEPT, candidates


def attention(operands: maps.Operands, head: int, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output [N, Dv] and weights [N, N], queries that see nothing zero."""
    group = operands.heads // operands.key.shape[0]
    query, key, value = (x.astype(np.float64) for x in (operands.query[head], operands.key[head // group],
                                                        operands.value[head // group]))  # fmt: skip
    scores = np.where(visible, query @ key.T * operands.scale, -np.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    out = weights @ value
    return (out if operands.weights is None else out @ operands.weights[head]), weights


def pairs(seen: np.ndarray, geometry: BlockGeometry, operands: maps.Operands) -> np.ndarray:
    token = np.arange(geometry.tokens)
    visible = seen[token[:, None] // geometry.edge, token[None, :] // geometry.edge].copy()
    if geometry.causal:
        visible &= token[None, :] <= token[:, None]
    return visible if operands.open is None else visible & operands.open[None, :]


@pytest.fixture(params=["plain", "causal", "padded", "projected"])
def made(request) -> tuple[maps.Operands, BlockGeometry]:
    rng = np.random.default_rng(3)
    tokens, heads, kv_heads, dim, value_dim = 147, 4, 2, 8, 6
    geometry = BlockGeometry(tokens, 32, request.param == "causal")
    shown = None
    if request.param == "padded":
        shown = np.arange(tokens) < 90
        shown[:40] = False
    weights = rng.standard_normal((heads, value_dim, value_dim)) if request.param == "projected" else None
    return maps.Operands(
        *(rng.standard_normal((n, tokens, d)).astype(np.float32) for n, d in ((heads, dim), (kv_heads, dim),
                                                                              (kv_heads, value_dim))),
        0.6, shown, None if weights is None else weights.astype(np.float32),
    ), geometry  # fmt: skip


def test_masses(made) -> None:
    operands, geometry = made
    for head in range(operands.heads):
        _, weights = attention(operands, head, pairs(geometry.all, geometry, operands))
        padded = np.zeros((160, 160))
        padded[:147, :147] = weights
        sums = padded.reshape(5, 32, 5, 32).sum(axis=(1, 3))
        rows = np.array([32, 32, 32, 32, 19])
        np.testing.assert_allclose(maps.masses(operands, geometry, head), sums / rows[:, None], atol=2e-6)


def test_scores(made) -> None:
    operands, geometry = made
    texts = ["dense", "sinks 1 window 0", "columns 3 diagonals 1,-1", "sinks 0 window 0", "sinks 0 window 2"]
    if not geometry.causal and operands.open is None:
        texts.append("mean")
    choices = np.stack([BlockPattern(t).blocks(geometry) for t in texts])
    for head in range(operands.heads):
        dense, weights = attention(operands, head, pairs(geometry.all, geometry, operands))
        found = maps.score(operands, geometry, head, choices, range(geometry.count))
        assert found.size == pytest.approx(np.square(dense).sum(), rel=1e-5)
        for k, text in enumerate(texts):
            visible = pairs(choices[k], geometry, operands)
            want, _ = attention(operands, head, visible)
            if text == "mean":
                mean = operands.value[head // 2].astype(np.float64).mean(axis=0)
                mean = mean if operands.weights is None else mean @ operands.weights[head]
                want = np.broadcast_to(mean, want.shape)
            assert found.error[k] == pytest.approx(np.square(want - dense).sum(), rel=1e-4, abs=1e-8 * found.size), text
            kept = (weights * visible).sum() / weights.sum()
            assert found.kept[k] == pytest.approx(kept, abs=1e-5)


def test_some_rows_alone(made) -> None:
    operands, geometry = made
    choices = BlockPattern("sinks 1 window 0").blocks(geometry)[None]
    parts = [maps.score(operands, geometry, 1, choices, [r]) for r in range(5)]
    whole = maps.score(operands, geometry, 1, choices, range(5))
    assert sum(p.error[0] for p in parts) == pytest.approx(whole.error[0]) and whole.error[0] > 0
    assert sum(p.size for p in parts) == pytest.approx(whole.size)


@pytest.mark.parametrize("causal", [False, True])
def test_candidates_hold_what_they_promise(causal) -> None:
    geometry = BlockGeometry(32 * 12 - 3, 32, causal)
    rng = np.random.default_rng(0)
    mass = np.where(geometry.all, rng.random((12, 12)) ** 8, 0)
    mass[:, 2] += 5 * geometry.all[:, 2]
    mass /= mass.sum(axis=1, keepdims=True)
    found = candidates(mass, geometry, True)
    assert found[0].text == "dense" and (found[1].text == "mean") == (not causal)
    blocks = [p.blocks(geometry) for p in found]
    assert len({b.tobytes() for b in blocks}) == len(blocks), "patterns are offered once"
    sizes = [int(b.sum()) for b in blocks[1:]]
    assert sizes == sorted(sizes)
    assert {p.kind for p in found} >= {"streaming", "slash", "blocks"}
    for kind in ("slash", "blocks"):
        kept = [float((mass * b).sum() / 12) for p, b in zip(found, blocks, strict=True) if p.kind == kind]
        assert all(any(abs(k - level) < 0.12 and k >= level - 1e-9 for level in KEPT) for k in kept)
    # Of all sets of blocks with the diagonal, the chosen ones hold a share with the fewest.
    for p, b in zip(found, blocks, strict=True):
        if p.kind == "blocks":
            out = np.where(b | ~geometry.all, 0, mass)
            chosen = np.where(b & ~np.eye(12, dtype=bool), mass, np.inf)
            assert out.max() <= chosen.min() + 1e-12
