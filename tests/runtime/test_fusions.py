"""Fusions on the way of a model to ``onnxruntime-cuda``: applied, compared, and undone where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile import fusion_check, pipeline
from attncompile.pipeline import Options
from attncompile.runtime import layout
from attncompile.targets import ort_fusions
from attncompile.targets.ort_fusions.view import CONTRIB, View
from tests.passes.attention_graphs import Spec, build, save
from tests.runtime.conftest import needs_compiler

WINDOWED = Spec(batch=1, heads=2, kv_heads=2, length=300, head_dim=16, mask="window", left=15, right=0, scale=0.25)


def with_gelu(folder: Path) -> Path:
    """An attention, and behind it a GELU with a bias and an RMS norm of a sum, in float32."""
    proto = build(WINDOWED)
    graph = proto.graph
    (end,) = graph.output
    y, width = end.name, 32
    rows = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    numbers = {"three": 3.0, "cubic": 0.044715, "root": 0.7978845608, "one": 1.0, "half": 0.5, "two": 2.0, "tiny": 1e-5}
    graph.initializer.extend(numpy_helper.from_array(np.float32(v), f"fusible.{n}") for n, v in numbers.items())
    arrays = {"bias": rows[0], "weight": rows[1], "last": np.array([-1]), "flat": np.array([1, -1, width])}
    graph.initializer.extend(numpy_helper.from_array(v, f"fusible.{n}") for n, v in arrays.items())
    for op_type, inputs, output in (
        ("Add", [y, "bias"], "x"), ("Pow", ["x", "three"], "x3"), ("Mul", ["cubic", "x3"], "cx3"),
        ("Add", ["x", "cx3"], "inner"), ("Mul", ["root", "inner"], "scaled"), ("Tanh", ["scaled"], "bent"),
        ("Add", ["bent", "one"], "raised"), ("Mul", ["half", "raised"], "factor"), ("Mul", ["x", "factor"], "gelu"),
        ("Reshape", ["gelu", "flat"], "a"), ("Reshape", [y, "flat"], "b"), ("Add", ["a", "b"], "s"),
        ("Pow", ["s", "two"], "s2"), ("ReduceMean", ["s2", "last"], "mean"), ("Add", ["mean", "tiny"], "more"),
        ("Sqrt", ["more"], "deviation"), ("Reciprocal", ["deviation"], "inverse"), ("Mul", ["s", "inverse"], "normal"),
        ("Mul", ["normal", "weight"], "z"),
    ):  # fmt: skip
        names = [v if v == y else f"fusible.{v}" for v in (*inputs, output)]  # others have those already
        graph.node.append(helper.make_node(op_type, names[:-1], names[-1:]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("fusible.z", TensorProto.FLOAT, [1, 300, width]))
    return save(proto, folder, "fusible.onnx")


def compiled(folder: Path, **given: Any) -> tuple[list[str], tuple[str, ...], Any]:
    """Ops of ONNX Runtime's own in what was written, the notes, and the report."""
    options = {"target": "onnxruntime-cuda", "precision": "fp16", "architectures": (80,), "keep_slower": True, **given}
    result = pipeline.compile(with_gelu(folder), Options(out=folder / "out", **options))
    assert result.exit_code == 0, result.failures
    _, ours = result.targets
    proto = onnx.load(folder / "out" / layout.MODEL)
    return sorted(n.op_type for n in proto.graph.node if n.domain == CONTRIB), ours.notes, proto


@needs_compiler
def test_fused_and_compared(tmp_path: Path, no_triton: None) -> None:
    found, notes, proto = compiled(tmp_path)
    assert found == ["FastGelu"]  # the residual sum stays outside of a norm in fp16
    assert not {"Tanh", "Pow", "ReduceMean"} & {n.op_type for n in proto.graph.node}
    assert any(n.startswith("fused for ONNX Runtime: ") and "GELU (1)" in n and "RMS norm (1)" in n for n in notes)
    assert any(n.startswith("with fusions against without, on the CPU in float32: relative L2") for n in notes)
    assert sum(n.domain == layout.DOMAIN for n in proto.graph.node) == 1


@needs_compiler
def test_not_asked_for(tmp_path: Path, no_triton: None) -> None:
    found, notes, _ = compiled(tmp_path, fusions=False)
    assert found == [] and not any("fus" in n for n in notes)


def broken(view: View) -> int:
    """Takes each tanh GELU for one without its bend."""
    done = 0
    for node in view.nodes("Tanh"):
        view.put("Relu", [node.input[0]], [node.output[0]])
        done += 1
    return done


@needs_compiler
def test_a_wrong_fusion_is_undone(tmp_path: Path, no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_fusions, "FUSIONS", (("GELU", broken),))
    found, notes, proto = compiled(tmp_path)
    assert found == [] and "Tanh" in {n.op_type for n in proto.graph.node}
    assert any(n.startswith("nothing was fused: ") for n in notes)
    assert not any(n.startswith("fused for ONNX Runtime") for n in notes)


def test_what_is_not_found_again_proves_nothing(tmp_path: Path) -> None:
    model = pipeline.load(with_gelu(tmp_path))
    feeds = [{"query": np.zeros(1)}]
    verdict = fusion_check.check(model.proto, model, None, feeds, {"GELU": 2}, model.proto)
    assert not verdict.ok and verdict.code == "unlike"


def test_nothing_compared_is_no_pass(tmp_path: Path) -> None:
    model = pipeline.load(with_gelu(tmp_path))
    verdict = fusion_check.check(model.proto, model, None, [], {"GELU": 1}, model.proto)
    assert not verdict.ok
