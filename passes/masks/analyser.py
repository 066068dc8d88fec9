"""Decides what a mask is: its factors are separated by structure, then evaluated at several lengths and fitted.

A factor that depends on constants and shapes only is evaluated element by element. One that depends on an input's data
is padding if it is the same for every query (its query axis has size 1), and opaque otherwise; a mask is never guessed
from sample inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isinf
from typing import Any

import numpy as np
from onnx import TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.head_pattern import HeadMasks
from attncompile.core.mask import Certificate, MaskedRows, MaskFacts, MaskKind, MaskPart
from attncompile.core.profile import ShapeProfile
from attncompile.passes.detect.scores import HIDDEN
from attncompile.passes.detect.softmax import MaskFactor, MaskQuery
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.grid import grid_with
from attncompile.passes.masks.conclude import Pictures, conclude, widths
from attncompile.passes.masks.factors import Leaf, Numbers, separate
from attncompile.passes.masks.heads import by_head, repeated_keys
from attncompile.passes.masks.lengths import Lengths, around, picture_of, visible_of_heads
from attncompile.passes.masks.pairs import Past, pairs, past_of, seen_enough
from attncompile.passes.masks.picture import Picture
from attncompile.passes.masks.windows import shifted_windows

_SEVERAL = 3
"""Lengths that a structure must have been seen at to be believed for others."""


class MaskAnalyser:
    """Analyses the masks of one model; results are shared by sites that read the same mask. ``grid`` is the user's."""

    def __init__(self, index: GraphIndex, world: World, profile: ShapeProfile, grid: TokenGrid | None = None) -> None:
        self.index = index
        self.world = world
        self.profile = profile
        self.grid = grid
        self.at = Lengths(index, world, profile)
        self._facts: dict[object, MaskFacts] = {}

    def world_at(self, binding: Mapping[str, int]) -> World | None:
        """The model at this binding; None where its shapes contradict it."""
        return self.at.world_at(binding)

    def __call__(self, query: MaskQuery) -> MaskFacts:
        key = (query.factors, query.guarded, query.stable, query.query_length, query.key_length)
        if key not in self._facts:
            self._facts[key] = self._analyse(query)
        return self._facts[key]

    def of_tokens(
        self, visible: np.ndarray, how: Certificate, fills: tuple[float, ...], guarded: bool
    ) -> MaskFacts:  # fmt: skip
        """The facts of a mask known as a bool array [query, key]: every query sees a key, lengths never change."""
        picture = Picture.of(visible, (visible.shape[0], visible.shape[1]))
        grid = grid_with(self.index, self.world, visible.shape[0], self.grid)
        parts = conclude({picture.lengths: picture}, True, False, True, grid, {})
        parts = [replace(p, certificate=replace(how, detail=f"{p.certificate.detail}: {how.detail}")) for p in parts]
        return MaskFacts(tuple(parts), "nan", fills, guarded)

    def of_counts(self, counts: np.ndarray, how: Certificate) -> MaskFacts:
        """The facts of a mask of which each head may have its own, and of keys that count several times."""
        seen = counts > 0
        if bool(np.all(seen == seen[:1])):
            facts = self.of_tokens(seen[0], how, (), False)
        else:
            facts = MaskFacts((by_head(seen, how),), "nan")
        repeats = repeated_keys(counts, how)
        return replace(facts, parts=(*facts.parts, repeats)) if repeats is not None else facts

    def _analyse(self, query: MaskQuery) -> MaskFacts:
        leaves: list[Leaf] = []
        parts: list[MaskPart] = []
        fills: list[float] = []
        for factor in query.factors:
            if factor.aligned:
                separate(self.index, self.world, factor, leaves, fills)
            elif not self._all_zero(factor):
                parts.append(self._unaligned(factor, fills))
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

    # Factors that are applied to scores of other axes than [batch, heads, query, key].

    def _unaligned(self, factor: MaskFactor, fills: list[float]) -> MaskPart:
        additive = factor.kind == "add"
        source = Certificate("structure", "added where the scores' axes are not [batch, heads, query, key]")
        data = self.index.data_inputs(factor.value)
        part = self._windows(factor, fills) if factor.windows > 1 and factor.factor == 1.0 and not data else None
        if part is not None:
            return part
        return MaskPart("opaque" if data or not additive else "bias", source, source=factor.value, additive=additive)

    def _windows(self, factor: MaskFactor, fills: list[float]) -> MaskPart | None:
        """One mask a window, [nW, 1, N, N], applied to the scores of batch entries that are windows."""
        try:
            array = self.world.value(factor.value)
        except Unsupported:
            return None
        if array.ndim not in (4, 5) or set(array.shape[:-4]) - {1} or array.shape[-4:-2] != (factor.windows, 1):
            return None
        array = array.reshape(factor.windows, *array.shape[-2:])
        fill, seen = factor.fill, array.astype(bool) ^ (factor.kind == "hidden")
        if factor.kind == "add":
            fill, seen = float(array.min()), array == 0
            if not np.all(seen | (array == fill)):
                return None
        pattern = shifted_windows(seen)
        if pattern is None:
            return None
        count, length = factor.windows, seen.shape[-1]
        detail = f"every element of {count} masks compared, one a window: batch entry b is window b mod {count}"
        additive = factor.kind == "add"
        if fill <= HIDDEN:
            fills.append(fill)
            how = Certificate("constant", detail, ((length, length),))
            return MaskPart("blocked", how, source=factor.value, additive=additive, pattern=pattern)
        # The method says that it is not added to scores of [batch, heads, query, key].
        detail = f"{detail}; adds {fill:.6g}, which is no proof that a key is hidden"
        how = Certificate("structure", detail, ((length, length),))
        return MaskPart("bias", how, source=factor.value, additive=True, pattern=pattern)

    # Factors from inputs.

    def _from_input(self, leaf: Leaf, query: MaskQuery) -> MaskPart:
        inputs = ", ".join(sorted(self.index.data_inputs(leaf.value)))
        shape = self.world.shapes.get(leaf.value)
        other = self.at.other_world()
        shapes = [shape] + ([other.shapes.get(leaf.value)] if other is not None else [])
        # Sizes of 1 at two bindings, one of them with more than one query, mean "the same for every query".
        broadcast = all(s is not None and (len(s) < 2 or s[-2] == 1) and (len(s) < 3 or s[-3] == 1) for s in shapes)
        if leaf.factor != 1.0:
            detail = f"depends on the data of input {inputs} and is scaled by {leaf.factor} after it is added"
            return MaskPart("opaque", Certificate("structure", detail), source=leaf.value, additive=True)
        if broadcast and (query.query_length > 1 or self.at.one_query(query)) and not leaf.negated:
            detail = f"from input {inputs}; the same for every query and head, since those axes have size 1"
            return MaskPart("padding", Certificate("structure", detail, general=True), source=leaf.value,
                            additive=not leaf.visible, as_input=self._plain(leaf, query))  # fmt: skip
        detail = f"depends on the data of input {inputs} and differs between queries or heads"
        return MaskPart("opaque", Certificate("structure", detail), source=leaf.value, additive=not leaf.visible,
                        as_input=self._plain(leaf, query))  # fmt: skip

    def _plain(self, leaf: Leaf, query: MaskQuery) -> bool:
        """Whether an op can take the value as it is: an operator's mask may also end before the keys do."""
        is_bool = self.world.types.get(leaf.value) == TensorProto.BOOL
        shape = self.world.shapes.get(leaf.value, (0,))
        sizes = zip(reversed(shape), (query.key_length, query.query_length), strict=False)
        fits = len(shape) <= 4 and all(size in (1, whole) for size, whole in sizes)
        return fits and leaf.visible == is_bool and not leaf.negated and leaf.factor == 1.0

    # Factors made of constants and shapes.

    def _from_shapes(self, leaves: list[Leaf], query: MaskQuery, fills: list[float]) -> list[MaskPart]:
        parts: list[MaskPart] = []
        masks: list[Leaf] = []
        merged: list[Leaf] = []
        for leaf in leaves:
            if leaf.visible:
                masks.append(leaf)
                continue
            try:
                numbers = Numbers.of(leaf.added(self.world.value(leaf.value)))
            except Unsupported as error:
                parts.append(
                    MaskPart("opaque", Certificate("evaluated", error.message), source=leaf.value, additive=True)
                )
                continue
            fills += numbers.fills
            if numbers.hides or not numbers.biases:
                (merged if numbers.biases else masks).append(leaf)
            if numbers.biases:
                detail = numbers.words
                kind: MaskKind = "bias"
                if leaf.factor != 1.0:
                    kind, detail = "opaque", f"{detail}, the scores being multiplied by {leaf.factor} after it is added"
                parts.append(MaskPart(kind, Certificate("evaluated", detail), source=leaf.value, additive=True))
        found = self._fit(masks, query)
        if merged:
            both = self._structure([*masks, *merged], query, named=False)
            # Adding such a tensor hides its keys too: where that has no structure the bias says it all.
            found = found if any(p.kind == "opaque" or isinstance(p.pattern, HeadMasks) for p in both) else both
        return [*found, *parts]

    def _fit(self, leaves: list[Leaf], query: MaskQuery) -> list[MaskPart]:
        """The structure of all leaves together, else of each alone."""
        if not leaves:
            return []
        together = self._structure(leaves, query)
        if len(leaves) == 1 or not any(p.kind in ("opaque", "block_sparse") for p in together):
            return together
        alone = [self._structure([leaf], query) for leaf in leaves]
        known = all(p.kind not in ("opaque", "block_sparse") for parts in alone for p in parts)
        return [p for parts in alone for p in parts] if known else together

    def _structure(self, leaves: list[Leaf], query: MaskQuery, named: bool = True) -> list[MaskPart]:
        """What the leaves say together; ``named``: a part that is one leaf alone names it as its source."""
        source: dict[str, Any] = {}
        if len(leaves) == 1 and named:
            (leaf,) = leaves
            source = {"source": leaf.value, "additive": not leaf.visible, "as_input": self._plain(leaf, query)}
        dynamic = self.at.driving_symbols(query)
        stored = not dynamic or all(leaf.value in self.index.initializers for leaf in leaves)
        try:
            picture = picture_of(leaves, self.world, query)
        except Unsupported as error:
            part = self._one_a_window(leaves) or self._one_a_head(leaves, query, source) if not dynamic else None
            return [part or MaskPart("opaque", Certificate("evaluated", error.message), **source)]
        symbol = self.at.moved_by(leaves, query, dynamic, picture)
        if symbol is not None:
            detail = f"changes with '{symbol}', which is not a length of this site"
            return [MaskPart("opaque", Certificate("evaluated", detail), **source)]
        pictures: Pictures = {picture.lengths: picture}
        grid = None
        if not dynamic and picture.window is None and query.query_length == query.key_length:
            grid = grid_with(self.index, self.world, query.query_length, self.grid)
        if not stored:
            for length in self.at.first(leaves):
                self.at.add(pictures, leaves, query, dynamic, length)
            numbers, largest = widths(pictures), max(max(lengths) for lengths in pictures)
            widest = max(numbers, default=0)
            for length in (*around(numbers, largest), *([2 * widest + 1] * (2 * widest > largest))):
                self.at.add(pictures, leaves, query, dynamic, length)
        past = past_of(self.at, query, dynamic) if not stored else None
        apart = past is not None and self._pairs(pictures, leaves, query, past)
        general = not stored and (len(dynamic) == 1 or apart) and len(pictures) >= _SEVERAL
        vectors = any(p.window is None for p in pictures.values())
        general = general and not self.at.cut_from_table(leaves, vectors)
        return conclude(pictures, stored, general, not dynamic, grid, source)

    def _pairs(self, pictures: Pictures, leaves: list[Leaf], query: MaskQuery, past: Past) -> bool:
        """Adds pictures at which past and sequence differ; whether those tell the two apart."""
        if any(p.window is None for p in pictures.values()):
            return False  # nothing but a window is claimed for two lengths
        numbers = widths(pictures)
        for before, new in pairs(self.at, past, numbers, self.at.first(leaves)):
            self.at.add_at(pictures, leaves, query, past.sizes(before, new))
        return widths(pictures) == numbers and seen_enough(pictures, numbers)

    def _one_a_head(self, leaves: list[Leaf], query: MaskQuery, source: dict[str, Any]) -> MaskPart | None:
        """A mask of its own in each head, the same in all batch entries."""
        try:
            visible = visible_of_heads(leaves, self.world, query)
        except Unsupported:
            return None
        shape = (query.query_length, query.key_length)
        how = Certificate("constant", f"every element of {len(visible)} masks compared, one a head", (shape,))
        return replace(by_head(visible, how), **source)

    def _one_a_window(self, leaves: list[Leaf]) -> MaskPart | None:
        """One mask a batch entry, where the batch is windows."""
        if len(leaves) != 1:
            return None
        array = self.world.value(leaves[0].value)
        if array.ndim != 4 or array.shape[1] != 1 or array.shape[0] < 2:
            return None
        pattern = shifted_windows(leaves[0].seen(array)[:, 0])
        if pattern is None:
            return None
        detail = f"every element of {array.shape[0]} masks compared, one a batch entry"
        how = Certificate("constant", detail, (array.shape[-2:],))
        return MaskPart("blocked", how, source=leaves[0].value, additive=not leaves[0].visible, pattern=pattern)
