"""The choice among candidates, the confidence bound, and what a search keeps on disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from attncompile.core.errors import BadArguments
from attncompile.search.choose import (
    Limits,
    Point,
    SiteSpace,
    Unit,
    choose,
    corrected,
    damage_of,
    time_of,
    tune,
    until_lost,
    within_damage,
    within_density,
)
from attncompile.search.confidence import mean_bound, share_bound, student, upper_bound
from attncompile.search.state import State, key_of


def unit(rng: np.random.Generator, count: int = 5) -> Unit:
    time = np.concatenate([[1.0], np.sort(rng.random(count - 1))[::-1]])
    damage = np.concatenate([[0.0], np.sort(rng.random(count - 1)) ** 3])
    return Unit(tuple(map(str, range(count))), time, damage)


def space(seed: int, site: str, heads: int = 3, **changes: float) -> SiteSpace:
    rng = np.random.default_rng(seed)
    given = {"base": heads * 1.1, "fixed": 0.1, "weight": 1.0 + seed, "least_gain": 1.1, **changes}
    return SiteSpace(site, units=tuple(unit(rng) for _ in range(heads)), **given)


@pytest.mark.parametrize("price", [0.0, 0.3, 1.0, 5.0, 1e9])
def test_a_price_is_paid_by_every_head_alone(price) -> None:
    """Against all combinations of all heads."""
    spaces = [space(0, "a"), space(1, "b")]
    found = choose(spaces, price)
    for s in spaces:
        every = itertools.product(*(range(len(u.time)) for u in s.units))
        best = min(every, key=lambda picks: s.time(picks) + price * s.damage(picks))
        worth = s.base >= s.least_gain * s.time(best) and s.time(best) + price * s.damage(best) < s.base
        assert found.get(s.site) == (best if worth else None)
    assert price < 1e9 or not found


def test_a_site_that_does_not_gain_stays() -> None:
    assert choose([space(0, "a", base=0.15)], 0.0) == {}
    assert set(choose([space(0, "a", base=9.0)], 0.0)) == {"a"}


def test_damage_and_density_are_kept() -> None:
    spaces = [space(i, str(i)) for i in range(4)]
    last = np.inf
    for limit in (1e-9, 0.01, 0.1, 1.0, 10.0, 1e6):
        found = within_damage(spaces, limit)
        assert damage_of(spaces, found) <= limit
        assert time_of(spaces, found) <= last
        last = time_of(spaces, found)
    assert within_damage(spaces, 1e6) == choose(spaces, 0.0)

    def density(choice: dict[str, tuple[int, ...]]) -> float:
        return time_of(spaces, choice) / time_of(spaces, {})

    for limit in (0.4, 0.7, 1.0):
        assert density(within_density(spaces, limit, density)) <= limit


def test_what_prices_leave_of_a_damage_is_used() -> None:
    """Two sites that gain only as a whole: at one price both come in, with more damage than is allowed; one fits."""
    heads = tuple(Unit(("dense", "half"), np.array([1.0, 0.5]), np.array([0.0, 0.1])) for _ in range(3))
    spaces = [SiteSpace(n, 3.0, 0.0, heads, 1.0, 1.5) for n in "ab"]
    assert set(choose(spaces, 4.9)) == {"a", "b"} and not choose(spaces, 5.1)
    assert within_damage(spaces, 0.5) == {} == within_damage(spaces, 0.29, fill=True)
    assert list(within_damage(spaces, 0.5, fill=True).values()) == [(1, 1, 1)]
    assert set(within_damage(spaces, 0.61)) == {"a", "b"}
    # A search that is left between two prices tries it.
    small = SiteSpace("c", 3.0, 0.0, tuple(Unit(u.labels, u.time, u.damage / 100) for u in heads), 1.0, 1.5)
    best, _ = tune([*spaces, small], Limits(0.5, 2, 0.5, 1.0, together=True),
                   lambda c: [damage_of([*spaces, small], c)] * 2)  # fmt: skip
    assert best is not None and set(best.choice) == {"a", "c"}


def errors_of(spaces: list[SiteSpace], spread: float, count: int, seed: int = 0):
    """Inputs whose errors follow the damage, each by its own factor, none exactly."""
    rng = np.random.default_rng(seed)
    factors = np.exp(spread * rng.standard_normal(count))

    def measure(choice) -> list[float]:
        return list(np.sqrt(1.7 * damage_of(spaces, choice)) ** 1.1 * factors)

    return measure


@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0, 100.0])
def test_the_fastest_choice_within_the_budget(budget) -> None:
    spaces = [space(i, str(i)) for i in range(6)]
    measure = errors_of(spaces, 0.1, 8)
    limits = Limits(budget, 8, 0.99, evaluations=14)
    best, points = tune(spaces, limits, measure)
    assert len(points) <= 14 and len({tuple(p.choice.items()) for p in points}) == len(points)
    # What any price gives, and would have kept the budget.
    every = [choose(spaces, p) for p in np.geomspace(1e-4, 1e5, 400)]
    fitting = [time_of(spaces, c) for c in every if c and upper_bound(measure(c), 8, 0.99) <= budget]
    if not fitting:
        assert best is None
        return
    assert best is not None and best.bound <= budget
    assert best.time * time_of(spaces, {}) <= min(fitting) * 1.1


def test_no_budget_is_nothing() -> None:
    def never(choice) -> list[float]:
        raise AssertionError("nothing is to be measured")

    assert tune([space(0, "a")], Limits(0.0, 4, 0.99), never) == (None, [])


def test_held_out_inputs_refuse() -> None:
    spaces = [space(i, str(i)) for i in range(6)]
    known, held = errors_of(spaces, 0.0, 4), errors_of(spaces, 0.0, 4, seed=1)
    limits = Limits(0.5, 4, 0.99)
    best, _ = tune(spaces, limits, known)
    assert best is not None
    assert corrected(spaces, best, limits, known, held) == (best, tuple(held(best.choice)), 0)
    asked: list[object] = []

    def twice(choice) -> list[float]:
        asked.append(choice)
        return [3 * e for e in held(choice)]

    less, errors, refused = corrected(spaces, best, limits, known, twice)
    assert less is not None and refused >= 1 and max(errors) <= 0.5 and len(asked) == refused + 1
    assert less.damage < best.damage and less.time > best.time
    nothing, _, refused = corrected(spaces, best, limits, known, lambda c: [np.inf])
    assert nothing is None and refused == 6
    # Inputs that were held out cannot vouch for what the calibration inputs speak against.
    wild, _, _ = corrected(spaces, best, limits, lambda c: [1e3] * 4, lambda c: [1.0] if c is best.choice else [0.1])
    assert wild is None


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for n, future, confidence in ((4, 4, 0.9), (8, 8, 0.95), (3, 1, 0.8)):
        exceeded = 0
        for _ in range(2000):
            logs = rng.standard_normal(n + future) * 0.3
            exceeded += max(np.exp(logs[n:])) > upper_bound(list(np.exp(logs[:n])), future, confidence)
        assert exceeded / 2000 < (1 - confidence) * 1.25, (n, future)
    assert upper_bound([0.3], 5, 0.99) == 0.3 and upper_bound([], 5, 0.99) == np.inf
    assert upper_bound([0.1, np.inf], 5, 0.99) == np.inf and upper_bound([0.0, 0.0], 5, 0.99) == 0.0
    assert upper_bound([1.0, 1.0, 1.0], 5, 0.99) == pytest.approx(1.0)
    assert upper_bound([0.0, 1e-3, 1e-3, 1e-3], 1, 0.9) == upper_bound([2e-5, 1e-3, 1e-3, 1e-3], 1, 0.9) < 0.1


def test_the_bound_on_a_mean_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    for n, future, confidence in ((4, 4, 0.9), (6, 6, 0.95), (3, 1, 0.8)):
        drawn = 0.01 + 0.02 * rng.standard_normal((2000, n + future))
        exceeded = [np.mean(row[n:]) > mean_bound(list(row[:n]), future, confidence) for row in drawn]
        assert (1 - confidence) * 0.7 < np.mean(exceeded) < (1 - confidence) * 1.3, (n, future)
    assert mean_bound([], 5, 0.99) == mean_bound([0.1, np.inf], 5, 0.99) == np.inf
    assert mean_bound([-0.3], 5, 0.99) == -0.3 and mean_bound([0.1, 0.3], 5, 0.5) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no quantile"):
        mean_bound([0.1, 0.3], 5, 0.3)


def test_the_bound_on_a_share_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    for n, share, confidence in ((30, 0.2, 0.9), (200, 0.01, 0.95), (64, 0.5, 0.8)):
        seen, often = np.unique(rng.binomial(n, share, 4000), return_counts=True)
        low = sum(c for k, c in zip(seen, often, strict=True) if share > share_bound(int(k), n, confidence)) / 4000
        assert low < (1 - confidence) * 1.2, (n, share)
    # Of 459 without a change at most 1% change, with 99% confidence: 0.99 ** 459 < 0.01 < 0.99 ** 458.
    assert share_bound(0, 459, 0.99) < 0.01 < share_bound(0, 458, 0.99)
    assert share_bound(1, 662, 0.99) < 0.01 < share_bound(1, 661, 0.99)
    assert share_bound(3, 3, 0.99) == 1.0 and share_bound(2, 10, 0.99) == pytest.approx(0.611743, abs=1e-6)
    assert 30 / 5000 < share_bound(30, 5000, 0.99) < 0.01


def test_of_answers_the_share_that_changes_counts() -> None:
    """Classifiers: four answers an input, of which one changes in every so many."""
    limits = Limits(0.1, 20, 0.95, 0.5, together=True, rows=4)
    one, none = [0.25, *[0.0] * 19], [0.0] * 20
    assert limits.bound(none) == share_bound(0, 80, 0.95) < limits.bound(one) == share_bound(1, 80, 0.95) < 0.1
    assert limits.judged(one) == 0.0125 and limits.bound([0.0, np.inf]) == np.inf
    # What is left can no longer make up for it: five of 80 exceed 10% with this confidence, four do not.
    assert share_bound(4, 80, 0.95) > 0.1 > share_bound(3, 80, 0.95)
    assert limits.lost([0.25] * 4, 20) and not limits.lost([0.25] * 3, 20)
    spaces = [space(i, str(i)) for i in range(3)]

    def measure(choice) -> list[float]:
        changed = min(round(80 * damage_of(spaces, choice)), 80)
        return [0.25] * min(changed, 20) + [0.0] * (20 - min(changed, 20))

    best, _ = tune(spaces, limits, measure)
    assert best is not None and best.choice and best.bound <= 0.1


def test_errors_that_count_together_may_be_negative_and_make_up_for_one_another() -> None:
    """Perplexity: every second input gains by the change."""
    spaces = [space(i, str(i)) for i in range(3)]
    limits = Limits(0.05, 4, 0.9, 1.0, together=True)

    def measure(choice) -> list[float]:
        damage = damage_of(spaces, choice)
        return [damage * f for f in (1.2, -0.3, 0.9, -0.1)]

    best, points = tune(spaces, limits, measure)
    assert best is not None and best.bound <= limits.budget < max(best.errors) * 1.7
    assert all(p.time >= best.time for p in points if p.bound <= limits.budget)
    assert best.bound == mean_bound(best.errors, 4, 0.9) > best.mean
    # What was held out is judged together too, and refuses together.
    kept, held, refused = corrected(spaces, best, limits, measure, lambda c: [0.09, -0.02, 0.07, 0.02])
    assert kept is best and refused == 0 and held == (0.09, -0.02, 0.07, 0.02)
    less, _, refused = corrected(
        spaces, best, limits, measure, lambda c: [0.2, 0.1] if c is best.choice else [0.06, 0.01]
    )
    assert less is not None and refused == 1 and less.time > best.time


def test_errors_that_say_nothing_do_not_lead_far() -> None:
    """A first model that seems better than the original is no reason to leave everything out at once."""
    spaces = [space(i, str(i)) for i in range(3)]
    seen: list[float] = []

    def measure(choice) -> list[float]:
        seen.append(damage_of(spaces, choice))
        return [-0.01, -0.02, -0.01]

    tune(spaces, Limits(1e-4, 3, 0.9, 1.0, together=True), measure)
    assert len(seen) > 1 and all(b / a < np.exp(3.01) for a, b in itertools.pairwise(seen))


def test_when_a_budget_is_lost() -> None:
    each, mean = Limits(0.1, 4, 0.9), Limits(0.1, 4, 0.9, together=True)
    assert each.lost([0.05, 0.11], 4) and not each.lost([0.1, 0.1], 4)
    assert mean.lost([0.4, 0.3], 4) and not mean.lost([0.4, 0.1], 4), "0.5 of 4 inputs is 0.125 each: others may gain"
    assert each.judged([0.1, 0.3]) == 0.3 and mean.judged([0.1, 0.3]) == pytest.approx(0.2)


@pytest.mark.parametrize("jobs", [1, 2, 3, 16, 1000])
def test_inputs_are_run_until_the_budget_is_lost(jobs: int) -> None:
    """Whatever the number of workers; of hundreds of inputs many at once, a quarter more than were needed at most."""
    limits, inputs = Limits(0.1, 4, 0.9), list(range(1000, 1301))
    parts: list[list[int]] = []

    def errors(of: list[int], bad: int) -> list[float]:
        parts.append(list(of))
        return [0.2 if k == bad else 0.05 for k in of]

    found = until_lost(inputs, limits, lambda p: errors(p, bad=1200), jobs)
    assert found == [0.05] * 200 + [0.2, 0.05], "looked at in twos"
    asked = [k for p in parts for k in p]
    assert asked == inputs[: len(asked)] and len(asked) <= min(1.25 * 202 + jobs, 301)
    assert len(parts) < 25, "a barrier between parts of two would be 101 of them"
    parts.clear()
    assert until_lost(inputs, limits, lambda p: errors(p, bad=-1), jobs) == [0.05] * 301
    assert [k for p in parts for k in p] == inputs


def test_the_first_step_that_gains_is_found() -> None:
    """Sites gain nothing until much is taken from them, and what is taken does little harm."""
    time, damage = np.array([1.0, 0.9, 0.3]), np.array([0.0, 1e-6, 1.0])
    one = SiteSpace("a", 1.0, 0.1, (Unit(("dense", "b", "c"), time, damage),), 1.0, 1.2)
    best, _ = tune([one], Limits(1e-3, 1, 0.9), lambda choice: [1e-5])
    assert best is not None and best.choice == {"a": (2,)}


def test_students_quantiles() -> None:
    """From the tables of Abramowitz and Stegun, 26.10."""
    for probability, freedom, want in (
        (0.975, 1, 12.706), (0.95, 2, 2.920), (0.995, 3, 5.841), (0.975, 7, 2.365), (0.95, 10, 1.812),
        (0.9995, 30, 3.646),
    ):  # fmt: skip
        assert student(probability, freedom) == pytest.approx(want, abs=1e-3)


def test_what_is_kept_belongs_to_one_key(tmp_path: Path) -> None:
    feeds = [{"x": np.arange(3.0), "file": np.array(1)}]
    key = key_of("m", feeds, {"budget": 0.1})
    assert key == key_of("m", feeds, {"budget": 0.1})
    others = {
        key_of("n", feeds, {"budget": 0.1}), key_of("m", feeds, {"budget": 0.2}),
        key_of("m", [{"x": np.arange(3.0) + 1, "file": np.array(1)}], {"budget": 0.1}),
        key_of("m", feeds * 2, {"budget": 0.1}),
    }  # fmt: skip
    assert len(others) == 4 and key not in others
    state = State(tmp_path / "s", key)
    state.store("a-1", feeds[0])
    state.release()
    again = State(tmp_path / "s", key)
    found = again.arrays("a-1")
    assert found is not None and again.resumed == 1 and again.arrays("b") is None
    assert {n: v.tolist() for n, v in found.items()} == {"x": [0, 1, 2], "file": 1}
    again.release()
    (tmp_path / "s" / "folder" / "inside").mkdir(parents=True)
    other = State(tmp_path / "s", "another")
    assert other.arrays("a-1") is None
    other.release()
    again.remove()
    assert not (tmp_path / "s").exists()


def test_two_searches_for_one_output_do_not_share_what_they_find(tmp_path: Path) -> None:
    """Each would take the other's files away: the second is refused, whatever it looks for, until the first ends."""
    first = State(tmp_path / "s", "key")
    first.store("a", {"x": np.ones(2)})
    for key in ("key", "another"):
        with pytest.raises(BadArguments, match="another search for the same output is running") as refused:
            State(tmp_path / "s", key)
        assert "--out" in refused.value.hint
    assert first.arrays("a") is not None
    first.release()
    second = State(tmp_path / "s", "key")
    first.remove()  # its output is whole, but the second is at work
    assert second.arrays("a") is not None
    second.release()
    second.remove()
    assert not (tmp_path / "s").exists()


def test_code_without_a_source_has_a_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a package of compiled files."""
    whole = key_of("m", [], {})

    def none(module: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", none)
    assert key_of("m", [], {}) not in ("", whole)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(BadArguments, match="holds other files"):
        State(tmp_path, "key")
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_points_say_their_mean() -> None:
    assert Point(1.0, 0.1, (1.0, 3.0), 4.0, {}).mean == 2.0


@pytest.mark.parametrize("damage", [0.1 * n for n in range(1, 40)])
def test_the_only_candidate_is_tried_whatever_its_damage_rounds_to(damage: float) -> None:
    one = Unit(("as it is", "other"), np.array([1.0, 0.5]), np.array([0.0, damage / 1e5]))
    best, points = tune([SiteSpace("a", 1.0, 0.0, (one,))], Limits(0.5, 4, 0.99), lambda choice: [0.01] * 6)
    assert best is not None and best.choice == {"a": (1,)} and points
