"""The rule for calls that stay dense: what it reads, what it holds of, and which inputs it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import BadArguments
from attncompile.core.keep_dense import KeepDense, steps_of


@pytest.mark.parametrize(
    ("text", "name", "relation", "number"),
    [
        ("time >= 0.7", "time", ">=", 0.7),
        ("t>3", "t", ">", 3.0),
        ("  sigma  <=  -1e-3 ", "sigma", "<=", -1e-3),
        ("a b/t:0 < .5", "a b/t:0", "<", 0.5),
    ],
)
def test_what_is_read(text: str, name: str, relation: str, number: float) -> None:
    rule = KeepDense.parse(text)
    assert (rule.input, rule.relation, rule.number) == (name, relation, number)
    assert KeepDense.parse(rule.text) == rule


@pytest.mark.parametrize("text", ["", "time", "time >= ", ">= 0.7", "time = 0.7", "time == 0.7", "t >== 1", "t > one",
                                  "0.7 <= t <= 1", "t >= nan", "t < inf", "t > 1e999"])  # fmt: skip
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(BadArguments, match=r"not a rule|not a finite number") as caught:
        KeepDense.parse(text)
    assert "time >= 0.7" in caught.value.hint


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_number_is_of_the_inputs_type(dtype: type) -> None:
    """0.7 in float32 is below the 0.7 that was written, and is meant all the same."""
    there = {"t": np.array(0.7, dtype)}
    assert KeepDense.parse("t >= 0.7").holds(there) and not KeepDense.parse("t > 0.7").holds(there)
    assert KeepDense.parse("t <= 0.7").holds(there) and not KeepDense.parse("t < 0.7").holds(there)


def test_one_entry_of_a_batch_is_enough() -> None:
    rule = KeepDense.parse("t >= 5")
    assert rule.holds({"t": np.array([1, 9, 2])}) and not rule.holds({"t": np.array([1, 4, 2])})
    assert rule.holds({"t": np.array([np.nan, 9.0])}) and not rule.holds({"t": np.array([np.nan])})
    assert not rule.holds({"t": np.zeros(0, np.float32)})


@pytest.mark.parametrize("relation", ["<", "<=", ">", ">="])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64])
def test_inputs_at_the_edge(relation: str, dtype: type) -> None:
    rule = KeepDense("t", relation, 7.0)
    given = {"x": np.ones(3), "t": np.zeros(2, dtype)}
    for keep in (True, False):
        made = rule.feed(given, keep)
        assert rule.holds(made) == keep and made["t"].dtype == dtype and made["t"].shape == (2,)
        assert made["x"] is given["x"] and (np.abs(made["t"].astype(float) - 7) <= 1).all()


def model(elem_type: int, shape: list[int | str] | None, stored: bool = False) -> ModelProto:
    inputs = [helper.make_tensor_value_info("t", elem_type, shape)]
    held = [numpy_helper.from_array(np.zeros((), np.float32), "t")] if stored else []
    return helper.make_model(helper.make_graph([], "g", inputs, [], held))


def test_inputs_that_look_like_steps() -> None:
    """Numbers that change, beside an input that is none."""
    beside = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5])

    def steps(made: ModelProto, *values: float) -> list[str]:
        return steps_of(made, [{"t": np.array(v, np.float32), "x": np.ones((1, 5), np.float32)} for v in values])

    for shape in ([], ["batch"]):
        made = model(TensorProto.FLOAT, shape)
        assert steps(made, 0.1, 0.2) == [], "no samples beside it"
        made.graph.input.append(beside)
        assert steps(made, 0.1, 0.2) == ["t"]
        assert steps(made, 0.1, 0.1) == steps(made) == []
    for other in (model(TensorProto.INT64, []), model(TensorProto.FLOAT, [2, 2]), model(TensorProto.FLOAT, None)):
        other.graph.input.append(beside)
        assert steps(other, 0.1, 0.2) == []


def test_inputs_that_can_be_asked() -> None:
    for kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT8):
        KeepDense.parse("t >= 3").check(model(kind, []))
        KeepDense.parse("t >= 3").check(model(kind, ["batch"]))


@pytest.mark.parametrize(
    ("rule", "made", "said"),
    [
        ("s >= 3", model(TensorProto.FLOAT, []), "no input 's'"),
        ("t >= 3", model(TensorProto.FLOAT, [], stored=True), "no input 't'"),
        ("t >= 3", model(TensorProto.BOOL, []), "holds bool"),
        ("t >= 3", model(TensorProto.STRING, [1]), "holds string"),
        ("t >= 3", model(TensorProto.FLOAT, ["batch", 1]), "2 axes"),
        ("t >= 3", model(TensorProto.FLOAT, None), "no declared shape"),
        ("t >= 3.5", model(TensorProto.INT64, []), "whole numbers"),
        ("t >= 0", model(TensorProto.UINT8, []), "holds of every uint8"),
        ("t < 0", model(TensorProto.UINT8, []), "holds of no uint8"),
        ("t > 127", model(TensorProto.INT8, []), "holds of no int8"),
        ("t > 1e6", model(TensorProto.FLOAT16, []), "holds of no float16"),
    ],
)
def test_inputs_that_cannot(rule: str, made: ModelProto, said: str) -> None:
    with pytest.raises(BadArguments, match=said) as caught:
        KeepDense.parse(rule).check(made)
    assert caught.value.hint
