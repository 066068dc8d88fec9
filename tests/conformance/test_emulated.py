"""Gluon kernels in the emulator: the dense one, which is known to be right on a GPU, and the one of lists of blocks."""

from __future__ import annotations

from unittest.mock import patch

import pytest

pytest.importorskip("triton")

from attncompile.core.kernel import Tactic
from tests.conformance import emulator, launch, vectorised
from tests.conformance.budget import wrong, wrong_sums
from tests.conformance.case import Case
from tests.conformance.cases import CASES, named

pytestmark = pytest.mark.slow

DENSE = (
    "17 queries, 50 keys, window",
    "GQA, batch 2, heads first",
    "head dim 72, value dim 72",
    "sinks, windows without a key",
)
TAKEN = {"rows", "columns", "kinds", "masks", "order", "sinks"}
SPARSE = [
    c
    for c in CASES["BlockSparseAttention"]
    if set(c.call.inputs) <= TAKEN and c.call.attributes["masked_rows"] != "uniform"
]


def verdict(case: Case, number: int, edits: emulator.Edits | None = None) -> str:
    """What is wrong with the outputs of the Gluon kernel; empty if nothing is. ``number`` varies tiles and stages."""
    kernel, module = launch.KERNELS[case.call.op]
    block = case.call.attributes.get("block", 128)
    consumers = block // 64
    constants = {"TAKE": 232, "GIVE": 40, "TURNS": consumers == 2, "CONSUMERS": consumers}
    keys = (64, 32)[number % 2] if block == 64 else (128, 64)[number % 2]
    tactic = Tactic("hopper-test", {**constants, "BN": keys}, 4, 2 + number // 2 % 2)
    with patch.object(module, "tactics", lambda *_: [tactic]):
        (program,) = kernel.programs(kernel.general(case.call), 90)
    assert program.language == "gluon"
    given = case.inputs()
    at = launch.tensors(case, given)
    known = {**launch.symbols(case, at), "SMS": 3 + number % 3}
    values = {
        a.name: launch.value(a.expression, known) if a.kind == "int32" else emulator.buffer_of(at[a.name], a.type)
        for a in program.arguments
    }
    try:
        emulator.launch(program, values, launch.value(program.grid[0], known), number, edits)
    except emulator.EmulationError as error:
        return str(error)
    want, lse = vectorised.expected(case.call, given)
    low, low_lse = vectorised.expected(case.call, given, half=case.call.dtype)
    said = wrong(at["output"].float().numpy(), want, low, case.call.dtype)
    if "log_sum_exp" in at and not said:
        said = wrong_sums(at["log_sum_exp"].numpy(), lse, low_lse, case.call.attributes.get("softcap", 0.0))
    return said


@pytest.mark.parametrize("name", DENSE)
def test_what_is_right_on_a_gpu_is_right_here(name: str) -> None:
    assert not verdict(named("Attention", name), 1)


@pytest.mark.parametrize(("number", "case"), list(enumerate(SPARSE)), ids=str)
def test_lists_of_blocks(number: int, case: Case) -> None:
    assert not verdict(case, number)


def test_there_are_cases() -> None:
    assert len(SPARSE) >= 35


@pytest.mark.parametrize("seed", (4, 9, 14))
def test_whichever_warpgroup_goes_on(seed: int) -> None:
    for name in ("128", "sinks"):
        assert not verdict(named("BlockSparseAttention", name), seed)


MANY = "128, lists of heads and batch entries"
PLANTED = {
    "a slot of keys given back under a product": (
        MANY, "consume_run", ("s_token = start_scores(rings, queries, stage, SPEC)",
                              "s_token = start_scores(rings, queries, stage, SPEC); "
                              "mbarrier.arrive(k_empty.index(stage))"),
    ),
    "values read before they arrive": (
        MANY, "consume_last", ("    arrived(v_full.index(stage), phase)\n", "")
    ),
    "queries never given back": (MANY, "consume_last", ("    mbarrier.arrive(q_empty.index(turn & 1))\n", "")),
    "a turn not passed on": (
        MANY, "pass_by", ("            mbarrier.arrive(turns.index((INDEX + 1) % CONSUMERS))\n", "")
    ),
    "a column too late": ("128", "produce", ("(t + 1) // PARTS", "t // PARTS")),
    "partial blocks shown whole": ("128", "hide", ("hidden = tile < partial", "hidden = tile < 0")),
    "bits of the other consumer": ("128", "consume", ("offsets = (INDEX * ROWS + inside)", "offsets = (0 + inside)")),
    "keys beyond the last": (
        "128, N past the last block", "shown_only", ("first + inside < NK", "first + inside < NK + 1")
    ),
    "masks of the row before": (MANY, "consume", ("gl.load(kinds + next_start", "gl.load(kinds + start")),
    "columns of the row before": (
        "128, N past the last block", "consume", ("gl.load(columns + next_start", "gl.load(columns + start")
    ),
    "lists of the wrong row": ("packed lists", "span_of", ("lists[0] + n * 3", "lists[0] + n // 2 * 3")),
    "heads that share lists": (MANY, "place", ("n // count % sets_h + copy % alike", "copy % alike")),
    "one full block less": ("full blocks alone", "span_of", ("gl.load(at + 2)", "gl.load(at + 2) - 1")),
    "sinks forgotten in the sum": ("sinks", "consume", ("l = l * alpha + gl.exp2(sink - top)", "l = l * alpha")),
    "sinks that scale nothing": ("sinks", "consume", ("reciprocal(l, RULE) * alpha", "reciprocal(l, RULE)")),
    "the row after the next": ("128", "row_at", ("n = number % listed", "n = (number + 1) // 2 % listed")),
    "rows out of step": (MANY, "consume", ("row_at(number + 2 * step", "row_at(number + step")),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_noticed(planted: str) -> None:
    name, function, edit = PLANTED[planted]
    case = named("BlockSparseAttention", name)
    assert any(verdict(case, number, {function: edit}) for number in range(1, 5))
