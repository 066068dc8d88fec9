"""Which axes of a product are batch, heads, queries and keys."""

from __future__ import annotations

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.contraction import Contraction
from attncompile.passes.detect.homes import Homes, NotSeparate, Stage, Walk, find_homes
from attncompile.passes.detect.scores import FLOATS, Path
from attncompile.passes.detect.views import Atoms, Axes, Axis, forward
from attncompile.passes.evaluate import World


def roles(path: Path, shape: tuple[int, ...], world: World) -> tuple[Contraction, str, str]:
    """The product, the label of the queries and that of the keys (the one that reaches the softmax's axis).

    Raises:
        Unsupported: it is no product of queries with keys, or the softmax runs over something else.
    """
    product = path.product
    name = product.node.output[0]
    if len(product.summed) != 1:
        raise Unsupported("score-product", f"the product '{name}' sums over {len(product.summed)} axes, not one")
    own = [x for x in product.out_labels if x not in product.shared]
    sides = [{x for x in own if x in labels} for labels in (product.left_labels, product.right_labels)]
    # A label of one operand that is a batch axis by position (the shorter operand is padded) is batch too.
    sides = [{x for x in side if len(x) == 1} for side in sides]
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


def batch_and_heads(
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


def homes_of_either(
    atoms: Atoms, walks: tuple[Walk, Walk, Walk], out: list[Stage], batch: Axis, heads: Axis,
    sequences: tuple[Axis, Axis], dims: tuple[Axis, Axis],
) -> tuple[Homes, Axis, Axis, Axis]:  # fmt: skip
    """The homes, and what is batch, heads and queries: one axis that nobody splits can be batch or heads, and the query
    heads of a group may stand in the place of queries where there is one query only.

    Raises:
        NotSeparate: neither reading has homes. It holds separations for the reading that the output speaks for: heads
            are merged with the head dim sooner or later, batch entries are not.
    """
    grouped = _grouped_as_queries(atoms, walks[0], out, batch, heads, sequences, dims)
    if grouped:
        try:
            return find_homes(atoms, walks, out, batch, grouped, ((), sequences[1]), dims), batch, grouped, ()
        except NotSeparate:
            pass  # the other reading is as true
    choices = [(batch, heads)]
    single = atoms.leaves(batch) + atoms.leaves(heads)
    if len(single) == 1:
        dim = atoms.leaves(dims[1])
        merged = any(atoms.leaves(axis) == single + dim for stage in out for axis in stage.axes)
        choices = [((), single), (single, ())] if merged else [(single, ()), ((), single)]
    failures: list[NotSeparate] = []
    for chosen in choices:
        try:
            return find_homes(atoms, walks, out, *chosen, sequences, dims), *chosen, sequences[0]
        except NotSeparate as error:
            failures.append(error)
    raise failures[0]


def _grouped_as_queries(
    atoms: Atoms, query: Walk, out: list[Stage], batch: Axis, heads: Axis, sequences: tuple[Axis, Axis],
    dims: tuple[Axis, Axis],
) -> Axis:  # fmt: skip
    """All query heads, where one token's [batch, heads, 1, dim] was reshaped to [batch, kv heads, group, dim] for its
    products and its result is reshaped back; else the empty axis.
    """
    b, h, q = (atoms.leaves(a) for a in (batch, heads, sequences[0]))
    if not h or not q:
        return ()

    def together(stage: Stage, dim: Axis) -> bool:
        leaves = tuple(atoms.leaves(a) for a in stage.axes)
        return leaves in ((b, h + q, (), atoms.leaves(dim)), (b, (), h + q, atoms.leaves(dim)))

    before = any(together(s, dims[0]) for s in query.stages)
    return h + q if before and any(together(s, dims[1]) for s in out) else ()
