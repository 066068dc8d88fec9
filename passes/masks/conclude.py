"""From the pictures of a mask at all lengths that were looked at to its factors, with the certificate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskKind, MaskPart
from attncompile.passes.masks.fit import block_sparse, fit
from attncompile.passes.masks.picture import Picture

Pictures = dict[tuple[int, int], Picture]
"""By (query length, key length)."""


def conclude(
    pictures: Pictures, stored: bool, general: bool, fixed: bool, grid: TokenGrid | None, source: dict[str, Any]
) -> list[MaskPart]:
    """One factor, or two where a causal mask stands beside the structure; none where every key is seen.

    ``stored``: a constant; ``general``: may be believed for other lengths; ``fixed``: there are no others. ``source``
    holds the fields ``source`` and ``additive`` where one value is the whole mask.
    """
    lengths = tuple(sorted(pictures))
    count = f"{len(pictures)} length{'s' * (len(pictures) > 1)}"
    how = Certificate("constant" if stored else "evaluated", f"every element compared at {count}", lengths, general)
    seen = list(pictures.values())
    if all(p.window is not None for p in seen):
        left = _agree([(p.window[0], p.reach[0]) for p in seen if p.window])
        right = _agree([(p.window[1], p.reach[1]) for p in seen if p.window])
        if left is None or right is None:
            return [MaskPart("opaque", replace(how, detail="its width changes with the length"), **source)]
        if (left, right) == (-1, -1):
            return []
        kind: MaskKind = "causal" if (left, right) == (-1, 0) else "window"
        return [MaskPart(kind, how, left=left, right=right)]
    found = fit(seen, fixed, grid)
    widest = _widest(seen)
    if found is None and not fixed:
        return [MaskPart("opaque", replace(how, detail=_contradiction(seen, widest)), **source)]
    found = found or block_sparse(widest)
    if 2 * max(_integers(found.pattern.parameters()), default=0) > max(max(p.lengths) for p in seen):
        how = replace(how, general=False)  # a number as large as the lengths may be one of them
    shown = f"{how.detail}; {widest.density:.1%} of the keys are seen at {widest.lengths[0]}x{widest.lengths[1]}"
    evidence = found.pattern.parameters().get("grid", {}).get("evidence")
    how = replace(how, detail=f"{shown}; the grid is from {evidence}" if evidence else shown)
    part = MaskPart(found.kind, how, pattern=found.pattern, **(source if not found.causal else {}))
    return [part, MaskPart("causal", how, -1, 0)] if found.causal else [part]


def widths(pictures: Pictures) -> set[int]:
    """The numbers in the structure that was seen so far, at whose neighbouring lengths it is tested."""
    seen = [pair for p in pictures.values() if p.window for pair in zip(p.window, p.reach, strict=True)]
    found = {width + 1 for width, reach in seen if 0 < width < reach}
    if any(p.window is None for p in pictures.values()):
        proposal = fit(list(pictures.values()), False, None)
        found = set(_integers(proposal.pattern.parameters())) if proposal is not None else set()
    return {n for n in found if n > 1}


def _widest(pictures: list[Picture]) -> Picture:
    return max(pictures, key=lambda p: p.lengths[0] * p.lengths[1])


def _integers(parameters: Any) -> list[int]:
    """All integers in a structure's parameters."""
    if isinstance(parameters, bool):
        return []
    if isinstance(parameters, int):
        return [abs(parameters)]
    items = parameters.values() if isinstance(parameters, dict) else parameters if isinstance(parameters, list) else ()
    return [n for item in items for n in _integers(item)]


def _contradiction(pictures: list[Picture], widest: Picture) -> str:
    """Why no structure holds at all lengths."""
    alone = fit([widest], False, None)
    if alone is None:
        odd = [p.lengths for p in pictures if p.window is None]
        return f"at lengths {odd[0]} no window: {widest.density:.1%} of the keys are seen at {widest.lengths}"
    other = next(p for p in pictures if not alone.holds(p.visible()))
    return f"at lengths {widest.lengths} it is {alone.words()}, at lengths {other.lengths} it is not"


def _agree(observed: list[tuple[int, int]]) -> int | None:
    """One width for all lengths: -1 if it always reaches the end, None if the lengths contradict one another."""
    bounded = {width for width, reach in observed if width < reach}
    if not bounded:
        return -1
    if len(bounded) > 1:
        return None
    (width,) = bounded
    return width if all(reach <= width for w, reach in observed if w >= reach and w != width) else None
