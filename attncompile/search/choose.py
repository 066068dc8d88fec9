"""Which candidate each head takes: the least predicted time for the damage that it may do, and the damage that a budget
at the model's outputs allows.

Damage is additive: a candidate's squared change of its site's output, relative to that output, times how much the
model's outputs follow that site (``SiteSpace.weight``, measured). For a price ``mu`` of damage every head takes the
candidate with the least time + mu * damage on its own; what a price gives is judged by running the whole model, and the
price is found by a bisection over predicted damage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attncompile.search.confidence import FLOOR, mean_bound, share_bound, upper_bound

Choice = Mapping[str, tuple[int, ...]]
"""Site -> candidate of each of its units; sites that stay as they are are left out."""


_MARGIN = 1.5
"""Where a mean counts, single errors may be negative: the rest may make up for this share of the budget less 1."""

_SHARES = (0.9, 0.5, 0.2)
"""Of what lies between the best choice of a price and the first that breaks the budget: so much is tried to be filled
site by site."""

_LADDER = 10
"""Halvings of a price down to which sites are looked at for what is left of a damage."""

_PART = 2
"""Inputs after which it is looked whether a choice has lost the budget already."""

_GROWTH = 4
"""Of hundreds of inputs a quarter of those that were run already is run at once, so that workers rarely wait for each
other: a choice that loses late costs at most so much more."""

_REACH = 8.0
"""A bound is taken for no more than this many times the largest error where it says how far to step: that of the two
inputs that showed a budget to be lost knows next to nothing of the spread."""

_LEAP = 3.0
"""By how much the logarithm of the damage grows at most from one model that is measured to the next: where errors are
hardly there they say nothing of how far one may go."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One head, or a whole site: its candidates by their texts, the first of which changes nothing, their predicted
    times, and their squared changes of the site's output, relative to its size [K]. ``mode`` [K], 0 if not given: all
    units of a site take candidates of one mode.
    """

    labels: tuple[str, ...]
    time: np.ndarray
    damage: np.ndarray
    mode: np.ndarray | None = None

    @property
    def of_modes(self) -> np.ndarray:
        """``mode``, whether it is given or not."""
        return np.zeros(len(self.time), int) if self.mode is None else self.mode

    def of(self, mode: int) -> np.ndarray:
        """Numbers of the candidates of one mode."""
        return np.flatnonzero(self.of_modes == mode)


@dataclass(frozen=True, slots=True, eq=False)
class SiteSpace:
    """All that a site can become. ``base`` is the time of the site as it is, ``fixed`` that of a replacement beside its
    units', ``more`` the same of modes 1, 2, ...; it has to gain ``least_gain``.
    """

    site: str
    base: float
    fixed: float
    units: tuple[Unit, ...]
    weight: float = 1.0
    least_gain: float = 1.0
    more: tuple[float, ...] = ()

    def mode(self, picks: Sequence[int]) -> int:
        """That of these candidates."""
        return int(self.units[0].of_modes[picks[0]])

    def time(self, picks: Sequence[int]) -> float:
        """Of a replacement with these candidates."""
        fixed = (self.fixed, *self.more)[self.mode(picks)]
        return fixed + sum(float(u.time[k]) for u, k in zip(self.units, picks, strict=True))

    def damage(self, picks: Sequence[int]) -> float:
        """Predicted squared change of the model's outputs."""
        return self.weight * sum(float(u.damage[k]) for u, k in zip(self.units, picks, strict=True))

    def best(self, price: float) -> tuple[int, ...] | None:
        """The cheapest candidates at this price, or None where the site had better stay as it is."""
        found: tuple[int, ...] | None = None
        least = self.base
        for mode in range(1 + len(self.more)):
            picks = self._least(mode, lambda u: u.time + price * self.weight * u.damage)
            time = self.time(picks)
            if time * self.least_gain <= self.base and time + price * self.damage(picks) < least:
                found, least = picks, time + price * self.damage(picks)
        return found

    def near(self, damage: float) -> tuple[int, ...]:
        """Candidates that change each unit by about so much, of the first mode that changes anything."""
        for mode in range(1 + len(self.more)):
            picks = self._least(mode, lambda u: np.abs(np.log(np.maximum(u.damage, 1e-12) / damage)))
            if any(picks):
                break
        return picks

    def _least(self, mode: int, key: Callable[[Unit], np.ndarray]) -> tuple[int, ...]:
        of = [u.of(mode) for u in self.units]
        return tuple(int(k[np.argmin(key(u)[k])]) for u, k in zip(self.units, of, strict=True))


def choose(spaces: Sequence[SiteSpace], price: float) -> dict[str, tuple[int, ...]]:
    """What all sites become at one price of damage."""
    found = ((s.site, s.best(price)) for s in spaces)
    return {site: picks for site, picks in found if picks is not None}


def damage_of(spaces: Sequence[SiteSpace], choice: Choice) -> float:
    return sum(s.damage(choice[s.site]) for s in spaces if s.site in choice)


def time_of(spaces: Sequence[SiteSpace], choice: Choice) -> float:
    return sum(s.time(choice[s.site]) if s.site in choice else s.base for s in spaces)


def _bounded(
    spaces: Sequence[SiteSpace], fits: Callable[[dict[str, tuple[int, ...]]], bool], good: float, bad: float
) -> tuple[dict[str, tuple[int, ...]], float]:
    """The choice whose price is the nearest to ``bad`` that still fits, and that price. Prices are powers of 2 times
    the time of all sites; choices fit more and more from ``bad`` to ``good``.
    """
    scale = sum(s.base for s in spaces) or 1.0
    if fits(choose(spaces, scale * 2.0**bad)):
        return choose(spaces, scale * 2.0**bad), scale * 2.0**bad
    for _ in range(50):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(choose(spaces, scale * 2.0**middle)) else (good, middle)
    return choose(spaces, scale * 2.0**good), scale * 2.0**good


def within_damage(spaces: Sequence[SiteSpace], limit: float, fill: bool = False) -> dict[str, tuple[int, ...]]:
    """The fastest choice of any price whose predicted damage is at most ``limit``; with ``fill`` also what the rest
    of it allows: a site that has to gain something comes with all its heads at once, so that prices leave gaps.
    """
    found, price = _bounded(spaces, lambda c: damage_of(spaces, c) <= limit, good=40.0, bad=-40.0)
    if damage_of(spaces, found) > limit:
        found = {}
    return _filled(spaces, found, price, limit) if fill else found


def _filled(
    spaces: Sequence[SiteSpace], found: Mapping[str, tuple[int, ...]], price: float, limit: float
) -> dict[str, tuple[int, ...]]:
    """``found`` with sites as at lower prices as far as ``limit`` allows, always the one that saves the most time for
    its damage.
    """
    chosen = dict(found)
    offers = [
        (s, picks)
        for s in spaces
        for picks in dict.fromkeys(s.best(price * 2.0 ** (-step / 2)) for step in range(1, 2 * _LADDER + 1))
        if picks is not None
    ]
    while True:
        left = limit - damage_of(spaces, chosen)
        best: tuple[float, str, tuple[int, ...]] | None = None
        for space, picks in offers:
            now = chosen.get(space.site)
            saved = (space.base if now is None else space.time(now)) - space.time(picks)
            cost = space.damage(picks) - (0.0 if now is None else space.damage(now))
            if saved > 0 and cost <= left:
                rate = saved / max(cost, 1e-300)
                if best is None or rate > best[0]:
                    best = (rate, space.site, picks)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


@dataclass(frozen=True, slots=True)
class Point:
    """One choice that was measured: predicted time relative to that of all sites as they are, errors of the inputs, the
    bound that further inputs stay below, and how that was judged.
    """

    time: float
    damage: float
    errors: tuple[float, ...]
    bound: float
    choice: Choice

    @property
    def mean(self) -> float:
        return float(np.mean(self.errors))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a choice is judged by: ``budget`` for the errors of ``future`` more inputs, with this confidence. ``power``:
    errors grow like damage to it, near enough to begin with. ``together``: the mean over inputs keeps the budget, not
    each of them. ``rows``: an error is the share of so many answers that changed, which are one as good as the other.
    """

    budget: float
    future: int
    confidence: float
    power: float = 0.5
    evaluations: int = 9
    together: bool = False
    rows: int = 0

    def bound(self, errors: Sequence[float]) -> float:
        """What further inputs stay below, from the errors of the calibration inputs."""
        if self.rows and errors and all(math.isfinite(e) for e in errors):
            return share_bound(round(sum(errors) * self.rows), len(errors) * self.rows, self.confidence)
        return (mean_bound if self.together else upper_bound)(errors, self.future, self.confidence)

    def lost(self, errors: Sequence[float], count: int) -> bool:
        """Whether the budget is exceeded whatever the others of ``count`` inputs give."""
        if not self.together:
            return max(errors) > self.budget
        if self.rows:
            return self.bound([*errors, *[0.0] * (count - len(errors))]) > self.budget
        return sum(errors) / count > _MARGIN * self.budget

    def judged(self, errors: Sequence[float]) -> float:
        """What the budget is for, of inputs that were measured."""
        return float(np.mean(errors)) if self.together else max(errors)


def until_lost(
    inputs: Sequence[int], limits: Limits, errors: Callable[[Sequence[int]], Sequence[float]], jobs: int = 1
) -> list[float]:
    """``errors`` of these inputs, or of the first of them that show the budget to be lost; how many those are does not
    depend on the number of workers, ``jobs``.
    """
    found: list[float] = []
    seen = 0
    while len(found) < len(inputs):
        found += errors(inputs[len(found) :][: max(jobs, _PART, len(found) // _GROWTH)])
        while seen < (step := min(seen + _PART, len(inputs))) <= len(found):
            seen = step
            if limits.lost(found[:seen], len(inputs)):
                return found[:seen]
    return found


def tune(
    spaces: Sequence[SiteSpace], limits: Limits, measure: Callable[[Choice], Sequence[float]],
    advance: Callable[[], None] = lambda: None,
) -> tuple[Point | None, list[Point]]:  # fmt: skip
    """The fastest choice that was measured to keep the budget, and all that were measured.

    ``measure`` gives the error of the whole model on every calibration input, or on so many that the budget is lost.
    """
    base = sum(s.base for s in spaces) or 1.0
    points: list[Point] = []

    def judged(choice: Choice) -> Point:
        known = next((p for p in points if p.choice == choice), None)
        if known is None:
            errors = tuple(float(e) for e in measure(choice))
            bound = limits.bound(errors)
            known = Point(time_of(spaces, choice) / base, damage_of(spaces, choice), errors, bound, choice)
            points.append(known)
            advance()
        return known

    if limits.budget <= 0:
        return None, []
    best: Point | None = None
    most = damage_of(spaces, choose(spaces, 0.0))
    room = math.log(max(most, 1e-300)) + 1e-9  # the exponential of a logarithm may be a little less
    low, high = -math.inf, math.inf  # logarithms of damage that is within the budget, and that is not
    target = min(math.log(limits.budget) / limits.power, room)
    for _ in range(limits.evaluations):
        choice = within_damage(spaces, math.exp(target))
        ceiling = room if high == math.inf else high
        while not choice and ceiling - target >= 0.1:  # so little damage gains nothing
            low = max(low, target)
            target = min(target + 0.7, ceiling) if high == math.inf else (target + ceiling) / 2
            choice = within_damage(spaces, math.exp(target))
        if not choice:
            break
        point = judged(choice)
        here = math.log(max(point.damage, 1e-300))
        reach = min(point.bound, _REACH * max(max(point.errors), limits.budget))
        away = math.log(max(limits.budget, FLOOR)) - math.log(max(reach, FLOOR))
        if point.bound <= limits.budget:
            if best is None or point.time < best.time:
                best = point
            low = max(low, target)
            if away < 0.05 or point.damage >= most:
                break
        else:
            high = min(high, here)
        step = max(min(away / limits.power, _LEAP), -2 * _LEAP) if math.isfinite(away) else -3.0
        target = here + step
        if math.isfinite(low) and math.isfinite(high):
            if high - low < 0.1:
                break
            target = min(max(target, low + 0.15 * (high - low)), high - 0.15 * (high - low))
        elif math.isfinite(low):
            target = min(max(target, low + 0.2), room)
        else:
            target = min(target, high - 0.2)
    if best is not None and math.isfinite(high):
        for share in _SHARES:
            limit = best.damage + share * (math.exp(high) - best.damage)
            choice = within_damage(spaces, limit, fill=True)
            if time_of(spaces, choice) < best.time * base and all(p.choice != choice for p in points):
                point = judged(choice)
                if point.bound <= limits.budget:
                    best = point
                    break
    return best, points


def corrected(
    spaces: Sequence[SiteSpace], start: Point, limits: Limits, measure: Callable[[Choice], Sequence[float]],
    held: Callable[[Choice], Sequence[float]], tries: int = 6,
) -> tuple[Point | None, tuple[float, ...], int]:  # fmt: skip
    """``start``, or what is left of it once inputs that chose nothing (``held``) keep the budget too; their errors; and
    how many choices they refused. Each refusal lowers the damage that is allowed by what it was exceeded; what is left
    has to keep the calibration inputs' bound too.
    """
    base = sum(s.base for s in spaces) or 1.0
    point = start
    refused = 0
    for _ in range(tries):
        worst = point.bound
        if worst <= limits.budget:
            errors = tuple(float(e) for e in held(point.choice))
            if limits.judged(errors) <= limits.budget:
                return point, errors, refused
            refused += 1
            worst = limits.judged(errors)
        over = worst / limits.budget
        shrink = 0.9 * over ** (-1 / limits.power) if math.isfinite(over) else 0.25
        choice = within_damage(spaces, point.damage * shrink)
        if not choice or refused == tries:
            break
        known = tuple(float(e) for e in measure(choice))
        bound = limits.bound(known)
        point = Point(time_of(spaces, choice) / base, damage_of(spaces, choice), known, bound, choice)
    return None, (), refused


def within_density(spaces: Sequence[SiteSpace], limit: float, density: Callable[[Choice], float]) -> Choice:
    """The choice with the least predicted damage whose density is at most ``limit``, among those of all prices."""
    return _bounded(spaces, lambda c: density(c) <= limit, good=-40.0, bad=40.0)[0]
