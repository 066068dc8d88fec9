"""Configurations of linear attention from a seed, for the cost model: each launch of an op is one of its kind."""

from __future__ import annotations

import random
from dataclasses import replace

from linear import LEARNED, RELU, Linear

from attncompile.plugins.linear_attention.form import Decay, Form
from attncompile.plugins.linear_attention.kernel import preferred_chunk, whole_chunk

LARGEST = 1 << 26
"""Elements of the largest operand."""
MAPPED = replace(RELU, query_map="elu+1", key_map="elu+1")
PLAIN = replace(RELU, query_map="none", key_map="none", normaliser="none")
DECAYS: tuple[Decay, ...] = ("none", "head", "token", "channel")
KINDS = (
    "relu", "none", "head", "learned", "token", "channel", "mapped", "delta", "step", "plain", "delta", "learned",
    "head", "token", "step", "none",
)  # fmt: skip
"""Without a triangle by the feature map, under one by the decay; ``delta`` is the delta rule, gated or not."""


def linear_sweep(count: int, seed: int = 0) -> list[Linear]:
    """Cases of all ``KINDS`` in turn, of all sizes, none twice."""
    rng = random.Random(seed)
    found: dict[str, Linear] = {}
    while len(found) < count:
        case = _one(rng, "", KINDS[len(found) % len(KINDS)])
        found.setdefault(str(case), replace(case, name=f"sweep-{len(found)}"))
    return list(found.values())


def _one(rng: random.Random, name: str, kind: str) -> Linear:
    dim, heads, batch = rng.choice([32, 64, 128]), rng.choice([4, 8, 12, 16, 24, 32, 64]), rng.choice([1, 2, 4, 8])
    if kind == "step":
        many = rng.choice([1, 4, 16, 64, 128])
        form = Form(causal=True, decay=rng.choice(DECAYS), scale=dim**-0.5, chunk=1, initial=True)
        delta = form.decay != "channel" and rng.random() < 0.5
        return Linear(name, replace(form, delta=delta), heads, 1, dim, batch=many, step=True)
    longest = LARGEST // (batch * heads * dim)
    tokens = min(64 * int(2 ** rng.uniform(3.0, 9.0)), longest // 64 * 64)
    if kind in DECAYS or kind == "delta":
        decay: Decay = rng.choice(("none", "token")) if kind == "delta" else kind  # type: ignore[assignment]
        chunk = preferred_chunk(decay, batch * heads, tokens, dim)
        form = Form(causal=True, decay=decay, scale=dim**-0.5, chunk=chunk, delta=kind == "delta")
        return Linear(name, form, heads, tokens, dim, batch=batch)
    form = {"relu": RELU, "mapped": MAPPED, "plain": PLAIN, "learned": LEARNED}[kind]
    chunk = whole_chunk(batch, heads, tokens, dim, dim)
    return Linear(name, replace(form, chunk=chunk), heads, tokens, dim, batch=batch)
