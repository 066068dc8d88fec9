"""Runs Triton kernels of the cases in the interpreter, in a process of its own: ``python -m tests.conformance.interpret
OP N OF`` does every OF-th case from the N-th and prints one line of JSON each, then those with an error planted.

Triton decides when it is imported whether it interprets, so that no other test may have imported it.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from attncompile.core.kernel import OpCall
from tests.conformance import launch, planted, vectorised
from tests.conformance.budget import wrong, wrong_sums
from tests.conformance.case import Case
from tests.conformance.cases import CASES
from tests.conformance.random_cases import random_cases

RANDOM, RANDOM_SCORES = {"BlockSparseAttention": 4}, 30_000
"""Of each op (12 where it does not say).
"""


def mend() -> None:
    """Of Triton 3.9's interpreter: products of bfloat16, and what takes more than half of its time. Torch runs in one
    thread: the references are small, and threads wait for each other.
    """
    torch.set_num_threads(1)
    products_of_bfloat16()
    # Sums for an assertion of device code, which it then skips.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_builtin = patched_once
    interpreter._patch_lang(interpreter.tl.zeros_like.fn)  # once and for all: what the language's own functions call
    interpreter.InterpretedFunction.__call__ = called
    interpreter._get_np_dtype = numpy_type


def products_of_bfloat16() -> None:
    """It keeps bfloat16 as its bits and multiplies those: give its products numbers."""
    builder = interpreter.InterpreterBuilder
    right = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        return right(self, _numbers(a), _numbers(b), d, *more)

    builder.create_dot = create_dot


@cache
def builtins(of: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(of) if interpreter.tl.core.is_builtin(member)]


def patched_once(of: Any, builder: Any, scope: Any) -> None:
    """It looks through all members of the language at each call of a device function, for those that it has not
    replaced yet: the same ones for every kernel, and none while a kernel runs.
    """
    members = builtins(of)
    if members and getattr(of, members[0][0]) is members[0][1]:
        for name, member in members:
            interpreter._patch_attr(of, name, member, builder, scope)


def called(self: Any, *given: Any, **named: Any) -> Any:
    """A call of a device function. Its own one replaces members of the language, which the launch of the kernel has
    done already.
    """
    return self.rewrite()(*given, **named)


@cache
def _numpy_type(name: str, find: Callable[[Any], Any] = interpreter._get_np_dtype) -> Any:
    return find(interpreter.tl.dtype(name))


def numpy_type(kind: Any) -> Any:
    """Its own one hashes every type that there is, for each value."""
    if isinstance(kind, interpreter.tl.block_type):
        kind = kind.element_ty
    return np.dtype(np.uint64) if isinstance(kind, interpreter.tl.pointer_type) else _numpy_type(kind.name)


def _numbers(x: Any) -> Any:
    if x.dtype.scalar != interpreter.tl.bfloat16:
        return x
    wide = (x.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, interpreter.tl.float32)


def tiles(case: Case) -> tuple[int, int]:
    """Queries and keys of a tile: small, so that there are several; large where a case would take long."""
    _, queries, keys = case.sizes
    if case.call.op == "BlockSparseAttention":
        # Several tiles to a block, or one; narrower than a word of its masks, and wider.
        return ((32, 16), (64, 32), (32, 64), (64, 64))[case.seed % 4 if case.seed < 10 else 3]
    return (16, 16) if queries * keys < 20_000 else (64, 32)


def verdict(case: Case, **options: Any) -> str:
    """What is wrong with the kernel's outputs; empty if nothing is."""
    got, inputs = launch.run(case, launch.program(case, *tiles(case)), **options), case.inputs()
    want, lse = vectorised.expected(case.call, inputs)
    low, low_lse = vectorised.expected(case.call, inputs, half=case.call.dtype)
    said = wrong(got["output"], want, low, case.call.dtype)
    if "log_sum_exp" in got and not said:
        said = wrong_sums(got["log_sum_exp"], lse, low_lse, case.call.attributes.get("softcap", 0.0))
    return said


def cases(op: str) -> list[Case]:
    """Named cases and random ones; a plain window on a grid also as the call of ``Attention`` that it is."""
    found = [*CASES[op], *random_cases(op, 23, RANDOM.get(op, 12), RANDOM_SCORES)]
    kernel, _ = launch.KERNELS[op]
    if op == "NeighborhoodAttention":
        for case in list(found):
            routed: OpCall = kernel.call(case.call)
            if routed.op != op:
                found.append(replace(case, name=f"{case.name}, by the kernel of Attention", routed=routed))
    return found


def main(op: str, part: int, parts: int) -> None:
    mend()
    warnings.simplefilter("ignore")
    work: list[tuple[str, Callable[[], str]]] = [(c.name, lambda c=c: verdict(c)) for c in cases(op)]
    work += [(f"planted: {name}", lambda p=p: p.verdict(verdict)) for name, p in planted.PLANTED[op].items()]
    for name, run in work[part::parts]:
        print(json.dumps({"name": name, "wrong": run()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
