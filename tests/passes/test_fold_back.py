"""What was done to a model for detection alone is taken back: in sites that are kept every node is the model's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from attncompile import pipeline
from attncompile.core import plan_toml
from attncompile.core.model import Model
from attncompile.core.plan import Decision
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.fold_back import Folds
from attncompile.passes.replace import apply
from attncompile.passes.separate import separate
from attncompile.passes.symbols import profile_for
from attncompile.pipeline import Options
from attncompile.plugins import mechanisms
from tests.passes.operator_graphs import run
from tests.test_backend_nodes import tool

B, N, H, D = 2, 261, 3, 4
W = H * D


def constants(*layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    found: dict[str, np.ndarray] = {}
    for i in layers:
        found[f"w{i}"] = rng.standard_normal((W, 3 * W)).astype(np.float32) / 4
        found[f"b{i}"] = rng.standard_normal(3 * W).astype(np.float32)
    return found


def proto_of(nodes: list[NodeProto], stored: Mapping[str, np.ndarray]) -> ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, [B, N, W])],
        [helper.make_tensor_value_info("y", 1, [B, N, W])], [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def fused() -> ModelProto:
    """Three causal layers, each one fused operator."""

    def layer(i: int, x: str, y: str) -> NodeProto:
        return helper.make_node(
            "Attention", [x, f"w{i}", f"b{i}"], [y], name=f"layer{i}", domain="com.microsoft", num_heads=H,
            unidirectional=1,
        )  # fmt: skip

    nodes = [layer(0, "x", "y0"), layer(1, "y0", "y1"), layer(2, "y1", "y2"),
             helper.make_node("Add", ["y2", "y0"], ["y"], name="sum")]  # fmt: skip
    return proto_of(nodes, constants(0, 1, 2))


def plain() -> ModelProto:
    """Two layers of one head in nodes of rank 3: each operand, and the output, needs a pair of Reshapes."""
    nodes, x = [], "x"
    for i in range(2):
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"all{i}"]),
            helper.make_node("Split", [f"all{i}"], [f"q{i}", f"k{i}", f"v{i}"], axis=2, num_outputs=3),
            helper.make_node("Transpose", [f"k{i}"], [f"kt{i}"], perm=[0, 2, 1]),
            helper.make_node("MatMul", [f"q{i}", f"kt{i}"], [f"s{i}"]),
            helper.make_node("Softmax", [f"s{i}"], [f"p{i}"], axis=-1),
            helper.make_node("MatMul", [f"p{i}", f"v{i}"], ["y" if i else "y0"]),
        ]
        x = "y0"
    return proto_of(nodes, {"w0": constants(0)["w0"], "w1": constants(1)["w1"]})


def parts(proto: ModelProto) -> tuple[Model, Model, tuple[AttentionSite, ...]]:
    """The model, the working copy, and its sites."""
    model = Model(Path("model.onnx"), proto, "", 18)
    profile = profile_for(model, {})
    working = separate(model, profile)
    assert working is not model
    detection = detect(working, profile)
    assert not detection.near_misses
    return model, working, detection.sites


def written(working: Model, sites: tuple[AttentionSite, ...], chosen: tuple[int, ...]) -> ModelProto:
    (dense,) = (m for m in mechanisms() if m.name == "DenseAttention")
    edits = []
    for i in chosen:
        parameters = next(p for m, p in tool().ways(sites[i], mechanisms()) if m.name == dense.name)
        edits.append((sites[i], dense.lower(sites[i], parameters, 18)))
    return apply(working, edits)


def fused_names(graph: GraphProto) -> set[str]:
    return {n.name for n in graph.node if (n.domain, n.op_type) == ("com.microsoft", "Attention")}


def texts(proto: ModelProto) -> set[bytes]:
    return {n.SerializeToString(deterministic=True) for n in proto.graph.node}


@pytest.mark.parametrize("make", [fused, plain])
def test_with_nothing_replaced_all_is_taken_back(make: Any) -> None:
    model, working, _ = parts(make())
    back = ModelProto()
    back.CopyFrom(working.proto)
    Folds(model.proto, working.proto).undo(back)
    assert texts(back) == texts(model.proto)
    assert [t.name for t in back.graph.initializer] == [t.name for t in model.proto.graph.initializer]


@pytest.mark.parametrize(("make", "chosen"), [
    (fused, (0,)), (fused, (1,)), (fused, (0, 2)), (plain, (0,)), (plain, (1,)),
])  # fmt: skip
def test_kept_sites_keep_their_nodes(make: Any, chosen: tuple[int, ...]) -> None:
    proto = make()
    model, working, sites = parts(proto)
    changed = written(working, sites, chosen)
    loose = len(changed.graph.node)
    Folds(model.proto, working.proto).undo(changed)
    assert len(changed.graph.node) < loose
    onnx.checker.check_model(changed)
    if make is fused:
        names = fused_names(changed.graph)
        assert names == {f"layer{i}" for i in range(3) if i not in chosen}
        kept = {n.SerializeToString(deterministic=True) for n in proto.graph.node if n.name in names}
    else:
        (other,) = {0, 1} - set(chosen)
        own = {f"{x}{other}" for x in ("all", "q", "kt", "s", "p")} | {"y" if other else "y0"}
        kept = {n.SerializeToString(deterministic=True) for n in proto.graph.node if n.output[0] in own}
        assert len(kept) == len(own)
    assert kept <= texts(changed)
    read = {v for n in changed.graph.node for v in n.input}
    assert {t.name for t in changed.graph.initializer} <= read
    x = np.random.default_rng(1).standard_normal((B, N, W)).astype(np.float32)
    expected, got = (run(p, {"x": x}, ["y"])["y"] for p in (proto, changed))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_shape_that_became_a_constant(chosen: int) -> None:
    """The Shape node that reads inside a site comes back with the site that is kept, and goes with one that is not."""
    proto = plain()
    proto.graph.node.append(helper.make_node("Shape", ["s0"], ["sizes"]))
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["zeros"]))
    proto.graph.output.append(helper.make_tensor_value_info("zeros", 1, [B, N, N]))
    model, working, sites = parts(proto)
    assert "sizes" in {t.name for t in working.proto.graph.initializer}
    changed = written(working, sites, (chosen,))
    Folds(model.proto, working.proto).undo(changed)
    onnx.checker.check_model(changed)
    assert ("sizes" in {t.name for t in changed.graph.initializer}) == (chosen == 0)
    assert [n.output[0] for n in changed.graph.node if n.op_type == "Shape"] == (["sizes"] if chosen else [])
    feed = {"x": np.random.default_rng(1).standard_normal((B, N, W)).astype(np.float32)}
    expected, got = (run(p, feed, ["y", "zeros"]) for p in (proto, changed))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=2e-5)


def test_what_somebody_else_reads_stays() -> None:
    """A replacement that reads a value which writing out made: that operator stays written out."""
    model, working, _ = parts(fused())
    changed = ModelProto()
    changed.CopyFrom(working.proto)
    value = next(n.output[0] for n in changed.graph.node if n.op_type == "MatMul" and n.name.startswith("layer1"))
    changed.graph.node.append(helper.make_node("Identity", [value], ["spy"]))
    changed.graph.output.append(helper.make_tensor_value_info("spy", 1, None))
    Folds(model.proto, working.proto).undo(changed)
    assert fused_names(changed.graph) == {"layer0", "layer2"}


def test_bodies_are_folded_too() -> None:
    """The same operators in a branch of If."""
    inner = fused()
    del inner.graph.input[:]
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "o", [], [inner.graph.output[0]])
    graph = helper.make_graph(
        [helper.make_node("If", ["go"], ["z"], name="choose", then_branch=inner.graph, else_branch=other)], "g",
        [helper.make_tensor_value_info("x", 1, [B, N, W]), helper.make_tensor_value_info("go", 9, [])],
        [helper.make_tensor_value_info("z", 1, [B, N, W])],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=list(fused().opset_import), ir_version=10)
    model, working, sites = parts(proto)
    assert [s.scope for s in sites] == ["If 'choose'/then_branch"] * 3
    changed = written(working, sites, (1,))
    Folds(model.proto, working.proto).undo(changed)
    branch = next(a.g for a in changed.graph.node[0].attribute if a.name == "then_branch")
    assert fused_names(branch) == {"layer0", "layer2"}
    onnx.checker.check_model(changed)
    feed = {"x": np.random.default_rng(1).standard_normal((B, N, W)).astype(np.float32), "go": np.array(True)}
    expected, got = (run(p, feed, ["z"])["z"] for p in (proto, changed))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_compile_one_of_three(tmp_path: Path) -> None:
    """The whole way: one site is replaced, the other operators are in the file as they were in the input."""
    path, out = tmp_path / "model.onnx", tmp_path / "out"
    onnx.save(fused(), path)
    found = pipeline.inspect(path, Options())
    assert len(found.detection.sites) == 3 and not found.detection.near_misses
    result = pipeline.compile(path, Options(target="onnx", out=out, sites=("site1",), keep_slower=True))
    assert result.outcome == "replaced" and result.parity is not None and result.parity.passed
    proto = onnx.load(out / "model.onnx")
    assert fused_names(proto.graph) == {"layer0", "layer2"}
    sites = json.loads((out / "report.json").read_text())["sites"]
    assert [s["decision"]["mechanism"] != "keep" for s in sites] == [False, True, False]


def test_nothing_replaced_is_the_input(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out"
    onnx.save(fused(), path)
    ids = [s.id for s in pipeline.inspect(path, Options()).detection.sites]
    plan = pipeline.plan(pipeline.inspect(path, Options()), Options())
    assert ids == [d.site for d in plan.decisions]
    kept = replace(plan, decisions=tuple(Decision(i, "keep", "by hand") for i in ids))
    (tmp_path / "plan.toml").write_text(plan_toml.dumps(kept))
    result = pipeline.compile(path, Options(target="onnx", out=out, plan=tmp_path / "plan.toml"))
    assert result.outcome == "unchanged"
    assert (out / "model.onnx").read_bytes() == path.read_bytes()
