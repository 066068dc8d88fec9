"""Cases of linear attention: the mechanism's ops through kernels, and the float64 that they must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from attncompile.core.kernel import OpCall, Program
from attncompile.kernels import symbols
from attncompile.kernels.symbols import Strided
from attncompile.plugins import kernels
from attncompile.plugins.linear_attention.form import Form
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, OUTPUT, STATE, STATES
from attncompile.plugins.linear_attention.reference import with_state
from tests.conformance.case import rounded

Tensors = dict[str, torch.Tensor]
Launch = Callable[[Program, Tensors, Mapping[str, int]], None]
"""Runs a program on tensors by formal names; the numbers are what expressions speak of."""


@dataclass(frozen=True)
class Linear:
    """``layouts`` of query, key, value, output. ``sizes``: B, queries, keys, heads, key heads, head dim, value dim."""

    name: str
    form: Form
    sizes: tuple[int, int, int, int, int, int, int]
    layouts: tuple[str, str, str, str] = ("BNHD",) * 4
    dtype: str = "float16"
    decay_type: str = "float32"
    seed: int = 1
    size: float = 1.0

    def __str__(self) -> str:
        return self.name

    def values(self) -> dict[str, np.ndarray]:
        """Float32, exact in their types, logical axes."""
        rng = np.random.default_rng(self.seed)
        batch, queries, keys, heads, groups, dim, value_dim = self.sizes

        def normal(*shape: int, kind: str = self.dtype) -> np.ndarray:
            return rounded(rng.standard_normal(shape).astype(np.float32) * np.float32(self.size), kind)

        found = {"query": normal(batch, queries, heads, dim), "key": normal(batch, keys, groups, dim),
                 "value": normal(batch, keys, groups, value_dim)}  # fmt: skip
        shape = {"head": (groups,), "token": (batch, keys, groups), "channel": (batch, keys, groups, dim)}
        if self.form.decay != "none":
            found["log_decay"] = -np.abs(normal(*shape[self.form.decay], kind=self.decay_type)) / 4
        if self.form.key_weight:
            found["key_weight"] = np.abs(normal(batch, keys, groups))
        if self.form.initial:
            found["initial_state"] = normal(batch, groups, dim, value_dim, kind="float32")
            found["initial_total"] = np.abs(normal(batch, groups, dim, kind="float32"))
        return found


HEADS_FIRST = ("BHND",) * 4
COLUMNS = ("BHDN",) * 4
MIXED = ("BNHD", "BHDN", "BHND", "BHDN")
RELU = Form("relu", "relu", "sum", 1e-3)
RETENTION = Form(causal=True, decay="head", scale=0.25, chunk=16)

CASES = (
    Linear("relu", RELU, (2, 37, 50, 4, 2, 32, 32)),
    Linear("relu, three chunks", replace(RELU, chunk=23), (1, 70, 50, 2, 2, 32, 48)),
    Linear("relu, channels first", replace(RELU, chunk=16), (2, 37, 45, 2, 2, 16, 24), COLUMNS),
    Linear("relu, channels first, whole units", RELU, (1, 40, 48, 2, 1, 24, 16), COLUMNS),
    Linear("relu, bfloat16, mixed", replace(RELU, chunk=20), (1, 33, 41, 2, 2, 72, 40), MIXED, "bfloat16"),
    Linear("a bound of the sum", Form("relu", "relu", "sum", 0.0, 30.0, 0.7), (1, 19, 26, 2, 2, 16, 16)),
    Linear("elu", Form("elu+1", "elu+1", "sum"), (1, 37, 50, 2, 2, 40, 32), HEADS_FIRST),
    Linear("exp", Form("exp", "exp", "sum", chunk=17), (1, 37, 50, 2, 2, 32, 32)),
    Linear("no map", Form(scale=0.125), (1, 37, 50, 2, 2, 128, 64)),
    Linear("softmax", Form("softmax", "softmax", scale=0.5, chunk=17), (2, 37, 50, 2, 2, 24, 32)),
    Linear("softmax, large", Form("softmax", "softmax"), (1, 37, 50, 2, 2, 16, 16), size=9.0),
    Linear("mala", Form("elu+1", "elu+1", "mala", chunk=25), (1, 37, 50, 2, 2, 32, 32)),
    Linear("inline", Form("exp", "exp", "inline"), (1, 37, 50, 2, 2, 16, 32)),
    Linear("rala", Form("elu+1", "elu+1", "sum", key_weight=True, chunk=25), (1, 37, 50, 4, 2, 32, 16)),
    Linear("wide", replace(RELU, chunk=64), (1, 40, 70, 1, 1, 256, 136)),
    Linear("sums under a triangle", Form("elu+1", "elu+1", "sum", 1e-3, causal=True, chunk=16),
           (2, 45, 45, 4, 2, 32, 32)),
    Linear("running sum", Form("relu", "relu", causal=True, chunk=32), (1, 70, 70, 2, 2, 16, 40), HEADS_FIRST),
    Linear("retention", RETENTION, (2, 45, 45, 2, 2, 32, 64)),
    Linear("retention, bfloat16", replace(RETENTION, chunk=64), (1, 150, 150, 2, 1, 72, 32), MIXED, "bfloat16"),
    Linear("retention, sums, first state", replace(RETENTION, query_map="exp", key_map="exp", normaliser="sum",
           epsilon=1e-3, initial=True), (1, 45, 45, 2, 2, 16, 32)),
    Linear("simple GLA", replace(RETENTION, decay="token"), (2, 45, 45, 4, 2, 32, 32)),
    Linear("GLA", replace(RETENTION, decay="channel", chunk=32), (2, 75, 75, 4, 2, 32, 32)),
    Linear("GLA, bfloat16, first state", replace(RETENTION, decay="channel", chunk=64, initial=True, query_map="relu"),
           (1, 90, 90, 2, 2, 24, 40), MIXED, "bfloat16"),
    Linear("GLA, strong gates", replace(RETENTION, decay="channel", chunk=64), (1, 70, 70, 1, 1, 16, 16), size=12.0),
    Linear("simple GLA, half gates", replace(RETENTION, decay="token", chunk=32, initial=True),
           (1, 75, 75, 2, 2, 48, 32), COLUMNS, decay_type="float16"),
)  # fmt: skip


def expected(case: Linear) -> dict[str, np.ndarray]:
    """Float64 of ``output`` and, under a triangle, ``final_state``."""
    form, given = case.form, {n: x.astype(np.float64) for n, x in case.values().items()}
    said = {"query_map": form.query_map, "key_map": form.key_map, "normaliser": form.normaliser,
            "epsilon": form.epsilon, "floor": form.floor, "scale": form.scale, "causal": form.causal}  # fmt: skip
    q, k, v = (given.pop(n) for n in ("query", "key", "value"))
    out, state, _ = with_state(q, k, v, said, **given)
    return {"output": out, **({"final_state": state} if form.causal else {})}


def low(case: Linear) -> np.ndarray:
    """What the type makes of the output at best: features, weights, state and result are rounded to it."""
    form, given = case.form, case.values()
    batch, _, keys, heads, groups, _, _ = case.sizes
    half = case.dtype
    out = []
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            q, k, v = given["query"][b, :, h], given["key"][b, :, g], given["value"][b, :, g]
            fq, fk = (rounded(_map(x, m, a), half) for x, m, a in ((q, form.query_map, 1), (k, form.key_map, 0)))
            if form.causal:
                if form.decay == "channel":
                    out.append(rounded(_gated(case, given, b, g, fq, fk, v), half))
                    continue
                logs = np.broadcast_to(given["log_decay"][g] if form.decay == "head" else given["log_decay"][b, :, g]
                                       if form.decay == "token" else np.float32(0), (keys,))  # fmt: skip
                sums = np.cumsum(logs)
                apart = np.tril(np.exp(np.minimum(sums[:, None] - sums[None], 0)))
                p = (fq @ fk.T) * apart
                found = rounded(p, half) @ v
                below = p.sum(1)
                if form.initial:
                    first = rounded(given["initial_state"][b, g], half)
                    found = found + rounded(fq * np.exp(sums)[:, None], half) @ first
                    below = below + (fq * np.exp(sums)[:, None]) @ given["initial_total"][b, g]
            else:
                weights = given["key_weight"][b, :, g, None] if form.key_weight else np.float32(1)
                state = rounded(fk * weights, half).T @ v
                size = np.abs(state).max()
                found = (fq @ rounded(state / size, half)) * size
                below = fq @ fk.sum(0)
            mean = v.mean(0)
            if form.normaliser == "none":
                found = found * form.scale
            elif form.normaliser == "sum":
                found = form.scale * found / np.maximum(below + form.epsilon, form.floor)[:, None]
            elif form.normaliser == "mala":
                found = found * (1 + 1 / below)[:, None] - below[:, None] * mean
            else:
                found = found + (1 - below)[:, None] * mean
            out.append(rounded(found.astype(np.float32), half))
    return np.array(out).reshape(batch, heads, *out[0].shape).transpose(0, 2, 1, 3)


def _gated(
    case: Linear, given: Mapping[str, np.ndarray], b: int, g: int, fq: np.ndarray, fk: np.ndarray, v: np.ndarray
) -> np.ndarray:  # fmt: skip
    """With a gate for every channel: all pairs, channel by channel."""
    sums = np.cumsum(given["log_decay"][b, :, g], 0)
    p = np.zeros((len(fq), len(fk)), np.float32)
    for d in range(fq.shape[1]):
        p += fq[:, d, None] * fk[None, :, d] * np.exp(np.minimum(sums[:, None, d] - sums[None, :, d], 0))
    found = rounded(np.tril(p), case.dtype) @ v
    if case.form.initial:
        found = found + rounded(fq * np.exp(sums), case.dtype) @ rounded(given["initial_state"][b, g], case.dtype)
    return np.asarray(found * np.float32(case.form.scale))


def _map(x: np.ndarray, kind: str, axis: int) -> np.ndarray:
    if kind == "softmax":
        e = np.exp(x - x.max(axis, keepdims=True))
        return np.asarray(e / e.sum(axis, keepdims=True))
    low_part = np.exp(np.minimum(x, 0))
    return {"none": x, "relu": np.maximum(x, 0), "elu+1": np.where(x > 0, x + 1, low_part), "exp": np.exp(x)}[kind]


def run(case: Linear, launch: Launch, small: bool = False, device: str = "cpu",
        change: Callable[[Program], Program] = lambda p: p) -> dict[str, np.ndarray]:  # fmt: skip
    """Outputs by name, float32 and with logical axes. ``small``: the last tactic; ``change`` plants an error."""
    form, given = case.form, case.values()
    batch, queries, keys, heads, groups, dim, value_dim = case.sizes
    half = getattr(torch, case.dtype)
    at: Tensors = {}
    orders = dict(zip(("query", "key", "value", "output"), case.layouts, strict=True))
    for name, array in given.items():
        x = torch.from_numpy(array).to(device)
        if name in orders:
            x = _laid(x.to(half), orders[name])
        elif name == "log_decay":
            x = x.to(getattr(torch, case.decay_type))
        elif name == "key_weight":
            x = x.to(half)
        at[name] = x
    out = torch.full((batch, queries, heads, value_dim), torch.nan, dtype=half, device=device)
    at["output"] = _laid(out, orders["output"])

    def poisoned(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=device)

    def op(kind: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        kernel = kernels()[kind]
        named = {**inputs, **outputs}
        columns = [n for n in orders if n in named and orders[n] == "BHDN"]
        said: dict[str, Any] = {"key_map": form.key_map, "query_map": form.query_map, "normaliser": form.normaliser,
                                "epsilon": form.epsilon, "floor": form.floor, "scale": form.scale,
                                "columns": columns}  # fmt: skip
        if kind in (STATE, STATES, OUTPUT):
            said["chunk"] = form.chunk
        more = {n: x for n, x in inputs.items() if n not in orders}
        node = OpCall(
            kind, case.dtype if kind != COMBINE else "float32", heads if kind in (APPLY, OUTPUT) else groups, groups,
            dim, value_dim, said, {n: str(x.dtype).removeprefix("torch.") for n, x in more.items()},
            {n: tuple(x.shape) for n, x in more.items()}, tuple(outputs), batch,
            queries if "query" in inputs else None, keys if "key" in inputs else None,
        )  # fmt: skip
        call = kernel.call(node)
        made = kernel.programs(kernel.general(call), 80)[-1 if small else 0]
        strided = {n: Strided(tuple(x.shape), tuple(x.stride())) for n, x in _in_memory(named, orders).items()}
        known = symbols.of_tensors(strided, node.attributes, orders)
        launch(change(made), named, {**known, "SMS": 2})

    keyed = {n: at[n] for n in ("key", "value")}
    if form.causal:
        count = -(-keys // form.chunk)
        decay = {n: at[n] for n in ("log_decay",) if n in at}
        first = {n: at[n] for n in ("initial_state", "initial_total") if n in at}
        made = {"state": poisoned(batch, groups, count, dim, value_dim), "total": poisoned(batch, groups, count, dim)}
        last = {"final_state": poisoned(batch, groups, dim, value_dim), "final_total": poisoned(batch, groups, dim)}
        op(STATES, {**keyed, **decay, **first}, {**made, **last})
        read = {n: made[n] for n in ("state", *(["total"] if form.sums else []))}
        op(OUTPUT, {"query": at["query"], **keyed, **read, **decay}, {"output": at["output"]})
        return {"output": at["output"].float().cpu().numpy(), "final_state": last["final_state"].cpu().numpy()}
    count = -(-keys // form.chunk) if form.chunk else 1
    made = {"state": poisoned(batch, groups, count, dim, value_dim), "total": poisoned(batch, groups, count, dim),
            "mean": poisoned(batch, groups, count, value_dim)}  # fmt: skip
    tops = {"top": poisoned(batch, groups, count, dim)} if form.tops else {}
    weight = {n: at[n] for n in ("key_weight",) if n in at}
    op(STATE, {**keyed, **weight}, {**made, **tops})
    if form.tops or case.seed % 2 == 0:  # else the chunks are summed where they are read
        whole = {n: poisoned(*x.shape[:2], 1, *x.shape[3:]) for n, x in made.items()}
        op(COMBINE, {**made, **tops}, {f"whole_{n}": x for n, x in whole.items()})
        made = whole
    read = {n: made[n] for n in ("state", *(["total"] if form.sums else []), *(["mean"] if form.means else []))}
    op(APPLY, {"query": at["query"], **read}, {"output": at["output"]})
    return {"output": at["output"].float().cpu().numpy()}


def _laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view with axes BNHD that lies in memory as ``layout`` says."""
    order = ["BNHD".index(a) for a in layout]
    return x.permute(order).contiguous().permute([layout.index(a) for a in "BNHD"])


def _in_memory(named: Mapping[str, torch.Tensor], orders: Mapping[str, str]) -> Tensors:
    return {n: x.permute(["BNHD".index(a) for a in orders[n]]) if n in orders else x for n, x in named.items()}
