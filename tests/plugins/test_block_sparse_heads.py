"""BlockSparseAttention where each head has its own mask, and where keys count several times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attncompile.core.mask import MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism
from attncompile.plugins.block_sparse import plan as planning
from attncompile.plugins.block_sparse.op import lists
from attncompile.plugins.block_sparse.reference import counts_of, reference
from tests.plugins.conftest import ONCE, stored_mask
from tests.plugins.test_block_sparse import documents, random_mask, said_by

SUBJECT = mechanism("BlockSparseAttention")
LAYOUTS = [("BHND",) * 4, ("BNHD",) * 4, ("BNHD", "BHND", "BNHD", "BHND"), ("BHND", "BNHD", "BHND", "BNHD")]


def masks(seed: int, heads: int, queries: int, keys: int, *, times: int = 1, empty: bool = False) -> np.ndarray:
    """One a head, the first two alike; keys that count up to ``times`` times where that is above 1."""
    rng = np.random.default_rng(seed)
    out = np.stack([random_mask(seed + max(h, 1), queries, keys, empty) for h in range(heads)])
    if times == 1:
        return out
    counts = out.astype(np.uint8) * rng.integers(1, times + 1, size=(heads, 1, keys)).astype(np.uint8)
    counts[:, : queries // 3] *= np.uint8(1) + (rng.random((1, 1, keys)) < 0.3).astype(np.uint8)
    return counts


@pytest.fixture(params=[4, 32])
def piece(request, monkeypatch) -> int:
    """Small pieces and free groups, and the real sizes."""
    from attncompile.plugins.block_sparse import mechanism as module

    if request.param == 4:
        monkeypatch.setattr(planning, "_PIECE", 4)
        monkeypatch.setattr(planning, "LAUNCH", 0.0)
        monkeypatch.setattr(planning, "COPY", 1.0)
    module._made.cache_clear()
    yield request.param
    module._made.cache_clear()


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (64, 130), (75, 61)])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_lists_say_what_the_masks_say(queries, keys, block, times) -> None:
    for counts in (masks(3, 3, queries, keys, times=times), masks(3, 3, queries, keys, times=times)[:1]):
        said = lists(counts, block)
        assert (said.counts is not None) == (times > 1) and said.rows.shape[:2] == (1, len(counts))
        np.testing.assert_array_equal(counts_of((queries, keys), block, **said.arrays())[0], counts)
    twice = lists(np.full((queries, keys), 2, np.uint8), block)
    assert set(twice.counts) == {2} and (twice.rows[..., 2] - twice.rows[..., 1] == keys // block).all()


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_the_masks(seed, piece) -> None:
    queries, keys = (int(n) for n in np.random.default_rng(seed).integers(40, 150, size=2))
    counts = masks(seed, 4, queries, keys, times=1 + seed, empty=seed % 2 == 1)
    made = planning.plan(counts, 4, group=2)
    rows = np.concatenate([t.query_index.reshape(-1) for t in made.groups])
    np.testing.assert_array_equal(rows[made.slots], np.arange(4 * queries))
    seen = []
    for tiles in made.groups:
        for key_index, kind in zip(tiles.key_index, tiles.kind, strict=True):
            seen += [np.bincount(key_index, weights=row.astype(float), minlength=2 * keys) for row in tiles.masks[kind]]
    found = np.array(seen)[made.slots].reshape(4, queries, 2, keys)
    want = np.zeros_like(found)
    for head in range(4):
        want[head, :, head // 2] = counts[head]
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("times", [1, 3])
def test_heads_with_masks_of_their_own(heads, kv_heads, layouts, times, piece, case, error, tolerance) -> None:
    at = case(batch=2, queries=90, keys=131, heads=heads, kv_heads=kv_heads, layouts=layouts, static=True,
              visible=masks(5, heads, 90, 131, times=times))  # fmt: skip
    assert error(at, SUBJECT, {}) < tolerance["float32"]


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_keys_that_count_several_times(heads, kv_heads, layouts, biased, padded, piece, case, error, tolerance) -> None:
    rng = np.random.default_rng(0)
    counts = masks(7, 2, 75, 61, times=3)[1]
    bias = rng.standard_normal((1, heads, 75, 61)).astype(np.float32) if biased else None
    key_mask = rng.random((2, 1, 1, 61)) < 0.8 if padded else None
    at = case(batch=2, queries=75, keys=61, heads=heads, kv_heads=kv_heads, layouts=layouts, static=True,
              visible=counts, bias=bias, key_mask=key_mask)  # fmt: skip
    assert error(at, SUBJECT, {"masked_rows": "zero"}) < tolerance["float32"]
    once = replace(at, visible=counts > 0).expected(SUBJECT, {"masked_rows": "zero"})
    assert np.abs(once - at.expected(SUBJECT, {"masked_rows": "zero"})).max() > 0.1


@pytest.mark.parametrize("rows", ["zero", "nan"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 131), (2, 1, 1, 131), (2, 131)])
@pytest.mark.parametrize("layouts", LAYOUTS[:3], ids="-".join)
def test_padding_and_rows_without_a_key(rows, shape, layouts, piece, case, error, tolerance) -> None:
    key_mask = np.random.default_rng(1).random(shape) < 0.6
    key_mask = key_mask[:, None, None] if len(shape) == 2 else key_mask
    at = case(batch=2, queries=75, keys=131, static=True, visible=masks(9, 4, 75, 131, empty=True, times=2),
              key_mask=key_mask, masked_rows=rows, layouts=layouts)  # fmt: skip
    assert error(at, SUBJECT, {"masked_rows": rows}) < tolerance["float32"]


def test_half(piece, case, error, tolerance) -> None:
    for softmax in ("float16", "float32"):
        at = case(queries=75, static=True, visible=masks(3, 4, 75, 75, times=3), dtype="float16", softmax_dtype=softmax)
        assert error(at, SUBJECT, {}) < tolerance["float16"]


def test_one_changed_count_is_noticed(piece, case) -> None:
    counts = masks(5, 4, 90, 90, times=3)
    at = case(queries=90, static=True, visible=counts)
    want = at.expected(SUBJECT, {})
    rng = np.random.default_rng(0)
    for head, y in zip(rng.integers(4, size=4), rng.integers(90, size=4), strict=True):
        wrong = counts.copy()
        x = int(rng.choice(np.flatnonzero(counts[head, y])))
        wrong[head, y, x] += 1
        got = replace(at, visible=wrong).run(SUBJECT, {})
        difference = np.linalg.norm(got - want, axis=-1)[0]  # [Nq, H]
        assert np.unravel_index(int(difference.argmax()), difference.shape) == (y, head)
        assert difference[y, head] > 1e-3 and (np.delete(difference.reshape(-1), y * 4 + head) < 1e-5).all()


def test_the_inputs_of_the_node_say_what_the_body_does(piece, case) -> None:
    counts = masks(7, 4, 90, 101, times=4)
    at = case(queries=90, keys=101, static=True, visible=counts)
    block, said = said_by(at.model(SUBJECT, {}))
    assert {"counts", "order"} <= set(said)
    seen = counts_of((90, 101), block, **said)
    np.testing.assert_array_equal(seen[0], counts)
    want = reference(**at.tensors(), visible=seen, scale=at.scale)
    np.testing.assert_allclose(at.run(SUBJECT, {}), want, atol=1e-5)


def _found(site) -> Candidate | Verdict:
    (found,) = SUBJECT.exact_candidates(site)
    return found


def test_sites_with_masks_of_their_own(case) -> None:
    at = case(queries=1000, static=True)
    heads = np.stack([documents(1000, n) for n in (7, 7, 5, 4)])
    site = at.site(mask=MaskFacts(tuple(stored_mask(heads))))
    assert site.needs == {"head-mask"} <= SUBJECT.understands
    assert not mechanism("NeighborhoodAttention").understands & {"head-mask", "key-counts"}
    found = _found(site)
    assert isinstance(found, Candidate) and found.exact and "18.4%" in found.reason
    other = at.site(mask=MaskFacts(tuple(stored_mask(heads[[0, 2, 1, 3]]))))
    assert SUBJECT.is_exact_for(other, found.parameters).code == "other-mask"
    counted = at.site(mask=MaskFacts(tuple(stored_mask(heads * np.uint8(2) - (heads & (np.arange(1000) > 9))))))
    assert counted.needs == {"head-mask", "key-counts"}
    assert SUBJECT.is_exact_for(counted, found.parameters).code == "other-mask"
    assert isinstance(_found(counted), Candidate)


@pytest.mark.parametrize(
    ("more", "rows", "code"),
    [
        ((MaskPart("bias", ONCE, source="b", additive=True),), "nan", "bias"),
        ((MaskPart("padding", ONCE, source="m"),), "uniform", "masked-rows"),
        ((MaskPart("padding", ONCE, source="m", additive=True),), "nan", "mask"),
    ],
)
def test_refusals(more, rows, code, case) -> None:
    at = case(queries=1000, static=True)
    heads = np.stack([documents(1000, n) for n in (7, 7, 5, 4)])
    found = _found(at.site(mask=MaskFacts((*stored_mask(heads), *more), rows, (-3e38,))))
    assert isinstance(found, Verdict) and (found.ok, found.code) == (False, code)


def test_masks_for_another_number_of_heads_are_refused(case) -> None:
    site = case(queries=1000, static=True).site(
        mask=MaskFacts(tuple(stored_mask(np.stack([documents(1000, n) for n in (7, 5, 4)])))),
    )
    found = _found(site)
    assert isinstance(found, Verdict) and found.code == "heads"
