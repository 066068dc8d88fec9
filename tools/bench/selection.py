"""Blocks that are chosen for each input, then attention to them, beside cuDNN's dense attention: each launch apart.

Every head keeps a tenth of the blocks that it may see, those with the highest scores, so that all sizes have one
density. Operands are random but for tokens that draw others to them, so that some blocks do weigh more. By an anchor a
head keeps what it must: there the first token draws every query, one in 500 tokens does so less, by chance, and about a
tenth of the blocks of long sequences hold one within ``THETA``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import ceilings, times

from attncompile.core.block_selection import Cut, Family
from attncompile.core.kernel import ARCHITECTURES, OpCall, Program
from attncompile.kernels.build import build, general
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.cost import model_name
from attncompile.kernels.launcher import run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels
from attncompile.plugins.block_select.op import LISTS, SCORES, SELECT, masks
from attncompile.plugins.block_sparse.kernel import of_blocks

BATCH, DIM, SHARE = 1, 128, 0.1
THETA = 4.0
"""Distance from the anchor, which is about ``DRAWN``; what other tokens draw a query by is spread evenly below it."""

DRAWN, SEPARATE = 9.4, 8.0
"""Logit of a mean query with the first token, and the feature of all queries that makes it."""


@dataclass(frozen=True)
class Choice:
    """``family``: the way to choose, whose means of blocks torch makes here. ``wanted``: least time of dense cuDNN over
    ours.
    """

    name: str
    tokens: int
    family: Family
    block: int = 128
    heads: int = 32
    kv_heads: int = 32
    causal: bool = True
    wanted: float = 0.0

    @property
    def cut(self) -> Cut:
        """How the scores are made."""
        return Cut.of(self.family, self.block)

    @property
    def rule(self) -> str:
        return "anchor" if self.family[0] == "anchor" else "share"

    def calls(self) -> list[OpCall]:
        """Scores, selection, attention."""
        count, cut = -(-self.tokens // self.block), self.cut
        queries, keys = (count if n in cut.pooled else self.tokens for n in ("query", "key"))
        shape = (BATCH, self.heads, -(-queries // cut.stride), count)
        room = BATCH * self.heads * count * count
        lists = {"rows": (BATCH, self.heads, count, 3), "columns": (room,), "kinds": (room,),
                 "masks": (1, self.block, self.block // 32)}  # fmt: skip
        scale = DIM**-0.5
        return [
            OpCall(SCORES, "float16", self.heads, self.kv_heads, DIM, DIM,
                   {"reduce": "sum", "span": 1, **cut.attributes, "causal": int(self.causal), "scale": scale},
                   outputs=("scores",), batch=BATCH, query_length=queries, key_length=keys),
            OpCall(SELECT, "float32", self.heads, self.heads, 1, 1,
                   {"tiles": cut.tiles, "causal": int(self.causal), "rule": self.rule, "sinks": 1, "window": 0},
                   {"scores": "float32", "amount": "float32"}, {"scores": shape, "amount": (1,)}, (*LISTS, "mass"),
                   batch=BATCH),
            OpCall("BlockSparseAttention", "float16", self.heads, self.kv_heads, DIM, DIM,
                   {"block": self.block, "masked_rows": "zero", "scale": scale}, dict.fromkeys(lists, "int32"), lists,
                   batch=BATCH, query_length=self.tokens, key_length=self.tokens),
        ]  # fmt: skip


S16: Family = ("xattention", 16)
POOLED: Family = ("pooled", 0)
ANCHOR: Family = ("anchor", 0)
SIZES = ((2048, "2k"), (8192, "8k"), (32768, "32k"), (131072, "128k"))
CASES = (
    *(Choice(f"xattention-s16-{n}", t, S16, wanted=4.0 if t == 131072 else 0.0) for t, n in SIZES),
    *(Choice(f"xattention-s8-{n}", t, ("xattention", 8)) for t, n in SIZES),
    *(Choice(f"pooled-{n}", t, POOLED) for t, n in SIZES),
    *(Choice(f"anchor-{n}", t, ANCHOR) for t, n in SIZES),
    Choice("xattention-s16-b64-32k", 32768, S16, 64),
    Choice("xattention-s16-gqa-32k", 32768, S16, kv_heads=8),
    Choice("xattention-s16-full-32k", 32768, S16, causal=False),
    Choice("pooled-full-32k", 32768, POOLED, causal=False),
    Choice("anchor-gqa-32k", 32768, ANCHOR, kv_heads=8),
    Choice("anchor-b64-32k", 32768, ANCHOR, 64),
    Choice("anchor-full-8k", 8192, ANCHOR, causal=False),
    Choice("anchor-full-32k", 32768, ANCHOR, causal=False),
)


def prepare(out: Path, architectures: Sequence[int], names: Sequence[str] = ()) -> None:
    """Compile what the cases need (all without ``names``), on a machine that needs no GPU."""
    import triton

    calls = [c for case in CASES if not names or case.name in names for c in case.calls()]
    built = build([], calls, kernels(), architectures or ARCHITECTURES, Cache.default())
    write(out, built, triton.__version__)


def run(bundle: Path, names: Sequence[str], rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Measure the cases called ``names`` (all without any) on this GPU; what is wrong is not timed."""
    device = torch.cuda.get_device_properties(0)
    opened, capability = Bundle.open(bundle), device.major * 10 + device.minor
    result: dict[str, Any] = {
        "gpu": device.name, "torch": torch.__version__, "cuda": torch.version.cuda, "when": time.strftime("%Y-%m-%d"),
        "rounds": rounds, "density": SHARE, "theta": THETA, **ceilings(), "cases": [],
    }  # fmt: skip
    for case in CASES:
        if names and case.name not in names:
            continue
        found = one(case, opened, capability, rounds)
        result["cases"].append(found)
        print(json.dumps({k: found[k] for k in ("name", "wrong", "ms", "ratio", "density") if k in found}), flush=True)
        torch.cuda.empty_cache()
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def one(case: Choice, bundle: Bundle, capability: int, rounds: int) -> dict[str, Any]:
    known, stream = kernels(), torch.cuda.current_stream().cuda_stream
    at = tensors(case)
    pool = partial(pooled, case, at) if case.cut.pooled else None
    if pool is not None:
        pool()
    launches: list[tuple[OpCall, Program, Callable[..., object]]] = []
    for call in case.calls():
        compiled = bundle.kernels(key_of(general(known, call)), capability)[0]
        programs = known[call.op].programs(general(known, call), capability)
        program = next(p for p in programs if p.tactic == compiled.entry.tactic)
        named = {a.name: at[a.name] for a in program.arguments if a.kind != "int32"}
        if call.op == SCORES:
            named |= {n: at[f"pooled_{n}"] for n in case.cut.pooled}
        launches.append((call, program, run_program(program, compiled, named, call.attributes, stream)))
    problem = wrong(case, at)
    if problem:
        return {"name": case.name, "wrong": problem}

    def ours() -> None:
        if pool is not None:
            pool()
        for _, _, launch in launches:
            launch(stream)

    parts = {name: partial(launch, stream) for name, (_, _, launch) in
             zip(("scores", "select", "attention"), launches, strict=True)}  # fmt: skip
    group = case.heads // case.kv_heads
    q, k, v = (
        at["query"].transpose(1, 2),
        *(at[n].transpose(1, 2).repeat_interleave(group, 1) for n in ("key", "value")),
    )
    runs: dict[str, Callable[[], object]] = {"ours": ours, **parts, "cudnn": partial(dense, case, q, k, v)}
    if pool is not None:
        runs["pool"] = pool
    took = {name: median(t) for name, t in times(runs, rounds).items()}
    spans = at["rows"].reshape(-1, 3).long()
    full, partial_blocks = int((spans[:, 2] - spans[:, 1]).sum()), int((spans[:, 1] - spans[:, 0]).sum())
    works = []
    for (call, program, _), name in zip(launches, parts, strict=True):
        work = (
            of_blocks(call, program, full, partial_blocks)
            if name == "attention"
            else known[call.op].work(call, program)
        )
        works.append({"model": model_name(program, capability), "tactic": program.tactic, "work": asdict(work),
                      "ms": took[name]})  # fmt: skip
    count = -(-case.tokens // case.block)
    visible = count * (count + 1) // 2 if case.causal else count**2
    ratio = took["cudnn"] / took["ours"]
    return {
        "name": case.name, "ms": took, "ratio": ratio,
        "density": (full + partial_blocks) / (visible * case.heads * BATCH),
        "share_of_choice": 1 - took["attention"] / took["ours"], "wanted": case.wanted,
        "met": ratio >= case.wanted if case.wanted else None, "launches": works,
    }  # fmt: skip


def tensors(case: Choice, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Operands, and outputs that are poisoned."""
    generator = torch.Generator(device).manual_seed(0)
    made = {}
    for name, heads in (("query", case.heads), ("key", case.kv_heads), ("value", case.kv_heads)):
        made[name] = torch.randn(BATCH, case.tokens, heads, DIM, device=device, generator=generator).half()
    drawn = torch.randint(case.tokens, (max(case.tokens // 500, 1),), device=device, generator=generator)
    if case.rule == "anchor":
        far = DRAWN * math.sqrt(DIM) / SEPARATE
        made["query"][..., 0] = SEPARATE
        shares = torch.rand(len(drawn), case.kv_heads, device=device, generator=generator)
        made["key"][:, drawn, :, 0] = (far * shares).half()
        made["key"][:, 0, :, 0] = far
    else:
        made["key"][:, drawn] *= 3
    shapes = {n: s for call in case.calls()[1:] for n, s in call.shapes.items()}
    count = -(-case.tokens // case.block)
    made["amount"] = torch.tensor([THETA if case.rule == "anchor" else SHARE], device=device)
    made["masks"] = torch.from_numpy(masks(case.block, case.causal)).to(device)
    made["output"] = torch.full_like(made["query"], math.nan)
    made["scores"] = torch.full(shapes["scores"], math.nan, device=device)
    made["mass"] = torch.full((BATCH, case.heads, count, count), math.nan, device=device)
    for name in LISTS:
        made[name] = torch.full(shapes[name], -1, dtype=torch.int32, device=device)
    return made


def pooled(case: Choice, at: dict[str, torch.Tensor]) -> None:
    """Means of blocks; the sizes here are multiples of them."""
    for name in case.cut.pooled:
        x = at[name]
        cut = x.reshape(BATCH, -1, case.block, x.shape[2], DIM)
        at[f"pooled_{name}"] = torch.mean(cut, 2, out=at.get(f"pooled_{name}"))


def dense(case: Choice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal)


def wrong(case: Choice, at: dict[str, torch.Tensor]) -> str:
    """What is wrong on sampled rows of blocks of sampled heads, in float64; empty if nothing is."""
    count, cut = -(-case.tokens // case.block), case.cut
    stride, group = cut.stride, case.heads // case.kv_heads
    q, k = (at[f"pooled_{n}" if n in cut.pooled else n] for n in ("query", "key"))
    for h in (0, case.heads - 1):
        keys = k[0, :, h // group].double().reshape(-1, stride, DIM).reshape(-1, stride * DIM)
        values = at["value"][0, :, h // group].double()
        whole = at["key"][0, :, h // group].double()
        for r in (0, 1, count // 3, count - 1):
            rows = slice(r * cut.tiles, (r + 1) * cut.tiles)
            tiles = q[0, rows.start * stride : rows.stop * stride, h].double().reshape(-1, stride, DIM).flip(1)
            s = tiles.reshape(-1, stride * DIM) @ keys.T * (DIM**-0.5 / stride)
            if case.causal:
                place = torch.arange(rows.start, rows.stop, device=s.device)
                s[torch.arange(s.shape[1], device=s.device)[None] // cut.span > place[:, None]] = -math.inf
            s = s.reshape(len(s), -1, cut.block // stride)
            want = torch.logsumexp(s, 2) if cut.reduce == "sum" else s.amax(2)
            got = at["scores"][0, h, rows].double()
            if not torch.equal(want.isinf(), got.isinf()) or bool(got.isnan().any()):
                return f"scores of row {r}, head {h}: infinite where they are not, or NaN"
            off = float((want - got)[~want.isinf()].abs().max())
            if off > 1e-3:
                return f"scores of row {r}, head {h}: off by {off:.1e}"
            first, _, end = (int(x) for x in at["rows"][0, h, r])
            listed = at["columns"][first:end].long()
            said = wrong_list(case, got, listed.tolist(), r, r + 1 if case.causal else count)
            if said:
                return f"list of row {r}, head {h}: {said}"
            i = min(r * case.block + case.block * 3 // 5, case.tokens - 1)
            at_keys = (listed[:, None] * case.block + torch.arange(case.block, device=listed.device)).reshape(-1)
            at_keys = at_keys[at_keys <= i] if case.causal else at_keys
            weights = torch.softmax(whole[at_keys] @ at["query"][0, i, h].double() * DIM**-0.5, 0)
            exact = weights @ values[at_keys]
            error = float((at["output"][0, i, h].double() - exact).norm() / exact.norm())
            if not error < 3e-3:
                return f"output of query {i}, head {h}: off by {error:.1e}"
    return ""


def wrong_list(case: Choice, scores: torch.Tensor, listed: list[int], r: int, visible: int) -> str:
    """What is wrong with the list of row ``r`` that was made of ``scores`` [tiles, C]; empty if nothing is."""
    met = set(listed)
    if len(met) != len(listed) or not {0, r} <= met or max(met) >= visible:
        return f"{listed[:8]} ... of {visible}"
    if case.rule == "anchor":
        least = (scores[0, [0, r]].max() - THETA).float().double()
        near = {c for c, x in enumerate(scores[0, :visible].tolist()) if x >= least} | {0, r}
        return "" if near == met else f"{len(near ^ met)} blocks more or less are within {THETA:g} of the anchor"
    wanted = max(math.ceil(SHARE * visible - 2**-10), len({0, r}))
    if len(met) != wanted:
        return f"{listed[:8]} ..., {wanted} blocks were asked for"
    mass = torch.softmax(scores, 1).mean(0).tolist()
    rest, free = [mass[c] for c in range(visible) if c not in met], [mass[c] for c in met - {0, r}]
    return "a block with more weight is left out" if rest and free and min(free) < max(rest) - 1e-5 else ""


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| case | density | scores | select | pool | attention | all | cudnn | gain | wanted |", "|---" * 10 + "|"]
    for c in result["cases"]:
        if "wrong" in c:
            lines.append(f"| {c['name']} | wrong: {c['wrong']} |")
            continue
        ms = {n: f"{c['ms'][n]:.3f}" if n in c["ms"] else "" for n in
              ("scores", "select", "pool", "attention", "ours", "cudnn")}  # fmt: skip
        wanted = f"{c['wanted']:g}{'' if c['met'] else ' (missed)'}" if c["wanted"] else ""
        lines.append(f"| {c['name']} | {c['density']:.1%} | {' | '.join(ms.values())} | {c['ratio']:.2f} | {wanted} |")
    return "\n".join(lines)
