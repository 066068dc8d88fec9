"""A decoder layer's attention over past and new keys, under a mask that is computed from the shapes of both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.passes.test_lifter_forms import KV, D, Graph, H, W

Masks = Callable[[Graph, str, str, str], str]
"""(graph, new tokens, past tokens, all tokens, each a scalar value) -> bool [new, all], True = seen."""


def whole(b: Graph, value: int) -> str:
    """A scalar int64 constant."""
    return b.const(np.array(value, np.int64))


def count(b: Graph, value: str, axis: int) -> str:
    shape = b.op("Shape", value)
    return b.op("Gather", shape, whole(b, axis), axis=0)


def positions(b: Graph, new: str, past: str, total: str) -> tuple[str, str]:
    """Positions of queries [new, 1] and of keys [1, all]."""
    query = b.op("Range", past, total, whole(b, 1))
    key = b.op("Range", whole(b, 0), total, whole(b, 1))
    return b.op("Unsqueeze", query, b.const([1])), b.op("Unsqueeze", key, b.const([0]))


def window(width: int) -> Masks:
    """The last ``width`` keys, the query's own among them."""

    def mask(b: Graph, new: str, past: str, total: str) -> str:
        i, j = positions(b, new, past, total)
        return b.op("And", b.op("LessOrEqual", j, i), b.op("Greater", j, b.op("Sub", i, whole(b, width))))

    return mask


def model_of(mask: Masks, padded: bool = False, layers: int = 1) -> onnx.ModelProto:
    """x [batch, n, W] with past keys and values [batch, KV, p, D], and, if ``padded``, mask int64 [batch, total]."""
    b = Graph()
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "n", W])]
    x, outputs = "x", []
    new, past = count(b, "x", 1), count(b, "k0", 2)
    total = b.op("Add", past, new)
    seen = b.op("Unsqueeze", mask(b, new, past, total), b.const([0, 1]))
    if padded:
        infos.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "p + n"]))
        keep = b.op("Unsqueeze", b.op("Cast", "mask", to=TensorProto.BOOL), b.const([1, 2]))
        seen = b.op("And", keep, seen)
    bias = b.op("Where", seen, b.number(0.0), b.number(-3.4028234663852886e38))
    for layer in range(layers):
        split = [(b.linear(x, c * D), c) for c in (H, KV, KV)]
        q, k, v = (b.op("Transpose", b.op("Reshape", s, b.const([0, -1, c, D])), perm=[0, 2, 1, 3]) for s, c in split)
        names = (f"k{layer}", f"v{layer}")
        infos += [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", KV, "p", D]) for n in names]
        k, v = (b.op("Concat", old, fresh, axis=2) for old, fresh in zip(names, (k, v), strict=True))
        outputs += [k, v]

        def spread(value: str) -> str:
            ones = b.op("Expand", b.op("Unsqueeze", value, b.const([2])), b.const([1, 1, H // KV, 1, 1]))
            sizes = b.op("Concat", b.op("Shape", "x", start=0, end=1), b.const([H]),
                         b.op("Unsqueeze", total, b.const([0])), b.const([D]), axis=0)  # fmt: skip
            return b.op("Reshape", ones, sizes)

        s = b.op("MatMul", b.op("Mul", q, b.number(0.4)), b.op("Transpose", spread(k), perm=[0, 1, 3, 2]))
        out = b.op("MatMul", b.op("Softmax", b.op("Add", s, bias), axis=-1), spread(v))
        out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([0, -1, H * D]))
        x = b.op("Add", x, b.linear(out, W))
    made = [helper.make_tensor_value_info(b.op("Identity", x), TensorProto.FLOAT, None)]
    made += [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    graph = helper.make_graph(b.nodes, "g", infos, made, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
