"""Masks along a sequence, stored and computed from the length: exact kinds and parameters, and none with one element
flipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite
from tests.passes.mask_graphs import Positions, Sees, computed, constant, drawn, flipped, read

SIZES = Range(1, 23, 61)
QUICK = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Case:
    """One mask: what it lets through, how a graph computes it, and what must be said of it."""

    def __init__(
        self, kinds: tuple[str, ...], parameters: dict[str, Any], sees: Sees, make: Callable[[Positions], str] | None
    ) -> None:
        self.kinds, self.parameters, self.sees, self.make = kinds, parameters, sees, make

    def check(self, site: AttentionSite) -> None:
        assert tuple(p.kind for p in site.mask.parts) == self.kinds
        main = site.mask.part(site.mask.kind)
        assert main is not None and {**main.parameters(), **self.parameters} == main.parameters()
        assert site.mask.to_json()["kind"] == self.kinds[0]


def _dilated(draw: st.DrawFn) -> Case:
    d = draw(st.integers(2, 4))
    left, right = d * draw(st.integers(1, 3)), d * draw(st.integers(0, 2))
    return Case(
        ("dilated",), {"dilation": d, "left": left, "right": right},
        lambda i, j: (j - i) % d == 0 and -left <= j - i <= right,
        lambda p: p.b.op("And", p.multiple(p.ahead, d), p.between(p.ahead, -left, right)),
    )  # fmt: skip


def _prefix(draw: st.DrawFn) -> Case:
    tokens = draw(st.integers(2, 12))
    return Case(
        ("prefix",), {"tokens": tokens}, lambda i, j: j <= i or j < tokens,
        lambda p: p.b.op("Or", p.causal(), p.b.op("Less", p.key, p.number(tokens))),
    )  # fmt: skip


def _chunks(draw: st.DrawFn) -> Case:
    w = draw(st.integers(3, 8))
    return Case(
        ("blocked", "causal"), {"window": [w], "shift": [0]}, lambda i, j: j <= i and i // w == j // w,
        lambda p: p.b.op("And", p.causal(), p.b.op("Equal", p.cell(p.query, w), p.cell(p.key, w))),
    )  # fmt: skip


def _shifted(draw: st.DrawFn) -> Case:
    w = draw(st.integers(3, 8))
    s = draw(st.integers(1, w - 1))
    return Case(
        ("blocked",), {"window": [w], "shift": [s]}, lambda i, j: (i - s) // w == (j - s) // w,
        lambda p: p.b.op("Equal", p.cell(p.query, w, s), p.cell(p.key, w, s)),
    )  # fmt: skip


def _neighbouring(draw: st.DrawFn) -> Case:
    w = draw(st.integers(2, 5))
    after = draw(st.integers(0, 1))
    return Case(
        ("blocked",), {"window": [w], "shift": [0], "before": 1, **({"after": 1} if after else {})},
        lambda i, j: -1 <= j // w - i // w <= after,
        lambda p: p.between(p.b.op("Sub", p.cell(p.key, w), p.cell(p.query, w)), -1, after),
    )  # fmt: skip


def _longformer(draw: st.DrawFn) -> Case:
    w, first = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Case(
        ("global",), {"left": w, "right": w, "block": 1, "first": first, "last": 0, "tokens": []},
        lambda i, j: abs(i - j) <= w or min(i, j) < first,
        lambda p: p.b.op("Or", p.between(p.ahead, -w, w),
                         p.b.op("Less", p.b.op("Min", p.query, p.key), p.number(first))),
    )  # fmt: skip


def _sinks(draw: st.DrawFn) -> Case:
    w, first = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    return Case(
        ("global", "causal"), {"left": w, "right": 0, "first": first, "last": 0, "tokens": []},
        lambda i, j: j <= i and (i - j <= w or j < first),
        lambda p: p.b.op("And", p.causal(), p.b.op("Or", p.between(p.ahead, -w, 0),
                                                   p.b.op("Less", p.key, p.number(first)))),
    )  # fmt: skip


def _diagonals(draw: st.DrawFn) -> Case:
    a, c = draw(st.integers(2, 4)), draw(st.integers(6, 9))
    return Case(
        ("stripe",), {"diagonals": [[-c - 1, -c], [-a, 1], [c, c]], "columns": []},
        lambda i, j: -c - 1 <= j - i <= -c or -a <= j - i <= 1 or j - i == c,
        lambda p: p.b.op("Or", p.b.op("Or", p.between(p.ahead, -c - 1, -c), p.between(p.ahead, -a, 1)),
                         p.b.op("Equal", p.ahead, p.number(c))),
    )  # fmt: skip


def _slash(draw: st.DrawFn) -> Case:
    w, c = draw(st.integers(1, 3)), draw(st.integers(5, 9))
    return Case(
        ("stripe", "causal"), {"diagonals": [[-w, 0]], "columns": [[c, c + 1]]},
        lambda i, j: j <= i and (i - j <= w or c <= j <= c + 1),
        lambda p: p.b.op("And", p.causal(), p.b.op("Or", p.between(p.ahead, -w, 0), p.between(p.key, c, c + 1))),
    )  # fmt: skip


def _strided(draw: st.DrawFn) -> Case:
    period = draw(st.integers(4, 7))
    return Case(
        ("stripe", "causal"), {"period": period, "left": period - 1, "right": 0},
        lambda i, j: j <= i and (i - j < period or (i - j) % period == 0),
        lambda p: p.b.op("And", p.causal(), p.b.op("Or", p.between(p.ahead, 1 - period, 0),
                                                   p.multiple(p.ahead, period))),
    )  # fmt: skip


def _fixed(draw: st.DrawFn) -> Case:
    period = draw(st.integers(4, 7))
    c = draw(st.integers(1, period - 2))
    return Case(
        ("stripe", "causal"), {"period": period, "summary": c},
        lambda i, j: j <= i and (i // period == j // period or j % period >= period - c),
        lambda p: p.b.op("And", p.causal(), p.b.op(
            "Or", p.b.op("Equal", p.cell(p.query, period), p.cell(p.key, period)),
            p.b.op("GreaterOrEqual", p.b.op("Mod", p.key, p.number(period)), p.number(period - c)),
        )),
    )  # fmt: skip


def _without_itself(draw: st.DrawFn) -> Case:
    low = draw(st.integers(1, 3))
    return Case(
        ("stripe", "causal"), {"diagonals": [[None, -low]], "columns": [[0, 0]]}, lambda i, j: i - j >= low or j == 0,
        lambda p: p.b.op("Or", p.b.op("LessOrEqual", p.ahead, p.number(-low)), p.b.op("Equal", p.key, p.number(0))),
    )  # fmt: skip


def _causal(draw: st.DrawFn) -> Case:
    return Case(("causal",), {}, lambda i, j: j <= i, lambda p: p.causal())


def _window(draw: st.DrawFn) -> Case:
    left, right = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    return Case(("window",), {"left": left, "right": right}, lambda i, j: -left <= j - i <= right,
                lambda p: p.between(p.ahead, -left, right))  # fmt: skip


BOTH = [_causal, _window, _prefix, _dilated, _chunks, _shifted, _neighbouring, _longformer, _sinks, _diagonals, _slash,
        _strided, _fixed, _without_itself]  # fmt: skip


@pytest.mark.parametrize("case", BOTH)
def test_stored(case: Callable[[st.DrawFn], Case]) -> None:
    @QUICK
    @given(st.data(), st.integers(29, 43), st.sampled_from(["where", "add", "half"]), st.integers(0, 999))
    def check(data: st.DataObject, length: int, form: str, seed: int) -> None:
        said = case(data.draw)
        seen = drawn(length, length, said.sees)
        site = constant(seen, form)
        said.check(site)
        assert site.mask.parts[0].certificate.method == "constant" and not site.mask.parts[0].certificate.general
        np.testing.assert_array_equal(read(site, length, length), seen)
        other = flipped(seen, seed)
        site = constant(other, form)
        np.testing.assert_array_equal(read(site, length, length), other)
        assert site.mask.kind == "block_sparse" or said.kinds[0] != site.mask.kind

    check()


@pytest.mark.parametrize("case", BOTH)
def test_computed_from_a_dynamic_length(case: Callable[[st.DrawFn], Case]) -> None:
    @QUICK
    @given(st.data(), st.sampled_from(["where", "add"]))
    def check(data: st.DataObject, form: str) -> None:
        said = case(data.draw)
        assert said.make is not None
        site = computed(said.make, SIZES, form=form)
        said.check(site)
        certificate = site.mask.parts[0].certificate
        assert certificate.method == "evaluated" and certificate.general
        seen = {q for q, _ in certificate.lengths}
        assert {1, 23, 61, 127} <= seen
        main = site.mask.parts[0]
        numbers = [main.left, main.right] if main.pattern is None else [
            n for v in main.parameters().values() for n in (v if isinstance(v, list) else [v]) if isinstance(n, int)
        ]  # fmt: skip
        smallest = min((n for n in numbers if n > 1), default=0)
        assert not smallest or {smallest - 1, smallest, smallest + 1, 2 * smallest + 1} & seen
        for length in (2, 31, 64):
            np.testing.assert_array_equal(read(site, length, length), drawn(length, length, said.sees))

    check()


@QUICK
@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([_chunks, _longformer, _strided, _prefix]), st.data())
def test_computed_with_one_element_flipped_is_opaque(
    i: int, j: int, case: Callable[[st.DrawFn], Case], data: st.DataObject
) -> None:
    said = case(data.draw)

    def make(p: Positions) -> str:
        assert said.make is not None
        one = p.b.op("And", p.b.op("Equal", p.query, p.number(i)), p.b.op("Equal", p.key, p.number(j)))
        return p.b.op("Xor", said.make(p), one)

    site = computed(make, SIZES)
    main = site.mask.parts[0]
    if main.kind == said.kinds[0] and main.pattern is not None:  # another one, where the element belongs to it
        assert main.parameters() != said.parameters
        np.testing.assert_array_equal(read(site, 61, 61)[i, j], not said.sees(i, j))
    else:
        assert main.kind == "opaque" and main.certificate.detail


@QUICK
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=6).filter(lambda x: sum(x) > 14),
    st.booleans(),
    st.integers(0, 99),
)
def test_documents(lengths: list[int], causal: bool, seed: int) -> None:
    total = sum(lengths)
    of = np.repeat(np.arange(len(lengths)), lengths)
    seen = drawn(total, total, lambda i, j: bool(of[i] == of[j]) and (j <= i or not causal))
    site = constant(seen)
    np.testing.assert_array_equal(read(site, total, total), seen)
    middle = set(lengths[1:-1])
    if (len(middle) < 2 and (not middle or max(lengths[0], lengths[-1]) <= min(middle))) or len(lengths) == 2:
        assert site.mask.kind in ("blocked", "document", "window")
    elif not causal or min(lengths) > 1:
        assert site.mask.kind == "document"
        assert site.mask.parts[0].parameters() == {"lengths": lengths}
        assert [p.kind for p in site.mask.parts[1:]] == ["causal"] * causal
    other = flipped(seen, seed)
    again = constant(other)
    np.testing.assert_array_equal(read(again, total, total), other)
    assert again.mask.kind != "document"


@QUICK
@given(st.integers(5, 8), st.integers(3, 5), st.integers(0, 999))
def test_big_bird(blocks: int, block: int, seed: int) -> None:
    """Global first and last blocks, a window of three blocks, one random block each."""
    rng = np.random.default_rng(seed)
    random = {i: int(rng.integers(1, blocks - 1)) for i in range(1, blocks - 1)}
    length = blocks * block
    seen = drawn(length, length, lambda i, j: (
        abs(i // block - j // block) <= 1 or {i // block, j // block} & {0, blocks - 1} != set()
        or random.get(i // block) == j // block
    ))  # fmt: skip
    site = constant(seen)
    np.testing.assert_array_equal(read(site, length, length), seen)
    if blocks > 5 and any(abs(i - j) > 1 for i, j in random.items()):
        found = site.mask.parts[0].parameters()
        assert site.mask.kind == "global" and (found["first"], found["last"]) == (block, block)
        assert found["random_blocks"] == sum(abs(i - j) > 1 for i, j in random.items())


def test_queries_are_the_last_of_more_keys() -> None:
    for kind, sees in (
        ("blocked", lambda i, j: i // 6 == j // 6), ("dilated", lambda i, j: (j - i) % 3 == 0),
        ("stripe", lambda i, j: j < 2 or -3 <= j - i <= 0),
    ):  # fmt: skip
        seen = drawn(11, 23, sees)
        site = constant(seen)
        assert site.mask.parts[0].kind == kind
        np.testing.assert_array_equal(read(site, 11, 23), seen)


def test_the_simplest_of_several_kinds() -> None:
    """A window as wide as the sequence, one document, chunks of the whole length are no mask, or causal."""
    length = 19
    everything = np.ones((length, length), dtype=bool)
    assert constant(everything).mask.kind == "none"
    assert constant(drawn(length, length, lambda i, j: j <= i and i // 32 == j // 32)).mask.kind == "causal"
    assert constant(drawn(length, length, lambda i, j: j <= i or j < 1)).mask.kind == "causal"
    assert constant(np.eye(length, dtype=bool)).mask.parts[0].parameters() == {"left": 0, "right": 0}
    halves = drawn(20, 20, lambda i, j: i // 10 == j // 10)  # two documents, chunks of 10, or a 2x10 grid's windows
    assert constant(halves).mask.kind == "blocked"


@pytest.mark.parametrize("seed", range(3))
def test_any_other_mask_is_kept_as_blocks(seed: int) -> None:
    seen = np.random.default_rng(seed).random((37, 37)) < 0.4
    site = constant(seen)
    assert site.mask.kind == "block_sparse" and "seen" in site.mask.parts[0].certificate.detail
    assert 0 < site.mask.to_json()["density"] <= 1
    np.testing.assert_array_equal(read(site, 37, 37), seen)
