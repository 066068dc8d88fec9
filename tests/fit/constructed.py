"""Models with one attention site a layer, whose distance from linear attention is known.

Tokens of the ``words`` model are rows of an identity: queries and keys take as many values as there are words, so that
the softmax is linear attention: phi(q) picks the word, phi(k) holds exp(q k scale) for every word. Tokens of the others
are normal: with large weights no small feature map holds their softmax.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.search.constructed import feeds

WORDS = 6


def build(
    tokens: int = 96, heads: int = 2, dim: int = 6, width: int = WORDS, size: float = 1.0, layers: int = 1,
    causal: bool = False, dtype: int = TensorProto.FLOAT, seed: int = 0, masked: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    """x [1, N, width] -> y [1, N, width]: x + attention(x) W in each layer; ``size`` of queries and keys."""
    rng = np.random.default_rng(seed)
    numbers = helper.tensor_dtype_to_np_dtype(dtype)
    stored: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def const(value: np.ndarray, name: str) -> str:
        kind = np.int64 if value.dtype.kind == "i" else numbers
        if all(t.name != name for t in stored):
            stored.append(numpy_helper.from_array(value.astype(kind), name))
        return name

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    inputs = [helper.make_tensor_value_info("x", dtype, [1, tokens, width])]
    shape = const(np.array([0, 0, heads, dim]), "shape")
    back = const(np.array([0, 0, heads * dim]), "back")
    x = "x"
    for layer in range(layers):
        parts = []
        for what, large in zip("qkv", (size, size, 1.0), strict=True):
            weight = rng.standard_normal((width, heads * dim)) * large
            part = op("MatMul", x, const(weight, f"{what}{layer}"))
            parts.append(op("Transpose", op("Reshape", part, shape), perm=[0, 2, 1, 3]))
        query, key, value = parts
        scores = op("MatMul", query, op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = op("Mul", scores, const(np.array(dim**-0.5), "root"))
        if causal:
            mask = np.where(np.tri(tokens, dtype=bool), 0, -np.inf)[None, None]
            scores = op("Add", scores, const(mask, "mask"))
        if masked:
            near = np.abs(np.arange(tokens)[:, None] - np.arange(tokens)) <= 8
            scores = op("Add", scores, const(np.where(near, 0, -np.inf)[None, None], "window"))
        out = op("MatMul", op("Softmax", scores, axis=-1), value)
        out = op("Reshape", op("Transpose", out, perm=[0, 2, 1, 3]), back)
        out = op("MatMul", out, const(rng.standard_normal((heads * dim, width)) / heads, f"o{layer}"))
        x = op("Add", x, out)
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    output = helper.make_tensor_value_info("y", dtype, [1, tokens, width])
    graph = helper.make_graph(nodes, "constructed", inputs, [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def words(count: int, tokens: int = 96, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": np.eye(WORDS, dtype=np.float32)[rng.integers(0, WORDS, (1, tokens))]} for _ in range(count)]


def normal(count: int, tokens: int = 96, width: int = WORDS, seed: int = 1) -> list[dict[str, np.ndarray]]:
    return feeds(count, tokens, width, seed)
