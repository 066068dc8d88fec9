"""Finds the structure that a mask has at every length that it was seen at.

Of several that say the same the first in this order is taken: none, causal, window, prefix, dilated, blocked, document,
a neighborhood that wraps around the sequence, global, stripe, radial; blocked, document, global and stripe beside a
causal mask; blocked and neighborhood on a grid; those beside a causal mask; block_sparse, for a fixed length only.
Within a kind the fewest axes and the smallest parameters come first, and clamp before truncate before circular.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncompile.core.grid import TokenGrid
from attncompile.core.pattern import BlockSparse
from attncompile.passes.masks.on_grid import on_grid, radial, ring
from attncompile.passes.masks.picture import Look, Picture
from attncompile.passes.masks.proposal import Proposal
from attncompile.passes.masks.sequence import along_sequence
from attncompile.passes.masks.stripes import with_stripes

SMALL = 512
"""Masks with fewer queries or keys than this are cut into blocks of 16, others into blocks of 64."""


def fit(pictures: Sequence[Picture], fixed: bool, grid: TokenGrid | None) -> Proposal | None:
    """The first structure that every picture has exactly; ``fixed``: the lengths never change.

    ``grid`` is that of the model's patch embedding, for masks of its number of tokens.
    """
    largest = max(pictures, key=lambda p: p.lengths[0] * p.lengths[1])
    visible = largest.visible()
    others = [p for p in pictures if p is not largest]
    tried: set[Proposal] = set()
    for proposal in _proposals(Look(visible), fixed, grid):
        if proposal in tried:
            continue
        tried.add(proposal)
        if proposal.holds(visible) and all(proposal.holds(p.visible()) for p in others):
            return proposal
    return None


def block_sparse(picture: Picture) -> Proposal:
    """The mask itself, in blocks."""
    return Proposal("block_sparse", BlockSparse.of(picture.visible(), edge_of(picture.lengths)))


def edge_of(lengths: tuple[int, int]) -> int:
    """The edge of the blocks that a mask of these lengths is cut into."""
    return 16 if min(lengths) < SMALL else 64


def _proposals(look: Look, fixed: bool, grid: TokenGrid | None) -> Iterator[Proposal]:
    if not look.visible.any():
        return
    for causal in (False, True) if look.causal else (False,):
        yield from along_sequence(look, causal, fixed)
        if fixed and not causal:
            yield from ring(look)
        yield from with_stripes(look, causal, fixed)
        if fixed and not causal:
            yield from radial(look, grid)
    if fixed:
        for causal in (False, True) if look.causal else (False,):
            yield from on_grid(look, causal, grid)
