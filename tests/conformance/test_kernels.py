"""Triton kernels in the interpreter, on poisoned outputs, within their type's budget; planted errors are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
PARTS = 2
"""Processes an op."""

EXPECTED = {"Attention": 100, "NeighborhoodAttention": 60, "BlockSparseAttention": 60}
"""Fewer cases than that would mean that some were lost."""


def interpreted(op: str) -> dict[str, str]:
    """What is wrong with each case of ``op``."""
    command = [sys.executable, "-m", "tests.conformance.interpret", op]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([*command, str(n), str(PARTS)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for n in range(PARTS)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    found = [json.loads(line) for output in outputs for line in output.splitlines()]
    return {one["name"]: one["wrong"] for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("op", EXPECTED)
def test_kernels_in_the_interpreter(op: str) -> None:
    found = interpreted(op)
    planted = {name: said for name, said in found.items() if name.startswith("planted: ")}
    wrong = {name: said for name, said in found.items() if said and name not in planted}
    assert not wrong
    assert [name for name, said in planted.items() if not said] == []
    assert len(found) >= EXPECTED[op] and len(planted) >= 12
