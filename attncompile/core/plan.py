"""The plan: one decision a site. A file that a person can read and edit between detection and replacement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attncompile.core.assumption import Assumption
from attncompile.core.mechanism import Parameters

PLAN_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A mechanism that was considered for a site and not chosen."""

    mechanism: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dense:
    """An exact replacement: a mechanism's name and its parameters."""

    mechanism: str
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """``mechanism`` is ``keep`` or the name of a mechanism; ``reason`` says why.

    ``predicted_gain`` is the predicted time of the site's subgraph before / after at the profile's usual shape.
    ``assumptions`` are what the replacement relies on; a site that is kept has none. ``dense``: the exact replacement
    of an approximated site in calls that the option ``keep_dense`` holds of; None: there it is as it was.
    """

    site: str
    mechanism: str
    reason: str
    exact: bool = True
    parameters: Parameters = field(default_factory=dict)
    predicted_gain: float = 1.0
    refusals: tuple[Refusal, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    dense: Dense | None = None

    @property
    def kept(self) -> bool:
        return self.mechanism == "keep"


@dataclass(frozen=True, slots=True)
class Plan:
    """Decisions for the model with this hash, in site order. ``options`` are the policy's settings in force."""

    model_hash: str
    policy: str
    decisions: tuple[Decision, ...]
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema_version: int = PLAN_SCHEMA_VERSION
