"""``recipe.toml`` as values."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True, slots=True)
class Phase:
    """Until the part ``until`` of the budget, batches of ``batch`` samples of ``size`` tokens, or pixels a side."""

    until: float
    size: int
    batch: int


@dataclass(frozen=True, slots=True)
class Training:
    """What all three have. ``rate`` is Muon's, for matrices; ``rate_other`` AdamW's; ``decay`` is weight decay."""

    hidden: int
    heads: int
    ffn: int
    layers: int
    seed: int
    rate: float
    rate_other: float
    decay: float
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class LmRecipe(Training):
    """The decoder."""

    vocab: int
    rope_theta: float
    context: int
    needles: float
    copies: float


@dataclass(frozen=True, slots=True)
class VitRecipe(Training):
    """The classifier; ``side`` and ``patch`` in pixels."""

    side: int
    patch: int
    classes: int


@dataclass(frozen=True, slots=True)
class DitRecipe(Training):
    """The diffusion transformer; ``steps`` of its sampler."""

    side: int
    patch: int
    classes: int
    steps: int


@dataclass(frozen=True, slots=True)
class Recipes:
    """All of the file."""

    lm: LmRecipe
    vit: VitRecipe
    dit: DitRecipe


_R = TypeVar("_R", bound=Training)


def load(path: Path | None = None) -> Recipes:
    """Reads ``path``, or the committed file; raises ``TypeError`` for a field that is missing or unknown."""
    text = (path or Path(__file__).with_name("recipe.toml")).read_text()
    tables = tomllib.loads(text)
    return Recipes(_read(LmRecipe, tables["lm"]), _read(VitRecipe, tables["vit"]), _read(DitRecipe, tables["dit"]))


def _read(kind: type[_R], table: dict[str, Any]) -> _R:
    assert {field.name for field in fields(kind)} >= {"phases"}
    return kind(**table | {"phases": tuple(Phase(*phase) for phase in table["phases"])})
