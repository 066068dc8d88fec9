"""What maps are fitted to: queries, keys and values of softmax sites as the original model computes them.

Read input by input in groups of sites below a bound, and kept in files: one for each key head and input, with some rows
of queries and all keys and values. No process holds more than a group, or a key head of all inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from attncompile import measure
from attncompile.core.site import AttentionSite
from attncompile.measure import Provider
from attncompile.search.arrays import load, save


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One batch entry of one key head. ``query`` [heads, R, D] are the rows ``rows`` [R] of its query heads; ``key``
    [N, D], ``value`` [N, Dv]; float32.
    """

    query: np.ndarray
    rows: np.ndarray
    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True, slots=True)
class Place:
    """Where one site's operands are, in the model and on disk."""

    number: int
    site: str
    names: tuple[str, str, str]
    layouts: tuple[str, str, str]
    folder: Path

    def file(self, head: int, entry: int) -> Path:
        return self.folder / f"{self.number}-{head}-{entry}.npz"


def place(number: int, site: AttentionSite, folder: Path) -> Place:
    operands = (site.query, site.key, site.value)
    names, layouts = tuple(o.value for o in operands), tuple(o.layout for o in operands)
    assert len(names) == len(layouts) == 3
    return Place(number, site.id, (names[0], names[1], names[2]), (layouts[0], layouts[1], layouts[2]), folder)


@dataclass(frozen=True, slots=True)
class Capture:
    """Writes the entries of one group of sites for one input, numbered from ``entry`` on (a batch has several); gives
    their number. ``stamp`` tells models apart that were written to one path.
    """

    model: Path
    feed: Path
    places: tuple[Place, ...]
    rows: int
    entry: int
    seed: int
    stamp: str
    provider: Provider = "cpu"

    def __call__(self, threads: int) -> int:
        given = load(self.feed)
        wanted = sorted({n for p in self.places for n in p.names} - given.keys())
        session = _session(self.model, self.stamp, threads, self.provider)
        values = {**given, **dict(zip(wanted, measure.run_session(session, given, wanted), strict=True))}
        count = 0
        for p in self.places:
            query, key, value = (
                np.asarray(values[n], np.float32).transpose(0, 2, 1, 3) if at == "BNHD" else
                np.asarray(values[n], np.float32)
                for n, at in zip(p.names, p.layouts, strict=True)
            )  # fmt: skip
            count, group = len(query), query.shape[1] // key.shape[1]
            for b in range(count):
                rng = np.random.default_rng([self.seed, self.entry, b])
                rows = np.sort(rng.permutation(query.shape[2])[: self.rows])
                for g in range(key.shape[1]):
                    save(p.file(g, self.entry + b), {
                        "query": query[b, g * group : (g + 1) * group, rows].transpose(1, 0, 2), "rows": rows,
                        "key": key[b, g], "value": value[b, g],
                    })  # fmt: skip
        return count


@lru_cache(maxsize=1)
def _session(model: Path, stamp: str, threads: int, provider: Provider) -> Any:
    return measure.open_session(model, threads, provider=provider)


def entries(place: Place, head: int, numbers: Sequence[int]) -> list[Entry]:
    """What was captured of one key head."""
    found = []
    for n in numbers:
        held = load(place.file(head, n))
        found.append(Entry(held["query"], held["rows"], held["key"], held["value"]))
    return found
