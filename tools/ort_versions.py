"""Loads the library of kernels into every minor version of ONNX Runtime from 1.23 on, each in its own environment.

    python tools/ort_versions.py                       # the newest patch of each minor version that pip finds
    python tools/ort_versions.py 1.23.2 1.32.0         # these

In each: a bundle and a model as the target writes them, a double of the CUDA driver, ONNX Runtime's CPU provider. A run
is right if the launch's grid and arguments are those that Python computes. A bundle of a model with norms of sums in
fp16 is refused before 1.27, unless strict mode is confirmed. Needs g++; ``pip`` installs onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

FIRST = (1, 23)
ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import ctypes, json, os, sys
import numpy as np, onnxruntime as ort
folder = sys.argv[1]
case = json.load(open(folder + "/case.json"))
double = ctypes.CDLL(os.environ["ATTNCOMPILE_LIBCUDA"])
double.double_reset()
for name, kinds in case["entries"].items():
    double.double_entry(name.encode(), kinds.encode())
double.double_launch.restype = ctypes.c_void_p
options = ort.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(folder + "/libattncompile_ort.so")
old = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 27)
for entry in ("", "1"):
    strict = ort.SessionOptions()
    strict.add_session_config_entry("attncompile.bundle", folder + "/strict")
    if entry:
        strict.add_session_config_entry("attncompile.strict_norms", entry)
    try:
        strict.register_custom_ops_library(folder + "/libattncompile_ort.so")
        said = ""
    except Exception as error:
        said = str(error)
    wanted = "ONNX Runtime " + ort.__version__ + " adds up their squares in float16" if old and not entry else ""
    assert wanted in said and bool(wanted) == bool(said), (entry, said)
    if not said:
        ort.InferenceSession(folder + "/model.onnx", strict, providers=["CPUExecutionProvider"])
bad = open(folder + "/bad.onnx", "rb").read()
try:
    ort.InferenceSession(bad, options, providers=["CPUExecutionProvider"])
    refused = ""
except Exception as error:
    refused = str(error)
assert "INVALID_GRAPH" in refused, refused
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
for run in case["runs"]:
    feeds = {n: np.ones(s, np.float16) if n != "key_mask" else np.ones(s, bool) for n, s in run["shapes"].items()}
    results = session.run(None, feeds)
    assert list(results[0].shape) == run["output"] and str(results[1].dtype) == "float32", results[0].shape
    launch = ctypes.cast(double.double_launch(double.double_launched() - 1), ctypes.POINTER(ctypes.c_uint32))
    assert list(launch[:3]) == run["grid"], (list(launch[:3]), run["grid"])
    values = ctypes.cast(ctypes.addressof(launch.contents) + case["offset"], ctypes.POINTER(ctypes.c_int64))
    for place, number in run["numbers"].items():
        assert values[int(place)] == number, (place, values[int(place)], number)
try:
    session.run(None, {**feeds, "value": np.ones((1, 3, 2, 64), np.float16)})
    said = ""
except Exception as error:
    said = str(error)
assert "site: value has size" in said, said
print(ort.__version__)
"""


def case(folder: Path) -> None:
    """The files of one case in ``folder``: made once, by this environment's onnx."""
    sys.path.insert(0, str(ROOT))
    import shutil

    from attncompile import kernel_kit
    from attncompile.console import SilentProgress
    from attncompile.kernels import arguments, build, symbols
    from attncompile.kernels.bundle import Bundle
    from attncompile.runtime import library
    from attncompile.targets import onnxruntime_cuda
    from attncompile.targets.kernels import by_name
    from tests.runtime.conftest import HERE, Launch, node_model, uncompiled
    from tests.runtime.test_launches import ATTENTION

    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", str(HERE / "libcuda_double.c"), "-o", str(folder / "double.so"),
         "-lpthread"], check=True,
    )  # fmt: skip
    build.compile_all = lambda jobs, *_: [uncompiled(job) for job in jobs]  # type: ignore[assignment]
    kernel_kit.compiler.require_triton = lambda: "none"
    shapes = {"query": ["b", "n", 6, 64], "key": ["b", "m", 2, 64], "value": ["b", "m", 2, 64],
              "key_mask": ["b", 1, 1, "m"]}  # fmt: skip
    types = {**dict.fromkeys(shapes, "float16"), "key_mask": "bool", "log_sum_exp": "float32"}
    model = node_model("Attention", shapes, types, ("output", "log_sum_exp"), ATTENTION, scale=0.125, right=0)
    kit = kernel_kit.Kit((90,), SilentProgress())
    lowered = onnxruntime_cuda._launching(model, by_name(kit.compile(model)))
    kit.write(folder / "bundle")
    kit.write(folder / "strict", strict_norms=True)
    (folder / "model.onnx").write_bytes(lowered.SerializeToString())
    del lowered.graph.value_info[:]
    lowered.graph.input[0].type.tensor_type.elem_type = 16
    (folder / "bad.onnx").write_bytes(lowered.SerializeToString())
    shutil.copy(library(), folder)
    bundle = Bundle.open(folder / "bundle")
    entry = bundle.kernels(bundle.call_of("site"), 90)[0].entry
    runs = []
    for b, n, m in ((1, 1, 1), (2, 37, 53)):
        sizes = {"query": [b, n, 6, 64], "key": [b, m, 2, 64], "value": [b, m, 2, 64], "key_mask": [b, 1, 1, m]}
        numbers = {"SMS": 132, **symbols.values(bundle.symbols_of("site"), sizes)}
        runs.append({
            "shapes": sizes, "output": [b, n, 6, 64], "grid": list(arguments.grid(entry, numbers, "")),
            "numbers": {i: arguments.int32(a, numbers, "")
                        for i, a in enumerate(entry.arguments) if a.kind == "int32"},
        })  # fmt: skip
    kinds = {e.name: "".join("i" if a.kind == "int32" else "p" for a in e.arguments) for e in bundle.entries.values()}
    found = {"entries": kinds, "runs": runs, "offset": Launch.values.offset}
    (folder / "case.json").write_text(json.dumps(found), encoding="utf-8")


def newest() -> list[str]:
    """The newest patch of every minor version from ``FIRST`` on."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "onnxruntime"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for text in re.findall(r"\b\d+\.\d+\.\d+\b", said):
        major, minor, patch = map(int, text.split("."))
        if (major, minor) >= FIRST:
            found[major, minor] = max(found.get((major, minor), (-1, "")), (patch, text))
    return [text for _, (_, text) in sorted(found.items())]


def probe(version: str, folder: Path, scratch: Path) -> str:
    """An empty text, or what went wrong."""
    place = scratch / version
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"onnxruntime=={version}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        return "pip: " + done.stderr.strip().splitlines()[-1]
    environment = {
        "PATH": "/usr/bin:/bin", "ATTNCOMPILE_LIBCUDA": str(folder / "double.so"),
        "ATTNCOMPILE_TEST_PROVIDER": "CPUExecutionProvider",
    }  # fmt: skip
    done = subprocess.run(
        [python, "-c", PROBE, str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode == 0 and done.stdout.strip() == version:
        return ""
    return f"exit code {done.returncode}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*")
    wanted = parser.parse_args().versions or newest()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="attncompile-ort-") as scratch:
        folder = Path(scratch) / "case"
        folder.mkdir()
        case(folder)
        for version in wanted:
            wrong = probe(version, folder, Path(scratch))
            failed += bool(wrong)
            print(f"{version}: {wrong or 'ok'}", flush=True)
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
