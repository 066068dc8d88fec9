"""Pieces of programs that the kernels of all mechanisms share: argument lists, head-dim splits, element types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import POINTER_ALIGN, Argument, OpCall

HALF = ("float16", "bfloat16")
RULES = {"zero": 0, "uniform": 1, "nan": 2}
"""``masked_rows`` as the kernels' constant."""

BROADCAST = {"rows": "BH", "key_mask": "BK", "bias": "BHQK", "sinks": "H", "mask": "BHQK"}
"""Axes over which an optional input may be broadcast; each has a stride argument, 0 where it is. In the order of
the kernels' parameters.
"""

INPUT_TYPES = {
    "key_mask": ("bool",), "mask": ("bool",), "key_lengths": ("int32", "int64"), "bias": (*HALF, "float32"),
    "sinks": (*HALF, "float32"), **dict.fromkeys(("rows", "columns", "kinds", "masks", "order", "counts"), ("int32",)),
}  # fmt: skip
"""Element types of optional inputs."""


def split(dim: int) -> tuple[int, int]:
    """A head dim as a power of two and the tile that holds the rest: 72 -> (64, 16), 128 -> (128, 16, unused)."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    return first, max(16, 1 << (rest - 1).bit_length() if rest else 16)


def padded(dim: int) -> int:
    """Columns that are multiplied for a head dim."""
    first, rest = split(dim)
    return first if dim == first else first + rest


def widths(call: OpCall) -> dict[str, int]:
    """The compile-time constants of head dim and value dim."""
    (k1, k2), (v1, v2) = split(call.head_dim), split(call.value_dim)
    return {"DK": call.head_dim, "K1": k1, "K2": k2, "DV": call.value_dim, "V1": v1, "V2": v2}


def parted(call: OpCall) -> bool:
    """Whether head or value dim is multiplied in two parts."""
    return any(padded(dim) > split(dim)[0] for dim in (call.head_dim, call.value_dim))


def check_operands(call: OpCall) -> None:
    """Types and head dims that all kernels take. Raises ``Unsupported``."""
    if call.dtype not in HALF:
        raise Unsupported("dtype", f"kernels take float16 and bfloat16, not {call.dtype}", "convert with --fp16")
    for name, dim in (("head", call.head_dim), ("value", call.value_dim)):
        if not 16 <= dim <= 256 or dim % 8:
            raise Unsupported("head-dim", f"{name} dim {dim}: kernels take multiples of 8 from 16 to 256")
    if call.heads % call.kv_heads:
        raise Unsupported("heads", f"{call.heads} query heads on {call.kv_heads} key heads")


def check_optional(call: OpCall) -> None:
    """Types of optional inputs, and the scale. Raises ``Unsupported``."""
    for name, kind in call.inputs.items():
        types = INPUT_TYPES.get(name, ())
        if kind not in types:
            raise Unsupported("dtype", f"{name} is {kind}: kernels take {', '.join(types)}")
    scale = call.attributes.get("scale")
    if scale is not None and not scale > 0:
        raise Unsupported("scale", f"scale {scale}: the kernels need a positive one")


def without_sizes(call: OpCall) -> OpCall:
    """``call`` for any batch, lengths and numbers of heads, which come as arguments."""
    return replace(
        call, heads=1, kv_heads=1, batch=None, query_length=None, key_length=None, shapes={},
        inputs=dict(sorted(call.inputs.items())),
    )  # fmt: skip


def inputs(call: OpCall, optional: Iterable[str]) -> list[Argument]:
    """Pointers: query, key, value and those of ``optional`` that the call has."""
    found = [Argument(name, "input", call.dtype, align=POINTER_ALIGN) for name in ("query", "key", "value")]
    return found + [Argument(name, "input", call.inputs[name]) for name in optional if name in call.inputs]


def strides(call: OpCall) -> list[Argument]:
    """Strides of the operands in units of 8 elements, and of broadcast inputs in elements."""
    operands = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    found = [int32(f"{short}_{a.lower()}", f"{name}_stride_{a}") for short, name in operands for a in "BNH"]
    found += offsets(call, ("query", "key", "value"))
    for name, axes in BROADCAST.items():
        if name in call.inputs:
            found += [int32(f"{name}_{axis.lower()}", f"{name}_stride_{axis}") for axis in axes]
    return found


def offsets(call: OpCall, operands: Iterable[str]) -> list[Argument]:
    """Where operands begin in packed tensors, in units of 8 elements; none for a call without any."""
    return [int32(f"{name[0]}_o", f"{name}_offset") for name in operands if call.packed]


def output(call: OpCall) -> Argument:
    return Argument("output", "output", call.dtype, align=POINTER_ALIGN)


def int32(name: str, expression: str) -> Argument:
    return Argument(name, "int32", expression=expression)
