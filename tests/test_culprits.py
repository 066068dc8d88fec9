"""The bisection of replacements that make a model fail: what it finds, and how few runs it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from attncompile.culprits import find_culprits

SITES = tuple(f"site{i}" for i in range(12))


class Model:
    """Fails where all sites of a planted group are replaced; counts its runs."""

    def __init__(self, *groups: Sequence[str]) -> None:
        self.groups = [frozenset(g) for g in groups]
        self.runs: list[frozenset[str]] = []

    def __call__(self, replaced: Sequence[str]) -> bool:
        self.runs.append(frozenset(replaced))
        return any(g <= set(replaced) for g in self.groups)


@pytest.mark.parametrize("at", range(12))
def test_one_culprit_of_twelve(at: int) -> None:
    model = Model([SITES[at]])
    found = find_culprits(SITES, model)
    assert found.groups == ((SITES[at],),) and found.rest == tuple(s for s in SITES if s != SITES[at])
    assert found.runs == len(model.runs) <= math.ceil(math.log2(12)) + 2 < 12


@pytest.mark.parametrize("pair", list(itertools.combinations(range(12), 2)))
def test_two_independent_culprits(pair: tuple[int, int]) -> None:
    model = Model(*([SITES[i]] for i in pair))
    found = find_culprits(SITES, model)
    assert {g for group in found.groups for g in group} == {SITES[i] for i in pair}
    assert all(len(g) == 1 for g in found.groups) and len(found.rest) == 10
    assert found.runs <= 2 * (math.ceil(math.log2(12)) + 2)


@pytest.mark.parametrize("pair", list(itertools.combinations(range(12), 2)))
def test_a_pair_that_fails_only_together(pair: tuple[int, int]) -> None:
    model = Model([SITES[i] for i in pair])
    found = find_culprits(SITES, model)
    assert found.groups == (tuple(SITES[i] for i in pair),)
    assert found.runs <= 2 * (math.ceil(math.log2(12)) + 1) + 1


def test_runs_grow_with_the_logarithm() -> None:
    for n in (16, 64, 256):
        names = [str(i) for i in range(n)]
        found = find_culprits(names, Model([str(n // 3)]))
        assert found.groups == ((str(n // 3),),) and found.runs <= math.log2(n) + 2


def test_all_of_them_and_no_set_is_run_twice() -> None:
    model = Model(*([s] for s in SITES))
    found = find_culprits(SITES, model)
    assert found.rest == () and sorted(g for (g,) in found.groups) == sorted(SITES)
    assert len(set(model.runs)) == len(model.runs)
    assert frozenset() not in model.runs and frozenset(SITES) not in model.runs


def test_errors_that_cancel_end_with_a_rest_that_passes() -> None:
    """Failing is not monotone here: two errors of opposite sign hide each other."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        error = dict(zip(SITES, rng.choice([-1.0, 0.0, 0.0, 1.0], 12), strict=True))

        def fails(replaced: Sequence[str], error: dict[str, float] = error) -> bool:
            return abs(sum(error[s] for s in replaced)) > 0.5

        if not fails(SITES):
            continue
        found = find_culprits(SITES, fails)
        assert not fails(found.rest) and all(fails(g) for g in found.groups)
