"""Cases of linear attention: the mechanism's ops through kernels, and the float64 that they must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from attncompile.core.kernel import OpCall, Program
from attncompile.core.layout import part, unpacked
from attncompile.kernels import symbols
from attncompile.kernels.symbols import Strided
from attncompile.plugins import kernels
from attncompile.plugins.linear_attention.form import Form
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES, STEP
from attncompile.plugins.linear_attention.reference import with_state
from tests.conformance.case import laid, rounded
from tests.conformance.launch import of_part_0, whole

OPERANDS = ("query", "key", "value", "output")
Tensors = dict[str, torch.Tensor]
Launch = Callable[[Program, Tensors, Mapping[str, int]], None]
"""Runs a program on tensors by formal names; the numbers are what expressions speak of."""


@dataclass(frozen=True)
class Linear:
    """``layouts`` of query, key, value, output. ``sizes``: B, queries, keys, heads, key heads, head dim, value dim.
    ``step``: a token at a time.
    """

    name: str
    form: Form
    sizes: tuple[int, int, int, int, int, int, int]
    layouts: tuple[str, str, str, str] = ("BNHD",) * 4
    dtype: str = "float16"
    decay_type: str = "float32"
    seed: int = 1
    size: float = 1.0
    step: bool = False
    width: int = 0
    """Of the weights of Hedgehog's map: half as many as there are features."""
    closed: bool = False
    """Whether some gates are minus infinity."""
    beta: str = "a head"
    """With the delta rule: whether its rate is one ``a head`` or one ``a token``."""

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
        if self.closed:
            found["log_decay"][(0,) if self.form.decay == "head" else (slice(None), slice(5, None, 23))] = -np.inf
        if self.form.delta:  # of keys of length one, as the models have them
            length = np.linalg.norm(found["key"], axis=-1, keepdims=True)
            found["key"] = rounded(found["key"] / length, self.dtype)
            rates = rng.random((batch, keys, groups if self.beta == "a head" else 1)).astype(np.float32)
            found["beta"] = rounded(rates, self.dtype)
        if self.form.key_weight:
            found["key_weight"] = np.abs(normal(batch, keys, groups))
        if self.width:
            for name, count in (("feature_weight", groups), ("query_weight", heads)):
                found[name] = rounded(normal(count, dim, self.width) / np.float32(dim**0.5), self.dtype)
        if self.form.initial:
            found["initial_state"] = normal(batch, groups, dim, value_dim, kind="float32")
            found["initial_total"] = np.abs(normal(batch, groups, dim, kind="float32"))
        return found


HEADS_FIRST = ("BHND",) * 4
COLUMNS = ("BHDN",) * 4
COLUMNS_OF_KEYS = ("BHND", "BHDN", "BNHD", "BHND")
MIXED = ("BNHD", "BHDN", "BHND", "BHDN")
PACKED = ("BN0HD", "BN1HD", "BN2HD", "BNHD")
IN_COLUMNS = ("B0HDN", "BNH1D", "B2HDN", "BHDN")
RELU = Form("relu", "relu", "sum", 1e-3)
RETENTION = Form(causal=True, decay="head", scale=0.25, chunk=16)
DELTA_RULE = Form(causal=True, delta=True, chunk=64, scale=0.25)

CASES = (
    Linear("relu", RELU, (2, 37, 50, 4, 2, 32, 32)),
    Linear("relu, three chunks", replace(RELU, chunk=23), (1, 70, 50, 2, 2, 32, 48)),
    Linear("relu, channels first", replace(RELU, chunk=16), (2, 37, 45, 2, 2, 16, 24), COLUMNS),
    Linear("relu, channels first, whole units", RELU, (1, 40, 48, 2, 1, 24, 16), COLUMNS),
    Linear("relu, packed", replace(RELU, chunk=23), (2, 37, 50, 4, 2, 32, 32), PACKED),
    Linear("relu, packed, channels first", RELU, (2, 37, 45, 2, 2, 16, 24), IN_COLUMNS),
    Linear("retention, packed", replace(RETENTION, decay="token"), (2, 45, 45, 2, 2, 32, 32), PACKED),
    Linear("GLA, packed", replace(RETENTION, decay="channel", chunk=32), (1, 75, 75, 4, 2, 32, 32), PACKED),
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
    Linear("hedgehog", Form("hedgehog", "hedgehog", "sum"), (2, 37, 50, 4, 2, 32, 48), width=32),
    Linear("hedgehog, chunks, bfloat16", Form("hedgehog", "hedgehog", "sum", 1e-3, chunk=23),
           (1, 40, 70, 2, 2, 40, 24), MIXED, "bfloat16", width=24),
    Linear("hedgehog, no sum", Form("hedgehog", "hedgehog", scale=0.1, chunk=16), (1, 33, 45, 2, 1, 64, 16),
           HEADS_FIRST, width=72),
    Linear("hedgehog, large", Form("hedgehog", "hedgehog", "sum"), (1, 37, 50, 1, 1, 16, 16), width=16, size=3.0),
    Linear("short heads side by side", replace(RELU, chunk=64), (2, 75, 90, 6, 6, 32, 32)),
    Linear("shorter ones, shared keys", Form("elu+1", "elu+1", "sum", 1e-3, 30.0, 0.7), (1, 70, 50, 10, 5, 16, 16),
           MIXED, "bfloat16"),
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
    Linear("retention, long chunks", replace(RETENTION, chunk=128), (1, 300, 300, 2, 2, 32, 32)),
    Linear("a running sum, long chunks", Form("relu", "elu+1", "sum", 1e-3, causal=True, chunk=256),
           (1, 300, 300, 2, 1, 40, 32), MIXED),
    Linear("simple GLA, sums, long chunks", Form("exp", "relu", "sum", 1e-3, 0.1, causal=True, decay="token", chunk=128,
           initial=True), (1, 290, 290, 2, 1, 16, 24), dtype="bfloat16"),
    Linear("simple GLA, tiles of 128", replace(RETENTION, decay="token", chunk=256, initial=True),
           (1, 330, 330, 1, 1, 128, 40)),
    Linear("closed gates, a head", replace(RETENTION, chunk=64, initial=True), (1, 90, 90, 2, 2, 16, 16), closed=True),
    Linear("closed gates, a token", replace(RETENTION, decay="token", chunk=64, initial=True),
           (1, 90, 90, 2, 2, 16, 16), closed=True),
    Linear("closed gates, a channel", replace(RETENTION, decay="channel", chunk=64, initial=True),
           (1, 90, 90, 2, 2, 16, 16), closed=True),
    Linear("retention, a chunk of 1,024", replace(RETENTION, chunk=1024, initial=True), (1, 1100, 1100, 1, 1, 16, 16)),
    Linear("delta rule", replace(DELTA_RULE, chunk=16), (2, 45, 45, 4, 2, 32, 48), beta="a token"),
    Linear("gated delta rule", replace(DELTA_RULE, decay="token"), (1, 150, 150, 4, 2, 40, 32), MIXED, "bfloat16"),
    Linear("gated delta rule, first state", replace(DELTA_RULE, decay="token", initial=True, chunk=128),
           (1, 200, 200, 1, 1, 32, 24), HEADS_FIRST),
    Linear("delta rule, retention", replace(DELTA_RULE, decay="head", chunk=32, initial=True),
           (1, 75, 75, 2, 2, 16, 40), COLUMNS_OF_KEYS),
    Linear("gated delta rule, closed gates", replace(DELTA_RULE, decay="token"), (1, 90, 90, 1, 1, 16, 16),
           closed=True),
    Linear("delta rule, packed", replace(DELTA_RULE, decay="token"), (1, 70, 70, 4, 2, 16, 16), PACKED),
    Linear("delta rule, channels first", DELTA_RULE, (1, 37, 37, 1, 1, 24, 16), COLUMNS, "bfloat16", beta="a token"),
    Linear("delta rule, few tokens", replace(DELTA_RULE, chunk=16, initial=True), (2, 5, 5, 2, 1, 16, 32)),
    Linear("delta rule, wide", replace(DELTA_RULE, decay="head", chunk=32), (1, 40, 40, 1, 1, 72, 136), HEADS_FIRST),
    Linear("a step, packed", replace(RETENTION, initial=True), (2, 1, 1, 4, 2, 16, 16), PACKED, step=True),
    Linear("steps, channels first", replace(RETENTION, decay="token"), (1, 3, 3, 2, 2, 16, 24), COLUMNS, step=True),
    Linear("a step", replace(RETENTION, decay="token", initial=True), (2, 1, 1, 4, 2, 32, 48), step=True),
    Linear("steps, sums", Form("elu+1", "relu", "sum", 1e-3, 40.0, 0.7, causal=True, chunk=1), (2, 5, 5, 3, 1, 40, 72),
           MIXED, "bfloat16", step=True),
    Linear("steps, retention, first state and sums", Form("exp", "exp", "sum", 1e-3, causal=True, decay="head", chunk=1,
           initial=True), (1, 7, 7, 2, 2, 16, 24), HEADS_FIRST, step=True),
    Linear("steps, GLA", Form(causal=True, decay="channel", chunk=1, initial=True, scale=0.25), (2, 6, 6, 4, 2, 72, 32),
           COLUMNS_OF_KEYS, decay_type="bfloat16", step=True),
    Linear("steps, delta rule", Form(causal=True, delta=True, chunk=1, scale=0.25), (2, 9, 9, 4, 2, 24, 40), step=True,
           beta="a token"),
    Linear("steps, gated delta rule", Form(causal=True, delta=True, decay="token", chunk=1, initial=True),
           (1, 19, 19, 4, 2, 128, 64), dtype="bfloat16", step=True),
    Linear("steps, 256 features", replace(DELTA_RULE, decay="token", chunk=1, initial=True, query_map="softmax"),
           (1, 3, 3, 1, 1, 256, 136), step=True),
    Linear("simple GLA, half gates", replace(RETENTION, decay="token", chunk=32, initial=True),
           (1, 75, 75, 2, 2, 48, 32), COLUMNS, decay_type="float16"),
    Linear("GLA, sums", Form("relu", "elu+1", "sum", 1e-3, causal=True, decay="channel", chunk=32, initial=True),
           (1, 75, 75, 2, 1, 72, 32)),
    Linear("GLA, a softmax of queries, a bound", Form("softmax", "relu", "sum", 1e-3, 30.0, causal=True,
           decay="channel", chunk=32, initial=True), (1, 75, 75, 4, 2, 72, 136)),
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
    """What the type makes of the output at best: features, weights, state and result are rounded to it. Of single
    steps the result alone.
    """
    if case.step:
        return rounded(expected(case)["output"].astype(np.float32), case.dtype)
    form, given = case.form, case.values()
    batch, _, _, heads, groups, _, _ = case.sizes
    half = case.dtype
    out = []
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            if form.delta:
                out.append(rounded(_delta(case, given, b, h, g), half))
                continue
            q, k, v = given["query"][b, :, h], given["key"][b, :, g], given["value"][b, :, g]
            wq, wk = (given[n][x] if case.width else None for n, x in (("query_weight", h), ("feature_weight", g)))
            both = ((q, form.query_map, 1, wq), (k, form.key_map, 0, wk))
            fq, fk = (_map(x, m, a, w) for x, m, a, w in both)
            if case.width:
                out.append(rounded(_learned(case, fq, fk, v), half))
                continue
            fq, fk = rounded(fq, half), rounded(fk, half)
            if form.causal:
                if form.decay == "channel":
                    found, below = _gated(case, given, b, g, fq, fk, v)
                else:
                    found, below = _decayed(case, given, b, g, fq, fk, v)
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


def _decayed(
    case: Linear, given: Mapping[str, np.ndarray], b: int, g: int, fq: np.ndarray, fk: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What a head reads, and its sums, under a triangle with one decay for all channels."""
    form, half = case.form, case.dtype
    logs = np.broadcast_to(given["log_decay"][g] if form.decay == "head" else given["log_decay"][b, :, g]
                           if form.decay == "token" else np.float32(0), (len(fk),))  # fmt: skip
    sums = np.cumsum(np.maximum(logs, -128))
    apart = np.tril(np.exp(np.minimum(sums[:, None] - sums[None], 0)))
    p = (fq @ fk.T) * apart
    found = rounded(p, half) @ v
    below = p.sum(1)
    if form.initial:
        first = rounded(given["initial_state"][b, g], half)
        found = found + rounded(fq * np.exp(sums)[:, None], half) @ first
        below = below + (fq * np.exp(sums)[:, None]) @ given["initial_total"][b, g]
    return found, below


def _gated(
    case: Linear, given: Mapping[str, np.ndarray], b: int, g: int, fq: np.ndarray, fk: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """With a gate for every channel: all pairs, channel by channel."""
    sums = np.cumsum(np.maximum(given["log_decay"][b, :, g], -128), 0)
    p = np.zeros((len(fq), len(fk)), np.float32)
    for d in range(fq.shape[1]):
        p += fq[:, d, None] * fk[None, :, d] * np.exp(np.minimum(sums[:, None, d] - sums[None, :, d], 0))
    p = np.tril(p)
    found, below = rounded(p, case.dtype) @ v, p.sum(1)
    if case.form.initial:
        reading = fq * np.exp(sums)
        found = found + rounded(reading, case.dtype) @ rounded(given["initial_state"][b, g], case.dtype)
        below = below + reading @ given["initial_total"][b, g]
    return found, below


def _learned(case: Linear, fq: np.ndarray, fk: np.ndarray, v: np.ndarray) -> np.ndarray:
    """With Hedgehog's features, which are rounded over their sizes: those of keys, of the state, of a query."""
    fq, fk, form = fq.astype(np.float64), fk.astype(np.float64), case.form
    size = fk.max(0)
    state = rounded((fk / size).astype(np.float32), case.dtype).astype(np.float64).T @ v * size[:, None]
    most = np.abs(state).max(1)
    read = fq * most
    largest = read.max(1, keepdims=True)
    found = rounded((read / largest).astype(np.float32), case.dtype) @ rounded(
        (state / most[:, None]).astype(np.float32), case.dtype
    )
    found = found * largest * form.scale
    if form.normaliser == "sum":
        found = found / np.maximum(fq @ fk.sum(0) + form.epsilon, form.floor)[:, None]
    return np.asarray(found, np.float32)


def _delta(case: Linear, given: Mapping[str, np.ndarray], b: int, h: int, g: int) -> np.ndarray:
    """By the delta rule: a key reads a state that is rounded, and what it writes is rounded."""
    q, k, v = given["query"][b, :, h], given["key"][b, :, g], given["value"][b, :, g]
    keys, half = len(k), case.dtype
    logs = given.get("log_decay", np.zeros(case.sizes[4], np.float32))
    left = np.exp(np.broadcast_to(logs[g] if logs.ndim == 1 else logs[b, :, g], (keys,)))
    rates = given["beta"][b, :, g if given["beta"].shape[2] > 1 else 0]
    shape = (k.shape[1], v.shape[1])
    state = given["initial_state"][b, g] if case.form.initial else np.zeros(shape, np.float32)
    found = np.zeros((keys, shape[1]), np.float32)
    for n in range(keys):
        state = state * left[n]
        state = state + np.outer(k[n], rounded(rates[n] * (v[n] - k[n] @ rounded(state, half)), half))
        found[n] = case.form.scale * (q[n] @ rounded(state, half))
    return found


def _map(x: np.ndarray, kind: str, axis: int, weight: np.ndarray | None = None) -> np.ndarray:
    if weight is not None:
        return np.concatenate([np.exp(x @ weight), np.exp(-x @ weight)], 1)
    if kind == "softmax":
        e = np.exp(x - x.max(axis, keepdims=True))
        return np.asarray(e / e.sum(axis, keepdims=True))
    low_part = np.exp(np.minimum(x, 0))
    return {"none": x, "relu": np.maximum(x, 0), "elu+1": np.where(x > 0, x + 1, low_part), "exp": np.exp(x)}[kind]


@dataclass(frozen=True)
class Step:
    """One node: names of values by their formal names."""

    op: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def attributes(case: Linear) -> dict[str, Any]:
    """Of all nodes of the case."""
    form = case.form
    return {"key_map": form.key_map, "query_map": form.query_map, "normaliser": form.normaliser,
            "epsilon": form.epsilon, "floor": form.floor, "scale": form.scale, "chunk": form.chunk,
            "tile": form.tile}  # fmt: skip


def steps(case: Linear) -> list[Step]:
    """The case's nodes in order. An output has its formal name."""

    def step(op: str, inputs: Sequence[str], outputs: Sequence[str], **renamed: str) -> Step:
        return Step(op, {n: renamed.get(n, n) for n in inputs}, {n: n for n in outputs})

    form, keyed = case.form, ("key", "value")
    if form.causal:
        decay = ("log_decay",) if form.decay != "none" else ()
        first = ("initial_state", "initial_total") if form.initial else ()
        if form.delta and not case.step:
            first = first[:1]
            return [step(SOLVE, ("key", *decay, "beta"), ("solved",)),
                    step(DELTA, (*keyed, "solved", *decay, *first), ("written", "state", "final_state")),
                    step(OUTPUT, ("query", *keyed, "state", *decay), ("output",), value="written")]  # fmt: skip
        if case.step:
            beta = ("beta",) if form.delta else ()
            return [step(STEP, ("query", *keyed, *decay, *beta, *first), ("output", "final_state", "final_total"))]
        read = ("state", "total") if form.sums else ("state",)
        return [step(STATES, (*keyed, *decay, *first), ("state", "total", "final_state", "final_total")),
                step(OUTPUT, ("query", *keyed, *read, *decay), ("output",))]  # fmt: skip
    made = ("state", "total", "mean", *(("top",) if form.tops else ()))
    learned = ("feature_weight",) if case.width else ()
    if case.width:
        made = ("state", "total")
    found = [step(STATE, (*keyed, *(("key_weight",) if form.key_weight else ()), *learned), made)]
    read = ("state", *(("total",) if form.sums else ()), *(("mean",) if form.means else ()))
    if form.tops or case.seed % 2 == 0:  # else the chunks are summed where they are read
        whole = tuple(f"whole_{n}" for n in made if n != "top")
        found.append(step(COMBINE, made, whole))
        named = {n: f"whole_{n}" for n in read} | {"feature_weight": "query_weight"}
        return [*found, step(APPLY, ("query", *read, *learned), ("output",), **named)]
    return [*found, step(APPLY, ("query", *read, *learned), ("output",), feature_weight="query_weight")]


def _shapes(case: Linear) -> dict[str, tuple[int, ...]]:
    """Of what ops give to others, and of last states."""
    batch, _, keys, _, groups, dim, value_dim = case.sizes
    dim = 2 * case.width or dim
    count = -(-keys // case.form.chunk) if case.form.chunk else 1
    found: dict[str, tuple[int, ...]] = {
        "state": (count, dim, value_dim), "total": (count, dim), "mean": (count, value_dim), "top": (count, dim),
        "final_state": (dim, value_dim), "final_total": (dim,),
        "solved": (-(-keys // case.form.tile), case.form.tile, case.form.tile) if case.form.tile else (),
    }  # fmt: skip
    whole = {f"whole_{n}": (1, *found[n][1:]) for n in ("state", "total", "mean")}
    return {name: (batch, groups, *shape) for name, shape in (found | whole).items()}


def nodes(case: Linear) -> list[OpCall]:
    """The call of every step, with all its sizes."""
    batch, queries, keys, heads, groups, dim, value_dim = case.sizes
    decays = {"head": (groups,), "token": (batch, keys, groups), "channel": (batch, keys, groups, dim)}
    rates = groups if case.beta == "a head" else 1
    sizes = {**_shapes(case), "log_decay": decays.get(case.form.decay, ()), "key_weight": (batch, keys, groups),
             "beta": (batch, keys, rates),
             "feature_weight": (groups, dim, case.width), "query_weight": (heads, dim, case.width),
             "initial_state": (batch, groups, dim, value_dim), "initial_total": (batch, groups, dim)}  # fmt: skip
    types = {"log_decay": case.decay_type, "key_weight": case.dtype, "beta": case.dtype, "feature_weight": case.dtype}
    found = []
    for step in steps(case):
        formal, orders = (*step.inputs, *step.outputs), layouts_of(case, step)
        said = {**attributes(case), "columns": [n for n in orders if n in formal and unpacked(orders[n]) == "BHDN"]}
        if step.op not in (STATE, STATES, OUTPUT, DELTA):
            del said["chunk"]
        if step.op not in (SOLVE, DELTA):
            del said["tile"]
        more = {n: name for n, name in step.inputs.items() if n not in orders}
        found.append(OpCall(
            step.op, case.dtype if step.op != COMBINE else "float32", heads if "query" in formal else groups,
            groups, (2 * case.width or dim) if step.op == COMBINE else dim, value_dim, said,
            {n: types.get(n, "float32") for n in more},
            {n: sizes[name] for n, name in more.items()}, tuple(step.outputs), batch,
            queries if "query" in formal else None, keys if "key" in formal else None,
            any(part(orders[n]) for n in formal if n in orders),
        ))  # fmt: skip
    return [kernels()[c.op].call(c) for c in found]


def layouts_of(case: Linear, step: Step) -> dict[str, str]:
    """Of the operands by formal names: what keys write has a layout of its own."""
    found = dict(zip(OPERANDS, case.layouts, strict=True))
    return found | ({"value": "BNHD"} if step.inputs.get("value") == "written" else {})


def tensors(case: Linear, device: str = "cpu") -> Tensors:
    """All values by name: what is given, with axes BNHD and lying as the layouts say, and poisoned outputs."""
    batch, queries, keys, heads, groups, _, value_dim = case.sizes
    half, orders = getattr(torch, case.dtype), dict(zip(OPERANDS, case.layouts, strict=True))
    kinds = {"log_decay": getattr(torch, case.decay_type), "key_weight": half, "beta": half,
             "feature_weight": half, "query_weight": half}  # fmt: skip
    at: Tensors = {}
    for name, array in case.values().items():
        x = torch.from_numpy(array).to(device)
        at[name] = _laid(x.to(half), orders[name]) if name in orders else x.to(kinds.get(name, torch.float32))
    for name, shape in _shapes(case).items():
        at[name] = torch.full(shape, torch.nan, device=device)
    if case.form.delta:
        at["written"] = torch.full((batch, keys, groups, value_dim), torch.nan, dtype=half, device=device)
    out = torch.full((batch, queries, heads, value_dim), torch.nan, dtype=half, device=device)
    return {**at, "output": _laid(out, orders["output"])}


def in_memory(case: Linear, step: Step, named: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Operands with the axes of their layouts, and those layouts."""
    orders = layouts_of(case, step)
    return {n: whole(x, orders[n]) if n in orders else x for n, x in named.items()}, orders


def logical(case: Linear, step: Step, named: Tensors) -> Tensors:
    """Operands as references take them: of a packed tensor the part that one is, with axes BNHD."""
    found = dict(named)
    for name, order in layouts_of(case, step).items():
        chosen = part(order)
        if name in named and chosen is not None:
            one = whole(named[name], order).select(*chosen)
            found[name] = one.permute([unpacked(order).index(a) for a in "BNHD"])
    return found


def run(case: Linear, launch: Launch, small: bool = False, device: str = "cpu",
        change: Callable[[Program], Program] = lambda p: p) -> dict[str, np.ndarray]:  # fmt: skip
    """Outputs by name, float32 and with logical axes. ``small``: the last tactic; ``change`` plants an error."""
    at = tensors(case, device)
    for step, call in zip(steps(case), nodes(case), strict=True):
        kernel = kernels()[step.op]
        made = kernel.programs(kernel.general(call), 80)[-1 if small else 0]
        named = {formal: at[name] for formal, name in (*step.inputs.items(), *step.outputs.items())}
        laid, orders = in_memory(case, step, named)
        strided = {n: Strided(tuple(x.shape), tuple(x.stride())) for n, x in laid.items()}
        launch(change(made), named, {**symbols.of_tensors(strided, call.attributes, orders), "SMS": 2})
    names = ("output", "final_state") if case.form.causal else ("output",)
    return {name: at[name].float().cpu().numpy() for name in names}


def _laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view with axes BNHD that lies in memory as ``layout`` says; of a packed tensor, the first part."""
    return of_part_0(torch.from_numpy(laid(x.float().cpu().numpy(), layout)).to(x), layout)
