"""Sizes beside the profile's at which right-looking code breaks: primes (no block divides them), odd batches, Nq unlike
Nk. The smallest sizes, one token among them where the profile allows it, are the profile's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.site import AttentionSite

PRIMES = (127, 113, 101, 89, 73, 61, 53, 43, 37, 31, 23, 19, 17, 13, 11, 7, 5, 3, 2)
"""Largest first: more than one block of 64 for the first length, another number of blocks or tokens for the next."""


@dataclass(frozen=True, slots=True)
class Edge:
    """``bindings`` are alternatives: the first at which the original runs counts (two inputs' lengths may have to be
    equal although the file gives them two names).
    """

    label: str
    bindings: tuple[Mapping[str, int], ...]


def edges(profile: ShapeProfile, sites: Iterable[AttentionSite]) -> tuple[Edge, ...]:
    """Sizes inside the profile beside its own; none for a model without dynamic dimensions."""
    if not profile.ranges:
        return ()
    batches = {w for s in sites for w in re.findall(r"[^\s+*(),=]+", str(s.batch)) if w in profile.ranges}
    known = [dict(b) for _, b in profile.bindings()]
    odd = {n: next((x for x in (3, 5, 1) if r.minimum <= x <= r.maximum), r.usual)
           for n, r in profile.ranges.items() if n in batches}  # fmt: skip
    lengths = {n: r for n, r in profile.ranges.items() if n not in batches}
    unlike, alike = _primes(lengths), _primes(lengths, alike=True)
    bindings = [{**odd, **p} for p in ([unlike] if unlike == alike else [unlike, alike])]
    left = tuple(b for b in bindings if b not in known)
    return (Edge("prime lengths", left),) if left else ()


def _primes(ranges: Mapping[str, Range], alike: bool = False) -> dict[str, int]:
    """A prime inside each range, another one each unless ``alike``; the smallest size where a range holds none."""
    taken: list[int] = []
    result = {}
    for name, r in ranges.items():
        inside = [p for p in PRIMES if r.minimum <= p <= r.maximum] or _next_primes(r.minimum, r.maximum)
        fresh = inside if alike else [p for p in inside if p not in taken] or inside
        result[name] = fresh[0] if fresh else r.minimum
        taken.append(result[name])
    return result


def _next_primes(low: int, high: int, count: int = 4) -> Sequence[int]:
    found: list[int] = []
    for n in range(max(2, low), min(high, low + 2000) + 1):
        if all(n % d for d in range(2, int(n**0.5) + 1)):
            found.append(n)
        if len(found) == count:
            break
    return found
