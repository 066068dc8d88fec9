"""Kernels of linear attention: in the interpreter on poisoned outputs, with errors planted; compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attncompile.core.kernel import ARCHITECTURES, SMALL_SHARED, OpCall
from attncompile.kernels import calls
from attncompile.kernels.cache import Cache
from attncompile.plugins import kernels
from attncompile.plugins.linear_attention.op import APPLY, INPUTS, OUTPUT, SOLVE, STATE, STATES, STEP
from tests.conformance import linear
from tests.plugins import test_linear_bodies as bodies

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OPS = tuple(INPUTS)


@pytest.mark.parametrize("case", linear.CASES, ids=str)
def test_the_low_reference_is_near_the_naive_one(case: linear.Linear) -> None:
    """They share no code; what the type costs is all that is between them."""
    want, low = linear.expected(case)["output"], linear.low(case)
    assert np.linalg.norm(low - want) < {"float16": 2e-3, "bfloat16": 2e-2}[case.dtype] * np.linalg.norm(want)


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.conformance.linear_interpret", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {x["name"]: x["wrong"] for x in map(json.loads, done.stdout.splitlines())}
    planted = {name: said for name, said in found.items() if name.startswith("planted: ")}
    assert {name: said for name, said in found.items() if said and name not in planted} == {}
    assert [name for name, said in planted.items() if not said] == []
    assert len(found) - len(planted) == len(linear.CASES) + 16 and len(planted) >= 41


def test_a_steps_sums_are_the_same_in_all_threads() -> None:
    """Threads of a warp write one sum to one place: no multiply-add may round it otherwise in one of them."""
    from attncompile.kernels.compiler import compile_program

    for call in kernels()[STEP].standard("float16")[:1]:
        for program in kernels()[STEP].programs(call, 90):
            assert "fma." not in compile_program(program, 90, cache=Cache.default()).ptx, program.tactic


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_they_compile_without_spills(architecture: int) -> None:
    """All tactics on sm_80 and sm_90; on sm_120, whose programs are the same, those that are tried first and last. The
    first call of each op, and with gates a token at head dim 128 states of long chunks and the delta rule's tiles.
    """
    from attncompile.kernels.compiler import compile_program, describe

    made_for = [kernels()[op].standard("bfloat16")[0] for op in OPS]
    gated = next(c for c in kernels()[STATES].standard("bfloat16") if c.head_dim == 128 and c.attributes["decay"] == 2)
    made_for.append(replace(gated, attributes={**gated.attributes, "chunk": 1024}))
    made_for.append(kernels()[SOLVE].standard("bfloat16")[-1])
    for call in made_for:
        op, shared = call.op, []
        made = kernels()[op].programs(call, architecture)
        assert [*map(describe, made)] == [*map(describe, kernels()[op].programs(call, 80))]
        for program in {id(p): p for p in (made[0], made[-1])}.values() if architecture == 120 else made:
            entry = compile_program(program, architecture, cache=Cache.default()).entry
            assert entry.spills == 0, (op, program.tactic, entry.spills)
            shared.append(entry.shared)
        assert min(shared) <= SMALL_SHARED, (op, shared)


def test_calls_of_a_model() -> None:
    """Nodes as the mechanism writes them have calls, and symbols for all that their kernels' arguments speak of."""
    for form, ops in ((bodies.PLAIN["relu"], (STATE, APPLY)), (bodies.CAUSAL["retention"], (STATES, OUTPUT))):
        at = bodies.sizes(("BHDN", "BNHD", "BHDN", "BHND"), kv_heads=4, head_dim=16, value_dim=24, queries=40, keys=40)
        form = bodies.replace(form, chunk=0 if ops[0] == STATE else 16)
        found = calls.find(bodies.model(form, at, bodies.values(form, at)), kernels())
        assert [c.op for c in found] == list(ops)
        for node in found:
            assert node.call is not None and node.symbols is not None, node.verdict
            assert node.call.attributes["columns"] and node.call.kv_heads == 4
            assert all(kind == "float32" or name not in ("state", "total") for name, kind in node.call.inputs.items())
            for program in kernels()[node.op].programs(node.call, 80):
                known = {*node.symbols, "SMS"}
                for expression in (*program.grid, *(a.expression for a in program.arguments)):
                    words = expression
                    for mark in "()+-*/,":
                        words = words.replace(mark, " ")
                    names = {w for w in words.split() if not w.isdigit()} - {"cdiv", "min", "max"}
                    assert names <= known, (program.tactic, expression, names - known)


def test_the_domain_is_the_ops_with_kernels() -> None:
    """What a mechanism writes never runs through its body for want of a kernel."""
    from onnx import defs

    for kernel in kernels().values():
        kernel.register()
    assert {s.name for s in defs.get_all_schemas_with_history() if s.domain == "attncompile"} == set(kernels())


@pytest.mark.parametrize("op", OPS)
def test_the_op_has_a_kernel_everywhere(op: str) -> None:
    for dtype in ("float16", "bfloat16"):
        offered = kernels()[op].standard(dtype)
        assert offered
        for call in offered:
            for architecture in ARCHITECTURES:
                assert kernels()[op].supports(call, architecture).ok
                assert kernels()[op].programs(call, architecture)


REFUSED = [
    (STATE, {"key_map": "hedgehog"}, {}, 64, "feature-map"), (STATE, {"key_map": "relu"}, {}, 72 + 4, "head-dim"),
    (STATE, {"key_map": "relu"}, {}, 8, "head-dim"), (STATES, {"key_map": "relu", "chunk": 48}, {}, 64, "chunk"),
    (OUTPUT, {"key_map": "none", "query_map": "none", "chunk": 128, "decay": 3, "normaliser": "none"}, {}, 64, "chunk"),
    (STEP, {"key_map": "softmax"}, {}, 64, "feature-map"), (STATES, {"key_map": "softmax"}, {}, 64, "feature-map"),
    (STEP, {"query_map": "hedgehog"}, {}, 64, "feature-map"), (STEP, {"normaliser": "mala"}, {}, 64, "normaliser"),
    (OUTPUT, {"key_map": "none", "query_map": "none", "chunk": 64, "normaliser": "inline"}, {}, 64, "normaliser"),
    (STEP, {"normaliser": "none"}, {"initial_state": "float16"}, 64, "dtype"),
    (APPLY, {"query_map": "relu"}, {"state": "float16"}, 64, "dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "inputs", "dim", "code"), REFUSED, ids=str)
def test_refusals(op: str, attributes: dict[str, object], inputs: dict[str, str], dim: int, code: str) -> None:
    said = kernels()[op].supports(OpCall(op, "float16", 2, 2, dim, 64, attributes, inputs), 90)
    assert not said.ok and said.code == code
    assert not kernels()[op].supports(OpCall(op, "float64", 2, 2, 64, 64, attributes, inputs), 90).ok


def test_work_counts_what_goes_through_memory() -> None:
    call = kernels()[STATE].call(OpCall(STATE, "float16", 4, 4, 64, 64, {"key_map": "relu", "chunk": 256},
                                        outputs=("state",), batch=2, key_length=1024))  # fmt: skip
    program = kernels()[STATE].programs(call, 90)[0]
    work = kernels()[STATE].work(call, program)
    assert work.bytes == 2 * 8 * 1024 * 128 + 4 * 8 * 4 * 64 * 64
    assert program.constants["HB"] == 2 and work.blocks == 8 // 2 * 4
