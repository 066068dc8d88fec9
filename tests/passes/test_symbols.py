"""Dimensions that are sums of others: by their names, or because the graph contradicts itself at other sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile.core.errors import BadArguments
from attncompile.core.model import Model
from attncompile.core.profile import Range
from attncompile.core.sums import size_of, terms_of
from attncompile.passes.detect import detect, detection_binding
from attncompile.passes.equal_lengths import with_sums
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.symbols import profile_for, symbols
from attncompile.shaped import sizes_of
from attncompile.verification.inputs import make_inputs
from tests.passes.test_lifter_forms import D, Graph, H, W


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("past + sequence", ({"past": 1, "sequence": 1}, 0)),
        ("past_sequence_length + 1", ({"past_sequence_length": 1}, 1)),
        ("2*n + 1", ({"n": 2}, 1)),
        ("n - 1", ({"n": 1}, -1)),
        ("a+b+a", ({"a": 2, "b": 1}, 0)),
        ("sequence", None),
        ("x:1", None),
        ("s0//2", None),
        ("(a + b)", None),
        ("a * b", None),
        ("a + ", None),
        ("7", None),
        ("", None),
    ],
)
def test_terms(symbol: str, expected: tuple[dict[str, int], int] | None) -> None:
    assert terms_of(symbol) == expected


def test_sizes() -> None:
    binding = {"past": 13, "sequence": 3, "odd + name": 5}
    assert size_of("past + sequence", binding) == 16
    assert size_of("2*past - 1", binding) == 25
    assert size_of("odd + name", binding) == 5, "a binding of the whole name comes first"
    assert size_of("past + other", binding) is None
    assert size_of("other", binding) is None


def decoder(
    total: str, past: str = "past", sequence: int | str = "sequence", batch: int | str = "batch"
) -> Model:  # fmt: skip
    """x [batch, sequence, W], caches [batch, H, past, D], mask [batch, total] of numbers -> y and the grown caches."""
    b = Graph()

    def heads() -> str:
        return b.op("Transpose", b.op("Reshape", b.linear("x", W), b.const([0, -1, H, D])), perm=[0, 2, 1, 3])

    query, key, value = heads(), heads(), heads()
    keys, values = (b.op("Concat", p, new, axis=2) for p, new in (("pk", key), ("pv", value)))
    scores = b.op("MatMul", query, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = b.op("Mul", scores, b.number(0.4))
    scores = b.op("Add", scores, b.op("Unsqueeze", "mask", b.const([1, 2])))
    out = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), values), perm=[0, 2, 1, 3])
    out = b.op("Reshape", out, b.const([0, -1, W]))
    shapes: dict[str, list[int | str]] = {
        "x": [batch, sequence, W], "pk": [batch, H, past, D], "pv": [batch, H, past, D], "mask": [batch, total],
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    outputs = [helper.make_tensor_value_info(o, TensorProto.FLOAT, [None] * rank)
               for o, rank in ((out, 3), (keys, 4), (values, 4))]  # fmt: skip
    graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return Model(Path("model.onnx"), proto, "", 18)


def check_runs(model: Model) -> None:
    """At every shape of the profile and its neighbours the model runs, and its scores have a shape."""
    profile = profile_for(model, {})
    session = ort.InferenceSession(model.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    usual = profile.usual()
    varied = [{**usual, name: size + 1} for name, size in usual.items()]
    for binding in [*(b for _, b in profile.bindings()), *varied]:
        feed = make_inputs(model, binding)
        assert all(np.isfinite(o).all() for o in session.run(None, feed))
        assert sizes_of(model, feed) == binding
    softmax = next(n for n in model.proto.graph.node if n.op_type == "Softmax")
    assert softmax.output[0] in World(GraphIndex(model), detection_binding(profile)).shapes


def test_a_sum_by_name_is_no_dimension_of_its_own() -> None:
    model = decoder("past + sequence")
    assert symbols(model) == {"batch": 0, "sequence": 1, "past": 2}
    check_runs(model)
    (site,) = detect(model, profile_for(model, {})).sites
    assert site.key_length in ("past + sequence", "sequence + past")
    assert with_sums(model) is model
    with pytest.raises(BadArguments, match="no dynamic dimension 'past \\+ sequence'"):
        profile_for(model, {"past + sequence": Range(1, 2, 3)})


def test_a_sum_of_names_that_no_input_has_is_a_name() -> None:
    assert "seen + new" in symbols(decoder("seen + new"))


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (decoder("total"), "'total' has to be past + sequence"),
        (decoder("a"), "'a' has to be past + sequence"),
        (decoder("total", sequence=1), "'total' has to be past + 1"),
        (decoder("total", sequence=1, batch=2), "'total' has to be past + 1"),
        (decoder("total", sequence=3), "'total' has to be past + 3"),
        (decoder("total", past="sequence", sequence=5), "'total' has to be sequence + 5"),
    ],
)
def test_a_sum_that_the_graph_asks_for(model: Model, note: str) -> None:
    before = model.proto.SerializeToString()
    assert not detect(model, profile_for(model, {})).sites, "at sizes that contradict one another"
    mended = with_sums(model)
    assert [note in n for n in mended.notes] == [True]
    assert model.proto.SerializeToString() == before
    check_runs(mended)
    (site,) = detect(mended, profile_for(mended, {})).sites
    assert [p.kind for p in site.mask.parts] == ["padding"]
    onnx.checker.check_model(mended.proto)


def test_the_users_range_keeps_a_dimension() -> None:
    model = decoder("total")
    mended = with_sums(model, ("total",))
    assert "total" in symbols(mended)


def test_what_no_sum_mends_is_left_alone() -> None:
    """A mask of 7 columns, whatever the cache's length."""
    model = decoder("total")
    mask = next(i for i in model.proto.graph.input if i.name == "mask")
    mask.type.tensor_type.shape.dim[1].dim_value = 7
    assert with_sums(model) is model
    assert with_sums(decoder("past + sequence", sequence="past")) is not None


def test_one_dimension_alone_has_no_sum() -> None:
    b = Graph()
    b.nodes.append(helper.make_node("Add", ["x", "x"], ["y"]))
    graph = helper.make_graph(b.nodes, "g", [helper.make_tensor_value_info("x", 1, ["n", 3])],
                              [helper.make_tensor_value_info("y", 1, ["n", 3])])  # fmt: skip
    model = Model(Path("m.onnx"), helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), "", 18)
    assert with_sums(model) is model
