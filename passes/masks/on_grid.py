"""Proposals on a grid of tokens: blocked windows, neighborhoods, radial attention.

A box of windows is a product of one small matrix an axis, so that the mask is cut into those and each is fitted alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import prod

import numpy as np

from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked, Radial
from attncompile.core.pattern import GridWindow
from attncompile.passes.masks.axis import BORDERS, fit_axis
from attncompile.passes.masks.picture import Look
from attncompile.passes.masks.proposal import Proposal

_MAX_GRIDS = 512
_MAX_LIKELY = 12
_ROWS = 7

GUESSED = "the mask itself: the first of {} that the grid's {} tokens can be cut into and that fits"


def on_grid(look: Look, causal: bool, known: TokenGrid | None) -> Iterator[Proposal]:
    """Simplest first: blocked before neighborhood, fewer axes before more, nearly square grids first."""
    if not look.square or not look.filled.all():
        return
    whole = look.closure if causal else look
    likely = list(islice(_likely(whole, grids(whole, known)), _MAX_LIKELY))
    for grid, boxes in likely:
        if boxes:
            yield from _boxes(whole, grid, causal)
    if not causal:
        for grid, boxes in likely:
            if not boxes:
                yield from _balls(whole, grid)


def grids(look: Look, known: TokenGrid | None) -> Iterator[TokenGrid]:
    """The grid that the model's patch embedding gives, then all that the tokens can be cut into."""
    if known is not None and known.tokens == look.keys:
        yield known
    whole = look.full_rows(False) & look.full_columns(False)
    if whole.all():
        return
    prefix, suffix = int(np.argmin(whole)), int(np.argmin(whole[::-1]))
    for ends in dict.fromkeys([(prefix, suffix), (0, 0)]):
        tokens = look.keys - sum(ends)
        shapes = [(tokens,), *factorizations(tokens, 2), *factorizations(tokens, 3)][:_MAX_GRIDS]
        for shape in shapes:
            yield TokenGrid(shape, *ends, evidence=GUESSED.format(len(shapes), tokens))


def factorizations(tokens: int, rank: int) -> list[tuple[int, ...]]:
    """Ways to write ``tokens`` as a product of ``rank`` sizes of at least 2, the most even first."""
    if rank == 1:
        return [(tokens,)] if tokens >= 2 else []
    found = [
        (size, *rest)
        for size in range(2, tokens // 2 + 1)
        if tokens % size == 0
        for rest in factorizations(tokens // size, rank - 1)
    ]
    return sorted(found, key=lambda shape: (max(shape) / min(shape), shape))


def _likely(look: Look, candidates: Iterator[TokenGrid]) -> Iterator[tuple[TokenGrid, bool]]:
    """The grids on which a few rows are boxes (True), or, for two and three axes, are no boxes but may be balls."""
    for grid in candidates:
        tokens = prod(grid.shape)
        sample = np.unique(np.linspace(0, tokens - 1, _ROWS).astype(np.int64)) + grid.prefix
        rows = look.visible[sample, grid.prefix : grid.prefix + tokens].reshape(-1, *grid.shape)
        if all(_is_box(row) for row in rows):
            yield grid, True
        elif len(grid.shape) > 1 and _ball(look, grid) is not None:
            yield grid, False


def _is_box(row: np.ndarray) -> bool:
    product: np.ndarray = np.ones((1,) * row.ndim, dtype=bool)
    for axis in range(row.ndim):
        others = tuple(a for a in range(row.ndim) if a != axis)
        product = product & row.any(axis=others, keepdims=True)
    return bool(np.array_equal(product, row))


def axes_of(look: Look, grid: TokenGrid) -> list[np.ndarray]:
    """For each axis, bool [size, size]: whether anything at one coordinate sees anything at the other."""
    rank = len(grid.shape)
    last = grid.prefix + prod(grid.shape)
    inside = look.visible[grid.prefix : last, grid.prefix : last].reshape(grid.shape + grid.shape)
    others = [tuple(a for a in range(2 * rank) if a % rank != axis) for axis in range(rank)]
    return [np.asarray(inside.any(axis=rest)) for rest in others]


def _boxes(look: Look, grid: TokenGrid, causal: bool) -> Iterator[Proposal]:
    axes = axes_of(look, grid)
    cells = [_cells(axis) for axis in axes]
    for cyclic in (False, True):
        chosen = [next((c for c in options if c[2] in (None, cyclic)), None) for options in cells]
        cut = [c for c in chosen if c is not None]
        if len(cut) == len(axes):
            windows, shifts = tuple(c[0] for c in cut), tuple(c[1] for c in cut)
            yield Proposal("blocked", Blocked(windows, shifts, grid, cyclic=cyclic), causal)
    for border in BORDERS:
        found = [f for f in (fit_axis(axis, border) for axis in axes) if f is not None]
        if len(found) == len(axes):
            yield Proposal("neighborhood", GridWindow(
                grid, tuple(f.kernel for f in found), tuple(f.dilation for f in found),
                tuple(f.stride for f in found), tuple(f.causal for f in found), border,
            ), causal)  # fmt: skip


def _cells(seen: np.ndarray) -> list[tuple[int, int, bool | None]]:
    """(window, shift, cyclic) of cells along one axis; cyclic None is either: one cell, or cells without a rest."""
    size = len(seen)
    if seen.all():
        return [(size, 0, None)]
    label = seen.argmax(axis=1)
    if not np.array_equal(seen, label[:, None] == label[None, :]):
        return []
    starts = np.flatnonzero(np.diff(label)) + 1
    if len(starts) == 1:
        first, rest = int(starts[0]), size - int(starts[0])
        return [(first, 0, None if first == rest else False)] if rest <= first else [(rest, first, False)]
    window = int(np.diff(starts).min())
    shift = int(starts[0]) % window
    if seen[0, -1]:
        return [(window, shift, True)]
    return [(window, shift, None if shift == 0 and size % window == 0 else False)]


def _ball(look: Look, grid: TokenGrid) -> GridWindow | None:
    """The ball whose radii are those of a few rows' extent, if it gives these rows."""
    tokens = prod(grid.shape)
    sample = np.unique(np.linspace(0, tokens - 1, _ROWS).astype(np.int64))
    rows = look.visible[sample + grid.prefix, grid.prefix : grid.prefix + tokens].reshape(-1, *grid.shape)
    radii = []
    for axis, where in enumerate(np.unravel_index(sample, grid.shape)):
        others = tuple(a + 1 for a in range(len(grid.shape)) if a != axis)
        extent = rows.any(axis=others)
        apart = np.abs(np.arange(grid.shape[axis])[None, :] - where[:, None])
        radii.append(int(apart[extent].max(initial=0)))
    ones = (1,) * len(radii)
    kernel = tuple(2 * r + 1 for r in radii)
    found = GridWindow(grid, kernel, ones, ones, (False,) * len(radii), "truncate", "ball")
    said = found.rows(sample + grid.prefix, look.queries, look.keys)
    return found if np.array_equal(said, look.visible[sample + grid.prefix]) else None


def _balls(look: Look, grid: TokenGrid) -> Iterator[Proposal]:
    found = _ball(look, grid)
    if found is not None:
        yield Proposal("neighborhood", found)


def ring(look: Look) -> Iterator[Proposal]:
    """A window along the sequence that wraps around: its corners would pass for stripes."""
    if not look.square or look.visible[0].all() or look.counts.min() != look.counts.max():
        return
    ahead = np.flatnonzero(look.visible[0])
    apart = np.where(ahead <= look.keys // 2, ahead, ahead - look.keys)
    dilation = max(1, int(np.gcd.reduce(apart)))
    kernel = (int(apart.max()) - int(apart.min())) // dilation + 1
    grid = TokenGrid((look.keys,), evidence=GUESSED.format(1, look.keys))
    yield Proposal("neighborhood", GridWindow(grid, (kernel,), (dilation,), (1,), (False,), "circular"))


def radial(look: Look, known: TokenGrid | None) -> Iterator[Proposal]:
    """Frames of the known grid, else every number of frames that divides the tokens, fewest tokens a frame last."""
    if not look.square or not look.filled.all():
        return
    full = look.full_columns(False)
    sunk = look.keys if full.all() else int(np.argmin(full))
    options = [f for f in range(3, look.keys // 2 + 1) if look.keys % f == 0]
    if known is not None and known.tokens == look.keys and len(known.shape) == 3 and not known.prefix + known.suffix:
        options = [known.shape[0]]
    for frames in options:
        tokens = look.keys // frames
        if sunk % tokens:
            continue
        # The last frame's first token: its own frame shows the width, unless it sees all of it; then two frames before.
        row = look.visible[look.keys - tokens].reshape(frames, tokens)
        own, before = int(row[-1].sum()), int(row[-3].sum())
        widths = [own] if own < tokens else [tokens, 2 * before, 2 * before + 1]
        for width in dict.fromkeys(w for w in widths if w >= 1):
            yield Proposal("radial", Radial(frames, tokens, width, sunk // tokens))
