"""The search for approximate replacements of one model: capture, candidates, scores, choice, check on held-out inputs.

Seeded noise is never evidence for an approximation: everything here is judged on the user's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attncompile import __version__, measure
from attncompile.core.block_pattern import MEAN, BlockGeometry, BlockPattern, with_rest
from attncompile.core.block_selection import BlockSelection, is_selection, rest_of
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import ChoosingMechanism, HeadMechanism, Mechanism
from attncompile.core.plan import Decision
from attncompile.core.policy import Policy
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.cost import dense_cost, shape_of
from attncompile.gate import Edit
from attncompile.gpu_cost import GpuCost
from attncompile.measure import Provider
from attncompile.passes.evaluate import World
from attncompile.report import SiteFidelity
from attncompile.search import choose, executors, heads, orders, tasks, whole_sites
from attncompile.search.arrays import save
from attncompile.search.candidates import beside_means, candidates, mean_size, selections, selections_beside_means
from attncompile.search.choose import Choice, Limits, Point, SiteSpace, Unit
from attncompile.search.confidence import share_bound
from attncompile.search.found import CurvePoint, HeadFound, SearchReport
from attncompile.search.slim import SlimModel
from attncompile.search.state import State, key_of, stamp_of
from attncompile.verification.answers import answers
from attncompile.verification.next_token import next_token

if TYPE_CHECKING:
    from attncompile.console import Progress
    from attncompile.pipeline import Inspection

Feed = Mapping[str, np.ndarray]
PROBES = 12
"""Calibration inputs on which it is measured how much the outputs follow each site: of a diffusion model's they differ
with the time, and two of them order the sites wrongly."""

_PROBES_OF_LOGITS = 2
"""The same of language models, whose logits are kept whole for it."""

FEW = 6
"""Calibration inputs below which the bound on others is wide, because little is known of how they differ."""

SEQUENCES = 64
"""Of so many sequences of the calibration inputs maps are read and patterns scored: of more the mean says no more.
Whole models are run on all inputs."""

PROBE_DAMAGE = 0.02
"""Squared change of a site's output that it is probed with, or the nearest that its candidates offer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the search is asked for. ``budget`` bounds ``metric`` as the user writes it; ``density`` in its place."""

    metric: str
    budget: float
    density: float | None = None
    confidence: float = 0.99
    jobs: int = 1
    executor: str = "local"
    threads: int | None = None
    provider: Provider = "cpu"

    def to_json(self) -> dict[str, Any]:
        """What decides about the result."""
        return {
            "metric": self.metric,
            "budget": self.budget,
            "density": self.density,
            "confidence": self.confidence,
            "provider": self.provider,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """``edits`` replace sites; ``kept`` says of open sites why they are not; ``fidelity`` by site."""

    edits: tuple[Edit, ...] = ()
    fidelity: Mapping[str, SiteFidelity] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    report: SearchReport | None = None


@dataclass(slots=True)
class _HeadPlan:
    """One site under search, head by head. ``time`` of patterns that are fixed, None where the length is not; ``ways``:
    how heads may choose blocks when the model runs, texts and times of each; ``moved``: time of patterns that are fixed
    where some are in other orders of the tokens; ``coarse``: where some meet what they leave out by its means.
    ``offered`` [H][K] are the texts of all candidates, in the order of ``modes`` [H][K]: 0 fixed, 1, 2, ... one of
    ``ways``, then fixed with such means, fixed in any order if heads gain by that, and both together. ``shares``
    [H][K] of all blocks; ``masses`` by order are maps as ``mass`` [H, R, R] is.
    """

    site: AttentionSite
    mechanism: HeadMechanism
    geometry: BlockGeometry
    time: heads.BlockTime | None
    spec: tasks.HeadSite
    ways: list[tuple[list[str], heads.BlockTime]] = field(default_factory=list)
    offered: list[list[str]] = field(default_factory=list)
    modes: list[np.ndarray] = field(default_factory=list)
    moved: heads.BlockTime | None = None
    coarse: heads.BlockTime | None = None
    mass: np.ndarray | None = None
    masses: dict[orders.Order, np.ndarray] = field(default_factory=dict)
    damage: list[np.ndarray] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)
    shares: list[np.ndarray] = field(default_factory=list)

    @property
    def dense(self) -> float:
        """Predicted time of the site as it is in the source."""
        return (self.time or self.ways[0][1]).dense

    def offer(self, average: bool) -> None:
        """Fill ``offered`` and ``modes`` from ``mass`` [H, R, R], dense first in each mode."""
        assert self.mass is not None
        turned = [self._in_other_orders(head) for head in range(len(self.mass))]
        if not any(turned):
            self.moved = None
        for mass, others in zip(self.mass, turned, strict=True):
            fixed = ["dense"]
            if self.time is not None:
                fixed = [p.text for p in candidates(mass, self.geometry, average)]
            parts = [fixed, *(["dense", *texts] for texts, _ in self.ways)]
            if self.coarse is not None:
                means = [p.text for p in beside_means(mass, self.geometry)]
                parts.append([*(text for text in fixed if text != MEAN.text), *means])
            if self.moved is not None:
                parts.append([*fixed, *others])
            if self.moved is not None and self.coarse is not None:
                beside = [with_rest(BlockPattern(text), mean_size(self.geometry)).text for text in others]
                parts.append([*parts[1 + len(self.ways)], *others, *beside])
            self.offered.append([text for part in parts for text in part])
            self.modes.append(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))

    def _in_other_orders(self, head: int) -> list[str]:
        assert self.mass is not None
        masses = {order: mass[head] for order, mass in self.masses.items()}
        return [p.text for p in orders.offered(self.mass[head], masses, self.geometry)] if self.moved else []

    @property
    def others(self) -> list[heads.BlockTime]:
        """Times of modes 1, 2, ..."""
        more = [time for time in (self.coarse, self.moved) if time is not None]
        if self.coarse is not None and self.moved is not None and self.time is not None:
            more.append(replace(self.coarse, fixed=self.coarse.fixed + self.moved.fixed - self.time.fixed))
        return [*(time for _, time in self.ways), *more]

    def chooses(self, picks: Sequence[int]) -> bool:
        """Whether these candidates are chosen when the model runs."""
        return 0 < int(self.modes[0][picks[0]]) <= len(self.ways)

    def times(self, head: int) -> np.ndarray:
        """Predicted time of each candidate of one head [K]."""
        found = np.empty(len(self.offered[head]))
        blocks = self.shares[head] * float(self.geometry.all.sum())
        for mode, time in enumerate([self.time, *self.others]):
            of = np.flatnonzero(self.modes[head] == mode)
            if time is None:
                found[of] = self.dense / len(self.offered)
                continue
            found[of] = time.block * blocks[of]
            found[of[0]] = time.head  # dense
        return found


def split(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the calibration inputs and of the held-out ones: every other one. A single input serves as both."""
    return (list(range(0, count, 2)), list(range(1, count, 2))) if count > 1 else ([0], [0])


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``numbers``, from end to end: neighbours may be alike."""
    if count >= len(numbers):
        return list(numbers)
    return [numbers[round(i)] for i in np.linspace(0, len(numbers) - 1, max(count, 1))]


def batch_of(feed: Feed) -> int:
    """Sequences of an input: the first axis of all that are no scalars, if it is the same; else 1."""
    first = {value.shape[0] for value in feed.values() if value.ndim}
    return first.pop() if len(first) == 1 and all(value.ndim > 1 for value in feed.values() if value.ndim) else 1


def open_sites(
    sites: Sequence[AttentionSite], policy: Policy, registry: Sequence[Mechanism], exact: Sequence[Edit],
    only: Sequence[str] = (),
) -> list[AttentionSite]:  # fmt: skip
    """Those that may be approximated: not at the ends that ``policy`` keeps dense, not sparse exactly, and of ``only``
    if it names any.
    """
    skip = {m.name for m in registry if m.skips_keys}
    sparse = {e.site.id for e in exact if e.decision.mechanism in skip}
    allowed = sites[policy.keep_first : max(len(sites) - policy.keep_last, 0)]
    return [s for s in allowed if s.id not in sparse and s.id in (only or {s.id})]


class Search:
    """One search. ``exact`` are the edits in force; ``scratch`` is a folder for models and captured outputs, ``state``
    one for what is to be taken up after an interruption.
    """

    def __init__(
        self, found: Inspection, policy: Policy, registry: Sequence[Mechanism], feeds: Sequence[Feed],
        worlds: Sequence[World], exact: Sequence[Edit], scratch: Path, settings: Settings, progress: Progress,
        gpu: GpuCost | None, state: Path,
    ) -> None:  # fmt: skip
        self._found = found
        self._policy = policy
        self._by_name = {m.name: m for m in registry}
        self._registry = registry
        self.feeds = feeds
        self._worlds = worlds
        self._exact = list(exact)
        self._slim: SlimModel | None = None
        self._scratch = scratch
        self._settings = settings
        self._progress = progress
        self._gpu = gpu
        self._state_folder = state
        self._known, self._held = split(len(feeds))
        self._read = spread(self._known, -(-SEQUENCES // max(batch_of(feeds[0]), 1)))
        self._warnings: list[str] = []
        self._heads: dict[str, _HeadPlan] = {}
        self._whole: dict[str, list[Edit]] = {}
        self._refusals: dict[str, str] = {}
        self._unknown: dict[str, set[str]] = {}
        self._opset = found.index.model.opset
        self._least = max(policy.min_gain, gpu.least_gain if gpu is not None else 0.0)
        self._files = [scratch / "inputs" / f"{i}.npz" for i in range(len(feeds))]
        self._executor: executors.Executor | None = None
        self._state: State | None = None
        self._language = next_token(found.model.proto) if settings.metric == "perplexity" else None

    def run(self, sites: Sequence[AttentionSite]) -> Result:
        """Searches among ``sites``."""
        try:
            if missing := self._too_few():
                return Result(kept=self._refusals, warnings=(missing,))
            spaces = self.spaces(sites)
            if not spaces:
                text = "no site has an approximation with a predicted gain worth it at the inputs' sizes"
                return Result(kept=self._refusals, warnings=(text,))
            if self._settings.density is not None:
                return self._by_density(spaces, self._settings.density)
            return self._by_budget(spaces)
        finally:
            self.close()

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know of what was found so far."""
        return self._warnings

    def close(self) -> None:
        """Ends the workers, and lets go of what was found."""
        if self._executor is not None:
            self._executor.close()
        if self._state is not None:
            self._state.release()

    def spaces(self, sites: Sequence[AttentionSite]) -> list[SiteSpace]:
        """All that ``sites`` can become, scored on the calibration inputs. ``close`` ends what is started for it."""
        for site in sites:
            self._open(site)
        if not self._heads and not self._whole:
            return []
        key = key_of(
            self._found.model.hash, self.feeds,
            {**self._settings.to_json(), "version": __version__, "sites": [*self._heads, *self._whole],
             "whole": [dict(e.decision.parameters) for edits in self._whole.values() for e in edits],
             "heads": [repr((p.geometry, [t for t, _ in p.ways], p.spec.orders, p.coarse))
                       for p in self._heads.values()],
             "policy": repr(self._policy), "exact": [(e.site.id, e.decision.mechanism) for e in self._exact],
             "gpu": self._gpu.said if self._gpu else ""},
        )  # fmt: skip
        self._state = State(self._state_folder, key)
        threads = self._settings.threads or measure.default_threads()
        self._executor = executors.make(self._settings.executor, self._settings.jobs, threads)
        folder = self._scratch / "inputs"
        folder.mkdir(parents=True, exist_ok=True)
        for path, feed in zip(self._files, self.feeds, strict=True):
            save(path, feed)
        self._slim = SlimModel(self._found.index.model, self._scratch / "models")
        self._score_heads()
        spaces = self._joined([self._space(p) for p in self._heads.values()], self._whole_spaces())
        offered = any(p.ways for p in self._heads.values())
        for message, ways in sorted(self._unknown.items()):
            by = f" by {' or '.join(sorted(ways))}" if offered else ""
            self._warnings.append(f"no head chooses its blocks{by} when the model runs: {message}")
        if self._state.resumed:
            self._progress.note(f"{self._state.resumed} pieces of an earlier search were taken up")
        return self._weighed(spaces)

    # What each site can become.

    def _open(self, site: AttentionSite) -> None:
        for name in self._policy.approximate:
            mechanism = self._by_name[name]
            made = self._by_heads(mechanism, site)
            if made is None:
                continue
            self._heads[site.id] = made
            if made.time is not None:
                return  # else what slides with the length is offered beside what is chosen
            break
        known = [self._worlds[i] for i in self._known]
        edits = whole_sites.options_for(site, self._policy, self._registry, known, self._opset, self._gpu)
        if edits:
            self._whole[site.id] = edits

    def _by_heads(self, mechanism: Mechanism, site: AttentionSite) -> _HeadPlan | None:
        """What the heads of ``site`` may become by this mechanism: patterns that are fixed, blocks that are chosen when
        the model runs, or both. Why not is kept in ``_refusals`` and ``_unknown``.
        """
        world = self._worlds[0]
        geometry = heads.geometry_of(mechanism, site)
        if not isinstance(mechanism, HeadMechanism):
            return None
        time = None
        if isinstance(geometry, Verdict):
            self._refusals[site.id] = f"no pattern for each head: {geometry.reason}"
        else:
            try:
                time = heads.block_time(site, geometry, mechanism, world.binding, self._gpu)
            except Unsupported as error:
                self._refusals[site.id] = f"no pattern for each head: {error.message}"
        ways: list[tuple[list[str], heads.BlockTime]] = []
        found = heads.choice_geometry(mechanism, site, world.binding)
        if isinstance(found, Verdict) or not isinstance(mechanism, ChoosingMechanism):
            found = geometry
        else:
            found = geometry if isinstance(geometry, BlockGeometry) else found
            beside = isinstance(site.query_length, int) and self._gpu is None and found.tokens >= found.edge
            for texts in (*selections(), *(selections_beside_means(found) if beside else [])):
                family, rest = BlockSelection(texts[0]).family, rest_of(texts[0])
                try:
                    taken = heads.choice_time(site, found, mechanism, world.binding, self._gpu, family, rest)
                except Unsupported as error:
                    self._unknown.setdefault(error.message, set()).add(family[0])
                    continue
                ways.append((texts, taken))
        if isinstance(found, Verdict) or (time is None and not ways):
            return None
        made = _HeadPlan(site, mechanism, found, time, heads.spec(site, found, world), ways)
        if time is not None and self._gpu is None and not made.spec.padding and found.averaged.any():
            size = mean_size(found)
            made.coarse = heads.block_time(site, found, mechanism, world.binding, None, size)
        if made.time is None:
            made.spec = replace(made.spec, orders=())
        elif made.spec.orders:
            made.moved = heads.ordered_time(
                site, found, mechanism, world.binding, self._gpu, made.time, made.spec.orders[0]
            )
        return made

    def _score_heads(self) -> None:
        if not self._heads:
            return
        assert self._slim is not None
        provider = self._settings.provider
        read = [n for p in self._heads.values() for n in p.spec.read]
        model = self._slim.with_outputs(read, "capture.onnx", self._exact)  # the same but for rounding, and faster
        sizes = {n: 4 * int(np.prod(s)) for n, s in self._worlds[0].shapes.items()}
        groups = tasks.groups([p.spec for p in self._heads.values()], sizes, whole_sites.CAPTURE_BYTES)
        self._progress.stage("read attention maps", len(groups) * len(self._read))
        work = [
            (f"mass-{i}-{g}", tasks.Masses(model, self._files[i], tuple(group), provider))
            for i in self._read for g, group in enumerate(groups)
        ]  # fmt: skip
        maps: dict[str, list[np.ndarray]] = {}
        for arrays in self._stored(work, lambda found: found):
            for name, mass in arrays.items():
                maps.setdefault(name, []).append(mass)
        for name, plan in self._heads.items():  # inputs may differ in length: the map is of those like the first
            alike = [m for m in maps[name] if m.shape == maps[name][0].shape]
            plan.mass = np.sum([m / len(alike) for m in alike], axis=0)
            for order in plan.spec.orders:
                plan.masses[order] = np.mean(maps[tasks.ordered_name(name, order)], axis=0)
            plan.offer(self._gpu is None and not plan.spec.padding)
        texts = {n: plan.offered for n, plan in self._heads.items()}
        self._progress.stage("score patterns of heads", len(groups) * len(self._read))
        scoring = [
            (f"score-{stamp_of([texts[s.site] for s in group])}-{i}-{g}",
             tasks.Scores(model, self._files[i], tuple(group), texts, i, provider))
            for i in self._read for g, group in enumerate(groups)
        ]  # fmt: skip
        totals: dict[str, list[tuple[np.ndarray, ...]]] = {}
        for arrays in self._stored(scoring, _flattened):
            for name in {n.rpartition("/")[0].rpartition("/")[0] for n in arrays}:
                count = len(texts[name])
                for h in range(count):
                    found = tuple(arrays[f"{name}/{h}/{what}"] for what in _SCORED)
                    known = totals.setdefault(name, [])
                    if len(known) <= h:
                        known.append(found)
                    else:
                        known[h] = tuple(a + b for a, b in zip(known[h], found, strict=True))
        for name, plan in self._heads.items():
            plan.damage, plan.kept, plan.shares = (
                [scored[i] / len(self._read) for scored in totals[name]] for i in range(len(_SCORED))
            )

    def _stored(
        self, work: Sequence[tuple[str, tasks.Task]], arrays_of: Callable[[Any], Mapping[str, np.ndarray]]
    ) -> list[Mapping[str, np.ndarray]]:
        """Results as arrays, in order; what is stored is not computed again, and what is computed is stored."""
        assert self._state is not None and self._executor is not None
        found: list[Mapping[str, np.ndarray] | None] = [self._state.arrays(name) for name, _ in work]
        for _ in (f for f in found if f is not None):
            self._progress.advance()
        missing = [i for i, f in enumerate(found) if f is None]
        size = max(self._settings.jobs, 1) * 4  # stored in between, so that little is lost
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            results = self._executor.map([work[i][1] for i in part], self._progress.advance)
            for i, result in zip(part, results, strict=True):
                found[i] = arrays_of(result)
                self._state.store(work[i][0], found[i] or {})
        return [f for f in found if f is not None]

    def _base(self, site: AttentionSite, dense: float) -> float:
        """Time of the site with its exact replacement, if it has one."""
        exact = next((e for e in self._exact if e.site.id == site.id), None)
        return dense / max(exact.decision.predicted_gain, 1.0) if exact is not None else dense

    def _space(self, plan: _HeadPlan) -> SiteSpace:
        units = [
            Unit(tuple(texts), plan.times(head), plan.damage[head], plan.modes[head])
            for head, texts in enumerate(plan.offered)
        ]
        base = self._base(plan.site, plan.dense)
        fixed = plan.time.fixed if plan.time is not None else 0.0
        more = tuple(time.fixed for time in plan.others)
        return SiteSpace(plan.site.id, base, fixed, tuple(units), 1.0, self._least, more)

    def _whole_spaces(self) -> list[SiteSpace]:
        sites = [e[0].site for e in self._whole.values()]
        if not sites:
            return []
        self._progress.stage("score approximations", len(sites) * len(self._read))
        slim = self._slim
        assert slim is not None
        scored = whole_sites.score_sites(
            self._whole, sites, [self.feeds[i] for i in self._read], [self._worlds[i] for i in self._read],
            lambda names: slim.with_outputs(names, "sites.onnx"), self._settings.threads, self._progress.advance,
        )  # fmt: skip
        spaces = []
        for site, options in zip(sites, scored, strict=True):
            shape = shape_of(site, self._worlds[0].binding)
            dense = self._gpu.before(site, shape) if self._gpu else dense_cost(site, shape).elements
            base = self._base(site, dense)
            time = np.array([base, *(dense / o.edit.decision.predicted_gain for o in options)])
            damage = np.array([0.0, *(float(np.mean(np.square(o.errors))) for o in options)])
            labels = ("as it is", *(o.edit.decision.reason for o in options))
            damage[~np.isfinite(damage)] = 1e30
            spaces.append(SiteSpace(site.id, base, 0.0, (Unit(labels, time, damage),), 1.0, self._least))
        return spaces

    def _joined(self, spaces: Sequence[SiteSpace], whole: Sequence[SiteSpace]) -> list[SiteSpace]:
        """All of them; of a site that has both, each replacement as a whole is a mode of its own, in which every head
        has one candidate with its part of time and damage.
        """
        by_site = {s.site: s for s in spaces}
        alone = [s for s in whole if s.site not in by_site]
        for other in (s for s in whole if s.site in by_site):
            space, (all_heads,) = by_site[other.site], other.units
            first, count, parts = 1 + len(space.more), len(all_heads.time) - 1, len(space.units)
            units = [
                Unit((*u.labels, *all_heads.labels[1:]), np.concatenate([u.time, all_heads.time[1:] / parts]),
                     np.concatenate([u.damage, all_heads.damage[1:] / parts]),
                     np.concatenate([u.of_modes, first + np.arange(count)]))
                for u in space.units
            ]  # fmt: skip
            more = (*space.more, *[0.0] * count)
            by_site[other.site] = replace(space, units=tuple(units), more=more)
        return [*by_site.values(), *alone]

    # Whole models.

    def _edit(self, site: str, picks: Sequence[int], space: SiteSpace | None = None) -> Edit:
        plan = self._heads.get(site)
        if plan is None:
            return self._whole[site][picks[0] - 1]
        if self._as_a_whole(site, picks):
            return self._whole[site][picks[0] - len(plan.offered[0])]
        texts = [offered[k] for offered, k in zip(plan.offered, picks, strict=True)]
        if plan.chooses(picks):
            assert isinstance(plan.mechanism, ChoosingMechanism)
            given = plan.mechanism.choice_parameters(plan.geometry, texts)
            how = "chosen for each input"
        else:
            given = plan.mechanism.head_parameters(plan.geometry, [BlockPattern(t) for t in texts])
            how = "chosen for each head"
        share = float(np.mean([s[k] for s, k in zip(plan.shares, picks, strict=True)]))
        gain = plan.dense / space.time(picks) if space is not None else 1.0
        decision = Decision(site, plan.mechanism.name, f"{share:.1%} of the blocks, {how}", False, given, gain)
        return Edit.of(plan.site, decision, plan.mechanism, self._opset)

    def _meant(self, site: str, picks: Sequence[int]) -> list[Any]:
        """What these candidates are, whatever their numbers among those that are offered."""
        plan = self._heads.get(site)
        if plan is None:
            return list(picks)  # the replacements of a site as a whole are in the state's key
        if self._as_a_whole(site, picks):
            return [picks[0] - len(plan.offered[0])]
        return [plan.chooses(picks), *(offered[k] for offered, k in zip(plan.offered, picks, strict=True))]

    def _as_a_whole(self, site: str, picks: Sequence[int]) -> bool:
        """Whether these candidates of a site with heads are one replacement for all of them."""
        return site in self._heads and picks[0] >= len(self._heads[site].offered[0])

    def edits(self, choice: Choice, spaces: Sequence[SiteSpace] = ()) -> list[Edit]:
        """The exact edits that stay, and those of ``choice``. Without ``spaces`` their gains are not predicted."""
        by_site = {s.site: s for s in spaces}
        kept = [e for e in self._exact if e.site.id not in choice]
        return [*kept, *(self._edit(site, picks, by_site.get(site)) for site, picks in choice.items())]

    def errors(self, choice: Choice, spaces: Sequence[SiteSpace], inputs: Sequence[int], metric: str) -> list[float]:
        """How far the whole model with ``choice`` is from the original on these inputs: see ``tasks.badness``."""
        assert self._state is not None and self._executor is not None and self._slim is not None
        stamp = stamp_of([metric, sorted([s, self._meant(s, p)] for s, p in choice.items())])
        names = [f"error-{stamp}-{i}" for i in inputs]
        known = [self._state.arrays(n) for n in names]
        missing = [k for k, found in enumerate(known) if found is None]
        if missing:
            self._baselines([inputs[k] for k in missing])
            provider = self._settings.provider
            path = self._slim.write(self.edits(choice, spaces))
            work = [
                tasks.Error(path, stamp, self._files[inputs[k]], self._outputs(inputs[k]), metric, provider,
                            self._language)
                for k in missing
            ]  # fmt: skip
            for k, error in zip(missing, self._executor.map(work), strict=True):
                if not np.isfinite(error) and _BROKEN not in self._warnings:
                    self._warnings.append(_BROKEN)
                known[k] = {"error": np.array(error)}
                self._state.store(names[k], {"error": np.array(error)})
        return [float(found["error"]) for found in known if found is not None]

    def measured(self, choice: Choice, spaces: Sequence[SiteSpace], limits: Limits) -> list[float]:
        """Errors on the calibration inputs, or on the first of them that show the budget to be lost."""
        return choose.until_lost(
            self._known, limits, lambda part: self.errors(choice, spaces, part, self._settings.metric),
            self._settings.jobs,
        )  # fmt: skip

    def _outputs(self, number: int) -> Path:
        return self._scratch / f"outputs-{number}.npz"

    def _baselines(self, inputs: Sequence[int]) -> None:
        missing = [i for i in inputs if not self._outputs(i).is_file()]
        path = self._found.model.path.resolve()
        assert self._executor is not None
        probed = self._probed()  # by another metric, of all outputs
        self._executor.map([
            tasks.Baseline(path, self._files[i], self._outputs(i), self._settings.provider, self._language,
                           self._language is None or i in probed) for i in missing
        ])  # fmt: skip

    def _probed(self) -> Sequence[int]:
        return self._known[: PROBES if self._language is None else _PROBES_OF_LOGITS]

    def _weighed(self, spaces: Sequence[SiteSpace]) -> list[SiteSpace]:
        """Spaces with the share of a site's squared change that arrives at the outputs, by changing one site alone."""
        inputs = self._probed()
        metric = tasks.PROBE.get(self._settings.metric, "relative_l2")
        power = 1 / tasks.POWER[metric]
        self._progress.stage("probe sites", len(spaces))
        found = []
        for space in spaces:
            picks = space.near(PROBE_DAMAGE / len(space.units))
            damage = sum(float(u.damage[k]) for u, k in zip(space.units, picks, strict=True))
            weight = 1.0
            if damage > 0 and any(picks):
                errors = self.errors({space.site: picks}, spaces, inputs, metric)
                weight = float(np.mean(np.minimum(errors, 1e6) ** power)) / damage
            found.append(replace(space, weight=max(weight, 1e-9)))
            self._progress.advance()
        return found

    # The choice.

    def limits(self) -> Limits:
        """What a choice is judged by."""
        settings = self._settings
        judged = self._answers() if settings.metric == "top1_agreement" else 0
        return Limits(
            tasks.badness(settings.metric, settings.budget), len(self._held), settings.confidence,
            tasks.POWER.get(settings.metric, 0.5), together=bool(judged) or settings.metric in tasks.TOGETHER,
            rows=judged,
        )  # fmt: skip

    def _too_few(self) -> str:
        """Why no choice can keep the budget, whatever it does to the answers of a classifier; "" where one can."""
        settings = self._settings
        if settings.density is not None or settings.metric != "top1_agreement" or not (rows := self._answers()):
            return ""
        budget, have = tasks.badness(settings.metric, settings.budget), len(self._known) * rows
        if not 0.0 < budget < 1.0 or share_bound(0, have, settings.confidence) <= budget:
            return ""
        wanted = math.ceil(math.log(1.0 - settings.confidence) / math.log1p(-budget))
        return (
            f"top1_agreement {settings.budget:g} with confidence {settings.confidence:.0%} takes {wanted} answers to "
            f"choose on of which none changes, and as many to hold out: there are {have}, give more with --inputs"
        )

    def _answers(self) -> int:
        outputs = self._found.model.proto.graph.output
        return answers(self.feeds, [world.shapes.get(o.name) for world in self._worlds for o in outputs])

    def _by_budget(self, spaces: Sequence[SiteSpace]) -> Result:
        settings = self._settings
        limits = self.limits()
        budget = limits.budget
        self._progress.stage("search", limits.evaluations)

        def measured(choice: Choice) -> list[float]:
            return self.measured(choice, spaces, limits)

        best, points = choose.tune(spaces, limits, measured, self._progress.advance)
        held: tuple[float, ...] = ()
        refused = 0
        if len(self.feeds) == 1:
            self._warnings.append("one input served for calibration and as the held-out check: give more with --inputs")
        elif best is not None:
            self._progress.stage("check on held-out inputs")
            first = best
            best, held, refused = choose.corrected(
                spaces, best, limits, measured, lambda c: self.errors(c, spaces, self._held, settings.metric)
            )
            if refused:
                self._warnings.append("what keeps the budget on the calibration inputs breaks it on held-out ones: "
                                      f"{refused} choice{'s' * (refused > 1)} refused by them")  # fmt: skip
            if best is not None and best is not first:
                points.append(best)
        if best is None:
            text = f"no approximation keeps {settings.metric} within {settings.budget:g} at the outputs"
            if any(p.mean <= budget for p in points) and len(self._known) < FEW:
                text += f" with confidence: {len(self._known)} calibration inputs say little about others, give more"
            self._warnings.append(text)
        return self._result(spaces, best, points, held, refused)

    def _by_density(self, spaces: Sequence[SiteSpace], limit: float) -> Result:
        choice = choose.within_density(spaces, limit, self.density)
        if self.density(choice) > limit:
            self._warnings.append(f"the sparsest choice keeps {self.density(choice):.1%} of the blocks")
        self._progress.stage("measure", 1)
        point = None
        held: tuple[float, ...] = ()
        if choice:
            errors = tuple(self.errors(choice, spaces, self._known, self._settings.metric))
            if len(self.feeds) > 1:
                held = tuple(self.errors(choice, spaces, self._held, self._settings.metric))
            else:
                self._warnings.append("one input served for calibration, none was held out: give more with --inputs")
            base = sum(s.base for s in spaces) or 1.0
            damage = choose.damage_of(spaces, choice)
            point = Point(choose.time_of(spaces, choice) / base, damage, errors, max(errors), choice)
        return self._result(spaces, point, [point] if point else [], held, 0)

    def kept(self, site: str) -> list[np.ndarray]:
        """Of each head of a site the share of attention weight that its candidates keep, in their order."""
        return self._heads[site].kept if site in self._heads else []

    def exported(self, site: str) -> float | None:
        """Predicted time of a site as it is in the file, where its heads are searched; ``SiteSpace.base`` is that of
        its exact replacement.
        """
        return self._heads[site].dense if site in self._heads else None

    def blocks(self, choice: Choice) -> dict[str, tuple[int, int]]:
        """Of each site of ``choice`` with fixed lists the edge of its blocks and how many all its heads have."""
        found = {}
        for site, picks in choice.items():
            if site in self._heads:
                plan = self._heads[site]
                if self._as_a_whole(site, picks) or plan.chooses(picks):
                    continue
                share = sum(float(s[k]) for s, k in zip(plan.shares, picks, strict=True))
                found[site] = (plan.geometry.edge, round(share * int(plan.geometry.all.sum())))
        return found

    def patterns(self, choice: Choice) -> dict[str, list[str]]:
        """Of each site of ``choice`` whose heads have patterns their texts, as in plan.toml."""
        return {
            site: [offered[k] for offered, k in zip(self._heads[site].offered, picks, strict=True)]
            for site, picks in choice.items() if site in self._heads and not self._as_a_whole(site, picks)
        }  # fmt: skip

    def turned(self, choice: Choice) -> set[str]:
        """Sites of ``choice`` whose heads are brought to orders of their own."""
        found = set()
        for site, picks in choice.items():
            if site in self._heads and not self._as_a_whole(site, picks):
                texts = [offered[k] for offered, k in zip(self._heads[site].offered, picks, strict=True)]
                if any(not is_selection(text) and BlockPattern(text).order for text in texts):
                    found.add(site)
        return found

    def density(self, choice: Choice) -> float:
        """Blocks over dense blocks, of all sites that have heads to choose for."""
        have = whole = 0.0
        for name, plan in self._heads.items():
            all_blocks = int(plan.geometry.all.sum())
            whole += len(plan.offered) * all_blocks
            picks = choice.get(name)
            if picks is None or self._as_a_whole(name, picks):
                have += len(plan.offered) * all_blocks
            else:
                have += all_blocks * sum(float(shares[k]) for shares, k in zip(plan.shares, picks, strict=True))
        return have / whole if whole else 1.0

    def _result(
        self, spaces: Sequence[SiteSpace], best: Point | None, points: Sequence[Point], held: tuple[float, ...],
        refused: int,
    ) -> Result:  # fmt: skip
        choice: Choice = best.choice if best is not None else {}
        by_site = {s.site: s for s in spaces}
        edits = tuple(self._edit(site, picks, by_site[site]) for site, picks in choice.items())
        fidelity: dict[str, SiteFidelity] = {}
        shown: dict[str, tuple[HeadFound, ...]] = {}
        kept = dict(self._refusals)
        for space in spaces:
            picks = choice.get(space.site)
            if picks is None:
                kept[space.site] = "no pattern of its heads is worth its share of the budget"
                if self._settings.density is not None:
                    kept[space.site] = "no pattern of its heads gains"
                elif best is None:
                    kept[space.site] = f"no approximation fits the budget {self._settings.budget:g}"
                continue
            kept.pop(space.site, None)
            error = float(np.sqrt(sum(u.damage[k] for u, k in zip(space.units, picks, strict=True))))
            mass = None
            if space.site in self._heads and not self._as_a_whole(space.site, picks):
                shown[space.site] = self._shown(self._heads[space.site], picks)
                mass = float(np.mean([h.kept for h in shown[space.site]]))
            fidelity[space.site] = SiteFidelity(error, None, mass)
        curve = tuple(CurvePoint(p.time, p.mean, p.bound, best is not None and p.choice == best.choice) for p in points)
        settings = self._settings
        by_density = settings.density is not None
        report = SearchReport(
            settings.metric, None if by_density else settings.budget, settings.confidence, len(self._known), curve,
            held, refused, self.density(choice) if self._heads else None, shown,
        )  # fmt: skip
        return Result(edits, fidelity, kept, tuple(self._warnings), report)

    def _shown(self, plan: _HeadPlan, picks: Sequence[int]) -> tuple[HeadFound, ...]:
        assert plan.mass is not None
        texts = [offered[k] for offered, k in zip(plan.offered, picks, strict=True)]
        if any(is_selection(t) for t in texts):
            seen = self._seen(plan, texts)
        else:
            seen = np.stack([BlockPattern(t).blocks(plan.geometry) for t in texts])
        found = []
        for head, (k, text) in enumerate(zip(picks, texts, strict=True)):
            kind, mass = BlockSelection(text).way if is_selection(text) else BlockPattern(text).kind, plan.mass[head]
            if not is_selection(text) and BlockPattern(text).order:
                mass = plan.masses[BlockPattern(text).order][head]
            found.append(
                HeadFound(text, kind, float(plan.shares[head][k]), float(plan.damage[head][k]),
                          float(plan.kept[head][k]), mass, seen[head])
            )  # fmt: skip
        return tuple(found)

    def _seen(self, plan: _HeadPlan, texts: Sequence[str]) -> np.ndarray:
        """Bool [H, R, R]: what heads that choose meet on the first calibration input."""
        assert self._slim is not None and self._executor is not None
        # Workers keep sessions by their paths.
        name = f"seen-{list(self._heads).index(plan.site.id)}.onnx"
        model = self._slim.with_outputs(plan.spec.read, name)
        task = tasks.Seen(
            model, self._files[self._known[0]], (plan.spec,), {plan.site.id: texts}, self._settings.provider
        )
        (found,) = self._executor.map([task])
        seen: np.ndarray = found[plan.site.id]
        return seen

    def done(self) -> None:
        """The result is in the output: nothing needs to be taken up again."""
        if self._state is not None:
            self._state.remove()


_BROKEN = "a choice that was tried does not run or gives NaN: its error counts as infinite"


_SCORED = ("error", "kept", "share")


def _flattened(found: Mapping[str, tuple[list[np.ndarray], ...]]) -> dict[str, np.ndarray]:
    return {
        f"{name}/{head}/{what}": scored[head]
        for name, lists in found.items()
        for what, scored in zip(_SCORED, lists, strict=True)
        for head in range(len(scored))
    }
