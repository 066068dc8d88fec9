"""A launch to be interpreted, as it goes from one process to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One launch with its numbers. ``outputs``: element type and shape of each, in order."""

    sample: str
    tactic: str
    sizes: Mapping[str, int]
    inputs: tuple[str, ...]
    numbers: tuple[int, ...]
    outputs: Mapping[str, tuple[int, tuple[int, ...]]]
    grid: tuple[int, int, int]
    planted: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
