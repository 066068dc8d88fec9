"""Which grid windows cut, from the tokens in them; nothing where one token stands elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from attncompile.passes.detect.gathers.windows import blocks_of


def tokens(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> np.ndarray:
    """[windows, places], as Swin's roll and partition leave them."""
    rank = len(grid)
    rolled = np.roll(np.arange(int(np.prod(grid))).reshape(grid), [-s for s in shift], tuple(range(rank)))
    cut = rolled.reshape([x for n, w in zip(grid, window, strict=True) for x in (n // w, w)])
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    return np.ascontiguousarray(cut.transpose(order)).reshape(-1, int(np.prod(window)))


def test_random_windows() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        rank = int(rng.integers(1, 4))
        window = tuple(int(x) for x in rng.integers(1, 6, rank))
        counts = rng.integers(1, 5, rank)
        grid = tuple(int(w * n) for w, n in zip(window, counts, strict=True))
        shift = tuple(int(rng.integers(0, w)) if n > 1 else 0 for w, n in zip(window, counts, strict=True))
        table = tokens(grid, window, shift)
        if table.shape[0] < 2 or table.shape[1] < 2:
            continue
        blocks = blocks_of(table)
        if blocks is None:
            # Windows of one token along two axes of three do not show where those end.
            assert (any(shift) and sum(w == 1 for w in window) > 1) or min(counts) == 1 < rank
            continue
        found += 1
        pattern = blocks.pattern
        assert pattern.grid is not None and pattern.grid.tokens == table.size
        seen = pattern.visible(table.size, table.size)
        same = np.zeros_like(seen)
        for row in table:
            same[np.ix_(row, row)] = True
        np.testing.assert_array_equal(seen, same)
        assert np.all(np.diff(table[blocks.plain]) > 0)
        # Places are counted from where the pattern's windows begin.
        where = np.unravel_index(table, pattern.grid.shape)
        place = np.zeros_like(table)
        for axis, w, s in zip(where, pattern.window, pattern.shift, strict=True):
            place = place * w + (axis - s) % w
        np.testing.assert_array_equal(place, np.broadcast_to(np.arange(table.shape[1]), table.shape))
    assert found > 100


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_two_tokens_swapped_are_no_grid(shift: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    table = tokens((6, 12), (3, 4), shift)
    assert blocks_of(table) is not None
    for _ in range(40):
        a, b = (tuple(rng.integers(0, n) for n in table.shape) for _ in range(2))
        if a == b:
            continue
        other = table.copy()
        other[a], other[b] = table[b], table[a]
        assert blocks_of(other) is None


def test_windows_in_any_order_are_the_same_grid() -> None:
    table = tokens((6, 12), (3, 4), (1, 2))
    mixed = np.random.default_rng(3).permutation(table)
    one, other = blocks_of(table), blocks_of(mixed)
    assert one is not None and other is not None
    assert one.pattern == other.pattern


def test_columns_are_no_windows_side_by_side() -> None:
    """Every fourth token: a dilated set, whose places are not those of a box."""
    assert blocks_of(np.arange(24).reshape(6, 4).T.copy()[:, ::-1]) is None
