"""Blocks that are chosen for one head when the model runs, from its queries and keys; written in plan.toml as

- ``pooled S``: of the blocks that a row of blocks may see, the share S with the highest scores of mean query and mean
  key (block-sparse heads of MInference, arXiv:2407.02490; the fixed number there is a share here, so that it holds for
  all lengths);
- ``xattention T``: the fewest blocks that hold a share T of the estimated attention weight, by sums over antidiagonals
  of tiles of 16 tokens; ``xattention T stride 8``: of 8 (arXiv:2503.16428);
- ``anchor T``: every block that holds a key whose scaled logit with the mean query of the row of blocks is at most T
  below the anchor, the highest one in the blocks that are always kept (AnchorAttention, arXiv:2505.23520; there single
  keys are gathered, here their blocks).

Behind each of them ``rest 16`` says that blocks which are not chosen are met by the means of every 16 of their keys and
values, as of ``BlockPattern``; lengths are fixed then.

The first block and the row's own are always among them, and count. All heads of a site are chosen in one way, each with
a share or distance of its own, or are ``dense``. This module says what a text means, and estimates it on captured
operands as the ops do (plugins/block_select): NumPy, a row of blocks at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.errors import Unsupported

_AMOUNT = r"[0-9]{1,9}(?:\.[0-9]+)?"
_FORMS = {
    "pooled": re.compile(rf"pooled ({_AMOUNT})"),
    "xattention": re.compile(rf"xattention ({_AMOUNT})(?: stride ([0-9]{{1,9}}))?"),
    "anchor": re.compile(rf"anchor ({_AMOUNT})"),
}
_REST = re.compile(r"(.*) rest ([1-9][0-9]{0,8})")
STRIDE = 16
"""Edge of the tiles of ``xattention`` where the text names none."""

STRIDES = (4, 8, 16, 32)
SLACK = 2.0**-10
"""What a share is lessened by before it is rounded up."""

SINKS, WINDOW = 1, 0
"""First blocks, and distance from a row's own block, that are always kept."""

EVERYTHING = 2.0
"""More weight than there is: what a dense head among chosen ones asks for."""

FURTHEST = 1000.0
"""The largest distance from an anchor that a text may name. Beside such heads a dense one names infinity."""

Way = Literal["pooled", "xattention", "anchor"]
Family = tuple[Way, int]
"""Of a way to choose what all heads of a site have in common: the way, and the tiles of ``xattention``, else 0."""

RULES: dict[Way, str] = {"pooled": "share", "xattention": "mass", "anchor": "anchor"}
"""The rule of ``BlockSelect`` by which each way keeps blocks."""


def is_selection(text: str) -> bool:
    """Whether ``text`` chooses blocks when the model runs, well written or not."""
    return text.split(" ", 1)[0] in _FORMS


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """One head's way to choose, by its ``text``; see the module. ``rest``: keys of a mean, 0 where there is none."""

    text: str
    way: Way = field(init=False)
    amount: float = field(init=False)
    stride: int = field(init=False)
    rest: int = field(init=False)

    def __post_init__(self) -> None:
        """Raises ``Unsupported`` for a text that is no selection."""
        tail = _REST.fullmatch(self.text)
        said, rest = (tail[1], int(tail[2])) if tail else (self.text, 0)
        for way, form in _FORMS.items():
            match = form.fullmatch(said)
            if match is None:
                continue
            amount, stride = float(match[1]), 0
            if way == "xattention":
                stride = int(match[2] or STRIDE)
            there = 0 <= amount <= FURTHEST if way == "anchor" else 0 < amount <= 1
            if not there or (way == "xattention" and stride not in STRIDES):
                break
            for name, value in (("way", way), ("amount", amount), ("stride", stride), ("rest", rest)):
                object.__setattr__(self, name, value)
            return
        raise Unsupported(
            "pattern", f"'{self.text[:60]}' chooses no blocks",
            f"pooled SHARE or xattention SHARE stride {'|'.join(map(str, STRIDES))}, with a share up to 1, or anchor "
            f"THETA, a distance of logits from 0 to {FURTHEST:g}; rest SIZE may follow",
        )  # fmt: skip

    @property
    def family(self) -> Family:
        return self.way, self.stride

    @property
    def rule(self) -> str:
        """That of ``BlockSelect``."""
        return RULES[self.way]


def rest_of(text: str) -> int:
    """Of how many keys there are means in place of the blocks that a head with this pattern leaves out, or 0."""
    return BlockSelection(text).rest if is_selection(text) else BlockPattern(text).rest


@dataclass(frozen=True, slots=True)
class Cut:
    """How the scores of a way are made for blocks of one edge, in the words of ``BlockScores``; ``pooled``: which
    operands are means of blocks.
    """

    stride: int
    block: int
    pooled: tuple[str, ...] = ()
    reduce: str = "sum"
    span: int = 1

    @staticmethod
    def of(family: Family, edge: int) -> Cut:
        way, stride = family
        if way == "pooled":
            return Cut(1, 1, ("query", "key"))
        if way == "anchor":
            return Cut(1, edge, ("query",), "max", edge)
        return Cut(stride, edge)

    @property
    def tiles(self) -> int:
        """Rows of scores that make a row of blocks."""
        return self.block // (self.stride * self.span)

    @property
    def attributes(self) -> dict[str, int | str]:
        """Those of ``BlockScores`` that are not at their defaults."""
        said: dict[str, int | str] = {"stride": self.stride, "block": self.block}
        return said if self.reduce == "sum" else {**said, "reduce": self.reduce, "span": self.span}


@dataclass(frozen=True, slots=True)
class Chooser:
    """How all heads of one site choose: ``amounts`` one a head, ``rest`` as of ``BlockSelection``."""

    way: Way
    stride: int
    amounts: tuple[float, ...]
    rest: int = 0

    @property
    def family(self) -> Family:
        return self.way, self.stride

    @property
    def rule(self) -> str:
        return RULES[self.way]

    @property
    def everything(self) -> float:
        """The amount of a dense head."""
        return math.inf if self.way == "anchor" else EVERYTHING

    @staticmethod
    def of(texts: Sequence[str]) -> Chooser:
        """Raises ``Unsupported`` where the heads do not go together."""
        fixed = next((text for text in texts if text != "dense" and not is_selection(text)), None)
        if fixed is not None:
            raise Unsupported(
                "pattern", f"'{fixed[:60]}' beside heads of the same site that choose their blocks when the model runs",
                "let all of them choose, in one way, or none; heads may be dense",
            )  # fmt: skip
        made = [None if text == "dense" else BlockSelection(text) for text in texts]
        families = {(*m.family, m.rest) for m in made if m is not None}
        if len(families) != 1:
            raise Unsupported(
                "pattern", "heads of one site that choose blocks in different ways",
                "give all of them one way, one stride and one rest: shares and distances may differ, and heads may be "
                "dense",
            )  # fmt: skip
        ((way, stride, rest),) = families
        every = Chooser(way, stride, ()).everything
        return Chooser(way, stride, tuple(every if m is None else m.amount for m in made), rest)


def weights(
    query: np.ndarray, key: np.ndarray, scale: float, geometry: BlockGeometry, family: Family,
    rows: Sequence[int] | None = None,
) -> np.ndarray:  # fmt: skip
    """One head's query [N, D] and key [N, D] -> float32 [R, C]: what each block of keys is estimated to weigh for a row
    of blocks; of ``anchor`` the highest logit of its keys, -inf for later blocks. Only ``rows`` are filled, if given.
    """
    edge, tokens = geometry.edge, geometry.tokens
    cut = Cut.of(family, edge)
    starts = np.arange(0, tokens, edge)
    sizes = np.minimum(edge, tokens - starts)[:, None]
    query, key = (
        np.add.reduceat(x.astype(np.float32), starts) / sizes if name in cut.pooled else x
        for name, x in (("query", query), ("key", key))
    )
    if cut.reduce == "max":
        return _highest(query, key, scale, geometry, rows)
    stride, members = cut.stride, cut.tiles
    high = -(-len(query) // stride)
    tiles = []
    for x, turned in ((query, True), (key, False)):
        whole = np.zeros((high * stride, x.shape[1]), np.float32)
        whole[: len(x)] = x
        pieces = whole.reshape(high, stride, -1)
        tiles.append((pieces[:, ::-1] if turned else pieces).reshape(high, -1))
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


def _highest(
    query: np.ndarray, key: np.ndarray, scale: float, geometry: BlockGeometry, rows: Sequence[int] | None
) -> np.ndarray:
    """Mean queries [R, D] with each key [N, D] -> float32 [R, C]: the highest logit of each block's keys."""
    edge, count = geometry.edge, geometry.count
    out = np.full((count, count), -np.inf, np.float32)
    for r in range(count) if rows is None else rows:
        end = min((r + 1) * edge, len(key)) if geometry.causal else len(key)
        logits = key[:end] @ (query[r] * np.float32(scale))
        out[r, : -(-end // edge)] = np.maximum.reduceat(logits, np.arange(0, end, edge))
    return out


def kept(
    mass: np.ndarray, amount: float, rule: str, causal: bool, sinks: int = SINKS, window: int = WINDOW
) -> np.ndarray:
    """``weights`` [.., R, C] -> bool [.., R, C]: what ``BlockSelect`` keeps."""
    rows, columns = mass.shape[-2:]
    row, place = np.arange(rows)[:, None], np.arange(columns)[None, :]
    visible = (place <= row) | (not causal)
    always = ((place < sinks) | (abs(place - row) <= window)) & visible
    if rule == "anchor":
        anchor = np.where(always, mass, -np.inf).max(axis=-1, keepdims=True).astype(np.float32)
        near: np.ndarray = always | (visible & (mass >= anchor - np.float32(amount)))
        return near
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
