"""Mechanisms: one folder each. The registry is an explicit tuple of lazy names; other packages add theirs by the
entry-point group ``attncompile.extensions``: an entry is an object whose attribute ``mechanisms`` holds instances.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from attncompile.core.errors import AttncompileError
from attncompile.core.mechanism import Mechanism

MECHANISMS = (
    "attncompile.plugins.neighborhood.mechanism:NeighborhoodAttention",
    "attncompile.plugins.block_sparse.mechanism:BlockSparseAttention",
    "attncompile.plugins.attention.dense_mechanism:DenseAttention",
    "attncompile.plugins.attention.standard_mechanism:Attention",
)

ENTRY_POINT_GROUP = "attncompile.extensions"


class BadExtension(AttncompileError):
    """An installed extension cannot be used."""


@cache
def mechanisms() -> tuple[Mechanism, ...]:
    """All mechanisms, ours first. Raises ``BadExtension`` for one that fails to load or takes a name in use."""
    found: list[Mechanism] = []
    for target in MECHANISMS:
        module, _, attribute = target.partition(":")
        found.append(getattr(import_module(module), attribute)())
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
        try:
            offered = tuple(getattr(entry.load(), "mechanisms", ()))  # an extension may bring policies or targets only
        except Exception as error:  # whatever a foreign package raises: name the package, do not die nameless
            raise BadExtension(
                f"extension {entry.name} ({entry.value}) failed: {error}", "uninstall or fix it"
            ) from error
        for made in offered:
            if any(made.name == m.name for m in found):
                raise BadExtension(f"extension {entry.name}: the mechanism name {made.name} is taken", "rename it")
            found.append(made)
    return tuple(found)


def mechanism(name: str) -> Mechanism:
    """The mechanism with this name. Raises ``AttncompileError`` naming those that exist."""
    for m in mechanisms():
        if m.name == name:
            return m
    raise AttncompileError(f"no mechanism {name!r}", f"there are: {', '.join(m.name for m in mechanisms())}")
