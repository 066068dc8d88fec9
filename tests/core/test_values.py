"""The central values: verdicts are no bools, ranges are ordered, masks and sites print what the CLI promises."""

from __future__ import annotations

import dataclasses

import pytest

from attncompile.core.errors import AttncompileError, BadArguments, BadModel, GateFailed, Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.plan import Decision
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.verdict import Verdict


def test_a_verdict_is_no_bool() -> None:
    with pytest.raises(TypeError, match=r"use Verdict\.ok"):
        bool(Verdict.yes("fine"))
    with pytest.raises(TypeError):
        if Verdict.no("x", "not so"):
            pass


def test_unsupported_becomes_a_verdict() -> None:
    verdict = Verdict.of(Unsupported("opset", "needs opset 18", "convert it"))
    assert (verdict.ok, verdict.code, verdict.reason, verdict.hint) == (False, "opset", "needs opset 18", "convert it")


def test_exit_codes() -> None:
    assert GateFailed("x").exit_code == 1
    assert {e("x").exit_code for e in (AttncompileError, BadModel, BadArguments)} == {2}


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 4, 3), (-1, 1, 1)])
def test_ranges_increase(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(BadArguments):
        Range(*sizes)


def test_bindings_do_not_repeat() -> None:
    assert list(ShapeProfile({}).bindings()) == [("static", {})]
    fixed = ShapeProfile({"n": Range(4, 4, 4)})
    assert list(fixed.bindings()) == [("usual", {"n": 4})]
    profile = ShapeProfile({"b": Range(1, 1, 8), "n": Range(1, 64, 128)})
    assert list(profile.bindings()) == [
        ("usual", {"b": 1, "n": 64}), ("min", {"b": 1, "n": 1}), ("max", {"b": 8, "n": 128}),
    ]  # fmt: skip
    assert profile.usual() == {"b": 1, "n": 64}
    assert profile.maximum() == {"b": 8, "n": 128}


def test_grid_counts_its_tokens() -> None:
    grid = TokenGrid((14, 14), prefix=5, suffix=2, evidence="patch embedding")
    assert grid.tokens == 14 * 14 + 7
    assert grid.to_json() == {"shape": [14, 14], "prefix": 5, "suffix": 2, "evidence": "patch embedding"}


_HOW = Certificate("constant", "all elements compared", ((8, 8),))


def test_mask_kind_is_the_most_telling_factor() -> None:
    padding = MaskPart("padding", _HOW, source="mask")
    window = MaskPart("window", _HOW, left=255, right=0)
    assert MaskFacts().kind == "none"
    assert MaskFacts((padding,)).kind == "padding"
    assert MaskFacts((padding, window)).kind == "window"
    assert MaskFacts((window, MaskPart("opaque", _HOW, source="m"))).kind == "opaque"
    assert MaskFacts((padding, window)).part("window") is window
    assert MaskFacts((padding,)).part("window") is None


def test_mask_json_holds_the_promised_keys() -> None:
    assert MaskFacts().to_json() == {"kind": "none"}
    both = MaskFacts(
        (MaskPart("padding", _HOW, source="mask"), MaskPart("window", _HOW, left=255, right=0)), "uniform"
    ).to_json()
    assert (both["kind"], both["left"], both["right"], both["masked_rows"]) == ("window", 255, 0, "uniform")
    assert [p["kind"] for p in both["parts"]] == ["padding", "window"]
    assert both["parts"][0]["source"] == "mask"
    assert both["certificate"] == {
        "method": "constant", "detail": "all elements compared", "lengths": [[8, 8]], "general": False,
    }  # fmt: skip


def test_values_are_frozen() -> None:
    decision = Decision("s", "keep", "r")
    assert decision.kept
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.mechanism = "x"  # type: ignore[misc]
