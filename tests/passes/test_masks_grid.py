"""Masks on a grid of tokens: exact kinds and parameters, and none with one element flipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked, Radial
from attncompile.core.pattern import GridWindow
from attncompile.core.profile import Range
from tests.passes.mask_graphs import Positions, computed, constant, drawn, flipped, read

QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def windows(draw: st.DrawFn) -> GridWindow:
    """Windows that only one set of parameters gives: odd kernels that leave room, no causal axis without a window."""
    rank = draw(st.integers(1, 3))
    border = draw(st.sampled_from(["clamp", "truncate", "circular"]))
    sizes, kernels, dilations, causal = [], [], [], []
    for _ in range(rank):
        dilation = draw(st.integers(1, 2)) if rank < 3 else 1
        kernel = draw(st.sampled_from([3, 4, 5] if rank == 2 else [3] if rank == 3 else [3, 5, 6, 9]))
        sizes.append(kernel * dilation + draw(st.integers(2, 5)))
        kernels.append(kernel)
        dilations.append(dilation)
        causal.append(border != "circular" and draw(st.integers(0, 3)) == 0)
    assume(rank > 1 or border == "circular" or (border == "clamp" and not any(causal)))  # the rest are 1-D kinds
    assume(not all(causal) or border == "clamp")  # causal axes are truncated either way
    prefix = draw(st.integers(0, 2)) if not any(causal) else 0
    suffix = draw(st.integers(0, 1)) if not any(causal) else 0
    grid = TokenGrid(tuple(sizes), prefix, suffix)
    return GridWindow(grid, tuple(kernels), tuple(dilations), (1,) * rank, tuple(causal), border)


def parameters(pattern: Any) -> dict[str, Any]:
    found = dict(pattern.parameters())
    grid = found.pop("grid")
    return {**found, "shape of the grid": grid["shape"], "prefix": grid["prefix"], "suffix": grid["suffix"]}


@QUICK
@given(windows(), st.integers(0, 999))
def test_neighborhoods(pattern: GridWindow, seed: int) -> None:
    n = pattern.grid.tokens
    seen = pattern.visible(n, n)
    site = constant(seen, grid=pattern.grid)
    assert site.mask.kind == "neighborhood" and len(site.mask.parts) == 1
    (part,) = site.mask.parts
    assert part.pattern is not None and parameters(part.pattern) == parameters(pattern)
    assert site.mask.to_json()["kernel_size"] == list(pattern.kernel_size)
    site = constant(flipped(seen, seed), grid=pattern.grid)
    assert site.mask.kind == "block_sparse"
    np.testing.assert_array_equal(read(site, n, n), flipped(seen, seed))


@QUICK
@given(windows())
def test_neighborhoods_on_a_grid_that_nobody_names(pattern: GridWindow) -> None:
    """Some cutting of the tokens into a grid gives the mask; the certificate says that the grid is from the mask."""
    n = pattern.grid.tokens
    site = constant(pattern.visible(n, n))
    assert "neighborhood" in {p.kind for p in site.mask.parts}
    assert "the mask itself" in site.mask.parts[0].certificate.detail
    np.testing.assert_array_equal(read(site, n, n), pattern.visible(n, n))


@pytest.mark.parametrize("kernel, stride, size", [(5, 2, 14), (6, 3, 15), (4, 4, 18), (7, 5, 23)])
@pytest.mark.parametrize("causal", [False, True])
def test_strides(kernel: int, stride: int, size: int, causal: bool) -> None:
    """Generalised neighborhood attention: groups of queries share the window of their leader."""
    grid = TokenGrid((size, 7))
    pattern = GridWindow(grid, (kernel, 3), (1, 1), (stride, 1), (causal, False))
    site = constant(pattern.visible(grid.tokens, grid.tokens), grid=grid)
    assert site.mask.parts[0].pattern is not None
    assert parameters(site.mask.parts[0].pattern) == parameters(pattern)


@pytest.mark.parametrize("shape, radii", [((9, 11), (3, 3)), ((8, 9), (2, 3)), ((5, 6, 7), (2, 2, 2))])
def test_balls(shape: tuple[int, ...], radii: tuple[int, ...]) -> None:
    ones = (1,) * len(shape)
    grid = TokenGrid(shape, 1)
    kernel = tuple(2 * r + 1 for r in radii)
    pattern = GridWindow(grid, kernel, ones, ones, (False,) * len(shape), "truncate", "ball")
    seen = pattern.visible(grid.tokens, grid.tokens)
    for given_grid in (grid, None):
        site = constant(seen, grid=given_grid)
        assert site.mask.kind == "neighborhood" and site.mask.parts[0].pattern is not None
        assert parameters(site.mask.parts[0].pattern) == parameters(pattern)
    assert constant(flipped(seen, 1), grid=grid).mask.kind == "block_sparse"


@QUICK
@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 3), st.integers(2, 3), st.data())
def test_swins_windows_over_the_whole_grid(high: int, wide: int, rows: int, columns: int, data: st.DataObject) -> None:
    shift = (data.draw(st.integers(0, high - 1)), data.draw(st.integers(0, wide - 1)))
    assume(shift[0] in (0, high // 2) and (high, rows) != (2, 2) and (wide, columns) != (2, 2))
    grid = TokenGrid((high * rows, wide * columns), data.draw(st.integers(0, 1)))
    pattern = Blocked((high, wide), shift, grid)
    seen = pattern.visible(grid.tokens, grid.tokens)
    site = constant(seen, data.draw(st.sampled_from(["where", "add"])), grid=grid)
    assert site.mask.kind == "blocked" and site.mask.parts[0].pattern is not None
    np.testing.assert_array_equal(read(site, grid.tokens, grid.tokens), seen)
    found = site.mask.to_json()
    for axis, (count, size) in enumerate(((rows, high), (columns, wide))):
        if count > 2:  # of two windows the larger is taken for the size
            assert (found["window"][axis], found["shift"][axis]) == (size, shift[axis])
    again = constant(flipped(seen, 5), grid=grid)
    assert again.mask.kind == "block_sparse"


def test_windows_that_wrap_around() -> None:
    grid = TokenGrid((12, 15))
    pattern = Blocked((4, 5), (2, 3), grid, cyclic=True)
    site = constant(pattern.visible(180, 180), grid=grid)
    assert site.mask.kind == "blocked" and site.mask.parts[0].pattern is not None
    assert parameters(site.mask.parts[0].pattern) == parameters(pattern)


def test_a_neighborhood_beside_a_causal_mask() -> None:
    grid = TokenGrid((7, 9))
    pattern = GridWindow(grid, (3, 5), (1, 1), (1, 1), (False, False), "truncate")
    site = constant(pattern.visible(63, 63) & np.tri(63, dtype=bool), grid=grid)
    assert [p.kind for p in site.mask.parts] == ["neighborhood", "causal"]
    assert site.mask.kind == "neighborhood" and site.mask.part("causal") is not None
    assert site.mask.parts[0].pattern is not None
    assert parameters(site.mask.parts[0].pattern) == parameters(pattern)


@pytest.mark.parametrize("frames, tokens, width, sink", [(9, 5, 5, 0), (7, 6, 6, 1), (9, 8, 4, 1), (6, 7, 12, 0)])
def test_radial(frames: int, tokens: int, width: int, sink: int) -> None:
    n = frames * tokens
    seen = Radial(frames, tokens, width, sink).visible(n, n)
    for grid in (TokenGrid((frames, tokens, 1)), None):
        site = constant(seen, grid=grid)
        assert site.mask.kind == "radial"
        found = site.mask.to_json()
        assert [found[x] for x in ("frames", "tokens", "width", "sink")] == [frames, tokens, width, sink]
        assert constant(flipped(seen, 3), grid=grid).mask.kind == "block_sparse"


# Computed from the shape.


def _coordinates(p: Positions, columns: int) -> tuple[str, str]:
    """Distances in rows and in columns of a grid that is ``columns`` wide."""
    size = p.number(columns)
    rows = p.b.op("Sub", p.b.op("Div", p.key, size), p.b.op("Div", p.query, size))
    return rows, p.b.op("Sub", p.b.op("Mod", p.key, size), p.b.op("Mod", p.query, size))


@QUICK
@given(st.integers(1, 2), st.integers(1, 2), st.integers(5, 8), st.integers(6, 9))
def test_a_truncated_neighborhood_computed_at_a_fixed_length(up: int, left: int, rows: int, columns: int) -> None:
    def make(p: Positions) -> str:
        down, across = _coordinates(p, columns)
        return p.b.op("And", p.between(down, -up, up), p.between(across, -left, left))

    site = computed(make, None, length=rows * columns)
    n = rows * columns
    truth = drawn(n, n, lambda i, j: abs(i // columns - j // columns) <= up and abs(i % columns - j % columns) <= left)
    np.testing.assert_array_equal(read(site, n, n), truth)
    assert site.mask.kind == "neighborhood"
    found = site.mask.to_json()
    if found["grid"]["shape"] == [rows, columns]:
        assert found["kernel_size"] == [2 * up + 1, 2 * left + 1] and found["border"] == "truncate"


def test_a_neighborhood_of_a_dynamic_grid_is_not_understood() -> None:
    """The grid has 6 columns and grows: no length says what the next one's mask is in the terms of a grid."""

    def make(p: Positions) -> str:
        down, across = _coordinates(p, 6)
        return p.b.op("And", p.between(down, -1, 1), p.between(across, -1, 1))

    site = computed(make, Range(6, 36, 60))
    assert site.mask.kind == "opaque" and site.mask.parts[0].certificate.detail
