"""Linear attention: our ops one after the other, beside torch.compile's einsum form, fla-core and lightning-attn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import ceilings, times

from attncompile.core.kernel import ARCHITECTURES, OpCall
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.cost import model_name
from attncompile.kernels.launcher import run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels
from attncompile.plugins.linear_attention.form import Form
from attncompile.plugins.linear_attention.kernel import preferred_chunk, whole_chunk
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES, STEP
from tests.conformance import linear_ops

Run = Callable[[], torch.Tensor]
Tensors = dict[str, torch.Tensor]
OPERANDS = ("query", "key", "value")


@dataclass(frozen=True)
class Linear:
    """``wanted``: least time of a peer over ours; ``copy``: least share of the rate at which this GPU copies. ``step``:
    one token after a state.
    """

    name: str
    form: Form
    heads: int
    tokens: int
    dim: int
    wanted: dict[str, float] = field(default_factory=dict)
    copy: float = 0.0
    batch: int = 1
    dtype: str = "float16"
    step: bool = False


RELU = Form("relu", "relu", "sum", 1e-6)
LEARNED = Form("hedgehog", "hedgehog", "sum", 1e-6)
HEAD = Form(causal=True, decay="head", scale=128**-0.5, chunk=64)
TOKEN, CHANNEL = replace(HEAD, decay="token"), replace(HEAD, decay="channel")
GATED_DELTA = replace(TOKEN, delta=True)
FLA = {"fla": 1.0}


def whole(name: str, heads: int, tokens: int, dim: int) -> Linear:
    """Without a triangle, in chunks as the mechanism cuts them."""
    chunk = whole_chunk(1, heads, tokens, dim, dim)
    return Linear(name, replace(RELU, chunk=chunk), heads, tokens, dim, {"einsum": 3.0}, 0.7)


def causal(kind: str, form: Form, tokens: int, wanted: Mapping[str, float], **more: Any) -> Linear:
    """32 heads of 128, in chunks as the mechanism gives them to kernels."""
    name = f"{kind}-{tokens // 1024}k"
    chunk = preferred_chunk(form.decay, 32, tokens, 128)
    return Linear(name, replace(form, chunk=chunk), 32, tokens, 128, dict(wanted), **more)


def steps(kind: str, form: Form) -> Linear:
    return Linear(f"{kind}-step", replace(form, chunk=1, initial=True), 32, 1, 128, dict(FLA), 0.7, batch=64, step=True)


CASES = (
    *(whole(name, heads, n, d) for name, heads, n, d in (
        ("relu-d32-16k", 70, 16384, 32), ("relu-d128-16k", 16, 16384, 128), ("relu-d128-64k", 16, 65536, 128))),
    *(causal("retention", HEAD, n, {"fla": 1.0, "lightning": 1.0}) for n in (8192, 32768)),
    *(causal("simple-gla", TOKEN, n, FLA) for n in (8192, 32768)),
    *(causal("gla", CHANNEL, n, FLA) for n in (8192, 32768)),
    *(causal("gated-delta", GATED_DELTA, n, FLA) for n in (8192, 32768)),
    steps("simple-gla", TOKEN), steps("gated-delta", GATED_DELTA),
)  # fmt: skip
"""Sizes of the issue. Retention with the decays of a head is Lightning attention too."""


def shapes(case: Linear) -> dict[str, tuple[int, ...]]:
    b, n, h, d = case.batch, case.tokens, case.heads, case.dim
    features = 2 * d if learned(case) else d
    count, tile = -(-n // (case.form.chunk or n)), case.form.tile or 1
    decays = {"head": (h,), "token": (b, n, h), "channel": (b, n, h, d)}
    found: dict[str, tuple[int, ...]] = dict.fromkeys((*OPERANDS, "output", "written"), (b, n, h, d))
    return found | {
        "state": (b, h, count, features, d), "total": (b, h, count, features),
        "whole_state": (b, h, 1, features, d), "whole_total": (b, h, 1, features), "feature_weight": (h, d, d),
        "log_decay": decays.get(case.form.decay, ()), "beta": (b, n, h),
        "solved": (b, h, -(-n // tile), tile, tile), "initial_state": (b, h, d, d), "final_state": (b, h, d, d),
    }  # fmt: skip


def learned(case: Linear) -> bool:
    return case.form.key_map == "hedgehog"


Op = tuple[str, dict[str, str], dict[str, str]]


def plan(case: Linear) -> list[Op]:
    """(op, formal inputs, formal outputs), each to the name of a tensor."""

    def op(name: str, inputs: str, outputs: str, **renamed: str) -> Op:
        return name, {n: renamed.get(n, n) for n in inputs.split()}, {n: n for n in outputs.split()}

    decay = " log_decay" if case.form.decay != "none" else ""
    if case.step:
        beta = " beta" if case.form.delta else ""
        return [op(STEP, f"query key value{decay}{beta} initial_state", "output final_state")]
    if case.form.delta:
        return [op(SOLVE, f"key{decay} beta", "solved"), op(DELTA, f"key value solved{decay}", "written state"),
                op(OUTPUT, f"query key value state{decay}", "output", value="written")]  # fmt: skip
    if case.form.causal:
        return [op(STATES, f"key value{decay}", "state"), op(OUTPUT, f"query key value state{decay}", "output")]
    sums, weight = " total" if case.form.sums else "", " feature_weight" if learned(case) else ""
    made = op(STATE, f"key value{weight}", f"state{sums}")
    if not case.form.combined:
        return [made, op(APPLY, f"query state{sums}{weight}", "output")]
    whole = " ".join(f"whole_{n}" for n in f"state{sums}".split())
    return [made, op(COMBINE, f"state{sums}", whole),
            op(APPLY, f"query state{sums}{weight}", "output", state="whole_state", total="whole_total")]  # fmt: skip


def said(case: Linear) -> dict[str, Any]:
    form = case.form
    return {"query_map": form.query_map, "key_map": form.key_map, "normaliser": form.normaliser, "scale": form.scale,
            "epsilon": form.epsilon, "floor": form.floor, "chunk": form.chunk, "tile": form.tile}  # fmt: skip


def calls(case: Linear) -> list[OpCall]:
    sizes, found = shapes(case), []
    dims = (case.dim, 2 * case.dim if learned(case) else case.dim)
    for op, inputs, outputs in plan(case):
        more = {n: x for n, x in inputs.items() if n not in OPERANDS}
        attributes = {k: v for k, v in said(case).items() if k != "tile" or op in (SOLVE, DELTA)}
        node = OpCall(
            op, case.dtype if op != COMBINE else "float32", case.heads, case.heads, dims[op == COMBINE], case.dim,
            attributes, {n: case.dtype if n == "feature_weight" else "float32" for n in more},
            {n: sizes[x] for n, x in more.items()}, tuple(outputs), case.batch,
            case.tokens if "query" in inputs else None, case.tokens if "key" in inputs else None,
        )  # fmt: skip
        found.append(kernels()[op].call(node))
    return found


def drawn(case: Linear, device: str = "cuda") -> Tensors:
    """What a case is given."""
    torch.manual_seed(0)
    sizes, kind, at = shapes(case), getattr(torch, case.dtype), {}
    for name in dict.fromkeys(x for _, inputs, _ in plan(case) for x in inputs.values()):
        if name in OPERANDS:
            at[name] = torch.randn(sizes[name], device=device, dtype=kind)
        elif name == "feature_weight":
            at[name] = (torch.randn(sizes[name], device=device) / (4 * case.dim**0.5)).to(kind)
        elif name == "log_decay":
            at[name] = -torch.rand(sizes[name], device=device) / 16
        elif name == "beta":
            at[name] = torch.rand(sizes[name], device=device)
        elif name == "initial_state":
            at[name] = torch.randn(sizes[name], device=device)
    if case.form.delta:
        at["key"] = torch.nn.functional.normalize(at["key"].float(), dim=-1).to(kind)
    return at


def empty(case: Linear, name: str) -> torch.Tensor:
    """What an op gives, poisoned."""
    kind = getattr(torch, case.dtype) if name in ("output", "written") else torch.float32
    return torch.full(shapes(case)[name], torch.nan, device="cuda", dtype=kind)


def wanted(case: Linear, at: Mapping[str, torch.Tensor]) -> Tensors:
    """Float64 of all that the ops give, by the references of the conformance tests."""
    found: Tensors = dict(at)
    for op, inputs, outputs in plan(case):
        made = linear_ops.expected(op, said(case), {n: found[x] for n, x in inputs.items()})
        found |= {x: made[n] for n, x in outputs.items()}
    return {name: x for name, x in found.items() if name not in at}


def least(case: Linear) -> float:
    """Bytes that any way has to move: the operands and the result, and of a step the states."""
    size = 2.0 * case.batch * case.heads * case.tokens * case.dim * 4
    return size + 8.0 * case.batch * case.heads * case.dim**2 * case.step


def prepare(
    out: Path, architectures: Sequence[int], names: Sequence[str], cases: Sequence[Linear] = CASES
) -> None:  # fmt: skip
    """Compile what the cases called ``names`` (all without any) need, on a machine that needs no GPU."""
    import triton

    every = [call for case in cases if not names or case.name in names for call in calls(case)]
    write(out, build([], every, kernels(), architectures or ARCHITECTURES, Cache.default()), triton.__version__)


def run(
    bundle: Path, names: Sequence[str], rounds: int, with_peers: bool, out: Path | None = None,
    cases: Sequence[Linear] = CASES,
) -> dict[str, Any]:  # fmt: skip
    """Measure the cases called ``names`` (all without any). What is wrong is not timed. ``out``: written after each."""
    device = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": device.name, "torch": torch.__version__, "cuda": torch.version.cuda, "when": time.strftime("%Y-%m-%d"),
        "rounds": rounds, **ceilings(), "cases": [],
    }  # fmt: skip
    opened = Bundle.open(bundle)
    for case in cases:
        if not names or case.name in names:
            result["cases"].append(one(case, opened, device.major * 10 + device.minor, rounds, with_peers, result))
            print(json.dumps(result["cases"][-1]), flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            torch.cuda.empty_cache()
    return result


def one(
    case: Linear, bundle: Bundle, capability: int, rounds: int, with_peers: bool, ceiling: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    given = drawn(case)
    want = wanted(case, given)["output"]
    at = given | {x: empty(case, x) for _, _, outputs in plan(case) for x in outputs.values()}
    stream = torch.cuda.current_stream().cuda_stream
    launches, tactics, works, moved = [], [], [], 0.0
    for call, (_, inputs, outputs) in zip(calls(case), plan(case), strict=True):
        compiled = bundle.kernels(key_of(general(kernels(), call)), capability)[0]
        made = kernels()[call.op].programs(general(kernels(), call), capability)
        program = next(p for p in made if p.tactic == compiled.entry.tactic)
        tensors = {formal: at[name] for formal, name in (*inputs.items(), *outputs.items())}
        launches.append(run_program(program, compiled, tensors, call.attributes, stream))
        tactics.append(program.tactic)
        work = kernels()[call.op].work(call, program)
        works.append({"op": call.op, "model": model_name(program, capability), "work": asdict(work)})
        moved += work.bytes
    budget, error = BUDGETS[case.dtype], far(at["output"], want)
    if not error <= budget:
        return {"name": case.name, "wrong": f"{tactics}: {error:.1e}, budget {budget:.1e}"}

    def ours() -> None:
        for launch in launches:
            launch(stream)

    beside, errors, left_out = measurable(case, given, want, with_peers)
    each = {f"launch {i}": partial(launch, stream) for i, launch in enumerate(launches)}
    took = {name: median(t) for name, t in times({"ours": ours, **beside, **each}, rounds).items()}
    alone = [{**w, "ms": took.pop(name)} for w, name in zip(works, each, strict=True)]
    return {
        "name": case.name, "chunk": case.form.chunk, "tactics": tactics, "ms": took,
        "errors": {"ours": error, **errors}, "left_out": left_out,
        **judged(case, took["ours"], took, ceiling["copy_tbs"]),
        "wanted": case.wanted, "bytes": moved, "launches": alone,
    }  # fmt: skip


BUDGETS = {"float16": 3e-3, "bfloat16": 2e-2}
"""Relative L2 of an output; peers have three times that."""


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def judged(case: Linear, ours: float, took: Mapping[str, float], copy_tbs: float) -> dict[str, Any]:
    """Milliseconds of ``ours`` against those of peers, and against the rate of a copy."""
    ratios = {name: ms / ours for name, ms in took.items() if not name.startswith("ours")}
    share = least(case) / ours * 1e-9 / copy_tbs
    met = {n: ratios[n] >= x for n, x in case.wanted.items() if n in ratios}
    return {"ratios": ratios, "share_of_copy": share, "met": met | ({"copy": share >= case.copy} if case.copy else {})}


def measurable(
    case: Linear, at: Tensors, want: torch.Tensor, with_peers: bool
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:  # fmt: skip
    """Peers that run and are right, how far off they are, and why others are left out."""
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, make in peers(case, at) if with_peers else ():
        try:
            made = make()
            errors[name] = far(made(), want)
            if errors[name] <= 3 * BUDGETS[case.dtype]:
                runs[name] = made
            else:
                left_out[name] = f"wrong: {errors[name]:.1e}"
        except Exception as problem:  # a peer that fails in whatever way is left out by name
            left_out[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    return runs, errors, left_out


def peers(case: Linear, at: Tensors) -> Iterator[tuple[str, Callable[[], Run]]]:
    if not case.form.causal:
        yield "einsum", lambda: einsum(case, at)
        return
    yield "fla", lambda: fla(case, at)
    if case.form.decay == "head" and not case.step:
        yield "lightning", lambda: lightning(case, at)


def einsum(case: Linear, at: Tensors) -> Run:
    torch._dynamo.reset()

    def whole(q: Any, k: Any, v: Any) -> torch.Tensor:
        q, k = q.relu(), k.relu()
        state = torch.einsum("bnhd,bnhe->bhde", k, v)
        below = torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) + case.form.epsilon
        return torch.einsum("bnhd,bhde->bnhe", q, state) / below[..., None]

    # Sums over 16,384 tokens leave the range of float16: the einsum form is timed in bfloat16.
    q, k, v = (at[n].bfloat16() for n in OPERANDS)
    compiled = torch.compile(whole, dynamic=False)
    return lambda: compiled(q, k, v)


def fla(case: Linear, at: Tensors) -> Run:
    """fla-core's chunked op of the case, of a step its recurrent one."""
    from importlib import import_module

    named = {n: at[n] for n in OPERANDS}
    given: dict[str, Any] = {short: named[n] for short, n in zip("qkv", OPERANDS, strict=True)}
    given |= {"scale": case.form.scale, "g_gamma" if case.form.decay == "head" else "g": at["log_decay"]}
    kind = "gla" if case.form.decay == "channel" else "simple_gla"
    if case.form.delta:
        kind, given["beta"] = "gated_delta_rule", at["beta"]
    if case.step:
        given |= {"initial_state": at["initial_state"], "output_final_state": True}
    called = getattr(import_module(f"fla.ops.{kind}"), f"{'fused_recurrent' if case.step else 'chunk'}_{kind}")
    return lambda: called(**given)[0]


def lightning(case: Linear, at: Tensors) -> Run:
    from lightning_attn.ops import lightning_attn_func

    q, k, v = (at[n].transpose(1, 2).contiguous() for n in OPERANDS)
    slope = -at["log_decay"][:, None, None]
    q = q * case.form.scale
    return lambda: lightning_attn_func(q, k, v, slope).transpose(1, 2)
