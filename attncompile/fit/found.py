"""How far fitted maps are from the attention that they stand for: for reports.

Everything is of inputs that were not fitted on (``held``) where there are any, beside the same of those that were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

COLUMNS = ("site", "map", "KL", "map L1", "output L2", "worst head", "fitted on", "at the model", "predicted")


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one head, means over the rows of all inputs of a part: ``kl`` of the map (NaN where weights may be negative),
    ``l1`` (sum of |difference| over a row, between 0 and 2 for weights that are positive and sum to 1), ``output``:
    relative L2 of the head's output; ``size`` is the squared size of that.
    """

    kl: float
    l1: float
    output: float
    size: float


@dataclass(frozen=True, slots=True)
class FitMap:
    """One kind at one site: distances of every head on held-out inputs and on the fitted ones. ``model`` is the metric
    at the model's outputs with this site alone replaced, ``gain`` the predicted gain of the site; ``refused`` says why
    there is nothing.
    """

    kind: str
    digest: str = ""
    held: tuple[Distance, ...] = ()
    known: tuple[Distance, ...] = ()
    model: float | None = None
    gain: float | None = None
    refused: str = ""

    @property
    def output(self) -> float:
        """Relative L2 of the site's output on held-out inputs."""
        return output_of(self.held)

    def to_json(self) -> dict[str, Any]:
        if self.refused:
            return {"map": self.kind, "refused": self.refused}
        return {
            "map": self.kind, "fit": self.digest, "kl": _mean(self.held, "kl"), "l1": _mean(self.held, "l1"),
            "output": number(self.output), "output_fitted_on": number(output_of(self.known)),
            "model": None if self.model is None else number(self.model), "gain": self.gain,
            "heads": [{n: number(getattr(d, n)) for n in ("kl", "l1", "output")} for d in self.held],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class FitSite:
    """One site: its maps, or why there are none."""

    site: str
    maps: tuple[FitMap, ...] = ()
    refused: str = ""

    @property
    def best(self) -> FitMap | None:
        """The map whose output is nearest on the inputs that it was fitted on: the others choose nothing."""
        made = [m for m in self.maps if not m.refused and isfinite(output_of(m.known))]
        return min(made, key=lambda m: output_of(m.known), default=None)

    def to_json(self) -> dict[str, Any]:
        return {"site": self.site, "refused": self.refused or None, "maps": [m.to_json() for m in self.maps]}


@dataclass(frozen=True, slots=True)
class FitReport:
    """All sites. ``together``: the metric with the best map at every site that has one. ``inputs`` counts those that
    were fitted on, ``held`` those that were not; without any, everything is of the former.
    """

    metric: str
    inputs: int
    held: int
    sites: tuple[FitSite, ...]
    together: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def why(self, site: str) -> str:
        """In words how near the best map of a site comes; empty where nothing was fitted."""
        found = next((s for s in self.sites if s.site == site), None)
        best = found.best if found is not None else None
        if found is None:
            return ""
        if best is None:
            return found.refused or "; ".join(dict.fromkeys(m.refused for m in found.maps if m.refused))
        text = f"its nearest fitted map ({best.kind}) changes its output by {best.output:.2g}"
        return text + (f" and the model's by {best.model:.2g} ({self.metric})" if best.model is not None else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "inputs": self.inputs, "held": self.held, "settings": dict(self.settings),
            "together": None if self.together is None else number(self.together),
            "sites": [s.to_json() for s in self.sites],
        }  # fmt: skip


def rows(report: FitReport) -> Iterator[tuple[str, ...]]:
    """Of the table with ``COLUMNS``: the site's name stands in its first row."""
    for site in report.sites:
        for place, m in enumerate([m for m in site.maps if not m.refused]):
            name = site.site if place == 0 else ""
            kl, l1 = _mean(m.held, "kl"), _mean(m.held, "l1")
            yield (
                name, m.kind, _text(kl), _text(l1), _text(m.output), _text(max(d.output for d in m.held)),
                _text(output_of(m.known)), _text(m.model), "" if m.gain is None else f"{m.gain:.2f}x",
            )  # fmt: skip


def lines(report: FitReport) -> list[str]:
    """What stands below the table."""
    made = sum(s.best is not None for s in report.sites)
    on = f"{report.held} inputs that nothing was fitted on" if report.held else "the inputs that were fitted on"
    text = [f"distances on {on}; fitted on {report.inputs}; at the model: {report.metric}, the site alone replaced"]
    if not report.held:
        text.append("one input: nothing is said of others, give more with --inputs")
    closing = f"{made} of {len(report.sites)} softmax sites have fitted maps"
    if report.together is not None:
        closing += f"; the nearest at all of them together: {report.metric} {report.together:.3g}"
    refused: dict[str, list[str]] = {}
    for s in report.sites:
        for what, reason in ((s.site, s.refused), *((f"{s.site} ({m.kind})", m.refused) for m in s.maps)):
            if reason:
                refused.setdefault(reason, []).append(what)
    left = [f"{', '.join(names)}: {reason}" for reason, names in refused.items()]
    return [*(text if made else []), *left, closing]


def output_of(heads: tuple[Distance, ...]) -> float:
    """Relative L2 of all heads' outputs together."""
    if not heads:
        return float("inf")
    size = sum(d.size for d in heads)
    changed = sum(d.output**2 * d.size for d in heads)
    return float(np.sqrt(changed / size)) if size > 0 else float("inf")


def number(value: float) -> float | None:
    return float(f"{value:.6g}") if isfinite(value) else None


def _mean(heads: tuple[Distance, ...], name: str) -> float | None:
    return number(float(np.mean([getattr(d, name) for d in heads]))) if heads else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
