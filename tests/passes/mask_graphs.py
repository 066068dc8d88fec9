"""One attention graph around a given mask, and plain definitions of masks, one query and key at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from attncompile.core.grid import TokenGrid
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import Builder, save

Sees = Callable[[int, int], bool]


def drawn(queries: int, keys: int, sees: Sees) -> np.ndarray:
    """Bool [queries, keys] of ``sees(position of the query, key)``; queries are the last of the keys."""
    return np.array([[sees(i + keys - queries, j) for j in range(keys)] for i in range(queries)], dtype=bool)


def attention(b: Builder, apply: Callable[[str], str], heads: int, length: int | str, keys: int | None = None) -> str:
    """softmax(x x^T + mask) x for x [b, n, 4 * heads] (keys and values are the input y where ``keys`` is given)."""
    shape = b.const([0, -1, heads, 4])
    other = "x" if keys is None else "y"
    query = b.op("Transpose", b.op("Reshape", "x", shape), perm=[0, 2, 1, 3])
    key = b.op("Transpose", b.op("Reshape", other, shape), perm=[0, 2, 3, 1])
    value = b.op("Transpose", b.op("Reshape", other, shape), perm=[0, 2, 1, 3])
    weights = b.op("Softmax", apply(b.op("MatMul", query, key)), axis=-1)
    return b.op("MatMul", weights, value)


def site_of(
    b: Builder, apply: Callable[[str], str], heads: int, length: int | str, keys: int | None = None,
    batch: int | str = 2, sizes: Range | None = None, grid: TokenGrid | None = None,
    extra: tuple[onnx.ValueInfoProto, ...] = (), models: list[onnx.ModelProto] | None = None,
) -> AttentionSite:  # fmt: skip
    """The one site of ``attention``; the model is appended to ``models``."""
    out = attention(b, apply, heads, length, keys)
    inputs = [helper.make_tensor_value_info("x", 1, [batch, length, 4 * heads]), *extra]
    if keys is not None:
        inputs.append(helper.make_tensor_value_info("y", 1, [batch, keys, 4 * heads]))
    graph = helper.make_graph(b.nodes, "g", inputs, [helper.make_tensor_value_info(out, 1, [None] * 4)], b.stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if models is not None:
        models.append(model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(save(model, Path(folder)))
        found = detect(loaded, profile_for(loaded, {str(length): sizes} if sizes else {}), grid=grid)
    assert [m.reason for m in found.near_misses] == []
    (site,) = found.sites
    return site


def constant(seen: np.ndarray, form: str = "where", heads: int = 2, grid: TokenGrid | None = None) -> AttentionSite:
    """The site whose mask is stored: a bool in a Where, or numbers that are added (``add``, ``half``)."""
    b = Builder()
    queries, keys = seen.shape

    def apply(scores: str) -> str:
        if form == "where":
            return b.op("Where", b.const(seen[None, None]), scores, b.const(np.array(-np.inf, np.float32)))
        low = np.finfo(np.float32).min if form == "add" else np.float32(-65504)
        return b.op("Add", scores, b.const(np.where(seen, np.float32(0), np.float32(low))[None, None]))

    return site_of(b, apply, heads, queries, None if queries == keys else keys, grid=grid)


def flipped(seen: np.ndarray, seed: int) -> np.ndarray:
    """The same but for one element."""
    out = seen.copy()
    i, j = (int(x) for x in np.random.default_rng(seed).integers(0, seen.shape))
    out[i, j] = not out[i, j]
    return out


def read(site: AttentionSite, queries: int, keys: int) -> np.ndarray:
    """What the structures of the site's mask say together, bool [queries, keys]."""
    out = np.ones((queries, keys), dtype=bool)
    for part in site.mask.parts:
        assert part.kind not in ("opaque", "padding")
        if part.kind in ("window", "causal"):
            left, right = part.left, part.right
            out &= drawn(queries, keys, lambda i, j: (left < 0 or i - j <= left) and (right < 0 or j - i <= right))  # noqa: B023
        elif part.pattern is not None:
            out &= part.pattern.visible(queries, keys)
    return out


BOOL = TensorProto.BOOL


class Positions:
    """Arithmetic on the positions of queries [n, 1] and keys [1, n], computed from the length of x."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        size = b.op("Squeeze", b.op("Shape", "x", start=1, end=2))
        index = b.op("Range", b.const(np.array(0)), size, b.const(np.array(1)))
        self.size = size
        self.query, self.key = b.op("Unsqueeze", index, b.const([1])), b.op("Unsqueeze", index, b.const([0]))
        self.ahead = b.op("Sub", self.key, self.query)

    def number(self, value: int) -> str:
        return self.b.const(np.array(value))

    def between(self, value: str, low: int, high: int) -> str:
        return self.b.op("And", self.b.op("GreaterOrEqual", value, self.number(low)),
                         self.b.op("LessOrEqual", value, self.number(high)))  # fmt: skip

    def cell(self, value: str, size: int, shift: int = 0) -> str:
        """floor((value - shift) / size), of values from 0 (ONNX divides towards 0)."""
        lifted = self.b.op("Add", value, self.number((size - shift) % size))
        return self.b.op("Div", lifted, self.number(size))

    def multiple(self, value: str, of: int) -> str:
        return self.b.op("Equal", self.b.op("Mod", value, self.number(of)), self.number(0))

    def causal(self) -> str:
        return self.b.op("LessOrEqual", self.key, self.query)


def computed(
    make: Callable[[Positions], str], sizes: Range | None, length: int = 24, form: str = "where"
) -> AttentionSite:
    """The site whose mask ``make`` computes, [n, n] bool: at the fixed ``length``, or at a dynamic one."""
    b = Builder()

    def apply(scores: str) -> str:
        seen = b.op("Unsqueeze", make(Positions(b)), b.const([0, 1]))
        low = b.const(np.array(np.finfo(np.float32).min, np.float32))
        if form == "where":
            return b.op("Where", seen, scores, low)
        return b.op("Add", b.op("Where", seen, b.const(np.array(0, np.float32)), low), scores)

    return site_of(b, apply, 2, "n" if sizes else length, sizes=sizes)
