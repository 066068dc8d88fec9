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
import torch
import triton
import triton.language as tl

from attncompile.core.kernel import Program
from attncompile.kernels import symbols
from attncompile.kernels.symbols import Strided
from attncompile.plugins import kernels
from attncompile.plugins.linear_attention.form import Form
from attncompile.plugins.linear_attention.kernel_causal import gates
from attncompile.plugins.linear_attention.kernel_delta import product
from attncompile.plugins.linear_attention.op import APPLY, DELTA, OUTPUT, SOLVE
from tests.conformance import launch, linear, linear_ops
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
def nothing_elapsed(log_decay, rate, b, first, place, g, groups, tokens, DECAY: tl.constexpr, BT: tl.constexpr):
    """``elapsed`` for which nothing decays inside of a tile."""
    return place.to(tl.float32) * 0.0, 0.0


@triton.jit
def nothing_before(log_decay, rate, b, rows, place, g, groups, tokens, before, DECAY: tl.constexpr):
    """``passed`` for which every square begins anew."""
    if DECAY == 0:
        x, after = place.to(tl.float32) * 0.0, before
    elif DECAY == 1:
        x, after = rate * (place + 1).to(tl.float32), before
    else:
        x, after = tl.cumsum(gates(log_decay, b, rows, g, groups, tokens, tokens), 0), before
    return x, after


@triton.jit
def halves_apart(q, qt, a, row, col, SIZE: tl.constexpr):
    """``doubled`` for which halves of eight tokens do not depend on one another."""
    r = tl.where((row // SIZE == col // SIZE + 1) & (row // (2 * SIZE) == col // (2 * SIZE)), a, 0.0)
    mt = product(qt, r * (SIZE < 8), tl.zeros_like(q))
    return product(q, mt, q), product(mt, q, qt)


@triton.jit
def of_one_part(a, b, added):
    """``product`` of bfloat16s alone."""
    return tl.dot(a.to(tl.bfloat16), tl.trans(b).to(tl.bfloat16), added)


@triton.jit
def nothing_is_bad(p, rates, place, I: tl.constexpr, BT: tl.constexpr):  # noqa: E741
    """``first_bad`` that trusts all tokens."""
    return place * 0 + BT


@triton.jit
def halves_of_sums(log_decay, b, first, g, groups, tokens, BT: tl.constexpr):
    """``running`` whose later half forgets the sum of the earlier one."""
    each = gates(log_decay, b, first + tl.arange(0, BT), g, groups, tokens, tokens)
    late = tl.sum(tl.where(tl.arange(0, BT) < 32, each, 0.0), 0)
    return tl.cumsum(each, 0) - tl.where(tl.arange(0, BT) < 32, 0.0, late), tl.sum(each, 0)


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
    "sums of gates by halves": (
        "simple GLA, sums, long chunks", {"attribute": "running", "device": halves_of_sums}),
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
        "running": CAUSAL,
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


TILED = tuple(
    Linear(f"{decay} {tile}", replace(linear.DELTA_RULE, decay=decay, chunk=tile), (1, 110, 110, 2, 2, 40, 16),
           layouts, dtype, beta=beta)
    for tile, decay, layouts, dtype, beta in (
        (64, "token", linear.MIXED, "float16", "a head"), (64, "none", linear.COLUMNS_OF_KEYS, "bfloat16", "a token"),
        (64, "head", linear.HEADS_FIRST, "float16", "a token"), (32, "token", ("BNHD",) * 4, "bfloat16", "a head"),
        (16, "head", ("BNHD",) * 4, "float16", "a head"),
    )
)  # fmt: skip


def solved(case: Linear, length: float = 1.0, bad: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``Solve`` makes of keys of ``length``, those at ``bad`` infinite or NaNs, and float64 where these are 0."""
    at, step, call = linear.tensors(case), linear.steps(case)[0], linear.nodes(case)[0]
    at["key"] *= length
    at["key"][:, list(bad)] = 0.0
    named = {formal: at[name] for formal, name in (*step.inputs.items(), *step.outputs.items())}
    inputs = {n: x for n, x in linear.logical(case, step, named).items() if n != "solved"}
    want = linear_ops.expected(SOLVE, linear.attributes(case), inputs)["solved"]
    for n, place in enumerate(bad):
        at["key"][:, place, :, n] = (torch.nan, torch.inf)[n % 2]
    kernel = kernels()[SOLVE]
    (program,) = kernel.programs(kernel.general(call), 80)
    given, orders = linear.in_memory(case, step, named)
    strided = {n: Strided(tuple(x.shape), tuple(x.stride())) for n, x in given.items()}
    launch.interpreted(program, named, symbols.of_tensors(strided, call.attributes, orders))
    return at["solved"].double(), want


def tiles(case: Linear, length: float = 1.0, allowed: float = 1e-5) -> str:
    """How far ``Solve`` is from float64: products keep 16 bits of a factor; the longer keys are, the more cancels."""
    got, want = solved(case, length)
    far = float(torch.linalg.norm(got - want) / torch.linalg.norm(want))
    return "" if far < allowed else f"tiles of keys of length {length} are {far:.2g} away"


def bad_keys(case: Linear) -> str:
    """Rows of a tile before its first bad key are those of keys that are 0 there; from it on they are NaNs."""
    bad, tile = (40, 61, 85), case.form.tile
    got, want = solved(case, bad=bad)
    ends = [min((p - first for p in bad if first <= p < first + tile), default=tile) for first in range(0, 110, tile)]
    for n, end in enumerate(ends):
        far = float((got - want)[:, :, n, :end].abs().max()) if end else 0.0
        if not far < 2e-5:
            return f"rows before a bad key in tile {n} are {far:.2g} away"
        if not all(got[:, :, n, row, row].isnan().all() for row in range(end, tile)):
            return f"rows behind a bad key in tile {n} are numbers"
    return ""


PLANTED_IN_TILES: dict[str, tuple[str, Any, Callable[[Linear], str]]] = {
    "squares that begin anew": ("passed", nothing_before, tiles),
    "halves of squares apart": ("doubled", halves_apart, tiles),
    "products of bfloat16s": ("product", of_one_part, tiles),
    "bad keys that are trusted": ("first_bad", nothing_is_bad, bad_keys),
}


def planted_in_tiles(name: str) -> str:
    attribute, device, check = PLANTED_IN_TILES[name]
    with patch.object(import_module(KERNELS_OF_DELTA), attribute, device):
        return check(TILED[0])


def main(part: int, parts: int) -> None:
    mend()
    warnings.simplefilter("ignore")
    work: list[tuple[str, Callable[[], str]]] = [(c.name, lambda c=c: verdict(c)) for c in CASES]
    work += [
        (f"earlier tokens, decay {d}", lambda d=d: earlier_tokens(d)) for d in ("none", "head", "token", "channel")
    ]
    work.append(("large features", large_features))
    work += [(f"tiles: {c}", lambda c=c: tiles(c)) for c in TILED]
    work.append(("tiles of long keys", lambda: tiles(TILED[0], 4.0, 2e-4)))
    work += [(f"tiles with bad keys: {c}", lambda c=c: bad_keys(c)) for c in TILED]
    work += [(f"planted: {name}", lambda n=name: planted(n)) for name in PLANTED]
    work += [(f"planted: {name}", lambda n=name: planted_in_tiles(n)) for name in PLANTED_IN_TILES]
    for name, run in work[part::parts]:
        print(json.dumps({"name": name, "wrong": run()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
