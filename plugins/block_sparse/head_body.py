"""The function body of ``BlockSparseAttention`` for blocks that were chosen for each head (``head_lists.HeadPlan``).

Queries, keys and values are cut into blocks once; each group of rows gathers its blocks of keys and values whole, and
is one batched product, softmax and product. A mask is added where there is something to hide: the causal half of the
diagonal, which is the first block of every row, and columns of keys that only fill a row up, do not exist or are
padding. Means of what rows leave out stand in front of the keys (``rest.py``); a group with such rows has all of them
behind the gathered blocks, hidden where a row meets the block itself.

Shapes in comments: B batch, H heads, G key heads, R blocks a side, e their edge, T rows of a group, W blocks of each,
F means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import FunctionProto, NodeProto, helper

from attncompile.plugins.block_sparse.head_lists import HeadPlan, Rows
from attncompile.plugins.block_sparse.op import OP_TYPE, Form
from attncompile.plugins.body import Body, attribute_names, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call

WHOLE_ROWS = 1024
"""Queries of a dense head that are done at once: bounds the scores that are held."""


def function(plan: HeadPlan, template: NodeProto, form: Form, call: Call) -> FunctionProto:
    """A body in standard ops of ``call.opset`` of the node ``template``, whose lists are in ``plan``."""
    body = Body(call.opset)
    output = _Writer(body, plan, call, form.masked_rows).write()
    doc = f"{OP_TYPE} in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads with blocks of their own"
    return body.function(OP_TYPE, template.overload, form.formal, output, attribute_names(template), doc)


@dataclass(frozen=True, slots=True)
class _Writer:
    body: Body
    plan: HeadPlan
    call: Call
    masked_rows: str

    def write(self) -> str:
        body, call, geometry = self.body, self.call, self.plan.geometry
        count, edge = geometry.count, geometry.edge
        query = self._filled(parts.scaled(body, call, parts.heads_first(body, "query", call.layouts[0])))
        key, value = (parts.heads_first(body, n, call.layouts[i]) for i, n in ((1, "key"), (2, "value")))
        both = (key, value)
        means = None
        if (rest := self.plan.rest) is not None:
            end = body.ints(rest.keys + geometry.tokens)
            key, value = (body.op("Slice", x, body.ints(rest.keys), end, body.ints(2)) for x in both)
            if not self._in_blocks:
                means = tuple(body.op("Slice", x, body.ints(0), body.ints(rest.means), body.ints(2)) for x in both)
        ends = self._ends()
        pieces: list[str] = []
        if self.plan.groups:
            rows = body.op("Reshape", query, body.ints(0, call.heads * count, edge, call.head_dim))
            blocks = call.kv_heads * (count + self._in_front)
            cut = both if self._in_blocks else (key, value)
            of_keys, of_values = (
                body.op("Reshape", self._filled(x), body.ints(0, blocks, edge, dim))
                for x, dim in zip(cut, (call.head_dim, call.value_dim), strict=True)
            )
            pieces += [self._group(g, rows, (of_keys, of_values), means, ends) for g in self.plan.groups]
        if self.plan.whole:
            pieces.append(self._whole(query, key, value))
        if self.plan.empty:
            pieces.append(self._empty(value))
        joined = pieces[0] if len(pieces) == 1 else body.op("Concat", *pieces, axis=1)
        if not np.array_equal(self.plan.slots, np.arange(len(self.plan.slots))):
            joined = body.op("Gather", joined, body.constant(self.plan.slots), axis=1)
        out = body.op("Reshape", joined, body.ints(0, call.heads, count * edge, call.value_dim))
        if geometry.tokens % edge:
            out = body.op("Slice", out, body.ints(0), body.ints(geometry.tokens), body.ints(2))
        return parts.heads_first(body, out, call.layouts[3])

    @property
    def _in_blocks(self) -> bool:
        """Whether means fill whole blocks: then they are gathered like keys."""
        rest = self.plan.rest
        return rest is not None and rest.means == rest.keys

    @property
    def _in_front(self) -> int:
        """Blocks of means before those of the keys that are gathered."""
        return self.plan.rest.tiles if self.plan.rest is not None and self._in_blocks else 0

    def _filled(self, value: str) -> str:
        """[B, h, N, d] with zeros up to whole blocks."""
        geometry = self.plan.geometry
        missing = -geometry.tokens % geometry.edge
        return self.body.op("Pad", value, self.body.ints(0, 0, 0, 0, 0, 0, missing, 0)) if missing else value

    def _ends(self) -> str:
        """[R + 1, e], or [b, R + 1, e] with padding: what is added for a key of each block; the last block is none."""
        body, geometry = self.body, self.plan.geometry
        kind = float_type(parts.softmax_type(self.call))[1]
        count, edge = geometry.count, geometry.edge
        if not self.call.key_mask:
            there = np.arange((count + 1) * edge).reshape(count + 1, edge) < geometry.tokens
            return body.constant(np.where(there, 0, -np.inf).astype(kind))
        added = parts.additive(body, self.call, parts.key_mask_4d(body, "key_mask"))  # [b, 1, 1, N]
        missing = (count + 1) * edge - geometry.tokens
        hidden = body.constant(np.array(-np.inf, kind))
        added = body.op("Pad", added, body.ints(0, 0, 0, 0, 0, 0, 0, missing), hidden)
        return body.op("Reshape", added, body.ints(0, count + 1, edge))

    def _group(
        self, group: Rows, query: str, keys: tuple[str, str], means: tuple[str, ...] | None, ends: str
    ) -> str:  # fmt: skip
        """[B, T, e, Dv]. ``keys`` and values in blocks; ``means`` of both, [B, G, F, D]."""
        body, call, geometry = self.body, self.call, self.plan.geometry
        count, edge, (tiles, width) = geometry.count, geometry.edge, group.columns.shape
        head = group.rows // count
        front = self._in_front
        columns = np.maximum(group.columns, 0) + front
        if front and group.averaged is not None:
            columns = np.concatenate([columns, np.broadcast_to(np.arange(front), (tiles, front))], axis=1)
        blocks = (head // call.group * (count + front))[:, None] + columns
        rows = body.op("Gather", query, body.constant(group.rows), axis=1)  # [B, T, e, D]
        of_keys, of_values = (
            body.op(
                "Reshape", body.op("Gather", x, body.constant(blocks), axis=1),
                body.ints(0, tiles, columns.shape[1] * edge, dim),
            )
            for x, dim in zip(keys, (call.head_dim, call.value_dim), strict=True)
        )  # fmt: skip
        if means is not None and group.averaged is not None:
            of_heads = body.constant(head // call.group)
            of_keys, of_values = (
                body.op("Concat", x, body.op("Gather", m, of_heads, axis=1), axis=2)
                for x, m in zip((of_keys, of_values), means, strict=True)
            )  # [B, T, W * e + F, D]
        scores = body.op("MatMul", rows, body.op("Transpose", of_keys, perm=[0, 1, 3, 2]))  # [B, T, e, W * e]
        wide = parts.softmax_type(call) != call.dtype
        kind, numpy_kind = float_type(parts.softmax_type(call))
        if wide:
            scores = body.op("Cast", scores, to=kind)
        if geometry.causal:
            above = np.where(np.tri(edge, dtype=bool), 0, -np.inf).astype(numpy_kind)[None]
            behind = body.ints(0, 0, 0, 0, 0, (width - 1) * edge + self._means(group))
            scores = body.op("Add", scores, body.op("Pad", body.constant(above), behind))
        last = bool(geometry.tokens % edge) and bool((group.columns == count - 1).any())
        if call.key_mask or last or bool((group.columns < 0).any()):
            place = body.constant(np.where(group.columns < 0, count, group.columns))
            axis = 1 if call.key_mask else 0
            added = body.op("Gather", ends, place, axis=axis)  # [T, W, e] or [b, T, W, e]
            added = body.op("Reshape", added, body.ints(*[0] * axis, tiles, 1, width * edge))
            if group.averaged is not None:
                added = body.op("Concat", added, self._rest(group), axis=-1)
            scores = body.op("Add", scores, added)
        elif group.averaged is not None:
            room = body.ints(0, 0, width * edge, 0, 0, 0)
            scores = body.op("Add", scores, body.op("Pad", self._rest(group), room))
        weights = body.op("Softmax", scores, axis=-1)
        if wide:
            weights = body.op("Cast", weights, to=float_type(call.dtype)[0])
        result = body.op("MatMul", weights, of_values)
        if not call.key_mask:
            return result
        # Decided from the scores: a NaN of the operands must stay visible.
        dead = body.op("Equal", body.op("ReduceMax", scores, body.ints(-1), keepdims=1),
                       body.constant(np.array(-np.inf, numpy_kind)))  # fmt: skip
        return body.op("Where", dead, body.constant(np.array(0, float_type(call.dtype)[1])), result)

    def _means(self, group: Rows) -> int:
        """Means behind the keys of each row."""
        return self.plan.rest.means if self.plan.rest is not None and group.averaged is not None else 0

    def _rest(self, group: Rows) -> str:
        """[T, 1, F]: the logarithm of how often a mean counts, -inf where the row meets its block itself."""
        rest, averaged = self.plan.rest, group.averaged
        assert rest is not None and averaged is not None
        kind = float_type(parts.softmax_type(self.call))[1]
        added = np.where(averaged[:, : rest.blocks, None], np.log(rest.size), -np.inf).astype(kind)
        spread = self.body.op("Expand", self.body.constant(added), self.body.ints(1, 1, rest.of_block))
        return self.body.op("Reshape", spread, self.body.ints(len(added), 1, rest.means))

    def _of_heads(self, value: str, heads: tuple[int, ...], shared: int) -> str:
        """The heads of [B, h, N, d], ``shared`` of them on one."""
        if shared == 1 and heads == tuple(range(self.call.heads)):
            return value
        return self.body.op("Gather", value, self.body.constant(np.array(heads, np.int64) // shared), axis=1)

    def _whole(self, query: str, key: str, value: str) -> str:
        """[B, heads * R, e, Dv] of heads that meet everything."""
        body, call, geometry, heads = self.body, self.call, self.plan.geometry, self.plan.whole
        total = geometry.count * geometry.edge
        query = self._of_heads(query, heads, 1)
        key, value = (self._of_heads(x, heads, call.group) for x in (key, value))
        mask = parts.additive(body, call, parts.key_mask_4d(body, "key_mask")) if call.key_mask else None
        step = max(WHOLE_ROWS // geometry.edge, 1) * geometry.edge
        pieces = []
        for start in range(0, total, step):
            rows = query
            if step < total:
                end = body.ints(min(start + step, total))
                rows = body.op("Slice", query, body.ints(start), end, body.ints(2))
            weights = parts.probabilities(body, call, rows, key, mask, [0, 1, 3, 2])
            pieces.append(parts.guarded(body, call, body.op("MatMul", weights, value), mask, "zero", str))
        joined = pieces[0] if len(pieces) == 1 else body.op("Concat", *pieces, axis=2)
        return body.op("Reshape", joined, body.ints(0, len(heads) * geometry.count, geometry.edge, call.value_dim))

    def _empty(self, value: str) -> str:
        """[B, heads * R, e, Dv]: for every query the mean of all values, or zero."""
        body, call, geometry, heads = self.body, self.call, self.plan.geometry, self.plan.empty
        if self.masked_rows == "zero":
            sizes = body.ints(len(heads) * geometry.count, geometry.edge, call.value_dim)
            shape = body.op("Concat", body.op("Shape", value, start=0, end=1), sizes, axis=0)
            element, kind = float_type(call.dtype)
            zero = helper.make_tensor("zero", element, [1], np.zeros(1, kind).tobytes(), raw=True)
            return body.op("ConstantOfShape", shape, value=zero)
        mean = self._of_heads(body.op("ReduceMean", value, body.ints(2), keepdims=1), heads, call.group)
        spread = body.op("Expand", body.op("Unsqueeze", mean, body.ints(2)),
                         body.ints(1, 1, geometry.count, geometry.edge, 1))  # fmt: skip
        return body.op("Reshape", spread, body.ints(0, len(heads) * geometry.count, geometry.edge, call.value_dim))
