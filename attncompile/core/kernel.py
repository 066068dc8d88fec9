"""What a GPU kernel is, before it is compiled and without importing a compiler: plain values.

A mechanism's ``kernel.py`` offers a ``Kernel``. Asked about one ``OpCall`` (a node of ours with all that is known of it
at compile time) and an architecture, it answers with ``Program``s: one per tactic, each of which is compiled to one
entry of a kernel bundle. What only the run knows (sizes and strides) reaches the entry as int32 arguments, which the
runtimes compute from ``Argument.expression``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from attncompile.core.verdict import Verdict

Constant = int | float | bool | str | None

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that bundles are built for, major * 10 + minor."""

SMALL_SHARED = 48 * 1024
"""Bytes of shared memory that every launch may have without raising a function attribute. Every call has one tactic
within it: whether TensorRT raises the attribute for a plugin is not known."""

POINTER_ALIGN = 16
"""Bytes of which pointers to query, key, value and output are multiples: rows are moved 16 bytes at a time."""

STRIDE_UNIT = 8
"""Strides of query, key, value and output are passed in units of 8 elements (16 bytes): an int32 then reaches 2^34
elements, and the compiler sees that rows are aligned. Head dims and offsets are multiples of it."""

Abi = Literal["plain", "tma"]


@dataclass(frozen=True, slots=True)
class OpCall:
    """One node of ours as a kernel sees it.

    ``inputs`` holds the element type of every optional input that is there, by its formal name (``key_mask``, ``bias``,
    ``sinks``, ...); ``shapes`` what is known of their sizes, None where dynamic. ``outputs`` names the outputs. Lengths
    and batch are None where dynamic. ``attributes`` are the node's, defaults filled in, layouts left out: strides say
    those at run time. ``packed``: query, key or value is a part of a larger tensor (``core/layout.py``); the kernel is
    told where each begins.
    """

    op: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("output",)
    batch: int | None = None
    query_length: int | None = None
    key_length: int | None = None
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Argument:
    """One launch argument. TensorRT's order is inputs, int32 extras, outputs; every kernel keeps it.

    ``type`` is the element type of what an input or output points to. ``expression`` of an ``int32`` is over the
    symbols of ``kernels/symbols.py``: ``B``, ``H``, ``HKV``, ``NQ``, ``NK``, ``query_stride_N``, ``scale_bits``,
    ``SMS`` (multiprocessors of the GPU), ...
    ``align``: the kernel is compiled for pointers that are multiples of so many bytes; a runtime checks it.
    """

    name: str
    kind: Literal["input", "int32", "output"]
    type: str = "int32"
    expression: str = ""
    align: int = 1


@dataclass(frozen=True, slots=True)
class Tactic:
    """How one program is tiled and scheduled. ``constants`` are compile-time values of the kernel. ``ptxas``: the major
    version of the assembler, 12 or 13: drivers of CUDA 12 load what 12 makes, and either is faster for some kernels.
    """

    name: str
    constants: Mapping[str, Constant]
    warps: int
    stages: int = 1
    registers: int | None = None
    ptxas: int = 12


@dataclass(frozen=True, slots=True)
class Program:
    """One kernel to be compiled. ``function`` is ``module:attribute`` of a Triton or Gluon function, whose parameters
    are the arguments' names in order, then compile-time constants; a parameter that is in neither is a constant None.
    ``grid`` gives the number of blocks an axis, as expressions. ``rank`` orders the tactics of a call, best first.
    ``value_dim`` 0: as ``head_dim``. ``fused``: products and sums may be one instruction, which can differ by its last
    bit between threads that compute the same sum.
    """

    op: str
    tactic: str
    language: Literal["triton", "gluon"]
    function: str
    arguments: tuple[Argument, ...]
    constants: Mapping[str, Constant]
    grid: tuple[str, str, str]
    warps: int
    dtype: str
    head_dim: int
    stages: int = 1
    registers: int | None = None
    ptxas: int = 12
    abi: Abi = "plain"
    rank: int = 0
    value_dim: int = 0
    fused: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch has to do, for the cost model. ``flops`` of the products over touched tiles (2 a multiply-add),
    ``scores`` touched score elements, ``masked`` of them under mask code, ``bytes`` that must reach device memory,
    ``blocks`` thread blocks, the longest of which does ``peak`` times what they do on average; ``parted``: head or
    value dim in two parts, as 72 is; ``steps``: tiles that a block goes through, each waiting for the one before (of
    linear attention).
    """

    flops: float
    scores: float
    masked: float
    bytes: float
    blocks: int
    peak: float = 1.0
    parted: bool = False
    steps: int = 1


class Kernel(Protocol):
    """One implementation of a mechanism for a range of types, head dims and architectures."""

    op: str
    """Type of the nodes whose kernel this is, and of the calls that it takes."""

    def register(self) -> None:
        """Make the op's schema known to onnx; later calls do nothing."""
        ...

    def call(self, node: OpCall) -> OpCall:
        """What a node of this op asks for: its attributes are as the schema names them, those of the result as kernels
        read them. The result's ``op`` may be that of another kernel. Raises ``Unsupported``.
        """
        ...

    def general(self, call: OpCall) -> OpCall:
        """``call`` without what only launch arguments say (batch, lengths, numbers of heads, scale, ...): all calls
        with the same general one have the same programs.
        """
        ...

    def standard(self, dtype: str) -> Sequence[OpCall]:
        """General calls that are worth having in a bundle without knowing a model."""
        ...

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        """Whether there are programs for ``call``; the reason names what there are none for."""
        ...

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        """Best first; one of them needs at most ``SMALL_SHARED`` bytes. Raises ``Unsupported``."""
        ...

    def work(self, call: OpCall, program: Program) -> Work:
        """What a launch of ``program`` does; ``call`` needs all its sizes. Raises ``Unsupported`` without them."""
        ...
