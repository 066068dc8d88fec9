"""Windows over a KV cache: one body for the prefill and for every step, which reads the last keys alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, Shape
from attncompile.core.site import AttentionSite, Cache
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism
from attncompile.plugins.neighborhood import cached

SUBJECT = mechanism("NeighborhoodAttention")
LEFT = 8
CAUSAL = {"kernel_size": [LEFT + 1], "causal": [1], "block": 16}
BOTH = {"kernel_size": [LEFT + 4], "left": [LEFT], "block": 16}
PAIRS = (
    (0, 1), (0, 2), (0, 9), (0, 37), (0, 70), (1, 1), (1, 5), (7, 1), (7, 3), (8, 1), (8, 8), (9, 1), (9, 2), (10, 1),
    (17, 1), (17, 4), (31, 16), (31, 17), (61, 1), (61, 9), (61, 33), (203, 1), (203, 7), (203, 41),
)  # fmt: skip
"""(past, sequence) around the window of 8 + 1, the block of 16 and none of them."""


def lengths(past: int, new: int) -> dict[str, Any]:
    return {"queries": new, "keys": past + new}


def dynamic(at: Any) -> AttentionSite:
    """A site whose two lengths vary on their own, also where they happen to be equal in the case."""
    return replace(at.site(), query_length="n", key_length="p + n")


def ran(at: Any, site: AttentionSite, parameters: Any, feeds: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """[B, Nq, H, Dv] of the op for ``site``."""

    class Given(type(at)):  # type: ignore[misc]
        def site(self, **changes: Any) -> AttentionSite:
            return site

        def feeds(self) -> dict[str, np.ndarray]:
            return feeds if feeds is not None else super().feeds()

    return Given(**{f: getattr(at, f) for f in at.__dataclass_fields__}).run(SUBJECT, parameters)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape and got.size and np.array_equal(np.isnan(got), np.isnan(want))
    seen = ~np.isnan(want)
    return float(np.linalg.norm(got[seen] - want[seen]) / np.linalg.norm(want[seen]))


def whole_keys(at: Any, parameters: Any) -> np.ndarray:
    """The definition, over all keys."""
    return at.expected(SUBJECT, parameters)


@pytest.mark.parametrize("dense_below", [0, 20])
@pytest.mark.parametrize("given", [CAUSAL, BOTH], ids=["causal", "both sides"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
def test_every_pair_of_lengths(given: Any, dense_below: int, heads: int, kv_heads: int, case: Any) -> None:
    parameters = {**given, "dense_below": dense_below}
    for seed, (past, new) in enumerate(PAIRS):
        layouts = ("BHND",) * 4 if seed % 2 else ("BNHD", "BHND", "BNHD", "BNHD")
        at = case(batch=2, heads=heads, kv_heads=kv_heads, layouts=layouts, seed=seed, **lengths(past, new))
        assert relative(ran(at, dynamic(at), parameters), whole_keys(at, parameters)) < 1e-6, (past, new)


def test_one_graph_for_all_lengths(case: Any) -> None:
    """The same bytes at every pair: nothing of the lengths is in the body."""
    made = set()
    for past, new in PAIRS:
        at = case(**lengths(past, new))
        lowered = SUBJECT.lower(dynamic(at), {**CAUSAL, "dense_below": 20}, 18)
        made.add(lowered.functions[0].SerializeToString() + lowered.nodes[0].SerializeToString())
    assert len(made) == 1


@pytest.mark.parametrize("static", [(1, 300), (3, 300), (16, 61), (17, 61), (33, 37), (1, 5), (70, 203)])
@pytest.mark.parametrize("padded", [False, True])
def test_fixed_lengths(static: tuple[int, int], padded: bool, case: Any) -> None:
    new, keys = static
    at = case(static=True, queries=new, keys=keys, heads=6, kv_heads=2)
    if padded:
        at = replace(at, key_mask=np.random.default_rng(0).random((1, 1, 1, keys)) < 0.6)
    assert relative(at.run(SUBJECT, CAUSAL), whole_keys(at, CAUSAL)) < 1e-6
    for site in (replace(at.site(), key_length="M"), replace(at.site(), query_length="N")):
        for dense_below in (0, 20):
            got = ran(at, site, {**CAUSAL, "dense_below": dense_below})
            assert relative(got, whole_keys(at, CAUSAL)) < 1e-6


@pytest.mark.parametrize("rows", ["zero", "uniform", "nan"])
@pytest.mark.parametrize("dense_below", [0, 20])
@pytest.mark.parametrize("layouts", [("BHND",) * 4, ("BNHD",) * 4], ids="-".join)
def test_padding_on_either_side(rows: str, dense_below: int, layouts: Any, case: Any) -> None:
    """A query that sees no key gives the mean of all values, those that were cut away among them."""
    parameters = {**CAUSAL, "masked_rows": rows, "dense_below": dense_below}
    emptied = 0
    for seed, (past, new) in enumerate(PAIRS):
        total = past + new
        keep = np.random.default_rng(seed).random((2, 1, 1, total)) < 0.8
        keep[0, ..., : total // 2] = False  # left padding
        keep[1, ..., max(total - 12, 1) :] = False  # right padding: the last queries see nothing
        at = case(batch=2, seed=seed, heads=4, kv_heads=2, key_mask=keep, masked_rows=rows, layouts=layouts,
                  fills=(-3.4e38,), **lengths(past, new))  # fmt: skip
        want = whole_keys(at, parameters)
        if np.isnan(want).all():
            assert np.isnan(ran(at, dynamic(at), parameters)).all()
            continue
        emptied += not keep[1, ..., -LEFT - 1 :].any()
        if not np.nan_to_num(want).any():
            assert not ran(at, dynamic(at), parameters).any()
            continue
        assert relative(ran(at, dynamic(at), parameters), want) < 1e-6, (past, new)
    assert emptied > 10


@pytest.mark.parametrize("shape", [(23,), (1, 23), (1, 1, 1, 23), (2, 1, 1, 23)])
def test_ranks_of_the_padding(shape: tuple[int, ...], case: Any) -> None:
    keep = np.random.default_rng(0).random(shape) < 0.7
    at = case(batch=2, key_mask=keep, queries=3, keys=23)
    for dense_below in (0, 20):
        parameters = {**CAUSAL, "dense_below": dense_below, "masked_rows": "uniform"}
        at_rows = replace(at, masked_rows="uniform", fills=(-3.4e38,))
        assert relative(ran(at_rows, dynamic(at_rows), parameters), whole_keys(at, parameters)) < 1e-6


@pytest.mark.parametrize("dense_below", [0, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
def test_sinks(dense_below: int, heads: int, kv_heads: int, case: Any) -> None:
    sinks = np.random.default_rng(7).standard_normal(heads).astype(np.float32)
    parameters = {**CAUSAL, "dense_below": dense_below}
    for past, new in PAIRS:
        at = case(heads=heads, kv_heads=kv_heads, sinks=sinks, **lengths(past, new))
        assert relative(ran(at, dynamic(at), parameters), whole_keys(at, parameters)) < 1e-6
        keep = np.random.default_rng(past).random((1, 1, 1, past + new)) < 0.5
        at = replace(at, key_mask=keep)
        want = whole_keys(at, parameters)
        got = ran(at, dynamic(at), parameters)
        assert np.abs(got - want).max() < 1e-5
        assert np.abs(ran(at, replace(dynamic(at), query_length=new), parameters) - want).max() < 1e-5


@pytest.mark.parametrize("softmax", ["float16", "float32"])
def test_half(softmax: str, case: Any) -> None:
    for past, new in PAIRS:
        at = case(heads=6, kv_heads=2, dtype="float16", softmax_dtype=softmax, **lengths(past, new))
        for dense_below in (0, 20):
            parameters = {**CAUSAL, "dense_below": dense_below}
            assert relative(ran(at, dynamic(at), parameters).astype(np.float64), whole_keys(at, parameters)) < 2e-3


def test_nothing_else_is_read(case: Any) -> None:
    """Keys and values before the window are NaN: any product with them would be seen. Few queries read what lies just
    before it too, hidden as in the source, where that costs less than a copy of the others.
    """
    checked = 0
    for past, new in PAIRS:
        if past <= LEFT:
            continue
        keep = np.ones((1, 1, 1, past + new), bool)
        hides = new * (new + LEFT) <= 20**2 and 2 * (past + new) <= 5 * (new + LEFT)
        for dense_below in (0,) if hides else (0, 20):
            checked += dense_below > 0
            at = case(heads=6, kv_heads=2, **lengths(past, new))
            feeds = at.feeds()
            for name in "kv":
                feeds[name][:, :, : past - LEFT] = np.nan
            for padding in (False, True):
                one = replace(at, key_mask=keep, masked_rows="uniform", fills=(-3.4e38,)) if padding else at
                rows = {"masked_rows": "uniform"} if padding and dense_below else {}
                given = {**CAUSAL, "dense_below": dense_below, **rows}
                fed = {**feeds, "key_mask": keep} if padding else feeds
                got = ran(one, dynamic(one), given, fed)
                assert relative(got, whole_keys(at, CAUSAL)) < 1e-6
            feeds["k"][:, :, past - LEFT] = np.nan  # the first key that the first query sees
            assert np.isnan(ran(at, dynamic(at), {**CAUSAL, "dense_below": dense_below}, feeds)[:, 0]).all()
    assert checked >= 6


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_cut_that_is_off_by_one_is_seen(wrong: int, case: Any, monkeypatch: Any) -> None:
    """The keys that are left and where they start have to agree with the window's own mask."""
    honest = cached._bounded

    def shifted(body: Any, given: Any) -> Any:
        left = given.hood.left[0] + wrong
        made = honest(body, replace(given, hood=replace(given.hood, left=(left,), kernel_size=(left + 1,))))
        return replace(made, hood=given.hood)

    monkeypatch.setattr(cached, "_bounded", shifted)
    for past, new in ((61, 1), (61, 9), (203, 16)):
        at = case(**lengths(past, new))
        given = {**CAUSAL, "dense_below": 20}
        error = relative(ran(at, dynamic(at), given), whole_keys(at, given))
        if wrong < 0 or new == 1:
            assert error > 1e-3  # a key is missing, or a single step, which looks at no mask, sees one too many
        else:
            assert error < 1e-6  # the window hides it


@pytest.mark.parametrize("left", [LEFT - 1, LEFT + 1])
def test_another_window_is_seen(left: int, case: Any) -> None:
    for past, new in ((61, 1), (61, 9), (203, 41)):
        at = case(**lengths(past, new))
        other = {**CAUSAL, "kernel_size": [left + 1]}
        assert relative(ran(at, dynamic(at), other), whole_keys(at, CAUSAL)) > 1e-3


def site_of(at: Any, *, left: int = LEFT, right: int = 0, general: bool = True, **changes: Any) -> AttentionSite:
    part = MaskPart("window", Certificate("evaluated", "given by the test", general=general), left, right)
    made = dynamic(at)
    return replace(made, mask=MaskFacts((part, *made.mask.parts)), cache=Cache("concat", "pk", "pv"), **changes)


def only(site: AttentionSite) -> Candidate | Verdict:
    (found,) = SUBJECT.exact_candidates(site)
    return found


def test_a_window_over_a_cache_is_taken_exactly(case: Any) -> None:
    at = case(queries=1, keys=62)
    found = only(site_of(at))
    assert isinstance(found, Candidate) and found.exact
    assert SUBJECT.is_exact_for(site_of(at), found.parameters).ok
    for past, new in PAIRS:
        one = case(**lengths(past, new))
        for parameters in (found.parameters, SUBJECT.without_branches(found.parameters)):
            assert relative(ran(one, site_of(one), parameters), whole_keys(one, CAUSAL)) < 1e-6
    bodies = SUBJECT.lower(site_of(at), SUBJECT.without_branches(found.parameters), 18).functions
    assert not any(n.op_type == "If" for f in bodies for n in f.node)


def test_what_is_kept_and_why(case: Any) -> None:
    at = case(queries=1, keys=62)
    uncertain = only(site_of(at, general=False))
    assert isinstance(uncertain, Verdict) and uncertain.code == "certificate"
    unlimited = only(site_of(at, left=-1))
    assert isinstance(unlimited, Verdict) and unlimited.code == "nothing-to-skip"
    plain = only(replace(site_of(at), mask=MaskFacts()))
    assert isinstance(plain, Verdict) and plain.code == "nothing-to-skip"
    opaque = MaskFacts((MaskPart("opaque", Certificate("structure", "from input cache_position")),))
    written = only(replace(site_of(at), mask=opaque, cache=Cache("scatter", "pk", "pv")))
    assert isinstance(written, Verdict) and written.code == "cache" and "positions" in written.reason
    joined = only(replace(site_of(at), mask=opaque))
    assert isinstance(joined, Verdict) and joined.code == "mask"
    inside = replace(site_of(at), cache=Cache("operator", "pk", "pv"))
    assert "cache" in inside.needs and "cache" not in SUBJECT.understands


def test_a_cache_of_fixed_length_is_no_longer_too_wide(case: Any) -> None:
    """One query over many keys: its cost is its window, without a block around it."""
    at = case(static=True, queries=1, keys=8193, heads=8, kv_heads=8, head_dim=64, value_dim=64)
    part = MaskPart("window", Certificate("constant", "given by the test"), 511, 0)
    site = replace(at.site(), mask=MaskFacts((part,)))
    found = only(site)
    assert isinstance(found, Candidate) and found.parameters["kernel_size"] == [512]
    parameters = {"kernel_size": [512], "causal": [1], "block": 64}
    assert SUBJECT.cost(site, parameters, Shape(1, 1, 8193)).keys == 512
    dynamic_ = replace(site, query_length="n", key_length="n + p")
    cost = SUBJECT.cost(dynamic_, {**parameters, "dense_below": 640}, Shape(1, 1, 8193))
    assert cost.keys == 512 and cost.elements == 8 * 512


def test_no_other_opset_is_needed(case: Any) -> None:
    at = case(queries=5, keys=66, opset=21)
    model = replace(at).model(SUBJECT, {**CAUSAL, "dense_below": 20})
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, at.feeds())[0].shape == (1, 4, 5, 6)
