"""What is not linear attention, or is a form that is not understood, is never claimed; what came near has a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.passes.attention_graphs import Builder
from tests.passes.attention_graphs import Spec as SoftmaxSpec
from tests.passes.attention_graphs import build as softmax_graph
from tests.passes.linear_graphs import Change, Spec, Writer, build, detected, error_of, feed_of

_SUM = Spec(normaliser="sum", epsilon=1e-3)


def refusal(proto: onnx.ModelProto, folder: Path) -> dict[str, str]:
    """Codes and reasons of the near misses of a graph in which no linear site is found."""
    _, detection = detected(proto, folder)
    assert [s for s in detection.sites if s.kind == "linear"] == []
    return {m.code: m.reason for m in detection.near_misses}


def _and_output(writer: Writer, part: str) -> onnx.ModelProto:
    def keep(b: Builder, value: str) -> str:
        writer.extra.append(value)
        return value

    writer.change[part] = keep
    return writer.build()


@pytest.mark.parametrize("part", ["state", "total"])
def test_a_state_or_normaliser_that_is_an_output(part: str, tmp_path: Path) -> None:
    assert "state-used" in refusal(_and_output(Writer(_SUM), part), tmp_path)


def _read_elsewhere(writer: Writer) -> Change:
    def both(b: Builder, value: str) -> str:
        writer.extra.append(b.op("ReduceMax", value, keepdims=0))
        return value

    return both


@pytest.mark.parametrize("part", ["state", "total"])
def test_a_state_or_normaliser_that_somebody_else_reads(part: str, tmp_path: Path) -> None:
    writer = Writer(_SUM)
    writer.change[part] = _read_elsewhere(writer)
    assert "is also read by" in refusal(writer.build(), tmp_path)["state-used"]


def _number(b: Builder, value: float) -> str:
    return b.const(np.array(value, np.float32))


_TOTALS: dict[str, Change] = {
    "abs": lambda b, x: b.op("Abs", x),
    "square root": lambda b, x: b.op("Sqrt", x),
    "negative": lambda b, x: b.op("Mul", x, _number(b, -1.0)),
    "capped": lambda b, x: b.op("Clip", x, "", _number(b, 9.0)),
    "bounded twice": lambda b, x: b.op("Max", b.op("Clip", x, _number(b, 1.0)), _number(b, 2.0)),
    "moved after its bound": lambda b, x: b.op("Add", b.op("Clip", x, _number(b, 1.0)), _number(b, 2.0)),
    "tensor": lambda b, x: b.op("Mul", x, b.const(np.array([1.0, 2.0, 3.0], np.float32).reshape(3, 1, 1))),
    "other queries": lambda b, x: b.op("Gather", x, b.const(list(range(11))[::-1]), axis=2),
    "maximum over queries": lambda b, x: b.op("ReduceMax", x, b.const([2]), keepdims=1),
}


@pytest.mark.parametrize("how", _TOTALS)
def test_a_result_divided_by_something_else(how: str, tmp_path: Path) -> None:
    assert "normaliser" in refusal(build(_SUM, total=_TOTALS[how]), tmp_path)


@pytest.mark.parametrize("how", ["abs", "negative", "maximum over queries"])
def test_a_channel_of_ones_used_for_something_else(how: str, tmp_path: Path) -> None:
    spec = Spec(normaliser="pad", epsilon=1e-3)
    assert "normaliser" in refusal(build(spec, total=_TOTALS[how]), tmp_path)


def _nodes(proto: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.op_type == kind]


def _store(proto: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return name


def test_padded_by_something_that_is_not_one(tmp_path: Path) -> None:
    """V with a channel of a half is V as it stands; the quotient after it is what nobody can say."""
    proto = build(Spec(normaliser="pad"))
    _nodes(proto, "Pad")[0].input[2] = _store(proto, "half", np.array(0.5, np.float32))
    refused_or_unnormalised(proto, tmp_path)


def test_padded_in_front(tmp_path: Path) -> None:
    proto = build(Spec(normaliser="pad"))
    _nodes(proto, "Pad")[0].input[1] = _store(proto, "front", np.array([0, 0, 0, 1, 0, 0, 0, 0]))
    refused_or_unnormalised(proto, tmp_path)


def test_divided_by_the_first_channel(tmp_path: Path) -> None:
    proto = build(Spec(normaliser="pad"))
    cut = _nodes(proto, "Slice")[1]
    cut.input[1], cut.input[2] = _store(proto, "zero", np.array([0])), _store(proto, "one", np.array([1]))
    assert "normaliser" in refusal(proto, tmp_path)


def test_the_inverse_way_round(tmp_path: Path) -> None:
    proto = build(Spec(normaliser="pad", value_dim=2))
    quotient = _nodes(proto, "Div")[0]
    quotient.input[0], quotient.input[1] = quotient.input[1], quotient.input[0]
    assert "normaliser" in refusal(proto, tmp_path)


def refused_or_unnormalised(proto: onnx.ModelProto, folder: Path) -> None:
    """The site may end before the quotient, and is then what it says; it is not normalised."""
    model, detection = detected(proto, folder)
    for site in detection.sites:
        assert site.linear is not None
        assert site.linear.normaliser == "none"
        assert error_of(model, site, feed_of(model)) < 3e-6
    assert detection.sites or detection.near_misses


def test_the_sum_is_of_other_keys(tmp_path: Path) -> None:
    """Masked keys in the state, unmasked ones in the sum."""

    def masked(b: Builder, x: str) -> str:
        key, value = b.nodes[-1].input
        return b.op("Einsum", b.op("Mul", key, "pad"), value, equation="zjhd,zjhe->zhed")

    assert "normaliser" in refusal(build(Spec(order="einsum", normaliser="mul"), state=masked), tmp_path)


def test_the_sum_runs_over_the_head_dim_of_the_keys(tmp_path: Path) -> None:
    proto = build(Spec(normaliser="mul", dim=11, length=11))
    total = _nodes(proto, "ReduceSum")[0]
    total.input[1] = _store(proto, "last", np.array([3]))
    assert "normaliser" in refusal(proto, tmp_path)


def graph(*shapes: tuple[int, ...], make: Callable[[Builder, list[str]], str], opset: int = 18) -> onnx.ModelProto:
    """Inputs x0, x1.. of these shapes -> what ``make`` gives."""
    b = Builder()
    names = [f"x{i}" for i in range(len(shapes))]
    out = b.op("Identity", make(b, names))
    inputs = [helper.make_tensor_value_info(n, 1, s) for n, s in zip(names, shapes, strict=True)]
    made = helper.make_graph(b.nodes, "g", inputs, [helper.make_tensor_value_info(out, 1, None)], b.stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


_RNG = np.random.default_rng(5)


def linear(b: Builder, x: str, before: int, after: int) -> str:
    return b.op("MatMul", x, b.const((_RNG.standard_normal((before, after)) / np.sqrt(before)).astype(np.float32)))


def turned(b: Builder, x: str) -> str:
    return b.op("Transpose", x, perm=[0, 2, 1])


def _mlp(b: Builder, x: list[str]) -> str:
    return linear(b, b.op("Relu", linear(b, x[0], 8, 12)), 12, 8)


def _lora(b: Builder, x: list[str]) -> str:
    return b.op("Add", linear(b, x[0], 8, 8), linear(b, linear(b, x[0], 8, 2), 2, 8))


def _gated(b: Builder, x: list[str]) -> str:
    gate = b.op("Sigmoid", linear(b, x[0], 8, 12))
    return linear(b, b.op("Mul", gate, linear(b, x[0], 8, 12)), 12, 8)


def _weights_chain(b: Builder, x: list[str]) -> str:
    weight = linear(b, b.const(_RNG.standard_normal((8, 3)).astype(np.float32)), 3, 8)
    return b.op("MatMul", x[0], weight)


def _hyper(b: Builder, x: list[str]) -> str:
    """A low-rank weight made from another input: its rank is no token axis."""
    z = b.op("Reshape", b.op("Slice", x[0], b.const([0]), b.const([1]), b.const([1])), b.const([2, 8]))
    first = b.op("Reshape", linear(b, z, 8, 24), b.const([2, 8, 3]))
    second = b.op("Reshape", linear(b, z, 8, 24), b.const([2, 3, 8]))
    return b.op("MatMul", linear(b, x[0], 8, 8), b.op("MatMul", first, second))


def _gram(b: Builder, x: list[str]) -> str:
    y = linear(b, x[0], 8, 8)
    return b.op("MatMul", linear(b, x[0], 8, 8), b.op("MatMul", turned(b, y), y))


def _gram_style(b: Builder, x: list[str]) -> str:
    y, z = linear(b, x[0], 8, 8), linear(b, x[0], 8, 8)
    return linear(b, b.op("MatMul", turned(b, y), z), 8, 4)


def _covariance(b: Builder, x: list[str]) -> str:
    """Two steps of a Newton iteration on a cross-covariance."""
    y, z = linear(b, x[0], 8, 8), linear(b, x[0], 8, 8)
    cross = b.op("MatMul", turned(b, y), z)
    return b.op("MatMul", b.op("MatMul", cross, turned(b, cross)), b.op("Relu", cross))


def _squeeze(b: Builder, x: list[str]) -> str:
    pooled = b.op("ReduceMean", x[0], b.const([1]), keepdims=1)
    return b.op("Mul", x[0], b.op("Sigmoid", linear(b, b.op("Relu", linear(b, pooled, 8, 2)), 2, 8)))


def _bilinear(b: Builder, x: list[str]) -> str:
    return b.op("MatMul", linear(b, x[0], 8, 8), turned(b, linear(b, x[0], 8, 8)))


def _cross_covariance(b: Builder, x: list[str]) -> str:
    """XCA: a softmax over channels."""
    q, k, v = (turned(b, linear(b, x[0], 8, 8)) for _ in range(3))
    return turned(b, b.op("MatMul", b.op("Softmax", b.op("MatMul", q, turned(b, k)), axis=-1), v))


def _relu_scores(b: Builder, x: list[str]) -> str:
    """relu(Q K^T) V is no product of features."""
    q, k, v = (linear(b, x[0], 8, 8) for _ in range(3))
    return b.op("MatMul", b.op("Relu", b.op("MatMul", q, turned(b, k))), v)


def _points(b: Builder, x: list[str]) -> str:
    """Poses times intrinsics times points."""
    pose = b.op("Reshape", linear(b, b.op("ReduceMean", x[0], b.const([1]), keepdims=0), 8, 9), b.const([2, 3, 3]))
    lens = b.op("Reshape", linear(b, b.op("ReduceMax", x[0], b.const([1]), keepdims=0), 8, 9), b.const([2, 3, 3]))
    return b.op("MatMul", b.op("MatMul", lens, pose), turned(b, linear(b, x[0], 8, 3)))


def _scan(b: Builder, x: list[str]) -> str:
    """A selective state space without keys: the state is a running sum of gated inputs."""
    gated = b.op("Mul", linear(b, x[0], 8, 8), b.op("Sigmoid", linear(b, x[0], 8, 8)))
    return b.op("Mul", b.op("CumSum", gated, b.const(np.array(1))), linear(b, x[0], 8, 8))


@pytest.mark.parametrize(
    "make",
    [_mlp, _lora, _gated, _weights_chain, _hyper, _gram, _gram_style, _covariance, _squeeze, _bilinear,
     _cross_covariance, _relu_scores, _points, _scan],
)  # fmt: skip
def test_what_is_no_attention(make: Callable[[Builder, list[str]], str], tmp_path: Path) -> None:
    refusal(graph((2, 9, 8), make=make), tmp_path)


def test_reasons_of_what_came_near(tmp_path: Path) -> None:
    assert "axis-roles" in refusal(graph((2, 9, 8), make=_hyper), tmp_path)
    assert "gram" in refusal(graph((2, 9, 8), make=_gram), tmp_path)


def test_what_chains_of_weights_look_like_leaves_no_near_miss(tmp_path: Path) -> None:
    for make in (_mlp, _lora, _gated, _weights_chain, _squeeze, _bilinear, _gram_style):
        assert refusal(graph((2, 9, 8), make=make), tmp_path) == {}


def test_softmax_attention_stays_softmax(tmp_path: Path) -> None:
    _, detection = detected(softmax_graph(SoftmaxSpec()), tmp_path)
    assert [s.kind for s in detection.sites] == ["softmax"]
    assert detection.near_misses == ()
