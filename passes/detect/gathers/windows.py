"""Windows of a grid that stand side by side as batch entries (Swin): which grid they cut, and what is added in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from onnx import helper

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.passes.detect.gathers.ends import Moved
from attncompile.passes.detect.gathers.origins import Coordinate
from attncompile.passes.detect.scores import HIDDEN
from attncompile.passes.detect.sinks import NotStored
from attncompile.passes.detect.views import Atoms, Axis
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import tensor_value

_MAX_AXES = 3
_MAX_ADDED = 1 << 25
"""Elements of what is added in all windows and heads."""
_MAX_ADDS = 8
"""Constants that are looked at for the one that holds the bias alone."""
_UNITS = 4.0
"""Rounding units of the source's own sum by which what is added across a seam may differ from one number."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Windows of equal size that cover a grid, moved by ``pattern.shift`` around its ends. ``plain`` is one of them
    that no end of the grid goes through.
    """

    pattern: Blocked
    plain: int


def blocks_of(tokens: np.ndarray) -> Blocks | None:
    """What ``tokens`` [windows, places], every token once, cut; None where it is no grid of one to three axes.

    Places are row-major in a window, so a window that no end goes through has ascending tokens, from whose distances
    the sizes of grid and window follow. Then every token is compared.
    """
    count, size = tokens.shape
    ascending = np.flatnonzero(np.all(np.diff(tokens, axis=1) > 0, axis=1)) if size > 1 else np.arange(count)
    if count < 2 or not len(ascending):
        return None
    plain = int(ascending[0])
    window, pitches = _lattice(tokens[plain])
    if window is None or len(window) > _MAX_AXES:
        return None
    grid: list[int] = []
    rest = count * size
    for pitch in pitches:  # outermost first: tokens between two neighbours along the axis
        if rest % pitch:
            return None
        grid.append(rest // pitch)
        rest = pitch
    if rest != 1:
        return None
    for sides, cut in _with_one_more_axis(grid, window):
        if any(n % w for n, w in zip(sides, cut, strict=True)):
            continue
        first = np.unravel_index(int(tokens[plain, 0]), sides)
        shift = tuple(int(x) % w for x, w in zip(first, cut, strict=True))
        where = TokenGrid(tuple(sides), evidence=f"the order of the tokens in {count} windows")
        pattern = Blocked(tuple(cut), shift, where, cyclic=any(shift))
        if _holds(pattern, tokens):
            return Blocks(pattern, plain)
    return None


def _with_one_more_axis(grid: list[int], window: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Grid and window as they are, then with an axis cut in two: windows of one token along an axis do not show it."""
    yield grid, window
    for axis in range(len(grid)) if len(grid) < _MAX_AXES else ():
        for inner in range(2, grid[axis]):
            if grid[axis] % inner == 0:
                sides = [*grid[:axis], grid[axis] // inner, inner, *grid[axis + 1 :]]
                yield sides, [*window[:axis], 1, *window[axis:]]


def _lattice(window: np.ndarray) -> tuple[list[int] | None, list[int]]:
    """Sizes of an ascending window along its axes, and how far apart neighbours are along each, outermost first."""
    sizes: list[int] = []
    pitches: list[int] = []
    line = window
    while len(line) > 1 or not sizes:
        pitch = int(line[1] - line[0]) if len(line) > 1 else 1
        steps = np.flatnonzero(np.diff(line) != pitch)
        size = int(steps[0]) + 1 if len(steps) else len(line)
        if len(line) % size:
            return None, []
        rows = line.reshape(-1, size)
        if not np.array_equal(rows, rows[:, :1] + pitch * np.arange(size)):
            return None, []
        sizes.insert(0, size)
        pitches.insert(0, pitch)
        line = rows[:, 0]
    if pitches[-1] != 1:  # windows of one column: the axis that runs through all tokens has windows of one
        sizes.append(1)
        pitches.append(1)
    return sizes, pitches


def _holds(pattern: Blocked, tokens: np.ndarray) -> bool:
    """Whether every token stands at its place, with the tokens of its own window and no others."""
    assert pattern.grid is not None
    grid = pattern.grid.shape
    place = np.zeros(tokens.shape, np.int64)
    cell = np.zeros(tokens.shape, np.int64)
    for where, length, window, shift in zip(
        np.unravel_index(tokens, grid), grid, pattern.window, pattern.shift, strict=True
    ):
        place = place * window + (where - shift) % window
        cell = cell * (length // window) + (where - shift) % length // window
    standing = np.array_equal(place, np.broadcast_to(np.arange(tokens.shape[1]), place.shape))
    alone = bool(np.all(cell == cell[:, :1])) and len(np.unique(cell[:, 0])) == len(cell)
    return standing and alone


def window_facts(
    index: GraphIndex, world: World, atoms: Atoms, ends: tuple[Moved, Moved], order: tuple[Axis, Axis],
    added: list[tuple[str, Coordinate]], picture: np.ndarray, dtype: int, fills: tuple[float, ...], guarded: bool,
) -> MaskFacts:  # fmt: skip
    """The mask of windows side by side. ``ends``: query and key; ``order``: the leaves of their axes in the scores;
    ``added``: values that are added to the scores; ``picture``: bool [tokens, tokens], what is not hidden.

    Raises:
        Unsupported: the windows are no grid's, or what is added differs between them otherwise than across its ends.
        NotStored: no value holds the bias alone.
    """
    rows, columns = (e.coordinates["N"].on_leaves(atoms) for e in ends)
    shared = tuple(a for a in rows.atoms if a in columns.atoms)
    own_rows, own_columns = (
        tuple(a for a in leaves if a in c.atoms and a not in shared)
        for leaves, c in zip(order, (rows, columns), strict=True)
    )
    tables = []
    for coordinate, mine in ((rows, own_rows), (columns, own_columns)):
        table = coordinate.over(atoms, (*shared, *mine))
        tables.append(table.reshape(prod(atoms.sizes[a] for a in shared), -1))
    tokens = tables[0]
    first = f"'{added[0][0]}' is added to windowed scores and is more than a mask, and " if added else ""
    if not np.array_equal(tokens, tables[1]) or tokens.size != ends[0].sizes["N"]:
        raise Unsupported("gather-bias", f"{first}queries and keys of a window are not the same tokens in one order")
    blocks = blocks_of(tokens)
    if blocks is None:
        raise Unsupported("gather-bias", f"{first}the windows do not stand side by side on a grid of tokens")
    heads = ends[0].coordinates["H"].on_leaves(atoms).atoms
    total = _total(atoms, added, (shared, heads, own_rows, own_columns))
    pattern, number = _seam(blocks, tokens, total, picture, float(np.finfo(_numpy(dtype)).eps))
    how = Certificate(
        "structure", f"every token of {len(tokens)} windows followed back to the grid", (picture.shape,)
    )  # fmt: skip
    parts = [MaskPart("blocked", how, pattern=pattern)]
    bias = total[blocks.plain]
    if bool(np.any(bias)):
        source = _stored(index, world, bias, [name for name, _ in added], dtype)
        words = Certificate("structure", "added by the places in a window, the same in every window", (picture.shape,))
        parts.append(MaskPart("bias", words, source=source, additive=True, places=True))
    if number:
        detail = f"adds {number:.6g} across the ends of the grid, which is no proof that a key is hidden"
        words = Certificate("structure", detail, (picture.shape,))
        apart = replace(pattern, cyclic=False)
        parts.append(MaskPart("bias", words, additive=True, pattern=apart, number=number))
    return MaskFacts(tuple(parts), "nan", fills, guarded)


def _numpy(dtype: int) -> type[np.floating]:
    found = helper.tensor_dtype_to_np_dtype(dtype)
    return np.float32 if found.name == "bfloat16" else found.type


def without_constant_axes(coordinate: Coordinate) -> Coordinate:
    """The same in fewer atoms: those along which it never changes are left out."""
    atoms, array = list(coordinate.atoms), coordinate.array
    for axis in reversed(range(array.ndim)):
        first = array.take([0], axis=axis)
        if array.shape[axis] > 1 and bool(np.all(array == first)):
            array = first.squeeze(axis)
            del atoms[axis]
    return Coordinate(tuple(atoms), array)


def _total(atoms: Atoms, added: list[tuple[str, Coordinate]], axes: tuple[Axis, Axis, Axis, Axis]) -> np.ndarray:
    """The sum of what is added, [windows, heads (1: the same for all), places, places]."""
    windows, heads, rows, columns = ([atoms.sizes[a] for a in axis] for axis in axes)
    full = [prod(windows), prod(heads), prod(rows), prod(columns)]
    if prod(full) > _MAX_ADDED:
        raise Unsupported("too-large", "what is added in all windows is too much to be looked at one by one")
    total = np.zeros((full[0], 1, *full[2:]))
    wanted = tuple(a for axis in axes for a in axis)
    for _, coordinate in added:
        lean = without_constant_axes(coordinate.on_leaves(atoms))
        if set(lean.atoms) - set(wanted):
            raise Unsupported("gather-bias", "what is added to windowed scores differs between batch entries")
        wide = lean.over(atoms, wanted)
        of_heads = any(a in lean.atoms for a in axes[1])
        shape = [*windows, *(heads if of_heads else [1] * len(heads)), *rows, *columns]
        total = total + np.broadcast_to(wide, shape).reshape(full[0], -1, *full[2:])
    return total


def _seam(
    blocks: Blocks, tokens: np.ndarray, total: np.ndarray, picture: np.ndarray, unit: float
) -> tuple[Blocked, float]:
    """The windows as the mask has them, and the number that is added across the grid's ends (0: none).

    Raises:
        Unsupported: windows differ in another way.
    """
    whole = blocks.pattern
    assert whole.grid is not None
    cut = replace(whole, cyclic=False)
    cells = np.argmax(cut.visible(len(picture), len(picture)), axis=1)[tokens]
    apart = cells[:, :, None] != cells[:, None, :]
    seen = picture[tokens[:, :, None], tokens[:, None, :]]
    if int(picture.sum()) != int(seen.sum()) or not (seen.all() or np.array_equal(seen, ~apart)):
        raise Unsupported("gather-bias", "the masks of the windows are not those of a grid whose ends meet")
    pattern = whole if seen.all() else cut
    beyond = total - total[blocks.plain][None]
    if bool(np.any(beyond[np.broadcast_to((seen & ~apart)[:, None], beyond.shape)])):
        raise Unsupported("gather-bias", "what is added to windowed scores differs between windows")
    across = beyond[np.broadcast_to((seen & apart)[:, None], beyond.shape)]
    if not across.size:
        return pattern, 0.0
    mean = float(across.mean())
    slack = _UNITS * unit * float(np.abs(total).max())
    number = float(round(mean)) if abs(mean - round(mean)) <= slack else mean
    if float(np.abs(across - number).max()) > slack:
        raise Unsupported("gather-bias", "what is added across the ends of the grid is not one number")
    return pattern, number


def _stored(index: GraphIndex, world: World, bias: np.ndarray, added: list[str], dtype: int) -> str:
    """A value that is ``bias`` [heads or 1, W, W]: an addend of what is added, else any initializer.

    Raises:
        NotStored: there is none.
    """
    array = bias.astype(_numpy(dtype))

    def same(shape: tuple[int, ...] | None) -> bool:
        return shape is not None and shape[-2:] == array.shape[-2:] and prod(shape) == array.size

    queue = list(dict.fromkeys(added))
    for _ in range(_MAX_ADDS):
        if not queue:
            break
        name = queue.pop(0)
        if same(world.shapes.get(name)) and np.array_equal(world.value(name).reshape(array.shape), array):
            return name
        node = index.producer.get(name)
        if node is not None and node.op_type in ("Add", "Cast", "Identity", "Expand"):
            queue += [v for v in node.input if v]
    for name, tensor in index.initializers.items():
        fits = same(tuple(tensor.dims)) and tensor.data_type == dtype
        if fits and np.array_equal(tensor_value(tensor, index.folder).reshape(array.shape), array):
            return name
    raise NotStored("the bias of the windows is written out for every window, or in no value at all", array[None])


def hides(array: np.ndarray) -> bool:
    """Whether what is added is a mask and nothing more."""
    return bool(np.all((array == 0) | (array <= HIDDEN)))
