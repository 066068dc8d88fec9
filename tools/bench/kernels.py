"""Our kernels beside their peers: correctness first, in the same run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import peers as other
import torch
from cases import CASES, Case
from measure import ceilings, times
from truth import pairs, sample, truth

from attncompile.core.kernel import ARCHITECTURES, Kernel, OpCall, Program
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.cost import model_name
from attncompile.kernels.launcher import Launch, run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place, relative."""


class BestOnly:
    """A kernel without its further tactics in a language."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        best: dict[str, Program] = {}
        for program in self._kernel.programs(call, architecture):
            best.setdefault(program.language, program)
        return list(best.values())


def prepare(out: Path, architectures: Sequence[int], cases: Sequence[Case] = CASES) -> None:
    """Compile what the cases need, on a machine that needs no GPU. Of a sweep the best tactic in each language."""
    import triton

    known: Mapping[str, Kernel] = kernels()
    if cases is not CASES:
        known = {op: cast(Kernel, BestOnly(kernel)) for op, kernel in known.items()}
    calls = [routed(c) for c in cases]
    built = build([], calls, known, architectures or ARCHITECTURES, Cache.default())
    write(out, built, triton.__version__)


def routed(case: Case) -> OpCall:
    """The call of the kernel that takes the case: a plain window of a grid is one of ``Attention``."""
    return case.call() if case.op == "Attention" else kernels()[case.op].call(case.call())


def run(
    bundle: Path,
    names: Sequence[str],
    rounds: int,
    without: Sequence[str] | None,
    cases: Sequence[Case] = CASES,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the cases called ``names`` (all without any) on this GPU. What is wrong is not timed: see ``wrong``.

    ``without``: peers that are left out; None: all of them. ``out``: written after every case.
    """
    device = torch.cuda.get_device_properties(0)
    capability = device.major * 10 + device.minor
    opened = Bundle.open(bundle)
    result: dict[str, Any] = {
        "gpu": device.name, "torch": torch.__version__, "cuda": torch.version.cuda,
        "when": time.strftime("%Y-%m-%d"), "rounds": rounds, **ceilings(), "cases": [], "wrong": {},
    }  # fmt: skip
    for case in cases:
        if names and case.name not in names:
            continue
        try:
            result["cases"].append(one(case, opened, capability, rounds, without, result))
            print(json.dumps(result["cases"][-1]["summary"]), flush=True)
        except Wrong as problem:
            result["wrong"][case.name] = str(problem)
            print(f"{case.name}: {problem}", flush=True)
        torch.cuda.empty_cache()
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rates = [c["ours_touched_tflops"] for c in result["cases"] if c["name"] == "dense-d128-32760"]
    for found, case in ((f, c) for f in result["cases"] for c in cases if c.name == f["name"]):
        if case.bound is not None and rates:
            at_rate = found["touched_flops"] / rates[0] * 1e-9
            found["at_dense_rate"] = found["ms"]["ours"] / at_rate
            found["bound"] = case.bound
            found["met"]["bound"] = found["at_dense_rate"] <= case.bound
    return result


class Wrong(Exception):
    """A kernel is outside its error budget."""


def one(
    case: Case, bundle: Bundle, capability: int, rounds: int, without: Sequence[str] | None, ceiling: dict[str, Any]
) -> dict[str, Any]:
    """One case: ours, its peers, the limits."""
    known = kernels()
    call = routed(case)
    compiled = bundle.kernels(key_of(general(known, call)), capability)[0]
    program = next(
        p for p in known[call.op].programs(general(known, call), capability) if p.tactic == compiled.entry.tactic
    )
    torch.manual_seed(0)
    kind = getattr(torch, case.dtype)
    shapes = [(case.batch, case.tokens, h, case.dim) for h in (case.heads, case.kv_heads, case.kv_heads)]
    q, k, v = (torch.randn(s, device="cuda", dtype=kind) for s in shapes)
    out = torch.full_like(q, float("nan"))
    stream = torch.cuda.current_stream().cuda_stream
    at = {"query": q, "key": k, "value": v, "output": out}
    at |= {name: torch.from_numpy(x).cuda() for name, x in case.lists().items()}
    drawn = {name: torch.randn(shape, device="cuda") for name, shape in case.drawn().items()}
    drawn = {name: x > -1.0 if name == "key_mask" else x.to(kind) for name, x in drawn.items()}
    at |= drawn
    launch = run_program(program, compiled, at, call.attributes, stream)
    rows = sample(case.tokens)
    want = truth(case, q, k, v, rows, drawn)

    def error(found: torch.Tensor) -> float:
        return float((found[:, rows].double() - want).norm() / want.norm())

    low = want.to(kind).double()
    budget = 3 * max(float((low - want).norm() / want.norm()), ROUNDING[case.dtype])
    errors = {"ours": error(out)}
    if not errors["ours"] <= budget or bool(torch.isnan(out).any()):
        raise Wrong(f"{compiled.entry.tactic} is wrong: {errors['ours']:.1e}, budget {budget:.1e}")
    runs: dict[str, Any] = {"ours": lambda: launch(stream)}
    left_out = {}
    programs = {"ours": program}
    for another, other_launch in further(case, bundle, capability, at, stream):
        name = another.tactic
        errors[name] = error(out)
        if errors[name] <= budget and not bool(torch.isnan(out).any()):
            runs[name] = partial(other_launch, stream)
            programs[name] = another
        else:
            left_out[name] = f"wrong: {errors[name]:.1e}"
            print(f"{case.name}: {name} is wrong: {errors[name]:.1e}, budget {budget:.1e}", flush=True)
    for name, make in other.peers(case, q, k, v) if without is not None else ():
        if name in (without or ()):
            left_out[name] = "left out by --without"
            continue
        try:
            made = make()
            if isinstance(made, str):
                left_out[name] = made
                continue
            found = made()
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            left_out[name] = str(problem).splitlines()[0][:200]
            continue
        found = getattr(made, "restore", lambda x: x)(found)
        dense_only = (case.grid is not None or case.kept is not None) and name in ("cudnn", "flash")
        if not dense_only:
            errors[name] = error(found)
            if not errors[name] <= 2 * budget:
                left_out[name] = f"wrong: {errors[name]:.1e}"
                continue
        runs[name] = made
    took = {name: median(t) for name, t in times(runs, rounds).items()}
    found_all = summary(case, call, program, compiled.entry.tactic, took, errors, left_out, ceiling, capability)
    found_all["launches"] = [
        {"model": model_name(p, capability), "work": asdict(kernels()[call.op].work(call, p)), "ms": took[name]}
        for name, p in programs.items()
    ]
    return found_all


def further(
    case: Case, bundle: Bundle, capability: int, at: dict[str, torch.Tensor], stream: int
) -> Iterator[tuple[Program, Launch]]:
    """Our other tactics: of dense attention the first in Triton alone. Each writes the output, poisoned before."""
    known = kernels()
    call = general(known, routed(case))
    programs = {p.tactic: p for p in known[call.op].programs(call, capability)}
    best, *others = bundle.kernels(key_of(call), capability)
    if case.op == "Attention":
        others = [c for c in others if c.entry.language != best.entry.language][:1]
    for compiled in others:
        at["output"].fill_(float("nan"))
        program = programs[compiled.entry.tactic]
        yield program, run_program(program, compiled, at, routed(case).attributes, stream)


def summary(
    case: Case, call: Any, program: Any, tactic: str, took: dict[str, float], errors: dict[str, float],
    left_out: dict[str, str], ceiling: dict[str, Any], capability: int,
) -> dict[str, Any]:  # fmt: skip
    work = kernels()[call.op].work(call, program)
    flops = 4.0 * case.batch * case.heads * case.dim * pairs(case)
    limit = max(flops / ceiling["gemm_tflops"] * 1e-9, work.bytes / ceiling["copy_tbs"] * 1e-9)
    ratios = {name: ms / took["ours"] for name, ms in took.items() if name != "ours"}
    met = {name: ratios[name] >= least for name, least in case.wanted.items() if name in ratios}
    return {
        "name": case.name, "note": case.note, "tactic": tactic, "ms": took, "errors": errors, "left_out": left_out,
        "ratios": ratios, "wanted": dict(case.wanted), "met": met, "flops": flops, "touched_flops": work.flops,
        "limit_ms": limit, "ours_tflops": flops / took["ours"] * 1e-9,
        "ours_touched_tflops": work.flops / took["ours"] * 1e-9,
        "model": model_name(program, capability), "work": asdict(work),
        "summary": {"case": case.name, **{n: round(ms, 4) for n, ms in took.items()}, "left_out": left_out},
    }  # fmt: skip
