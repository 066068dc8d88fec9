"""Linear attention, phi(Q) (phi(K)^T V) in any order and spelling, lifted by what its axes mean.

Every form ends in a product of activations, one operand of which comes from another such product: keys with values
first (``state``, and ``cumulative`` with a running sum between), or queries with keys first (``parallel``). Which of
them it is, and whether it is attention at all, is said by what the axes are: tokens or channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.linear_assemble import Core, assemble
from attncompile.passes.detect.linear_chain import Chain, Context, Product, chain_to, context_of, product_of
from attncompile.passes.detect.linear_mask import Applied, Factor, applied, factor_of
from attncompile.passes.detect.linear_operands import Path, Roles, path_of
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.detect.views import Atoms, Axes, Axis, forward
from attncompile.passes.detect.walks import operand_axes
from attncompile.passes.evaluate import GraphIndex, World

FORM = "linear-attention"
"""The name of the family, for near misses."""

_PLAIN = frozenset({"view", "cast", "scale"})


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite | None:
    """The site whose last product is ``node``; None where ``node`` is no such product.

    Raises:
        Unsupported: it is a product of queries, keys and values, or nearly, in a form that is not understood.
    """
    if node.op_type == "Mul":
        return None
    ctx = context_of(index, world)
    outer = product_of(ctx, node)
    if outer is None or world.types.get(outer.output) not in FLOATS:
        return None
    failure: Unsupported | None = None
    for value in (outer.contraction.left, outer.contraction.right):
        chain = chain_to(ctx, value)
        if chain is None:
            continue
        try:
            core = _core(ctx, chain, outer, value)
            if core is not None:
                return assemble(ctx, core)
        except Unsupported as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


@dataclass(frozen=True, slots=True)
class _Reading:
    """Whose axis the last product sums over: operand ``summed`` of the first product; ``kept`` is the other one."""

    summed: str
    kept: str
    third: str
    summed_axis: Axis
    kept_axis: Axis


def _core(ctx: Context, chain: Chain, outer: Product, value: str) -> Core | None:
    world, atoms = ctx.world, Atoms()
    inner = chain.product
    first, second = inner.contraction, outer.contraction
    if inner.third is not None or len(second.summed) != 1 or len(first.summed) > 1:
        return None
    labels = _label_axes(world, atoms, inner)
    axes: Axes = tuple(labels.get(x, ()) for x in first.out_labels)
    places: list[tuple[int, Axes]] = []
    for at, step in enumerate(chain.steps):
        if step.kind == "view":
            axes = forward(world, atoms, step.node, axes)
        places.append((at, axes))
    outer_labels = dict(zip(outer.labels_of(value), axes, strict=True))
    other = second.right if value == second.left else second.left
    for label, size in zip(outer.labels_of(other), world.shapes[other], strict=True):
        if not outer_labels.get(label):
            outer_labels[label] = atoms.new(size)
    reading = _reading(ctx, atoms, inner, outer, labels, outer_labels, other)
    if reading is None:
        return None
    form = _form_of(ctx, inner, outer, reading, chain)
    if form is None:
        return None
    queries = [outer_labels[x] for x in outer.own(world, other)]
    (contracted,) = first.summed if first.summed else ("",)
    parallel = form == "parallel"
    dims = (labels[contracted], reading.summed_axis) if parallel else (reading.summed_axis, labels.get(contracted, ()))
    dim, keys = dims
    if form == "cumulative":
        keys = query_axis = _running(ctx, atoms, chain, places)
        value_dim = reading.kept_axis
    elif parallel:
        query_axis, (value_dim,) = reading.kept_axis, queries
    else:
        (query_axis,), value_dim = queries, reading.kept_axis
    out_axes: Axes = tuple(outer_labels.get(x, ()) for x in second.out_labels)
    query_name, key_name, value_name = (
        (reading.kept, reading.summed, other) if parallel else (other, reading.summed, reading.kept)
    )

    def operand(name: str, softmax_axis: Axis | None) -> Path:
        product, known = (outer, outer_labels) if name == other else (inner, labels)
        at = operand_axes(world, name, product.labels_of(name), known)
        return path_of(ctx, atoms, name, at, softmax_axis, product.nodes[0].output[0])

    query, key, values = operand(query_name, dim), operand(key_name, keys), operand(value_name, None)
    batch, heads = _batch_and_heads(atoms, out_axes, query_axis, value_dim)
    roles = Roles(batch, heads, query_axis, keys, dim, value_dim)
    if key.stages[0].value == values.stages[0].value and key.kind == "identity":
        raise Unsupported("gram", f"keys and values are one activation, '{key.stages[0].value}': a Gram matrix")
    factor, before_rows, after_rows = _score_factors(ctx, atoms, chain, places, roles)
    weights: dict[str, Axes] = {}
    if parallel:
        weights[inner.output] = tuple(labels.get(x, ()) for x in first.out_labels)
    for at, after in places if parallel else []:
        weights = weights if chain.steps[at].kind in ("view", "cast") else {}
        weights[chain.steps[at].node.output[0]] = after
    rows = next((at for at, _ in places if chain.steps[at].kind == "rows"), None)
    return Core(
        form=form, atoms=atoms, chain=chain, outer=outer, labels=outer_labels, roles=roles, query=query, key=key,
        value=values, out_axes=out_axes, factor=factor, before_rows=before_rows, after_rows=after_rows,
        weights=weights, rows=None if rows is None else (chain.steps[rows], places[rows][1]),
    )  # fmt: skip


def _label_axes(world: World, atoms: Atoms, product: Product) -> dict[str, Axis]:
    sizes: dict[str, int] = {}
    c = product.contraction
    for value, labels in ((c.left, c.left_labels), (c.right, c.right_labels)):
        for label, size in zip(labels, world.shapes[value], strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return {label: atoms.new(size) for label, size in sizes.items()}


def _reading(
    ctx: Context, atoms: Atoms, inner: Product, outer: Product, labels: dict[str, Axis],
    outer_labels: dict[str, Axis], other: str,
) -> _Reading | None:  # fmt: skip
    c = inner.contraction
    (summed_label,) = outer.contraction.summed
    summed = atoms.leaves(outer_labels[summed_label])
    own = [(v, inner.own(ctx.world, v)) for v in (c.left, c.right)]
    if not summed or any(len(mine) != 1 for _, mine in own):
        return None
    (left, (left_label,)), (right, (right_label,)) = own
    sides = [(left, labels[left_label], right, labels[right_label])]
    sides.append((right, labels[right_label], left, labels[left_label]))
    for mine, axis, theirs, their_axis in sides:
        if atoms.leaves(axis) == summed:
            return _Reading(mine, theirs, other, axis, their_axis)
    return None


def _form_of(ctx: Context, inner: Product, outer: Product, reading: _Reading, chain: Chain) -> str | None:
    """``state``, ``cumulative`` or ``parallel``, by what the axes are; None where it is no attention at all."""
    (summed_label,) = outer.contraction.summed

    def tag(product: Product, value: str, label: str) -> str:
        return ctx.tags.tag(value, product.labels_of(value).index(label))

    pair = (reading.summed, reading.kept)
    own = [tag(inner, v, inner.own(ctx.world, v)[0]) for v in pair]
    third_summed = tag(outer, reading.third, summed_label)
    third_own = [tag(outer, reading.third, x) for x in outer.own(ctx.world, reading.third)]
    kinds = {s.kind for s in chain.steps}
    name = outer.output
    if "sum" in kinds or not inner.contraction.summed:
        runs = [s for s in chain.steps if s.kind == "sum"]
        if not runs or inner.contraction.summed:
            if runs and own == ["channel", "channel"] and third_summed == "channel":
                raise Unsupported("chunked", f"the states before '{name}' are summed over chunks of tokens: chunked "
                                  "linear attention is not taken yet")  # fmt: skip
            return None
        # A query beside each state has an axis of size 1 where the others have their tokens.
        lone = all(n == 1 for n in own_sizes(ctx, outer, reading.third))
        fits = own == ["channel", "channel"] and third_summed == "channel" and lone and len(runs) == 1
        return "cumulative" if fits and kinds <= _PLAIN | {"sum"} else None
    (label,) = inner.contraction.summed
    summed = [tag(inner, v, label) for v in pair]
    if summed == ["channel", "channel"] and own == ["token", "token"] and third_summed == "token":
        if len(third_own) != 1 or third_own == ["token"]:
            return None
        if "gate" in kinds:
            gate = next(s for s in chain.steps if s.kind == "gate")
            raise Unsupported("data-mask", f"the scores are multiplied by '{gate.value or gate.node.output[0]}', which "
                              "depends on the input (a gate, or a mask of the data)")  # fmt: skip
        return "parallel"
    if not kinds <= _PLAIN:
        return None
    if summed == ["token", "token"] and own == ["channel", "channel"] and third_summed == "channel":
        return "state" if third_own == ["token"] else None
    words = f"sums over {' and '.join(summed)} axes and keeps {' and '.join(own)} axes"
    raise Unsupported("axis-roles", f"'{name}' is a product of three activations, but '{inner.output}' {words}: not "
                      "keys with values over tokens, and not queries with keys over channels")  # fmt: skip


def own_sizes(ctx: Context, product: Product, value: str) -> list[int]:
    """The sizes of the axes that the operand ``value`` alone brings into the result."""
    labels = product.labels_of(value)
    return [ctx.world.shapes[value][labels.index(x)] for x in product.own(ctx.world, value)]


def _running(ctx: Context, atoms: Atoms, chain: Chain, places: list[tuple[int, Axes]]) -> Axis:
    at = next(i for i, s in enumerate(chain.steps) if s.kind == "sum")
    axis = places[at][1][chain.steps[at].axis]
    if not atoms.leaves(axis):
        raise Unsupported("one-token", "the running sum runs over one token")
    step = chain.steps[at]
    if ctx.tags.tag(step.node.input[0], step.axis) != "token":
        raise Unsupported("axis-roles", f"the running sum '{step.node.output[0]}' does not run over tokens")
    return axis


def _batch_and_heads(atoms: Atoms, out: Axes, queries: Axis, value_dim: Axis) -> tuple[Axis, Axis]:
    """The axes of the result that are neither tokens nor channels: the outermost is batch, the rest heads."""
    gone = (*atoms.leaves(queries), *atoms.leaves(value_dim))
    rest = [tuple(x for x in atoms.leaves(axis) if x not in gone) for axis in out]
    taken = {x for axis in rest for x in axis}
    rest = [a for a, axis in zip(rest, out, strict=True) if a or not set(atoms.leaves(axis)) & set(gone)]
    if not taken:
        return (), ()
    if len(rest) > 1 and len(out) > 3:
        return rest[0], tuple(x for axis in rest[1:] for x in axis)
    every = tuple(x for axis in rest for x in axis)
    return every[:-1], every[-1:]


def _score_factors(
    ctx: Context, atoms: Atoms, chain: Chain, places: list[tuple[int, Axes]], roles: Roles
) -> tuple[Factor, float, float]:
    """The constant factor of the scores, and the numbers they are multiplied by before and after their rows are
    divided (all before, where they are not).
    """
    before = after = 1.0
    masks: list[Applied] = []
    divided = False
    for at, axes in places:
        step = chain.steps[at]
        if step.kind == "scale":
            before, after = (before, after * step.factor) if divided else (before * step.factor, after)
        elif step.kind == "rows":
            if divided:
                raise Unsupported("normaliser", "the rows of the scores are divided twice")
            divided = True
        elif step.kind in ("mask", "visible", "hidden", "lower"):
            if divided:
                raise Unsupported("mask", f"'{step.node.output[0]}' multiplies the scores after their rows are divided")
            masks.append(applied(atoms, step, axes, roles.heads, roles.queries, roles.keys))
    factor = factor_of(ctx, masks, atoms.size(atoms.leaves(roles.heads)))
    return factor, before * factor.scale * chain.product.contraction.factor, after
