"""``attncompile explain``: what was understood of each candidate, and what every mechanism says to it."""

from __future__ import annotations

from pathlib import Path

from onnx import NodeProto

from attncompile import pipeline
from attncompile.core.errors import BadArguments
from attncompile.core.mechanism import exact_candidates
from attncompile.core.plan import Decision
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.passes.evaluate import GraphIndex
from attncompile.passes.load import graphs
from attncompile.pipeline import Inspection, Options
from attncompile.plugins import mechanisms
from attncompile.report_explain import Explanation, Explanations


def explain_all(path: Path, options: Options) -> Explanations:
    """Every site and every near miss of the model."""
    found = pipeline.inspect(path, options)
    decisions = _decisions(found, options)
    sites = [_of_site(s.id, s, decisions) for s in found.detection.sites]
    misses = [Explanation(m.node, near_miss=m) for m in found.detection.near_misses]
    return Explanations(str(path), (*sites, *misses))


def explain(path: Path, node: str, options: Options) -> Explanation:
    """Why ``node`` (a node's name, ``op_type:output``, a value or a site id) is, or is not, replaced.

    Raises:
        BadArguments: the model has no such node.
    """
    found = pipeline.inspect(path, options)
    for site in found.detection.sites:
        if node in (site.id, site.output.value, *site.nodes, *site.interior):
            return _of_site(node, site, _decisions(found, options))
    for miss in found.detection.near_misses:
        if miss.node == node:
            return Explanation(node, near_miss=miss)
    around = _taken_in(found, node)
    if around is not None:
        return _of_site(node, around, _decisions(found, options))
    if node not in _names(found):
        raise BadArguments(
            f"{path.name} has no node, value or site '{node}'", "list its sites: attncompile inspect MODEL"
        )
    return Explanation(node)


def _names(found: Inspection) -> set[str]:
    """Nodes, values and inputs of the main graph and of all bodies in it."""
    names: set[str] = set()
    models = [found.index.model] + ([found.plain] if found.plain is not None else [])
    for graph in (g for model in models for g in graphs(model.proto)):
        names |= {n.name for n in graph.node if n.name}
        names |= {x for n in graph.node for o in n.output if o for x in (o, f"{n.op_type}:{o}")}
        names |= {i.name for i in graph.input} | {t.name for t in graph.initializer}
    return names


def _taken_in(found: Inspection, node: str) -> AttentionSite | None:
    """The site that ``node`` of the file became a part of, where it is written in another way in the working copy: what
    moves tokens into windows, or back.
    """
    if found.plain is None:
        return None
    index = GraphIndex(found.plain)
    inside = {v: s for s in found.detection.sites for v in (*s.interior, s.output.value)}
    start = [n for n in index.nodes if node in (n.name, *n.output, *(f"{n.op_type}:{o}" for o in n.output))]
    kept = {o for n in found.index.model.proto.graph.node for o in n.output}

    def forward(n: NodeProto) -> list[NodeProto]:
        return [reader for o in n.output if o not in kept for reader in index.consumers.get(o, [])]

    def backward(n: NodeProto) -> list[NodeProto]:
        return [index.producer[v] for v in n.input if v in index.producer and index.data_inputs(v)]

    for step in (forward, backward):
        pending, seen = list(start), set[int]()
        while pending:
            at = pending.pop(0)
            if id(at) in seen:
                continue
            seen.add(id(at))
            met = next((inside[o] for o in at.output if o in inside), None)
            if met is not None:
                return met
            pending += [n for n in step(at) if step is forward or not kept & {*n.output} - inside.keys()]
    return None


def _decisions(found: Inspection, options: Options) -> dict[str, Decision]:
    return {d.site: d for d in pipeline.plan(found, options).decisions}


def _of_site(node: str, site: AttentionSite, decisions: dict[str, Decision]) -> Explanation:
    verdicts = tuple(
        (m.name, answer if isinstance(answer, Verdict) else Verdict.yes(answer.reason))
        for m in mechanisms()
        for answer in exact_candidates(m, site)
    )
    return Explanation(node, site, None, verdicts, decisions[site.id])
