"""Hostile and damaged models through the command line: exit 0, 1 or 2, two lines, no traceback, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, helper, numpy_helper

from attncompile.cli import main
from tests.passes.attention_graphs import Spec, build


def base(**options: object) -> onnx.ModelProto:
    return build(Spec(mask="window", left=3, right=0, mask_form="where", **options))  # type: ignore[arg-type]


def first(model: onnx.ModelProto, kind: str) -> NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind)


def replace_scale(value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_type == 1 and not t.dims)
        tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), tensor.name))

    return change


def without(field: str, kind: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: first(model, kind).ClearField(field)  # type: ignore[arg-type]


def chain(kind: str, before: str, operand: int, length: int, twice: bool) -> Callable[[onnx.ModelProto], None]:
    """``length`` nodes of one kind in front of an operand; ``twice``: each reads the one before it twice."""

    def change(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        reader = first(model, before)
        at, value = nodes.index(reader), reader.input[operand]
        for i in range(length):
            nodes.insert(at + i, helper.make_node(kind, [value, value] if twice else [value], [f"chain{i}"]))
            value = f"chain{i}"
        reader.input[operand] = value
        copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)

    return change


def recursive_function(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("loc", 1)]
    inner = [helper.make_node("F", ["a"], ["b"], domain="loc")]
    model.functions.append(helper.make_function("loc", "F", ["a"], ["b"], inner, opsets))
    model.opset_import.append(helper.make_opsetid("loc", 1))
    model.graph.node.append(helper.make_node("F", [model.graph.output[0].name], ["fo"], domain="loc"))


def duplicate_output(model: onnx.ModelProto) -> None:
    model.graph.node[2].output[0] = model.graph.node[1].output[0]


def float_axis(model: onnx.ModelProto) -> None:
    node = first(model, "Softmax")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1.5))


def negative_perm(model: onnx.ModelProto) -> None:
    [n for n in model.graph.node if n.op_type == "Transpose"][-1].attribute[0].ints[:] = [0, -2, 1, 2]


def integer_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 7


def no_inputs(model: onnx.ModelProto) -> None:
    del model.graph.input[:]


REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "no outputs of a node": (without("output", "Softmax"), "has no output"),
    "no inputs of a node": (without("input", "Softmax"), "has 0 inputs, but Softmax takes 1"),
    "one input of two": (lambda m: first(m, "MatMul").input.pop() and None, "has 1 inputs, but MatMul takes 2"),
    "float axis": (float_axis, "attribute 'axis' of another type"),
    "a value made twice": (duplicate_output, "which another node makes too"),
    "old Reshape": (lambda m: setattr(m.opset_import[0], "version", 1), "Reshape takes 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_nodes_are_named(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, message = REFUSED[name]
    model = base()
    change(model)
    code, errors = run(model, tmp_path, capfd)
    assert code == 2 and message in errors[0] and errors[1].startswith("hint: ")


READ: dict[str, Callable[[onnx.ModelProto], None]] = {
    "NaN scale": replace_scale(float("nan")),
    "zero scale": replace_scale(0.0),
    "infinite scale": replace_scale(float("inf")),
    "recursive function": recursive_function,
    "negative perm": negative_perm,
    "integer input": integer_input,
    "no inputs": no_inputs,
    "3000 Identity": chain("Identity", "Softmax", 0, 3000, False),
    "3000 Not": chain("Not", "Where", 0, 3000, False),
    "2^40 paths of sums": chain("Add", "Softmax", 0, 40, True),
    "2^40 paths of conjunctions": chain("And", "Where", 0, 40, True),
}


@pytest.mark.parametrize("name", READ)
def test_strange_graphs_can_be_inspected(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = base()
    READ[name](model)
    code, errors = run(model, tmp_path, capfd)
    assert code == 0 and not errors


def run(model: onnx.ModelProto, folder: Path, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Exit code and the ``error:`` and ``hint:`` lines of ``inspect`` (or other words)."""
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    before = sorted(p.name for p in folder.iterdir())
    code = main([*(words or ("inspect",)), str(path)])
    err = capfd.readouterr().err
    assert "Traceback" not in err and "bug in attncompile" not in err
    if code == 2:
        assert sorted(p.name for p in folder.iterdir()) == before, "something was left behind"
    return code, [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]


@pytest.mark.parametrize(
    "words, message",
    [
        (("compile", "--target", "onnx", "--site", "site7"), "no site 'site7'"),
        (("compile", "--target", "onnx", "--plan", "BINARY"), "not a text file"),
        (("compile", "--target", "onnx", "--inputs", "EXIT"), "cannot read inputs: SystemExit"),
        (("compile", "--target", "onnx", "--profile", "n=1:2:99999999999999999999"), "above every size"),
    ],
)
def test_bad_options(
    words: tuple[str, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BINARY").write_bytes(bytes(range(128, 256)))
    (tmp_path / "exit.py").write_text("raise SystemExit(3)\n")
    words = tuple("exit.py" if w == "EXIT" else w for w in words)
    code, errors = run(build(Spec(dynamic=True, mask="window")), tmp_path, capfd, *words)
    assert code == 2 and message in errors[0] and errors[1].startswith("hint: ")


def test_a_link_to_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").symlink_to(tmp_path / "m.onnx")
    assert main(["compile", "m.onnx", "--target", "onnx"]) == 2
    err = capfd.readouterr().err
    assert "error: cannot read m.onnx" in err and "hint: " in err and "bug" not in err


def test_string_outputs_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = base()
    model.graph.initializer.append(helper.make_tensor("words", 8, [1], [b"a"]))
    model.graph.node.append(helper.make_node("Identity", ["words"], ["said"]))
    model.graph.output.append(helper.make_tensor_value_info("said", 8, [1]))
    path = tmp_path / "words.onnx"
    onnx.save(model, path)
    code, errors = run(model, tmp_path, capfd, "verify", str(path))
    assert code == 2 and "output said holds strings" in errors[0] and errors[1].startswith("hint: ")
    code, errors = run(model, tmp_path, capfd, "compile", "--target", "onnx", "--out", str(tmp_path / "out"))
    assert code == 0 and not errors, "nothing is replaced here, so nothing has to be compared"
