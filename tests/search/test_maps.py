"""Errors and weights of blocks against attention written out pair by pair in float64."""

from __future__ import annotations

import numpy as np
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.grid import TokenGrid
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


@pytest.fixture(params=["plain", "causal", "padded", "causal padded", "projected"])
def made(request) -> tuple[maps.Operands, BlockGeometry]:
    rng = np.random.default_rng(3)
    tokens, heads, kv_heads, dim, value_dim = 147, 4, 2, 8, 6
    geometry = BlockGeometry(tokens, 32, "causal" in request.param)
    shown = None
    if "padded" in request.param:  # causal: the first 40 queries, a block and more, see nothing
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
    texts.append("skip")
    if not geometry.causal and operands.open is None:
        texts.append("mean")
    averaged = [k for k, text in enumerate(texts) if text == "mean"]
    choices = np.stack([BlockPattern(t).blocks(geometry) for t in texts])
    for head in range(operands.heads):
        dense, weights = attention(operands, head, pairs(geometry.all, geometry, operands))
        found = maps.score(operands, geometry, head, choices, range(geometry.count), averaged)
        assert found.size == pytest.approx(np.square(dense).sum(), rel=1e-5)
        for k, text in enumerate(texts):
            visible = pairs(choices[k], geometry, operands)
            want, _ = attention(operands, head, visible)
            if text == "skip":
                want = np.zeros_like(want)
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
    assert found[0].text == "dense" and found[1].text == ("skip" if causal else "mean")
    assert [p.text for p in candidates(mass, geometry, False)][1] == "skip"
    blocks = [p.blocks(geometry) for p in found]
    assert len({b.tobytes() for b in blocks}) == len(blocks), "patterns are offered once"
    sizes = [int(b.sum()) for b in blocks[1:]]
    assert sizes == sorted(sizes)
    assert {p.kind for p in found} >= {"streaming", "slash", "blocks"}
    offered = {b.tobytes() for b in blocks}
    own = np.eye(12, dtype=bool)
    # Of all sets of blocks with the diagonal, the offered ones hold each share with the fewest.
    rest = np.sort(mass[geometry.all & ~own])[::-1]
    held = (np.trace(mass) + np.concatenate([[0], np.cumsum(rest)])) / 12
    fewest = {12 + int(np.argmax(held >= level)) for level in KEPT}
    chosen = [b for p, b in zip(found, blocks, strict=True) if p.kind == "blocks"]
    simple = {int(b.sum()) for p, b in zip(found, blocks, strict=True) if p.kind != "blocks"}
    assert {int(b.sum()) for b in chosen} <= fewest <= {int(b.sum()) for b in chosen} | simple
    for b in chosen:
        assert np.where(b | ~geometry.all, 0, mass).max() <= np.where(b & ~own, mass, np.inf).min() + 1e-12
    # Columns and diagonals: the first set that the greedy rule comes to which holds a share, and no fewer lines do.
    for level in KEPT:
        seen = own.copy()
        lines = [geometry.all & (np.arange(12) == c)[None, :] for c in range(12)]
        lines += [geometry.all & (np.subtract.outer(np.arange(12), np.arange(12)) == d) for d in range(-11, 12)]
        while (mass * seen).sum() / 12 < level:
            gains = [(mass * (line & ~seen)).sum() / max((line & ~seen).sum(), 1) for line in lines]
            seen |= lines[int(np.argmax(gains))]
        assert seen.tobytes() in offered, level


def test_candidates_on_a_grid_are_neighborhoods_of_it() -> None:
    """Those that fit, each side a share of the grid's; under a triangle, on a line, none."""
    tokens = 16 * 24
    grid = TokenGrid((16, 24))
    mass = np.full((12, 12), 1 / 12)
    texts = {
        causal: [p.text for p in candidates(mass, BlockGeometry(tokens, 32, causal, grid), False)]
        for causal in (False, True)
    }
    assert not any(t.startswith("grid") for t in texts[True])
    kernels = [tuple(map(int, t[5:].split("x"))) for t in texts[False] if t.startswith("grid")]
    assert (5, 7) in kernels and all(h % 2 == w % 2 == 1 and h <= 16 and w <= 24 for h, w in kernels)
    assert "mean" not in texts[False] and texts[False][1] == "skip"
    line = BlockGeometry(tokens, 32, False, TokenGrid((tokens,)))
    assert not any(p.text.startswith("grid") for p in candidates(mass, line, False))


def with_means(
    operands: maps.Operands, geometry: BlockGeometry, head: int, seen: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Output [N, Dv] pair by pair where blocks that are left out are met by means of ``size`` keys, and the share of
    the dense weight that the others hold, by query.
    """
    group = operands.heads // operands.key.shape[0]
    query, key, value = (x.astype(np.float64) for x in (operands.query[head], operands.key[head // group],
                                                        operands.value[head // group]))  # fmt: skip
    out = np.zeros((len(query), value.shape[1]))
    held = np.zeros(len(query))
    for i in range(len(query)):
        weight, total, every = np.zeros(value.shape[1]), 0.0, 0.0
        for c in range(geometry.count):
            keys = np.arange(c * geometry.edge, min((c + 1) * geometry.edge, geometry.tokens))
            keys = keys[keys <= i] if geometry.causal else keys
            w = np.exp(key[keys] @ query[i] * operands.scale)
            every += w.sum()
            if seen[i // geometry.edge, c]:
                weight, total = weight + w @ value[keys], total + w.sum()
                held[i] += w.sum()
            elif len(keys) == geometry.edge and (not geometry.causal or c < i // geometry.edge):
                of = keys.reshape(-1, size)
                w = size * np.exp(key[of].mean(axis=1) @ query[i] * operands.scale)
                weight, total = weight + w @ value[of].mean(axis=1), total + w.sum()
        out[i] = weight / total
        held[i] /= every
    return (out if operands.weights is None else out @ operands.weights[head]), held


@pytest.mark.parametrize("made", ["plain", "causal", "projected"], indirect=True)
def test_scores_of_means_of_what_is_left_out(made) -> None:
    operands, geometry = made
    texts = ["sinks 0 window 0", "sinks 0 window 0 rest 8", "columns 1 rest 32", "sinks 1 window 1 rest 8", "dense"]
    patterns = [BlockPattern(t) for t in texts]
    choices = np.stack([p.blocks(geometry) for p in patterns])
    for head in range(operands.heads):
        dense, _ = attention(operands, head, pairs(geometry.all, geometry, operands))
        got = maps.score(operands, geometry, head, choices, range(geometry.count), rests=[p.rest for p in patterns])
        plain = maps.score(operands, geometry, head, choices, range(geometry.count))
        np.testing.assert_array_equal(got.kept, plain.kept)
        np.testing.assert_allclose(got.error[[0, 4]], plain.error[[0, 4]])
        assert got.size == pytest.approx(np.square(dense).sum(), rel=1e-5), "what errors are relative to is the same"
        for k in (1, 2, 3):
            out, held = with_means(operands, geometry, head, choices[k], patterns[k].rest)
            assert got.error[k] == pytest.approx(np.square(out - dense).sum(), rel=1e-4)
            assert got.kept[k] == pytest.approx(held.mean(), rel=1e-5)
        assert got.error[1] != pytest.approx(plain.error[1], rel=0.05)
