"""Fits feature maps to the softmax attention of a model: capture, fit, distances on inputs that were not fitted on.

Of the inputs the same half is fitted on that a search calibrates on; the other half chooses nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attncompile import measure
from attncompile.core.errors import Unsupported
from attncompile.core.feature_map import ARRAYS, KINDS, FeatureMaps, Kind
from attncompile.core.mechanism import Mechanism, understood
from attncompile.core.plan import Decision
from attncompile.core.site import AttentionSite
from attncompile.cost import predicted_gain, shape_of
from attncompile.fit import solve
from attncompile.fit.capture import Capture, Place, place
from attncompile.fit.fitted import Fitted
from attncompile.fit.found import Distance, FitMap, FitReport, FitSite
from attncompile.fit.judge import Judge
from attncompile.gate import Edit
from attncompile.gpu_cost import GpuCost
from attncompile.measure import Provider
from attncompile.passes.evaluate import World
from attncompile.plugins.linear_attention.fitted import FittedLinearAttention
from attncompile.search import executors, heads, tasks
from attncompile.search.arrays import save
from attncompile.search.run import split
from attncompile.search.slim import SlimModel
from attncompile.search.whole_sites import CAPTURE_BYTES
from attncompile.verification.next_token import next_token

if TYPE_CHECKING:
    from attncompile.console import Progress
    from attncompile.pipeline import Inspection

Feed = Mapping[str, np.ndarray]
NAME = FittedLinearAttention.name

ENTRIES = 16
"""Batch entries that are fitted on at most, and as many that are looked at."""

ROWS = 512
"""Queries of an entry that are kept."""

PROBES = 2
"""Inputs on which a whole model is run with one site replaced."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``width``: columns of a learned map's weight; None: the head dim. ``steps`` of a learned map."""

    kinds: tuple[Kind, ...] = KINDS
    steps: int = 200
    width: int | None = None
    seed: int = 0
    metric: str = "relative_l2"
    jobs: int = 1
    threads: int | None = None
    executor: str = "local"
    provider: Provider = "cpu"
    min_gain: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What decides about the result."""
        return {"maps": list(self.kinds), "steps": self.steps, "width": self.width, "seed": self.seed}


def with_maps(registry: Sequence[Mechanism], maps: Mapping[str, Sequence[FeatureMaps]]) -> tuple[Mechanism, ...]:
    """The registry, whose mechanism for fitted maps has these."""
    return tuple(m.having(maps) if isinstance(m, FittedLinearAttention) else m for m in registry)


def candidates(
    sites: Sequence[AttentionSite], kinds: Sequence[Kind], world: World, gpu: GpuCost | None, min_gain: float
) -> tuple[dict[str, list[Kind]], list[FitSite]]:
    """Of each site the kinds that can stand there and gain, and the sites with none, with the reason. On a GPU gains
    are known when the maps are.
    """
    able: dict[str, list[Kind]] = {}
    refused: list[FitSite] = []
    mechanism = FittedLinearAttention()
    for site in sites:
        if site.kind != "softmax":
            continue
        known = understood(mechanism, site)
        answers = {k: mechanism.fits(site, k) if known.ok else known for k in kinds}
        gains = {k: _gain(site, k, world) for k, a in answers.items() if a.ok}
        kept = [k for k, g in gains.items() if gpu is not None or g >= min_gain]
        if kept:
            able[site.id] = kept
        elif gains:
            best = max(gains.values())
            refused.append(
                FitSite(site.id, refused=f"predicted gain {best:.2f} of linear attention, below {min_gain:g}")
            )
        elif answers:
            refused.append(FitSite(site.id, refused=next(iter(answers.values())).reason))
    return able, refused


def _gain(site: AttentionSite, kind: str, world: World) -> float:
    shape = shape_of(site, world.binding)
    return predicted_gain(site, FittedLinearAttention().cost(site, {"map": kind}, shape), shape)


class Fit:
    """One fit. ``scratch`` is a folder for what is captured, and for models."""

    def __init__(
        self, found: Inspection, feeds: Sequence[Feed], worlds: Sequence[World], scratch: Path, settings: Settings,
        progress: Progress, gpu: GpuCost | None = None,
    ) -> None:  # fmt: skip
        self._found, self._feeds, self._worlds = found, feeds, worlds
        self._scratch, self._settings, self._progress, self._gpu = scratch / "fit", settings, progress, gpu
        self._threads = settings.threads or measure.default_threads()
        known, held = split(len(feeds))
        self._known, self._held = known, held if len(feeds) > 1 else []
        self._executor: executors.Executor | None = None
        self._language = next_token(found.model.proto) if settings.metric == "perplexity" else None

    def run(
        self, sites: Sequence[AttentionSite], given: Fitted | None = None
    ) -> tuple[Fitted, FitReport]:  # fmt: skip
        """Maps of all sites that can have some, and how far they are. ``given`` are judged as they are.

        Raises:
            MissingDependency: torch is needed and not there.
        """
        settings = self._settings
        able, refused = candidates(sites, settings.kinds, self._worlds[0], self._gpu, settings.min_gain)
        chosen = [s for s in sites if s.id in able]
        if given is not None:
            for site in chosen:
                have = {m.kind for m in given.maps.get(site.id, ())}
                able[site.id] = [k for k in able[site.id] if k in have]
            refused += [FitSite(s.id, refused="the given file has no maps for it") for s in chosen if not able[s.id]]
            chosen = [s for s in chosen if able[s.id]]
        elif any(k != "mala" for kinds in able.values() for k in kinds):
            solve.require_torch()
        model = self._found.model.hash
        if not chosen:
            return Fitted(model, {}, settings.to_json()), self._report(sites, refused, {}, None)
        here = settings.jobs == 1 and settings.executor == "local"
        made = executors.Inline(self._threads) if here else None
        self._executor = made or executors.make(settings.executor, settings.jobs, self._threads)
        try:
            return self._run(chosen, able, refused, sites, given)
        finally:
            self._executor.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _run(
        self, chosen: Sequence[AttentionSite], able: Mapping[str, list[Kind]], refused: list[FitSite],
        sites: Sequence[AttentionSite], given: Fitted | None,
    ) -> tuple[Fitted, FitReport]:  # fmt: skip
        files = []
        (self._scratch / "inputs").mkdir(parents=True, exist_ok=True)
        for number, feed in enumerate(self._feeds):
            files.append(self._scratch / "inputs" / f"{number}.npz")
            save(files[-1], feed)
        slim = SlimModel(self._found.index.model, self._scratch / "models")
        places = {s.id: place(i, s, self._scratch) for i, s in enumerate(chosen)}
        known, held = self._capture(chosen, places, files, slim)
        maps = dict(given.maps) if given is not None else self._solve(chosen, able, places, known)
        settings = given.settings if given is not None else self._settings.to_json()
        fitted = Fitted(self._found.model.hash, {s.id: maps[s.id] for s in chosen}, settings)
        distances = self._judge(chosen, fitted, places, known, held)
        found, together = self._measure(chosen, fitted, distances, files, slim)
        return fitted, replace(self._report(sites, refused, found, together), settings=fitted.settings)

    def _report(
        self, sites: Sequence[AttentionSite], refused: Sequence[FitSite], found: Mapping[str, FitSite],
        together: float | None,
    ) -> FitReport:  # fmt: skip
        by_site = {**{r.site: r for r in refused}, **found}
        ordered = tuple(by_site[s.id] for s in sites if s.id in by_site)
        return FitReport(self._settings.metric, len(self._known), len(self._held), ordered, together,
                         self._settings.to_json())  # fmt: skip

    # Capture and fit.

    def _capture(
        self, sites: Sequence[AttentionSite], places: Mapping[str, Place], files: Sequence[Path], slim: SlimModel
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of the entries to fit on and of those to look at; of more than ``ENTRIES`` some, evenly."""
        assert self._executor is not None
        shapes = self._worlds[0].shapes
        groups: list[list[Place]] = [[]]
        size = 0
        for p in (places[s.id] for s in sites):
            need = sum(4 * int(np.prod(shapes.get(n, (0,)))) for n in p.names)
            if groups[-1] and size + need > CAPTURE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(p)
            size += need
        chosen = [_evenly(part) for part in (self._known, self._held)]
        self._progress.stage("read queries and keys", len(groups) * sum(map(len, chosen)))
        model = slim.with_outputs([n for p in places.values() for n in p.names], "capture.onnx")
        start, found = 0, []
        for part in chosen:
            numbers: list[int] = []
            for number in part:
                work = [
                    Capture(
                        model,
                        files[number],
                        tuple(g),
                        ROWS,
                        start,
                        self._settings.seed,
                        self._found.model.hash,
                        self._settings.provider,
                    )
                    for g in groups
                ]
                count = max(self._executor.map(work, self._progress.advance))
                numbers += range(start, start + count)
                start += count
            found.append(tuple(_evenly(numbers)))
        return found[0], found[1]

    def _solve(
        self, sites: Sequence[AttentionSite], able: Mapping[str, list[Kind]], places: Mapping[str, Place],
        known: tuple[int, ...],
    ) -> dict[str, tuple[FeatureMaps, ...]]:  # fmt: skip
        assert self._executor is not None
        work, of = [], []
        for site in sites:
            group = site.heads // site.kv_heads
            weights = heads.projection(site, self._worlds[0])
            for kind in able[site.id]:
                for g in range(site.kv_heads):
                    part = None if weights is None else weights[g * group : (g + 1) * group]
                    seed = self._settings.seed * 100_003 + places[site.id].number * 1_009 + g
                    work.append(
                        solve.Solve(places[site.id], g, known, kind, site.scale, bool(site.mask.parts),
                                    self._settings.width or site.head_dim, self._settings.steps, seed, part)
                    )  # fmt: skip
                    of.append((site.id, kind))
        self._progress.stage("fit feature maps", len(work))
        parts: dict[tuple[str, Kind], list[Mapping[str, np.ndarray]]] = {}
        for key, arrays in zip(of, self._executor.map(work, self._progress.advance), strict=True):
            parts.setdefault(key, []).append(arrays)
        return {
            site.id: tuple(FeatureMaps(kind, _joined(kind, parts[site.id, kind])) for kind in able[site.id])
            for site in sites
        }

    # Distances.

    def _judge(
        self, sites: Sequence[AttentionSite], fitted: Fitted, places: Mapping[str, Place], known: tuple[int, ...],
        held: tuple[int, ...],
    ) -> dict[tuple[str, str, bool], tuple[Distance, ...]]:  # fmt: skip
        assert self._executor is not None
        work, of = [], []
        for site in sites:
            group = site.heads // site.kv_heads
            for maps in fitted.maps[site.id]:
                for is_held, numbers in ((False, known), (True, held)):
                    for g in range(site.kv_heads) if numbers else ():
                        arrays = {
                            n: a[g] if n.startswith("key") else a[g * group : (g + 1) * group]
                            for n, a in maps.arrays.items()
                        }
                        work.append(Judge(places[site.id], g, numbers, maps.kind, arrays, site.scale,
                                          bool(site.mask.parts)))  # fmt: skip
                        of.append((site.id, maps.kind, is_held))
        self._progress.stage("judge feature maps", len(work))
        found: dict[tuple[str, str, bool], tuple[Distance, ...]] = {}
        for key, part in zip(of, self._executor.map(work, self._progress.advance), strict=True):
            found[key] = (*found.get(key, ()), *part)
        return found

    def _measure(
        self, sites: Sequence[AttentionSite], fitted: Fitted,
        distances: Mapping[tuple[str, str, bool], tuple[Distance, ...]], files: Sequence[Path], slim: SlimModel,
    ) -> tuple[dict[str, FitSite], float | None]:  # fmt: skip
        """Every map with the metric at the outputs: of its site alone, and of the best of all sites together."""
        assert self._executor is not None
        mechanism = FittedLinearAttention(fitted.maps)
        inputs = (self._held or self._known)[:PROBES]
        baselines = {i: self._scratch / f"outputs-{i}.npz" for i in inputs}
        path = self._found.model.path.resolve()
        provider = self._settings.provider
        self._executor.map([tasks.Baseline(path, files[i], baselines[i], provider, self._language) for i in inputs])
        opset = self._found.index.model.opset

        def edit(site: AttentionSite, m: FeatureMaps) -> Edit:
            return Edit.of(site, Decision(site.id, NAME, "", False, {"map": m.kind, "fit": m.digest}), mechanism, opset)

        def error(edits: Sequence[Edit], stamp: str) -> float:
            assert self._executor is not None
            written = slim.write(edits, "fitted.onnx")
            metric = self._settings.metric
            work = [
                tasks.Error(written, stamp, files[i], baselines[i], metric, provider, self._language) for i in inputs
            ]
            return float(np.mean(self._executor.map(work)))

        self._progress.stage("run the model with fitted maps", sum(len(fitted.maps[s.id]) for s in sites) + 1)
        found: dict[str, FitSite] = {}
        for site in sites:
            made = []
            for m in fitted.maps[site.id]:
                parameters = {"map": m.kind, "fit": m.digest}
                verdict = mechanism.supports(site, parameters)
                if not verdict.ok:
                    made.append(FitMap(m.kind, m.digest, refused=verdict.reason))
                    continue
                gain, refusal = self._gain_of(site, mechanism, parameters, opset)
                if refusal:
                    made.append(FitMap(m.kind, m.digest, refused=refusal))
                    continue
                value = error([edit(site, m)], f"fit-{site.id}-{m.digest}")
                here = distances[site.id, m.kind, False]
                made.append(FitMap(m.kind, m.digest, distances.get((site.id, m.kind, True), here), here, value, gain))
                self._progress.advance()
            found[site.id] = FitSite(site.id, tuple(made))
        by_digest = {(s.id, m.digest): edit(s, m) for s in sites for m in fitted.maps[s.id]
                     if mechanism.supports(s, {"map": m.kind, "fit": m.digest}).ok}  # fmt: skip
        best = [by_digest[s, f.best.digest] for s, f in found.items() if f.best is not None]
        return found, error(best, "fit-together") if best else None

    def _gain_of(
        self, site: AttentionSite, mechanism: FittedLinearAttention, parameters: Mapping[str, Any], opset: int
    ) -> tuple[float | None, str]:  # fmt: skip
        if self._gpu is None:
            shape = shape_of(site, self._worlds[0].binding)
            return predicted_gain(site, mechanism.cost(site, parameters, shape), shape), ""
        try:
            return self._gpu.gain(site, mechanism.lower(site, parameters, opset), self._worlds[0].binding), ""
        except Unsupported as error:
            return None, error.message


def _evenly(numbers: Sequence[int]) -> list[int]:
    if len(numbers) <= ENTRIES:
        return list(numbers)
    return [numbers[i * len(numbers) // ENTRIES] for i in range(ENTRIES)]


def _joined(kind: Kind, parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The parts of all key heads, in their order."""
    return {
        n: np.stack([p[n] for p in parts]) if n.startswith("key") else np.concatenate([p[n] for p in parts])
        for n in ARRAYS[kind]
    }
