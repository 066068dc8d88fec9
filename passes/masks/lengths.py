"""At which lengths a mask that is computed from shapes is looked at, and what it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.profile import ShapeProfile
from attncompile.passes.detect.softmax import MaskQuery
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.masks.factors import Leaf
from attncompile.passes.masks.picture import Picture

PRIME = 127
"""A length that no power of two, table or window hides behind."""

_MAX_NUMBERS = 2
"""Numbers of the mask's own arithmetic, and of its structure, whose neighbouring lengths are tested."""

_CHEAP = 1024
"""Widths up to this are tested at every length that may tell something."""

_TABLE = 8
"""A stored vector longer than this says something of each position: a short one is a shape or a list of axes."""


class Lengths:
    """The model at other sizes."""

    def __init__(self, index: GraphIndex, world: World, profile: ShapeProfile) -> None:
        self.index = index
        self.world = world
        self.profile = profile
        self._worlds: dict[tuple[tuple[str, int], ...], World | None] = {tuple(sorted(world.binding.items())): world}

    def world_at(self, binding: Mapping[str, int]) -> World | None:
        """The model at this binding; None where its shapes contradict it."""
        key = tuple(sorted(binding.items()))
        if key not in self._worlds:
            try:
                self._worlds[key] = World(self.index, binding)
            except AttncompileError:
                self._worlds[key] = None
        return self._worlds[key]

    def other_world(self) -> World | None:
        """The model at another corner of the profile."""
        for _, binding in self.profile.bindings():
            if binding != self.world.binding:
                return self.world_at(binding)
        return None

    def driving_symbols(self, query: MaskQuery) -> list[str]:
        """The symbols that the query or key length depends on."""
        driving = []
        for symbol in self.profile.ranges:
            world = self.world_at({**self.world.binding, symbol: self.world.binding[symbol] + 1})
            if world is None:
                continue
            lengths = self.lengths(world, query)
            if lengths is not None and lengths != (query.query_length, query.key_length):
                driving.append(symbol)
        return driving

    def one_query(self, query: MaskQuery) -> bool:
        """Whether there is one query whatever the sizes (a decode step), so that no mask differs between queries."""
        worlds = [self.world_at(binding) for _, binding in self.profile.bindings()]
        worlds += [self.world_at({**self.world.binding, s: self.world.binding[s] + 1}) for s in self.profile.ranges]
        found = [self.lengths(w, query) for w in worlds if w is not None]
        return query.query_length == 1 and all(lengths is not None and lengths[0] == 1 for lengths in found)

    def lengths(self, world: World, query: MaskQuery) -> tuple[int, int] | None:
        q, k = world.shapes.get(query.query), world.shapes.get(query.key)
        return (q[query.query_axis], k[query.key_axis]) if q is not None and k is not None else None

    def moved_by(self, leaves: list[Leaf], query: MaskQuery, dynamic: list[str], picture: Picture) -> str | None:
        """A symbol that changes the mask though it changes neither length (the size of another input)."""
        shapes = {n.input[0] for leaf in leaves for n in self.index.slice_nodes(leaf.value)
                  if n.op_type in ("Shape", "Size")}  # fmt: skip
        for symbol, sizes in self.profile.ranges.items():
            if symbol in dynamic or not shapes:
                continue
            for size in sorted({sizes.minimum, self.world.binding[symbol] + 1, sizes.maximum}):
                world = self.world_at({**self.world.binding, symbol: size})
                if world is None or all(world.shapes.get(v) == self.world.shapes.get(v) for v in shapes):
                    continue
                try:
                    other = picture_of(leaves, world, query)
                except Unsupported:
                    return symbol
                if (other.window, other.bits) != (picture.window, picture.bits):
                    return symbol
        return None

    def first(self, leaves: list[Leaf]) -> list[int]:
        """The profile's sizes, a prime, and lengths around the numbers in the mask's own arithmetic, where a window may
        begin to bite.
        """
        lengths = [PRIME]
        for r in self.profile.ranges.values():
            lengths += [r.minimum, r.usual, r.maximum]
        numbers: set[int] = set()
        for leaf in leaves:
            for node in self.index.slice_nodes(leaf.value):
                for name in node.input:
                    number = self.world.scalar(name) if name and name not in self.index.inputs else None
                    if number is not None and 8 <= abs(number) <= 16384 and number == int(number):
                        numbers.add(abs(int(number)))
        return lengths + around(numbers - set(self.world.binding.values()), max(lengths))

    def add(
        self, pictures: dict[tuple[int, int], Picture], leaves: list[Leaf], query: MaskQuery, dynamic: list[str], n: int
    ) -> None:
        """The picture with all driving symbols at ``n``, if there is one."""
        if n >= 1:
            self.add_at(pictures, leaves, query, dict.fromkeys(dynamic, n))

    def add_at(
        self, pictures: dict[tuple[int, int], Picture], leaves: list[Leaf], query: MaskQuery, sizes: Mapping[str, int]
    ) -> None:
        """The picture at these sizes of the driving symbols, if there is one."""
        world = self.world_at({**self.world.binding, **sizes})
        if world is None or (lengths := self.lengths(world, query)) is None or lengths in pictures:
            return
        try:
            pictures[lengths] = picture_of(
                leaves, world, replace(query, query_length=lengths[0], key_length=lengths[1])
            )
        except Unsupported:
            return  # too large or contradictory at this length; the certificate lists the lengths that were seen
        finally:
            world.forget(leaf.value for leaf in leaves)

    def cut_from_table(self, leaves: list[Leaf], vectors: bool) -> bool:
        """Whether a stored table of two axes goes into the mask (or a vector, if ``vectors``): what it says beyond the
        lengths seen is not known.
        """
        for leaf in leaves:
            for node in self.index.slice_nodes(leaf.value):
                for name in (*node.input, *(node.output if node.op_type == "Constant" else ())):
                    if name not in self.index.initializers and node.op_type != "Constant":
                        continue
                    shape = self.world.shapes.get(name, ())
                    if sum(size > 1 for size in shape) > 1 or (vectors and max(shape, default=0) > _TABLE):
                        return True
        return False


def around(numbers: Iterable[int], largest: int) -> list[int]:
    """Lengths at which a window of one of these widths has just not begun, begins, and is far from both ends.

    ``largest`` is looked at anyway: a large mask takes seconds, so that nothing further is made where it is far enough.
    """
    lengths = []
    for w in sorted(numbers)[:_MAX_NUMBERS]:
        lengths += [w - 1, w, w + 1] + [w + 2] * (w <= _CHEAP)
        lengths += [2 * w + 1] * (w <= _CHEAP or 2 * w > largest)
    return lengths


def picture_of(leaves: list[Leaf], world: World, query: MaskQuery) -> Picture:
    """What all leaves together let through.

    Raises:
        Unsupported: a value that cannot be evaluated, that differs between heads or batch entries, or whose shape is
            not that of the scores.
    """
    shape = (query.query_length, query.key_length)
    visible: np.ndarray = np.ones((1, 1), dtype=bool)
    for leaf in leaves:
        seen = leaf.seen(world.value(leaf.value))
        while seen.ndim > 2:
            if seen.shape[0] > 1 and not bool(np.all(seen == seen[:1])):
                of = "heads" if seen.ndim == 3 else "batch entries"
                raise Unsupported("per-head-mask", f"mask '{leaf.value}' differs between {of}")
            seen = seen[0]
        try:
            visible = np.broadcast_to(visible & seen, np.broadcast_shapes(visible.shape, seen.shape, shape))
        except ValueError:
            sizes = f"{list(seen.shape)}, the scores {list(shape)}"
            raise Unsupported("mask-shape", f"mask '{leaf.value}' has shape {sizes}") from None
    if visible.shape != shape:
        raise Unsupported("mask-shape", f"the mask has shape {list(visible.shape)}, the scores {list(shape)}")
    return Picture.of(visible, shape)


def visible_of_heads(leaves: list[Leaf], world: World, query: MaskQuery) -> np.ndarray:
    """Bool [heads, query, key]: what all leaves together let through where heads have masks of their own.

    Raises:
        Unsupported: batch entries differ, or the shape is not that of the scores.
    """
    shape = (query.query_length, query.key_length)
    visible: np.ndarray = np.ones((1, 1, 1), dtype=bool)
    for leaf in leaves:
        seen = leaf.seen(world.value(leaf.value))
        while seen.ndim > 3:
            if seen.shape[0] > 1 and not bool(np.all(seen == seen[:1])):
                raise Unsupported("per-head-mask", f"mask '{leaf.value}' differs between batch entries")
            seen = seen[0]
        try:
            visible = np.broadcast_to(visible & seen, np.broadcast_shapes(visible.shape, seen.shape, (1, *shape)))
        except ValueError:
            raise Unsupported("mask-shape", f"mask '{leaf.value}' has shape {list(seen.shape)}") from None
    if visible.shape[1:] != shape or len(visible) < 2:
        raise Unsupported("mask-shape", f"the mask has shape {list(visible.shape)}, the scores {list(shape)}")
    return visible
