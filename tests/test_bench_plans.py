"""tools/bench plans: a search's patterns as lists."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = str(Path(__file__).parents[1] / "tools" / "bench")
    monkeypatch.syspath_prepend(folder)
    known = set(sys.modules)
    yield importlib.import_module("plans")
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


TEXTS = ["dense", "sinks 1 window 2", "columns 0,7 diagonals 1", "sinks 0 window 0", "sinks 2 window 9", "dense"]


def test_a_map_is_drawn_larger(plans: Any) -> None:
    small, large = (plans.blocks_of(TEXTS, tokens) for tokens in (8192, 32768))
    assert small.shape == (6, 64, 64) and large.shape == (6, 256, 256)
    rows, columns = np.tril_indices(256)
    assert np.array_equal(large[:, rows, columns], small[:, rows // 4, columns // 4])
    assert not np.triu(large, 1).any() and large[0, rows, columns].all()
    assert small[1].sum() == 3 * 64 - 3 + 61 and np.array_equal(small[3], np.eye(64, dtype=bool))


def test_sites_whose_heads_choose_are_left_and_one_kernel_takes_all_lengths(plans: Any, tmp_path: Path) -> None:
    from attncompile.kernels.build import general
    from attncompile.kernels.records import key_of
    from attncompile.plugins import kernels

    path = tmp_path / "patterns.json"
    path.write_text(json.dumps({"site0": TEXTS, "site3": ["pooled 0.25", *["dense"] * 5]}))
    cases, left = plans.cases(path, (8192, 16384))
    assert left == ["site3"] and [c.name for c in cases] == ["site0-8192", "site0-16384"]
    committed = Path(__file__).parents[1] / "docs" / "bench" / "search-lm-8192.json"
    assert [c.name for c in plans.cases(committed, (8192,))[0]] == [f"site{n}-8192" for n in range(6)]
    keys = {key_of(general(kernels(), importlib.import_module("kernels").routed(c))) for c in cases}
    assert len(keys) == 1 and all(c.causal and c.grid is None for c in cases)
    # The op's inputs say what the map says, blocks on the diagonal first.
    given = cases[0].lists()
    start, full, end = given["rows"][0, 1, 10]
    assert given["columns"][start] == 10 and full == start + 1
    assert set(given["columns"][start:end].tolist()) == {0, 8, 9, 10}


def test_sites_that_meet_the_rest_by_its_means_are_left(plans: Any, tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps({"site0": ["sinks 1 window 2 rest 16", *["dense"] * 5], "site1": ["skip", *TEXTS[1:]]}))
    cases, left = plans.cases(path, (8192,))
    assert left == ["site0"] and [c.name for c in cases] == ["site1-8192"]


def test_a_skipped_head_gives_zero_and_takes_no_products(plans: Any) -> None:
    import torch

    truth = importlib.import_module("truth")
    whole, without = (plans.planned("case", plans.blocks_of([first, *TEXTS[1:]], 8192)) for first in ("dense", "skip"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8192, 6, 64) for _ in range(3))
    rows = torch.tensor([0, 127, 128, 5000])
    all_heads, some = (truth.truth(case, q, k, v, rows) for case in (whole, without))
    assert torch.equal(some[:, :, 0], torch.zeros(1, 4, 64, dtype=torch.float64))
    assert torch.equal(some[:, :, 1:], all_heads[:, :, 1:]) and all_heads[:, :, 0].abs().min() > 0
    assert truth.pairs(whole) - truth.pairs(without) == pytest.approx(8192 * 8193 / 2 / 6)
    lists = without.lists()
    assert (lists["rows"][0, 0, :, 0] == lists["rows"][0, 0, :, 2]).all()


def test_of_all_sites_together(plans: Any) -> None:
    result = {"total": {"8192": {"ours": 0.2, "cudnn": 0.5, "ratio": 2.5}},
              "density": {"site0-8192": 0.25, "site1-8192": 0.75}}  # fmt: skip
    assert plans.table(result).splitlines()[-1] == "| 8,192 | 50.0% | 0.200 | 0.500 | 2.50x |"
