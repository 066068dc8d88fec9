"""Random sites whose heads have random patterns: what runs, what the search says of it and how many blocks it counts,
against a definition that shares no code with either.

Combinations are the point: orders beside means beside bitmaps on shared key heads, class tokens, ragged lengths, both
types, all layouts, batches of any size. What single patterns mean is tested in ``tests/core/test_block_pattern.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, bitmap, density
from attncompile.core.grid import TokenGrid
from attncompile.core.site import AttentionSite
from attncompile.plugins import mechanism
from attncompile.search import maps, tasks
from tests.plugins.conftest import Case, relative_error

SUBJECT = mechanism("BlockSparseAttention")
LAYOUTS = ("BHND", "BNHD")


@dataclass(frozen=True)
class Meant:
    """The place of each token in the head's order, the blocks [R, R] that it meets there, and the keys of a mean."""

    places: np.ndarray
    seen: np.ndarray
    rest: int


def order_of(grid: TokenGrid, said: str) -> np.ndarray:
    """Tokens in this order, by sorting their coordinates."""
    numbers = [int(x) for x in said.replace("x", ",").split(",")]
    where = list(np.ndindex(*grid.shape))

    def key(i: int) -> tuple[int, ...]:
        if "x" in said:
            pairs = list(zip(where[i], numbers, strict=True))
            return (*(x // side for x, side in pairs), *(x % side for x, side in pairs))
        return tuple(where[i][axis] for axis in numbers)

    inner = sorted(range(len(where)), key=key)
    last = grid.prefix + len(where)
    return np.array([*range(grid.prefix), *(grid.prefix + i for i in inner), *range(last, grid.tokens)])


def neighbors(grid: TokenGrid, sizes: list[int], edge: int) -> np.ndarray:
    """Bool [R, R]: blocks with a pair of a clamped neighborhood; tokens beside the grid see all."""
    where = np.array(list(np.ndindex(*grid.shape)))
    inside = np.ones((len(where), len(where)), bool)
    for axis, size in enumerate(sizes):
        at = where[:, axis]
        first = np.clip(at - size // 2, 0, grid.shape[axis] - size)[:, None]
        inside &= (at >= first) & (at < first + size)
    count = -(-grid.tokens // edge)
    pairs = np.zeros((count * edge, count * edge), bool)
    pairs[: grid.tokens, : grid.tokens] = True
    here = slice(grid.prefix, grid.prefix + len(where))
    pairs[here, here] = inside
    return np.asarray(pairs.reshape(count, edge, count, edge).any(axis=(1, 3)))


def meant(
    text: str, tokens: int, edge: int, causal: bool, grid: TokenGrid | None, bits: dict[str, np.ndarray]
) -> Meant:
    body, _, size = text.partition(" rest ")
    places, words = np.arange(tokens), body.split(" ")
    if words[0] == "order":
        assert grid is not None
        places = order_of(grid, words[1])
        if "x" not in words[1]:
            grid = replace(grid, shape=tuple(grid.shape[int(axis)] for axis in words[1].split(",")))
        words = words[2:]
    count = -(-tokens // edge)
    row, column = np.arange(count)[:, None], np.arange(count)[None, :]
    said = dict(zip(words[::2], words[1::2], strict=False))
    if words[0] in ("mean", "skip"):
        return Meant(places, np.zeros((count, count), bool), 0)
    if words[0] == "dense":
        seen = np.ones((count, count), bool)
    elif words[0] == "sinks":
        seen = (column < int(said["sinks"])) | (abs(row - column) <= int(said["window"]))
    elif words[0] == "grid":
        assert grid is not None
        seen = neighbors(grid, [int(x) for x in words[1].split("x")], edge)
    elif words[0] == "blocks":
        seen = bits[" ".join(words)].copy()
    else:
        columns, behind = ([int(x) for x in said.get(n, "").split(",") if x] for n in ("columns", "diagonals"))
        seen = np.isin(np.broadcast_to(column, (count, count)), columns) | np.isin(row - column, behind)
    seen = (seen | (row == column)) & ((column <= row) | (not causal))
    return Meant(places, seen, int(size or 0))


def head(at: RandomSite, text: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """q [N, D], k, v, ``shown`` bool [N] -> [N, Dv] in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    if text == "mean":
        return np.broadcast_to(v.mean(axis=0), v.shape)
    one, out = at.meant(text), np.zeros_like(v)
    place = one.places
    q, k, v, shown = q[place], k[place], v[place], shown[place]
    block = np.arange(at.tokens) // at.edge
    times = (one.seen[block][:, block] & shown[None, :]).astype(float)
    if at.causal:
        times = np.tril(times)
    if one.rest:
        means = at.tokens // at.edge * at.edge // one.rest
        of = np.arange(means) * one.rest // at.edge
        left = ~one.seen[block][:, of] & ((of[None, :] < block[:, None]) | (not at.causal))
        k, v = (np.concatenate([x, x[: means * one.rest].reshape(means, one.rest, -1).mean(axis=1)]) for x in (k, v))
        times = np.concatenate([times, left * float(one.rest)], axis=1)
    scores = np.where(times > 0, at.scale * (q @ k.T), -np.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = times * np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=1, keepdims=True)
    out[place] = weights @ v / np.where(total > 0, total, 1)
    return out


@dataclass(frozen=True)
class RandomSite:
    tokens: int
    edge: int
    causal: bool
    grid: TokenGrid | None
    texts: tuple[str, ...]
    bits: dict[str, np.ndarray]
    scale: float
    case: Case

    def meant(self, text: str) -> Meant:
        return meant(text, self.tokens, self.edge, self.causal, self.grid, self.bits)

    @property
    def geometry(self) -> BlockGeometry:
        return BlockGeometry(self.tokens, self.edge, self.causal, self.grid)

    def blocks(self, text: str) -> float:
        """Blocks that are computed, with those that means amount to."""
        one, whole = self.meant(text), self.tokens // self.edge
        return float(one.seen.sum()) + (len(one.seen) * whole / one.rest if one.rest else 0.0)


def random_text(rng: np.random.Generator, geometry: BlockGeometry, rest: int, plain: bool, bits: Any) -> str:
    """``plain``: in the order of the tokens."""
    count, grid = geometry.count, geometry.grid
    kind = str(rng.choice(["dense", "skip", "sinks", "columns", "diagonals", "blocks", *["grid"] * (grid is not None)]))
    if kind in ("dense", "skip"):
        return kind
    order = ""
    if grid is not None and not plain and len(grid.shape) > 1 and rng.random() < 0.6:
        shape = grid.shape
        if kind != "grid" and rng.random() < 0.5:
            order = f"order {'x'.join(str(s) for s in rng.integers(2, 4, len(shape)))} "
        else:
            axes = np.roll(range(len(shape)), int(rng.integers(1, len(shape))))
            order = f"order {','.join(map(str, axes))} "
            grid = replace(grid, shape=tuple(shape[axis] for axis in axes))
    if kind == "sinks":
        body = f"sinks {rng.integers(0, 2)} window {rng.integers(0, 2)}"
    elif kind == "columns":
        body = f"columns {rng.integers(count)},{rng.integers(count)} diagonals {rng.integers(1, count)}"
    elif kind == "diagonals":
        body = f"diagonals {rng.integers(1 - count, count)}"
    elif kind == "grid":
        assert grid is not None
        body = f"grid {'x'.join(str(rng.integers(1, side + 1)) for side in grid.shape)}"
    else:
        seen = rng.random((count, count)) < rng.random()
        body = bitmap(seen).text
        bits[body] = seen
    return order + body + (f" rest {rest}" if rest and rng.random() < 0.7 else "")


def random_site(seed: int) -> RandomSite:
    rng = np.random.default_rng(seed)
    causal, edge = bool(rng.random() < 0.35), int(rng.choice([64, 64, 128]))
    grid = None
    if rng.random() < 0.6:
        shape = [(13, 11), (4, 7, 9), (19, 10), (173,), (3, 5, 13)][int(rng.integers(5))]
        grid = TokenGrid(shape, int(rng.choice([0, 1, 70])), int(rng.choice([0, 5])))
    tokens = grid.tokens if grid is not None else int(rng.choice([rng.integers(130, 400), 256, 129, 192]))
    padded = bool(rng.random() < 0.25)
    rest = 0 if padded else int(rng.choice([0, 0, 1, 4, 16, 64]))
    kv_heads, group, batch = (int(rng.choice(x)) for x in ([1, 2], [1, 2, 3], [1, 2]))
    bits: dict[str, np.ndarray] = {}
    geometry = BlockGeometry(tokens, edge, causal, grid)
    texts = [random_text(rng, geometry, rest, causal or padded, bits) for _ in range(kv_heads * group)]
    if not (causal or padded or rest):
        texts = ["mean" if text == "skip" else text for text in texts]
    shown = None
    if padded:
        shown = rng.random((batch, 1, 1, tokens)) < 0.8
        shown[0, ..., : int(rng.integers(tokens))] = False
    half = bool(rng.random() < 0.3)
    dim, value_dim = int(rng.choice([8, 16, 32])), int(rng.choice([1, 8, 20]))
    scale = float(rng.choice([dim**-0.5, 0.3]))
    dynamic = bool(rng.random() < 0.5)

    class Made(Case):
        def site(self, **changes: Any) -> AttentionSite:
            return super().site(**{"grid": grid, "batch": "B" if dynamic else batch, **changes})

    q, k, v, o = (str(x) for x in rng.choice(LAYOUTS, 4))
    at = Made(
        batch=batch, queries=tokens, heads=len(texts), kv_heads=kv_heads, head_dim=dim, value_dim=value_dim,
        layouts=(q, k, v, o), dtype="float16" if half else "float32", softmax_dtype="float32", scale=scale, static=True,
        key_mask=shown, causal=causal, seed=seed,
    )  # fmt: skip
    return RandomSite(tokens, edge, causal, grid, tuple(texts), bits, scale, at)


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_what_runs_is_what_was_asked_for(first: int) -> None:
    for seed in range(first, first + 20):
        made = random_site(seed)
        at, texts = made.case, list(made.texts)
        given = at.tensors()
        want = np.zeros((*given["q"].shape[:3], at.value_dim))
        shown = np.ones((at.batch, made.tokens), bool) if at.key_mask is None else at.key_mask[:, 0, 0]
        for b, h in np.ndindex(at.batch, at.heads):
            g = h // (at.heads // at.kv_heads)
            want[b, :, h] = head(
                made, texts[h], given["q"][b, :, h], given["k"][b, :, g], given["v"][b, :, g], shown[b]
            )
        parameters = {"edge": made.edge, "heads": texts}
        assert SUBJECT.supports(at.site(), parameters).ok, (seed, texts)
        got = at.run(SUBJECT, parameters).astype(np.float64)
        near = 2e-6 if at.dtype == "float32" else 4e-3
        assert np.isfinite(got).all() and (not want.any() or relative_error(got, want) < near), (seed, texts)
        assert want.any() or not got.any(), seed
        counted = [made.blocks(text) for text in texts]
        assert [BlockPattern(text).computed(made.geometry) for text in texts] == pytest.approx(counted), (seed, texts)
        share = sum(counted) / (len(texts) * made.geometry.all.sum())
        assert density([BlockPattern(text) for text in texts], made.geometry) == pytest.approx(share)


@pytest.mark.parametrize("first", range(200, 260, 20))
def test_what_the_search_says_of_it(first: int) -> None:
    """Of one head all texts of the site, the rows of blocks all or every second: what is lost relative to the dense
    output, and blocks.
    """
    for seed in range(first, first + 20):
        made = random_site(seed)
        at, rng = made.case, np.random.default_rng(seed)
        h = int(rng.integers(at.heads))
        g = h // (at.heads // at.kv_heads)
        given = {n: x[0].astype(np.float32).transpose(1, 0, 2) for n, x in at.tensors().items()}
        shown = np.ones(made.tokens, bool) if at.key_mask is None else at.key_mask[0, 0, 0]
        operands = maps.Operands(
            given["q"], given["k"], given["v"], made.scale, shown if at.key_mask is not None else None
        )
        count = made.geometry.count
        which = range(seed % 2, count, 1 + int(rng.integers(2)))
        texts = [*dict.fromkeys(made.texts), "dense"]
        found, blocks = tasks._scored(operands, made.geometry, h, texts, which)
        said = [head(made, text, given["q"][h], given["k"][g], given["v"][g], shown) for text in texts]
        for k, text in enumerate(texts):
            one = made.meant(text)
            tokens = one.places[np.isin(np.arange(made.tokens) // made.edge, which)]
            size = np.square(said[-1][tokens]).sum()
            lost = np.square(said[k] - said[-1])[tokens].sum()
            if size:
                assert found.error[k] / found.size == pytest.approx(lost / size, rel=2e-3, abs=1e-6), (seed, text)
            means = len(which) * (made.tokens // made.edge) / one.rest if one.rest else 0
            assert blocks[k] == pytest.approx(one.seen[list(which)].sum() + means), (seed, text)


def test_random_sites_are_of_all_kinds() -> None:
    """The sites above hold what they are there for."""
    made = [random_site(seed) for seed in range(120)]
    texts = [text for one in made for text in one.texts]
    for word in ("order", " rest ", "grid", "blocks", "columns", "diagonals", "mean", "skip", "dense", "x"):
        assert sum(word in text for text in texts) >= 10, word
    assert sum("order" in text and " rest " in text for text in texts) >= 10
    assert sum(len({"order" in t for t in one.texts}) == 2 and one.case.kv_heads < one.case.heads for one in made) >= 5
    assert sum(one.case.key_mask is not None for one in made) >= 10 <= sum(one.causal for one in made)
