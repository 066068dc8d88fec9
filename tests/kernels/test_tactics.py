"""Tactics of the kernels of softmax attention as the compiler sees them, on every architecture: those that are tried
first compile and spill nothing in their loops, those that are tried last are small.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import ARCHITECTURES, SMALL_SHARED, OpCall, Program
from attncompile.kernels import cubin, ptx
from attncompile.kernels.build import general
from attncompile.kernels.cache import Cache
from attncompile.kernels.compiler import SHARED_LIMIT, describe
from attncompile.kernels.entry import Compiled
from attncompile.kernels.jobs import Job
from attncompile.kernels.pool import compile_all
from attncompile.plugins import kernels
from tests.kernels import sass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

CLOSELY = (80, 90)
"""On these the calls of a test are compiled closely; on the others what needs most."""

ALIKE = {86: 80, 89: 80}
"""The programs of one are those of the other, and so is what Triton makes of them: compiled is the second alone. That
ptxas takes code for the first is seen in ``tensorrt/test_walk.py``.
"""

GRIDS = {
    "clamped": {"grid": [64, 64], "kernel_size": [16, 16], "border": "clamp"},
    "video": {"grid": [5, 30, 52], "kernel_size": [3, 15, 27], "prefix": 3},
}
LISTS = dict.fromkeys(("rows", "columns", "kinds", "masks", "order"), "int32")
EVERYTHING = {"key_mask": "bool", "bias": "float16", "sinks": "float32", "mask": "bool", "key_lengths": "int32"}


def attention(dim: int, left: int = -1, right: int = -1, dtype: str = "float16") -> OpCall:
    return OpCall("Attention", dtype, 8, 2, dim, dim, attributes={"left": left, "right": right})


def neighborhood(dim: int, grid: str) -> OpCall:
    return OpCall("NeighborhoodAttention", "float16", 8, 2, dim, dim, attributes=GRIDS[grid])


def listed(dim: int, block: int, **inputs: str) -> OpCall:
    return OpCall(
        "BlockSparseAttention", "float16", 8, 2, dim, dim, attributes={"block": block, "masked_rows": "zero"},
        inputs={**LISTS, **inputs}, outputs=("output", "log_sum_exp") if inputs else ("output",),
    )  # fmt: skip


def per_score(dim: int, **inputs: str) -> OpCall:
    """A value of each score's own: relative positions, or a mask."""
    return OpCall("Attention", "float16", 8, 8, dim, dim, inputs=inputs, attributes={"masked_rows": "zero"})


def full(dim: int) -> OpCall:
    """All that ``Attention`` can have at once."""
    return OpCall(
        "Attention", "float16", 8, 2, dim, dim, inputs=EVERYTHING, outputs=("output", "log_sum_exp"),
        attributes={"left": 100, "right": 30, "softcap": 50.0, "masked_rows": "uniform"},
    )  # fmt: skip


def compiled(jobs: Sequence[tuple[OpCall, int, Program]]) -> list[Compiled]:
    found = compile_all([Job(program, architecture) for _, architecture, program in jobs], Cache.default())
    for (call, architecture, program), made in zip(jobs, found, strict=True):
        if isinstance(made, Unsupported):
            pytest.fail(f"{call.op} {call.head_dim} {program.tactic} on sm_{architecture}: {made.message}")
    return [made for made in found if isinstance(made, Compiled)]


def programs(call: OpCall, architecture: int) -> Sequence[Program]:
    return kernels()[call.op].programs(general(kernels(), call), architecture)


COMPILED = [a for a in ARCHITECTURES if a not in ALIKE]


@pytest.mark.parametrize("architecture", ALIKE)
def test_they_are_alike(architecture: int) -> None:
    """First and last tactic of every kind of call; what the other's need of shared memory is had here too."""
    calls = [attention(128, 0, 0), attention(64, -1, 0), neighborhood(128, "clamped"), neighborhood(256, "video"),
             listed(128, 128), listed(256, 128), per_score(128, bias="float16"), full(64), full(256)]  # fmt: skip
    for call in calls:
        own, others = programs(call, architecture), programs(call, ALIKE[architecture])
        for place in (0, -1):
            assert describe(own[place]) == describe(others[place]), (call.op, call.head_dim, own[place].tactic)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_tactics(architecture: int, tmp_path: Path) -> None:
    """The tactic that is tried first, of dense calls, windows and clamped neighborhoods at head dims 64 and 128, on
    every architecture. On sm_80 and sm_90 of causal calls too, and no register spills, but for a few numbers that the
    Gluon kernel of a window at 128 keeps from tile to tile, outside of its loops over keys.
    """
    calls = [attention(dim, *reach) for dim in (64, 128) for reach in ((), (0, 0))]
    calls += [neighborhood(dim, "clamped") for dim in (64, 128)]
    if architecture in CLOSELY:
        calls += [attention(128, -1, 0), attention(64, -1, 0), per_score(64, bias="float16")]
    if architecture == 90:
        calls += [per_score(128, bias="float16"), per_score(128, mask="bool")]
    found = compiled([(c, architecture, programs(c, architecture)[0]) for c in calls])
    for made in found:
        entry = made.entry
        ptx.check_parameters(made.ptx, entry.arguments)
        cubin.check(made.cubin)
        assert entry.shared <= SHARED_LIMIT[architecture]
        assert entry.hidden == 0 and not entry.serialized, entry.tactic
        if architecture in CLOSELY:
            windowed = entry.language == "gluon" and entry.constants.get("HAS_LEFT") and entry.head_dim == 128
            assert entry.spills <= (96 if windowed else 0), (entry.op, entry.head_dim, entry.tactic, entry.spills)
            if windowed:
                (tmp_path / "window.cubin").write_bytes(made.cubin)
                loops = sass.loops_over_keys(tmp_path / "window.cubin")
                assert loops and not any(sass.local_memory(loop) for loop in loops), entry.tactic


@pytest.mark.parametrize("architecture", COMPILED)
def test_tactics_of_lists(architecture: int, tmp_path: Path) -> None:
    """The tactic that is tried first, at head dim 128 and blocks of 128, on sm_80 and sm_90 at 64 and with a bias too,
    and on sm_90 the second: Triton's spills no registers on these two. The Gluon kernel keeps a few numbers outside of
    its loops over keys; in them it has no local memory, and fits twice where it has one consumer.
    """
    calls = [listed(128, 128)]
    if architecture in CLOSELY:
        calls += [listed(64, 64), listed(128, 64 if architecture == 90 else 128, bias="float16")]
    jobs = [(c, architecture, programs(c, architecture)[0]) for c in calls]
    if architecture == 90:
        jobs += [(c, 90, programs(c, 90)[1]) for c in (listed(128, 128), listed(128, 64))]
    for made in compiled(jobs):
        entry = made.entry
        ptx.check_parameters(made.ptx, entry.arguments)
        assert entry.hidden == 0 and not entry.serialized and entry.abi == "plain", entry.tactic
        assert all(entry.shared <= SHARED_LIMIT[a] for a, other in ALIKE.items() if other == architecture)
        if entry.language == "triton":
            assert architecture not in CLOSELY or entry.spills == 0, (entry.tactic, entry.head_dim, entry.spills)
            continue
        assert entry.spills <= 128, (entry.tactic, entry.spills)
        (tmp_path / "lists.cubin").write_bytes(made.cubin)
        loops = sass.loops_over_keys(tmp_path / "lists.cubin")
        assert loops and not any(sass.local_memory(loop) for loop in loops), entry.tactic
        if entry.constants["CONSUMERS"] == 1:
            # Two thread blocks on a multiprocessor: 64 K registers, 228 KB of shared memory, of which each takes 1 KB.
            assert entry.registers <= 65536 // (2 * 32 * entry.warps) and 2 * (entry.shared + 1024) <= 228 * 1024


@pytest.mark.parametrize("architecture", COMPILED)
def test_every_call_has_a_small_tactic(architecture: int) -> None:
    """The tactic that is tried last is within what every launch may have without asking: with every optional input at
    head dim 256; on sm_80, sm_90 and sm_120 of video neighborhoods and of lists at 256; on the first two of a call with
    every optional input at 64; on sm_80 with all of them at 128, and of windows at other head dims; on sm_90, whose
    programs need more, of windows at 64, 128 and 256. The program is the same everywhere.
    """
    calls = [full(256)]
    if architecture in CLOSELY:
        calls += [neighborhood(256, "video"), listed(256, 128), full(64)]
    if architecture == 80:
        calls += [attention(dim, 0, 0) for dim in (32, 72, 160)]
        calls += [attention(256, dtype="bfloat16"), full(128)]
    if architecture == 90:
        calls += [attention(dim, 0, 0) for dim in (64, 128, 256)]
    if architecture == 120:
        calls += [neighborhood(256, "video"), listed(256, 128)]
    jobs = [(c, architecture, programs(c, architecture)[-1]) for c in calls]
    for made in compiled(jobs):
        assert made.entry.shared <= SMALL_SHARED, (made.entry.tactic, made.entry.head_dim, made.entry.shared)
        assert made.entry.abi == "plain" and made.entry.hidden == 0
    for call in (attention(32, 0, 0), attention(72, 0, 0), neighborhood(256, "video"), listed(256, 128), full(128)):
        assert describe(programs(call, architecture)[-1]) == describe(programs(call, 80)[-1])


def test_parameters_are_the_arguments_for_every_kind_of_program() -> None:
    """All tactics on sm_90, which are of both languages, of ``Attention``, bare and with every optional input and
    output, and of ``NeighborhoodAttention``, bare and with a mask and a bias. The PTX without hidden parameters
    assembles: that is how its cubin was made.
    """
    calls = [attention(64), full(64), neighborhood(64, "video")]
    with_mask = OpCall(
        "NeighborhoodAttention", "bfloat16", 8, 2, 64, 64, attributes=GRIDS["clamped"],
        inputs={"key_mask": "bool", "bias": "float32"},
    )  # fmt: skip
    jobs = [(c, 90, p) for c in (*calls, with_mask) for p in programs(c, 90)]
    found = compiled(jobs)
    assert {m.entry.language for m in found} == {"triton", "gluon"}
    for (call, _, _), made in zip(jobs, found, strict=True):
        given = ptx.parameters(made.ptx)
        names = [a.name for a in made.entry.arguments]
        assert len(given) == len(names) and names[:3] == ["query", "key", "value"]
        assert names[-1] == call.outputs[-1] and set(call.inputs) <= set(names)
        kinds = [a.kind for a in made.entry.arguments]
        assert kinds == sorted(kinds, key=("input", "int32", "output").index), "TensorRT's order"
        assert [p.type for p in given] == ["u32" if k == "int32" else "u64" for k in kinds]
