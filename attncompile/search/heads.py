"""Sites whose heads may have patterns: what workers need of them, and what their blocks cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, ordered, streaming, with_rest
from attncompile.core.block_selection import Family
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import ChoosingMechanism, HeadMechanism, Mechanism, Shape, understood
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.cost import dense_cost, predicted_gain, shape_of
from attncompile.gpu_cost import GpuCost
from attncompile.passes.evaluate import World
from attncompile.search.orders import axis_orders
from attncompile.search.tasks import HeadSite

_VIEWS = frozenset({"Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
"""What stands between a site and its projection; their meaning is followed element by element."""


@dataclass(frozen=True, slots=True)
class BlockTime:
    """Predicted time of a site by how many blocks all its heads have: ``fixed + blocks * block``, and ``head`` for one
    that has all; ``dense``: of the site as it is in the source. Milliseconds on a GPU, score elements on the CPU.
    """

    fixed: float
    block: float
    head: float
    dense: float


def spec(site: AttentionSite, geometry: BlockGeometry, world: World) -> HeadSite:
    """What workers need of ``site``."""
    part = site.mask.part("padding")
    padding = part.source if part is not None and part.source is not None else ""
    return HeadSite(
        site.id, (site.query.value, site.key.value, site.value.value),
        (site.query.layout, site.key.layout, site.value.layout), site.scale, geometry, padding,
        projection(site, world), () if part is not None else axis_orders(geometry),
    )  # fmt: skip


def geometry_of(mechanism: Mechanism, site: AttentionSite) -> BlockGeometry | Verdict:
    """The blocks that heads of this site may leave out, or why none."""
    if not isinstance(mechanism, HeadMechanism):
        return Verdict.no("heads", f"{mechanism.name} has no patterns for heads")
    if site.scope:
        return Verdict.no("scope", "operands in the body of an If, Loop or Scan cannot be captured")
    known = understood(mechanism, site)
    return mechanism.head_geometry(site) if known.ok else known


def projection(site: AttentionSite, world: World) -> np.ndarray | None:
    """float32 [H, Dv, Dv]: for each head a square root W of M M^T, where M [Dv, width] are the head's rows of the
    matrix that the site's output is multiplied by, so that |x W| = |x M|. None where the graph has no such product, or
    one of other elements than all heads' of one token.
    """
    value, width = site.output.value, site.heads * site.value_dim
    place = _places(site, world)
    for _ in range(8):
        readers = world.index.consumers.get(value, [])
        if place is None or len(readers) != 1 or value in world.index.outputs:
            return None
        (node,) = readers
        if node.op_type in _VIEWS and node.input[0] == value:
            place, value = _viewed(place, node, world), node.output[0]
            continue
        stored = _weights(node, value, world)
        if stored is None or stored.shape[0] != width or place.shape[-1] != width:
            return None
        order = place.reshape(-1, width)
        if (order != order[0]).any() or (np.sort(order[0]) != np.arange(width)).any():
            return None
        rows = np.asarray(stored, np.float64)[np.argsort(order[0])].reshape(site.heads, site.value_dim, -1)
        values, vectors = np.linalg.eigh(rows @ rows.transpose(0, 2, 1))
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0))[:, None, :], np.float32)
    return None


def _places(site: AttentionSite, world: World) -> np.ndarray | None:
    """Where each element of the site's output stands among its token's: the number of its head times Dv, and so on."""
    shape = world.shapes.get(site.output.value)
    heads, dims = (site.output.layout.find(axis) for axis in "HD")
    if shape is None or len(shape) != len(site.output.layout) or min(heads, dims) < 0:
        return None
    if (shape[heads], shape[dims]) != (site.heads, site.value_dim):
        return None
    head, dim = (np.arange(shape[a], dtype=np.int32).reshape([-1 if a == i else 1 for i in range(len(shape))])
                 for a in (heads, dims))  # fmt: skip
    return np.broadcast_to(head * site.value_dim + dim, shape)


def _viewed(place: np.ndarray, node: NodeProto, world: World) -> np.ndarray | None:
    """The same behind a node that moves or renames axes."""
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return place.transpose(order)
    shape = world.shapes.get(node.output[0])
    return None if shape is None or int(np.prod(shape)) != place.size else place.reshape(shape)


def _weights(node: NodeProto, value: str, world: World) -> np.ndarray | None:
    """The stored matrix [in, out] that ``value`` is multiplied by from the left."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] != value or not world.is_stored(node.input[1]):
        return None
    try:
        stored = world.value(node.input[1])
    except Unsupported:
        return None
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    if any((a.name == "transA" and a.i) or (a.name == "alpha" and a.f != 1.0) for a in node.attribute):
        return None
    return None if stored.ndim != 2 else stored.T if turned else stored


def block_time(
    site: AttentionSite, geometry: BlockGeometry, mechanism: HeadMechanism, binding: Mapping[str, int],
    gpu: GpuCost | None, rest: int = 0,
) -> BlockTime:  # fmt: skip
    """With ``rest``, of heads with means of so many keys, which are among the blocks. Raises ``Unsupported`` where
    nothing is known of the GPU's time.
    """
    shape = shape_of(site, binding)
    of_head = int(geometry.all.sum())
    if gpu is not None:
        if rest:
            raise Unsupported("cost", "means beside blocks were not measured on a GPU")
        few, many = site.heads * geometry.count, site.heads * of_head
        least, most = (gpu.lists(site, shape, geometry.edge, n) for n in (few, many))
        slope = (most - least) / max(many - few, 1)
        return BlockTime(_fixed(least - slope * few, slope), slope, slope * of_head, gpu.before(site, shape))
    dense = dense_cost(site, shape).elements
    windows = [streaming(0, n) for n in (0, max(geometry.count - 2, 1))]
    windows = [with_rest(w, rest) for w in windows] if rest else windows
    fewest, most_blocks = (site.heads * w.computed(geometry) for w in windows)
    least, most = (_relative(site, geometry, mechanism, shape, [w] * site.heads) * dense for w in windows)
    slope = (most - least) / max(most_blocks - fewest, 1)
    # Heads that see everything are done as they are in the source, but for a causal half.
    head = slope * of_head if geometry.causal else dense / site.heads
    return BlockTime(_fixed(least - slope * fewest, slope), slope, head, dense)


def _fixed(time: float, block: float) -> float:
    """``time`` beside the blocks, but no less than a ``block``'s: a site that computes none still writes its output."""
    return max(time, block)


def _relative(
    site: AttentionSite, geometry: BlockGeometry, mechanism: HeadMechanism, shape: Shape,
    patterns: Sequence[BlockPattern],
) -> float:  # fmt: skip
    """Time of the body with these patterns of its heads, relative to the site as it is."""
    given = mechanism.head_parameters(geometry, patterns)
    return 1 / predicted_gain(site, mechanism.cost(site, given, shape), shape)


def ordered_time(
    site: AttentionSite, geometry: BlockGeometry, mechanism: HeadMechanism, binding: Mapping[str, int],
    gpu: GpuCost | None, time: BlockTime, order: Sequence[int],
) -> BlockTime:  # fmt: skip
    """``time`` of a site some of whose heads have another order of their tokens, such as ``order``: with what it takes
    to bring all heads to their orders and back, and to copy key heads that are shared, at most: one head of a group has
    it.
    """
    shape = shape_of(site, binding)
    if gpu is not None:
        return replace(time, fixed=time.fixed + gpu.moving(site, shape))
    plain = streaming(0, 0)
    group = max(2, site.heads // site.kv_heads)
    mixed = [plain if head % group else ordered(order, plain) for head in range(site.heads)]
    moved, still = (_relative(site, geometry, mechanism, shape, patterns) for patterns in (mixed, [plain] * site.heads))
    return replace(time, fixed=time.fixed + (moved - still) * dense_cost(site, shape).elements)


def choice_geometry(mechanism: Mechanism, site: AttentionSite, binding: Mapping[str, int]) -> BlockGeometry | Verdict:
    """The blocks that heads of this site may choose among when the model runs, or why not."""
    if not isinstance(mechanism, ChoosingMechanism):
        return Verdict.no("heads", f"the heads of {mechanism.name} do not choose")
    if site.scope:
        return Verdict.no("scope", "operands in the body of an If, Loop or Scan cannot be captured")
    known = understood(mechanism, site)
    return mechanism.choice_geometry(site, shape_of(site, binding).query_length) if known.ok else known


def choice_time(
    site: AttentionSite, geometry: BlockGeometry, mechanism: ChoosingMechanism, binding: Mapping[str, int],
    gpu: GpuCost | None, family: Family, rest: int = 0,
) -> BlockTime:  # fmt: skip
    """Of a site whose heads choose, what choosing takes included; a head that is dense among them costs all blocks.
    ``rest`` as of ``block_time``. Raises ``Unsupported`` where nothing is known of the GPU's time.
    """
    shape = shape_of(site, binding)
    of_head = int(geometry.all.sum())
    few, many = site.heads * geometry.count, site.heads * of_head
    if gpu is not None:
        if rest:
            raise Unsupported("cost", "means beside blocks were not measured on a GPU")
        picked = gpu.selection(site, shape, geometry.edge, family, geometry.causal)
        least, most = (picked + gpu.lists(site, shape, geometry.edge, n) for n in (few, many))
        dense = gpu.before(site, shape)
    else:
        dense = dense_cost(site, shape).elements
        costs = (mechanism.choice_cost(site, geometry.edge, family, n * shape.batch, shape, rest) for n in (few, many))
        least, most = (dense / predicted_gain(site, cost, shape) for cost in costs)
    slope = (most - least) / max(many - few, 1)
    return BlockTime(_fixed(least - slope * few, slope), slope, slope * of_head, dense)
