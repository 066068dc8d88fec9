"""Softmax attention written out as a product, a softmax and a product, lifted by what its axes mean."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.detect.cache import find_cache
from attncompile.passes.detect.checks import check_guard, check_keys, check_private, head_scale, with_floor
from attncompile.passes.detect.contraction import Contraction
from attncompile.passes.detect.homes import Walk
from attncompile.passes.detect.log_sum_exp import log_sum_exp
from attncompile.passes.detect.normaliser import Normaliser, softmax_operator, written_out
from attncompile.passes.detect.repeated import for_all_heads
from attncompile.passes.detect.roles import batch_and_heads, homes_of_either, roles
from attncompile.passes.detect.scores import Path, Step, trace
from attncompile.passes.detect.sinks import logits_of, with_sinks
from attncompile.passes.detect.tokens import check_tokens
from attncompile.passes.detect.views import Atoms, Axes, Axis, forward
from attncompile.passes.detect.walks import (
    after_softmax,
    node_name,
    operand_axes,
    second_product,
    walk,
    walk_output,
)
from attncompile.passes.evaluate import GraphIndex, World


@dataclass(frozen=True, slots=True)
class MaskFactor:
    """A value added to the scores, or a bool that selects them. ``aligned`` says whether the scores' axes are
    [batch, heads, query, key] where it is applied, so that its own axes (from the right) mean the same;
    ``factor`` is the scale that the scores, and so an added value, still pass through afterwards. ``windows`` > 0: the
    scores' axes are [outer batch, windows, heads, query, key] there (Swin); the batch is the first two together.
    """

    kind: str
    value: str
    fill: float
    aligned: bool
    factor: float
    windows: int = 0


@dataclass(frozen=True, slots=True)
class MaskQuery:
    """What the mask analysis needs to know about a site."""

    factors: tuple[MaskFactor, ...]
    guarded: bool
    query: str
    key: str
    query_axis: int
    key_axis: int
    query_length: int
    key_length: int
    stable: bool = True


_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}  # fmt: skip


class MaskAnalysis(Protocol):
    """What tells the facts of a site's mask."""

    def __call__(self, query: MaskQuery) -> MaskFacts:
        """From the factors that the graph applies."""
        ...

    def of_tokens(self, visible: np.ndarray, how: Certificate, fills: tuple[float, ...], guarded: bool) -> MaskFacts:
        """From a bool array [query, key] itself, in which every query sees a key."""
        ...

    def of_counts(self, counts: np.ndarray, how: Certificate) -> MaskFacts:
        """From how often each key counts, uint8 [heads, query, key], 0 where it is not seen; every query sees one."""
        ...


def lift(index: GraphIndex, world: World, softmax: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site around the ``Softmax`` node.

    Raises:
        Unsupported: this softmax is not attention, or a form of it that is not understood.
    """
    return lift_around(index, world, softmax_operator(index, world, softmax), analyse)


def lift_written_out(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite | None:
    """The site around a softmax in several nodes that ends in ``node``; None where ``node`` ends none.

    Raises:
        Unsupported: it is a softmax, but not attention, or a form of it that is not understood.
    """
    normaliser = written_out(index, world, node)
    return None if normaliser is None else lift_around(index, world, normaliser, analyse)


def lift_around(index: GraphIndex, world: World, norm: Normaliser, analyse: MaskAnalysis) -> AttentionSite:
    """The site around ``norm``; lengths are the world's numbers and the id is empty.

    Raises:
        Unsupported: this softmax is not attention, or a form of it that is not understood.
    """
    scores_value, weights = norm.scores, norm.weights
    shape = world.shapes.get(scores_value)
    if shape is None:
        raise Unsupported("shape-unknown", f"the shape of '{scores_value}' is not known")
    path = trace(index, world, scores_value)
    product, query_label, key_label = roles(path, shape, world)
    check_keys(index, product, key_label)
    interior_nodes: list[NodeProto] = [product.node, *(n for s in path.steps for n in (*s.extra, s.node)), *norm.nodes]

    atoms = Atoms()
    out_shape = world.shapes[product.node.output[0]]
    label_axis: dict[str, Axis] = {
        label: atoms.new(size) for label, size in zip(product.out_labels, out_shape, strict=True)
    }
    axes: Axes = tuple(label_axis[label] for label in product.out_labels)
    checkpoints: list[tuple[Step, Axes]] = []
    for step in path.steps:
        if step.kind == "view":
            axes = forward(world, atoms, step.node, axes)
        checkpoints.append((step, axes))
    scores_axes = axes
    if atoms.leaves(scores_axes[-1]) != atoms.leaves(label_axis[key_label]):
        raise Unsupported("softmax-axis", "the softmax does not run over the keys")

    weights, axes, guard_nodes, guarded = after_softmax(index, world, atoms, weights, axes)
    interior_nodes += guard_nodes
    check_guard(path, guard_nodes)
    second = second_product(index, world, weights)
    interior_nodes.append(second.node)
    left_is_weights = second.left == weights
    weight_labels, value_labels = (
        (second.left_labels, second.right_labels) if left_is_weights else (second.right_labels, second.left_labels)
    )
    value_name = second.right if left_is_weights else second.left
    if second.factor != 1.0:
        raise Unsupported("value-product", f"the product with the values is multiplied by {second.factor}")
    if len(second.summed) != 1:
        raise Unsupported("value-product", "the weights and the values are contracted over more than one axis")
    (summed,) = second.summed
    if atoms.leaves(axes[weight_labels.index(summed)]) != atoms.leaves(label_axis[key_label]):
        raise Unsupported("value-axis", "the product with the values does not sum over the keys")
    second_axis = {label: axes[i] for i, label in enumerate(weight_labels)}
    value_shape = world.shapes[value_name]
    for label, size in zip(value_labels, value_shape, strict=True):
        if label not in second_axis:
            second_axis[label] = atoms.new(size)
        elif size not in (1, world.shapes[weights][weight_labels.index(label)]):
            raise Unsupported("value-product", "one set of weights serves several batch entries or heads of the values")
    dim_labels = [x for x in second.out_labels if x not in weight_labels]
    if len(dim_labels) != 1:
        raise Unsupported("value-product", "the values have no, or more than one, axis of their own")
    value_dim = second_axis[dim_labels[0]]
    query_axis = label_axis[query_label]

    # Walk each operand back to where its axes are separate; this may split atoms, so roles are read afterwards.
    query_on_left = query_label in product.left_labels
    query_name, key_name = (product.left, product.right) if query_on_left else (product.right, product.left)
    query_labels, key_labels = (
        (product.left_labels, product.right_labels) if query_on_left else (product.right_labels, product.left_labels)
    )
    (contracted,) = product.summed
    label_axis[contracted] = atoms.new(world.shapes[query_name][query_labels.index(contracted)])
    query_walk = walk(
        index,
        world,
        atoms,
        query_name,
        operand_axes(world, query_name, query_labels, label_axis),
        True,
        product.node.output[0],
    )
    key_walk = walk(
        index,
        world,
        atoms,
        key_name,
        operand_axes(world, key_name, key_labels, label_axis),
        True,
        product.node.output[0],
    )
    value_walk = walk(
        index,
        world,
        atoms,
        value_name,
        operand_axes(world, value_name, value_labels, second_axis),
        False,
        second.node.output[0],
    )
    out_value = second.node.output[0]
    out_axes: Axes = tuple(second_axis[label] for label in second.out_labels)
    out_stages, out_nodes = walk_output(index, world, atoms, out_value, out_axes)

    batch, heads = batch_and_heads(atoms, product, label_axis, scores_axes, query_axis, label_axis[key_label])
    dim, keys = label_axis[contracted], label_axis[key_label]
    walks, sequences, dims = (query_walk, key_walk, value_walk), (query_axis, keys), (dim, value_dim)
    written = (batch, heads, query_axis, keys)
    homes, batch, heads, query_axis = homes_of_either(atoms, walks, out_stages, batch, heads, sequences, dims)
    check_tokens(index, world, atoms, (query_walk, key_walk), sequences, dim)
    shared_keys = homes.kv_heads != atoms.leaves(heads)
    query, key, value, output = homes.operands
    query_at, key_at, value_at, output_at = homes.at

    scale = prod(query_walk.scales[query_at:]) * prod(key_walk.scales[key_at:])
    scale *= product.factor * prod(s.factor for s in path.steps if s.kind == "scale")
    if any(s.kind in ("scale", "head-scale") and _after_softcap(path, s) for s in path.steps):
        raise Unsupported("softcap", "the scores are scaled again after the softcap")
    per_head = head_scale(world, atoms, checkpoints, heads)
    sinks, sink_nodes = "", tuple[NodeProto, ...]()
    if norm.sink is not None:
        sinks, sink_nodes = logits_of(index, world, atoms, norm.sink, scores_value, scores_axes, heads)
    beside, beside_nodes = log_sum_exp(index, world, norm)
    if beside:
        flat = tuple(x for axis in scores_axes[:-1] for x in atoms.leaves(axis))
        wanted = tuple(x for axis in (batch, heads, query_axis) for x in atoms.leaves(axis))
        if flat != wanted or prod(world.shapes.get(beside, ())) != prod(shape[:-1]):
            raise Unsupported("log-sum-exp", f"'{beside}' is not one log-sum-exp for each batch entry, head and query")
    operand_nodes = [
        *query_walk.nodes[query_at:], *key_walk.nodes[key_at:], *value_walk.nodes[value_at:], *out_nodes[:output_at],
        *sink_nodes,
    ]  # fmt: skip
    nodes = list({id(n): n for n in (*operand_nodes, *interior_nodes)}.values())
    nodes = list({id(n): n for n in (*nodes, *beside_nodes)}.values())
    check_private(index, interior_nodes, [*operand_nodes, *interior_nodes, *beside_nodes], out_value)
    facts = analyse(
        MaskQuery(
            factors=_factors(index, world, atoms, path, checkpoints, (batch, heads, query_axis, keys), written),
            guarded=guarded,
            stable=norm.stable,
            query=query.value,
            key=key.value,
            query_axis=_sequence_axis(query),
            key_axis=_sequence_axis(key),
            query_length=atoms.size(query_axis),
            key_length=atoms.size(keys),
        )
    )
    facts = with_floor(world, path, norm.stable, facts)
    return AttentionSite(
        id="",
        form=_form(product, second, path, norm, guarded, query_walk, key_walk, shared_keys),
        query=query, key=key, value=value, output=output,
        batch=atoms.size(batch), heads=atoms.size(heads), kv_heads=atoms.size(homes.kv_heads),
        head_dim=atoms.size(dim), value_dim=atoms.size(value_dim),
        query_length=atoms.size(query_axis), key_length=atoms.size(keys),
        scale=scale, mask=with_sinks(index, world, facts, sinks) if sinks else facts,
        softcap=next((s.factor for s in path.steps if s.kind == "softcap"), 0.0),
        dtype=dtype_name(world, query.value), softmax_dtype=dtype_name(world, norm.logits),
        nodes=tuple(node_name(n) for n in nodes),
        interior=tuple(o for n in nodes for o in n.output if o and o not in (output.value, beside)),
        sinks=sinks, head_scale=per_head, log_sum_exp=beside, cache=find_cache(index, world, key, value),
    )  # fmt: skip


def dtype_name(world: World, value: str) -> str:
    """The element type in the spelling of ``AttentionSite.dtype``."""
    return _DTYPES.get(world.types.get(value, 0), str(world.types.get(value, 0)))


def _sequence_axis(operand: Operand) -> int:
    return operand.layout.index("N")


def _after_softcap(path: Path, step: Step) -> bool:
    kinds = [s.kind for s in path.steps[: path.steps.index(step)]]
    return "softcap" in kinds


def _factors(
    index: GraphIndex, world: World, atoms: Atoms, path: Path, checkpoints: list[tuple[Step, Axes]],
    site: tuple[Axis, Axis, Axis, Axis], written: Axes,
) -> tuple[MaskFactor, ...]:  # fmt: skip
    """What masks the scores. ``site``: batch, heads, queries and keys as the site says them; ``written``: as the graph
    does, which may hold heads where queries belong. A mask that is the same for all of both means the same there.
    """
    wanted, other = (tuple(atoms.leaves(a) for a in axes) for axes in (site, written))
    factors = []
    for i, (step, axes) in enumerate(checkpoints):
        if step.kind not in ("add", "visible", "hidden"):
            continue
        leaves = tuple(atoms.leaves(a) for a in axes)
        shape = world.shapes.get(step.value, (0, 0, 0))
        aligned = leaves == wanted or (leaves == other and all(size == 1 for size in shape[-3:-1]))
        later = prod(s.factor for s in path.steps[i + 1 :] if s.kind == "scale")
        after = {s.kind for s in path.steps[i + 1 :]}
        if "softcap" in after:
            raise Unsupported("softcap", "a mask is applied before the softcap")
        if "head-scale" in after:
            raise Unsupported("mask-scale", "a mask is applied before the scores are multiplied by one number a head")
        outer, inner = tuple(atoms.leaves(a) for a in axes[:2]), tuple(atoms.leaves(a) for a in axes[2:])
        windowed = len(axes) == 5 and (sum(outer, ()), *inner) == wanted
        windows = atoms.size(axes[1]) if windowed else 0
        once = for_all_heads(index, world, atoms, step.value, axes, site)
        aligned = aligned or bool(once)
        factors.append(MaskFactor(step.kind, once or step.value, step.fill, aligned, later, windows))
    return tuple(factors)


def _form(
    product: Contraction, second: Contraction, path: Path, norm: Normaliser, guarded: bool, query: Walk,
    key: Walk, shared: bool,
) -> str:  # fmt: skip
    words = [f"{product.node.op_type.lower()}-{norm.word}-{second.node.op_type.lower()}"]
    where = [n for n, w in (("query", query), ("key", key)) if any(s != 1.0 for s in w.scales)]
    where += ["scores"] * (product.factor != 1.0 or any(s.kind == "scale" for s in path.steps))
    words.append("scale:" + ("+".join(where) or "none"))
    words += ["head-scale"] * any(s.kind == "head-scale" for s in path.steps)
    words += [f"mask:{s.kind}" for s in path.steps if s.kind in ("add", "visible", "hidden")]
    words += ["softcap"] * any(s.kind == "softcap" for s in path.steps)
    words += ["floor"] * any(s.kind == "floor" for s in path.steps)
    words += ["cast"] * any(s.kind == "cast" for s in path.steps)
    words += ["shared-kv"] * shared + ["nan-guard"] * guarded
    return " ".join(words)
