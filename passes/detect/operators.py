"""What operators that are whole attention have in common: operands of rank 3, causal and window attributes, caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.pattern import BlockSparse
from attncompile.core.site import AttentionSite, Layout, Operand
from attncompile.passes.detect.homes import NotSeparate, Separation
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

FRONTIER = "aligned at the first new key"
"""What the certificate of a part that ``with_frontier`` made says."""

BLOCK = 64
"""Edge of the blocks that the density of a frontier that is no window is counted in."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Query, key, value and output as rank-4 values, and the Reshape nodes between them and the operator."""

    query: Operand
    key: Operand
    value: Operand
    output: Operand
    around: tuple[NodeProto, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """``new_keys`` come with the node, after ``past`` ones in its cache."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    queries: int
    new_keys: int
    past: int

    @property
    def keys(self) -> int:
        return self.past + self.new_keys


def find_operands(
    index: GraphIndex, world: World, node: NodeProto, heads: tuple[int, int], four: Layout = "BHND"
) -> Operands:  # fmt: skip
    """The first three inputs and the first output of ``node``: of rank 4 in the layout ``four``, or of rank 3
    [batch, sequence, heads * dim], then the rank-4 value that a Reshape makes them from, or makes of them.
    ``heads``: of query and output, of key and value; 0 where all are of rank 4.

    Raises:
        NotSeparate: a value of rank 3 has no such Reshape.
        Unsupported: a shape is not known, or a rank is neither.
    """
    values = (*node.input[:3], node.output[0])
    found: list[Operand] = []
    around: list[NodeProto] = []
    missing: list[Separation] = []
    for at, value in enumerate(values):
        if value not in world.shapes:
            raise Unsupported("shape-unknown", f"the shape of '{value}' is not known")
        shape, count = world.shapes[value], heads[0] if at in (0, 3) else heads[1]
        if len(shape) == 4:
            found.append(Operand(value, four))
            continue
        if len(shape) != 3 or count <= 0 or shape[2] % count:
            raise Unsupported("layout", f"'{value}' {list(shape)} is not [batch, sequence, {count or '?'} heads * dim]")
        wanted = (*shape[:2], count, shape[2] // count)
        near, source = _reshape(index, value, at < 3)
        if near is not None and world.shapes.get(source) == wanted:
            found.append(Operand(source, "BNHD"))
            around.append(near)
        else:
            reader = node.output[0] if at < 3 else ""
            missing.append(Separation(value, reader, "BNHD", count, wanted[3], "outer", (shape[2],)))
    if missing:
        words = f"operand '{missing[0].value}' of {node.op_type} '{node_name(node)}' is of rank 3"
        raise NotSeparate(words, tuple(missing))
    return Operands(found[0], found[1], found[2], found[3], tuple({id(n): n for n in around}.values()))


def _reshape(index: GraphIndex, value: str, before: bool) -> tuple[NodeProto | None, str]:
    """The Reshape that makes ``value``, or the only reader of it, and the value on its other side."""
    if before:
        node = index.producer.get(value)
    else:
        readers = index.consumers.get(value, [])
        node = readers[0] if len(readers) == 1 and value not in index.outputs else None
    if node is None or node.op_type != "Reshape" or node.domain not in ("", "ai.onnx") or node.input[0] == "":
        return None, ""
    if not before and node.input[0] != value:
        return None, ""
    return node, node.input[0] if before else node.output[0]


def find_sizes(world: World, operands: Operands, past: tuple[str, str]) -> Sizes:
    """The numbers of a site.

    Raises:
        Unsupported: they contradict one another, or the past's shape is not known.
    """
    four = (operands.query, operands.key, operands.value, operands.output)
    q, k, v, o = (dict(zip(x.layout, world.shapes[x.value], strict=True)) for x in four)
    wrong = (
        k["H"] != v["H"] or k["N"] != v["N"] or q["D"] != k["D"] or q["B"] != k["B"] or k["B"] != v["B"]
        or k["H"] < 1 or q["H"] % k["H"] or (o["B"], o["H"], o["N"], o["D"]) != (q["B"], q["H"], q["N"], v["D"])
    )  # fmt: skip
    if wrong:
        shapes = ", ".join(str(list(world.shapes[x.value])) for x in four)
        raise Unsupported("layout", f"the shapes of query, key, value and output do not go together: {shapes}")
    kinds = {world.types.get(x.value) for x in four}
    if len(kinds) > 1:
        raise Unsupported("types", "query, key, value and output differ in element type")
    before = 0
    if any(past):
        shapes_of = [world.shapes.get(p) for p in past]
        wanted = [(q["B"], k["H"], d) for d in (k["D"], v["D"])]
        for shape, (batch, heads, dim) in zip(shapes_of, wanted, strict=True):
            if shape is None:
                raise Unsupported("shape-unknown", f"the shape of the cache '{past[0]}' is not known")
            if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (batch, heads, dim):
                raise Unsupported("layout", f"the cache {list(shape)} is not [batch, key heads, sequence, dim]")
        if shapes_of[0] is None or shapes_of[1] is None or shapes_of[0][2] != shapes_of[1][2]:
            raise Unsupported("layout", "the caches of keys and values differ in length")
        before = shapes_of[0][2]
    return Sizes(q["B"], q["H"], k["H"], q["D"], v["D"], q["N"], k["N"], before)


def number(name: str, value: float) -> float:
    """``value`` of an attribute. Raises ``Unsupported`` unless it is finite and not zero."""
    if not isfinite(value) or value == 0.0:
        raise Unsupported("zero-scale", f"the attribute {name} is {value}")
    return value


def with_frontier(facts: MaskFacts, sizes: Sizes, left: int, right: int, says: str) -> MaskFacts:
    """``facts`` and the keys that attributes leave: past + i - left <= j <= past + i + right, -1: unlimited.

    A site's windows are aligned at the last key, these at past + i: the bounds differ where a call does not bring as
    many keys as queries. Where that gives no window (fewer queries than keys, no cache) the fact is the pattern at
    these lengths. With ``facts.ends`` the operator's are aligned as the site's are.

    Raises:
        Unsupported: a stored window and one that moves with each batch entry's keys.
    """
    old = facts.part("causal", "window")
    moves = facts.ends is not None and facts.ends.offset != "sequence"
    if moves and old is not None:
        raise Unsupported("mask-alignment", "the mask is a window at fixed places, the operator's moves with its keys")
    if left < 0 and right < 0:
        return facts
    shift = 0 if moves else sizes.queries - sizes.new_keys
    certificate = Certificate("attribute", says if moves else f"{says}, {FRONTIER}", general=True)
    bounds = (left - shift if left >= 0 else -1), (right + shift if right >= 0 else -1)
    if (left >= 0 and bounds[0] < 0) or (right >= 0 and bounds[1] < 0):
        distance = np.arange(sizes.keys)[None] - np.arange(sizes.queries)[:, None] - sizes.past
        visible = np.ones(distance.shape, dtype=bool)
        visible &= (distance >= -left) | (left < 0)
        visible &= (distance <= right) | (right < 0)
        at = replace(certificate, lengths=((sizes.queries, sizes.keys),), general=False)
        part = MaskPart("block_sparse", at, pattern=BlockSparse.of(visible, BLOCK))
        return replace(facts, parts=(part, *facts.parts))
    if old is None:
        return replace(facts, parts=(window(certificate, *bounds), *facts.parts))
    # One window in place of two: mechanisms look at the first.
    rest = tuple(p for p in facts.parts if p is not old)
    joined = replace(old.certificate, detail=f"{old.certificate.detail}; {certificate.detail}")
    part = window(joined, _closer(old.left, bounds[0]), _closer(old.right, bounds[1]))
    return replace(facts, parts=(part, *rest))


def window(certificate: Certificate, left: int, right: int) -> MaskPart:
    """The part for these bounds: causal where it is nothing else."""
    return MaskPart("causal" if (left, right) == (-1, 0) else "window", certificate, left, right)


def _closer(a: int, b: int) -> int:
    limited = [x for x in (a, b) if x >= 0]
    return min(limited, default=-1)


def check_lengths(site: AttentionSite, world: World, worlds: Sequence[World | None]) -> None:
    """What ``with_frontier`` said holds at other sizes too.

    Raises:
        Unsupported: the numbers of queries and of keys that come with the node do not change together.
    """
    own = [p for p in site.mask.parts if FRONTIER in p.certificate.detail]
    if not own:
        return
    base = _lengths(site, world)
    for other in worlds:
        lengths = _lengths(site, other) if other is not None else None
        if lengths is None or base is None or lengths == base:
            continue
        if lengths[0] - lengths[1] != base[0] - base[1] or any(p.kind == "block_sparse" for p in own):
            raise Unsupported(
                "causal-offset",
                f"the operator's triangle starts at its first new key: with {base[0]} queries over {base[1]} new keys, "
                f"and {lengths[0]} over {lengths[1]} at other sizes, it is no one window",
            )  # fmt: skip


def _lengths(site: AttentionSite, world: World) -> tuple[int, ...] | None:
    found = [site.query, site.key]
    shapes = [(world.shapes.get(o.value), o.layout.index("N")) for o in found]
    if site.cache is not None and site.cache.past_key:
        shapes.append((world.shapes.get(site.cache.past_key), 2))
    if any(shape is None for shape, _ in shapes):
        return None
    return tuple(shape[axis] for shape, axis in shapes if shape is not None)
