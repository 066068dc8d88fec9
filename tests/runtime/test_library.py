"""What can go wrong is one status that names the node or the file, and says what to do; through ONNX Runtime itself."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attncompile.core.errors import MissingDependency
from attncompile.runtime import build, layout, locate
from attncompile.runtime.locate import library
from tests.runtime.conftest import Double, Made, Maker, needs_compiler, node_model

pytestmark = needs_compiler

SHAPES = {"query": ["b", "n", 4, 64], "key": ["b", "m", 4, 64], "value": ["b", "m", 4, 64]}


@pytest.fixture
def made(make: Maker, double: Double) -> Made:
    found = make(node_model("Attention", SHAPES, dict.fromkeys(SHAPES, "float16"), scale=0.125), (80, 90))
    double.expect(list(found.bundle.entries.values()))
    return found


def feeds(b: int = 1, n: int = 5, m: int = 7) -> dict[str, Any]:
    return {x: np.zeros((b, n if x == "query" else m, 4, 64), np.float16) for x in SHAPES}


def refused(made: Made, text: str) -> None:
    with pytest.raises(Exception, match=text):
        made.session()


def cubins(made: Made) -> list[Path]:
    return sorted((made.folder / layout.BUNDLE / "kernels").glob("*.cubin"))


def test_no_bundle(made: Made) -> None:
    shutil.rmtree(made.folder / layout.BUNDLE)
    refused(made, r"bundle is no bundle of kernels: .*bundle.json: No such file.*hint: compile the model again")


def test_a_bundle_that_was_cut_off_or_edited(made: Made) -> None:
    index = made.folder / layout.BUNDLE / layout.INDEX
    whole = index.read_text(encoding="utf-8")
    index.write_text(whole[: len(whole) // 2], encoding="utf-8")
    refused(made, r"bundle.json: no JSON at byte \d+")
    index.write_text(whole.replace('"threads": 128', '"threads": 256'), encoding="utf-8")
    refused(made, r"bundle.json: entry [0-9a-f]{16} was changed")
    index.write_text(whole.replace('"format": 1', '"format": 2'), encoding="utf-8")
    refused(made, "bundle.json: its format is 2, this library reads 1")
    index.write_text(whole, encoding="utf-8")
    made.session()


def test_a_cubin_that_was_cut_off_or_is_missing(made: Made) -> None:
    for path in cubins(made):
        path.write_bytes(path.read_bytes()[:-1])
    refused(made, r"site: .*\.cubin: its contents are not those of the index \(\d+ bytes\).*compile the model again")
    for path in cubins(made):
        path.unlink()
    refused(made, r"site: .*\.cubin: No such file")


def test_a_bundle_of_another_model(made: Made, make: Maker) -> None:
    other = make(node_model("Attention", SHAPES, dict.fromkeys(SHAPES, "bfloat16"), scale=0.125), (80,))
    shutil.rmtree(made.folder / layout.BUNDLE)
    shutil.copytree(other.folder / layout.BUNDLE, made.folder / layout.BUNDLE)
    refused(made, r"Attention_[0-9a-f]{16}")


def test_another_dtype_is_no_valid_graph(made: Made) -> None:
    for value in made.model.graph.input:
        value.type.tensor_type.elem_type = 16
    del made.model.graph.value_info[:]
    refused(made, "INVALID_GRAPH")


def test_a_provider_that_is_not_there(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNCOMPILE_TEST_PROVIDER")
    refused(made, "NOT_IMPLEMENTED")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ({"capability": 75}, r"site: .*bundle.json has no kernel of Attention that runs on sm_75.*--arch 75"),
        ({"capability": 80, "shared": 500}, r"site: Attention .* needs \d+ bytes of shared memory, the GPU has 500"),
        ({"cuda": 11080}, r"site: the NVIDIA driver is too old: it is one of CUDA 11.8 .*CUDA 12.8 or later"),
    ],
)
def test_a_device_without_a_kernel(made: Made, double: Double, device: dict[str, int], said: str) -> None:
    double.device(**device)
    refused(made, said)
    double.device()
    made.session()


def test_less_shared_memory_takes_the_next_tactic(made: Made, double: Double) -> None:
    double.device(capability=80, shared=48 << 10)
    session = made.session()
    session.run(None, feeds())
    assert double.last().shared == 1024


def test_no_driver(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_LIBCUDA", "libcuda_that_is_not_there.so")
    refused(made, "site: libcuda_that_is_not_there.so cannot be loaded: there is no NVIDIA driver .*NVIDIA GPUs only")


def test_a_driver_that_refuses_code(made: Made, double: Double) -> None:
    double.device(cuda=12040)
    double.fail("cuModuleLoadDataEx", 222)
    refused(made, r"site: cuModuleLoadDataEx: CUDA_ERROR_UNSUPPORTED_PTX_VERSION.*update the NVIDIA driver")


def test_bad_shapes(made: Made) -> None:
    session = made.session()
    for given, said in (
        ({"key": (1, 7, 4, 64), "value": (1, 8, 4, 64)}, "value has size 8 on axis 1, not NK = 7"),
        ({"key": (2, 7, 4, 64), "value": (1, 7, 4, 64)}, "key has size 2 on axis 0, not B = 1"),
    ):
        bad = {**feeds(), **{name: np.zeros(shape, np.float16) for name, shape in given.items()}}
        with pytest.raises(Exception, match=f"site: {said}"):
            session.run(None, bad)
    session.run(None, feeds())


def test_nothing_to_do_launches_nothing(made: Made, double: Double) -> None:
    session = made.session()
    assert session.run(None, feeds(n=0))[0].shape == (1, 0, 4, 64)
    assert session.run(None, feeds(b=0))[0].shape == (0, 5, 4, 64)
    assert double.count("launched") == 0


def test_too_large(made: Made, double: Double) -> None:
    """65,536 batch entries: the smallest arrays that no grid has room for are those of empty heads' rows."""
    double.device(capability=80)
    session = made.session()
    with pytest.raises(Exception, match="site: a grid of 65536 blocks on axis z; CUDA has at most 65535"):
        session.run(None, feeds(b=65536, n=1, m=0))


def test_a_pointer_that_is_not_aligned(made: Made) -> None:
    import onnxruntime

    session = made.session()
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds().items()}
    memory = np.zeros(5 * 4 * 64 + 64, np.float16)
    start = (memory.ctypes.data % 16) // 2
    moved = memory[start + 1 :][: 5 * 4 * 64].reshape(1, 5, 4, 64)
    assert moved.ctypes.data % 16
    binding = session.io_binding()
    for name, x in given.items():
        binding.bind_ortvalue_input(name, x)
    binding.bind_input("query", "cpu", 0, np.float16, moved.shape, moved.ctypes.data)
    binding.bind_output("output")
    with pytest.raises(Exception, match=r"site: query at 0x[0-9a-f]+ is not a multiple of 16 bytes.*memory of its own"):
        session.run_with_iobinding(binding)


def test_two_bundles_in_one_process(made: Made, make: Maker, double: Double) -> None:
    """One library serves both: the session's option says where a bundle is."""
    import onnxruntime

    gc.collect()  # sessions of other tests
    shapes = {name: [*sizes[:3], 72] for name, sizes in SHAPES.items()}
    other = make(node_model("Attention", shapes, dict.fromkeys(shapes, "float16"), scale=0.125), (80,))
    double.expect(list(other.bundle.entries.values()))
    sessions = []
    for one in (made, other, made):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(layout.BUNDLE_KEY, str(one.folder / layout.BUNDLE))
        options.register_custom_ops_library(str(library()))
        sessions.append(
            onnxruntime.InferenceSession(one.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        )
    names = []
    for session, dim in zip(sessions, (64, 72, 64), strict=True):
        session.run(None, {name: np.zeros((1, 3, 4, dim), np.float16) for name in SHAPES})
        names.append(double.last().name.decode())
    assert names[0] == names[2] != names[1]
    assert double.count("loaded") == 2
    before = double.count("unloaded")
    del sessions, session
    gc.collect()
    assert double.count("unloaded") == before + 2


def test_a_bundle_that_is_written_again_is_read_again(made: Made, make: Maker, double: Double) -> None:
    double.device(capability=80)
    made.session()
    again = make(node_model("Attention", SHAPES, dict.fromkeys(SHAPES, "float16"), scale=0.125), (90,))
    shutil.rmtree(made.folder / layout.BUNDLE)
    shutil.copytree(again.folder / layout.BUNDLE, made.folder / layout.BUNDLE)
    refused(made, "no kernel of Attention that runs on sm_80")


def test_a_session_that_outlives_the_statics(made: Made, tmp_path: Path) -> None:
    """A process that never lets go of its session ends in peace."""
    path = made.folder / layout.MODEL
    path.write_bytes(made.model.SerializeToString())
    code = (
        "import ctypes, os, onnxruntime as o\n"
        "double = ctypes.CDLL(os.environ['ATTNCOMPILE_LIBCUDA'])\n"
        + "".join(f"double.double_entry(b'{e.name}', b'p')\n" for e in made.bundle.entries.values())
        + "options = o.SessionOptions()\n"
        f"options.register_custom_ops_library({str(made.folder / layout.LIBRARY)!r})\n"
        f"session = o.InferenceSession({str(path)!r}, options, providers=['CPUExecutionProvider'])\n"
        "import builtins; builtins.kept = [session, options]; kept.append(kept)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_gives_away_one_name_only() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    said = subprocess.run(["nm", "-D", "--defined-only", str(library())], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in said.stdout.splitlines()] == ["RegisterCustomOps"]


def test_it_compiles_without_a_warning() -> None:
    unit = "".join(f'#include "{path.name}"\n' for path in sorted(build.SOURCES.glob("*.cpp")))
    command = ["g++", "-std=c++17", *build.WARNINGS, "-Werror", "-fsyntax-only", f"-I{build.SOURCES}", "-x", "c++", "-"]
    done = subprocess.run(command, input=unit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(locate.build, "NAME", "not_in_the_package.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependency, match="no C\\+\\+ compiler: install g\\+\\+") as caught:
        library()
    assert "no CUDA toolkit" in caught.value.hint
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(MissingDependency, match="false failed: it said nothing"):
        library()
