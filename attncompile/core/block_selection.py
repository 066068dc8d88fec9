"""Blocks that are chosen for one head when the model runs, from its queries and keys; written in plan.toml as

- ``pooled S``: of the blocks that a row of blocks may see, the share S with the highest scores of mean query and mean
  key (block-sparse heads of MInference, arXiv:2407.02490; the fixed number there is a share here, so that it holds for
  all lengths);
- ``xattention T``: the fewest blocks that hold a share T of the estimated attention weight, by sums over antidiagonals
  of tiles of 16 tokens; ``xattention T stride 8``: of 8 (arXiv:2503.16428).

The first block and the row's own are always among them, and count. All heads of a site are chosen in one way, each with
a share of its own, or are ``dense``. This module says what a text means, and estimates it on captured operands as the
ops do (plugins/block_select): NumPy, a row of blocks at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.errors import Unsupported

_FORMS = {
    "pooled": re.compile(r"pooled (\d+(?:\.\d+)?)"),
    "xattention": re.compile(r"xattention (\d+(?:\.\d+)?)(?: stride (\d+))?"),
}
STRIDE = 16
"""Edge of the tiles of ``xattention`` where the text names none."""

STRIDES = (4, 8, 16, 32)
SLACK = 2.0**-10
"""What a share is lessened by before it is rounded up."""

SINKS, WINDOW = 1, 0
"""First blocks, and distance from a row's own block, that are always kept."""

EVERYTHING = 2.0
"""More weight than there is: what a dense head among chosen ones asks for."""

Way = Literal["pooled", "xattention"]


def is_selection(text: str) -> bool:
    """Whether ``text`` chooses blocks when the model runs, well written or not."""
    return text.split(" ", 1)[0] in _FORMS


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """One head's way to choose, by its ``text``; see the module."""

    text: str
    way: Way = field(init=False)
    amount: float = field(init=False)
    stride: int = field(init=False)

    def __post_init__(self) -> None:
        """Raises ``Unsupported`` for a text that is no selection."""
        for way, form in _FORMS.items():
            match = form.fullmatch(self.text)
            if match is None:
                continue
            amount, stride = float(match[1]), 0
            if way == "xattention":
                stride = int(match[2] or STRIDE)
            if not 0 < amount <= 1 or (stride and stride not in STRIDES):
                break
            for name, value in (("way", way), ("amount", amount), ("stride", stride)):
                object.__setattr__(self, name, value)
            return
        raise Unsupported(
            "pattern", f"'{self.text[:60]}' chooses no blocks",
            f"pooled SHARE or xattention SHARE stride {'|'.join(map(str, STRIDES))}, with a share up to 1",
        )  # fmt: skip

    @property
    def family(self) -> tuple[Way, int]:
        """What all heads of a site have to have in common."""
        return self.way, self.stride

    @property
    def rule(self) -> str:
        """That of ``BlockSelect``."""
        return "share" if self.way == "pooled" else "mass"


@dataclass(frozen=True, slots=True)
class Chooser:
    """How all heads of one site choose: ``amounts`` one a head."""

    way: Way
    stride: int
    amounts: tuple[float, ...]

    @property
    def rule(self) -> str:
        return "share" if self.way == "pooled" else "mass"

    @staticmethod
    def of(texts: Sequence[str]) -> Chooser:
        """Raises ``Unsupported`` where the heads do not go together."""
        made = [None if text == "dense" else BlockSelection(text) for text in texts]
        families = {m.family for m in made if m is not None}
        if len(families) != 1:
            raise Unsupported(
                "pattern", "heads of one site that choose blocks in different ways",
                "give all of them one way and one stride: shares may differ, and heads may be dense",
            )  # fmt: skip
        ((way, stride),) = families
        return Chooser(way, stride, tuple(EVERYTHING if m is None else m.amount for m in made))


def weights(
    query: np.ndarray, key: np.ndarray, scale: float, geometry: BlockGeometry, family: tuple[Way, int],
    rows: Sequence[int] | None = None,
) -> np.ndarray:  # fmt: skip
    """One head's query [N, D] and key [N, D] -> float32 [R, C]: what each block of keys is estimated to weigh for a row
    of blocks. Only ``rows`` are filled, if given.
    """
    way, stride = family
    edge, tokens = geometry.edge, geometry.tokens
    if way == "pooled":
        starts = np.arange(0, tokens, edge)
        sizes = np.minimum(edge, tokens - starts)[:, None]
        query, key = (np.add.reduceat(x.astype(np.float32), starts) / sizes for x in (query, key))
        stride, members = 1, 1
    else:
        members = edge // stride
    high = -(-len(query) // stride)
    tiles = []
    for x, turned in ((query, True), (key, False)):
        whole = np.zeros((high * stride, x.shape[1]), np.float32)
        whole[: len(x)] = x
        cut = whole.reshape(high, stride, -1)
        tiles.append((cut[:, ::-1] if turned else cut).reshape(high, -1))
    of_queries, of_keys = tiles
    count = geometry.count
    out = np.zeros((count, count), np.float32)
    for r in range(count) if rows is None else rows:
        first, last = r * members, min((r + 1) * members, high)
        end = last if geometry.causal else high
        s = of_queries[first:last] @ of_keys[:end].T * np.float32(scale / stride)
        if geometry.causal:
            s[np.arange(end)[None, :] > np.arange(first, last)[:, None]] = -np.inf
        s = np.exp(s - s.max(axis=1, keepdims=True))
        mean = (s / s.sum(axis=1, keepdims=True)).mean(axis=0)
        out[r, : -(-end // members)] = np.add.reduceat(mean, np.arange(0, end, members))
    return out


def kept(
    mass: np.ndarray, amount: float, rule: str, causal: bool, sinks: int = SINKS, window: int = WINDOW
) -> np.ndarray:
    """``weights`` [.., R, C] -> bool [.., R, C]: what ``BlockSelect`` keeps."""
    rows, columns = mass.shape[-2:]
    row, place = np.arange(rows)[:, None], np.arange(columns)[None, :]
    visible = (place <= row) | (not causal)
    always = ((place < sinks) | (abs(place - row) <= window)) & visible
    ranked = np.where(always, np.inf, np.where(visible, mass, -np.inf))
    order = np.argsort(-ranked, axis=-1, kind="stable")
    sorted_mass = np.take_along_axis(np.where(visible, mass, 0), order, -1)
    least = always.sum(axis=1)[:, None]
    if rule == "mass":
        before = np.cumsum(sorted_mass, axis=-1) - sorted_mass
        wanted = (before < amount).sum(axis=-1)[..., None]
    else:
        wanted = np.ceil(amount * visible.sum(axis=1)[:, None] - SLACK).astype(int)
    wanted = np.minimum(np.maximum(wanted, least), visible.sum(axis=1)[:, None])
    out = np.zeros(mass.shape, bool)
    np.put_along_axis(out, order, np.broadcast_to(np.arange(columns) < wanted, mass.shape), -1)
    return out


def with_tokens(geometry: BlockGeometry, tokens: int) -> BlockGeometry:
    """The blocks of another length."""
    return geometry if geometry.tokens == tokens else replace(geometry, tokens=tokens, grid=None)
