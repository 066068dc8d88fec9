"""Detection of a large language model takes seconds, and time that grows with the number of its nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "detection_time.py"


def measured(*layers: int, repeats: int = 1) -> dict[int, dict[str, float]]:
    """The tool's rows by layers; it fails where an attention is not found."""
    words = [sys.executable, str(TOOL), "--format", "json", "--repeats", str(repeats), "--layers", *map(str, layers)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = {r["layers"]: r for r in json.loads(done.stdout)}
    assert all(r["sites"] == n for n, r in rows.items())
    return rows


def test_32_layers_within_10_seconds() -> None:
    assert measured(32)[32]["seconds"] < 10


@pytest.mark.slow
def test_time_is_linear_in_the_layers() -> None:
    rows = measured(16, 64, repeats=3)
    assert rows[64]["nodes"] > 3.8 * rows[16]["nodes"]
    assert rows[64]["seconds"] < 5.5 * rows[16]["seconds"]
