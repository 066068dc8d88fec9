"""The way of a model: load -> normalise -> detect -> plan -> replace -> verify -> build -> report."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from attncompile import budget, fit, outputs, verify, whole
from attncompile.console import Progress, SilentProgress
from attncompile.core import plan_toml
from attncompile.core.errors import BadArguments, MissingDependency, Unsupported
from attncompile.core.keep_dense import KeepDense, steps_of
from attncompile.core.mechanism import Candidate, Mechanism, kernel_parameters, understood
from attncompile.core.model import Model
from attncompile.core.plan import Decision, Plan
from attncompile.core.policy import Policy, check_budget
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.site import AttentionSite, Detection
from attncompile.core.verdict import Verdict
from attncompile.cost import predicted_gain, shape_of
from attncompile.edges import edges
from attncompile.env import environment
from attncompile.gate import Edit, SiteGate, SiteResult
from attncompile.gpu_cost import GpuCost, gpu_cost
from attncompile.ledger import Ledger
from attncompile.measure import Provider
from attncompile.passes.detect import detect
from attncompile.passes.equal_lengths import with_sums
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.grid import parse_grid
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from attncompile.passes.whole_grid import whole_grid
from attncompile.plugins import kernels, mechanisms
from attncompile.policy import decide, load_policy
from attncompile.report import Report, SiteReport, TargetReport, model_info
from attncompile.shaped import sizes_of
from attncompile.targets import base
from attncompile.targets.base import Target
from attncompile.targets.engine import EngineOptions


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line can say. ``profile`` holds only the ranges that the user gave; ``sites`` limits the run to
    these ids; ``precision`` is that of the engine (``fp16`` or ``bf16``), None for the model's own; ``architectures``
    those that kernels are compiled for, empty for the GPUs of this machine, or all where it has none; ``fusions``
    whether what lies between the sites is fused for ONNX Runtime's GPU provider, ``half_norms`` whether residual sums
    go into norms in fp16 too. ``density`` asks for so many of the blocks of full attention in place of an error budget;
    ``keep_dense``: the rule for calls that nothing is approximated in (None: the plan's or the policy's);
    ``jobs`` (None: one a core) processes of ``executor`` do the search, in sessions of ``provider``.
    ``fitted``: a file of feature maps for linear attention, which are fitted where there is none and the policy wants
    some.
    """

    policy: str = "exact"
    target: str | None = None
    out: Path | None = None
    inputs: Path | None = None
    profile: Mapping[str, Range] = field(default_factory=dict)
    max_error: float | None = None
    metric: str | None = None
    dry_run: bool = False
    plan: Path | None = None
    fitted: Path | None = None
    require_sites: int | None = None
    strict: bool = False
    keep_slower: bool = False
    precision: str | None = None
    grid: str | None = None
    threads: int | None = None
    hash_weights: bool = False
    seed: int = 0
    sites: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ()
    fusions: bool = True
    half_norms: bool = True
    density: float | None = None
    keep_dense: str | None = None
    jobs: int | None = None
    executor: str = "local"
    provider: Provider = "cpu"
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model holds. ``normal`` is the form that replacements are made in, or the reason why there is none;
    ``feeds`` are the user's inputs. ``plain`` is what ``normal`` was before operands were given rank 4, operators
    written out and windows taken to their attention (None: the same): what is written goes back to it where nothing
    was replaced.
    """

    model: Model
    normal: Model | Unsupported
    profile: ShapeProfile
    index: GraphIndex
    detection: Detection
    seconds: float
    feeds: tuple[Mapping[str, np.ndarray], ...] = ()
    plain: Model | None = None

    @property
    def ledger(self) -> Ledger:
        """What the assumptions of replacements are read from."""
        return Ledger(self.index, self.profile, self.model.opset, edges(self.profile, self.detection.sites))


class Worlds:
    """The model at the bindings of a run, each evaluated once."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        self._worlds: dict[tuple[tuple[str, int], ...], World] = {}

    def __call__(self, binding: Mapping[str, int]) -> World:
        key = tuple(sorted(binding.items()))
        if key not in self._worlds:
            self._worlds[key] = World(self._index, binding)
        return self._worlds[key]


def inspect(path: Path, options: Options) -> Inspection:
    """Load, normalise and detect; nothing is written and no weight is read that is not needed.

    Sizes that the profile only assumes are widened to those of the user's inputs.
    """
    start = time.perf_counter()
    model = with_sums(load(path, hash_weights=options.hash_weights), options.profile)
    feeds = tuple(verify.load_inputs(options.inputs, model.proto)) if options.inputs else ()
    profile = widened(profile_for(model, options.profile), model, feeds)
    normal: Model | Unsupported
    try:
        normal = normalise(model)
    except Unsupported as error:
        normal = error
    index = GraphIndex(model if isinstance(normal, Unsupported) else normal)
    grid = parse_grid(options.grid) if options.grid else None
    detection = detect(index.model, profile, index=index, grid=grid)
    plain = None
    if isinstance(normal, Model) and any(m.code in HELPED for m in detection.near_misses):
        separated = separate(normal, profile)
        if separated is not normal:
            plain, normal, index = normal, separated, GraphIndex(separated)
            detection = detect(normal, profile, index=index, grid=grid)
    if isinstance(normal, Model):
        whole_model, detection = whole_grid(normal, profile, detection, grid)
        if whole_model is not normal:
            plain, normal, index = plain or normal, whole_model, GraphIndex(whole_model)
    return Inspection(model, normal, profile, index, detection, time.perf_counter() - start, feeds, plain)


def widened(profile: ShapeProfile, model: Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> ShapeProfile:
    """``profile`` with the sizes of ``feeds`` inside its ranges, where the user gave none."""
    ranges = dict(profile.ranges)
    for feed in feeds:
        for symbol, size in sizes_of(model, feed).items():
            r = ranges[symbol]
            if r.assumed and size:  # an empty cache is no size to compile for
                ranges[symbol] = replace(r, minimum=min(r.minimum, size), maximum=max(r.maximum, size))
    return ShapeProfile(ranges)


def plan(found: Inspection, options: Options) -> Plan:
    """One decision a site, by the policy; nothing is measured."""
    target = base.get(options.target or "onnx")
    made = _plan(found, options, mechanisms(), target, Worlds(found.index))
    rule = keep_dense(found, options, made)
    if rule is None:
        return made
    return replace(made, notes=(*made.notes, f"nothing is approximated in calls with {rule.text}"))


def compile(path: Path, options: Options, progress: Progress | None = None) -> Report:  # noqa: A001
    """Everything: detect, decide, replace, prove, measure, build, and write ``OUT/`` whole or not at all.

    Raises:
        AttncompileError: nothing could be written; see its hint.
    """
    progress = progress or SilentProgress()
    clock = _Clock()
    out = options.out or Path(f"{path.stem}.attncompile")
    target = outputs.target(options.target, options.precision, options.engine)
    outputs.check(out, path)

    progress.stage("detect")
    found = inspect(path, options)
    registry = _registry(found, options)
    clock.lap("detect")

    progress.stage("plan")
    worlds = Worlds(found.index)
    chosen = _read_plan(options.plan, found) if options.plan else _plan(found, options, registry, target, worlds)
    rule = keep_dense(found, options, chosen)
    warnings = [*found.model.notes, *chosen.notes]
    if rule is not None:
        chosen = replace(chosen, options={**chosen.options, "keep_dense": rule.text})
        target = _without_branches(options, target, rule, warnings)
    clock.lap("plan")

    edits = _edits(found, chosen, registry)
    if options.plan and not all(e.decision.exact for e in edits):
        options, chosen = budget.of_plan(options, chosen, load_policy(options.policy, registry))
    exact_sides = _exact_sides(found, chosen, registry) if rule is not None else []
    in_force = {e.site.id: e.decision for e in edits}  # exactness and assumptions are never a plan file's to say
    chosen = replace(chosen, decisions=tuple(in_force.get(d.site, d) for d in chosen.decisions))
    checker = SiteGate(
        worlds, list(found.profile.bindings()), threads=options.threads, seed=options.seed,
        keep_slower=options.keep_slower, edges=found.ledger.edges,
    )  # fmt: skip
    progress.stage("check sites", len(edits))
    results: dict[str, SiteResult] = {}
    for edit in edits:
        results[edit.site.id] = checker.check(edit)
        progress.advance()
    checked = [(e, checker.check(e)) for e in exact_sides]
    sides = [(e, result) for e, result in checked if _stays(result, target)]
    clock.lap("check sites")

    kept = [e for e in edits if _stays(results[e.site.id], target)]
    with outputs.staged(out) as folder:
        gpu = gpu_of(options, target, worlds)
        run = whole.Run(found, options, found.feeds, kept, results, registry, worlds, checker, progress, folder,
                        out.with_name(f".{out.name}.search"), gpu, rule, sides, clock.lap)  # fmt: skip
        outcome = run.finish(chosen)
        clock.lap("verify the model")
        target = outputs.configured(target, options, outcome.plan)
        built = outputs.build(found, options, target, run.proto_for(target), folder, run.evidence, progress)
        # A target that was asked for and cannot be had is a failure; one that was tried by default is a warning.
        failures, warned = (built.problems, ()) if options.target else ((), built.problems)
        clock.lap("build")
        report = _report(found, options, target, outcome, built.reports, [*warnings, *warned], failures, clock, out)
        if failures and built.missing:
            report = replace(report, exit_code=MissingDependency.exit_code)
        outputs.write(folder, report, outcome.plan)
        used = {s.site.id: str(s.decision.parameters["fit"]) for s in report.sites if s.decision.mechanism == fit.NAME}
        if used and run.fitted is not None:  # what plan.toml's digests stand for
            fit.save(folder / fit.FILE, run.fitted.only(used))
    run.done()
    return report


def keep_dense(found: Inspection, options: Options, chosen: Plan) -> KeepDense | None:
    """The rule for calls that stay dense: the option's, else the plan's, which is the policy's unless it was edited.

    Raises:
        BadArguments: it is no rule, or the model has no such input.
    """
    text = options.keep_dense or chosen.options.get("keep_dense")
    if not text:
        return None
    if not isinstance(text, str):
        raise BadArguments(f"the plan's keep_dense is not a text: {text!r}", "write a rule such as 'time >= 0.7'")
    rule = KeepDense.parse(text)
    rule.check(found.model.proto)
    return rule


def _without_branches(options: Options, target: Target, rule: KeepDense, warnings: list[str]) -> Target:
    """``target``, or ``onnx`` in the place of a default one that takes no model with both sides.

    Raises:
        BadArguments: such a one was asked for.
    """
    if target.takes_branches:
        return target
    why = f"'{rule.text}' puts an If around each site, and no engine with one was tried"
    if options.target is not None:
        raise BadArguments(
            f"target {target.name}: {why}",
            "build for --target onnx or onnxruntime-cuda; or without the rule, and call the original in the steps that "
            "stay dense",
        )
    warnings.append(f"nothing is built for {target.name}: {why}")
    return base.get("onnx")


def _stays(result: SiteResult, target: Target) -> bool:
    """Whether a replacement comes into the whole model. What is slow on this CPU may still be for the target's GPU."""
    return not result.rolled_back or (result.slower and target.runs_kernels)


def _plan(
    found: Inspection, options: Options, registry: Sequence[Mechanism], target: Target, worlds: Worlds
) -> Plan:  # fmt: skip
    policy = load_policy(options.policy, registry)
    if options.density is not None and not policy.approximate:
        raise BadArguments(f"--density: policy {policy.name} approximates nothing", "give --policy sparse")
    if options.density is not None and policy.approximate == (fit.NAME,):
        raise BadArguments(f"--density counts blocks, and policy {policy.name} leaves none out", "give --max-error")
    if options.density is None and options.max_error is None and options.metric not in (None, policy.metric):
        raise BadArguments(f"--metric {options.metric} has no default budget", "give one with --max-error")
    unknown = [s for s in options.sites if s not in {site.id for site in found.detection.sites}]
    if unknown:
        raise BadArguments(f"--site: the model has no site '{unknown[0]}'", "list its sites: attncompile inspect MODEL")
    gpu = gpu_of(options, target, worlds)
    if gpu is not None and options.keep_slower:
        policy = replace(policy, min_gain=0.0)
    decisions = tuple(_decide(found, policy, site, registry, options.sites, gpu) for site in found.detection.sites)
    notes = [f"gains are predicted {gpu.said}, not measured"] if gpu else []
    if isinstance(found.normal, Unsupported):
        notes.append(f"nothing is replaced: {found.normal.message}")
    elif found.normal.notes:
        notes += [n for n in found.normal.notes if n not in found.model.notes]
    if any(r.assumed for r in found.profile.ranges.values()):
        ranges = ", ".join(
            f"{n}={r.minimum}:{r.usual}:{r.maximum}" for n, r in found.profile.ranges.items() if r.assumed
        )
        notes.append(f"assumed sizes of dynamic dimensions: {ranges} (set them with --profile)")
    if options.max_error and not policy.approximate:
        notes.append(f"--max-error is not used: policy {policy.name} approximates nothing")
    if policy.approximate and options.inputs is None:
        notes.append(f"policy {policy.name}: exact replacements only, because no --inputs were given")
    if policy.approximate and options.inputs is not None and (options.metric or policy.metric) == "perplexity":
        verify.next_token(found.model.proto)  # what cannot be measured is refused before hours of search
    largest = policy.max_error if options.max_error is None else options.max_error
    check_budget(largest, options.metric or policy.metric, "--max-error")
    asked = {"max_error": largest} if options.density is None else {"density": options.density}
    settings: dict[str, object] = {**asked, "metric": options.metric or policy.metric}
    if options.keep_dense and not policy.approximate:
        raise BadArguments(f"--keep-dense: policy {policy.name} approximates nothing", "give --policy sparse")
    if rule := options.keep_dense or policy.keep_dense:
        settings["keep_dense"] = rule
    elif policy.approximate and target.takes_branches and len(steps := steps_of(found.model.proto, found.feeds)) == 1:
        notes.append(
            f"input '{steps[0]}' is another number from call to call: if some calls bear less error, as the first "
            f"steps of a sampler may, --keep-dense '{steps[0]} >= NUMBER' keeps those dense"
        )
    return Plan(found.model.hash, policy.name, decisions, settings if policy.approximate else {}, tuple(notes))


def gpu_of(options: Options, target: Target, worlds: Worlds) -> GpuCost | None:
    """What the target's GPU takes; None where sites are judged on this CPU."""
    if not target.runs_kernels:
        return None
    return gpu_cost(worlds, kernels(), options.precision, target, options.keep_slower)


def _decide(
    found: Inspection, policy: Policy, site: AttentionSite, registry: Sequence[Mechanism], only: tuple[str, ...],
    gpu: GpuCost | None,
) -> Decision:  # fmt: skip
    if isinstance(found.normal, Unsupported):
        return Decision(site.id, "keep", found.normal.message)
    if only and site.id not in only:
        return Decision(site.id, "keep", "not among the sites given by --site")
    by_name = {m.name: m for m in registry}

    opset, bindings = found.normal.opset, [binding for _, binding in found.profile.bindings()]

    def gain_of(candidate: Candidate) -> float | Verdict:
        if gpu is not None:  # nothing will be measured: the replacement has to win at every shape
            mechanism = by_name[candidate.mechanism]
            lowering = mechanism.lower(site, kernel_parameters(mechanism, site, candidate.parameters), opset)
            try:
                return min(gpu.gain(site, lowering, binding) for binding in bindings)
            except Unsupported as error:
                return 1.0 if gpu.keep_slower and error.code == "cost" else Verdict.of(error)
        shapes = [shape_of(site, binding) for binding in bindings]
        costs = [by_name[candidate.mechanism].cost(site, candidate.parameters, s) for s in shapes]
        return max(predicted_gain(site, c, s) for c, s in zip(costs, shapes, strict=True))

    decision = decide(policy, site, registry, opset, gain_of, gpu.least_gain if gpu else 0.0)
    if decision.kept:
        return decision
    chosen = by_name[decision.mechanism]
    return replace(decision, assumptions=found.ledger.of(site, chosen, decision.parameters, decision.exact))


def _read_plan(path: Path, found: Inspection) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise BadArguments(f"cannot read plan {path}: {reason}", "write one with attncompile plan MODEL") from None
    loaded = plan_toml.loads(text, str(path))
    if loaded.model_hash != found.model.hash:
        raise BadArguments(f"plan {path} was made for another model", "write a new one with attncompile plan MODEL")
    ids = {s.id for s in found.detection.sites}
    for decision in loaded.decisions:
        if decision.site not in ids:
            raise BadArguments(f"plan {path} names site '{decision.site}', which the model does not have",
                               "list the sites: attncompile inspect MODEL")  # fmt: skip
    return loaded


def _edits(found: Inspection, chosen: Plan, registry: Sequence[Mechanism]) -> list[Edit]:
    """Lowerings of the plan's replacements.

    Raises:
        BadArguments: the plan asks for a mechanism that is not there or cannot do it.
    """
    by_name = {m.name: m for m in registry}
    sites = {s.id: s for s in found.detection.sites}
    edits = []
    for decision in chosen.decisions:
        if decision.kept or isinstance(found.normal, Unsupported):
            continue
        site = sites[decision.site]
        mechanism = by_name.get(decision.mechanism)
        if mechanism is None:
            raise BadArguments(f"the plan's mechanism '{decision.mechanism}' for {site.id} does not exist",
                               f"there are {', '.join(by_name)} and keep")  # fmt: skip
        known = understood(mechanism, site)
        verdict = mechanism.supports(site, decision.parameters) if known.ok else known
        if not verdict.ok:
            raise BadArguments(f"{decision.mechanism} cannot replace {site.id}: {verdict.reason}",
                               verdict.hint or 'correct its parameters, or write mechanism = "keep"')  # fmt: skip
        exact = mechanism.is_exact_for(site, decision.parameters).ok
        assumed = found.ledger.of(site, mechanism, decision.parameters, exact)
        edits.append(Edit.of(site, replace(decision, exact=exact, assumptions=assumed), mechanism, found.normal.opset))
    return edits


def _exact_sides(found: Inspection, chosen: Plan, registry: Sequence[Mechanism]) -> list[Edit]:
    """The plan's exact replacements of approximated sites, for calls that stay dense."""
    given = [
        replace(d, mechanism=d.dense.mechanism, parameters=d.dense.parameters, dense=None)
        for d in chosen.decisions if not d.kept and d.dense is not None
    ]  # fmt: skip
    made = _edits(found, replace(chosen, decisions=tuple(given)), registry)
    for edit in made:
        if not edit.decision.exact:
            raise BadArguments(
                f"the plan's dense replacement of {edit.site.id} by {edit.decision.mechanism} is not exact",
                "delete its table [site.dense]",
            )
    return made


def edits(found: Inspection, options: Options) -> list[Edit]:
    """What a plan (the options' file, else the policy's) replaces by what; nothing is checked or measured.

    Raises:
        BadArguments: as ``compile``.
    """
    return sides(found, options)[0]


def sides(found: Inspection, options: Options) -> tuple[list[Edit], list[Edit]]:
    """``edits``, and what approximated sites are replaced by in calls that stay dense.

    Raises:
        BadArguments: as ``compile``.
    """
    registry = _registry(found, options)
    chosen = _read_plan(options.plan, found) if options.plan else plan(found, options)
    made = _edits(found, chosen, registry)
    return made, _exact_sides(found, chosen, registry) if keep_dense(found, options, chosen) is not None else []


def _registry(found: Inspection, options: Options) -> tuple[Mechanism, ...]:
    """All mechanisms, that for fitted maps with those of the options' file.

    Raises:
        BadArguments: the file is none, or was made for another model.
    """
    if options.fitted is None:
        return mechanisms()
    given = fit.load(options.fitted)
    if given.model_hash != found.model.hash:
        raise BadArguments(f"the maps in {options.fitted} were fitted to another model",
                           "fit this one with attncompile fit MODEL --inputs FILE")  # fmt: skip
    return fit.with_maps(mechanisms(), given.maps)


def _report(
    found: Inspection, options: Options, target: Target, outcome: whole.Outcome, targets: Sequence[TargetReport],
    warnings: list[str], problems: Sequence[str], clock: _Clock, out: Path,
) -> Report:  # fmt: skip
    decisions = {d.site: d for d in outcome.plan.decisions}
    sites = []
    for site in found.detection.sites:
        result = outcome.results.get(site.id, SiteResult())
        decision = decisions.get(site.id, Decision(site.id, "keep", "not in the plan"))
        sites.append(SiteReport(site, decision, result.exactness, outcome.fidelity.get(site.id), result.timings,
                                result.rolled_back))  # fmt: skip
    failures = [*outcome.failures, *problems]
    if options.require_sites is not None and len(sites) < options.require_sites:
        failures.append(f"{len(sites)} attention sites were found, --require-sites asks for {options.require_sites}")
    elsewhere = {s.id for s in found.detection.sites if s.id in outcome.on_gpu} if target.runs_kernels else set()
    rolled = [s for s in sites if s.rolled_back and s.site.id not in elsewhere]
    for s in rolled:
        warnings.append(f"{s.site.id} was rolled back: {s.rolled_back}")
    for s in sites:
        if s.rolled_back and s.site.id in elsewhere:
            warnings.append(f"{s.site.id} is replaced for {target.name} only; in model.onnx it is {s.rolled_back}")
    if elsewhere and outcome.parity and outcome.on_gpu_error is not None:
        said = f"through their bodies here, {outcome.parity.metric} {outcome.on_gpu_error:.1e}"
        warnings.append(f"{target.name}: {len(elsewhere)} of {len(sites)} sites replaced; {said}")
    if options.strict and rolled:
        failures.append(f"{len(rolled)} replacements were rolled back (--strict)")
    replaced = any(s.replaced for s in sites)
    if not replaced and not elsewhere and isinstance(found.normal, Model):
        # What was done to the model in memory says nothing about a file that is the input.
        warnings = [w for w in warnings if w in found.model.notes or w not in found.normal.notes]
    return Report(
        environment=environment(options.threads), model=model_info(found.model), policy=outcome.plan.policy,
        options=outcome.plan.options, profile=found.profile.ranges, sites=tuple(sites),
        near_misses=found.detection.near_misses,
        outcome="replaced" if replaced or elsewhere else "rolled_back" if rolled else "unchanged",
        parity=outcome.parity, timings=outcome.timings, targets=tuple(targets),
        warnings=(*warnings, *outcome.warnings), failures=tuple(failures), seconds=clock.laps, out=str(out),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), exit_code=1 if failures else 0,
        bisection=outcome.bisection, search=outcome.search, fit=outcome.fit,
    )  # fmt: skip


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
