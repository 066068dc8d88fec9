"""The few functions of the CUDA driver that a launch needs, each with its return code checked."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from attncompile.core.errors import KernelError, MissingDependency

_MULTIPROCESSORS, _CC_MAJOR, _CC_MINOR, _MAX_SHARED = 16, 75, 76, 97
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_ERROR_LOG, _ERROR_LOG_SIZE = 5, 6
"""CU_JIT_ERROR_LOG_BUFFER and its size: what is wrong with PTX that the driver refuses."""

_POINTER, _INT, _UINT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_TYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDriverGetVersion": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxGetCurrent": (_POINTER,),
    "cuCtxSetCurrent": (_POINTER,),
    "cuModuleLoadDataEx": (_POINTER, _POINTER, _UINT, _POINTER, _POINTER),
    "cuModuleUnload": (_POINTER,),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuLaunchKernel": (_POINTER, *(_UINT,) * 7, _POINTER, _POINTER, _POINTER),
}


class Driver:
    """The driver's library, started. Made once a process by ``driver()``."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, types in _TYPES.items():
            getattr(library, name).argtypes = types
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``name``; a ``KernelError`` with the driver's own name of what went wrong, if anything did."""
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DriverError(name, code, *self._explained(code))

    def _explained(self, code: int) -> tuple[str, str]:
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            found = ctypes.c_char_p()
            known = getattr(self._library, function)(code, ctypes.byref(found)) == 0
            texts.append(found.value.decode(errors="replace") if known and found.value else f"error {code}")
        return texts[0], texts[1]

    def version(self) -> int:
        """The newest CUDA that the driver takes, such as 13000."""
        found = _INT()
        self.call("cuDriverGetVersion", ctypes.byref(found))
        return found.value

    def device(self, index: int) -> int:
        found = _INT()
        self.call("cuDeviceGet", ctypes.byref(found), index)
        return found.value

    def attribute(self, device: int, which: int) -> int:
        found = _INT()
        self.call("cuDeviceGetAttribute", ctypes.byref(found), which, device)
        return found.value

    def capability(self, device: int) -> int:
        """Compute capability, major * 10 + minor."""
        return self.attribute(device, _CC_MAJOR) * 10 + self.attribute(device, _CC_MINOR)

    def shared_limit(self, device: int) -> int:
        """Bytes of shared memory that one block can have."""
        return self.attribute(device, _MAX_SHARED)

    def multiprocessors(self, device: int) -> int:
        return self.attribute(device, _MULTIPROCESSORS)

    def primary_context(self, device: int) -> int:
        """The context that the CUDA runtime, and so torch, uses on ``device``."""
        found = _POINTER()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(found), device)
        return found.value or 0

    def make_current(self, context: int) -> None:
        now = _POINTER()
        self.call("cuCtxGetCurrent", ctypes.byref(now))
        if now.value != context:
            self.call("cuCtxSetCurrent", context)

    def load(self, code: bytes) -> int:
        """A module from a cubin or from PTX (ending in a zero byte)."""
        found, log = _POINTER(), ctypes.create_string_buffer(4096)
        options = (_INT * 2)(_ERROR_LOG, _ERROR_LOG_SIZE)
        values = (_POINTER * 2)(ctypes.cast(log, _POINTER), _POINTER(len(log)))
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(found), code, 2, options, values)
        except DriverError as error:
            said = " ".join(log.value.decode(errors="replace").split())
            raise (error if not said else error.with_text(said)) from None
        return found.value or 0

    def function(self, module: int, name: str) -> int:
        found = _POINTER()
        self.call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
        return found.value or 0

    def allow_shared(self, function: int, size: int) -> None:
        self.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, size)

    def launch(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, stream: int, values: Any
    ) -> None:
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, values, None)


class DriverError(KernelError):
    """A function of the driver failed. ``code`` and ``error`` are the driver's (``CUDA_ERROR_INVALID_IMAGE``)."""

    def __init__(self, function: str, code: int, error: str, text: str) -> None:
        super().__init__(f"{function}: {error} ({text})", _HINTS.get(error, ""))
        self.function, self.code, self.error, self.text = function, code, error, text

    def with_text(self, text: str) -> DriverError:
        return DriverError(self.function, self.code, self.error, text)


_HINTS = {
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the driver: bundles need one of CUDA 12.8 or later",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "build the bundle for this GPU's architecture (--arch)",
    "CUDA_ERROR_INVALID_IMAGE": "build the bundle again, or update the driver",
    "CUDA_ERROR_NO_DEVICE": "see 'attncompile env'",
}


@cache
def driver() -> Driver:
    """The driver of this machine. Raises ``MissingDependency`` without one, ``DriverError`` if it does not start."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        raise MissingDependency(f"{name} is not there: no NVIDIA driver", "kernels run on NVIDIA GPUs only") from None
    return Driver(library)
