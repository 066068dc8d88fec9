"""Finds attention. Reads the graph and never changes it.

One file a family of forms; each offers ``lift(index, world, node, analyse) -> AttentionSite`` and raises
``Unsupported`` with a reason. ``FORMS`` says which operator starts which family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx import NodeProto

from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite, Detection, Dim, NearMiss
from attncompile.passes.detect import softmax, standard
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.grid import infer_grid
from attncompile.passes.masks import MaskAnalyser

Lift = Callable[[GraphIndex, World, NodeProto, MaskAnalysis], AttentionSite | None]

FORMS: Mapping[str, tuple[str, Lift]] = {
    "Softmax": ("matmul-softmax-matmul", softmax.lift),
    "Div": ("matmul-written-out-softmax-matmul", softmax.lift_written_out),
    "Exp": ("matmul-written-out-softmax-matmul", softmax.lift_written_out),
    "Attention": ("attention-op", standard.lift),
}

_SAYS_ATTENTION = frozenset({"Softmax", "Attention"})
"""Operators that are reported even where they cannot be looked at: in bodies of control flow and local functions."""

_FUSED = {
    "com.microsoft": frozenset({
        "Attention", "MultiHeadAttention", "GroupQueryAttention", "SparseAttention", "PagedAttention", "QAttention",
        "PackedAttention", "PackedMultiHeadAttention", "LongformerAttention", "DecoderAttention", "QOrderedAttention",
        "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention",
    }),
    "": frozenset({"LinearAttention", "FlexAttention"}),
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
    """Every attention site of the main graph, and every softmax that is not one, with the reason.

    Raises:
        BadArguments: ``grid`` was given and no self-attention site has its number of tokens.
    """
    world = World(index or GraphIndex(model), detection_binding(profile)).without_idle()
    index = world.index
    analyser = MaskAnalyser(index, world, profile)
    varied = {s: analyser.world_at({**world.binding, s: world.binding[s] + 1}) for s in profile.ranges}
    largest = analyser.world_at(profile.maximum())
    sites: list[AttentionSite] = []
    misses: list[NearMiss] = []
    for node in index.order:
        misses += [*_inside_bodies(node, node), *_inside_function(model, node), *_fused(node)]
        if node.domain not in ("", "ai.onnx") or node.op_type not in FORMS:
            continue
        form, lift = FORMS[node.op_type]
        try:
            site = lift(index, world, node, analyser)
            if site is not None:
                _check_fixed(site, [*varied.values(), largest])
        except Unsupported as error:
            misses.append(NearMiss(node_name(node), error.message, form, error.code))
            continue
        if site is None:
            continue
        names = _names(world, varied, largest, site)
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

    def name(value: str, axis: int, number: Dim) -> Dim:
        def size(other: World | None) -> int | None:
            shape = other.shapes.get(value) if other is not None else None
            return shape[axis] if shape is not None else None

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
    return {
        "batch": name(q.value, 0, site.batch),
        "query_length": name(q.value, q.layout.index("N"), site.query_length),
        "key_length": name(k.value, k.layout.index("N"), site.key_length),
    }


def _inside_bodies(outer: NodeProto, node: NodeProto) -> list[NearMiss]:
    """Softmax and Attention nodes in the bodies of an If, Loop or Scan, at any depth."""
    found: list[NearMiss] = []
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                if inner.op_type in _SAYS_ATTENTION and inner.domain in ("", "ai.onnx"):
                    body = f"{attribute.name} of {node.op_type} '{node_name(node)}'"
                    inside = f", itself inside {outer.op_type} '{node_name(outer)}'" if outer is not node else ""
                    reason = f"it lies inside the {body}{inside}: bodies of control flow are not rewritten"
                    found.append(NearMiss(node_name(inner), reason, FORMS[inner.op_type][0], "subgraph"))
                found += _inside_bodies(outer, inner)
    return found


def _inside_function(model: Model, node: NodeProto) -> list[NearMiss]:
    """Softmax and Attention nodes of a model-local function that ``node`` calls and that was not inlined."""
    found = []
    for function in model.proto.functions:
        if (function.domain, function.name, function.overload) != (node.domain, node.op_type, node.overload):
            continue
        for inner in function.node:
            if inner.op_type in _SAYS_ATTENTION and inner.domain in ("", "ai.onnx"):
                reason = f"it lies inside the local function {node.op_type} called by '{node_name(node)}', not inlined"
                found.append(NearMiss(node_name(inner), reason, FORMS[inner.op_type][0], "function"))
    return found


def _fused(node: NodeProto) -> list[NearMiss]:
    if node.op_type not in _FUSED.get("" if node.domain == "ai.onnx" else node.domain, ()):
        return []
    reason = f"the operator {node.domain + '.' if node.domain else ''}{node.op_type} is kept as it is"
    return [NearMiss(node_name(node), reason, "attention-op", "fused-op")]
