"""Which sites NeighborhoodAttention takes, and why it refuses the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attncompile.core.errors import AttncompileError
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, Shape
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism, mechanisms
from attncompile.plugins.neighborhood import tiles
from attncompile.plugins.neighborhood.op import Neighborhood
from attncompile.plugins.neighborhood.reference import sees
from attncompile.plugins.neighborhood.tiles import tiling

GENERAL = Certificate("structure", "", general=True)
ONCE = Certificate("constant", "", ((4096, 4096),), general=False)
SUBJECT = mechanism("NeighborhoodAttention")


def mask(*parts: MaskPart, rows: str = "nan") -> MaskFacts:
    return MaskFacts(parts, rows)


def window(left: int, right: int, certificate: Certificate = GENERAL) -> MaskPart:
    return MaskPart("window", certificate, left, right)


def only(found) -> Candidate | Verdict:
    assert len(found) == 1
    return found[0]


def test_a_causal_window_of_dynamic_length(case) -> None:
    site = case().site(mask=mask(window(511, 0)))
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Candidate) and found.exact
    assert found.parameters["kernel_size"] == [512] and found.parameters["causal"] == [1]
    assert found.parameters["dense_below"] > 512
    assert SUBJECT.is_exact_for(site, found.parameters).ok


def test_window_and_causal_factors_are_intersected(case) -> None:
    site = case().site(mask=mask(window(63, 63), MaskPart("causal", GENERAL, -1, 0)))
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Candidate)
    assert (found.parameters["kernel_size"], found.parameters["causal"]) == ([64], [1])


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (mask(), "nothing-to-skip"),
        (mask(MaskPart("causal", GENERAL, -1, 0)), "nothing-to-skip"),
        (mask(MaskPart("padding", GENERAL, source="m")), "nothing-to-skip"),
        (mask(window(-1, 5)), "nothing-to-skip"),
        (mask(MaskPart("bias", GENERAL, source="b")), "nothing-to-skip"),
        (mask(window(7, 0), MaskPart("opaque", GENERAL, source="b")), "mask"),
        (mask(window(511, 0, ONCE)), "certificate"),
        (mask(window(511, 0), MaskPart("padding", GENERAL, source="m"), rows="uniform"), "masked-rows"),
    ],
)
def test_refusals(facts, code, case) -> None:
    found = only(SUBJECT.exact_candidates(case().site(mask=facts)))
    assert isinstance(found, Verdict) and not found.ok
    assert found.code == code and found.reason


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"kind": "linear"}, "kind"),
        ({"dtype": "int8"}, "dtype"),
        ({"query_length": 4096, "key_length": 1024}, "lengths"),
    ],
)
def test_sites_that_the_op_cannot_express(changes, code, case) -> None:
    site = case().site(mask=mask(window(511, 0)), **changes)
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Verdict) and found.code == code
    with pytest.raises(AttncompileError):
        SUBJECT.lower(site, {"kernel_size": [512], "causal": [1]}, 18)


def test_a_window_too_wide_for_its_length(case) -> None:
    at = case(queries=600, static=True)
    wide = only(SUBJECT.exact_candidates(at.site(mask=mask(window(511, 0)))))
    assert isinstance(wide, Verdict) and wide.code == "too-wide"
    narrow = only(SUBJECT.exact_candidates(at.site(mask=mask(window(63, 0)))))
    assert isinstance(narrow, Candidate) and narrow.parameters["dense_below"] == 0


def test_a_stored_mask_holds_for_its_own_length(case) -> None:
    site = case(queries=4096, static=True).site(mask=mask(window(511, 0, ONCE)))
    assert isinstance(only(SUBJECT.exact_candidates(site)), Candidate)


def test_other_parameters_are_not_exact(case) -> None:
    site = case().site(mask=mask(window(511, 0)))
    right = only(SUBJECT.exact_candidates(site)).parameters
    for wrong in ({"kernel_size": [511], "left": [510]}, {"prefix": 4}):
        assert not SUBJECT.is_exact_for(site, {**right, **wrong}).ok


def test_approximations_of_a_causal_site_keep_sinks(case) -> None:
    site = case(queries=4096, static=True, causal=True).site()
    found = SUBJECT.approximate_candidates(site)
    assert found and all(c.parameters["prefix"] == 4 and not c.exact for c in found)
    shape = Shape(1, 4096, 4096)
    costs = [SUBJECT.cost(site, c.parameters, shape).elements for c in found]
    assert costs == sorted(costs)
    for c in found:
        assert not SUBJECT.is_exact_for(site, c.parameters).ok
        SUBJECT.lower(site, c.parameters, 18)


def test_approximations_on_a_grid(case) -> None:
    site = case(queries=1025, static=True).site(grid=TokenGrid((32, 32), prefix=1))
    found = SUBJECT.approximate_candidates(site)
    on_grid = [c for c in found if len(c.parameters["kernel_size"]) == 2]
    assert all(c.parameters["prefix"] == 1 for c in on_grid)
    boxes = [c for c in on_grid if c.parameters["border"] == "clamp"]
    balls = [c for c in on_grid if c.parameters.get("shape") == "ball" and c.parameters["border"] == "truncate"]
    assert len(boxes) > 1 and len(balls) > 1 and len(boxes) + len(balls) == len(on_grid)
    for c in found:
        SUBJECT.lower(site, c.parameters, 18)


@pytest.mark.parametrize(
    "grid",
    [TokenGrid((9, 9)), TokenGrid((9, 14)), TokenGrid((13, 6), suffix=2), TokenGrid((5, 9, 14), prefix=3)],
    ids=str,
)
def test_a_ball_is_inside_of_its_box(grid, case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a ball is compared with before it is tried sees all that it does; without such a box it is all."""
    monkeypatch.setattr("attncompile.plugins.neighborhood.mechanism.MINIMUM_GAIN", 0.0)
    site = case(queries=grid.tokens, static=True).site(grid=grid)
    balls = [c for c in SUBJECT.approximate_candidates(site) if c.parameters.get("shape") == "ball"]
    assert len(balls) > 2 and sum(c.inside is None for c in balls) == (grid.shape == (9, 9))
    for c in balls:
        assert SUBJECT.supports(site, c.parameters).ok and not SUBJECT.is_exact_for(site, c.parameters).ok
        assert all(size % 2 for size in c.parameters["kernel_size"])
        if c.inside is None:
            assert all(size >= side for size, side in zip(c.parameters["kernel_size"], grid.shape, strict=True))
            continue
        assert SUBJECT.supports(site, c.inside).ok
        some = range(0, grid.tokens, 7)
        for i in some:
            for j in range(grid.tokens):
                assert sees(i, j, grid.tokens, c.inside) or not sees(i, j, grid.tokens, c.parameters), (i, j)


def test_nothing_approximate_for_cross_attention_or_bias(case) -> None:
    assert not SUBJECT.approximate_candidates(case(queries=64, keys=77, static=True).site())
    assert not SUBJECT.approximate_candidates(case().site(mask=mask(MaskPart("bias", GENERAL, source="b"))))


def test_cost_counts_touched_keys(case) -> None:
    site = case(batch=2, heads=3, kv_heads=3, head_dim=8, value_dim=4).site()
    parameters = {"kernel_size": [9], "causal": [1], "block": 16, "dense_below": 20}
    blocked = SUBJECT.cost(site, parameters, Shape(2, 40, 40))
    assert blocked.elements == 2 * 3 * 48 * (8 + 16)
    assert blocked.flops == 2 * blocked.elements * 12
    assert SUBJECT.cost(site, parameters, Shape(2, 20, 20)).elements == 2 * 3 * 400


@pytest.mark.parametrize(
    "parameters",
    [
        {"kernel_size": [3, 3], "grid": [9, 7], "border": "clamp", "dilation": [2, 1]},
        {"kernel_size": [4, 3], "grid": [9, 10], "border": "clamp", "stride": [2, 3]},
        {"kernel_size": [5, 5], "grid": [9, 7], "shape": "ball"},
        {"kernel_size": [7, 9], "grid": [9, 14], "shape": "ball"},
        {"kernel_size": [5, 7], "grid": [9, 14], "shape": "ball", "dilation": [2, 1], "stride": [1, 3]},
        {"kernel_size": [17, 17], "grid": [9, 14], "shape": "ball"},
        {"kernel_size": [3, 5, 1], "grid": [4, 9, 3], "shape": "ball"},
    ],
)
def test_tables_of_tiles_say_what_the_definition_says(parameters) -> None:
    """Every tile's keys and masks against the reference's predicate: each visible key exactly once."""
    plan = tiling(Neighborhood.of(parameters), 12)
    total = int(np.prod(parameters["grid"]))
    want = np.array([[sees(i, j, total, parameters) for j in range(total)] for i in range(total)], int)
    for query, slot in enumerate(plan.slots):
        tile, row = divmod(int(slot), plan.queries)
        assert plan.query_index[tile, row] == query
        got = np.zeros(total, int)
        np.add.at(got, plan.key_index[tile], plan.masks[plan.kind[tile], row])
        np.testing.assert_array_equal(got, want[query])


@pytest.mark.parametrize("planted", ["one key too few", "keys of another kind"])
def test_a_planted_bug_in_corners_is_seen(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiles._without_corners

    def wrong(key_index: np.ndarray, kind: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if planted == "one key too few":
            keys, kept = right(key_index, kind, masks)
            return keys[:, :-1], kept[:, :, :-1]
        return right(key_index, np.roll(kind, 1), masks)

    monkeypatch.setattr(tiles, "_without_corners", wrong)
    tiling.cache_clear()
    with pytest.raises(AssertionError):
        test_tables_of_tiles_say_what_the_definition_says({"kernel_size": [7, 9], "grid": [9, 14], "shape": "ball"})
    tiling.cache_clear()


@pytest.mark.parametrize(
    ("grid", "kernel", "share"), [([27, 38], [13, 13], 0.92), ([64, 64], [33, 33], 0.83), ([5, 9, 14], [5, 7, 9], 0.7)]
)
def test_tiles_of_a_ball_leave_the_corners_out(grid, kernel, share, case) -> None:
    """Work and keys against those of the box: as tables, and as the cost that candidates are ranked by. Some tile has
    no key that none of its queries sees, so that the tables are not wider than they must be.
    """
    both = [{"kernel_size": kernel, "grid": grid, "shape": shape} for shape in ("ball", "box")]
    ball, box = (tiling(Neighborhood.of(given), 64) for given in both)
    assert ball.tiles * ball.queries * ball.keys < share * box.tiles * box.queries * box.keys
    assert ball.key_index.shape[1] == ball.masks.shape[2] == ball.keys == ball.masks.any(axis=1).sum(axis=1).max()
    tokens = int(np.prod(grid))
    site = case(queries=tokens, static=True).site(grid=TokenGrid(tuple(grid)))
    ours, theirs = (SUBJECT.cost(site, given, Shape(1, tokens, tokens)).elements for given in both)
    assert ours < share * theirs


def test_registry() -> None:
    names = [m.name for m in mechanisms()]
    assert {"NeighborhoodAttention", "BlockSparseAttention", "DenseAttention", "Attention"} <= set(names)
    assert len(names) == len(set(names))
    with pytest.raises(AttncompileError, match="no mechanism"):
        mechanism("nothing")


def guarded(*parts, rows="uniform", fills=(), on=True):
    return MaskFacts(tuple(parts), rows, fills, on)


def test_dense_attention_says_where_it_wins(case) -> None:
    subject = mechanism("DenseAttention")
    causal = MaskPart("causal", GENERAL, -1, 0)
    padding = MaskPart("padding", GENERAL, source="m")

    def answer(facts, **changes):
        return only(subject.exact_candidates(case(queries=1024, static=True).site(mask=facts, **changes)))

    plain = {"left": -1, "right": -1, "softcap": 0.0, "masked_rows": "zero", "chunks": 1}
    assert answer(guarded(on=False)).parameters == answer(guarded()).parameters == plain
    assert answer(guarded(causal, on=False)).parameters == {**plain, "right": 0, "chunks": 8}
    # A finite mask over two factors, or a small one, gives fully masked rows something that depends on the scores.
    assert answer(guarded(padding, fills=(-3e38,))).parameters["masked_rows"] == "uniform"
    for fills in ((), (-3e38, -3e38), (-1e4,)):
        assert answer(guarded(padding, fills=fills)).code == "masked-rows"
    assert answer(guarded(padding, replace(padding, source="other"), rows="zero")).code == "mask"
    assert answer(guarded(replace(padding, additive=True), rows="zero")).code == "mask"
    # What may hold any number is added as it is: rows of -inf alone give what the source gives them.
    added = replace(padding, additive=True, as_input=True)
    assert answer(guarded(added)).parameters == plain
    assert answer(guarded(added, on=False)).parameters == {**plain, "masked_rows": "nan"}
    assert answer(guarded(added, padding, fills=(-3e38,))).code == "masked-rows"
    assert answer(guarded(causal, padding, rows="zero")).parameters["chunks"] == 8
    assert answer(guarded(causal, padding, fills=(-3e38,))).parameters["chunks"] == 8
    half = answer(guarded(), dtype="float16", softmax_dtype="float16")
    assert half.parameters == {**plain, "guard": True}
    assert "leaves nothing out" in answer(guarded(), form="attention-op").reason
    once = replace(causal, certificate=ONCE)
    assert only(subject.exact_candidates(case().site(mask=guarded(once)))).code == "certificate"


def test_attention_says_where_it_applies(case) -> None:
    subject = mechanism("Attention")
    causal = MaskPart("causal", GENERAL, -1, 0)
    padding = MaskPart("padding", GENERAL, source="m")
    assert isinstance(only(subject.exact_candidates(case().site())), Candidate)
    found = only(subject.exact_candidates(case().site(mask=mask(causal))))
    assert isinstance(found, Candidate) and found.parameters == {"causal": True}
    assert isinstance(only(subject.exact_candidates(case().site(mask=mask(padding, rows="zero")))), Candidate)
    for facts, code in (
        (mask(window(7, 0)), "window"),
        (mask(padding, rows="uniform"), "masked-rows"),
        (mask(causal, padding), "mask"),
        (mask(replace(causal, certificate=ONCE)), "certificate"),
    ):
        verdict = only(subject.exact_candidates(case().site(mask=facts)))
        assert isinstance(verdict, Verdict) and verdict.code == code
    assert only(subject.exact_candidates(case().site(form="attention-op"))).code == "already"
    lengths = case(queries=5, keys=7, static=True).site(mask=mask(causal))
    assert only(subject.exact_candidates(lengths)).code == "lengths"
    assert not subject.approximate_candidates(case().site())
