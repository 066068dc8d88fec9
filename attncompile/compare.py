"""Two files against each other, at every shape of a profile: ``attncompile verify`` and ``attncompile bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attncompile import measure, verify
from attncompile.console import Progress
from attncompile.core.errors import BadArguments
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.report import ShapeTiming


@dataclass(frozen=True, slots=True)
class Feeds:
    """Inputs of one shape. ``label`` is ``min``, ``usual``, ``max``, ``static``, or ``inputs`` for the user's file."""

    label: str
    bindings: Mapping[str, int]
    feeds: tuple[Mapping[str, np.ndarray], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of ``compare``: one whole-model comparison for every shape."""

    original: Path
    other: Path
    evidence: str
    results: tuple[tuple[Feeds, verify.ModelComparison], ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it passed."""
        return bool(self.results) and all(c.passed for _, c in self.results)

    def to_json(self) -> dict[str, Any]:
        return {
            "original": str(self.original), "other": str(self.other), "passed": self.passed,
            "evidence": self.evidence,
            "shapes": [{"label": f.label, "bindings": dict(f.bindings), **c.to_json()} for f, c in self.results],
        }  # fmt: skip


def feeds_for(model: Model, profile: ShapeProfile, inputs: Path | None, seed: int) -> tuple[Feeds, ...]:
    """The user's inputs if there is a file, else seeded ones at every shape of the profile."""
    if inputs is not None:
        return (Feeds("inputs", {}, tuple(verify.load_inputs(inputs, model.proto))),)
    return tuple(
        Feeds(label, binding, (verify.make_inputs(model, binding, seed),)) for label, binding in profile.bindings()
    )


def compare(
    original: Path,
    other: Path,
    feeds: Sequence[Feeds],
    progress: Progress,
    *,
    budget: float | None = None,
    metric: str = "relative_l2",
) -> Comparison:
    """Run both files on all ``feeds`` and compare every output.

    Raises BadArguments for a metric without a budget, BadModel for a file that does not load.
    """
    if budget is None and metric != "relative_l2":
        raise BadArguments(f"--metric {metric} has no default budget", "give one with --max-error")
    evidence = "inputs" if any(f.label == "inputs" for f in feeds) else "seeded"
    progress.stage("verify", len(feeds))
    results = []
    for item in feeds:
        found = verify.compare_models(original, other, item.feeds, budget=budget, metric=metric)
        results.append((item, found))
        progress.advance()
    return Comparison(original, other, evidence, tuple(results))


def bench(
    original: Path,
    other: Path,
    feeds: Sequence[Feeds],
    progress: Progress,
    *,
    rounds: int | None = None,
    seconds: float = 10.0,
    threads: int | None = None,
) -> tuple[ShapeTiming, ...]:
    """Time both files in paired rounds on all ``feeds``, ``seconds`` for each shape, both fully optimised."""
    threads = threads or measure.default_threads()
    sessions = [measure.open_session(path, threads) for path in (original, other)]
    progress.stage("bench", len(feeds))
    timings = []
    for item in feeds:
        timing = measure.paired(
            sessions[0], sessions[1], item.feeds, rounds=rounds, budget_seconds=seconds, threads=threads
        )
        timings.append(ShapeTiming(item.label, item.bindings, timing))
        progress.advance()
    return tuple(timings)
