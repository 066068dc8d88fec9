"""What nodes ask of kernels, from models that the compiler made and from single nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from attncompile import kernel_bundle, pipeline
from attncompile.console import SilentProgress
from attncompile.core.errors import BadModel
from attncompile.kernels import build, calls, symbols
from attncompile.kernels.records import NodeCall, key_of
from attncompile.plugins import kernels
from tests.exports import exported
from tests.passes.attention_graphs import Spec, save
from tests.passes.attention_graphs import build as graph_of

HOUSE = "attncompile"


def compiled(path: Path, policy: str = "exact") -> list[NodeCall]:
    """The calls of what a plan makes of a file."""
    options = pipeline.Options(policy=policy)
    (model,) = kernel_bundle._with_our_ops(path, options, SilentProgress())
    return calls.find(model, kernels())


def one(
    op: str = "Attention", kind: int = TensorProto.FLOAT16, shapes: Any = None, inputs: Any = (), **attributes: Any
) -> NodeCall:
    """The call of a single node: query [b, 5, 6, 64], key and value [b, n, 2, 64]."""
    sizes = {"query": ("b", 5, 6, 64), "key": ("b", "n", 2, 64), "value": ("b", "n", 2, 64), **(shapes or {})}
    given = [(name, kind, sizes[name]) for name in ("query", "key", "value")] + list(inputs)
    names = [name for name, _, _ in given]
    node = helper.make_node(op, names, ["y"], "attn", domain=HOUSE, **attributes)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, k, s) for n, k, s in given if n],
        [helper.make_tensor_value_info("y", kind, None)],
    )  # fmt: skip
    (found,) = calls.find(model_of(graph), kernels())
    return found


def model_of(graph: onnx.GraphProto) -> ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(HOUSE, 1)])


def test_causal_sites_of_an_export() -> None:
    found = compiled(exported("gpt2"))
    assert [n.op for n in found] == ["Attention", "Attention"]
    for node in found:
        assert node.call is not None and node.symbols is not None
        call = node.call
        assert (call.op, call.dtype, call.heads, call.kv_heads, call.head_dim) == ("Attention", "float16", 4, 4, 16)
        assert call.attributes == {"left": -1, "right": 0, "softcap": 0.0, "scale": 0.25, "masked_rows": "zero"}
        assert (call.batch, call.query_length, call.key_length) == (1, 48, 48)
        assert node.symbols["scale_bits"] == str(symbols.bits(0.25)) and node.symbols["right"] == "0"
    assert len({key_of(build.general(kernels(), n.call)) for n in found if n.call}) == 1, "one kernel serves both"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plain_window_is_attention(tmp_path: Path, dynamic: bool) -> None:
    spec = Spec(batch=1, heads=4, kv_heads=2, length=700, head_dim=16, mask="window", left=15, right=0, dynamic=dynamic)
    (node,) = compiled(save(graph_of(spec), tmp_path, "windowed.onnx"))
    assert node.op == "NeighborhoodAttention" and node.call is not None and node.symbols is not None
    assert node.call.op == "Attention" and (node.call.heads, node.call.kv_heads) == (4, 2)
    assert (node.call.attributes["left"], node.call.attributes["right"]) == (15, 0)
    assert node.call.query_length == (None if dynamic else 700)
    assert (node.symbols["left"], node.symbols["right"]) == ("15", "0")
    assert (node.symbols["NQ"] == "700") != dynamic
    programs = kernels()["Attention"].programs(build.general(kernels(), node.call), 90)
    assert programs and programs[0].constants["HAS_LEFT"] and programs[0].constants["HAS_RIGHT"]


def test_float32_is_taken_for_a_half() -> None:
    bias = ("bias", TensorProto.FLOAT, (6, 1, "n"))
    node = one("NeighborhoodAttention", TensorProto.FLOAT, inputs=[("", 0, ()), bias], kernel_size=[3])
    assert node.call is not None and node.call.dtype == "float16" and node.call.inputs == {"bias": "float16"}
    same = one("NeighborhoodAttention", TensorProto.BFLOAT16, inputs=[("", 0, ()), bias], kernel_size=[3])
    assert same.call is not None and same.call.dtype == "bfloat16" and same.call.inputs == {"bias": "float32"}
    assert same.symbols is not None and same.symbols["bias_stride_H"] == "bias[2]"
    assert same.symbols["bias_stride_B"] == same.symbols["bias_stride_Q"] == "0"


def test_defaults_come_from_the_schema() -> None:
    node = one(scale=0.5)
    assert node.call is not None
    assert node.call.attributes == {"left": -1, "right": -1, "softcap": 0.0, "scale": 0.5, "masked_rows": "zero"}
    grid = one("NeighborhoodAttention", shapes=dict.fromkeys(("query", "key", "value"), (1, 35, 6, 64)),
               kernel_size=[3, 3], grid=[5, 7], border="clamp", plugin_namespace="attncompile")  # fmt: skip
    assert grid.call is not None and grid.call.op == "NeighborhoodAttention"
    assert grid.call.attributes["left"] == [1, 1] and grid.call.attributes["stride"] == [1, 1]
    assert "plugin_namespace" not in grid.call.attributes and "q_layout" not in grid.call.attributes
    assert grid.symbols is not None and grid.symbols["scale_bits"] == str(symbols.bits(0.125))


def test_layouts_are_in_the_symbols() -> None:
    shapes = {"query": ("b", 6, 5, 64), "key": ("b", 2, "n", 64)}
    node = one(scale=0.5, q_layout="BHND", k_layout="BHND", o_layout="BHND", shapes=shapes)
    assert node.call is not None and node.symbols is not None and node.call.heads == 6
    assert (node.symbols["query_stride_H"], node.symbols["query_stride_N"]) == ("40", "8")
    assert (node.symbols["key_stride_H"], node.symbols["NK"]) == ("key[2] * 8", "key[2]")
    assert (node.symbols["value_stride_N"], node.symbols["output_stride_H"]) == ("16", "40")


@pytest.mark.parametrize(
    ("node", "code"),
    [
        (lambda: one(scale=0.5, kind=TensorProto.DOUBLE), None),
        (lambda: one(scale=0.5, shapes={"query": None}), "shapes"),
        (lambda: one(scale=0.5, shapes={"query": ("b", 5, "h", 64)}), "shapes"),
        (lambda: one(scale=0.5, shapes={"query": ("b", 5, 6, "d")}), "shapes"),
        (lambda: one("NeighborhoodAttention", kernel_size=[3], left=[7]), "parameters"),
        (lambda: one("NoSuchAttention"), "no-kernel"),
    ],
)  # fmt: skip
def test_what_has_no_kernel_says_why(node: Any, code: str | None) -> None:
    found = node()
    if code is None:  # there is a call, which no kernel takes
        verdict = kernels()[found.call.op].supports(found.call, 90)
        assert not verdict.ok and verdict.code == "dtype"
        return
    assert not found.verdict.ok and found.call is None and found.symbols is None
    assert found.verdict.code == code and found.verdict.reason, found.verdict


def test_shapes_that_contradict_the_op() -> None:
    with pytest.raises(BadModel, match="the model's shapes do not fit its ops"):
        one(scale=0.5, shapes={"query": ("b", 5, 384)})


def test_rings_have_no_kernel() -> None:
    """Swin's shifted windows: no kernel may take them for truncated ones."""
    ring = one(
        "NeighborhoodAttention", shapes=dict.fromkeys(("query", "key", "value"), (1, 64, 6, 64)),
        kernel_size=[4, 4], stride=[4, 4], left=[0, 0], grid=[8, 8], border="circular", shift=[2, 2],
        seam=float("-inf"),
    )  # fmt: skip
    assert ring.call is not None
    assert kernels()[ring.call.op].supports(ring.call, 90).code == "ring"
    made = build.build([ring], [], kernels(), (80, 90), None)
    assert not made.calls and made.nodes[0][0].verdict.code == "ring" and made.nodes[0][1] == ""


def test_bodies_and_functions() -> None:
    """Nodes in the branches of an If see values from outside; those in a function have no shapes."""

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Attention", ["query", "key", "key"], [name], name, domain=HOUSE, scale=0.5)
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None)])

    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], "choose", then_branch=branch("a"), else_branch=branch("b"))], "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("query", TensorProto.FLOAT16, [1, 9, 4, 32]),
         helper.make_tensor_value_info("key", TensorProto.FLOAT16, [1, 9, 2, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
    )  # fmt: skip
    model = model_of(graph)
    inner = helper.make_node("Attention", ["q", "k", "v"], ["o"], "inner", domain=HOUSE, scale=0.5)
    model.functions.append(
        helper.make_function("theirs", "Layer", ["q", "k", "v"], ["o"], [inner], [helper.make_opsetid(HOUSE, 1)])
    )
    before = model.SerializeToString()
    found = calls.find(model, kernels())
    assert sorted((n.name, n.scope, n.verdict.code) for n in found) == [
        ("a", "choose.then_branch", "ok"), ("b", "choose.else_branch", "ok"), ("inner", "theirs::Layer", "function"),
    ]  # fmt: skip
    assert found[0].call is not None and found[0].call.key_length == 9
    assert model.SerializeToString() == before
    assert calls.find(model_of(helper.make_graph([], "g", [], [])), kernels()) == []


def test_a_mechanism_without_a_kernel_is_listed(tmp_path: Path) -> None:
    spec = Spec(batch=1, heads=2, kv_heads=2, length=512, head_dim=16, mask="window", left=15, right=0)
    path = save(graph_of(spec), tmp_path, "windowed.onnx")
    (model,) = kernel_bundle._with_our_ops(path, pipeline.Options(), SilentProgress())
    for node in model.graph.node:
        if node.domain == HOUSE:
            node.op_type = "PooledAttention"
    (found,) = calls.find(model, kernels())
    assert found.verdict.code == "no-kernel" and "PooledAttention" in found.verdict.reason


def test_general_calls_forget_what_arguments_say() -> None:
    kernel = kernels()["Attention"]
    first, second = one(scale=0.5).call, one(scale=0.25, shapes={"query": ("b", 9, 8, 64)}).call
    assert first is not None and second is not None and kernel.general(first) == kernel.general(second)
    wide = one("NeighborhoodAttention", kernel_size=[9]).call
    narrow = one("NeighborhoodAttention", kernel_size=[3], masked_rows="nan").call
    assert wide is not None and narrow is not None
    assert kernel.general(wide) == kernel.general(narrow) != kernel.general(first)
    masked = one("NeighborhoodAttention", kernel_size=[3], inputs=[("m", TensorProto.BOOL, ("b", 1, 1, "n"))]).call
    hidden = one("NeighborhoodAttention", kernel_size=[3], inputs=[("m", TensorProto.BOOL, ("b", 1, 1, "n"))],
                 masked_rows="nan").call  # fmt: skip
    assert masked is not None and hidden is not None
    assert kernel.general(masked) != kernel.general(hidden), "a key mask can leave a row without a key"


def test_standard_calls() -> None:
    found = kernels()["Attention"].standard("bfloat16")
    assert {c.head_dim for c in found} == {64, 72, 80, 128, 256} and len({key_of(c) for c in found}) == 15
    assert all(kernels()["Attention"].general(c) == c for c in found)
    ours = one(kind=TensorProto.BFLOAT16, scale=0.5).call
    assert ours is not None
    assert key_of(kernels()["Attention"].general(ours)) in {key_of(c) for c in found}, "a model finds them"


def test_attention_says_all_that_its_kernel_does() -> None:
    half, whole = TensorProto.FLOAT16, TensorProto.INT64
    optional = [
        ("key_mask", TensorProto.BOOL, ("b", 1, 1, "n")), ("bias", half, (6, 1, "n")), ("sinks", half, (6,)),
        ("mask", TensorProto.BOOL, (5, "n")), ("key_lengths", whole, ("b",)),
    ]  # fmt: skip
    node = one(scale=0.5, inputs=optional, left=7, right=0, softcap=30.0, masked_rows="uniform")
    assert node.call is not None and node.symbols is not None
    assert node.call.attributes == {
        "left": 7, "right": 0, "softcap": 30.0, "scale": 0.5, "masked_rows": "uniform",
    }  # fmt: skip
    (program, *_) = kernels()["Attention"].programs(build.general(kernels(), node.call), 80)
    names = [a.name for a in program.arguments if a.kind == "input"]
    assert names == ["query", "key", "value", "key_mask", "bias", "sinks", "mask", "key_lengths"]
    assert all(a.expression in node.symbols for a in program.arguments if a.kind == "int32" and a.name != "group")


def test_windows_that_may_end_before_the_first_key_keep_their_rule() -> None:
    """Five queries on as many keys as there are: a query may stand before all of them."""
    kernel = kernels()["Attention"]
    rules = {}
    for rule in ("zero", "nan"):
        call = one(scale=0.5, right=0, masked_rows=rule).call
        assert call is not None
        rules[rule] = kernel.general(call).attributes["masked_rows"]
    assert rules == {"zero": "zero", "nan": "nan"}
    fixed = {"query": ("b", 5, 6, 64), "key": ("b", 9, 2, 64), "value": ("b", 9, 2, 64)}
    inside = one(scale=0.5, right=0, masked_rows="nan", shapes=fixed).call
    assert inside is not None and kernel.general(inside).attributes["masked_rows"] == "zero"
