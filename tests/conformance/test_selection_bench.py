"""``tools/bench selection`` as far as it goes without a GPU: every case has kernels, and what a case is compared with
is the definition.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attncompile.kernels.build import general
from attncompile.plugins import kernels
from attncompile.plugins.block_select import reference
from attncompile.plugins.block_sparse.reference import reference as attention

pytest.importorskip("triton")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    folder = str(Path(__file__).parents[2] / "tools" / "bench")
    sys.path.insert(0, folder)
    import selection

    yield selection
    sys.path.remove(folder)


def test_every_case_has_kernels(bench: Any) -> None:
    for case in bench.CASES:
        for call in case.calls():
            wide = general(kernels(), call)
            assert kernels()[call.op].supports(wide, 90).ok, (case.name, call.op)
            assert len(kernels()[call.op].programs(wide, 90)) > 1
    assert {f"anchor-{n}" for n in ("8k", "32k", "128k")} <= {case.name for case in bench.CASES}


def defined(case: Any, at: dict[str, Any]) -> dict[str, Any]:
    """All outputs by the definition."""
    cut, edge = case.cut, case.block
    q, k, v = (at[n].double().numpy() for n in ("query", "key", "value"))
    operands = [at[f"pooled_{n}" if n in cut.pooled else n].double().numpy() for n in ("query", "key")]
    scores = reference.scores(*operands, cut.stride, cut.block, case.causal, None, cut.reduce, cut.span)
    scores = scores.astype(np.float32)
    weights = scores if case.rule == "anchor" else reference.mass(scores, cut.tiles)
    kept = reference.kept(weights, at["amount"].numpy(), case.rule, case.causal)
    token = np.arange(case.tokens)
    seen = kept[:, :, token[:, None] // edge, token[None, :] // edge]
    if case.causal:
        seen = seen & (token[None, :] <= token[:, None])
    rows, columns = np.zeros((*kept.shape[:3], 3), np.int32), list[int]()
    for place in np.ndindex(*kept.shape[:3]):
        own = place[2] if case.causal else kept.shape[3] - 1
        listed = [own, *(int(c) for c in np.flatnonzero(kept[place]) if c != own)]
        rows[place] = len(columns) + 1 - bool(kept[place][own]), len(columns) + 1, len(columns) + len(listed)
        columns += listed
    made = {"scores": scores, "rows": rows, "columns": np.array(columns),
            "output": attention(q, k, v, visible=seen, scale=bench_scale(q))}  # fmt: skip
    return {**at, **{n: torch.from_numpy(x) for n, x in made.items()}}


def bench_scale(query: np.ndarray) -> float:
    return float(query.shape[-1] ** -0.5)


@pytest.mark.parametrize("name", ["xattention-s16-gqa-32k", "pooled-2k", "anchor-gqa-32k", "anchor-full-32k"])
def test_what_cases_are_compared_with(name: str, bench: Any) -> None:
    (whole,) = (case for case in bench.CASES if case.name == name)
    case = replace(whole, heads=2, kv_heads=whole.kv_heads // whole.heads or 1, block=64, tokens=1024)
    at = bench.tensors(case, "cpu")
    bench.pooled(case, at)
    right = defined(case, at)
    assert bench.wrong(case, right) == ""
    # One thing wrong at a time.
    scores, rows = right["scores"].clone(), right["rows"].clone()
    scores[0, 1, -1, 0] += 0.01
    assert bench.wrong(case, {**right, "scores": scores}).startswith("scores of row")
    rows[0, 1, -1, 2] -= 1
    assert bench.wrong(case, {**right, "rows": rows}).startswith("list of row")
    output = right["output"].clone()
    output[0, 38, 0] *= 1.1
    assert bench.wrong(case, {**right, "output": output}).startswith("output of query 38")


@pytest.mark.parametrize("tokens", [8192, 32768])
def test_a_tenth_of_the_blocks_is_near_an_anchor(tokens: int, bench: Any) -> None:
    """More of a short sequence, of which two blocks are always kept."""
    case = bench.Choice("", tokens, bench.ANCHOR, heads=4, kv_heads=4)
    at = bench.tensors(case, "cpu")
    bench.pooled(case, at)
    q, k = at["pooled_query"].float()[0], at["key"].float()[0]
    count = tokens // case.block
    scores = torch.einsum("rhd,khd->hrk", q, k).mul(q.shape[-1] ** -0.5).unflatten(2, (count, -1)).amax(3)
    scores = scores.masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), -torch.inf)
    kept = reference.kept(scores[None].double().numpy(), at["amount"].numpy(), "anchor", True)
    density = kept.sum() / (count * (count + 1) / 2 * case.heads)
    assert 0.07 < density < (0.2 if tokens == 8192 else 0.14)
