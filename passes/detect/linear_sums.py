"""The sum of the keys' features that linear attention is divided by, followed back to the features themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.contraction import contraction
from attncompile.passes.detect.linear_chain import Context, Product, product_of, reduced_axes, standard
from attncompile.passes.detect.linear_denominator import Denominator
from attncompile.passes.detect.linear_operands import Path, Roles
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis, forward

_LONGEST = 16


def viewed(ctx: Context, atoms: Atoms, total: Denominator, axes: Axes) -> Axes:
    """The axes of a denominator whose root has ``axes``."""
    for node in total.nodes:
        if node.op_type in VIEW_OPS:
            axes = forward(ctx.world, atoms, node, axes)
    return axes


@dataclass
class Sums:
    """Reads phi(Q) sum(phi(K)) of the operands ``query`` and ``key``. ``causal``: the sum is a running one.
    ``weights``: values that hold the scores as they meet the values, with their axes.
    """

    ctx: Context
    atoms: Atoms
    roles: Roles
    query: Path
    key: Path
    causal: bool
    weights: dict[str, Axes] = field(default_factory=dict)

    def _shape(self, value: str) -> tuple[int, ...]:
        return self.ctx.world.shapes.get(value, ())

    def of(self, total: Denominator) -> tuple[Axes, tuple[int, int] | None, float, list[NodeProto]]:
        """The axes of ``total`` after its own views, the stages and the factor that its root is made from, the nodes.

        Raises:
            Unsupported: its root is not phi(Q) sum(phi(K)).
        """
        node = self.ctx.index.producer.get(total.root)
        weights = self.row_sum(node)
        if weights is not None and node is not None:
            return viewed(self.ctx, self.atoms, total, weights), None, 1.0, [node]
        product = product_of(self.ctx, node)
        if product is not None:
            c = product.contraction
            for q, k in ((c.left, c.right), (c.right, c.left)):
                query, key = self._of_query(q), self._of_keys(k)
                if query is not None and key is not None:
                    axes = self._product_axes(product, {q: query[0], k: key[0]})
                    nodes = [*query[3], *key[3], *product.nodes]
                    factor = query[2] * key[2] * c.factor
                    return viewed(self.ctx, self.atoms, total, axes), (query[1], key[1]), factor, nodes
        raise Unsupported("normaliser", f"the result is divided by '{total.root}', which is not the queries' features "
                          "times the sum of the keys'")  # fmt: skip

    def row_sum(self, node: NodeProto | None) -> Axes | None:
        """The axes of a sum of the scores over the keys."""
        if node is None or not standard(node, "ReduceSum") or node.input[0] not in self.weights:
            return None
        axes, reduced = self.weights[node.input[0]], reduced_axes(self.ctx.world, node)
        return self._without(node, axes, reduced)

    def _without(self, node: NodeProto, axes: Axes, reduced: list[int] | None) -> Axes | None:
        """``axes`` without the keys, where the Reduce node takes these away and nothing else."""
        keys = self.atoms.leaves(self.roles.keys)
        if reduced is None or [self.atoms.leaves(axes[i]) for i in reduced] != [keys]:
            return None
        kept = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        at = reduced[0]
        return (*axes[:at], *([()] if kept else []), *axes[at + 1 :])

    def _product_axes(self, product: Product, axes: dict[str, Axes]) -> Axes:
        c, known = product.contraction, dict[str, Axis]()
        for value, labels in ((c.left, c.left_labels), (c.right, c.right_labels)):
            for label, axis in zip(labels, axes[value], strict=True):
                before = known.get(label, ())
                if before and axis and self.atoms.leaves(before) != self.atoms.leaves(axis):
                    raise Unsupported("normaliser", f"the axes of '{product.output}' do not match")
                known[label] = before or axis
        summed = [self.atoms.leaves(known[x]) for x in c.summed]
        if summed != [self.atoms.leaves(self.roles.dim)]:
            raise Unsupported("normaliser", f"'{product.output}' does not sum over the head dim")
        return tuple(known.get(x, ()) for x in c.out_labels)

    def _features(self, path: Path) -> dict[str, int]:
        """The values of ``path`` that hold features, and their stages."""
        return {s.value: i for i, s in enumerate(path.stages) if i > path.map_at}

    def _of_query(self, value: str) -> tuple[Axes, int, float, list[NodeProto]] | None:
        return self._seen(value, self.query, False)

    def _of_keys(self, value: str) -> tuple[Axes, int, float, list[NodeProto]] | None:
        return self._seen(value, self.key, True)

    def _seen(self, value: str, path: Path, summed: bool) -> tuple[Axes, int, float, list[NodeProto]] | None:
        """``value`` as features (their sum over the keys, where ``summed``): axes, stage, factor, nodes; or None."""
        stages = self._features(path)
        nodes: list[NodeProto] = []
        current = value
        while len(nodes) < _LONGEST:
            if current in stages and (not summed or any(self._sums(n) for n in nodes)):
                break
            node = self.ctx.index.producer.get(current)
            if node is None or node.domain not in ("", "ai.onnx"):
                return None
            source = self._before(node, summed and not any(self._sums(n) for n in nodes))
            if source is None:
                return None
            nodes.append(node)
            current = source
        else:
            return None
        return self._axes_along(path.stages[stages[current]].axes, stages[current], nodes[::-1])

    def _sums(self, node: NodeProto) -> bool:
        return node.op_type in ("ReduceSum", "CumSum", "MatMul", "Einsum", "Gemm")

    def _before(self, node: NodeProto, may_sum: bool) -> str | None:
        world = self.ctx.world
        first: str = node.input[0]
        if node.op_type in VIEW_OPS or (node.op_type == "Cast" and world.types.get(first) in FLOATS):
            return first
        data: list[str] = [v for v in node.input if v and self.ctx.index.data_inputs(v)]
        if len(data) != 1:
            return None
        if node.op_type in ("Mul", "Div") and self._shape(data[0]) == self._shape(node.output[0]):
            others = [v for v in node.input if v != data[0]]
            number = world.scalar(others[0]) if others else None
            fits = number is not None and number > 0 and (node.op_type == "Mul" or data[0] == first)
            return data[0] if fits else None
        return data[0] if may_sum and self._sums(node) else None

    def _axes_along(
        self, axes: Axes, stage: int, nodes: list[NodeProto]
    ) -> tuple[Axes, int, float, list[NodeProto]] | None:  # fmt: skip
        factor = 1.0
        for node in nodes:
            made: Axes | None = axes
            if node.op_type in VIEW_OPS:
                made = forward(self.ctx.world, self.atoms, node, axes)
            elif node.op_type in ("Mul", "Div"):
                number = prod(
                    self.ctx.world.scalar(v) or 1.0 for v in node.input if not self.ctx.index.data_inputs(v)
                )  # fmt: skip
                factor *= number if node.op_type == "Mul" else 1.0 / number
            elif node.op_type == "ReduceSum":
                reduced = reduced_axes(self.ctx.world, node)
                made = None if self.causal else self._without(node, axes, reduced)
            elif node.op_type == "CumSum":
                made = axes if self._runs(node, axes) else None
            elif node.op_type in ("MatMul", "Einsum", "Gemm"):
                made = None if self.causal else self._times_ones(node, axes)
            if made is None:
                return None
            axes = made
        return axes, stage, factor, nodes

    def _runs(self, node: NodeProto, axes: Axes) -> bool:
        along = self.ctx.world.scalar(node.input[1])
        if not self.causal or along is None or any(a.i for a in node.attribute):
            return False
        return self.atoms.leaves(axes[int(along)]) == self.atoms.leaves(self.roles.keys)

    def _times_ones(self, node: NodeProto, axes: Axes) -> Axes | None:
        """A product with a constant of ones that sums over the keys, or an Einsum of one operand that does."""
        keys = self.atoms.leaves(self.roles.keys)
        if len(node.input) == 1:
            equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
            before, _, after = equation.partition("->")
            gone = [a for x, a in zip(before, axes, strict=False) if x not in after]
            if "." in equation or len(before) != len(axes) or [self.atoms.leaves(a) for a in gone] != [keys]:
                return None
            return tuple(axes[before.index(x)] for x in after)
        try:
            c = contraction(self.ctx.world, node)
        except Unsupported:
            return None
        if c is None or c.factor != 1.0:
            return None
        on_left = bool(self.ctx.index.data_inputs(c.left))
        labels, ones, other = (
            (c.left_labels, c.right, c.right_labels) if on_left else (c.right_labels, c.left, c.left_labels)
        )
        if not bool((self.ctx.world.value(ones) == 1).all()):
            return None
        known = dict(zip(labels, axes, strict=True))
        spare = [n for x, n in zip(other, self._shape(ones), strict=True) if x not in labels]
        if any(n != 1 for n in spare) or [self.atoms.leaves(known.get(x, ())) for x in c.summed] != [keys]:
            return None
        return tuple(known.get(x, ()) for x in c.out_labels)
