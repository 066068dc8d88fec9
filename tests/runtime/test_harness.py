"""The library under sanitizers: every call of the driver fails in turn, files are damaged byte by byte, threads."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from attncompile.runtime import build, layout
from tests.runtime.conftest import HERE, Maker, needs_compiler, node_model

pytestmark = needs_compiler

FLAGS = {
    "address": ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O0", "-g", "-fsanitize=thread"),
    "allocations": ("-O0", "-DCOUNT_ALLOCATIONS"),
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("harness")}


def built(harness: dict[str, Path], kind: str) -> Path:
    if kind not in harness:
        out = harness["folder"] / kind
        # The double of ONNX Runtime casts functions to pointers to data and back, as the real table does.
        command = [
            "g++", "-std=c++17", *build.WARNINGS, "-Wno-pedantic", "-Werror", *FLAGS[kind], f"-I{build.SOURCES}",
            str(HERE / "harness.cpp"), "-ldl", "-lpthread", "-o", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if "cannot find -l" in done.stderr:
            pytest.skip(f"this compiler has no {kind} sanitizer")
        assert done.returncode == 0, done.stderr[-3000:]
        harness[kind] = out
    return harness[kind]


def run(
    program: Path, mode: str, make: Maker, compiled_double: Path, tmp_path: Path, strict_norms: bool = False
) -> str:  # fmt: skip
    shapes = {"query": ["b", "n", 4, 64], "key": ["b", "m", 4, 64], "value": ["b", "m", 4, 64]}
    model = node_model("Attention", shapes, dict.fromkeys(shapes, "float16"), scale=0.125, left=9, right=0)
    made = make(model, (80,))
    shorten(made.folder / layout.BUNDLE / layout.INDEX, strict_norms)
    record = tmp_path / "record.json"
    record.write_text(made.record, encoding="utf-8")
    environment = {
        **os.environ, "ATTNCOMPILE_LIBCUDA": str(compiled_double), "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=1",
    }  # fmt: skip
    done = subprocess.run(
        [str(program), mode, str(made.folder / layout.BUNDLE), str(record)], env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def shorten(path: Path, strict_norms: bool) -> None:
    """One kernel is enough, and every byte of the index costs time."""
    index = json.loads(path.read_text(encoding="utf-8"))
    index |= {layout.STRICT: True} if strict_norms else {}
    index["entries"], index["nodes"] = [max(index["entries"], key=lambda e: e["shared"])], []
    (call,) = index["calls"]
    call["kernels"] = [{"architecture": 80, "rank": 0, "entry": index["entries"][0]["id"]}]
    path.write_text(json.dumps(index, separators=(",", ":")), encoding="utf-8")


def test_every_call_of_the_driver_fails_in_turn(
    harness: dict[str, Path], make: Maker, compiled_double: Path, tmp_path: Path
) -> None:
    said = run(built(harness, "address"), "inject", make, compiled_double, tmp_path).splitlines()
    for line, name in zip(
        said,
        ("cuCtxGetCurrent", "cuCtxGetId", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadDataEx",
         "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"),
        strict=False,
    ):  # fmt: skip
        assert line.startswith(f"node: {name}: CUDA_ERROR_NO_BINARY_FOR_GPU (no kernel image"), line
        assert "--arch" in line


def test_damaged_files(harness: dict[str, Path], make: Maker, compiled_double: Path, tmp_path: Path) -> None:
    run(built(harness, "address"), "fuzz", make, compiled_double, tmp_path)


def test_a_run_allocates_nothing(harness: dict[str, Path], make: Maker, compiled_double: Path, tmp_path: Path) -> None:
    said = run(built(harness, "allocations"), "allocations", make, compiled_double, tmp_path)
    assert "allocations in 1000 runs: 0" in said


@pytest.mark.parametrize("marked", [True, False], ids=["its own bundle", "the bundle of another model"])
def test_norms_in_float16_before_1_27(
    harness: dict[str, Path], make: Maker, compiled_double: Path, tmp_path: Path, marked: bool
) -> None:
    """Refused without the entry: where the bundle says it, when the library is registered; where only a node does, when
    the session is made. Nothing else is.
    """
    said = run(built(harness, "address"), "norms", make, compiled_double, tmp_path, marked).splitlines()
    found = {(version, entry): rest for version, entry, *rest in (line.split("|") for line in said)}
    assert len(found) == len(said) == 18
    for (version, entry), rest in found.items():
        if version in ("1.27.0", "1.100.1", "2.0.0") or entry == "1":
            assert rest == ["", "", ""], (version, entry)
            continue
        what = f"the model has norms of sums in float16, and ONNX Runtime {version} adds up their squares in float16"
        *passed, refused = rest
        assert passed == ([] if marked else ["", ""]), (version, entry)
        where = r".*/bundle\.json" if marked else "node"
        assert re.match(rf"{where}: {re.escape(what)} \(hint: ", refused), refused
        for remedy in ("enable_skip_layer_norm_strict_mode=1", "attncompile.strict_norms=1", "1.27", "--no-half-norms"):
            assert remedy in refused


@pytest.mark.slow
def test_threads_and_contexts(harness: dict[str, Path], make: Maker, compiled_double: Path, tmp_path: Path) -> None:
    """Three kernels of one call in three contexts: a module a context, however many threads come at once."""
    said = run(built(harness, "thread"), "threads", make, compiled_double, tmp_path)
    assert "modules 4" in said  # the first session had one too
