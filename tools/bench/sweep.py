"""Configurations from a seed, for the cost model: every second one of a kind is fitted, the others are withheld."""

from __future__ import annotations

import random
from math import prod

from cases import Case

LARGEST = 3.0e12
"""Flops of the largest configuration."""


KINDS = (
    "none", "causal", "window", "2-D", "3-D", "strided", "window", "bias", "key mask", "softcap", "64 lists",
    "128 lists",
)  # fmt: skip
LONGEST = {"bias": 12.0, "64 lists": 13.5, "128 lists": 13.5}
"""log2 of the most tokens, 14 otherwise."""


def sweep(count: int, seed: int = 0) -> list[Case]:
    """Calls of all ``KINDS`` in turn, of all sizes, none twice."""
    rng = random.Random(seed)
    found: list[Case] = []
    while len(found) < count:
        case = _one(rng, f"sweep-{len(found)}", KINDS[len(found) % len(KINDS)])
        if _flops(case) <= LARGEST:
            found.append(case)
    return found


def _one(rng: random.Random, name: str, kind: str) -> Case:
    dim, heads, batch = rng.choice([64, 72, 128]), rng.choice([4, 8, 12, 16, 24]), rng.choice([1, 2, 4])
    tokens = int(2 ** rng.uniform(8.5, LONGEST.get(kind, 14.0)))
    if kind.endswith("lists"):
        block = int(kind.split()[0])
        tokens = -(-tokens // block) * block
        attributes = {"block": block, "masked_rows": "zero", "scale": dim**-0.5}
        density = rng.choice([0.05, 0.1, 0.2, 0.4])
        return Case(name, "BlockSparseAttention", 1, heads, heads, tokens, dim, attributes, density=density)
    if kind in ("bias", "key mask"):
        inputs = {"bias": "float16"} if kind == "bias" else {"key_mask": "bool"}
        return Case(name, "Attention", batch, heads, heads, tokens, dim, {"masked_rows": "zero"}, inputs=inputs)
    if kind == "softcap":
        return Case(name, "Attention", batch, heads, heads, tokens, dim, {"right": 0, "softcap": 30.0})
    if kind in ("none", "causal", "window"):
        reach = int(2 ** rng.uniform(6, 11))
        attributes = {"none": {}, "causal": {"right": 0}, "window": {"left": reach, "right": rng.choice([0, reach])}}[
            kind
        ]
        return Case(name, "Attention", batch, heads, heads, tokens, dim, attributes)
    rank = 3 if kind == "3-D" else 2
    grid = [rng.randint(8, 24) for _ in range(rank)] if rank == 3 else [rng.randint(24, 112) for _ in range(rank)]
    kernel = [rng.randint(max(2, g // 6), max(3, g // 2)) for g in grid]
    attributes = {"grid": grid, "kernel_size": kernel, "border": "clamp"}
    if kind == "strided":
        attributes["stride"] = [min(rng.choice([4, 8, 16]), k) for k in kernel]
    return Case(name, "NeighborhoodAttention", batch, heads, heads, prod(grid), dim, attributes)


def _flops(case: Case) -> float:
    keys = prod(case.attributes["kernel_size"]) if case.grid else case.tokens
    return 4.0 * case.batch * case.heads * case.tokens * keys * case.dim
