"""What is said of regions that are run and are not attention with a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.reading import read
from attncompile.passes.detect.probed.visible import Sizes, visible_keys
from tests.passes.attention_graphs import Builder
from tests.passes.rebuild import found_in

BATCH, HEADS, DIM, FIRST, TOKENS = 2, 3, 4, 3, 13


def joined(*, start: int, padding: bool = False) -> onnx.ModelProto:
    """Every query meets the first 3 keys, and in the same softmax those from ``start`` on: 3 is attention over all,
    0 counts the first ones twice. ``padding``: int64 mask [BATCH, TOKENS] hides some of the latter.
    """
    b = Builder()
    rng = np.random.default_rng(0)
    width = HEADS * DIM

    def weight() -> str:
        return b.const(rng.standard_normal((width, width)).astype(np.float32) * 0.3)

    def project() -> str:
        flat = b.op("Reshape", b.op("MatMul", "x", weight()), b.const([BATCH, TOKENS, HEADS, DIM]))
        return b.op("Transpose", flat, perm=[0, 2, 1, 3])

    def cut(value: str, begin: int, end: int, axis: int) -> str:
        return b.op("Slice", value, b.const([begin]), b.const([end]), b.const([axis]))

    q, k, v = project(), project(), project()
    near = b.op("Einsum", q, cut(k, start, TOKENS, 2), equation="bhqd,bhkd->bhqk")
    far = b.op("Einsum", q, cut(k, 0, FIRST, 2), equation="bhqd,bhkd->bhqk")
    if padding:
        hidden = b.op("Equal", b.op("Unsqueeze", "mask", b.const([1, 2])), b.const(np.array(0)))
        bias = b.op("Where", hidden, b.const(np.float32(-1e9)), b.const(np.float32(0.0)))
        near = b.op("Add", near, cut(bias, start, TOKENS, 3))
    weights = b.op("Softmax", b.op("Concat", far, near, axis=-1), axis=-1)
    out = b.op(
        "Add",
        b.op("MatMul", cut(weights, 0, FIRST, 3), cut(v, 0, FIRST, 2)),
        b.op("MatMul", cut(weights, FIRST, FIRST + TOKENS, 3), cut(v, start, TOKENS, 2)),
    )
    merged = b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([BATCH, TOKENS, width]))
    b.nodes.append(helper.make_node("MatMul", [merged, weight()], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, TOKENS, width])]
    if padding:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, [BATCH, TOKENS]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH, TOKENS, width])]
    graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_keys_that_count_once_are_a_site(tmp_path: Path) -> None:
    _, found = found_in(joined(start=FIRST), tmp_path)
    (site,) = found.sites
    assert (site.key_length, site.mask.kind) == (TOKENS, "none")


def test_padding_among_the_pieces_is_named(tmp_path: Path) -> None:
    _, found = found_in(joined(start=FIRST, padding=True), tmp_path)
    assert found.sites == ()
    (miss,) = [m for m in found.near_misses if m.code == "padding-enters"]
    assert "'mask'" in miss.reason and "do not hide keys" in miss.reason


def _attention(logs: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = 0.5 * (q @ k.swapaxes(2, 3)) + logs
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray((weights / weights.sum(axis=-1, keepdims=True)) @ v).astype(np.float32)


def test_a_bias_is_no_multiplicity() -> None:
    bias = np.zeros((2, 9, 11))
    bias[1, 4, 7] = 0.4
    with pytest.raises(Unsupported, match="do not have equal weights"):
        read(lambda q, k, v: _attention(bias, q, k, v), Sizes(1, 2, 9, 11, 4, 4))


@pytest.mark.parametrize("keys, channels", [(41, 2), (97, 3), (300, 16), (1031, 8)])
def test_keys_are_read_whatever_their_number(keys: int, channels: int) -> None:
    """Sparse rows, dense rows and a row that sees one key; more keys than one run tells apart."""
    rng = np.random.default_rng(keys)
    sizes = Sizes(2, 2, 23, keys, 4, channels)
    visible = rng.random((2, 2, 23, keys)) < rng.random((2, 2, 23, 1))
    visible[..., 0, :] = False
    visible[..., 5, :] = True
    visible[..., 0] |= ~visible.any(axis=-1)
    logs = np.where(visible, 0.0, -np.inf)
    np.testing.assert_array_equal(visible_keys(lambda q, k, v: _attention(logs, q, k, v), sizes), visible)
