"""Attention in two parts of one softmax whose padding comes from an input of batch and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.passes.attention_graphs import Builder


@dataclass(frozen=True)
class Padded:
    """Queries meet the first ``first`` tokens, and in the same softmax those near to them: chunks of ``chunk``.

    ``gate``: queries that are hidden themselves give zero. ``fault`` changes one thing.
    """

    batch: int = 2
    heads: int = 3
    dim: int = 4
    first: int = 3
    chunk: int = 4
    chunks: int = 3
    gate: bool = True
    fill: float = -np.inf
    kind: int = TensorProto.INT64
    fault: str = ""

    @property
    def tokens(self) -> int:
        return self.first + self.chunk * self.chunks

    def visible(self) -> np.ndarray:
        """Bool [tokens, tokens]. The first tokens are queries of the last chunk's keys, for want of a chunk."""
        chunk = np.concatenate(
            [np.full(self.first, self.chunks - 1), np.arange(self.chunk * self.chunks) // self.chunk]
        )
        near = (chunk[:, None] == chunk[None]) & (np.arange(self.tokens) >= self.first)
        return near | (np.arange(self.tokens) < self.first)


def graph(given: Padded) -> onnx.ModelProto:
    """x [batch, tokens, width], mask [batch, tokens] -> y."""
    b = Builder()
    rng = np.random.default_rng(0)
    batch, heads, dim, first, tokens = given.batch, given.heads, given.dim, given.first, given.tokens
    width, fault, parts = heads * dim, given.fault, range(given.chunks)

    def weight() -> str:
        return b.const(rng.standard_normal((width, width)).astype(np.float32) * 0.3)

    def project() -> str:
        flat = b.op("Reshape", b.op("MatMul", "x", weight()), b.const([batch, tokens, heads, dim]))
        return b.op("Transpose", flat, perm=[0, 2, 1, 3])

    def cut(value: str, begin: int, end: int, axis: int) -> str:
        return b.op("Slice", value, b.const([begin]), b.const([end]), b.const([axis]))

    def chunk(value: str, i: int, axis: int) -> str:
        return cut(value, first + i * given.chunk, first + (i + 1) * given.chunk, axis)

    q, k, v = project(), project(), project()
    hidden = "mask" if given.kind == TensorProto.BOOL else b.op("Cast", "mask", to=TensorProto.BOOL)
    hidden = b.op("Not", hidden)  # [batch, tokens]
    if fault == "by data":
        hidden = b.op("Less", b.op("ReduceSum", "x", b.const([2]), keepdims=0), b.const(np.float32(-2)))
    moved = hidden
    if fault == "next token":
        moved = b.op("Gather", hidden, b.const(np.roll(np.arange(tokens), 1)), axis=1)
    if fault == "two tokens":
        moved = b.op(
            "Or", hidden, b.op("Gather", hidden, b.const(np.minimum(np.arange(tokens) + 1, tokens - 1)), axis=1)
        )
    if fault == "unlike the first":
        moved = b.op("Not", b.op("Equal", hidden, cut(hidden, 0, 1, 1)))
    if fault == "other entry":
        moved = b.op("Gather", hidden, b.const(np.arange(batch)[::-1].copy()), axis=0)
    fill = b.const(np.float32(-5.0 if fault == "soft" else 9e4 if fault == "sign" else given.fill))
    rows = b.op("Unsqueeze", moved, b.const([1, 3] if fault == "queries" else [1, 2]))
    added = b.op("Where", rows, fill, b.const(np.float32(0)))
    if fault == "one head":
        added = b.op(
            "Where", rows, b.op("Mul", fill, b.const(np.float32([[[[1]], [[1]], [[0]]]]))), b.const(np.float32(0))
        )
    if fault == "part of the keys":
        added = b.op("Mul", added, b.const((np.arange(tokens) != first + 1).astype(np.float32)))
    if fault == "times":
        factor = b.op("Cast", b.op("Unsqueeze", b.op("Not", hidden), b.const([1, 3])), to=TensorProto.FLOAT)
        v = b.op("Mul", v, factor)

    def masked(scores: str, begin: int, end: int) -> str:
        if fault in ("queries", "gate of keys"):
            return scores
        return b.op("Add", scores, cut(added, begin, end, 3))

    outputs = []
    far = b.op("MatMul", q, b.op("Transpose", cut(k, 0, first, 2), perm=[0, 1, 3, 2]))
    far = masked(b.op("Mul", far, b.const(np.float32(0.4))), 0, first)
    spans = [(first + i * given.chunk, first + (i + 1) * given.chunk, i) for i in parts]
    for begin, end, i in [(0, first, given.chunks - 1), *spans]:
        keys = b.op("Transpose", chunk(k, i, 2), perm=[0, 1, 3, 2])
        near = b.op("Mul", b.op("MatMul", cut(q, begin, end, 2), keys), b.const(np.float32(0.4)))
        near = masked(near, first + i * given.chunk, first + (i + 1) * given.chunk)
        both = b.op("Concat", cut(far, begin, end, 2), near, axis=3)
        if fault == "queries":
            both = b.op("Add", both, cut(added, begin, end, 2))
        weights = b.op("Softmax", both, axis=-1)
        if given.gate or fault.startswith("gate"):
            at = cut(hidden, begin, end, 1)
            if fault == "gate of the next":
                at = cut(b.op("Gather", hidden, b.const(np.roll(np.arange(tokens), 1)), axis=1), begin, end, 1)
            condition = b.op("Unsqueeze", at, b.const([1, 3]))
            if fault == "gate of keys":
                condition = b.op("Unsqueeze", b.op("Concat", cut(hidden, 0, first, 1), chunk(hidden, i, 1), axis=1),
                                 b.const([1, 2]))  # fmt: skip
            value = b.const(np.float32(0.25 if fault == "gate of a quarter" else 0))
            weights = b.op("Where", condition, value, weights)
        kept = [cut(weights, 0, first, 3), cut(weights, first, first + given.chunk, 3)]
        values = [cut(v, 0, first, 2), chunk(v, i, 2)]
        outputs.append(b.op("Add", *(b.op("MatMul", w, x) for w, x in zip(kept, values, strict=True))))
    whole = b.op("Transpose", b.op("Concat", *outputs, axis=2), perm=[0, 2, 1, 3])
    merged = b.op("Reshape", whole, b.const([batch, tokens, width]))
    b.nodes.append(helper.make_node("MatMul", [merged, weight()], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, tokens, width])]
    if fault != "by data":
        inputs.append(helper.make_tensor_value_info("mask", given.kind, [batch, tokens]))
    else:
        b.nodes = [n for n in b.nodes if "mask" not in n.input and not _reads_cast(n, b.nodes)]
    made = helper.make_graph(
        b.nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, tokens, width])], b.stored
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _reads_cast(node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> bool:
    """Whether ``node`` is the Not behind the Cast of the mask, which nobody reads any more."""
    cast = next((n for n in nodes if n.op_type == "Cast" and n.input[0] == "mask"), None)
    return cast is not None and node.op_type == "Not" and node.input[0] == cast.output[0]
