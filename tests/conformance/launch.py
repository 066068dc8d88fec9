"""Run a Triton kernel of a case on torch tensors: in the interpreter (TRITON_INTERPRET=1 before Triton is imported)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import prod
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from attncompile.core.kernel import STRIDE_UNIT, Program, Tactic
from attncompile.core.layout import part, unpacked
from attncompile.plugins.attention import kernel as dense
from attncompile.plugins.block_sparse import kernel as sparse
from attncompile.plugins.neighborhood import kernel as grid
from tests.conformance.case import PARTS, Case, laid

KERNELS = {
    "Attention": (dense.AttentionKernel(), dense), "NeighborhoodAttention": (grid.NeighborhoodKernel(), grid),
    "BlockSparseAttention": (sparse.BlockSparseKernel(), sparse),
}  # fmt: skip
FULL = {"key_mask": "BHQK", "bias": "BHQK", "mask": "BHQK", "sinks": "H", "key_lengths": "B", "rows": "BHRX"}


def program(case: Case, queries: int, keys: int) -> Program:
    """The Triton kernel of the case with tiles of ``queries`` and ``keys``, so that small cases have several."""
    call = case.routed or case.call
    kernel, module = KERNELS[call.op]
    tactic = Tactic(f"test-{queries}-{keys}", {"BM": queries, "BN": keys}, 4)
    with patch.object(module, "tactics", lambda *_: [tactic]):
        (made,) = kernel.programs(call, 80)
    assert made.language == "triton"
    return made


def tensors(case: Case, given: Mapping[str, np.ndarray], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Inputs in the call's types and the layouts of the case, as views with logical axes, and poisoned outputs."""
    call, found = case.call, {}
    half = getattr(torch, call.dtype)
    for name, array in given.items():
        x = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        if name in ("query", "key", "value"):
            layout = case.layouts[("query", "key", "value").index(name)]
            x = of_part_0(torch.from_numpy(laid(array, layout)).to(device).to(half), layout)
        elif x.is_floating_point():
            x = x.to(getattr(torch, call.inputs[name]))
        found[name] = x
    batch, queries, _ = case.sizes
    found["output"] = _laid(
        torch.full((batch, queries, call.heads, call.value_dim), torch.nan, dtype=half, device=device), case.layouts[3]
    )
    if "log_sum_exp" in call.outputs:
        found["log_sum_exp"] = torch.full((batch, call.heads, queries), torch.nan, device=device)
    return found


def of_part_0(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The first part, with logical axes: its memory begins where that of ``x`` does."""
    chosen = part(layout)
    whole = x if chosen is None else x.select(chosen[0], 0)
    return whole.permute([unpacked(layout).index(axis) for axis in "BNHD"])


def in_memory(case: Case, at: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What is packed as the whole tensors, and the layouts of those."""
    found = dict(at)
    found |= {name: whole(at[name], layout) for name, layout in case.packed.items()}
    return found, case.packed


def whole(x: torch.Tensor, layout: str) -> torch.Tensor:
    """All of the tensor that has this first part, with the axes of ``layout``."""
    sizes = dict(zip("BNHD", x.shape, strict=True))
    shape = [sizes.get(axis, PARTS) for axis in layout]
    return x.as_strided(shape, torch.empty(shape, device="meta").stride())


def _laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x.contiguous() if layout == "BNHD" else x.transpose(1, 2).contiguous().transpose(1, 2)


def symbols(case: Case, at: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """What the expressions of launch arguments speak of."""
    call = case.call
    batch, queries, keys = case.sizes
    found = {
        "B": batch, "H": call.heads, "HKV": call.kv_heads, "NQ": queries, "NK": keys, "SMS": 4,
        "scale_bits": bits(call.attributes["scale"]), "softcap_bits": bits(call.attributes.get("softcap", 0.0)),
    }  # fmt: skip
    for side in ("left", "right"):
        reach = (case.routed or call).attributes.get(side, -1)
        if isinstance(reach, int) and reach >= 0:
            found[side] = reach
    for name in ("query", "key", "value", "output"):
        for axis, place in zip("BNH", (0, 1, 2), strict=True):
            stride = at[name].stride(place)
            assert stride % STRIDE_UNIT == 0
            found[f"{name}_stride_{axis}"] = stride // STRIDE_UNIT
        found[f"{name}_offset"] = 0
    for name, layout in case.packed.items():
        sizes, (axis, number) = dict(zip("BNHD", at[name].shape, strict=True)), part(layout) or (0, 0)
        found[f"{name}_offset"] = number * prod(sizes[x] for x in layout[axis + 1 :]) // STRIDE_UNIT
    for name in call.inputs:
        axes, x = FULL.get(name, ""), at[name]
        for axis in axes:
            place = axes.index(axis) - len(axes) + x.ndim
            there = place >= 0 and x.shape[place] > 1
            found[f"{name}_stride_{axis}"] = x.stride(place) if there else 0
    return found


def bits(value: float) -> int:
    """A float32 as an int32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def value(expression: str, known: Mapping[str, int]) -> int:
    """The value of an expression of a launch argument or a grid."""
    functions = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}
    return int(eval(expression, {"__builtins__": {}}, {**functions, **known}))


def call(made: Program, given: Mapping[str, Any], grid: Sequence[int]) -> None:
    """Runs a kernel in the interpreter on arguments by their names, tensors and numbers."""
    module, _, attribute = made.function.partition(":")
    function = getattr(import_module(module), attribute)
    named = {**made.constants, **given}
    for name in function.arg_names:
        named.setdefault(name, None)  # as the compiler does: what is neither an argument nor a constant is None
    function[tuple(grid)](**named)


def interpreted(made: Program, tensors: Mapping[str, Any], known: Mapping[str, int]) -> None:
    """Runs a kernel in the interpreter on ``tensors``, with the numbers that its expressions give of ``known``. Kernels
    address memory by strides and not by shapes.
    """
    given = {a.name: value(a.expression, known) if a.kind == "int32" else tensors[a.name] for a in made.arguments}
    call(made, given, [value(x, known) for x in made.grid])


def run(
    case: Case, made: Program, expressions: Mapping[str, str] | None = None, constants: Mapping[str, Any] | None = None,
    grid_of: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Outputs (float32, logical axes) of one launch. ``expressions`` of arguments, ``constants`` and the grid may be
    replaced, to plant errors.
    """
    at = tensors(case, case.inputs())
    known = symbols(case, at)
    arguments: dict[str, Any] = {}
    for argument in made.arguments:
        if argument.kind == "int32":
            arguments[argument.name] = value((expressions or {}).get(argument.name, argument.expression), known)
        else:
            arguments[argument.name] = at[argument.name]
    call(made, {**(constants or {}), **arguments}, [value(x, known) for x in grid_of or made.grid])
    return {name: at[name].float().numpy() for name in case.call.outputs}
