"""What a replacement must pass before it ships: exactness of the site alone, and speed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto

from attncompile import measure, verify
from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.mechanism import Lowering, Mechanism
from attncompile.core.plan import Decision
from attncompile.core.site import AttentionSite
from attncompile.edges import Edge
from attncompile.passes.evaluate import World
from attncompile.passes.extract import SiteModel, extract_site
from attncompile.report import Exactness, ShapeTiming, SiteCase


@dataclass(frozen=True, slots=True)
class Edit:
    """A site with the decision to replace it and what it would be replaced by.

    ``twin`` is the lowering in float32 of a site that the CPU cannot run (bfloat16): what is checked and timed.
    """

    site: AttentionSite
    decision: Decision
    lowering: Lowering
    twin: Lowering | None = None

    @staticmethod
    def of(site: AttentionSite, decision: Decision, mechanism: Mechanism, opset: int) -> Edit:
        """Raises ``Unsupported`` where the mechanism has no lowering."""
        lowering = mechanism.lower(site, decision.parameters, opset)
        if site.dtype != "bfloat16":
            return Edit(site, decision, lowering)
        wide = replace(site, dtype="float32", softmax_dtype="float32")
        return Edit(site, decision, lowering, mechanism.lower(wide, decision.parameters, opset))


@dataclass(frozen=True, slots=True)
class SiteResult:
    """What the gates found. ``rolled_back`` is the reason for not replacing the site, or empty; ``slower``: the reason
    is its speed on this CPU alone, which says nothing about a target that is judged by its GPU.
    """

    exactness: Exactness | None = None
    timings: tuple[ShapeTiming, ...] = ()
    rolled_back: str = ""
    slower: bool = False


Bindings = Sequence[tuple[str, Mapping[str, int]]]
_Models = list[tuple[str, Mapping[str, int], SiteModel]]

EXTRA_CASES_BELOW = 1 << 26
"""Score elements of one run (16 heads of 2,048 tokens) above which the extra cases are left to the smaller shapes."""

LEAN_ABOVE = 1 << 27
"""Score elements of one run (8 heads of 4,096 tokens) above which sites are timed in sessions that give memory back:
ONNX Runtime's arenas keep the scores of both."""

EXTRA_MEMORY_CAP = 1 << 27
"""Bytes of a float64 intermediate above which the extra cases are judged on sampled query rows."""


class SiteGate:
    """Checks sites alone. Sites whose standalone models are the same but for names share one check."""

    def __init__(
        self, world_at: Callable[[Mapping[str, int]], World], bindings: Bindings, *, threads: int | None, seed: int,
        keep_slower: bool, seconds: float = 4.0, edges: Sequence[Edge] = (),
    ) -> None:  # fmt: skip
        """``bindings`` are the profile's shapes, which are timed too; ``edges`` further ones to be right at."""
        self._world_at = world_at
        self._bindings = bindings
        self._edges = edges
        self._threads = threads
        self._seed = seed
        self._keep_slower = keep_slower
        self._seconds = seconds
        self._results: dict[str, SiteResult] = {}

    def check(self, edit: Edit) -> SiteResult:
        """Exactness at every shape of the profile and at the edges (exact sites only), then speed. A failure is a
        result.
        """
        return self._checked(edit, timed=True)

    def exact(self, edit: Edit) -> SiteResult:
        """``check`` of an exact site without speed, which says nothing of what another machine will run."""
        return self._checked(edit, timed=False)

    def _checked(self, edit: Edit, timed: bool) -> SiteResult:
        models: _Models = []
        for label, binding in self._bindings:
            try:
                models.append((label, binding, self._extract(edit, binding)))
            except Unsupported as error:
                return SiteResult(rolled_back=f"cannot be checked at {label} shapes: {error.message}")
        beyond: list[tuple[str, list[SiteModel], str]] = []
        for edge in self._edges if edit.decision.exact else ():
            alternatives, reason = [], ""
            for binding in edge.bindings:
                try:
                    alternatives.append(self._extract(edit, binding))
                except AttncompileError as error:
                    reason = error.message
            beyond.append((edge.label, alternatives, reason))
        key = _digest([m for _, _, m in models] + [m for _, found, _ in beyond for m in found], edit.decision.exact)
        key = key if timed else f"{key} untimed"
        if key not in self._results:
            self._results[key] = self._check(edit, models, beyond, timed)
        return self._results[key]

    def _extract(self, edit: Edit, binding: Mapping[str, int]) -> SiteModel:
        return extract_site(self._world_at(binding), edit.site, edit.twin or edit.lowering)

    def _check(
        self, edit: Edit, models: _Models, beyond: Sequence[tuple[str, list[SiteModel], str]], timed: bool
    ) -> SiteResult:  # fmt: skip
        exactness = None
        if edit.decision.exact:
            exactness = self._exactness(edit, models, beyond)
            if not exactness.passed:
                return SiteResult(exactness, rolled_back=f"not exact: {exactness.reason}")
        if not timed:
            return SiteResult(exactness)
        try:
            timings = tuple(self._time(label, binding, model) for label, binding, model in models)
        except AttncompileError as error:
            return SiteResult(exactness, rolled_back=f"could not be timed: {error.message}")
        if not self._keep_slower and not any(t.timing.faster for t in timings):
            gains = ", ".join(f"{t.timing.gain:.2f}x ({_interval(t)}) at {t.label}" for t in timings)
            return SiteResult(exactness, timings, f"not faster with 95% confidence: gain {gains}", slower=True)
        return SiteResult(exactness, timings)

    def _exactness(
        self, edit: Edit, models: _Models, beyond: Sequence[tuple[str, list[SiteModel], str]]
    ) -> Exactness:  # fmt: skip
        found: list[tuple[str, verify.SiteCheck]] = []
        labels: list[str] = []
        for label, _, model in models:
            found.append((f"{label} shapes", self._check_cases(edit, model, labels)))
            if not found[-1][1].passed:
                return _exactness(found, labels)
        for label, alternatives, reason in beyond:
            for model in alternatives:
                check = self._check_cases(edit, model, labels)
                if check.verdict.code != "original_failed":
                    found.append((label, check))
                    break
                reason = f"the original does not run there ({check.verdict.reason[:120]})"
            else:
                labels.append(f"not checked at {label}: {reason or 'no such sizes'}")
        return _exactness(found, labels)

    def _check_cases(self, edit: Edit, model: SiteModel, labels: list[str]) -> verify.SiteCheck:
        site = edit.site
        made = verify.cases(
            model.inputs, model.fixed, model.roles, self._seed, scale=site.scale,
            fill=max(site.mask.fills, default=-math.inf),
            biases=[p.source for p in site.mask.parts if p.source and p.additive and p.kind != "padding"],
            dims=(site.query.layout.index("D"), site.key.layout.index("D"), site.value.layout.index("D")),
        )  # fmt: skip
        core, extra = [c for c in made if not c.extra], [c for c in made if c.extra]
        if verify.largest_intermediate(model.original) > EXTRA_CASES_BELOW and extra:
            labels.append(f"a run takes long at some shapes: not tried there: {', '.join(c.name for c in extra)}")
            extra = []
        facts = None
        if site.form.startswith(verify.FACTS_FORMS):
            witness = verify.ordinary(made[0].feed, site)
            facts = verify.FactsReference(site, model.original, witness)
        found = self._compare(edit, model, core, verify.MEMORY_CAP, facts)
        if not extra or not found.passed:
            return found
        more = self._compare(edit, model, extra, EXTRA_MEMORY_CAP, facts)
        failed = not more.passed and more.verdict.code != "nothing_compared"
        said = tuple(x for x in more.labels if x not in found.labels)
        return verify.SiteCheck(
            more.verdict if failed else found.verdict, found.checks + more.checks, found.labels + said
        )  # fmt: skip

    def _compare(
        self, edit: Edit, model: SiteModel, made: Sequence[verify.Case], memory_cap: int,
        facts: verify.FactsReference | None,
    ) -> verify.SiteCheck:  # fmt: skip
        return verify.check_site(
            model.original, model.replaced, made, query=edit.site.query, facts=facts, threads=self._threads,
            memory_cap=memory_cap,
        )  # fmt: skip

    def _time(self, label: str, binding: Mapping[str, int], model: SiteModel) -> ShapeTiming:
        feed = verify.cases(model.inputs, model.fixed, model.roles, self._seed)[0].feed
        protos = [model.original, model.replaced]
        if verify.uses_bfloat16(model.original):  # the CPU provider has no kernels for it
            protos = [verify.retype(p, verify.TO_TWIN) for p in protos]
            feed = verify.convert_feed(feed, protos[0])
        lean = verify.largest_intermediate(model.original) > LEAN_ABOVE  # both sessions would keep what they need
        pair = [measure.open_session(p.SerializeToString(), self._threads, lean=lean) for p in protos]
        timing = measure.paired_conclusive(pair[0], pair[1], feed, budget_seconds=self._seconds, threads=self._threads)
        return ShapeTiming(label, binding, timing)


def _exactness(found: Sequence[tuple[str, verify.SiteCheck]], labels: Sequence[str]) -> Exactness:
    """The verdict over all shapes; it fails where one does, or where nothing was compared."""
    ratio, distance, worst = 0.0, 0.0, ""
    texts: list[str] = []
    cases: list[SiteCase] = []
    for shapes, result in found:
        texts += [x for x in result.labels if x not in texts]
        for check in result.checks:
            judged = check.verdict.code != "not_judged"
            reason = check.note if check.verdict.ok else check.verdict.reason
            cases.append(
                SiteCase(check.case, shapes, check.verdict.ok, judged, check.error, check.original_error, reason)
            )
            if not check.verdict.ok:
                continue
            # An extreme case has a large error in the original as well: it says nothing about how near the two are.
            if math.isfinite(check.error) and check.error >= distance and not check.extreme:
                distance, worst = check.error, f"{check.case} at {shapes}"
            if check.original_error > 0 and math.isfinite(check.error):
                ratio = max(ratio, check.error / check.original_error)
    label = "; ".join([*texts, *dict.fromkeys(labels)])
    count = sum(c.judged for c in cases)
    failed = next(((s, r) for s, r in found if not r.passed), None)
    if failed is not None:
        reason = f"at {failed[0]}: {failed[1].verdict.reason}"
        return Exactness(False, count, label=label, worst_case=failed[0], reason=reason, checks=tuple(cases))
    if not count:
        return Exactness(False, 0, label=label, reason="nothing was compared", checks=tuple(cases))
    return Exactness(True, count, ratio or None, distance if worst else None, label, worst, checks=tuple(cases))


def _interval(item: ShapeTiming) -> str:
    """The 95% interval of the gain, which is that of the ratio turned over."""
    t = item.timing
    low = f"{1 / t.high:.2f}" if math.isfinite(t.high) and t.high > 0 else "?"
    return f"{low}..{1 / t.low:.2f}" if t.low > 0 else f"{low}..?"


def _digest(models: Sequence[SiteModel], exact: bool) -> str:
    digest = hashlib.sha256(repr(exact).encode())
    for model in models:
        names: dict[str, str] = {}
        for proto in (model.original, model.replaced):
            _digest_proto(digest, proto, names)
        for name, value in model.fixed.items():
            digest.update(names.get(name, "?").encode() + np.ascontiguousarray(value).tobytes())
        digest.update(repr([(names.get(n, "?"), s) for n, s in model.inputs.items()]).encode())
    return digest.hexdigest()


def _digest_proto(digest: hashlib._Hash, proto: ModelProto, names: dict[str, str]) -> None:
    def canonical(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}") if name else ""

    for node in proto.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = copy.doc_string = ""
        del copy.metadata_props[:]
        copy.input[:] = [canonical(i) for i in node.input]
        copy.output[:] = [canonical(o) for o in node.output]
        digest.update(copy.SerializeToString(deterministic=True))
    for tensor in sorted(proto.graph.initializer, key=lambda t: canonical(t.name)):
        digest.update(canonical(tensor.name).encode() + repr((tensor.dims, tensor.data_type)).encode())
        digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    for function in proto.functions:
        digest.update(function.SerializeToString(deterministic=True))
