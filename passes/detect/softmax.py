"""Softmax attention written out as a product, a softmax and a product, lifted by what its axes mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.detect.contraction import Contraction
from attncompile.passes.detect.homes import Homes, NotSeparate, ShapeRead, Stage, Walk, find_homes
from attncompile.passes.detect.normaliser import Normaliser, softmax_operator, written_out
from attncompile.passes.detect.scores import FLOATS, Path, Step, trace
from attncompile.passes.detect.views import Atoms, Axes, Axis, forward
from attncompile.passes.detect.walks import (
    after_softmax,
    dies,
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
    ``factor`` is the scale that the scores, and so an added value, still pass through afterwards.
    """

    kind: str
    value: str
    fill: float
    aligned: bool
    factor: float


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

MaskAnalysis = Callable[[MaskQuery], MaskFacts]


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
    product, query_label, key_label = _roles(path, shape, world)
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

    batch, heads = _batch_and_heads(atoms, product, label_axis, scores_axes, query_axis, label_axis[key_label])
    dim, keys = label_axis[contracted], label_axis[key_label]
    walks, sequences, dims = (query_walk, key_walk, value_walk), (query_axis, keys), (dim, value_dim)
    homes, batch, heads = _homes_of_either(atoms, walks, out_stages, batch, heads, sequences, dims)
    query, key, value, output = homes.operands
    query_at, key_at, value_at, output_at = homes.at

    scale = prod(query_walk.scales[query_at:]) * prod(key_walk.scales[key_at:])
    scale *= product.factor * prod(s.factor for s in path.steps if s.kind == "scale" and not _after_softcap(path, s))
    if any(s.kind == "scale" and _after_softcap(path, s) for s in path.steps):
        raise Unsupported("softcap", "the scores are scaled again after the softcap")
    operand_nodes = [
        *query_walk.nodes[query_at:], *key_walk.nodes[key_at:], *value_walk.nodes[value_at:], *out_nodes[:output_at],
    ]  # fmt: skip
    nodes = list({id(n): n for n in (*operand_nodes, *interior_nodes)}.values())
    _check_private(index, interior_nodes, [*operand_nodes, *interior_nodes], out_value, product)
    facts = analyse(
        MaskQuery(
            factors=_factors(atoms, path, checkpoints, batch, heads, query_axis, keys),
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
    return AttentionSite(
        id="",
        form=_form(product, second, path, norm, guarded, query_walk, key_walk, homes.kv_heads != heads),
        query=query, key=key, value=value, output=output,
        batch=atoms.size(batch), heads=atoms.size(heads), kv_heads=atoms.size(homes.kv_heads),
        head_dim=atoms.size(dim), value_dim=atoms.size(value_dim),
        query_length=atoms.size(query_axis), key_length=atoms.size(keys),
        scale=scale, mask=facts,
        softcap=next((s.factor for s in path.steps if s.kind == "softcap"), 0.0),
        dtype=dtype_name(world, query.value), softmax_dtype=dtype_name(world, scores_value),
        nodes=tuple(node_name(n) for n in nodes),
        interior=tuple(o for n in nodes for o in n.output if o and o != output.value),
    )  # fmt: skip


def dtype_name(world: World, value: str) -> str:
    """The element type in the spelling of ``AttentionSite.dtype``."""
    return _DTYPES.get(world.types.get(value, 0), str(world.types.get(value, 0)))


def _sequence_axis(operand: Operand) -> int:
    return operand.layout.index("N")


def _roles(path: Path, shape: tuple[int, ...], world: World) -> tuple[Contraction, str, str]:
    """The product, the label of the queries and that of the keys (the one that reaches the softmax's axis)."""
    product = path.product
    name = product.node.output[0]
    if len(product.summed) != 1:
        raise Unsupported("score-product", f"the product '{name}' sums over {len(product.summed)} axes, not one")
    own = [x for x in product.out_labels if x not in product.shared]
    sides = [{x for x in own if x in labels} for labels in (product.left_labels, product.right_labels)]
    # A label of one operand that is a broadcast batch axis there (MatMul pads the shorter operand) is batch too.
    sides = [{x for x in side if not x.startswith("b") or product.node.op_type == "Einsum"} for side in sides]
    if any(len(side) != 1 for side in sides):
        raise Unsupported("score-product", f"the product '{name}' is not one of queries with keys")
    if world.types.get(name) not in FLOATS:
        raise Unsupported("score-product", f"the product '{name}' is not of floats")
    atoms = Atoms()
    axes: Axes = tuple(atoms.new(s) for s in world.shapes[name])
    start = dict(zip(product.out_labels, axes, strict=True))
    for step in path.steps:
        if step.kind == "view":
            axes = forward(world, atoms, step.node, axes)
    last = atoms.leaves(axes[-1])
    labels = [next(iter(side)) for side in sides]
    matching = [x for x in labels if atoms.leaves(start[x]) == last]
    if len(matching) == 2:  # both of size 1: the key is the later axis
        matching = [max(labels, key=product.out_labels.index)]
    if not matching:
        raise Unsupported("softmax-axis", "the softmax does not run over the keys")
    key = matching[0]
    return product, next(x for x in labels if x != key), key


def _batch_and_heads(
    atoms: Atoms, product: Contraction, label_axis: dict[str, Axis], scores: Axes, query: Axis, key: Axis
) -> tuple[Axis, Axis]:
    """The axes of the scores that are neither query nor key: outermost is batch, the rest heads."""
    q, k = atoms.leaves(query), atoms.leaves(key)
    # Of the two spellings of the scores the one with more axes says more.
    widest = max((scores, tuple(label_axis[x] for x in product.out_labels)), key=len)
    rest = [atoms.leaves(axis) for axis in widest]
    if rest[-1] == k:
        rest = rest[:-1]
    if rest and rest[-1] == q:
        rest = rest[:-1]
    rest = [tuple(x for x in axis if x not in q and x not in k) for axis in rest]
    if len(rest) >= 2:
        return rest[0], tuple(x for axis in rest[1:] for x in axis)
    if not rest:
        return (), ()
    merged = rest[0]
    return (merged[:-1], merged[-1:]) if merged else ((), ())


def _homes_of_either(
    atoms: Atoms, walks: tuple[Walk, Walk, Walk], out: list[Stage], batch: Axis, heads: Axis,
    sequences: tuple[Axis, Axis], dims: tuple[Axis, Axis],
) -> tuple[Homes, Axis, Axis]:  # fmt: skip
    """The homes, and what is batch and what heads: one axis that nobody splits can be either.

    Raises:
        NotSeparate: neither reading has homes. It holds separations for the reading that the output speaks for: heads
            are merged with the head dim sooner or later, batch entries are not.
    """
    choices = [(batch, heads)]
    single = atoms.leaves(batch) + atoms.leaves(heads)
    if len(single) == 1:
        dim = atoms.leaves(dims[1])
        merged = any(atoms.leaves(axis) == single + dim for stage in out for axis in stage.axes)
        choices = [((), single), (single, ())] if merged else [(single, ()), ((), single)]
    failures: list[NotSeparate] = []
    for chosen in choices:
        try:
            return find_homes(atoms, walks, out, *chosen, sequences, dims), *chosen
        except NotSeparate as error:
            failures.append(error)
    raise failures[0]


def _after_softcap(path: Path, step: Step) -> bool:
    kinds = [s.kind for s in path.steps[: path.steps.index(step)]]
    return "softcap" in kinds


def _factors(
    atoms: Atoms, path: Path, checkpoints: list[tuple[Step, Axes]], batch: Axis, heads: Axis, query: Axis, keys: Axis
) -> tuple[MaskFactor, ...]:
    wanted = tuple(atoms.leaves(a) for a in (batch, heads, query, keys))
    factors = []
    for i, (step, axes) in enumerate(checkpoints):
        if step.kind not in ("add", "visible", "hidden"):
            continue
        aligned = tuple(atoms.leaves(a) for a in axes) == wanted
        later = prod(s.factor for s in path.steps[i + 1 :] if s.kind == "scale")
        if any(s.kind == "softcap" for s in path.steps[i + 1 :]):
            raise Unsupported("softcap", "a mask is applied before the softcap")
        factors.append(MaskFactor(step.kind, step.value, step.fill, aligned, later))
    return tuple(factors)


def _check_private(
    index: GraphIndex, core: list[NodeProto], allowed: list[NodeProto], out_value: str, product: Contraction
) -> None:
    """Scores and weights that someone else reads cannot disappear."""
    ids = {id(n) for n in allowed}
    for node in core:
        for output in node.output:
            if output == out_value or not output:
                continue
            if output in index.outputs:
                raise Unsupported("scores-used", f"the scores or weights '{output}' are an output of the model")
            outside = [n for n in index.consumers.get(output, []) if not dies(index, n, ids)]
            if outside and all(n.op_type == "Shape" for n in outside):
                reason = f"the shape of the scores or weights '{output}' is read by '{node_name(outside[0])}'"
                raise ShapeRead(reason, tuple(n.output[0] for n in outside))
            if outside:
                raise Unsupported(
                    "scores-used", f"the scores or weights '{output}' are also read by '{node_name(outside[0])}'"
                )


def _form(
    product: Contraction, second: Contraction, path: Path, norm: Normaliser, guarded: bool, query: Walk,
    key: Walk, shared: bool,
) -> str:  # fmt: skip
    words = [f"{product.node.op_type.lower()}-{norm.word}-{second.node.op_type.lower()}"]
    where = [n for n, w in (("query", query), ("key", key)) if any(s != 1.0 for s in w.scales)]
    where += ["scores"] * (product.factor != 1.0 or any(s.kind == "scale" for s in path.steps))
    words.append("scale:" + ("+".join(where) or "none"))
    words += [f"mask:{s.kind}" for s in path.steps if s.kind in ("add", "visible", "hidden")]
    words += ["softcap"] * any(s.kind == "softcap" for s in path.steps)
    words += ["cast"] * any(s.kind == "cast" for s in path.steps)
    words += ["shared-kv"] * shared + ["nan-guard"] * guarded
    return " ".join(words)
