"""Kernels of every op on a GPU against float64, on random configurations.

    python tools/gpu_conformance.py prepare DIR --arch 90      # compiles what the cases need; no GPU
    python tools/gpu_conformance.py run DIR --json out.json    # compares; 1 where anything is wrong or was not compiled
    compute-sanitizer --tool memcheck python tools/gpu_conformance.py run DIR --only 23 --jobs 1 --launch-only

The cases are those of ``tests/conformance`` and ``--count`` of each family from ``--seed``; of linear attention the
ops run one after the other. Every case runs one of its tactics, in turn, the outputs poisoned before.
``--case NAME`` runs one again. PYTHONPATH must hold the checkout. ``--interpret`` runs the Triton kernels in Triton's
interpreter instead, without a bundle or a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from attncompile.core.errors import KernelError, Unsupported
from attncompile.core.kernel import OpCall, Program
from attncompile.kernels import symbols
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.records import Built, key_of
from attncompile.plugins import kernels
from tests.conformance import linear, selection
from tests.conformance.case import Case
from tests.conformance.cases import CASES
from tests.conformance.linear import Linear
from tests.conformance.random_cases import random_cases, random_linear
from tests.conformance.selection import Selection

Any_ = Case | Linear | Selection
FAMILY, CHOICE = "LinearAttention", "BlockSelect"
START = 240.0
"""Seconds that a process may take to begin, beside those of a case."""


def cases(count: int, seed: int) -> Iterator[Any_]:
    """Those with a name, then ``count`` of each family from ``seed``."""
    for op, named in CASES.items():
        yield from named
        yield from random_cases(op, seed, count)
    yield from linear.CASES
    yield from random_linear(seed, count)
    yield from selection.CASES
    yield from selection.random_selections(seed, count)


def family(case: Any_) -> str:
    """The op that a case is of; one name for all ops of linear attention, and for those that choose blocks."""
    return case.call.op if isinstance(case, Case) else FAMILY if isinstance(case, Linear) else CHOICE


def selected(given: argparse.Namespace) -> list[tuple[int, Any_]]:
    """Cases with their numbers, which do not depend on what is selected."""
    found = []
    for number, case in enumerate(cases(given.count, given.seed)):
        turn = not given.only or number % given.only == 0
        if turn and (not given.case or case.name in given.case) and given.family in (None, family(case)):
            found.append((number, case))
    return found


def calls_of(case: Any_) -> Sequence[OpCall]:
    """Of each launch, in order."""
    if isinstance(case, Linear):
        return linear.nodes(case)
    return case.calls() if isinstance(case, Selection) else [case.call]


def chosen(case: Any_, number: int, architecture: int) -> list[tuple[OpCall, OpCall, Program]]:
    """Of each launch: the call, its general one, and the tactic that is its turn, for half of the cases the best one.
    Raises ``Unsupported``.
    """
    known, found = kernels(), []
    for call in calls_of(case):
        wide = general(known, call)
        programs = known[call.op].programs(wide, architecture)
        # Neighbours of a case are of another kind, so that turns go by two.
        found.append((call, wide, programs[0 if number // 2 % 2 else (number // 4) % len(programs)]))
    return found


class Only:
    """The kernel of an op, with no programs but those that some case runs."""

    def __init__(self, op: str, wanted: Mapping[str, set[str]]) -> None:
        self.made, self.wanted = kernels()[op], wanted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def programs(self, call: OpCall, architecture: int) -> list[Program]:
        return [p for p in self.made.programs(call, architecture) if p.tactic in self.wanted[key_of(call)]]


def prepare(given: argparse.Namespace) -> None:
    import triton

    wanted: dict[str, set[str]] = {}
    calls: dict[str, OpCall] = {}
    for number, case in selected(given):
        try:
            for _, call, program in chosen(case, number, given.arch):
                wanted.setdefault(key_of(call), set()).add(program.tactic)
                calls[key_of(call)] = call
        except Unsupported:
            continue
    only = {op: Only(op, wanted) for op in kernels()}
    every, start = list(calls.values()), time.monotonic()
    print(f"{sum(map(len, wanted.values()))} programs of {len(every)} calls", file=sys.stderr, flush=True)
    built = Built({}, (), ())
    for first in range(0, len(every), 200):
        made = compiled(every[first : first + 200], only, given.arch)
        built = Built({**built.compiled, **made.compiled}, (*built.calls, *made.calls), ())
        done = min(first + 200, len(every))
        print(f"{done} calls in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for kept in built.calls:
        for refusal in kept.refused:
            if refusal.code != "small":  # not all tactics are asked for
                print(f"not compiled: {kept.call.op} {refusal.tactic}: {refusal.reason}", file=sys.stderr)
    ordered = Built(dict(sorted(built.compiled.items())), tuple(sorted(built.calls, key=lambda c: c.key)), ())
    write(given.bundle, ordered, triton.__version__)


def compiled(calls: Sequence[OpCall], only: Mapping[str, Any], architecture: int) -> Built:
    """A call that does not compile is named and left out; ``run`` counts its cases as wrong."""
    try:
        return build([], calls, only, [architecture], Cache.default())
    except KernelError as error:
        if len(calls) == 1:
            print(f"not compiled: {error}\n    {calls[0]}", file=sys.stderr, flush=True)
            return Built({}, (), ())
    half = len(calls) // 2
    one, other = (compiled(part, only, architecture) for part in (calls[:half], calls[half:]))
    return Built({**one.compiled, **other.compiled}, (*one.calls, *other.calls), ())


class Missing(Exception):
    """The bundle has no kernel of a tactic."""


class Gpu:
    """Launches kernels of a bundle. ``launch_only``: nothing is compared."""

    device = "cuda"

    def __init__(self, bundle: Path, launch_only: bool = False) -> None:
        import torch

        from attncompile.kernels.launcher import launcher_for

        self.launch_only = launch_only
        self.torch, self.bundle, self.architecture = torch, Bundle.open(bundle), launcher_for().capability

    def launch(
        self, call: OpCall, wide: OpCall, program: Program, tensors: Mapping[str, Any], layouts: Mapping[str, str]
    ) -> None:
        from attncompile.kernels.launcher import run_program

        found = self.bundle.kernels(key_of(wide), self.architecture)
        made = next((c for c in found if c.entry.tactic == program.tactic), None)
        if made is None:
            raise Missing(program.tactic)
        stream = self.torch.cuda.current_stream().cuda_stream
        run_program(program, made, tensors, call.attributes, stream, layouts=layouts)
        self.torch.cuda.synchronize()


class Interpreter:
    """Runs Triton kernels without a GPU, as an architecture that has no others."""

    device, architecture, launch_only = "cpu", 80, False

    def __init__(self) -> None:
        from tests.conformance.interpret import mend

        mend()

    def launch(
        self, call: OpCall, wide: OpCall, program: Program, tensors: Mapping[str, Any], layouts: Mapping[str, str]
    ) -> None:
        from tests.conformance.launch import interpreted

        strided = {n: symbols.Strided(tuple(x.shape), tuple(x.stride())) for n, x in tensors.items()}
        known = {**symbols.of_tensors(strided, call.attributes, layouts), "SMS": 4}
        interpreted(program, tensors, known)


PASSED = ("right", "launched")


def said_of(case: Any_) -> str:
    return str(case.call if isinstance(case, Case) else repr(case))


@dataclass(frozen=True)
class Outcome:
    """``verdict``: right, wrong, not compiled, failed (it raised, or its process ended or hung), refused, or launched,
    where nothing was compared.
    """

    number: int
    name: str
    op: str
    tactics: tuple[str, ...] = ()
    verdict: str = "right"
    problem: str = ""
    call: str = ""
    seconds: float = 0.0


def compare(case: Any_, number: int, on: Gpu | Interpreter) -> Outcome:
    start = time.monotonic()
    op = family(case)
    tactics: tuple[str, ...] = ()
    verdict, problem = "right", ""
    try:
        launches = chosen(case, number, on.architecture)
    except Unsupported as error:
        return Outcome(number, case.name, op, (), "refused", error.code, said_of(case))
    try:
        tactics = tuple(f"{p.language} {p.tactic}" for _, _, p in launches)
        if isinstance(case, Selection):
            problem = of_selection(case, launches, on)
        else:
            problem = of_linear(case, launches, on) if isinstance(case, Linear) else of_softmax(case, launches[0], on)
        verdict = "wrong" if problem else "launched" if on.launch_only else "right"
    except Missing as error:
        verdict, problem = "not compiled", str(error)
    except Exception as error:
        verdict = "failed"
        problem = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
    seconds = round(time.monotonic() - start, 3)
    return Outcome(number, case.name, op, tactics, verdict, problem, "" if verdict in PASSED else repr(case), seconds)


def of_softmax(case: Case, launch: tuple[OpCall, OpCall, Program], on: Gpu | Interpreter) -> str:
    """What is wrong; empty if nothing is."""
    from tests.conformance.budget import wrong, wrong_sums
    from tests.conformance.launch import in_memory, tensors
    from tests.conformance.vectorised import expected

    given = case.inputs()
    at = tensors(case, given, on.device)
    on.launch(*launch, *in_memory(case, at))
    if on.launch_only:
        return ""
    want, want_lse = expected(case.call, given, on.device)
    low, low_lse = expected(case.call, given, on.device, half=case.call.dtype)
    problem = wrong(at["output"].float().cpu().numpy(), want, low, case.call.dtype)
    if not problem and "log_sum_exp" in at:
        softcap = case.call.attributes.get("softcap", 0.0)
        problem = wrong_sums(at["log_sum_exp"].cpu().numpy(), want_lse, low_lse, softcap)
        problem = f"log-sum-exp: {problem}" if problem else ""
    return problem


def of_linear(case: Linear, launches: Sequence[tuple[OpCall, OpCall, Program]], on: Gpu | Interpreter) -> str:
    """What is wrong with any output of any op for what it was given, or with the last output; empty if nothing is."""
    from tests.conformance.budget import wrong
    from tests.conformance.linear_ops import expected

    at = linear.tensors(case, on.device)
    whole, low, said = {**at}, {**at}, linear.attributes(case)
    for step, launch in zip(linear.steps(case), launches, strict=True):
        named = {formal: at[name] for formal, name in (*step.inputs.items(), *step.outputs.items())}
        laid, layouts = linear.in_memory(case, step, named)
        on.launch(*launch, laid, layouts)
        if on.launch_only:
            continue
        results: dict[str, dict[str, Any]] = {}
        for way, values, half in (("own", at, ""), ("best", at, case.dtype), ("", whole, ""), ("low", low, case.dtype)):
            given = linear.logical(case, step, {formal: values[name] for formal, name in step.inputs.items()})
            results[way] = expected(step.op, said, given, half)
        for formal, name in step.outputs.items():
            got = at[name].double().cpu().numpy()
            pairs = [("of its inputs", results["own"][formal], results["best"][formal])]
            if name == "output":
                pairs.append(("of the case", results[""][formal], results["low"][formal]))
            for what, want, best in pairs:
                kind = case.dtype if name in ("output", "written") else "sums"
                problem = wrong(got, want.cpu().numpy(), best.cpu().numpy(), kind)
                if problem:
                    return f"{step.op} {formal} {what}: {problem}"
            whole[name], low[name] = results[""][formal], results["low"][formal]
    return ""


def of_selection(case: Selection, launches: Sequence[tuple[OpCall, OpCall, Program]], on: Gpu | Interpreter) -> str:
    """What is wrong with scores, or with the lists made of them; empty if nothing is."""
    by_op = {call.op: (call, wide, program) for call, wide, program in launches}

    def launch(call: OpCall, tensors: Mapping[str, Any], layouts: Mapping[str, str]) -> None:
        on.launch(*by_op[call.op], tensors, layouts)

    return selection.verdict(case, launch, on.device, not on.launch_only)


def opened(given: argparse.Namespace) -> Gpu | Interpreter:
    return Interpreter() if given.interpret else Gpu(given.bundle, given.launch_only)


def serve(given: argparse.Namespace, connection: Connection) -> None:
    """A process: compares the numbers that come, until it is told None. What raised may have broken the GPU's context,
    so that it ends then.
    """
    on = opened(given)
    every = dict(selected(given))
    connection.send(None)
    while (number := connection.recv()) is not None:
        outcome = compare(every[number], number, on)
        connection.send(outcome)
        if outcome.verdict == "failed":
            return


def in_processes(given: argparse.Namespace, numbers: Sequence[int], names: Mapping[int, str]) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(numbers))
    running: dict[Connection, tuple[Any, int | None, float]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(given, theirs), daemon=True)
        process.start()
        theirs.close()
        running[ours] = process, None, time.monotonic() + START

    def lost(connection: Connection, why: str) -> Iterator[Outcome]:
        process, number, _ = running.pop(connection)
        process.kill()
        process.join()
        if number is not None:
            yield Outcome(number, names[number], "", verdict="failed", problem=why)
        if waiting and (number is not None or why == "restart"):
            start()

    for _ in range(min(given.jobs, len(numbers))):
        start()
    while running:
        for ready in wait(list(running), timeout=1.0):
            connection = ready
            assert isinstance(connection, Connection)
            process, _, _ = running[connection]
            try:
                outcome = connection.recv()
            except (EOFError, OSError):
                process.join()
                yield from lost(connection, f"its process ended with {process.exitcode}")
                continue
            if outcome is not None:
                yield outcome
            running[connection] = process, None, time.monotonic()
            if outcome is not None and outcome.verdict == "failed":
                yield from lost(connection, "restart")
                continue
            number = waiting.pop() if waiting else None
            running[connection] = process, number, time.monotonic()
            with suppress(OSError):  # it has ended: the next look at it says so
                connection.send(number)
            if number is None:
                running.pop(connection)
                process.join()
        for connection, (_, _, since) in list(running.items()):
            if time.monotonic() - since > given.timeout:
                yield from lost(connection, f"no result after {given.timeout} s")
    for number in waiting:
        yield Outcome(number, names[number], "", verdict="failed", problem="no process was left to run it")


def run(given: argparse.Namespace) -> int:
    """The number of cases that are not right."""
    start = time.monotonic()
    chosen_cases = selected(given)
    names = {number: case.name for number, case in chosen_cases}
    outcomes: list[Outcome] = []

    def found() -> Iterator[Outcome]:
        if given.jobs > 1:
            yield from in_processes(given, list(names), names)
            return
        on = opened(given)
        for number, case in chosen_cases:
            outcome = compare(case, number, on)
            yield outcome
            if outcome.verdict == "failed" and not given.interpret:
                return  # the GPU's context may be broken: what comes after says nothing

    for outcome in found():
        outcomes.append(outcome)
        if outcome.verdict not in (*PASSED, "refused"):
            again = f"--seed {given.seed} --count {given.count} --case '{outcome.name}'"
            print(f"{outcome.verdict}: {outcome.name} ({outcome.number}): {' | '.join(outcome.tactics)}", flush=True)
            print(f"    {outcome.problem}\n    {outcome.call}\n    run again: {again}", flush=True)
    seconds = time.monotonic() - start
    bad = sum(o.verdict not in (*PASSED, "refused") for o in outcomes) + len(chosen_cases) - len(outcomes)
    print(table(outcomes))
    print(f"{len(outcomes)} of {len(chosen_cases)} cases in {seconds:.0f} s, {bad} not right or not run")
    if given.json:
        device = {"device": "interpreter"} if given.interpret else of_device()
        record = {
            **device, "seed": given.seed, "count": given.count, "only": given.only, "seconds": round(seconds, 1),
            "launch_only": given.launch_only, "not_right": bad,
            "cases": [asdict(o) for o in sorted(outcomes, key=lambda o: o.number)],
        }  # fmt: skip
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return bad or int(not any(o.verdict in PASSED for o in outcomes))


def of_device() -> dict[str, Any]:
    import torch

    from attncompile.kernels.driver import driver

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "driver": driver().version()}


def table(outcomes: Sequence[Outcome]) -> str:
    """Cases by op and language of their kernels, and by what came of them."""
    tally: Counter[tuple[str, str]] = Counter()
    for o in outcomes:
        languages = sorted({t.split()[0] for t in o.tactics})
        tally[" ".join([o.op, *languages]), o.verdict] += 1
    verdicts = (*PASSED, "wrong", "failed", "not compiled", "refused")
    rows = [("", *verdicts)]
    for kind in sorted({kind for kind, _ in tally}):
        rows.append((kind, *(str(tally[kind, v]) for v in verdicts)))
    wide = [max(len(row[i]) for row in rows) for i in range(len(verdicts) + 1)]
    return "\n".join(
        "  ".join([row[0].ljust(wide[0]), *(x.rjust(w) for x, w in zip(row[1:], wide[1:], strict=True))])
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["prepare", "run"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=200, help="random cases of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", type=int, help="every n-th case")
    parser.add_argument("--family", choices=[*CASES, FAMILY, CHOICE], help="the cases of this one alone")
    parser.add_argument("--case", action="append", help="the case of this name; may be given several times")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes of run")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that a case may take")
    parser.add_argument("--json", type=Path, help="a file for all outcomes")
    parser.add_argument("--launch-only", action="store_true", help="compare nothing: for a tool that watches memory")
    parser.add_argument("--interpret", action="store_true", help="run in Triton's interpreter, without a GPU")
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given)
        return
    if given.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    sys.exit(1 if run(given) else 0)


if __name__ == "__main__":
    main()
