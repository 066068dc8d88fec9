"""Seeded semantic mutations of attention graphs, made without any of the lifter's code.

Each mutation is ``f(graph, site, rng) -> bool``: False where it does not apply. Whether the mutant is still attention,
and of which kind, is not known here: the tests run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper, shape_inference

PRODUCTS = ("MatMul", "Einsum", "Gemm")


class Graph:
    """A copy of a model that is edited by value names; ``sized`` is it with numbers for its dynamic dimensions."""

    def __init__(self, proto: onnx.ModelProto, sized: onnx.ModelProto | None = None) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self.nodes = list(self.proto.graph.node)
        self.stored = {t.name: t for t in self.proto.graph.initializer}
        inferred = shape_inference.infer_shapes(sized or self.proto, data_prop=True).graph
        self.shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self.types = {
            v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self._count = 0

    def producer(self, value: str) -> NodeProto | None:
        return next((n for n in self.nodes if value in n.output), None)

    def readers(self, value: str) -> list[NodeProto]:
        return [n for n in self.nodes if value in n.input]

    def const(self, value: np.ndarray) -> str:
        self._count += 1
        name = f"mutant_c{self._count}"
        self.stored[name] = numpy_helper.from_array(np.asarray(value), name)
        self.proto.graph.initializer.append(self.stored[name])
        return name

    def scalar(self, value: float) -> str:
        return self.const(np.array(value, np.float32))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """A new node, put where all its inputs exist."""
        self._count += 1
        node = helper.make_node(kind, list(inputs), [f"mutant_v{self._count}"], **attributes)
        made = [i for i, n in enumerate(self.nodes) if set(n.output) & set(inputs)]
        self.nodes.insert(max(made, default=-1) + 1, node)
        return str(node.output[0])

    def wrap(self, value: str, change: Callable[[str], str], readers: list[NodeProto] | None = None) -> bool:
        """``change(value)`` instead of ``value`` for its readers (or those given)."""
        readers = self.readers(value) if readers is None else readers
        new = change(value)
        for node in readers:
            for i, name in enumerate(node.input):
                if name == value:
                    node.input[i] = new
        # Readers stand after the value's producer, and so after what was put right behind it.
        return bool(readers)

    def output(self, value: str) -> bool:
        if any(o.name == value for o in self.proto.graph.output):
            return False
        self.proto.graph.output.append(helper.make_tensor_value_info(value, self.types.get(value, 1), None))
        return True

    def model(self) -> onnx.ModelProto:
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(self.nodes)
        del self.proto.graph.value_info[:]  # the old shapes need not hold any more
        for value in self.proto.graph.output:
            value.type.tensor_type.ClearField("shape")
        return self.proto


@dataclass(frozen=True)
class Around:
    """A softmax with the products before and behind it; ``scores`` and ``weights`` are the values between."""

    softmax: NodeProto
    first: NodeProto
    second: NodeProto
    scores: tuple[str, ...]
    weights: tuple[str, ...]


def softmaxes(graph: Graph) -> list[Around]:
    """Every softmax between two products."""
    found = []
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        scores, pending, first = [], [node.input[0]], None
        while pending and first is None:
            value = pending.pop(0)
            maker = graph.producer(value)
            if maker is None:
                continue
            scores.append(value)
            if maker.op_type in PRODUCTS:
                first = maker
            elif len(scores) < 12:
                pending.extend(i for i in maker.input if graph.types.get(i, 1) != 9)
        weights, value, second = [], node.output[0], None
        while second is None and len(weights) < 6:
            weights.append(value)
            readers = graph.readers(value)
            second = next((n for n in readers if n.op_type in PRODUCTS), None)
            onward = [n for n in readers if n.op_type in ("Where", "Cast", "Reshape", "Identity", "Transpose")]
            if not onward:
                break
            value = onward[0].output[0]
        if first is not None and second is not None:
            found.append(Around(node, first, second, tuple(scores), tuple(weights)))
    return found


Mutation = Callable[[Graph, Around, np.random.Generator], bool]


def pick(rng: np.random.Generator, items: object) -> object:
    options = list(items)  # type: ignore[call-overload]
    return options[int(rng.integers(len(options)))]


def _any(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _operand(site: Around, rng: np.random.Generator) -> tuple[str, NodeProto]:
    """One of Q, K, V with the product that reads it."""
    which = int(rng.integers(3))
    if which == 2:
        value = next((i for i in site.second.input if i not in site.weights), site.second.input[0])
        return value, site.second
    return site.first.input[which], site.first


def _mask_like(graph: Graph, value: str, rng: np.random.Generator, low: float) -> np.ndarray | None:
    """A random 0 / ``low`` array that broadcasts to ``value`` somehow, every row of keys with something to see."""
    shape = graph.shapes.get(value, ())
    if len(shape) < 2 or 0 in shape:
        return None
    rank = int(rng.integers(1, len(shape) + 1))
    dims = [s if rng.random() < 0.7 else 1 for s in shape[-rank:]]
    seen = rng.random(dims) < 0.7
    seen[..., 0] = True
    return np.where(seen, np.float32(0), np.float32(low))


def softmax_axis(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    del site.softmax.attribute[:]
    site.softmax.attribute.append(helper.make_attribute("axis", int(rng.integers(-3, -1))))
    return True


def scale_constant(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    factor = float(rng.choice([0.5, 2.0, -1.0, 0.0, 1.7]))
    return graph.wrap(_any(rng, site.scores), lambda v: graph.op("Mul", v, graph.scalar(factor)))


def division_by_constant(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    divisor = float(rng.choice([2.0, -3.0, 0.0, 1e-3]))
    if rng.random() < 0.3:
        return graph.wrap(_any(rng, site.scores), lambda v: graph.op("Div", graph.scalar(2.0), v))
    return graph.wrap(_any(rng, site.scores), lambda v: graph.op("Div", v, graph.scalar(divisor)))


def scale_of_another_rank(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    rank = int(rng.integers(1, 7))
    value = _any(rng, (*site.scores, _operand(site, rng)[0]))
    return graph.wrap(value, lambda v: graph.op("Mul", v, graph.const(np.full((1,) * rank, 0.7, np.float32))))


def transpose_perm(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    near = [n for n in graph.nodes if n.op_type == "Transpose" and any(a.name == "perm" for a in n.attribute)]
    if not near:
        return False
    node = near[int(rng.integers(len(near)))]
    (perm,) = (a for a in node.attribute if a.name == "perm")
    order = rng.permutation(len(perm.ints))
    perm.ints[:] = [perm.ints[i] for i in order]
    return True


def swap_operands(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    node = site.first if rng.random() < 0.5 else site.second
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return True


def einsum_letters(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    node = site.first if rng.random() < 0.5 else site.second
    if node.op_type != "Einsum":
        return False
    (attribute,) = node.attribute
    left, arrow, out = attribute.s.decode().partition("->")
    if not arrow:
        return False
    letters = [x for x in out if x != "."]
    moved = [letters[i] for i in rng.permutation(len(letters))]
    head = out.partition("...")[0]
    if "..." in out:
        moved.insert(len(head), "...")
    attribute.s = f"{left}->{''.join(moved)}".encode()
    return True


def extra_consumer(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    value = _any(rng, (*site.scores, *site.weights))
    return graph.output(graph.op(str(rng.choice(["Neg", "Exp", "Identity", "Transpose"])), value))


def becomes_an_output(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    return graph.output(_any(rng, (*site.scores, *site.weights, *site.second.output, *site.first.input)))


def second_reader(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """The scores or weights come back in, added to the output of the second product's input V or the scores."""
    value = _any(rng, (*site.scores, *site.weights))
    target = site.softmax.input[0]
    return graph.wrap(target, lambda v: graph.op("Add", v, value), [site.softmax]) and value not in site.weights


def flip_mask_element(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    masks = [
        t for t in graph.stored.values()
        if len(t.dims) >= 2 and t.dims[-1] == t.dims[-2] and t.dims[-1] > 2 and max([1, *t.dims[:-2]]) == 1
    ]  # fmt: skip
    if not masks:
        return False
    tensor = masks[int(rng.integers(len(masks)))]
    array = numpy_helper.to_array(tensor).copy()
    flat = array.reshape(-1)
    at = int(rng.integers(flat.size))
    others = flat[flat != flat[at]]
    if not others.size:
        return False
    flat[at] = others[int(rng.integers(others.size))]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return True


def mask_added(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """A mask, somewhere between the product and the softmax: before or after scale and other masks."""
    value = _any(rng, site.scores)
    low = float(rng.choice([-np.inf, -1e4, -1e9, float(np.finfo(np.float32).min), -3.0]))
    mask = _mask_like(graph, value, rng, low)
    return mask is not None and graph.wrap(value, lambda v: graph.op("Add", v, graph.const(mask)))


def mask_then_scale(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    value = _any(rng, site.scores)
    mask = _mask_like(graph, value, rng, float(rng.choice([-1e4, -1e9, -20.0, -2e4])))
    factor = float(rng.choice([1e-4, 1e-3, 0.5, 8.0, -1.0]))
    if mask is None:
        return False
    return graph.wrap(
        value, lambda v: graph.op("Mul", graph.op("Add", v, graph.const(mask)), graph.scalar(factor))
    )  # fmt: skip


def mask_where(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    value = _any(rng, site.scores)
    mask = _mask_like(graph, value, rng, -1.0)
    if mask is None:
        return False
    fill = graph.scalar(float(rng.choice([-np.inf, -1e4, -1e9, -5.0, 0.0, 1e4])))
    sides = (lambda v: (v, fill)) if rng.random() < 0.6 else (lambda v: (fill, v))
    return graph.wrap(value, lambda v: graph.op("Where", graph.const(mask == 0), *sides(v)))


def mask_of_more_axes(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """A mask that broadcasts the scores instead of being broadcast."""
    value = _any(rng, site.scores)
    shape = graph.shapes.get(value, ())
    if len(shape) < 3 or 0 in shape:
        return False
    dims = [2 if s == 1 else s for s in shape] if 1 in shape else [2, *shape]
    seen = rng.random(dims) < 0.8
    seen[..., 0] = True
    if rng.random() < 0.5:
        return graph.wrap(value, lambda v: graph.op("Where", graph.const(seen), v, graph.scalar(-1e9)))
    return graph.wrap(value, lambda v: graph.op("Add", v, graph.const(np.where(seen, 0, -1e9).astype(np.float32))))


def other_sum(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    adds = [n for v in site.scores for n in [graph.producer(v)] if n is not None and n.op_type in ("Add", "Mul")]
    if not adds:
        return False
    node = adds[int(rng.integers(len(adds)))]
    node.op_type = str(rng.choice([k for k in ("Add", "Sub", "Mul", "Max") if k != node.op_type]))
    return True


def where_swapped(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    near = [n for n in graph.nodes if n.op_type == "Where"]
    if not near:
        return False
    node = near[int(rng.integers(len(near)))]
    node.input[1], node.input[2] = node.input[2], node.input[1]
    return True


def comparison(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    kinds = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or")
    near = [n for n in graph.nodes if n.op_type in kinds]
    if not near:
        return False
    node = near[int(rng.integers(len(near)))]
    same = kinds[4:] if node.op_type in kinds[4:] else kinds[:4]
    node.op_type = str(rng.choice([k for k in same if k != node.op_type]))
    return True


def data_mask(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Hides keys by the scores' own values, or by a function of the queries or keys."""
    value, low = site.softmax.input[0], graph.scalar(-1e9)
    kind = int(rng.integers(3))
    if kind == 0:
        return graph.wrap(value, lambda v: graph.op("Where", graph.op("Greater", v, graph.scalar(-0.5)), v, low))
    source, _ = _operand(site, rng)
    axes = graph.const(np.array([-1 if rng.random() < 0.5 else -2], np.int64))
    bias = graph.op("ReduceSum", source, axes, keepdims=1)
    if kind == 1:
        return graph.wrap(value, lambda v: graph.op("Add", v, bias), [site.softmax])
    seen = graph.op("Greater", bias, graph.scalar(0.0))
    return graph.wrap(value, lambda v: graph.op("Where", seen, v, low), [site.softmax])


def wrong_axis(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Transposes an operand, the scores or the weights."""
    value = _any(rng, (*site.scores, *site.weights, _operand(site, rng)[0]))
    rank = len(graph.shapes.get(value, ()))
    if rank < 2:
        return False
    a, b = rng.choice(rank, 2, replace=False) if rng.random() < 0.5 else (rank - 1, rank - 2)
    perm = list(range(rank))
    perm[a], perm[b] = perm[b], perm[a]
    return graph.wrap(value, lambda v: graph.op("Transpose", v, perm=perm))


def heads_in_another_order(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """As a tile does where a repeat belongs: heads of one operand gathered in another order."""
    value, reader = _operand(site, rng)
    shape = graph.shapes.get(value, ())
    if len(shape) < 3:
        return False
    axis = int(rng.integers(len(shape)))
    order = rng.permutation(shape[axis]) if rng.random() < 0.5 else rng.integers(0, shape[axis], shape[axis])
    return graph.wrap(value, lambda v: graph.op("Gather", v, graph.const(order), axis=axis), [reader])


def tile_order(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Group-major expansion of the heads, where exporters write the head-major one."""
    near = [n for n in graph.nodes if n.op_type == "Expand" and len(graph.shapes.get(n.output[0], ())) == 5]
    if not near:
        return False
    value = near[int(rng.integers(len(near)))].output[0]
    perm = [0, 2, 1, 3, 4] if rng.random() < 0.7 else [0, 1, 3, 2, 4]
    return graph.wrap(value, lambda v: graph.op("Transpose", v, perm=perm))


def tensor_factor(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    value = _any(rng, (*site.scores, *site.weights, _operand(site, rng)[0]))
    shape = graph.shapes.get(value, ())
    if len(shape) < 2:
        return False
    rank = int(rng.integers(1, len(shape) + 1))
    dims = [s if rng.random() < 0.5 else 1 for s in shape[-rank:]]
    factor = rng.uniform(0.5, 1.5, dims).astype(np.float32)
    return graph.wrap(value, lambda v: graph.op(str(rng.choice(["Mul", "Div", "Add"])), v, graph.const(factor)))


def factor_from_data(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    value, (source, _) = _any(rng, (*site.scores, *site.weights)), _operand(site, rng)
    mean = graph.op("ReduceMean", source, keepdims=0)
    return graph.wrap(value, lambda v: graph.op(str(rng.choice(["Mul", "Add"])), v, mean))


def nan_guard(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    fill = graph.const(np.full((1,) * int(rng.integers(0, 6)), rng.choice([0.0, 0.5, 1e-3]), np.float32))
    tested = site.weights[0] if rng.random() < 0.7 else site.scores[0]
    flip = rng.random() < 0.2

    def guard(v: str) -> str:
        bad = graph.op("IsNaN", tested)
        return graph.op("Where", bad, *((v, fill) if flip else (fill, v)))

    return graph.wrap(site.weights[0], guard)


def after_softmax(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    kind = str(rng.choice(["Add", "Mul", "Relu", "Softmax", "Sqrt", "Round", "Cast"]))
    if kind == "Cast":
        return graph.wrap(site.weights[0], lambda v: graph.op("Cast", graph.op("Cast", v, to=6), to=1))
    if kind in ("Add", "Mul"):
        return graph.wrap(site.weights[0], lambda v: graph.op(kind, v, graph.scalar(0.25)))
    return graph.wrap(site.weights[-1], lambda v: graph.op(kind, v))


def before_softmax(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    kind = str(rng.choice(["Neg", "Abs", "Relu", "Sigmoid", "Exp", "Floor", "Cast", "Clip"]))
    value = _any(rng, site.scores)
    if kind == "Cast":
        return graph.wrap(value, lambda v: graph.op("Cast", graph.op("Cast", v, to=6), to=1))
    if kind == "Clip":
        return graph.wrap(value, lambda v: graph.op("Clip", v, graph.scalar(-0.5), graph.scalar(0.5)))
    return graph.wrap(value, lambda v: graph.op(kind, v))


def other_softmax(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    site.softmax.op_type = str(rng.choice(["LogSoftmax", "Hardmax"]))
    return True


def key_and_value_swapped(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    value = next((i for i, v in enumerate(site.second.input) if v not in site.weights), None)
    if value is None:
        return False
    at = int(rng.integers(2))
    site.first.input[at], site.second.input[value] = site.second.input[value], site.first.input[at]
    return True


def mixing_reshape(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Same shape, other elements: a reshape to exchanged sizes and a transpose back."""
    value = _any(rng, (*site.scores, *site.weights, _operand(site, rng)[0], *site.second.output))
    shape = graph.shapes.get(value, ())
    if len(shape) < 3 or 0 in shape:
        return False
    a = int(rng.integers(len(shape) - 1))
    dims = list(shape)
    dims[a], dims[a + 1] = dims[a + 1], dims[a]
    perm = list(range(len(shape)))
    perm[a], perm[a + 1] = perm[a + 1], perm[a]
    target = graph.const(np.array(dims, np.int64))
    return graph.wrap(value, lambda v: graph.op("Transpose", graph.op("Reshape", v, target), perm=perm))


def softcap(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    cap = float(rng.choice([1.0, 2.0, 5.0]))
    back = cap if rng.random() < 0.7 else cap * 1.5
    times = 1 + int(rng.random() < 0.3)
    value = _any(rng, site.scores)

    def change(v: str) -> str:
        for i in range(times):
            divided = graph.op("Div", v, graph.scalar(cap + i))
            v = graph.op("Mul", graph.op("Tanh", divided), graph.scalar(back + i))
        return v

    return graph.wrap(value, change)


def one_entry_of_the_weights(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """The weights (or an operand) of the first batch entry or head serve all of them."""
    value = _any(rng, (*site.weights, *site.scores, _operand(site, rng)[0]))
    shape = graph.shapes.get(value, ())
    if len(shape) < 3:
        return False
    axis = int(rng.integers(len(shape) - 2))
    zero = graph.const(np.array([0], np.int64))
    return graph.wrap(value, lambda v: graph.op("Gather", v, zero, axis=axis))


def shifted_operand(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Adds a constant or itself to one operand: another function, but attention all the same."""
    value, reader = _operand(site, rng)
    other = value if rng.random() < 0.5 else graph.scalar(0.3)
    return graph.wrap(value, lambda v: graph.op("Add", v, other), [reader])


def fewer_keys(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Cuts the weights and the values, or the scores, to the first keys."""
    shape = graph.shapes.get(site.weights[0], ())
    if len(shape) < 3 or shape[-1] < 4:
        return False
    cut = graph.const(np.arange(shape[-1] - 2))
    value = next((v for v in site.second.input if v not in site.weights), None)
    if value is None:
        return False
    axis = len(graph.shapes.get(value, ())) - 2
    graph.wrap(site.weights[-1], lambda v: graph.op("Gather", v, cut, axis=-1))
    return graph.wrap(value, lambda v: graph.op("Gather", v, cut, axis=axis), [site.second])


def appended_sink(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """One more key in the softmax that no value belongs to."""
    shape = graph.shapes.get(site.softmax.input[0], ())
    if len(shape) < 3 or 0 in shape:
        return False
    sink = graph.const(np.full((*shape[:-1], 1), 0.7, np.float32))
    keep = graph.const(np.arange(shape[-1]) + int(rng.random() < 0.3))
    graph.wrap(site.softmax.input[0], lambda v: graph.op("Concat", v, sink, axis=-1), [site.softmax])
    return graph.wrap(site.weights[0], lambda v: graph.op("Gather", v, keep, axis=-1))


def harmless(graph: Graph, site: Around, rng: np.random.Generator) -> bool:
    """Controls: what changes nothing must not stop the lifter from being right either."""
    value = _any(rng, (*site.scores, *site.weights, *site.second.output))
    if rng.random() < 0.5:
        return graph.wrap(value, lambda v: graph.op("Cast", v, to=1))
    return graph.wrap(value, lambda v: graph.op("Identity", v))


MUTATIONS: tuple[Mutation, ...] = (
    softmax_axis, scale_constant, division_by_constant, scale_of_another_rank, transpose_perm, swap_operands,
    einsum_letters, extra_consumer, becomes_an_output, second_reader, flip_mask_element, mask_added, mask_then_scale,
    mask_where, mask_of_more_axes, other_sum, where_swapped, comparison, data_mask, wrong_axis, heads_in_another_order,
    tile_order, tensor_factor, factor_from_data, nan_guard, after_softmax, before_softmax, other_softmax,
    key_and_value_swapped, mixing_reshape, softcap, one_entry_of_the_weights, shifted_operand, fewer_keys,
    appended_sink, harmless,
)  # fmt: skip
