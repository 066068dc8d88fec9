"""Times of an engine's layers, by TensorRT's own ``IProfiler``. It needs a GPU that runs the engine."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attncompile.core.errors import BadArguments


@dataclass(frozen=True, slots=True)
class EngineLayerTime:
    """Median microseconds a run. ``plugin``: the layer is called like a node that is a plugin of ours."""

    name: str
    microseconds: float
    plugin: bool = False


@dataclass(slots=True)
class LayerTable:
    """What a profiler is told, run by run. A layer that runs several times in one run counts as their sum."""

    plugins: frozenset[str] = frozenset()
    _runs: list[dict[str, float]] = field(default_factory=lambda: [{}])

    def report(self, name: str, milliseconds: float) -> None:
        now = self._runs[-1]
        now[name] = now.get(name, 0.0) + 1000 * milliseconds

    def next_run(self) -> None:
        self._runs.append({})

    def layers(self) -> tuple[EngineLayerTime, ...]:
        """Slowest first; the first run, which warms up, is left out where there are more."""
        runs = [r for r in self._runs if r]
        runs = runs[1:] or runs
        names = dict.fromkeys(name for run in runs for name in run)
        found = [EngineLayerTime(n, statistics.median(r.get(n, 0.0) for r in runs), n in self.plugins) for n in names]
        return tuple(sorted(found, key=lambda x: -x.microseconds))


def profiler(trt: Any, table: LayerTable) -> Any:
    """An ``IProfiler`` that writes into ``table``."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            table.report(layer_name, ms)

    return Profiler()


def profile(engine: Path, feeds: Sequence[Mapping[str, np.ndarray]], module: str, plugins: Sequence[str] = (),
            runs: int = 20) -> tuple[EngineLayerTime, ...]:  # fmt: skip
    """Run ``engine`` ``runs`` times on the first of ``feeds`` with the profiler on, through Polygraphy's runner."""
    if not feeds:
        raise BadArguments("there are no inputs to profile an engine with", "give --inputs")
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    table = LayerTable(frozenset(plugins))
    with TrtRunner(EngineFromBytes(BytesFromPath(str(engine)))) as runner:
        # Kept: the context does not own it.
        kept = runner.context.profiler = profiler(importlib.import_module(module), table)
        for _ in range(runs + 1):
            runner.infer(feeds[0])
            table.next_run()
        del kept
    return table.layers()
