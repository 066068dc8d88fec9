"""From a Softmax back to the product of queries and keys: scales, masks, softcap and views on the way."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.contraction import Contraction, contraction
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.evaluate import GraphIndex, World

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
LOWEST = {
    int(TensorProto.FLOAT): float(np.finfo(np.float32).min), int(TensorProto.FLOAT16): -65504.0,
    int(TensorProto.DOUBLE): float(np.finfo(np.float64).min), int(TensorProto.BFLOAT16): -3.3895313892515355e38,
}  # fmt: skip
"""The lowest finite number of each type."""
HIDDEN = -9000.0
"""An additive mask at or below this hides a key (exporters use -1e4, finfo.min and -inf)."""

_MAX_STEPS = 24


@dataclass(frozen=True, slots=True)
class Step:
    """One node between the product and the softmax, in the direction of the data.

    ``add``: ``value`` is added to the scores; ``visible``/``hidden``: keys where the bool ``value`` holds are kept or
    dropped (``fill`` is what a dropped score becomes); ``scale``: times ``factor``; ``head-scale``: times ``value``,
    one number a head; ``softcap``: ``factor * tanh``; ``floor``: nothing below ``fill``, the lowest number of its type,
    so that only -inf is changed.
    """

    node: NodeProto
    kind: Literal["view", "cast", "scale", "head-scale", "add", "visible", "hidden", "softcap", "floor"]
    value: str = ""
    factor: float = 1.0
    fill: float = 0.0
    extra: tuple[NodeProto, ...] = ()


@dataclass(frozen=True, slots=True)
class Path:
    """The product and the steps that lead from it to the softmax."""

    product: Contraction
    steps: tuple[Step, ...]


def trace(index: GraphIndex, world: World, value: str, depth: int = 0) -> Path:
    """The path that ends at ``value``; each value is followed once.

    Raises:
        Unsupported: no product of two tensors is reached by operators that attention scores pass through.
    """
    if value not in world.traced:
        try:
            world.traced[value] = _trace(index, world, value, depth)
        except Unsupported as error:
            world.traced[value] = error
    found = world.traced[value]
    if isinstance(found, Unsupported):
        raise found
    assert isinstance(found, Path)
    return found


def _trace(index: GraphIndex, world: World, value: str, depth: int) -> Path:
    node = index.producer.get(value)
    if node is None:
        raise Unsupported("no-product", f"'{value}' is an input or a constant, not a product of queries and keys")
    if depth > _MAX_STEPS:
        raise Unsupported("no-product", f"no product of queries and keys within {_MAX_STEPS} nodes before '{value}'")
    product = contraction(world, node)
    if product is not None:
        return Path(product, ())
    if node.domain not in ("", "ai.onnx"):
        raise Unsupported("custom-op", f"'{value}' comes from custom operator {node.domain}.{node.op_type}")
    step, source = _step(index, world, node, depth)
    before = trace(index, world, source, depth + 1)
    if step.kind == "softcap" and any(s.kind == "softcap" for s in before.steps):
        raise Unsupported("softcap", f"the scores pass through two softcaps before '{value}'")
    return Path(before.product, (*before.steps, step))


def _step(index: GraphIndex, world: World, node: NodeProto, depth: int) -> tuple[Step, str]:
    op = node.op_type
    if op in VIEW_OPS:
        return Step(node, "view"), node.input[0]
    if op == "Cast":
        if world.types.get(node.input[0]) not in FLOATS or world.types.get(node.output[0]) not in FLOATS:
            raise Unsupported("cast", f"the scores pass through a cast that is not between floats ('{node.output[0]}')")
        return Step(node, "cast"), node.input[0]
    if op in ("Mul", "Div"):
        return _scale(index, world, node)
    if op == "Add":
        scores, mask = _scores_of(index, world, node, (node.input[0], node.input[1]), depth)
        return Step(node, "add", value=mask), scores
    if op == "Where":
        for scores, fill, kind in ((node.input[1], node.input[2], "visible"), (node.input[2], node.input[1], "hidden")):
            number = world.scalar(fill)
            if number is not None and number <= HIDDEN:
                if world.shapes.get(scores) != world.shapes.get(node.output[0]):
                    raise Unsupported("broadcast-scores", f"the mask of Where '{node.output[0]}' repeats the scores")
                return Step(node, "visible" if kind == "visible" else "hidden", node.input[0], fill=number), scores
        raise Unsupported("where", f"Where '{node.output[0]}' does not fill with a large negative constant")
    if op in ("Max", "Clip"):
        return _floor(world, node)
    if op == "Concat":
        raise _joined(world, node)
    if op in ("DequantizeLinear", "QuantizeLinear"):
        raise Unsupported("quantised", f"quantised: kept ({op} '{node.output[0]}' stands before the softmax)")
    raise Unsupported(
        "unknown-op", f"{op} '{node.output[0]}' stands between the softmax and the product of queries and keys"
    )


def _floor(world: World, node: NodeProto) -> tuple[Step, str]:
    """XGLM and OPT take the maximum of masked scores and the lowest number, so that no row is all -inf."""
    shape, given = world.shapes.get(node.output[0]), [v for v in node.input if v]
    lowest = LOWEST.get(world.types.get(node.output[0], 0), -inf)
    for scores, bound in (given, given[::-1]) if len(given) == 2 else ():
        number = world.scalar(bound) if node.op_type == "Max" or list(node.input)[:2] == [scores, bound] else None
        if number is not None and number <= lowest and world.shapes.get(scores) == shape:
            return Step(node, "floor", fill=number), scores
    raise Unsupported("unknown-op", f"{node.op_type} '{node.output[0]}' bounds the scores by something other than the "
                      "lowest number of their type")  # fmt: skip


def _scale(index: GraphIndex, world: World, node: NodeProto) -> tuple[Step, str]:
    sides = [(node.input[0], node.input[1])]
    if node.op_type == "Mul":
        sides.append((node.input[1], node.input[0]))
    for source, other in sides:
        factor = world.scalar(other)
        if factor is None or world.shapes.get(source) != world.shapes.get(node.output[0]):
            continue
        if factor == 0.0 or not isfinite(factor):
            raise Unsupported("zero-scale", f"'{node.output[0]}' multiplies or divides the scores by {factor}")
        inner = index.producer.get(source)
        if node.op_type == "Mul" and inner is not None and inner.op_type == "Tanh":
            return _softcap(index, world, node, inner, factor)
        return Step(node, "scale", factor=factor if node.op_type == "Mul" else 1.0 / factor), source
    for source, other in sides:
        shape = world.shapes.get(source, ())
        if node.op_type == "Mul" and shape == world.shapes.get(node.output[0]) and _is_one_a_head(world, other, shape):
            return Step(node, "head-scale", other), source
    raise tensor_scale(world, node)


def _is_one_a_head(world: World, factor: str, scores: tuple[int, ...]) -> bool:
    """Whether ``factor`` is spread over queries and keys and may have one number a head (looked at with the axes)."""
    shape = world.shapes.get(factor, ())
    return len(shape) <= len(scores) and len(shape) >= 3 and shape[-2:] == (1, 1) and prod(shape) > 1


def tensor_scale(world: World, node: NodeProto) -> Unsupported:
    """Why scores that are multiplied by a tensor are not taken."""
    factor = min((world.shapes.get(v, ()) for v in node.input), key=prod)
    if node.op_type == "Div" and len(factor) >= 3 and factor[-1] == factor[-2] == 1 and prod(factor) == factor[-3]:
        return Unsupported("tensor-scale", f"the scores are divided by one number for each of {factor[-3]} heads at "
                           f"'{node.output[0]}'; a site says what they are multiplied by")  # fmt: skip
    return Unsupported("tensor-scale", f"the scores are multiplied by a tensor {list(factor)}, not by a number, or by "
                       f"one number a head, at '{node.output[0]}'")  # fmt: skip


def _softcap(index: GraphIndex, world: World, node: NodeProto, tanh: NodeProto, cap: float) -> tuple[Step, str]:
    divide = index.producer.get(tanh.input[0])
    if divide is None or divide.op_type not in ("Div", "Mul"):
        raise Unsupported("softcap", f"Tanh '{tanh.output[0]}' is not fed by scores divided by the cap")
    factor = world.scalar(divide.input[1])
    if factor is None or not 0.0 < factor < inf or world.shapes.get(divide.input[0]) != world.shapes.get(tanh.input[0]):
        raise Unsupported("softcap", f"'{divide.output[0]}' does not divide by a positive number")
    inverse = factor if divide.op_type == "Div" else 1.0 / factor
    if abs(inverse - cap) > 1e-4 * abs(cap):
        raise Unsupported(
            "softcap", f"'{node.output[0]}' multiplies by {cap}, but the scores were divided by {inverse}"
        )
    return Step(node, "softcap", factor=cap, extra=(tanh, divide)), divide.input[0]


def _scores_of(index: GraphIndex, world: World, node: NodeProto, sides: tuple[str, str], depth: int) -> tuple[str, str]:
    """Which side of an Add carries the scores: the one that is a product; the shorter path if both are."""
    lengths: list[tuple[int, str, str]] = []
    reasons: list[Unsupported] = []
    shape = world.shapes.get(node.output[0])
    for scores, mask in (sides, sides[::-1]):
        if world.shapes.get(scores) != shape or not index.data_inputs(scores):
            continue
        try:
            path = trace(index, world, scores, depth + 1)
            if prod(world.shapes[path.product.node.output[0]]) != prod(shape or ()):
                # A decomposed position bias is a product too, but one that is spread over the scores.
                raise Unsupported("no-product", f"the product before '{scores}' has fewer elements than the scores")
            lengths.append((len(path.steps), scores, mask))
        except Unsupported as error:
            reasons.append(error)
    if len(lengths) == 2:
        _check_one_product(index, world, node, sides, depth)
    if lengths:
        _, scores, mask = min(lengths, key=lambda x: x[0])
        return scores, mask
    raise reasons[0] if reasons else Unsupported("no-product", f"no side of Add '{node.output[0]}' holds scores")


def _check_one_product(index: GraphIndex, world: World, node: NodeProto, sides: tuple[str, str], depth: int) -> None:
    """Queries with keys twice, over different features, are one product of what is joined there, not a bias."""
    for side in sides:
        path = trace(index, world, side, depth + 1)
        if any(s.kind not in ("view", "cast", "scale") for s in path.steps):
            return
        if not (index.data_inputs(path.product.left) and index.data_inputs(path.product.right)):
            return
    raise Unsupported(
        "sum-of-products",
        f"the scores are the sum of two products of queries with keys at '{node.output[0]}' (as in latent attention "
        "with its projections absorbed); a site has one product",
        "join the two queries and the two keys along the head dim",
    )  # fmt: skip


def _joined(world: World, node: NodeProto) -> Unsupported:
    """Why scores that are one operand of a Concat are not taken."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    shapes = [world.shapes.get(v, ()) for v in node.input]
    last = all(shapes) and axis % len(shapes[0]) == len(shapes[0]) - 1
    if last and len(node.input) == 2 and any(s[-1] == 1 for s in shapes):
        return Unsupported("sinks", f"'{node.output[0]}' joins one more logit to the keys' (an attention sink), and "
                           "more follows before the softmax")  # fmt: skip
    narrow = min((s[-1] for s in shapes if s), default=0)
    if last and len(node.input) == 2:
        return Unsupported("joined-scores", f"'{node.output[0]}' joins the scores with {narrow} other logits before "
                           "the softmax; a site can say one sink a head")  # fmt: skip
    return Unsupported("joined-scores", f"'{node.output[0]}' joins the scores with other logits before the softmax")
