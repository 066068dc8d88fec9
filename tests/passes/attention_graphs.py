"""Random attention graphs with known truth, and the NumPy reading of a site that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.evaluate import World


@dataclass(frozen=True)
class Spec:
    """What a generated graph says, in the generator's own terms."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    length: int = 13
    head_dim: int = 6
    scale: float = 0.5
    scale_at: str = "query"  # query, key, both, scores, none
    mask: str = "none"  # none, causal, window
    left: int = 3
    right: int = 2
    mask_form: str = "constant"  # constant (added), where (bool constant), computed (from shapes)
    padding: bool = False
    guard: bool = False
    key_first: bool = False  # scores computed as K Q^T and transposed
    einsum: bool = False
    fused_batch: bool = False  # heads folded into the batch around the products
    merge_output: bool = True
    dynamic: bool = False
    seed: int = 0


class Builder:
    """Collects nodes under unspoken names: names must mean nothing to the lifter."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[TensorProto] = []

    def const(self, value: np.ndarray | list[int]) -> str:
        array = np.asarray(value, dtype=np.int64) if isinstance(value, list) else value
        name = f"c{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out


def visible(spec: Spec, queries: int, keys: int) -> np.ndarray:
    """[queries, keys] bool."""
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    if spec.mask == "causal":
        return distance <= 0
    if spec.mask == "window":
        return (distance >= -spec.left) & (distance <= spec.right)
    return np.ones((queries, keys), bool)


def build(spec: Spec) -> onnx.ModelProto:
    """x [batch, length, heads * head_dim] (and pad [batch, 1, 1, length]) -> y."""
    rng = np.random.default_rng(spec.seed)
    b = Builder()
    h, kv, d, n = spec.heads, spec.kv_heads, spec.head_dim, spec.length
    length: int | str = "n" if spec.dynamic else n
    width = h * d

    def weight(columns: int) -> str:
        return b.const((rng.standard_normal((width, columns)) / np.sqrt(width)).astype(np.float32))

    def heads_of(count: int, transposed: bool) -> str:
        x = b.op("MatMul", "x", weight(count * d))
        x = b.op("Reshape", x, b.const([0, -1 if spec.dynamic else n, count, d]))
        x = b.op("Transpose", x, perm=[0, 2, 3, 1] if transposed and count == h else [0, 2, 1, 3])
        if count != h:
            x = b.op("Unsqueeze", x, b.const([2]))
            shape = b.op("Concat", b.op("Shape", x, end=2), b.const([h // count]), b.op("Shape", x, start=3), axis=0)
            x = b.op("Reshape", b.op("Expand", x, shape), b.const([0, h, -1, d]))
            x = b.op("Transpose", x, perm=[0, 1, 3, 2]) if transposed else x
        return x

    transpose_key = not spec.einsum and not spec.key_first
    query, key, value = (
        heads_of(h, spec.key_first and not spec.einsum),
        heads_of(kv, transpose_key),
        heads_of(kv, False),
    )
    root = np.float32(np.sqrt(spec.scale))
    whole = np.float32(spec.scale)
    if spec.scale_at == "query":
        query = b.op("Mul", query, b.const(np.array(whole)))
    elif spec.scale_at == "key":
        key = b.op("Div", key, b.const(np.array(1 / whole)))
    elif spec.scale_at == "both":
        query, key = b.op("Mul", b.const(np.array([root])), query), b.op("Mul", key, b.const(np.array(root)))
    if spec.fused_batch and not spec.einsum and not spec.key_first:
        query = b.op("Reshape", query, b.const([-1, n, d]))
        key = b.op("Reshape", key, b.const([-1, d, n]))
        value = b.op("Reshape", value, b.const([-1, n, d]))
    if spec.einsum:
        scores = b.op("Einsum", query, key, equation="zaij,zakj->zaik")
    elif spec.key_first:
        scores = b.op("Transpose", b.op("MatMul", key, query), perm=[0, 1, 3, 2])
    else:
        scores = b.op("MatMul", query, key)
    if spec.fused_batch and not spec.einsum and not spec.key_first:
        scores = b.op("Reshape", scores, b.const([-1, h, n, n]))
    if spec.scale_at == "scores":
        scores = b.op("Mul", scores, b.const(np.array(whole)))
    scores = _mask(b, spec, scores)
    weights = b.op("Softmax", scores, axis=-1)
    if spec.guard:
        weights = b.op("Where", b.op("IsNaN", weights), b.const(np.array(0, np.float32)), weights)
    if spec.fused_batch and not spec.einsum and not spec.key_first:
        weights = b.op("Reshape", weights, b.const([-1, n, n]))
    equation = {"equation": "zakj,zaik->zaij"} if spec.einsum else {}
    out = b.op("Einsum", value, weights, **equation) if spec.einsum else b.op("MatMul", weights, value)
    if spec.fused_batch and not spec.einsum and not spec.key_first:
        out = b.op("Reshape", out, b.const([-1, h, n, d]))
    if spec.merge_output:
        out = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([0, 0, width]))
    out = b.op("Identity", out)
    inputs = [helper.make_tensor_value_info("x", 1, ["b" if spec.dynamic else spec.batch, length, width])]
    if spec.padding:
        inputs.append(helper.make_tensor_value_info("pad", TensorProto.BOOL, [spec.batch, 1, 1, length]))
    graph = helper.make_graph(
        b.nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(out, 1, [None] * (3 if spec.merge_output else 4))],
        b.stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _mask(b: Builder, spec: Spec, scores: str) -> str:
    if spec.mask == "none" and not spec.padding:
        return scores
    low = np.array(-np.inf if spec.guard else np.finfo(np.float32).min, np.float32)
    n = spec.length
    if spec.mask == "none":
        seen = "pad"
    elif spec.mask_form == "computed" or spec.dynamic:
        size = b.op("Squeeze", b.op("Shape", "x", start=1, end=2))
        index = b.op("Range", b.const(np.array(0)), size, b.const(np.array(1)))
        rows, columns = b.op("Unsqueeze", index, b.const([1])), b.op("Unsqueeze", index, b.const([0]))
        seen = b.op(
            "LessOrEqual", b.op("Sub", columns, rows), b.const(np.array(0 if spec.mask == "causal" else spec.right))
        )
        if spec.mask == "window":
            seen = b.op("And", seen, b.op("Less", b.op("Sub", rows, columns), b.const(np.array(spec.left + 1))))
        seen = b.op("Unsqueeze", seen, b.const([0, 1]))
    else:
        seen = b.const(visible(spec, n, n)[None, None])
    if spec.padding and spec.mask != "none":
        seen = b.op("And", seen, "pad")
    if spec.mask_form == "where":
        return b.op("Where", seen, scores, b.const(low))
    if spec.mask_form == "constant" and not spec.padding and not spec.dynamic:
        return b.op("Add", scores, b.const(np.where(visible(spec, n, n), np.float32(0), low)[None, None]))
    return b.op("Add", b.op("Where", seen, b.const(np.array(0, np.float32)), b.const(low)), scores)


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def to_bnhd(array: np.ndarray, operand: Operand) -> np.ndarray:
    return array if operand.layout == "BNHD" else array.transpose(0, 2, 1, 3)


def read_site(site: AttentionSite, feed: dict[str, np.ndarray], world: World) -> np.ndarray:
    """What the facts of ``site`` say its output is, in float64 and its layout; shares no code with the lifter."""
    q, k, v = (
        to_bnhd(feed[o.value].astype(np.float64), o).transpose(0, 2, 1, 3) for o in (site.query, site.key, site.value)
    )
    group = site.heads // site.kv_heads
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = site.scale * np.einsum("bhid,bhjd->bhij", q, k)
    if site.softcap:
        scores = site.softcap * np.tanh(scores / site.softcap)
    queries, keys = scores.shape[-2:]
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    hidden = -np.inf if site.mask.masked_rows != "uniform" else -1e30
    for part in site.mask.parts:
        if part.kind in ("causal", "window"):
            seen = np.ones(distance.shape, bool)
            if part.left >= 0:
                seen &= distance >= -part.left
            if part.right >= 0:
                seen &= distance <= part.right
            scores = np.where(seen, scores, hidden)
        elif part.pattern is not None and part.kind != "bias":
            scores = np.where(part.pattern.visible(queries, keys), scores, hidden)
        elif part.counts is not None:
            scores = scores + np.log(np.maximum(part.counts.times(queries, keys), 1))
        else:
            assert part.source is not None
            data = feed[part.source] if part.source in feed else world.value(part.source)
            scores = scores + data.astype(np.float64) if part.additive else np.where(data, scores, hidden)
    top = scores.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - top)
        weights /= weights.sum(-1, keepdims=True)
    if site.mask.masked_rows == "zero":
        weights = np.nan_to_num(weights, nan=0.0)
    out = np.einsum("bhij,bhjd->bhid", weights, v)
    return out if site.output.layout == "BHND" else out.transpose(0, 2, 1, 3)
