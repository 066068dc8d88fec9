"""What an operator of ``com.microsoft`` holds that is no value of the graph, and whether it can be written out.

Projections, biases, packed operands and masks of integers lie inside the operator or in one tensor, where a site, whose
operands are values of the graph, cannot name them. The operator's own definition says which nodes compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import AttributeProto, NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import World


class Fused(Unsupported):
    """The operator whose first named output is ``output`` is a site once it is written out."""

    def __init__(self, reason: str, output: str) -> None:
        super().__init__("fused-op", reason)
        self.output = output


def inputs_of(node: NodeProto) -> list[str]:
    """The node's inputs, with empty names for those left out."""
    return [*node.input, *([""] * 20)]


def attributes_of(node: NodeProto) -> dict[str, AttributeProto]:
    return {a.name: a for a in node.attribute}


def whole(node: NodeProto, name: str, default: int = 0) -> int:
    """An attribute that is a whole number."""
    found = attributes_of(node).get(name)
    return int(found.i) if found is not None else default


def hidden_sizes(node: NodeProto) -> list[int]:
    """Widths of query, key and value of ``Attention``; empty where they are thirds of the weights."""
    found = attributes_of(node).get("qkv_hidden_sizes")
    return [int(n) for n in found.ints] if found is not None else []


def shape_of(world: World, value: str) -> tuple[int, ...]:
    """The shape at the world's sizes. Raises ``Unsupported`` where it is not known."""
    shape = world.shapes.get(value)
    if shape is None:
        raise Unsupported("shape-unknown", f"the shape of '{value}' is not known")
    return tuple(shape)


def check_attention(world: World, node: NodeProto) -> None:
    """``Attention``: input, weights, bias, mask_index, past, attention_bias, past_sequence_length.

    Raises:
        Unsupported: what it does beyond projections and attention, or a mask of another form.
    """
    given = inputs_of(node)
    heads = whole(node, "num_heads")
    if whole(node, "do_rotary"):
        raise Unsupported("fused-op", "it rotates queries and keys (RoPE) inside")
    if whole(node, "past_present_share_buffer") or given[6]:
        raise Unsupported("fused-op", "its past and present caches share one buffer")
    x, weights, sizes = shape_of(world, given[0]), shape_of(world, given[1]), hidden_sizes(node)
    widths = sizes or [weights[-1] // 3] * 3
    fits = len(x) == 3 and len(weights) == 2 and len(widths) == 3 and sum(widths) == weights[1]
    if not fits or heads <= 0 or any(w % heads for w in widths) or widths[0] != widths[1]:
        raise Unsupported("layout", f"weights {list(weights)} of widths {widths} are no projections to {heads} heads")
    past = shape_of(world, given[4])[3] if given[4] and len(shape_of(world, given[4])) == 5 else 0
    if given[4] and len(shape_of(world, given[4])) != 5:
        raise Unsupported("kv-cache", f"the past '{given[4]}' is not [2, batch, heads, sequence, dim]")
    if given[3]:
        shape, keys = shape_of(world, given[3]), x[1] + past
        if shape not in ((x[0],), (x[0], keys), (x[0], x[1], keys)):
            raise Unsupported("mask-shape", f"mask_index '{given[3]}' {list(shape)} is not lengths [batch], nor "
                              "[batch, keys], nor [batch, queries, keys]")  # fmt: skip


def packed_or_biased(world: World, node: NodeProto) -> Sequence[str]:
    """What a ``MultiHeadAttention`` node holds that no value of the graph is, in words.

    Raises:
        Unsupported: it cannot be written out.
    """
    query, key, value, bias, mask = inputs_of(node)[:5]
    heads, shape, found = whole(node, "num_heads"), shape_of(world, query), []
    if not key or not value:
        packed, parts, words = (key, 2, "keys and values") if key else (query, 3, "queries, keys and values")
        five = shape_of(world, packed)
        if len(five) != 5 or five[2:4] != (heads, parts):
            raise Unsupported("layout", f"'{packed}' {list(five)} is not [batch, sequence, {heads}, {parts}, dim]")
        found.append(f"{words} lie in one packed tensor")
    if bias:
        ranks = {len(shape_of(world, v)) for v in (query, key, value) if v}
        if 4 in ranks:
            raise Unsupported("layout", "it adds a bias inside, and its keys come as [batch, heads, sequence, dim]")
        found.append("it adds a bias to queries, keys and values inside")
    if mask and len(shape_of(world, mask)) < 3:
        keys = shape_of(world, mask)
        if keys[0] != shape[0]:
            raise Unsupported("mask-shape", f"key_padding_mask '{mask}' has shape {list(keys)}")
        found.append("its padding mask is integers, and what it adds to the scores is made inside")
    return found


def check_packed_groups(world: World, node: NodeProto) -> None:
    """``GroupQueryAttention`` with queries, keys and values in one tensor [batch, sequence, all heads * dim].

    Raises:
        Unsupported: the width is not that of whole heads.
    """
    shape = shape_of(world, node.input[0])
    heads = whole(node, "num_heads") + 2 * whole(node, "kv_num_heads")
    if len(shape) != 3 or heads <= 0 or shape[2] % heads:
        raise Unsupported("layout", f"'{node.input[0]}' {list(shape)} is not [batch, sequence, {heads} heads * dim]")
