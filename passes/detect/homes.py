"""Where an attention core begins and ends: the values that hold query, key, value and output with their axes apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import Layout, Operand
from attncompile.passes.detect.views import Atoms, Axes, Axis

BYTES = {
    int(TensorProto.FLOAT16): 2, int(TensorProto.BFLOAT16): 2, int(TensorProto.FLOAT): 4, int(TensorProto.DOUBLE): 8,
}  # fmt: skip
"""Sizes of the element types that attention is computed in."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A value on an operand's way from its home to the product, with its axes and its element type."""

    value: str
    axes: Axes
    dtype: int


@dataclass(frozen=True, slots=True)
class Walk:
    """An operand's stages, the deepest first; ``nodes[i]`` leads from stage i to stage i + 1, and the node whose first
    output is ``reader`` reads the last one.
    """

    stages: tuple[Stage, ...]
    nodes: tuple[NodeProto, ...]
    scales: tuple[float, ...]
    reader: str


@dataclass(frozen=True, slots=True)
class Homes:
    """Query, key, value and output, and where each lies among its stages."""

    operands: tuple[Operand, Operand, Operand, Operand]
    at: tuple[int, int, int, int]
    kv_heads: Axis


@dataclass(frozen=True, slots=True)
class Separation:
    """``value`` holds an operand (or the output) in another rank: its elements, in order, are those of ``layout``.

    ``reader`` is the first output of the node that reads it on the way to the core, empty for the output.
    ``groups`` are the axes that an output of more than four has in place of its heads; ``swapped`` says that the last
    two axes of ``value`` (a key, ready for its product) come in the other order. ``form``: batch and sequence come
    first (``outer``), sequence and dim last (``inner``), or there are no other axes than these two (``matrix``); or
    there are four axes in another order (``permuted``: ``perm`` gives those of ``layout``), or all is as it should be
    but the element type, which ``kinds`` (the wider one wanted, its own) says (``wider``).
    """

    value: str
    reader: str
    layout: Layout
    heads: int
    dim: int
    form: Literal["outer", "inner", "matrix", "permuted", "wider"]
    groups: tuple[int, ...] = ()
    swapped: bool = False
    perm: tuple[int, ...] = ()
    kinds: tuple[int, int] = (0, 0)


class NotSeparate(Unsupported):
    """Operands or the output have no rank-4 value. ``separations``, if any, would give each one."""

    def __init__(self, reason: str, separations: tuple[Separation, ...] = ()) -> None:
        super().__init__("layout", reason)
        self.separations = separations


class ShapeRead(Unsupported):
    """Somebody outside of the site reads the shape of an inner value: ``outputs`` of those Shape nodes."""

    def __init__(self, reason: str, outputs: tuple[str, ...]) -> None:
        super().__init__("shape-read", reason)
        self.outputs = outputs


def find_homes(
    atoms: Atoms, walks: tuple[Walk, Walk, Walk], out: list[Stage], batch: Axis, heads: Axis,
    sequences: tuple[Axis, Axis], dims: tuple[Axis, Axis],
) -> Homes:  # fmt: skip
    """The homes of one element type for all four: the narrowest there is, so that casts around the core go too.

    Raises:
        NotSeparate: no type at which query, key, value and output each have batch, heads, sequence and dim apart.
    """
    reasons: list[NotSeparate] = []
    kinds = {s.dtype for w in walks for s in w.stages} | {s.dtype for s in out if s.dtype}
    for kind in sorted(kinds, key=lambda k: BYTES.get(k, 0)):
        try:
            return _homes_of(_Search(atoms, kind, batch, heads), walks, out, sequences, dims)
        except NotSeparate as error:
            reasons.append(error)
    raise next((r for r in reasons if r.separations), reasons[-1])


@dataclass(frozen=True, slots=True)
class _Search:
    atoms: Atoms
    kind: int
    batch: Axis
    heads: Axis

    def home(self, stages: tuple[Stage, ...], choices: list[Axis], sequence: Axis, dim: Axis) -> _Found | None:
        """The earliest stage of the wanted type that is [batch, sequence, heads, dim] or its transpose."""
        b, s, d = (self.atoms.leaves(a) for a in (self.batch, sequence, dim))
        for at, stage in enumerate(stages):
            leaves = tuple(self.atoms.leaves(a) for a in stage.axes)
            for heads in choices[::-1] if stage.dtype == self.kind else ():
                h = self.atoms.leaves(heads)
                if leaves == (b, h, s, d):
                    return _Found(Operand(stage.value, "BHND"), at, h)
                if leaves == (b, s, h, d):
                    return _Found(Operand(stage.value, "BNHD"), at, h)
        return None

    def separation(self, walk: Walk, choices: list[Axis], sequence: Axis, dim: Axis) -> tuple[Separation, Axis] | None:
        """The earliest stage that a Reshape would make a home, with the heads that it holds."""
        readers = [*(n.output[0] for n in walk.nodes), walk.reader]
        for swapped in (False, True):
            for stage, reader in zip(walk.stages, readers, strict=True):
                axes = (*stage.axes[:-2], stage.axes[-1], stage.axes[-2]) if swapped else stage.axes
                for heads in choices[::-1] if stage.dtype == self.kind else ():
                    made = self._reshaped(replace(stage, axes=axes), heads, sequence, dim, reader)
                    if made is not None and not (swapped and made.form == "outer"):
                        return replace(made, swapped=swapped), self.atoms.leaves(heads)
        for made_of in (self._permuted, self._widened):
            for stage, reader in zip(walk.stages, readers, strict=True):
                for heads in choices[::-1]:
                    made = made_of(stage, heads, sequence, dim, reader)
                    if made is not None:
                        return made, self.atoms.leaves(heads)
        return None

    def output_separation(self, stages: list[Stage], sequence: Axis, dim: Axis) -> Separation | None:
        for made_of in (self._reshaped, self._permuted):
            for stage in stages[::-1]:
                made = made_of(stage, self.heads, sequence, dim, "") if stage.dtype == self.kind else None
                if made is not None:
                    return made
        return None

    def _permuted(self, stage: Stage, heads: Axis, sequence: Axis, dim: Axis, reader: str) -> Separation | None:
        """Four axes in another order, as in XLNet's [sequence, batch, heads, dim]."""
        wanted = [self.atoms.leaves(a) for a in (self.batch, sequence, heads, dim)]
        held = [self.atoms.leaves(a) for a in stage.axes]
        if stage.dtype != self.kind or len(held) != 4:
            return None
        perm = next((p for p in permutations(range(4)) if [held[i] for i in p] == wanted), None)
        sizes = self.atoms.size(wanted[2]), self.atoms.size(wanted[3])
        return Separation(stage.value, reader, "BNHD", *sizes, "permuted", perm=perm) if perm else None

    def _widened(self, stage: Stage, heads: Axis, sequence: Axis, dim: Axis, reader: str) -> Separation | None:
        """A narrower value among wider ones: it fits into their type, and back, without a change."""
        b, s, d, h = (self.atoms.leaves(a) for a in (self.batch, sequence, dim, heads))
        held = tuple(self.atoms.leaves(a) for a in stage.axes)
        layout: Layout | None = "BHND" if held == (b, h, s, d) else "BNHD" if held == (b, s, h, d) else None
        if layout is None or not 0 < BYTES.get(stage.dtype, 0) < BYTES.get(self.kind, 0):
            return None
        sizes = self.atoms.size(h), self.atoms.size(d)
        return Separation(stage.value, reader, layout, *sizes, "wider", kinds=(self.kind, stage.dtype))

    def _reshaped(self, stage: Stage, heads: Axis, sequence: Axis, dim: Axis, reader: str) -> Separation | None:
        b, s, d, h = (self.atoms.leaves(a) for a in (self.batch, sequence, dim, heads))
        axes = tuple(self.atoms.leaves(a) for a in stage.axes)
        flat = tuple(x for axis in axes for x in axis)
        sizes = self.atoms.size(h), self.atoms.size(d)
        groups = tuple(self.atoms.size(a) for a in axes)
        if axes == (s, d) and not b and not h:
            return Separation(stage.value, reader, "BHND", *sizes, "matrix")
        if flat == (*b, *s, *h, *d) and len(axes) > 2 and axes[:2] == (b, s):
            return Separation(stage.value, reader, "BNHD", *sizes, "outer", groups[2:])
        if flat == (*b, *h, *s, *d) and len(axes) > 2 and axes[-2:] == (s, d):
            # The number of batch entries is what is left, so every other axis before the sequence must be known.
            inner = () if len(axes) == 3 else groups[1:-2]
            if len(axes) == 3 or axes[0] == b:
                return Separation(stage.value, reader, "BHND", *sizes, "inner", inner)
        return None


@dataclass(frozen=True, slots=True)
class _Found:
    operand: Operand
    at: int
    heads: Axis


def _homes_of(
    search: _Search, walks: tuple[Walk, Walk, Walk], out: list[Stage], sequences: tuple[Axis, Axis],
    dims: tuple[Axis, Axis],
) -> Homes:  # fmt: skip
    (queries, keys), (dim, value_dim) = sequences, dims
    heads, every = search.heads, [search.heads]
    shared = [heads[:n] for n in range(len(heads) + 1)]
    wanted = [("query", walks[0], every, queries, dim), ("key", walks[1], shared, keys, dim),
              ("value", walks[2], shared, keys, value_dim)]  # fmt: skip
    found = [search.home(w.stages, choices, s, d) for _, w, choices, s, d in wanted]
    # The latest stage of the output, so that the transposes after the site disappear.
    end = search.home(tuple(out[::-1]), every, queries, value_dim)
    if found[1] is not None and found[2] is not None and found[1].heads != found[2].heads:
        # One of them is shared among more heads than the other: take both where they have all heads.
        found[1] = search.home(walks[1].stages, every, keys, dim)
        found[2] = search.home(walks[2].stages, every, keys, value_dim)
    query, key, value = found
    if query is None or key is None or value is None or end is None:
        raise _not_separate(search, wanted, found, out, end, queries, value_dim)
    return Homes(
        (query.operand, key.operand, value.operand, end.operand),
        (query.at, key.at, value.at, len(out) - 1 - end.at), key.heads,
    )  # fmt: skip


def _not_separate(
    search: _Search, wanted: list[tuple[str, Walk, list[Axis], Axis, Axis]], found: list[_Found | None],
    out: list[Stage], end: _Found | None, queries: Axis, value_dim: Axis,
) -> NotSeparate:  # fmt: skip
    missing = [name for (name, *_), f in zip(wanted, found, strict=True) if f is None] + ["output"] * (end is None)
    reason = f"no rank-4 value with batch, heads, sequence and head dim as separate axes holds the {missing[0]}"
    made: list[Separation] = []
    for (_, walk, choices, sequence, dim), f in zip(wanted, found, strict=True):
        if f is None:
            separation = search.separation(walk, choices, sequence, dim)
            if separation is None:
                return NotSeparate(reason)
            made.append(separation[0])
    if end is None:
        last = search.output_separation(out, queries, value_dim)
        if last is None:
            return NotSeparate(reason)
        made.append(last)
    return NotSeparate(reason, tuple(made))
