"""The language of arguments: what it says, what it refuses, and that folding changes no value."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompile.kernels.expressions import (
    BadExpression,
    Binary,
    Expression,
    Literal,
    Symbol,
    evaluate,
    fold,
    parse,
    product,
    substitute,
    symbols_of,
    text,
)

SIZES = {"NQ": 130, "H": 8, "HKV": 2, "query[1]": 77}
NAMES = ("a", "b", "query[1]")


def expressions() -> st.SearchStrategy[Expression]:
    leaves = st.one_of(st.integers(0, 40).map(Literal), st.sampled_from(NAMES).map(Symbol))
    operators = st.sampled_from(("+", "-", "*", "//", "cdiv", "min", "max"))
    return st.recursive(leaves, lambda inner: st.builds(Binary, operators, inner, inner), max_leaves=12)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("7", 7), ("NQ", 130), ("cdiv(NQ, 128)", 2), ("cdiv(128, 128)", 1), ("H // HKV", 4), ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20), ("20 - 5 - 4", 11), ("100 // 7 // 2", 7), ("min(NQ, 64) + max(H, HKV)", 72),
        ("query[1] * 2", 154), (" NQ ", 130), ("HKV - H", -6),
    ],
)  # fmt: skip
def test_values(written: str, value: int) -> None:
    assert evaluate(written, SIZES) == value


@pytest.mark.parametrize(
    "written",
    [
        "", "NQ %", "NQ % 2", "-NQ", "+NQ", "NQ / 2", "1.5", "True", "NQ == 1", "NQ if H else 2", "abs(NQ)", "min(NQ)",
        "min(NQ, H, 2)", "min(a=1, b=2)", "NQ.real", "query[NQ]", "query[-1]", "query[1:2]", "query[True]", "'NQ'",
        "NQ; H", "2 ** 3",
        "__import__('os')", "lambda: 1", "99999999999999999999", "(" * 300 + "1" + ")" * 300, "1+" * 200 + "1",
        "1+" * 4000 + "1",
    ],
)  # fmt: skip
def test_what_is_not_in_the_language(written: str) -> None:
    with pytest.raises(BadExpression) as caught:
        parse(written)
    assert "expression" in caught.value.message


@pytest.mark.parametrize("written", ["NQ // 0", "cdiv(NQ, 0)", "NQ // (HKV - H)", "(HKV - H) // 2", "cdiv(HKV - H, 2)"])
def test_divisions_without_one_meaning(written: str) -> None:
    with pytest.raises(BadExpression, match="numerator >= 0 and a divisor > 0"):
        evaluate(written, SIZES)


def test_unknown_symbol() -> None:
    with pytest.raises(BadExpression, match="'NK' is not known") as caught:
        evaluate("NQ + NK", SIZES)
    assert "NQ" in caught.value.hint


@given(expressions())
@settings(max_examples=300, deadline=None)
def test_text_is_read_back(tree: Expression) -> None:
    assert parse(text(tree)) == tree


@given(expressions(), st.fixed_dictionaries({name: st.integers(1, 50) for name in NAMES}))
@settings(max_examples=500, deadline=None)
def test_folding_keeps_the_value(tree: Expression, sizes: dict[str, int]) -> None:
    try:
        value = evaluate(tree, sizes)
    except BadExpression:
        return
    folded = fold(tree)
    assert evaluate(folded, sizes) == value
    assert fold(folded) == folded or evaluate(fold(folded), sizes) == value


def numbers_on_the_left(tree: Expression) -> bool:
    if not isinstance(tree, Binary):
        return False
    here = tree.operator in ("+", "*", "min", "max") and isinstance(tree.left, Literal)
    here = here and not isinstance(tree.right, Literal)
    return here or numbers_on_the_left(tree.left) or numbers_on_the_left(tree.right)


@given(expressions())
@settings(max_examples=300, deadline=None)
def test_a_folded_expression_has_no_number_before_an_operator(tree: Expression) -> None:
    """TensorRT has no number times expression."""
    assert not numbers_on_the_left(fold(tree))


@given(expressions(), st.fixed_dictionaries({name: st.integers(1, 50) for name in NAMES}))
@settings(max_examples=200, deadline=None)
def test_substituting_numbers_is_evaluating(tree: Expression, sizes: dict[str, int]) -> None:
    try:
        value = evaluate(tree, sizes)
    except BadExpression:
        return
    left = substitute(tree, {name: Literal(size) for name, size in sizes.items()})
    assert evaluate(left, {}) == value and not list(symbols_of(left))


def test_folded_forms() -> None:
    assert text(fold(parse("8 * NQ * 2"))) == "NQ * 16"
    assert text(fold(parse("4 + NQ + 3"))) == "NQ + 7"
    assert text(fold(parse("NQ * 1 + 0"))) == "NQ"
    assert text(fold(parse("NQ * 0"))) == "0"
    assert text(product([Symbol("a"), Literal(8), Symbol("b"), Literal(4)])) == "a * b * 32"
    assert text(product([])) == "1"
    assert text(fold(parse("1 // 0"))) == "1 // 0", "what raises is left to raise"
