"""Chains of two products of activations, (A B) C: what every form of linear attention is written as."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.contraction import Contraction, contraction
from attncompile.passes.detect.linear_tags import AxisTags
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.evaluate import GraphIndex, World

_LONGEST = 24


@dataclass(frozen=True, slots=True)
class Product:
    """A contraction of two activations and the nodes that write it. ``third``: an operand, with its labels, that the
    result is multiplied by in the same Einsum.
    """

    contraction: Contraction
    nodes: tuple[NodeProto, ...]
    third: tuple[str, tuple[str, ...]] | None = None

    @property
    def output(self) -> str:
        """The value that holds the result."""
        return str(self.nodes[-1].output[0])

    def labels_of(self, value: str) -> tuple[str, ...]:
        """The labels of the operand ``value``."""
        c = self.contraction
        return c.left_labels if value == c.left else c.right_labels

    def own(self, world: World, value: str) -> list[str]:
        """Labels of the operand ``value`` alone that stay in the result."""
        c = self.contraction
        other = c.right if value == c.left else c.left
        theirs, mine = self.labels_of(other), self.labels_of(value)
        if self.nodes[0].op_type != "Mul":
            return [x for x in mine if x in c.out_labels and x not in theirs]
        sizes = dict(zip(theirs, world.shapes[other], strict=True))
        return [
            x for x, n in zip(mine, world.shapes[value], strict=True)
            if x in c.out_labels and n > 1 and sizes.get(x, 1) == 1
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """A node between the two products. ``sum``: a running sum over ``axis``; ``mask``: times the constant ``value``;
    ``visible``/``hidden``: zero where the bool ``value`` is false/true; ``lower``: zero above the diagonal;
    ``rows``: divided by ``value``; ``gate``: times an activation.
    """

    node: NodeProto
    kind: Literal["view", "cast", "scale", "sum", "mask", "visible", "hidden", "lower", "rows", "gate"]
    value: str = ""
    factor: float = 1.0
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Chain:
    """The steps from a product to the value that the next product reads."""

    product: Product
    steps: tuple[Step, ...]

    def has(self, *kinds: str) -> bool:
        """Whether a step of one of these kinds is among them."""
        return any(s.kind in kinds for s in self.steps)


@dataclass
class Context:
    """What is found out about one world, once."""

    index: GraphIndex
    world: World
    tags: AxisTags
    chains: dict[str, Chain | None] = field(default_factory=dict)
    shifted: list[World] | None = None

    def others(self) -> list[World]:
        """The same model at other sizes; none where every shape is fixed."""
        if self.shifted is None:
            steps = (1, 6) if self.world.binding else ()
            self.shifted = [World(self.index, {k: v + d for k, v in self.world.binding.items()}) for d in steps]
        return self.shifted

    def worlds(self) -> list[World]:
        """This world and the others."""
        return [self.world, *self.others()]


_CONTEXT = "linear attention"


def context_of(index: GraphIndex, world: World) -> Context:
    """The context of ``world``, made on first use."""
    found = world.kept.get(_CONTEXT)
    if not isinstance(found, Context):
        found = world.kept[_CONTEXT] = Context(index, world, AxisTags(index, world))
    return found


def standard(node: NodeProto | None, *kinds: str) -> bool:
    """Whether ``node`` is one of these standard operators."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in kinds


def product_of(ctx: Context, node: NodeProto | None) -> Product | None:
    """``node`` as a product of two activations, or None: also ReduceSum(Mul) and a Mul that spreads both operands."""
    if node is None or not standard(node, "MatMul", "Einsum", "Gemm", "ReduceSum", "Mul"):
        return None
    if node.op_type == "ReduceSum":
        return _summed_product(ctx, node)
    if node.op_type == "Mul":
        made = _elementwise(ctx, node)
        if made is None:
            return None
        spreads = [made.own(ctx.world, v) for v in (made.contraction.left, made.contraction.right)]
        return made if all(spreads) else None
    if not all(ctx.index.data_inputs(v) for v in node.input[:2]):
        return None
    if node.op_type == "Einsum" and len(node.input) == 3:
        return _third(ctx, node)
    try:
        found = contraction(ctx.world, node)
    except Unsupported:
        return None
    return _floats(ctx, Product(found, (node,))) if found is not None and found.left != found.right else None


def chain_to(ctx: Context, value: str) -> Chain | None:
    """The chain that ends at ``value``, or None where no product of activations is reached."""
    if value not in ctx.chains:
        ctx.chains[value] = None
        ctx.chains[value] = _chain(ctx, value)
    return ctx.chains[value]


def _chain(ctx: Context, value: str) -> Chain | None:
    steps: list[Step] = []
    while len(steps) < _LONGEST:
        node = ctx.index.producer.get(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        product = product_of(ctx, node)
        if product is not None:
            return Chain(product, tuple(steps[::-1]))
        found = _step(ctx, node)
        if found is None:
            return None
        step, value = found
        steps.append(step)
    return None


def _step(ctx: Context, node: NodeProto) -> tuple[Step, str] | None:
    world, op = ctx.world, node.op_type
    first, out = node.input[0] if node.input else "", node.output[0]
    if op in VIEW_OPS and op != "Expand":
        return Step(node, "view"), first
    if op == "Cast":
        floats = world.types.get(first) in FLOATS and world.types.get(out) in FLOATS
        return (Step(node, "cast"), first) if floats else None
    if op == "CumSum":
        attributes = {a.name: a.i for a in node.attribute}
        axis = world.scalar(node.input[1])
        if axis is None or attributes.get("exclusive") or attributes.get("reverse"):
            return None
        return Step(node, "sum", axis=int(axis) % len(world.shapes[first])), first
    if op == "Trilu":
        upper = next((a.i for a in node.attribute if a.name == "upper"), 1)
        diagonal = world.scalar(node.input[1]) if len(node.input) > 1 and node.input[1] else 0.0
        return (Step(node, "lower"), first) if not upper and diagonal == 0.0 else None
    if op == "Where":
        for kept, fill, kind in ((node.input[1], node.input[2], "visible"), (node.input[2], node.input[1], "hidden")):
            if world.scalar(fill) == 0.0 and world.shapes.get(kept) == world.shapes.get(out):
                step = Step(node, "visible" if kind == "visible" else "hidden", node.input[0])
                return (step, kept) if not ctx.index.data_inputs(node.input[0]) else (Step(node, "gate"), kept)
        return None
    if op in ("Mul", "Div"):
        return _factor(ctx, node)
    return None


def _factor(ctx: Context, node: NodeProto) -> tuple[Step, str] | None:
    world, shape = ctx.world, ctx.world.shapes.get(node.output[0])
    pairs = [(node.input[0], node.input[1])]
    if node.op_type == "Mul":
        pairs.append((node.input[1], node.input[0]))
    pairs = [(s, o) for s, o in pairs if ctx.index.data_inputs(s) and world.shapes.get(s) == shape]
    for source, other in pairs:
        number = world.scalar(other)
        if number is not None:
            if number == 0.0 or not isfinite(number):
                return None
            return Step(node, "scale", other, number if node.op_type == "Mul" else 1.0 / number), source
        if node.op_type == "Mul" and not ctx.index.data_inputs(other):
            return Step(node, "mask", other), source
    for source, other in pairs:
        if node.op_type == "Div" and chain_to(ctx, source) is not None:
            return Step(node, "rows", other), source
        if node.op_type == "Mul" and source != other and chain_to(ctx, source) is not None:
            return Step(node, "gate", other), source
    return None


def _floats(ctx: Context, product: Product) -> Product | None:
    return product if ctx.world.types.get(product.output) in FLOATS else None


def _elementwise(ctx: Context, node: NodeProto) -> Product | None:
    left, right = node.input
    shapes = [ctx.world.shapes.get(v) for v in (left, right)]
    if left == right or shapes[0] is None or shapes[1] is None:
        return None
    if not all(ctx.index.data_inputs(v) for v in (left, right)):
        return None
    rank = max(len(shapes[0]), len(shapes[1]))
    labels = tuple(f"b{i}" for i in range(rank))
    sides = [labels[rank - len(s) :] for s in (shapes[0], shapes[1])]
    return _floats(ctx, Product(Contraction(node, left, right, sides[0], sides[1], labels), (node,)))


def _summed_product(ctx: Context, node: NodeProto) -> Product | None:
    """ReduceSum(Mul(a, b)) over one axis."""
    multiply = ctx.index.producer.get(node.input[0])
    if multiply is None or not standard(multiply, "Mul"):
        return None
    made, axes = _elementwise(ctx, multiply), reduced_axes(ctx.world, node)
    if made is None or axes is None or len(axes) != 1:
        return None
    c = made.contraction
    gone, kept = c.out_labels[axes[0]], next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    out = tuple(f"{x}'" if x == gone else x for x in c.out_labels if kept or x != gone)
    return Product(Contraction(node, c.left, c.right, c.left_labels, c.right_labels, out), (multiply, node))


def reduced_axes(world: World, node: NodeProto) -> list[int] | None:
    """The axes that a Reduce node reduces, or None where they cannot be told."""
    shape = world.shapes.get(node.input[0])
    if shape is None:
        return None
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    if axes is None and len(node.input) > 1 and node.input[1]:
        if world.index.data_inputs(node.input[1]):
            return None
        axes = [int(a) for a in world.value(node.input[1]).reshape(-1)]
    return None if not axes else [a % len(shape) for a in axes]


def _third(ctx: Context, node: NodeProto) -> Product | None:
    """Einsum of queries, state and a factor for each query: the factor is the operand whose labels all stay."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    if "." in equation or "->" not in equation or any(v not in ctx.world.shapes for v in node.input):
        return None
    terms, out = equation.split("->")
    labels = [tuple(t) for t in terms.split(",")]
    if any(len(set(t)) < len(t) for t in labels) or not all(ctx.index.data_inputs(v) for v in node.input):
        return None
    for at in range(3):
        first, second = (i for i in range(3) if i != at)
        if set(labels[at]) < set(out) and set(out) <= set(labels[first]) | set(labels[second]):
            pair = Contraction(node, node.input[first], node.input[second], labels[first], labels[second], tuple(out))
            if len(pair.summed) == 1 and pair.summed <= set(labels[first]) & set(labels[second]):
                return _floats(ctx, Product(pair, (node,), (node.input[at], labels[at])))
    return None
