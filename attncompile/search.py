"""Approximate replacements within an error budget, on the user's inputs. Seeded noise is never evidence for one.

Every candidate is scored on the Q, K and V that the original model computes for the calibration inputs. For a bound on
that site error each site takes its fastest candidate below the bound; the largest bound whose whole model stays within
the budget, on calibration and held-out inputs alike, wins. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, ValueInfoProto

from attncompile import measure, metrics
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Mechanism, understood
from attncompile.core.plan import Decision
from attncompile.core.policy import Policy
from attncompile.core.site import AttentionSite
from attncompile.cost import predicted_gain, shape_of
from attncompile.gate import Edit
from attncompile.passes.evaluate import World
from attncompile.passes.extract import extract_site
from attncompile.report import SiteFidelity

Feed = Mapping[str, np.ndarray]
CAPTURE_BYTES = 1 << 30
"""Sites are captured in groups, so that Q, K, V and outputs of one group and one input stay below this."""


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate of one site: its replacement, what it costs there, and its predicted gain."""

    edit: Edit
    error: float
    cosine: float

    @property
    def fidelity(self) -> SiteFidelity:
        return SiteFidelity(self.error, self.cosine)


@dataclass(frozen=True, slots=True)
class Captured:
    """What the original computes at one site for one input."""

    feed: dict[str, np.ndarray]
    output: np.ndarray


def split(feeds: Sequence[Feed]) -> tuple[list[Feed], list[Feed]]:
    """Every other input is held out; a single input has to serve as both."""
    return (list(feeds[::2]), list(feeds[1::2])) if len(feeds) > 1 else (list(feeds), list(feeds))


def options_for(
    site: AttentionSite, policy: Policy, registry: Sequence[Mechanism], worlds: Sequence[World], opset: int
) -> list[Edit]:
    """The approximate candidates of a site with a predicted gain worth it at the inputs' shapes. None in a body: its
    operands cannot be made outputs of the model.
    """
    found: list[Edit] = []
    if site.scope:
        return found
    for mechanism in registry:
        if mechanism.name not in policy.approximate or not understood(mechanism, site).ok:
            continue
        for candidate in mechanism.approximate_candidates(site):
            if not mechanism.supports(site, candidate.parameters).ok:
                continue
            shapes = [shape_of(site, w.binding) for w in worlds]
            gain = min(predicted_gain(site, mechanism.cost(site, candidate.parameters, s), s) for s in shapes)
            if gain < policy.min_gain:
                continue
            decision = Decision(site.id, mechanism.name, candidate.reason, False, candidate.parameters, gain)
            found.append(Edit.of(site, decision, mechanism, opset))
    return found


def score(edits: Sequence[Edit], world: World, captured: Captured, threads: int | None) -> list[tuple[float, float]]:
    """(relative L2, cosine) of every edit's output against what the original computed at this site."""
    scores = []
    for edit in edits:
        model = extract_site(world, edit.site, edit.lowering)
        session = measure.open_session(model.replaced.SerializeToString(), threads)
        feed = {**model.fixed, **captured.feed}
        ours = measure.run_session(session, {n: feed[n] for n in model.inputs})[0]
        scores.append((metrics.relative_l2(captured.output, ours), metrics.cosine(captured.output, ours)))
    return scores


def capture(
    proto: ModelProto, write: Callable[[ModelProto], Path], sites: Sequence[AttentionSite], names: Sequence[set[str]],
    feed: Feed, threads: int | None,
) -> list[Captured]:  # fmt: skip
    """Runs the original once with the sites' operands as extra outputs. ``names``: the values each site reads."""
    wanted = sorted({n for group in names for n in group} | {s.output.value for s in sites})
    present = {o.name for o in proto.graph.output}
    extended = ModelProto()
    extended.CopyFrom(proto)
    extended.graph.output.extend(ValueInfoProto(name=n) for n in wanted if n not in present and n not in feed)
    session: ort.InferenceSession = measure.open_session(write(extended), threads)
    outputs = [n for n in wanted if n not in feed]
    values = dict(zip(outputs, measure.run_session(session, feed, outputs), strict=True))
    values.update({n: feed[n] for n in wanted if n in feed})
    return [
        Captured({n: values[n] for n in group}, values[site.output.value])
        for site, group in zip(sites, names, strict=True)
    ]


def operand_names(site: AttentionSite, world: World) -> set[str]:
    """The values outside the site that its standalone model reads and that are not computed from shapes."""
    sources = {p.source for p in site.mask.parts if p.source and world.index.data_inputs(p.source)}
    return {site.query.value, site.key.value, site.value.value} | sources


def select(options: Sequence[Sequence[Option]], bound: float) -> list[Option]:
    """For every site the candidate with the largest predicted gain whose site error is within ``bound``."""
    chosen = []
    for site_options in options:
        fit = [o for o in site_options if o.error <= bound]
        if fit:
            chosen.append(max(fit, key=lambda o: (o.edit.decision.predicted_gain, -o.error)))
    return chosen


def search(
    options: Sequence[Sequence[Option]], budget: float, error_of: Callable[[Sequence[Edit]], float],
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Option], float]:  # fmt: skip
    """The choice with the largest site-error bound whose whole-model error is within ``budget``, and that error.

    ``error_of`` gives the worst error over all inputs. Errors grow with the bound up to noise, so a bisection over the
    bounds that occur finds it; whatever is returned was measured to be within the budget.
    """
    bounds = sorted({o.error for group in options for o in group if np.isfinite(o.error)})
    best: tuple[list[Option], float] = ([], 0.0)
    low, high = 0, len(bounds) - 1
    while low <= high and budget > 0:
        middle = (low + high) // 2
        chosen = select(options, bounds[middle])
        error = error_of([o.edit for o in chosen])
        advance()
        if error <= budget:
            best = (chosen, error)
            low = middle + 1
        else:
            high = middle - 1
    return best


def score_sites(
    edits: Mapping[str, list[Edit]], sites: Sequence[AttentionSite], feeds: Sequence[Feed], worlds: Sequence[World],
    proto: ModelProto, write: Callable[[ModelProto], Path], threads: int | None, advance: Callable[[], None],
) -> list[list[Option]]:  # fmt: skip
    """Options of every site with their worst error over the calibration inputs."""
    worst: dict[str, list[tuple[float, float]]] = {}
    for feed, world in zip(feeds, worlds, strict=True):
        for group in _groups(sites, world):
            names = [operand_names(s, world) for s in group]
            for site, captured in zip(group, capture(proto, write, group, names, feed, threads), strict=True):
                try:
                    scores = score(edits[site.id], world, captured, threads)
                except Unsupported:
                    scores = [(float("inf"), 0.0)] * len(edits[site.id])
                old = worst.get(site.id, scores)
                worst[site.id] = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(old, scores, strict=True)]
                advance()
    return [[Option(e, *x) for e, x in zip(edits[s.id], worst[s.id], strict=True)] for s in sites]


def _groups(sites: Sequence[AttentionSite], world: World) -> list[list[AttentionSite]]:
    groups: list[list[AttentionSite]] = [[]]
    size = 0
    for site in sites:
        values = operand_names(site, world) | {site.output.value}
        need = sum(4 * int(np.prod(world.shapes.get(v, (0,)))) for v in values)
        if groups[-1] and size + need > CAPTURE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(site)
        size += need
    return groups
