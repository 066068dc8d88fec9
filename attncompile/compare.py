"""Files against each other, or one alone: what ``attncompile verify``, ``bench`` and ``profile`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from attncompile import measure, profile, verify
from attncompile.console import Progress
from attncompile.core.errors import BadArguments
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.passes.load import load
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


def check_pair(original: Path, other: Path) -> None:
    """Refuse a file that cannot be run on the inputs of ``original``.

    Raises BadModel for a file that cannot be read, BadArguments for inputs that ``original`` does not have.
    """
    first, second = (_required(load(path).proto.graph) for path in (original, other))
    strange = [name for name in second if name not in first]
    if strange:
        raise BadArguments(
            f"{other.name} takes input '{strange[0]}', which {original.name} does not have",
            "give two files of the same model",
        )


def _required(graph: onnx.GraphProto) -> list[str]:
    stored = {t.name for t in graph.initializer}
    return [i.name for i in graph.input if i.name not in stored]


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
    check_pair(original, other)
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
    device: str = "cpu",
) -> tuple[ShapeTiming, ...]:
    """Time both files in paired rounds on all ``feeds``, ``seconds`` for each shape, both fully optimised.

    ``device``: ``cpu``, or ``cuda``, where either may be a folder that --target onnxruntime-cuda wrote.
    """
    threads = threads or measure.default_threads()
    sessions: list[measure.Session]
    if device == "cuda":
        from attncompile.measure_device import open_on_device

        check_pair(*(portable(path) for path in (original, other)))
        sessions = [open_on_device(path) for path in (original, other)]
    else:
        check_pair(original, other)
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


def portable(path: Path) -> Path:
    """The ONNX file that says the inputs of ``path``, which may be a folder that a target wrote."""
    return path / "model.onnx" if path.is_dir() else path


@dataclass(frozen=True, slots=True)
class Profiled:
    """Layer and site times of one file, or of two at the same inputs. Without ``other`` the sites' ``after`` is NaN."""

    model: Path
    other: Path | None
    feeds: Feeds
    before: profile.LayerTimes
    after: profile.LayerTimes | None
    sites: tuple[profile.SiteTime, ...]

    def to_json(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return value if isfinite(value) else None

        return {
            "model": str(self.model), "other": str(self.other) if self.other else None, "label": self.feeds.label,
            "bindings": dict(self.feeds.bindings),
            "sites": [
                {"id": s.site, "microseconds": number(s.before), "other_microseconds": number(s.after),
                 "gain": number(s.gain)} for s in self.sites
            ],
            "times": _times_json(self.before), "other_times": _times_json(self.after) if self.after else None,
        }  # fmt: skip


def _times_json(times: profile.LayerTimes) -> dict[str, Any]:
    return {
        "total_microseconds": times.total, "runs": times.runs, "threads": times.threads, "by_op": dict(times.by_op()),
        "layers": [
            {"name": x.name, "op": x.op_type, "microseconds": x.microseconds, "calls": x.calls, "site": x.site}
            for x in sorted(times.layers, key=lambda x: -x.microseconds)
        ],
    }  # fmt: skip


def profile_files(
    model: Path,
    other: Path | None,
    sites: Sequence[AttentionSite],
    feeds: Feeds,
    progress: Progress,
    *,
    runs: int = 10,
    threads: int | None = None,
) -> Profiled:
    """Per-layer and per-site times of ``model``, and of ``other`` made from it if given, by ONNX Runtime's profiler.

    Raises BadModel for a file that cannot be run.
    """
    threads = threads or measure.default_threads()
    feed = feeds.feeds[0]
    progress.stage("profile")
    if other is not None:
        check_pair(model, other)
        pair = profile.profile_pair(model, other, feed, sites, threads=threads, runs=runs)
        return Profiled(model, other, feeds, pair.before, pair.after, pair.sites)
    proto = onnx.load(str(model), load_external_data=False)
    known = {o for node in proto.graph.node for o in node.output}
    regions = {s.id: profile.region(proto, s, known) for s in sites}
    times = profile.profile_model(model, feed, threads=threads, runs=runs, regions=regions)
    found = {layer.site for layer in times.layers}
    rows = (profile.SiteTime(s.id, times.site(s.id) if s.id in found else nan, nan) for s in sites)
    return Profiled(model, None, feeds, times, None, tuple(rows))
