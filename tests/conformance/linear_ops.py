"""What each op of linear attention gives for its own inputs, in float64 by whole chunks, in torch: on a GPU too. Shares
no code with kernels, bodies or the naive reference; ``test_linear_ops.py`` compares them in a row with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch

from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES, STEP

Tensors = Mapping[str, torch.Tensor]
Round = Callable[[torch.Tensor], torch.Tensor]
CLOSED = -800.0
"""A logarithm of which float64 keeps nothing: the difference of two infinite sums is none."""


def expected(op: str, said: Mapping[str, Any], given: Tensors, half: str = "") -> dict[str, torch.Tensor]:
    """Every output of ``op`` by its formal name, float64; of operands the axes are B, N, H, D.

    ``said``: the attributes. ``given``: the inputs. With ``half`` (float16, bfloat16): what that type makes of it at
    best: what is multiplied is rounded to it, and so is ``output``.
    """
    inputs = {name: x.double() for name, x in given.items()}

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(getattr(torch, half)).double() if half else x

    made = {STATE: _state, COMBINE: _combine, APPLY: _apply, STATES: _states, OUTPUT: _output, STEP: _step,
            SOLVE: _solve, DELTA: _delta}[op]  # fmt: skip
    return made(said, inputs, rounded)


def _map(x: torch.Tensor, kind: str, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Features of rows [.., D]; ``weight`` [heads, D, W] is Hedgehog's, of rows [.., heads, D]."""
    if weight is not None:
        inner = torch.einsum("...hd,hdw->...hw", x, weight)
        return torch.cat([torch.exp(inner), torch.exp(-inner)], -1)
    if kind == "softmax":
        return torch.softmax(x, -1)
    if kind == "elu+1":
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    return {"none": lambda: x, "relu": lambda: x.clamp(min=0), "exp": lambda: torch.exp(x)}[kind]()


def _chunks(x: torch.Tensor, chunk: int, fill: float = 0.0) -> torch.Tensor:
    """[B, N, G, ..] -> [B, G, C, L, ..]; tokens past the last are ``fill``."""
    batch, tokens, groups = x.shape[:3]
    length = chunk or tokens
    count = -(-tokens // length)
    full = torch.full((batch, count * length, *x.shape[2:]), fill, dtype=x.dtype, device=x.device)
    full[:, :tokens] = x
    return full.reshape(batch, count, length, groups, *x.shape[3:]).movedim(3, 1)


def _state(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    key, value, chunk = given["key"], _chunks(given["value"], said["chunk"]), said["chunk"]
    tokens = key.shape[1]
    made: dict[str, torch.Tensor] = {}
    if said["key_map"] == "softmax":
        cut = _chunks(key, chunk, -inf)
        made["top"] = cut.amax(3)
        f = torch.exp(cut - made["top"][:, :, :, None])
    else:
        weight = given.get("feature_weight")
        f = _chunks(_map(key, said["key_map"], weight if weight is None else rounded(weight)), chunk)
    made |= {"total": f.sum(3), "mean": value.sum(3) / tokens}
    if "key_weight" in given:
        f = f * _chunks(given["key_weight"], chunk)[..., None]
    size = f.amax(3, keepdim=True) if "feature_weight" in given else f.new_ones(())  # what is learned is large
    return {"state": (rounded(f / size) * size).transpose(-1, -2) @ value, **made}


def _combine(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    state, total = given["state"], given.get("total")
    if "top" in given:
        assert total is not None
        share = torch.exp(given["top"] - given["top"].amax(2, keepdim=True))
        share = share / (total * share).sum(2, keepdim=True)
        state, total = state * share[..., None], total * share
    made = {"whole_state": state, "whole_total": total, "whole_mean": given.get("mean")}
    return {name: x.sum(2, keepdim=True) for name, x in made.items() if x is not None}


def _apply(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    query = given["query"].transpose(1, 2)  # [B, H, N, D]
    group = query.shape[1] // given["state"].shape[1]
    weight = given.get("feature_weight")
    f = _map(query.transpose(1, 2), said["query_map"], weight if weight is None else rounded(weight)).transpose(1, 2)
    state, total, mean = (
        given[name].sum(2).repeat_interleave(group, 1) if name in given else None for name in ("state", "total", "mean")
    )
    assert state is not None
    axes = (-1, -2) if weight is None else (-1,)  # learned features differ by orders of magnitude
    size = state.abs().amax(axes, keepdim=True).clamp(min=1e-300)
    if weight is not None:
        read = f * size.transpose(-1, -2)
        largest = read.amax(-1, keepdim=True)
        found = rounded(read / largest) @ rounded(state / size) * largest
    else:
        found = rounded(f) @ rounded(state / size) * size
    below = f @ total[..., None] if total is not None else None
    return {"output": rounded(_normalised(said, found, below, mean)).transpose(1, 2)}


def _normalised(
    said: Mapping[str, Any], found: torch.Tensor, below: torch.Tensor | None, mean: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    """``found`` [.., N, E], ``below`` [.., N, 1], ``mean`` [.., E]."""
    kind = said["normaliser"]
    if kind == "none":
        return found * said["scale"]
    assert below is not None
    if kind == "sum":
        return said["scale"] * found / (below + said["epsilon"]).clamp(min=said["floor"])
    assert mean is not None
    between = mean[..., None, :]
    return (1 + 1 / below) * found - below * between if kind == "mala" else found + (1 - below) * between


def _sums(said: Mapping[str, Any], given: Tensors) -> torch.Tensor:
    """Logarithms of what is left of a state before a chunk after each of its tokens: [B, G, C, L, F or 1]."""
    key, decay = given["key"], given.get("log_decay")
    batch, tokens, groups = key.shape[:3]
    if decay is None:
        decay = torch.zeros(groups, dtype=key.dtype, device=key.device)
    every = decay.reshape(decay.shape if decay.ndim > 1 else (1, 1, -1)).expand(batch, tokens, groups, *decay.shape[3:])
    cut = _chunks(every.clamp(min=CLOSED), said["chunk"])
    return (cut if decay.ndim == 4 else cut[..., None]).cumsum(3)


def _states(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    f, value = _chunks(_map(given["key"], said["key_map"]), said["chunk"]), _chunks(given["value"], said["chunk"])
    sums = _sums(said, given)
    last = sums[:, :, :, -1]
    left = f * torch.exp(last[:, :, :, None] - sums)
    added, more = rounded(left).transpose(-1, -2) @ value, left.sum(3)
    batch, groups, count, features, width = added.shape
    state, total = (
        given.get(name, torch.zeros(batch, groups, *sizes, dtype=f.dtype, device=f.device))
        for name, sizes in (("initial_state", (features, width)), ("initial_total", (features,)))
    )
    states, totals = [], []
    for c in range(count):
        states.append(state)
        totals.append(total)
        kept = torch.exp(last[:, :, c])
        state, total = kept[..., None] * state + added[:, :, c], kept * total + more[:, :, c]
    return {"state": torch.stack(states, 2), "total": torch.stack(totals, 2), "final_state": state,
            "final_total": total}  # fmt: skip


def _output(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    chunk, groups = said["chunk"], given["key"].shape[2]
    batch, tokens, heads, _ = given["query"].shape
    sums, value = _sums(said, given), _chunks(given["value"], chunk)
    fk = _chunks(_map(given["key"], said["key_map"]), chunk)
    made = torch.empty(batch, heads, tokens, value.shape[-1], dtype=value.dtype, device=value.device)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            fq = _chunks(_map(given["query"][b : b + 1, :, h : h + 1], said["query_map"]), chunk)[0, 0]
            s, state = sums[b, g], given["state"][b, g]
            if s.shape[-1] > 1:  # pair by pair: behind a closed gate a factor of one token alone would be infinite
                apart = torch.exp((s[:, :, None] - s[:, None]).clamp(max=0))
                weights = torch.einsum("clf,cmf,clmf->clm", rounded(fq), rounded(fk[b, g]), apart)
            else:
                apart = torch.exp((s - s.transpose(-1, -2)).clamp(max=0))
                weights = rounded(fq) @ rounded(fk[b, g]).transpose(-1, -2) * apart
            weights = weights.tril()
            reading = fq * torch.exp(s)
            size = state.abs().amax((-1, -2), keepdim=True).clamp(min=1e-300)
            found = rounded(weights) @ value[b, g] + rounded(reading) @ rounded(state / size) * size
            below = None
            if "total" in given:
                below = reading @ given["total"][b, g][..., None] + weights.sum(-1, keepdim=True)
            out = _normalised(said, found, below, None)
            made[b, h] = out.reshape(-1, out.shape[-1])[:tokens]
    return {"output": rounded(made).transpose(1, 2)}


def _step(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    """Token by token; nothing but the result is rounded."""
    fk, value = _map(given["key"], said["key_map"]), given["value"]
    batch, tokens, groups, features = fk.shape
    group = given["query"].shape[2] // groups
    fq = _map(given["query"], said["query_map"]).unflatten(2, (groups, group))  # [B, N, G, r, F]
    state, total = (
        given.get(name, torch.zeros(batch, groups, *sizes, dtype=fk.dtype, device=fk.device))
        for name, sizes in (("initial_state", (features, value.shape[3])), ("initial_total", (features,)))
    )
    kept = torch.exp(_sums({"chunk": 1}, given)[:, :, :, 0])  # [B, G, N, F or 1]
    found = []
    for t in range(tokens):
        state, total = kept[:, :, t, :, None] * state, kept[:, :, t] * total
        written = value[:, t]
        if "beta" in given:
            written = given["beta"][:, t, :, None] * (written - torch.einsum("bgf,bgfe->bge", fk[:, t], state))
        state = state + fk[:, t, :, :, None] * written[:, :, None]
        total = total + fk[:, t]
        read = torch.einsum("bgrf,bgfe->bgre", fq[:, t], state)
        below = torch.einsum("bgrf,bgf->bgr", fq[:, t], total)[..., None]
        found.append(_normalised(said, read, below, None).flatten(1, 2))
    return {"output": rounded(torch.stack(found, 1)), "final_state": state, "final_total": total}


def _solve(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    """By a triangular solver."""
    tile, groups = said["tile"], given["key"].shape[2]
    f = rounded(_chunks(_map(given["key"], said["key_map"]), tile))
    rates = _chunks(given["beta"].expand(-1, -1, groups), tile)  # [B, G, C, L]
    s = _sums({"chunk": tile}, given)
    apart = torch.exp((s - s.transpose(-1, -2)).clamp(max=0))
    system = (f @ f.transpose(-1, -2) * apart * rates[..., None]).tril(-1)
    system = system + torch.eye(tile, dtype=f.dtype, device=f.device)
    return {"solved": torch.linalg.solve_triangular(system, torch.diag_embed(rates), upper=False)}


def _delta(said: Mapping[str, Any], given: Tensors, rounded: Round) -> dict[str, torch.Tensor]:
    """From tile to tile."""
    tile, pieces = said["tile"], said["chunk"] // said["tile"]
    f, value = _chunks(_map(given["key"], said["key_map"]), tile), _chunks(given["value"], tile)
    s = _sums({"chunk": tile}, given)
    state = given.get("initial_state", torch.zeros(*f.shape[:2], f.shape[-1], value.shape[-1], dtype=f.dtype,
                                                   device=f.device))  # fmt: skip
    states, rows = [], []
    for c in range(f.shape[2]):
        if c % pieces == 0:
            states.append(state)
        size = state.abs().amax((-1, -2), keepdim=True).clamp(min=1e-300)
        read = rounded(f[:, :, c]) @ rounded(state / size) * size * torch.exp(s[:, :, c])
        rows.append(rounded(rounded(given["solved"][:, :, c]) @ rounded(value[:, :, c] - read)))
        last = s[:, :, c, -1:]
        left = rounded(rows[-1] * torch.exp(last - s[:, :, c]))
        state = state * torch.exp(last) + rounded(f[:, :, c]).transpose(-1, -2) @ left
    written = torch.cat(rows, 2)[:, :, : given["key"].shape[1]].transpose(1, 2)
    return {"written": written, "state": torch.stack(states, 2), "final_state": state}
