"""Runs Gluon kernels of ours on the CPU, as Python over NumPy: what Triton's interpreter does not do.

The functions are those of the kernel, with other globals: a thread a warpgroup, of which one runs at a time. Where one
waits for or arrives at a barrier, another one may go on, whichever a seed says. Copies and products happen late: what
cp.async is to write is NaN until the copies have arrived at their barrier, and a product reads its shared memory only
when it is waited for. So a slot that is given back too early is overwritten under a product, a barrier that nobody
completes is a deadlock with a message, and a pointer outside of its tensor an error. What it cannot see: layouts,
registers, fences, and whether the compiler keeps the order.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from attncompile.core.kernel import Program

THREADS = 128
"""Of a warpgroup."""


class EmulationError(Exception):
    """What a GPU would not forgive."""


class Array:
    """A value of a kernel: NumPy's arithmetic, Triton's methods."""

    def __init__(self, x: Any) -> None:
        self.x = np.asarray(x)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        return Array(self.x.view(dtype) if bitcast else self.x.astype(dtype))

    def __getitem__(self, key: Any) -> Array:
        return Array(self.x[key])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Array, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Array(getattr(self.x, name)(plain(other)))

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "and", "or", "xor", "rshift", "lshift"):
    for _side in ("", "r"):
        setattr(Array, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))
Array.__hash__ = None  # type: ignore[assignment]


def plain(x: Any) -> Any:
    return x.value if isinstance(x, Pending) else x.x if isinstance(x, Array) else x


@dataclass
class Pointer:
    """An element of a flat buffer, or many."""

    buffer: np.ndarray
    offset: Any
    name: str

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.buffer.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.buffer, self.offset + np.asarray(plain(other)).astype(np.int64), self.name)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.buffer, self.offset[key], self.name)

    def at(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and which of them are touched; all of those lie inside."""
        there = np.broadcast_to(True if mask is None else np.asarray(plain(mask)), np.shape(self.offset))
        offsets = np.where(there, self.offset, 0)
        if offsets.size and not 0 <= offsets.min() <= offsets.max() < self.buffer.size:
            raise EmulationError(f"{self.name}: element {offsets.min()} or {offsets.max()} of {self.buffer.size}")
        return offsets, there


@dataclass
class Shared:
    """A piece of shared memory."""

    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def index(self, i: Any) -> Shared:
        if not 0 <= int(i) < len(self.data):
            raise EmulationError(f"slot {int(i)} of {len(self.data)}")
        return Shared(self.data[int(i)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order))


class Pending(Array):
    """The result of a product that was started."""

    def __init__(self, compute: Callable[[], np.ndarray]) -> None:
        self.compute: Callable[[], np.ndarray] | None = compute
        self.value: np.ndarray | None = None

    def finish(self) -> None:
        if self.compute is not None:
            self.value, self.compute = self.compute(), None

    @property
    def x(self) -> np.ndarray:  # type: ignore[override]
        if self.value is None:
            raise EmulationError("a product is read before it is waited for")
        return self.value


@dataclass(eq=False)
class Barrier:
    count: int = 0
    pending: int = 0
    parity: int = 0

    def arrive(self, count: int) -> None:
        self.pending -= count
        if self.pending < 0:
            raise EmulationError("more arrivals than a barrier waits for")
        if self.pending == 0:
            self.parity, self.pending = self.parity ^ 1, self.count


@dataclass
class Barriers:
    of: list[Barrier]

    def index(self, i: Any) -> Barrier:
        return self.of[int(i)]


class Scheduler:
    """Lets one of the warpgroups run at a time, whichever ``seed`` says, among those that need not wait."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.turns: dict[int, threading.Semaphore] = {}
        self.error: BaseException | None = None

    def run(self, work: Sequence[Callable[[], None]]) -> None:
        self.waiting = {n: lambda: True for n in range(len(work))}
        self.turns = {n: threading.Semaphore(0) for n in range(len(work))}
        threads = [threading.Thread(target=self._one, args=(n, w), daemon=True) for n, w in enumerate(work)]
        for thread in threads:
            thread.start()
        self._hand_over()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _one(self, n: int, work: Callable[[], None]) -> None:
        LOCAL.number, LOCAL.copies, LOCAL.products = n, [], []
        self.turns[n].acquire()
        try:
            if self.error is None:
                work()
        except BaseException as error:
            self.error = self.error or error
        del self.waiting[n]
        self._hand_over()

    def _hand_over(self) -> None:
        ready = [n for n, condition in self.waiting.items() if self.error is not None or condition()]
        if not ready and self.waiting:
            self.error = EmulationError(f"deadlock: warpgroups {sorted(self.waiting)} wait")
            ready = list(self.waiting)
        if ready:
            self.turns[self.random.choice(ready)].release()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let others run until ``condition`` holds."""
        n = LOCAL.number
        self.waiting[n] = condition
        self._hand_over()
        self.turns[n].acquire()
        if self.error is not None:
            raise EmulationError("another warpgroup failed")


LOCAL = threading.local()


@dataclass
class Machine:
    """One thread block: what ``gl`` and the modules beside it are for a kernel."""

    block: int
    blocks: int
    scheduler: Scheduler
    edits: Edits
    globals: dict[str, dict[str, Any]] = field(default_factory=dict)

    def function(self, jitted: Any) -> FunctionType:
        """The Python function of ``jitted``, in a module in which everything is emulated."""
        function = jitted.fn
        known = self.module(function.__module__)
        if function.__name__ not in self.edits:
            return FunctionType(function.__code__, known, function.__name__, function.__defaults__)
        before, after = self.edits[function.__name__]
        source = inspect.getsource(function)
        if source.count(before) != 1:
            raise ValueError(f"{function.__name__} has {before!r} {source.count(before)} times")
        local: dict[str, Any] = {}
        text = "from __future__ import annotations\n" + source.replace(before, after).partition("@gluon.jit\n")[2]
        exec(text, known, local)
        made: FunctionType = local[function.__name__]
        return made

    def module(self, name: str) -> dict[str, Any]:
        if name not in self.globals:
            module = import_module(name)
            known = self.globals[name] = dict(vars(module))
            for key, value in vars(module).items():
                if hasattr(value, "fn") and hasattr(value, "arg_names"):
                    known[key] = self.function(value)
                elif type(value).__name__ == "ConstexprFunction":
                    known[key] = lambda *_: None  # layouts
                elif type(value).__name__ == "constexpr":
                    known[key] = value.value
            known |= {n: f for n, f in self.modules().items() if n in known}
        return self.globals[name]

    def modules(self) -> dict[str, Any]:
        return {
            "gl": self.language(), "async_copy": SimpleNamespace(
                async_load=self.async_load, mbarrier_arrive=self.copies_arrive
            ),
            "mbarrier": SimpleNamespace(
                allocate_mbarrier=lambda batch: Barriers([Barrier() for _ in range(batch)]), init=self.init,
                wait=self.wait, arrive=self.arrive,
            ),
            "warpgroup_mma": self.mma, "warpgroup_mma_wait": self.mma_wait, "fence_async_shared": lambda: None,
        }  # fmt: skip

    def language(self) -> Any:
        def both(f: Any) -> Any:
            return lambda *arguments: Array(f(*map(plain, arguments)))

        def ignored(*_: Any, **__: Any) -> None:
            return None

        return SimpleNamespace(
            program_id=lambda axis: Array(np.int32(self.block)), num_programs=lambda axis: Array(np.int32(self.blocks)),
            arange=lambda a, b, layout=None: Array(np.arange(a, b, dtype=np.int32)), load=self.load, store=self.store,
            full=lambda shape, x, dtype, layout=None: Array(np.full(shape, x, dtype)),
            zeros=lambda shape, dtype, layout=None: Array(np.zeros(shape, dtype)),
            where=lambda c, a, b: Array(_typed_where(plain(c), plain(a), plain(b))), maximum=both(np.maximum),
            minimum=both(np.minimum), exp2=both(np.exp2), log2=both(np.log2),
            max=lambda x, axis: Array(plain(x).max(axis)), sum=lambda x, axis: Array(plain(x).sum(axis)),
            convert_layout=lambda x, layout: x, static_range=range, static_assert=_assert,
            inline_asm=lambda *_, args, **__: args, barrier=ignored, SliceLayout=ignored, DotOperandLayout=ignored,
            BlockedLayout=ignored, NVMMASharedLayout=SimpleNamespace(get_default_for=ignored),
            allocate_shared_memory=lambda dtype, shape, layout: Shared(np.full(shape, np.nan, dtype)),
            warp_specialize=self.specialize, int32=np.int32, int64=np.int64, float32=np.float32,
        )  # fmt: skip

    def specialize(self, parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        if len(warps) != len(parts) - 1 or len(registers) != len(warps) or set(warps) != {4}:
            raise EmulationError(f"{len(parts)} parts, {warps} warps and {registers} registers")
        self.scheduler.run([lambda f=f, a=a: f(*a) for f, a in parts])  # type: ignore[misc]

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Array:
        offsets, there = pointer.at(mask)
        found = np.where(there, pointer.buffer[offsets], np.asarray(other, pointer.buffer.dtype))
        return Array(found.astype(pointer.buffer.dtype))

    def store(self, pointer: Pointer, values: Any, mask: Any = None) -> None:
        offsets, there = pointer.at(mask)
        shape = np.broadcast_shapes(offsets.shape, np.shape(plain(values)))
        offsets, there = np.broadcast_to(offsets, shape), np.broadcast_to(there, shape)
        pointer.buffer[offsets[there]] = np.broadcast_to(plain(values), shape)[there].astype(pointer.buffer.dtype)

    def async_load(self, target: Shared, pointer: Pointer, mask: Any = None) -> None:
        target.data[:] = np.nan
        offsets, there = pointer.at(mask)

        def copy() -> None:
            target.data[:] = np.where(there, pointer.buffer[offsets], np.zeros((), pointer.buffer.dtype))

        LOCAL.copies.append(copy)

    def copies_arrive(self, barrier: Barrier, increment_count: bool = True) -> None:
        if increment_count:
            raise EmulationError("counts that grow are not emulated")
        self.scheduler.wait(lambda: True)
        for copy in LOCAL.copies:
            copy()
        LOCAL.copies.clear()
        barrier.arrive(THREADS)

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = int(count)

    def wait(self, barrier: Barrier, phase: Any) -> None:
        wanted = int(phase)
        self.scheduler.wait(lambda: barrier.parity != wanted)

    def arrive(self, barrier: Barrier) -> None:
        barrier.arrive(1)
        self.scheduler.wait(lambda: True)

    def mma(self, a: Any, b: Shared, acc: Array, use_acc: bool = True, is_async: bool = False) -> Array:
        def compute() -> np.ndarray:
            left = a.data if isinstance(a, Shared) else plain(a)
            made = left.astype(np.float32) @ b.data.astype(np.float32)
            return np.asarray(made + plain(acc) if use_acc else made)

        started = Pending(compute)
        LOCAL.products.append(started)
        if not is_async:
            self.mma_wait(0)
        return started

    def mma_wait(self, left: int, deps: Sequence[Array] = ()) -> Any:
        while len(LOCAL.products) > left:
            LOCAL.products.pop(0).finish()
        return deps[0] if len(deps) == 1 else tuple(deps)


def _typed_where(condition: Any, a: Any, b: Any) -> np.ndarray:
    # A number beside an array takes its type, as in Triton.
    kinds = [x.dtype for x in (a, b) if hasattr(x, "dtype")]
    return np.where(condition, a, b).astype(kinds[0]) if kinds else np.where(condition, a, b)


def _assert(condition: bool) -> None:
    if not condition:
        raise EmulationError("a static assertion fails")


Edits = Mapping[str, tuple[str, str]]
"""By the name of a function, a piece of its text and what stands in its place: errors to be planted."""


def launch(program: Program, values: Mapping[str, Any], grid: int, seed: int = 0, edits: Edits | None = None) -> None:
    """Run ``program``: ``values`` are its int32s, and flat buffers of its tensors, outputs among them."""
    module, _, name = program.function.partition(":")
    jitted = getattr(import_module(module), name)
    arguments: dict[str, Any] = dict.fromkeys(jitted.arg_names)
    arguments |= dict(program.constants)
    for argument in program.arguments:
        x = values[argument.name]
        arguments[argument.name] = Array(np.int32(x)) if argument.kind == "int32" else Pointer(x, 0, argument.name)
    for block in range(grid):
        machine = Machine(block, grid, Scheduler(seed + block), edits or {})
        with np.errstate(invalid="ignore", over="ignore"):
            machine.function(jitted)(**arguments)


def buffer_of(x: Any, dtype: str) -> np.ndarray:
    """A torch tensor's memory as a flat NumPy array that shares it; bfloat16 by its bits."""
    import torch

    flat = torch.as_strided(x, (x.untyped_storage().size() // x.element_size(),), (1,), 0)
    if dtype == "bfloat16":
        found: np.ndarray = flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return found
    return np.asarray(flat.numpy())
