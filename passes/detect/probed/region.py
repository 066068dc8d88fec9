"""The piece of graph between three projections and the projection of the output, if it is analytic throughout."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import Layout, Operand
from attncompile.passes.detect.probed.mask_paths import check_paths, is_gate, mask_input
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.detect.walks import dies, is_idle_dropout, node_name
from attncompile.passes.evaluate import GraphIndex, World

_MOVES = VIEW_OPS | {"Slice", "Gather", "GatherND", "GatherElements", "Pad", "Concat", "Split", "Tile", "Where",
                     "ScatterND", "ScatterElements", "Dropout"}  # fmt: skip
_ARITHMETIC = frozenset({"MatMul", "Einsum", "Mul", "Div", "Add", "Sub", "Neg", "Softmax", "ReduceSum", "Sum", "Cast"})
ANALYTIC = _MOVES | _ARITHMETIC
"""Operators that are analytic in their float inputs, given that indices, conditions and divisors are constants."""

_STEERING = {"Slice": 1, "Gather": 1, "GatherND": 1, "GatherElements": 1, "Pad": 1, "Tile": 1, "Reshape": 1,
             "Expand": 1, "Unsqueeze": 1, "Squeeze": 1, "Split": 1, "ReduceSum": 1, "Div": 1}  # fmt: skip
"""From which input on an operator's inputs must be constants for it to be analytic in the others."""

MAX_NODES = 4000

WHOLE = (TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8)
"""Types of an input that hides tokens."""


@dataclass(frozen=True, slots=True)
class Region:
    """``nodes`` in topological order compute ``output`` from ``entries``, each read as a rank-4 operand; ``mask`` names
    the input [batch, tokens] that hides tokens, empty without one. What is made of that alone is not among the nodes.
    """

    nodes: tuple[NodeProto, ...]
    entries: tuple[Operand, Operand, Operand]
    output: Operand
    mask: str = ""


def regions_around(index: GraphIndex, world: World, softmax: NodeProto) -> list[Region]:
    """The region that ``softmax`` lies in, once for each way to read its output and entries as rank-4 operands.

    Raises:
        Unsupported: there is none.
    """
    exit_value = _exit(index, world, softmax)
    nodes, entries = _back(index, world, exit_value)
    masks = {v: source for v in entries if (source := mask_input(index, v)) is not None}
    entries = [v for v in entries if v not in masks]
    odd = [v for v in entries if index.data_inputs(v) <= set(masks.values())]
    if odd and len(entries) - len(odd) == 3:
        source = next(iter(masks.values()))
        raise Unsupported("padding-enters", f"padding from '{source}' enters the pieces as '{odd[0]}', which is not "
                          "followed element by element")  # fmt: skip
    if len(entries) != 3:
        raise Unsupported(
            "probe-region", f"the region around the softmax starts at {len(entries)} values, not at three"
        )
    inside = {id(n) for n in nodes}
    found: list[Region] = []
    reason = Unsupported("probe-region", "no rank-4 value with tokens and heads apart holds the output")
    for output in _output_homes(index, world, exit_value, inside):
        try:
            found.append(_region(index, world, entries, inside, output, masks))
        except Unsupported as error:
            reason = error
    if not found:
        raise reason
    return found


def _region(
    index: GraphIndex, world: World, entries: list[str], inside: set[int], output: Operand, masks: dict[str, str]
) -> Region:  # fmt: skip
    homes = [_home(index, world, entry, inside, output) for entry in entries]
    starts = {h.value for h in homes}
    nodes = between(index, output.value, starts)
    nodes.sort(key=lambda n: index.position[id(n)])
    mask = _mask_of(world, homes, masks)
    if mask:
        nodes = _through(nodes, starts)
        check_paths(index, world, tuple(nodes), starts, masks)
    check_private(index, nodes, output.value)
    return Region(tuple(nodes), (homes[0], homes[1], homes[2]), output, mask)


def _through(nodes: list[NodeProto], starts: set[str]) -> list[NodeProto]:
    """Those of ``nodes`` (in topological order) that depend on ``starts``."""
    reached = set(starts)
    kept = []
    for node in nodes:
        if reached & set(node.input):
            reached.update(o for o in node.output if o)
            kept.append(node)
    return kept


def _mask_of(world: World, homes: list[Operand], masks: dict[str, str]) -> str:
    """The one input that all ``masks`` are made of, [batch, tokens]; empty without a mask."""
    sources = list(dict.fromkeys(masks.values()))
    if not sources:
        return ""
    if any(world.types.get(s) not in WHOLE for s in sources):
        raise Unsupported("padding-enters", f"padding from '{sources[0]}' enters the pieces as floats, which may hold "
                          "anything", "export with a mask of whole numbers or bools")  # fmt: skip
    sizes = {(world.shapes[h.value][0], world.shapes[h.value][h.layout.index("N")]) for h in homes}
    if len(sizes) != 1 or len(sources) > 1 or world.shapes.get(sources[0]) not in sizes:
        named = ", ".join(f"'{s}' {list(world.shapes.get(s, ()))}" for s in sources)
        raise Unsupported("padding-enters", f"padding from {named} enters the pieces beside queries, keys and values, "
                          "and is not one input of batch and tokens")  # fmt: skip
    return sources[0]


def is_analytic(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether ``node`` is analytic in those of its inputs that carry data, and is not a projection by weights."""
    kind = node.op_type
    if node.domain not in ("", "ai.onnx") or kind not in ANALYTIC:
        return False
    data = [bool(v) and bool(index.data_inputs(v)) for v in node.input]
    floats = [world.types.get(v) in FLOATS for v in (*node.input[:1], *node.output[:1])]
    if kind == "Where":
        return not data[0]
    if kind == "Dropout" and not is_idle_dropout(index, world, node):
        return False
    if kind in ("ScatterND", "ScatterElements"):
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        return not data[1] and reduction in ("none", "add")
    if kind == "MatMul" and data.count(True) == 1:
        return False
    if not all(floats):
        return False
    return not any(data[_STEERING.get(kind, len(data)) :])


def _exit(index: GraphIndex, world: World, softmax: NodeProto) -> str:
    """The one value that leaves the analytic nodes after ``softmax``."""
    seen: set[int] = set()
    leaving: dict[str, None] = {}
    stack = [softmax.output[0]]
    while stack:
        value = stack.pop()
        if value in index.outputs:
            leaving[value] = None
        for reader in index.consumers.get(value, []):
            if reader.op_type == "Shape" or id(reader) in seen:
                continue
            if not (is_analytic(index, world, reader) or is_gate(index, reader)):
                leaving[value] = None
                continue
            seen.add(id(reader))
            stack += [o for o in reader.output if o]
        if len(seen) > MAX_NODES or len(leaving) > 1:
            break
    if len(leaving) != 1:
        raise Unsupported("probe-region", "the softmax's results leave the region at more than one value")
    return next(iter(leaving))


def _back(index: GraphIndex, world: World, value: str) -> tuple[list[NodeProto], list[str]]:
    """The analytic nodes that ``value`` is made by, and the values where they begin, in the order of the graph."""
    nodes: dict[int, NodeProto] = {}
    entries: dict[str, None] = {}
    stack = [value]
    while stack:
        name = stack.pop()
        if not index.data_inputs(name):
            continue
        node = index.producer.get(name)
        inner = node is not None and (is_analytic(index, world, node) or is_gate(index, node))
        if node is None or not inner or adds_bias(index, world, node):
            entries[name] = None
            continue
        if id(node) in nodes:
            continue
        nodes[id(node)] = node
        if len(nodes) > MAX_NODES:
            raise Unsupported("probe-region", f"the region around the softmax has more than {MAX_NODES} nodes")
        stack += [v for v in node.input if v]
    made = {v: index.position[id(index.producer[v])] for v in entries if v in index.producer}
    return list(nodes.values()), sorted(entries, key=lambda v: made.get(v, -1))


def adds_bias(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether ``node`` adds the bias of a projection: it belongs to the projection."""
    if node.op_type != "Add":
        return False
    for source, bias in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        before = index.producer.get(source)
        constant = not index.data_inputs(bias) and len(world.shapes.get(bias, (0, 0))) == 1
        if constant and before is not None and before.op_type == "MatMul" and not is_analytic(index, world, before):
            return True
    return False


def _home(index: GraphIndex, world: World, entry: str, inside: set[int], output: Operand) -> Operand:
    """The last rank-4 value that everything in the region reads ``entry`` through.

    Raises:
        Unsupported: there is none with tokens and heads apart.
    """
    found: Operand | None = None
    value = entry
    while True:
        layout = _layout(world, value, output)
        if layout is not None:
            found = Operand(value, layout)
        readers = [n for n in index.consumers.get(value, []) if id(n) in inside and n.op_type != "Shape"]
        if len(readers) != 1 or not _passes_on(index, world, readers[0], value):
            break
        value = readers[0].output[0]
    if found is None:
        raise Unsupported("probe-region", f"no rank-4 value with tokens and heads apart holds '{entry}'")
    return found


def _passes_on(index: GraphIndex, world: World, node: NodeProto, value: str) -> bool:
    """Whether ``node`` only reshapes ``value`` or multiplies it by a number."""
    if node.op_type in VIEW_OPS:
        return bool(node.input[0] == value)
    if node.op_type not in ("Mul", "Div") or world.shapes.get(node.output[0]) != world.shapes.get(value):
        return False
    others = [v for v in node.input if v != value]
    return (
        len(others) == 1 and world.scalar(others[0]) is not None and (node.op_type == "Mul" or node.input[0] == value)
    )


def _output_homes(index: GraphIndex, world: World, value: str, inside: set[int]) -> list[Operand]:
    """The rank-4 values that the region's end is a view of, in both layouts, the deepest first."""
    stages = [value]
    while (node := index.producer.get(stages[-1])) is not None and id(node) in inside and node.op_type in VIEW_OPS:
        stages.append(node.input[0])
    layouts: tuple[Layout, Layout] = ("BNHD", "BHND")
    return [Operand(v, x) for v in stages[::-1] if len(world.shapes.get(v, ())) == 4 for x in layouts]


def _layout(world: World, value: str, output: Operand) -> Layout | None:
    """How ``value`` holds the same batch entries and heads as the output; None where it does not, or could be both."""
    shape, out = world.shapes.get(value, ()), world.shapes[output.value]
    batch, heads = out[0], out[output.layout.index("H")]
    if len(shape) != 4 or shape[0] != batch or (shape[1] == heads) == (shape[2] == heads):
        return None
    return "BNHD" if shape[2] == heads else "BHND"


def between(index: GraphIndex, end: str, starts: set[str]) -> list[NodeProto]:
    nodes: dict[int, NodeProto] = {}
    stack = [end]
    while stack:
        name = stack.pop()
        node = index.producer.get(name)
        if name in starts or node is None or id(node) in nodes or not index.data_inputs(name):
            continue
        nodes[id(node)] = node
        stack += [v for v in node.input if v]
    return list(nodes.values())


def check_private(index: GraphIndex, nodes: list[NodeProto], end: str) -> None:
    ids = {id(n) for n in nodes}
    for node in nodes:
        for output in (o for o in node.output if o and o != end):
            outside = [n for n in index.consumers.get(output, []) if not dies(index, n, ids)]
            if output in index.outputs or outside:
                reader = "an output of the model" if output in index.outputs else f"read by '{node_name(outside[0])}'"
                raise Unsupported("scores-used", f"the inner value '{output}' of the region is also {reader}")
