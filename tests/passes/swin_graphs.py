"""A layer of Swin as a graph: windows around projections and attention, each part in several ways to write it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Layer:
    """``twist`` changes one thing, after which windows may not be taken out, or not in the same way."""

    grid: tuple[int, int] = (6, 9)
    window: tuple[int, int] = (3, 3)
    shift: tuple[int, int] = (1, 1)
    heads: int = 3
    dim: int = 4
    batch: int = 1
    fill: float = -100.0
    roll: str = "slices"  # slices | gather
    qkv: str = "apart"  # apart | fused | gemm
    mask: str = "five axes"  # five axes | merged | bool
    bias: bool = True
    cosine: bool = False
    late: bool = False  # projections before the windows
    seed: int = 0
    twist: str = ""

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    @property
    def places(self) -> int:
        return prod(self.window)

    @property
    def windows(self) -> int:
        return self.tokens // self.places

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    def model(self) -> ModelProto:
        return _Build(self).model()

    def feed(self) -> dict[str, np.ndarray]:
        shape = (self.batch, self.tokens, self.channels)
        return {"x": np.random.default_rng(self.seed + 1).standard_normal(shape).astype(np.float32)}


@dataclass
class _Build:
    layer: Layer
    nodes: list[NodeProto] = field(default_factory=list)
    stored: list[TensorProto] = field(default_factory=list)

    def model(self) -> ModelProto:
        it = self.layer
        c, heads, dim = it.channels, it.heads, it.dim
        wide = self.op("Relu", "x") if it.twist != "no-op" else "x"
        if it.late:
            sides = [self.heads_of(self.partition(self.linear(wide, c, c, x), c), x) for x in "qkv"]
        elif it.qkv == "fused":
            joint = self.linear(self.partition(wide, c), c, 3 * c, "qkv")
            five = self.op("Reshape", joint, self.ints(-1, it.places, 3, heads, dim))
            moved = self.op("Transpose", five, perm=[2, 0, 3, 1, 4])
            parts = [f"part{i}" for i in range(3)]
            self.nodes.append(helper.make_node("Split", [moved], parts, axis=0, num_outputs=3))
            sides = [self.op("Squeeze", x, self.ints(0)) for x in parts]
        else:
            inside = self.partition(wide, c)
            if it.twist == "norm over a window":
                mean = self.op("ReduceMean", inside, self.ints(1), keepdims=1)
                inside = self.op("Sub", inside, mean)
            if it.twist == "positions in a window":
                inside = self.op("Add", inside, self.constant(self.random("place", it.places, c)))
            sides = [self.heads_of(self.linear(inside, c, c, x), x) for x in "qkv"]
        out = self.attend(*sides)
        flat = self.op("Reshape", self.op("Transpose", out, perm=[0, 2, 1, 3]), self.ints(-1, it.places, c))
        if it.twist == "mean of the outputs":
            flat = self.op("Add", flat, self.op("ReduceMean", flat, self.ints(1), keepdims=1))
        projected = flat if it.late else self.linear(flat, c, c, "out")
        back = self.reverse(projected, c)
        self.nodes.append(helper.make_node("Add", ["x", self.linear(back, c, c, "out") if it.late else back], ["y"]))
        outputs = ["y"] + [projected] * (it.twist == "windows are an output")
        shape = [it.batch, it.tokens, c]
        graph = helper.make_graph(
            self.nodes, "swin", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
             *(onnx.ValueInfoProto(name=o) for o in outputs[1:])], self.stored,
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)

    # Windows.

    def partition(self, value: str, c: int) -> str:
        it = self.layer
        (h, w), (m, n) = it.grid, it.window
        value = self.op("Reshape", value, self.ints(it.batch, h, w, c))
        value = self.rolled(value, [-s for s in it.shift])
        cut = self.op("Reshape", value, self.ints(it.batch, h // m, m, w // n, n, c))
        moved = self.op("Transpose", cut, perm=[0, 1, 3, 2, 4, 5])
        return self.op("Reshape", moved, self.ints(-1, m * n, c))

    def reverse(self, value: str, c: int) -> str:
        it = self.layer
        (h, w), (m, n) = it.grid, it.window
        if it.twist == "reversed by another window":
            m, n = n, m
        cut = self.op("Reshape", value, self.ints(it.batch, h // m, w // n, m, n, c))
        moved = self.op("Transpose", cut, perm=[0, 1, 3, 2, 4, 5])
        shifts = list(it.shift)
        if it.twist == "rolled back by more":
            shifts[1] += 1
        if it.twist == "rolled on":
            shifts = [-s for s in shifts]
        value = self.rolled(self.op("Reshape", moved, self.ints(it.batch, h, w, c)), shifts)
        return self.op("Reshape", value, self.ints(it.batch, h * w, c))

    def rolled(self, value: str, shifts: list[int]) -> str:
        for axis, (shift, size) in enumerate(zip(shifts, self.layer.grid, strict=True), 1):
            first = -shift % size
            if not first:
                continue
            if self.layer.roll == "gather":
                value = self.op("Gather", value, self.constant(np.roll(np.arange(size), shift)), axis=axis)
                continue
            head = self.op("Slice", value, self.ints(0), self.ints(first), self.ints(axis))
            tail = self.op("Slice", value, self.ints(first), self.ints(size), self.ints(axis))
            value = self.op("Concat", tail, head, axis=axis)
        return value

    # Attention.

    def heads_of(self, value: str, side: str) -> str:
        it = self.layer
        apart = self.op("Reshape", value, self.ints(-1, it.places, it.heads, it.dim))
        return self.op("Transpose", apart, perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str) -> str:
        it = self.layer
        if it.cosine:
            q, k = (self.op("LpNormalization", x, axis=-1, p=2) for x in (q, k))
        else:
            q = self.op("Mul", q, self.constant(np.array(it.dim**-0.5, np.float32)))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        if it.cosine:
            scores = self.op("Mul", scores, self.constant(1 + abs(self.random("scale", it.heads, 1, 1))))
        scores = self.masked(scores)
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), v)

    def masked(self, scores: str) -> str:
        it = self.layer
        bias = self.biases()
        apart = self.apart()
        if it.mask == "merged":
            total = np.broadcast_to(bias, (it.windows, it.heads, it.places, it.places)).copy()
            total += np.where(apart, np.float32(it.fill), np.float32(0))[:, None]
            return self.op("Add", scores, self.constant(np.tile(total, (it.batch, 1, 1, 1))))
        if it.bias or it.twist == "a bias for each window":
            scores = self.op("Add", scores, self.constant(np.tile(bias, (it.batch if len(bias) > 1 else 1, 1, 1, 1))))
        if not apart.any():
            return scores
        shape = (it.batch, it.windows, it.heads, it.places, it.places)
        five = self.op("Reshape", scores, self.ints(*shape))
        if it.mask == "bool":
            fill = self.constant(np.array(it.fill, np.float32))
            five = self.op("Where", self.constant(~apart[None, :, None]), five, fill)
        else:
            added = np.where(apart, np.float32(it.fill), np.float32(0))[None, :, None]
            five = self.op("Add", five, self.constant(added))
        return self.op("Reshape", five, self.ints(-1, *shape[2:]))

    def biases(self) -> np.ndarray:
        """[1, H, W, W]: by the distance of the places, as a relative position bias is."""
        it = self.layer
        m, n = it.window
        table = self.random("table", it.heads, 2 * m - 1, 2 * n - 1)
        row, column = np.divmod(np.arange(m * n), n)
        found = table[:, row[:, None] - row[None] + m - 1, column[:, None] - column[None] + n - 1][None]
        if it.twist == "a bias for each window":
            found = np.repeat(found, it.windows, axis=0)
            found[-1, 0, 1, 0] += 0.5
        return found if it.bias or it.twist else np.zeros_like(found)

    def apart(self) -> np.ndarray:
        """Bool [windows, places, places], by Swin's own construction: regions of the rolled image are numbered."""
        it = self.layer
        regions = np.zeros(it.grid, np.int64)
        for axis, (size, window, shift) in enumerate(zip(it.grid, it.window, it.shift, strict=True)):
            where = np.arange(size)
            number = (where >= size - window).astype(np.int64) + (where >= size - shift) if shift else 0 * where
            regions = 3 * regions + np.expand_dims(number, 1 - axis)
        (h, w), (m, n) = it.grid, it.window
        cut = regions.reshape(h // m, m, w // n, n).transpose(0, 2, 1, 3).reshape(-1, m * n)
        apart = cut[:, :, None] != cut[:, None, :]
        if it.twist == "one element of the mask":
            apart[-1, 0, 1] ^= True
        if it.twist == "the mask of another window":
            apart = np.roll(apart, 1, axis=0)
        return apart

    # Nodes.

    def linear(self, value: str, size: int, out: int, name: str) -> str:
        weight = self.constant(self.random(f"{name}/weight", size, out) / np.float32(size**0.5))
        bias = self.constant(self.random(f"{name}/bias", out))
        if self.layer.qkv != "gemm":
            return self.op("Add", self.op("MatMul", value, weight), bias)
        rows = self.layer.batch * self.layer.tokens
        flat = self.op("Gemm", self.op("Reshape", value, self.ints(rows, size)), weight, bias)
        return self.op("Reshape", flat, self.ints(*([-1, self.layer.places, out] if not self.layer.late else
                                                    [self.layer.batch, -1, out])))  # fmt: skip

    def random(self, name: str, *shape: int) -> np.ndarray:
        rng = np.random.default_rng([self.layer.seed, *name.encode()])
        return rng.standard_normal(shape).astype(np.float32)

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"const{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))
