"""The piece of graph of a chunked linear attention: from queries, keys and values of all tokens to their output."""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import Layout, Operand
from attncompile.passes.detect.probed.region import Region, adds_bias, between, check_private, is_analytic
from attncompile.passes.evaluate import GraphIndex, World

MAX_NODES = 2000
"""Chunks that were unrolled are a dozen nodes each."""

_MAX_OUTPUTS = 48
"""Values after the first product that are tried as the output."""

_MAX_STATE = 1 << 22

_JOINS = frozenset({"Concat", "Add", "Sum", "ScatterND", "ScatterElements"})
"""Operators that put the results of several chunks together."""

_CHOOSES = frozenset({"Split", "Slice", "Gather"})


def linear_regions(index: GraphIndex, world: World, product: NodeProto) -> list[Region]:
    """Regions that hold ``product``, the largest first; their entries are in no particular order.

    Raises:
        Unsupported: there is none.
    """
    reason = Unsupported("probe-region", "no value after the product is computed from three rank-4 values alone")
    found: list[Region] = []
    for value in _after(index, world, product)[:_MAX_OUTPUTS]:
        if len(world.shapes.get(value, ())) != 4:
            continue
        try:
            nodes, entries = _back(index, world, value)
            for layout in ("BNHD", "BHND"):
                found += _region(index, world, nodes, entries, Operand(value, layout))
        except Unsupported as error:
            reason = error
        if found:
            _check_whole(index, value)
            return found
    raise reason


def _check_whole(index: GraphIndex, value: str) -> None:
    """One chunk is not the whole: its result is put together with others.

    Raises:
        Unsupported: ``value`` is the result of a chunk.
    """
    while len(readers := [n for n in index.consumers.get(value, []) if n.op_type != "Shape"]) == 1:
        (node,) = readers
        if sum(bool(index.data_inputs(v)) for v in node.input if v) > 1 or not node.output:
            if node.op_type in _JOINS:
                raise Unsupported("chunked", f"'{node.output[0]}' joins the result to those of other tokens")
            return
        value = node.output[0]


def _linear(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether ``node`` is a polynomial or a quotient of its inputs."""
    if node.domain in ("", "ai.onnx") and node.op_type in ("CumSum", "Trilu"):
        return not any(index.data_inputs(v) for v in node.input[1:] if v)
    if node.op_type == "Div" and node.domain in ("", "ai.onnx"):
        return True
    if node.domain in ("", "ai.onnx") and node.op_type == "MatMul" and _times_zero(index, world, node):
        return True
    return node.op_type != "Softmax" and is_analytic(index, world, node) and not _gates_itself(index, world, node)


def _times_zero(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether ``node`` multiplies by zeros: the state before the first chunk, and no projection."""
    for value in node.input:
        if not index.data_inputs(value) and value in world.shapes and prod(world.shapes[value]) <= _MAX_STATE:
            return not world.value(value).any()
    return False


def _gates_itself(index: GraphIndex, world: World, node: NodeProto) -> bool:
    """Whether ``node`` multiplies a value by a function of that same value, as SiLU does: a feature map."""
    if node.op_type != "Mul":
        return False
    for value, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        maker = index.producer.get(other)
        if maker is not None and value in maker.input and not is_analytic(index, world, maker):
            return True
    return False


def _after(index: GraphIndex, world: World, product: NodeProto) -> list[str]:
    """What is computed from ``product`` alone and with other activations, the last value first."""
    seen = {id(product): product}
    stack = [product]
    while stack:
        for output in stack.pop().output:
            for reader in index.consumers.get(output, []):
                if id(reader) not in seen and reader.op_type != "Shape" and _linear(index, world, reader):
                    seen[id(reader)] = reader
                    stack.append(reader)
        if len(seen) > MAX_NODES:
            raise Unsupported("probe-region", f"more than {MAX_NODES} nodes follow the product")
    ordered = sorted(seen.values(), key=lambda n: -index.position[id(n)])
    return [o for n in ordered for o in n.output if o]


def _back(index: GraphIndex, world: World, value: str) -> tuple[list[NodeProto], list[str]]:
    """The nodes that ``value`` is made by, in topological order, and the values where they begin."""
    nodes: dict[int, NodeProto] = {}
    entries: dict[str, None] = {}
    stack = [value]
    while stack:
        name = stack.pop()
        node = index.producer.get(name)
        if not index.data_inputs(name):
            continue
        if node is None or not _linear(index, world, node) or adds_bias(index, world, node):
            entries[name] = None
        elif id(node) not in nodes:
            nodes[id(node)] = node
            stack += [v for v in node.input if v]
        if len(nodes) > MAX_NODES or len(entries) > 3:
            raise Unsupported("probe-region", f"'{value}' is computed from more than three values")
    return sorted(nodes.values(), key=lambda n: index.position[id(n)]), list(entries)


def _region(
    index: GraphIndex, world: World, nodes: list[NodeProto], entries: list[str], output: Operand
) -> list[Region]:
    """One region, or none where the sizes of ``output`` in its layout fit no entry."""
    starts = _branches(index, nodes, entries)
    homes = [_home(world, _cuts(index, nodes, starts, s, output.value), output) for s in starts]
    if len(homes) != 3 or any(h is None for h in homes):
        return []
    first, second, third = (h for h in homes if h is not None)
    inner = between(index, output.value, {first.value, second.value, third.value})
    check_private(index, inner, output.value)
    inner.sort(key=lambda n: index.position[id(n)])
    return [Region(tuple(inner), (first, second, third), output)]


def _branches(index: GraphIndex, nodes: list[NodeProto], entries: list[str]) -> list[str]:
    """The entries; fewer than three are followed to where they are split into queries, keys and values."""
    inside = {id(n) for n in nodes}
    starts = list(entries)
    while len(starts) < 3:
        for at, start in enumerate(starts):
            parts = _parts(index, inside, start)
            if parts and len(starts) - 1 + len(parts) <= 3:
                starts[at : at + 1] = parts
                break
        else:
            raise Unsupported("probe-region", f"the region starts at {len(starts)} values, not at three")
    return starts


def _parts(index: GraphIndex, inside: set[int], value: str) -> list[str]:
    """What ``value`` is split into after views; nothing where it is read in another way."""
    while True:
        readers = [n for n in index.consumers.get(value, []) if id(n) in inside and n.op_type != "Shape"]
        if len(readers) == 1 and readers[0].op_type == "Split":
            return [o for o in readers[0].output if any(id(n) in inside for n in index.consumers.get(o, []))]
        if len(readers) > 1:
            chosen = all(n.op_type in _CHOOSES and n.input[0] == value for n in readers)
            return [n.output[0] for n in readers] if chosen else []
        if not readers or sum(bool(index.data_inputs(v)) for v in readers[0].input if v) != 1:
            return []
        value = readers[0].output[0]


def _cuts(index: GraphIndex, nodes: list[NodeProto], starts: list[str], start: str, end: str) -> list[str]:
    """The values made of ``start`` alone that all the rest of the region reads it through, the first one first."""
    sources: dict[str, frozenset[str]] = {s: frozenset({s}) for s in starts}
    ways: dict[str, list[str]] = {start: [start]}
    through: list[str] | None = None
    for node in nodes:
        data = [v for v in node.input if v in sources]
        if not data or any(o in starts for o in node.output):
            continue
        origin = frozenset[str]().union(*(sources[v] for v in data))
        pure = origin == {start} and end not in node.output
        for output in node.output:
            sources[output] = origin
            if pure:
                ways[output] = [*_common([ways[v] for v in data]), output]
        if not pure:
            for value in data:
                if value in ways:
                    through = ways[value] if through is None else _common([through, ways[value]])
    return through or []


def _common(ways: list[list[str]]) -> list[str]:
    kept = set(ways[0]).intersection(*ways[1:])
    return [v for v in ways[0] if v in kept]


def _home(world: World, values: list[str], output: Operand) -> Operand | None:
    """The last of ``values`` that holds the output's batch entries, heads and tokens; before a channel of ones is
    joined to it.
    """
    sizes = dict(zip(output.layout, world.shapes[output.value], strict=True))
    wanted: dict[Layout, tuple[int, ...]] = {
        "BNHD": (sizes["B"], sizes["N"], sizes["H"]), "BHND": (sizes["B"], sizes["H"], sizes["N"])
    }  # fmt: skip
    found: list[Operand] = []
    for value in reversed(values):
        shape = world.shapes.get(value, ())
        layouts = [x for x, want in wanted.items() if len(shape) == 4 and shape[:3] == want]
        if len(layouts) == 1:
            found.append(Operand(value, layouts[0]))
    widths = [world.shapes[o.value][3] for o in found]
    if widths and widths[0] == sizes["D"] + 1 and sizes["D"] in widths:
        return found[widths.index(sizes["D"])]
    return found[0] if found else None
