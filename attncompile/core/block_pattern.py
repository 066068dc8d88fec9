"""What one head of self-attention computes of its score matrix, in squares of ``edge`` queries and keys.

Written as a person writes it in plan.toml:

- ``dense``: everything;
- ``mean``: nothing, every query gets the mean of all values (attention that is uniform);
- ``skip``: nothing, every query gets zero (a head that does not matter: arXiv:2506.03065);
- ``sinks S window W``: the first S blocks of keys, and the blocks at most W away (A-shape, streaming heads:
  arXiv:2309.17453, arXiv:2407.02490, arXiv:2502.14866);
- ``columns C.. diagonals D..``: whole columns of blocks, and the blocks at these distances behind the query's own,
  ahead of it where negative (vertical-slash: arXiv:2407.02490; multi-diagonal and stripes: arXiv:2506.03065);
- ``grid 7x9``: the blocks that a neighborhood of 7x9 on the site's token grid touches (arXiv:2204.07143);
- ``ball 7x9``: those that the ellipse with these diameters around a token touches, cut off at the grid's borders; an
  ellipsoid on three axes (CLEAR's ball, arXiv:2412.16112);
- ``radial``: the blocks that hold a pair of radial attention over the site's grid of frames, height and width: a window
  over the places of a frame that shrinks by powers of two with the distance in time, and the first frame
  (arXiv:2506.19852); ``radial 0.5``: with half of the window everywhere;
- ``blocks TEXT``: these blocks, a bitmap that is compressed and written in base64;
- ``order 2,0,1 PATTERN``: any of these but the first three in another order of the tokens: row-major over the axes of
  the site's grid in this order, the slowest first (PAROAttention, arXiv:2506.16054). Tokens before and behind the grid
  stay there. Blocks are then blocks of that order, and a ``grid``, ``ball`` or ``radial`` is over its axes. Not on a
  causal site;
- ``order 8x8 PATTERN``: the same of ``sinks``, ``columns``, ``diagonals`` and ``blocks``, with the tokens tile by tile
  of the grid, so that a block is a square of it and not a strip (sliding tile attention, arXiv:2502.04507);
- ``PATTERN rest 16``: any of these but the first three, and in place of the blocks that it leaves out the means of
  every 16 consecutive keys and values there, each of which counts 16 times in the softmax (the coarse part of
  multiresolution attention, arXiv:2207.10284). Of a causal site those are the blocks before a row's own; a last block
  that is not whole is left out or met, and never averaged.

A block of a query's own token is part of every pattern but ``mean`` and ``skip``, so no query of another is left
without a key. What the site's own causal mask hides stays hidden: blocks above the diagonal belong to no pattern of a
causal site.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, prod
from typing import Literal

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Radial
from attncompile.core.pattern import GridWindow

_COUNT = r"[0-9]{1,9}"
"""A number of a text: no site has more of anything, and whole numbers of Python and NumPy hold it."""
_LIST = rf"-?{_COUNT}(?:,-?{_COUNT})*"
_FORMS = {
    "streaming": re.compile(rf"sinks ({_COUNT}) window ({_COUNT})"),
    "slash": re.compile(rf"(?:columns ({_LIST}))? ?(?:diagonals ({_LIST}))?"),
    "grid": re.compile(rf"grid ({_COUNT}(?:x{_COUNT}){{0,2}})"),
    "ball": re.compile(rf"ball ({_COUNT}(?:x{_COUNT}){{0,2}})"),
    "radial": re.compile(rf"radial(?: ({_COUNT}(?:\.[0-9]+)?))?"),
    "blocks": re.compile(r"blocks ([A-Za-z0-9+/=]+)"),
}
EMPTY = frozenset({"mean", "skip"})
"""Kinds that meet no block."""
ORDERLESS = EMPTY | {"dense"}
"""Kinds that are the same in every order of the tokens."""
_SIDE = r"[1-9][0-9]{0,8}"
_ORDER = re.compile(rf"order ({_COUNT}(?:,{_COUNT})*|{_SIDE}(?:x{_SIDE})+) (.*)")
_OF_GRID = frozenset({"grid", "ball", "radial"})
_REST = re.compile(rf"(.*) rest ({_COUNT})")


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """The squares of one site: ``tokens`` queries and keys, the ``edge`` of a square, whether the site is causal, and
    the token grid, if there is one.
    """

    tokens: int
    edge: int
    causal: bool
    grid: TokenGrid | None = None

    @property
    def count(self) -> int:
        """Blocks along each side."""
        return ceil(self.tokens / self.edge)

    @property
    def all(self) -> np.ndarray:
        """Bool [count, count]: what dense attention computes."""
        full = np.ones((self.count, self.count), bool)
        return np.tril(full) if self.causal else full

    @property
    def averaged(self) -> np.ndarray:
        """Bool [count, count]: blocks whose keys may be averaged for a row: whole ones, of a causal site before it."""
        out = np.ones((self.count, self.count), bool)
        out[:, self.tokens // self.edge :] = False
        return np.tril(out, -1) if self.causal else out

    def check_mean(self, size: int) -> None:
        """Raises ``Unsupported`` where blocks cannot be cut into means of ``size`` keys."""
        if self.edge % size:
            raise Unsupported("pattern", f"'rest {size}' does not divide a block of {self.edge} keys",
                              f"write a divisor of {self.edge}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """One head's pattern by its ``text``; see the module. ``rest``: of how many keys there is a mean where a block is
    left out, 0 where there is nothing; ``listed`` is the text without that. ``order``: that of the grid's axes,
    counted from 0, or sides of tiles, none of which is 0; empty where tokens stay as they stand. ``kind`` is of what is
    said in that order.
    """

    text: str
    kind: str = field(init=False)
    order: tuple[int, ...] = field(init=False)
    rest: int = field(init=False)
    listed: str = field(init=False)

    def __post_init__(self) -> None:
        """Raises ``Unsupported`` for a text that is no pattern."""
        tail = _REST.fullmatch(self.text)
        listed, rest = (tail[1], int(tail[2])) if tail else (self.text, 0)
        match = _ORDER.fullmatch(listed)
        order = tuple(int(axis) for axis in re.split("[,x]", match[1])) if match else ()
        kind = _kind(match[2] if match else listed)
        if match and kind in ORDERLESS:
            raise Unsupported("pattern", f"'{self.text[:60]}': {kind} is the same in every order", f"write {kind}")
        if kind in _OF_GRID and match and "x" in match[1]:
            raise Unsupported("pattern", f"'{self.text[:60]}': tiles have no neighborhood", "leave the order out")
        if tail and (kind in ORDERLESS or not rest):
            why = f"{kind} has no blocks to go with a rest" if rest else "a mean of no keys"
            raise Unsupported("pattern", f"'{self.text[:60]}': {why}", "write for example sinks 0 window 0 rest 16")
        for name, value in (("order", order), ("kind", kind), ("rest", rest), ("listed", listed)):
            object.__setattr__(self, name, value)

    def averaged(self, geometry: BlockGeometry) -> np.ndarray:
        """Bool [count, count]: blocks of keys that each block of queries meets by their means; ``Unsupported`` as of
        ``blocks``.
        """
        if not self.rest:
            return np.zeros((geometry.count, geometry.count), bool)
        geometry.check_mean(self.rest)
        return np.asarray(geometry.averaged & ~self.blocks(geometry))

    def computed(self, geometry: BlockGeometry) -> float:
        """Blocks whose scores are computed; means of all whole blocks are for every row, those of blocks that it meets
        are hidden.
        """
        means = geometry.count * (geometry.tokens // geometry.edge) / self.rest if self.rest else 0.0
        return float(self.blocks(geometry).sum()) + means

    def places(self, geometry: BlockGeometry) -> np.ndarray:
        """int64 [tokens]: which token stands at each place of the head's order; ``Unsupported`` as of ``blocks``."""
        if not self.order:
            return np.arange(geometry.tokens)
        self._ordered(geometry)
        assert geometry.grid is not None
        return geometry.grid.ordered(self.order)

    def blocks(self, geometry: BlockGeometry) -> np.ndarray:
        """Bool [count, count]: the blocks of keys that each block of queries meets, in the head's order.

        Raises:
            Unsupported: the pattern has no meaning for these blocks.
        """
        if self.order:
            match = _ORDER.fullmatch(self.listed)
            assert match is not None
            return BlockPattern(match[2]).blocks(self._ordered(geometry))
        if self.rest:
            return BlockPattern(self.listed).blocks(geometry)
        count = geometry.count
        if self.kind == "mean" and geometry.causal:
            raise Unsupported("pattern", "a causal query has no mean of all values", "use another pattern")
        if self.kind in EMPTY:
            return np.zeros((count, count), bool)
        if self.kind == "dense":
            return geometry.all
        made = {"streaming": self._streaming, "slash": self._slash, "grid": self._grid, "ball": self._ball,
                "radial": self._radial, "blocks": self._bitmap}  # fmt: skip
        seen = made[self.kind](geometry)
        np.fill_diagonal(seen, True)
        out: np.ndarray = seen & geometry.all
        return out

    def _ordered(self, geometry: BlockGeometry) -> BlockGeometry:
        """The site's blocks in the head's order."""
        grid, axes = geometry.grid, len(self.order)
        said = " ".join(self.listed.split(" ")[:2])
        tiles = "x" in said
        if geometry.causal:
            raise Unsupported("pattern", f"'{said}' on a causal site: what is causal is not in another order",
                              "leave the order out")  # fmt: skip
        if grid is None or grid.tokens != geometry.tokens or (tiles and len(grid.shape) != axes):
            raise Unsupported("grid", f"'{said}' needs a token grid of {axes} axes", "give it with --grid")
        if tiles:
            if (np.diff(grid.ordered(self.order)) > 0).all():
                shape = "x".join(map(str, grid.shape))
                raise Unsupported("grid", f"'{said}' is no other order of the tokens of the grid {shape}",
                                  "leave the order out")  # fmt: skip
            return replace(geometry, grid=None)
        usual = tuple(range(len(grid.shape)))
        if tuple(sorted(self.order)) != usual or self.order == usual:
            shape = "x".join(map(str, grid.shape))
            raise Unsupported(
                "grid", f"'{said}' is no other order of the axes of the grid {shape}",
                f"name each of the {len(usual)} axes once, counted from 0" if len(usual) > 1 else "leave the order out",
            )  # fmt: skip
        return replace(geometry, grid=replace(grid, shape=tuple(grid.shape[axis] for axis in self.order)))

    def _numbers(self) -> list[list[int]]:
        match = _FORMS[self.kind].fullmatch(self.text)
        assert match is not None
        return [[int(x) for x in re.split("[,x]", part)] if part else [] for part in match.groups()]

    def _streaming(self, geometry: BlockGeometry) -> np.ndarray:
        (sinks,), (window,) = self._numbers()
        place = np.arange(geometry.count)
        seen = np.abs(place[:, None] - place[None, :]) <= window
        seen[:, :sinks] = True
        return np.asarray(seen)

    def _slash(self, geometry: BlockGeometry) -> np.ndarray:
        columns, diagonals = self._numbers()
        count = geometry.count
        if any(not 0 <= c < count for c in columns) or any(abs(d) >= count for d in diagonals):
            raise Unsupported("pattern", f"'{self.text}': there are {count} blocks along a side", "count them from 0")
        place = np.arange(count)
        seen = np.isin(place[:, None] - place[None, :], diagonals)
        seen[:, columns] = True
        return seen

    def _grid(self, geometry: BlockGeometry) -> np.ndarray:
        return self._neighborhood(geometry, "clamp", "box")

    def _ball(self, geometry: BlockGeometry) -> np.ndarray:
        return self._neighborhood(geometry, "truncate", "ball")

    def _neighborhood(
        self, geometry: BlockGeometry, border: Literal["clamp", "truncate"], shape: Literal["box", "ball"]
    ) -> np.ndarray:
        (kernel,) = self._numbers()
        grid = geometry.grid
        if grid is None or len(grid.shape) != len(kernel) or grid.tokens != geometry.tokens:
            raise Unsupported("grid", f"'{self.text}' needs a token grid of {len(kernel)} axes", "give it with --grid")
        one = (1,) * len(kernel)
        hood = GridWindow(grid, tuple(kernel), one, one, (False,) * len(kernel), border, shape)
        try:
            return _neighborhood_blocks(geometry, hood).copy()
        except ValueError as error:
            raise Unsupported("grid", str(error)) from None

    def _radial(self, geometry: BlockGeometry) -> np.ndarray:
        match = _FORMS["radial"].fullmatch(self.text)
        grid = geometry.grid
        if grid is None or len(grid.shape) != 3 or grid.tokens != geometry.tokens:
            raise Unsupported(
                "grid", f"'{self.text}' needs a token grid of frames, height and width", "give it with --grid"
            )
        assert match is not None
        # From as many tokens as the grid has on, everything is seen: 32 bits hold what ``Radial`` compares.
        width = min(round(float(match[1] or 1) * grid.shape[1] * grid.shape[2]), prod(grid.shape))
        if width < 1:
            raise Unsupported("pattern", f"'{self.text}': no token of a frame is left", "use a larger share")
        return _radial_blocks(geometry, width).copy()

    def _bitmap(self, geometry: BlockGeometry) -> np.ndarray:
        count = geometry.count
        size, stream = -(-(count**2) // 8), zlib.decompressobj()
        try:  # of a bitmap that is larger no more is unpacked than shows it
            data = stream.decompress(base64.b64decode(self.text.removeprefix("blocks "), validate=True), size + 1)
        except (binascii.Error, zlib.error):
            data = b""
        if not data or (len(data) <= size and not stream.eof):
            raise Unsupported("pattern", "a bitmap of blocks that cannot be read", "write another pattern")
        if len(data) != size:
            raise Unsupported("pattern", f"a bitmap for other sizes than {count}x{count} blocks", "plan it anew")
        bits = np.unpackbits(np.frombuffer(data, np.uint8))
        return np.asarray(bits[: count * count].reshape(count, count) > 0)


@lru_cache(maxsize=32)
def _neighborhood_blocks(geometry: BlockGeometry, hood: GridWindow) -> np.ndarray:
    """Bool [count, count]: the blocks that hold a pair of ``hood``."""
    starts = np.arange(0, geometry.tokens, geometry.edge)
    stops = np.append(starts[1:], geometry.tokens)
    rows = [np.logical_or.reduceat(hood.met(int(a), int(b)), starts) for a, b in zip(starts, stops, strict=True)]
    return np.stack(rows)


@lru_cache(maxsize=16)
def _radial_blocks(geometry: BlockGeometry, width: int) -> np.ndarray:
    """Bool [count, count]; tokens before and behind the grid see and are seen by all."""
    grid = geometry.grid
    assert grid is not None
    frames, tokens = grid.shape[0], grid.shape[1] * grid.shape[2]
    inner, total = frames * tokens, geometry.tokens
    pattern = Radial(frames, tokens, width, 1)
    starts = np.arange(0, total, geometry.edge)
    seen = np.zeros((geometry.count, geometry.count), bool)
    for row in range(geometry.count):
        queries = np.arange(row * geometry.edge, min((row + 1) * geometry.edge, total)) - grid.prefix
        inside = queries[(queries >= 0) & (queries < inner)]
        keys = np.ones(total, bool)
        if len(inside) == len(queries):
            keys[grid.prefix : grid.prefix + inner] = pattern.rows(inside, inner, inner).any(axis=0)
        seen[row] = np.logical_or.reduceat(keys, starts)
    return seen


def _kind(text: str) -> str:
    if text in ORDERLESS:
        return text
    for kind, form in _FORMS.items():
        if text and text == text.strip() and form.fullmatch(text):
            sizes = [int(x) for x in text[5:].split("x")] if kind in ("grid", "ball") else [1]
            if min(sizes) < 1:
                break
            if kind == "ball" and any(size % 2 == 0 for size in sizes):
                raise Unsupported("pattern", f"'{text[:60]}': a ball is around a token", "give odd diameters")
            return kind
    raise Unsupported(
        "pattern", f"'{text[:60]}' is no pattern of a head",
        "dense, mean, skip, sinks S window W, columns C,.. diagonals D,.., grid HxW, ball HxW, radial or blocks TEXT; "
        "but for the first three also behind an order of the grid's axes, as in order 1,0 sinks 1 window 2, and before "
        "the means of what they leave out, as in sinks 1 window 2 rest 16",
    )  # fmt: skip


DENSE = BlockPattern("dense")
MEAN = BlockPattern("mean")
SKIP = BlockPattern("skip")


def streaming(sinks: int, window: int) -> BlockPattern:
    """The first ``sinks`` blocks of keys and those at most ``window`` blocks away."""
    return BlockPattern(f"sinks {sinks} window {window}")


def slash(columns: Sequence[int], diagonals: Sequence[int]) -> BlockPattern:
    """Whole columns and diagonals of blocks; at least one of either."""
    parts = [(name, sorted({int(x) for x in v})) for name, v in (("columns", columns), ("diagonals", diagonals)) if v]
    return BlockPattern(" ".join(f"{name} {','.join(map(str, values))}" for name, values in parts))


def bitmap(seen: np.ndarray) -> BlockPattern:
    """These blocks, bool [count, count]."""
    data = zlib.compress(np.packbits(seen.astype(bool)).tobytes(), 9)
    return BlockPattern("blocks " + base64.b64encode(data).decode("ascii"))


def ordered(order: Sequence[int], pattern: BlockPattern) -> BlockPattern:
    """``pattern`` in this order of the grid's axes, or tile by tile."""
    return BlockPattern(f"order {text_of(order)} {pattern.text}")


def text_of(order: Sequence[int]) -> str:
    """As it is written in a pattern."""
    return ("," if 0 in order else "x").join(map(str, order))


def with_rest(pattern: BlockPattern, size: int) -> BlockPattern:
    """``pattern`` with means of ``size`` keys in place of the blocks that it leaves out."""
    return BlockPattern(f"{pattern.text} rest {size}")


def density(patterns: Sequence[BlockPattern], geometry: BlockGeometry) -> float:
    """Blocks of all heads that are computed over those of dense ones."""
    return float(sum(p.computed(geometry) for p in patterns) / (len(patterns) * geometry.all.sum()))
