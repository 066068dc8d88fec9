"""Kernels that choose blocks on a GPU: every tactic, the same lists in every run, and attention to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attncompile.core.kernel import OpCall
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.compiler import require_triton
from attncompile.kernels.launcher import launcher_for, run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels
from attncompile.plugins.block_select.op import LISTS, masks
from attncompile.plugins.block_sparse.reference import reference
from tests.conformance import selection
from tests.conformance.selection import CASES, Selection

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHOLE = Selection("attended to", heads=(4, 2), tokens=(777, 777), dim=64, amount=(0.6,), seed=5)
SEVERAL = Selection("1,500 blocks", stride=1, block=1, tokens=(1500, 1500), rule="share", amount=(0.1,), heads=(1, 1))
AROUND = Selection("attended to around an anchor", heads=(4, 2), tokens=(13, 777), dim=64, stride=1, reduce="max",
                   span=64, rule="anchor", amount=(0.4, 0.2, 0.0, 3.0), seed=5)  # fmt: skip
FAR = Selection("1,100 blocks", stride=1, block=1, tokens=(1100, 1100), rule="anchor", amount=(0.5,), heads=(1, 1))
TESTED = (*CASES, WHOLE, SEVERAL, AROUND, FAR)


def attention() -> OpCall:
    """To the lists of ``WHOLE`` or ``AROUND``, which are alike in all that it is made for."""
    shapes = {**{n: WHOLE.shapes[n] for n in LISTS}, "masks": (1, 64, 2)}
    return OpCall(
        "BlockSparseAttention", "float16", 4, 2, 64, 64, {"block": 64, "masked_rows": "zero", "scale": WHOLE.scale},
        dict.fromkeys(shapes, "int32"), shapes, batch=1, query_length=777, key_length=777,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    every = [general(kernels(), c) for case in TESTED for c in case.calls()] + [general(kernels(), attention())]
    calls = list({key_of(c): c for c in every}.values())
    folder: Path = tmp_path_factory.mktemp("selection") / "made"
    write(folder, build([], calls, kernels(), [launcher_for().capability], Cache.default()), require_triton())
    return Bundle.open(folder)


def launcher(made: Bundle, number: int) -> Any:
    """Launches the tactic of that number of each op, or its last."""

    def launch(call: OpCall, tensors: Mapping[str, Any], layouts: Mapping[str, str]) -> None:
        wide, capability = general(kernels(), call), launcher_for().capability
        found = made.kernels(key_of(wide), capability)
        one = found[min(number, len(found) - 1)]
        programs = kernels()[call.op].programs(wide, capability)
        program = next(p for p in programs if p.tactic == one.entry.tactic)
        stream = torch.cuda.current_stream().cuda_stream
        run_program(program, one, tensors, call.attributes, stream, layouts=layouts)
        torch.cuda.synchronize()

    return launch


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_every_tactic(case: Selection, made: Bundle) -> None:
    for number in range(3):
        assert selection.verdict(case, launcher(made, number), "cuda") == "", number


@pytest.mark.parametrize("case", [WHOLE, AROUND], ids=str)
def test_the_same_lists_in_every_run_and_what_they_give(case: Selection, made: Bundle) -> None:
    at, launch = selection.tensors(case, "cuda"), launcher(made, 0)
    first, second = case.calls()
    kept = []
    for _ in range(5):
        launch(first, {n: at[n] for n in ("query", "key", "scores")}, {"query": "BNHD", "key": "BNHD"})
        launch(second, {n: at[n] for n in ("scores", "amount", *LISTS, "mass")}, {})
        kept.append([at[n].cpu().numpy().copy() for n in (*LISTS, "mass")])
    assert all(np.array_equal(a, b) for run in kept[1:] for a, b in zip(run, kept[0], strict=True))
    if case is AROUND:  # its queries stand for means
        at["query"] = torch.randn(1, 777, 4, 64, device="cuda").half()
    at["value"] = torch.randn(1, 777, 2, 64, device="cuda").half()
    at["output"] = torch.full((1, 777, 4, 64), float("nan"), device="cuda", dtype=torch.float16)
    at["masks"] = torch.from_numpy(masks(64, True)).cuda()
    names = ("query", "key", "value", "rows", "columns", "kinds", "masks", "output")
    launch(attention(), {n: at[n] for n in names}, {})
    listed = selection.reference.listed(*kept[0][:2], 13, True)
    assert not listed[..., np.tri(13, dtype=bool)].all()
    token = np.arange(777)
    seen = listed[:, :, token[:, None] // 64, token[None, :] // 64] & (token[None, :] <= token[:, None])
    q, k, v = (at[n].double().cpu().numpy() for n in ("query", "key", "value"))
    want = reference(q, k, v, visible=seen, scale=WHOLE.scale)
    got = at["output"].double().cpu().numpy()
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-3
