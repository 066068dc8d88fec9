"""Runs the kernels of linear attention in Triton's interpreter, in a process of its own, as ``interpret`` does:
``python -m tests.conformance.linear_interpret N OF`` prints one line of JSON a case.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl

from attncompile.core.kernel import Program
from attncompile.plugins.linear_attention.form import Form
from attncompile.plugins.linear_attention.op import APPLY, DELTA, OUTPUT
from tests.conformance import launch, linear
from tests.conformance.budget import wrong
from tests.conformance.interpret import mend
from tests.conformance.linear import CASES, Linear, Tensors

KERNELS = "attncompile.plugins.linear_attention.kernel_triton"
KERNELS_OF_DELTA = "attncompile.plugins.linear_attention.kernel_delta"
HEDGEHOG = "attncompile.plugins.linear_attention.kernel_hedgehog"
CAUSAL = "attncompile.plugins.linear_attention.kernel_causal"


@cache
def wanted(case: Linear) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Its float64 and what its type makes of that: planted errors ask for them again."""
    return linear.expected(case), linear.low(case)


def verdict(case: Linear, **options: Any) -> str:
    """What is wrong with either tactic's outputs; empty if nothing is."""
    want, low = wanted(case)
    for small in (False, True):
        got = linear.run(case, launch.interpreted, small, **options)
        said = wrong(got["output"], want["output"], low, case.dtype)
        if not said and "final_state" in want:  # sums of products of halves, whose decays are rounded to halves
            far = np.linalg.norm(got["final_state"] - want["final_state"]) / np.linalg.norm(want["final_state"])
            limit = {"float16": 6e-4, "bfloat16": 5e-3}[case.dtype]
            said = "" if far < limit else f"final_state is {far:.2g} away, allowed are {limit}"
        if said:
            return f"{'small' if small else 'best'}: {said}"
    return ""


@triton.jit
def relu_of_one_too_many(x, seen, MAP: tl.constexpr):
    """``features`` that forgets what is not seen."""
    x = x.to(tl.float32)
    if MAP == 2:
        x = tl.where(x > 0.0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634))
    return x


@triton.jit
def not_scaled_back(state):
    """``scaled`` that forgets the size of the state."""
    largest = tl.max(tl.max(tl.abs(state), 1), 0)
    return state * tl.where(largest > 0.0, 1.0 / largest, 0.0), largest * 0.0 + 1.0


@triton.jit
def gates_of_the_first_channel(log_decay, b, rows, g, groups, tokens, end, cols, DK: tl.constexpr):
    """``channel_gates`` that reads one channel for all."""
    at = log_decay + ((b.to(tl.int64) * tokens + rows) * groups + g)[:, None] * DK + cols[None, :] * 0
    return tl.load(at, mask=(rows < end)[:, None], other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def always_split(fq, fk, own, whole, place, BT: tl.constexpr, SMALL: tl.constexpr):
    """``gated_products`` that splits a decay however far it goes."""
    halfway = (whole * 0.5)[None, :]
    return tl.dot(fq * tl.exp2(own - halfway), tl.trans(fk * tl.exp2(halfway - own)))


@triton.jit
def not_decayed(fq, fk, own, whole, place, BT: tl.constexpr, SMALL: tl.constexpr):
    """``gated_products`` for which nothing decays inside of a tile."""
    return tl.dot(fq, tl.trans(fk))


@triton.jit
def all_is_left(log_decay, rate, b, rows, g, first, end, groups, tokens, DECAY: tl.constexpr):
    """``left_over`` for which a state does not decay from tile to tile."""
    return tl.exp2(rate * tl.maximum(end - 1 - rows, 0).to(tl.float32)), 1.0


@triton.jit
def not_kept(acc, sums, m, x, v, seen):
    """``added`` that does not shrink what stood over a smaller maximum."""
    x = tl.where(seen, x, -1.0e30)
    new = tl.maximum(m, tl.max(x, 0))
    f = tl.where(seen, tl.exp2((x - new[None, :]) * 1.4426950408889634), 0.0)
    return tl.dot(tl.trans(f.to(v.dtype)), v, acc), sums + tl.sum(f, 0), new


@triton.jit
def nothing_elapsed(log_decay, rate, b, rows, place, g, groups, tokens, DECAY: tl.constexpr):
    """``elapsed`` for which nothing decays inside of a tile."""
    return place.to(tl.float32) * 0.0


def _expressions(**changed: str) -> Callable[[Program], Program]:
    def change(made: Program) -> Program:
        return replace(made, arguments=tuple(
            replace(a, expression=changed.get(a.name, a.expression)) for a in made.arguments))  # fmt: skip

    return change


def _constants(**changed: Any) -> Callable[[Program], Program]:
    return lambda made: replace(
        made, constants={**made.constants, **{k: v for k, v in changed.items() if k in made.constants}}
    )


def _of(op: str, change: Callable[[Program], Program]) -> Callable[[Program], Program]:
    """Of one op's programs: another's would write past its output."""
    return lambda made: change(made) if made.op == op else made


PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "one key less": ("relu", {"change": _expressions(NK="NK - 1")}),
    "one query less": ("relu", {"change": _expressions(NQ="NQ - 1")}),
    "a chunk left out": ("relu, three chunks", {"change": _expressions(C="C - 1")}),
    "chunks too short": ("relu, three chunks", {"change": _expressions(chunk="chunk - 8")}),
    "wrong key heads": ("relu", {"change": _expressions(group="H // HKV + 1")}),
    "keys of the first part": ("relu, packed", {"change": _expressions(k_o="key_offset * 0")}),
    "queries of another part": ("GLA, packed", {"change": _expressions(q_o="query_offset + query_stride_H")}),
    "no epsilon": ("retention, sums, first state", {"change": _expressions(epsilon="scale_bits")}),
    "no bound": ("a bound of the sum", {"change": _constants(FLOOR=False)}),
    "scale": ("no map", {"change": _expressions(scale="scale_bits + 200000")}),
    "tokens for channels": ("relu, channels first", {"change": _constants(K_COLUMNS=False)}),
    "units": ("relu, channels first", {"change": _constants(Q_UNIT=2)}),
    "another map": ("elu", {"change": _constants(MAP=1)}),
    "plain for MALA": ("mala", {"change": _constants(NORM=1)}),
    "no decay": ("retention", {"change": _constants(DECAY=0)}),
    "a decay a head": ("simple GLA", {"change": _constants(DECAY=1)}),
    "gates of the tile before": ("GLA", {"change": _of(OUTPUT, _constants(CHUNK=16))}),
    "gates of other channels": ("GLA", {"attribute": "channel_gates", "device": gates_of_the_first_channel}),
    "tiles without gates": ("GLA", {"attribute": "gated_products", "device": not_decayed}),
    "gates out of range": ("closed gates, a channel", {"attribute": "gated_products", "device": always_split}),
    "features that nobody sees": ("elu", {"attribute": "features", "device": relu_of_one_too_many}),
    "heads in one another's place": ("short heads side by side", {"change": _expressions(groups="HKV - 1")}),
    "a state that stays": ("retention, long chunks", {"attribute": "left_over", "device": all_is_left}),
    "a step less": ("steps, sums", {"change": _expressions(NK="NK - 1")}),
    "steps without decay": ("steps, GLA", {"change": _constants(DECAY=0)}),
    "steps without the delta rule": ("steps, delta rule", {"change": _constants(BETA=0)}),
    "rates of other heads": ("steps, gated delta rule", {"change": _constants(BETA=1)}),
    "steps without a bound": ("steps, sums", {"change": _constants(FLOOR=False)}),
    "a tile less": ("delta rule", {"change": _expressions(NK="NK - 1")}),
    "tiles that do not decay": ("gated delta rule", {"attribute": "elapsed", "device": nothing_elapsed}),
    "rates a token for rates a head": ("gated delta rule", {"change": _constants(BETA=1)}),
    "states too seldom": ("gated delta rule, first state", {"change": _of(DELTA, _constants(CHUNK=256))}),
    "features of one sign": ("hedgehog", {"change": _of(APPLY, _constants(W=16))}),
    "weights of another head": ("hedgehog", {"change": _of(APPLY, _expressions(group="H // HKV + 1"))}),
    "more than it has": ("hedgehog, large", {"attribute": "added", "device": not_kept}),
    "size of the state": ("relu", {"attribute": "scaled", "device": not_scaled_back}),
}  # fmt: skip


def planted(name: str) -> str:
    of, options = PLANTED[name]
    case = next(c for c in CASES if c.name == of)
    if "attribute" not in options:
        return verdict(case, **options)
    modules = {
        "channel_gates": CAUSAL,
        "gated_products": CAUSAL,
        "left_over": CAUSAL,
        "elapsed": KERNELS_OF_DELTA,
        "added": HEDGEHOG,
    }
    module = import_module(modules.get(options["attribute"], KERNELS))
    with patch.object(module, options["attribute"], options["device"]):
        return verdict(case)


def earlier_tokens(decay: str) -> str:
    """A key whose exp is infinite, and what stays finite before it."""
    case = Linear("later", Form("exp", "exp", "sum", causal=True, decay=decay, chunk=64), (1, 64, 64, 1, 1, 16, 16))
    made = linear.tensors

    def drawn(case: Linear, device: str = "cpu") -> Tensors:
        at = made(case, device)
        at["key"][:, 40] = 12.0
        return at

    with patch.object(linear, "tensors", drawn):
        got = [linear.run(case, launch.interpreted, small)["output"][:, :40] for small in (False, True)]
    return "" if all(np.isfinite(x).all() for x in got) else "a later key reaches earlier tokens"


def large_features() -> str:
    """Features and gates that float32 holds, but not one times half the decay of the other."""
    form = Form("exp", "exp", "sum", causal=True, decay="channel", chunk=64)
    case = Linear("large", form, (1, 64, 64, 1, 1, 16, 16), dtype="bfloat16")
    made = linear.tensors

    def drawn(case: Linear, device: str = "cpu") -> Tensors:
        at = made(case, device)
        at["query"][:, :2] = 40.0
        at["key"].clamp_(max=1.0)
        at["log_decay"].fill_(-1.7)
        return at

    with patch.object(linear, "tensors", drawn):
        got = [linear.run(case, launch.interpreted, small)["output"] for small in (False, True)]
    return "" if all(np.isfinite(x).all() for x in got) else "products of large features are not finite"


def main(part: int, parts: int) -> None:
    mend()
    warnings.simplefilter("ignore")
    work: list[tuple[str, Callable[[], str]]] = [(c.name, lambda c=c: verdict(c)) for c in CASES]
    work += [
        (f"earlier tokens, decay {d}", lambda d=d: earlier_tokens(d)) for d in ("none", "head", "token", "channel")
    ]
    work.append(("large features", large_features))
    work += [(f"planted: {name}", lambda n=name: planted(n)) for name in PLANTED]
    for name, run in work[part::parts]:
        print(json.dumps({"name": name, "wrong": run()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
