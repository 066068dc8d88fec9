"""Two lengths that vary on their own: the keys are the past of a KV cache and the queries' own tokens.

A mask seen along one line of sizes says nothing of the others: what holds where past and sequence are equal may not
hold where a step decodes one token after a long past. So it is looked at on a grid of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from attncompile.passes.detect.softmax import MaskQuery
from attncompile.passes.masks.lengths import PRIME, Lengths, around

_CHEAP = 1 << 20
"""Pairs with this many scores or fewer are looked at in all combinations of the window's own numbers."""

_LARGEST = 1 << 26
"""Pairs with more scores are left out, beside those that the profile names."""


@dataclass(frozen=True, slots=True)
class Past:
    """``sequence`` adds one query and one key for each of its tokens, ``past`` one key and no query."""

    past: str
    sequence: str

    def sizes(self, past: int, sequence: int) -> dict[str, int]:
        return {self.past: past, self.sequence: sequence}


def past_of(at: Lengths, query: MaskQuery, dynamic: list[str]) -> Past | None:
    """The two symbols, where exactly these two change the lengths, each as ``Past`` says."""
    if len(dynamic) != 2:
        return None
    steps = {}
    for symbol in dynamic:
        world = at.world_at({**at.world.binding, symbol: at.world.binding[symbol] + 1})
        lengths = at.lengths(world, query) if world is not None else None
        if lengths is None:
            return None
        steps[lengths[0] - query.query_length, lengths[1] - query.key_length] = symbol
    if set(steps) != {(0, 1), (1, 1)}:
        return None
    return Past(steps[0, 1], steps[1, 1])


def pairs(at: Lengths, past: Past, numbers: Iterable[int], others: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(past, sequence): prefill without a past, single steps, and both on their own around ``numbers``, the widths that
    the mask may have; a prime, the profile's sizes and ``others`` among them.
    """
    others = list(others)
    ranges = [at.profile.ranges[past.past], at.profile.ranges[past.sequence]]
    profile = [[r.minimum, r.usual, r.maximum] for r in ranges]
    tests = sorted(set(around(numbers, max(r.maximum for r in ranges))))
    before = sorted({0, 1, 2, 3, PRIME, *tests, *others, *profile[0]})
    new = sorted({1, 2, 3, PRIME, *tests, *others, *profile[1]})
    wanted = [(p, s) for s in (1, PRIME) for p in before] + [(p, s) for p in (0, PRIME) for s in new]
    wanted += [(p, s) for p in tests for s in tests if s * (p + s) <= _CHEAP]
    named = [(p, s) for p in profile[0] for s in profile[1]]
    yield from dict.fromkeys([*[(p, s) for p, s in wanted if p >= 0 and s > 0 and s * (p + s) <= _LARGEST], *named])


REQUIRED = ((0, 1), (0, PRIME), (PRIME, 1), (PRIME, PRIME))
"""(past, sequence) that have to be among what was seen: the prefill, and a single step."""


def seen_enough(pictures: Iterable[tuple[int, int]], widths: Iterable[int]) -> bool:
    """Whether these (query, key) lengths tell past and sequence apart: ``REQUIRED``, and on both sides of every width a
    single step, a prefill and both together.
    """
    seen = set(pictures)
    needed = {(s, p + s) for p, s in REQUIRED}
    for width in widths:
        for n in (width - 1, width, width + 1):
            needed |= {(1, n + 1), *([(n, n)] if n > 0 else [])}
            needed |= {(PRIME, n + PRIME)}
    return needed <= seen
