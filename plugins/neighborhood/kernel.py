"""The kernels of ``NeighborhoodAttention``: which calls they take, how the grid is cut, what there is to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil, prod

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import Argument, Constant, OpCall, Program, Tactic, Work
from attncompile.core.verdict import Verdict
from attncompile.plugins.kernel_arguments import (
    RULES,
    check_operands,
    check_optional,
    inputs,
    int32,
    output,
    padded,
    parted,
    strides,
    widths,
    without_sizes,
)
from attncompile.plugins.neighborhood.op import OP_TYPE, Neighborhood, register
from attncompile.plugins.tactics import HOPPER, HOPPER_ROWS, HOPPER_SHARED, hopper_shared, tactics

PACKAGE = "attncompile.plugins.neighborhood"
WINDOWS = "Attention"
"""The op whose kernel takes plain windows."""
ALIKE = "zero"
"""``masked_rows`` of its calls in which every query sees a key."""
NARROW, WIDE = 1 << 7, 1 << 15
"""Distances that the fields of 8 and of 16 bits hold, in which kernel_triton.py compares coordinates."""
MOST_QUERIES = 256
"""Queries of a tile are at most so many."""
Three = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class AxisCut:
    """One axis cut into tiles of ``size`` queries: ``tiles``, the ``extent`` of the keys that the widest tile meets,
    ``reach``: how far a bound of a query's window and a key of its tile may be apart (more than the extent where
    windows are empty), ``same``: every query of every tile sees all of its extent; ``clip``: an extent is longer than a
    dilation's line.
    """

    size: int
    tiles: int
    extent: int
    reach: int
    same: bool
    clip: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A grid cut into boxes of queries, always of three axes; missing ones are of size 1 and come first."""

    hood: Neighborhood
    axes: tuple[AxisCut, AxisCut, AxisCut]

    @property
    def queries(self) -> int:
        return prod(a.size for a in self.axes)

    @property
    def tiles(self) -> int:
        return prod(a.tiles for a in self.axes)

    @property
    def box(self) -> int:
        """Keys that a tile meets."""
        return prod(a.extent for a in self.axes)

    def keys_met(self, keys: int, planes: bool) -> int:
        """Keys of whole tiles of ``keys`` that a tile of queries meets."""
        if planes and not self.all_seen:
            return self.axes[0].extent * ceil(self.axes[1].extent * self.axes[2].extent / keys) * keys
        return ceil(self.box / keys) * keys

    @property
    def all_seen(self) -> bool:
        """Whether no mask is needed: every query of a tile sees the whole box."""
        return self.hood.shape == "box" and all(a.same for a in self.axes)

    def constants(self) -> dict[str, int | bool]:
        """The kernel's compile-time constants that say the neighborhood and its cut."""
        hood, axes = self.hood, range(3)
        per_axis = {
            "G": three(hood.grid, 1), "T": tuple(a.size for a in self.axes), "E": tuple(a.extent for a in self.axes),
            "W": three(hood.kernel_size, 1), "L": three(hood.left, 0), "S": three(hood.stride, 1),
            "D": three(hood.dilation, 1), "C": three(hood.causal, 0),
        }  # fmt: skip
        found: dict[str, int | bool] = {f"{k}{i}": v[i] for k, v in per_axis.items() for i in axes}
        found |= {
            "CLAMP": hood.border == "clamp", "BALL": hood.shape == "ball", "ALL_SEEN": self.all_seen,
            "NARROW": max(a.reach for a in self.axes) < NARROW, "CLIP": any(a.clip for a in self.axes),
            "PREFIX": hood.prefix, "SUFFIX": hood.suffix, "RULE": RULES[hood.masked_rows],
        }  # fmt: skip
        return found


def three(values: Sequence[int], missing: int) -> Three:
    """Three axes, the missing ones first."""
    padded = (missing,) * (3 - len(values)) + tuple(values)
    return padded[0], padded[1], padded[2]


@lru_cache(maxsize=4096)
def cut_axis(
    grid: int, kernel: int, left: int, stride: int, dilation: int, causal: int, clamp: bool, size: int
) -> AxisCut:
    """Cut one axis into tiles of ``size`` queries on one line of the dilation."""
    extent, same, shortest = 1, True, grid
    longest = ceil(grid / dilation)
    spans = []
    for rest in range(min(dilation, grid)):
        length = (grid - rest + dilation - 1) // dilation
        shortest = min(shortest, length)
        low, high = windows(length, kernel, left, stride, causal, clamp)
        for first in range(0, length, size):
            part = slice(first, min(first + size, length))
            spans.append((low[part], high[part], length))
            extent = max(extent, int(high[part].max()) - int(low[part].min()) + 1)
    reach = extent
    for low, high, length in spans:
        corner = max(min(int(low.min()), length - extent), 0)
        same = same and bool((low == corner).all() and (high == corner + extent - 1).all())
        reach = max(reach, int(low.max()) - corner, corner + extent - 1 - int(high.min()))
    return AxisCut(size, ceil(longest / size) * dilation, extent, reach, same, extent > shortest)


def windows(
    length: int, kernel: int, left: int, stride: int, causal: int, clamp: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First and last key of every query on a line of ``length`` tokens. An empty window has last < first."""
    place = np.arange(length)
    group = place // stride * stride
    if causal:
        leader = np.minimum(group + stride - 1, length - 1)
        return np.maximum(leader - kernel + 1, 0), place
    centre = np.minimum(group + stride // 2, length - 1)
    if clamp:
        centre = np.clip(centre, left, length - kernel + left)
    return np.maximum(centre - left, 0), np.minimum(centre + kernel - 1 - left, length - 1)


def _axis(hood: Neighborhood, a: int, size: int) -> AxisCut:
    grid, kernel, left = three(hood.grid, 1), three(hood.kernel_size, 1), three(hood.left, 0)
    stride, dilation, causal = three(hood.stride, 1), three(hood.dilation, 1), three(hood.causal, 0)
    return cut_axis(grid[a], kernel[a], left[a], stride[a], dilation[a], causal[a], hood.border == "clamp", size)


@lru_cache(maxsize=256)
def cut(hood: Neighborhood, queries: int, keys: int, planes: bool) -> Cut:
    """The cut into boxes of ``queries`` (a power of two) that meets the fewest tiles of ``keys`` keys; ``planes``: a
    tile of keys stays in one plane of a box.
    """
    powers = [1 << i for i in range(queries.bit_length())]
    shapes = [s for s in product(powers, repeat=3) if prod(s) == queries]
    found = [Cut(hood, (_axis(hood, 0, a), _axis(hood, 1, b), _axis(hood, 2, c))) for a, b, c in shapes]

    def price(made: Cut) -> tuple[float, int]:
        work = made.tiles * made.keys_met(keys, planes)
        return work * (1.0 if made.all_seen else 1.15), -made.axes[2].size

    return min(found, key=price)


class NeighborhoodKernel:
    """Static grids of one to three axes, on every architecture."""

    op = OP_TYPE
    optional = ("key_mask", "bias")

    def register(self) -> None:
        register()

    def call(self, node: OpCall) -> OpCall:
        """A plain window is a call of ``Attention``, whose kernel takes any lengths."""
        hood = Neighborhood.of(node.attributes)
        scale = {"scale": node.attributes["scale"]} if "scale" in node.attributes else {}
        plain = hood.sliding and not hood.prefix and not hood.suffix
        if plain or slides_inward(hood):
            # Queries are the last tokens: each sees itself, unless an input hides it.
            rule = hood.masked_rows if set(node.inputs) else ALIKE
            window = {"left": hood.left[0], "right": hood.right[0], "masked_rows": rule}
            return replace(node, op=WINDOWS, attributes={**window, **({} if plain else {"clamp": True}), **scale})
        return replace(node, attributes={**hood.attributes(), **scale})

    def general(self, call: OpCall) -> OpCall:
        return replace(without_sizes(call), attributes=Neighborhood.of(call.attributes).attributes())

    def standard(self, dtype: str) -> Sequence[OpCall]:
        return ()  # a grid is part of the code: there is none that most models share

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        try:
            self._check(call)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("boxes of the grid")

    def _check(self, call: OpCall) -> Neighborhood:
        check_operands(call)
        hood = Neighborhood.of(call.attributes)
        if hood.tokens is None:
            raise Unsupported("grid", "a dynamic sequence has no grid kernel", "plain windows have that of Attention")
        if hood.circular:
            raise Unsupported("ring", "windows on rings (border circular, shift, seam) have no kernel on a grid")
        if any(hood.causal) and hood.prefix:
            raise Unsupported("prefix", "prefix tokens before a causal axis of a static grid have no kernel")
        for length in (call.query_length, call.key_length):
            if length not in (None, hood.tokens):
                raise Unsupported("lengths", f"{length} tokens for a grid of {hood.tokens}")
        unknown = set(call.inputs) - set(self.optional)
        if unknown:
            raise Unsupported("inputs", f"there is no kernel with {', '.join(sorted(unknown))} on a grid")
        if set(call.outputs) - {"output"}:
            raise Unsupported("outputs", f"there is no kernel that gives {', '.join(call.outputs[1:])} on a grid")
        check_optional(call)
        if hood.tokens >= 1 << 31:
            raise Unsupported("size", f"{hood.tokens} tokens: token numbers are int32")
        if hood.shape == "ball" and len(hood.left) * prod(max(radius, 1) ** 2 for radius in hood.left) >= 1 << 31:
            radii = "x".join(map(str, hood.left))
            raise Unsupported("size", f"a ball of radii {radii}: squared distances in common units are int32")
        # A tile of one query has the least reach: where that does not fit no tile does.
        if max(_axis(hood, a, 1).reach for a in range(3)) >= WIDE - MOST_QUERIES:
            raise Unsupported(
                "size", f"windows of more than {WIDE - MOST_QUERIES - 1} tokens on an axis have no kernel"
            )
        return hood

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        hood = self._check(call)
        hopper = architecture == 90
        met = kind(hood) if hopper else "many"
        chosen = tactics(PACKAGE, call, architecture, met, lambda t: hopper and on_hopper(call, hood, t))
        return [self._program(call, hood, t, rank) for rank, t in enumerate(chosen)]

    def _program(self, call: OpCall, hood: Neighborhood, tactic: Tactic, rank: int) -> Program:
        hopper = tactic.name.startswith(HOPPER)
        queries = HOPPER_ROWS * int(tactic.constants["CONSUMERS"] or 0) if hopper else int(tactic.constants["BM"] or 0)
        made = cut(hood, queries, int(tactic.constants["BN"] or 0), hopper)
        extra = ceil((hood.prefix + hood.suffix) / made.queries)
        # Queries of a tile: the cut says them an axis.
        tiling = {name: value for name, value in tactic.constants.items() if name != "BM"}
        constants: dict[str, Constant] = {**made.constants(), **widths(call), **tiling}
        if hopper:
            constants["STAGES"] = tactic.stages
            del constants["BALL"], constants["CLIP"]  # see ``on_hopper``
        grid = (str(made.tiles + extra), "H", "B")
        if hopper:
            # One consumer leaves room for another block beside it.
            at_once = "SMS" if tiling["CONSUMERS"] == 2 else "SMS * 2"
            grid = (f"min({made.tiles + extra} * H * B, {at_once})", "1", "1")
        module = "kernel_hopper" if hopper else "kernel_triton"
        return Program(
            op=self.op, tactic=tactic.name, language="gluon" if hopper else "triton",
            function=f"{PACKAGE}.{module}:neighborhood", arguments=tuple(arguments(call, self.optional, hopper)),
            constants=constants, grid=grid, warps=tactic.warps, stages=tactic.stages,
            registers=tactic.registers, ptxas=tactic.ptxas, dtype=call.dtype, head_dim=call.head_dim,
            value_dim=call.value_dim, rank=rank,
        )  # fmt: skip

    def work(self, call: OpCall, program: Program) -> Work:
        return work(call, program)


def kind(hood: Neighborhood) -> str:
    """What the tactic table tells apart: how many keys 128 queries meet, and whether they see all of them."""
    made = cut(hood, 2 * HOPPER_ROWS, 128, True)
    met = made.keys_met(128, True)
    if made.all_seen:
        return "few, all seen" if met <= 512 else "many"
    return "few" if met <= 1024 else "many"


def slides_inward(hood: Neighborhood) -> bool:
    """A clamped 1-D window without anything else, which is a call of ``Attention`` as well."""
    plain = replace(hood, border="truncate").sliding and not hood.prefix and not hood.suffix
    return plain and hood.border == "clamp" and hood.tokens is not None and not any(hood.causal)


def on_hopper(call: OpCall, hood: Neighborhood, tactic: Tactic) -> bool:
    """Whether ``kernel_hopper.py`` takes the call with this tactic."""
    if call.inputs or hood.shape != "box" or hood.masked_rows == "uniform":
        return False
    if any(c and s > k for c, s, k in zip(hood.causal, hood.stride, hood.kernel_size, strict=True)):
        return False  # queries without a window
    keys, consumers = int(tactic.constants["BN"] or 0), int(tactic.constants["CONSUMERS"] or 0)
    if tactic.constants.get("OVERLAP") and (hood.prefix or hood.suffix):
        return False
    made = cut(hood, HOPPER_ROWS * consumers, keys, True)
    plane = made.box if made.all_seen else made.axes[1].extent * made.axes[2].extent
    wide = max(a.reach for a in made.axes) >= NARROW
    if any(a.clip for a in made.axes) or (wide and made.axes[1].extent > 1):
        return False
    tables = 2 * 4 * ceil(plane / keys) * keys
    return (hopper_shared(call, tactic) + tables) * (3 - consumers) <= HOPPER_SHARED


def arguments(call: OpCall, optional: Sequence[str], hopper: bool) -> list[Argument]:
    extras = [int32("H", "H"), int32("B", "B")] if hopper else []
    extras += [int32("group", "H // HKV"), int32("scale", "scale_bits")]
    return [*inputs(call, optional), *strides(call), *extras, output(call)]


def work(call: OpCall, program: Program) -> Work:
    """Touched tiles of keys; a tile of prefix and suffix queries meets all tokens."""
    if call.batch is None:
        raise Unsupported("sizes", "the cost of a launch needs the batch")
    hood = Neighborhood.of(call.attributes)
    assert hood.tokens is not None
    bn = int(program.constants["BN"] or 0)
    sizes = [int(program.constants[f"T{a}"] or 0) for a in range(3)]
    made = Cut(hood, tuple(_axis(hood, a, sizes[a]) for a in range(3)))  # type: ignore[arg-type]
    heads, bm = call.batch * call.heads, made.queries
    apart = hood.prefix + hood.suffix
    runs = sum(-(-n // bn) for n in (hood.prefix, hood.suffix))
    met = made.keys_met(bn, program.language == "gluon")
    scores = float(made.tiles * (met + runs * bn) + ceil(apart / bm) * ceil(hood.tokens / bn) * bn) * bm
    masked = 0.0 if made.all_seen and not call.inputs else float(made.tiles * met) * bm
    size = 2 * call.batch * hood.tokens * (call.heads + call.kv_heads) * (call.head_dim + call.value_dim)
    dims = padded(call.head_dim) + padded(call.value_dim)
    blocks = (made.tiles + ceil(apart / bm)) * heads
    return Work(2.0 * scores * heads * dims, scores * heads, masked * heads, float(size), blocks, parted=parted(call))
