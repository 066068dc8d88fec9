"""Products of two tensors by axis labels, whatever node writes them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import World


@dataclass(frozen=True, slots=True)
class Contraction:
    """out[out_labels] = sum over the other labels of left[left_labels] * right[right_labels].

    A label whose size is 1 in one operand and larger in the other is broadcast there. Labels of more than one letter
    are batch axes by position (MatMul's leading axes, an Einsum's ellipsis), which the shorter operand may lack.
    """

    node: NodeProto
    left: str
    right: str
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    out_labels: tuple[str, ...]
    factor: float = 1.0
    """What the product is multiplied by (alpha of Gemm and FusedMatMul)."""

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
        Unsupported: a product whose axes cannot be named (unknown rank, a diagonal, a vector operand).
    """
    fused = node.domain == "com.microsoft" and node.op_type == "FusedMatMul"
    standard = node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Einsum", "Gemm")
    if not fused and not standard:
        return None
    if node.op_type == "Gemm":
        return _gemm(node)
    if len(node.input) != 2:
        if node.op_type == "Einsum":
            raise Unsupported("einsum", f"Einsum '{node.output[0]}' multiplies {len(node.input)} operands, not two")
        return None
    left, right = node.input
    attributes = {a.name: a for a in node.attribute}
    if any(name in attributes and attributes[name].i for name in ("transBatchA", "transBatchB")):
        raise Unsupported("fused-matmul", f"FusedMatMul '{node.output[0]}' moves the batch axes of an operand")
    ranks = [len(world.shapes[v]) if v in world.shapes else None for v in (left, right)]
    if ranks[0] is None or ranks[1] is None or node.output[0] not in world.shapes:
        raise Unsupported("shape-unknown", f"the shapes around '{node.output[0]}' are not known")
    if node.op_type == "Einsum":
        return Contraction(node, left, right, *_einsum(node, (ranks[0], ranks[1])))
    if min(ranks[0], ranks[1]) < 2:
        raise Unsupported("vector-product", f"'{node.output[0]}' multiplies by a vector")
    turned = [name in attributes and bool(attributes[name].i) for name in ("transA", "transB")]
    factor = attributes["alpha"].f if "alpha" in attributes else 1.0
    rank = max(ranks[0], ranks[1])
    batch = tuple(f"b{i}" for i in range(rank - 2))
    return Contraction(
        node, left, right,
        (*batch[rank - ranks[0] :], *(("c", "m") if turned[0] else ("m", "c"))),
        (*batch[rank - ranks[1] :], *(("n", "c") if turned[1] else ("c", "n"))),
        (*batch, "m", "n"), factor,
    )  # fmt: skip


_Labels = tuple[str, ...]


def _einsum(node: NodeProto, ranks: tuple[int, int]) -> tuple[_Labels, _Labels, _Labels]:
    """Labels of both operands and the result; an ellipsis becomes labels by position from the right, and a result that
    is not written is the ellipsis and then, in order, the letters that occur once.
    """
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    operands, arrow, out = equation.partition("->")
    terms = operands.split(",")
    letters = operands.replace(",", "").replace("...", "")
    if len(terms) != 2 or not letters.isalpha():
        raise Unsupported("einsum", f"Einsum equation '{equation}' of '{node.output[0]}' is not one of two operands")
    if not arrow:
        once = sorted(x for x in set(letters) if letters.count(x) == 1)
        out = ("..." if "..." in operands else "") + "".join(once)
    hidden = [rank - len(term) + 3 if "..." in term else 0 for rank, term in zip(ranks, terms, strict=True)]
    most = max(hidden)

    def labels(term: str, count: int) -> _Labels:
        before, dots, after = term.partition("...")
        middle = tuple(f"...{i}" for i in range(most - count, most)) if dots else ()
        return (*before, *middle, *after)

    made = [labels(term, count) for term, count in zip(terms, hidden, strict=True)]
    wrong = [len(m) != rank for m, rank in zip(made, ranks, strict=True)]
    if any(wrong) or min(hidden) < 0 or any(len(set(m)) < len(m) for m in made):
        raise Unsupported("einsum", f"Einsum equation '{equation}' takes a diagonal or does not fit its operands")
    if most and "..." not in out:
        raise Unsupported("einsum", f"Einsum equation '{equation}' sums over the axes of its ellipsis")
    return made[0], made[1], labels(out, most)


def _gemm(node: NodeProto) -> Contraction:
    if len(node.input) > 2 and node.input[2]:
        raise Unsupported("gemm-addend", f"Gemm '{node.output[0]}' adds a third operand: a linear layer")
    attributes = {a.name: a for a in node.attribute}
    turned = [name in attributes and bool(attributes[name].i) for name in ("transA", "transB")]
    factor = attributes["alpha"].f if "alpha" in attributes else 1.0
    left, right = ("c", "m") if turned[0] else ("m", "c"), ("n", "c") if turned[1] else ("c", "n")
    return Contraction(node, node.input[0], node.input[1], left, right, ("m", "n"), factor)
