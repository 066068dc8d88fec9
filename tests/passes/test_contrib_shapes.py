"""Shapes after ONNX Runtime's own operators are those that ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from attncompile.core.model import Model
from attncompile.passes.evaluate import GraphIndex, World
from tests.passes.operator_graphs import one_node

MS = "com.microsoft"
RNG = np.random.default_rng(3)
NONE: tuple[str, None] = ("", None)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 255, shape).astype(np.uint8)


def named(*arrays: np.ndarray | None) -> list[tuple[str, np.ndarray | None]]:
    return [("" if a is None else f"x{i}", a) for i, a in enumerate(arrays)]


ONE = np.float32(0.1)
ZERO = np.uint8(3)
CASES: list[tuple[str, str, list[Any], Sequence[str], dict[str, Any]]] = [
    ("BiasGelu", MS, [f(2, 5, 8), f(8)], ["y"], {}),
    ("FastGelu", MS, [f(2, 5, 8)], ["y"], {}),
    ("QuickGelu", MS, [f(2, 5, 8)], ["y"], {}),
    ("SkipLayerNormalization", MS, [f(2, 5, 8), f(2, 5, 8), f(8)], ["y", "", "", "s"], {}),
    ("SkipSimplifiedLayerNormalization", MS, [f(2, 5, 8), f(2, 5, 8), f(8)], ["y", "", "", "s"], {}),
    ("SimplifiedLayerNormalization", "", [f(2, 5, 8), f(8)], ["y"], {}),
    ("EmbedLayerNormalization", MS, [i32(1, 2, 3).reshape(1, 3), i32(0, 1, 0).reshape(1, 3), f(9, 8), f(7, 8), f(2, 8),
                                     f(8), f(8), i32(1, 1, 0).reshape(1, 3)], ["y", "m", "e"], {}),
    ("MultiHeadAttention", MS, [f(2, 5, 12), f(2, 7, 12), f(2, 7, 18)], ["y"], {"num_heads": 3}),
    ("MultiHeadAttention", MS, [f(2, 5, 12), f(2, 3, 7, 4), f(2, 3, 7, 4)], ["y"], {"num_heads": 3}),
    ("MultiHeadAttention", MS, [f(2, 5, 12)] * 3 + [None] * 3 + [f(2, 3, 4, 4)] * 2, ["y", "k", "v"], {"num_heads": 3}),
    ("GroupQueryAttention", MS, [f(2, 5, 32), f(2, 5, 16), f(2, 5, 16), None, None, i32(4, 4), np.array(5, np.int32)],
     ["y"], {"num_heads": 4, "kv_num_heads": 2}),
    ("GroupQueryAttention", MS, [f(2, 5, 64), None, None, None, None, i32(4, 4), np.array(5, np.int32)], ["y"],
     {"num_heads": 4, "kv_num_heads": 2}),
    ("Attention", MS, [f(2, 5, 8), f(8, 24), f(24)], ["y"], {"num_heads": 2}),
    ("Attention", MS, [f(2, 5, 8), f(8, 28), f(28)], ["y"], {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 12]}),
    ("QAttention", MS, [u8(2, 5, 8), u8(8, 24), f(24), ONE, ONE, None, ZERO, ZERO], ["y"], {"num_heads": 2}),
    ("FusedMatMul", MS, [f(2, 3, 5, 4), f(4, 6)], ["y"], {"alpha": 0.5}),
    ("FusedMatMul", MS, [f(2, 3, 5, 4), f(2, 3, 6, 4)], ["y"], {"transB": 1}),
    ("FusedMatMul", MS, [f(3, 4, 5), f(3, 4, 6)], ["y"], {"transA": 1}),
    ("MatMulIntegerToFloat", MS, [u8(2, 5, 8), u8(8, 6), ONE, ONE, ZERO, ZERO], ["y"], {}),
    ("DynamicQuantizeMatMul", MS, [f(2, 5, 8), u8(8, 6), ONE, ZERO], ["y"], {}),
    ("DequantizeLinear", MS, [u8(2, 5), ONE, ZERO], ["y"], {}),
    ("QuantizeLinear", MS, [f(2, 5), ONE, ZERO], ["y"], {}),
    ("MatMulNBits", MS, [f(2, 5, 32), u8(6, 1, 16), f(6)], ["y"], {"K": 32, "N": 6, "bits": 4, "block_size": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "domain", "arrays", "outputs", "attributes"), CASES)
def test_shapes_are_those_of_the_runtime(
    op: str, domain: str, arrays: list[Any], outputs: Sequence[str], attributes: dict[str, Any]
) -> None:
    given = named(*(None if a is None else np.asarray(a) for a in arrays))
    proto = one_node(op, given, outputs, domain=domain, opset=18, **attributes)
    for output in proto.graph.output:  # what ONNX Runtime knows, and nothing from this file
        output.ClearField("type")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip([o for o in outputs if o], session.run(None, {n: a for n, a in given if n}), strict=True))
    world = World(GraphIndex(Model(Path("m.onnx"), proto, "", 18)), {})
    for name, array in found.items():
        assert world.shapes[name] == array.shape
        assert np.dtype(array.dtype) == np.dtype({1: np.float32, 2: np.uint8, 6: np.int32}[world.types[name]])


@pytest.mark.parametrize(
    ("size", "attributes"),
    [
        ((9, 11), {}),
        ((9, 11), {"pads": [1, 2, 0, 1], "strides": [2, 3]}),
        ((12, 13), {"dilations": [2, 1], "pads": [2, 1, 2, 1], "strides": [1, 2]}),
    ],
)
def test_convolutions_with_channels_last(size: tuple[int, int], attributes: dict[str, Any]) -> None:
    """ONNX Runtime's CPU provider has no kernel for them: against the standard Conv, channels first."""
    data, weight = f(2, 6, *size), f(4, 6, 3, 2)
    proto = one_node("Conv", named(data, weight), ["y"], opset=18, **attributes)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x0": data, "x1": weight})
    last = named(data.transpose(0, 2, 3, 1), weight.transpose(0, 2, 3, 1))
    made = one_node("NhwcConv", last, ["y"], domain=MS, opset=18, **attributes)
    world = World(GraphIndex(Model(Path("m.onnx"), made, "", 18)), {})
    assert world.shapes["y"] == expected.transpose(0, 2, 3, 1).shape


def test_the_sum_of_a_group_norm_with_skip() -> None:
    """Its second output, and no other, is the sum; there is no CPU kernel to ask."""
    given = named(f(2, 5, 7, 8), f(8), f(8), f(2, 5, 7, 8))
    made = one_node("SkipGroupNorm", given, ["y", "s"], domain=MS, opset=18, groups=2)
    world = World(GraphIndex(Model(Path("m.onnx"), made, "", 18)), {})
    assert world.shapes["y"] == world.shapes["s"] == (2, 5, 7, 8)
