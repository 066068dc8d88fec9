"""Kernels on a GPU against float64, on random configurations: ``prepare DIR`` compiles (no GPU), ``run DIR`` compares.

The cases are those of ``tests/conformance`` and as many from a seed; every case runs one of its tactics, in turn, the
outputs poisoned before. PYTHONPATH must hold the checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import OpCall, Program
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels
from tests.conformance.case import Case
from tests.conformance.cases import CASES
from tests.conformance.random_cases import random_cases


def cases(count: int, seed: int) -> Iterator[Case]:
    """Those with a name, then ``count`` of each op from ``seed``."""
    for op, named in CASES.items():
        yield from named
        yield from random_cases(op, seed, count)


def chosen(case: Case, number: int, architecture: int) -> tuple[OpCall, Program] | Unsupported:
    """The general call of the case and the tactic that is its turn: every second time the best one."""
    known = kernels()
    call = general(known, case.call)
    try:
        programs = known[call.op].programs(call, architecture)
    except Unsupported as error:
        return error
    return call, programs[0 if number % 2 else (number // 2) % len(programs)]


def prepare(out: Path, count: int, seed: int, architecture: int) -> None:
    import triton

    class Only:
        """The kernels, with no programs but those that some case runs."""

        def __init__(self, op: str, wanted: dict[str, set[str]]) -> None:
            self.made, self.wanted = kernels()[op], wanted

        def __getattr__(self, name: str) -> object:
            return getattr(self.made, name)

        def programs(self, call: OpCall, architecture: int) -> list[Program]:
            return [p for p in self.made.programs(call, architecture) if p.tactic in self.wanted[key_of(call)]]

    wanted: dict[str, set[str]] = {}
    calls = {}
    for number, case in enumerate(cases(count, seed)):
        found = chosen(case, number, architecture)
        if not isinstance(found, Unsupported):
            call, program = found
            wanted.setdefault(key_of(call), set()).add(program.tactic)
            calls[key_of(call)] = call
    only = {op: Only(op, wanted) for op in kernels()}
    built = build([], list(calls.values()), only, [architecture], Cache.default())  # type: ignore[arg-type]
    for call in built.calls:
        for refusal in call.refused:
            print(f"not compiled: {call.call.op} {refusal.tactic}: {refusal.reason}", file=sys.stderr)
    write(out, built, triton.__version__)


def run(bundle: Path, count: int, seed: int, only: int | None) -> int:
    """The number of wrong cases. ``only``: every n-th case, for a slow tool around it."""
    import torch

    from attncompile.kernels.launcher import launcher_for, run_program
    from tests.conformance.budget import wrong, wrong_sums
    from tests.conformance.launch import tensors
    from tests.conformance.vectorised import expected

    opened, capability = Bundle.open(bundle), launcher_for().capability
    tally: Counter[str] = Counter()
    for number, case in enumerate(cases(count, seed)):
        if only and number % only:
            continue
        found = chosen(case, number, capability)
        if isinstance(found, Unsupported):
            tally[f"refused: {found.code}"] += 1
            continue
        call, program = found
        compiled = [c for c in opened.kernels(key_of(call), capability) if c.entry.tactic == program.tactic]
        if not compiled:
            tally["not compiled"] += 1
            continue
        given = case.inputs()
        want, want_lse = expected(case.call, given, "cuda")
        low, low_lse = expected(case.call, given, "cuda", half=case.call.dtype)
        at = tensors(case, given, "cuda")
        run_program(program, compiled[0], at, case.call.attributes, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        problem = wrong(at["output"].float().cpu().numpy(), want, low, case.call.dtype)
        if not problem and "log_sum_exp" in at:
            softcap = case.call.attributes.get("softcap", 0.0)
            problem = wrong_sums(at["log_sum_exp"].cpu().numpy(), want_lse, low_lse, softcap)
            problem = f"log-sum-exp: {problem}" if problem else ""
        tally[f"{case.call.op} {program.language} {'wrong' if problem else 'right'}"] += 1
        if problem:
            print(f"{case.name}: {program.tactic}: {problem}\n    {case.call}", flush=True)
    for name, times in sorted(tally.items()):
        print(f"{times:6d}  {name}")
    return sum(times for name, times in tally.items() if name.endswith("wrong") or name == "not compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["prepare", "run"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=200, help="random cases of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", type=int, help="every n-th case")
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given.bundle, given.count, given.seed, given.arch)
    else:
        sys.exit(1 if run(given.bundle, given.count, given.seed, given.only) else 0)


main()
