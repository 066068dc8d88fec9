"""From the products of linear attention outwards: operands before their feature maps, and the four rank-4 values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from onnx import NodeProto

from attncompile.core.linear import FeatureMap
from attncompile.core.site import Layout, Operand
from attncompile.passes.detect.homes import BYTES, NotSeparate, Separation, Stage, Walk, find_homes
from attncompile.passes.detect.linear_chain import Context, standard
from attncompile.passes.detect.linear_features import feature_map
from attncompile.passes.detect.views import Atoms, Axes, Axis
from attncompile.passes.detect.walks import walk


@dataclass(frozen=True, slots=True)
class Path:
    """An operand's stages, the deepest first. ``steps[i]`` are the nodes from stage i to the next, ``scales[i]`` what
    they multiply by; ``map_at`` is the step that is the feature map ``kind``, -1 without one. ``reader`` is the first
    output of the node that reads the last stage.
    """

    stages: tuple[Stage, ...]
    steps: tuple[tuple[NodeProto, ...], ...]
    scales: tuple[float, ...]
    reader: str
    kind: FeatureMap = "identity"
    map_at: int = -1

    def nodes_from(self, at: int) -> list[NodeProto]:
        """The nodes between stage ``at`` and the product."""
        return [n for step in self.steps[at:] for n in step]

    def scale_from(self, at: int) -> float:
        """What the operand at stage ``at`` is multiplied by on its way."""
        return prod(self.scales[at:])

    def map_from(self, at: int) -> FeatureMap:
        """The map between stage ``at`` and the product."""
        return self.kind if at <= self.map_at else "identity"

    def walk(self) -> Walk:
        """The stages for ``find_homes``: those after the map, where several nodes of it read the operand."""
        first = self.map_at + 1 if self.map_at >= 0 and len(self.steps[self.map_at]) > 1 else 0
        nodes = tuple(s[0] for s in self.steps[first:])
        return Walk(self.stages[first:], nodes, self.scales[first:], self.reader)


@dataclass(frozen=True, slots=True)
class Roles:
    """What the axes of a site are."""

    batch: Axis
    heads: Axis
    queries: Axis
    keys: Axis
    dim: Axis
    value_dim: Axis


@dataclass(frozen=True, slots=True)
class Placed:
    """Query, key, value and output, and at which of its stages each lies; ``roles`` as they were read."""

    operands: tuple[Operand, Operand, Operand, Operand]
    at: tuple[int, int, int, int]
    kv_heads: Axis
    roles: Roles


def path_of(ctx: Context, atoms: Atoms, value: str, axes: Axes, softmax_axis: Axis | None, reader: str) -> Path:
    """The way of an operand whose features have ``axes`` at ``value``: back over views and scales to the map, and on to
    where the raw operand comes from. ``softmax_axis`` is the axis that a softmax must run over; None looks for no map.
    """
    near = walk(ctx.index, ctx.world, atoms, value, axes, True, reader)
    path = Path(near.stages, tuple((n,) for n in near.nodes), near.scales, reader)
    if softmax_axis is None:
        return path
    first = near.stages[0]
    feature = feature_map(ctx.index, ctx.world, first.value)
    if feature is None:
        return path
    if feature.kind == "softmax" and atoms.leaves(first.axes[feature.axis]) != atoms.leaves(softmax_axis):
        return path
    if ctx.world.types.get(feature.source) != first.dtype:
        return path
    # The order of the elements is the features': a number that multiplies before the map is not one after it.
    far = walk(ctx.index, ctx.world, atoms, feature.source, first.axes, False, feature.nodes[0].output[0])
    steps = (*((n,) for n in far.nodes), feature.nodes, *path.steps)
    scales = (*far.scales, 1.0, *path.scales)
    return Path(far.stages + path.stages, steps, scales, reader, feature.kind, len(far.nodes))


def place(atoms: Atoms, paths: tuple[Path, Path, Path], out: list[Stage], roles: Roles) -> Placed:
    """The four values of one element type, the narrowest at which all are found.

    Raises:
        NotSeparate: there is no such type.
    """
    choices = [roles]
    single = atoms.leaves(roles.batch) + atoms.leaves(roles.heads)
    if len(single) == 1:  # one axis that nobody splits is batch or heads: heads are merged with the head dim later
        dim = atoms.leaves(roles.value_dim)
        merged = any(atoms.leaves(a) in (single + dim, dim + single) for s in out for a in s.axes)
        choices = [replace(roles, batch=(), heads=single), replace(roles, batch=single, heads=())]
        choices = choices if merged else choices[::-1]
    kinds = {s.dtype for p in paths for s in p.stages} | {s.dtype for s in out if s.dtype}
    ordered = sorted(kinds, key=lambda k: BYTES.get(k, 0))
    for chosen in choices:
        for at, kind in enumerate(ordered):
            found = _placed(atoms, kind, paths, out, chosen)
            if found is not None:
                if any(p.map_at >= 0 and i > p.map_at for p, i in zip(paths[:2], found.at[:2], strict=True)):
                    _check_narrower(atoms, ordered[:at], paths, out, chosen)
                return found
    first = choices[0]
    find_homes(atoms, (paths[0].walk(), paths[1].walk(), paths[2].walk()), out, first.batch, first.heads,
               (first.queries, first.keys), (first.dim, first.value_dim))  # fmt: skip
    raise AssertionError("homes exist in fewer layouts, but not in more")


def _check_narrower(
    atoms: Atoms, kinds: list[int], paths: tuple[Path, Path, Path], out: list[Stage], roles: Roles
) -> None:  # fmt: skip
    """Operands cast up after their maps, and a result cast down after heads and channels were merged.

    Raises:
        NotSeparate: with its heads apart again the whole site lies in the narrower type, maps included.
    """
    b, h, n, d = (atoms.leaves(a) for a in (roles.batch, roles.heads, roles.queries, roles.value_dim))
    for kind in kinds:
        for stage in [s for s in out if s.dtype == kind]:
            if [atoms.leaves(a) for a in stage.axes] != [b, n, h + d] or not h:
                continue
            apart = Stage(stage.value, (b, n, h, d), kind)
            found = _placed(atoms, kind, paths, [apart], roles)
            if found is not None and all(i <= p.map_at or p.map_at < 0 for p, i in zip(paths, found.at, strict=False)):
                size = atoms.size(h), atoms.size(d)
                made = Separation(stage.value, "", "BNHD", *size, "outer", (size[0] * size[1],))
                raise NotSeparate(f"the result has its heads apart in a wider type than '{stage.value}'", (made,))


def _placed(atoms: Atoms, kind: int, paths: tuple[Path, Path, Path], out: list[Stage], roles: Roles) -> Placed | None:
    heads = atoms.leaves(roles.heads)
    query = _home(atoms, paths[0].stages, kind, roles.batch, heads, roles.queries, roles.dim)
    end = _home(atoms, tuple(out[::-1]), kind, roles.batch, heads, roles.queries, roles.value_dim)
    if query is None or end is None:
        return None
    for n in range(len(heads) + 1):  # fewest heads first: K and V before they are repeated
        shared = heads[:n]
        key = _home(atoms, paths[1].stages, kind, roles.batch, shared, roles.keys, roles.dim)
        value = _home(atoms, paths[2].stages, kind, roles.batch, shared, roles.keys, roles.value_dim)
        if key is not None and value is not None:
            return Placed(
                (query[0], key[0], value[0], end[0]), (query[1], key[1], value[1], len(out) - 1 - end[1]), shared, roles
            )  # fmt: skip
    return None


def _home(
    atoms: Atoms, stages: tuple[Stage, ...], kind: int, batch: Axis, heads: Axis, sequence: Axis, dim: Axis
) -> tuple[Operand, int] | None:  # fmt: skip
    b, h, n, d = (atoms.leaves(a) for a in (batch, heads, sequence, dim))
    layouts: tuple[tuple[Layout, tuple[Axis, ...]], ...] = (
        ("BHND", (b, h, n, d)), ("BNHD", (b, n, h, d)), ("BHDN", (b, h, d, n)),
    )  # fmt: skip
    for at, stage in enumerate(stages):
        if stage.dtype == kind:
            leaves = tuple(atoms.leaves(a) for a in stage.axes)
            for layout, wanted in layouts:
                if leaves == wanted:
                    return Operand(stage.value, layout), at
    return None


def ones_channel(ctx: Context, atoms: Atoms, path: Path, dim: Axis) -> tuple[str, Axes, NodeProto] | None:
    """Where the values at the path's deepest stage are V with one more channel of ones behind: V, its axes (the channel
    axis is a new one) and the Pad or Concat; else None. Nothing may scale the values after that.
    """
    node, stage = ctx.index.producer.get(path.stages[0].value), path.stages[0]
    if not standard(node, "Pad", "Concat") or node is None or any(s != 1.0 for s in path.scales):
        return None
    places = [i for i, a in enumerate(stage.axes) if atoms.leaves(a) == atoms.leaves(dim)]
    size = atoms.size(atoms.leaves(dim))
    if len(places) != 1 or size < 2:
        return None
    (axis,) = places
    source = _padded(ctx, node, axis) if node.op_type == "Pad" else _joined(ctx, node, axis)
    if source is None or ctx.world.shapes.get(source, ())[axis : axis + 1] != (size - 1,):
        return None
    axes = (*stage.axes[:axis], atoms.new(size - 1), *stage.axes[axis + 1 :])
    return source, axes, node


def _padded(ctx: Context, node: NodeProto, axis: int) -> str | None:
    mode = next((a.s.decode() for a in node.attribute if a.name == "mode"), "constant")
    inputs = [*node.input, "", "", ""]
    rank = len(ctx.world.shapes.get(inputs[0], ()))
    if mode != "constant" or not inputs[2] or ctx.world.scalar(inputs[2]) != 1.0 or ctx.index.data_inputs(inputs[1]):
        return None
    given = [int(n) for n in ctx.world.value(inputs[1]).reshape(-1)]
    axes = range(rank) if not inputs[3] else [int(a) % rank for a in ctx.world.value(inputs[3]).reshape(-1)]
    before = dict(zip(axes, given[: len(given) // 2], strict=True))
    after = dict(zip(axes, given[len(given) // 2 :], strict=True))
    wanted = {a: 1 if a == axis else 0 for a in after}
    return inputs[0] if axis in after and after == wanted and not any(before.values()) else None


def _joined(ctx: Context, node: NodeProto, axis: int) -> str | None:
    rank = len(ctx.world.shapes.get(node.output[0], ()))
    along = next((a.i for a in node.attribute if a.name == "axis"), 0) % max(rank, 1)
    if along != axis or len(node.input) != 2 or ctx.index.data_inputs(node.input[1]):
        return None
    shape = ctx.world.shapes.get(node.input[1], ())
    if shape[axis : axis + 1] != (1,) or not bool((ctx.world.value(node.input[1]) == 1).all()):
        return None
    return str(node.input[0])
