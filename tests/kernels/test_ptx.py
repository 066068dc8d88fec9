"""PTX as text: parameters, hidden ones, and what ptxas reports."""

from __future__ import annotations

import pytest

from attncompile.core.errors import KernelError
from attncompile.kernels import ptx
from tests.kernels.conftest import ARGUMENTS, PTX

_MORE = "kernel_param_2,\n\t.param .u64 .ptr .global .align 1 kernel_param_3,\n\t.param .u64 kernel_param_4\n)"
HIDDEN = PTX.replace("kernel_param_2\n)", _MORE)


def test_hidden_parameters_go() -> None:
    assert [p.type for p in ptx.parameters(HIDDEN)] == ["u64", "u32", "u64", "u64", "u64"]
    made = ptx.without_hidden(HIDDEN, 3)
    assert made == PTX
    assert ptx.entry_name(made) == "kernel"
    ptx.check_parameters(made, ARGUMENTS)
    ptx.check_parameters(HIDDEN, ARGUMENTS, hidden=2)
    assert ptx.without_hidden(PTX, 3) == PTX


def test_a_parameter_that_is_read_stays() -> None:
    used = HIDDEN.replace("ret;", "ld.param.b64 %rd1, [kernel_param_3];\n\tret;")
    with pytest.raises(KernelError, match="reads its hidden parameter kernel_param_3"):
        ptx.without_hidden(used, 3)
    # kernel_param_3 is no part of kernel_param_30.
    other = HIDDEN.replace("ret;", "ld.param.b64 %rd1, [kernel_param_30];\n\tret;")
    assert len(ptx.parameters(ptx.without_hidden(other, 3))) == 3


def test_parameters_must_be_the_arguments() -> None:
    with pytest.raises(KernelError, match="5 parameters for 3 arguments"):
        ptx.check_parameters(HIDDEN, ARGUMENTS)
    with pytest.raises(KernelError, match="kernel_param_0 is u64; argument rows is an int32"):
        ptx.check_parameters(PTX, (ARGUMENTS[1], ARGUMENTS[0], ARGUMENTS[2]))
    with pytest.raises(KernelError, match="2 entries, not one"):
        ptx.parameters(PTX + PTX)


def test_resources() -> None:
    log = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x\n"
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90a'\n"
        "ptxas info    : Function properties for kernel\n"
        "    48 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 8 bytes smem\n"
    )
    assert ptx.resources(log) == ptx.Resources(168, 44, True)
    assert ptx.resources(log.split("\n", 1)[1]) == ptx.Resources(168, 44, False)
    with pytest.raises(KernelError, match="reported 0 kernels"):
        ptx.resources("nothing")
