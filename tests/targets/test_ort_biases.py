"""Biases of keys that go and biases of values that move behind the attention: what may, what may not, the same numbers
by a naive attention in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from attncompile.plugins import kernels
from attncompile.targets.ort_fusions import fuse
from tests.targets.test_ort_fusions import Graph

B, N, H, D, OUT = 2, 7, 6, 5, 11
C = H * D


@pytest.fixture(autouse=True)
def registered() -> None:
    for kernel in kernels().values():
        kernel.register()


class Attention(OpRun):
    """By its definition, query by query."""

    op_domain = "attncompile"

    def _run(
        self, query: Any, key: Any, value: Any, key_mask: Any = None, bias: Any = None, sinks: Any = None, **said: Any
    ) -> tuple[Any]:  # fmt: skip
        # onnx adds the defaults of its own op of this name.
        left, right, scale, softcap = (
            said.get(n, x) for n, x in (("left", -1), ("right", -1), ("scale", 0), ("softcap", 0))
        )
        layouts = {x: said.get(f"{x}_layout", "BNHD") for x in "qkvo"}
        q, k, v = (
            x.astype(np.float64).transpose([layouts[n].index(a) for a in "BNHD"])
            for n, x in (("q", query), ("k", key), ("v", value))
        )
        out = np.zeros((*q.shape[:3], v.shape[3]))
        for b, i, h in np.ndindex(*q.shape[:3]):
            group = h * k.shape[2] // q.shape[2]
            place = i + k.shape[1] - q.shape[1]
            seen = [
                j for j in range(k.shape[1]) if (left < 0 or j >= place - left) and (right < 0 or j <= place + right)
            ]
            if key_mask is not None:
                seen = [j for j in seen if np.broadcast_to(key_mask, (len(q), 1, 1, k.shape[1]))[b, 0, 0, j]]
            if not seen:
                continue
            s = np.array([scale * q[b, i, h] @ k[b, j, group] for j in seen])
            s = softcap * np.tanh(s / softcap) if softcap else s
            weights = np.exp(s - s.max())
            rest = 0.0 if sinks is None else np.exp(sinks[h] - s.max())
            out[b, i, h] = weights @ v[b, seen, group] / (weights.sum() + rest)
        return (out.transpose(["BNHD".index(a) for a in layouts["o"]]).astype(query.dtype),)


def run(proto: ModelProto) -> np.ndarray:
    random = np.random.default_rng(1)
    evaluator = ReferenceEvaluator(proto, new_ops=[Attention])
    feeds = {
        i.name: random.random([d.dim_value for d in i.type.tensor_type.shape.dim]) < 0.7
        if i.type.tensor_type.elem_type == TensorProto.BOOL
        else random.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in proto.graph.input
    }
    return np.asarray(evaluator.run(None, feeds)[0])


def product(g: Graph, x: str, width: int, seed: int, spelled: str = "add") -> str:
    """``x`` [B, n, C] times a matrix, plus a bias, as heads."""
    weight, bias = 0.3 * g.weight(C, width, seed=seed), g.weight(width, seed=seed + 100)
    if spelled == "gemm":
        flat = g.op("Reshape", x, np.array([-1, C]))
        return str(g.op("Reshape", g.op("Gemm", flat, weight, bias), np.array([B, -1, width // D, D])))
    y = g.op("MatMul", x, weight)
    if spelled == "each head":
        return str(g.op("Add", g.op("Reshape", y, np.array([B, -1, width // D, D])), g.weight(D, seed=seed + 100)))
    y = g.op("Add", *((y, bias) if spelled == "add" else (bias, y)))
    return str(g.op("Reshape", y, np.array([B, -1, width // D, D])))


def model(
    spelled: str = "add", kv: int = H, keys: int = N, more: tuple[str, ...] = (), behind: str = "add",
    o_layout: str = "BNHD", also: str = "", **attributes: Any,
) -> ModelProto:  # fmt: skip
    """Query, key and value with biases, attention, a product with a bias. ``also``: what else is read."""
    g = Graph(x=(B, N, C), y=(B, keys, C))
    q, k, v = product(g, "x", C, 0), product(g, "y", kv * D, 1, spelled), product(g, "y", kv * D, 2, spelled)
    inputs = {"key_mask": "mask", "sinks": g.weight(H, seed=9)}
    last = max((["key_mask", "bias", "sinks"].index(n) + 1 for n in more), default=0)
    given = [inputs[n] if n in more else "" for n in ("key_mask", "bias", "sinks")[:last]]
    if "key_mask" in more:
        g.inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, (B, 1, 1, keys)))
    v = k if also == "keys are values" else v
    out = g.op("Attention", q, k, v, *given, domain="attncompile", scale=0.4, o_layout=o_layout, **attributes)
    rows = np.array([B * N, C] if behind == "gemm" else [B, N, C])
    flat = g.op("Reshape", out, rows)
    weight, bias = 0.3 * g.weight(C, OUT, seed=3), g.weight(OUT, seed=103)
    if behind.startswith("gemm"):
        y = g.op("Gemm", flat, weight.T.copy(), bias, transB=1)
    else:
        y = g.op("MatMul", flat, weight)
        y = y if behind == "none" else g.op("Add", bias, y)
    if also in ("keys", "values", "output"):
        read = {"keys": k, "values": v, "output": out}[also]
        y = g.op("Add", y, g.op("ReduceMean", read, keepdims=0))
    if also == "biased keys":
        biased = next(n.output[0] for n in g.nodes[4:] if n.op_type == "Add")
        y = g.op("Add", y, g.op("ReduceMean", biased, keepdims=0))
    return g.model(y)


def checked(proto: ModelProto) -> dict[str, int]:
    """What was done about biases, the numbers being the same."""
    result = fuse(proto, Path())
    want, got = run(proto), run(result.proto)
    assert np.abs(want).max() > 0.1 and np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)
    return {n.rpartition(" ")[2]: c for n, c in result.counts.items() if n.startswith("biases")}


def adds(proto: ModelProto) -> int:
    biased = (n.op_type == "Add" or (n.op_type == "Gemm" and len(n.input) > 2) for n in proto.graph.node)
    return sum(biased)


@pytest.mark.parametrize("spelled", ["add", "turned add", "gemm", "each head"])
@pytest.mark.parametrize("behind", ["add", "gemm"])
@pytest.mark.parametrize("kv", [H, 2, 1])
def test_both_go(spelled: str, behind: str, kv: int) -> None:
    proto = model(spelled, kv, behind=behind)
    assert checked(proto) == {"keys": 1, "values": 1}
    assert (adds(proto), adds(fuse(proto, Path()).proto)) == (4, 2)


def test_other_numbers_of_keys_and_windows() -> None:
    both = {"keys": 1, "values": 1}
    assert checked(model(keys=4)) == both
    assert checked(model(right=0)) == checked(model(left=2, right=1)) == both
    # Rows without a key keep the bias of their values; what a key adds to all scores of a row is nothing there either.
    assert checked(model(keys=4, right=0)) == checked(model(keys=9, left=1)) == {"keys": 1}
    assert checked(model(more=("key_mask",))) == {"keys": 1}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"softcap": 2.0}, {"values": 1}), ({"more": ("sinks",)}, {}), ({"also": "keys are values"}, {}),
        ({"also": "keys"}, {"values": 1}), ({"also": "biased keys"}, {"values": 1}), ({"also": "values"}, {"keys": 1}),
        ({"also": "output"}, {"keys": 1}), ({"behind": "none"}, {"keys": 1}), ({"o_layout": "BHND"}, {"keys": 1}),
    ],
)  # fmt: skip
def test_what_sees_a_bias_keeps_it(given: dict[str, Any], wanted: dict[str, int]) -> None:
    assert checked(model(**given)) == wanted


def test_a_bias_that_differs_between_tokens_stays() -> None:
    g = Graph(x=(B, N, C))
    q, v = product(g, "x", C, 0), product(g, "x", C, 2)
    moved = g.op("Add", g.op("MatMul", "x", g.weight(C, C)), g.weight(N, C))
    k = g.op("Reshape", moved, np.array([B, N, H, D]))
    out = g.op("Attention", q, k, v, domain="attncompile", scale=0.4)
    result = fuse(g.model(g.op("Reshape", out, np.array([B, N, C]))), Path())
    assert not [n for n in result.counts if n.startswith("biases")]
    # As many elements as a row of heads, over another axis.
    g = Graph(x=(B, N, C))
    k = g.op("Reshape", g.op("Add", "x", g.weight(C)), np.array([B, C, 1, N]))
    q, v = (g.op("Reshape", x, np.array([B, C, 1, N])) for x in ("x", "x"))
    result = fuse(g.model(g.op("Attention", q, k, v, domain="attncompile", scale=0.4)), Path())
    assert not [n for n in result.counts if n.startswith("biases")]


def test_heads_and_tokens_are_told_apart() -> None:
    """Where they are as many: keys with heads before tokens, an output with tokens behind heads."""
    n = H
    g = Graph(x=(B, n, C))
    q, v = product(g, "x", C, 0), product(g, "x", C, 2)
    k = g.op("Reshape", g.op("Add", g.op("MatMul", "x", g.weight(C, C)), g.weight(C)), np.array([B, H, n, D]))
    out = g.op("Attention", q, k, v, domain="attncompile", scale=0.4, k_layout="BHND", o_layout="BHND")
    y = g.op("MatMul", g.op("Reshape", out, np.array([B, n, C])), 0.3 * g.weight(C, OUT, seed=3))
    assert checked(g.model(g.op("Add", y, g.weight(OUT)))) == {}


def test_a_log_sum_exp_sees_the_keys() -> None:
    proto = model()
    (node,) = [n for n in proto.graph.node if n.domain == "attncompile"]
    node.output.append("lse")
    proto.graph.output.append(helper.make_tensor_value_info("lse", TensorProto.FLOAT, [B, H, N]))
    assert not [n for n in fuse(proto, Path()).counts if n.startswith("biases of keys")]


def neighborhood(**attributes: Any) -> ModelProto:
    g = Graph(x=(B, N, C))
    said = {
        "scale": 0.4, "grid": [N], "kernel_size": [3], "left": [1], "stride": [1], "dilation": [1], "causal": [0],
        "border": "truncate", "shape": "box", "prefix": 0, "suffix": 0, "masked_rows": "zero", **attributes,
    }  # fmt: skip
    parts = [product(g, "x", C, i) for i in range(3)]
    flat = g.op("Reshape", g.op("NeighborhoodAttention", *parts, domain="attncompile", **said), np.array([B, N, C]))
    return g.model(g.op("Add", g.op("MatMul", flat, g.weight(C, OUT)), g.weight(OUT)))


def test_neighborhoods() -> None:
    for given, wanted in (
        ({}, {"biases of keys": 1, "biases of values": 1}),
        ({"stride": [4], "causal": [1], "left": [2]}, {"biases of keys": 1}),  # a group's first queries may see nothing
    ):
        counts = fuse(neighborhood(**given), Path()).counts
        assert {n: c for n, c in counts.items() if n.startswith("biases")} == wanted


def test_a_bias_that_fp16_cannot_hold_stays() -> None:
    proto = model()
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor)
            array = array * (3000 if array.shape == (C, OUT) else 1)
            large = array.shape == (OUT,)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array((array * 0 + 65504 if large else array).astype(np.float16), tensor.name)
            )
    for value in proto.graph.input:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT16
    counts = fuse(proto, Path()).counts
    assert counts["biases of keys"] == 1 and "biases of values" not in counts
