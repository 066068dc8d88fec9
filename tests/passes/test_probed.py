"""Attention in pieces, known by running it: one site rebuilt from its facts, or a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile.passes.detect.probed.reading import read
from attncompile.passes.detect.probed.visible import Sizes
from tests.passes.attention_graphs import Builder
from tests.passes.rebuild import found_in, only_site

BATCH, HEADS, DIM, CHUNK, CHUNKS, FIRST = 2, 3, 4, 5, 4, 3


def pieces(*, fault: str = "") -> onnx.ModelProto:
    """Queries in chunks; a query meets the first keys and those of its own chunk, in one softmax over two products.

    x [B, N, width] -> y [B, Nq, width], with N = FIRST + CHUNKS * CHUNK keys, the queries being all but the first.
    """
    b = Builder()
    rng = np.random.default_rng(0)
    width, queries = HEADS * DIM, CHUNK * CHUNKS
    tokens = FIRST + queries

    def weight() -> str:
        return b.const(rng.standard_normal((width, width)).astype(np.float32) * 0.3)

    def project(source: str, length: int) -> str:
        flat = b.op("Add", b.op("MatMul", source, weight()), b.const(rng.standard_normal(width).astype(np.float32)))
        return b.op("Transpose", b.op("Reshape", flat, b.const([BATCH, length, HEADS, DIM])), perm=[0, 2, 1, 3])

    def first(value: str) -> str:
        return b.op("Slice", value, b.const([0]), b.const([FIRST]), b.const([2]))

    def chunks(value: str) -> str:
        return b.op("Reshape", value, b.const([BATCH, HEADS, CHUNKS, CHUNK, DIM]))

    rest = b.op("Slice", "x", b.const([FIRST]), b.const([tokens]), b.const([1]))
    q, k, v = project(rest, queries), project("x", tokens), project("x", tokens)
    local = [b.op("Slice", t, b.const([FIRST]), b.const([tokens]), b.const([2])) for t in (k, v)]
    near = b.op("Einsum", chunks(q), chunks(local[0]), equation="bhcqd,bhckd->bhcqk")
    far = b.op("Einsum", chunks(q), first(k), equation="bhcqd,bhkd->bhcqk")
    scale = b.const(np.float32(0.35))
    near, far = b.op("Mul", near, scale), b.op("Mul", far, b.const(np.float32(0.5)) if fault == "scale" else scale)
    if fault == "bias":
        far = b.op("Add", far, b.const(np.float32(0.1)))
    weights = b.op("Softmax", b.op("Concat", far, near, axis=-1), axis=-1)
    if fault == "square":
        weights = b.op("Mul", weights, weights)
    sides = [(0, FIRST), (FIRST, FIRST + CHUNK)]
    parts = [b.op("Slice", weights, b.const([s]), b.const([e]), b.const([4])) for s, e in sides]
    out = b.op(
        "Add",
        b.op("Einsum", parts[0], first(k if fault == "values" else v), equation="bhcqk,bhkd->bhcqd"),
        b.op("MatMul", parts[1], chunks(local[1])),
    )
    out = b.op("Reshape", out, b.const([BATCH, HEADS, queries, DIM]))
    if fault == "tanh":
        out = b.op("Tanh", out)
    merged = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([BATCH, queries, width]))
    b.nodes.append(helper.make_node("MatMul", [merged, weight()], ["y"]))
    graph = helper.make_graph(
        b.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, tokens, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH, queries, width])], b.stored,
    )  # fmt: skip
    if fault == "scores-out":
        graph.output.append(onnx.ValueInfoProto(name=far))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_two_products_under_one_softmax_are_one_site(tmp_path: Path) -> None:
    _, site = only_site(pieces(), tmp_path)
    queries, keys = CHUNK * CHUNKS, FIRST + CHUNK * CHUNKS
    assert (site.query_length, site.key_length, site.heads, site.head_dim) == (queries, keys, HEADS, DIM)
    assert site.scale == pytest.approx(0.35, rel=1e-4)
    (part,) = site.mask.parts
    assert part.pattern is not None
    chunk = np.arange(queries) // CHUNK
    expected = np.concatenate([np.ones((queries, FIRST), bool), chunk[:, None] == chunk[None]], axis=1)
    np.testing.assert_array_equal(part.pattern.visible(queries, keys), expected)
    assert part.certificate.method == "evaluated"
    assert not part.certificate.general


@pytest.mark.parametrize("fault", ["scale", "bias", "values", "square", "scores-out"])
def test_what_is_not_attention_is_refused(fault: str, tmp_path: Path) -> None:
    _, found = found_in(pieces(fault=fault), tmp_path)
    assert found.sites == ()
    assert found.near_misses


def test_any_mask_is_read() -> None:
    rng = np.random.default_rng(3)
    sizes = Sizes(2, 3, 37, 41, 2, 3)
    visible = rng.random((3, 37, 41)) < rng.random((3, 37, 1))
    visible[..., 0] |= ~visible.any(axis=-1)

    def run(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = np.where(visible, 0.7 * (q @ k.swapaxes(2, 3)), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out: np.ndarray = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        return out.astype(np.float32)

    reading = read(run, sizes)
    np.testing.assert_array_equal(reading.counts, visible)
    assert reading.scale == pytest.approx(0.7, rel=1e-4)
