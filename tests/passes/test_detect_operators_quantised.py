"""Quantised models: attention is seen through QuantizeLinear and DequantizeLinear, or said to be kept; never taken."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

from attncompile.core.mechanism import exact_candidates
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanisms
from tests.exports import exported
from tests.passes.operator_graphs import check_facts, find, model
from tests.passes.rebuild import random_feeds

H, N, D = 2, 7, 4
INT8, UINT8 = TensorProto.INT8, TensorProto.UINT8
FP8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([random_feeds(onnx.load(path), i) for i in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@cache
def quantised(name: str, form: str, folder: Path) -> Path:
    """The recipe's tiny export, quantised by ONNX Runtime's own tool."""
    source, out = exported(name), folder / f"{name}_{form}.onnx"
    if form == "dynamic":
        quantize_dynamic(source, out, op_types_to_quantize=["MatMul"])
    else:
        every = ["MatMul", "Softmax", "Add", "Mul", "Transpose", "Reshape"]
        kinds = None if form != "all" else every
        layout = QuantFormat.QOperator if form == "operator" else QuantFormat.QDQ
        quantize_static(source, out, _Reader(source), quant_format=layout, op_types_to_quantize=kinds)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def refused_by_all(site: AttentionSite) -> bool:
    answers = [a for m in mechanisms() for a in exact_candidates(m, site)]
    assert answers
    return all(isinstance(a, Verdict) and a.code == "needs" and "quantised" in a.reason for a in answers)


@pytest.mark.parametrize("form", ["qdq", "all"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_qdq_models_have_the_sites_of_their_source(name: str, form: str, folder: Path) -> None:
    _, plain = find(onnx.load(exported(name)))
    _, found = find(onnx.load(quantised(name, form, folder)))
    assert len(found.sites) == len(plain.sites) == 2
    for site, other in zip(found.sites, plain.sites, strict=True):
        assert site.quantised == "int8"
        assert site.needs >= {"quantised"}
        assert refused_by_all(site)
        same = ("heads", "kv_heads", "head_dim", "value_dim", "query_length", "key_length", "softcap", "kind")
        assert [getattr(site, n) for n in same] == [getattr(other, n) for n in same]
        assert site.scale == pytest.approx(other.scale, rel=0.02)  # it is quantised too
        assert {p.kind for p in site.mask.parts} == {p.kind for p in other.mask.parts}
        assert any("QuantizeLinear" in n for n in site.nodes)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_operators_on_integers_are_reported(name: str, folder: Path) -> None:
    _, found = find(onnx.load(quantised(name, "operator", folder)))
    assert not found.sites
    assert [m.code for m in found.near_misses] == ["quantised"] * 2
    assert all(m.reason.startswith("quantised: kept (QLinearSoftmax") for m in found.near_misses)


def test_projections_on_integers_leave_the_attention_as_it_is(folder: Path) -> None:
    """Dynamic quantisation takes the linear layers alone: the sites are those of floats."""
    _, found = find(onnx.load(quantised("bert", "dynamic", folder)))
    assert [s.quantised for s in found.sites] == ["", ""]
    assert not found.near_misses


class _Graph:
    """q, k^T, v -> attention, with quantisation at the places that are named."""

    def __init__(self, kind: int, places: str, apart: bool = False, scale: float = 0.05) -> None:
        self.kind, self.places, self.apart = kind, places, apart
        self.nodes: list[NodeProto] = []
        size = int(helper.tensor_dtype_to_np_dtype(kind).itemsize)
        self.stored = [numpy_helper.from_array(np.array(scale, np.float32), "s"),
                       numpy_helper.from_array(np.array(0.1, np.float32), "s2"),
                       helper.make_tensor("z", kind, [], bytes(size), raw=True)]  # fmt: skip

    def op(self, kind: str, *inputs: str, **more: Any) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=f"n{len(self.nodes)}", **more))
        return out

    def pair(self, value: str, place: str) -> str:
        if place not in self.places.split():
            return value
        small = self.op("QuantizeLinear", value, "s", "z")
        return self.op("DequantizeLinear", small, "s2" if self.apart else "s", "z")

    def build(self) -> ModelProto:
        key = self.op("Transpose", "k", perm=[0, 1, 3, 2])
        scores = self.op("MatMul", self.pair("q", "q"), self.pair(key, "k"))
        scores = self.pair(scores, "scores")
        self.stored.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
        weights = self.pair(self.op("Softmax", self.op("Mul", scores, "half"), axis=-1), "weights")
        self.pair(self.op("MatMul", weights, self.pair("v", "v")), "out")
        self.nodes[-1].output[0] = "y"
        infos = [helper.make_tensor_value_info(x, 1, [1, H, N, D]) for x in "qkv"]
        graph = helper.make_graph(self.nodes, "g", infos, [helper.make_tensor_value_info("y", 1, [1, H, N, D])],
                                  self.stored)  # fmt: skip
        made = model(graph, 21)
        onnx.checker.check_model(made)
        return made


PLACES = ["scores", "weights", "scores weights", "q k", "q k v weights", "q k v scores weights out", "v", "k"]


@pytest.mark.parametrize("kind", [INT8, UINT8, *FP8])
@pytest.mark.parametrize("places", PLACES)
def test_every_place_of_quantisation(places: str, kind: int) -> None:
    _, found = find(_Graph(kind, places).build())
    (site,) = found.sites
    assert not found.near_misses
    assert site.quantised == ("fp8" if kind in FP8 else "int8")
    assert refused_by_all(site)
    assert (site.scale, site.heads, site.head_dim, site.key_length) == (0.5, H, D, N)
    assert site.mask.kind == "none"


@pytest.mark.parametrize("places", PLACES)
def test_the_facts_behind_fine_quantisation(places: str) -> None:
    """Steps of 0.001: the facts, computed without any quantisation, are the run within its rounding."""
    rng = np.random.default_rng(2)
    found, detection = find(_Graph(TensorProto.INT16, places, scale=0.001).build())
    (site,) = detection.sites
    assert site.quantised == "int16"
    check_facts(found, site, {x: rng.standard_normal((1, H, N, D)).astype(np.float32) for x in "qkv"}, 0.01)


def test_quantisation_of_the_output_alone_is_not_the_sites() -> None:
    _, found = find(_Graph(INT8, "out").build())
    (site,) = found.sites
    assert site.quantised == ""


def test_a_pair_with_two_scales_is_a_multiplication() -> None:
    """It is not stepped over: the site would have another scale."""
    _, found = find(_Graph(INT8, "scores", apart=True).build())
    assert not found.sites
    (miss,) = found.near_misses
    assert miss.code == "quantised"


def test_what_is_no_attention_behind_its_quantisation_is_not_one() -> None:
    """A router: the softmax meets a constant."""
    graph = _Graph(INT8, "scores weights")
    logits = graph.pair(graph.op("MatMul", "x", "w"), "scores")
    weights = graph.pair(graph.op("Softmax", logits, axis=-1), "weights")
    graph.op("MatMul", weights, "book")
    graph.nodes[-1].output[0] = "y"
    graph.stored += [numpy_helper.from_array(np.ones((8, 5), np.float32), "w"),
                     numpy_helper.from_array(np.ones((5, 3), np.float32), "book")]  # fmt: skip
    infos = [helper.make_tensor_value_info("x", 1, [4, 8])], [helper.make_tensor_value_info("y", 1, [4, 3])]
    _, found = find(model(helper.make_graph(graph.nodes, "g", *infos, graph.stored), 21))
    assert not found.sites
    assert [m.code for m in found.near_misses] == ["constant-keys"]


def integer_attention(second: str) -> ModelProto:
    """Both products as MatMulInteger on dynamically quantised operands, or the second one in float."""
    nodes: list[NodeProto] = []

    def product(left: str, right: str, out: str) -> None:
        for x in (left, right):
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], [f"{x}_{out}", f"{x}_{out}s", f"{x}_{out}z"]))
        nodes.append(helper.make_node("MatMulInteger", [f"{left}_{out}", f"{right}_{out}", f"{left}_{out}z",
                                                        f"{right}_{out}z"], [f"{out}_i"]))  # fmt: skip
        nodes.append(helper.make_node("Cast", [f"{out}_i"], [f"{out}_f"], to=1))
        nodes.append(helper.make_node("Mul", [f"{left}_{out}s", f"{right}_{out}s"], [f"{out}_s"]))
        nodes.append(helper.make_node("Mul", [f"{out}_f", f"{out}_s"], [out]))

    nodes.append(helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]))
    product("q", "kt", "a")
    nodes.append(helper.make_node("Softmax", ["a"], ["p"], axis=-1, name="soft"))
    if second == "integer":
        product("p", "v", "y")
    else:
        nodes.append(helper.make_node("MatMul", ["p", "v"], ["y"]))
    infos = [helper.make_tensor_value_info(x, 1, [1, H, N, D]) for x in "qkv"]
    return model(
        helper.make_graph(nodes, "g", infos, [helper.make_tensor_value_info("y", 1, [1, H, N, D])]), 21
    )  # fmt: skip


@pytest.mark.parametrize("second", ["integer", "float"])
def test_products_of_integers_are_reported(second: str) -> None:
    _, found = find(integer_attention(second))
    assert not found.sites
    (miss,) = found.near_misses
    assert miss.node == "soft"
    assert "quantised" in miss.reason
    assert "kept" in miss.reason
    if second == "integer":
        assert miss.code == "quantised"


def test_a_quantised_operator_is_a_quantised_site() -> None:
    """DequantizeLinear right before a standard Attention."""
    graph = _Graph(FP8[0], "q k v")
    inputs = [graph.pair(x, x) for x in "qkv"]
    graph.nodes.append(helper.make_node("Attention", inputs, ["y"], is_causal=1))
    infos = [helper.make_tensor_value_info(x, 1, [1, H, "n", D]) for x in "qkv"]
    out = [helper.make_tensor_value_info("y", 1, [1, H, "n", D])]
    _, found = find(model(helper.make_graph(graph.nodes, "g", infos, out, graph.stored), 23), {"n": Range(1, 8, 32)})
    (site,) = found.sites
    assert (site.quantised, site.mask.kind, site.key_length) == ("fp8", "causal", "n")
    assert refused_by_all(site)
