"""Reading the builder's list of layers, on text in the form that TensorRT-RTX 1.7.1 writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto, helper

from attncompile.targets import fusion
from attncompile.targets.base import EngineLayer

SEPARATOR = "\x1f"


def _line(name: str, *nodes: str, kind: str = "kgen") -> str:
    metadata = SEPARATOR.join(f"[ONNX Layer: {n}]" for n in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: x, Dimensions: [4,128,64], Datatype: Half }}], "
        f"Constants: [], Outputs: [ {{ Name: y }}], TacticName: t, StreamId: 0, Metadata: {metadata}"
    )


FUSED = "Layers:\n" + "\n".join(
    [
        _line("project_myl0_0", "project_q", "project_k", kind="gemm"),
        _line("_gemm_mha_v2_myl0_1", "pv", "softmax", "qk"),
    ]
)
SPLIT = "Layers:\n" + "\n".join(
    [
        _line("qk_myl0_1", "qk", kind="gemm"),
        _line("__myl_Soft_2", "scaled", "softmax"),
        _line("pv_3", "pv", kind="gemm"),
    ]
)


def test_lines_are_parsed() -> None:
    layers = fusion.parse_layers(FUSED + "\n\nI/O Tensors:\n Name: x, IOMode: Input")
    assert layers == (
        EngineLayer("project_myl0_0", "gemm", ("project_q", "project_k")),
        EngineLayer("_gemm_mha_v2_myl0_1", "kgen", ("pv", "softmax", "qk")),
    )


def test_names_with_brackets_and_branches() -> None:
    line = _line("n", "a[0]", "/model/x]y", "mul__1 | whole (then_branch) | if_94 (If)")
    assert fusion.parse_layers(line)[0].nodes == ("a[0]", "/model/x]y", "mul__1")


@pytest.mark.parametrize(("dump", "fused"), [(FUSED, True), (SPLIT, False), ("", None), (None, None)])
def test_judged_by_what_one_kernel_computes(
    attention: Callable[..., ModelProto], dump: str | None, fused: bool | None
) -> None:
    found = fusion.judge(attention(), fusion.parse_layers(dump))
    assert [(a.node, a.fused) for a in found] == [("softmax", fused)]
    assert found[0].reason


def test_softmax_that_the_log_does_not_name_is_unknown(attention: Callable[..., ModelProto]) -> None:
    found = fusion.judge(attention(), fusion.parse_layers(_line("other", "project_q")))
    assert [a.fused for a in found] == [None]


def test_kernel_with_the_softmax_and_one_product_is_not_fused(attention: Callable[..., ModelProto]) -> None:
    dump = "\n".join([_line("a", "qk", "softmax"), _line("b", "pv")])
    assert [a.fused for a in fusion.judge(attention(), fusion.parse_layers(dump))] == [False]


def test_classifier_softmax_is_no_attention() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"], name="head"), helper.make_node("Softmax", ["s"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [])
    assert fusion.attentions(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])) == {}
