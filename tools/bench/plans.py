"""A search's choice as launches: the lists of each site of the trained language model, one BlockSparseAttention beside
cuDNN's causal attention on as many heads.

``tools/search_compare.py --write`` leaves a ``patterns.json`` of each row: the texts of all heads by site, at 8,192
tokens. What such lists take at more tokens is tried with the same map drawn larger: each block becomes 4 x 4, 16 x 16
of them, what then lies above the diagonal left out. No model was asked there; it says what such a share of blocks is
worth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from kernels import prepare as prepare_cases
from kernels import run as run_cases

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.block_selection import is_selection

HEADS, DIM, BLOCK = 6, 64, 128
LENGTHS = (8192, 32768, 131072)


@dataclass(frozen=True, eq=False)
class Planned(Case):
    """``blocks`` bool [heads, R, R] are met, what is above the diagonal aside."""

    blocks: np.ndarray | None = None

    @property
    def causal(self) -> bool:
        return True

    @property
    def kept(self) -> np.ndarray | None:
        return self.blocks


def planned(name: str, blocks: np.ndarray) -> Planned:
    heads, count, _ = blocks.shape
    attributes = {"block": BLOCK, "masked_rows": "zero", "scale": DIM**-0.5}
    return Planned(name, "BlockSparseAttention", 1, heads, heads, count * BLOCK, DIM, attributes, blocks=blocks)


def blocks_of(texts: Sequence[str], tokens: int) -> np.ndarray:
    """Bool [heads, R, R] of the patterns of one site at 8,192 tokens, drawn larger for more."""
    geometry = BlockGeometry(LENGTHS[0], BLOCK, True)
    met = np.stack([BlockPattern(text).blocks(geometry) for text in texts])
    times = tokens // LENGTHS[0]
    return np.tril(np.kron(met, np.ones((1, times, times), bool)))


def cases(patterns: Path, lengths: Sequence[int] = LENGTHS) -> tuple[list[Planned], list[str]]:
    """What is timed, and sites that are not: a head chooses blocks for each input, or meets the rest by its means, so
    that the lists are not all of what the site launches.
    """
    found, left = [], []
    given = json.loads(patterns.read_text(encoding="utf-8"))
    for site, texts in given.get("patterns", given).items():
        if any(is_selection(text) or BlockPattern(text).rest for text in texts):
            left.append(site)
            continue
        found += [planned(f"{site}-{tokens}", blocks_of(texts, tokens)) for tokens in lengths]
    return found, left


def prepare(out: Path, architectures: Sequence[int]) -> None:
    """Compile the kernels, on a machine that needs no GPU: what the lists are they are told when they run."""
    prepare_cases(out, architectures, [planned("any", blocks_of(["sinks 1 window 1"] * HEADS, LENGTHS[0]))])


def run(bundle: Path, patterns: Path, rounds: int, out: Path) -> dict[str, Any]:
    """Measure each site at each length; what is wrong is not timed."""
    made, left = cases(patterns)
    result = run_cases(bundle, (), rounds, ("flash", "flex"), made, out)
    result["choosing"] = left
    result["density"] = {c.name: float(c.blocks.sum() / np.tril(np.ones_like(c.blocks)).sum())
                         for c in made if c.blocks is not None}  # fmt: skip
    result["total"] = {}
    for tokens in LENGTHS:
        same = [c["ms"] for c in result["cases"] if c["name"].endswith(f"-{tokens}")]
        ours, dense = (sum(ms[name] for ms in same) for name in ("ours", "cudnn"))
        if same and len(same) * len(LENGTHS) == len(made):
            result["total"][str(tokens)] = {"ours": ours, "cudnn": dense, "ratio": dense / ours}
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: of all sites together."""
    lines = ["| tokens | blocks left | lists, ms | cuDNN, causal, ms | gain |", "|---|---|---|---|---|"]
    for tokens, total in result["total"].items():
        shares = [x for name, x in result["density"].items() if name.endswith(f"-{tokens}")]
        lines.append(f"| {int(tokens):,} | {sum(shares) / len(shares):.1%} | {total['ours']:.3f} | "
                     f"{total['cudnn']:.3f} | {total['ratio']:.2f}x |")  # fmt: skip
    return "\n".join(lines)
