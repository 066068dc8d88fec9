"""The float64 truth of sites that are operators of ONNX Runtime: what its kernels give, and seen to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from attncompile.verification import reference
from attncompile.verification.site import check_site
from attncompile.verification.standard_operators import in_standard_operators
from tests.passes.operator_graphs import one_node, run

RNG = np.random.default_rng(21)
B, S, L, H, D = 2, 5, 7, 3, 4


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def operator(inputs: Sequence[tuple[str, np.ndarray | None]], **attributes: Any) -> ModelProto:
    return one_node("MultiHeadAttention", inputs, ("y",), "com.microsoft", 18, num_heads=H, **attributes)


OWN: list[Any] = [(x, floats(B, S, H * D)) for x in "qkv"]
CROSS: list[Any] = [OWN[0], ("k", floats(B, L, H * D)), ("v", floats(B, L, H * 6))]
HEADS_FIRST: list[Any] = [OWN[0], ("k", floats(B, H, L, D)), ("v", floats(B, H, L, D))]
NONE: tuple[str, None] = ("", None)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (OWN, {}),
        (CROSS, {"scale": 0.3}),
        (HEADS_FIRST, {}),
        (OWN, {"unidirectional": 1}),
        ([*CROSS, NONE, NONE, ("b", floats(1, H, S, L))], {}),
        ([*OWN, NONE, NONE, ("b", floats(B, 1, S, S))], {"unidirectional": 1, "scale": 0.8}),
    ],
)
def test_the_same_in_standard_operators(inputs: list[Any], attributes: dict[str, Any]) -> None:
    proto = operator(inputs, **attributes)
    standard = in_standard_operators(proto)
    assert {n.domain for n in standard.graph.node} == {""}
    feed = {n: a for n, a in inputs if a is not None}
    expected, got = (run(p, feed, ["y"])["y"] for p in (proto, standard))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [[("b", floats(3 * H * D))], [NONE, ("m", np.ones((B, S, S), np.int32))],
     [NONE, NONE, NONE, ("pk", floats(B, H, 3, D)), ("pv", floats(B, H, 3, D))]],
)  # fmt: skip
def test_what_is_not_understood_stays(more: list[Any]) -> None:
    proto = operator([*OWN, *more])
    assert in_standard_operators(proto) is proto


def test_a_model_without_such_operators_is_left_alone() -> None:
    proto = one_node("Softmax", [("x", floats(2, 3))], ("y",), opset=18)
    assert in_standard_operators(proto) is proto


def test_a_site_is_judged_in_float64() -> None:
    """What is right passes; a scale that is off by a thousandth does not."""
    right = operator(OWN)
    feed = dict(OWN)
    assert check_site(right, in_standard_operators(right), [feed]).passed
    wrong = in_standard_operators(operator(OWN, scale=D**-0.5 * 1.001))
    check = check_site(right, wrong, [feed])
    assert not check.passed
    assert check.checks[0].reference.startswith("float64")


def test_an_operator_that_is_not_what_was_read_fails_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """A truth that the original contradicts is no truth: nothing can be judged good by it."""

    def other(model: ModelProto) -> ModelProto:
        return in_standard_operators(operator(OWN, scale=0.4)) if model.graph.node[0].domain else model

    monkeypatch.setattr(reference, "in_standard_operators", other)
    check = check_site(operator(OWN), in_standard_operators(operator(OWN, scale=0.4)), [dict(OWN)])
    assert not check.passed
    assert "not what its documentation says" in check.checks[0].verdict.reason
