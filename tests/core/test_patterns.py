"""Patterns against plain definitions, one query and key at a time, written here and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked, Radial, ShiftedWindows
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.pattern import BlockSparse, GridWindow


def natten(q: int, k: int, size: int, kernel: int, dilation: int, stride: int, causal: bool) -> bool:
    """One axis of NATTEN's neighborhood: windows by walking over the tokens of the query's dilation group."""
    group = [x for x in range(size) if x % dilation == q % dilation]
    if k not in group:
        return False
    at, length = group.index(q), len(group)
    mates = [x for x in range(length) if x // stride == at // stride]
    if causal:
        return group[max(0, mates[-1] - kernel + 1)] <= k <= q
    leader = min(at // stride * stride + stride // 2, length - 1)
    start = min(max(leader - kernel // 2, 0), length - kernel)
    return k in group[start : start + kernel]


@pytest.mark.parametrize("border", ["clamp", "truncate", "circular"])
@pytest.mark.parametrize("shape", ["box", "ball"])
def test_what_neighbours_meet_together(border, shape) -> None:
    """The union over queries that follow one another, prefix and suffix tokens among them, against their rows."""
    rng = np.random.default_rng(0)
    partial = 0
    for _ in range(25):
        made = random_window(rng, border)
        prefix, suffix = (int(n) for n in rng.integers(0, 4, 2))
        window = replace(made, grid=replace(made.grid, prefix=prefix, suffix=suffix), shape=shape)
        n = window.grid.tokens
        rows = window.visible(n, n)
        for _ in range(6):
            first = int(rng.integers(0, n))
            stop = int(rng.integers(first + 1, min(first + 30, n) + 1))
            want = rows[first:stop].any(axis=0)
            np.testing.assert_array_equal(window.met(first, stop), want, str((window, first, stop)))
            partial += not want.all()
    assert partial > 30
    with pytest.raises(ValueError, match="does not fit"):
        GridWindow(TokenGrid((3, 7)), (3, 3), (2, 1), (1, 1), (False, False)).met(0, 4)


def random_window(rng: np.random.Generator, border: Literal["clamp", "truncate", "circular"]) -> GridWindow:
    rank = int(rng.integers(1, 4))
    size = [int(rng.integers(2, (30, 9, 5)[rank - 1])) for _ in range(rank)]
    dilation = [int(rng.integers(1, max(2, s // 2))) for s in size]
    kernel = [int(rng.integers(1, s // d + 1)) for s, d in zip(size, dilation, strict=True)]
    stride = [int(rng.integers(1, k + 1)) for k in kernel]
    causal = [border != "circular" and bool(rng.random() < 0.3) for _ in size]
    return GridWindow(TokenGrid(tuple(size)), tuple(kernel), tuple(dilation), tuple(stride), tuple(causal), border)


@pytest.mark.parametrize("seed", range(40))
def test_clamped_neighborhoods_are_natten(seed: int) -> None:
    w = random_window(np.random.default_rng(seed), "clamp")
    n = w.grid.tokens
    where = np.array(np.unravel_index(np.arange(n), w.grid.shape)).T
    truth = [
        [all(natten(int(a), int(b), *rest) for a, b, *rest in zip(
            q, k, w.grid.shape, w.kernel_size, w.dilation, w.stride, w.causal, strict=True)) for k in where]
        for q in where
    ]  # fmt: skip
    np.testing.assert_array_equal(w.visible(n, n), np.array(truth))


@pytest.mark.parametrize("seed", range(20))
def test_truncated_neighborhoods_are_the_whole_plane_cut(seed: int) -> None:
    """A window on a grid with a wide margin around it, where nothing is moved or cut, seen through the grid."""
    w = random_window(np.random.default_rng(seed), "truncate")
    if any(w.causal) or max(w.stride) > 1:
        w = GridWindow(w.grid, w.kernel_size, w.dilation, (1,) * len(w.stride), (False,) * len(w.stride), "truncate")
    n = w.grid.tokens
    where = np.array(np.unravel_index(np.arange(n), w.grid.shape)).T
    steps = [range(-(k // 2) * d, (k - 1 - k // 2) * d + 1, d) for k, d in zip(w.kernel_size, w.dilation, strict=True)]
    truth = [[all(b - a in step for a, b, step in zip(q, k, steps, strict=True)) for k in where] for q in where]
    np.testing.assert_array_equal(w.visible(n, n), np.array(truth))


@pytest.mark.parametrize("seed", range(20))
def test_circular_neighborhoods_wrap(seed: int) -> None:
    w = random_window(np.random.default_rng(seed), "circular")
    w = GridWindow(w.grid, w.kernel_size, w.dilation, (1,) * len(w.stride), w.causal, "circular")
    n = w.grid.tokens
    where = np.array(np.unravel_index(np.arange(n), w.grid.shape)).T
    truth = np.zeros((n, n), dtype=bool)
    offsets = [np.arange(-(k // 2), k - k // 2) * d for k, d in zip(w.kernel_size, w.dilation, strict=True)]
    for i, q in enumerate(where):
        for offset in np.stack(np.meshgrid(*offsets), -1).reshape(-1, len(q)):
            truth[i, np.ravel_multi_index(tuple((q + offset) % np.array(w.grid.shape)), w.grid.shape)] = True
    np.testing.assert_array_equal(w.visible(n, n), truth)


def test_a_ball_is_round() -> None:
    ball = GridWindow(TokenGrid((9, 9)), (7, 5), (1, 1), (1, 1), (False, False), "truncate", "ball")
    truth = [
        [((i // 9 - j // 9) / 3) ** 2 + ((i % 9 - j % 9) / 2) ** 2 <= 1 + 1e-9 for j in range(81)] for i in range(81)
    ]
    np.testing.assert_array_equal(ball.visible(81, 81), np.array(truth))


def test_prefix_and_suffix_tokens_see_and_are_seen_by_all() -> None:
    ones = (1, 1)
    plain = GridWindow(TokenGrid((4, 5)), (3, 3), ones, ones, (False, False))
    more = GridWindow(TokenGrid((4, 5), 2, 1), (3, 3), ones, ones, (False, False))
    seen = more.visible(23, 23)
    np.testing.assert_array_equal(seen[2:22, 2:22], plain.visible(20, 20))
    assert seen[:2].all() and seen[22:].all() and seen[:, :2].all() and seen[:, 22:].all()
    rows = np.array([0, 7, 22, 3])
    np.testing.assert_array_equal(more.rows(rows, 23, 23), seen[rows])


@pytest.mark.parametrize(
    "pattern, reason",
    [
        (GridWindow(TokenGrid((4, 5)), (3, 3), (1, 1), (1, 1), (False, False)), "20 tokens"),
        (GridWindow(TokenGrid((3, 7)), (3, 3), (2, 1), (1, 1), (False, False)), "does not fit"),
        (GridWindow(TokenGrid((3, 7)), (3,), (1, 1), (1, 1), (False, False)), "an axis"),
        (GridWindow(TokenGrid((3, 7)), (3, 3), (1, 1), (1, 1), (True, False), "circular"), "wraps"),
        (Blocked((4,), (1,), cyclic=True), "wrap"),
        (ShiftedWindows((2,), (4,), (2,)), "differs between windows"),
        (Radial(4, 5, 5), "4 frames"),
        (BlockSparse.of(np.eye(20, dtype=bool), 4), "20x20"),
    ],
)
def test_no_meaning_at_these_lengths(pattern: GridWindow, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pattern.visible(21, 21)


def test_swins_windows_after_rolling_back() -> None:
    """Shifted windows, one mask a window of the rolled grid, are blocked windows of the grid itself."""
    (rows, columns), (high, wide), (down, right) = (12, 15), (4, 5), (1, 2)
    blocked = Blocked((high, wide), (down, right), TokenGrid((rows, columns))).visible(180, 180)
    windows = ShiftedWindows((3, 3), (high, wide), (down, right)).visible_windows()
    token = np.roll(np.arange(180).reshape(rows, columns), (-down, -right), (0, 1))
    cut = token.reshape(3, high, 3, wide).transpose(0, 2, 1, 3).reshape(9, high * wide)
    truth = np.zeros((180, 180), dtype=bool)
    for tokens, seen in zip(cut, windows, strict=True):
        truth[np.ix_(tokens, tokens)] = seen
    np.testing.assert_array_equal(blocked, truth)


def test_radial_is_the_papers_formula() -> None:
    frames, tokens = 9, 6
    n = frames * tokens
    truth = np.zeros((n, n), dtype=bool)
    for q in range(n):
        for k in range(n):
            far, apart = abs(q // tokens - k // tokens), abs(q % tokens - k % tokens)
            g = 2 ** int(np.floor(np.log2(max(far, 1))))
            near = g <= tokens and apart + 1 <= tokens / g
            truth[q, k] = near or (far % int(np.ceil(g / tokens)) == 0 and apart == 0) or k < tokens
    np.testing.assert_array_equal(Radial(frames, tokens, tokens, sink=1).visible(n, n), truth)


def test_block_sparse_holds_every_bit() -> None:
    seen = np.random.default_rng(0).random((37, 53)) < 0.2
    held = BlockSparse.of(seen, 16)
    np.testing.assert_array_equal(held.visible(37, 53), seen)
    np.testing.assert_array_equal(held.rows(np.array([5, 0]), 37, 53), seen[[5, 0]])


def test_the_structure_that_says_most_names_the_mask() -> None:
    how = Certificate("constant", "")
    window = GridWindow(TokenGrid((4, 5)), (3, 3), (1, 1), (1, 1), (False, False))
    parts = (
        MaskPart("bias", how, source="b", additive=True), MaskPart("padding", how, source="p"),
        MaskPart("causal", how, -1, 0), MaskPart("neighborhood", how, pattern=window),
    )  # fmt: skip
    facts = MaskFacts(parts)
    assert facts.kind == "neighborhood" and facts.part("causal") is parts[2]
    shown = facts.to_json()
    assert shown["kernel_size"] == [3, 3] and shown["grid"]["shape"] == [4, 5] and len(shown["parts"]) == 4
    assert [MaskFacts(parts[:n]).kind for n in (1, 2, 3)] == ["bias", "padding", "causal"]
    assert MaskFacts((*parts, MaskPart("opaque", how, source="o"))).kind == "opaque"
