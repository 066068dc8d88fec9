"""The search's work, in pieces that another process or machine can do: each names files that it reads, and is pickled.

A task is called with the number of threads it may use. Files must be where all workers see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from attncompile import measure, metrics
from attncompile.core import block_selection
from attncompile.core.block_pattern import MEAN, BlockGeometry, BlockPattern, text_of
from attncompile.core.block_selection import BlockSelection, rest_of
from attncompile.core.errors import AttncompileError, MissingDependency
from attncompile.measure import Provider
from attncompile.search import maps
from attncompile.search.arrays import load, save
from attncompile.verification.next_token import NextToken

ROWS = 32
"""Rows of blocks of a head that are scored for one input; of longer sequences every second, third, ... row, beginning
at another one for each input."""


class Task(Protocol):
    """Anything that can be pickled and called."""

    def __call__(self, threads: int) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class HeadSite:
    """What is needed of a site to score its heads: names of its operands and of its padding in the model, and how they
    lie. ``weights`` [H, Dv, Dv] as in ``maps.Operands``; ``orders``: of the grid's axes, in which maps are made too.
    """

    site: str
    names: tuple[str, str, str]
    layouts: tuple[str, str, str]
    scale: float
    geometry: BlockGeometry
    padding: str = ""
    weights: np.ndarray | None = None
    orders: tuple[tuple[int, ...], ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        return (*self.names, *([self.padding] if self.padding else []))

    def operands(self, values: Mapping[str, np.ndarray]) -> list[maps.Operands]:
        """One for each batch entry."""
        arrays = []
        for name, layout in zip(self.names, self.layouts, strict=True):
            array = np.asarray(values[name], np.float32)
            arrays.append(array.transpose(0, 2, 1, 3) if layout == "BNHD" else array)
        query, key, value = (np.ascontiguousarray(a) for a in arrays)
        shown = None
        if self.padding:
            shown = np.asarray(values[self.padding]) != 0
            shown = np.broadcast_to(shown.reshape(shown.shape[0], -1), (len(query), self.geometry.tokens))
        return [
            maps.Operands(q, k, v, self.scale, None if shown is None else shown[i], self.weights)
            for i, (q, k, v) in enumerate(zip(query, key, value, strict=True))
        ]


def groups(sites: Sequence[HeadSite], sizes: Mapping[str, int], limit: int) -> list[list[HeadSite]]:
    """Sites whose operands together stay below ``limit`` bytes."""
    found: list[list[HeadSite]] = [[]]
    held = 0
    for site in sites:
        need = sum(sizes.get(name, 0) for name in site.read)
        if found[-1] and held + need > limit:
            found.append([])
            held = 0
        found[-1].append(site)
        held += need
    return [g for g in found if g]


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """Maps of all heads of one group of sites for one input: site -> float32 [H, R, R], and those of other
    orders by ``ordered_name``.
    """

    model: Path
    feed: Path
    sites: tuple[HeadSite, ...]
    provider: Provider = "cpu"

    def __call__(self, threads: int) -> dict[str, np.ndarray]:
        values = _captured(self.model, self.feed, self.sites, threads, self.provider)
        found: dict[str, np.ndarray] = {}
        for site in self.sites:
            entries = site.operands(values)
            heads, geometry = range(entries[0].heads), entries[0].geometry(site.geometry)
            orders = [] if geometry.grid is None else [geometry.grid.ordered(order) for order in site.orders]
            made = [np.mean([maps.ordered_masses(e, geometry, h, orders) for e in entries], axis=0) for h in heads]
            names = [site.site, *(ordered_name(site.site, order) for order in site.orders)]
            found |= {name: np.stack([m[i] for m in made]).astype(np.float32) for i, name in enumerate(names)}
        return found


def ordered_name(site: str, order: Sequence[int]) -> str:
    """Of a site's maps in another order of the tokens."""
    return f"{site}/order {text_of(order)}"


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Errors of all candidates of one group of sites for one input: site -> (squared changes [H][K] relative to the
    squared size of the site's output, shares of the weight that are kept [H][K], shares of the blocks that are
    computed [H][K]). ``number`` of the input.
    """

    model: Path
    feed: Path
    sites: tuple[HeadSite, ...]
    candidates: Mapping[str, Sequence[Sequence[str]]]
    number: int
    provider: Provider = "cpu"

    def __call__(self, threads: int) -> dict[str, tuple[list[np.ndarray], ...]]:
        values = _captured(self.model, self.feed, self.sites, threads, self.provider)
        found: dict[str, tuple[list[np.ndarray], ...]] = {}
        for site in self.sites:
            entries = site.operands(values)
            geometry = entries[0].geometry(site.geometry)
            count = geometry.count
            step = -(-count // ROWS)
            which = range(self.number % step, count, step)
            errors, kept, shares, size = [], [], [], 0.0
            for head, texts in enumerate(self.candidates[site.site]):
                scored = [_scored(e, geometry, head, texts, which) for e in entries]
                errors.append(np.sum([s.error for s, _ in scored], axis=0))
                kept.append(np.mean([s.kept for s, _ in scored], axis=0))
                shares.append(np.mean([met for _, met in scored], axis=0) / geometry.all[which].sum())
                size += sum(s.size for s, _ in scored)
            found[site.site] = ([e / max(size, 1e-300) for e in errors], kept, shares)
        return found


def _scored(
    operands: maps.Operands, geometry: BlockGeometry, head: int, texts: Sequence[str], which: Sequence[int]
) -> tuple[maps.HeadScores, np.ndarray]:
    """Of one head its choices, and how many blocks of the rows ``which`` each computes [K]. A pattern in another order
    of the tokens is scored in it, on the rows ``which`` of that order, relative to what they weigh.
    """
    by_order: dict[tuple[int, ...], dict[str, None]] = {(): {}}  # each text once
    for text in texts:
        order = () if block_selection.is_selection(text) else BlockPattern(text).order
        by_order.setdefault(order, {})[text] = None
    found: dict[str, tuple[float, float, float]] = {}
    size = 0.0
    for order, once in by_order.items():
        same = list(once)
        if not same:
            continue
        there, at = operands, head
        if order:
            there, at = operands.ordered(head, BlockPattern(same[0]).places(geometry)), 0
        met = chosen(there, geometry, at, same, which)
        averaged, rests = [k for k, text in enumerate(same) if text == MEAN.text], [rest_of(text) for text in same]
        made = maps.score(there, geometry, at, met, which, averaged, rests)
        size = size or made.size
        error = made.error * (size / made.size if made.size > 0 else 1.0)
        means = [len(which) * (geometry.tokens // geometry.edge) / rest if rest else 0.0 for rest in rests]
        blocks_of = met[:, which].sum(axis=(1, 2)) + means
        found |= dict(zip(same, zip(error, made.kept, blocks_of, strict=True), strict=True))
    error, kept, blocks = (np.array(column) for column in zip(*(found[text] for text in texts), strict=True))
    return maps.HeadScores(error, kept, size), blocks


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Blocks that each head meets on one input: site -> bool [H, R, R]. ``texts`` [H] of each site."""

    model: Path
    feed: Path
    sites: tuple[HeadSite, ...]
    texts: Mapping[str, Sequence[str]]
    provider: Provider = "cpu"

    def __call__(self, threads: int) -> dict[str, np.ndarray]:
        values = _captured(self.model, self.feed, self.sites, threads, self.provider)
        found = {}
        for site in self.sites:
            entry = site.operands(values)[0]
            geometry = entry.geometry(site.geometry)
            every = range(geometry.count)
            found[site.site] = np.stack(
                [chosen(entry, geometry, h, [text], every)[0] for h, text in enumerate(self.texts[site.site])]
            )
        return found


LOSS = "loss of the next token"
"""Name of what is kept of logits where a perplexity is asked for: of 8,192 tokens they take 134 MB and more."""


def chosen(
    operands: maps.Operands, geometry: BlockGeometry, head: int, texts: Sequence[str], which: Sequence[int]
) -> np.ndarray:
    """Bool [K, R, R]: what each pattern meets in its order, or chooses for these operands; of the latter only the rows
    ``which``.
    """
    weights: dict[tuple[str, int], np.ndarray] = {}
    found = []
    for text in texts:
        if not block_selection.is_selection(text):
            found.append(BlockPattern(text).blocks(geometry))
            continue
        selection = BlockSelection(text)
        if selection.family not in weights:
            key = operands.key[head // (operands.heads // operands.key.shape[0])]
            weights[selection.family] = block_selection.weights(
                operands.query[head], key, operands.scale, geometry, selection.family, which
            )
        mass = weights[selection.family]
        found.append(block_selection.kept(mass, selection.amount, selection.rule, geometry.causal))
    return np.stack(found)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Runs the original once and keeps its outputs in ``out`` (.npz); with ``language`` the logits and the loss, or
    without ``whole`` the loss alone.
    """

    model: Path
    feed: Path
    out: Path
    provider: Provider = "cpu"
    language: NextToken | None = None
    whole: bool = True

    def __call__(self, threads: int) -> None:
        session = _session(self.model, "baseline", threads, self.provider)
        names = [o.name for o in session.get_outputs()]
        feed = load(self.feed)
        values = dict(zip(names, measure.run_session(session, feed, names), strict=True))
        kept = dict(values)
        if self.language is not None:
            kept = {self.language.logits: values[self.language.logits]} if self.whole else {}
            kept[LOSS] = np.array(self.language.loss(values, feed))
        save(self.out, kept)


@dataclass(frozen=True, slots=True)
class Error:
    """How far the model's outputs are from those of ``baseline``, by ``metric``, the worst output's: see ``badness``.
    Infinite where the model does not run, gives NaN, or changes whole numbers. With ``language`` the logits alone
    count; of perplexity it is the logarithm of the rise, which may be negative.
    """

    model: Path
    stamp: str
    feed: Path
    baseline: Path
    metric: str
    provider: Provider = "cpu"
    language: NextToken | None = None

    def __call__(self, threads: int) -> float:
        feed = load(self.feed)
        try:
            session = _session(self.model, self.stamp, threads, self.provider)
            names = [self.language.logits] if self.language else [o.name for o in session.get_outputs()]
            ours = dict(zip(names, measure.run_session(session, feed, names), strict=True))
        except MissingDependency:
            raise
        except AttncompileError:
            return float("inf")
        if self.language is not None and self.metric == "perplexity":
            rise = self.language.loss(ours, feed) - float(load(self.baseline, [LOSS])[LOSS])
            return rise if np.isfinite(rise) else float("inf")
        stored = {n: v for n, v in load(self.baseline).items() if n in names or self.language is None}
        return max(distance(value, ours[name], self.metric) for name, value in stored.items())


def distance(reference: np.ndarray, ours: np.ndarray, metric: str) -> float:
    """``badness`` of one output."""
    if reference.shape != ours.shape or reference.dtype != ours.dtype:
        return float("inf")
    if reference.dtype.kind in "iub":
        return 0.0 if np.array_equal(reference, ours) else float("inf")
    if not np.isfinite(reference).all() or not np.isfinite(ours).all():
        return float("inf")
    name = {"kl": "kl_divergence"}.get(metric, metric)
    return badness(metric, getattr(metrics, name)(reference, ours))


def badness(metric: str, value: float) -> float:
    """``value`` as a number that is 0 for equal outputs and grows with their distance: 1 - cosine, 1 - agreement, and
    of PSNR the noise's amplitude relative to the peak, of perplexity's rise the logarithm.
    """
    if np.isnan(value):
        return float("inf")
    if metric == "perplexity":
        return float(np.log1p(value))
    if metric in ("cosine", "top1_agreement"):
        return max(1.0 - value, 0.0)
    if metric == "psnr":
        return float(10 ** (-value / 20))
    return float(value)


POWER = {
    "relative_l2": 0.5, "max_abs": 0.5, "psnr": 0.5, "cosine": 1.0, "kl": 1.0, "top1_agreement": 0.5, "perplexity": 1.0,
}  # fmt: skip
"""Badness grows like damage, a squared distance, to this power where both are small."""

TOGETHER = frozenset({"perplexity"})
"""Metrics of which the mean badness over inputs keeps the budget, not that of each input."""

PROBE = {"perplexity": "kl", "kl": "kl"}
"""What tells how much a site's change matters, by metric; others: relative L2. A rise of perplexity is the difference
of two noisy numbers where little is changed; its mean is the divergence of the two distributions."""


_KEPT: dict[Provider, int] = {"cpu": 2, "cuda": 1}
"""Sessions that a worker keeps open: one holds the memory of a run, and all workers share one GPU's."""

_open: dict[tuple[Path, str, int, Provider], Any] = {}


def _session(model: Path, stamp: str, threads: int, provider: Provider) -> Any:
    """``stamp`` tells models apart that were written to one path."""
    key = (model, stamp, threads, provider)
    session = _open.pop(key, None)
    if session is None:
        while len(_open) >= _KEPT[provider]:
            del _open[next(iter(_open))]  # before the next is there
        session = measure.open_session(model, threads, provider=provider, lean=True)
    _open[key] = session
    return session


def _captured(
    model: Path, feed: Path, sites: Sequence[HeadSite], threads: int, provider: Provider
) -> dict[str, np.ndarray]:
    given = load(feed)
    wanted = sorted({name for s in sites for name in s.read} - given.keys())
    session = _session(model, "capture", threads, provider)
    return {**given, **dict(zip(wanted, measure.run_session(session, given, wanted), strict=True))}
