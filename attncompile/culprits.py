"""Which replacements make a whole model fail, in few runs: delta debugging by bisection over prefixes.

A failing set of n replacements that holds one minimal failing subset of k members is found in at most
k * (ceil(log2 n) + 1) runs (QuickXplain's bound, Junker, AAAI 2004; the idea is Zeller's delta debugging, TSE 2002),
one more shows that the rest passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Culprits(Generic[T]):
    """``groups``: each fails together, and with any member left out it passes; ``runs``: how often ``fails`` was asked.

    ``rest`` passed, or is empty.
    """

    groups: tuple[tuple[T, ...], ...]
    rest: tuple[T, ...]
    runs: int


def find_culprits(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Culprits[T]:
    """The minimal sets of ``items`` because of which ``fails(items)`` holds; it is not asked again for all of them, nor
    for none, and never twice for the same set.

    ``fails`` need not be monotone (errors may cancel): each group was seen to fail by itself, and the rest to pass.
    """
    known: dict[frozenset[T], bool] = {frozenset(): False, frozenset(items): True}
    runs = 0

    def failing(subset: Sequence[T]) -> bool:
        nonlocal runs
        key = frozenset(subset)
        if key not in known:
            runs += 1
            known[key] = fails([x for x in items if x in key])
        return known[key]

    rest = list(items)
    groups: list[tuple[T, ...]] = []
    while rest and failing(rest):
        group = _one(rest, failing)
        groups.append(tuple(x for x in rest if x in group))
        rest = [x for x in rest if x not in group]
    return Culprits(tuple(groups), tuple(rest), runs)


def _one(items: Sequence[T], failing: Callable[[Sequence[T]], bool]) -> set[T]:
    """A set that fails; ``items`` fail. The last item of the shortest failing prefix belongs to it; then the items
    before that one are searched for what it fails together with.
    """
    core: list[T] = []
    pool = list(items)
    while not failing(core):
        low, high = 0, len(pool)  # core + pool[:low] passes, core + pool[:high] fails
        while high - low > 1:
            middle = (low + high) // 2
            if failing([*core, *pool[:middle]]):
                high = middle
            else:
                low = middle
        core.append(pool[high - 1])
        pool = pool[: high - 1]
    return set(core)
