"""The shapes a model is compiled for: smallest, usual and largest value of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attncompile.core.errors import BadArguments


@dataclass(frozen=True, slots=True)
class Range:
    """``minimum <= usual <= maximum`` of one dynamic dimension. ``assumed`` when the user did not give it."""

    minimum: int
    usual: int
    maximum: int
    assumed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.usual <= self.maximum:
            raise BadArguments(
                f"profile range {self.minimum}:{self.usual}:{self.maximum} is not increasing",
                "write MIN:USUAL:MAX with 1 <= MIN <= USUAL <= MAX",
            )
        if self.maximum >= 1 << 31:
            raise BadArguments(
                f"profile size {self.maximum} is above every size that a model can run at", "give a smaller MAX"
            )


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """A range for every symbol of the model's inputs; empty for a model without dynamic dimensions."""

    ranges: Mapping[str, Range]

    def bindings(self) -> Iterator[tuple[str, dict[str, int]]]:
        """('min' | 'usual' | 'max', symbol -> size), without repeats; ('static', {}) for a static model."""
        if not self.ranges:
            yield "static", {}
            return
        seen: list[dict[str, int]] = []
        for label, field in (("usual", "usual"), ("min", "minimum"), ("max", "maximum")):
            binding = {name: int(getattr(r, field)) for name, r in self.ranges.items()}
            if binding not in seen:
                seen.append(binding)
                yield label, binding

    def usual(self) -> dict[str, int]:
        return {name: r.usual for name, r in self.ranges.items()}

    def maximum(self) -> dict[str, int]:
        return {name: r.maximum for name, r in self.ranges.items()}
