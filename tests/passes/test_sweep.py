"""Inference over bodies: what holds in every iteration is known, the rest is not; and nothing depends on the cache."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.model import Model
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.index import GraphIndex as Index
from attncompile.passes.infer import topological
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import Spec, build
from tests.passes.body_graphs import branched, model, value


def world_of(proto: ModelProto, **binding: int) -> World:
    return World(GraphIndex(Model(Path("m.onnx"), proto, "", 18)), binding)


def loop(nodes: list[NodeProto], carried: list[str], outs: list[str], shapes: dict[str, list[int | str]]) -> ModelProto:
    """Three rounds of ``nodes``; ``carried`` enter as ``<name>_in`` from inputs of the model."""
    info = [value("round", TensorProto.INT64, []), value("going", TensorProto.BOOL, [])]
    info += [value(f"{c}_in", shape=[None] * len(shapes[c])) for c in carried]
    stored = [numpy_helper.from_array(np.array(3), "rounds")]
    results = [value("on", TensorProto.BOOL, []), *(value(o, shape=[None] * 2) for o in outs)]
    body = helper.make_graph([*nodes, helper.make_node("Identity", ["going"], ["on"])], "body", info, results)
    names = [f"out{i}" for i in range(len(outs))]
    node = helper.make_node("Loop", ["rounds", "", *carried], names, "loop", body=body)
    return model([node], [value(n, shape=s) for n, s in shapes.items()], names, stored)


def test_two_values_that_change_places() -> None:
    """(a [2, 5], b [3, 5]) -> (b, a): the first axis is not known, the second is."""
    nodes = [helper.make_node("Neg", ["a_in"], ["x"]), helper.make_node("Neg", ["b_in"], ["y"])]
    world = world_of(loop(nodes, ["a", "b"], ["y", "x"], {"a": [2, 5], "b": [3, 5]}))
    inner = world.within("Loop 'loop'/body")
    assert not {"a_in", "b_in", "x", "y", "out0", "out1"} & set({**world.shapes, **inner.shapes})
    assert inner.types["x"] == TensorProto.FLOAT
    same = world_of(loop(nodes, ["a", "b"], ["y", "x"], {"a": [3, 5], "b": [3, 5]}))
    assert same.shapes["out0"] == (3, 5) and same.within("Loop 'loop'/body").shapes["x"] == (3, 5)


def test_a_value_that_grows_keeps_its_other_axis() -> None:
    nodes = [helper.make_node("Concat", ["a_in", "a_in"], ["longer"], axis=0),
             helper.make_node("Transpose", ["longer"], ["turned"]),
             helper.make_node("MatMul", ["turned", "longer"], ["square"])]  # fmt: skip
    world = world_of(loop(nodes, ["a"], ["longer", "square"], {"a": ["n", 5]}), n=2)
    inner = world.within("Loop 'loop'/body")
    assert "longer" not in inner.shapes and "turned" not in inner.shapes
    assert inner.shapes["square"] == (5, 5)
    assert "out0" not in world.shapes and "out1" not in world.shapes


def test_a_carried_value_is_not_its_first_value() -> None:
    """A counter starts at a constant: what is computed from it is data in every round."""
    info = [
        value("round", TensorProto.INT64, []),
        value("going", TensorProto.BOOL, []),
        value("c", TensorProto.INT64, []),
    ]
    nodes = [helper.make_node("Add", ["c", "one"], ["more"]), helper.make_node("Identity", ["going"], ["on"])]
    outs = [value("on", TensorProto.BOOL, []), value("more", TensorProto.INT64, [])]
    body = helper.make_graph(nodes, "body", info, outs)
    stored = [numpy_helper.from_array(np.array(n), name) for n, name in ((3, "rounds"), (1, "one"))]
    proto = model([helper.make_node("Loop", ["rounds", "", "one"], ["y"], "loop", body=body)], [], ["y"], stored)
    inner = world_of(proto).within("Loop 'loop'/body")
    assert inner.scalar("one") == 1 and inner.scalar("c") is None and inner.scalar("more") is None
    assert inner.index.data_inputs("more") == {"c"} and inner.shapes["more"] == ()


def test_a_condition_that_the_sizes_decide() -> None:
    """If(n > 4) gives another shape in each branch: at one binding it is the shape of the one that is taken."""
    wide = helper.make_graph(
        [helper.make_node("Concat", ["x", "x"], ["w"], axis=1)], "wide", [], [value("w", shape=[None] * 2)]
    )
    thin = helper.make_graph([helper.make_node("Neg", ["x"], ["t"])], "thin", [], [value("t", shape=[None] * 2)])
    nodes = [helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
             helper.make_node("Greater", ["n", "four"], ["many"]),
             helper.make_node("If", ["many"], ["y"], then_branch=wide, else_branch=thin)]  # fmt: skip
    proto = model(nodes, [value("x", shape=["n", 3])], ["y"], [numpy_helper.from_array(np.array([4]), "four")])
    proto.graph.output[0].CopyFrom(value("y", shape=[None] * 2))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for n, expected in ((4, (4, 3)), (5, (5, 6))):
        assert world_of(proto, n=n).shapes["y"] == expected
        assert session.run(None, {"x": np.zeros((n, 3), np.float32)})[0].shape == expected


def test_shapes_are_those_of_a_run() -> None:
    """Every value of a graph with a dynamic mask, at several sizes, whatever was inferred at others before."""
    proto = build(Spec(mask="window", dynamic=True, scale_at="both"))
    proto.graph.output.extend(onnx.ValueInfoProto(name=o) for n in proto.graph.node[:-1] for o in n.output)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    index = GraphIndex(Model(Path("m.onnx"), proto, "", 18))
    names = [o.name for o in proto.graph.output]
    for b, n in ((2, 13), (1, 1), (3, 7), (2, 13)):
        world = World(index, {"b": b, "n": n})
        values = session.run(None, {"x": np.zeros((b, n, 24), np.float32)})
        assert {k: world.shapes[k] for k in names} == {k: v.shape for k, v in zip(names, values, strict=True)}
        for name, array in zip(names, values, strict=True):
            if not index.data_inputs(name):
                np.testing.assert_array_equal(world.value(name), array)


def test_any_order_of_nodes() -> None:
    rng = np.random.default_rng(0)
    nodes = list(build(Spec(mask="causal", mask_form="computed")).graph.node)
    for _ in range(5):
        made = {"x"}
        order = topological([nodes[i] for i in rng.permutation(len(nodes))])
        assert len(order) == len(nodes)
        produced = {o for n in nodes for o in n.output}
        for node in order:
            assert all(v in made or v not in produced for v in node.input)
            made.update(node.output)


def test_a_scope_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        Index(Model(Path("m.onnx"), build(Spec()), "", 18)).at("If 'x'/then_branch")


def test_nothing_keeps_a_model_after_detection() -> None:
    """Weights and masks that were evaluated go when the caller lets go of the model's index."""
    loaded = Model(Path("m.onnx"), branched(Spec(mask="window"), Spec(mask="causal")), "", 18)
    index = GraphIndex(loaded)
    assert len(detect(loaded, profile_for(loaded, {}), index=index).sites) == 2
    alive = [weakref.ref(index), weakref.ref(World(index, {}).within("If 'merged'/then_branch"))]
    del index, loaded
    gc.collect()
    assert [a() for a in alive] == [None, None]
