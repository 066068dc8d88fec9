"""What standard ops take on a GPU at least, of graphs whose products and sizes are known."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from attncompile.standard_cost import milliseconds

BANDWIDTH, PRODUCTS = 4000.0, 700e9
SLOW = 1e30
"""Of what is not to count."""


def made(nodes: list[onnx.NodeProto], **inputs: list[int]) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in inputs.items()]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", infos, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("node", "inputs", "multiplied"),
    [
        (helper.make_node("MatMul", ["a", "b"], ["y"]), {"a": [3, 700, 96], "b": [96, 33]}, 3 * 700 * 96 * 33),
        (helper.make_node("Gemm", ["a", "b"], ["y"], transA=1), {"a": [96, 700], "b": [96, 33]}, 700 * 96 * 33),
        (
            helper.make_node("Einsum", ["a", "b"], ["y"], equation="bnhd, bnhe -> bhde"),
            {"a": [2, 700, 3, 32], "b": [2, 700, 3, 40]}, 2 * 700 * 3 * 32 * 40,
        ),
    ],
)  # fmt: skip
def test_products_take_what_they_multiply(
    node: onnx.NodeProto, inputs: dict[str, list[int]], multiplied: int
) -> None:  # fmt: skip
    for pointwise in (False, True):
        took = milliseconds(made([node], **inputs), SLOW, PRODUCTS, pointwise)
        assert took == pytest.approx(2 * multiplied / PRODUCTS)


def test_other_ops_take_what_they_move_where_nothing_fuses_them() -> None:
    """Two bytes an element, read and written; what only looks at it otherwise moves nothing."""
    nodes = [
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
        helper.make_node("Mul", ["c", "d"], ["y"]),
    ]
    model = made(nodes, a=[700, 96], d=[96, 1])
    size = 700 * 96
    assert milliseconds(model, BANDWIDTH, PRODUCTS, True) == pytest.approx(2 * (4 * size + 96) / BANDWIDTH * 1e-6)
    assert milliseconds(model, BANDWIDTH, PRODUCTS, False) == 0.0
    launched = milliseconds(model, BANDWIDTH, PRODUCTS, True, 0.5) - milliseconds(model, BANDWIDTH, PRODUCTS, True)
    assert launched == pytest.approx(2 * 0.5), "one each, none of the view"


def test_a_scan_takes_it_for_every_token_and_an_if_its_shorter_branch() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "x"], ["t"]), helper.make_node("Identity", ["t"], ["o"])], "body",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 96]) for n in ("s", "x")],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 96]) for n in ("t", "o")],
    )  # fmt: skip
    scan = helper.make_node("Scan", ["s0", "xs"], ["last", "y"], body=body, num_scan_inputs=1)
    took = milliseconds(made([scan], s0=[4, 96], xs=[700, 4, 96]), BANDWIDTH, PRODUCTS, True)
    assert took == pytest.approx(700 * 3 * 2 * 4 * 96 / BANDWIDTH * 1e-6)

    def branch(*ops: str) -> onnx.GraphProto:
        names = ["a", *(f"{op}{i}" for i, op in enumerate(ops))]
        nodes = [helper.make_node(op, [a], [b]) for op, a, b in zip(ops, names, names[1:], strict=False)]
        out = helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, [8, 9])
        return helper.make_graph(nodes, "branch", [], [out])

    either = helper.make_node("If", ["c"], ["y"], then_branch=branch("Exp", "Neg"), else_branch=branch("Relu"))
    model = made([either], a=[8, 9])
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    assert milliseconds(model, BANDWIDTH, PRODUCTS, True) == pytest.approx(2 * 2 * 72 / BANDWIDTH * 1e-6)


def test_a_product_of_unknown_size_takes_what_is_known_to_move() -> None:
    model = made([helper.make_node("MatMul", ["a", "b"], ["y"])], b=[96, 33])
    model.graph.input.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 96]))
    assert milliseconds(model, BANDWIDTH, PRODUCTS, True) == pytest.approx(2 * 96 * 33 / BANDWIDTH * 1e-6)
    assert milliseconds(model, BANDWIDTH, PRODUCTS, False) == 0.0
