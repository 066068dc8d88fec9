"""Windows that nearly are attention over tokens, with one thing changed, and what the facts say of those that are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from attncompile.core.site import Detection
from attncompile.passes.detect import detect
from attncompile.passes.detect.gathers import lift as gathers
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes import windowed_graphs as graphs
from tests.passes.attention_graphs import Builder, save
from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt
from tests.passes.windowed_graphs import BATCH, DIM, HEADS


def _refused(proto: onnx.ModelProto, folder: Path) -> tuple[str, str]:
    _, found = found_in(proto, folder)
    assert found.sites == ()
    (miss,) = found.near_misses
    return miss.code, miss.reason


def _dims(proto: onnx.ModelProto, name: str, axis: int) -> onnx.TensorShapeProto.Dimension:
    (value,) = (i for i in proto.graph.input if i.name == name)
    return value.type.tensor_type.shape.dim[axis]


def test_values_of_more_tokens_than_keys_are_refused(tmp_path: Path) -> None:
    proto = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    _dims(proto, "v", 2).dim_value = 31
    code, reason = _refused(proto, tmp_path)
    assert code == "gather-tokens"
    assert "25 tokens" in reason
    assert "31" in reason


def test_keys_and_values_of_more_tokens_than_queries(tmp_path: Path) -> None:
    proto = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    for name in "kv":
        _dims(proto, name, 2).dim_value = 31
    _, site = only_site(proto, tmp_path)
    assert (site.query_length, site.key_length) == (25, 31)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_fewer_heads_of_one_operand_are_refused(name: str, tmp_path: Path) -> None:
    proto = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    _dims(proto, name, 1).dim_value = 1
    _refused(proto, tmp_path)


@pytest.mark.parametrize("equation", ["bhnkd,bhnk->bhnk", "bhnk,bhnkd->bhnk"])
def test_a_product_that_sums_one_operand_alone_is_refused(equation: str, tmp_path: Path) -> None:
    """Over D of the keys, with nothing of the queries there."""
    b = Builder()
    table = graphs.clamped(5, 5, 3)
    k, v = (b.op("Gather", x, b.const(table), axis=2) for x in "kv")
    q = b.op("Gather", "q", b.const(np.arange(9) % DIM), axis=3)
    operands = (k, q) if equation.startswith("bhnkd") else (q, k)
    weights = b.op("Softmax", b.op("Einsum", *operands, equation=equation), axis=-1)
    out = b.op("Einsum", weights, v, equation="bhnk,bhnkd->bhnd")
    _refused(graphs.build(b, 25, out), tmp_path)


def test_a_dynamic_number_of_keys_is_refused(tmp_path: Path) -> None:
    proto = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    for name in "kv":
        _dims(proto, name, 2).dim_param = "n"
    code, reason = _refused(shape_inference.infer_shapes(proto), tmp_path)
    assert code == "dynamic"
    assert "'n'" in reason


def _found(proto: onnx.ModelProto, folder: Path) -> Detection:
    model = load(save(proto, folder))
    return detect(model, profile_for(model, {}))


def _dynamic_batch(proto: onnx.ModelProto) -> onnx.ModelProto:
    for name in "qkv":
        _dims(proto, name, 0).dim_param = "b"
    return shape_inference.infer_shapes(proto)


def test_a_dynamic_batch_is_the_same_attention(tmp_path: Path) -> None:
    proto = _dynamic_batch(graphs.indexed(graphs.clamped(5, 5, 3)).proto)
    (site,) = _found(proto, tmp_path).sites
    assert site.batch == "b"
    for batch in (1, 4):
        rebuilt(proto, site, random_feeds(proto, 0, {"b": batch})).check()


def test_the_first_two_of_a_dynamic_batch_are_refused(tmp_path: Path) -> None:
    """At the batch that detection looks at, 2, it is nothing; at others the rest of the batch is missing."""
    made = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    for name in "qkv":
        numbers = [numpy_helper.from_array(np.array([x]), f"{name}{i}") for i, x in enumerate((0, 2, 0))]
        made.graph.initializer.extend(numbers)
        for node in made.graph.node:
            for i, value in enumerate(node.input):
                if value == name:
                    node.input[i] = f"{name}_cut"
        made.graph.node.insert(0, helper.make_node("Slice", [name, *(t.name for t in numbers)], [f"{name}_cut"]))
    found = _found(_dynamic_batch(made), tmp_path)
    assert [(s.query.value, s.key.value, s.value.value) for s in found.sites] == []


def test_half_precision(tmp_path: Path) -> None:
    proto = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    for value in proto.graph.input:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    _, site = only_site(proto, tmp_path, 4e-3)
    assert site.dtype == "float16"
    assert site.scale == float(np.float16(0.4))


def _masked(added: np.ndarray, *, factor: float = 1.0) -> onnx.ModelProto:
    b = Builder()
    table = graphs.clamped(5, 5, 3)
    k, v = (b.op("Gather", x, b.const(table), axis=2) for x in "kv")
    scores = b.op("Add", b.op("Einsum", "q", k, equation="bhnd,bhnkd->bhnk"), b.const(added.astype(np.float32)))
    if factor != 1.0:
        scores = b.op("Mul", scores, b.const(np.float32(factor)))
    out = b.op("Einsum", b.op("Softmax", scores, axis=-1), v, equation="bhnk,bhnkd->bhnd")
    return graphs.build(b, 25, out)


def _hole(fill: float, heads: int = 1) -> np.ndarray:
    mask = np.zeros((1, heads, 25, 9))
    mask[0, 0, 7, 3] = fill
    return mask


@pytest.mark.parametrize(
    ("mask", "fills"),
    [(_hole(-np.inf), (-np.inf,)), (_hole(-1e4), (-1e4,)), (_hole(0.0), ()),
     (_hole(-np.inf) + np.roll(_hole(-1e4), 1), (-np.inf, -1e4))],
)  # fmt: skip
def test_what_hides_is_said(mask: np.ndarray, fills: tuple[float, ...], tmp_path: Path) -> None:
    _, site = only_site(_masked(mask), tmp_path)
    assert site.mask.fills == fills


@pytest.mark.parametrize(
    "proto",
    [
        _masked(_hole(-20.0)),
        _masked(_hole(-1e4), factor=0.01),
        _masked(_hole(-np.inf, HEADS)),
        _masked(np.where(np.arange(25)[:, None] == 4, -np.inf, np.zeros((1, 1, 25, 9)))),
    ],
    ids=["small", "scaled", "per-head", "whole-row"],
)
def test_other_masks_are_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    _refused(proto, tmp_path)


def test_too_many_slots_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = graphs.indexed(graphs.clamped(5, 5, 3)).proto
    monkeypatch.setattr(gathers, "MAX_PAIRS", 600)
    assert _refused(proto, tmp_path)[0] == "too-large"


def test_a_part_without_elements(tmp_path: Path) -> None:
    made = graphs.chunked(4, 3).proto
    made.graph.initializer.extend(
        [numpy_helper.from_array(np.array([n]), name) for name, n in (("far", 12), ("end", 1 << 40), ("axis", 2))]
    )
    for node in made.graph.node:
        if node.op_type == "Pad" and node.input[0] == "k":
            node.input[0] = "k2"
    made.graph.node.insert(0, helper.make_node("Concat", ["none", "k"], ["k2"], axis=2))
    made.graph.node.insert(0, helper.make_node("Slice", ["k", "far", "end", "axis"], ["none"]))
    _, site = only_site(made, tmp_path)
    assert (site.query.value, site.key.value) == ("q", "k2")


def test_a_shape_read_inside_does_not_hide_it(tmp_path: Path) -> None:
    """The output's shape is computed from the shape of the windows' scores."""
    b = Builder()
    table = graphs.clamped(5, 5, 3)
    k, v = (b.op("Gather", x, b.const(table), axis=2) for x in "kv")
    scores = b.op("MatMul", b.op("Unsqueeze", "q", b.const([3])), b.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
    lead = b.op("Gather", b.op("Shape", scores), b.const([0, 1, 2]))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    out = b.op("Reshape", out, b.op("Concat", lead, b.const([DIM]), axis=0))
    _, site = only_site(graphs.build(b, 25, out), tmp_path)
    assert (site.query.value, site.key.value, site.batch) == ("q", "k", BATCH)
