"""Runs the kernels that choose blocks in Triton's interpreter, in a process of its own: ``python -m
tests.conformance.select_interpret`` prints one line of JSON a case, then one for each error that was planted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from attncompile.core.kernel import OpCall, Program, Tactic
from attncompile.kernels import symbols
from attncompile.plugins.block_select.kernel import ScoresKernel, SelectKernel
from attncompile.plugins.block_select.op import SCORES
from tests.conformance.interpret import mend
from tests.conformance.launch import interpreted
from tests.conformance.selection import CASES, Selection, random_selections, verdict

WIDTH = 64
"""Columns that are looked at at once; one case is done in small pieces, since the interpreter is slow."""

SEVERAL = 4
"""Columns of one of them."""

ANCHORED = next(n for n, case in enumerate(CASES) if case.rule == "anchor")

Change = Callable[[Program], Program]


def launcher(change: Change = lambda p: p, width: int = WIDTH) -> Callable[..., None]:
    def launch(call: OpCall, tensors: Mapping[str, Any], layouts: Mapping[str, str]) -> None:
        strided = {n: symbols.Strided(tuple(x.shape), tuple(x.stride())) for n, x in tensors.items()}
        known = symbols.of_tensors(strided, call.attributes, layouts)
        if call.op == SCORES:
            kernel = ScoresKernel()
            members = call.attributes["block"] // call.attributes["stride"]
            tactic = Tactic("test", {"BM": 16, "BN": max(16, members)}, 4)
            program = kernel.program(kernel.general(kernel.call(call)), tactic)
        else:
            select = SelectKernel()
            program = select.program(select.general(select.call(call)), width)
        program = change(program)
        interpreted(program, tensors, known)

    return launch


def constant(op: str, **changes: Any) -> Change:
    return lambda p: replace(p, constants={**p.constants, **changes}) if p.op == op else p


def argument(op: str, name: str, expression: str) -> Change:
    def change(p: Program) -> Program:
        said = tuple(replace(a, expression=expression) if a.name == name else a for a in p.arguments)
        return replace(p, arguments=said) if p.op == op else p

    return change


PLANTED: dict[str, tuple[int, Change]] = {
    "tiles as if there was no triangle": (0, constant("BlockScores", CAUSAL=False)),
    "half of the head dim": (0, constant("BlockScores", DK=16, K1=16)),
    "one key fewer": (1, argument("BlockScores", "NK", "NK - 1")),
    "one query fewer": (0, argument("BlockScores", "NQ", "NQ - 1")),
    "the first key head for all": (1, argument("BlockScores", "group", "H")),
    "a scale of one": (0, argument("BlockScores", "scale", "1065353216")),
    "the other rule": (0, constant("BlockSelect", COUNTED=True)),
    "no triangle in the lists": (0, constant("BlockSelect", CAUSAL=False)),
    "a row of scores fewer": (0, argument("BlockSelect", "TQ", "T - 1")),
    "one amount for all heads": (4, argument("BlockSelect", "amount_h", "0")),
    "no sinks": (6, argument("BlockSelect", "sinks", "0")),
    "no window": (6, argument("BlockSelect", "window", "0")),
    "one column fewer": (1, argument("BlockSelect", "C", "C - 1")),
    "shares not rounded up": (12, constant("BlockSelect", SLACK=1.0)),
    "sums, not the highest": (ANCHORED, constant("BlockScores", HIGHEST=False)),
    "the highest, not sums": (0, constant("BlockScores", HIGHEST=True)),
    "a mean query that stands for one key": (ANCHORED, constant("BlockScores", SPAN=1)),
    "a mean query that sees a block more": (ANCHORED, constant("BlockScores", SPAN=128)),
    "a key fewer of a block": (ANCHORED + 1, argument("BlockScores", "NK", "NK - 1")),
    "an anchor without the window": (ANCHORED, argument("BlockSelect", "window", "0")),
    "an anchor without the first block": (ANCHORED, argument("BlockSelect", "sinks", "0")),
    "one distance for all heads": (ANCHORED, argument("BlockSelect", "amount_h", "0")),
    "an anchor of a column fewer": (ANCHORED + 1, argument("BlockSelect", "C", "C - 1")),
    "no triangle around an anchor": (ANCHORED, constant("BlockSelect", CAUSAL=False)),
}
"""By name: the case that shows it, and the error."""


def planted(number: int, change: Change) -> str:
    case = CASES[number]
    if case.heads[0] == case.heads[1] == 1 or case.heads[1] == 1:
        case = replace(case, heads=(2, 2))
    try:
        return verdict(case, launcher(change))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    mend()
    warnings.simplefilter("ignore")
    drawn = (replace(c, heads=(1, 1), batch=1, amount=c.amount[:1]) for c in random_selections(3, 4, 150))
    cases: list[Selection] = [*CASES, *drawn]
    for case in cases:
        print(json.dumps({"name": case.name, "wrong": verdict(case, launcher())}), flush=True)
    pieces = replace(CASES[8], name="in pieces", tokens=(640, 640), stride=64, heads=(1, 1))
    anchored = replace(CASES[ANCHORED], name="around an anchor, in pieces")
    for case in (pieces, replace(CASES[0], name="of a triangle, in pieces", heads=(1, 1)), anchored):
        print(json.dumps({"name": case.name, "wrong": verdict(case, launcher(width=SEVERAL))}), flush=True)
    for name, (number, change) in PLANTED.items():
        print(json.dumps({"name": f"planted: {name}", "wrong": planted(number, change)}), flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
