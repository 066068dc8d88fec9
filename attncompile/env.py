"""The machine and the software at hand, told without importing a framework.

Package versions are read from installed metadata, GPUs through the CUDA driver's C interface; ``torch``, ``triton``
and ``tensorrt`` are never imported to print this.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncompile import __version__
from attncompile.core.verdict import Verdict

PACKAGES = (
    "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "polygraphy", "tensorrt",
    "tensorrt-rtx-cu13", "torch", "triton", "transformers", "diffusers", "timm",
)  # fmt: skip
"""Distributions whose versions a report records."""

_CC_MAJOR, _CC_MINOR = 75, 76
"""CUDA driver attributes: compute capability."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device; ``capability`` is (major, minor), ``memory`` in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "capability": list(self.capability), "memory_bytes": self.memory}


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a report was made. ``threads`` is what this process may use at once, ``memory`` in bytes (0: unknown).

    ``cuda_driver`` is the newest CUDA version that the driver takes, such as ``13.0``, or empty without a driver.
    """

    attncompile: str
    python: str
    platform: str
    cpu: str
    cores: int
    threads: int
    memory: int
    packages: Mapping[str, str]
    gpus: tuple[Gpu, ...] = ()
    cuda_driver: str = ""
    targets: Mapping[str, Verdict] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "attncompile": self.attncompile, "python": self.python, "platform": self.platform, "cpu": self.cpu,
            "cores": self.cores, "threads": self.threads, "memory_bytes": self.memory,
            "packages": dict(self.packages), "gpus": [g.to_json() for g in self.gpus],
            "cuda_driver": self.cuda_driver,
            "targets": {
                name: {"ok": v.ok, "code": v.code, "reason": v.reason, "hint": v.hint}
                for name, v in self.targets.items()
            },
        }  # fmt: skip


def environment(threads: int | None = None) -> Environment:
    """This machine now. ``threads`` overrides the number of usable cores where the user gave one."""
    driver, gpus = cuda()
    return Environment(
        attncompile=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=threads or usable_cores(),
        memory=_memory(),
        packages=package_versions(),
        gpus=gpus,
        cuda_driver=driver,
        targets=target_verdicts(),
    )


def package_versions() -> dict[str, str]:
    """Version of every installed distribution in ``PACKAGES``."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


@functools.cache
def cuda() -> tuple[str, tuple[Gpu, ...]]:
    """(newest CUDA version the driver takes, devices); ('', ()) without a driver, and no devices if it cannot start."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return "", ()
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "", ()
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return text, ()
    found = (_gpu(driver, index) for index in range(count.value))
    return text, tuple(gpu for gpu in found if gpu is not None)


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    status = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if status != 0:
        return None
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), memory.value)


def has_gpu() -> bool:
    """Whether the CUDA driver starts and sees a device."""
    return bool(cuda()[1])


def target_verdicts() -> dict[str, Verdict]:
    """For every target, whether it could be used here, judged without importing anything."""
    gpu = has_gpu()
    verdicts = {"onnx": Verdict.yes("always written; needs nothing")}
    if not installed("tensorrt_rtx"):
        verdicts["tensorrt-rtx"] = Verdict.no(
            "not_installed", "tensorrt_rtx is not installed", "pip install 'attncompile[rtx]'"
        )
    else:
        verdicts["tensorrt-rtx"] = Verdict.yes("engines are built on the CPU and run on RTX GPUs")
    if not installed("triton"):
        verdicts["onnxruntime-cuda"] = Verdict.no(
            "not_installed", "triton, which compiles the kernels, is not installed", "pip install 'attncompile[gpu]'"
        )
    else:
        verdicts["onnxruntime-cuda"] = Verdict.yes("kernels are compiled without a GPU, and run with onnxruntime-gpu")
    if not installed("tensorrt"):
        verdicts["tensorrt"] = Verdict.no(
            "not_installed", "tensorrt is not installed", "pip install 'attncompile[tensorrt]'"
        )
    elif not gpu:
        verdicts["tensorrt"] = Verdict.no("no_gpu", "no CUDA device", "build on the machine with the GPU")
    else:
        verdicts["tensorrt"] = Verdict.yes("installed, and there is a CUDA device")
    return verdicts


def default_target() -> str:
    """The target of a run without ``--target``: ``tensorrt`` if it imports and there is a GPU, else ``tensorrt-rtx``
    if it imports, else ``onnx``. A package that is installed but does not import does not count.
    """
    if has_gpu() and imports("tensorrt"):
        return "tensorrt"
    if imports("tensorrt_rtx"):
        return "tensorrt-rtx"
    return "onnx"


def installed(module: str) -> bool:
    """Whether a top-level module can be found; does not import it."""
    return importlib.util.find_spec(module) is not None


def imports(module: str) -> bool:
    """Whether a top-level module is found and imports. Native libraries may be missing though the package is there:
    the wheels of TensorRT on the public index are such stubs.
    """
    if not installed(module):
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
