"""Seeded inputs that go through every body with a replaced site: what was not run is not proved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite
from attncompile.passes.bodies import beside, route, takes
from attncompile.passes.evaluate import World

Feed = Mapping[str, np.ndarray]


def through(world: World, sites: Iterable[AttentionSite], label: str, feed: Feed) -> list[tuple[str, Feed]]:
    """``feed``, and for each body that it does not run one that does: the bodies that hold ``sites``, and the other
    branches of the Ifs around them. Labels say what is fed: ``usual, use_cache=0``.
    """
    found = [(label, feed)]
    scopes = dict.fromkeys(s.scope for s in sites if s.scope)
    for scope in dict.fromkeys(b for s in scopes for b in beside(world.index, s)):
        try:
            wanted = route(world, scope)
        except Unsupported:
            continue
        if not any(takes(other, wanted) for _, other in found):
            words = ", ".join(f"{name}={value}" for name, value in wanted.items())
            changed = {name: np.full_like(feed[name], value) for name, value in wanted.items()}
            found.append((f"{label}, {words}", {**feed, **changed}))
    return found


def reached(world: World, site: AttentionSite, feeds: Sequence[Feed]) -> bool:
    """Whether one of ``feeds`` runs the graph that holds ``site``."""
    try:
        wanted = route(world, site.scope)
    except Unsupported:
        return False
    return any(takes(feed, wanted) for feed in feeds)
