"""The rewritten model as a whole: approximations, parity, speed, roll-backs, and the files of ``OUT/``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto

from attncompile import __version__, measure, search, verify
from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.plan import Plan
from attncompile.gate import Edit, SiteGate, SiteResult
from attncompile.passes.replace import apply
from attncompile.policy import load_policy
from attncompile.report import OutputComparison, Parity, ShapeTiming, SiteFidelity
from attncompile.targets import onnx as onnx_target

if TYPE_CHECKING:
    from attncompile.console import Progress
    from attncompile.core.mechanism import Mechanism
    from attncompile.pipeline import Inspection, Options, Worlds

Feed = Mapping[str, np.ndarray]
_SCRATCH = ".scratch"
TIMING_SECONDS = 10.0
"""Time for the paired rounds of the whole model at each shape."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a plan. ``plan`` holds the decisions in force, ``results`` what the gates found at each site."""

    plan: Plan
    results: Mapping[str, SiteResult]
    fidelity: Mapping[str, SiteFidelity] = field(default_factory=dict)
    parity: Parity | None = None
    timings: tuple[ShapeTiming, ...] = ()
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Shaped:
    """Inputs at one shape; ``label`` is that of the profile, or ``inputs`` for the user's."""

    label: str
    bindings: Mapping[str, int]
    feed: Feed


class Run:
    """One compilation from the moment that the sites were checked alone."""

    def __init__(
        self, found: Inspection, options: Options, feeds: Sequence[Feed], edits: Sequence[Edit],
        results: dict[str, SiteResult], registry: Sequence[Mechanism], worlds: Worlds, checker: SiteGate,
        progress: Progress, folder: Path,
    ) -> None:  # fmt: skip
        self._found = found
        self._options = options
        self._feeds = feeds
        self._edits = list(edits)
        self._results = results
        self._registry = registry
        self._worlds = worlds
        self._checker = checker
        self._progress = progress
        self._folder = folder
        self._baseline = verify.Baseline(found.model.path)
        self._bfloat16 = verify.uses_bfloat16(found.model.proto)
        self._warnings: list[str] = []
        self._fidelity: dict[str, SiteFidelity] = {}
        self._policy = load_policy(options.policy, registry)

    def finish(self, plan: Plan) -> Outcome:
        """Approximates if the policy and inputs allow it, then gates the whole model and writes ``model.onnx``."""
        if self._may_approximate():
            plan = self._approximate(plan)
        if not self._feeds:  # only a plan file can ask for this
            self._undo([e for e in self._edits if not e.decision.exact], "an approximation needs --inputs")
        if not self._edits:
            self._write(())
            shutil.rmtree(self._folder / _SCRATCH, ignore_errors=True)
            evidence = Parity(True, "relative_l2", self._budget(), 0.0, "none",
                              reason="nothing was replaced: the output is the input")  # fmt: skip
            return Outcome(plan, self._results, self._fidelity, evidence, (), tuple(self._warnings))
        self._progress.stage("verify the model")
        shaped = self._shaped()
        parity = self._parity(shaped)
        timings: tuple[ShapeTiming, ...] = ()
        if self._edits:
            timings = self._never_slower(shaped)
        if not self._edits:
            self._write(())
            parity = replace(parity, evidence="none", passed=True, value=0.0, comparisons=(),
                             reason="every replacement was undone: the output is the input")  # fmt: skip
        elif parity.passed:
            parity = self._compare(shaped, self._folder / "polygraphy")
        shutil.rmtree(self._folder / _SCRATCH, ignore_errors=True)
        failures = () if parity.passed else (f"parity: {parity.reason}",)
        return Outcome(plan, self._results, self._fidelity, parity, timings, tuple(self._warnings), failures)

    def evidence(self) -> list[Feed]:
        """The user's inputs, or seeded ones at the shapes at which the original runs."""
        return list(self._feeds) or [s.feed for s in self._shaped()]

    def proto_for(self, fuses_dense: bool) -> ModelProto:
        """The model for one target, from the decisions in force. One that fuses dense attention keeps its dense sites
        and gets the others without run-time branches.
        """
        if not fuses_dense:
            return self._proto(self._edits) if self._edits else self._found.model.proto
        by_name = {m.name: m for m in self._registry}
        opset = self._found.index.model.opset
        edits = []
        for edit in self._edits:
            mechanism = by_name[edit.decision.mechanism]
            if mechanism.skips_keys:
                parameters = mechanism.without_branches(edit.decision.parameters)
                edits.append(Edit.of(edit.site, replace(edit.decision, parameters=parameters), mechanism, opset))
        return self._proto(edits) if edits else self._found.model.proto

    # Approximations.

    def _may_approximate(self) -> bool:
        given = bool(self._policy.approximate) and self._options.plan is None
        if given and self._feeds and self._bfloat16:
            self._warnings.append(
                "nothing is approximated in a bfloat16 model: ONNX Runtime's CPU provider cannot run it"
            )
            return False
        return given and bool(self._feeds) and self._limit() > 0 and not isinstance(self._found.normal, Unsupported)

    def _limit(self) -> float:
        given = self._options.max_error
        return self._policy.max_error if given is None else given

    def _approximate(self, plan: Plan) -> Plan:
        taken = {e.site.id for e in self._edits}
        sites = self._found.detection.sites
        allowed = sites[self._policy.keep_first : len(sites) - self._policy.keep_last]
        if self._options.sites:
            allowed = tuple(s for s in allowed if s.id in self._options.sites)
        worlds = [self._worlds(self._binding(feed)) for feed in self._feeds]
        opset = self._found.index.model.opset
        choices: dict[str, list[Edit]] = {}
        for site in allowed:
            if site.id not in taken:
                found = search.options_for(site, self._policy, self._registry, worlds, opset)
                if found:
                    choices[site.id] = found
        open_sites = [s for s in allowed if s.id in choices]
        if not open_sites:
            self._warnings.append("no site has an approximation with a predicted gain worth it at the inputs' sizes")
            return plan
        known, _ = search.split(self._feeds)
        known_worlds = [w for f, w in zip(self._feeds, worlds, strict=True) if any(f is k for k in known)]
        self._progress.stage("score approximations", len(open_sites) * len(known))
        options = search.score_sites(choices, open_sites, known, known_worlds, self._found.index.model.proto,
                                     self._write_scratch, self._options.threads, self._progress.advance)  # fmt: skip
        self._progress.stage("search")
        exact = list(self._edits)
        chosen, _ = search.search(
            options, self._limit(), lambda edits: self._error([*exact, *edits], self._feeds), self._progress.advance
        )
        if len(self._feeds) == 1:
            self._warnings.append("one input served for calibration and as the held-out check: give more with --inputs")
        decisions = {d.site: d for d in plan.decisions}
        for option in chosen:
            result = self._checker.check(option.edit)
            self._results[option.edit.site.id] = result
            self._fidelity[option.edit.site.id] = option.fidelity
            decisions[option.edit.site.id] = option.edit.decision
            if not result.rolled_back:
                self._edits.append(option.edit)
        for site in open_sites:
            if decisions[site.id].kept:
                least = min(o.error for group in options for o in group if o.edit.site.id == site.id)
                reason = (
                    f"no approximation fits the budget {self._limit():g} (the closest changes the site by {least:.1%})"
                )
                decisions[site.id] = replace(decisions[site.id], reason=reason)
        if not chosen:
            self._warnings.append(f"no approximation keeps {self._metric()} within {self._limit():g} at the outputs")
        return replace(plan, decisions=tuple(decisions[d.site] for d in plan.decisions))

    def _metric(self) -> str:
        return self._options.metric or self._policy.metric

    def _binding(self, feed: Feed) -> dict[str, int]:
        """The sizes of the dynamic dimensions in a feed that was checked against the model."""
        from attncompile.passes.evaluate import symbol_of

        binding = dict(self._found.profile.usual())
        for info in self._found.model.proto.graph.input:
            if info.name in feed:
                for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                    symbol = symbol_of(info.name, axis, dim)
                    if symbol is not None:
                        binding[symbol] = feed[info.name].shape[axis]
        return binding

    def _error(self, edits: Sequence[Edit], feeds: Sequence[Feed]) -> float:
        """How far the model is from the original, as a number that must not exceed the budget (inf if unusable)."""
        if not edits:
            return 0.0
        path = self._write_scratch(self._proto(edits))
        found = verify.compare_models(self._baseline, path, feeds, budget=self._limit(), metric=self._metric())
        if found.passed:
            return 0.0 if self._metric() != "relative_l2" else found.error
        return float("inf")

    # Gates on the whole model.

    def _shaped(self) -> list[_Shaped]:
        """Seeded inputs at every shape at which the original runs, and the user's."""
        found: list[_Shaped] = []
        session = None if self._bfloat16 else measure.open_session(self._found.model.path, self._options.threads)
        for label, binding in self._found.profile.bindings():
            feed = verify.make_inputs(self._found.model, binding, self._options.seed)
            try:
                if session is not None:
                    measure.run_session(session, feed)
            except AttncompileError as error:
                sizes = ", ".join(f"{n}={v}" for n, v in binding.items())
                self._warnings.append(
                    f"the original itself does not run at {sizes}, so nothing was checked there: set --profile "
                    f"({error.message[:160]})"
                )
                continue
            found.append(_Shaped(label, binding, feed))
        found += [_Shaped("inputs", self._binding(f), f) for f in self._feeds]
        return found

    def _budget(self) -> float:
        approximate = any(not e.decision.exact for e in self._edits)
        return self._limit() if approximate else verify.exact_budget(self._found.model.proto)

    def _judged_by(self) -> str:
        """Rounding is judged by relative L2; approximations by what the user asked for."""
        return self._metric() if any(not e.decision.exact for e in self._edits) else "relative_l2"

    def _parity(self, shaped: Sequence[_Shaped]) -> Parity:
        """Compares; if that fails, finds the sites that fail alone and undoes them, else all."""
        self._write(self._edits)
        parity = self._compare(shaped)
        if parity.passed:
            return parity
        feeds = [s.feed for s in self._evidence(shaped)]
        for edit in list(self._edits):
            path = self._write_scratch(self._proto([edit]))
            alone = verify.compare_models(self._baseline, path, feeds, budget=self._budget(), metric=self._judged_by())
            if not alone.passed:
                self._undo([edit], f"the model's outputs change: {alone.verdict.reason}")
        if self._edits:
            self._write(self._edits)
            parity = self._compare(shaped)
            if not parity.passed:
                self._undo(list(self._edits), f"together the replacements change the outputs: {parity.reason}")
        return parity

    def _evidence(self, shaped: Sequence[_Shaped]) -> list[_Shaped]:
        """Approximations are judged on the user's inputs alone."""
        if any(not e.decision.exact for e in self._edits):
            return [s for s in shaped if s.label == "inputs"]
        return list(shaped)

    def _compare(self, shaped: Sequence[_Shaped], folder: Path | None = None) -> Parity:
        evidence = self._evidence(shaped)
        metric = self._judged_by()
        found = verify.compare_models(
            self._baseline, self._folder / "model.onnx", [s.feed for s in evidence], budget=self._budget(),
            metric=metric, folder=folder,
        )  # fmt: skip
        rows = tuple(
            OutputComparison(o.name, evidence[o.iteration].label, o.metrics, o.verdict.ok, o.verdict.reason)
            for o in found.outputs
        )
        source = "inputs" if any(s.label == "inputs" for s in evidence) else "seeded"
        return Parity(found.passed, metric, found.budget, found.worst, source, rows, found.verdict.reason)  # type: ignore[arg-type]

    def _never_slower(self, shaped: Sequence[_Shaped]) -> tuple[ShapeTiming, ...]:
        """Times the whole model at every shape; where it is slower, undoes the sites that are slower there."""
        if self._bfloat16:
            self._warnings.append("sites were timed on float32 twins and the model not at all: "
                                  "ONNX Runtime's CPU provider has no bfloat16 kernels")  # fmt: skip
            return ()
        while True:
            timings = self._time(shaped)
            slower = [t for t in timings if t.timing.slower]
            if not slower or self._options.keep_slower:
                for t in slower:
                    self._warnings.append(f"slower than the input at {t.label} shapes, kept by --keep-slower")
                return timings
            guilty = [e for e in self._edits if self._slower_alone(e, {t.label for t in slower})] or list(self._edits)
            shapes = ", ".join(f"{t.timing.ratio:.2f} at {t.label}" for t in slower)
            self._undo(guilty, f"the model is slower with it: ours / original {shapes}")
            if not self._edits:
                return ()
            self._write(self._edits)

    def _slower_alone(self, edit: Edit, labels: set[str]) -> bool:
        timings = self._results[edit.site.id].timings
        return any(t.label in labels and t.timing.ratio > 1.0 for t in timings)

    def _time(self, shaped: Sequence[_Shaped]) -> tuple[ShapeTiming, ...]:
        paths = (self._found.model.path, self._folder / "model.onnx")
        sessions = [measure.open_session(p, self._options.threads) for p in paths]
        timings = []
        # Where the original runs at none of the profile's shapes, the user's inputs are the only ones to time.
        todo = [s for s in shaped if s.label != "inputs"] or list(shaped)
        self._progress.stage("time the model", len(todo))
        for item in todo:
            timing = measure.paired_conclusive(
                sessions[0], sessions[1], item.feed, budget_seconds=TIMING_SECONDS, threads=self._options.threads
            )
            timings.append(ShapeTiming(item.label, item.bindings, timing))
            self._progress.advance()
        return tuple(timings)

    def _undo(self, edits: Sequence[Edit], reason: str) -> None:
        gone = {e.site.id for e in edits}
        self._edits = [e for e in self._edits if e.site.id not in gone]
        for name in gone:
            self._results[name] = replace(self._results[name], rolled_back=reason)

    # Files.

    def _proto(self, edits: Sequence[Edit]) -> ModelProto:
        approximate = [e.site.id for e in edits if not e.decision.exact]
        notes = {"attncompile.version": __version__}
        if approximate:
            notes["attncompile.approximate_sites"] = ",".join(approximate)
        return apply(self._found.index.model, [(e.site, e.lowering) for e in edits], notes)

    def _write(self, edits: Sequence[Edit]) -> Path:
        proto = self._proto(edits) if edits else self._found.model.proto
        return onnx_target.write(proto, self._found.model, self._folder)

    def _write_scratch(self, proto: ModelProto) -> Path:
        scratch = self._folder / _SCRATCH
        scratch.mkdir(exist_ok=True)
        return onnx_target.write(proto, self._found.model, scratch)
