"""What the symbols of launch arguments mean for one node: as expressions over the sizes of its inputs, or as numbers.

``B``, ``H``, ``HKV``, ``NQ``, ``NK``, ``D``, ``DV``: batch, query heads, key heads, queries, keys, head dim, value dim.
``query_stride_B|N|H`` and those of ``key``, ``value``, ``output``: in units of ``STRIDE_UNIT`` elements.
``bias_stride_B|H|Q|K``, ``mask_stride_B|H|Q|K``, ``key_mask_stride_B|K``, ``sinks_stride_H``, ``rows_stride_B|H``: in
elements, 0 where the input is broadcast over that axis, or does not have it.
``query_offset``, ``key_offset``, ``value_offset`` of a packed call: where the operand begins, in units of
``STRIDE_UNIT`` elements.
``key_stride_D`` of an operand in BHDN, whose tokens are the last axis: in elements; it has no stride of N.
``amount_stride_H`` likewise. ``T``, ``C``: rows and columns of the scores of blocks.
``C``: chunks of a linear attention's states. ``chunk``: tokens of one, all of them where the attribute is 0.
``scale_bits``, ``softcap_bits``, ``epsilon_bits``, ``floor_bits``: the bits of a float32 as an int32. ``left``,
``right``: how far a window reaches.
``SMS``, the device's number of multiprocessors, is no node's: a launcher adds it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import STRIDE_UNIT, OpCall
from attncompile.core.layout import part, unpacked
from attncompile.kernels.expressions import Binary, Expression, Literal, Symbol, evaluate, fold, product

OF_THE_DEVICE = ("SMS",)
"""Symbols that are no node's: the GPU gives them."""

OPERANDS = ("query", "key", "value", "output")
BROADCAST: Mapping[str, str] = {
    "bias": "BHQK", "mask": "BHQK", "key_mask": "B--K", "sinks": "H", "key_lengths": "B", "rows": "BH**",
    "amount": "H",
}  # fmt: skip
"""Axes of the optional inputs, to which they are broadcast from the right; ``-`` is of size 1, ``*`` of any
size and without a symbol: the kernel takes the input for one without gaps."""

Layout = str
"""Axes of an operand in order, such as ``BNHD``, or ``BN1HD`` for one that is packed (``core/layout.py``)."""

Sizes = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor as it lies in memory: sizes, and strides in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def contiguous(sizes: Sequence[int]) -> Strided:
        strides, step = [], 1
        for size in reversed(sizes):
            strides.append(step)
            step *= size
        return Strided(tuple(sizes), tuple(reversed(strides)))

    @property
    def gapless(self) -> bool:
        """Whether it lies as ``contiguous`` says. An axis of size 1 is never stepped along: its stride may be any."""
        dense = Strided.contiguous(self.sizes).strides
        return all(n == 1 or a == b for n, a, b in zip(self.sizes, self.strides, dense, strict=True))


def bits(value: float) -> int:
    """The bits of the float32 nearest to ``value``, as an int32."""
    number: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return number


def constants(attributes: Mapping[str, Any], head_dim: int) -> dict[str, int]:
    """The symbols that attributes alone give. Without ``scale`` it is 1 / sqrt(head_dim)."""
    scale = attributes.get("scale")
    found = {"scale_bits": bits(head_dim**-0.5 if scale is None else scale)}
    if attributes.get("softcap"):
        found["softcap_bits"] = bits(attributes["softcap"])
    for name in ("epsilon", "floor"):
        if isfinite(attributes.get(name, inf)):
            found[f"{name}_bits"] = bits(attributes[name])
    for side in ("left", "right"):
        reach = attributes.get(side, -1)
        if isinstance(reach, int) and reach >= 0:  # one an axis of a grid is part of the code
            found[side] = reach
    return found


def table(call: OpCall, shapes: Mapping[str, Sizes], layouts: Mapping[str, Layout]) -> dict[str, Expression]:
    """Every symbol as an expression over sizes of inputs such as ``query[1]``; a size that is known is a number.

    ``shapes`` holds the sizes of query, key and value (of those that the op has) and of the optional inputs, None where
    dynamic: what they are is part of the result, so that a runtime needs neither layouts nor shapes. ``layouts``: of
    all ``OPERANDS``.

    Raises:
        Unsupported: a shape does not fit its layout, or cannot be broadcast.
    """
    dims = {name: _dims(name, shapes[name], layouts[name]) for name in OPERANDS[:3] if name in shapes}
    _know(dims, call)
    if "state" in shapes:
        dims["state"] = _dims("state", shapes["state"], "BHCDE")
    if "scores" in shapes:
        dims["scores"] = _dims("scores", shapes["scores"], "BHTC")
    found = _sizes(dims)
    if "chunk" in call.attributes and "NK" in found:
        found["chunk"] = Literal(call.attributes["chunk"]) if call.attributes["chunk"] else found["NK"]
    if "query" in dims and "DV" in found:
        dims["output"] = {axis: dims["query"].get(axis, Literal(1)) for axis in layouts["output"]} | {"D": found["DV"]}
    for name in OPERANDS:
        if name not in dims:
            continue
        steps = _steps(layouts[name], dims[name])
        if unpacked(layouts[name]) == COLUMNS:
            found[f"{name}_stride_D"] = steps["D"]
        rows = "BH" if unpacked(layouts[name]) == COLUMNS else "BNH"
        found |= {f"{name}_stride_{axis}": _in_units(name, steps[axis]) for axis in rows}
        if call.packed and name != "output":
            found[f"{name}_offset"] = _offset(name, layouts[name], steps)
    for name in call.inputs:
        if name in BROADCAST:
            found |= _broadcast(name, shapes[name])
    return found | {name: _number(value) for name, value in constants(call.attributes, call.head_dim).items()}


COLUMNS = "BHDN"
"""The layout whose last axis is that of the tokens."""


def _sizes(dims: Mapping[str, Mapping[str, Expression]]) -> dict[str, Expression]:
    """Sizes by symbol, each from the first operand that says it."""
    sources = {
        "B": ("query", "key", "state", "scores"), "H": ("query", "key", "state", "scores"), "HKV": ("key", "state"),
        "NQ": ("query",), "NK": ("key",), "D": ("query", "key", "state"), "DV": ("value",), "C": ("state", "scores"),
        "T": ("scores",),
    }  # fmt: skip
    axes = {"HKV": "H", "NQ": "N", "NK": "N", "DV": "D"}
    found = {}
    for symbol, names in sources.items():
        first = next((n for n in names if n in dims), None)
        if first is not None:
            found[symbol] = dims[first][axes.get(symbol, symbol)]
    if "DV" not in found and "state" in dims:
        found["DV"] = dims["state"]["E"]
    return found


def _number(value: int) -> Expression:
    # The language has no negative numbers; the bits of a negative float are one.
    return Literal(value) if value >= 0 else Binary("-", Literal(0), Literal(-value))


def _dims(name: str, sizes: Sizes, layout: Layout) -> dict[str, Expression]:
    if len(sizes) != len(layout):
        raise Unsupported("rank", f"{name} has {len(sizes)} axes, its layout {layout} {len(layout)}")
    return {
        axis: Symbol(f"{name}[{i}]") if size is None else Literal(size)
        for i, (axis, size) in enumerate(zip(layout, sizes, strict=True))
    }


def _know(dims: dict[str, dict[str, Expression]], call: OpCall) -> None:
    """What the call fixes for all its launches, whether a file says it at this input or not."""
    known = {
        "query": {"H": call.heads, "D": call.head_dim, "B": call.batch, "N": call.query_length},
        "key": {"H": call.kv_heads, "D": call.head_dim, "B": call.batch, "N": call.key_length},
        "value": {"H": call.kv_heads, "D": call.value_dim, "B": call.batch, "N": call.key_length},
    }
    for name, sizes in known.items():
        if name not in dims:
            continue
        dims[name] |= {axis: Literal(size) for axis, size in sizes.items() if size is not None}


def _steps(layout: Layout, dims: Mapping[str, Expression]) -> dict[str, Expression]:
    """Stride of every axis in elements, of a tensor without gaps."""
    return {axis: product([dims[a] for a in layout[i + 1 :]]) for i, axis in enumerate(layout)}


def _offset(name: str, layout: Layout, steps: Mapping[str, Expression]) -> Expression:
    """Where the part of a packed tensor begins."""
    chosen = part(layout)
    if chosen is None or chosen[1] == 0:
        return Literal(0)
    return fold(Binary("*", _in_units(name, steps[layout[chosen[0]]]), Literal(chosen[1])))


def _in_units(name: str, step: Expression) -> Expression:
    match step:
        case Literal(value) | Binary("*", _, Literal(value)) if value % STRIDE_UNIT == 0:
            units = Literal(value // STRIDE_UNIT)
            return units if isinstance(step, Literal) else fold(Binary("*", step.left, units))
    raise Unsupported("strides", f"{name}: rows are not known to be multiples of {STRIDE_UNIT} elements")


def _broadcast(name: str, sizes: Sizes) -> dict[str, Expression]:
    axes = _axes(name, len(sizes))
    dims = [Symbol(f"{name}[{i}]") if size is None else Literal(size) for i, size in enumerate(sizes)]
    found: dict[str, Expression] = {f"{name}_stride_{a}": Literal(0) for a in BROADCAST[name] if a not in "-*"}
    for i, axis in enumerate(axes):
        if axis == "*":
            continue
        if axis == "-":
            if sizes[i] not in (1, None):
                raise Unsupported("rank", f"{name} has size {sizes[i]} on axis {i}, which must be 1")
            continue
        # 0 where the size is 1, else the stride; sizes are at least 1.
        more = fold(Binary("min", fold(Binary("-", dims[i], Literal(1))), Literal(1)))
        found[f"{name}_stride_{axis}"] = product([*dims[i + 1 :], more])
    return found


def _axes(name: str, rank: int) -> str:
    """The axes that an optional input of ``rank`` axes has."""
    full = BROADCAST[name]
    if rank > len(full):
        raise Unsupported("rank", f"{name} has {rank} axes, at most {len(full)} have a meaning")
    return full[len(full) - rank :]


def of_tensors(
    tensors: Mapping[str, Strided], attributes: Mapping[str, Any], layouts: Mapping[str, Layout] | None = None
) -> dict[str, int]:
    """Every symbol's value for tensors as they lie, which need not be contiguous; layouts default to BNHD.

    Raises:
        Unsupported: an operand's stride is not a multiple of ``STRIDE_UNIT`` elements, or its last axis has gaps.
    """
    orders = {name: (layouts or {}).get(name, "BNHD") for name in OPERANDS if name in tensors}
    size = {
        name: {axis: Literal(n) for axis, n in zip(order, tensors[name].sizes, strict=True)}
        for name, order in orders.items()
    }
    if "state" in tensors:
        size["state"] = {axis: Literal(n) for axis, n in zip("BHCDE", tensors["state"].sizes, strict=True)}
    if "scores" in tensors and "key" not in tensors:  # as an input: of what makes them they are an output
        size["scores"] = {axis: Literal(n) for axis, n in zip("BHTC", tensors["scores"].sizes, strict=True)}
    found = {name: evaluate(n, {}) for name, n in _sizes(size).items()}
    if "chunk" in attributes:
        found["chunk"] = attributes["chunk"] or found.get("NK", 0)
    for name, order in orders.items():
        step = dict(zip(order, tensors[name].strides, strict=True))
        lengths = dict(zip(order, tensors[name].sizes, strict=True))
        last = order[-1]
        if step[last] != 1:
            raise Unsupported("strides", f"{name}: its last axis has a stride of {step[last]}", "make it contiguous")
        if unpacked(order) == COLUMNS:
            found[f"{name}_stride_D"] = step["D"]
        for axis in "BH" if unpacked(order) == COLUMNS else "BNH":
            # An axis of size 1 is never stepped along, so its stride may be anything.
            apart = 0 if lengths[axis] == 1 else step[axis]
            if apart % STRIDE_UNIT:
                raise Unsupported("strides", f"{name}: stride {apart} of {axis} is not a multiple of {STRIDE_UNIT}")
            found[f"{name}_stride_{axis}"] = apart // STRIDE_UNIT
        chosen = part(order)
        apart = tensors[name].strides[chosen[0]] * chosen[1] if chosen else 0
        if apart % STRIDE_UNIT:
            raise Unsupported("strides", f"{name}: it begins at element {apart}, no multiple of {STRIDE_UNIT}")
        if any(map(part, orders.values())) and name != "output":
            found[f"{name}_offset"] = apart // STRIDE_UNIT
    for name, axes in BROADCAST.items():
        if name not in tensors:
            continue
        found |= {f"{name}_stride_{a}": 0 for a in axes if a not in "-*"}
        given = tensors[name]
        if "*" in axes and not given.gapless:
            raise Unsupported("strides", f"{name} has gaps", "make it contiguous")
        for axis, n, apart in zip(_axes(name, len(given.sizes)), given.sizes, given.strides, strict=True):
            if axis not in "-*":
                found[f"{name}_stride_{axis}"] = 0 if n == 1 else apart
    return found | constants(attributes, found.get("D", 1))


def values(symbols: Mapping[str, Expression | str], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """A node's symbols as numbers, for the sizes of one run. Raises ``BadExpression`` for a size that is missing."""
    sizes = {f"{name}[{i}]": size for name, shape in shapes.items() for i, size in enumerate(shape)}
    return {name: evaluate(expression, sizes) for name, expression in symbols.items()}
