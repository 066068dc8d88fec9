"""Sites whose mask is a ring of whole windows (Swin), and the parameters of border ``circular`` that say the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from typing import Any

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.grid_pattern import Blocked
from attncompile.core.mask import MaskFacts, in_windows, seam
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.plugins.neighborhood.facts import structures
from attncompile.plugins.neighborhood.op import Neighborhood
from attncompile.plugins.neighborhood.rings import rings


@dataclass(frozen=True, slots=True)
class Ring:
    """Whole windows side by side on a grid whose ends may meet, as border ``circular`` says it: what is added across
    a seam, and the graph value of the bias by places (empty without one).
    """

    windows: Blocked
    seam: float
    bias: str


def ring(mask: MaskFacts) -> Ring | None:
    """The mask as a ring of windows; None where it holds something else."""
    beside, places = seam(mask), in_windows(mask)
    rest = [p for p in mask.parts if p is not beside and p is not places]
    windows = rest[0].pattern if len(rest) == 1 else None
    if not isinstance(windows, Blocked) or windows.grid is None or windows.before or windows.after:
        return None
    grid = windows.grid
    if grid.prefix or grid.suffix or any(n % w for n, w in zip(grid.shape, windows.window, strict=True)):
        return None
    shifted = any(s % w for s, w in zip(windows.shift, windows.window, strict=True))
    across = -inf if shifted and not windows.cyclic else 0.0
    if beside is not None:
        if across or beside.pattern != replace(windows, cyclic=False):
            return None
        across = beside.number
    return Ring(windows, across, (places.source or "") if places is not None else "")


def ring_parameters(found: Ring) -> tuple[dict[str, Any], str]:
    """The op's parameters for ``found``, and that in words."""
    windows, grid = found.windows, found.windows.grid
    assert grid is not None
    moved = [s % w for s, w in zip(windows.shift, windows.window, strict=True)]
    seam = found.seam if isfinite(found.seam) else "-inf"  # JSON has no infinity
    parameters = {
        "kernel_size": list(windows.window), "stride": list(windows.window), "grid": list(grid.shape),
        "border": "circular", "shift": moved, "seam": seam, "masked_rows": "zero",
        "block": prod(windows.window), "dense_below": 0,
    }  # fmt: skip
    sides, size = ("x".join(map(str, x)) for x in (grid.shape, windows.window))
    where = f", moved by {'x'.join(map(str, moved))}" if any(moved) else ""
    return parameters, f"windows of {size}{where} on the grid of {sides} tokens"


def check_ring(site: AttentionSite, hood: Neighborhood) -> None:
    """Raise ``Unsupported`` for a site that the op cannot express as a ring."""
    if ring(site.mask) is None or site.sinks:
        raise Unsupported("mask", "border circular takes whole windows, a bias by places, and nothing beside them")
    if (site.query_length, site.key_length) != (hood.tokens, hood.tokens):
        lengths = f"{site.query_length} queries and {site.key_length} keys"
        raise Unsupported("grid", f"the grid has {hood.tokens} tokens, the site {lengths}", "give another --grid")


def ring_is_exact(site: AttentionSite, hood: Neighborhood, largest: int) -> Verdict:
    """Whether the windows are the site's, element by element (up to ``largest`` tokens), and so are places and seam."""
    found, tokens = ring(site.mask), hood.tokens
    if found is None or tokens is None:
        return Verdict.no("other-window", "the site's mask is no ring of whole windows")
    if tokens > largest:
        return Verdict.no("size", f"a mask of {tokens} tokens is too large to be compared")
    assert found.windows.grid is not None
    shift = tuple(s % w for s, w in zip(found.windows.shift, found.windows.window, strict=True))
    own = (found.windows.grid.shape, found.windows.window, shift)
    # Places, and where the seams are, follow from these three; the same mask may be cut in other ways.
    by_place = bool(found.bias) or found.seam not in (0.0, -inf)
    if by_place and own != (hood.grid, hood.kernel_size, hood.shift):
        return Verdict.no("other-window", "the site's windows are not those of these parameters")
    if hood.seam != found.seam and any((*shift, *hood.shift)):
        return Verdict.no("other-window", f"the source adds {found.seam:g} across the end of the grid")
    if not np.array_equal(rings(hood).visible(hood), found.windows.visible(tokens, tokens)):
        return Verdict.no("other-window", "the site's mask is not the windows of these parameters")
    return Verdict.yes(f"the mask is these windows ({structures(site.mask)[0].certificate.method})")
