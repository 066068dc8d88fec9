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

from attncompile.search.confidence import FLOOR, upper_bound

Choice = Mapping[str, tuple[int, ...]]
"""Site -> candidate of each of its units; sites that stay as they are are left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One head, or a whole site: its candidates by their texts, the first of which changes nothing, their predicted
    times, and their squared changes of the site's output, relative to its size [K].
    """

    labels: tuple[str, ...]
    time: np.ndarray
    damage: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class SiteSpace:
    """All that a site can become. ``base`` is the time of the site as it is, ``fixed`` that of a replacement beside its
    units'; it has to gain ``least_gain``.
    """

    site: str
    base: float
    fixed: float
    units: tuple[Unit, ...]
    weight: float = 1.0
    least_gain: float = 1.0

    def time(self, picks: Sequence[int]) -> float:
        """Of a replacement with these candidates."""
        return self.fixed + sum(float(u.time[k]) for u, k in zip(self.units, picks, strict=True))

    def damage(self, picks: Sequence[int]) -> float:
        """Predicted squared change of the model's outputs."""
        return self.weight * sum(float(u.damage[k]) for u, k in zip(self.units, picks, strict=True))

    def best(self, price: float) -> tuple[int, ...] | None:
        """The cheapest candidates at this price, or None where the site had better stay as it is."""
        picks = tuple(int(np.argmin(u.time + price * self.weight * u.damage)) for u in self.units)
        time = self.time(picks)
        if time * self.least_gain > self.base or time + price * self.damage(picks) >= self.base:
            return None
        return picks


def choose(spaces: Sequence[SiteSpace], price: float) -> dict[str, tuple[int, ...]]:
    """What all sites become at one price of damage."""
    found = ((s.site, s.best(price)) for s in spaces)
    return {site: picks for site, picks in found if picks is not None}


def damage_of(spaces: Sequence[SiteSpace], choice: Choice) -> float:
    return sum(s.damage(choice[s.site]) for s in spaces if s.site in choice)


def time_of(spaces: Sequence[SiteSpace], choice: Choice) -> float:
    return sum(s.time(choice[s.site]) if s.site in choice else s.base for s in spaces)


def within_damage(spaces: Sequence[SiteSpace], limit: float) -> dict[str, tuple[int, ...]]:
    """The fastest choice of any price whose predicted damage is at most ``limit``."""
    low, high = -40.0, 40.0  # powers of 2 times the scale below
    scale = sum(s.base for s in spaces) or 1.0
    if damage_of(spaces, choose(spaces, scale * 2.0**low)) <= limit:
        return choose(spaces, scale * 2.0**low)
    for _ in range(50):
        middle = (low + high) / 2
        if damage_of(spaces, choose(spaces, scale * 2.0**middle)) <= limit:
            high = middle
        else:
            low = middle
    found = choose(spaces, scale * 2.0**high)
    return found if damage_of(spaces, found) <= limit else {}


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
    errors grow like damage to it, near enough to begin with.
    """

    budget: float
    future: int
    confidence: float
    power: float = 0.5
    evaluations: int = 9


def tune(
    spaces: Sequence[SiteSpace], limits: Limits, measure: Callable[[Choice], Sequence[float]],
    advance: Callable[[], None] = lambda: None,
) -> tuple[Point | None, list[Point]]:  # fmt: skip
    """The fastest choice that was measured to keep the budget, and all that were measured.

    ``measure`` gives the error of the whole model on every calibration input.
    """
    base = sum(s.base for s in spaces) or 1.0
    points: list[Point] = []

    def judged(choice: Choice) -> Point:
        known = next((p for p in points if p.choice == choice), None)
        if known is None:
            errors = tuple(float(e) for e in measure(choice))
            bound = upper_bound(errors, limits.future, limits.confidence)
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
        away = math.log(max(limits.budget, FLOOR)) - math.log(max(point.bound, FLOOR))
        if point.bound <= limits.budget:
            if best is None or point.time < best.time:
                best = point
            low = max(low, target)
            if away < 0.05 or point.damage >= most:
                break
        else:
            high = min(high, here)
        step = away / limits.power if math.isfinite(away) else -3.0
        target = here + step
        if math.isfinite(low) and math.isfinite(high):
            if high - low < 0.1:
                break
            target = min(max(target, low + 0.15 * (high - low)), high - 0.15 * (high - low))
        elif math.isfinite(low):
            target = min(max(target, low + 0.2), room)
        else:
            target = min(target, high - 0.2)
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
            if max(errors) <= limits.budget:
                return point, errors, refused
            refused += 1
            worst = max(errors)
        over = worst / limits.budget
        shrink = 0.9 * over ** (-1 / limits.power) if math.isfinite(over) else 0.25
        choice = within_damage(spaces, point.damage * shrink)
        if not choice or refused == tries:
            break
        known = tuple(float(e) for e in measure(choice))
        bound = upper_bound(known, limits.future, limits.confidence)
        point = Point(time_of(spaces, choice) / base, damage_of(spaces, choice), known, bound, choice)
    return None, (), refused


def within_density(spaces: Sequence[SiteSpace], limit: float, density: Callable[[Choice], float]) -> Choice:
    """The choice with the least predicted damage whose density is at most ``limit``, among those of all prices."""
    low, high = -40.0, 40.0
    scale = sum(s.base for s in spaces) or 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if density(choose(spaces, scale * 2.0**middle)) <= limit:
            low = middle
        else:
            high = middle
    return choose(spaces, scale * 2.0**low)
