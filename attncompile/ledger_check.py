"""The user's inputs against the assumptions of the replacements: what breaks one is named, and fails the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attncompile import measure
from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.mask import MaskPart
from attncompile.core.plan import Decision
from attncompile.core.site import AttentionSite
from attncompile.ledger import HIDES, Ledger
from attncompile.passes.evaluate import World, slice_model

Feed = Mapping[str, np.ndarray]
LARGEST = 1 << 26
"""Elements of a query-by-key mask above which rows are looked at in pieces only for windows."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An assumption that one set of inputs breaks. ``text`` names the input, the file, what was assumed and found."""

    text: str
    sites: tuple[str, ...]


class LedgerCheck:
    """Looks at all sets of ``feeds``, read from ``source``; equal findings of several sites become one."""

    def __init__(
        self, ledger: Ledger, feeds: Sequence[Feed], world_of: Callable[[Feed], World], source: Path
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._feeds = feeds
        self._world_of = world_of
        self._source = source
        self._values: dict[tuple[int, str], np.ndarray | None] = {}

    def broken(self, decided: Sequence[tuple[AttentionSite, Decision]]) -> tuple[Broken, ...]:
        """What the inputs break, in the order of the inputs; nothing if all holds."""
        found: dict[str, list[str]] = {}
        for number in range(len(self._feeds)):
            for site, decision in decided:
                for text in self._of_site(number, site, decision):
                    found.setdefault(text, []).append(site.id)
        return tuple(Broken(text, tuple(ids)) for text, ids in found.items())

    def of_any(self, sites: Sequence[AttentionSite]) -> tuple[Broken, ...]:
        """What breaks every replacement of ``sites``, whatever it will be: inputs that are not finite, or of sizes that
        the profile does not have.
        """
        found: dict[str, list[str]] = {}
        for number in range(len(self._feeds)):
            for site in sites:
                for text in self._sizes(number, site) + self._finite(number, self._ledger.float_inputs(site)):
                    found.setdefault(text, []).append(site.id)
        return tuple(Broken(text, tuple(ids)) for text, ids in found.items())

    def _of_site(self, number: int, site: AttentionSite, decision: Decision) -> list[str]:
        kinds = {a.kind for a in decision.assumptions if a.checked}
        texts = []
        if "sizes" in kinds:
            texts += self._sizes(number, site)
        for a in decision.assumptions:
            if a.checked and a.kind == "finite":
                texts += self._finite(number, a.inputs)
        for part in site.mask.parts:
            if part.kind == "padding" and "padding" in kinds:
                texts += self._padding(number, part)
        if "masked-rows" in kinds:
            texts += self._masked_rows(number, site)
        return texts

    def _say(self, name: str, number: int, found: str, assumed: str) -> str:
        return f"input '{name}' of {self._source.name}, set {number}: {found}; assumed {assumed}"

    def _sizes(self, number: int, site: AttentionSite) -> list[str]:
        axes, feed = self._ledger.axes(), self._feeds[number]
        texts = []
        for symbol in self._ledger.symbols(site):
            r = self._ledger.profile.ranges[symbol]
            for name, axis in axes.get(symbol, []):
                size = feed[name].shape[axis] if name in feed else r.usual
                empty = r.assumed and not size  # nobody said that it may not be; the whole model is compared on it
                if not r.minimum <= size <= r.maximum and not empty:
                    assumed = f"{r.minimum} to {r.maximum} (--profile)"
                    texts.append(self._say(name, number, f"{symbol} is {size}", assumed))
                    break
        return texts

    def _finite(self, number: int, names: Sequence[str]) -> list[str]:
        texts = []
        for name in names:
            values = np.asarray(self._feeds[number][name]).astype(np.float32)
            bad = int(values.size - np.isfinite(values).sum())
            if bad:
                what = "NaN" if np.isnan(values).any() else "infinite"
                texts.append(self._say(name, number, f"{bad} of {values.size} values are {what}", "finite values"))
        return texts

    def _padding(self, number: int, part: MaskPart) -> list[str]:
        direct = self._ledger.direct_float(part)
        if direct and not part.additive:
            values = np.asarray(self._feeds[number][direct]).astype(np.float64)
            odd = values[(values != 0) & (values != 1)]
            return [self._say(direct, number, f"values {_some(odd)}", "0 or 1")] if odd.size else []
        if not part.additive or (values_of := self._value(number, part.source or "")) is None:
            return []
        values = values_of.astype(np.float64)
        odd = values[~((values == 0) | (values <= HIDES))]
        name = ", ".join(self._ledger.data_inputs(part.source or ""))
        found = f"it adds {_some(odd)} to the scores"
        return [self._say(name, number, found, f"0, or {HIDES:g} and less")] if odd.size else []

    def _masked_rows(self, number: int, site: AttentionSite) -> list[str]:
        parts = [p for p in site.mask.parts if p.kind == "padding"]
        world = self._world_of(self._feeds[number])
        q, k = (world.shapes.get(o.value) for o in (site.query, site.key))
        if q is None or k is None:
            return []
        queries, keys = q[site.query.layout.index("N")], k[site.key.layout.index("N")]
        seen = np.ones((1, keys), bool)
        for part in parts:
            value = self._value(number, part.source or "")
            if value is None:
                return []
            value = value[:, None, None] if part.tokens else value
            visible = value.astype(np.float64) > HIDES if part.additive else value.astype(bool)
            seen = seen & np.broadcast_to(visible, np.broadcast_shapes(visible.shape, (1, 1, 1, keys))).reshape(
                -1, keys
            )
        alive = _alive(site, seen, queries)
        if alive is None or alive.all():
            return []
        entry, row = (int(x) for x in np.argwhere(~alive)[0])
        name = ", ".join(self._ledger.data_inputs(*(p.source or "" for p in parts)))
        found = f"query {row} of batch entry {entry} sees no key ({int((~alive).sum())} such queries)"
        return [self._say(name, number, found, "that every query sees one")]

    def _value(self, number: int, source: str) -> np.ndarray | None:
        """What the model computes for ``source``, a value made of inputs; None where it cannot be had alone."""
        key = (number, source)
        if key not in self._values:
            self._values[key] = None
            feed = self._feeds[number]
            try:
                model, needed = slice_model(self._world_of(feed), [source])
                if all(n in feed for n in needed):
                    session = measure.open_session(model.SerializeToString(), None, "basic")
                    self._values[key] = measure.run_session(session, {n: feed[n] for n in needed}, [source])[0]
            except (Unsupported, AttncompileError):
                pass  # not computable alone: the whole model's outputs are compared on these inputs in any case
        return self._values[key]


def _alive(site: AttentionSite, seen: np.ndarray, queries: int) -> np.ndarray | None:
    """Bool [batch, queries]: whether the query sees a key (in every head), by ``seen`` ([batch, keys]) and the mask's
    structure. None where the structure says nothing at this size.
    """
    keys = seen.shape[1]
    left, right = -1, -1
    visible: np.ndarray | None = None
    for part in site.mask.parts:
        if part.kind in ("window", "causal"):
            left = part.left if left < 0 else min(left, part.left) if part.left >= 0 else left
            right = part.right if right < 0 else min(right, part.right) if part.right >= 0 else right
        elif part.pattern is not None and queries * keys <= LARGEST:
            try:
                other = part.pattern.visible(queries, keys)
            except ValueError:
                return None
            visible = other if visible is None else visible & other
    position = np.arange(queries) + keys - queries
    first = np.clip(position - left, 0, keys) if left >= 0 else np.zeros(queries, int)
    end = np.clip(position + right + 1, 0, keys) if right >= 0 else np.full(queries, keys)
    if visible is not None:
        column = np.arange(keys)
        visible = visible & (column[None] >= first[:, None]) & (column[None] < end[:, None])
        return np.stack([(visible & row).any(axis=-1).reshape(-1, queries).all(axis=0) for row in seen])
    count = np.concatenate([np.zeros((seen.shape[0], 1), int), np.cumsum(seen, axis=1)], axis=1)
    return np.asarray(count[:, np.maximum(end, first)] > count[:, first])


def _some(values: np.ndarray) -> str:
    """At most three different numbers of ``values``."""
    distinct = np.unique(values)[:4]
    return ", ".join(f"{x:g}" for x in distinct[:3]) + (", ..." if distinct.size > 3 else "")
