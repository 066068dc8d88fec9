"""Replacements that approximate all heads of a site alike: each is run on what the original computes at the site for
the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from attncompile import measure, metrics
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Mechanism, Parameters, understood
from attncompile.core.plan import Decision
from attncompile.core.policy import Policy
from attncompile.core.site import AttentionSite
from attncompile.cost import predicted_gain, shape_of
from attncompile.gate import Edit
from attncompile.gpu_cost import GpuCost
from attncompile.passes.evaluate import World
from attncompile.passes.extract import extract_site

Feed = Mapping[str, np.ndarray]
LESS = 1.05
"""Gain over a replacement that sees more keys below which one that sees fewer is not scored: it loses more and saves
less than times are predicted to.
"""
CAPTURE_BYTES = 1 << 30
"""Sites are captured in groups, so that Q, K, V and outputs of one group and one input stay below this."""


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate of one site: its replacement, and the relative L2 of the site's output on each calibration
    input.
    """

    edit: Edit
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Captured:
    """What the original computes at one site for one input."""

    feed: dict[str, np.ndarray]
    output: np.ndarray


def options_for(
    site: AttentionSite, policy: Policy, registry: Sequence[Mechanism], worlds: Sequence[World], opset: int,
    gpu: GpuCost | None = None,
) -> list[Edit]:  # fmt: skip
    """The approximate candidates of a site with a predicted gain worth it at the inputs' shapes, but for those that see
    a part of another's keys and save nothing by it. None in a body: its operands cannot be made outputs of the model.
    """
    found: list[Edit] = []
    if site.scope:
        return found
    for mechanism in registry:
        if mechanism.name not in policy.approximate or not understood(mechanism, site).ok:
            continue
        for candidate in mechanism.approximate_candidates(site):
            gain = _least(site, mechanism, candidate.parameters, worlds, opset, gpu)
            if gain is None or gain < policy.min_gain:
                continue
            if candidate.inside is not None:
                wider = _least(site, mechanism, candidate.inside, worlds, opset, gpu)
                if wider is not None and gain < LESS * wider:
                    continue
            decision = Decision(site.id, mechanism.name, candidate.reason, False, candidate.parameters, gain)
            found.append(Edit.of(site, decision, mechanism, opset))
    return found


def _least(
    site: AttentionSite, mechanism: Mechanism, given: Parameters, worlds: Sequence[World], opset: int,
    gpu: GpuCost | None,
) -> float | None:  # fmt: skip
    """The least gain over the inputs' sizes; None where the site cannot be replaced so, the GPU has no kernel for it,
    or nothing was measured of it.
    """
    if not mechanism.supports(site, given).ok:
        return None
    try:
        return min(_gain(site, mechanism, given, world, opset, gpu) for world in worlds)
    except Unsupported:
        return None


def _gain(
    site: AttentionSite, mechanism: Mechanism, given: Parameters, world: World, opset: int, gpu: GpuCost | None
) -> float:
    if gpu is not None:
        return gpu.gain(site, mechanism.lower(site, given, opset), world.binding)
    shape = shape_of(site, world.binding)
    return predicted_gain(site, mechanism.cost(site, given, shape), shape)


def score(edits: Sequence[Edit], world: World, captured: Captured, threads: int | None) -> list[float]:
    """Relative L2 of every edit's output against what the original computed at this site."""
    scores = []
    for edit in edits:
        model = extract_site(world, edit.site, edit.lowering)
        session = measure.open_session(model.replaced.SerializeToString(), threads)
        feed = {**model.fixed, **captured.feed}
        ours = measure.run_session(session, {n: feed[n] for n in model.inputs})[0]
        scores.append(metrics.relative_l2(captured.output, ours))
    return scores


def capture(
    with_outputs: Callable[[Sequence[str]], Path], sites: Sequence[AttentionSite], names: Sequence[set[str]],
    feed: Feed, threads: int | None,
) -> list[Captured]:  # fmt: skip
    """Runs the original once with the sites' operands as extra outputs. ``names``: the values each site reads."""
    wanted = sorted({n for group in names for n in group} | {s.output.value for s in sites})
    outputs = [n for n in wanted if n not in feed]
    session: ort.InferenceSession = measure.open_session(with_outputs(outputs), threads)
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


def score_sites(
    edits: Mapping[str, list[Edit]], sites: Sequence[AttentionSite], feeds: Sequence[Feed], worlds: Sequence[World],
    with_outputs: Callable[[Sequence[str]], Path], threads: int | None, advance: Callable[[], None],
) -> list[list[Option]]:  # fmt: skip
    """Options of every site, in the order of ``sites``. ``with_outputs`` writes the original with these values as
    outputs too.
    """
    found: dict[str, list[list[float]]] = {s.id: [] for s in sites}
    for feed, world in zip(feeds, worlds, strict=True):
        for group in _groups(sites, world):
            names = [operand_names(s, world) for s in group]
            for site, captured in zip(group, capture(with_outputs, group, names, feed, threads), strict=True):
                try:
                    scores = score(edits[site.id], world, captured, threads)
                except Unsupported:
                    scores = [float("inf")] * len(edits[site.id])
                found[site.id].append(scores)
                advance()
    return [
        [Option(e, tuple(x)) for e, x in zip(edits[s.id], zip(*found[s.id], strict=True), strict=True)] for s in sites
    ]


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
