"""Parameters that a person edited in plan.toml: a mechanism takes what stands there as it is meant, or says no."""

from __future__ import annotations

from typing import Any

import pytest

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Shape
from attncompile.plugins import mechanism

GIVEN: dict[str, dict[str, Any]] = {
    "NeighborhoodAttention": {
        "kernel_size": [17], "left": [8], "causal": [0], "dilation": [1], "stride": [1], "border": "truncate",
        "shape": "box", "grid": [-1], "prefix": 0, "suffix": 0, "masked_rows": "zero", "shift": [0], "seam": 0.0,
        "block": 64, "dense_below": 0,
    },
    "DenseAttention": {
        "left": -1, "right": -1, "softcap": 0.0, "masked_rows": "zero", "chunks": 1, "guard": False,
    },
    "Attention": {"causal": False},
    "BlockSparseAttention": {"edge": 64, "heads": ["dense"] * 4, "masked_rows": "zero"},
}  # fmt: skip
VALUES: list[Any] = [
    "x", "", "1", "-inf", "false", -1, 2**40, 2**70, 1.5, float("nan"), float("inf"), True, [], [1], [2**70], [1.5],
    ["a"], [[1]], [1, 2], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_every_value_is_taken_or_refused(name, case) -> None:
    """No traceback, and what ``supports`` says yes to has a cost and a lowering."""
    subject, site = mechanism(name), case(queries=150, static=True).site()
    opset = 23 if name == "Attention" else 18
    assert subject.supports(site, GIVEN[name]).ok
    taken = 0
    for key in GIVEN[name]:
        for value in VALUES:
            given = {**GIVEN[name], key: value}
            verdict = subject.supports(site, given)
            if verdict.ok:
                taken += 1
                subject.cost(site, given, Shape(1, 150, 150))
                assert subject.lower(site, given, opset).nodes, (key, value)
            else:
                assert verdict.reason and len(verdict.reason) < 300, (key, value)
                with pytest.raises(Unsupported):
                    subject.lower(site, given, opset)
    assert taken < len(VALUES) * len(GIVEN[name]) / 3


@pytest.mark.parametrize("name", GIVEN)
def test_a_misspelt_parameter_is_named(name, case) -> None:
    """Its default would be taken in its place: another pattern than was asked for."""
    subject, site = mechanism(name), case(queries=150, static=True).site()
    verdict = subject.supports(site, {**GIVEN[name], "dilatoin": [2]})
    assert not verdict.ok and f"{name} has no parameter dilatoin" in verdict.reason and verdict.hint


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("NeighborhoodAttention", "prefix", 1.5), ("NeighborhoodAttention", "block", "64"),
     ("NeighborhoodAttention", "seam", [0]), ("DenseAttention", "guard", "false"), ("DenseAttention", "right", "0"),
     ("Attention", "causal", "false")],
)  # fmt: skip
def test_what_is_of_another_type_is_not_converted(name, key, value, case) -> None:
    verdict = mechanism(name).supports(case(queries=150, static=True).site(), {**GIVEN[name], key: value})
    assert not verdict.ok and f"{name}: {key} = " in verdict.reason and verdict.hint.startswith(f"{key} is ")
