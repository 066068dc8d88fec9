"""The rewritten model as a whole: approximations, parity, speed, roll-backs, and the files of ``OUT/``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from onnx import ModelProto

from attncompile import __version__, branches, fit, measure, search, verify
from attncompile.core.errors import BadModel, Unsupported
from attncompile.core.keep_dense import KeepDense
from attncompile.core.mechanism import kernel_parameters
from attncompile.core.plan import Dense, Plan
from attncompile.culprits import find_culprits
from attncompile.gate import Edit, SiteGate, SiteResult
from attncompile.gpu_cost import GpuCost
from attncompile.ledger_check import Broken, LedgerCheck
from attncompile.passes.fold_back import Folds
from attncompile.passes.load import graphs
from attncompile.passes.replace import apply
from attncompile.passes.two_sides import joined
from attncompile.policy import load_policy
from attncompile.report import Bisection, OutputComparison, Parity, ShapeTiming, SiteFidelity
from attncompile.shaped import Shaped, binding_of, both_sides, shaped_inputs
from attncompile.targets import onnx as onnx_target
from attncompile.targets.base import Target
from attncompile.verification.whole import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from attncompile.console import Progress
    from attncompile.core.mechanism import Mechanism
    from attncompile.core.site import AttentionSite
    from attncompile.passes.evaluate import World
    from attncompile.pipeline import Inspection, Options, Worlds

Feed = Mapping[str, np.ndarray]
_SCRATCH = ".scratch"
_RUNTIME_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
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
    bisection: Bisection | None = None
    on_gpu: tuple[str, ...] = ()
    """Sites that are replaced for a target which runs GPU kernels."""
    on_gpu_error: float | None = None
    """How far the outputs are from the original's with all of these, run through their bodies here."""
    search: search.SearchReport | None = None
    fit: fit.FitReport | None = None


class Run:
    """One compilation from the moment that the sites were checked alone."""

    def __init__(
        self, found: Inspection, options: Options, feeds: Sequence[Feed], edits: Sequence[Edit],
        results: dict[str, SiteResult], registry: Sequence[Mechanism], worlds: Worlds, checker: SiteGate,
        progress: Progress, folder: Path, state: Path, gpu: GpuCost | None = None, rule: KeepDense | None = None,
        dense: Sequence[tuple[Edit, SiteResult]] = (), lap: Callable[[str], None] = lambda name: None,
    ) -> None:  # fmt: skip
        """``state``: where a search keeps what it has found until it is over. ``gpu``: what the target's GPU takes.
        ``rule``: of calls in which approximated sites are as they were, or replaced by the exact edits ``dense``, of
        which the gates found these results. ``lap`` is told the name of a stage that is over.
        """
        self._found = found
        self._options = options
        self._feeds = feeds
        self._edits = list(edits)
        self._on_gpu: list[Edit] = []
        self._results = results
        self._registry = registry
        self._worlds = worlds
        self._checker = checker
        self._progress = progress
        self._folder = folder
        self._state = state
        self._gpu = gpu
        self._rule = rule
        self._dense = {e.site.id: e for e, _ in dense}
        self._dense_on_gpu: dict[str, Edit] = {}
        self._lap = lap
        self._slow_dense = {e.site.id for e, result in dense if result.slower}
        self._shown: list[Shaped] = []
        self._search: search.Search | None = None
        self._searched: search.SearchReport | None = None
        self.fitted = fit.load(options.fitted) if options.fitted is not None else None
        self._fit_report: fit.FitReport | None = None
        self._folds = Folds(found.plain.proto, found.index.model.proto) if found.plain is not None else None
        self._baseline = verify.Baseline(found.model.path)
        self._bfloat16 = verify.uses_bfloat16(found.model.proto)
        self._warnings: list[str] = []
        self._fidelity: dict[str, SiteFidelity] = {}
        self._bisection: Bisection | None = None
        self._policy = load_policy(options.policy, registry)

    def finish(self, plan: Plan) -> Outcome:
        """Approximates if the policy and inputs allow it, then gates the whole model and writes ``model.onnx``."""
        failures: tuple[str, ...] = ()
        if self._may_approximate():
            failures = self._unfit()  # before hours of search
            if not failures:
                plan = self._approximate(plan)
            self._lap("approximate")
        if not self._feeds:  # only a plan file can ask for this
            self._undo([e for e in self._edits if not e.decision.exact], "an approximation needs --inputs")
        failures = failures or self._broken_assumptions()
        self._undo_what_is_not_joined()
        foreign = _not_of_onnx_runtime(self._found.model.proto)
        if foreign and self._edits:
            self._undo(list(self._edits), f"the whole model cannot be compared: ONNX Runtime does not have {foreign}")
        if not self._edits:
            self._write(())
            shutil.rmtree(self._folder / _SCRATCH, ignore_errors=True)
            evidence = Parity(True, "relative_l2", self._budget(), 0.0, "none",
                              reason="nothing was replaced: the output is the input")  # fmt: skip
            return Outcome(plan, self._results, self._fidelity, evidence, (), tuple(self._warnings), failures,
                           search=self._in_force(), fit=self._fit_report)  # fmt: skip
        self._progress.stage("verify the model")
        shaped = self._shown = self._shaped()
        seen = [s.feed for s in self._evidence(shaped)]
        usual = self._worlds(self._found.profile.usual())
        self._undo([e for e in self._edits if e.site.scope and not branches.reached(usual, e.site, seen)],
                   "the body that holds it was not run by any inputs")  # fmt: skip
        parity = self._parity(shaped)
        self._on_gpu = [self._for_kernels(e) for e in self._edits] if parity.passed else []
        self._dense_on_gpu = {e.site.id: self._for_kernels(self._dense[e.site.id])
                              for e in self._on_gpu if e.site.id in self._dense}  # fmt: skip
        error = parity.value
        timings: tuple[ShapeTiming, ...] = ()
        slow = [e for e in self._edits if self._results[e.site.id].slower]
        self._edits = [e for e in self._edits if e not in slow]
        if self._leave_to_the_gpu() or slow:  # right, and for another target
            self._write(self._edits)
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
        if self._bisection is not None:
            self._warnings.append(self._bisection.text)
        on_gpu = tuple(e.site.id for e in self._on_gpu)
        return Outcome(plan, self._results, self._fidelity, parity, timings, tuple(self._warnings), failures,
                       self._bisection, on_gpu, error if on_gpu else None, self._in_force(),
                       self._fit_report)  # fmt: skip

    def _leave_to_the_gpu(self) -> bool:
        """Takes exact replacements that are slow on this CPU out of the dense side of ``model.onnx``; whether any."""
        gone = {e.site.id: self._dense.pop(e.site.id) for e in self._edits if e.site.id in self._slow_dense}
        if gone:
            names = " and ".join(dict.fromkeys(e.decision.mechanism for e in gone.values()))
            self._warnings.append(f"{_ids(list(gone))}: in calls that stay dense model.onnx has the site as it was, "
                                  f"which {names} is slower than here; kernels run {names}")  # fmt: skip
        return bool(gone)

    def _for_kernels(self, edit: Edit) -> Edit:
        """With the parameters that kernels like, where the target runs them and what they give was shown to be as
        exact.
        """
        mechanism = next(m for m in self._registry if m.name == edit.decision.mechanism)
        parameters = kernel_parameters(mechanism, edit.site, edit.decision.parameters)
        if self._gpu is None or not edit.decision.exact or parameters == edit.decision.parameters:
            return edit
        decision = replace(edit.decision, parameters=parameters)
        changed = Edit.of(edit.site, decision, mechanism, self._found.index.model.opset)
        refused = self._checker.exact(changed).rolled_back
        if refused:
            self._warnings.append(f"{edit.site.id}: kernels run with the parameters of model.onnx: {refused}")
        return edit if refused else changed

    def _broken_assumptions(self) -> tuple[str, ...]:
        """What the user's inputs break; then nothing stays replaced, and the run fails."""
        if not self._feeds or not self._edits or self._options.inputs is None:
            return ()
        check = self._ledger_check(self._options.inputs)
        return self._refused_for(check.broken([(e.site, e.decision) for e in self._edits]))

    def _unfit(self) -> tuple[str, ...]:
        """The user's inputs that nothing can be approximated on; then nothing stays replaced, and the run fails."""
        if self._options.inputs is None:
            return ()
        sites = [*self._open_sites(), *(e.site for e in self._edits)]
        return self._refused_for(self._ledger_check(self._options.inputs).of_any(sites))

    def _ledger_check(self, source: Path) -> LedgerCheck:
        return LedgerCheck(
            self._found.ledger, self._feeds, lambda feed: self._worlds(binding_of(self._found, feed)), source
        )

    def _refused_for(self, broken: Sequence[Broken]) -> tuple[str, ...]:
        if broken:
            self._undo(list(self._edits), f"your inputs break an assumption: {broken[0].text}")
        return tuple(f"assumption of {_ids(b.sites)}: {b.text}" for b in broken)

    def _open_sites(self) -> list[AttentionSite]:
        return search.open_sites(
            self._found.detection.sites, self._policy, self._registry, self._edits, self._options.sites
        )

    def _in_force(self) -> search.SearchReport | None:
        sites = {e.site.id for e in (*self._edits, *self._on_gpu)}
        return self._searched.only(sites) if self._searched is not None else None

    def done(self) -> None:
        """The output is in its place: a search need not be taken up again."""
        if self._search is not None:
            self._search.done()

    def evidence(self) -> list[Feed]:
        """The user's inputs, or seeded ones at the shapes at which the original runs. Where a rule tells calls apart
        and the user's are all of one kind, a seeded one of the other.
        """
        if not self._feeds:
            return [s.feed for s in self._shaped() if s.timed]
        found = list(self._feeds)
        if self._rule is not None:
            for keep in (False, True):
                if all(self._rule.holds(f) != keep for f in self._feeds):
                    seeded = (s.feed for s in self._shown if not s.given and self._rule.holds(s.feed) == keep)
                    found += list(seeded)[:1]
        return found

    def proto_for(self, target: Target) -> ModelProto:
        """The model for one target, from the decisions in force. One that runs kernels gets what was predicted to be
        faster on its GPU, though it be slow here. Another that fuses dense attention keeps its dense sites and gets the
        others without run-time branches.
        """
        if target.runs_kernels:
            return self._proto(self._on_gpu, self._dense_on_gpu) if self._on_gpu else self._found.model.proto
        if not target.fuses_dense:
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
        wanted = self._options.density is not None or self._limit() > 0
        return given and bool(self._feeds) and wanted and not isinstance(self._found.normal, Unsupported)

    def _limit(self) -> float:
        """The budget; where a density was asked for there is none."""
        if self._options.density is not None:
            return -inf if self._metric() in HIGHER_IS_BETTER else inf
        given = self._options.max_error
        return self._policy.max_error if given is None else given

    def _approximate(self, plan: Plan) -> Plan:
        """Searches among sites that are not made sparse exactly, and checks what was chosen alone."""
        options = self._options
        chosen = self._open_sites()
        settings = search.Settings(
            self._metric(), self._limit(), options.density, self._policy.confidence,
            options.jobs or measure.default_threads(), options.executor, options.threads, options.provider,
        )  # fmt: skip
        exact = list(self._edits)
        feeds = search.approximated(self._feeds, self._rule)
        if self._rule is not None and len(feeds) == len(self._feeds):
            self._warnings.append(
                f"'{self._rule.text}' holds of none of the inputs: calls that stay dense were compared on seeded ones"
            )
        worlds = [self._worlds(binding_of(self._found, feed)) for feed in feeds]
        scratch = self._folder / _SCRATCH
        scratch.mkdir(exist_ok=True)
        if fit.NAME in self._policy.approximate:
            self._fit(chosen, feeds, worlds, scratch)
        self._search = search.Search(
            self._found, self._policy, self._registry, feeds, worlds, exact, scratch, settings, self._progress,
            self._gpu, self._state,
        )  # fmt: skip
        result = self._search.run(chosen)
        self._warnings += result.warnings
        self._searched = result.report
        if self._rule is not None and result.report is not None:
            aside, count = len(self._feeds) - len(feeds), len(self._feeds)
            self._searched = replace(result.report, keep_dense=self._rule.text, set_aside=aside, inputs=count)
        decisions = {d.site: d for d in plan.decisions}
        for made in result.edits:
            edit = self._with_assumptions(made)
            checked = self._checker.check(edit)
            if checked.rolled_back and not (checked.slower and self._gpu is not None):
                if edit.site.id not in {e.site.id for e in exact}:  # else what is exact stays
                    self._results[edit.site.id] = checked
                    decisions[edit.site.id] = edit.decision
                continue
            alone = self._results.get(edit.site.id)
            self._results[edit.site.id] = checked
            if edit.site.id in result.fidelity:
                self._fidelity[edit.site.id] = result.fidelity[edit.site.id]
            if self._rule is not None:
                edit = self._sided(edit, next((e for e in exact if e.site.id == edit.site.id), None), self._rule)
                if alone is not None and alone.slower:
                    self._slow_dense.add(edit.site.id)
            decisions[edit.site.id] = edit.decision
            self._edits = [*(e for e in self._edits if e.site.id != edit.site.id), edit]
        for site, reason in result.kept.items():
            if decisions[site].kept:
                decisions[site] = replace(decisions[site], reason=reason)
        for site, decision in decisions.items():
            replaced = any(e.site.id == site for e in self._edits)
            said = self._fit_report.why(site) if self._fit_report is not None and not replaced else ""
            if said and not decision.kept:  # an exact replacement was rolled back: its reason is that of the site
                self._warnings.append(f"{site}: {said}")
            elif said:
                before = "" if self._policy.approximate == (fit.NAME,) else f"{decision.reason}; "
                decisions[site] = replace(decision, reason=before + said)
        return replace(plan, decisions=tuple(decisions[d.site] for d in plan.decisions))

    def _sided(self, edit: Edit, exact: Edit | None, rule: KeepDense) -> Edit:
        """With what the site is in calls that stay dense: replaced by ``exact``, or as it was."""
        other = None
        if exact is not None:
            self._dense[edit.site.id] = exact
            other = Dense(exact.decision.mechanism, exact.decision.parameters)
        reason = f"{edit.decision.reason}; dense where {rule.text}"
        return replace(edit, decision=replace(edit.decision, dense=other, reason=reason))

    def _undo_what_is_not_joined(self) -> None:
        """Approximations, where their model and the dense one cannot be one file."""
        if self._two_sides(self._edits):
            try:
                self._proto(self._edits)
            except Unsupported as error:
                self._undo([e for e in self._edits if not e.decision.exact], error.message)

    def _fit(
        self, sites: Sequence[AttentionSite], feeds: Sequence[Feed], worlds: Sequence[World], scratch: Path
    ) -> None:  # fmt: skip
        """Fits feature maps to these sites, or takes the given ones, for the search to choose from."""
        options = self._options
        settings = fit.Settings(
            seed=options.seed, metric=self._metric(), jobs=options.jobs or measure.default_threads(),
            threads=options.threads, executor=options.executor, provider=options.provider,
            min_gain=self._policy.min_gain,
        )  # fmt: skip
        work = fit.Fit(self._found, feeds, worlds, scratch, settings, self._progress, self._gpu)
        self.fitted, self._fit_report = work.run(sites, self.fitted)
        self._registry = fit.with_maps(self._registry, self.fitted.maps)

    def _with_assumptions(self, edit: Edit) -> Edit:
        mechanism = next(m for m in self._registry if m.name == edit.decision.mechanism)
        assumed = self._found.ledger.of(edit.site, mechanism, edit.decision.parameters, exact=False)
        return replace(edit, decision=replace(edit.decision, assumptions=assumed))

    def _metric(self) -> str:
        return self._options.metric or self._policy.metric

    # Gates on the whole model.

    def _shaped(self) -> list[Shaped]:
        session = None if self._bfloat16 else measure.open_session(self._found.model.path, self._options.threads)
        sites = [e.site for e in self._edits]
        made = shaped_inputs(
            self._found, sites, session, self._worlds, self._options.seed, self._warnings.append
        )  # fmt: skip
        if self._rule is None or session is None:
            return made
        return both_sides(made, self._rule, self._feeds, session, self._warnings.append)

    def _budget(self) -> float:
        approximate = any(not e.decision.exact for e in self._edits)
        return self._limit() if approximate else verify.exact_budget(self._found.model.proto)

    def _judged_by(self) -> str:
        """Rounding is judged by relative L2; approximations by what the user asked for."""
        return self._metric() if any(not e.decision.exact for e in self._edits) else "relative_l2"

    def _parity(self, shaped: Sequence[Shaped]) -> Parity:
        """Compares; while that fails, finds by bisection the replacements because of which it does, and undoes them."""
        self._write(self._edits)
        parity = self._compare(shaped)
        while not parity.passed and self._edits:
            self._restore_culprits(shaped, parity)
            if self._edits:  # what is left may be judged by a stricter budget: that of exact replacements
                self._write(self._edits)
                parity = self._compare(shaped)
        return parity

    def _restore_culprits(self, shaped: Sequence[Shaped], parity: Parity) -> None:
        by_id = {e.site.id: e for e in self._edits}
        reasons = {frozenset(by_id): parity.reason}

        def fails(names: Sequence[str]) -> bool:
            path = self._write_scratch(self._proto([by_id[n] for n in names]))
            found = self._compare(shaped, path=path)
            reasons[frozenset(names)] = found.reason
            self._progress.advance()
            return not found.passed

        self._progress.stage("bisect")
        found = find_culprits(list(by_id), fails)
        for group in found.groups:
            for name in group:
                others = ", ".join(n for n in group if n != name)
                text = f"together with {others} it changes the model's outputs" if others else "the outputs change"
                self._undo([by_id[name]], f"{text}: {reasons[frozenset(group)]} (bisection, {found.runs} model runs)")
        before = self._bisection
        self._bisection = Bisection(
            (*(before.groups if before else ()), *found.groups),
            before.candidates if before else len(by_id),
            found.runs + (before.runs if before else 0),
        )

    def _evidence(self, shaped: Sequence[Shaped]) -> list[Shaped]:
        """Approximations are judged on the user's inputs alone."""
        if any(not e.decision.exact for e in self._edits):
            return [s for s in shaped if s.given]
        return list(shaped)

    def _compare(self, shaped: Sequence[Shaped], folder: Path | None = None, path: Path | None = None) -> Parity:
        """The written model, or that at ``path``, against the original. A model that does not run is a failure."""
        path = path or self._folder / "model.onnx"
        evidence = self._evidence(shaped)
        metric, budget = self._judged_by(), self._budget()
        if not self._two_sides(self._edits):
            return self._compared(evidence, metric, budget, path, folder)
        assert self._rule is not None
        approximated = [s for s in evidence if not self._rule.holds(s.feed)]
        found = self._compared(approximated, metric, budget, path, folder)
        kept = [s for s in shaped if self._rule.holds(s.feed)]
        dense = self._compared(kept, "relative_l2", verify.exact_budget(self._found.model.proto), path)
        said = f"calls that stay dense: {dense.reason}"
        return replace(
            found, passed=found.passed and dense.passed, comparisons=(*found.comparisons, *dense.comparisons),
            reason=f"{found.reason}; {said}",
        )  # fmt: skip

    def _compared(
        self, evidence: Sequence[Shaped], metric: str, budget: float, path: Path, folder: Path | None = None
    ) -> Parity:
        source: Literal["inputs", "seeded"] = "inputs" if any(s.given for s in evidence) else "seeded"
        try:
            found = verify.compare_models(
                self._baseline, path, [s.feed for s in evidence], budget=budget, metric=metric, folder=folder
            )
        except (verify.RewrittenFailed, BadModel) as error:
            return Parity(False, metric, budget, None, source, reason=error.message)
        rows = tuple(
            OutputComparison(o.name, evidence[o.iteration].label, o.metrics, o.verdict.ok, o.verdict.reason)
            for o in found.outputs
        )
        return Parity(found.passed, metric, found.budget, found.worst, source, rows, found.verdict.reason)

    def _never_slower(self, shaped: Sequence[Shaped]) -> tuple[ShapeTiming, ...]:
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
            labels = {t.label.partition(",")[0] for t in slower}  # after a comma: which branch was run
            guilty = [e for e in self._edits if self._slower_alone(e, labels)] or list(self._edits)
            shapes = ", ".join(f"{t.timing.ratio:.2f} at {t.label}" for t in slower)
            self._undo(guilty, f"the model is slower with it: ours / original {shapes}")
            if not self._edits:
                return ()
            self._write(self._edits)

    def _slower_alone(self, edit: Edit, labels: set[str]) -> bool:
        timings = self._results[edit.site.id].timings
        return any(t.label in labels and t.timing.ratio > 1.0 for t in timings)

    def _time(self, shaped: Sequence[Shaped]) -> tuple[ShapeTiming, ...]:
        paths = (self._found.model.path, self._folder / "model.onnx")
        sessions = [measure.open_session(p, self._options.threads) for p in paths]
        timings = []
        # Where the original runs at none of the profile's shapes, the user's inputs are the only ones to time.
        todo = [s for s in shaped if not s.given and s.timed] or [s for s in shaped if s.timed]
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

    def _proto(self, edits: Sequence[Edit], dense: Mapping[str, Edit] | None = None) -> ModelProto:
        """With ``edits``; in calls that stay dense with ``dense``, by site, in the place of approximations (None: those
        of ``model.onnx``).
        """
        approximate = [e.site.id for e in edits if not e.decision.exact]
        notes = {"attncompile.version": __version__}
        if approximate:
            notes["attncompile.approximate_sites"] = ",".join(approximate)
        if not self._two_sides(edits):
            return self._applied(edits, notes)
        assert self._rule is not None
        notes["attncompile.keep_dense"] = self._rule.text
        instead = self._dense if dense is None else dense
        others = [e if e.decision.exact else instead.get(e.site.id) for e in edits]
        other = self._applied([e for e in others if e is not None], {})
        return joined(other, self._applied(edits, notes), self._rule)

    def _two_sides(self, edits: Sequence[Edit]) -> bool:
        """Whether there are calls in which the model with ``edits`` is another one."""
        return self._rule is not None and any(not e.decision.exact for e in edits)

    def _applied(self, edits: Sequence[Edit], notes: Mapping[str, str]) -> ModelProto:
        proto = apply(self._found.index.model, [(e.site, e.lowering) for e in edits], notes)
        if self._folds is not None:
            self._folds.undo(proto)
        return proto

    def _write(self, edits: Sequence[Edit]) -> Path:
        proto = self._proto(edits) if edits else self._found.model.proto
        return onnx_target.write(proto, self._found.model, self._folder)

    def _write_scratch(self, proto: ModelProto) -> Path:
        scratch = self._folder / _SCRATCH
        scratch.mkdir(exist_ok=True)
        return onnx_target.write(proto, self._found.model, scratch)


def _ids(ids: Sequence[str]) -> str:
    return ", ".join(ids) if len(ids) < 4 else f"{ids[0]} .. {ids[-1]} ({len(ids)})"


def _not_of_onnx_runtime(proto: ModelProto) -> str:
    """``domain::operator`` of the first node that neither ONNX Runtime nor a function of the model defines, or ""."""
    functions = {(f.domain, f.name) for f in proto.functions}
    for node in (n for graph in graphs(proto) for n in graph.node):
        if node.domain not in _RUNTIME_DOMAINS and (node.domain, node.op_type) not in functions:
            return f"{node.domain}::{node.op_type}"
    return ""
