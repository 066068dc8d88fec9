"""Products of two tensors by axis labels, whatever node writes them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import World


@dataclass(frozen=True, slots=True)
class Contraction:
    """out[out_labels] = sum over the other labels of left[left_labels] * right[right_labels].

    A label whose size is 1 in one operand and larger in the other is broadcast there.
    """

    node: NodeProto
    left: str
    right: str
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    out_labels: tuple[str, ...]
    factor: float = 1.0
    """What the product is multiplied by (Gemm's alpha)."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset(self.left_labels + self.right_labels) - frozenset(self.out_labels)

    @property
    def shared(self) -> frozenset[str]:
        """Labels of both operands that stay: the batch of the product."""
        return frozenset(self.left_labels) & frozenset(self.right_labels) & frozenset(self.out_labels)


def contraction(world: World, node: NodeProto) -> Contraction | None:
    """``node`` as a contraction, or None for any other operator.

    Raises:
        Unsupported: a product whose axes cannot be named (unknown rank, an ellipsis, a vector operand).
    """
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Einsum", "Gemm"):
        return None
    if node.op_type == "Gemm":
        return _gemm(node)
    if len(node.input) != 2:
        if node.op_type == "Einsum":
            raise Unsupported("einsum", f"Einsum '{node.output[0]}' has {len(node.input)} operands")
        return None
    left, right = node.input
    ranks = [len(world.shapes[v]) if v in world.shapes else None for v in (left, right)]
    if ranks[0] is None or ranks[1] is None or node.output[0] not in world.shapes:
        raise Unsupported("shape-unknown", f"the shapes around '{node.output[0]}' are not known")
    if node.op_type == "MatMul":
        if min(ranks[0], ranks[1]) < 2:
            raise Unsupported("vector-product", f"'{node.output[0]}' multiplies by a vector")
        rank = max(ranks[0], ranks[1])
        batch = tuple(f"b{i}" for i in range(rank - 2))
        return Contraction(
            node, left, right, (*batch[rank - ranks[0] :], "m", "c"), (*batch[rank - ranks[1] :], "c", "n"),
            (*batch, "m", "n"),
        )  # fmt: skip
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Unsupported("einsum", f"Einsum equation '{equation}' of '{node.output[0]}' is not an explicit one")
    operands, out = equation.split("->")
    first, second = operands.split(",")
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        raise Unsupported("einsum", f"Einsum equation '{equation}' takes a diagonal")
    return Contraction(node, left, right, tuple(first), tuple(second), tuple(out))


def _gemm(node: NodeProto) -> Contraction:
    if len(node.input) > 2 and node.input[2]:
        raise Unsupported("gemm-addend", f"Gemm '{node.output[0]}' adds a third operand: a linear layer")
    attributes = {a.name: a for a in node.attribute}
    turned = [name in attributes and bool(attributes[name].i) for name in ("transA", "transB")]
    factor = attributes["alpha"].f if "alpha" in attributes else 1.0
    left, right = ("c", "m") if turned[0] else ("m", "c"), ("n", "c") if turned[1] else ("c", "n")
    return Contraction(node, node.input[0], node.input[1], left, right, ("m", "n"), factor)
