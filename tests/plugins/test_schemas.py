"""Schemas of ours beside onnx's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from attncompile.plugins import kernels
for kernel in kernels().values():
    kernel.register()
import onnx
assert onnx.defs.has("Attention", domain="attncompile") and onnx.defs.has("Attention", domain="")
import onnx.reference
import attncompile.pipeline
"""


def test_onnx_reference_is_importable_after_our_ops() -> None:
    """It refuses two ops of one name when it is first imported."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert ran.returncode == 0, ran.stderr
