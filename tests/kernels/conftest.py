"""Kernels that are made up."""

from __future__ import annotations

from attncompile.core.kernel import Argument
from attncompile.kernels.entry import Compiled, Entry

ARGUMENTS = (
    Argument("query", "input", "float16", align=16), Argument("rows", "int32", expression="B * NQ * query_stride_N"),
    Argument("output", "output", "float16", align=16),
)  # fmt: skip
PTX = """.version 8.7
.target sm_80
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2
)
{
	ret;
}
"""


def made_up(architecture: int = 80, tactic: str = "small", shared: int = 1024, **more: object) -> Compiled:
    """A kernel that no compiler made: its cubin is a few bytes."""
    facts = {
        "op": "Attention", "dtype": "float16", "head_dim": 64, "value_dim": 64, "architecture": architecture,
        "tactic": tactic, "abi": "plain", "language": "triton", "name": "kernel", "arguments": ARGUMENTS,
        "grid": ("cdiv(NQ, 64)", "H", "B"), "constants": {"BM": 64, "RULE": None}, "warps": 4, "shared": shared,
        "registers": 100, "spills": 0, "serialized": False, "hidden": 0, "specific": architecture >= 90,
        "ptx_version": 87, **more,
    }  # fmt: skip
    return Compiled(Entry(**facts), PTX, f"cubin of {architecture} {tactic}".encode())  # type: ignore[arg-type]
