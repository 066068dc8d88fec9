"""Softmax attention, whole or in pieces: where the products around a softmax are not attention over all tokens, the
windows they work on are followed back to the tokens, or the region is run to see what it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.mask import Certificate, MaskFacts
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import softmax
from attncompile.passes.detect.gathers.lift import lift_gathered
from attncompile.passes.detect.homes import ShapeRead
from attncompile.passes.detect.normaliser import softmax_operator
from attncompile.passes.detect.probed.lift import Readings, lift_probed
from attncompile.passes.detect.probed.region import Region
from attncompile.passes.detect.sinks import NotStored
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.detect.token_heads import moved_before, queries_as_heads, tokens_among
from attncompile.passes.evaluate import GraphIndex, World

_FOLLOWED = "every pair of query and key compared, the windows followed back to their tokens"
_READ = "every pair of query and key read by running the region, which equals attention on random inputs"

_TELLING = frozenset({
    "padding-seen", "gather-bias", "gather-tokens", "gather-twice", "scores-used", "value-axis", "dynamic", "too-large",
})  # fmt: skip
"""Reasons of the second look that say more than those of the first: the windows themselves were understood."""

_UNKNOWN = frozenset({"unknown-op", "joined-scores"})
_IN_PIECES = _UNKNOWN | {"weights-used", "no-value-product"}
"""Reasons of the first look after which the region is run: something stands where it was not expected. Where the parts
were understood and are not attention over tokens, running them cannot know better.
"""


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site around the ``Softmax`` node.

    Raises:
        Unsupported: this softmax is not attention, or a form of it that is not understood.
    """
    try:
        site = softmax.lift(index, world, node, analyse)
        if not tokens_among(index, world, site, "H"):
            return _side_by_side(index, world, node, analyse, site) or site
        first = queries_as_heads()
    except Unsupported as error:
        first = error
    try:
        return _followed(index, world, node, analyse)
    except Unsupported as error:
        if error.code in _TELLING and not isinstance(first, ShapeRead):  # that one is mended, and looked at again
            first = error
    if first.code not in _IN_PIECES:
        raise first
    try:
        return _read(index, world, node, analyse)
    except Unsupported as error:
        tells = error.code in {"dynamic", "padding-enters"} and first.code in _UNKNOWN
        raise (error if tells else first) from error


def _side_by_side(
    index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis, site: AttentionSite
) -> AttentionSite | None:
    """``site``, whose batch entries may be windows of a grid (Swin), as one over the grid; None where it is not."""
    if site.batch == 1 or site.cache is not None or not moved_before(index, world, site.key.value):
        return None
    try:
        return _followed(index, world, node, analyse, windowed=True)
    except NotStored:
        raise
    except Unsupported:
        return None


def _followed(
    index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis, windowed: bool = False
) -> AttentionSite:
    """The site of a core over windows, the same at all sizes of the batch."""
    seen: list[tuple[np.ndarray, MaskFacts]] = []

    def facts_of(picture: np.ndarray, guarded: bool, fills: tuple[float, ...]) -> MaskFacts:
        if not any(np.array_equal(picture, known) for known, _ in seen):
            how = Certificate("structure", _FOLLOWED, (picture.shape,))
            seen.append((picture, analyse.of_tokens(picture, how, fills, guarded)))
        return next(facts for known, facts in seen if np.array_equal(picture, known))

    def at(other: World) -> AttentionSite:
        return lift_gathered(index, other, softmax_operator(index, other, node), facts_of, windowed)

    site = at(world)
    operands = (site.query, site.key, site.value, site.output)
    for symbol, other, changed in _changes(index, world, (*(o.value for o in operands), *site.interior)):
        lengths = [shape[o.layout.index("N")] if (shape := other.shapes.get(o.value)) else None for o in operands[:2]]
        if lengths != [site.query_length, site.key_length]:
            raise _dynamic(world, symbol, changed)
        if replace(at(other), batch=site.batch) != site:
            raise Unsupported("dynamic", f"the windows change with '{symbol}', which is no length of this site")
    return site


def _read(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site of a region that was run, all of whose sizes are numbers."""
    known = world.kept.setdefault("probed", Readings())
    assert isinstance(known, Readings)

    def check(region: Region) -> None:
        inner = (o for n in region.nodes for o in n.output if o)
        for symbol, _, changed in _changes(index, world, (*(e.value for e in region.entries), region.mask, *inner)):
            raise _dynamic(world, symbol, changed)

    def facts_of(counts: np.ndarray) -> MaskFacts:
        return analyse.of_counts(counts, Certificate("evaluated", _READ, (counts.shape[1:],)))

    return lift_probed(index, world, node, known, check, facts_of)


def _changes(index: GraphIndex, world: World, values: Iterable[str]) -> Iterator[tuple[str, World, str]]:
    """Each dynamic dimension that changes the shape of one of ``values``, the model with one more there, that value.

    Raises:
        Unsupported: the model has no meaning there.
    """
    values = list(values)
    for symbol, size in world.binding.items():
        try:
            other = World(index, {**world.binding, symbol: size + 1})
        except AttncompileError:
            raise Unsupported(
                "dynamic", f"the windows are known where '{symbol}' is {size} only: the shapes contradict {size + 1}"
            ) from None
        changed = next((v for v in values if other.shapes.get(v) != world.shapes.get(v)), None)
        if changed is not None:
            yield symbol, other, changed


def _dynamic(world: World, symbol: str, changed: str) -> Unsupported:
    return Unsupported(
        "dynamic",
        f"the windows are known where '{symbol}' is {world.binding[symbol]} only, and '{changed}' changes with it",
        "export the model with this dimension fixed",
    )
