"""One site out of the chunks of a linear attention, shown by running them."""

from __future__ import annotations

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.linear import LinearFacts
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.detect import linear
from attncompile.passes.detect.linear_chain import context_of
from attncompile.passes.detect.probed.lift import digest, runner, session_of
from attncompile.passes.detect.probed.linear_reading import LinearReading, read_linear
from attncompile.passes.detect.probed.linear_region import linear_regions
from attncompile.passes.detect.probed.region import Region
from attncompile.passes.detect.softmax import MaskAnalysis, dtype_name
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

FORM = "probed linear-chunked"

_SHOWN = "the weight of every key read by running the chunks, which equal linear attention on random inputs"

_IN_CHUNKS = frozenset({"chunked", "normaliser"})
"""Reasons of the first look after which the product may be a part of chunks."""

MAX_TOKENS = 8192
"""More tokens than this are not looked at one by one."""


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite | None:
    """The site whose last product is ``node``, or whose chunks it is a part of; None where it is no such product.

    Raises:
        Unsupported: it is a product of queries, keys and values, or nearly, in a form that is not understood.
    """
    try:
        return linear.lift(index, world, node, analyse)
    except Unsupported as error:
        if error.code not in _IN_CHUNKS:
            raise
        first = error
    try:
        site = _lift(index, world, node)
    except Unsupported as error:
        if first.code != "chunked":
            raise first from error
        raise Unsupported("chunked", f"{first.message}; run as a whole: {error.message}") from error
    if first.code == "normaliser" and (site.linear is None or site.linear.normaliser == "none"):
        raise first  # the numerator of a quotient that was not understood
    return site


def _lift(index: GraphIndex, world: World, node: NodeProto) -> AttentionSite:
    known = world.kept.setdefault("linear chunks", {})
    assert isinstance(known, dict)
    last: Unsupported | None = None
    for region in linear_regions(index, world, node):
        _check_fixed(index, world, region)
        key = digest(index, world, region)
        if key not in known:
            known[key] = _read(index, world, region)
        if isinstance(known[key], LinearReading):
            return _site(world, region, known[key])
        last = last or known[key]
    assert last is not None
    raise last


def _check_fixed(index: GraphIndex, world: World, region: Region) -> None:
    """What is read at one size says nothing about another."""
    if dtype_name(world, region.output.value) != "float32":
        raise Unsupported("probe", "only float32 can be told apart finely enough by running it")
    for other in context_of(index, world).others():
        for operand in (*region.entries, region.output):
            if other.shapes.get(operand.value) != world.shapes[operand.value]:
                raise Unsupported("probe", f"the size of '{operand.value}' is dynamic, and chunks are run at one size")
        if digest(index, other, region) != digest(index, world, region):
            raise Unsupported("probe", "constants of the chunks change with a dynamic dimension")


def _read(index: GraphIndex, world: World, region: Region) -> LinearReading | Unsupported:
    batch, heads, tokens, _ = _sizes(world, region.output)
    if tokens > MAX_TOKENS:
        return Unsupported("too-large", f"{tokens} tokens are too many to be looked at one by one")
    widths = [_sizes(world, e)[3] for e in region.entries]
    try:
        run = runner(session_of(index, world, region), region)
        return read_linear(run, batch, heads, tokens, (widths[0], widths[1], widths[2]))
    except Unsupported as error:
        return error


def _sizes(world: World, operand: Operand) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, width."""
    sizes = dict(zip(operand.layout, world.shapes[operand.value], strict=True))
    return sizes["B"], sizes["H"], sizes["N"], sizes["D"]


def _site(world: World, region: Region, reading: LinearReading) -> AttentionSite:
    query, key, value = (region.entries[i] for i in reading.order)
    batch, heads, tokens, head_dim = _sizes(world, query)
    mask = MaskFacts()
    if reading.causal:
        certificate = Certificate("evaluated", _SHOWN, ((tokens, tokens),))
        mask = MaskFacts((MaskPart("causal", certificate, -1, 0),), "zero")
    return AttentionSite(
        id="", form=FORM, query=query, key=key, value=value, output=region.output, batch=batch, heads=heads,
        kv_heads=heads, head_dim=head_dim, value_dim=_sizes(world, region.output)[3], query_length=tokens,
        key_length=tokens, scale=reading.scale, mask=mask, kind="linear", dtype="float32", softmax_dtype="float32",
        nodes=tuple(node_name(n) for n in region.nodes),
        interior=tuple(o for n in region.nodes for o in n.output if o and o != region.output.value),
        linear=LinearFacts(
            "identity", "identity", "sum" if reading.normalised else "none", reading.epsilon, reading.causal,
            "chunked", decay="head" if reading.rates else "none", decay_rates=reading.rates,
        ),
    )  # fmt: skip
