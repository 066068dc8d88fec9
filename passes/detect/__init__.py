"""Finds attention. Reads the graph and never changes it.

One file a family of forms; each offers ``lift(index, world, node, analyse) -> AttentionSite`` and raises
``Unsupported`` with a reason. ``FORMS`` says which operator starts which family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from onnx import GraphProto, NodeProto

from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite, Detection, Dim, NearMiss
from attncompile.passes.detect import softmax, standard
from attncompile.passes.detect.softmax import MaskAnalysis, node_name
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.grid import infer_grid
from attncompile.passes.masks import MaskAnalyser

Lift = Callable[[GraphIndex, World, NodeProto, MaskAnalysis], AttentionSite]

FORMS: Mapping[str, tuple[str, Lift]] = {
    "Softmax": ("matmul-softmax-matmul", softmax.lift),
    "Attention": ("attention-op", standard.lift),
}


def detection_binding(profile: ShapeProfile) -> dict[str, int]:
    """The usual sizes, but 2 where the usual size is 1 and more are allowed: a size of 1 hides its axis."""
    return {
        name: 2 if r.usual == 1 and r.maximum > 1 else r.usual for name, r in profile.ranges.items()
    }  # fmt: skip


def detect(
    model: Model, profile: ShapeProfile, *, index: GraphIndex | None = None, grid: TokenGrid | None = None
) -> Detection:
    """Every attention site of the main graph, and every softmax that is not one, with the reason.

    Raises:
        BadArguments: ``grid`` was given and no self-attention site has its number of tokens.
    """
    index = index or GraphIndex(model)
    world = World(index, detection_binding(profile))
    analyser = MaskAnalyser(index, world, profile)
    varied = {s: analyser.world_at({**world.binding, s: world.binding[s] + 1}) for s in profile.ranges}
    sites: list[AttentionSite] = []
    misses: list[NearMiss] = []
    for node in index.order:
        misses += [_inside(node, attribute.g) for attribute in node.attribute if _has_softmax(attribute.g)]
        if node.domain not in ("", "ai.onnx") or node.op_type not in FORMS:
            continue
        form, lift = FORMS[node.op_type]
        try:
            site = lift(index, world, node, analyser)
        except Unsupported as error:
            misses.append(NearMiss(node_name(node), error.message, form, error.code))
            continue
        names = _names(index, world, varied, site)
        sites.append(
            replace(site, id=f"site{len(sites)}", grid=infer_grid(index, world, site, grid), **names)
        )  # fmt: skip
    if grid is not None and sites and all(s.grid is None for s in sites):
        lengths = sorted({str(s.query_length) for s in sites})
        raise BadArguments(
            f"--grid has {grid.tokens} tokens ({grid.prefix} + {'x'.join(map(str, grid.shape))} + {grid.suffix}), but "
            f"the sites have {', '.join(lengths)}",
            "give the grid of the tokens that the attention sees, prefix tokens (class, register) included",
        )
    return Detection(tuple(sites), tuple(misses))


def _names(index: GraphIndex, world: World, varied: Mapping[str, World | None], site: AttentionSite) -> dict[str, Any]:
    """Batch and lengths as the graph's symbols where they follow one."""

    def name(value: str, axis: int, number: Dim) -> Dim:
        terms: list[str] = []
        rest = int(number)
        for symbol, other in varied.items():
            shape = other.shapes.get(value) if other is not None else None
            slope = shape[axis] - world.shapes[value][axis] if shape is not None else 0
            if slope:
                terms.append(symbol if slope == 1 else f"{slope}*{symbol}")
                rest -= slope * world.binding[symbol]
        if not terms:
            return number
        return " + ".join([*terms, *([str(rest)] if rest else [])])

    q, k = site.query, site.key
    return {
        "batch": name(q.value, 0, site.batch),
        "query_length": name(q.value, q.layout.index("N"), site.query_length),
        "key_length": name(k.value, k.layout.index("N"), site.key_length),
    }


def _has_softmax(graph: GraphProto) -> bool:
    return any(n.op_type in FORMS for n in graph.node)


def _inside(node: NodeProto, graph: GraphProto) -> NearMiss:
    inner = next(n for n in graph.node if n.op_type in FORMS)
    reason = f"a softmax inside the body of {node.op_type} '{node_name(node)}' is not looked at yet"
    return NearMiss(node_name(inner), reason, FORMS[inner.op_type][0], "subgraph")
