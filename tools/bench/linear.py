"""Linear attention: our ops one after the other, beside torch.compile's einsum form, fla-core and lightning-attn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
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
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, OUTPUT, STATE, STATES

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Linear:
    """``wanted``: least time of a peer over ours; ``copy``: least share of the rate at which this GPU copies."""

    name: str
    form: Form
    heads: int
    tokens: int
    dim: int
    wanted: dict[str, float] = field(default_factory=dict)
    copy: float = 0.0
    batch: int = 1
    dtype: str = "float16"


RELU = Form("relu", "relu", "sum", 1e-6)
HEAD = Form(causal=True, decay="head", scale=128**-0.5, chunk=64)
TOKEN = replace(HEAD, decay="token")
CASES = (
    Linear("relu-d32-16k", replace(RELU, chunk=1024), 70, 16384, 32, {"einsum": 3.0}, 0.7),
    Linear("relu-d128-16k", replace(RELU, chunk=1024), 16, 16384, 128, {"einsum": 3.0}, 0.7),
    Linear("relu-d128-64k", replace(RELU, chunk=4096), 16, 65536, 128, {"einsum": 3.0}, 0.7),
    *(Linear(f"retention-{n}-c{c}", replace(HEAD, chunk=c), 32, t, 128, {"fla": 1.0, "lightning": 1.0})
      for t, n in ((8192, "8k"), (32768, "32k")) for c in (64, 128)),
    *(Linear(f"simple-gla-{n}", TOKEN, 32, t, 128, {"fla": 1.0}) for t, n in ((8192, "8k"), (32768, "32k"))),
)  # fmt: skip
"""Sizes of the issue. Retention with the decays of a head is Lightning attention too; gates for every channel and the
gated delta rule have no kernel yet.
"""


@dataclass(frozen=True)
class Step:
    call: OpCall
    tensors: dict[str, torch.Tensor]


def shapes(case: Linear) -> dict[str, tuple[int, ...]]:
    b, n, h, d = case.batch, case.tokens, case.heads, case.dim
    count = -(-n // case.form.chunk)
    found: dict[str, tuple[int, ...]] = dict.fromkeys(("query", "key", "value", "output"), (b, n, h, d))
    found |= {"state": (b, h, count, d, d), "total": (b, h, count, d), "whole_state": (b, h, 1, d, d),
              "whole_total": (b, h, 1, d), "log_decay": (h,) if case.form.decay == "head" else (b, n, h)}  # fmt: skip
    return found


def plan(case: Linear) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """(op, formal inputs, formal outputs), each to the name of a tensor."""
    if case.form.causal:
        decay = {"log_decay": "log_decay"}
        keyed = {"key": "key", "value": "value"}
        return [(STATES, {**keyed, **decay}, {"state": "state"}),
                (OUTPUT, {"query": "query", **keyed, "state": "state", **decay}, {"output": "output"})]  # fmt: skip
    whole = {"whole_state": "whole_state", "whole_total": "whole_total"}
    return [(STATE, {"key": "key", "value": "value"}, {"state": "state", "total": "total"}),
            (COMBINE, {"state": "state", "total": "total"}, whole),
            (APPLY, {"query": "query", "state": "whole_state", "total": "whole_total"},
             {"output": "output"})]  # fmt: skip


def calls(case: Linear) -> list[OpCall]:
    form, sizes = case.form, shapes(case)
    said = {"query_map": form.query_map, "key_map": form.key_map, "normaliser": form.normaliser, "scale": form.scale,
            "epsilon": form.epsilon, "floor": form.floor, "chunk": form.chunk}  # fmt: skip
    found = []
    for op, inputs, outputs in plan(case):
        more = {n: x for n, x in inputs.items() if n not in ("query", "key", "value")}
        node = OpCall(
            op, case.dtype if op != COMBINE else "float32", case.heads, case.heads, case.dim, case.dim, said,
            dict.fromkeys(more, "float32"), {n: sizes[x] for n, x in more.items()}, tuple(outputs), case.batch,
            case.tokens if "query" in inputs else None, case.tokens if "key" in inputs else None,
        )  # fmt: skip
        found.append(kernels()[op].call(node))
    return found


def prepare(out: Path, architectures: Sequence[int]) -> None:
    """Compile what the cases need, on a machine that needs no GPU."""
    import triton

    every = [call for case in CASES for call in calls(case)]
    write(out, build([], every, kernels(), architectures or ARCHITECTURES, Cache.default()), triton.__version__)


def run(bundle: Path, names: Sequence[str], rounds: int, with_peers: bool) -> dict[str, Any]:
    """Measure the cases called ``names`` (all without any). What is wrong is not timed."""
    device = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": device.name, "torch": torch.__version__, "cuda": torch.version.cuda, "when": time.strftime("%Y-%m-%d"),
        "rounds": rounds, **ceilings(), "cases": [],
    }  # fmt: skip
    opened = Bundle.open(bundle)
    for case in CASES:
        if not names or case.name in names:
            result["cases"].append(one(case, opened, device.major * 10 + device.minor, rounds, with_peers, result))
            print(json.dumps(result["cases"][-1]), flush=True)
            torch.cuda.empty_cache()
    return result


def one(
    case: Linear, bundle: Bundle, capability: int, rounds: int, with_peers: bool, ceiling: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    kind = getattr(torch, case.dtype)
    at: dict[str, torch.Tensor] = {}
    for name, shape in shapes(case).items():
        if name in ("query", "key", "value"):
            at[name] = torch.randn(shape, device="cuda", dtype=kind)
        elif name == "log_decay":
            at[name] = -torch.rand(shape, device="cuda") / 16
        else:
            at[name] = torch.full(shape, torch.nan, device="cuda", dtype=kind if name == "output" else torch.float32)
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
    want = truth(case, at)
    budget = {"float16": 3e-3, "bfloat16": 2e-2}[case.dtype]

    def error(found: torch.Tensor) -> float:
        return float((found.double() - want).norm() / want.norm())

    errors = {"ours": error(at["output"])}
    if not errors["ours"] <= budget:
        return {"name": case.name, "wrong": f"{tactics}: {errors['ours']:.1e}, budget {budget:.1e}"}

    def ours() -> None:
        for launch in launches:
            launch(stream)

    runs: dict[str, Any] = {"ours": ours}
    left_out: dict[str, str] = {}
    for name, make in peers(case, at) if with_peers else ():
        try:
            made_of = make()
            errors[name] = error(made_of())
            if not errors[name] <= 2 * budget:
                left_out[name] = f"wrong: {errors[name]:.1e}"
                continue
            runs[name] = made_of
        except Exception as problem:  # a peer that fails in whatever way is left out by name
            left_out[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    each = {f"launch {i}": partial(launch, stream) for i, launch in enumerate(launches)}
    took = {name: median(t) for name, t in times({**runs, **each}, rounds).items()}
    alone = [{**w, "ms": took.pop(name)} for w, name in zip(works, each, strict=True)]
    ratios = {name: ms / took["ours"] for name, ms in took.items() if name != "ours"}
    least = 2.0 * case.batch * case.heads * case.tokens * case.dim * 4
    share = least / took["ours"] * 1e-9 / ceiling["copy_tbs"]
    met = {n: ratios[n] >= x for n, x in case.wanted.items() if n in ratios}
    met |= {"copy": share >= case.copy} if case.copy else {}
    return {
        "name": case.name, "tactics": tactics, "ms": took, "errors": errors, "left_out": left_out, "ratios": ratios,
        "wanted": case.wanted, "met": met, "bytes": moved, "share_of_copy": share,
        "launches": alone,
    }  # fmt: skip


def truth(case: Linear, at: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, N, H, D] float64, in blocks of queries, each against all its keys."""
    q, k, v = (at[n].double().transpose(1, 2) for n in ("query", "key", "value"))
    if not case.form.causal:
        q, k = q.relu(), k.relu()
        below = q @ k.sum(2)[..., None] + case.form.epsilon
        return (q @ (k.transpose(2, 3) @ v) / below).transpose(1, 2)
    n = case.tokens
    place = torch.arange(n, device=q.device)
    if case.form.decay == "head":
        sums = at["log_decay"].double()[None, :, None] * (place + 1)
    else:
        sums = at["log_decay"].double().cumsum(1).transpose(1, 2)
    out = torch.empty_like(q)
    for first in range(0, n, 256):
        rows = slice(first, first + 256)
        apart = (sums[:, :, rows, None] - sums[:, :, None, : first + 256]).clamp(max=0).exp()
        apart = apart * (place[rows, None] >= place[None, : first + 256])
        out[:, :, rows] = (q[:, :, rows] @ k[:, :, : first + 256].transpose(2, 3) * apart) @ v[:, :, : first + 256]
    return (case.form.scale * out).transpose(1, 2)


def peers(case: Linear, at: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable[[], Run]]]:
    if case.form.causal:
        yield "fla", lambda: fla(case, at)
        if case.form.decay == "head":
            yield "lightning", lambda: lightning(case, at)
        return
    yield "einsum", lambda: einsum(case, at)


def einsum(case: Linear, at: dict[str, torch.Tensor]) -> Run:
    torch._dynamo.reset()

    def whole(q: Any, k: Any, v: Any) -> torch.Tensor:
        q, k = q.relu(), k.relu()
        state = torch.einsum("bnhd,bnhe->bhde", k, v)
        below = torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) + case.form.epsilon
        return torch.einsum("bnhd,bhde->bnhe", q, state) / below[..., None]

    # Sums over 16,384 tokens leave the range of float16: the einsum form is timed in bfloat16.
    q, k, v = (at[n].bfloat16() for n in ("query", "key", "value"))
    compiled = torch.compile(whole, dynamic=False)
    return lambda: compiled(q, k, v)


def fla(case: Linear, at: dict[str, torch.Tensor]) -> Run:
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, g = at["query"], at["key"], at["value"], at["log_decay"]
    said = {"g_gamma": g} if case.form.decay == "head" else {"g": g}
    return lambda: chunk_simple_gla(q, k, v, scale=case.form.scale, **said)[0]


def lightning(case: Linear, at: dict[str, torch.Tensor]) -> Run:
    from lightning_attn.ops import lightning_attn_func

    q, k, v = (at[n].transpose(1, 2).contiguous() for n in ("query", "key", "value"))
    slope = -at["log_decay"][:, None, None]
    q = q * case.form.scale
    return lambda: lightning_attn_func(q, k, v, slope).transpose(1, 2)
