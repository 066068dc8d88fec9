"""BigBird's way to write block-sparse attention: several softmaxes over gathered blocks, joined into one output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.passes.attention_graphs import Builder

SCALE = np.float32(0.35)


@dataclass(frozen=True)
class Blocks:
    """``count`` blocks of ``block`` tokens. The first block's queries see all keys. Those in the middle see, in one
    softmax, the first block, their own, and the blocks ``drawn`` [heads, count - 2, r]. Those of the last see the
    blocks ``last`` [heads, m]. A block that is named several times counts so often.
    """

    batch: int
    heads: int
    dim: int
    block: int
    count: int
    drawn: np.ndarray
    last: np.ndarray

    @property
    def tokens(self) -> int:
        return self.block * self.count

    @staticmethod
    def random(seed: int, *, per_head: bool, width: int = 2) -> Blocks:
        rng = np.random.default_rng(seed)
        heads, count = int(rng.integers(2, 5)), int(rng.integers(4, 8))
        sets = heads if per_head else 1
        drawn = np.broadcast_to(rng.integers(count, size=(sets, count - 2, width)), (heads, count - 2, width))
        last = np.broadcast_to(rng.integers(count, size=(sets, 3)), (heads, 3))
        return Blocks(
            int(rng.integers(1, 3)), heads, int(rng.integers(3, 7)), int(rng.integers(2, 6)), count, drawn, last
        )

    def counts(self) -> np.ndarray:
        """Int [heads, tokens, tokens], written down block by block."""
        blocks = np.zeros((self.heads, self.count, self.count), int)
        blocks[:, 0] = 1
        for h in range(self.heads):
            for i in range(1, self.count - 1):
                for j in (0, i, *self.drawn[h, i - 1]):
                    blocks[h, i, j] += 1
            for j in self.last[h]:
                blocks[h, -1, j] += 1
        return blocks.repeat(self.block, axis=1).repeat(self.block, axis=2)


def graph(given: Blocks, fault: str = "") -> onnx.ModelProto:
    """x [batch, tokens, width] -> y, with projections around; ``fault`` changes one thing."""
    b = Builder()
    rng = np.random.default_rng(0)
    batch, heads, dim, block, count = given.batch, given.heads, given.dim, given.block, given.count
    width, tokens, middle = heads * dim, given.tokens, count - 2

    def weight() -> str:
        return b.const(rng.standard_normal((width, width)).astype(np.float32) * 0.3)

    def project() -> str:
        flat = b.op("Reshape", b.op("MatMul", "x", weight()), b.const([batch, tokens, heads, dim]))
        return b.op("Transpose", flat, perm=[0, 2, 1, 3])

    def cut(value: str, begin: int, end: int, axis: int) -> str:
        return b.op("Slice", value, b.const([begin]), b.const([end]), b.const([axis]))

    def blocked(value: str, begin: int, end: int) -> str:
        part = cut(value, begin * block, end * block, 2)
        return b.op("Reshape", part, b.const([batch, heads, end - begin, block, dim]))

    def gathered(value: str, index: np.ndarray) -> str:
        """Blocks ``index`` [heads, n, r] of each head -> [batch, heads, n, r * block, dim]."""
        flat = b.op("Reshape", value, b.const([batch * heads * count, block, dim]))
        start = (np.arange(batch)[:, None] * heads + np.arange(heads))[..., None, None] * count
        taken = b.op("Gather", flat, b.const(start + index[None]), axis=0)
        return b.op("Reshape", taken, b.const([batch, heads, index.shape[1], index.shape[2] * block, dim]))

    def scores(queries: str, keys: str, scale: np.float32 = SCALE) -> str:
        perm = [0, 1, 3, 2] if queries not in fives else [0, 1, 2, 4, 3]
        return b.op("Mul", b.op("MatMul", queries, b.op("Transpose", keys, perm=perm)), b.const(scale))

    q, k, v = project(), project(), project()
    fives: set[str] = set()
    first = b.op("MatMul", b.op("Softmax", scores(cut(q, 0, block, 2), k), axis=-1), v)

    centre, own = blocked(q, 1, count - 1), [blocked(t, 1, count - 1) for t in (k, v)]
    fives.add(centre)
    ends = [cut(t, 0, block, 2) for t in (k, v)]
    of_values = given.drawn.copy()
    if fault == "index":
        of_values[0, 0, 0] = (of_values[0, 0, 0] + 1) % count
    drawn = [gathered(k, given.drawn), gathered(v, of_values)]
    global_part = b.op("Mul", b.op("Einsum", centre, ends[0], equation="bhlqd,bhkd->bhlqk"), b.const(SCALE))
    near = scores(centre, own[0], np.float32(0.36) if fault == "scale" else SCALE)
    far = scores(centre, drawn[0])
    if fault == "mask":  # hides one key of one query for one head from the softmax
        hidden = np.zeros((1, heads, middle, block, 1), np.float32)
        hidden[0, -1, 0, 1] = -np.inf
        far = b.op("Add", far, b.const(np.pad(hidden, [(0, 0)] * 4 + [(0, far_keys(given) - 1)])))
    weights = b.op("Softmax", b.op("Concat", global_part, near, far, axis=-1), axis=-1)
    if fault == "weights":
        weights = b.op("Mul", weights, b.const(np.float32(1.001)))
    sides = [
        cut(weights, *span, 4) for span in ((0, block), (block, 2 * block), (2 * block, 2 * block + far_keys(given)))
    ]
    summed = b.op("Einsum", sides[0], ends[1], equation="bhlqk,bhkd->bhlqd")
    summed = b.op("Add", b.op("Add", summed, b.op("MatMul", sides[1], own[1])), b.op("MatMul", sides[2], drawn[1]))
    inner = b.op("Reshape", summed, b.const([batch, heads, middle * block, dim]))

    shape = b.const([batch, heads, given.last.shape[1] * block, dim])
    end = [b.op("Reshape", gathered(t, given.last[:, None]), shape) for t in (k, v)]
    logits = scores(cut(q, tokens - block, tokens, 2), end[0])
    if fault == "bias":
        logits = b.op("Add", logits, b.const(np.linspace(0, 0.1, given.last.shape[1] * block, dtype=np.float32)))
    final = b.op("MatMul", b.op("Softmax", logits, axis=-1), end[1])
    parts = [final, inner, first] if fault == "order" else [first, inner, final]
    whole = b.op("Transpose", b.op("Concat", *parts, axis=2), perm=[0, 2, 1, 3])
    merged = b.op("Reshape", whole, b.const([batch, tokens, width]))
    b.nodes.append(helper.make_node("MatMul", [merged, weight()], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, tokens, width])]
    if fault == "seen outside":
        outputs.append(onnx.ValueInfoProto(name=logits))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, tokens, width])]
    made = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def far_keys(given: Blocks) -> int:
    return int(given.drawn.shape[2]) * given.block
