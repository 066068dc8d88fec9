"""Neighborhoods that a mask was found to be: taken exactly, with every parameter, and not with a wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate
from attncompile.core.pattern import BlockSparse, GridWindow
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism
from attncompile.plugins.block_sparse.reference import reference
from attncompile.plugins.neighborhood.facts import visible

SUBJECT = mechanism("NeighborhoodAttention")
ONCE = Certificate("constant", "given by the test")


def window(
    sides: tuple[int, ...], kernel: tuple[int, ...], prefix: int = 0, suffix: int = 0, **other: Any
) -> GridWindow:
    ones = (1,) * len(sides)
    values = {"dilation": ones, "stride": ones, "causal": (False,) * len(sides), **other}
    return GridWindow(TokenGrid(sides, prefix, suffix), kernel, **values)


FORMS = {
    "2-D": window((23, 17), (5, 3)),
    "2-D, even, prefix, suffix": window((23, 17), (4, 6), prefix=1, suffix=2),
    "2-D, truncated": window((23, 17), (5, 3), border="truncate"),
    "2-D, dilated": window((23, 17), (5, 3), dilation=(2, 3)),
    "2-D, strided": window((23, 17), (6, 4), stride=(3, 2)),
    "2-D, causal rows": window((23, 17), (5, 3), causal=(True, False)),
    "2-D, causal, strided": window((23, 17), (6, 4), causal=(True, True), stride=(2, 2)),
    "2-D, windows of Swin": window((24, 16), (4, 4), stride=(4, 4), border="truncate"),
    "2-D, ball": window((23, 17), (7, 5), border="truncate", shape="ball"),
    "2-D, ball, prefix, suffix": window((9, 14), (7, 7), 1, 2, border="truncate", shape="ball"),
    "3-D, ball": window((5, 9, 14), (3, 5, 7), border="truncate", shape="ball"),
    "3-D": window((5, 9, 11), (2, 3, 3)),
    "3-D, causal frames, prefix": window((5, 9, 11), (3, 3, 3), causal=(True, False, False)),
    "1-D": window((391,), (9,)),
    "1-D, dilated, prefix": window((391,), (9,), dilation=(4,), prefix=3),
    "1-D, truncated": window((391,), (9,), border="truncate"),
}


def only(found: Any) -> Candidate | Verdict:
    assert len(found) == 1, found
    return found[0]


def truth(at: Any, pattern: GridWindow) -> np.ndarray:
    """By the bits of the pattern, which know nothing of the op."""
    n = pattern.grid.tokens
    extra = {"bias": at.bias} if at.bias is not None else {}
    return reference(**at.tensors(), visible=pattern.visible(n, n), masked_rows=at.masked_rows, scale=at.scale,
                     key_mask=at.key_mask, **extra)  # fmt: skip


def run(at: Any) -> np.ndarray:
    found = only(SUBJECT.exact_candidates(at.site()))
    assert isinstance(found, Candidate) and found.exact, found
    assert SUBJECT.is_exact_for(at.site(), found.parameters).ok
    return at.run(SUBJECT, found.parameters)


@pytest.fixture(autouse=True)
def _small_sites_are_worth_it(monkeypatch) -> None:
    from attncompile.plugins.neighborhood import mechanism as module

    monkeypatch.setattr(module, "MINIMUM_GAIN", 0.0)


@pytest.mark.parametrize("label", FORMS)
def test_forms(label, case) -> None:
    pattern = FORMS[label]
    tokens = pattern.grid.tokens
    at = case(queries=tokens, static=True, batch=2, pattern=pattern)
    for more in (
        {}, {"heads": 6, "kv_heads": 2, "layouts": ("BNHD",) * 4},
        {"key_mask": np.random.default_rng(1).random((2, 1, 1, tokens)) < 0.7},
    ):  # fmt: skip
        one = replace(at, **more)
        np.testing.assert_allclose(run(one), truth(one, pattern), atol=2e-5)
    (found,) = SUBJECT.exact_candidates(at.site())
    assert isinstance(found, Candidate) and ("a ball of" in found.reason) == (pattern.shape == "ball"), found


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("label", [k for k, p in FORMS.items() if not p.grid.prefix and not p.grid.suffix])
def test_biases(label, heads, case) -> None:
    """Relative position biases come as [H, N, N], or as what broadcasts to it."""
    pattern = FORMS[label]
    n = pattern.grid.tokens
    for shape in ((4, n, n), (1, 1, 1, n)):
        bias = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        at = case(queries=n, static=True, pattern=pattern, bias=bias, heads=heads[0], kv_heads=heads[1])
        np.testing.assert_allclose(run(at), truth(at, pattern), atol=2e-5)
    half = replace(at, dtype="float16")
    np.testing.assert_allclose(run(half), truth(half, pattern), atol=2e-2)


@pytest.mark.parametrize("left_right", [(15, 0), (7, 4)])
def test_a_plain_window_with_a_bias(left_right, case) -> None:
    """At a fixed length; a dynamic one has no table to cut the bias by."""
    left, right = left_right
    bias = np.random.default_rng(3).standard_normal((4, 203, 203)).astype(np.float32)
    at = case(queries=203, static=True, bias=bias)
    part = MaskPart("window", Certificate("structure", "", general=True), left, right)
    site = at.site()
    site = replace(site, mask=MaskFacts((part, *site.mask.parts)))
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Candidate)
    want = reference(**at.tensors(), visible=visible((part,), 203, 203), scale=at.scale, bias=bias)
    lowered = SUBJECT.lower(site, found.parameters, 18)

    class Fixed:
        def lower(self, *_: Any) -> Any:
            return lowered

    np.testing.assert_allclose(at.run(Fixed(), found.parameters), want, atol=2e-5)
    dynamic = only(SUBJECT.exact_candidates(replace(site, query_length="N", key_length="N")))
    assert isinstance(dynamic, Verdict) and dynamic.code == "bias"


def test_one_wrong_parameter_is_not_exact(case) -> None:
    """Every parameter of every form, changed by one step: no longer the site's mask, or not a neighborhood at all."""
    changed = 0
    for pattern in FORMS.values():
        site = case(queries=pattern.grid.tokens, static=True, pattern=pattern).site()
        right = only(SUBJECT.exact_candidates(site)).parameters
        for name in ("kernel_size", "dilation", "stride"):
            for axis in range(len(pattern.grid.shape)):
                wrong = [v + (a == axis) for a, v in enumerate(right[name])]
                assert not SUBJECT.is_exact_for(site, {**right, name: wrong}).ok, (pattern, name, wrong)
                changed += 1
        for axis in range(len(pattern.grid.shape)):
            flipped = [int(c) ^ (a == axis) for a, c in enumerate(right["causal"])]
            assert not SUBJECT.is_exact_for(site, {**right, "causal": flipped}).ok
        border = {"clamp": "truncate", "truncate": "clamp"}[right["border"]]
        # Windows that tile the grid are not cut by its border, and causal ones are cut either way.
        if right["stride"] != right["kernel_size"] and not all(right["causal"]):
            assert not SUBJECT.is_exact_for(site, {**right, "border": border, "shape": "box"}).ok
        if len(pattern.grid.shape) > 1:
            turned = {**right, "grid": right["grid"][::-1]}
            assert not SUBJECT.is_exact_for(site, turned).ok
    assert changed > 60


def test_one_flipped_bit_is_not_exact(case) -> None:
    pattern = FORMS["2-D"]
    n = pattern.grid.tokens
    at = case(queries=n, static=True, pattern=pattern)
    right = only(SUBJECT.exact_candidates(at.site())).parameters
    for y, x in ((0, 0), (200, 200), (17, 300)):
        bits = pattern.visible(n, n)
        bits[y, x] ^= True
        other = replace(at, pattern=None, visible=bits).site()
        assert SUBJECT.is_exact_for(other, right).code == "other-window"
    whole = replace(at, pattern=None, visible=pattern.visible(n, n)).site()
    assert SUBJECT.is_exact_for(whole, right).ok  # the same bits under another name


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ((MaskPart("neighborhood", ONCE, pattern=window((23, 17), (5, 3), border="circular")),), "border"),
        ((MaskPart("neighborhood", ONCE, pattern=FORMS["2-D"]), MaskPart("causal", ONCE, -1, 0)), "mask"),
        ((MaskPart("neighborhood", ONCE, pattern=FORMS["2-D"]), MaskPart("opaque", ONCE, source="x")), "mask"),
        ((MaskPart("neighborhood", ONCE, pattern=window((391,), (9,), causal=(True,), prefix=2)),), "grid"),
        ((MaskPart("neighborhood", ONCE, pattern=FORMS["3-D"]),), "grid"),
        (
            (
                MaskPart("neighborhood", ONCE, pattern=FORMS["2-D"]),
                MaskPart("bias", Certificate("structure", ""), source="b", additive=True),
            ),
            "bias",
        ),
    ],
)
def test_refusals(parts, code, case) -> None:
    found = only(SUBJECT.exact_candidates(case(queries=391, static=True).site(mask=MaskFacts(parts))))
    assert isinstance(found, Verdict) and (found.code, bool(found.reason)) == (code, True)


def test_prefix_tokens_and_a_bias_are_refused(case) -> None:
    pattern = FORMS["2-D, even, prefix, suffix"]
    n = pattern.grid.tokens
    found = only(SUBJECT.exact_candidates(case(queries=n, static=True, pattern=pattern, bias=np.zeros((n, n))).site()))
    assert isinstance(found, Verdict) and found.code == "bias"


def test_a_wide_neighborhood_is_not_worth_it(case, monkeypatch) -> None:
    from attncompile.plugins.neighborhood import mechanism as module

    monkeypatch.setattr(module, "MINIMUM_GAIN", 1.15)
    site = case(queries=400, static=True, pattern=window((20, 20), (17, 17))).site()
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Verdict) and found.code == "too-wide"


def test_dilated_causal_groups_without_any_key(case) -> None:
    """A group wider than its window has queries that see nothing."""
    pattern = window((64,), (2,), causal=(True,), stride=(4,))
    assert not pattern.visible(64, 64).any(axis=1).all()
    for rows in ("zero", "nan"):
        at = case(queries=64, static=True, pattern=pattern, masked_rows=rows)
        np.testing.assert_allclose(run(at), truth(at, pattern), atol=2e-5)
    unknown = case(queries=64, static=True, pattern=pattern, masked_rows="uniform", fills=(-1e4,))
    found = only(SUBJECT.exact_candidates(unknown.site()))
    assert isinstance(found, Verdict) and found.code == "masked-rows"


def test_bodies_inline_to_standard_ops(case) -> None:
    at = case(queries=391, static=True, pattern=FORMS["2-D"], bias=np.zeros((391, 391), np.float32))
    given = only(SUBJECT.exact_candidates(at.site())).parameters
    inlined = onnx.inliner.inline_local_functions(at.model(SUBJECT, given))
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}


def test_what_wraps_around_is_one_for_block_sparse(case) -> None:
    pattern = window((23, 17), (5, 3), border="circular")
    at = case(queries=391, static=True, pattern=pattern)
    other = mechanism("BlockSparseAttention")
    found = only(other.exact_candidates(at.site()))
    assert isinstance(found, Candidate)
    np.testing.assert_allclose(at.run(other, found.parameters), truth(at, pattern), atol=2e-5)
    assert BlockSparse.of(pattern.visible(391, 391), 16).density > 0
