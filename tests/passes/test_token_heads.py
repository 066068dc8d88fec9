"""Queries that stand where heads belong: keys gathered for each of them in a rank-4 value of the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.passes.attention_graphs import Builder
from tests.passes.rebuild import found_in, only_site
from tests.passes.windowed_graphs import BATCH, DIM, HEADS, Windowed, build, clamped, seen


def flat(table: np.ndarray, *, bias: bool = False) -> Windowed:
    """[B, H * N, 1, D] times keys [B, H * N, k, D] of ``table`` [N, k]. ``bias``: numbers are added to the scores."""
    b = Builder()
    tokens, width = table.shape

    def take(value: str) -> str:
        taken = b.op("Gather", value, b.const(table.astype(np.int64)), axis=2)
        return b.op("Reshape", taken, b.const([BATCH, HEADS * tokens, width, DIM]))

    k, v = take("k"), take("v")
    q = b.op("Reshape", b.op("Mul", "q", b.const(np.float32(0.4))), b.const([BATCH, HEADS * tokens, 1, DIM]))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    if bias:
        rng = np.random.default_rng(0)
        scores = b.op("Add", scores, b.const(rng.standard_normal((1, HEADS * tokens, 1, width)).astype(np.float32)))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    return Windowed(build(b, tokens, b.op("Reshape", out, b.const([BATCH, HEADS, tokens, DIM]))), seen(table, tokens))


@pytest.mark.parametrize("table", [clamped(5, 7, 3), np.array([[0, 1], [1, 2], [2, 0]])])
def test_windows_become_one_site(table: np.ndarray, tmp_path: Path) -> None:
    made = flat(table)
    tokens = len(table)
    _, site = only_site(made.proto, tmp_path)
    assert (site.heads, site.query_length, site.key_length) == (HEADS, tokens, tokens)
    assert (site.query.value, site.key.value, site.value.value) == ("q", "k", "v")


def test_a_bias_in_the_windows_is_refused_and_no_head_is_made_of_a_query(tmp_path: Path) -> None:
    _, found = found_in(flat(clamped(5, 7, 3), bias=True).proto, tmp_path)
    assert not found.sites
    assert [m.code for m in found.near_misses] == ["gather-bias"]


def test_heads_of_their_own_tokens_are_heads(tmp_path: Path) -> None:
    """Keys that no two queries share: a permutation of tokens before ordinary heads."""
    b = Builder()
    order = np.random.default_rng(1).permutation(7)
    k, v = (b.op("Gather", x, b.const(order.astype(np.int64)), axis=2) for x in "kv")
    scores = b.op("MatMul", b.op("Mul", "q", b.const(np.float32(0.4))), b.op("Transpose", k, perm=[0, 1, 3, 2]))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    _, site = only_site(build(b, 7, b.op("Tanh", out)), tmp_path)
    assert (site.heads, site.query_length, site.key_length) == (HEADS, 7, 7)
    assert site.mask.parts == ()
