"""The normaliser of linear attention: a channel of ones in the values, or a sum of the keys of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.linear_chain import Context, Product, standard
from attncompile.passes.detect.linear_denominator import Denominator, denominator
from attncompile.passes.detect.linear_sums import Sums, viewed
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis, forward
from attncompile.passes.detect.walks import readers_of

_LONGEST = 16


@dataclass(frozen=True, slots=True)
class Normalised:
    """What follows the last product up to the quotient ``output``. ``factor``: what the numerator alone is multiplied
    by after the product; ``common``: what both are. ``stages``: which stages of the query and the key path the sum was
    made from (None: from the product itself), times ``total_factor``.
    """

    output: str
    axes: Axes
    nodes: tuple[NodeProto, ...]
    total: Denominator
    factor: float = 1.0
    common: float = 1.0
    stages: tuple[int, int] | None = None
    total_factor: float = 1.0
    how: str = "sum"


@dataclass
class Search:
    """Looks for the normaliser after ``output``, a value with ``axes``. ``ones`` is the axis of the values' channels
    where the last of them is one, ``channels`` that of the others.
    """

    ctx: Context
    atoms: Atoms
    sums: Sums
    output: str
    axes: Axes
    ones: Axis | None
    channels: Axis
    _nodes: list[NodeProto] = field(default_factory=list)
    _factor: float = 1.0

    def find(self, product: Product, labels: dict[str, Axis]) -> Normalised | None:
        """The normaliser, or None where the result is not divided by anything.

        Raises:
            Unsupported: it is divided by something that is not understood.
        """
        if product.third is not None:
            value, names = product.third
            total = denominator(self.ctx, value, inverse=True)
            axes, stages, factor, nodes = self.sums.of(total)
            wanted = tuple(() if n == 1 else labels[x] for x, n in zip(names, self._shape(value), strict=True))
            if [self.atoms.leaves(a) for a in axes] != [self.atoms.leaves(a) for a in wanted]:
                raise Unsupported("normaliser", f"the axes of the normaliser '{value}' are not those of the queries")
            self._check_cover(axes)
            found = (*nodes, *total.nodes)
            return Normalised(self.output, self.axes, found, total, 1.0, 1.0, stages, factor)
        value, axes = self._forward(self.output, self.axes)
        before, factor = list(self._nodes), self._factor
        if self.ones is not None:
            return self._cut(value, axes, before, factor)
        readers = readers_of(self.ctx.index, value)
        if value in self.ctx.index.outputs or len(readers) != 1:
            return None
        return self._divided(value, axes, readers[0], before, factor)

    def _shape(self, value: str) -> tuple[int, ...]:
        return self.ctx.world.shapes.get(value, ())

    def _forward(self, value: str, axes: Axes) -> tuple[str, Axes]:
        """On over views, casts and numbers, as long as one node alone reads the value."""
        self._nodes, self._factor = [], 1.0
        index, world = self.ctx.index, self.ctx.world
        while value not in index.outputs and len(self._nodes) < _LONGEST:
            readers = readers_of(index, value)
            if len(readers) != 1 or readers[0].domain not in ("", "ai.onnx"):
                break
            (node,) = readers
            out = node.output[0]
            if node.op_type in VIEW_OPS and node.op_type != "Expand" and node.input[0] == value:
                try:
                    axes = forward(world, self.atoms, node, axes)
                except Unsupported:
                    break
            elif node.op_type in ("Mul", "Div") and self._shape(out) == self._shape(value):
                other = node.input[1] if node.input[0] == value else node.input[0]
                number = world.scalar(other) if other != value else None
                if not number or not isfinite(number) or (node.op_type == "Div" and node.input[0] != value):
                    break
                self._factor *= number if node.op_type == "Mul" else 1.0 / number
            elif not (node.op_type == "Cast" and world.types.get(out) in FLOATS) and not self._idle_slice(node):
                break
            self._nodes.append(node)
            value = out
        return value, axes

    def _idle_slice(self, node: NodeProto) -> bool:
        """A Slice of everything, at all sizes, in the order that it has."""
        if not standard(node, "Slice"):
            return False
        steps = node.input[4] if len(node.input) > 4 else ""
        if steps and (self.ctx.index.data_inputs(steps) or not bool((self.ctx.world.value(steps) == 1).all())):
            return False
        shapes = [(w.shapes.get(node.output[0]), w.shapes.get(node.input[0])) for w in self.ctx.worlds()]
        return all(after is not None and after == before for after, before in shapes)

    def _divided(
        self, value: str, axes: Axes, node: NodeProto, before: list[NodeProto], factor: float
    ) -> Normalised | None:
        """``node`` divides ``value`` by a sum of the keys, or multiplies by its inverse."""
        if not standard(node, "Div", "Mul") or self._shape(node.output[0]) != self._shape(value):
            return None
        if node.op_type == "Div" and node.input[0] != value:
            return None
        other = node.input[1] if node.input[0] == value else node.input[0]
        if other == value:
            return None
        try:
            total = denominator(self.ctx, other, inverse=node.op_type == "Mul")
        except Unsupported:
            if node.op_type == "Mul":  # a gate, not a normaliser
                return None
            raise
        found, stages, extra, nodes = self.sums.of(total)
        self._check_against(found, axes)
        every = (*before, *nodes, *total.nodes, node)
        return Normalised(node.output[0], axes, every, total, factor, 1.0, stages, extra)

    def _check_against(self, total: Axes, axes: Axes) -> None:
        if len(total) > len(axes):
            raise Unsupported("normaliser", "the normaliser has more axes than the result")
        padded = ((),) * (len(axes) - len(total)) + total
        for divisor, axis in zip(padded, axes, strict=True):
            if self.atoms.leaves(divisor) not in ((), self.atoms.leaves(axis)):
                raise Unsupported("normaliser", "the normaliser's axes do not lie along those of the result")
        self._check_cover(total)

    def _check_cover(self, total: Axes) -> None:
        """Each batch entry, head and query has its own sum, and a channel has none of its own."""
        have = {x for a in total for x in self.atoms.leaves(a)}
        r = self.sums.roles
        if have != {x for a in (r.batch, r.heads, r.queries) for x in self.atoms.leaves(a)}:
            raise Unsupported("normaliser", "there is not one sum for each query of each head")

    def _cut(self, value: str, axes: Axes, before: list[NodeProto], common: float) -> Normalised:
        """The result's last channel divides the others."""
        none = Unsupported("normaliser", "the values have a channel of ones, but the result is not divided by it")
        pieces = self._pieces(value, axes)
        if value in self.ctx.index.outputs or pieces is None:
            raise none
        (top, top_axes), (bottom, bottom_axes), cuts = pieces
        end, end_axes = self._forward(top, top_axes)
        numerator, factor = list(self._nodes), self._factor
        readers = readers_of(self.ctx.index, end)
        if end in self.ctx.index.outputs or len(readers) != 1 or not standard(readers[0], "Div", "Mul"):
            raise none
        (node,) = readers
        other = node.input[1] if node.input[0] == end else node.input[0]
        if other == end or (node.op_type == "Div" and node.input[0] != end):
            raise none
        total = denominator(self.ctx, other, inverse=node.op_type == "Mul")
        if total.root != bottom:
            raise none
        self._check_against(viewed(self.ctx, self.atoms, total, bottom_axes), end_axes)
        if self._shape(node.output[0]) != self._shape(end):
            raise none
        every = (*before, *cuts, *numerator, *total.nodes, node)
        return Normalised(node.output[0], end_axes, every, total, factor, common, None, 1.0, "ones")

    def _pieces(
        self, value: str, axes: Axes
    ) -> tuple[tuple[str, Axes], tuple[str, Axes], tuple[NodeProto, ...]] | None:
        """All channels but the last, and the last: each with its axes; and the nodes that cut them out."""
        assert self.ones is not None
        leaves = self.atoms.leaves(self.ones)
        places = [i for i, a in enumerate(axes) if self.atoms.leaves(a) == leaves]
        if len(places) != 1:
            return None
        axis, size = places[0], self.atoms.size(leaves)
        found: dict[tuple[int, int], tuple[str, Axes]] = {}
        cuts: list[NodeProto] = []
        for reader in readers_of(self.ctx.index, value):
            for low, high, out, dropped, nodes in self._ranges(reader, axis, size):
                middle = () if dropped else (self.channels if high - low == size - 1 else (),)
                found[low, high] = (out, (*axes[:axis], *middle, *axes[axis + 1 :]))
                cuts += [n for n in nodes if n not in cuts]
        if set(found) != {(0, size - 1), (size - 1, size)}:
            return None
        return found[0, size - 1], found[size - 1, size], tuple(cuts)

    def _ranges(self, node: NodeProto, axis: int, size: int) -> list[tuple[int, int, str, bool, tuple[NodeProto, ...]]]:
        """(from, to, value, whether the axis is gone, nodes) of each piece of ``axis`` that ``node`` cuts out."""
        index, chain = self.ctx.index, [node]
        while self._idle_slice(chain[-1]):
            readers = readers_of(index, chain[-1].output[0])
            if len(readers) != 1:
                return [(-1, -1, "", False, ())]
            chain.append(readers[0])
        node, world = chain[-1], self.ctx.world
        bad: list[tuple[int, int, str, bool, tuple[NodeProto, ...]]] = [(-1, -1, "", False, ())]
        if any(index.data_inputs(v) for v in node.input[1:] if v) or node.domain not in ("", "ai.onnx"):
            return bad
        if node.op_type == "Split":
            at = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(self._shape(node.input[0]))
            sizes = [self._shape(o)[at] if self._shape(o) else -1 for o in node.output]
            if at != axis or sum(sizes) != size:
                return bad
            return [(sum(sizes[:i]), sum(sizes[: i + 1]), o, False, tuple(chain)) for i, o in enumerate(node.output)]
        if node.op_type == "Gather":
            at = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(self._shape(node.input[0]))
            number = world.scalar(node.input[1])
            if at != axis or number is None:
                return bad
            low = int(number) % size
            return [(low, low + 1, node.output[0], not self._shape(node.input[1]), tuple(chain))]
        if node.op_type != "Slice":
            return bad
        inputs = [*node.input, "", ""]
        starts, ends = (world.value(v).reshape(-1) for v in node.input[1:3])
        axes = world.value(inputs[3]).reshape(-1) if inputs[3] else range(len(starts))
        if inputs[4] and not bool((world.value(inputs[4]) == 1).all()):
            return bad
        shapes = [(w.shapes.get(node.input[0], ()), w.shapes.get(node.output[0], ())) for w in self.ctx.worlds()]
        same = all(a[:axis] + a[axis + 1 :] == b[:axis] + b[axis + 1 :] for a, b in shapes)
        for start, end, at in zip(starts, ends, axes, strict=True):
            if int(at) % len(shapes[0][0]) == axis:
                low, high, _ = slice(int(start), int(end)).indices(size)
                return [(low, high, node.output[0], False, tuple(chain))] if same else bad
        return bad
