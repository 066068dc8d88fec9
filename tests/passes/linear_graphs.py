"""Linear attention written node by node, and the comparison of a detected site with what the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from attncompile.core.model import Model
from attncompile.core.site import AttentionSite, Detection
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from attncompile.verification.linear_reference import linear_output
from tests.passes.attention_graphs import Builder, save


@dataclass(frozen=True)
class Spec:
    """One spelling. ``inner`` is done to the graph's parts: see ``build``."""

    batch: int = 2
    heads: int = 3
    kv_heads: int = 3
    length: int = 11
    keys: int = 0  # 0: as many as queries
    dim: int = 5
    value_dim: int = 7
    order: str = "kv"  # kv: Q (K^T V); vk: (V^T K) Q^T on channels before tokens; einsum: tokens before heads
    query_map: str = "relu"
    key_map: str = "relu"
    normaliser: str = "none"  # none, pad, concat, split, gather, sum, ones, mul, reciprocal, einsum
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    scale_at: str = "query"  # query, key, value, state, after
    seed: int = 0


Change = Callable[[Builder, str], str]


class Writer:
    """Writes one site; ``change`` may put a node behind a named part (query, key, value, state, total, out)."""

    def __init__(self, spec: Spec, **change: Change) -> None:
        self.spec, self.b, self.change = spec, Builder(), change
        self.extra: list[str] = []
        self._rng = np.random.default_rng(spec.seed)

    def part(self, name: str, value: str) -> str:
        return self.change[name](self.b, value) if name in self.change else value

    def number(self, value: float) -> str:
        return self.b.const(np.array(value, np.float32))

    def project(self, x: str, length: int, heads: int, dim: int) -> str:
        """[batch, length, width] -> [batch, length, heads, dim]"""
        weight = (self._rng.standard_normal((16, heads * dim)) / 4).astype(np.float32)
        y = self.b.op("MatMul", x, self.b.const(weight))
        return self.b.op("Reshape", y, self.b.const([self.spec.batch, length, heads, dim]))

    def mapped(self, x: str, kind: str, dim_axis: int, token_axis: int, query: bool) -> str:
        b, one = self.b, self.number
        if kind == "softmax":
            return b.op("Softmax", x, axis=dim_axis if query else token_axis)
        if kind == "elu+1":
            return b.op("Add", one(1.0), b.op("Elu", x))
        if kind == "elu+1 where":
            return b.op("Where", b.op("Greater", x, one(0.0)), b.op("Add", x, one(1.0)), b.op("Exp", x))
        if kind == "elu+1 parts":
            low = b.op("Exp", b.op("Min", x, one(0.0)))
            return b.op("Add", b.op("Relu", x), low)
        if kind == "relu max":
            return b.op("Max", one(0.0), x)
        if kind == "relu clip":
            return b.op("Clip", x, one(0.0))
        if kind == "relu+eps":
            return b.op("Add", b.op("Relu", x), one(1e-6))
        if kind == "relu6":
            return b.op("Clip", x, one(0.0), one(6.0))
        if kind == "elu alpha":
            return b.op("Add", b.op("Elu", x, alpha=1.001), one(1.0))
        if kind == "elu+2":
            return b.op("Add", b.op("Elu", x), one(2.0))
        if kind == "identity":
            return x
        return b.op({"relu": "Relu", "exp": "Exp"}[kind], x)

    def repeated(self, x: str) -> str:
        """[batch, kv_heads, a, b] -> [batch, heads, a, b]"""
        s = self.spec
        if s.kv_heads == s.heads:
            return x
        times = s.heads // s.kv_heads
        x = self.b.op("Unsqueeze", x, self.b.const([2]))
        x = self.b.op("Expand", x, self.b.const([1, 1, times, 1, 1]))
        keys = s.keys or s.length
        return self.b.op("Reshape", x, self.b.const([s.batch, s.heads, keys, -1]))

    def scaled(self, name: str, x: str) -> str:
        s = self.spec
        return self.b.op("Mul", x, self.number(s.scale)) if s.scale != 1.0 and s.scale_at == name else x

    def build(self) -> onnx.ModelProto:
        """x0 [batch, length, 16] (and x1 [batch, keys, 16]) -> y [batch, length, heads * value_dim]"""
        s, b = self.spec, self.b
        keys, source = s.keys or s.length, "x1" if s.keys else "x0"
        q = self.project("x0", s.length, s.heads, s.dim)
        k = self.project(source, keys, s.kv_heads, s.dim)
        v = self.project(source, keys, s.kv_heads, s.value_dim)
        q, k, v = (self.part(n, x) for n, x in (("query", q), ("key", k), ("value", v)))
        heads_first = s.order != "einsum"
        if heads_first:
            q, k, v = (b.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, k, v))
            k, v = self.repeated(k), self.repeated(v)
        tokens = 2 if heads_first else 1
        q = self.scaled("query", self.mapped(q, s.query_map, 3, tokens, True))
        k = self.scaled("key", self.mapped(k, s.key_map, 3, tokens, False))
        q, k = self.part("query_features", q), self.part("key_features", k)
        v = self.scaled("value", v)
        out = self._channels_first(q, k, v) if s.order == "vk" else self._tokens_first(q, k, v, heads_first)
        out = self.part("out", self.scaled("after", out))
        out = b.op("Transpose", out, perm=[0, 2, 1, 3]) if heads_first else out
        out = b.op("Reshape", out, b.const([s.batch, s.length, s.heads * s.value_dim]))
        out = b.op("Identity", out)
        inputs = [helper.make_tensor_value_info("x0", 1, [s.batch, s.length, 16])]
        if s.keys:
            inputs.append(helper.make_tensor_value_info("x1", 1, [s.batch, keys, 16]))
        if any("pad" in n.input for n in b.nodes):
            inputs.append(helper.make_tensor_value_info("pad", 1, [s.batch, keys, 1, 1]))
        outputs = [helper.make_tensor_value_info(o, 1, None) for o in (out, *self.extra)]
        graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def bounded(self, total: str) -> str:
        s = self.spec
        total = self.b.op("Add", total, self.number(s.epsilon)) if s.epsilon else total
        total = self.b.op("Clip", total, self.number(s.floor)) if s.floor else total
        return self.part("total", total)

    def _padded(self, v: str, axis: int) -> str:
        s, b = self.spec, self.b
        if s.normaliser == "concat":
            shape = [s.batch, s.heads, s.keys or s.length, 1] if axis == 3 else None
            assert shape is not None
            return b.op("Concat", v, b.const(np.ones(shape, np.float32)), axis=3)
        pads = [0] * 8
        pads[4 + axis] = 1
        return b.op("Pad", v, b.const(pads), self.number(1.0))

    def _cut(self, y: str, axis: int) -> str:
        s, b = self.spec, self.b
        if s.normaliser == "split":
            top, bottom = f"top{len(b.nodes)}", f"bottom{len(b.nodes)}"
            b.nodes.append(
                helper.make_node("Split", [y, b.const([s.value_dim, 1])], [top, bottom], axis=axis)
            )  # fmt: skip
        else:
            top = b.op("Slice", y, b.const([0]), b.const([-1]), b.const([axis]))
            if s.normaliser == "gather":
                bottom = b.op("Gather", y, b.const(np.array(-1)), axis=axis)
                bottom = b.op("Unsqueeze", bottom, b.const([axis]))
            else:
                bottom = b.op("Slice", y, b.const([-1]), b.const([2**62]), b.const([axis]))
        return b.op("Div", top, self.bounded(bottom))

    def _channels_first(self, q: str, k: str, v: str) -> str:
        s, b = self.spec, self.b
        q, v = b.op("Transpose", q, perm=[0, 1, 3, 2]), b.op("Transpose", v, perm=[0, 1, 3, 2])
        v = self._padded(v, 2) if s.normaliser != "none" else v
        state = self.scaled("state", self.part("state", b.op("MatMul", v, k)))
        y = b.op("MatMul", state, q)
        y = self._cut(y, 2) if s.normaliser != "none" else y
        return b.op("Transpose", y, perm=[0, 1, 3, 2])

    def _tokens_first(self, q: str, k: str, v: str, heads_first: bool) -> str:
        s, b = self.spec, self.b
        ones = s.normaliser in ("pad", "concat", "split", "gather")
        v = self._padded(v, 3) if ones else v
        if heads_first:
            state = b.op("MatMul", b.op("Transpose", k, perm=[0, 1, 3, 2]), v)
        else:
            state = b.op("Einsum", k, v, equation="zjhd,zjhe->zhed")
        state = self.scaled("state", self.part("state", state))
        y = b.op("MatMul", q, state) if heads_first else b.op("Einsum", state, q, equation="zhed,zihd->zihe")
        if ones:
            return self._cut(y, 3)
        if s.normaliser == "none":
            return y
        tokens = 2 if heads_first else 1
        if s.normaliser == "ones":
            column = b.const(np.ones((s.keys or s.length, 1), np.float32))
            total = b.op("MatMul", q, b.op("MatMul", b.op("Transpose", k, perm=[0, 1, 3, 2]), column))
        elif s.normaliser == "einsum":
            gone = b.op("Einsum", k, equation="zhjd->zhd" if heads_first else "zjhd->zhd")
            equation = "zhid,zhd->zhi" if heads_first else "zihd,zhd->zih"
            total = b.op("Unsqueeze", b.op("Einsum", q, gone, equation=equation), b.const([3]))
        else:
            gone = b.op("ReduceSum", k, b.const([tokens]), keepdims=1)
            total = b.op("ReduceSum", b.op("Mul", gone, q), b.const([3]), keepdims=1)
            if s.normaliser == "sum" and heads_first:
                b.nodes.pop(), b.nodes.pop()
                b.stored.pop()
                total = b.op("MatMul", q, b.op("Transpose", gone, perm=[0, 1, 3, 2]))
        total = self.bounded(total)
        if s.normaliser == "reciprocal":
            return b.op("Mul", b.op("Reciprocal", total), y)
        return b.op("Div", y, total)


def build(spec: Spec, **change: Change) -> onnx.ModelProto:
    """The graph of ``spec``, changed at the named parts."""
    return Writer(spec, **change).build()


def detected(proto: onnx.ModelProto, folder: Path) -> tuple[Model, Detection]:
    """What detection finds, after operands were given rank 4 where that helps."""
    model = normalise(load(save(proto, folder)))
    profile = profile_for(model, {})
    detection = detect(model, profile)
    if any(m.code in HELPED for m in detection.near_misses):
        model = separate(model, profile)
        detection = detect(model, profile)
    return model, detection


def feed_of(model: Model, seed: int = 3, sizes: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Random inputs; ``pad`` is one or zero; ``sizes`` are those of dynamic dimensions."""
    rng = np.random.default_rng(seed)
    feed = {}
    for info in model.proto.graph.input:
        shape = [d.dim_value or (sizes or {})[d.dim_param] for d in info.type.tensor_type.shape.dim]
        kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        feed[info.name] = rng.standard_normal(shape).astype(kind)
        if info.name == "pad":
            feed[info.name] = (feed[info.name] > -0.8).astype(kind)
    return feed


def error_of(model: Model, site: AttentionSite, feed: dict[str, np.ndarray]) -> float:
    """Relative L2 between the site rebuilt from its facts and the same value of the original graph in ONNX Runtime."""
    facts = site.linear
    assert facts is not None
    operands = [o.value for o in (site.query, site.key, site.value, site.output)]
    names = list(dict.fromkeys(operands))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    have = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = dict(zip(names, session.run(names, feed), strict=True))
    want = values[site.output.value].astype(np.float64)
    got = linear_output(site, {**feed, **values})
    assert got.shape == want.shape
    dead = np.isnan(want)  # 0 / 0: a query without features, in a graph without an epsilon
    assert np.array_equal(dead, np.isnan(got))
    assert not dead.all()
    return float(np.linalg.norm((got - want)[~dead]) / np.linalg.norm(want[~dead]))
