"""The function body of ``BlockSparseAttention`` for lists that ``BlockSelect`` makes: every row of every head has its
own, of one partial block at most, the first.

Rows are ordered by length and done in ``PIECES``, each padded to its longest row: what is computed grows with the
blocks that are listed, however they are spread over rows and heads. Means of what is not listed (``rest.py``) are met
by every row, behind its blocks; the row's first entries say which of them it sees.

Shapes in comments: B batch, H heads, G key heads, R rows of blocks, C blocks of keys, n = B * H * R, e edge of a block;
t rows of a piece, W entries of its longest; F means of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto

from attncompile.plugins.block_sparse.op import OP_TYPE, Form
from attncompile.plugins.block_sparse.rest import Rest
from attncompile.plugins.body import Body, attribute_names, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call

_END = np.iinfo(np.int64).max
PIECES = 8
"""Fewer of them pad more, more of them begin more products."""


def function(template: NodeProto, form: Form, call: Call, causal: bool, rest: Rest | None = None) -> FunctionProto:
    """A body in standard ops of ``call.opset`` of ``template``. ``causal``: the partial block is a row's own. ``rest``:
    of means in front of the keys, whose lists are as ``rest.listed`` makes them.
    """
    body = Body(call.opset)
    output = _Writer(body, form, call, causal, rest).write()
    doc = (
        f"{OP_TYPE} in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads and lists that are chosen"
    )
    return body.function(OP_TYPE, template.overload, form.formal, output, attribute_names(template), doc)


@dataclass(frozen=True, slots=True)
class _Writer:
    body: Body
    form: Form
    call: Call
    causal: bool
    rest: Rest | None

    def op(self, name: str, *inputs: str, **attributes: Any) -> str:
        return self.body.op(name, *inputs, **attributes)

    def ints(self, *values: int) -> str:
        return self.body.ints(*values)

    def write(self) -> str:
        call = self.call
        query = parts.scaled(self.body, call, parts.heads_first(self.body, "query", call.layouts[0]))
        key = parts.heads_first(self.body, "key", call.layouts[1])
        value = parts.heads_first(self.body, "value", call.layouts[2])
        means: tuple[str, ...] = ()
        if self.rest is not None:
            means = tuple(self._means(x, d) for x, d in ((key, call.head_dim), (value, call.value_dim)))
            key, value = (
                self.op("Slice", x, self.ints(self.rest.keys), self.ints(_END), self.ints(2)) for x in (key, value)
            )
        keys, queries = (self.op("Shape", x, start=2, end=3) for x in (key, query))
        tiles, row_count = self._blocks(query, queries, call.head_dim)  # [n, e, D], R
        of_keys, columns = self._blocks(key, keys, call.head_dim)  # [B * G * C, e, D], C
        of_values, _ = self._blocks(value, keys, call.value_dim)
        spans = self.op("Cast", self.op("Reshape", "rows", self.ints(-1, 3)), to=TensorProto.INT64)
        first, end = (self.op("Slice", spans, self.ints(i), self.ints(i + 1), self.ints(1)) for i in (0, 2))  # [n, 1]
        listed = self.op("Cast", "columns", to=TensorProto.INT64)
        if self.rest is not None:
            means = (*means, self._shown(first))
            first = self.op("Add", first, self.ints(self.rest.tiles))
            listed = self.op("Sub", listed, self.ints(self.rest.tiles))
        length = self.op("Squeeze", self.op("Sub", end, first), self.ints(1))
        count = self.op("Shape", length)
        lengths, order = self.body.ops("TopK", (length, count), 2, axis=0, largest=1, sorted=1)  # [n]
        head = self.op("Div", order, self.op("Mul", row_count, self.ints(call.group)))  # b * G + g
        base = self.op("Unsqueeze", self.op("Mul", head, columns), self.ints(1))  # [n, 1]
        first = self.op("Gather", first, order)
        pieces = []
        for n in range(PIECES):
            cut = [self.op("Div", self.op("Mul", count, self.ints(i)), self.ints(PIECES)) for i in (n, n + 1)]
            own, size, start, heads, number = (
                self.op("Slice", x, *cut, self.ints(0)) for x in (order, lengths, first, base, head)
            )  # fmt: skip
            widest = self.op("Squeeze", self.op("Gather", lengths, cut[0]))
            at = (own, size, start, heads)
            coarse = None
            if self.rest is not None:
                coarse = tuple(self.op("Gather", x, y) for x, y in zip(means, (number, number, own), strict=True))
            pieces.append(self._piece(at, widest, (tiles, of_keys, of_values), listed, keys, coarse))
        joined = self.op("Concat", *pieces, axis=0)
        _, back = self.body.ops("TopK", (order, count), 2, axis=0, largest=0, sorted=1)
        joined = self.op("Gather", joined, back)  # [n, e, Dv]
        shape = self.op(
            "Concat", self.op("Shape", query, start=0, end=1), self.ints(call.heads, -1, call.value_dim), axis=0
        )
        out = self.op("Slice", self.op("Reshape", joined, shape), self.ints(0), queries, self.ints(2))
        return parts.heads_first(self.body, out, call.layouts[3])

    def _blocks(self, value: str, tokens: str, dim: int) -> tuple[str, str]:
        """[B, h, N, d] as [B * h * blocks, e, d], and blocks of a head [1]."""
        edge = self.form.block
        blocks = self.op("Div", self.op("Add", tokens, self.ints(edge - 1)), self.ints(edge))
        missing = self.op("Sub", self.op("Mul", blocks, self.ints(edge)), tokens)
        ends = self.op("Concat", self.ints(0, 0, 0, 0, 0, 0), missing, self.ints(0), axis=0)
        return self.op("Reshape", self.op("Pad", value, ends), self.ints(-1, edge, dim)), blocks

    def _means(self, value: str, dim: int) -> str:
        """[B * G, F, d]."""
        assert self.rest is not None
        found = self.op("Slice", value, self.ints(0), self.ints(self.rest.means), self.ints(2))
        return self.op("Reshape", found, self.ints(-1, self.rest.means, dim))

    def _shown(self, first: str) -> str:
        """[n, 1, F]: what is added for each mean, from the masks of the rows' first entries; ``first`` [n, 1]."""
        rest = self.rest
        assert rest is not None
        entry = self.op("Add", first, self.body.constant(np.arange(rest.tiles)))  # [n, tiles]
        kinds = self.op("Cast", self.op("Gather", "kinds", entry), to=TensorProto.INT64)
        words = self.op("Gather", self.op("Gather", "masks", self.body.scalar(0), axis=1), kinds)  # [n, tiles, e / 32]
        # Taken apart by division: TensorRT-RTX has no bits. A word with its highest bit is negative.
        words = self.op("Cast", words, to=TensorProto.INT64)
        words = self.op("Where", self.op("Less", words, self.body.scalar(0)),
                        self.op("Add", words, self.body.scalar(1 << 32)), words)  # fmt: skip
        shifted = self.op("Div", self.op("Unsqueeze", words, self.ints(-1)), self.body.constant(1 << np.arange(32)))
        twice = self.op("Mul", self.op("Div", shifted, self.body.scalar(2)), self.body.scalar(2))
        hidden = self.op("Equal", self.op("Sub", shifted, twice), self.body.scalar(0))
        hidden = self.op("Reshape", hidden, self.ints(-1, 1, rest.keys))
        if rest.keys > rest.means:
            hidden = self.op("Slice", hidden, self.ints(0), self.ints(rest.means), self.ints(2))
        kind = float_type(parts.softmax_type(self.call))[1]
        none, times = (self.body.constant(np.array(x, kind)) for x in (-np.inf, np.log(rest.size)))
        return self.op("Where", hidden, none, times)

    def _piece(
        self, rows: tuple[str, str, str, str], widest: str, operands: tuple[str, str, str], listed: str, keys: str,
        coarse: tuple[str, ...] | None,
    ) -> str:  # fmt: skip
        """[t, e, Dv] of the rows ``own`` [t] with ``size`` [t] entries from ``start`` [t, 1] on, whose heads' blocks
        begin at ``heads`` [t, 1]. ``coarse``: the rows' means of keys and values [t, F, d], and what is added for each.
        """
        call, edge = self.call, self.form.block
        own, size, start, heads = rows
        kind, numpy_kind = float_type(parts.softmax_type(call))
        step = self.op("Range", self.body.scalar(0), widest, self.body.scalar(1))  # [W]
        there = self.op("Less", step, self.op("Unsqueeze", size, self.ints(1)))  # [t, W]
        entry = self.op("Where", there, self.op("Add", start, step), start)
        column = self.op("Gather", listed, entry)
        blocks = self.op("Add", heads, column)
        flat = [self.op("Mul", self.op("Unsqueeze", widest, self.ints(0)), self.ints(edge))]
        query = self.op("Gather", operands[0], own)  # [t, e, D]
        of_keys, of_values = (
            self.op(
                "Reshape", self.op("Gather", x, blocks), self.op("Concat", self.ints(-1), *flat, self.ints(d), axis=0)
            )
            for x, d in zip(operands[1:], (call.head_dim, call.value_dim), strict=True)
        )  # [t, W * e, D]
        behind = 0
        if coarse is not None and self.rest is not None:
            of_keys, of_values = (
                self.op("Concat", x, m, axis=1) for x, m in zip((of_keys, of_values), coarse[:2], strict=True)
            )
            behind = self.rest.means
        scores = self.op("MatMul", query, self.op("Transpose", of_keys, perm=[0, 2, 1]))
        if parts.softmax_type(call) != call.dtype:
            scores = self.op("Cast", scores, to=kind)
        if self.causal:  # the row's own block is its first
            above = np.where(np.tri(edge, dtype=bool), 0, -np.inf).astype(numpy_kind)
            more = self.op("Add", flat[0], self.ints(behind - edge))
            scores = self.op("Add", scores, self.op(
                "Pad", self.body.constant(above), self.op("Concat", self.ints(0, 0, 0), more, axis=0)))  # fmt: skip
        inside = self.body.constant(np.arange(edge))
        at = self.op("Add", self.op("Unsqueeze", self.op("Mul", column, self.ints(edge)), self.ints(2)), inside)
        seen = self.op("And", self.op("Less", at, keys), self.op("Unsqueeze", there, self.ints(2)))  # [t, W, e]
        zero, hidden = (self.body.constant(np.array(x, numpy_kind)) for x in (0, -np.inf))
        added = self.op("Reshape", self.op("Where", seen, zero, hidden),
                        self.op("Concat", self.ints(-1, 1), *flat, axis=0))  # fmt: skip
        if coarse is not None:
            added = self.op("Concat", added, coarse[2], axis=2)
        weights = self.op("Softmax", self.op("Add", scores, added), axis=-1)
        if parts.softmax_type(call) != call.dtype:
            weights = self.op("Cast", weights, to=float_type(call.dtype)[0])
        return self.op("MatMul", weights, of_values)
