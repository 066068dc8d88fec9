"""``tools/gpu_conformance.py`` without a GPU: its cases in Triton's interpreter, what it says of errors, its bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from attncompile.core.errors import KernelError, Unsupported
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "gpu_conformance.py"
NAMED = ("17 queries, 17 keys, causal", "2-D, left", "no blocks at all", "a bound of the sum", "simple GLA, half gates")
"""One of each family, and one with tokens as the last axis."""


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = spec_from_file_location("gpu_conformance", TOOL)
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def given(**more: Any) -> Namespace:
    return Namespace(**{"count": 0, "seed": 0, "only": None, "case": None, "family": None, "interpret": True,
                        "jobs": 1, "json": None, "timeout": 60.0, "arch": 80, "launch_only": False,
                        **more})  # fmt: skip


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_cases_of_all_families_in_processes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = [x for name in NAMED for x in ("--case", name)]
    done = started("run", "none", "--interpret", "--jobs", "2", "--count", "0", *names, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert sorted(x["name"] for x in found["cases"]) == sorted(NAMED)
    assert {x["verdict"] for x in found["cases"]} == {"right"} and found["not_right"] == 0
    assert {x["op"] for x in found["cases"]} == {
        "Attention", "NeighborhoodAttention", "BlockSparseAttention", "LinearAttention"
    }  # fmt: skip
    assert "5 of 5 cases" in done.stdout


class Broken:
    """A device whose launches write nothing, or raise."""

    device, architecture = "cpu", 80

    def __init__(self, error: Exception | None = None, launch_only: bool = False) -> None:
        self.error, self.launch_only = error, launch_only

    def launch(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("name", NAMED)
def test_what_is_wrong_is_said(name: str, tool: Any) -> None:
    ((number, case),) = tool.selected(given(case=[name]))
    nothing = tool.compare(case, number, Broken())
    assert nothing.verdict == "wrong" and "NaN" in nothing.problem and nothing.call == repr(case)
    missing = tool.compare(case, number, Broken(tool.Missing("a-tactic")))
    assert (missing.verdict, missing.problem) == ("not compiled", "a-tactic")
    broken = tool.compare(case, number, Broken(KernelError("cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS")))
    assert broken.verdict == "failed" and "CUDA_ERROR_ILLEGAL_ADDRESS" in broken.problem
    launched = tool.compare(case, number, Broken(KernelError("cuLaunchKernel"), launch_only=True))
    assert tool.compare(case, number, Broken(launch_only=True)).verdict == "launched" and launched.verdict == "failed"
    # Only a call that no kernel takes is refused: what is raised later is a fault.
    assert tool.compare(case, number, Broken(Unsupported("strides", "gaps"))).verdict == "failed"
    assert nothing.tactics == missing.tactics == broken.tactics and nothing.tactics
    row = next(x for x in tool.table([nothing, missing, broken]).split("\n") if x.startswith(f"{nothing.op} triton"))
    assert row.split()[-5:] == ["0", "1", "1", "1", "0"]


def test_a_wrong_case_fails_the_run(tool: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(tool, "opened", lambda _: Broken())
    assert tool.run(given(case=["simple GLA, half gates"])) == 1
    said = capsys.readouterr().out
    assert "wrong: simple GLA, half gates" in said and "--case 'simple GLA, half gates'" in said
    assert tool.run(given(case=["no such case"])) == 1


def test_the_cases_have_every_op_with_kernels_and_both_turns(tool: Any) -> None:
    ops: Counter[str] = Counter()
    turns: Counter[tuple[str, int]] = Counter()
    several = set()
    for number, case in tool.selected(given(count=40)):
        for call, wide, program in tool.chosen(case, number, 80):
            ops[call.op] += 1
            programs = kernels()[call.op].programs(wide, 80)
            turns[call.op, programs.index(program)] += 1
            if len(programs) > 1:
                several.add(call.op)
    assert set(ops) == set(kernels()) and min(ops.values()) >= 10, ops
    assert set(ops) - several <= {"LinearAttentionCombine", "LinearAttentionSolve"}
    assert all(turns[op, 1] >= 3 for op in several), turns


def test_cases_of_one_family_keep_their_numbers(tool: Any) -> None:
    every = dict(tool.selected(given(count=1)))
    found = [(op, tool.selected(given(count=1, family=op))) for op in {tool.family(case) for case in every.values()}]
    assert len(found) == 5 and sum(len(cases) for _, cases in found) == len(every)
    for op, cases in found:
        assert cases and all(tool.family(case) == op and every[number].name == case.name for number, case in cases)


def test_what_is_general_stays_so(tool: Any) -> None:
    """A call made general twice has the same kernels: bundles find them by the general call."""
    known = kernels()
    for number, case in tool.selected(given(count=10)):
        for _, wide, _ in tool.chosen(case, number, 80):
            assert key_of(known[wide.op].general(wide)) == key_of(wide), case.name
    for op, kernel in known.items():
        for wide in kernel.standard("float16"):
            assert key_of(kernel.general(wide)) == key_of(wide), op


@pytest.mark.slow
def test_a_bundle_of_what_the_cases_need(tool: Any, tmp_path: Path) -> None:
    """And a kernel that does not compile is named, not the end of all others."""
    names = ["--case", "1-D, one token", "--case", "running sum"]
    done = started("prepare", str(tmp_path / "b"), "--arch", "80", "--count", "0", *names)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(tmp_path / "b")
    wanted = set()
    for number, case in tool.selected(given(case=["1-D, one token", "running sum"])):
        wanted |= {(call.op, program.tactic) for call, _, program in tool.chosen(case, number, 80)}
    assert {(e.op, e.tactic) for e in bundle.entries.values()} == wanted


def test_what_does_not_compile_is_left_out(tool: Any, monkeypatch: Any, capsys: Any) -> None:
    def build(nodes: Any, calls: Any, *_: Any) -> Any:
        if "bad" in calls:
            raise KernelError("ptxas says no")
        return tool.Built({c: c for c in calls}, tuple(calls), ())

    monkeypatch.setattr(tool, "build", build)
    made = tool.compiled(["a", "b", "bad", "c", "d"], {}, 80)
    assert made.calls == ("a", "b", "c", "d")
    assert "not compiled: ptxas says no" in capsys.readouterr().err
