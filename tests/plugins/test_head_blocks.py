"""Heads with blocks of their own choice: lists and body against the definition, and the sites that may have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, bitmap
from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import HeadMechanism, Shape
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism
from attncompile.plugins.block_sparse import head_body, head_lists, per_head
from attncompile.plugins.block_sparse.op import lists
from attncompile.plugins.block_sparse.reference import counts_of, reference
from attncompile.search.candidates import candidates
from tests.plugins.conftest import relative_error

SUBJECT = mechanism("BlockSparseAttention")
ONCE = Certificate("constant", "given by the test")


def random_seen(seed: int, heads: int, geometry: BlockGeometry) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seen = rng.random((heads, geometry.count, geometry.count)) < rng.random((heads, 1, 1))
    seen[:, range(geometry.count), range(geometry.count)] = True
    return seen & geometry.all


def pairs(seen: np.ndarray, geometry: BlockGeometry) -> np.ndarray:
    """Bool [H, N, N]: the definition, pair by pair."""
    token = np.arange(geometry.tokens)
    block = token // geometry.edge
    visible = seen[:, block[:, None], block[None, :]]
    return visible & (token[None, :] <= token[:, None]) if geometry.causal else visible


@pytest.mark.parametrize("edge", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [130, 256, 333])
def test_lists_say_what_the_blocks_say(tokens, causal, edge) -> None:
    geometry = BlockGeometry(tokens, edge, causal)
    seen = random_seen(tokens, 3, geometry)
    seen[2] = geometry.all
    want = pairs(seen, geometry)
    said = head_lists.lists_of(seen, geometry)
    got = counts_of((tokens, tokens), edge, **said.arrays())[0]
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
    assert all(x.dtype == np.int32 for x in said.arrays().values())
    usual = lists(want[: len(got)], edge)  # the general maker of lists agrees on rows and columns
    np.testing.assert_array_equal(said.rows, usual.rows)
    np.testing.assert_array_equal(said.order, usual.order)
    assert head_lists.lists_of(seen[[0, 0]], geometry).rows.shape[1] == 1


CASES: list[tuple[int, bool, int, int, tuple[str, str, str, str], list[str]]] = [
    (200, True, 4, 2, ("BNHD",) * 4, ["dense", "sinks 1 window 0", "columns 1", "diagonals 2"]),
    (200, False, 4, 4, ("BHND",) * 4, ["dense", "sinks 1 window 0", "mean", "columns 3 diagonals 1"]),
    (192, False, 4, 1, ("BNHD", "BHND", "BNHD", "BHND"), ["dense", "dense", "mean", "sinks 0 window 1"]),
    (129, True, 2, 1, ("BHND", "BNHD", "BHND", "BNHD"), ["sinks 1 window 0", "sinks 0 window 0"]),
    (300, False, 2, 2, ("BNHD",) * 4, ["dense", "dense"]),
    (300, False, 2, 2, ("BNHD",) * 4, ["mean", "mean"]),
    (200, True, 4, 2, ("BNHD", "BHND", "BNHD", "BHND"), ["skip", "sinks 1 window 0", "dense", "skip"]),
    (192, False, 4, 1, ("BNHD",) * 4, ["dense", "skip", "skip", "sinks 0 window 1"]),
    (129, True, 2, 1, ("BHND",) * 4, ["skip", "skip"]),
]


# A mean over keys has no meaning where some are hidden: of padded sites it is not offered.
BODIES = [(c, False) for c in CASES] + [(c, True) for c in CASES if "mean" not in c[5]]


@pytest.mark.parametrize(("case_", "padded"), BODIES, ids=range(len(BODIES)))
def test_the_body_is_the_definition(case_, padded, case, tolerance, monkeypatch) -> None:
    tokens, causal, heads, kv_heads, layouts, texts = case_
    monkeypatch.setattr(head_body, "WHOLE_ROWS", 128)
    key_mask = None
    if padded:
        key_mask = np.ones((2, 1, 1, tokens), bool)
        key_mask[0, ..., :70] = False  # a block and more: queries there see nothing
        key_mask[1, ..., 150:] = False
    at = case(batch=2, queries=tokens, static=True, heads=heads, kv_heads=kv_heads, layouts=layouts, causal=causal,
              key_mask=key_mask)  # fmt: skip
    geometry = BlockGeometry(tokens, 64, causal)
    patterns = [BlockPattern(t) for t in texts]
    parameters = SUBJECT.head_parameters(geometry, patterns)
    assert SUBJECT.supports(at.site(), parameters).ok
    got = at.run(SUBJECT, parameters)
    visible = pairs(np.stack([p.blocks(geometry) for p in patterns]), geometry)
    want = reference(**at.tensors(), visible=visible, masked_rows=parameters["masked_rows"], scale=at.scale,
                     key_mask=key_mask)  # fmt: skip
    assert got.shape == want.shape
    assert relative_error(got, want) < tolerance["float32"] if want.any() else not got.any()
    model = at.model(SUBJECT, parameters)
    (made,) = [n for n in model.graph.node if n.op_type == "BlockSparseAttention"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    arrays = {name: stored[made.input[3 + i]] for i, name in enumerate(("rows", "columns", "kinds", "masks"))}
    np.testing.assert_array_equal(counts_of((tokens, tokens), 64, **arrays)[0], np.broadcast_to(
        visible, (heads, tokens, tokens))[: arrays["rows"].shape[1]])  # fmt: skip
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}


def test_half(case, tolerance) -> None:
    at = case(queries=200, static=True, causal=True, dtype="float16", softmax_dtype="float32", head_dim=16)
    geometry = BlockGeometry(200, 64, True)
    patterns = [BlockPattern(t) for t in ("dense", "sinks 1 window 0", "sinks 0 window 1", "columns 2")]
    parameters = SUBJECT.head_parameters(geometry, patterns)
    visible = pairs(np.stack([p.blocks(geometry) for p in patterns]), geometry)
    want = reference(**at.tensors(), visible=visible, scale=at.scale)
    assert relative_error(at.run(SUBJECT, parameters).astype(np.float64), want) < tolerance["float16"]


def test_many_random_blocks(case, tolerance) -> None:
    """Rows of many lengths, done in few groups."""
    geometry = BlockGeometry(64 * 9 - 31, 64, True)
    seen = random_seen(5, 4, geometry)
    at = case(queries=geometry.tokens, static=True, causal=True, layouts=("BNHD",) * 4)
    parameters = SUBJECT.head_parameters(geometry, [bitmap(s) for s in seen])
    want = reference(**at.tensors(), visible=pairs(seen, geometry), scale=at.scale)
    assert relative_error(at.run(SUBJECT, parameters), want) < tolerance["float32"]
    made = head_lists.plan_of(seen, geometry)
    assert sorted(made.slots) == list(range(4 * 9)) and len(made.groups) < 10
    cost = SUBJECT.cost(at.site(), parameters, Shape(3, geometry.tokens, geometry.tokens))
    assert cost.elements == pytest.approx(3 * made.blocks * 64**2 * per_head.OVERHEAD) and made.blocks >= seen.sum()


@pytest.mark.parametrize("wrong", ["kinds", "columns", "diagonal"])
def test_a_planted_bug_is_seen(wrong, case, monkeypatch) -> None:
    geometry = BlockGeometry(200, 64, True)
    patterns = [BlockPattern(t) for t in ("dense", "sinks 1 window 0", "sinks 0 window 1", "columns 2")]
    at = case(queries=200, static=True, causal=True)
    parameters = SUBJECT.head_parameters(geometry, patterns)
    visible = pairs(np.stack([p.blocks(geometry) for p in patterns]), geometry)
    want = reference(**at.tensors(), visible=visible, scale=at.scale)
    right = head_lists.plan_of

    def planted(seen: np.ndarray, of: BlockGeometry, *more: Any) -> Any:
        made = right(seen, of, *more)
        groups = list(made.groups)
        columns = groups[-1].columns.copy()
        if wrong == "columns":
            columns[0, -1] = (columns[0, -1] + 1) % of.count
        elif wrong == "diagonal":
            columns = columns[:, ::-1].copy()
        groups[-1] = replace(groups[-1], columns=columns)
        slots = np.roll(made.slots, 1) if wrong == "kinds" else made.slots
        return replace(made, groups=tuple(groups), slots=slots)

    right_error = relative_error(at.run(SUBJECT, parameters), want)
    per_head._plan.cache_clear()
    monkeypatch.setattr(per_head, "plan_of", planted)
    try:
        assert relative_error(at.run(SUBJECT, parameters), want) > 1e-3 > 100 * right_error
    finally:
        per_head._plan.cache_clear()  # no other test meets what was planted


def test_which_sites_have_a_choice(case) -> None:
    assert isinstance(SUBJECT, HeadMechanism)
    at = case(queries=200, static=True)
    found = SUBJECT.head_geometry(at.site())
    assert found == BlockGeometry(200, 64, False)
    long = SUBJECT.head_geometry(case(queries=5000, static=True, causal=True).site())
    assert long == BlockGeometry(5000, 128, True)
    opaque = MaskFacts((MaskPart("opaque", ONCE, source="x"),))
    bias = MaskFacts((MaskPart("bias", ONCE, source="b", additive=True),))
    for changes, code in (
        ({"query_length": "N", "key_length": "N"}, "lengths"), ({"key_length": 100}, "lengths"),
        ({"mask": opaque}, "mask"), ({"mask": bias}, "mask"), ({"softcap": 3.0}, "softcap"),
        ({"sinks": "s"}, "needs"), ({"query_length": 60, "key_length": 60}, "size"),
    ):  # fmt: skip
        refused = SUBJECT.head_geometry(at.site(**changes))
        assert isinstance(refused, Verdict) and (refused.ok, refused.code) == (False, code), changes


def test_parameters_that_are_refused(case) -> None:
    site = case(queries=200, static=True).site()
    masked = case(queries=200, static=True, key_mask=np.ones((1, 1, 1, 200), bool)).site()
    good = {"masked_rows": "zero", "edge": 64, "heads": ["dense"] * 4}
    assert SUBJECT.supports(site, good).ok and not SUBJECT.is_exact_for(site, good).ok
    for at, changes in (
        (site, {"heads": ["dense"] * 3}), (site, {"edge": 48}), (site, {"edge": "64"}), (site, {"heads": "dense"}),
        (site, {"heads": ["none"] * 4}), (site, {"heads": ["mean", "skip", "mean", "mean"], "masked_rows": "uniform"}),
        (site, {"heads": ["mean", "skip", "dense", "dense"]}),
        (masked, {"heads": ["mean"] * 4, "masked_rows": "uniform"}),
        (site, {"masked_rows": "uniform"}), (site, {"masked_rows": "nan"}), (site, {"masked_rows": 0}),
        (site, {"heads": ["mean", *["dense"] * 3]}), (site, {"edges": 128}), (site, {"mask": "0123456789abcdef"}),
    ):  # fmt: skip
        assert not SUBJECT.supports(at, {**good, **changes}).ok, changes
    # What a query without a key gets follows from the heads: a line that says otherwise is refused, one less is fine.
    for heads, rule in ((["dense"] * 4, "uniform"), (["skip", *["dense"] * 3], "uniform"), (["mean"] * 4, "zero")):
        verdict = SUBJECT.supports(site, {"heads": heads, "masked_rows": rule})
        assert (verdict.ok, verdict.hint) == (False, "delete that line") and "masked_rows" in verdict.reason
        assert SUBJECT.supports(site, {"heads": heads}).ok and SUBJECT.lower(site, {"heads": heads}, 18).nodes
    for heads in (["dense"] * 4, ["skip", *["dense"] * 3]):
        with pytest.raises(Unsupported, match="masked_rows"):
            SUBJECT.lower(site, {**good, "heads": heads, "masked_rows": "uniform"}, 18)
    with pytest.raises(Unsupported, match="masked_rows"):
        SUBJECT.lower(site, {**good, "heads": ["mean", *["dense"] * 3]}, 18)


def test_what_a_plan_leaves_out_follows_from_its_heads(case) -> None:
    """Queries of a head that is a mean average all values, whether the plan says so or not."""
    at = case(queries=200, static=True)
    for heads, rule in ((["mean", "dense", "sinks 0 window 1", "mean"], "uniform"), (["skip", *["dense"] * 3], "zero")):
        said, silent = ({"edge": 64, "heads": heads, **more} for more in ({"masked_rows": rule}, {}))
        assert SUBJECT.supports(at.site(), silent).ok
        np.testing.assert_array_equal(at.run(SUBJECT, silent), at.run(SUBJECT, said))


def test_radial_heads_on_a_video(case) -> None:
    """Candidates of a site whose tokens are frames, and lists of what radial attention touches."""
    grid = TokenGrid((6, 16, 16))
    site = case(queries=grid.tokens, static=True).site(grid=grid)
    geometry = SUBJECT.head_geometry(site)
    assert isinstance(geometry, BlockGeometry) and geometry.grid == grid and geometry.count == 24
    offered = [p.text for p in candidates(np.full((24, 24), 1 / 24), geometry, False)]
    assert {"radial", "radial 0.5", "radial 0.25"} <= set(offered)
    given = {"masked_rows": "zero", "edge": 64, "heads": ["radial", "radial 0.25", "dense", "sinks 1 window 1"]}
    assert SUBJECT.supports(site, given).ok
    _, seen = per_head.seen_of(site, given)
    frame = np.arange(24) // 4  # four blocks a frame
    apart = np.abs(frame[:, None] - frame[None, :])
    assert seen[0][apart <= 1].all() and seen[0][:, :4].all(), "neighbours in time, and the first frame"
    assert not seen[0][apart == 4].all() and seen[1].sum() < seen[0].sum() < 24**2
    refused = SUBJECT.supports(case(queries=grid.tokens, static=True).site(), given)
    assert not refused.ok and refused.code == "grid"
