"""The function body of ``BlockSparseAttention`` for lists that only the run knows: those that other ops make.

Shapes in comments: b batch entries and h heads of the lists, R rows of blocks, C blocks of keys, W entries of the
longest row, U masks, e the edge of a block; B, H, N, D as ever. All rows are padded to the longest, so what it computes
grows with R * W, and lists of like length lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto

from attncompile.plugins.block_sparse.op import OP_TYPE, Form
from attncompile.plugins.body import Body, attribute_names, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call


def function(template: NodeProto, form: Form, call: Call) -> FunctionProto:
    """A body in standard ops of ``call.opset`` of the node ``template``, for any lists and lengths."""
    outputs = _Writer(Body(call.opset), form, call).write()
    doc = f"{OP_TYPE} in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads and any lists"
    return outputs[0].function(
        OP_TYPE, template.overload, form.formal, outputs[1][: 1 + form.log_sum_exp], attribute_names(template), doc
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    body: Body
    form: Form
    call: Call

    def op(self, name: str, *inputs: str, **attributes: Any) -> str:
        return self.body.op(name, *inputs, **attributes)

    def ints(self, *values: int) -> str:
        return self.body.ints(*values)

    def wide(self, value: float) -> str:
        """A scalar in the softmax's element type."""
        return self.body.constant(np.array(value, float_type(parts.softmax_type(self.call))[1]))

    def shape(self, value: str, axis: int) -> str:
        """The size of one axis, [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def sizes(self, *sizes: str | int) -> str:
        return self.op("Concat", *(self.ints(s) if isinstance(s, int) else s for s in sizes), axis=0)

    def write(self) -> tuple[Body, tuple[str, str]]:
        call, edge = self.call, self.form.block
        query = parts.scaled(self.body, call, parts.heads_first(self.body, "query", call.layouts[0]))  # [B, H, Nq, D]
        key = parts.heads_first(self.body, "key", call.layouts[1])
        value = parts.heads_first(self.body, "value", call.layouts[2])
        queries, keys = self.shape(query, 2), self.shape(key, 2)
        row_count = self.shape("rows", 2)
        columns = self.op("Div", self.op("Add", keys, self.ints(edge - 1)), self.ints(edge))
        batch = self.shape(query, 0)

        rows = self.op("Expand", self.op("Cast", "rows", to=TensorProto.INT64), self.sizes(batch, call.heads, 1, 1))
        first, full, end = (
            self.op("Slice", rows, self.ints(n), self.ints(n + 1), self.ints(3)) for n in range(3)
        )  # [B, H, R, 1] each
        longest = self.op("ReduceMax", self.op("Sub", end, first), keepdims=0)
        longest = self.op("Max", longest, self.body.scalar(1))
        step = self.op("Range", self.body.scalar(0), longest, self.body.scalar(1))  # [W]
        entry = self.op("Add", first, step)  # [B, H, R, W]
        there = self.op("Less", entry, end)
        partial = self.op("Less", entry, full)
        entry = self.op("Where", there, entry, self.body.scalar(0))
        column = self.op("Cast", self.op("Gather", "columns", entry), to=TensorProto.INT64)

        visible = self._visible(entry, there, partial, column, keys)  # [B, H, R, e, W * e]
        if call.key_mask:
            visible = self.op("And", visible, self._key_mask(column, columns, keys, batch))
        length = self.op("Mul", self.op("Reshape", longest, self.ints(1)), self.ints(edge))  # [1]: W * e
        missing = self.op("Sub", self.op("Mul", row_count, self.ints(edge)), queries)
        tiles = self.op(
            "Reshape", self._padded(query, missing), self.sizes(0, call.heads, row_count, edge, call.head_dim)
        )
        of_keys = self._gathered(key, column, columns, keys, length, call.head_dim)  # [B, H, R, W * e, D]
        of_values = self._gathered(value, column, columns, keys, length, call.value_dim)
        scores = self.op("MatMul", tiles, self.op("Transpose", of_keys, perm=[0, 1, 2, 4, 3]))
        scores = self.op("Cast", scores, to=float_type(parts.softmax_type(call))[0])
        if call.bias:
            scores = self.op(
                "Add", scores, self._bias(column, columns, (queries, keys, batch, row_count), missing, length)
            )
        scores = self.op("Where", visible, scores, self.wide(-np.inf))
        output, lse = self._softmax(scores, of_values, entry, value)
        flat = self.op("Reshape", output, self.sizes(0, call.heads, -1, call.value_dim))
        flat = self.op("Slice", flat, self.ints(0), queries, self.ints(2))
        lse = self.op(
            "Slice", self.op("Reshape", lse, self.sizes(0, call.heads, -1)), self.ints(0), queries, self.ints(2)
        )
        return self.body, (
            parts.heads_first(self.body, flat, call.layouts[3]), self.op("Cast", lse, to=TensorProto.FLOAT)
        )  # fmt: skip

    def _softmax(self, scores: str, values: str, entry: str, value: str) -> tuple[str, str]:
        """Output [B, H, R, e, Dv] and log-sum-exp [B, H, R, e, 1]."""
        call = self.call
        top = self.op("ReduceMax", scores, self.ints(-1), keepdims=1)
        if call.sinks:
            kind = float_type(parts.softmax_type(call))[0]
            sink = self.op("Reshape", self.op("Cast", "sinks", to=kind), self.ints(1, -1, 1, 1, 1))
            top = self.op("Max", top, sink)
        alive = self.op("Greater", top, self.wide(-np.inf))
        weights = self.op("Exp", self.op("Sub", scores, self.op("Where", alive, top, self.wide(0.0))))
        if "counts" in self.form.inputs:
            times = self.op("Cast", self.op("Gather", "counts", entry), to=float_type(parts.softmax_type(call))[0])
            times = self._over_keys(self.op("Unsqueeze", times, self.ints(-1)), 1)
            weights = self.op("Mul", weights, times)
        total = self.op("ReduceSum", weights, self.ints(-1), keepdims=1)
        if call.sinks:
            total = self.op("Add", total, self.op("Exp", self.op("Sub", sink, top)))
        weights = self.op("Div", weights, self.op("Where", alive, total, self.wide(1.0)))
        output = self.op("MatMul", self.op("Cast", weights, to=float_type(call.dtype)[0]), values)
        if not call.sinks and self.form.masked_rows != "zero":
            instead = self.body.constant(np.array(np.nan, float_type(call.dtype)[1]))
            if self.form.masked_rows == "uniform":
                mean = self.op("ReduceMean", parts.repeat_heads(self.body, call, value, call.value_dim), self.ints(2))
                instead = self.op("Unsqueeze", mean, self.ints(2))  # [B, H, 1, 1, Dv]
            output = self.op("Where", alive, output, instead)
        lse = self.op("Add", self.op("Log", self.op("Where", alive, total, self.wide(1.0))), top)
        return output, lse

    def _padded(self, value: str, missing: str) -> str:
        """[B, G, N, D] with ``missing`` [1] more rows of zeros."""
        return self.op("Pad", value, self.sizes(0, 0, 0, 0, 0, 0, missing, 0))

    def _over_keys(self, value: str, height: int) -> str:
        """[B, H, R, W, x] of each entry (x = 1: one value; e: one a key) -> [B, H, R, 1, W * e]."""
        wide = self.op("Expand", value, self.ints(1, 1, 1, 1, self.form.block))
        flat = self.op("Reshape", wide, self.ints(0, 0, 0, -1))
        return self.op("Unsqueeze", flat, self.ints(3))

    def _visible(self, entry: str, there: str, partial: str, column: str, keys: str) -> str:
        """[B, H, R, e, W * e]: what the lists let through."""
        edge = self.form.block
        words = self.op("Unsqueeze", "masks", self.ints(3))  # [U, e, e / 32, 1]
        bit = self.op("BitwiseAnd", words, self.body.constant((1 << np.arange(32, dtype=np.int64)).astype(np.int32)))
        seen = self.op("Not", self.op("Equal", bit, self.body.constant(np.array(0, np.int32))))
        seen = self.op("Reshape", seen, self.ints(-1, edge, edge))
        seen = self.op("Concat", seen, self.body.constant(np.ones((1, edge, edge), np.bool_)), axis=0)  # full: U
        kind = self.op("Cast", self.op("Gather", "kinds", entry), to=TensorProto.INT64)
        kind = self.op("Where", partial, kind, self.shape("masks", 0))
        bits = self.op("Transpose", self.op("Gather", seen, kind), perm=[0, 1, 2, 4, 3, 5])  # [B, H, R, e, W, e]
        bits = self.op("Reshape", bits, self.ints(0, 0, 0, edge, -1))
        at = self.op("Add", self.op("Unsqueeze", self.op("Mul", column, self.ints(edge)), self.ints(-1)),
                     self.body.constant(np.arange(edge)))  # fmt: skip
        real = self.op("And", self.op("Less", at, keys), self.op("Unsqueeze", there, self.ints(-1)))
        return self.op("And", bits, self._over_keys(real, 1))

    def _key_mask(self, column: str, columns: str, keys: str, batch: str) -> str:
        """[B, H, R, 1, W * e]."""
        edge = self.form.block
        mask = self.op("Expand", parts.key_mask_4d(self.body, "key_mask"), self.sizes(batch, 1, 1, keys))
        missing = self.op("Sub", self.op("Mul", columns, self.ints(edge)), keys)
        ends = self.sizes(0, 0, 0, 0, 0, 0, 0, missing)
        number = self.op("Cast", self.op("Pad", self.op("Cast", mask, to=TensorProto.INT32), ends), to=TensorProto.BOOL)
        blocks = self.op("Reshape", number, self.ints(-1, edge))  # [B * C, e]
        return self._over_keys(self.op("Gather", blocks, self._numbered(column, columns, batch, 1)), 1)

    def _numbered(self, column: str, columns: str, batch: str, heads: int) -> str:
        """Blocks of keys counted through batch entries and ``heads``: [B, H, R, W]."""
        of_batch = self.op("Range", self.body.scalar(0), self.op("Squeeze", batch), self.body.scalar(1))
        of_batch = self.op("Reshape", self.op("Mul", of_batch, self.ints(heads)), self.ints(-1, 1, 1, 1))
        of_head = np.arange(self.call.heads) // max(self.call.heads // heads, 1)
        number = self.op("Add", of_batch, self.body.constant(of_head.reshape(1, -1, 1, 1)))
        return self.op("Add", self.op("Mul", number, columns), column)

    def _gathered(self, value: str, column: str, columns: str, keys: str, length: str, dim: int) -> str:
        """[B, G, Nk, dim] -> [B, H, R, W * e, dim]."""
        edge = self.form.block
        whole = self._padded(value, self.op("Sub", self.op("Mul", columns, self.ints(edge)), keys))
        blocks = self.op("Reshape", whole, self.ints(-1, edge, dim))  # [B * G * C, e, dim]
        found = self.op(
            "Gather", blocks, self._numbered(column, columns, self.shape(value, 0), self.call.kv_heads)
        )  # [B, H, R, W, e, dim]
        return self.op("Reshape", found, self.sizes(0, 0, 0, length, dim))

    def _bias(
        self, column: str, columns: str, sizes: tuple[str, str, str, str], missing: str, length: str
    ) -> str:  # fmt: skip
        """[B, H, R, e, W * e]."""
        edge, heads = self.form.block, self.call.heads
        queries, keys, batch, row_count = sizes
        kind = float_type(parts.softmax_type(self.call))[0]
        whole = self.op("Expand", self.op("Cast", "bias", to=kind), self.sizes(batch, heads, queries, keys))
        beyond = self.op("Sub", self.op("Mul", columns, self.ints(edge)), keys)
        whole = self.op("Pad", whole, self.sizes(0, 0, 0, 0, 0, 0, missing, beyond))
        blocks = self.op("Reshape", whole, self.sizes(0, heads, row_count, edge, columns, edge))
        blocks = self.op("Transpose", blocks, perm=[0, 1, 2, 4, 3, 5])  # [B, H, R, C, e, e]
        blocks = self.op("Reshape", blocks, self.ints(-1, edge, edge))
        count = self.op("Mul", self.op("Mul", batch, self.ints(heads)), row_count)
        row = self.op("Range", self.body.scalar(0), self.op("Squeeze", count), self.body.scalar(1))
        row = self.op("Reshape", row, self.sizes(batch, heads, row_count, 1))
        found = self.op("Gather", blocks, self.op("Add", self.op("Mul", row, columns), column))  # [B, H, R, W, e, e]
        return self.op(
            "Reshape", self.op("Transpose", found, perm=[0, 1, 2, 4, 3, 5]), self.sizes(0, 0, 0, edge, length)
        )
