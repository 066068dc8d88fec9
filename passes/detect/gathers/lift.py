"""One site out of an attention core whose queries and keys were moved into windows before the products.

The core's rows and columns are followed back to tokens. Where every query stands in one row, and every key at most once
in a row, the core is softmax attention over all tokens with the keys of the row visible and all others hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.checks import head_scale
from attncompile.passes.detect.contraction import Contraction
from attncompile.passes.detect.gathers.ends import Moved, OutputPlace, check_private, find_source
from attncompile.passes.detect.gathers.origins import Coordinate
from attncompile.passes.detect.gathers.windows import hides, window_facts, without_constant_axes
from attncompile.passes.detect.normaliser import Normaliser
from attncompile.passes.detect.scores import HIDDEN, Step, trace
from attncompile.passes.detect.softmax import dtype_name
from attncompile.passes.detect.views import Atoms, Axes, Axis, forward
from attncompile.passes.detect.walks import after_softmax, node_name, second_product
from attncompile.passes.evaluate import GraphIndex, World

VisibleFacts = Callable[[np.ndarray, bool, tuple[float, ...]], MaskFacts]
"""What a bool array [query, key] is; whether a NaN guard follows the softmax; what hides keys."""

MAX_SLOTS = 1 << 25
"""Query and key slots that are looked at one by one."""

MAX_PAIRS = 1 << 27
"""Queries times keys of a site."""


def lift_gathered(
    index: GraphIndex, world: World, norm: Normaliser, facts_of: VisibleFacts, windowed: bool = False
) -> AttentionSite:
    """The site around ``norm``, lengths as numbers, id empty. ``windowed``: windows side by side on a grid, or nothing.

    Raises:
        Unsupported: the tokens cannot be followed, or the core is not attention over them.
    """
    if norm.sink is not None:
        raise Unsupported("gather-form", "a sink stands beside the keys of the windows")
    path = trace(index, world, norm.scores)
    first = path.product
    if len(first.summed) != 1 or not first.summed <= _both(first) or first.node.op_type == "Gemm":
        raise Unsupported("gather-form", "the product of queries and keys is not over one axis")
    atoms = Atoms()
    label_axis = {x: atoms.new(n) for x, n in zip(first.out_labels, world.shapes[first.node.output[0]], strict=True)}
    (contracted,) = first.summed
    label_axis[contracted] = atoms.new(world.shapes[first.left][first.left_labels.index(contracted)])
    axes: Axes = tuple(label_axis[x] for x in first.out_labels)
    shown: list[Coordinate] = []
    added: list[tuple[str, Coordinate]] = []
    of_heads: list[tuple[Step, Axes]] = []
    fills: list[float] = []
    scale = first.factor
    for step in path.steps:
        if step.kind == "view":
            axes = forward(world, atoms, step.node, axes)
        elif step.kind == "scale" and not shown and not added:
            scale *= step.factor
        elif step.kind == "head-scale" and not shown and not added:
            of_heads.append((step, axes))
        elif step.kind in ("add", "visible", "hidden"):
            mask, fill, bias = _applied(world, atoms, axes, step)
            shown += [mask] if mask is not None else []
            added += [(step.value, bias)] if bias is not None else []
            fills += fill
        elif step.kind != "cast":
            raise Unsupported("gather-form", f"a {step.kind} stands between windowed scores and their softmax")
    keys = atoms.leaves(axes[-1])
    weights, axes, guards, guarded = after_softmax(index, world, atoms, norm.weights, axes)
    second = second_product(index, world, weights)
    values = _value_side(world, atoms, second, weights, axes)
    if atoms.leaves(values.summed) != keys:
        raise Unsupported("value-axis", "the product with the values does not sum over the keys")
    sides = [(first.left, first.left_labels), (first.right, first.right_labels)]
    if not any(set(atoms.leaves(label_axis[x])) & set(keys) for x in first.left_labels):
        sides.reverse()
    (key_name, key_labels), (query_name, query_labels) = sides
    dim = label_axis[contracted]
    key = find_source(index, world, atoms, key_name, tuple(label_axis[x] for x in key_labels), dim)
    query = find_source(index, world, atoms, query_name, tuple(label_axis[x] for x in query_labels), dim, key)
    value = find_source(index, world, atoms, values.name, values.axes, values.dim, key)
    if value.factor != 1.0:
        raise Unsupported("value-product", "the values are scaled")
    if value.sizes["N"] != key.sizes["N"]:
        raise Unsupported(
            "gather-tokens", f"the keys are gathered from {key.sizes['N']} tokens, the values from {value.sizes['N']}"
        )
    slots = atoms.leaves(keys)
    rows = tuple(a for x in first.out_labels for a in atoms.leaves(label_axis[x]) if a not in slots)
    shown = [without_constant_axes(s.on_leaves(atoms)) for s in shown]
    picture = _picture(atoms, query, key, value, shown, rows)
    if not picture.any(axis=1).all():
        raise Unsupported("gather-form", "a query of a windowed core sees no key at all")
    place = OutputPlace(index, world, atoms, query, values.dim)
    output, out_nodes = place.find(second.node.output[0], values.out_axes)
    core = [first.node, *(n for s in path.steps for n in (*s.extra, s.node)), *norm.nodes, *guards, second.node]
    around = (*query.nodes, *key.nodes, *value.nodes, *out_nodes)
    nodes = list({id(n): n for n in (*around, *core)}.values())
    check_private(index, core, [*core, *around], second.node.output[0])
    if added or of_heads or windowed:
        order = atoms.leaves(rows), atoms.leaves(keys)
        kind = world.types[norm.scores]
        facts = window_facts(
            index, world, atoms, (query, key), order, added, picture, kind, tuple(fills), guarded
        )  # fmt: skip
        word = "windowed"
    else:
        facts, word = facts_of(picture, guarded, tuple(fills)), "gathered"
    per_head = head_scale(world, atoms, of_heads, query.coordinates["H"].on_leaves(atoms).atoms)
    query_dtype, scores_dtype = dtype_name(world, query.operand.value), dtype_name(world, norm.scores)
    return AttentionSite(
        id="", form=f"{word} {first.node.op_type.lower()}-{norm.word}-{second.node.op_type.lower()}",
        query=query.operand, key=key.operand, value=value.operand, output=output,
        batch=query.sizes["B"], heads=query.sizes["H"], kv_heads=key.sizes["H"],
        head_dim=query.sizes["D"], value_dim=value.sizes["D"],
        query_length=query.sizes["N"], key_length=key.sizes["N"],
        scale=scale * query.factor * key.factor, mask=facts,
        dtype=query_dtype, softmax_dtype=scores_dtype,
        nodes=tuple(node_name(n) for n in nodes),
        interior=tuple(o for n in nodes for o in n.output if o and o != output.value), head_scale=per_head,
    )  # fmt: skip


def _applied(
    world: World, atoms: Atoms, axes: Axes, step: Step
) -> tuple[Coordinate | None, list[float], Coordinate | None]:
    """What is applied to windowed scores, over the atoms that it depends on: a bool array of what it does not hide, if
    it hides anything or is made for that; what hides, the number next to zero and the one farthest from it; and the
    numbers that are added, if they are more than a mask.
    """
    array = world.value(step.value)
    fills = [step.fill]
    if step.kind == "add":
        array = array.astype(np.float64)
        seen = array > HIDDEN
        fills = sorted({float(f(array[~seen])) for f in (np.min, np.max) if not seen.all()})
        if hides(array):
            return _spread(atoms, axes, seen), fills, None
        mask = None if seen.all() else _spread(atoms, axes, seen)
        return mask, fills, _spread(atoms, axes, np.where(seen, array, 0.0))
    return _spread(atoms, axes, array.astype(bool) ^ (step.kind == "hidden")), fills, None


def _spread(atoms: Atoms, axes: Axes, array: np.ndarray) -> Coordinate:
    """An array that broadcasts to values with ``axes``, with one axis an atom."""
    wide = array.reshape((1,) * (len(axes) - array.ndim) + array.shape)
    own = [i for i, size in enumerate(wide.shape) if size > 1]
    leaves = tuple(a for i in own for a in atoms.leaves(axes[i]))
    return Coordinate(leaves, wide.reshape([atoms.sizes[a] for a in leaves]))


def _both(product: Contraction) -> frozenset[str]:
    return frozenset(product.left_labels) & frozenset(product.right_labels)


@dataclass(frozen=True, slots=True)
class _Values:
    name: str
    axes: Axes
    summed: Axis
    dim: Axis
    out_axes: Axes


def _value_side(world: World, atoms: Atoms, second: Contraction, weights: str, axes: Axes) -> _Values:
    """The other operand of the product with the weights, in terms of the weights' axes and a new one."""
    sides = [(second.left, second.left_labels), (second.right, second.right_labels)]
    if second.left != weights:
        sides.reverse()
    (_, own_labels), (name, labels) = sides
    if second.factor != 1.0 or len(second.summed) != 1 or not second.summed <= _both(second):
        raise Unsupported(
            "value-product", "the product with the values is scaled, or does not sum over one axis of both operands"
        )
    label_axis = dict(zip(own_labels, axes, strict=True))
    new = [x for x in labels if x not in label_axis]
    if len(new) != 1:
        raise Unsupported("value-product", "the values have no, or more than one, axis of their own")
    label_axis[new[0]] = atoms.new(world.shapes[name][labels.index(new[0])])
    (summed,) = second.summed
    return _Values(
        name, tuple(label_axis[x] for x in labels), label_axis[summed], label_axis[new[0]],
        tuple(label_axis[x] for x in second.out_labels),
    )  # fmt: skip


def _picture(
    atoms: Atoms, query: Moved, key: Moved, value: Moved, shown: list[Coordinate], rows: Axis
) -> np.ndarray:  # fmt: skip
    """Which keys each query sees, [queries, keys]; every query must stand in one row, every key once in it."""
    rows = atoms.leaves(rows)
    tokens_of_query, tokens_of_key = query.coordinates["N"].on_leaves(atoms), key.coordinates["N"].on_leaves(atoms)
    apart = {a for name in "BH" for a in query.coordinates[name].on_leaves(atoms).atoms}
    masks = [s.on_leaves(atoms) for s in shown]
    if apart & {a for c in (tokens_of_query, tokens_of_key, *masks) for a in c.atoms}:
        raise Unsupported("gather-form", "the windows differ between heads or batch entries")
    if apart - set(rows) or set(rows) - apart != set(tokens_of_query.atoms):
        raise Unsupported("gather-twice", "a query stands in several rows of the windowed scores")
    real = tokens_of_query.array[tokens_of_query.array >= 0]
    if len(np.unique(real)) != real.size:
        raise Unsupported("gather-twice", "a query stands in several rows of the windowed scores")
    every = tuple(dict.fromkeys(a for c in (tokens_of_query, tokens_of_key, *masks) for a in c.atoms))
    if prod(atoms.sizes[a] for a in every) > MAX_SLOTS or query.sizes["N"] * key.sizes["N"] > MAX_PAIRS:
        raise Unsupported("too-large", "the windowed scores are too many to be looked at one by one")
    shape = [atoms.sizes[a] for a in every]
    seen = np.broadcast_to(tokens_of_query.over(atoms, every) >= 0, shape)
    for mask in masks:
        seen = seen & mask.over(atoms, every)
    queries = np.broadcast_to(tokens_of_query.over(atoms, every), shape)[seen]
    keys = np.broadcast_to(tokens_of_key.over(atoms, every), shape)[seen]
    values = np.broadcast_to(value.coordinates["N"].over(atoms, every), shape)[seen]
    if bool(np.any(keys < 0)):
        raise Unsupported("padding-seen", "padding around the keys takes part in the softmax")
    if not np.array_equal(keys, values):
        raise Unsupported("gather-tokens", "keys and values are gathered from different tokens")
    picture = np.zeros((query.sizes["N"], key.sizes["N"]), dtype=bool)
    picture[queries, keys] = True
    if int(picture.sum()) != len(queries):
        raise Unsupported("gather-twice", "a query meets a key several times")
    return picture
