"""``tools/bench linear`` as far as it goes without a GPU: every case has kernels, every trial programs, and what a case
is compared with is the definition.
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
from attncompile.plugins.linear_attention.reference import with_state

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    folder = str(Path(__file__).parents[2] / "tools" / "bench")
    sys.path.insert(0, folder)
    import linear
    import linear_sweep
    import linear_tactics

    yield linear, linear_tactics, linear_sweep
    sys.path.remove(folder)


def test_every_case_has_kernels_and_every_trial_programs(bench: Any) -> None:
    linear, tactics, sweep = bench
    first, second = (sweep.linear_sweep(256, seed) for seed in (0, 1))
    assert [c.name for c in first] == [f"sweep-{n}" for n in range(256)]
    assert len({str(replace(c, name="")) for c in first}) == len(first), "none twice"
    for case in (*linear.CASES, *first, *second):
        for call in linear.calls(case):
            assert kernels()[call.op].supports(general(kernels(), call), 90).ok, (case.name, call.op)
            (program, *_) = kernels()[call.op].programs(general(kernels(), call), 90)
            assert kernels()[call.op].work(call, program).bytes >= 0
    known = tactics.known()
    assert set(known) == {op for op in kernels() if op.startswith("LinearAttention")}
    for trial in tactics.TRIALS:
        for chunk in trial.chunks:
            for call in linear.calls(tactics.in_chunks(trial.case, chunk)):
                names = [p.tactic for p in known[call.op].programs(general(known, call), 90)]
                assert len(set(names)) == len(names) >= 3, (call.op, names)


def test_what_cases_are_compared_with(bench: Any) -> None:
    """Of every case, and of every kind of a sweep."""
    linear, _, sweep = bench
    for case in (*linear.CASES, *sweep.linear_sweep(len(sweep.KINDS))):
        chunk = 1 if case.step else 16
        small = replace(
            case, form=replace(case.form, chunk=chunk), heads=2, tokens=1 if case.step else 48, dim=16, batch=2
        )
        at = linear.drawn(small, "cpu")
        want = {n: x.double().numpy() for n, x in at.items()}
        q, k, v = (want.pop(n) for n in ("query", "key", "value"))
        if "feature_weight" in want:  # of keys and queries
            want["query_weight"] = want["feature_weight"]
        output, state, _ = with_state(q, k, v, {**linear.said(small), "causal": small.form.causal}, **want)
        got = linear.wanted(small, at)
        assert np.linalg.norm(got["output"].numpy() - output) < 1e-9 * np.linalg.norm(output), case.name
        if "final_state" in got:
            assert np.linalg.norm(got["final_state"].numpy() - state) < 1e-9 * np.linalg.norm(state)
