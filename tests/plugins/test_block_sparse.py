"""BlockSparseAttention: its lists, its plans, its body at sizes that make many groups, and the sites that it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, Shape
from attncompile.core.pattern import BlockSparse
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism
from attncompile.plugins.block_sparse import plan as planning
from attncompile.plugins.block_sparse.op import lists
from attncompile.plugins.block_sparse.reference import counts_of, reference

SUBJECT = mechanism("BlockSparseAttention")
ONCE = Certificate("constant", "given by the test")


def random_mask(seed: int, queries: int, keys: int, empty: bool = False) -> np.ndarray:
    """A band, some dense rows and columns, rectangles and noise; with ``empty`` some rows that see nothing."""
    rng = np.random.default_rng(seed)
    i, j = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None, :]
    out = (i - j >= 0) & (i - j < rng.integers(1, 12))
    out |= rng.random((queries, keys)) < 0.01
    out[rng.integers(queries, size=2)] = True
    out[:, rng.integers(keys, size=2)] |= rng.random((queries, 1)) < 0.5
    for _ in range(3):
        y, x = rng.integers(queries), rng.integers(keys)
        out[y : y + 13, x : x + 21] = True
    out[np.arange(queries), (np.arange(queries) + keys - queries) % keys] = True
    if empty:
        out[rng.integers(queries, size=5)] = False
        out[queries // 2 : queries // 2 + 9] = False
    return out


def windows(height: int, width: int, size: int, shift: int) -> np.ndarray:
    """Swin's windows as a mask over tokens in raster order."""
    y, x = np.divmod(np.arange(height * width), width)
    window = (y + shift) // size * 1000 + (x + shift) // size
    return window[:, None] == window[None, :]


@pytest.fixture(params=[4, 32])
def piece(request, monkeypatch) -> int:
    """Small pieces and free groups, so that small masks make many of them; and the real sizes."""
    if request.param == 4:
        monkeypatch.setattr(planning, "_PIECE", 4)
        monkeypatch.setattr(planning, "LAUNCH", 0.0)
        monkeypatch.setattr(planning, "COPY", 1.0)
    from attncompile.plugins.block_sparse import mechanism as module

    module._made.cache_clear()
    yield request.param
    module._made.cache_clear()


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (37, 37), (64, 130), (75, 61), (128, 128)])
def test_the_lists_say_what_the_mask_says(queries, keys, block) -> None:
    rng = np.random.default_rng(queries)
    masks = [random_mask(1, queries, keys) if min(queries, keys) > 1 else np.ones((queries, keys), bool)]
    masks += [rng.random((queries, keys)) < 0.5, np.ones((queries, keys), bool), np.zeros((queries, keys), bool)]
    for mask in masks:
        said = lists(mask, block)
        np.testing.assert_array_equal(counts_of((queries, keys), block, **said.arrays())[0, 0], mask)
        assert said.rows.shape == (1, 1, -(-queries // block), 3) and all(x.size for x in said.arrays().values())
        assert all(x.dtype == np.int32 for x in said.arrays().values())
    rows = lists(np.ones((queries, keys), bool), block).rows
    # Full wherever all keys of the block exist: no query that is there needs a mask.
    assert (rows[..., 2] - rows[..., 1] == keys // block).all() and (rows[..., 1] - rows[..., 0] <= 1).all()


def test_the_longest_rows_come_first() -> None:
    mask = np.tril(np.ones((300, 300), bool))
    assert lists(mask, 64).order.tolist() == [4, 3, 2, 1, 0]
    heads = np.stack([mask & (np.arange(300) > 200), mask])
    assert lists(heads, 64).order.tolist() == [9, 8, 7, 6, 5, 4, 3, 0, 1, 2]
    assert sorted(lists(random_mask(0, 300, 200), 64).order.tolist()) == [0, 1, 2, 3, 4]


def test_the_edge_of_blocks_is_chosen_by_the_mask() -> None:
    """Large blocks where they hold little more than small ones."""
    i = np.arange(1024)
    assert lists(np.tril(np.ones((1024, 1024), bool))).block == 128
    assert lists((i[:, None] // 64) == (i // 64)).block == 64


def plan_is(mask: np.ndarray, made: planning.Plan) -> None:
    """The plan's tables let through exactly ``mask``, and no key twice."""
    rows = np.concatenate([t.query_index.reshape(-1) for t in made.groups])
    np.testing.assert_array_equal(rows[made.slots], np.arange(len(mask)))
    seen = []
    for tiles in made.groups:
        for keys, kind in zip(tiles.key_index, tiles.kind, strict=True):
            for row in tiles.masks[kind]:
                count = np.bincount(keys, weights=row.astype(float), minlength=mask.shape[1])
                seen.append(count)
    np.testing.assert_array_equal(np.array(seen)[made.slots], mask.astype(float))


@pytest.mark.parametrize("seed", range(6))
def test_plans_are_the_mask(seed, piece) -> None:
    queries, keys = (int(n) for n in np.random.default_rng(seed).integers(40, 200, size=2))
    mask = random_mask(seed, queries, keys, empty=seed % 2 == 1)
    made = planning.plan(mask, 4)
    plan_is(mask, made)
    assert made.elements == sum(t.key_index.shape[1] * t.query_index.size for t in made.groups)
    assert len(made.groups) <= planning.MAX_GROUPS


def test_plans_find_the_order_in_which_masks_are_dense() -> None:
    """Equal rows, remainders and boxes of a grid: what is met is little more than what is seen."""
    i = np.arange(1024)
    dilated = ((i[:, None] - i) % 8 == 0) & (abs(i[:, None] - i) < 512)
    y, x = np.divmod(np.arange(32 * 32), 32)
    wrapped = [np.minimum(abs(p[:, None] - p), 32 - abs(p[:, None] - p)) <= 3 for p in (y, x)]
    cases = [(windows(28, 28, 7, 3), (), 1.1), (dilated, (), 1.5), (wrapped[0] & wrapped[1], (TokenGrid((32, 32)),), 4)]
    for mask, grids, bound in cases:
        made = planning.plan(mask, 8, grids)
        plan_is(mask, made)
        assert made.elements <= bound * mask.sum()


def test_a_mask_without_structure_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(planning, "LARGEST_TABLE", 1000)
    with pytest.raises(Unsupported, match="its tiles would take"):
        planning.plan(random_mask(0, 100, 100), 4)
    monkeypatch.setattr(planning, "LARGEST_PLAN", 1000)
    with pytest.raises(Unsupported, match="still be computed"):
        planning.plan(random_mask(0, 100, 100), 4)


@pytest.mark.parametrize("layouts", [("BHND",) * 4, ("BNHD",) * 4], ids="-".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(131, 131), (90, 131)])
def test_bodies(queries, keys, heads, kv_heads, layouts, piece, case, error, tolerance) -> None:
    for seed in range(2):
        at = case(batch=2, queries=queries, keys=keys, heads=heads, kv_heads=kv_heads, layouts=layouts, static=True,
                  visible=random_mask(seed, queries, keys))  # fmt: skip
        assert error(at, SUBJECT, {}) < tolerance["float32"]


@pytest.mark.parametrize("shape", [(1, 1, 75, 75), (1, 4, 75, 75), (2, 4, 75, 75), (4, 75, 75), (75, 75), (4, 1, 75)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_biases(shape, kv_heads, piece, case, error, tolerance) -> None:
    bias = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    at = case(batch=2, queries=75, kv_heads=kv_heads, static=True, visible=random_mask(2, 75, 75), bias=bias)
    assert error(at, SUBJECT, {}) < tolerance["float32"]
    assert np.abs(at.expected(SUBJECT, {}) - replace(at, bias=None).expected(SUBJECT, {})).max() > 0.1


@pytest.mark.parametrize("rows", ["zero", "uniform", "nan"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_without_a_key(rows, padded, biased, piece, case, error, tolerance) -> None:
    rng = np.random.default_rng(4)
    key_mask = rng.random((2, 1, 1, 75)) < 0.6 if padded else None
    bias = rng.standard_normal((1, 4, 75, 75)).astype(np.float32) if biased else None
    at = case(batch=2, queries=75, static=True, visible=random_mask(3, 75, 75, empty=True), key_mask=key_mask,
              bias=bias, masked_rows=rows, fills=(-3e38,))  # fmt: skip
    given = {"masked_rows": rows}
    want = at.expected(SUBJECT, given)
    assert np.isnan(want).any() == (rows == "nan")
    assert error(at, SUBJECT, given) < tolerance["float32"]


def test_half(piece, case, error, tolerance) -> None:
    for softmax in ("float16", "float32"):
        at = case(queries=75, static=True, visible=random_mask(3, 75, 75), dtype="float16", softmax_dtype=softmax,
                  bias=np.random.default_rng(0).standard_normal((4, 75, 75)).astype(np.float32))  # fmt: skip
        assert error(at, SUBJECT, {}) < tolerance["float16"]


def test_one_flipped_bit_is_noticed(piece, case) -> None:
    mask = random_mask(5, 90, 90)
    at = case(queries=90, static=True, visible=mask)
    want = at.expected(SUBJECT, {})
    rng = np.random.default_rng(0)
    for y, x in zip(rng.integers(90, size=4), rng.integers(90, size=4), strict=True):
        wrong = mask.copy()
        wrong[y, x] ^= True
        got = replace(at, visible=wrong).run(SUBJECT, {})
        assert np.linalg.norm(got[:, y] - want[:, y]) / np.linalg.norm(want[:, y]) > 1e-3
        np.testing.assert_allclose(np.delete(got, y, 1), np.delete(want, y, 1), atol=1e-5)


def test_every_index_of_the_body_matters(piece, case) -> None:
    """Change one integer table of the body by one in one place that is seen: the result must differ or fail."""
    at = case(queries=90, static=True, visible=random_mask(6, 90, 90), value_dim=8)
    model, want = at.model(SUBJECT, {}), at.expected(SUBJECT, {})
    seeded = 0
    for node in model.functions[0].node:
        if node.op_type != "Constant":
            continue
        table = onnx.numpy_helper.to_array(node.attribute[0].t)
        if table.dtype != np.int64 or table.size < 9:
            continue  # sizes of reshapes
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        twin = next(n for n in broken.functions[0].node if n.name == node.name)
        wrong = table.copy()
        wrong[..., 0] = (wrong[..., 0] + 1) % 90
        twin.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(wrong))
        session = ort.InferenceSession(broken.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, at.feeds())[0].transpose(0, 2, 1, 3)
        assert not np.allclose(got, want, rtol=1e-3, atol=1e-3), node.name
        seeded += 1
    assert seeded >= (4 if piece == 4 else 1)


def said_by(model: onnx.ModelProto) -> tuple[int, dict[str, np.ndarray]]:
    """Edge of the blocks and lists of the model's one node."""
    (node,) = model.graph.node
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    formal = onnx.defs.get_schema(node.op_type, 1, node.domain).inputs
    given = {formal[i].name: stored[name] for i, name in enumerate(node.input) if name in stored}
    return next(a.i for a in node.attribute if a.name == "block"), given


def test_the_inputs_of_the_node_say_what_the_body_does(piece, case) -> None:
    mask = random_mask(7, 90, 101)
    at = case(queries=90, keys=101, static=True, visible=mask)
    block, said = said_by(at.model(SUBJECT, {}))
    seen = counts_of((90, 101), block, **said)
    np.testing.assert_array_equal(seen, mask[None, None])
    want = reference(**at.tensors(), visible=seen, scale=at.scale)
    np.testing.assert_allclose(at.run(SUBJECT, {}), want, atol=1e-5)


def test_bodies_inline_to_standard_ops(piece, case) -> None:
    at = case(queries=90, static=True, visible=random_mask(8, 90, 90), bias=np.zeros((90, 90), np.float32))
    inlined = onnx.inliner.inline_local_functions(at.model(SUBJECT, {}))
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}


def facts(mask: np.ndarray, *more: MaskPart, rows: str = "nan", fills: tuple[float, ...] = ()) -> MaskFacts:
    return MaskFacts((MaskPart("block_sparse", ONCE, pattern=BlockSparse.of(mask, 16)), *more), rows, fills)


def documents(length: int, count: int) -> np.ndarray:
    i = np.arange(length) * count // length
    return i[:, None] == i[None, :]


def only(found: Any) -> Candidate | Verdict:
    assert len(found) == 1
    return found[0]


def test_a_stored_mask_is_taken_and_is_exact(case, error, tolerance) -> None:
    at = case(queries=1000, static=True)
    site = at.site(mask=facts(documents(1000, 7)))
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Candidate) and found.exact and "14.3%" in found.reason
    assert SUBJECT.supports(site, found.parameters).ok and SUBJECT.is_exact_for(site, found.parameters).ok
    assert SUBJECT.lower(site, found.parameters, 18).functions
    cost = SUBJECT.cost(site, found.parameters, Shape(2, 1000, 1000))
    assert 143 <= cost.keys < 150 and cost.elements == 2 * 4 * cost.keys * 1000
    other = at.site(mask=facts(documents(1000, 8)))
    assert not SUBJECT.supports(other, found.parameters).ok
    assert SUBJECT.is_exact_for(other, found.parameters).code == "other-mask"


def test_all_structures_are_intersected(case) -> None:
    at = case(queries=1000, static=True)
    causal = MaskPart("causal", ONCE, -1, 0)
    found = only(SUBJECT.exact_candidates(at.site(mask=facts(documents(1000, 3), causal))))
    want = only(SUBJECT.exact_candidates(at.site(mask=facts(np.tril(documents(1000, 3))))))
    assert isinstance(found, Candidate) and isinstance(want, Candidate)
    assert found.parameters == want.parameters


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"mask": MaskFacts()}, "nothing-to-skip"),
        ({"mask": MaskFacts((MaskPart("window", ONCE, 7, 0),))}, "nothing-to-skip"),
        ({"mask": facts(np.ones((1000, 1000), bool))}, "too-dense"),
        ({"mask": facts(np.random.default_rng(0).random((1000, 1000)) < 0.5)}, "too-dense"),
        ({"mask": facts(documents(1000, 7), MaskPart("opaque", ONCE, source="x"))}, "mask"),
        ({"mask": facts(documents(1000, 7), MaskPart("padding", ONCE, source="m", additive=True))}, "mask"),
        ({"mask": facts(documents(1000, 7), MaskPart("padding", ONCE, source="m"), rows="uniform")}, "masked-rows"),
        ({"mask": facts(documents(999, 7))}, "lengths"),
        ({"mask": facts(documents(1000, 7)), "query_length": "N", "key_length": "N"}, "lengths"),
        ({"mask": facts(documents(1000, 7)), "softcap": 50.0}, "softcap"),
        ({"mask": facts(documents(1000, 7)), "kind": "linear"}, "kind"),
        ({"mask": facts(documents(1000, 7)), "dtype": "int8"}, "dtype"),
        (
            {"mask": facts(documents(1000, 7), MaskPart("bias", Certificate("structure", ""), source="b"))},
            "bias",
        ),
    ],
)
def test_refusals(changes, code, case) -> None:
    site = case(queries=1000, static=True).site(**changes)
    found = only(SUBJECT.exact_candidates(site))
    assert isinstance(found, Verdict) and not found.ok
    assert (found.code, bool(found.reason)) == (code, True)
    if code not in ("too-dense", "masked-rows", "nothing-to-skip"):
        with pytest.raises(Unsupported):
            SUBJECT.lower(site, {}, 18)


def test_empty_rows_of_a_stored_mask_need_a_known_result(case) -> None:
    mask = documents(1000, 7)
    mask[5] = False
    at = case(queries=1000, static=True)
    for rows, fills, ok in (
        ("nan", (), True), ("zero", (), True), ("uniform", (-3e38,), True), ("uniform", (-1e4,), False),
        ("uniform", (-3e38, -3e38), False),
    ):  # fmt: skip
        found = only(SUBJECT.exact_candidates(at.site(mask=facts(mask, rows=rows, fills=fills))))
        assert isinstance(found, Candidate) == ok
        assert ok or found.code == "masked-rows"
    kept = at.site(mask=facts(mask, rows="zero"))
    assert SUBJECT.is_exact_for(kept, {"masked_rows": "nan"}).code == "masked-rows"


def test_equal_masks_share_a_function(case) -> None:
    at = case(queries=75, static=True)
    one, same, other = (
        SUBJECT.lower(at.site(mask=facts(m)), {}, 18).functions[0].overload
        for m in (documents(75, 4), documents(75, 4), documents(75, 5))
    )
    assert one == same != other
