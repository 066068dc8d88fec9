"""Two models in one file: each side gives what its model gives, and what both have is there once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.keep_dense import KeepDense
from attncompile.passes.two_sides import DENSE, SPARSE, joined

WIDTH = 65
RULE = KeepDense.parse("t >= 0.5")


def op(kind: str, inputs: Sequence[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(kind, list(inputs), [output], name=output, **attributes)


def made(
    nodes: Sequence[NodeProto], stored: Sequence[TensorProto] = (), elem: int = TensorProto.FLOAT,
    shape: Sequence[int | str] = ("batch",),
) -> ModelProto:  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, WIDTH]),
              helper.make_tensor_value_info("t", elem, shape)]  # fmt: skip
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, WIDTH])]
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32), "w")
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, [weight, *stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pair(elem: int = TensorProto.FLOAT, shape: Sequence[int | str] = ("batch",)) -> tuple[ModelProto, ModelProto]:
    """h = x w; the one goes on with tanh(h w), the other with -h; then y = 2 s + h."""
    first, last = op("MatMul", "xw", "h"), op("Add", "rh", "y")
    dense = [op("MatMul", "hw", "p"), op("Tanh", "p", "s")]
    ends = [op("Add", "ss", "r"), last]
    return (made([first, *dense, *ends], elem=elem, shape=shape),
            made([first, op("Neg", "h", "s"), *ends], elem=elem, shape=shape))  # fmt: skip


def run(model: ModelProto, t: np.ndarray) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x, "t": t})[0]
    return found


def the_if(model: ModelProto) -> dict[str, onnx.GraphProto]:
    (node,) = [n for n in model.graph.node if n.op_type == "If"]
    return {a.name: a.g for a in node.attribute}


@pytest.mark.parametrize("relation", ["<", "<=", ">", ">="])
@pytest.mark.parametrize(
    "kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT8]
)
def test_each_call_gets_its_side(relation: str, kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    rule = KeepDense("t", relation, 3.0 if dtype.kind in "iu" else 2.7)
    dense, sparse = pair(kind)
    both = joined(dense, sparse, rule)
    onnx.checker.check_model(both, full_check=True)
    edge = rule.feed({"t": np.zeros(1, dtype)}, True)["t"][0]
    other = rule.feed({"t": np.zeros(1, dtype)}, False)["t"][0]
    for values in ([edge], [other], [other, edge, other], [other, other], [edge, edge], []):
        t = np.array(values, dtype)
        expected = run(dense if rule.holds({"t": t}) else sparse, t)
        assert np.array_equal(run(both, t), expected), values
        assert not np.array_equal(expected, run(sparse if rule.holds({"t": t}) else dense, t))


def test_a_scalar_and_entries_that_are_no_numbers() -> None:
    dense, sparse = pair(shape=())
    both = joined(dense, sparse, RULE)
    for value, side in ((0.5, dense), (0.49, sparse), (np.nan, sparse), (np.inf, dense)):
        assert np.array_equal(run(both, np.array(value, np.float32)), run(side, np.array(value, np.float32)))
    dense, sparse = pair()
    t = np.array([np.nan, 0.7], np.float32)
    assert np.array_equal(run(joined(dense, sparse, RULE), t), run(dense, t))


def test_what_both_have_is_there_once() -> None:
    dense, sparse = pair()
    before = dense.SerializeToString(), sparse.SerializeToString()
    both = joined(dense, sparse, RULE)
    assert before == (dense.SerializeToString(), sparse.SerializeToString()), "neither is changed"
    assert [t.name for t in both.graph.initializer].count("w") == 1
    assert both.ByteSize() < dense.ByteSize() + 1500 < 1.1 * dense.ByteSize()
    assert (both.graph.input, both.graph.output) == (sparse.graph.input, sparse.graph.output)
    bodies = the_if(both)
    assert [n.op_type for n in bodies[DENSE].node] == ["MatMul", "Tanh"]
    assert [n.op_type for n in bodies[SPARSE].node] == ["Neg"] and not bodies[DENSE].initializer
    outside = [n.op_type for n in both.graph.node]
    assert outside.count("MatMul") == 1 and outside.count("Add") == 2 and "Neg" not in outside


def test_models_that_are_alike_stay_one() -> None:
    dense, sparse = pair()[0], pair()[0]
    assert joined(dense, sparse, RULE) is sparse


def test_external_weights_stay_references(tmp_path: Path) -> None:
    dense, sparse = pair()
    path = tmp_path / "dense.onnx"
    onnx.save(dense, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    dense = onnx.load(path, load_external_data=False)
    tensor = next(t for t in dense.graph.initializer if t.name == "w")
    next(t for t in sparse.graph.initializer if t.name == "w").CopyFrom(tensor)
    both = joined(dense, sparse, RULE)
    assert [t for t in both.graph.initializer if t.name == "w"] == [tensor] and both.ByteSize() < 5000


def test_a_value_that_two_sites_read_is_made_outside() -> None:
    """It is no part of one branch: the other site reads it too."""
    shared = [op("MatMul", "xw", "h"), op("Exp", "h", "m")]
    between = op("Mul", ["s1", "x"], "z")
    ends = op("Add", ["s2", "z"], "y")
    dense = made([*shared, op("Mul", "hm", "s1"), between, op("Mul", "zm", "s2"), ends])
    sparse = made([shared[0], op("Neg", "h", "s1"), between, op("Neg", "z", "s2"), ends])
    both = joined(dense, sparse, RULE)
    assert [n.op_type for n in both.graph.node].count("If") == 2 and "m" in {
        o for n in both.graph.node for o in n.output
    }
    for t in (np.ones(1, np.float32), np.zeros(1, np.float32)):
        assert np.array_equal(run(both, t), run(dense if t[0] else sparse, t))


def test_one_name_for_two_things() -> None:
    """A value and a constant that are called alike on both sides and are not the same."""
    first, last = op("MatMul", "xw", "h"), op("Add", "sh", "y")

    def model(kind: str, factor: float) -> ModelProto:
        stored = numpy_helper.from_array(np.array(factor, np.float32), "c")
        return made(
            [first, op(kind, "hc", "p"), op("Tanh", "p", "s") if factor > 2 else op("Neg", "p", "s"), last], [stored]
        )

    dense, sparse = model("Mul", 3.0), model("Div", 2.0)
    both = joined(dense, sparse, RULE)
    for t in (np.ones(1, np.float32), np.zeros(1, np.float32)):
        assert np.array_equal(run(both, t), run(dense if t[0] else sparse, t))
    assert {"c", "c/sparse"} <= {t.name for t in both.graph.initializer}


def test_names_that_are_taken() -> None:
    dense, sparse = pair()
    for model in (dense, sparse):
        model.graph.node.insert(0, op("Identity", "x", "attncompile/keep_dense/holds"))
    both = joined(dense, sparse, RULE)
    onnx.checker.check_model(both, full_check=True)
    assert np.array_equal(run(both, np.ones(1, np.float32)), run(dense, np.ones(1, np.float32)))


def test_what_cannot_be_joined() -> None:
    first, last = op("MatMul", "xw", "h"), op("Add", "sh", "y")
    c = [numpy_helper.from_array(np.array(v, np.float32), "c") for v in (1.0, 2.0)]
    common = op("Mul", "hc", "s")
    with pytest.raises(Unsupported, match="constant 'c' differs"):
        joined(made([first, common, last], [c[0]]), made([first, common, last], [c[1]]), RULE)
    half = [numpy_helper.from_array(np.array([33, 32], np.int64), "sizes")]
    two = helper.make_node("Split", ["h", "sizes"], ["a", "b"], axis=1)
    ends = [op("Neg", "b", "d"), op("Concat", "ad", "s", axis=1), last]
    other = [op("Slice", ["h", "from", "to", "axis"], "a"), op("Slice", ["h", "to", "end", "axis"], "e"),
             op("Concat", "ae", "s", axis=1), last]  # fmt: skip
    numbers = {"from": 0, "to": 33, "end": 65, "axis": 1}
    stored = half + [numpy_helper.from_array(np.array([v], np.int64), n) for n, v in numbers.items()]
    keep = op("Neg", "a", "unread")
    fine = joined(made([first, two, *ends], stored), made([first, *other], stored), RULE)
    assert np.array_equal(
        run(fine, np.ones(1, np.float32)), run(made([first, two, *ends], stored), np.ones(1, np.float32))
    )
    with pytest.raises(Unsupported, match="'b' is made in two ways"):
        # 'a' is read by what both have, so its Split goes into a branch; what reads 'b' is not of that branch alone
        joined(made([first, two, keep, *ends], stored), made([first, keep, *other], stored), RULE)


def test_a_site_in_a_body() -> None:
    """The Ifs stand in the body, and ask the condition outside of it."""

    def model(nodes: Sequence[NodeProto]) -> ModelProto:
        output = helper.make_tensor_value_info("s", TensorProto.FLOAT, [3, WIDTH])
        body = helper.make_graph(list(nodes), "body", [], [output])
        other = helper.make_graph([op("Identity", "x", "o")], "other", [],
                                  [helper.make_tensor_value_info("o", TensorProto.FLOAT, [3, WIDTH])])  # fmt: skip
        flag = numpy_helper.from_array(np.array(True), "flag")
        return made(
            [helper.make_node("If", ["flag"], ["y"], name="around", then_branch=body, else_branch=other)], [flag]
        )

    dense = model([op("MatMul", "xw", "p"), op("Tanh", "p", "s")])
    sparse = model([op("Neg", "x", "s")])
    both = joined(dense, sparse, RULE)
    (inner,) = the_if(both)["then_branch"].node
    assert inner.op_type == "If" and [n.op_type for n in both.graph.node].count("If") == 1
    for t in (np.ones(1, np.float32), np.zeros(1, np.float32)):
        assert np.array_equal(run(both, t), run(dense if t[0] else sparse, t))
