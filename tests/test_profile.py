"""Times of layers and sites, on a model whose site was replaced by a call of a function."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import BadModel
from attncompile.core.mask import MaskFacts
from attncompile.core.site import AttentionSite, Operand
from attncompile.profile import LayerTime, LayerTimes, compare, profile_model, profile_pair, region

N, D = 192, 64
IMPORTS = [helper.make_opsetid("", 18)]
NODES = [f"{op}{{i}}" for op in ("transpose", "qk", "scale", "softmax", "pv")]


def _site(i: int) -> AttentionSite:
    names = [n.format(i=i) for n in NODES]
    return AttentionSite(
        id=f"site{i}", form="test", query=Operand(f"q{i}", "BHND"), key=Operand(f"k{i}", "BHND"),
        value=Operand(f"v{i}", "BHND"), output=Operand(f"o{i}", "BHND"), batch=1, heads=2, kv_heads=2, head_dim=D,
        value_dim=D, query_length=N, key_length=N, scale=1.0, mask=MaskFacts(), dtype="float32",
        softmax_dtype="float32", nodes=tuple(names), interior=(f"kt{i}", f"s{i}", f"t{i}", f"p{i}", f"o{i}"),
    )  # fmt: skip


def _project(i: int, source: str) -> list[onnx.NodeProto]:
    return [helper.make_node("MatMul", [source, f"w{x}"], [f"{x}{i}"], name=f"project_{x}{i}") for x in "qkv"]


def _core(i: int) -> list[onnx.NodeProto]:
    names = [n.format(i=i) for n in NODES]
    return [
        helper.make_node("Transpose", [f"k{i}"], [f"kt{i}"], perm=[0, 1, 3, 2], name=names[0]),
        helper.make_node("MatMul", [f"q{i}", f"kt{i}"], [f"s{i}"], name=names[1]),
        helper.make_node("Mul", [f"s{i}", "half"], [f"t{i}"], name=names[2]),
        helper.make_node("Softmax", [f"t{i}"], [f"p{i}"], axis=-1, name=names[3]),
        helper.make_node("MatMul", [f"p{i}", f"v{i}"], [f"o{i}"], name=names[4]),
    ]


def _function() -> FunctionProto:
    """A body with nested branches; the mean of V, so that it is much less work."""
    out = [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    mean = helper.make_graph([helper.make_node("ReduceMean", ["value", "axis"], ["r"])], "mean", [], out)
    out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    other = helper.make_graph([helper.make_node("Neg", ["value"], ["z"])], "other", [], out)
    body = [
        helper.make_node("Constant", [], ["axis"], value_ints=[2]),
        helper.make_node("Size", ["query"], ["size"]),
        helper.make_node("Constant", [], ["zero"], value_int=0),
        helper.make_node("Less", ["zero", "size"], ["yes"]),
        helper.make_node("If", ["yes"], ["m"], then_branch=mean, else_branch=other),
        helper.make_node("Add", ["m", "value"], ["out"]),
    ]
    return helper.make_function("attncompile", "F", ["query", "key", "value"], ["out"], body, IMPORTS, overload="h")


def _model(replaced: tuple[int, ...] = ()) -> ModelProto:
    rng = np.random.default_rng(0)
    nodes = []
    for i in range(2):
        nodes += _project(i, "x" if i == 0 else "o0")
        if i in replaced:
            call = helper.make_node("F", [f"q{i}", f"k{i}", f"v{i}"], [f"o{i}"], domain="attncompile", overload="h")
            nodes.append(call)
        else:
            nodes += _core(i)
    stored = [numpy_helper.from_array((rng.standard_normal((D, D)) * 0.1).astype(np.float32), f"w{x}") for x in "qkv"]
    stored.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2, N, D]) for n in ("x", "o1")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    imports = [*IMPORTS, helper.make_opsetid("attncompile", 1)]
    return helper.make_model(graph, functions=[_function()] if replaced else [], opset_imports=imports, ir_version=10)


@pytest.fixture
def feed() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((1, 2, N, D)).astype(np.float32)}


def _save(proto: ModelProto, path: Path) -> Path:
    onnx.save(proto, path)
    return path


def test_layers_of_a_plain_model(tmp_path: Path, feed: dict[str, np.ndarray]) -> None:
    path = _save(_model(), tmp_path / "m.onnx")
    sites = [_site(0), _site(1)]
    known = {o for n in _model().graph.node for o in n.output}
    times = profile_model(path, feed, threads=1, runs=3, regions={s.id: region(_model(), s, known) for s in sites})
    assert (times.runs, times.threads) == (3, 1)
    assert {"project_q0", "softmax0", "softmax1"} <= {layer.name for layer in times.layers}
    assert all(layer.calls == 1 for layer in times.layers)
    assert {layer.site for layer in times.layers if layer.name.startswith("project")} == {""}
    for i in range(2):
        mine = {layer.op_type for layer in times.layers if layer.site == f"site{i}"}
        # The scale and the transpose are fused into the first product by ONNX Runtime.
        assert {"Softmax", "MatMul", "FusedMatMul"} == mine
        assert times.site(f"site{i}") > 0
    summed = math.fsum(layer.microseconds for layer in times.layers)
    assert math.isclose(sum(times.by_op().values()), summed)
    assert 0 < summed <= times.total * 1.2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"], "the profiler's files were left"


def test_calls_of_one_function_are_told_apart(tmp_path: Path, feed: dict[str, np.ndarray]) -> None:
    before, after = _save(_model(), tmp_path / "a.onnx"), _save(_model((0, 1)), tmp_path / "b.onnx")
    unchanged = after.read_bytes()
    found = profile_pair(before, after, feed, [_site(0), _site(1)], threads=1, runs=4)
    assert after.read_bytes() == unchanged
    assert found.before.runs == found.after.runs == 4
    for i, site in enumerate(found.sites):
        assert site.site == f"site{i}"
        assert 0 < site.after < site.before
        assert site.gain > 1
        layers = [layer for layer in found.after.layers if layer.site == f"site{i}"]
        # The node inside the branch is counted, the If around it is not.
        assert "ReduceMean" in {layer.op_type for layer in layers}
        assert sum(layer.calls for layer in layers if layer.op_type == "ReduceMean") == 1
    assert "If" not in found.after.by_op()


def test_one_site_replaced_and_one_kept(tmp_path: Path, feed: dict[str, np.ndarray]) -> None:
    before, after = _save(_model(), tmp_path / "a.onnx"), _save(_model((1,)), tmp_path / "b.onnx")
    found = profile_pair(before, after, feed, [_site(0), _site(1)], threads=1, runs=2)
    ops = {s: {layer.op_type for layer in found.after.layers if layer.site == s} for s in ("site0", "site1")}
    assert "Softmax" in ops["site0"]
    assert "Softmax" not in ops["site1"]
    assert "ReduceMean" in ops["site1"]


def test_region_ends_at_the_operands() -> None:
    known = {o for n in _model().graph.node for o in n.output}
    assert region(_model(), _site(1), known) == {n.format(i=1) for n in NODES}
    assert region(_model((1,)), _site(1), known) == {"F:o1"}


def test_compare_sums_what_was_found() -> None:
    def times(layers: list[LayerTime]) -> LayerTimes:
        return LayerTimes(tuple(layers), 100.0, 1, 1)

    before = times([LayerTime("a", "MatMul", 30.0, 1, "site0"), LayerTime("b", "Softmax", 10.0, 1, "site0")])
    after = times([LayerTime("c", "MatMul", 8.0, 1, "site0"), LayerTime("d", "Add", 50.0, 1)])
    found = compare(before, after, [_site(0), _site(1)])
    assert (found.sites[0].before, found.sites[0].after, found.sites[0].gain) == (40.0, 8.0, 5.0)
    assert math.isnan(found.sites[1].gain), "a site that was not found has no time, not zero"


def test_wrong_inputs_are_one_line(tmp_path: Path) -> None:
    path = _save(_model(), tmp_path / "m.onnx")
    with pytest.raises(BadModel, match=r"cannot run m\.onnx") as error:
        profile_model(path, {"x": np.zeros((1, 2, 3), np.float32)})
    assert "\n" not in error.value.message


def test_external_weights_are_found(tmp_path: Path, feed: dict[str, np.ndarray]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(_model(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert profile_model(path, feed, threads=1, runs=1).total > 0
