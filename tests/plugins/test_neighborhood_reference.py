"""The reference against oracles that were written apart from it, one for each property."""

from __future__ import annotations

import numpy as np
import pytest

from attncompile.core.errors import Unsupported
from attncompile.plugins.neighborhood.op import Neighborhood
from attncompile.plugins.neighborhood.reference import reference, sees


def visible(parameters: dict, total: int) -> np.ndarray:
    return np.array([[sees(i, j, total, parameters) for j in range(total)] for i in range(total)])


def test_clamped_2d_neighborhood_is_the_nearest_square() -> None:
    """NAT's definition: the kernel_size nearest rows and columns, the window moved inward at the borders."""
    height, width, kernel = 7, 6, 3
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, height * width, 2, 4)) for _ in range(3))
    want = np.zeros_like(q)
    for y in range(height):
        for x in range(width):
            top = min(max(y - kernel // 2, 0), height - kernel)
            start = min(max(x - kernel // 2, 0), width - kernel)
            rows = [(top + a) * width + start + b for a in range(kernel) for b in range(kernel)]
            for h in range(2):
                s = k[0, rows, h] @ q[0, y * width + x, h] / 2.0
                p = np.exp(s) / np.exp(s).sum()
                want[0, y * width + x, h] = p @ v[0, rows, h]
    got = reference(q, k, v, {"kernel_size": [kernel, kernel], "grid": [height, width], "border": "clamp"})
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize(("kernel", "left", "right"), [(5, 2, 2), (4, 2, 1), (1, 0, 0), (2, 1, 0)])
def test_default_reach_of_a_window(kernel, left, right) -> None:
    """An even window has kernel // 2 on the left and one less on the right."""
    n = 11
    d = np.arange(n)[None, :] - np.arange(n)[:, None]
    want = (d >= -left) & (d <= right)
    np.testing.assert_array_equal(visible({"kernel_size": [kernel]}, n), want)


def test_causal_window_is_that_of_mistral() -> None:
    n, window = 12, 4
    d = np.arange(n)[None, :] - np.arange(n)[:, None]
    np.testing.assert_array_equal(
        visible({"kernel_size": [window], "causal": [1]}, n), np.tril(np.ones((n, n), bool)) & (d > -window)
    )


def test_stride_of_kernel_size_is_blocked() -> None:
    """Swin's windows without shift: tokens see those of their own block."""
    n, block = 12, 4
    want = np.arange(n)[:, None] // block == np.arange(n)[None, :] // block
    np.testing.assert_array_equal(visible({"kernel_size": [block], "stride": [block]}, n), want)


def test_dilation_is_a_neighborhood_on_every_remainder() -> None:
    n, d = 13, 3
    got = visible({"kernel_size": [3], "dilation": [d], "border": "clamp", "grid": [n]}, n)
    for r in range(d):
        line = np.arange(r, n, d)
        alone = visible({"kernel_size": [3], "border": "clamp", "grid": [len(line)]}, len(line))
        np.testing.assert_array_equal(got[np.ix_(line, line)], alone)
        assert not got[np.ix_(line, np.setdiff1d(np.arange(n), line))].any()


def test_ball_is_a_disc() -> None:
    height, width, radius = 9, 8, 2
    y, x = np.divmod(np.arange(height * width), width)
    want = (y[:, None] - y[None, :]) ** 2 + (x[:, None] - x[None, :]) ** 2 <= radius**2
    size = 2 * radius + 1
    got = visible({"kernel_size": [size, size], "grid": [height, width], "shape": "ball"}, height * width)
    np.testing.assert_array_equal(got, want)


def test_stride_shares_the_window_of_the_centre() -> None:
    """All queries of a group see what the group's centre sees at stride 1 (the right one of two centres)."""
    n, stride = 15, 4
    alone = visible({"kernel_size": [5], "border": "clamp", "grid": [n]}, n)
    got = visible({"kernel_size": [5], "border": "clamp", "grid": [n], "stride": [stride]}, n)
    for i in range(n):
        np.testing.assert_array_equal(got[i], alone[min(i // stride * stride + stride // 2, n - 1)])


def test_prefix_and_suffix_see_all_and_are_seen() -> None:
    got = visible({"kernel_size": [3], "prefix": 1, "suffix": 2}, 12)
    assert got[0].all() and got[-2:].all() and got[:, 0].all() and got[:, -2:].all()
    assert not got[4, 7] and got[4, 5]


def test_sinks_stay_causal() -> None:
    got = visible({"kernel_size": [3], "causal": [1], "prefix": 2}, 9)
    assert not np.triu(got, 1).any()
    assert got[:, 0].all() and got[1:, 1].all() and not got[8, 2]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"kernel_size": []},
        {"kernel_size": [3], "left": [3]},
        {"kernel_size": [3], "causal": [1], "left": [1]},
        {"kernel_size": [3, 3]},
        {"kernel_size": [3, 3], "grid": [8]},
        {"kernel_size": [9, 3], "grid": [8, 8], "border": "clamp"},
        {"kernel_size": [3], "border": "wrap"},
        {"kernel_size": [4], "shape": "ball"},
        {"kernel_size": [3], "dilation": [0]},
        {"kernel_size": [3], "causal": [1], "suffix": 1},
        {"kernel_size": [3], "masked_rows": "mean"},
        {"kernel_size": ["3"]},
        {"kernel_size": 3},
    ],
    ids=str,
)
def test_parameters_without_a_meaning_are_refused(parameters) -> None:
    with pytest.raises(Unsupported):
        Neighborhood.of(parameters)
