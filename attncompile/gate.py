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
from attncompile.passes.evaluate import World
from attncompile.passes.extract import SiteModel, extract_site
from attncompile.report import Exactness, ShapeTiming


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
    """What the gates found. ``rolled_back`` is the reason for not replacing the site, or empty."""

    exactness: Exactness | None = None
    timings: tuple[ShapeTiming, ...] = ()
    rolled_back: str = ""


Bindings = Sequence[tuple[str, Mapping[str, int]]]


class SiteGate:
    """Checks sites alone. Sites whose standalone models are the same but for names share one check."""

    def __init__(
        self, world_at: Callable[[Mapping[str, int]], World], bindings: Bindings, *, threads: int | None, seed: int,
        keep_slower: bool, seconds: float = 4.0,
    ) -> None:  # fmt: skip
        self._world_at = world_at
        self._bindings = bindings
        self._threads = threads
        self._seed = seed
        self._keep_slower = keep_slower
        self._seconds = seconds
        self._results: dict[str, SiteResult] = {}

    def check(self, edit: Edit) -> SiteResult:
        """Exactness at every shape of the profile (exact sites only), then speed. A failure is a result."""
        models: list[tuple[str, Mapping[str, int], SiteModel]] = []
        for label, binding in self._bindings:
            world = self._world_at(binding)
            try:
                models.append((label, binding, extract_site(world, edit.site, edit.twin or edit.lowering)))
            except Unsupported as error:
                return SiteResult(rolled_back=f"cannot be checked at {label} shapes: {error.message}")
        key = _digest([m for _, _, m in models], edit.decision.exact)
        if key not in self._results:
            self._results[key] = self._check(edit, models)
        return self._results[key]

    def _check(self, edit: Edit, models: list[tuple[str, Mapping[str, int], SiteModel]]) -> SiteResult:
        exactness = None
        if edit.decision.exact:
            exactness = self._exactness(edit, models)
            if not exactness.passed:
                return SiteResult(exactness, rolled_back=f"not exact: {exactness.reason}")
        try:
            timings = tuple(self._time(label, binding, model) for label, binding, model in models)
        except AttncompileError as error:
            return SiteResult(exactness, rolled_back=f"could not be timed: {error.message}")
        if not self._keep_slower and not any(t.timing.faster for t in timings):
            ratios = ", ".join(f"{t.timing.ratio:.2f} at {t.label}" for t in timings)
            return SiteResult(exactness, timings, f"not faster: ours / original {ratios}")
        return SiteResult(exactness, timings)

    def _exactness(self, edit: Edit, models: list[tuple[str, Mapping[str, int], SiteModel]]) -> Exactness:
        count, ratio, distance, worst = 0, 0.0, 0.0, ""
        labels: list[str] = []
        for label, _, model in models:
            cases = verify.cases(model.inputs, model.fixed, model.roles, self._seed, scale=edit.site.scale)
            found = verify.check_site(
                model.original, model.replaced, cases, query=edit.site.query, threads=self._threads
            )
            labels += [x for x in found.labels if x not in labels]
            count += len(found.checks)
            if not found.passed:
                return Exactness(False, count, label="; ".join(labels), worst_case=label,
                                 reason=f"at {label} shapes: {found.verdict.reason}")  # fmt: skip
            for check in found.checks:
                if math.isfinite(check.error) and check.error >= distance:
                    distance, worst = check.error, f"{check.case} at {label}"
                if check.original_error > 0 and math.isfinite(check.error):
                    ratio = max(ratio, check.error / check.original_error)
        return Exactness(True, count, ratio or None, distance, "; ".join(labels), worst)

    def _time(self, label: str, binding: Mapping[str, int], model: SiteModel) -> ShapeTiming:
        feed = verify.cases(model.inputs, model.fixed, model.roles, self._seed)[0].feed
        protos = [model.original, model.replaced]
        if verify.uses_bfloat16(model.original):  # the CPU provider has no kernels for it
            protos = [verify.retype(p, verify.TO_TWIN) for p in protos]
            feed = verify.convert_feed(feed, protos[0])
        pair = [measure.open_session(p.SerializeToString(), self._threads) for p in protos]
        timing = measure.paired_conclusive(pair[0], pair[1], feed, budget_seconds=self._seconds, threads=self._threads)
        return ShapeTiming(label, binding, timing)


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
