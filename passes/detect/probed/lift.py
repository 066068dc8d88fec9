"""One site out of a region that was shown to be attention by running it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, ValueInfoProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.probed.padding import Padding, read_padding
from attncompile.passes.detect.probed.reading import Reading, check_logits, read
from attncompile.passes.detect.probed.region import Region, regions_around
from attncompile.passes.detect.probed.visible import Run, Sizes
from attncompile.passes.detect.softmax import dtype_name
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

FactsOf = Callable[[np.ndarray], MaskFacts]
"""What a mask is that shows each key so many times: uint8 [heads, query, key]."""

Check = Callable[[Region], None]
"""Raises ``Unsupported`` where a region must not be run: it has other sizes too."""

MAX_SCORES = 1 << 28
"""A region with more scores than this (12 heads of 4,700 tokens squared) is not run."""


class Readings:
    """What was read, by the region's text: layers that differ in names only are run once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Reading, Padding | None] | Unsupported] = {}

    def of(self, index: GraphIndex, world: World, region: Region) -> tuple[Reading, Padding | None]:
        """Raises ``Unsupported`` where the region is not attention."""
        key = digest(index, world, region)
        if key not in self._known:
            try:
                self._known[key] = _read(index, world, region)
            except Unsupported as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, Unsupported):
            raise found
        return found


def lift_probed(
    index: GraphIndex, world: World, softmax: NodeProto, readings: Readings, check: Check, facts_of: FactsOf
) -> AttentionSite:
    """The site that ``softmax`` is a part of; lengths are numbers, the id is empty.

    Raises:
        Unsupported: the softmax lies in no analytic region, or the region is not attention.
    """
    region, reading, padding = _first_read(index, world, regions_around(index, world, softmax), readings, check)
    query, key, value = region.entries
    sizes = dict(zip(query.layout, world.shapes[query.value], strict=True))
    keys = dict(zip(key.layout, world.shapes[key.value], strict=True))
    mask = facts_of(reading.counts)
    if padding is not None:
        mask = with_padding(mask, region.mask, padding)
    return AttentionSite(
        id="", form="probed analytic-region",
        query=query, key=key, value=value, output=region.output,
        batch=sizes["B"], heads=sizes["H"], kv_heads=keys["H"],
        head_dim=sizes["D"], value_dim=world.shapes[region.output.value][-1],
        query_length=sizes["N"], key_length=keys["N"], scale=reading.scale, mask=mask,
        dtype="float32", softmax_dtype="float32",
        nodes=tuple(node_name(n) for n in region.nodes),
        interior=tuple(o for n in region.nodes for o in n.output if o and o != region.output.value),
    )  # fmt: skip


def _first_read(
    index: GraphIndex, world: World, regions: list[Region], readings: Readings, check: Check
) -> tuple[Region, Reading, Padding | None]:  # fmt: skip
    """The first region that is attention, its entries in the order query, key, value.

    The values are the entry that reaches the output past every softmax.
    """
    last: Unsupported | None = None
    # The right way to read the axes is more often than not the one with the most tokens.
    for region in sorted(regions, key=lambda r: -_tokens(world, r)):
        check(region)
        if any(dtype_name(world, o.value) != "float32" for o in (*region.entries, region.output)):
            raise Unsupported("probe", "only float32 can be told apart finely enough by running it")
        reach = _past_softmax(region)
        values = [e for e in region.entries if e.value in reach]
        others = [e for e in region.entries if e.value not in reach]
        if len(values) != 1 or len(others) != 2:
            raise Unsupported(
                "probe-region", f"{len(values)} of the region's entries reach its output past the softmax"
            )
        ordered = replace(region, entries=(others[0], others[1], values[0]))
        try:
            reading, padding = readings.of(index, world, ordered)
        except Unsupported as error:
            last = last or error
            continue
        if reading.swapped:
            ordered = replace(region, entries=(others[1], others[0], values[0]))
        return ordered, reading, padding
    assert last is not None
    raise last


def _tokens(world: World, region: Region) -> int:
    return world.shapes[region.output.value][region.output.layout.index("N")]


def _past_softmax(region: Region) -> set[str]:
    """The values that the output is made of without a softmax on the way."""
    producer = {o: n for n in region.nodes for o in n.output}
    seen: set[str] = set()
    stack = [region.output.value]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        node = producer.get(name)
        if node is not None and node.op_type != "Softmax":
            stack += list(node.input)
    return seen


def _sizes(world: World, region: Region) -> Sizes:
    q, k, v, o = (
        dict(zip(x.layout, world.shapes[x.value], strict=True)) for x in (*region.entries, region.output)
    )  # fmt: skip
    same = q["B"] == k["B"] == v["B"] == o["B"] and q["H"] == k["H"] == v["H"] == o["H"]
    if not same or k["N"] != v["N"] or q["N"] != o["N"] or q["D"] != k["D"] or v["D"] != o["D"]:
        raise Unsupported("probe-region", "the operands' sizes do not fit together")
    if q["B"] * q["H"] * q["N"] * k["N"] > MAX_SCORES:
        raise Unsupported("too-large", f"{q['N']} queries and {k['N']} keys in {q['B'] * q['H']} heads are too many to "
                          "be looked at one by one")  # fmt: skip
    return Sizes(q["B"], q["H"], q["N"], k["N"], q["D"], v["D"])


def _read(index: GraphIndex, world: World, region: Region) -> tuple[Reading, Padding | None]:
    sizes = _sizes(world, region)
    logits = tuple(dict.fromkeys(n.input[0] for n in region.nodes if n.op_type == "Softmax"))
    session = session_of(index, world, region, logits)
    fixed: dict[str, np.ndarray] = {}
    if region.mask:
        dtype = helper.tensor_dtype_to_np_dtype(world.types[region.mask])
        fixed[region.mask] = np.ones(world.shapes[region.mask], dtype)
    check_logits(lambda q, k, v: _values(session, region, (q, k, v), logits, fixed), sizes)
    reading = read(runner(session, region, fixed), sizes)
    if not region.mask:
        return reading, None

    def masked(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        operands = (k, q, v) if reading.swapped else (q, k, v)
        wanted = (region.output.value, *logits)
        out, *scores = _values(session, region, operands, wanted, {region.mask: mask.astype(dtype)})
        return (out.swapaxes(1, 2) if region.output.layout == "BNHD" else out), scores

    try:
        padding = read_padding(masked, sizes, reading)
    except Unsupported as error:
        raise Unsupported("padding-enters", f"of the input '{region.mask}': {error.message}", error.hint) from error
    return reading, padding


def with_padding(mask: MaskFacts, source: str, padding: Padding) -> MaskFacts:
    """``mask`` with the padding that ``source`` [batch, tokens] says."""
    detail = f"from input {source}: masks that tell all tokens apart were run; each hides one key from every query"
    how = Certificate("evaluated", detail, mask.parts[0].certificate.lengths if mask.parts else ())
    part = MaskPart("padding", how, source=source, tokens=True)
    return MaskFacts((*mask.parts, part), padding.masked_rows, mask.fills, mask.guarded, zeroed=padding.zeroed)


def session_of(index: GraphIndex, world: World, region: Region, also: tuple[str, ...] = ()) -> ort.InferenceSession:
    """The region as a model of its own, its entries the inputs, with the values ``also`` among the outputs.

    Raises:
        Unsupported: ONNX Runtime does not take it.
    """
    nodes, stored = _whole(index, world, region)
    graph = helper.make_graph(
        nodes, "region",
        [helper.make_tensor_value_info(e.value, world.types[e.value], list(world.shapes[e.value]))
         for e in region.entries]
        + [helper.make_tensor_value_info(v, world.types[v], list(world.shapes[v])) for v in (region.mask,) if v],
        [ValueInfoProto(name=v) for v in (region.output.value, *also)], world.known_initializers(stored),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=index.model.proto.opset_import, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Indices of gigabytes are not computed ahead, and the nodes that run are those of the model.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own untyped errors
        raise Unsupported("not-evaluated", f"the region cannot be run: {' '.join(str(error).split())[:200]}") from None


def _whole(index: GraphIndex, world: World, region: Region) -> tuple[list[NodeProto], set[str]]:
    """The region's nodes with those that compute its indices and masks, and the constants that all of them read.

    Indices are written out element by element by some exporters: too large to be held here as values.
    """
    entries = {*(e.value for e in region.entries), region.mask}
    nodes: dict[int, NodeProto] = {}
    stored: set[str] = set()
    stack = [region.output.value]
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        if name in seen or name in entries:
            continue
        seen.add(name)
        if world.is_stored(name):
            stored.add(name)
            continue
        node = index.producer.get(name)
        if node is None:
            raise Unsupported("probe-region", f"the region reads the input '{name}'")
        nodes[id(node)] = node
        stack += [v for v in node.input if v]
    order = {id(n): i for i, n in enumerate(index.order)}
    return sorted(nodes.values(), key=lambda n: order[id(n)]), stored


def runner(session: ort.InferenceSession, region: Region, fixed: Mapping[str, np.ndarray] | None = None) -> Run:
    """Runs ``session`` on the region's entries, given and returned with heads before tokens, and ``fixed`` values."""

    def run(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        (out,) = _values(session, region, (q, k, v), (region.output.value,), fixed or {})
        return out.swapaxes(1, 2) if region.output.layout == "BNHD" else out

    return run


def _values(
    session: ort.InferenceSession, region: Region, entries: tuple[np.ndarray, ...], wanted: tuple[str, ...],
    fixed: Mapping[str, np.ndarray],
) -> list[np.ndarray]:  # fmt: skip
    """``wanted`` values, as they are in the graph, from entries with heads before tokens and ``fixed`` values."""
    feed = dict(fixed)
    for entry, array in zip(region.entries, entries, strict=True):
        feed[entry.value] = np.ascontiguousarray(array.swapaxes(1, 2) if entry.layout == "BNHD" else array)
    try:
        return [np.asarray(x) for x in session.run(list(wanted), feed)]
    except Exception as error:  # ONNX Runtime raises its own untyped errors
        reason = " ".join(str(error).split())[:200]
        raise Unsupported("not-evaluated", f"the region cannot be run: {reason}") from None


def digest(index: GraphIndex, world: World, region: Region) -> str:
    """Of everything in the region but the names of its values."""
    nodes, stored = _whole(index, world, region)
    tensors = {t.name: t for t in world.known_initializers(stored)}
    number: dict[str, int] = {}
    text = hashlib.sha256()
    for operand in (*region.entries, region.output):
        number.setdefault(operand.value, len(number))
        text.update(f"{operand.layout}{world.shapes[operand.value]}".encode())
    if region.mask:
        number.setdefault(region.mask, len(number))
        text.update(f"mask {world.types[region.mask]}{world.shapes[region.mask]}".encode())
    for node in nodes:
        text.update(f"\n{node.op_type} {len(node.input)} {len(node.attribute)} ".encode())
        for attribute in node.attribute:
            text.update(attribute.SerializeToString(deterministic=True) + b";")
        for value in (*node.input, *node.output):
            if value in tensors:
                tensor = tensors[value]
                text.update(f"{tensor.data_type}{list(tensor.dims)}".encode() + numpy_helper.to_array(tensor).tobytes())
            else:
                text.update(f"{number.setdefault(value, len(number))},".encode())
    return text.hexdigest()
