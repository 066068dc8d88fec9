"""Cases of the ops that choose blocks: their calls, inputs, and what is wrong with what kernels gave.

Lists are judged by what they say, on the very scores that they were made of: where weights of a row sum to nearly
``amount``, one block more or less is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attncompile.core.kernel import OpCall
from attncompile.plugins.block_select import reference
from attncompile.plugins.block_select.op import LISTS, SCORES, SELECT
from tests.conformance.case import rounded

CLOSE = 2e-5
"""Sums of at most some thousand float32 weights that make 1 are right to this."""


@dataclass(frozen=True, slots=True)
class Selection:
    """``tokens``: queries and keys; ``loud``: scores of some hundreds; ``equal``: all keys alike, so that all weights
    tie. ``packed``: queries and keys are parts 0 and 1 of one tensor, whose third is NaN. ``reduce``, ``span``: of
    ``BlockScores``; with a span ``tokens`` are as many queries as means that they are of blocks of keys.
    """

    name: str
    dtype: str = "float16"
    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    tokens: tuple[int, int] = (300, 300)
    dim: int = 32
    stride: int = 16
    block: int = 64
    causal: bool = True
    rule: str = "mass"
    amount: tuple[float, ...] = (0.8,)
    sinks: int = 1
    window: int = 0
    layouts: tuple[str, str] = ("BNHD", "BNHD")
    values: str = "ordinary"
    seed: int = 0
    packed: bool = False
    factor: float = 0.0
    """Of scores; 0: 1 / sqrt(dim)."""
    reduce: str = "sum"
    span: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def tiles(self) -> int:
        return self.block // (self.stride * self.span)

    @property
    def scale(self) -> float:
        return float(np.float32(self.factor or self.dim**-0.5))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.tokens
        high, wide = -(-queries // self.stride), -(-keys // self.block)
        count = self.batch * self.heads[0]
        rows = -(-high // self.tiles)
        return {
            "scores": (self.batch, self.heads[0], high, wide), "rows": (self.batch, self.heads[0], rows, 3),
            "columns": (count * rows * wide,), "kinds": (count * rows * wide,),
            "mass": (self.batch, self.heads[0], rows, wide), "amount": (len(self.amount),),
        }  # fmt: skip

    def calls(self) -> list[OpCall]:
        heads, groups = self.heads
        said = {"stride": self.stride, "block": self.block, "causal": int(self.causal), "scale": self.scale,
                "reduce": self.reduce, "span": self.span}  # fmt: skip
        chosen = {"tiles": self.tiles, "rule": self.rule, "causal": int(self.causal), "sinks": self.sinks,
                  "window": self.window}  # fmt: skip
        given = {n: self.shapes[n] for n in ("scores", "amount")}
        return [
            OpCall(SCORES, self.dtype, heads, groups, self.dim, self.dim, said, outputs=("scores",), batch=self.batch,
                   query_length=self.tokens[0], key_length=self.tokens[1], packed=self.packed),
            OpCall(SELECT, "float32", heads, heads, 1, 1, chosen, dict.fromkeys(given, "float32"), given,
                   outputs=(*LISTS, "mass"), batch=self.batch),
        ]  # fmt: skip

    def operands(self) -> dict[str, np.ndarray]:
        """query and key [B, N, H, D], float32 and exact in ``dtype``."""
        rng = np.random.default_rng([self.seed, *self.tokens, self.dim])
        loud = 8.0 if self.values == "loud" else 1.0
        found = {
            name: loud * rng.standard_normal((self.batch, n, h, self.dim))
            for name, n, h in zip(("query", "key"), self.tokens, self.heads, strict=True)
        }
        if self.values == "equal":
            found["key"][:] = found["key"][:, :1]
        return {name: rounded(x.astype(np.float32), self.dtype) for name, x in found.items()}


def wrong_scores(case: Selection, got: np.ndarray) -> str:
    """What is wrong with ``scores``; empty if nothing is."""
    given = case.operands()
    want = reference.scores(
        given["query"], given["key"], case.stride, case.block, case.causal, case.scale, case.reduce, case.span
    )
    if got.shape != want.shape or np.isnan(got).any():
        return f"shape {got.shape}, {int(np.isnan(got).sum())} NaN"
    there = np.isfinite(want)
    if not np.array_equal(there, np.isfinite(got)):
        return f"{int((there != np.isfinite(got)).sum())} scores are infinite on one side only"
    # Products of two halves are exact in float32; what is lost is lost in sums.
    q, k = (np.abs(given[n]).max() for n in ("query", "key"))
    limit = 4e-6 * np.sqrt(case.dim * case.stride) * q * k * case.scale + 1e-5
    far = np.abs(got - want, where=there, out=np.zeros(want.shape)).max()
    return f"off by {far:.2e}, {limit:.2e} is allowed" if far > limit else ""


def wrong_lists(case: Selection, scores: np.ndarray, got: Mapping[str, np.ndarray]) -> str:
    """What is wrong with the lists that were made of ``scores``."""
    mass = reference.mass(scores, case.tiles)
    if np.isnan(got["mass"]).any() or np.abs(got["mass"] - mass).max() > CLOSE:
        return f"weights are off by {np.nanmax(np.abs(got['mass'] - mass)):.2e}, NaN: {np.isnan(got['mass']).sum()}"
    try:
        listed = reference.listed(got["rows"], got["columns"], mass.shape[-1], case.causal)
    except (AssertionError, IndexError) as error:
        return f"lists that cannot be: {error}"
    first = got["rows"][..., 0][got["rows"][..., 0] < got["rows"][..., 1]]
    if (got["kinds"][first] != 0).any():
        return "a partial block of a mask that there is not"
    return far(listed, (scores if case.rule == "anchor" else got["mass"]).astype(np.float64), case)


def far(listed: np.ndarray, mass: np.ndarray, case: Selection) -> str:
    """Whether ``listed`` is more than ``amount`` - CLOSE asks for and less than ``amount`` + CLOSE does; other rules
    than mass are exact. ``mass``: of rule anchor, scores.
    """
    slack = CLOSE if case.rule == "mass" else 0.0
    amount = np.array(case.amount, np.float32).astype(np.float64)
    less, more = (
        reference.kept(mass, amount + d, case.rule, case.causal, case.sinks, case.window) for d in (-slack, slack)
    )
    bad = (less & ~listed) | (listed & ~more)
    return f"{int(bad.sum())} blocks of {bad.size} are wrong, the first at {np.argwhere(bad)[0]}" if bad.any() else ""


def _anchored(name: str, keys: int, block: int = 64, **more: Any) -> Selection:
    """As ``anchor`` in plan.toml has them, of so many keys."""
    return Selection(name, tokens=(-(-keys // block), keys), stride=1, block=block, rule="anchor", reduce="max",
                     span=block, **more)  # fmt: skip


CASES = (
    Selection("xattention, causal, GQA"),
    Selection("xattention, no mask, heads of their own", batch=2, tokens=(200, 200), causal=False, amount=(0.5, 0.95)),
    Selection("bfloat16, BHND", dtype="bfloat16", layouts=("BHND", "BHND"), heads=(2, 2), dim=64, tokens=(333, 333)),
    Selection("mixed layouts", layouts=("BHND", "BNHD"), dim=24, stride=8, tokens=(150, 150)),
    Selection("head dim in two parts", dim=72, tokens=(190, 190), heads=(3, 3), amount=(0.9, 0.3, 2.0)),
    Selection("blocks of 128", block=128, tokens=(700, 700), heads=(1, 1)),
    Selection("a large window of loud ones", values="loud", sinks=2, window=1, tokens=(450, 450), amount=(0.6,)),
    Selection("equal weights", values="equal", tokens=(400, 400), amount=(0.5,), heads=(1, 1)),
    Selection("equal weights by share", values="equal", tokens=(640, 640), rule="share", amount=(0.5,), causal=False),
    Selection("tiles of 4", stride=4, block=64, tokens=(130, 130), heads=(1, 1), dim=16),
    Selection("more keys than queries", tokens=(70, 260), causal=False, amount=(0.7,)),
    Selection("more queries than keys", tokens=(260, 70), causal=False, amount=(0.7,)),
    Selection("pooled, causal", stride=1, block=1, tokens=(19, 19), rule="share", amount=(0.25, 0.5)),
    Selection(
        "pooled, no mask", stride=1, block=1, tokens=(21, 21), rule="share", amount=(0.1,), causal=False, heads=(1, 1)
    ),
    Selection(
        "pooled, everything", stride=1, block=1, tokens=(9, 9), rule="share", amount=(1.0,), causal=False, heads=(1, 1)
    ),
    Selection("parts of one tensor", heads=(2, 2), tokens=(140, 140), packed=True),
    Selection("a single block", tokens=(40, 40)),
    Selection("nothing asked", amount=(0.0,), tokens=(300, 300), sinks=0),
    _anchored("anchor, causal, GQA", 457, amount=(0.5, 1.0), window=1),
    _anchored("anchor, no mask", 322, causal=False, amount=(0.7,), heads=(3, 3), dim=40),
    _anchored("anchor, blocks of 128, BHND", 800, 128, layouts=("BHND", "BHND"), amount=(0.5,), heads=(1, 1)),
    _anchored("anchor, bfloat16, mixed layouts", 500, dtype="bfloat16", layouts=("BHND", "BNHD"), values="loud",
              amount=(math.inf, 20.0), dim=72),
    _anchored("anchor, equal scores", 400, values="equal", amount=(0.0,), heads=(1, 1)),
    _anchored("anchor, nothing always kept", 300, causal=False, sinks=0, window=-1, amount=(0.25,), heads=(1, 1)),
    _anchored("anchor, many rows, their own blocks as others", 590, 16, window=-1, amount=(0.5,), heads=(1, 1), dim=16),
    Selection("the highest of tiles", reduce="max", tokens=(210, 210), amount=(0.8,), heads=(1, 1)),
    Selection("sums of keys by mean queries", span=64, stride=1, rule="share", amount=(0.4,), tokens=(6, 350)),
    Selection("head dim 200", dim=200, tokens=(130, 130), heads=(2, 1)),
)  # fmt: skip


def random_selections(seed: int, count: int, most: int = 700) -> list[Selection]:
    """``most`` tokens; a fifth of it where they are pooled ones."""
    rng = np.random.default_rng([seed, 77])
    found = []
    for n in range(count):
        groups, group = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        pooled, causal = bool(rng.random() < 0.3), bool(rng.random() < 0.6)
        stride, block = (1, 1) if pooled else ((4, 64), (8, 64), (16, 64), (16, 128), (32, 128))[rng.integers(5)]
        queries = int(rng.integers(2, most // 5 if pooled else most))
        keys = queries if causal else int(rng.integers(2, most // 5 if pooled else most))
        by_anchor = not pooled and rng.random() < 0.3
        reduce, span = "sum", 1
        if by_anchor:
            stride, reduce, span = 1, "max", block
            queries = -(-keys // block)
        heads = groups * group
        amounts = tuple(float(x) for x in rng.random(heads if rng.random() < 0.5 else 1))
        found.append(Selection(
            f"selection-{seed}-{n}", ("float16", "bfloat16")[rng.integers(2)], int(rng.integers(1, 3)), (heads, groups),
            (queries, keys), 8 * int(rng.integers(2, 17)), stride, block, causal,
            "anchor" if by_anchor else ("mass", "share")[rng.integers(2)],
            amounts, int(rng.integers(3)), int(rng.integers(2)), (("BNHD", "BHND")[rng.integers(2)],) * 2,
            ("ordinary", "loud", "equal")[rng.integers(3)], n, reduce=reduce, span=span,
        ))  # fmt: skip
    return found


Launch = Callable[[OpCall, Mapping[str, Any], Mapping[str, str]], None]


def tensors(case: Selection, device: str) -> dict[str, Any]:
    """Operands as views with axes BNHD, and poisoned outputs."""
    import torch

    found: dict[str, Any] = {}
    for (name, array), layout in zip(case.operands().items(), case.layouts, strict=True):
        x = torch.from_numpy(array).to(device).to(getattr(torch, case.dtype))
        found[name] = x if layout == "BNHD" else x.transpose(1, 2).contiguous().transpose(1, 2)
    if case.packed:
        whole = torch.full_like(found["query"], float("nan"))
        found["query"] = found["key"] = torch.stack([found["query"], found["key"], whole], 2)
    found["amount"] = torch.tensor(case.amount, dtype=torch.float32, device=device)
    for name, shape in case.shapes.items():
        if name in ("scores", "mass"):
            found[name] = torch.full(shape, float("nan"), dtype=torch.float32, device=device)
        elif name != "amount":
            found[name] = torch.full(shape, -(1 << 30), dtype=torch.int32, device=device)
    return found


def verdict(case: Selection, launch: Launch, device: str = "cpu", compare: bool = True) -> str:
    """What is wrong with either op's outputs. ``launch`` runs a call on tensors that its kernel names."""
    at = tensors(case, device)
    first, second = case.calls()
    layouts = {"query": "BN0HD", "key": "BN1HD"} if case.packed else {"query": "BNHD", "key": "BNHD"}
    launch(first, {n: at[n] for n in ("query", "key", "scores")}, layouts)
    launch(second, {n: at[n] for n in ("scores", "amount", *LISTS, "mass")}, {})
    if not compare:
        return ""
    scores = at["scores"].cpu().numpy()
    said = wrong_scores(case, scores)
    return said or wrong_lists(case, scores, {n: at[n].cpu().numpy() for n in (*LISTS, "mass")})
