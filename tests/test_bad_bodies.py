"""Hostile and damaged bodies of control flow, and empty models: one line and a hint, or read; never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from tests.passes.attention_graphs import Spec
from tests.passes.body_graphs import branched, copied, looped, model, scanned, value
from tests.test_bad_input import run

SPEC = Spec(mask="window", left=3, right=0, mask_form="where")


def bodies(proto: ModelProto) -> list[GraphProto]:
    return [a.g for n in proto.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]


def first(proto: ModelProto, kind: str) -> NodeProto:
    return next(n for n in proto.graph.node if n.op_type == kind)


def cycle(proto: ModelProto) -> ModelProto:
    body = bodies(proto)[0]
    body.node[0].input[0] = body.node[-1].output[0]
    return proto


def made_twice(proto: ModelProto) -> ModelProto:
    body = bodies(proto)[0]
    body.node[1].output[0] = body.node[0].output[0]
    return proto


def without(proto: ModelProto, kind: str, attribute: str) -> ModelProto:
    node = first(proto, kind)
    kept = [a for a in node.attribute if a.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
    return proto


REFUSED: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "cycle in a body": (lambda: cycle(branched(SPEC, SPEC)), "has a cycle"),
    "a value made twice in a body": (lambda: made_twice(looped(SPEC)), "which another node makes too"),
    "If without else": (lambda: without(branched(SPEC, SPEC), "If", "else_branch"), "lacks attribute 'else_branch'"),
    "Loop without body": (lambda: without(looped(SPEC), "Loop", "body"), "lacks attribute 'body'"),
    "Scan without count": (lambda: without(scanned(SPEC), "Scan", "num_scan_inputs"), "lacks attribute 'num_scan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_hint(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[name]
    code, errors = run(make(), tmp_path, capfd)
    assert code == 2 and message in errors[0] and errors[1].startswith("hint: ")


def no_outputs_of_a_body(proto: ModelProto) -> ModelProto:
    for body in bodies(proto):
        del body.output[:]
    return proto


def output_from_nowhere(proto: ModelProto) -> ModelProto:
    for body in bodies(proto):
        body.output[-1].name = "nowhere"
    return proto


def no_inputs_of_a_body(proto: ModelProto) -> ModelProto:
    for body in bodies(proto):
        del body.input[:]
    return proto


def more_inputs(proto: ModelProto) -> ModelProto:
    for body in bodies(proto):
        body.input.extend([value("extra"), value("extra2")])
    return proto


def count(proto: ModelProto, number: int) -> ModelProto:
    node = first(proto, "Scan")
    next(a for a in node.attribute if a.name == "num_scan_inputs").i = number
    return proto


def axes(proto: ModelProto, numbers: list[int]) -> ModelProto:
    node = first(proto, "Scan")
    for attribute in node.attribute:
        if attribute.name.endswith("_axes"):
            attribute.ints[:] = numbers
    return proto


def one_side_only(proto: ModelProto) -> ModelProto:
    """The branches give different numbers of outputs."""
    bodies(proto)[0].output.append(value("t0"))
    return proto


def renamed_branch(proto: ModelProto) -> ModelProto:
    first(proto, "If").attribute.append(helper.make_attribute("third_branch", bodies(proto)[0]))
    return proto


def deep(depth: int) -> ModelProto:
    nodes, name = [helper.make_node("Softmax", ["x"], ["v0"], axis=-1)], "v0"
    for i in range(1, depth):
        then = helper.make_graph(nodes, f"g{i}", [], [value(name)])
        other = helper.make_graph([helper.make_node("Neg", ["x"], [f"n{i}"])], f"h{i}", [], [value(f"n{i}")])
        name = f"v{i}"
        nodes = [helper.make_node("If", ["flag"], [name], then_branch=then, else_branch=other)]
    return model(nodes, [value("x", shape=[2, 3, 4]), value("flag", TensorProto.BOOL, [])], [name], [])


def many(number: int) -> ModelProto:
    """A chain of Ifs without attention, as TorchScript leaves them behind every Squeeze."""
    nodes, name = [], "x"
    for i in range(number):
        sides = [helper.make_graph([helper.make_node(k, [name], ["o"])], k, [], [value("o")]) for k in ("Neg", "Abs")]
        nodes.append(helper.make_node("If", ["flag"], [f"v{i}"], then_branch=sides[0], else_branch=sides[1]))
        name = f"v{i}"
    return model(nodes, [value("x", shape=[2, 3, 4]), value("flag", TensorProto.BOOL, [])], [name], [])


def backwards(proto: ModelProto) -> ModelProto:
    for graph in [*bodies(proto), proto.graph]:
        nodes = copied(graph.node)[::-1]
        del graph.node[:]
        graph.node.extend(nodes)
    return proto


def no_nodes() -> ModelProto:
    return model([], [value("x", shape=[2, 3, 4])], ["x"], [])


def no_shapes(proto: ModelProto) -> ModelProto:
    for info in (*proto.graph.input, *(i for b in bodies(proto) for i in (*b.input, *b.output))):
        info.type.tensor_type.ClearField("shape")
    return proto


def no_types(proto: ModelProto) -> ModelProto:
    for info in (*proto.graph.input, *(i for b in bodies(proto) for i in (*b.input, *b.output))):
        info.ClearField("type")
    return proto


READ: dict[str, Callable[[], ModelProto]] = {
    "no nodes": no_nodes,
    "no attention": lambda: model([helper.make_node("Neg", ["x"], ["y"])], [value("x", shape=[2, 3, 4])], ["y"], []),
    "no outputs of branches": lambda: no_outputs_of_a_body(branched(SPEC, SPEC)),
    "no outputs of a Loop body": lambda: no_outputs_of_a_body(looped(SPEC)),
    "no outputs of a Scan body": lambda: no_outputs_of_a_body(scanned(SPEC)),
    "outputs from nowhere": lambda: output_from_nowhere(looped(SPEC)),
    "branch outputs from nowhere": lambda: output_from_nowhere(branched(SPEC, SPEC)),
    "no inputs of a Loop body": lambda: no_inputs_of_a_body(looped(SPEC)),
    "no inputs of a Scan body": lambda: no_inputs_of_a_body(scanned(SPEC)),
    "more inputs of a Loop body": lambda: more_inputs(looped(SPEC)),
    "more inputs of a Scan body": lambda: more_inputs(scanned(SPEC)),
    "inputs of branches": lambda: more_inputs(branched(SPEC, SPEC)),
    "count of 0": lambda: count(scanned(SPEC), 0),
    "count of 9": lambda: count(scanned(SPEC), 9),
    "axes too many": lambda: axes(scanned(SPEC), [0, 1, 2]),
    "axis too large": lambda: axes(scanned(SPEC), [7]),
    "axes none": lambda: axes(scanned(SPEC), []),
    "branches of different length": lambda: one_side_only(branched(SPEC, SPEC)),
    "a third branch": lambda: renamed_branch(branched(SPEC, SPEC)),
    "24 Ifs in one another": lambda: deep(24),
    "300 Ifs": lambda: many(300),
    "nodes backwards": lambda: backwards(branched(SPEC, SPEC)),
    "loop backwards": lambda: backwards(looped(SPEC)),
    "no shapes": lambda: no_shapes(branched(SPEC, SPEC)),
    "no shapes in a loop": lambda: no_shapes(looped(SPEC)),
    "no types": lambda: no_types(branched(SPEC, SPEC)),
    "no types in a loop": lambda: no_types(looped(SPEC)),
}


@pytest.mark.parametrize("name", READ)
def test_strange_models_can_be_inspected(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, errors = run(READ[name](), tmp_path, capfd)
    assert code == 0 and not errors


@pytest.mark.parametrize(
    "name", ["no nodes", "no attention", "nodes backwards", "loop backwards", "300 Ifs", "count of 0"]
)
def test_strange_models_can_be_compiled(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where ONNX Runtime takes the model; where it does not, that is what is said."""
    words = ("compile", "--target", "onnx", "--out", str(tmp_path / "out"))
    code, errors = run(READ[name](), tmp_path, capfd, *words)
    assert code == 0 or (code == 2 and errors[1].startswith("hint: "))
