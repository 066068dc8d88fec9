"""The ledger: what a replacement relies on, and how each of these things was shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from attncompile.core.mechanism import Parameters
from attncompile.core.site import AttentionSite

AssumptionKind = Literal[
    "sizes", "heads", "symbols", "mask", "padding", "masked-rows", "finite", "constants", "opset", "dtype", "other",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(AssumptionKind)


@dataclass(frozen=True, slots=True)
class Assumption:
    """One thing that must hold for a replacement to be right, in words, and how it was shown.

    ``inputs`` are the model's inputs that it is about. ``checked``: the user's ``--inputs`` are compared with it, and
    fail the run where they break it.
    """

    kind: AssumptionKind
    statement: str
    shown_by: str
    inputs: tuple[str, ...] = ()
    checked: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object of plan.toml and report.json."""
        return {
            "kind": self.kind, "statement": self.statement, "shown_by": self.shown_by, "inputs": list(self.inputs),
            "checked": self.checked,
        }  # fmt: skip

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.statement} ({self.shown_by})"


@runtime_checkable
class Assumes(Protocol):
    """A mechanism that relies on more than what every replacement relies on."""

    def assumptions(self, site: AttentionSite, parameters: Parameters) -> Sequence[Assumption]:
        """What else must hold for ``parameters`` at ``site``."""
        ...


def of_mechanism(mechanism: object, site: AttentionSite, parameters: Parameters) -> tuple[Assumption, ...]:
    """What ``mechanism`` adds to the ledger; nothing where it says nothing."""
    return tuple(mechanism.assumptions(site, parameters)) if isinstance(mechanism, Assumes) else ()
