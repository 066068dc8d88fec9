"""Tells heads from tokens: where keys were gathered for each query, the queries may stand where heads belong."""

from __future__ import annotations

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.gathers.origins import Coordinate, Mover, line
from attncompile.passes.detect.views import VIEW_OPS, Atoms
from attncompile.passes.evaluate import GraphIndex, World

_COPIES = frozenset({"Gather", "GatherND", "Pad", "Slice", "Concat", "Split", "Tile"})
_MAX_VIEWS = 16
_MAX_AXIS = 1 << 20
"""Sources with more entries along one axis hold everything flattened: nothing is told by where each comes from."""


def tokens_among(index: GraphIndex, world: World, site: AttentionSite, role: str) -> bool:
    """Whether the axis ``role`` ("H" or "B") of the site's keys runs over sets of tokens that share some, or hold
    padding: each of its entries has keys gathered for it. Heads and batch entries share no keys.
    """
    key = site.key
    shape = world.shapes.get(key.value, ())
    if len(shape) != 4 or not _is_copied(index, key.value):
        return False
    for source in line(index, world, key.value)[:-1]:
        if max(world.shapes.get(source, (0,))) > _MAX_AXIS:
            continue
        atoms = Atoms()
        try:
            mover = Mover(index, world, atoms, source, tuple(atoms.new(n) for n in world.shapes[source]))
            origins = mover.origins(key.value)
        except (Unsupported, KeyError):
            continue
        own, keys = (set(atoms.leaves(origins.axes[key.layout.index(x)])) for x in (role, "N"))
        return any(_overlap(c.on_leaves(atoms), own, keys) for c in origins.coordinates)
    return False


def queries_as_heads() -> Unsupported:
    """Why a site whose heads are queries is none."""
    words = "the queries stand where heads belong: each has keys of its own, gathered from shared tokens"
    return Unsupported("gather-form", words)


def _is_copied(index: GraphIndex, value: str) -> bool:
    """Whether a node that may gather stands right before ``value``, views aside: ordinary keys cost no more."""
    for _ in range(_MAX_VIEWS):
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in _COPIES:
            return True
        if node.op_type not in VIEW_OPS:
            return False
        value = node.input[0]
    return False


def moved_before(index: GraphIndex, world: World, value: str) -> bool:
    """Whether tokens may be moved among batch entries right before ``value``, views aside: by a copy, or by a Transpose
    of more axes than batch, tokens, heads and head dim.
    """
    for _ in range(_MAX_VIEWS):
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in _COPIES or (node.op_type == "Transpose" and len(world.shapes.get(value, ())) > 4):
            return True
        if node.op_type not in VIEW_OPS:
            return False
        value = node.input[0]
    return False


def _overlap(coordinate: Coordinate, own: set[int], keys: set[int]) -> bool:
    atoms = set(coordinate.atoms)
    if not (atoms & own and atoms & keys):
        return False
    entries = coordinate.array.reshape(-1)
    return bool(np.any(entries < 0)) or len(np.unique(entries)) < len(entries)
