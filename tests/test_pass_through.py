"""Operators that are not ours to touch: custom ones, plugins, ONNX Runtime's own, quantised ones, through the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from attncompile.cli import main
from tests.exports import exported

LENGTH, HEADS, DIM = 1024, 2, 32
WIDTH = HEADS * DIM


def layer(path: Path, window: int, before: onnx.NodeProto, after: onnx.NodeProto, declared: bool = True) -> None:
    """x -> ``before`` -> x1 -> attention over a window (0: all keys) -> y0 -> ``after`` -> y."""
    rng = np.random.default_rng(0)
    stored: list[onnx.TensorProto] = []

    def const(value: Any) -> str:
        stored.append(numpy_helper.from_array(np.asarray(value), f"c{len(stored)}"))
        return f"c{len(stored) - 1}"

    op = helper.make_node
    nodes = [before]
    for t in "qkv":
        weight = const((rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32))
        nodes.append(op("MatMul", ["x1", weight], [f"{t}0"]))
        nodes.append(op("Reshape", [f"{t}0", const(np.array([0, 0, HEADS, DIM]))], [f"{t}1"]))
        nodes.append(op("Transpose", [f"{t}1"], [t], perm=[0, 2, 3, 1] if t == "k" else [0, 2, 1, 3]))
    nodes.append(op("MatMul", ["q", "k"], ["s0"]))
    nodes.append(op("Mul", ["s0", const(np.float32(DIM**-0.5))], ["s1"]))
    scores = "s1"
    if window:
        distance = np.arange(LENGTH)[None] - np.arange(LENGTH)[:, None]
        mask = np.where((distance <= 0) & (distance > -window), 0, -np.inf).astype(np.float32)
        nodes.append(op("Add", ["s1", const(mask)], ["s2"]))
        scores = "s2"
    nodes.append(op("Softmax", [scores], ["p"], axis=-1))
    nodes.append(op("MatMul", ["p", "v"], ["o"]))
    nodes.append(op("Transpose", ["o"], ["o1"], perm=[0, 2, 1, 3]))
    nodes.append(op("Reshape", ["o1", const(np.array([0, 0, WIDTH]))], ["y0"]))
    nodes.append(after)
    infos = [helper.make_tensor_value_info(n, 1, [1, LENGTH, WIDTH]) for n in ("x", "y", "x1")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:2], stored, value_info=infos[2:] if declared else [])
    domains = {n.domain for n in (before, after)} - {""}
    imports = [helper.make_opsetid("", 18), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)


def plugins() -> tuple[onnx.NodeProto, onnx.NodeProto]:
    first = helper.make_node("MyPlugin", ["x"], ["x1"], domain="trt.plugins", name="plug", sizes=[3, 5], mode="fast")
    return first, helper.make_node("Other", ["y0", "x1"], ["y"], domain="my.own", alpha=1.5)


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def compiled(path: Path, out: Path) -> tuple[int, dict[str, Any]]:
    code = main(["compile", str(path), "--policy", "sparse", "--target", "onnx", "--out", str(out)])
    return code, json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("window", [0, 64])
def test_a_model_with_plugins_passes_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], window: int
) -> None:  # fmt: skip
    """ONNX Runtime cannot run the whole, so nothing is replaced, even where a site alone was proved."""
    path, out = tmp_path / "plugged.onnx", tmp_path / "out"
    layer(path, window, *plugins())
    (site,) = inspected(path, capsys)["sites"]
    assert (site["heads"], site["mask"]["kind"]) == (HEADS, "window" if window else "none")
    code, report = compiled(path, out)
    assert code == 0
    assert (out / "model.onnx").read_bytes() == path.read_bytes()
    text = json.dumps(report)
    assert ("ONNX Runtime does not have trt.plugins::MyPlugin" in text) == bool(window)


def test_a_plugin_without_a_declared_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing behind it has a shape: no site, and not silence."""
    path, out = tmp_path / "plugged.onnx", tmp_path / "out"
    layer(path, 64, *plugins(), declared=False)
    found = inspected(path, capsys)
    assert not found["sites"]
    assert [m["code"] for m in found["near_misses"]] == ["shape-unknown"]
    assert compiled(path, out)[0] == 0
    assert (out / "model.onnx").read_bytes() == path.read_bytes()


def test_operators_of_onnx_runtime_stay_while_a_site_is_replaced(tmp_path: Path) -> None:
    path, out = tmp_path / "fused.onnx", tmp_path / "out"
    before = helper.make_node("FastGelu", ["x"], ["x1"], domain="com.microsoft", name="gelu")
    layer(path, 64, before, helper.make_node("QuickGelu", ["y0"], ["y"], domain="com.microsoft", alpha=1.5, name="q"))
    assert main(["compile", str(path), "--policy", "sparse", "--target", "onnx", "--out", str(out), "--strict"]) == 0
    old, new = onnx.load(path), onnx.load(out / "model.onnx")
    kept = {n.name: n.SerializeToString() for n in new.graph.node if n.domain == "com.microsoft"}
    assert kept == {n.name: n.SerializeToString() for n in old.graph.node if n.domain == "com.microsoft"}
    assert [n.op_type for n in new.graph.node if n.domain == "attncompile"] == ["NeighborhoodAttention"]


@pytest.mark.parametrize("fused", ["Attention", "MultiHeadAttention"])
def test_models_of_onnx_runtimes_optimizer_pass_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fused: str
) -> None:  # fmt: skip
    """BERT as the transformer optimiser leaves it: its attention is found inside, and the file stays what it is."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    options = pytest.importorskip("onnxruntime.transformers.fusion_options").FusionOptions("bert")
    options.use_multi_head_attention = fused == "MultiHeadAttention"
    source = exported("bert", "torchscript", 17, attention="eager")
    made = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=4, hidden_size=64, opt_level=0, optimization_options=options
    )
    path, out = tmp_path / "optimised.onnx", tmp_path / "out"
    made.save_model_to_file(str(path))
    assert [n.op_type for n in onnx.load(path).graph.node if "Attention" in n.op_type] == [fused] * 2
    capsys.readouterr()
    found = inspected(path, capsys)
    sites, plain = found["sites"], inspected(source, capsys)["sites"]
    facts = ("heads", "kv_heads", "head_dim", "query_length", "key_length", "scale")
    assert [[s[f] for f in facts] for s in sites] == [[s[f] for f in facts] for s in plain]
    assert [s["mask"]["kind"] for s in sites] == ["padding"] * 2
    assert not found["near_misses"]
    assert compiled(path, out)[0] == 0
    assert (out / "model.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("name", "exporter", "opset"), [("vit", "torchscript", 17), ("gpt2", "torchscript", 17)])
def test_sites_behind_fused_normalisations_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, exporter: str, opset: int
) -> None:
    """The optimiser fuses the layer norms of these and not their attention: no shape is lost behind them."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    source = exported(name, exporter, opset)
    made = optimizer.optimize_model(str(source), model_type=name, num_heads=4, hidden_size=64, opt_level=0)
    path = tmp_path / "optimised.onnx"
    made.save_model_to_file(str(path))
    assert any(n.op_type == "SkipLayerNormalization" for n in onnx.load(path).graph.node)
    capsys.readouterr()
    sites, plain = inspected(path, capsys)["sites"], inspected(source, capsys)["sites"]
    facts = ("heads", "kv_heads", "head_dim", "query_length", "key_length", "scale")
    assert [[s[f] for f in facts] for s in sites] == [[s[f] for f in facts] for s in plain]
    assert [s["mask"]["kind"] for s in sites] == [s["mask"]["kind"] for s in plain]
    assert len(sites) == 2


def test_a_quantised_model_passes_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.passes.test_detect_operators_quantised import quantised

    path, out = quantised("bert", "qdq", tmp_path), tmp_path / "out"
    capsys.readouterr()
    assert [s["quantised"] for s in inspected(path, capsys)["sites"]] == ["int8", "int8"]
    code, report = compiled(path, out)
    assert code == 0
    assert "does not handle quantised operands" in json.dumps(report["sites"][0])
    assert (out / "model.onnx").read_bytes() == path.read_bytes()
