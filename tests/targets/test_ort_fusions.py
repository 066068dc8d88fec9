"""Fusions for ONNX Runtime: each pattern, what is nearly one, and the same outputs on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.targets.onnxruntime_cuda import half_sums
from attncompile.targets.ort_fusions import CONTRIB, FUSIONS, Fused, fuse
from attncompile.verification.retype import retype

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
B, N, C = 2, 11, 24


class Graph:
    """Nodes by op and inputs; numbers and arrays become constants, of ``kind`` where they are Python floats."""

    def __init__(self, kind: int = FLOAT, **inputs: tuple[int | str, ...]) -> None:
        self.kind = kind
        self.inputs = [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()]
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, op_type: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, [self._value(i) for i in inputs], names, **attributes))
        return names[0] if outputs == 1 else names

    def _value(self, given: Any) -> str:
        if isinstance(given, str):
            return given
        if isinstance(given, float):
            given = np.array(given, helper.tensor_dtype_to_np_dtype(self.kind))
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(given), name))
        return name

    def cast(self, value: Any, kind: int) -> str:
        return str(self.op("Cast", value, to=kind))

    def weight(self, *shape: int, seed: int = 0, kind: int = 0) -> np.ndarray:
        made = np.random.default_rng((seed, *shape)).standard_normal(shape)
        return np.asarray(made.astype(np.float16).astype(helper.tensor_dtype_to_np_dtype(kind or self.kind)))

    def model(self, *outputs: str) -> ModelProto:
        ends = [helper.make_empty_tensor_value_info(o) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, ends, self.constants)
        opsets = [helper.make_opsetid(d, 1 if d else 18) for d in sorted({"", *(n.domain for n in self.nodes)})]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(proto)
        del proto.graph.output[:]
        proto.graph.output.extend(inferred.graph.output)
        return proto


def run(proto: ModelProto, seed: int, sizes: dict[str, int]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    feeds = {
        i.name: random.standard_normal([sizes.get(d, d) for d in i.shape]).astype(np.float32)
        for i in session.get_inputs()
    }
    return list(session.run(None, feeds))


def fused(proto: ModelProto, tolerance: float = 2e-5, half_norms: bool = False, **sizes: int) -> Fused:
    """What fusing gives, shown to compute the same in float32."""
    before = proto.SerializeToString()
    result = fuse(proto, Path(), half_norms=half_norms)
    assert proto.SerializeToString() == before
    wide = {HALF: FLOAT}
    for want, got in zip(run(retype(proto, wide), 1, sizes), run(retype(result.proto, wide), 1, sizes), strict=True):
        assert np.isfinite(want).all() and np.abs(want).max() > 0.01
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    return result


def ops(result: Fused) -> list[str]:
    return sorted(n.op_type for n in result.proto.graph.node)


# -- GELU --------------------------------------------------------------------------------------------------------------


def tanh_gelu(g: Graph, x: str, cubic: float = 0.044715, root: float = 0.7978845608, power: float = 3.0) -> str:
    cube = g.op("Mul", cubic, g.op("Pow", x, power))
    bent = g.op("Tanh", g.op("Mul", root, g.op("Add", x, cube)))
    return str(g.op("Mul", x, g.op("Mul", 0.5, g.op("Add", bent, 1.0))))


def tanh_gelu_otherwise(g: Graph, x: str) -> str:
    """x * x * x, one product less, the half first."""
    square = g.op("Mul", x, x)
    inner = g.op("Mul", g.op("Mul", x, 0.7978845608), g.op("Add", g.op("Mul", square, 0.044715), 1.0))
    return str(g.op("Mul", g.op("Add", 1.0, g.op("Tanh", inner)), g.op("Mul", x, 0.5)))


def erf_gelu(g: Graph, x: str, root: float = 1.41421356) -> str:
    half = g.op("Mul", 0.5, g.op("Add", g.op("Erf", g.op("Div", x, root)), 1.0))
    return str(g.op("Mul", x, half))


@pytest.mark.parametrize("kind", [FLOAT, HALF])
@pytest.mark.parametrize(
    ("build", "plain", "biased"),
    [
        (tanh_gelu, "FastGelu", "FastGelu"),
        (tanh_gelu_otherwise, "FastGelu", "FastGelu"),
        (erf_gelu, "Gelu", "BiasGelu"),
    ],
)
def test_gelu(kind: int, build: Callable[[Graph, str], str], plain: str, biased: str) -> None:
    tolerance = 5e-5 if kind == HALF else 1e-6  # fp16's nearest numbers to the constants
    g = Graph(kind, x=(B, N, C))
    assert ops(fused(g.model(build(g, "x")), tolerance)) == [plain]
    g = Graph(kind, x=(B, N, C))
    total = g.op("Add", g.op("MatMul", "x", g.weight(C, 2 * C)), g.weight(2 * C))
    result = fused(g.model(build(g, total)), tolerance)
    assert ops(result) == sorted(["MatMul", biased]) and result.counts == {"GELU": 1}
    assert [len(n.input) for n in result.proto.graph.node] == [2, 2]
    assert {o.domain for o in result.proto.opset_import} == {"", CONTRIB}


@pytest.mark.parametrize(
    "build",
    [
        lambda g, x: tanh_gelu(g, x, cubic=0.0450),
        lambda g, x: tanh_gelu(g, x, root=0.8),
        lambda g, x: tanh_gelu(g, x, power=2.0),
        lambda g, x: erf_gelu(g, x, root=1.42),
        lambda g, x: g.op("Mul", g.op("Relu", x), g.op("Add", g.op("Tanh", x), 1.0)),
    ],
)
def test_what_is_nearly_a_gelu(build: Callable[[Graph, str], str]) -> None:
    g = Graph(x=(B, N, C))
    assert fused(g.model(build(g, "x"))).counts == {}


def test_gelu_of_two_values() -> None:
    """tanh of one, times another."""
    g = Graph(x=(B, N, C), z=(B, N, C))
    cube = g.op("Mul", 0.044715, g.op("Pow", "x", 3.0))
    bent = g.op("Tanh", g.op("Mul", 0.7978845608, g.op("Add", "x", cube)))
    y = g.op("Mul", "z", g.op("Mul", 0.5, g.op("Add", bent, 1.0)))
    assert fused(g.model(y)).counts == {}


@pytest.mark.parametrize("shape", [(1,), (N, 1), (1, 1, C)])
def test_a_bias_of_another_shape_stays_outside(shape: tuple[int, ...]) -> None:
    g = Graph(x=(B, N, C))
    result = fused(g.model(tanh_gelu(g, g.op("Add", "x", g.weight(*shape)))))
    assert ops(result) == ["Add", "FastGelu"]


def test_a_sum_that_others_read_stays_outside() -> None:
    g = Graph(x=(B, N, C))
    total = g.op("Add", "x", g.weight(C))
    result = fused(g.model(tanh_gelu(g, total), g.op("Neg", total)))
    assert ops(result) == ["Add", "FastGelu", "Neg"]


@pytest.mark.parametrize("op_type", ["Pow", "Tanh", "Add"])
def test_a_gelu_whose_pieces_others_read(op_type: str) -> None:
    """What lies above the tanh may be read by others, what lies below may not."""
    g = Graph(x=(B, N, C))
    end = tanh_gelu(g, "x")
    piece = next(n.output[0] for n in g.nodes[::-1] if n.op_type == op_type)
    result = fused(g.model(end, g.op("Neg", piece)))
    assert result.counts == ({"GELU": 1} if op_type == "Pow" else {})


# -- norms -------------------------------------------------------------------------------------------------------------


def rms(g: Graph, x: str, axis: int = -1, epsilon: float = 1e-6, keepdims: int = 1, power: float = 2.0) -> str:
    mean = g.op("ReduceMean", g.op("Pow", x, np.float32(power)), np.array([axis]), keepdims=keepdims)
    factor = g.op("Reciprocal", g.op("Sqrt", g.op("Add", mean, np.float32(epsilon))))
    return str(g.op("Mul", x, factor))


def test_rms_norm() -> None:
    g = Graph(x=(B, N, C))
    result = fused(g.model(g.op("Mul", rms(g, "x"), g.weight(C))))
    assert ops(result) == ["SimplifiedLayerNormalization"] and result.counts == {"RMS norm": 1}


@pytest.mark.parametrize("late", [False, True])
def test_rms_norm_between_casts(late: bool) -> None:
    """Weighted after the cast to fp16 (Llama), or before it (diffusers)."""
    g = Graph(HALF, x=(B, "n", C))
    y = rms(g, g.cast("x", FLOAT))
    end = g.op("Mul", g.weight(C), g.cast(y, HALF)) if late else g.cast(g.op("Mul", y, g.weight(C, kind=FLOAT)), HALF)
    result = fused(g.model(end), n=7)
    assert ops(result) == ["SimplifiedLayerNormalization"]
    assert all(t.data_type == HALF for t in result.proto.graph.initializer)


def test_rms_norm_that_was_converted() -> None:
    """Only the factor is computed in float32."""
    g = Graph(HALF, x=(B, N, C))
    mean = g.op("ReduceMean", g.op("Pow", g.cast("x", FLOAT), np.float32(2)), np.array([2]))
    factor = g.op("Reciprocal", g.op("Sqrt", g.op("Add", mean, np.float32(1e-5))))
    result = fused(g.model(g.op("Mul", g.op("Mul", "x", g.cast(factor, HALF)), g.weight(C))))
    assert ops(result) == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("changes", [{"axis": 1}, {"epsilon": 0.5}, {"epsilon": -1e-6}, {"power": 4.0}])
def test_what_is_nearly_an_rms_norm(changes: dict[str, Any]) -> None:
    g = Graph(x=(B, N, C))
    result = fuse(g.model(g.op("Mul", rms(g, "x", **changes), g.weight(C))), Path())
    assert result.counts == {}


def test_rms_norm_in_fp16() -> None:
    """All of it in fp16, as ``model.half()`` leaves one that was written without casts."""
    g = Graph(HALF, x=(B, "n", C))
    result = fused(g.model(g.op("Mul", g.weight(C), rms(g, "x", epsilon=1e-3))), n=7)
    assert ops(result) == ["SimplifiedLayerNormalization"] and result.counts == {"RMS norm": 1}
    (norm,) = result.proto.graph.node
    assert norm.input[0] == "x" and [a.i for a in norm.attribute if a.name == "stash_type"] == [1]
    g = Graph(HALF, x=(B, N, C))  # a weight in another type, one for each token, and one that is an output besides
    assert fused(g.model(g.op("Mul", rms(g, "x", epsilon=1e-3), g.weight(N, 1)))).counts == {}
    g = Graph(HALF, x=(B, N, C))
    bare = rms(g, "x", epsilon=1e-3)
    assert fused(g.model(g.op("Mul", bare, g.weight(C)), bare)).counts == {}


@pytest.mark.parametrize("place", ["mean", "root", "factor", "normal"])
def test_an_rms_norm_whose_pieces_others_read(place: str) -> None:
    """None is taken away from them."""
    g = Graph(x=(B, N, C))
    pieces = {}
    pieces["mean"] = g.op("ReduceMean", g.op("Pow", "x", 2.0), np.array([-1]))
    pieces["root"] = g.op("Sqrt", g.op("Add", pieces["mean"], 1e-6))
    pieces["factor"] = g.op("Reciprocal", pieces["root"])
    pieces["normal"] = g.op("Mul", "x", pieces["factor"])
    end = g.op("Mul", pieces["normal"], g.weight(C))
    assert fused(g.model(end)).counts == {"RMS norm": 1}
    assert fused(g.model(end, g.op("Neg", pieces[place]))).counts == {}


def test_a_weight_that_is_no_row_or_no_fp16_number() -> None:
    g = Graph(x=(B, N, N))
    assert fused(g.model(g.op("Mul", rms(g, "x"), g.weight(N, 1)))).counts == {}
    g = Graph(HALF, x=(B, N, C))
    weight = g.weight(C, kind=FLOAT) * np.float32(1.0003)
    assert fused(g.model(g.cast(g.op("Mul", rms(g, g.cast("x", FLOAT)), weight), HALF))).counts == {}


def modulated(g: Graph, x: str, scale: str, shift: str, **changes: Any) -> str:
    given = {"ones": np.ones(C, np.float32), "epsilon": 1e-6, "axis": -1, **changes}
    y = g.op("LayerNormalization", x, given["ones"], axis=given["axis"], epsilon=given["epsilon"])
    return str(g.op("Add", g.op("Mul", y, g.op("Add", scale, 1.0)), shift))


def test_modulated_norm() -> None:
    g = Graph(x=(B, N, C), scale=(1, 1, C), shift=(1, 1, C))
    result = fused(g.model(modulated(g, "x", "scale", "shift")))
    assert result.counts == {"modulated norm": 1} and ops(result).count("Mul") == 0
    (norm,) = [n for n in result.proto.graph.node if n.op_type == "LayerNormalization"]
    assert [a.f for a in norm.attribute if a.name == "epsilon"] == [pytest.approx(1e-6)]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((B, 1, C), {}),
        ((1, N, C), {}),
        ((1, 1, 1), {}),
        ((1, 1, C), {"ones": np.full(C, 1.5, np.float32)}),
        ((1, 1, C), {"axis": 1, "ones": np.ones((N, C), np.float32)}),
    ],
)
def test_what_is_nearly_a_modulated_norm(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    g = Graph(x=(B, N, C), scale=shape, shift=shape)
    assert fused(g.model(modulated(g, "x", "scale", "shift", **changes))).counts == {}


def test_norm_between_casts() -> None:
    g = Graph(HALF, x=(B, N, C))
    y = g.op("LayerNormalization", g.cast("x", FLOAT), g.weight(C, kind=FLOAT), g.weight(C, kind=FLOAT), epsilon=1e-6)
    result = fused(g.model(g.cast(y, HALF)))
    assert ops(result) == ["LayerNormalization"] and result.counts == {"norm in fp16": 1}
    g = Graph(HALF, x=(B, N, C))
    y = g.op("LayerNormalization", g.cast("x", FLOAT), g.weight(C, kind=FLOAT) * np.float32(1.0003), epsilon=1e-6)
    assert fused(g.model(g.cast(y, HALF))).counts == {}


def test_norms_and_gates_that_others_read_in_float32() -> None:
    g = Graph(HALF, x=(B, N, C))
    y = g.op("LayerNormalization", g.cast("x", FLOAT), g.weight(C, kind=FLOAT), epsilon=1e-6)
    assert fused(g.model(g.cast(y, HALF), g.op("Neg", y))).counts == {}
    g = Graph(HALF, x=(B, N, C), y=(B, N, C), gate=(1, 1, C))
    product = g.op("Mul", g.cast("y", FLOAT), g.cast("gate", FLOAT))
    total = g.op("Add", g.cast("x", FLOAT), product)
    assert fused(g.model(g.cast(total, HALF), g.op("Neg", product))).counts == {}
    assert fused(g.model(g.cast(total, HALF), g.op("Neg", total))).counts == {}


@pytest.mark.parametrize("place", [0, 1])
def test_a_modulated_norm_whose_pieces_others_read(place: int) -> None:
    g = Graph(x=(B, N, C), scale=(1, 1, C), shift=(1, 1, C))
    end = modulated(g, "x", "scale", "shift")
    piece = [n.output[0] for n in g.nodes if n.op_type in ("LayerNormalization", "Mul")][place]
    assert fused(g.model(end, g.op("Neg", piece))).counts == {}


def gated(gate: tuple[int, ...], other: int = HALF) -> Fused:
    g = Graph(HALF, x=(B, N, C), y=(B, N, C), gate=gate)
    product = g.op("Mul", g.cast("y", FLOAT), g.cast("gate", FLOAT))
    total = g.op("Add", g.cast("x", FLOAT), product)
    return fused(g.model(g.cast(total, other)))


def test_gated_residual() -> None:
    result = gated((1, 1, C))
    assert result.counts == {"gated residual in fp16": 1}
    assert gated((1, 1, C), FLOAT).counts == gated((1, N, C)).counts == gated((1, 1, 1)).counts == {}
    g = Graph(HALF, x=(B, N, C), y=(B, N, C))  # a constant gate that fp16 does not have
    gate = np.full((1, 1, C), 1.0003, np.float32)
    total = g.op("Add", g.cast("x", FLOAT), g.op("Mul", g.cast("y", FLOAT), gate))
    assert fused(g.model(g.cast(total, HALF))).counts == {}


# -- residuals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, 0, 1])
@pytest.mark.parametrize("read", [False, True])
def test_skip_layer_norm(bias: int | None, read: bool) -> None:
    """The bias on either side of the residual sum, which is read by others or not."""
    g = Graph(x=(B, "n", C), y=(B, "n", C))
    y = g.op("MatMul", "y", g.weight(C, C))
    if bias is not None:
        y = g.op("Add", *((y, g.weight(C)) if bias else (g.weight(C), y)))
    total = g.op("Add", "x", y) if bias else g.op("Add", y, "x")
    norm = g.op("LayerNormalization", total, g.weight(C, seed=1), g.weight(C, seed=2), epsilon=1e-6)
    result = fused(g.model(norm, *([g.op("Neg", total)] if read else [])), n=7)
    assert ops(result) == ["MatMul", *(["Neg"] if read else []), "SkipLayerNormalization"]
    (skip,) = [n for n in result.proto.graph.node if n.domain == CONTRIB]
    assert (len(skip.input), len(skip.output)) == (4 + (bias is not None), 4 if read else 1)
    assert [a.f for a in skip.attribute] == [pytest.approx(1e-6)]


def test_a_residual_in_fp16_is_left_alone_if_asked_for() -> None:
    """ONNX Runtime's CUDA kernel of before 1.27 would add up squares in fp16, but in strict mode."""
    g = Graph(HALF, x=(B, N, C), y=(B, N, C))
    total = g.op("Add", "x", "y")
    norm = g.op("LayerNormalization", total, g.weight(C), g.weight(C, seed=1), epsilon=1e-6)
    proto = g.model(norm, total)
    assert fused(proto).counts == {}
    assert not half_sums(proto)
    result = fused(proto, half_norms=True)
    assert fuse(proto, Path()).counts == result.counts and half_sums(result.proto)
    assert not half_sums(retype(result.proto, {HALF: FLOAT}))
    assert ops(result) == ["SkipLayerNormalization"] and result.counts == {"residual and norm": 1}


def test_norms_of_sums_of_types_that_are_not_written_down() -> None:
    """A scale that is computed; one that nothing says the type of counts as fp16; so does a norm in a branch."""
    for kind, unknown, wanted in ((HALF, False, True), (FLOAT, False, False), (FLOAT, True, True)):
        g = Graph(kind, x=(B, N, C), y=(B, N, C), s=(C,))
        scale = g.op("Neg", "s")
        norm = g.op("LayerNormalization", g.op("Add", "x", "y"), scale, g.weight(C, seed=1), epsilon=1e-6)
        proto = fused(g.model(norm), half_norms=True).proto
        (skip,) = [n for n in proto.graph.node if n.domain == CONTRIB]
        if unknown:
            skip.input[2] = "of nobody"
        assert half_sums(proto) is wanted, (kind, unknown)
        branch = helper.make_graph(list(proto.graph.node), "branch", [], list(proto.graph.output))
        branch.initializer.extend(proto.graph.initializer)
        outer = onnx.ModelProto()
        outer.CopyFrom(proto)
        del outer.graph.node[:], outer.graph.initializer[:]
        flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
        outer.graph.input.append(flag)
        outer.graph.node.append(helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch))
        assert half_sums(outer) is wanted, (kind, unknown)


@pytest.mark.parametrize("place", ["biased", "scaled"])
def test_a_branch_that_others_read_keeps_its_bias(place: str) -> None:
    """The sum alone goes into the norm."""
    g = Graph(x=(B, N, C), y=(B, N, C))
    biased = g.op("Add", g.op("MatMul", "y", g.weight(C, C)), g.weight(C))
    scaled = g.op("Mul", biased, g.weight(C, seed=3))
    also = g.op("Neg", {"biased": biased, "scaled": scaled}[place])
    norm = g.op("LayerNormalization", g.op("Add", scaled, "x"), g.weight(C, seed=1), g.weight(C, seed=2), epsilon=1e-6)
    result = fused(g.model(norm, also))
    assert ops(result) == ["Add", "MatMul", "Mul", "Neg", "SkipLayerNormalization"]
    (skip,) = [n for n in result.proto.graph.node if n.domain == CONTRIB]
    assert len(skip.input) == 4


def test_skip_rms_norm() -> None:
    g = Graph(x=(B, N, C), y=(B, N, C))
    total = g.op("Add", "x", g.op("Add", "y", g.weight(C)))
    result = fused(g.model(g.op("Mul", rms(g, total), g.weight(C)), total))
    assert ops(result) == ["SkipSimplifiedLayerNormalization"]
    assert result.proto.graph.output[1].name == result.proto.graph.node[0].output[3]


def test_a_scaled_branch_keeps_its_bias_inside() -> None:
    """LayerScale: (m + b) s is m s + b s."""
    g = Graph(x=(B, N, C), y=(B, N, C))
    branch = g.op("Mul", g.op("Add", g.op("MatMul", "y", g.weight(C, C)), g.weight(C)), g.weight(C, seed=3))
    total = g.op("Add", branch, "x")
    norm = g.op("LayerNormalization", total, g.weight(C, seed=1), g.weight(C, seed=2), epsilon=1e-6)
    assert ops(fused(g.model(norm, total))) == ["MatMul", "Mul", "SkipLayerNormalization"]


@pytest.mark.parametrize(("shape", "axis"), [((1, 1, C), -1), ((B, 1, C), -1), ((B, N, C), 1)])
def test_what_is_nearly_a_residual(shape: tuple[int, ...], axis: int) -> None:
    g = Graph(x=(B, N, C), y=shape)
    scale = g.weight(C) if axis == -1 else g.weight(N, C)
    norm = g.op("LayerNormalization", g.op("Add", "x", "y"), scale, axis=axis)
    assert fused(g.model(norm)).counts == {}


@pytest.mark.parametrize("shape", [(1,), (N, 1), (N, C)])
def test_a_bias_of_another_shape_is_no_part_of_a_residual(shape: tuple[int, ...]) -> None:
    g = Graph(x=(B, N, C), y=(B, N, C))
    total = g.op("Add", "x", g.op("Add", "y", g.weight(*shape)))
    result = fused(g.model(g.op("LayerNormalization", total, g.weight(C))))
    assert ops(result) == ["Add", "SkipLayerNormalization"]


# -- rotary codes ------------------------------------------------------------------------------------------------------

H, D = 3, 8


def element(g: Graph, pairs: str, i: int) -> str:
    last = np.array([-1])
    return str(g.op("Squeeze", g.op("Slice", pairs, np.array([i]), np.array([i + 1]), last), last))


def scattered(g: Graph, first: str, second: str, **changes: Any) -> str:
    """Written into the last axis of [B, N, H, D] as torch's exporter does."""
    given = {"even": np.arange(0, D, 2), "odd": np.arange(1, D, 2), "reduction": "none", **changes}
    value: Any = np.zeros((D, N, H, B), helper.tensor_dtype_to_np_dtype(g.kind))
    for update, rows in ((first, given["even"]), (second, given["odd"])):
        turned = g.op("Transpose", update, perm=[3, 1, 2, 0])
        value = g.op("ScatterND", value, rows[:, None], turned, reduction=given["reduction"])
        value = g.op("Identity", value)
    return str(g.op("Transpose", value, perm=[3, 2, 1, 0]))


def test_pairs_that_were_scattered() -> None:
    g = Graph(even=(B, N, H, D // 2), odd=(B, N, H, D // 2))
    result = fused(g.model(scattered(g, "even", "odd")), tolerance=0.0)
    assert "ScatterND" not in ops(result) and result.counts["interleaved pairs"] == 1
    g = Graph(even=(B, N, H, D // 2), odd=(B, N, H, D // 2))
    changes = {"even": np.arange(1, D, 2), "odd": np.arange(0, D, 2) - D}
    assert "ScatterND" not in ops(fused(g.model(scattered(g, "even", "odd", **changes)), tolerance=0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"odd": np.array([1, 3, 5, 5])},
        {"odd": np.array([3, 1, 5, 7])},
        {"odd": np.arange(0, D, 2)},
        {"even": np.arange(D // 2), "odd": np.arange(D // 2, D)},
        {"reduction": "add"},
    ],
)
def test_what_is_nearly_interleaved(changes: dict[str, Any]) -> None:
    g = Graph(even=(B, N, H, D // 2), odd=(B, N, H, D // 2))
    assert ops(fused(g.model(scattered(g, "even", "odd", **changes)), tolerance=0.0)).count("ScatterND") == 2


def test_updates_that_are_not_transposed() -> None:
    g = Graph(even=(D // 2, N), odd=(D // 2, N))
    first = g.op("ScatterND", np.zeros((D, N), np.float32), np.arange(0, D, 2)[:, None], "even")
    second = g.op("ScatterND", first, np.arange(1, D, 2)[:, None], "odd")
    assert "ScatterND" not in ops(fused(g.model(second), tolerance=0.0))


def pairs(g: Graph, crossed: bool = False, swapped: bool = False) -> str:
    split = g.op("Reshape", "x", np.array([B, N, H, D // 2, 2]))
    x0, x1 = element(g, split, int(swapped)), element(g, split, int(not swapped))
    even = g.op("Sub", g.op("Mul", x0, "cos"), g.op("Mul", x1, "sin"))
    odd = g.op("Add", g.op("Mul", x0, "cos" if crossed else "sin"), g.op("Mul", x1, "sin" if crossed else "cos"))
    return scattered(g, even, odd)


@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_rotary_pairs(kind: int) -> None:
    tables = {"cos": (1, N, 1, D // 2), "sin": (1, N, 1, D // 2)}
    g = Graph(kind, x=(B, N, H * D), **tables)
    result = fused(g.model(pairs(g)))
    assert result.counts["rotary pairs"] == 1
    assert ops(result) == ["Reshape", "Reshape", "Reshape", "RotaryEmbedding", "Transpose"]
    for changes in ({"crossed": True}, {"swapped": True}):
        g = Graph(kind, x=(B, N, H * D), **tables)
        assert "rotary pairs" not in fused(g.model(pairs(g, **changes))).counts
    for shape in ((1, 1, 1, D // 2), (B, N, 1, D // 2), (1, N, H, D // 2)):
        g = Graph(kind, x=(B, N, H * D), cos=shape, sin=shape)
        assert "rotary pairs" not in fused(g.model(pairs(g))).counts


def test_rotary_pairs_of_any_batch_and_tokens() -> None:
    tables = {"cos": (1, "n", 1, D // 2), "sin": (1, "n", 1, D // 2)}

    def made(joined: bool) -> Graph:
        g = Graph(x=("b", "n", H * D), **tables)
        split = g.op("Reshape", "x", np.array([0, 0, H, D // 2, 2]))
        x0, x1 = element(g, split, 0), element(g, split, 1)
        even = g.op("Sub", g.op("Mul", x0, "cos"), g.op("Mul", x1, "sin"))
        odd = g.op("Add", g.op("Mul", x0, "sin"), g.op("Mul", x1, "cos"))
        parts = [g.op("Unsqueeze", v, np.array([-1])) for v in ((even, odd) if joined else (odd, even))]
        g.op("Reshape", g.op("Concat", *parts, axis=-1), np.array([0, 0, H, D]))
        return g

    g = made(True)
    result = fused(g.model(g.nodes[-1].output[0]), b=3, n=7)
    assert result.counts == {"rotary pairs": 1} and ops(result).count("RotaryEmbedding") == 1
    g = made(False)  # the odd ones first
    assert fused(g.model(g.nodes[-1].output[0]), b=3, n=7).counts == {}


def test_a_rotation_whose_pieces_others_read() -> None:
    """They keep them; the rotation is one op all the same."""
    g = Graph(x=(B, N, H * D), t=(1, N, D // 2))
    end = halves(g, ("t", "t"))
    turned = next(n for n in g.nodes if n.op_type == "Concat" and len(n.input) == 2 and n.input[0] != n.input[1])
    result = fused(g.model(end, g.op("Abs", turned.output[0])))
    assert result.counts == {"rotary halves": 1} and "Neg" in ops(result)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_a_large_table(last: float) -> None:
    """More than a million numbers, whose halves are equal but, with ``last``, for one."""
    n, width = 70_001, 16
    g = Graph(x=(1, 1, n, width))
    table = np.random.default_rng(0).standard_normal((1, 1, n, width // 2)).astype(np.float32)
    cos, sin = (np.concatenate([table + i, table + i], -1) for i in range(2))
    sin[0, 0, -1, -1] += last
    low, high = (g.op("Slice", "x", np.array([a]), np.array([b]), np.array([3])) for a, b in ((0, 8), (8, 16)))
    turned = g.op("Concat", g.op("Neg", high), low, axis=-1)
    proto = g.model(g.op("Add", g.op("Mul", "x", cos), g.op("Mul", turned, sin)))
    assert proto.ByteSize() > 1 << 22
    assert fused(proto).counts == ({} if last else {"rotary halves": 1})


def test_silu_is_left_to_onnx_runtime(tmp_path: Path) -> None:
    """Its own optimizer makes one op of x sigmoid(x), for its CUDA provider too."""
    g = Graph(x=(B, N, C), up=(B, N, C))
    proto = g.model(g.op("Mul", g.op("Mul", "x", g.op("Sigmoid", "x")), "up"))
    assert fused(proto).counts == {}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = onnx.load(tmp_path / "optimized.onnx")
    assert sorted(n.op_type for n in made.graph.node) == ["Mul", "QuickGelu"]


def halves(g: Graph, angles: tuple[str, str], negative: bool = True, cut: int = D // 2, before: bool = True) -> str:
    x = "x"
    if before:
        x = g.op("Transpose", g.op("Reshape", "x", np.array([B, -1, H, D])), perm=[0, 2, 1, 3])
    joined = g.op("Concat", *angles, axis=-1)
    cos, sin = (g.op("Unsqueeze", g.op(f, joined), np.array([1])) for f in ("Cos", "Sin"))
    low, high = (g.op("Slice", x, np.array([a]), np.array([b]), np.array([3])) for a, b in ((0, cut), (cut, 2**40)))
    turned = g.op("Concat", g.op("Neg", high) if negative else high, low, axis=-1)
    return str(g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin)))


@pytest.mark.parametrize("before", [True, False])
def test_rotary_halves(before: bool) -> None:
    shape: tuple[int | str, ...] = (B, N, H * D) if before else (B, H, "n", D)
    g = Graph(x=shape, t=(1, N if before else "n", D // 2))
    result = fused(g.model(halves(g, ("t", "t"), before=before)), n=7)
    assert result.counts == {"rotary halves": 1} and "Neg" not in ops(result)


def test_what_is_nearly_a_rotation_of_halves() -> None:
    for changes in ({"negative": False}, {"cut": D // 4}):
        g = Graph(x=(B, N, H * D), t=(1, N, D // 2))
        assert fused(g.model(halves(g, ("t", "t"), **changes))).counts == {}
    g = Graph(x=(B, N, H * D), t=(1, N, D // 2), u=(1, N, D // 2))
    assert fused(g.model(halves(g, ("t", "u")))).counts == {}
    g = Graph(x=(B, N, H * D), t=(B, N, D // 2))  # another table for each batch entry
    assert fused(g.model(halves(g, ("t", "t")))).counts == {}


# -- all together ------------------------------------------------------------------------------------------------------


def test_large_external_weights_are_not_read(tmp_path: Path) -> None:
    """The file is longer than the disk has room for: a hole."""
    g = Graph(HALF, x=(1, N, 1 << 15))
    g.constants.append(helper.make_tensor("w", HALF, [0], []))
    proto = g.model(tanh_gelu(g, g.op("MatMul", "x", "w")))
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    weight.dims[:], weight.data_location = [1 << 15, 1 << 16], TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(1 << 32))):
        weight.external_data.add(key=key, value=value)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(1 << 32)
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info(proto.graph.node[-1].output[0], HALF, (1, N, 1 << 16)))
    result = fuse(proto, tmp_path)
    assert ops(result) == ["FastGelu", "MatMul"] and result.proto.ByteSize() < 1 << 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov2", {"GELU": 2, "residual and norm": 4}),
        ("so400m", {"GELU": 2, "residual and norm": 5}),
        ("mistral", {"rotary halves": 4, "RMS norm": 5, "residual and norm": 4}),
        ("wan", {"rotary pairs": 4, "GELU": 2, "RMS norm": 6, "modulated norm": 5, "norm in fp16": 7,
                 "gated residual in fp16": 4, "residual and norm": 6}),
    ],
)  # fmt: skip
def test_exports(name: str, expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the end-to-end benchmark, small, in fp16, from torch's exporter."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools" / "bench"))
    models, ours = pytest.importorskip("e2e_models"), pytest.importorskip("e2e_ours")
    try:
        model = next(m for m in models.MODELS if m.of == name)
        module, inputs = model.build(True, None)
        path = ours.export_onnx(module.half(), models.half(inputs), tmp_path / "model.onnx", 18, model.tokens)
    finally:
        for left in ("e2e_models", "e2e_ours"):
            sys.modules.pop(left, None)
    proto = onnx.load(path)
    without = fuse(proto, tmp_path, half_norms=False).counts
    assert {**expected, "residual and norm": 0}.items() <= {"residual and norm": 0, **without}.items()
    result = fuse(proto, tmp_path)
    assert expected.items() <= result.counts.items()
    assert not {"Tanh", "Erf", "ScatterND", "Pow", "ReduceMean"} & set(ops(result))
    wide = {HALF: FLOAT}
    options = onnxruntime.SessionOptions()
    found = []
    for form in (proto, result.proto):
        session = onnxruntime.InferenceSession(retype(form, wide).SerializeToString(), options)
        feeds = {n: v.numpy() if not v.is_floating_point() else v.float().numpy() for n, v in inputs.items()}
        found.append(session.run(None, feeds)[0])
    assert np.linalg.norm(found[0] - found[1]) <= 5e-5 * np.linalg.norm(found[0])


def test_names_of_fusions_are_unique() -> None:
    assert len({name for name, _ in FUSIONS}) == len(FUSIONS)
