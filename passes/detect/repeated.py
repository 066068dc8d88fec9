"""What an exporter wrote once for every head although heads share it: keys and values of groups, masks."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import Layout, Operand
from attncompile.passes.detect.operators import Operands
from attncompile.passes.detect.views import REPEAT_OPS, VIEW_OPS, Atoms, Axes, Axis, backward
from attncompile.passes.detect.walks import walk
from attncompile.passes.evaluate import GraphIndex, World


def before_repeats(index: GraphIndex, world: World, node: NodeProto, operands: Operands) -> Operands:
    """``operands`` of the operator ``node`` with key and value as they were before Expand, Tile, Gather or Concat gave
    each head its own; unchanged where both are not repeated alike.

    A head of the operator's then serves as many consecutive query heads more, which is how the operator itself groups
    them: only a repetition of each head in place (``repeat_interleave``) is taken back.
    """
    found = [_shared(index, world, node, operand) for operand in (operands.key, operands.value)]
    key, value = found
    if key is None or value is None or key[1] != value[1]:
        return operands
    around = {id(n): n for n in (*key[2], *value[2], *operands.around)}
    return replace(operands, key=key[0], value=value[0], around=tuple(around.values()))


def _shared(
    index: GraphIndex, world: World, node: NodeProto, operand: Operand
) -> tuple[Operand, int, tuple[NodeProto, ...]] | None:  # fmt: skip
    """The operand with the fewest heads, how many, and the nodes that repeat it."""
    atoms = Atoms()
    axes: Axes = tuple(atoms.new(size) for size in world.shapes[operand.value])
    b, h, n, d = (axes[operand.layout.index(x)] for x in "BHND")
    back = walk(index, world, atoms, operand.value, axes, False, node.output[0])
    every = atoms.leaves(h)  # after the walk, which splits it
    best: tuple[Operand, int, tuple[NodeProto, ...]] | None = None
    for at, stage in enumerate(back.stages):
        if stage.dtype != back.stages[-1].dtype:
            continue
        held = tuple(atoms.leaves(a) for a in stage.axes)
        batch, length, dim = (atoms.leaves(x) for x in (b, n, d))
        for shared in (every[:count] for count in range(len(every))):
            layout: Layout = "BHND" if held == (batch, shared, length, dim) else "BNHD"
            fits = held in ((batch, shared, length, dim), (batch, length, shared, dim))
            if fits and (best is None or atoms.size(shared) < best[1]):
                best = Operand(stage.value, layout), atoms.size(shared), back.nodes[at:]
    return best


def for_all_heads(
    index: GraphIndex, world: World, atoms: Atoms, value: str, axes: Axes, site: tuple[Axis, Axis, Axis, Axis]
) -> str:  # fmt: skip
    """The mask ``value`` as it was before it was written once for each head, [batch, 1, query, key] or with some of
    these 1; empty where it never was.

    ``axes``: those of the scores that ``value`` is applied to; ``site``: which of them are batch, heads, queries, keys.
    """
    # A failed attempt must leave no trace in the axes of the site.
    trial = Atoms(list(atoms.sizes), dict(atoms.children))
    shape = world.shapes.get(value)
    if shape is None or len(shape) > len(axes):
        return ""
    near = axes[len(axes) - len(shape) :]
    own: Axes = tuple(() if size == 1 else axis for axis, size in zip(near, shape, strict=True))
    heads = set(trial.leaves(site[1]))
    if not heads or not heads & {a for axis in own for a in trial.leaves(axis)}:
        return ""
    while True:
        node = index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in VIEW_OPS | REPEAT_OPS:
            return ""
        try:
            own = backward(world, trial, node, own)
        except Unsupported:
            return ""
        value = node.input[0]
        batch, _, *rest = (trial.leaves(axis) for axis in site)
        if len(own) == 4 and not trial.leaves(own[1]):
            held = [trial.leaves(own[i]) for i in (0, 2, 3)]
            if all(have in ((), want) for have, want in zip(held, (batch, *rest), strict=True)):
                return value
