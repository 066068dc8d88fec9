"""Attention over windows that were gathered first, in the ways that exporters write it, with the true mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.passes.attention_graphs import Builder

BATCH, HEADS, DIM = 2, 3, 5


@dataclass(frozen=True)
class Windowed:
    """A graph with inputs q, k, v [B, H, N, D] and output y, and which keys each query sees."""

    proto: onnx.ModelProto
    visible: np.ndarray


def starts(size: int, kernel: int) -> np.ndarray:
    """First token of each token's window, moved inward at the borders."""
    return np.clip(np.arange(size) - kernel // 2, 0, size - kernel)


def clamped(rows: int, columns: int, kernel: int) -> np.ndarray:
    """[N, kernel ** 2] tokens of each token's window."""
    r = starts(rows, kernel)[:, None] + np.arange(kernel)
    c = starts(columns, kernel)[:, None] + np.arange(kernel)
    return (r[:, None, :, None] * columns + c[None, :, None, :]).reshape(rows * columns, kernel * kernel)


def seen(table: np.ndarray, keys: int) -> np.ndarray:
    """Bool [queries, keys] of a table of tokens, -1 for none."""
    out = np.zeros((len(table), keys + 1), dtype=bool)
    np.put_along_axis(out, np.where(table < 0, keys, table), True, axis=1)
    return out[:, :keys]


def build(b: Builder, tokens: int, out: str, *, batch: int | str = BATCH) -> onnx.ModelProto:
    """The model around ``b``'s nodes."""
    shape = [batch, HEADS, tokens, DIM]
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in "qkv"]
    b.nodes.append(helper.make_node("Identity", [out], ["y"]))
    graph = helper.make_graph(
        b.nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], b.stored
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def indexed(table: np.ndarray, *, values: np.ndarray | None = None, how: str = "gather") -> Windowed:
    """K[:, :, table] and V[:, :, table] by Gather or GatherND, einsum products."""
    b = Builder()
    tokens = len(table)

    def take(value: str, indices: np.ndarray) -> str:
        if how == "gather":
            return b.op("Gather", value, b.const(indices.astype(np.int64)), axis=2)
        first = b.op("Transpose", value, perm=[2, 0, 1, 3])
        taken = b.op("GatherND", first, b.const(indices.astype(np.int64)[..., None]))
        return b.op("Transpose", taken, perm=[2, 3, 0, 1, 4])

    k, v = take("k", table), take("v", table if values is None else values)
    q = b.op("Mul", "q", b.const(np.float32(0.4)))
    scores = b.op("Einsum", q, k, equation="bhnd,bhnkd->bhnk")
    weights = b.op("Softmax", scores, axis=-1)
    out = b.op("Einsum", weights, v, equation="bhnk,bhnkd->bhnd")
    return Windowed(build(b, tokens, out), seen(table, tokens))


def unfolded(
    rows: int, columns: int, kernel: int, *, border: str, mask: bool = True, batch: int | str = BATCH
) -> Windowed:
    """im2col: zero Pad and -inf over it, or windows of the interior repeated at the borders (Pad of mode edge)."""
    b = Builder()
    tokens, half = rows * columns, kernel // 2
    width = HEADS * DIM

    def unfold(value: str) -> str:
        grid = b.op("Reshape", b.op("Transpose", value, perm=[0, 1, 3, 2]), b.const([-1, width, rows, columns]))
        if border == "truncate":
            grid = b.op("Pad", grid, b.const([0, 0, half, half, 0, 0, half, half]))
            r, c = (np.arange(kernel)[:, None] + np.arange(n)[None] for n in (rows, columns))
        else:
            r, c = (np.arange(kernel)[:, None] + np.arange(n - kernel + 1)[None] for n in (rows, columns))
        taken = b.op("Gather", grid, b.const(r.astype(np.int64)), axis=2)  # [B, C, k, rows, columns]
        taken = b.op("Gather", taken, b.const(c.astype(np.int64)), axis=4)  # [B, C, k, rows, k, columns]
        taken = b.op("Transpose", taken, perm=[0, 1, 2, 4, 3, 5])
        flat = b.op("Reshape", taken, b.const([0, width * kernel * kernel, r.shape[1], c.shape[1]]))
        if border == "clamp":
            flat = b.op("Pad", flat, b.const([0, 0, half, half, 0, 0, half, half]), mode="edge")
        split = b.op("Reshape", flat, b.const([0, HEADS, DIM, kernel * kernel, tokens]))
        return b.op("Transpose", split, perm=[0, 1, 4, 3, 2])  # [B, H, N, k * k, D]

    k, v = unfold("k"), unfold("v")
    q = b.op("Unsqueeze", b.op("Mul", "q", b.const(np.float32(0.4))), b.const([3]))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
    if border == "truncate":
        r, c = (np.arange(n)[:, None] + np.arange(kernel) - half for n in (rows, columns))
        inside = ((r >= 0) & (r < rows))[:, None, :, None] & ((c >= 0) & (c < columns))[None, :, None, :]
        inside = inside.reshape(tokens, kernel * kernel)
        token = (r[:, None, :, None] * columns + c[None, :, None, :]).reshape(tokens, kernel * kernel)
        table = np.where(inside, token, -1)
        if mask:
            added = np.where(inside, 0, -np.inf).astype(np.float32).reshape(1, 1, tokens, 1, -1)
            scores = b.op("Add", scores, b.const(added))
    else:
        table = clamped(rows, columns, kernel)
    weights = b.op("Softmax", scores, axis=-1)
    out = b.op("Squeeze", b.op("MatMul", weights, v), b.const([3]))
    return Windowed(build(b, tokens, b.op("Transpose", out, perm=[0, 2, 1, 3]), batch=batch), seen(table, tokens))


def chunked(chunks: int, width: int, *, tail: int = 0, circular: bool = False) -> Windowed:
    """Each chunk of queries meets its own, the previous and the next chunk of keys; ``tail`` tokens are padded away."""
    b = Builder()
    whole, tokens = chunks * width, chunks * width - tail

    def three(value: str) -> str:
        if circular:
            last = b.op("Slice", value, b.const([-width]), b.const([1 << 40]), b.const([2]))
            first = b.op("Slice", value, b.const([0]), b.const([width]), b.const([2]))
            wide = b.op("Concat", last, value, first, axis=2)
        else:
            wide = b.op("Pad", value, b.const([0, 0, width, 0, 0, 0, width + tail, 0]))
        blocks = b.op("Reshape", wide, b.const([BATCH, HEADS, chunks + 2, width, DIM]))
        parts = [b.op("Slice", blocks, b.const([i]), b.const([chunks + i]), b.const([2])) for i in range(3)]
        return b.op("Concat", *parts, axis=3)

    def padded(value: str) -> str:
        return b.op("Pad", value, b.const([0, 0, 0, 0, 0, 0, tail, 0])) if tail else value

    q = b.op("Reshape", padded("q"), b.const([BATCH, HEADS, chunks, width, DIM]))
    k, v = three("k"), three("v")
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
    scores = b.op("Mul", scores, b.const(np.float32(0.4)))
    token = (np.arange(chunks)[:, None] - 1) * width + np.arange(3 * width)[None]
    if circular:
        token = token % tokens
    inside = (token >= 0) & (token < tokens)
    if not inside.all():
        scores = b.op("Where", b.const(inside[:, None, :]), scores, b.const(np.float32(-1e9)))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    out = b.op("Reshape", out, b.const([BATCH, HEADS, whole, DIM]))
    if tail:
        out = b.op("Slice", out, b.const([0]), b.const([tokens]), b.const([2]))
    table = np.where(inside, token, -1).repeat(width, axis=0)[:tokens]
    return Windowed(build(b, tokens, out), seen(table, tokens))
