"""Heads whose blocks are of tokens in another order of the grid's axes: op, body and gathers against the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, bitmap
from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mechanism import Shape
from attncompile.plugins import mechanism
from attncompile.plugins.block_sparse import head_orders, per_head
from attncompile.plugins.block_sparse.reference import counts_of, reference
from tests.plugins.conftest import Case, relative_error

SUBJECT = mechanism("BlockSparseAttention")
EDGE = 64

Meant = Callable[[int, int], bool]


@dataclass(frozen=True)
class Head:
    """A head's text, and what it means: the order of the axes, and which block of keys a block of queries meets; None:
    nothing, the mean of all values.
    """

    text: str
    order: tuple[int, ...]
    meets: Meant | None


def ranks(grid: TokenGrid, order: tuple[int, ...]) -> list[int]:
    """The place of each token: by sorting coordinates, one token at a time."""
    if not order:
        return list(range(grid.tokens))
    last = grid.prefix + int(np.prod(grid.shape))

    def key(token: int) -> tuple[int, ...]:
        if token < grid.prefix:
            return (0, token)
        if token >= last:
            return (2, token)
        rest, coordinates = token - grid.prefix, []
        for side in reversed(grid.shape):
            rest, at = divmod(rest, side)
            coordinates.insert(0, at)
        if 0 not in order:  # tile by tile
            return (1, *(x // side for x, side in zip(coordinates, order, strict=True)),
                    *(x % side for x, side in zip(coordinates, order, strict=True)))  # fmt: skip
        return (1, *(coordinates[axis] for axis in order))

    ordered = sorted(range(grid.tokens), key=key)
    return [ordered.index(token) for token in range(grid.tokens)]


def visible(grid: TokenGrid, heads: tuple[Head, ...]) -> np.ndarray:
    """Bool [H, N, N]: which pairs of tokens, as they stand, a head computes."""
    out = np.zeros((len(heads), grid.tokens, grid.tokens), bool)
    for h, head in enumerate(heads):
        block = [place // EDGE for place in ranks(grid, head.order)]
        for i, j in product(range(grid.tokens), repeat=2):
            if head.meets is not None:
                out[h, i, j] = block[i] == block[j] or head.meets(block[i], block[j])
    return out


def near(window: int, sinks: int = 0) -> Meant:
    return lambda r, c: abs(r - c) <= window or c < sinks


def everything(r: int, c: int) -> bool:
    return True


def scattered(seed: int, count: int) -> tuple[str, Meant]:
    seen = np.random.default_rng(seed).random((count, count)) < 0.4
    return bitmap(seen | np.eye(count, dtype=bool)).text, lambda r, c: bool(seen[r, c])


FLAT, VIDEO = TokenGrid((11, 19), prefix=1), TokenGrid((3, 9, 10), prefix=2, suffix=5)  # 210 and 277 tokens
TEXT, BITS = scattered(3, 5)
DENSE, MEAN = Head("dense", (), everything), Head("mean", (), None)
PLAIN = Head("sinks 1 window 0", (), near(0, 1))
TURNED = Head("order 1,0 sinks 0 window 1", (1, 0), near(1))
LATE = Head("order 1,2,0 sinks 1 window 0", (1, 2, 0), near(0, 1))
ACROSS = Head(f"order 2,0,1 {TEXT}", (2, 0, 1), BITS)
TILED = Head("order 4x8 sinks 1 window 0", (4, 8), near(0, 1))
CUBES = Head(f"order 2x4x8 {TEXT}", (2, 4, 8), BITS)
COLUMN = Head("order 0,2,1 columns 3 diagonals 1", (0, 2, 1), lambda r, c: c == 3 or r - c == 1)

NHD, HND = ("BNHD",) * 4, ("BHND",) * 4
MIXED = ("BNHD", "BHND", "BNHD", "BHND")
CASES = {
    "a head of its own": (FLAT, 2, HND, (TURNED, PLAIN)),
    "all turned": (FLAT, 2, NHD, (TURNED, TURNED)),
    "three orders": (VIDEO, 4, NHD, (LATE, ACROSS, COLUMN, DENSE)),
    "in one group, all the same": (FLAT, 1, NHD, (TURNED, DENSE, TURNED, MEAN)),
    "in one group, every second": (FLAT, 1, HND, (TURNED, PLAIN, TURNED, PLAIN)),
    "two and three of one group": (FLAT, 1, NHD, (TURNED, PLAIN, TURNED, PLAIN, PLAIN)),
    "tiles": (FLAT, 2, MIXED, (TILED, TURNED)),
    "tiles of frames": (VIDEO, 1, NHD, (CUBES, LATE)),
    "groups that differ": (VIDEO, 2, MIXED, (LATE, LATE, ACROSS, PLAIN)),
    "a group without": (VIDEO, 2, tuple(reversed(MIXED)), (DENSE, MEAN, COLUMN, ACROSS)),
}  # fmt: skip


def subject(
    case: type[Case], grid: TokenGrid, kv_heads: int, layouts: Any, heads: tuple[Head, ...], **more: Any
) -> tuple[Case, dict[str, Any]]:
    """The case, whose site has the grid, and its parameters."""

    class Gridded(case):  # type: ignore[misc, valid-type]
        def site(self, **changes: Any) -> Any:
            return super().site(**{"grid": grid, **changes})

    at = Gridded(batch=2, queries=grid.tokens, static=True, heads=len(heads), kv_heads=kv_heads, layouts=layouts,
                 head_dim=8, value_dim=6, **more)  # fmt: skip
    patterns = [BlockPattern(h.text) for h in heads]
    return at, dict(SUBJECT.head_parameters(BlockGeometry(grid.tokens, EDGE, False, grid), patterns))


@pytest.mark.parametrize("name", CASES)
def test_the_lowering_is_the_definition(name, case, tolerance) -> None:
    grid, kv_heads, layouts, heads = CASES[name]
    at, parameters = subject(case, grid, kv_heads, layouts, heads)
    assert SUBJECT.supports(at.site(), parameters).ok
    seen = visible(grid, heads)
    want = reference(**at.tensors(), visible=seen, masked_rows=parameters["masked_rows"], scale=at.scale)
    assert relative_error(at.run(SUBJECT, parameters), want) < tolerance["float32"]
    model = at.model(SUBJECT, parameters)
    assert [n.op_type for n in model.graph.node if n.domain] == ["BlockSparseAttention"], "one launch for all orders"
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}


def test_lists_of_the_node_are_of_each_heads_order(case) -> None:
    """What a kernel reads, undone by hand: pairs of tokens as they stand."""
    grid, kv_heads, layouts, heads = CASES["groups that differ"]
    at, parameters = subject(case, grid, kv_heads, layouts, heads)
    model = at.model(SUBJECT, parameters)
    (made,) = [n for n in model.graph.node if n.domain]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    arrays = {name: stored[made.input[3 + i]] for i, name in enumerate(("rows", "columns", "kinds", "masks"))}
    got = counts_of((grid.tokens, grid.tokens), EDGE, **arrays)[0]
    want = visible(grid, heads)
    for h, head in enumerate(heads):  # runs of one order are in the order of the heads here
        place = np.array(ranks(grid, head.order))
        np.testing.assert_array_equal(got[h][np.ix_(place, place)], want[h])


def test_half(case, tolerance) -> None:
    grid, kv_heads, layouts, heads = CASES["three orders"]
    at, parameters = subject(case, grid, kv_heads, layouts, heads, dtype="float16", softmax_dtype="float32")
    want = reference(**at.tensors(), visible=visible(grid, heads), scale=at.scale)
    assert relative_error(at.run(SUBJECT, parameters).astype(np.float64), want) < tolerance["float16"]


def test_key_heads_are_copied_no_more_than_they_must(case) -> None:
    def keys(name: str) -> tuple[int, ...]:
        grid, kv_heads, _, heads = CASES[name]
        made = head_orders.arranged(
            [h.text for h in heads], len(heads) // kv_heads, BlockGeometry(grid.tokens, EDGE, False, grid)
        )
        assert made is not None and sorted(made.heads) == list(range(len(heads)))
        return made.key_heads

    assert keys("in one group, all the same") == (0,), "dense heads and means go with any order"
    assert keys("in one group, every second") == (0, 0)
    assert keys("two and three of one group") == (0,) * 5
    assert keys("groups that differ") == (0, 0, 1, 1), "the first two share one, but heads of the op share evenly"
    assert keys("all turned") == (0, 1)
    assert head_orders.arranged(["dense", "sinks 1 window 0"], 1, BlockGeometry(210, EDGE, False, FLAT)) is None


@pytest.mark.parametrize("wrong", ["rows", "keys", "heads", "axes"])
def test_a_planted_bug_is_seen(wrong, case, monkeypatch) -> None:
    grid, kv_heads, layouts, heads = CASES["groups that differ"]
    at, parameters = subject(case, grid, kv_heads, layouts, heads)
    want = reference(**at.tensors(), visible=visible(grid, heads), scale=at.scale)
    right_error = relative_error(at.run(SUBJECT, parameters), want)
    right, right_row, right_order = head_orders.arranged, head_orders._row, TokenGrid.ordered

    def planted(*given: Any) -> Any:
        made = right(*given)
        if wrong == "keys":
            return replace(made, keys=np.roll(made.keys, 1, axis=0))
        if wrong == "heads":
            return replace(made, heads=made.heads[::-1])
        return made

    def row(head: np.ndarray, token: np.ndarray, heads: int, layout: str) -> np.ndarray:
        return right_row(head, np.argsort(token, axis=1) if wrong == "rows" else token, heads, layout)

    def order(self: TokenGrid, axes: Any) -> np.ndarray:
        return right_order(self, np.argsort(axes) if wrong == "axes" else axes)

    per_head._arranged.cache_clear()
    monkeypatch.setattr(per_head, "arranged", planted)
    monkeypatch.setattr(head_orders, "_row", row)
    monkeypatch.setattr(TokenGrid, "ordered", order)
    try:
        assert relative_error(at.run(SUBJECT, parameters), want) > 1e-3 > 100 * right_error
    finally:
        per_head._arranged.cache_clear()  # no other test meets what was planted


def test_moving_heads_costs(case) -> None:
    """The same blocks in another order cost what is moved, and copies of keys if heads of a group differ."""
    at, _ = subject(case, FLAT, 2, MIXED, (PLAIN,) * 4)
    shape = Shape(2, FLAT.tokens, FLAT.tokens)

    def flops(*texts: str) -> float:
        return SUBJECT.cost(at.site(), {"masked_rows": "zero", "edge": EDGE, "heads": texts}, shape).flops

    base, turned = flops(*["sinks 1 window 0"] * 4), "order 1,0 sinks 1 window 0"
    of_element = 2.0 * (at.head_dim + at.value_dim)
    moved = flops(*[turned] * 4) - base
    start = per_head.LAUNCH * of_element
    nhd, hnd = per_head.MOVE["BNHD"], per_head.MOVE["BHND"]  # of query and value, of key and output
    assert moved - start == pytest.approx(of_element * 2 * FLAT.tokens * (nhd * (4 + 2) + hnd * (2 + 4)))
    assert flops(turned, "sinks 1 window 0", turned, turned) - base - start == pytest.approx(
        of_element * 2 * FLAT.tokens * (nhd + hnd) * (4 + 4)
    )


def test_orders_that_are_refused(case) -> None:
    heads = (PLAIN, PLAIN)
    at, good = subject(case, FLAT, 2, NHD, heads)

    def refused(site: Any, text: str, **more: Any) -> tuple[str, str, str]:
        found = SUBJECT.supports(site, {**good, "heads": ["dense", text], **more})
        assert not found.ok
        with pytest.raises(Unsupported):
            SUBJECT.lower(site, {**good, "heads": ["dense", text], **more}, 18)
        return found.code, found.reason, found.hint

    turned = "order 1,0 sinks 0 window 1"
    code, reason, hint = refused(at.site(grid=None), turned)
    assert code == "grid" and "needs a token grid of 2 axes" in reason and "--grid" in hint
    assert refused(at.site(grid=TokenGrid((11, 18))), turned)[0] == "grid", "tokens that are not on the grid"
    for wrong in ("order 0,1 sinks 0 window 1", "order 1,1 sinks 0 window 1", "order 2,1,0 sinks 0 window 1",
                  "order 1 sinks 0 window 1", "order 1,2 columns 0"):  # fmt: skip
        code, reason, hint = refused(at.site(), wrong)
        assert (
            code == "grid" and "is no other order of the axes of the grid 11x19" in reason and "each of the 2" in hint
        )
    for wrong in ("order 1,0 dense", "order 1,0 mean"):
        assert "is the same in every order" in refused(at.site(), wrong)[1]
    assert "tiles have no neighborhood" in refused(at.site(), "order 2x4 grid 3x3")[1]
    assert "needs a token grid of 3 axes" in refused(at.site(), "order 2x4x4 columns 1")[1]
    for wrong in ("order 1,0", "order sinks 0 window 1", "order 1,0 order 1,0 columns 1", "order 1,-1 columns 1",
                  "order 1,0  columns 1", "order 1,0 pooled 0.25"):  # fmt: skip
        assert "is no pattern of a head" in refused(at.site(), wrong)[1]
    causal = replace(at, causal=True)
    assert "causal" in refused(causal.site(grid=FLAT), turned)[1]
    padded = replace(at, key_mask=np.ones((2, 1, 1, FLAT.tokens), bool))
    assert "beside padding" in refused(padded.site(grid=FLAT), turned)[1]
    assert refused(at.site(grid=TokenGrid((210,))), "order 0 columns 1")[2] == "leave the order out"
