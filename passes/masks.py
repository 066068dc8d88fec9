"""Decides what a mask is: its factors are separated by structure, then evaluated at several lengths and fitted.

A factor that depends on constants and shapes only is evaluated element by element. One that depends on an input's data
is padding if it is the same for every query (its query axis has size 1), and opaque otherwise; a mask is never guessed
from sample inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isinf

import numpy as np
from onnx import TensorProto

from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.mask import Certificate, MaskedRows, MaskFacts, MaskKind, MaskPart
from attncompile.core.profile import ShapeProfile
from attncompile.passes.detect.scores import HIDDEN
from attncompile.passes.detect.softmax import MaskFactor, MaskQuery
from attncompile.passes.evaluate import GraphIndex, World

_PRIME = 127
_SEVERAL = 3
"""Lengths that a window must have been seen at to be believed for others."""

_MAX_STEPS = 256
"""Nodes of a sum of masks that are looked through."""

_MAX_WINDOWS = 2
"""Window widths taken from the mask's own constants, whose neighbouring lengths are tested too."""


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A factor that cannot be separated further. ``visible``: bool, True = seen; else added to the scores, which are
    then multiplied by ``factor``.
    """

    value: str
    visible: bool
    negated: bool = False
    factor: float = 1.0


class MaskAnalyser:
    """Analyses the masks of one model; results are shared by sites that read the same mask."""

    def __init__(self, index: GraphIndex, world: World, profile: ShapeProfile) -> None:
        self.index = index
        self.world = world
        self.profile = profile
        self._worlds: dict[tuple[tuple[str, int], ...], World | None] = {tuple(sorted(world.binding.items())): world}
        self._facts: dict[object, MaskFacts] = {}
        self._pictures: dict[tuple[str, int], _Picture | None] = {}

    def world_at(self, binding: Mapping[str, int]) -> World | None:
        """The model at this binding; None where its shapes contradict it."""
        key = tuple(sorted(binding.items()))
        if key not in self._worlds:
            try:
                self._worlds[key] = World(self.index, binding)
            except AttncompileError:
                self._worlds[key] = None
        return self._worlds[key]

    def __call__(self, query: MaskQuery) -> MaskFacts:
        key = (query.factors, query.guarded, query.stable, query.query_length, query.key_length)
        if key not in self._facts:
            self._facts[key] = self._analyse(query)
        return self._facts[key]

    def _analyse(self, query: MaskQuery) -> MaskFacts:
        leaves: list[_Leaf] = []
        parts: list[MaskPart] = []
        fills: list[float] = []
        for factor in query.factors:
            if not factor.aligned:
                if not self._all_zero(factor):
                    parts.append(self._unaligned(factor))
                continue
            self._separate(factor, leaves, fills)
        static = [leaf for leaf in leaves if not self.index.data_inputs(leaf.value)]
        for leaf in leaves:
            if leaf not in static:
                parts.append(self._from_input(leaf, query))
        if static:
            parts += self._from_shapes(static, query, fills)
        rows: MaskedRows = "uniform"
        if any(not leaf.visible for leaf in leaves if leaf not in static):
            pass  # an additive input may hold anything: no claim beyond the weakest
        elif fills and all(isinf(f) for f in fills):  # with others among them a row may still have a largest score
            rows = "zero" if query.guarded else "nan"
        elif not query.stable and fills:
            rows = "nan"  # exp of a finite fill is 0 without the maximum taken off: 0 / 0
        return MaskFacts(tuple(parts), rows, tuple(fills), query.guarded)

    def _all_zero(self, factor: MaskFactor) -> bool:
        """Whether a bias that the exporter left in (baddbmm of zeros) adds nothing."""
        if factor.kind != "add" or self.index.data_inputs(factor.value):
            return False
        try:
            return not np.any(self.world.value(factor.value))
        except Unsupported:
            return False

    def _unaligned(self, factor: MaskFactor) -> MaskPart:
        source = Certificate("structure", "added where the scores' axes are not [batch, heads, query, key]")
        kind: MaskKind = "opaque" if self.index.data_inputs(factor.value) or factor.kind != "add" else "bias"
        return MaskPart(kind, source, source=factor.value, additive=factor.kind == "add")

    def _separate(self, factor: MaskFactor, leaves: list[_Leaf], fills: list[float]) -> None:
        """Splits conjunctions of bools and sums of biases into leaves whose axes still mean the scores' axes."""
        if factor.kind != "add":
            fill = _scaled(factor.fill, factor.factor)
            if not fill <= HIDDEN:
                raise Unsupported("mask-scale", f"scores filled with {factor.fill} are multiplied by {factor.factor}")
            fills.append(fill)
            self._split_bool(factor.value, factor.kind == "hidden", leaves)
            return
        self._split_sum(factor.value, leaves, fills, factor.factor)

    def _split_sum(self, value: str, leaves: list[_Leaf], fills: list[float], factor: float) -> None:
        pending, steps = [value], 0
        while pending:
            value, steps = pending.pop(), steps + 1
            if steps > _MAX_STEPS:
                raise Unsupported("mask-form", f"the mask is a sum of more than {_MAX_STEPS} values")
            node = self.index.producer.get(value)
            op = node.op_type if node is not None and node.domain in ("", "ai.onnx") else ""
            if node is not None and op in ("Identity", "Expand", "Cast"):
                if op != "Cast" or self.world.types.get(node.input[0]) in (1, 10, 11, 16):
                    pending.append(node.input[0])
                    continue
            elif node is not None and op == "Add" and node.input[0] != node.input[1]:
                pending += [node.input[1], node.input[0]]
                continue
            elif node is not None and op == "Where":
                on, off = (self.world.scalar(i) for i in node.input[1:])
                if on == 0.0 and off is not None and _scaled(off, factor) <= HIDDEN:
                    fills.append(_scaled(off, factor))
                    self._split_bool(node.input[0], False, leaves)
                    continue
                if off == 0.0 and on is not None and _scaled(on, factor) <= HIDDEN:
                    fills.append(_scaled(on, factor))
                    self._split_bool(node.input[0], True, leaves)
                    continue
            leaves.append(_Leaf(value, visible=False, factor=factor))

    def _split_bool(self, value: str, negated: bool, leaves: list[_Leaf]) -> None:
        pending, seen = [(value, negated)], set()
        while pending:
            value, negated = pending.pop()
            if (value, negated) in seen:
                continue
            seen.add((value, negated))
            node = self.index.producer.get(value)
            op = node.op_type if node is not None and node.domain in ("", "ai.onnx") else ""
            if node is not None and op == "Not":
                pending.append((node.input[0], not negated))
            elif node is not None and (
                op in ("Identity", "Expand")
                or (op == "Cast" and self.world.types.get(node.input[0]) == TensorProto.BOOL)
            ):
                pending.append((node.input[0], negated))
            elif node is not None and op == ("Or" if negated else "And"):
                pending += [(node.input[1], negated), (node.input[0], negated)]
            else:
                leaves.append(_Leaf(value, visible=True, negated=negated))

    def _from_input(self, leaf: _Leaf, query: MaskQuery) -> MaskPart:
        inputs = ", ".join(sorted(self.index.data_inputs(leaf.value)))
        shape = self.world.shapes.get(leaf.value)
        other = self._other_world()
        shapes = [shape] + ([other.shapes.get(leaf.value)] if other is not None else [])
        # Sizes of 1 at two bindings, one of them with more than one query, mean "the same for every query".
        broadcast = all(s is not None and (len(s) < 2 or s[-2] == 1) and (len(s) < 3 or s[-3] == 1) for s in shapes)
        if leaf.factor != 1.0:
            detail = f"depends on the data of input {inputs} and is scaled by {leaf.factor} after it is added"
            return MaskPart("opaque", Certificate("structure", detail), source=leaf.value, additive=True)
        if broadcast and query.query_length > 1 and not leaf.negated:
            detail = f"from input {inputs}; the same for every query and head, since those axes have size 1"
            return MaskPart("padding", Certificate("structure", detail, general=True), source=leaf.value,
                            additive=not leaf.visible)  # fmt: skip
        detail = f"depends on the data of input {inputs} and differs between queries or heads"
        return MaskPart("opaque", Certificate("structure", detail), source=leaf.value, additive=not leaf.visible)

    def _other_world(self) -> World | None:
        for _, binding in self.profile.bindings():
            if binding != self.world.binding:
                return self.world_at(binding)
        return None

    # Factors made of constants and shapes.

    def _from_shapes(self, leaves: list[_Leaf], query: MaskQuery, fills: list[float]) -> list[MaskPart]:
        parts: list[MaskPart] = []
        masks: list[_Leaf] = []
        for leaf in leaves:
            if leaf.visible:
                masks.append(leaf)
                continue
            try:
                values = self.world.value(leaf.value).astype(np.float64) * leaf.factor
            except Unsupported as error:
                parts.append(
                    MaskPart("opaque", Certificate("evaluated", error.message), source=leaf.value, additive=True)
                )
                continue
            lowest = float(values.min()) if values.size else 0.0
            if bool(np.all((values == 0) | (values <= HIDDEN))):
                if lowest < 0:
                    fills.append(_scaled(lowest, 1.0))
                masks.append(leaf)
            else:
                detail = f"{list(values.shape)} values from {values.min():.3g} to {values.max():.3g}"
                kind: MaskKind = "bias"
                if leaf.factor != 1.0:
                    kind, detail = "opaque", f"{detail}, the scores being multiplied by {leaf.factor} after it is added"
                parts.append(MaskPart(kind, Certificate("evaluated", detail), source=leaf.value, additive=True))
        if masks:
            part = self._fit(masks, query)
            if part is not None:
                parts.insert(0, part)
        return parts

    def _fit(self, leaves: list[_Leaf], query: MaskQuery) -> MaskPart | None:
        source = leaves[0].value if len(leaves) == 1 else None
        dynamic = self._driving_symbols(query)
        stored = not dynamic or all(leaf.value in self.index.initializers for leaf in leaves)
        try:
            pictures = {p.lengths: p for p in [self._picture(leaves, self.world, query)]}
        except Unsupported as error:
            return MaskPart("opaque", Certificate("evaluated", error.message), source=source)
        symbol = self._moved_by(leaves, query, dynamic, next(iter(pictures.values())))
        if symbol is not None:
            detail = f"changes with '{symbol}', which is not a length of this site"
            return MaskPart("opaque", Certificate("evaluated", detail), source=source)
        if stored:
            return self._conclude(pictures, "constant", False, source)
        for length in self._first_lengths(leaves):
            self._add_picture(pictures, leaves, query, dynamic, length)
        for window in self._seen_windows(pictures):
            for length in (window - 1, window, window + 1, 2 * window + 1):
                self._add_picture(pictures, leaves, query, dynamic, length)
        general = len(dynamic) == 1 and len(pictures) >= _SEVERAL and not self._cut_from_table(leaves)
        return self._conclude(pictures, "evaluated", general, source)

    def _cut_from_table(self, leaves: list[_Leaf]) -> bool:
        """Whether a stored table of two axes goes into the mask: what it says beyond the lengths seen is not known."""
        for leaf in leaves:
            for node in self.index.slice_nodes(leaf.value):
                for name in (*node.input, *(node.output if node.op_type == "Constant" else ())):
                    stored = name in self.index.initializers or node.op_type == "Constant"
                    if stored and sum(size > 1 for size in self.world.shapes.get(name, ())) > 1:
                        return True
        return False

    def _driving_symbols(self, query: MaskQuery) -> list[str]:
        """The symbols that the query or key length depends on."""
        driving = []
        for symbol in self.profile.ranges:
            world = self.world_at({**self.world.binding, symbol: self.world.binding[symbol] + 1})
            if world is None:
                continue
            lengths = self._lengths(world, query)
            if lengths is not None and lengths != (query.query_length, query.key_length):
                driving.append(symbol)
        return driving

    def _moved_by(self, leaves: list[_Leaf], query: MaskQuery, dynamic: list[str], picture: _Picture) -> str | None:
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
                    other = self._picture(leaves, world, query)
                except Unsupported:
                    return symbol
                if other.window != picture.window:
                    return symbol
        return None

    def _lengths(self, world: World, query: MaskQuery) -> tuple[int, int] | None:
        q, k = world.shapes.get(query.query), world.shapes.get(query.key)
        return (q[query.query_axis], k[query.key_axis]) if q is not None and k is not None else None

    def _first_lengths(self, leaves: list[_Leaf]) -> list[int]:
        lengths = [_PRIME]
        for r in self.profile.ranges.values():
            lengths += [r.minimum, r.usual, r.maximum]
        constants: set[int] = set()
        for leaf in leaves:
            for node in self.index.slice_nodes(leaf.value):
                for name in node.input:
                    number = self.world.scalar(name) if name and name not in self.index.inputs else None
                    if number is not None and 8 <= abs(number) <= 16384 and number == int(number):
                        constants.add(abs(int(number)))
        # Numbers in the mask's own arithmetic are where a window may begin to bite.
        shapes = set(self.world.binding.values())
        for number in sorted(constants - shapes)[:_MAX_WINDOWS]:
            lengths += [number - 1, number, number + 1, number + 2, 2 * number + 1]
        return lengths

    def _add_picture(
        self,
        pictures: dict[tuple[int, int], _Picture],
        leaves: list[_Leaf],
        query: MaskQuery,
        dynamic: list[str],
        n: int,
    ) -> None:
        if n < 1:
            return
        world = self.world_at({**self.world.binding, **dict.fromkeys(dynamic, n)})
        if world is None or (lengths := self._lengths(world, query)) is None or lengths in pictures:
            return
        try:
            pictures[lengths] = self._picture(
                leaves, world, replace(query, query_length=lengths[0], key_length=lengths[1])
            )
        except Unsupported:
            return  # too large or contradictory at this length; the certificate lists the lengths that were seen

    def _seen_windows(self, pictures: Mapping[tuple[int, int], _Picture]) -> list[int]:
        widths = {w + 1 for p in pictures.values() if p.window for w in p.window if w > 0}
        return sorted(w for w in widths if w > 1)[:_MAX_WINDOWS]

    def _picture(self, leaves: list[_Leaf], world: World, query: MaskQuery) -> _Picture:
        visible: np.ndarray = np.ones((1, 1), dtype=bool)
        shape = (query.query_length, query.key_length)
        for leaf in leaves:
            array = world.value(leaf.value)
            seen = (
                (array.astype(bool) ^ leaf.negated) if leaf.visible else array.astype(np.float64) * leaf.factor > HIDDEN
            )
            while seen.ndim > 2:
                if seen.shape[0] > 1 and not bool(np.all(seen == seen[:1])):
                    raise Unsupported("per-head-mask", f"mask '{leaf.value}' differs between heads or batch entries")
                seen = seen[0]
            try:
                visible = np.broadcast_to(visible & seen, np.broadcast_shapes(visible.shape, seen.shape, shape))
            except ValueError:
                sizes = f"{list(seen.shape)}, the scores {list(shape)}"
                raise Unsupported("mask-shape", f"mask '{leaf.value}' has shape {sizes}") from None
        return _Picture.of(visible, shape)

    def _conclude(
        self, pictures: Mapping[tuple[int, int], _Picture], method: str, general: bool, source: str | None
    ) -> MaskPart | None:
        lengths = tuple(sorted(pictures))
        odd = [n for n, p in pictures.items() if p.window is None]
        count = f"{len(pictures)} length{'s' * (len(pictures) > 1)}"
        certificate = Certificate("constant" if method == "constant" else "evaluated",
                                  f"every element compared at {count}", lengths, general)  # fmt: skip
        if odd:
            density = pictures[odd[0]].density
            detail = f"at lengths {odd[0]} no window: {density:.1%} of the keys are seen"
            return MaskPart("opaque", replace(certificate, detail=detail), source=source)
        left = _agree([(p.window[0], p.reach[0]) for p in pictures.values() if p.window])
        right = _agree([(p.window[1], p.reach[1]) for p in pictures.values() if p.window])
        if left is None or right is None:
            return MaskPart("opaque", replace(certificate, detail="its width changes with the length"), source=source)
        if (left, right) == (-1, -1):
            return None
        kind: MaskKind = "causal" if (left, right) == (-1, 0) else "window"
        return MaskPart(kind, certificate, left=left, right=right)


def _scaled(fill: float, factor: float) -> float:
    """The fill after a multiplication in float32, where the lowest number times 8 is -inf."""
    with np.errstate(over="ignore"):
        return float(np.float32(fill) * np.float32(factor))


@dataclass(frozen=True, slots=True)
class _Picture:
    """A mask at one pair of lengths: how far its window reaches to both sides, and how far it could."""

    lengths: tuple[int, int]
    window: tuple[int, int] | None
    reach: tuple[int, int]
    density: float

    @staticmethod
    def of(visible: np.ndarray, lengths: tuple[int, int]) -> _Picture:
        """``window`` is None where the mask is not exactly the set -left <= key - query <= right."""
        queries, keys = lengths
        density = float(visible.mean()) if visible.size else 0.0
        reach = (keys - 1, queries - 1)
        if visible.shape != lengths or not visible.any():
            return _Picture(lengths, None, reach, density)
        distance = np.arange(keys, dtype=np.int32)[None, :] - np.arange(queries, dtype=np.int32)[:, None]
        distance -= keys - queries
        seen = distance[visible]
        left, right = -int(seen.min()), int(seen.max())
        exact = bool(np.array_equal(visible, (distance >= -left) & (distance <= right)))
        # A window that leaves out the query's own position is not one that -1 = unlimited could be told from.
        return _Picture(lengths, (left, right) if exact and left >= 0 and right >= 0 else None, reach, density)


def _agree(observed: list[tuple[int, int]]) -> int | None:
    """One width for all lengths: -1 if it always reaches the end, None if the lengths contradict one another."""
    bounded = {width for width, reach in observed if width < reach}
    if not bounded:
        return -1
    if len(bounded) > 1:
        return None
    (width,) = bounded
    return width if all(reach <= width for w, reach in observed if w >= reach and w != width) else None
