"""Fusions on the way of a model to ``onnxruntime-cuda``: applied, compared, and undone where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile import fusion_check, pipeline
from attncompile.kernels.bundle import Bundle
from attncompile.pipeline import Options
from attncompile.runtime import layout
from attncompile.targets import ort_fusions
from attncompile.targets.ort_fusions.operands import operands
from attncompile.targets.ort_fusions.view import CONTRIB, View
from tests.passes.attention_graphs import Spec, build, save
from tests.runtime.conftest import needs_compiler

pytestmark = pytest.mark.usefixtures("brief")
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


def with_packed(folder: Path) -> Path:
    """An attention whose query, key and value are one product, as those of timm's ViT: [B, N, 3, H, D], transposed, one
    part after the other gathered.
    """
    proto = build(WINDOWED)
    graph, stored = proto.graph, {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[0] == "x"]
    ends = [_reader(graph, _reader(graph, p)) for p in products]
    arrays: dict[str, Any] = {
        "weight": np.concatenate([stored[p.input[1]] for p in products], 1), "five": np.array([1, 300, 3, 2, 16]),
        **{f"number.{i}": np.array(i) for i in range(3)},
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in arrays.items())
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["packed"]),
        helper.make_node("Reshape", ["packed", "five"], ["by_part"]),
        helper.make_node("Transpose", ["by_part"], ["parts_first"], perm=[2, 0, 3, 1, 4]),
    ]
    for i, end in enumerate(ends):
        perm = list(end.attribute[0].ints)  # of [B, N, H, D]
        nodes.append(helper.make_node("Gather", ["parts_first", f"number.{i}"], [f"part.{i}"], axis=0))
        perm = [[0, 2, 1, 3].index(axis) for axis in perm]
        nodes.append(helper.make_node("Transpose", [f"part.{i}"], end.output, perm=perm))
    gone = {p.output[0] for p in products} | {e.input[0] for e in ends} | {e.output[0] for e in ends}
    nodes += [n for n in graph.node if not gone & set(n.output)]
    del graph.node[:]
    graph.node.extend(nodes)
    return save(proto, folder, "packed.onnx")


def _reader(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.NodeProto:
    return next(n for n in graph.node if node.output[0] in n.input)


def launched(folder: Path, **given: Any) -> tuple[tuple[str, ...], onnx.ModelProto]:
    """The notes and the model that ``with_packed`` becomes."""
    options = {"target": "onnxruntime-cuda", "architectures": (80,), "keep_slower": True, **given}
    result = pipeline.compile(with_packed(folder), Options(out=folder / "out", **options))
    assert result.exit_code == 0, result.failures
    return result.targets[1].notes, onnx.load(folder / "out" / layout.MODEL)


@needs_compiler
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_packed_operands_are_read_in_place(tmp_path: Path, no_triton: None, precision: str) -> None:
    notes, proto = launched(tmp_path, precision=precision)
    (node,) = [n for n in proto.graph.node if n.domain == layout.DOMAIN]
    assert len(node.input) == 3 and len(set(node.input)) == 1
    assert not {"Transpose", "Gather", "Slice", "Split", "Squeeze"} & {n.op_type for n in proto.graph.node}
    assert any("operands (3)" in n for n in notes)
    assert any(n.startswith("with fusions against without, on the CPU in float32: relative L2") for n in notes)


def other_parts(view: View) -> int:
    """``operands``, which takes keys for values."""
    done = operands(view)
    for node in view.nodes("NeighborhoodAttention", "Attention", domain="attncompile"):
        (said,) = [a for a in node.attribute if a.name == "v_layout"]
        said.s = said.s.replace(b"2", b"1")
    return done


def other_order(view: View) -> int:
    """``outputs``, as if heads were tokens."""
    for node in view.nodes("NeighborhoodAttention", "Attention", domain="attncompile"):
        (said,) = [a for a in node.attribute if a.name == "o_layout"]
        said.s = {b"BNHD": b"BHND", b"BHND": b"BNHD"}[said.s]
    return 1


@needs_compiler
@pytest.mark.parametrize("planted", [other_parts, other_order])
def test_a_wrong_layout_is_undone(
    tmp_path: Path, no_triton: None, monkeypatch: pytest.MonkeyPatch, planted: Any
) -> None:
    others = tuple((n, f) for n, f in ort_fusions.FUSIONS if n not in ("operands", "outputs"))
    monkeypatch.setattr(ort_fusions, "FUSIONS", (*others, ("operands", planted)))
    notes, proto = launched(tmp_path, precision="fp16")
    assert any(n.startswith("nothing was fused: ") for n in notes)
    assert "Gather" in {n.op_type for n in proto.graph.node}


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
    assert found == ["FastGelu", "SkipSimplifiedLayerNormalization"]
    assert not {"Tanh", "Pow", "ReduceMean"} & {n.op_type for n in proto.graph.node}
    assert any(n.startswith("fused for ONNX Runtime: ") and "GELU (1)" in n and "RMS norm (1)" in n for n in notes)
    assert any(n.startswith("with fusions against without, on the CPU in float32: relative L2") for n in notes)
    assert sum(n.domain == layout.DOMAIN for n in proto.graph.node) == 1


def says_strict(folder: Path, proto: onnx.ModelProto) -> set[bool]:
    """Whether the index of the bundle and the launches say that there are norms of sums in fp16."""
    said = json.loads((folder / "out" / layout.BUNDLE / layout.INDEX).read_text(encoding="utf-8")).get(layout.STRICT)
    nodes = [n for n in proto.graph.node if n.domain == layout.DOMAIN]
    return {bool(said), *(any(a.name == layout.STRICT for a in n.attribute) for n in nodes)}


@needs_compiler
@pytest.mark.parametrize(
    ("given", "strict"),
    [
        ({}, True), ({"half_norms": False}, False), ({"fusions": False}, False), ({"precision": "bf16"}, False),
    ],
)  # fmt: skip
def test_norms_of_sums_in_fp16_are_said(tmp_path: Path, no_triton: None, given: dict[str, Any], strict: bool) -> None:
    found, notes, proto = compiled(tmp_path, **given)
    assert ("SkipSimplifiedLayerNormalization" in found) == strict
    assert says_strict(tmp_path, proto) == {strict}
    assert any("before 1.27 is refused unless it is in strict mode" in n for n in notes) == strict
    assert Bundle.open(tmp_path / "out" / layout.BUNDLE).index.get(layout.STRICT, False) is strict


@needs_compiler
def test_not_asked_for(tmp_path: Path, no_triton: None) -> None:
    found, notes, _ = compiled(tmp_path, fusions=False)
    assert found == [] and not any("fus" in n for n in notes)


@needs_compiler
@pytest.mark.parametrize("rounded", ["biases of values", "other"])
def test_what_rounds_constants_is_left_out_alone(
    tmp_path: Path, no_triton: None, monkeypatch: pytest.MonkeyPatch, rounded: str
) -> None:
    """Where outputs are too far off with it; all else is fused."""

    def coarse(view: View) -> int:
        (scale,) = [n.input[1] for n in view.nodes("SimplifiedLayerNormalization")]
        known = view.constant(scale)
        assert known is not None
        other = view.tensor("coarse", np.round(known.astype(np.float32), 1).astype(known.dtype))
        return int(view.pass_by(scale, other))

    monkeypatch.setattr(ort_fusions, "FUSIONS", (*ort_fusions.FUSIONS[:-1], (rounded, coarse), ort_fusions.FUSIONS[-1]))
    _, notes, _ = compiled(tmp_path)
    undone = rounded not in ort_fusions.ROUNDING
    assert any(n.startswith("nothing was fused: ") for n in notes) == undone
    assert any(n.startswith("without biases of values: ") for n in notes) != undone
    fused = [n for n in notes if n.startswith("fused for ONNX Runtime: ")]
    assert not fused if undone else "GELU (1)" in fused[0] and rounded not in fused[0]


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


@needs_compiler
def test_above_the_limit_operands_are_not_compared_and_it_is_said(
    tmp_path: Path, no_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion_check, "WIDENED", 0)
    notes, _ = launched(tmp_path, precision="fp16")
    assert any("not compared: " in n and "operands" in n for n in notes)


@needs_compiler
def test_above_the_limit_biases_stay_and_it_is_said(
    tmp_path: Path, no_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever drops biases is not taken where it is not compared; all else is fused."""
    monkeypatch.setattr(fusion_check, "WIDENED", 0)
    dropping = (("biases of keys", lambda view: 1), ("biases of values", lambda view: 1))
    monkeypatch.setattr(ort_fusions, "FUSIONS", (*(f for f in ort_fusions.FUSIONS if "biases" not in f[0]), *dropping))
    notes, _ = launched(tmp_path, precision="fp16")
    assert any(n.startswith("without biases of keys, biases of values: ") for n in notes)
    (fused,) = [n for n in notes if n.startswith("fused for ONNX Runtime: ")]
    assert "biases" not in fused
