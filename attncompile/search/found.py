"""What a search found: for the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class HeadFound:
    """One head: its pattern's text and kind, share of dense blocks, squared change of the site's output that it causes
    relative to that output, and share of the attention weight that it keeps. ``mass`` [R, R] is its mean map, ``seen``
    bool [R, R] what it meets, both in the order of its tokens.
    """

    pattern: str
    kind: str
    density: float
    damage: float
    kept: float
    mass: np.ndarray
    seen: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern, "kind": self.kind, "density": round(self.density, 6),
            "damage": float(f"{self.damage:.6g}"), "kept": round(self.kept, 6),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One whole model that was measured: predicted time of all attention relative to that of the sites as they are,
    mean error of the calibration inputs (of those that showed the budget to be lost, if it was), and the bound for
    further ones. Errors grow with distance whatever the metric: see ``tasks.badness``.
    """

    time: float
    mean: float
    bound: float
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"time": self.time, "mean": _number(self.mean), "bound": _number(self.bound), "chosen": self.chosen}


@dataclass(frozen=True, slots=True, eq=False)
class SearchReport:
    """``budget`` None: a density was asked for. ``held`` are the errors of inputs that chose nothing; ``refused``: how
    many choices they turned down. ``set_aside`` of all ``inputs`` are those that the rule ``keep_dense`` holds of: they
    took no part. ``sites``: heads of every site that was replaced head by head.
    """

    metric: str
    budget: float | None
    confidence: float
    calibration: int
    points: tuple[CurvePoint, ...] = ()
    held: tuple[float, ...] = ()
    refused: int = 0
    density: float | None = None
    sites: Mapping[str, tuple[HeadFound, ...]] = field(default_factory=dict)
    keep_dense: str = ""
    set_aside: int = 0
    inputs: int = 0

    @property
    def density_of_inputs(self) -> float | None:
        """Share of the blocks over all ``inputs`` that were given, 1 where nothing is approximated."""
        if self.density is None or not self.inputs:
            return self.density
        return (self.set_aside + (self.inputs - self.set_aside) * self.density) / self.inputs

    def only(self, sites: Collection[str]) -> SearchReport:
        """Without the heads of sites that were undone later; then what was measured of the whole choice is not of the
        model that is there.
        """
        left = {name: heads for name, heads in self.sites.items() if name in sites}
        if len(left) == len(self.sites):
            return self
        points = tuple(replace(p, chosen=False) for p in self.points)
        return replace(self, sites=left, points=points, held=(), density=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "budget": self.budget, "confidence": self.confidence,
            "calibration": self.calibration, "points": [p.to_json() for p in self.points],
            "held": [_number(e) for e in self.held], "refused": self.refused, "density": self.density,
            "keep_dense": self.keep_dense, "set_aside": self.set_aside, "density_of_inputs": self.density_of_inputs,
            "sites": {name: [h.to_json() for h in heads] for name, heads in self.sites.items()},
        }  # fmt: skip


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
