"""Patterns of blocks: their texts, and what they mean, against sentences about single blocks."""

from __future__ import annotations

import base64
import zlib
from dataclasses import replace

import numpy as np
import pytest

from attncompile.core.block_pattern import (
    DENSE,
    MEAN,
    SKIP,
    BlockGeometry,
    BlockPattern,
    bitmap,
    density,
    ordered,
    slash,
    streaming,
)
from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.pattern import GridWindow

PLAIN = BlockGeometry(7 * 32 - 5, 32, False)
CAUSAL = BlockGeometry(7 * 32 - 5, 32, True)


@pytest.mark.parametrize("geometry", [PLAIN, CAUSAL])
def test_what_each_text_means(geometry) -> None:
    texts = {
        "dense": lambda r, c: True,
        "sinks 2 window 1": lambda r, c: c < 2 or abs(r - c) <= 1,
        "sinks 0 window 0": lambda r, c: False,
        "columns 0,5 diagonals 2,-3": lambda r, c: c in (0, 5) or r - c in (2, -3),
        "columns 4": lambda r, c: c == 4,
        "diagonals 1": lambda r, c: r - c == 1,
    }
    for text, meant in texts.items():
        seen = BlockPattern(text).blocks(geometry)
        for r in range(7):
            for c in range(7):
                hidden = geometry.causal and c > r
                assert seen[r, c] == (not hidden and (r == c or meant(r, c))), (text, r, c)


def test_texts_round_trip() -> None:
    assert streaming(1, 4).text == "sinks 1 window 4" and streaming(1, 4).kind == "streaming"
    assert slash([3, 0, 3], [2]).text == "columns 0,3 diagonals 2" and slash([], [1]).text == "diagonals 1"
    seen = np.random.default_rng(0).random((7, 7)) < 0.4
    np.fill_diagonal(seen, True)
    made = BlockPattern(bitmap(seen).text)
    np.testing.assert_array_equal(made.blocks(PLAIN), seen)
    np.testing.assert_array_equal(made.blocks(CAUSAL), np.tril(seen))
    assert not MEAN.blocks(PLAIN).any() and DENSE.blocks(CAUSAL).sum() == 28
    assert density([DENSE, MEAN], PLAIN) == 0.5
    assert not SKIP.blocks(PLAIN).any() and not SKIP.blocks(CAUSAL).any()
    with pytest.raises(Unsupported, match="skip is the same in every order"):
        BlockPattern("order 1,0 skip")


def test_a_neighborhood_touches_blocks() -> None:
    grid = TokenGrid((11, 13), prefix=2)
    geometry = BlockGeometry(grid.tokens, 32, False, grid)
    pairs = GridWindow(grid, (5, 7), (1, 1), (1, 1), (False, False)).visible(145, 145)
    padded = np.zeros((160, 160), bool)
    padded[:145, :145] = pairs
    want = padded.reshape(5, 32, 5, 32).any(axis=(1, 3))
    assert not want.all()
    np.testing.assert_array_equal(BlockPattern("grid 5x7").blocks(geometry), want)


@pytest.mark.parametrize(
    ("grid", "kernel", "edge"),
    [
        (TokenGrid((9, 14), prefix=3, suffix=2), (5, 7), 16),
        (TokenGrid((12, 29)), (11, 15), 16),
        (TokenGrid((5, 9, 14), prefix=1), (3, 5, 9), 32),
        (TokenGrid((6, 7, 9)), (1, 5, 5), 8),
    ],
    ids=str,
)
def test_a_ball_touches_blocks(grid: TokenGrid, kernel: tuple[int, ...], edge: int) -> None:
    """Pair by pair, in whole numbers; never more than the box of the same sizes."""
    geometry = BlockGeometry(grid.tokens, edge, False, grid)
    inner = np.arange(np.prod(grid.shape))
    where = np.stack(np.unravel_index(inner, grid.shape), axis=1)
    away = np.abs(where[:, None] - where[None, :])
    radii = [max(size // 2, 1) for size in kernel]
    total = sum(away[..., axis] ** 2 * (np.prod(radii) ** 2 // r**2) for axis, r in enumerate(radii))
    pairs = np.ones((grid.tokens, grid.tokens), bool)
    here = slice(grid.prefix, grid.prefix + len(inner))
    pairs[here, here] = (total <= np.prod(radii) ** 2) & (away <= np.array(kernel) // 2).all(axis=2)
    want = np.eye(geometry.count, dtype=bool)
    block = np.arange(grid.tokens) // edge
    np.logical_or.at(want, (block[:, None], block[None, :]), pairs)
    size = "x".join(map(str, kernel))
    found = BlockPattern(f"ball {size}").blocks(geometry)
    np.testing.assert_array_equal(found, want)
    box = BlockPattern(f"grid {size}").blocks(geometry)
    assert (box | ~found).all() and found.sum() < box.sum() < geometry.all.sum()


def test_a_ball_is_around_a_token() -> None:
    for text in ("ball 4x5", "ball 5x5x2", "order 1,0 ball 3x2"):
        with pytest.raises(Unsupported, match="a ball is around a token") as refused:
            BlockPattern(text)
        assert refused.value.hint == "give odd diameters"
    assert BlockPattern("ball 3x5").kind == "ball" and BlockPattern("order 1,0 ball 3x5").order == (1, 0)


def test_balls_of_a_grid() -> None:
    """Round over height and width, however long the sides; frames are of their own."""
    assert TokenGrid((32, 32)).ball(0.5) == (17, 17) and TokenGrid((16, 64)).ball(0.5) == (17, 17)
    assert TokenGrid((27, 38)).ball(0.25) == (9, 9) and TokenGrid((5, 9, 14)).ball(1.0) == (5, 11, 11)
    assert TokenGrid((30, 30)).ball(1.0) == (31, 31) and TokenGrid((21, 30, 52)).ball(0.5) == (11, 19, 19)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ball",
        "ball 0x3",
        "ball 3x3x3x3",
        "ball 3.5",
        "sinks 1",
        "window 3",
        "columns",
        "grid",
        "grid 0x3",
        "blocks ***",
        "columns 1 diagonals",
        "Dense",
        " ",
        "columns 1 ",
    ],
)
def test_what_is_no_pattern(text) -> None:
    with pytest.raises(Unsupported, match="is no pattern"):
        BlockPattern(text)


@pytest.mark.parametrize(
    "text",
    ["sinks {} window 0", "sinks 0 window {}", "columns {}", "diagonals 1,-{}", "grid {}x3", "ball {}", "radial {}",
     "order {},0 columns 1", "order {}x2 columns 1", "sinks 0 window 0 rest {}"],
)  # fmt: skip
def test_numbers_without_end_are_no_pattern(text) -> None:
    """Longer ones than Python turns into a number, or NumPy holds, and digits of other scripts."""
    for number in ("9" * 5000, "1" + "0" * 10, "\u0661"):
        with pytest.raises(Unsupported, match="is no pattern"):
            BlockPattern(text.format(number)).blocks(PLAIN)


def test_more_than_there_is_means_all_of_it() -> None:
    grid = TokenGrid((6, 5, 10))
    geometry = BlockGeometry(grid.tokens, 64, False, grid)
    for text in ("radial 999999999", "radial 6", "sinks 999999999 window 0", "sinks 0 window 999999999",
                 "ball 999999999x999999999x999999999"):  # fmt: skip
        assert BlockPattern(text).blocks(geometry).all(), text


def test_bitmaps_that_are_damaged_or_of_other_sizes() -> None:
    """A short text may stand for gigabytes: no more of it is unpacked than shows that."""
    whole = zlib.compress(np.packbits(np.ones((7, 7), bool)).tobytes())
    assert BlockPattern("blocks " + base64.b64encode(whole).decode()).blocks(PLAIN).all()
    for data, told in (
        (whole[:-5], "cannot be read"), (whole[:-1], "cannot be read"), (b"", "cannot be read"),
        (whole[:-1] + b"?", "cannot be read"), (zlib.compress(bytes(6)), "other sizes"),
        (zlib.compress(bytes(8)), "other sizes"), (zlib.compress(bytes(10**7)), "other sizes"),
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=told if data else "no pattern|cannot be read"):
            BlockPattern("blocks " + base64.b64encode(data).decode()).blocks(PLAIN)


def test_patterns_that_do_not_fit() -> None:
    for text, geometry in (
        ("mean", CAUSAL), ("grid 3x3", PLAIN), ("ball 3x3", PLAIN),
        ("columns 99", PLAIN), ("columns -1", PLAIN), ("diagonals 50", PLAIN),
        ("blocks AAAA", PLAIN), (bitmap(np.ones((5, 5))).text, PLAIN),
        ("grid 99x3", BlockGeometry(143, 32, False, TokenGrid((11, 13)))),
        ("ball 3x3x3", BlockGeometry(143, 32, False, TokenGrid((11, 13)))),
    ):  # fmt: skip
        with pytest.raises(Unsupported):
            BlockPattern(text).blocks(geometry)


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (3, 5)])
@pytest.mark.parametrize(("text", "share"), [("radial", 1.0), ("radial 0.5", 0.5)])
def test_radial_attention_touches_blocks(text, share, prefix, suffix) -> None:
    """Pair by pair, by the paper's formula: frames i and j, places k and l, s of them in a frame."""
    grid, s, edge = TokenGrid((12, 4, 8), prefix, suffix), 32, 8
    geometry, inner, width = BlockGeometry(grid.tokens, edge, False, grid), 12 * 32, share * 32
    want = np.eye(geometry.count, dtype=bool)
    for q in range(grid.tokens):
        for p in range(grid.tokens):
            if not (prefix <= q < prefix + inner and prefix <= p < prefix + inner):
                want[q // edge, p // edge] = True
                continue
            (i, k), (j, at) = divmod(q - prefix, s), divmod(p - prefix, s)
            g = 2 ** int(np.floor(np.log2(max(abs(i - j), 1))))
            near = g <= width and abs(k - at) + 1 <= width / g
            sampled = k == at and abs(i - j) % int(np.ceil(g / width)) == 0
            if near or sampled or j == 0:
                want[q // edge, p // edge] = True
    assert 0.3 < want.mean() < 1
    np.testing.assert_array_equal(BlockPattern(text).blocks(geometry), want)


def test_another_order_of_the_axes() -> None:
    """Places are those of a transposed array; what is said in an order is said of the grid with its axes so."""
    grid = TokenGrid((3, 7, 5), prefix=2, suffix=4)
    geometry = BlockGeometry(grid.tokens, 16, False, grid)
    names = np.array([[[(f, y, x) for x in range(5)] for y in range(7)] for f in range(3)])
    for order in ((2, 0, 1), (1, 2, 0), (0, 2, 1)):
        said = f"order {','.join(map(str, order))}"
        pattern = BlockPattern(f"{said} sinks 1 window 0")
        assert (pattern.order, pattern.kind) == (order, "streaming")
        assert ordered(order, streaming(1, 0)) == pattern
        places = pattern.places(geometry)
        assert list(places[:2]) == [0, 1] and list(places[-4:]) == [107, 108, 109, 110]
        inner = names.reshape(-1, 3)[places[2:-4] - 2]
        coordinates = [tuple(one[list(order)]) for one in inner]
        assert coordinates == sorted(coordinates) and len(set(coordinates)) == 105
        turned = replace(geometry, grid=replace(grid, shape=tuple(grid.shape[axis] for axis in order)))
        for text in ("sinks 1 window 0", "columns 1 diagonals 2", "grid 3x1x3", "ball 3x1x5", "radial 0.5"):
            np.testing.assert_array_equal(
                BlockPattern(f"{said} {text}").blocks(geometry), BlockPattern(text).blocks(turned)
            )
    assert list(DENSE.places(geometry)) == list(range(grid.tokens))


def test_radial_attention_needs_a_video() -> None:
    for geometry in (PLAIN, BlockGeometry(143, 32, False, TokenGrid((11, 13)))):
        with pytest.raises(Unsupported, match="frames, height and width"):
            BlockPattern("radial").blocks(geometry)
    with pytest.raises(Unsupported, match="no token"):
        BlockPattern("radial 0.01").blocks(BlockGeometry(60, 16, False, TokenGrid((3, 4, 5))))
    for text in ("radial x", "radial ", "radial -1"):
        with pytest.raises(Unsupported, match="is no pattern"):
            BlockPattern(text)
