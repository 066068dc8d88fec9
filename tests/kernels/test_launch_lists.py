"""Kernels of BlockSparseAttention on a GPU: every tactic, the same bytes in every run and whatever the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.compiler import require_triton
from attncompile.kernels.launcher import launcher_for, run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels
from tests.conformance.budget import wrong, wrong_sums
from tests.conformance.cases import sparse
from tests.conformance.launch import tensors
from tests.conformance.vectorised import expected

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [
    sparse(
        f"{block}, head dim {dim}", block, batch=2, queries=1111, keys=1303, heads=6, kv_heads=2, head_dim=dim, lse=True
    )
    for block in (64, 128)
    for dim in (64, 72, 128)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    calls = [general(kernels(), c.call) for c in CASES]
    folder: Path = tmp_path_factory.mktemp("lists") / "made"
    write(folder, build([], calls, kernels(), [launcher_for().capability], Cache.default()), require_triton())
    return Bundle.open(folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tactic(case, made: Bundle) -> None:
    call, capability = general(kernels(), case.call), launcher_for().capability
    programs = {p.tactic: p for p in kernels()[call.op].programs(call, capability)}
    compiled = made.kernels(key_of(call), capability)
    assert {c.entry.tactic for c in compiled} == set(programs)
    given = case.inputs()
    want, want_lse = expected(case.call, given, "cuda")
    low, low_lse = expected(case.call, given, "cuda", half=case.call.dtype)
    for one in compiled:
        results = []
        for order in (given["order"], given["order"][::-1], given["order"]):
            at = tensors(case, {**given, "order": np.ascontiguousarray(order)}, "cuda")
            program = programs[one.entry.tactic]
            run_program(program, one, at, case.call.attributes, torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            results.append((at["output"].float().cpu().numpy(), at["log_sum_exp"].cpu().numpy()))
        output, lse = results[0]
        assert not wrong(output, want, low, case.call.dtype), one.entry.tactic
        assert not wrong_sums(lse, want_lse, low_lse, 0.0), one.entry.tactic
        for again, sums in results[1:]:
            assert np.array_equal(again, output) and np.array_equal(sums, lse), one.entry.tactic
