"""Blocks that a head leaves out, met by means of their keys and values (``PATTERN rest 16``).

The means stand in front of a site's keys, filled up to whole blocks of keys, and are listed like keys: a row's blocks
of means are partial ones whose masks show the means of the blocks that it leaves out, each counting ``size`` times
(``counts`` of the op). So one softmax runs over both, and the op and its kernels know nothing of it.

Multiresolution attention, arXiv:2207.10284, with two scales and blocks that are chosen offline or by ``BlockSelect``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto, helper

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite, Operand
from attncompile.plugins.body import Body, float_type, in_graph

_WORD = 32


@dataclass(frozen=True, slots=True)
class Rest:
    """Means of ``size`` keys each, of the first ``blocks`` blocks of ``edge`` keys."""

    size: int
    blocks: int
    edge: int

    @staticmethod
    def of(size: int, geometry: BlockGeometry) -> Rest:
        """Of all whole blocks. Raises ``Unsupported`` for a size that does not divide them."""
        geometry.check_mean(size)
        return Rest(size, geometry.tokens // geometry.edge, geometry.edge)

    @property
    def of_block(self) -> int:
        """Means of one block."""
        return self.edge // self.size

    @property
    def means(self) -> int:
        return self.blocks * self.of_block

    @property
    def tiles(self) -> int:
        """Blocks of keys that they fill, in front of the site's own."""
        return -(-self.means // self.edge)

    @property
    def keys(self) -> int:
        return self.tiles * self.edge

    def shown(self, averaged: np.ndarray) -> np.ndarray:
        """Bool [.., C] of blocks -> bool [.., tiles, edge] of means."""
        bits = np.repeat(averaged[..., : self.blocks], self.of_block, axis=-1)
        out = np.zeros((*bits.shape[:-1], self.keys), bool)
        out[..., : self.means] = bits
        return out.reshape(*bits.shape[:-1], self.tiles, self.edge)


def size_of(texts: Sequence[str], geometry: BlockGeometry, padded: bool) -> int:
    """Of how many keys the heads of one site have means, 0 where none has any.

    Raises:
        Unsupported: heads that do not go together, or beside padding.
    """
    patterns = [BlockPattern(text) for text in texts]
    sizes = {p.rest for p in patterns if p.rest}
    if not sizes:
        return 0
    if len(sizes) > 1:
        raise Unsupported("pattern", "heads of one site with means of " + " and ".join(map(str, sorted(sizes))) +
                          " keys", "give all of them one size behind rest")  # fmt: skip
    if padded:
        raise Unsupported("pattern", "means of keys beside padding, which would be among them", "leave the rest out")
    if any(p.kind == "mean" for p in patterns):
        raise Unsupported("pattern", "a head that averages all values beside heads with means of the rest",
                          "write sinks 0 window 0 rest SIZE in place of mean")  # fmt: skip
    (size,) = sizes
    geometry.check_mean(size)
    return size


def in_front(site: AttentionSite, rest: Rest, opset: int) -> tuple[list[NodeProto], AttentionSite]:
    """Nodes that put the means before the site's keys and values, and the site that reads those."""
    base = f"{site.output.value}/rest"
    body = Body(opset)
    operands = {
        name: Operand(_joined(body, name, operand, dim, site, rest), operand.layout)
        for name, operand, dim in (("key", site.key, site.head_dim), ("value", site.value, site.value_dim))
    }
    nodes = in_graph(body, base, {"key": site.key.value, "value": site.value.value})
    made = {name: Operand(f"{base}/{operand.value}", operand.layout) for name, operand in operands.items()}
    return nodes, replace(site, key=made["key"], value=made["value"])


def listed(body: Body, rest: Rest, geometry: BlockGeometry) -> dict[str, str]:
    """``rows``, ``columns``, ``kinds`` and ``masks`` as ``BlockSelect`` gives them, of keys without means -> these and
    ``counts`` for keys with the means in front: every row begins with its ``tiles`` blocks of means.
    """
    op, ints, count, tiles = body.op, body.ints, geometry.count, rest.tiles
    spans = op("Cast", op("Reshape", "rows", ints(-1, 3)), to=TensorProto.INT64)  # [n, 3], n rows of all heads
    first, end = (op("Slice", spans, ints(i), ints(i + 1), ints(1)) for i in (0, 2))
    room = op("Cast", op("Reshape", "columns", ints(-1, count)), to=TensorProto.INT64)  # [n, C]
    there = op("Less", body.constant(np.arange(count)), op("Sub", end, first))
    room = op("Where", there, room, op("Slice", room, ints(0), ints(1), ints(1)))  # what is not written is anything
    shape = op("Shape", room)
    met = op("ScatterElements", op("ConstantOfShape", shape, value=_zero(TensorProto.INT64)), room,
             op("Expand", ints(1), shape), axis=1)  # fmt: skip
    met = op("Reshape", op("Equal", met, body.scalar(0)), ints(-1, count, count))
    averaged = op("And", met, body.constant(geometry.averaged))
    averaged = op("Slice", averaged, ints(0), ints(rest.blocks), ints(2))
    bits = op("Cast", op("Reshape", averaged, ints(-1, rest.blocks, 1)), to=TensorProto.INT32)
    bits = op("Reshape", op("Expand", bits, ints(1, 1, rest.of_block)), ints(-1, rest.means))
    if rest.keys > rest.means:
        bits = op("Pad", bits, ints(0, 0, 0, rest.keys - rest.means))
    # Two halves of 16 bits, the upper one with a sign: a runtime that adds up integers in float32, as ONNX Runtime's
    # CUDA provider does, has them exactly, and 32 bits it has not.
    half = 1 << np.arange(_WORD // 2)
    place = body.constant(np.stack([half, np.where(half == half[-1], -half, half)]).astype(np.int32))
    bits = op("Reshape", bits, ints(-1, rest.edge // _WORD, 2, _WORD // 2))
    halves = op("ReduceSum", op("Mul", bits, place), ints(3), keepdims=0)
    low, high = (op("Gather", halves, body.scalar(i), axis=2) for i in range(2))
    words = op("Add", low, op("Mul", high, body.constant(np.array(1 << 16, np.int32))))  # [n * tiles, e / 32]
    words = op("Expand", op("Unsqueeze", words, ints(1)), ints(1, rest.edge, 1))
    rows = op("Shape", op("Squeeze", first, ints(1)))  # [1]
    number = op("Range", body.scalar(0), op("Squeeze", rows), body.scalar(1))
    start = op("Unsqueeze", op("Mul", number, ints(tiles)), ints(1))  # [n, 1]
    moved = op("Add", spans, op("Add", start, ints(0, tiles, tiles)))
    tile = body.constant(np.arange(tiles))
    front = op("Expand", tile, op("Concat", rows, ints(1), axis=0))
    columns = op("Concat", front, op("Add", room, ints(tiles)), axis=1)
    kinds = op("Cast", op("Reshape", "kinds", ints(-1, count)), to=TensorProto.INT64)
    kinds = op("Concat", op("Add", start, op("Add", tile, ints(1))), kinds, axis=1)
    times = body.constant(np.repeat(np.array([rest.size, 1], np.int32), [tiles, count]))
    times = op("Expand", times, op("Concat", rows, ints(1), axis=0))

    def flat(value: str) -> str:
        return op("Cast", op("Reshape", value, ints(-1)), to=TensorProto.INT32)

    return {
        "rows": op("Reshape", op("Cast", moved, to=TensorProto.INT32), op("Shape", "rows")),
        "columns": flat(columns), "kinds": flat(kinds), "masks": op("Concat", "masks", words, axis=0),
        "counts": op("Reshape", times, ints(-1)),
    }  # fmt: skip


def _zero(element: int) -> TensorProto:
    return helper.make_tensor("zero", element, [1], [0])


def _joined(body: Body, value: str, operand: Operand, dim: int, site: AttentionSite, rest: Rest) -> str:
    axis = operand.layout.index("N")
    whole = value
    if rest.blocks * rest.edge != site.key_length:
        whole = body.op("Slice", value, body.ints(0), body.ints(rest.blocks * rest.edge), body.ints(axis))
    cut = [rest.means, rest.size]
    cut = [*cut, site.kv_heads] if axis == 1 else [site.kv_heads, *cut]
    # A share of each token before the sum: a sum of half numbers may be too large for its type.
    share = body.constant(np.array(1 / rest.size, float_type(site.dtype)[1]))
    tokens = body.op("Mul", body.op("Reshape", whole, body.ints(0, *cut, dim)), share)
    means = body.op("ReduceSum", tokens, body.ints(axis + 1), keepdims=0)
    missing = rest.keys - rest.means
    if missing:
        means = body.op("Pad", means, body.ints(*[0] * (4 + axis), missing, *[0] * (3 - axis)))
    return body.op("Concat", means, value, axis=axis)
