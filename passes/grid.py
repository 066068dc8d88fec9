"""Token grids: given by the user, or read from how patches of an image become tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attncompile.core.errors import BadArguments
from attncompile.core.grid import TokenGrid
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.evaluate import GraphIndex, World

if TYPE_CHECKING:
    from attncompile.passes.token_layout import TokenLayout


def parse_grid(text: str) -> TokenGrid:
    """``HxW``, ``N`` or ``TxHxW``, then ``+PREFIX`` and ``+SUFFIX``: ``14x14+1`` is a class token before a 14x14 grid.

    Raises:
        BadArguments: any other text.
    """
    match = re.fullmatch(r"(\d+(?:x\d+){0,2})(?:\+(\d+))?(?:\+(\d+))?", text)
    if match is None or "0" in match[1].split("x"):
        raise BadArguments(f"--grid '{text}' is not a grid", "write HxW[+PREFIX[+SUFFIX]], such as 14x14+1")
    shape = tuple(int(n) for n in match[1].split("x"))
    return TokenGrid(shape, int(match[2] or 0), int(match[3] or 0), "given by --grid")


def find_grid(
    index: GraphIndex,
    world: World,
    site: AttentionSite,
    given: TokenGrid | None = None,
    others: Iterable[World | None] = (),
) -> TokenGrid | str | None:
    """The grid of a self-attention site whose tokens are patches of an image or a video, else None; the evidence, in
    words, where the graph contradicts itself or the grid changes with the sizes (``others``: worlds of other sizes).

    A ``given`` grid is taken for every self-attention site that has its number of tokens.
    """
    if site.query_length != site.key_length:
        return None
    if given is not None:
        return given if given.tokens == site.query_length else None
    query, key = (_laid_out(index, world, x) for x in (site.query, site.key))
    found = query if query is not None else key
    if not isinstance(found, TokenGrid):
        return found
    if isinstance(key, TokenGrid) and (key.shape, key.prefix, key.suffix) != (found.shape, found.prefix, found.suffix):
        return f"the queries lie on {words(found)}, the keys on {words(key)}"
    for other in others:
        again = _laid_out(index, other, site.query) if other is not None else found
        if isinstance(again, TokenGrid) and again.shape != found.shape:
            return f"the grid changes with the inputs' sizes: {words(found)} and {words(again)}"
    return found


def grid_with(index: GraphIndex, world: World, tokens: int, given: TokenGrid | None = None) -> TokenGrid | None:
    """A grid of the model with this number of tokens, for masks: what it says is compared element by element."""
    if given is not None:
        return given if given.tokens == tokens else None
    return next((g for g in _layout(index, world).grids if g.tokens == tokens), None)


def words(grid: TokenGrid) -> str:
    """The grid and what it was read from, for people."""
    return f"{grid.prefix}+{'x'.join(map(str, grid.shape))}+{grid.suffix} ({grid.evidence})"


def _layout(index: GraphIndex, world: World) -> TokenLayout:
    """Computed once a world. It follows axes with detection's means, and detection imports this module."""
    from attncompile.passes.token_layout import TokenLayout

    found = world.kept.get("token layout")
    if not isinstance(found, TokenLayout):
        found = world.kept["token layout"] = TokenLayout(index, world)
    return found


def _laid_out(index: GraphIndex, world: World, operand: Operand) -> TokenGrid | str | None:
    return _layout(index, world).grid(operand.value, operand.layout.index("N"))
