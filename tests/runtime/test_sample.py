"""The C++ sample, compiled against ONNX Runtime's own headers and run on the CPU. The headers are in no wheel: Debian
and Ubuntu have them as ``libonnxruntime-dev``; ``ONNXRUNTIME_INCLUDE`` names another folder.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from attncompile import pipeline
from attncompile.pipeline import Options
from tests.runtime.conftest import needs_compiler
from tests.runtime.test_fusions import with_packed

pytestmark = pytest.mark.usefixtures("brief")
ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "attncompile/runtime/samples/run.cpp"
HEADERS = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
needs_headers = pytest.mark.skipif(
    LIBRARY is None or not (HEADERS / "onnxruntime_cxx_api.h").is_file(), reason="needs libonnxruntime-dev"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    assert LIBRARY is not None
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(LIBRARY)
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", str(HEADERS), str(SAMPLE), f"-L{folder}",
         "-lonnxruntime", f"-Wl,-rpath,{folder}", "-o", str(folder / "run")],
        check=True,
    )  # fmt: skip
    return folder / "run"


@needs_compiler
@needs_headers
def test_a_folder_in_cpp(program: Path, tmp_path: Path, no_triton: None) -> None:
    given: dict[str, Any] = {"target": "onnxruntime-cuda", "precision": "fp16", "architectures": (80,)}
    result = pipeline.compile(with_packed(tmp_path), Options(out=tmp_path / "out", keep_slower=True, **given))
    assert result.exit_code == 0
    done = subprocess.run([program, tmp_path / "out", "--cpu"], capture_output=True, text=True)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    zeros = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
    (wanted,) = session.run(None, zeros)
    assert done.returncode == 0, done.stderr
    *sizes, word, total = done.stdout.split()
    assert [int(n) for n in sizes] == list(wanted.shape) and word == "sum"
    assert abs(float(total) - wanted.sum()) <= 1e-4 * max(1.0, np.abs(wanted).sum())
    # Here is no CUDA provider: one line that says so, as for a folder that is not there.
    for arguments in ([tmp_path / "out"], [tmp_path / "none", "--cpu"]):
        failed = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert failed.returncode == 1 and failed.stderr.startswith("error: ")


def test_the_docs_show_what_is_compiled() -> None:
    """Line by line, but for white space."""
    text = (ROOT / "docs/onnxruntime.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    lines = {" ".join(line.split()) for line in SAMPLE.read_text(encoding="utf-8").splitlines()}
    wanted = [" ".join(line.split()) for line in shown.splitlines() if line.strip()]
    assert wanted and [line for line in wanted if line not in lines] == []
