"""Launch compiled kernels from Python through the CUDA driver. Needs the driver's library, no toolkit and no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

from attncompile.core.errors import KernelError, Unsupported
from attncompile.core.kernel import Program
from attncompile.kernels import cubin
from attncompile.kernels import symbols as symbols_of
from attncompile.kernels.arguments import grid, int32
from attncompile.kernels.driver import Driver, driver
from attncompile.kernels.entry import Compiled, Entry

PLAIN_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that need no attribute."""


class DeviceTensor(Protocol):
    """What is read of a tensor on the GPU; torch's tensors are such."""

    shape: Sequence[int]
    dtype: Any

    def data_ptr(self) -> int: ...

    def stride(self) -> Sequence[int]: ...


def form_for(entry: Entry, capability: int) -> Literal["cubin", "ptx"]:
    """How ``entry`` runs on a device: its cubin on its own architecture and, where the code is not specific to that, on
    later minors of its major; such PTX on everything later. Raises ``Unsupported``.
    """
    if entry.architecture == capability:
        return "cubin"
    if not entry.specific and entry.architecture < capability:
        return "cubin" if entry.architecture // 10 == capability // 10 else "ptx"
    raise Unsupported("architecture", f"a kernel for sm_{entry.architecture} does not run on sm_{capability}")


def best_for(entries: Sequence[Entry], capability: int) -> list[Entry]:
    """Those of ``entries`` of the architecture that suits a device best, in their order: its own, else the nearest
    lower minor, else the newest whose PTX the driver can translate. [] where none runs.
    """

    def price(entry: Entry) -> tuple[bool, int]:
        return form_for(entry, capability) == "ptx", capability - entry.architecture

    runs = [e for e in entries if e.architecture == capability or (not e.specific and e.architecture < capability)]
    cheapest = min((price(e) for e in runs), default=None)
    return [e for e in runs if price(e) == cheapest]


@dataclass(slots=True)
class Launch:
    """One launch with all its numbers, which can be made again and again."""

    function: Function
    grid: tuple[int, int, int]
    _values: Any
    _storage: Any

    def __call__(self, stream: int = 0) -> None:
        """Launch on ``stream`` (a handle such as ``torch.cuda.current_stream().cuda_stream``)."""
        f = self.function
        if 0 in self.grid:
            return
        f.driver.make_current(f.context)
        f.driver.launch(f.handle, self.grid, f.entry.threads, f.entry.shared, stream, self._values)


@dataclass(slots=True)
class Function:
    """A kernel that is loaded on a device."""

    entry: Entry
    form: str
    driver: Driver
    context: int
    handle: int
    of_device: Mapping[str, int]
    """Symbols that the device gives: ``SMS``, its number of multiprocessors."""

    def bind(self, symbols: Mapping[str, int], pointers: Mapping[str, int], where: str = "") -> Launch:
        """Evaluate arguments and grid. ``pointers``: device addresses of inputs and outputs by the arguments' names.

        Raises:
            KernelError: a pointer is missing or not aligned, or a number is no int32; ``where`` names the node.
        """
        where = where or self.entry.op
        symbols = {**self.of_device, **symbols}
        storage: list[Any] = []
        for argument in self.entry.arguments:
            if argument.kind == "int32":
                storage.append(ctypes.c_int32(int32(argument, symbols, where)))
                continue
            if argument.name not in pointers:
                raise KernelError(f"{where}: no pointer for {argument.name}")
            address = pointers[argument.name]
            if address % argument.align:
                raise KernelError(
                    f"{where}: {argument.name} at {address:#x} is not a multiple of {argument.align} bytes",
                    "copy it to memory of its own",
                )
            storage.append(ctypes.c_void_p(address))
        storage += [ctypes.c_void_p(0)] * self.entry.hidden
        values = (ctypes.c_void_p * len(storage))(*(ctypes.addressof(s) for s in storage))
        return Launch(self, grid(self.entry, symbols, where), values, storage)

    def launch(self, symbols: Mapping[str, int], pointers: Mapping[str, int], stream: int = 0, where: str = "") -> None:
        """``bind``, then launch once."""
        self.bind(symbols, pointers, where)(stream)


@dataclass(slots=True)
class Launcher:
    """One device. Kernels are loaded into its primary context, which is torch's, and stay loaded."""

    device: int = 0
    driver: Driver = field(init=False)
    context: int = field(init=False)
    capability: int = field(init=False)
    _shared: int = field(init=False)
    _symbols: Mapping[str, int] = field(init=False)
    _loaded: dict[str, Function] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.driver = driver()
        handle = self.driver.device(self.device)
        self.capability = self.driver.capability(handle)
        self.context = self.driver.primary_context(handle)
        self._shared = self.driver.shared_limit(handle)
        self._symbols = {"SMS": self.driver.multiprocessors(handle)}

    def prepare(self, compiled: Compiled, form: Literal["cubin", "ptx"] | None = None) -> Function:
        """Load ``compiled``, once. ``form`` forces its PTX, or its cubin.

        Raises:
            Unsupported: the kernel does not run on this device, or needs scratch memory or more shared memory.
            KernelError: the cubin is damaged, or the driver refuses it (``DriverError``).
        """
        entry = compiled.entry
        form = form or form_for(entry, self.capability)
        key = f"{compiled.id}.{form}"
        if key not in self._loaded:
            if entry.shared > self._shared:
                said = f"{entry.op} {entry.tactic} needs {entry.shared} bytes of shared memory"
                raise Unsupported("shared", f"{said}, the GPU has {self._shared}")
            if entry.hidden:
                raise Unsupported(
                    "scratch", f"{entry.op} {entry.tactic} needs scratch memory, which no launch here has"
                )
            if form == "cubin":
                cubin.check(compiled.cubin)
            self.driver.make_current(self.context)
            module = self.driver.load(compiled.cubin if form == "cubin" else compiled.ptx.encode() + b"\0")
            handle = self.driver.function(module, entry.name)
            if entry.shared > PLAIN_SHARED:
                self.driver.allow_shared(handle, entry.shared)
            self._loaded[key] = Function(entry, form, self.driver, self.context, handle, self._symbols)
        return self._loaded[key]


@cache
def launcher_for(device: int = 0) -> Launcher:
    """The launcher of ``device``, made once."""
    return Launcher(device)


def run_program(
    program: Program,
    compiled: Compiled,
    tensors: Mapping[str, DeviceTensor],
    attributes: Mapping[str, Any],
    stream: int = 0,
    device: int = 0,
    layouts: Mapping[str, str] | None = None,
) -> Launch:
    """Launch ``compiled``, which was made from ``program``, on tensors of the GPU, and return the launch for more.

    ``tensors``: inputs and outputs by their formal names, [B, N, H, D] each or as ``layouts`` says; they may have gaps.
    ``attributes``: the call's. The caller keeps the tensors until the stream is done.

    Raises:
        KernelError: ``compiled`` is of another program; a tensor is missing, of another type, or where it may not be.
    """
    entry = compiled.entry
    if entry.arguments != program.arguments or entry.tactic != program.tactic:
        raise KernelError(f"{entry.op} {entry.tactic} was not compiled from {program.op} {program.tactic}")
    missing = [a.name for a in entry.arguments if a.kind != "int32" and a.name not in tensors]
    if missing:
        raise KernelError(f"{entry.op} needs a tensor {missing[0]}")
    given = {n: symbols_of.Strided(tuple(t.shape), tuple(t.stride())) for n, t in tensors.items()}
    found = symbols_of.of_tensors(given, attributes, layouts)
    pointers = {}
    for argument in entry.arguments:
        if argument.kind == "int32":
            continue
        tensor = tensors[argument.name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind != argument.type:
            raise KernelError(f"{entry.op}: {argument.name} is {kind}, the kernel takes {argument.type}")
        has_strides = any(name.startswith(f"{argument.name}_stride_") for name in found)
        if not has_strides and not given[argument.name].gapless:
            raise KernelError(f"{entry.op}: {argument.name} has gaps", "make it contiguous")
        pointers[argument.name] = tensor.data_ptr()
    launch = launcher_for(device).prepare(compiled).bind(found, pointers)
    launch(stream)
    return launch
