"""A double of the driver, bundles whose kernels no compiler made, sessions over both."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, TensorProto, helper

from attncompile import kernel_kit
from attncompile.console import SilentProgress
from attncompile.core.kernel import ARCHITECTURES
from attncompile.kernels import build
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.entry import Compiled, Entry
from attncompile.kernels.jobs import Job
from attncompile.runtime import layout
from attncompile.runtime.locate import library
from attncompile.targets import onnxruntime_cuda
from attncompile.targets.kernels import by_name

HERE = Path(__file__).parent
TYPES = {
    "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT,
    "bool": TensorProto.BOOL, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
}  # fmt: skip

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p), ("context", ctypes.c_void_p), ("name", ctypes.c_char * 64),
        ("count", ctypes.c_int), ("values", ctypes.c_uint64 * 160),
    )  # fmt: skip


class Double:
    """``libcuda_double.c``, compiled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.double_launch.restype = ctypes.POINTER(Launch)
        for name in ("launched", "loaded", "unloaded"):
            getattr(self._library, f"double_{name}").restype = ctypes.c_long

    def reset(self) -> None:
        self._library.double_reset()

    def expect(self, entries: Sequence[Entry]) -> None:
        """Tell which parameters the functions of ``entries`` have; those of one name must agree."""
        for entry in {e.name: e for e in entries}.values():
            kinds = "".join("i" if a.kind == "int32" else "p" for a in entry.arguments)
            self._library.double_entry(entry.name.encode(), kinds.encode())

    def fail(self, name: str, code: int = 209, after: int = 0) -> None:
        self._library.double_fail(name.encode(), code, ctypes.c_long(after))

    def device(self, capability: int = 90, shared: int = 232448, sms: int = 132, cuda: int = 13000) -> None:
        self._library.double_device(capability, shared, sms, cuda)

    def count(self, what: str) -> int:
        return int(getattr(self._library, f"double_{what}")())

    def last(self) -> Launch:
        assert self.count("launched")
        return self._library.double_launch(ctypes.c_long(self.count("launched") - 1)).contents


@pytest.fixture(scope="session")
def compiled_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("double") / "libcuda_double.so"
    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(HERE / "libcuda_double.c"),
         "-o", str(out), "-lpthread"],
        check=True,
    )  # fmt: skip
    return out


@pytest.fixture
def double(compiled_double: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    monkeypatch.setenv("ATTNCOMPILE_LIBCUDA", str(compiled_double))
    monkeypatch.setenv("ATTNCOMPILE_TEST_PROVIDER", "CPUExecutionProvider")
    found = Double(compiled_double)
    found.reset()
    return found


def elf(what: bytes) -> bytes:
    """A file of the form of a cubin, whose one section holds ``what``."""
    end = 64 + len(what)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02" + bytes(11), 2, 190, 1, 0, 0, end, 0, 64, 56, 0, 64, 1, 0)
    return head + what + struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, 64, len(what), 0, 0, 1, 0)


def uncompiled(job: Job) -> Compiled:
    """What the compiler would say of a program, with made-up code: arguments, grid and constants are the real ones."""
    p = job.program
    name = "k" + hashlib.sha256(repr((p, job.architecture)).encode()).hexdigest()[:12]
    entry = Entry(
        op=p.op, dtype=p.dtype, head_dim=p.head_dim, value_dim=p.value_dim or p.head_dim, architecture=job.architecture,
        tactic=p.tactic, abi=p.abi, language=p.language, name=name, arguments=p.arguments, grid=p.grid,
        constants=p.constants, warps=p.warps, shared=1024 if p.rank else 60_000, registers=1, spills=0,
        serialized=False, hidden=0, specific=job.architecture >= 90, ptx_version=87,
    )  # fmt: skip
    return Compiled(entry, f"// {name}\n", elf(name.encode()))


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are made up by ``uncompiled`` instead of compiled."""
    monkeypatch.setattr(build, "compile_all", lambda jobs, *_: [uncompiled(job) for job in jobs])
    monkeypatch.setattr(kernel_kit.compiler, "require_triton", lambda: "none")


@dataclass
class Made:
    """A folder as the target writes it, and what the bundle's own reader says of it."""

    folder: Path
    model: ModelProto
    bundle: Bundle

    def options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self.folder / layout.LIBRARY))
        return options

    def session(self) -> Any:
        import onnxruntime

        return onnxruntime.InferenceSession(
            self.model.SerializeToString(), self.options(), providers=["CPUExecutionProvider"]
        )

    @property
    def record(self) -> str:
        (node,) = [n for n in self.model.graph.node if n.domain == layout.DOMAIN]
        return next(a.s.decode() for a in node.attribute if a.name == layout.RECORD)


Maker = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path, no_triton: None) -> Maker:
    """Lower a model whose nodes are ours and put bundle and library beside it."""
    count = iter(range(1000))

    def make(model: ModelProto, architectures: Sequence[int] = ARCHITECTURES) -> Made:
        kit = kernel_kit.Kit(architectures, SilentProgress())
        kernels = kit.compile(model)
        assert not [k.reason for k in kernels if k.reason]
        folder = tmp_path / f"out{next(count)}"
        folder.mkdir()
        kit.write(folder / layout.BUNDLE)
        shutil.copy(library(), folder / layout.LIBRARY)
        return Made(folder, onnxruntime_cuda._launching(model, by_name(kernels)), Bundle.open(folder / layout.BUNDLE))

    return make


def node_model(
    op: str, shapes: Mapping[str, Sequence[int | str]], types: Mapping[str, str], outputs: Sequence[str] = ("output",),
    order: Sequence[str] = (), **attributes: Any,
) -> ModelProto:  # fmt: skip
    """A model of one node called ``site``. ``order``: all formal inputs; those without a shape are left out."""
    names = list(order or shapes)
    while names and names[-1] not in shapes:
        names.pop()
    node = helper.make_node(
        op, [n if n in shapes else "" for n in names], list(outputs), "site", domain="attncompile", **attributes
    )
    values = [helper.make_tensor_value_info(n, TYPES[types[n]], list(shapes[n])) for n in names if n in shapes]
    results = [helper.make_tensor_value_info(o, TYPES[types.get(o, types[names[0]])], None) for o in outputs]
    graph = helper.make_graph([node], "one", values, results)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("attncompile", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
