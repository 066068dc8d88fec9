"""The two float64 references of each op, written apart, agree; an off-by-one in one of them does not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conformance import naive, vectorised
from tests.conformance.case import Case
from tests.conformance.cases import CASES, named
from tests.conformance.random_cases import random_cases

SMALL = 12_000
"""Score elements that the naive reference does in less than half a second."""

NAMED = [c for cases in CASES.values() for c in cases]
RANDOM = [c for op in CASES for c in random_cases(op, 7, 25, SMALL)]


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("case", [*NAMED, *RANDOM], ids=str)
def test_naive_and_vectorised(case: Case) -> None:
    output, lse = naive.expected(case)
    whole, whole_lse = vectorised.expected(case.call, case.inputs())
    assert agree(output, whole)
    assert lse is None or agree(lse, whole_lse)


PLANTED: list[tuple[str, str, dict[str, Any]]] = [
    ("Attention", "17 queries, 50 keys, window", {"left": 10}),
    ("Attention", "17 queries, 50 keys, window", {"right": 4}),
    ("Attention", "17 queries, 50 keys, past", {"left": 4}),
    ("Attention", "17 queries, 50 keys, causal", {"right": 1}),
    ("Attention", "all inputs", {"left": 29}),
    ("Attention", "softcap", {"softcap": 2.6}),
    ("Attention", "rows without a key: zero, dense", {"masked_rows": "uniform"}),
    ("NeighborhoodAttention", "1-D", {"kernel_size": [8]}),
    ("NeighborhoodAttention", "1-D, left", {"left": [3]}),
    ("NeighborhoodAttention", "1-D, causal, groups", {"stride": [4]}),
    ("NeighborhoodAttention", "2-D, clamp", {"border": "truncate"}),
    ("NeighborhoodAttention", "2-D, left", {"left": [1, 1]}),
    ("NeighborhoodAttention", "2-D, ball", {"shape": "box"}),
    ("NeighborhoodAttention", "3-D, clamp", {"kernel_size": [2, 3, 2]}),
    ("NeighborhoodAttention", "3-D, causal frames", {"kernel_size": [3, 3, 2]}),
]


@pytest.mark.parametrize(("op", "name", "wrong"), PLANTED, ids=str)
def test_a_planted_error_is_noticed(op: str, name: str, wrong: dict[str, Any]) -> None:
    case = named(op, name)
    whole, _ = vectorised.expected(case.call, case.inputs())
    assert not agree(naive.expected(case, **wrong)[0], whole)


def test_cases_are_the_same_every_time() -> None:
    for op in CASES:
        first, again = ([(c, c.inputs()) for c in random_cases(op, 3, 4, SMALL)] for _ in range(2))
        for (case, inputs), (other, others) in zip(first, again, strict=True):
            assert case == other
            assert all(np.array_equal(inputs[n], others[n], equal_nan=True) for n in inputs)


def test_names_are_distinct() -> None:
    for cases in CASES.values():
        assert len({c.name for c in cases}) == len(cases)
