"""How long detection takes on Llama-shaped graphs of several depths: seconds, nodes, seconds per node.

    python tools/detection_time.py --layers 4 8 16 32 64

The graphs are written here, node by node, as the dynamo exporter spells them: RMSNorm in single operators, rotate-half
positions, a KV cache by Concat, keys and values repeated by Unsqueeze, Expand and Reshape, a causal mask computed from
shapes, dynamic batch, sequence and past. The weights lie in an external file that holds nothing (a sparse file of the
right length): whoever read it would need gigabytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.profile import Range
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.symbols import profile_for

DATA = "weights.bin"


@dataclass(frozen=True)
class Sizes:
    """Llama-3-8B's by default."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14336
    vocabulary: int = 128256


class Writer:
    """Collects nodes, stored constants and external weights."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.stored: list[TensorProto] = []
        self.bytes = 0

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: object) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], f"n{len(self.nodes)}", **attributes))
        return name

    def const(self, value: object) -> str:
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        self.stored.append(numpy_helper.from_array(array, f"c{len(self.stored)}"))
        return str(self.stored[-1].name)

    def weight(self, *shape: int) -> str:
        tensor = TensorProto(name=f"w{len(self.stored)}", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        size = 4 * int(np.prod(shape))
        for key, text in (("location", DATA), ("offset", str(self.bytes)), ("length", str(size))):
            tensor.external_data.add(key=key, value=text)
        self.bytes += size
        self.stored.append(tensor)
        return tensor.name


def llama(layers: int, sizes: Sizes | None = None) -> tuple[ModelProto, int]:
    """A decoder with a KV cache, and the length of its external data in bytes."""
    s, w = sizes or Sizes(), Writer()
    hidden = w.op("Gather", w.weight(s.vocabulary, s.hidden), "input_ids")
    batch, length = (w.op("Shape", "input_ids", start=i, end=i + 1) for i in range(2))
    past = w.op("Shape", "past_key_0", start=2, end=3)
    total = w.op("Add", past, length)
    rows = w.op("Add", _range(w, length), past)
    mask = w.op("LessOrEqual", w.op("Unsqueeze", _range(w, total), w.const([0])), w.op("Unsqueeze", rows, w.const([1])))
    visible = w.op("Where", mask, w.const(0.0), w.const(float("-inf")))
    angles = w.op("MatMul", w.op("Unsqueeze", w.op("Cast", rows, to=1), w.const([1])), w.weight(1, s.head_dim // 2))
    angles = w.op("Concat", angles, angles, axis=-1)
    cos, sin = w.op("Cos", angles), w.op("Sin", angles)
    presents = []
    for layer in range(layers):
        x = _norm(w, s, hidden)
        q, k, v = (_heads(w, s, x, n, batch, length) for n in (s.heads, s.kv_heads, s.kv_heads))
        q, k = (_rotate(w, s, y, cos, sin) for y in (q, k))
        k = w.op("Concat", f"past_key_{layer}", k, out=f"present_key_{layer}", axis=2)
        v = w.op("Concat", f"past_value_{layer}", v, out=f"present_value_{layer}", axis=2)
        presents += [k, v]
        k, v = (_repeat(w, s, y, batch, total) for y in (k, v))
        root = float(np.sqrt(np.sqrt(1 / s.head_dim)))
        turned = w.op("Transpose", k, perm=[0, 1, 3, 2])
        scores = w.op("MatMul", w.op("Mul", q, w.const(root)), w.op("Mul", turned, w.const(root)))
        weights = w.op("Softmax", w.op("Add", scores, visible), axis=-1)
        y = w.op("Transpose", w.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        y = w.op("Reshape", y, w.op("Concat", batch, length, w.const([s.heads * s.head_dim]), axis=0))
        hidden = w.op("Add", hidden, w.op("MatMul", y, w.weight(s.heads * s.head_dim, s.hidden)))
        x = _norm(w, s, hidden)
        gate, up = (w.op("MatMul", x, w.weight(s.hidden, s.inner)) for _ in range(2))
        x = w.op("Mul", w.op("Mul", gate, w.op("Sigmoid", gate)), up)
        hidden = w.op("Add", hidden, w.op("MatMul", x, w.weight(s.inner, s.hidden)))
    w.op("MatMul", _norm(w, s, hidden), w.weight(s.hidden, s.vocabulary), out="logits")
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    shape = ["batch", s.kv_heads, "past", s.head_dim]
    inputs += [
        helper.make_tensor_value_info(f"past_{x}_{i}", 1, shape) for i in range(layers) for x in ("key", "value")
    ]
    outputs = [onnx.ValueInfoProto(name=n) for n in ("logits", *presents)]
    graph = helper.make_graph(w.nodes, "llama", inputs, outputs, w.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), w.bytes


def _range(w: Writer, length: str) -> str:
    return w.op("Range", w.const(0), w.op("Squeeze", length), w.const(1))


def _norm(w: Writer, s: Sizes, x: str) -> str:
    mean = w.op("ReduceMean", w.op("Pow", x, w.const(2.0)), w.const([-1]))
    root = w.op("Reciprocal", w.op("Sqrt", w.op("Add", mean, w.const(1e-6))))
    return w.op("Mul", w.op("Mul", x, root), w.weight(s.hidden))


def _heads(w: Writer, s: Sizes, x: str, heads: int, batch: str, length: str) -> str:
    x = w.op("MatMul", x, w.weight(s.hidden, heads * s.head_dim))
    shape = w.op("Concat", batch, length, w.const([heads]), w.const([s.head_dim]), axis=0)
    return w.op("Transpose", w.op("Reshape", x, shape), perm=[0, 2, 1, 3])


def _rotate(w: Writer, s: Sizes, x: str, cos: str, sin: str) -> str:
    half, end = w.const([s.head_dim // 2]), w.const([2**62])
    left = w.op("Slice", x, w.const([0]), half, w.const([3]))
    right = w.op("Neg", w.op("Slice", x, half, end, w.const([3])))
    turned = w.op("Concat", right, left, axis=-1)
    return w.op("Add", w.op("Mul", x, cos), w.op("Mul", turned, sin))


def _repeat(w: Writer, s: Sizes, x: str, batch: str, total: str) -> str:
    dim = w.const([s.head_dim])
    wide = w.op("Concat", batch, w.const([s.kv_heads]), w.const([s.heads // s.kv_heads]), total, dim, axis=0)
    x = w.op("Expand", w.op("Unsqueeze", x, w.const([2])), wide)
    return w.op("Reshape", x, w.op("Concat", batch, w.const([s.heads]), total, dim, axis=0))


@dataclass(frozen=True)
class Measured:
    layers: int
    nodes: int
    sites: int
    seconds: float
    """Load, normalise and detect."""


def measure(layers: int, folder: Path, repeats: int = 1) -> Measured:
    """The shortest of ``repeats`` runs.

    Raises:
        RuntimeError: not every layer's attention was found.
    """
    proto, size = llama(layers)
    path = folder / f"llama{layers}.onnx"
    path.write_bytes(proto.SerializeToString())
    with (folder / DATA).open("wb") as handle:
        handle.truncate(size)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        model = normalise(load(path))
        ranges = {"batch": Range(1, 1, 2), "sequence": Range(1, 32, 512), "past": Range(1, 64, 512)}
        found = detect(model, profile_for(model, ranges), index=GraphIndex(model))
        taken.append(time.perf_counter() - start)
        if len(found.sites) != layers:
            reasons = "; ".join(sorted({m.reason for m in found.near_misses})[:3])
            raise RuntimeError(f"{len(found.sites)} of {layers} sites were found: {reasons}")
    return Measured(layers, len(proto.graph.node), len(found.sites), min(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of detection on Llama-shaped graphs.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=1, help="the shortest of so many runs counts")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in options.layers:
            rows.append(measure(layers, Path(folder), options.repeats))
    if options.format == "json":
        print(json.dumps([vars(r) for r in rows]))
        return
    print("| layers | nodes | sites | seconds | seconds per 1,000 nodes |\n|---|---|---|---|---|")
    for r in rows:
        print(f"| {r.layers} | {r.nodes} | {r.sites} | {r.seconds:.2f} | {1000 * r.seconds / r.nodes:.2f} |")


if __name__ == "__main__":
    main()
