"""Finds attention. Reads the graph and never changes it.

One file a family of forms; each offers ``lift(index, world, node, analyse) -> AttentionSite`` and raises
``Unsupported`` with a reason. ``FORMS`` says which operator starts which family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache as once
from typing import Any

from onnx import AttributeProto, GraphProto, NodeProto

from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite, Detection, Dim, NearMiss
from attncompile.passes.detect import (
    contrib,
    linear,
    linear_operator,
    linear_recurrent,
    pieces,
    quantised,
    softmax,
    standard,
)
from attncompile.passes.detect.operators import check_lengths
from attncompile.passes.detect.probed import linear_lift
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.grid import find_grid
from attncompile.passes.index import Body, graphs_within, local_names, visible_names
from attncompile.passes.masks import MaskAnalyser

Lift = Callable[[GraphIndex, World, NodeProto, MaskAnalysis], AttentionSite | None]

FORMS: Mapping[str, tuple[str, Lift]] = {
    "Softmax": ("matmul-softmax-matmul", pieces.lift),
    "Div": ("matmul-written-out-softmax-matmul", softmax.lift_written_out),
    "Exp": ("matmul-written-out-softmax-matmul", softmax.lift_written_out),
    "Attention": ("attention-op", standard.lift),
    "LinearAttention": (linear_operator.FORM, linear_operator.lift),
    **dict.fromkeys(("MatMul", "Einsum", "Gemm", "ReduceSum"), (linear.FORM, linear_lift.lift)),
    **dict.fromkeys(("Loop", "Scan"), (linear.FORM, linear_recurrent.lift)),
}

_OPERATORS: dict[tuple[str, str], tuple[str, Lift]] = {
    **{(contrib.DOMAIN, name): ("attention-op", contrib.lift) for name in contrib.NAMES},
    (contrib.DOMAIN, "QLinearSoftmax"): ("matmul-softmax-matmul", quantised.softmax_of_integers),
}


def form_of(node: NodeProto) -> tuple[str, Lift] | None:
    """The family that ``node`` starts, by its domain and operator."""
    if node.domain in ("", "ai.onnx"):
        return FORMS.get(node.op_type)
    return _OPERATORS.get((node.domain, node.op_type))


_SAYS_ATTENTION = frozenset({"Softmax", "Attention"})
"""Operators that are reported even where they cannot be looked at: in bodies of control flow and local functions."""

_FUSED = {
    "": frozenset({"FlexAttention"}),
    "ai.onnx.preview": frozenset({"FlexAttention"}),
}  # fmt: skip
"""Whole attention in one operator that no form here reads."""


def detection_binding(profile: ShapeProfile) -> dict[str, int]:
    """The usual sizes, but 2 where the usual size is 1 and more are allowed: a size of 1 hides its axis."""
    return {
        name: 2 if r.usual == 1 and r.maximum > 1 else r.usual for name, r in profile.ranges.items()
    }  # fmt: skip


def detect(
    model: Model, profile: ShapeProfile, *, index: GraphIndex | None = None, grid: TokenGrid | None = None
) -> Detection:
    """Every attention site of the main graph and of the bodies of If, Loop and Scan nodes, and every softmax that is
    not one, with the reason.

    Raises:
        BadArguments: ``grid`` was given and no self-attention site has its number of tokens.
    """
    sites: list[AttentionSite] = []
    misses: list[NearMiss] = []
    _search(World(index or GraphIndex(model), detection_binding(profile)), profile, grid, sites, misses)
    if grid is not None and sites and all(s.grid is None for s in sites):
        lengths = sorted({str(s.query_length) for s in sites})
        raise BadArguments(
            f"--grid has {grid.tokens} tokens ({grid.prefix} + {'x'.join(map(str, grid.shape))} + {grid.suffix}), but "
            f"the sites have {', '.join(lengths)}",
            "give the grid of the tokens that the attention sees, prefix tokens (class, register) included",
        )
    sites = _outermost(sites)
    inside = {name for s in sites for name in s.nodes}  # a softmax that is a feature map, a product of a taken site
    return Detection(tuple(sites), tuple(m for m in misses if m.node not in inside or m.code == "grid"))


def _outermost(sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """Without the sites that lie inside of another one: a softmax of several that are one attention together."""
    inner = {(s.scope, value) for s in sites for value in s.interior}
    kept = [s for s in sites if (s.scope, s.output.value) not in inner]
    return kept if len(kept) == len(sites) else [replace(s, id=f"site{i}") for i, s in enumerate(kept)]


def _search(
    outside: World, profile: ShapeProfile, grid: TokenGrid | None, sites: list[AttentionSite], misses: list[NearMiss]
) -> None:
    """Adds what one graph holds, each body where its node stands."""
    world = outside.without_idle()
    index = world.index
    analyser = MaskAnalyser(index, world, profile, grid)
    varied = {s: analyser.world_at({**world.binding, s: world.binding[s] + 1}) for s in profile.ranges}
    largest = analyser.world_at(profile.maximum())
    seen = once(lambda: quantised.through(outside, lambda w: MaskAnalyser(w.index, w, profile, grid)))
    for node in index.own_order:
        misses += [*_inside_function(index.model, node), *_fused(node)]
        _search_bodies(outside, node, profile, grid, sites, misses)
        family = form_of(node)
        if family is None:
            continue
        form, lift = family
        try:
            site = quantised.lift(lift, world, node, analyser, seen)
            if site is not None:
                _check_fixed(site, [*varied.values(), largest])
                check_lengths(site, world, [*varied.values(), largest])
        except Unsupported as error:
            where = f" (in {index.scope})" if index.scope else ""
            misses.append(NearMiss(node_name(node), error.message + where, form, error.code))
            continue
        if site is None or any(s.output == site.output and s.scope == index.scope for s in sites):
            continue  # nothing, or one more softmax of a site that has several
        names = _names(world, varied, largest, site)
        tokens = find_grid(index, world, site, grid, [*varied.values(), largest])
        if isinstance(tokens, str):
            misses.append(NearMiss(node_name(node), f"the site has no token grid: {tokens}", "token-grid", "grid"))
            tokens = None
        sites.append(replace(site, id=f"site{len(sites)}", scope=index.scope, grid=tokens, **names))


def _search_bodies(
    outside: World, node: NodeProto, profile: ShapeProfile, grid: TokenGrid | None, sites: list[AttentionSite],
    misses: list[NearMiss],
) -> None:  # fmt: skip
    """What the bodies of ``node`` hold, at any depth."""
    if not any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
        return
    bodies = outside.index.bodies.get(next((o for o in node.output if o), ""))
    if bodies is None:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                place, why = f"{attribute.name} of {node.op_type} '{node_name(node)}'", "this body is not looked into"
                misses += _unseen(place, graph, why)
        return
    for body in bodies:
        if worth_looking(outside.index, body):
            _search(outside.within(body.scope), profile, grid, sites, misses)
            continue
        place = f"{body.attribute} of {node.op_type} '{node_name(node)}'"
        misses += _unseen(place, body.graph, "one of its values has the name of one outside")


def worth_looking(index: GraphIndex, body: Body) -> bool:
    """Whether a body of ``index`` has anything that may be attention, and its names mean one value each."""
    wanted = any(form_of(n) for g in graphs_within(body.graph) for n in g.node)
    return wanted and not local_names(body.graph) & visible_names(index)


def _check_fixed(site: AttentionSite, worlds: Sequence[World | None]) -> None:
    """Heads and head dims are numbers: the same at all sizes.

    Raises:
        Unsupported: what was taken for heads is a dynamic dimension.
    """
    wanted = ((site.query, site.heads, site.head_dim), (site.key, site.kv_heads, site.head_dim),
              (site.value, site.kv_heads, site.value_dim))  # fmt: skip
    for operand, heads, dim in wanted:
        for world in worlds:
            shape = world.shapes.get(operand.value) if world is not None else None
            if shape is None or len(shape) != 4:
                continue
            if (shape[operand.layout.index("H")], shape[operand.layout.index("D")]) != (heads, dim):
                raise Unsupported(
                    "dynamic-heads", f"the heads or the head dim of '{operand.value}' change with a dynamic dimension"
                )  # fmt: skip


def _names(
    world: World, varied: Mapping[str, World | None], largest: World | None, site: AttentionSite
) -> dict[str, Any]:
    """Batch and lengths in the graph's symbols: ``2*n + 1``, or ``f(h,w)=196..784`` (at the usual and the largest
    sizes) where the sizes that were tried do not lie on a line. A number is the same at all of them.
    """

    def name(value: str, axis: int, number: Dim, before: str = "") -> Dim:
        def size(other: World | None) -> int | None:
            shape = other.shapes.get(value) if other is not None else None
            past = other.shapes.get(before) if other is not None and before else (0, 0, 0)
            return shape[axis] + past[2] if shape is not None and past is not None else None

        terms: list[str] = []
        rest, expected = int(number), int(number)
        linear = size(largest) is not None
        for symbol, other in varied.items():
            varied_size = size(other)
            slope = varied_size - int(number) if varied_size is not None else 0
            linear &= varied_size is not None
            if slope:
                terms.append(symbol if slope == 1 else f"{slope}*{symbol}")
                rest -= slope * world.binding[symbol]
            if largest is not None:
                expected += slope * (largest.binding[symbol] - world.binding[symbol])
        if not linear or size(largest) != expected:
            return f"f({','.join(varied)})={number}..{size(largest) or '?'}"
        if not terms:
            return number
        return " + ".join([*terms, *([str(rest)] if rest else [])])

    q, k = site.query, site.key
    cache = site.cache if site.cache is not None and site.cache.form == "operator" else None
    return {
        "batch": name(q.value, 0, site.batch),
        "query_length": name(q.value, q.layout.index("N"), site.query_length),
        "key_length": name(k.value, k.layout.index("N"), site.key_length, cache.past_key if cache else ""),
    }


def _unseen(place: str, graph: GraphProto, why: str) -> list[NearMiss]:
    """Softmax and Attention nodes of a body that cannot be looked at, at any depth."""
    found: list[NearMiss] = []
    for inner in graph.node:
        if inner.op_type in _SAYS_ATTENTION and inner.domain in ("", "ai.onnx"):
            reason = f"it lies inside the {place}: {why}"
            found.append(NearMiss(node_name(inner), reason, FORMS[inner.op_type][0], "subgraph"))
        for attribute in inner.attribute:
            for body in (attribute.g, *attribute.graphs):
                deeper = f"{attribute.name} of {inner.op_type} '{node_name(inner)}', itself inside the {place}"
                found += _unseen(deeper, body, why)
    return found


def _inside_function(model: Model, node: NodeProto) -> list[NearMiss]:
    """Softmax and Attention nodes of a model-local function that ``node`` calls and that was not inlined."""
    found: list[NearMiss] = []
    if node.domain in ("", "ai.onnx"):
        return found
    for function in model.proto.functions:
        if (function.domain, function.name, function.overload) != (node.domain, node.op_type, node.overload):
            continue
        bodies = [g for n in function.node for a in n.attribute if a.type == AttributeProto.GRAPH
                  for g in graphs_within(a.g)]  # fmt: skip
        for inner in (*function.node, *(n for g in bodies for n in g.node)):
            if inner.op_type in _SAYS_ATTENTION and inner.domain in ("", "ai.onnx"):
                reason = f"it lies inside the local function {node.op_type} called by '{node_name(node)}', not inlined"
                found.append(NearMiss(node_name(inner), reason, FORMS[inner.op_type][0], "function"))
    return found


def _fused(node: NodeProto) -> list[NearMiss]:
    if node.op_type not in _FUSED.get("" if node.domain == "ai.onnx" else node.domain, ()):
        return []
    reason = f"the operator {node.domain + '.' if node.domain else ''}{node.op_type} is kept as it is"
    return [NearMiss(node_name(node), reason, "attention-op", "fused-op")]
