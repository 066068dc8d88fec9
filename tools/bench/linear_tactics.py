"""Every tactic of every op of linear attention on its own, each checked before it is timed; then the best ones in a row
beside the peers: ``prepare-linear DIR --tactics``, ``linear DIR --tactics``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from linear import (
    BUDGETS,
    CASES,
    LEARNED,
    RELU,
    Linear,
    calls,
    drawn,
    empty,
    far,
    judged,
    measurable,
    plan,
    wanted,
)
from measure import ceilings, times

from attncompile.core.errors import AttncompileError
from attncompile.core.kernel import OpCall, Program, Tactic
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.launcher import Launch, run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels
from attncompile.plugins.linear_attention.kernel import is_hedgehog, tactic
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES, STEP


@dataclass(frozen=True)
class Trial:
    """A case in chunks of every one of ``chunks``. ``peers``: whether they are measured, which takes seconds."""

    case: Linear
    chunks: tuple[int, ...]
    peers: bool = True


def _named(name: str) -> Linear:
    return next(c for c in CASES if c.name == name)


TRIALS = (
    Trial(_named("gated-delta-8k"), (1024,)),
    Trial(_named("gla-8k"), (64,)),
    Trial(_named("simple-gla-8k"), (512, 1024)),
    Trial(_named("gated-delta-step"), (1,)),
    Trial(_named("retention-8k"), (64, 128, 256, 512, 1024)),
    Trial(_named("relu-d32-16k"), (1024, 2048, 4096)),
    Trial(_named("relu-d128-16k"), (1024, 2048)),
    Trial(Linear("relu-d64-16k", RELU, 32, 16384, 64), (1024, 2048, 4096), peers=False),
    Trial(_named("retention-32k"), (512, 1024, 2048)),
    Trial(_named("simple-gla-32k"), (512, 1024)),
    Trial(_named("relu-d128-64k"), (4096, 8192), peers=False),
    *(Trial(Linear(f"hedgehog-d{d}-16k", LEARNED, 16, 16384, d), (2048,), peers=False) for d in (32, 64, 128)),
)


def tried(op: str, call: OpCall) -> list[Tactic]:
    """What is worth a try at the head dims of the cases, 32 and 128."""
    short, t = call.head_dim == 32, tactic
    if is_hedgehog(call):
        dim = call.head_dim
        if op == STATE:
            return [t(w, 2, BV=v, BN=n, FAST=1) for w, v, n in (
                (8, 32, 64), (8, 64, 64), (4, 64, 64), (8, 64, 32), (8, 64, 128), (4, 32, 64), (4, 32, 128),
                (8, 32, 128),
            ) if v <= dim]  # fmt: skip
        return [t(w, s, BV=v, BM=m, FAST=1, BLOCKS=b) for w, s, v, m, b in (
            (8, 2, 32, 64, 4), (4, 2, 64, 64, 2), (4, 1, 64, 64, 4), (8, 2, 128, 128, 1), (8, 1, 64, 128, 1),
            (4, 1, 32, 64, 4), (4, 1, 32, 64, 8), (4, 2, 32, 128, 4), (4, 1, 64, 64, 2), (4, 1, 64, 64, 3),
        ) if v <= dim]  # fmt: skip
    if op == COMBINE:
        wide = min(call.value_dim, 128)
        return [t(4, 1, BK=8, BV=wide, AHEAD=8), t(4, 1, BK=4, BV=wide, AHEAD=16), t(4, 1, BK=16, BV=32, AHEAD=8)]
    if op == STATE and short:
        return [
            *(t(8, s, BV=32, BN=64, HB=4, FAST=1) for s in (3, 5)), t(8, 3, 128, BV=32, BN=64, HB=4, FAST=1),
            t(4, 4, BV=32, BN=64, HB=2, FAST=1), t(4, 4, BV=32, BN=128, HB=2, FAST=1),
            t(4, 4, BV=32, BN=128, HB=1, FAST=1), t(4, 4, BV=32, BN=128, HB=1, FAST=0),
        ]  # fmt: skip
    if op == STATE:
        return [
            *(t(8, s, BV=128, BN=64, HB=1, FAST=1) for s in (3, 5)), t(8, 3, 128, BV=128, BN=64, HB=1, FAST=1),
            t(8, 4, BV=128, BN=32, HB=1, FAST=1), t(8, 4, BV=64, BN=64, HB=1, FAST=1),
            t(8, 3, BV=128, BN=64, HB=1, FAST=0), t(8, 2, BV=128, BN=64, HB=1, FAST=1),
            t(8, 2, BV=128, BN=128, HB=1, FAST=1), t(4, 3, BV=128, BN=32, HB=1, FAST=1),
            t(4, 4, BV=64, BN=64, HB=1, FAST=1), t(4, 2, BV=128, BN=64, HB=1, FAST=1),
        ]  # fmt: skip
    if op == APPLY and call.head_dim < 128:
        return [
            *(t(4, s, BV=call.value_dim, BM=m, FAST=1, BLOCKS=n, SUMS=1)
              for s in (2, 3) for m in (64, 128) for n in (3, 4, 5, 6, 8, 16)),
            *(t(4, 3, BV=call.value_dim, BM=m, FAST=1, BLOCKS=8, SUMS=0) for m in (64, 128)),
            t(4, 3, BV=call.value_dim, BM=64, FAST=0, BLOCKS=8, SUMS=1),
        ]  # fmt: skip
    if op == APPLY:
        return [
            *(t(4, s, BV=128, BM=64, FAST=1, BLOCKS=n, SUMS=1) for s in (1, 2) for n in (2, 3, 4, 6)),
            t(4, 2, BV=128, BM=64, FAST=0, BLOCKS=3, SUMS=1), t(4, 2, BV=128, BM=64, FAST=1, BLOCKS=3, SUMS=0),
            *(t(8, s, 128, BV=128, BM=128, FAST=1, BLOCKS=n, SUMS=1) for s in (1, 2) for n in (2, 4)),
            t(4, 2, BV=64, BM=64, FAST=1, BLOCKS=4, SUMS=1),
        ]  # fmt: skip
    if op == SOLVE:
        return [t(1, 1, BK=64), t(1, 1, 168, BK=32), t(2, 1, BK=64)]
    if op == DELTA:
        return [t(4, 3, BV=32), t(4, 4, BV=32), t(4, 3, BV=16)]
    if op == STEP:
        return [t(w, 1, BV=v) for v in (8, 16, 32) for w in (2, 4, 8)]
    chunk = int(call.attributes["chunk"])
    if call.attributes["decay"] == 3:
        if op == OUTPUT:
            return [t(w, s, r, BK=k, BV=v) for w, s, r, k, v in (
                (8, 1, None, 64, 128), (8, 2, None, 64, 128), (8, 1, 128, 64, 128), (8, 1, 128, 32, 128),
                (8, 2, 128, 32, 128), (8, 1, 128, 64, 64), (4, 1, None, 32, 64), (4, 1, 168, 32, 64),
                (4, 2, 168, 32, 64), (4, 1, None, 32, 128),
            )]  # fmt: skip
        found = [t(w, s, BK=k, BV=v, BT=r) for w, s, k, v, r in (
            (4, 4, 64, 64, 32), (4, 2, 64, 64, 64), (4, 3, 64, 64, 64), (8, 2, 64, 64, 64), (4, 3, 64, 32, 64),
            (4, 3, 32, 64, 64), (8, 2, 64, 128, 64), (8, 3, 32, 128, 64),
        )]  # fmt: skip
        return [x for x in found if int(x.constants["BT"] or 0) <= chunk]
    if op == STATES:
        found = [
            t(4, 4, BK=64, BV=64, BT=64), t(4, 4, BK=128, BV=32, BT=64), t(4, 6, BK=64, BV=64, BT=64),
            t(8, 3, BK=64, BV=64, BT=128), t(4, 5, BK=64, BV=32, BT=64),
        ]  # fmt: skip
    else:
        found = [
            t(4, 2, BV=64, BT=64), t(4, 3, BV=64, BT=64), t(4, 2, BV=32, BT=64), t(8, 2, BV=128, BT=64),
            t(4, 3, BV=64, BT=32), t(8, 2, BV=64, BT=128),
        ]  # fmt: skip
    return [x for x in found if int(x.constants["BT"] or 0) <= chunk]


class Tried:
    """The kernel of an op with the tactics to try in place of its own."""

    def __init__(self, op: str) -> None:
        self.made = kernels()[op]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def programs(self, call: OpCall, architecture: int) -> list[Program]:
        return [replace(self.made.trial(call, t), rank=n) for n, t in enumerate(tried(call.op, call))]


def known() -> dict[str, Any]:
    return {op: Tried(op) for op in (STATE, COMBINE, APPLY, STATES, OUTPUT, SOLVE, DELTA, STEP)}


def in_chunks(case: Linear, chunk: int) -> Linear:
    return replace(case, form=replace(case.form, chunk=chunk))


def prepare(out: Path, architectures: Sequence[int], names: Sequence[str]) -> None:
    """Compile what the trials called ``names`` (all without any) need, on a machine that needs no GPU."""
    import triton

    wanted = [trial for trial in TRIALS if not names or trial.case.name in names]
    every = [call for trial in wanted for chunk in trial.chunks for call in calls(in_chunks(trial.case, chunk))]
    built = build([], every, known(), architectures or (90,), Cache.default())
    for kept in built.calls:
        for refusal in kept.refused:
            print(f"not compiled: {kept.call.op} {refusal.tactic}: {refusal.reason}", flush=True)
    for made in built.compiled.values():
        e = made.entry
        print(f"{e.op} {e.tactic} d{e.head_dim} chunk {e.constants.get('CHUNK')} decay {e.constants.get('DECAY')}: "
              f"{e.registers} registers, {e.spills} spills, {e.shared} shared, serialized {e.serialized}")  # fmt: skip
    write(out, built, triton.__version__)


def run(
    bundle: Path, names: Sequence[str], rounds: int, with_peers: bool, out: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    device = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": device.name, "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"), "rounds": rounds,
        **ceilings(), "cases": [],
    }  # fmt: skip
    opened = Bundle.open(bundle)
    for trial in TRIALS:
        if names and trial.case.name not in names:
            continue
        found = one(trial, opened, device.major * 10 + device.minor, rounds, with_peers, result["copy_tbs"])
        result["cases"].append(found)
        print(json.dumps(found), flush=True)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    return result


def one(
    trial: Trial, bundle: Bundle, capability: int, rounds: int, with_peers: bool, copy_tbs: float
) -> dict[str, Any]:  # fmt: skip
    began, case, budget = time.monotonic(), trial.case, BUDGETS[trial.case.dtype]
    at = drawn(case)
    want_output = wanted(case, at)["output"]
    stream = torch.cuda.current_stream().cuda_stream
    found: dict[str, Any] = {"name": case.name, "chunks": {}}
    chains: dict[int, tuple[list[Launch], list[str], dict[str, torch.Tensor]]] = {}
    for chunk in trial.chunks:
        cut = in_chunks(case, chunk)
        want = wanted(cut, at)
        given = at | {n: x.to(empty(cut, n).dtype).contiguous() for n, x in want.items()}
        rows, best = [], []
        for call, (_, inputs, outputs) in zip(calls(cut), plan(cut), strict=True):
            tested, kept = launches(cut, call, bundle, capability, given, inputs, outputs, want, stream)
            ok = {name: partial(launch, stream) for name, launch, _ in tested if isinstance(launch, Launch)}
            took = {name: median(t) for name, t in times(ok, rounds).items()} if ok else {}
            del kept  # launches hold addresses alone
            rows.append({"op": call.op, "tactics": {name: {"ms": took.get(name), "error": said}
                                                    for name, _, said in tested}})  # fmt: skip
            print(json.dumps({"case": case.name, "chunk": chunk, **rows[-1]}), flush=True)
            best.append(min(took, key=lambda n: took[n]) if took else "")
        found["chunks"][chunk] = {"ops": rows, "best": best}
        if all(best):
            chains[chunk] = chain(cut, bundle, capability, at, best, stream)
            error = far(chains[chunk][2]["output"], want_output)
            found["chunks"][chunk]["error"] = error
            if not error <= budget:
                del chains[chunk]
    beside, errors, left_out = measurable(case, at, want_output, with_peers and trial.peers)
    runs: dict[str, Any] = {f"ours in chunks of {c}": partial(in_a_row, x[0], stream) for c, x in chains.items()}
    runs |= beside
    took = {name: median(t) for name, t in times(runs, rounds).items()} if runs else {}
    ours = {n: ms for n, ms in took.items() if n.startswith("ours")}
    found |= {"ms": took, "errors": errors, "left_out": left_out, "seconds": time.monotonic() - began}
    if ours:
        first = min(ours, key=lambda n: ours[n])
        found |= {"best": first, **judged(case, ours[first], took, copy_tbs)}
    return found


def in_a_row(every: Sequence[Launch], stream: int) -> None:
    for launch in every:
        launch(stream)


def launches(
    case: Linear, call: OpCall, bundle: Bundle, capability: int, given: Mapping[str, torch.Tensor],
    inputs: Mapping[str, str], outputs: Mapping[str, str], want: Mapping[str, torch.Tensor], stream: int,
) -> tuple[list[tuple[str, Launch | None, Any]], dict[str, torch.Tensor]]:  # fmt: skip
    """Of every tactic: its name, its launch where that is right, and its outputs' largest error or what it said; and
    the tensors, which have to live as long as the launches are made.
    """
    found: list[tuple[str, Launch | None, Any]] = []
    asked = general(known(), call)
    compiled = {k.entry.tactic: k for k in bundle.kernels(key_of(asked), capability)}
    tensors = {formal: given[name] for formal, name in inputs.items()}
    for formal, name in outputs.items():
        tensors[formal] = empty(case, name)
    for program in known()[call.op].programs(asked, capability):
        if program.tactic not in compiled:
            found.append((program.tactic, None, "not compiled"))
            continue
        for formal in outputs:
            tensors[formal].fill_(torch.nan)
        try:
            launch = run_program(program, compiled[program.tactic], tensors, call.attributes, stream)
            error = float(torch.tensor([far(tensors[f], want[n]) for f, n in outputs.items()]).max())  # NaN stays
        except AttncompileError as problem:
            found.append((program.tactic, None, str(problem)))
            continue
        found.append((program.tactic, launch if error <= BUDGETS[case.dtype] else None, error))
    return found, tensors


def chain(
    case: Linear, bundle: Bundle, capability: int, at: Mapping[str, torch.Tensor], best: Sequence[str], stream: int
) -> tuple[list[Launch], list[str], dict[str, torch.Tensor]]:
    """The ops of ``case`` with the tactics ``best``, on tensors of their own."""
    names = {n for _, inputs, outputs in plan(case) for n in (*inputs.values(), *outputs.values())}
    own = {n: at[n] if n in at else empty(case, n) for n in names}
    made = []
    for call, (_, inputs, outputs), name in zip(calls(case), plan(case), best, strict=True):
        asked = general(known(), call)
        compiled = next(k for k in bundle.kernels(key_of(asked), capability) if k.entry.tactic == name)
        program = next(p for p in known()[call.op].programs(asked, capability) if p.tactic == name)
        tensors = {formal: own[n] for formal, n in (*inputs.items(), *outputs.items())}
        made.append(run_program(program, compiled, tensors, call.attributes, stream))
    return made, list(best), own
