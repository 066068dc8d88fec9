"""The references of the single ops, in a row, are the definition; what an element type makes of them is near."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.conformance import linear, linear_ops
from tests.conformance.random_cases import random_linear

CASES = [*linear.CASES, *random_linear(5, 12, 37)]


def chained(case: linear.Linear, half: str = "", planted: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """``output`` and, under a triangle, ``final_state``, by the references of the ops."""
    values = {n: torch.from_numpy(x) for n, x in case.values().items()}
    for step in linear.steps(case):
        given = {formal: values[name] for formal, name in step.inputs.items()}
        made = linear_ops.expected(step.op, {**linear.attributes(case), **(planted or {})}, given, half)
        values |= {name: made[formal] for formal, name in step.outputs.items()}
    return {n: values[n].numpy() for n in ("output", "final_state") if n in values}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_a_row_they_are_the_definition(case: linear.Linear) -> None:
    want = linear.expected(case)
    got = chained(case)
    assert set(got) == set(want)
    for name, x in want.items():
        assert np.linalg.norm(got[name] - x) <= 1e-9 * np.linalg.norm(x), name
    low = chained(case, case.dtype)["output"]
    assert np.linalg.norm(low - want["output"]) < {"float16": 4e-3, "bfloat16": 3e-2}[case.dtype] * np.linalg.norm(
        want["output"]
    )
    assert np.isfinite(low).all()


PLANTED = {
    "relu": {"key_map": "none"}, "relu, three chunks": {"epsilon": 0.1}, "a bound of the sum": {"floor": 20.0},
    "no map": {"scale": 0.12}, "softmax": {"query_map": "none"}, "mala": {"normaliser": "sum"},
    "inline": {"normaliser": "mala"}, "retention": {"scale": 0.26}, "GLA": {"query_map": "relu"},
    "retention, sums, first state": {"epsilon": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name: str) -> None:
    case = next(c for c in linear.CASES if c.name == name)
    got, want = chained(case, planted=PLANTED[name])["output"], linear.expected(case)["output"]
    assert not np.linalg.norm(got - want) <= 1e-9 * np.linalg.norm(want)
