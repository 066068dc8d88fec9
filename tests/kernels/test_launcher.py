"""The launcher over a double of the driver: what is passed, in which order, and what is refused before."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from attncompile.core.errors import AttncompileError, KernelError, MissingDependency, Unsupported
from attncompile.core.kernel import Argument
from attncompile.kernels import cubin, driver, launcher
from attncompile.kernels.driver import DriverError
from attncompile.kernels.launcher import Launcher, best_for, form_for
from tests.kernels.conftest import made_up

SIZES = {"B": 2, "H": 6, "NQ": 130, "query_stride_N": 48}
ADDRESSES = {"query": 0x1000, "output": 0x2000}


class Library:
    """A double of libcuda that notes every call; ``fails`` names the function that gives ``code``."""

    def __init__(self, fails: str = "", code: int = 209) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._fails, self._code = fails, code

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            if name == self._fails:
                return self._code
            target = getattr(arguments[0], "_obj", None) if arguments else None
            if name in ("cuGetErrorName", "cuGetErrorString"):
                text = b"CUDA_ERROR_NO_BINARY_FOR_GPU" if name == "cuGetErrorName" else b"no kernel image"
                arguments[1]._obj.value = text if arguments[0] == 209 else None
                return 0 if arguments[0] == 209 else 1
            if name == "cuDeviceGetAttribute":
                target.value = {75: 9, 76: 0, 97: 227 << 10, 16: 132}[arguments[1]]
            elif name == "cuLaunchKernel":
                values = arguments[9]
                self.values = [ctypes.cast(v, ctypes.POINTER(ctypes.c_uint64)).contents.value for v in values]
            elif target is not None:
                target.value = 7
            return 0

        self.__dict__[name] = call
        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [a for n, a in self.calls if n == name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(launcher, "driver", lambda: driver.Driver(found))
    monkeypatch.setattr(cubin, "check", lambda data: None)
    return found


def test_a_launch(library: Library) -> None:
    function = Launcher().prepare(made_up(90))
    function.launch(SIZES, ADDRESSES, stream=99)
    (call,) = library.named("cuLaunchKernel")
    assert call[1:9] == (3, 6, 2, 128, 1, 1, 1024, 99), "grid, block, shared bytes, stream"
    query, rows, output = library.values
    assert (query, rows & 0xFFFFFFFF, output) == (0x1000, 2 * 130 * 48, 0x2000)
    assert not library.named("cuFuncSetAttribute")


def test_a_launch_is_made_again_and_kernels_are_loaded_once(library: Library) -> None:
    device = Launcher()
    assert device.prepare(made_up(90)) is device.prepare(made_up(90))
    launch = device.prepare(made_up(90)).bind(SIZES, ADDRESSES)
    launch(1)
    launch(2)
    assert [c[8] for c in library.named("cuLaunchKernel")] == [1, 2]
    assert len(library.named("cuModuleLoadDataEx")) == 1


def test_more_shared_memory_is_asked_for(library: Library) -> None:
    Launcher().prepare(made_up(90, shared=100_000))
    assert [a[1:] for a in library.named("cuFuncSetAttribute")] == [(8, 100_000)]
    with pytest.raises(Unsupported, match="needs 240000 bytes of shared memory, the GPU has 232448"):
        Launcher().prepare(made_up(90, shared=240_000))


def test_a_device_gives_its_multiprocessors(library: Library) -> None:
    Launcher().prepare(made_up(90, grid=("min(SMS, 1000)", "1", "1"))).launch(SIZES, ADDRESSES)
    assert library.named("cuLaunchKernel")[0][1] == 132


def test_an_empty_grid_launches_nothing(library: Library) -> None:
    Launcher().prepare(made_up(90)).launch({**SIZES, "NQ": 0}, ADDRESSES)
    assert not library.named("cuLaunchKernel")


@pytest.mark.parametrize(
    ("sizes", "addresses", "said"),
    [
        ({"NQ": 2**31}, {}, r"decoder.0: argument rows = B \* NQ \* query_stride_N is 206158430208, which is no int32"),
        ({"B": 65536, "NQ": 1}, {}, "decoder.0: a grid of 65536 blocks on axis z; CUDA has at most 65535"),
        ({}, {"query": 0x1008}, "decoder.0: query at 0x1008 is not a multiple of 16 bytes"),
        ({}, {"output": None}, "decoder.0: no pointer for output"),
    ],
)
def test_nothing_wraps(library: Library, sizes: dict[str, int], addresses: dict[str, Any], said: str) -> None:
    pointers = {n: a for n, a in {**ADDRESSES, **addresses}.items() if a is not None}
    with pytest.raises(KernelError, match=said):
        Launcher().prepare(made_up(90)).bind({**SIZES, **sizes}, pointers, "decoder.0")


def test_the_edge_of_an_int32(library: Library) -> None:
    entry = made_up(90, arguments=(Argument("x", "int32", expression="NQ - 1"),), grid=("1", "1", "1"))
    Launcher().prepare(entry).launch({"NQ": 2**31}, {})
    assert library.values[0] & 0xFFFFFFFF == 2**31 - 1
    with pytest.raises(KernelError, match="no int32"):
        Launcher().prepare(entry).launch({"NQ": 2**31 + 1}, {})


def test_scratch_is_refused(library: Library) -> None:
    with pytest.raises(Unsupported, match="needs scratch memory"):
        Launcher().prepare(made_up(90, hidden=2, abi="tma"))


def test_errors_have_the_drivers_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin, "check", lambda data: None)
    for fails in ("cuModuleLoadDataEx", "cuModuleGetFunction", "cuDevicePrimaryCtxRetain", "cuInit", "cuDeviceGet"):
        monkeypatch.setattr(launcher, "driver", lambda fails=fails: driver.Driver(Library(fails)))
        with pytest.raises(DriverError, match=rf"{fails}: CUDA_ERROR_NO_BINARY_FOR_GPU \(no kernel image\)") as caught:
            Launcher().prepare(made_up(90))
        assert caught.value.code == 209 and "--arch" in caught.value.hint
    monkeypatch.setattr(launcher, "driver", lambda: driver.Driver(Library("cuModuleLoadDataEx", 9999)))
    with pytest.raises(DriverError, match="error 9999"):
        Launcher().prepare(made_up(90))


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver.driver.cache_clear()
    with pytest.raises(MissingDependency, match="no NVIDIA driver"):
        Launcher()


def test_which_code_runs_where() -> None:
    entries = {a: made_up(a).entry for a in (80, 86, 89, 90, 100, 120)}
    forms = {
        (80, 80): "cubin", (80, 86): "cubin", (80, 89): "cubin", (80, 90): "ptx", (80, 120): "ptx", (86, 89): "cubin",
        (89, 90): "ptx", (90, 90): "cubin", (120, 120): "cubin",
    }  # fmt: skip
    for (made_for, capability), form in forms.items():
        assert form_for(entries[made_for], capability) == form
    for made_for, capability in ((86, 80), (90, 100), (90, 120), (120, 121), (100, 103), (80, 75)):
        with pytest.raises(Unsupported):
            form_for(entries[made_for], capability)
    everything = list(entries.values())
    best = {c: [e.architecture for e in best_for(everything, c)] for c in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)}
    assert best == {75: [], 80: [80], 86: [86], 87: [86], 89: [89], 90: [90], 100: [100], 103: [89], 120: [120],
                    121: [89]}  # fmt: skip


def elf(sections: int = 1, size: int = 100) -> bytes:
    """A small file of the form of a cubin: header, a section of ``size`` bytes, the table of sections."""
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02" + bytes(11), 2, 190, 1, 0, 0, 64 + size, 0, 64, 56, 0, 64,
                       sections, 0)  # fmt: skip
    return head + bytes(size) + struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, 64, size, 0, 0, 1, 0) * sections


def test_the_outer_form_of_a_cubin() -> None:
    cubin.check(elf())
    for length in (0, 10, 64, 100, len(elf()) - 1):
        with pytest.raises(AttncompileError, match="the cubin is damaged"):
            cubin.check(elf()[:length])
    for wrong in (b"PK" + elf()[2:], elf()[:18] + b"\x03\x00" + elf()[20:]):
        with pytest.raises(KernelError):
            cubin.check(wrong)
