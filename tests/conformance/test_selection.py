"""The kernels that choose blocks, in the interpreter; planted errors are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.selection import CASES

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_selection_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.conformance.select_interpret"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=True)
    found = {one["name"]: one["wrong"] for one in map(json.loads, done.stdout.splitlines())}
    planted = {name: said for name, said in found.items() if name.startswith("planted: ")}
    assert {name: said for name, said in found.items() if said and name not in planted} == {}
    assert [name for name, said in planted.items() if not said] == []
    assert len(planted) >= 24 and len(found) - len(planted) >= len(CASES) + 7
