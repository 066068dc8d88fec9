"""Takes windows (Swin's partition and cyclic shift) from around the projections to the attention between them.

Exports move tokens into windows, project them, attend, project, and move them back. A projection works on each token
alone, so the same comes out when tokens are projected in their own order and moved into windows right before the
products. There the windows are a part of the attention, which is one site over the whole grid: see
``detect.gathers.windows``. What is written is a copy to work on; ``fold_back`` takes it back where a site is kept.
"""

from __future__ import annotations

from dataclasses import replace

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite, Detection, NearMiss
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.separate import stored
from attncompile.passes.whole_grid.lifted import Lifted, lifted
from attncompile.passes.whole_grid.rewrite import Writer

FORM = "windowed "
"""Beginning of the form of a site over a grid whose windows were batch entries."""

_ROUNDS = 3


def whole_grid(
    model: Model, profile: ShapeProfile, found: Detection, grid: TokenGrid | None = None
) -> tuple[Model, Detection]:
    """``model`` and what was ``found`` in it; or a copy in which windows stand right around their sites, and what is
    found there: the same sites, those with windows over the whole grid. ``notes`` say how many. Sizes must be fixed.
    A site whose windows were understood and stay is a near miss as well, with the reason.
    """
    wanted = [s for s in found.sites if _may_be_windows(s)] if not profile.ranges else []
    if not wanted:
        return model, found
    world = World(GraphIndex(model), {}).without_idle()
    stay: dict[str, Unsupported] = {}
    lifts: list[Lifted] = []
    for site in wanted:
        try:
            lift = lifted(world.index, world, site)
        except Unsupported as error:
            stay[site.id] = error
            continue
        lifts += [lift] if lift is not None else []
    for _ in range(_ROUNDS):
        made, lifts = _written(world, lifts, stay)
        if made is None:
            break
        made = stored(made, profile)
        again = detect(made, profile, grid=grid)
        inside = {v for s in again.sites if s.form.startswith(FORM) for v in s.interior}
        good = [x for x in lifts if x.site.output.value in inside]
        if len(good) == len(lifts) and len(again.sites) == len(found.sites):
            return made, _with_reasons(again, found, stay)
        stay |= {x.site.id: _UNPROVED for x in lifts if all(x is not g for g in good)}
        lifts = good
    return model, _with_reasons(found, found, stay)


_UNPROVED = Unsupported("windows", "masks and biases of the windows are not those of one mask over a grid")


def _with_reasons(into: Detection, found: Detection, stay: dict[str, Unsupported]) -> Detection:
    """``into`` with a near miss for each site of ``found`` whose windows stay."""
    misses = [
        NearMiss(s.nodes[0], f"windows stay around the projections of this site: {stay[s.id].message}",
                 "windowed-attention", stay[s.id].code)
        for s in found.sites if s.id in stay
    ]  # fmt: skip
    return replace(into, near_misses=(*into.near_misses, *misses))


def _may_be_windows(site: AttentionSite) -> bool:
    """Whether batch entries may be windows: several, of fixed sizes, in the main graph."""
    sizes = (site.batch, site.query_length, site.key_length)
    fixed = all(isinstance(x, int) and x > 1 for x in sizes) and site.query_length == site.key_length
    plain = site.kind == "softmax" and not site.needs - {"head-scale"} and site.cache is None
    return fixed and plain and not site.form.startswith(("gathered ", "probed ", FORM))


def _written(
    world: World, lifts: list[Lifted], stay: dict[str, Unsupported]
) -> tuple[Model | None, list[Lifted]]:  # fmt: skip
    """The model with these lifts, and those of them that could be written; why the others ``stay``."""
    writer, kept = Writer(world), []
    for found in lifts:
        try:
            writer.lift(found)
        except Unsupported as error:
            stay[found.site.id] = error
            continue
        kept.append(found)
    return writer.finish(), kept
