"""What the result of linear attention is divided by: a sum, plus a small number, at least another one."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.linear_chain import Context, product_of
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS

_LONGEST = 12


@dataclass(frozen=True, slots=True)
class Denominator:
    """max(``scale`` * ``root`` + ``epsilon``, ``floor``), made of ``root`` by ``nodes`` (from the root on)."""

    root: str
    nodes: tuple[NodeProto, ...]
    scale: float = 1.0
    epsilon: float = 0.0
    floor: float | None = None


def denominator(ctx: Context, value: str, inverse: bool = False) -> Denominator:
    """``value`` (its inverse, where ``inverse``) as a denominator.

    Raises:
        Unsupported: a number on the way is not positive, or the sum is bounded twice.
    """
    nodes: list[NodeProto] = []
    while len(nodes) < _LONGEST:
        node = ctx.index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx") or product_of(ctx, node) is not None:
            break
        source = _source(ctx, node, inverse)
        if source is None:
            break
        inverse = inverse and node.op_type != "Reciprocal" and not (node.op_type == "Div" and source == node.input[1])
        nodes.append(node)
        value = source
    if inverse:
        raise Unsupported("normaliser", f"the result is multiplied by '{value}', which is not one over a sum")
    return _composed(ctx, value, nodes[::-1])


def _source(ctx: Context, node: NodeProto, inverse: bool) -> str | None:
    """The operand that carries the sum, or None where ``node`` is no part of a denominator."""
    world = ctx.world
    first: str = node.input[0] if node.input else ""
    if node.op_type in VIEW_OPS or (node.op_type == "Cast" and world.types.get(first) in FLOATS):
        return first
    if inverse:
        if node.op_type == "Reciprocal":
            return first
        if node.op_type == "Div" and ctx.index.data_inputs(node.input[1]):
            return str(node.input[1]) if world.scalar(first) is not None else None
    if node.op_type in ("Clip", "Max") or (node.op_type in ("Add", "Mul", "Div") and len(node.input) == 2):
        data: list[str] = [v for v in node.input if v and ctx.index.data_inputs(v)]
        others = [v for v in node.input if v and v not in data]
        same = len(data) == 1 and world.shapes.get(data[0]) == world.shapes.get(node.output[0])
        if same and all(world.scalar(v) is not None for v in others) and (node.op_type != "Div" or data[0] == first):
            return data[0]
    return None


def _composed(ctx: Context, root: str, nodes: list[NodeProto]) -> Denominator:
    scale, epsilon, floor, inverted = 1.0, 0.0, None, False
    value = root
    for node in nodes:
        others = [v for v in node.input if v and v != value]
        turns = node.op_type == "Reciprocal" or (node.op_type == "Div" and node.input[1] == value)
        inverted |= turns
        if node.op_type in VIEW_OPS | {"Cast", "Reciprocal"}:
            value = node.output[0]
            continue
        number = ctx.world.scalar(others[0]) if others else None
        if number is None or not isfinite(number):
            raise Unsupported("normaliser", f"'{node.output[0]}' bounds the normaliser in a way that is not understood")
        if node.op_type == "Add" and floor is None and not inverted:
            epsilon += number
        elif node.op_type in ("Mul", "Div") and number > 0:
            # c / sum is one over sum / c, and so is c * (1 / sum).
            factor = 1.0 / number if turns or inverted == (node.op_type == "Mul") else number
            scale, epsilon, floor = scale * factor, epsilon * factor, None if floor is None else floor * factor
        elif node.op_type in ("Clip", "Max") and not inverted and floor is None and _is_lower_bound(node, others):
            floor = number
        else:
            raise Unsupported("normaliser", f"{node.op_type} '{node.output[0]}' changes the normaliser in a way that "
                              "an attention site cannot say")  # fmt: skip
        value = node.output[0]
    return Denominator(root, tuple(nodes), scale, epsilon, floor)


def _is_lower_bound(node: NodeProto, others: list[str]) -> bool:
    return len(others) == 1 and (node.op_type == "Max" or node.input[1] == others[0])
