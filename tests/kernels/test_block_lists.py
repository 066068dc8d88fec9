"""BlockSparseAttention from a model to a bundle: what its nodes ask of kernels, and what a launch does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile import kernel_bundle, pipeline
from attncompile.cli import main
from attncompile.console import SilentProgress
from attncompile.core.errors import Unsupported
from attncompile.core.kernel import OpCall
from attncompile.kernels import build, calls, cost, symbols
from attncompile.kernels.bundle import Bundle
from attncompile.plugins import kernels
from attncompile.plugins.block_sparse.kernel import of_blocks
from tests.passes.attention_graphs import save

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
TOKENS, LAYERS = 449, 2


def dilated(tokens: int = TOKENS) -> np.ndarray:
    """Every fourth token around, as in dilated attention."""
    apart = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))
    return (apart % 4 == 0) & (apart < 160)


def model(folder: Path) -> Path:
    """Layers of four heads of 32 under one stored dilated mask; the output of one is the query of the next."""
    shape, nodes, query = [2, 4, TOKENS, 32], [], "q"
    stored = {"mask": dilated()[None, None], "hidden": np.array(-np.inf, np.float32),
              "scale": np.array(0.2, np.float32)}  # fmt: skip
    for n in range(LAYERS):
        nodes += [
            helper.make_node("Transpose", ["k"], [f"kt{n}"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [query, f"kt{n}"], [f"s{n}"]),
            helper.make_node("Mul", [f"s{n}", "scale"], [f"scaled{n}"]),
            helper.make_node("Where", ["mask", f"scaled{n}", "hidden"], [f"masked{n}"]),
            helper.make_node("Softmax", [f"masked{n}"], [f"w{n}"], axis=-1),
            helper.make_node("MatMul", [f"w{n}", "v"], [f"o{n}"]),
        ]
        query = f"o{n}"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, 1, shape) for n in "qkv"],
        [helper.make_tensor_value_info(query, 1, shape)], [numpy_helper.from_array(x, n) for n, x in stored.items()],
    )  # fmt: skip
    return save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = model(tmp_path_factory.mktemp("dilated"))
    (made,) = kernel_bundle._with_our_ops(path, pipeline.Options(), SilentProgress())
    return made


def test_layers_share_their_lists(replaced: onnx.ModelProto) -> None:
    nodes = [n for n in replaced.graph.node if n.domain == "attncompile"]
    assert [n.op_type for n in nodes] == ["BlockSparseAttention"] * LAYERS
    shared = [set(n.input) & {i.name for i in replaced.graph.initializer} for n in nodes]
    assert len(shared[0]) == 5 and shared[0] == shared[1]
    names = [i.name for i in replaced.graph.initializer]
    assert len(names) == len(set(names)) and len(replaced.functions) == 1


def test_its_nodes_have_kernels(replaced: onnx.ModelProto) -> None:
    for node in calls.find(replaced, kernels()):
        assert node.verdict.ok and node.call is not None and node.symbols is not None
        call = node.call
        assert call.attributes["block"] in (64, 128) and call.attributes["masked_rows"] in ("nan", "zero")
        assert call.shapes["rows"] == (1, 1, -(-TOKENS // call.attributes["block"]), 3)
        (program, *_) = kernels()[call.op].programs(build.general(kernels(), call), 90)
        names = [a.name for a in program.arguments if a.kind == "input"]
        assert names == ["query", "key", "value", "rows", "columns", "kinds", "masks", "order"]
        needed = {a.expression for a in program.arguments if a.kind == "int32"} - {"H // HKV"}
        assert needed <= set(node.symbols)
        assert node.symbols["rows_stride_B"] == node.symbols["rows_stride_H"] == "0", "all share their lists"


def test_strides_of_lists() -> None:
    """A dynamic size is asked whether it is one; inner axes are the kernel's own affair."""
    shapes: dict[str, Any] = {"query": (2, 9, 4, 16), "key": (2, 9, 4, 16), "value": (2, 9, 4, 16)}
    call = OpCall("BlockSparseAttention", "float16", 4, 4, 16, 16, inputs={"rows": "int32"})
    layouts = dict.fromkeys(symbols.OPERANDS, "BNHD")
    for rows, sizes, want in (
        ((None, None, None, 3), (2, 4, 7, 3), (84, 21)), ((None, None, None, 3), (1, 1, 7, 3), (0, 0)),
        ((1, 4, 7, 3), (1, 4, 7, 3), (0, 21)), ((2, 1, 7, 3), (2, 1, 7, 3), (21, 0)),
    ):  # fmt: skip
        found = symbols.values(symbols.table(call, {**shapes, "rows": rows}, layouts), {"rows": sizes})
        assert (found["rows_stride_B"], found["rows_stride_H"]) == want
        assert not [name for name in found if "*" in name]
    with pytest.raises(Unsupported, match="rows has gaps"):
        at = {n: symbols.Strided.contiguous((2, 9, 4, 16)) for n in symbols.OPERANDS}
        symbols.of_tensors({**at, "rows": symbols.Strided((1, 4, 7, 3), (0, 42, 6, 1))}, {})


def test_what_a_launch_does(replaced: onnx.ModelProto) -> None:
    (node, *_) = calls.find(replaced, kernels())
    assert node.call is not None
    kernel, call = kernels()[node.call.op], node.call
    (program, *_) = kernel.programs(build.general(kernels(), call), 90)
    block = call.attributes["block"]
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in replaced.graph.initializer}
    rows = next(x for x in stored.values() if x.ndim == 4 and x.shape[-1] == 3)
    partial, whole = int((rows[..., 1] - rows[..., 0]).sum()), int((rows[..., 2] - rows[..., 1]).sum())
    padded = np.zeros((rows.shape[2] * block,) * 2, bool)
    padded[:TOKENS, :TOKENS] = dilated()
    touched = padded.reshape(rows.shape[2], block, -1, block).any(axis=(1, 3)).sum()
    assert partial + whole == touched
    work = of_blocks(call, program, whole, partial)
    assert work.scores == touched * block * block * 8 and work.masked == partial * block * block * 8
    assert kernel.work(call, program).scores == work.scores
    assert cost.milliseconds(work, program, 90) > 0
    with pytest.raises(Unsupported, match="shapes of its lists"):
        kernel.work(build.general(kernels(), call), program)


@needs_triton
def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    path = model(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["kernels", "build", str(path), "--arch", "80", "-q", "--out", "made"]) == 0
    bundle = Bundle.open(tmp_path / "made")
    assert len(bundle.index["nodes"]) == LAYERS and len(bundle.index["calls"]) == 1
    for node in bundle.index["nodes"]:
        found = bundle.kernels(bundle.call_of(node["name"]), 86)
        assert found and min(c.entry.shared for c in found) <= 48 * 1024
        assert node["symbols"]["NQ"] == str(TOKENS)
    capfd.readouterr()


def test_lists_that_come_from_the_gpu() -> None:
    """Nothing of them is known when the file is compiled but the edge of their blocks."""
    half = TensorProto.FLOAT16
    lists = [("rows", (None, None, None, 3)), ("columns", (None,)), ("kinds", (None,)), ("masks", (1, 128, 4))]
    operands = [(n, half, ("b", "n", h, 64)) for n, h in (("query", 8), ("key", 2), ("value", 2))]
    given = [*operands, *((n, TensorProto.INT32, shape) for n, shape in lists)]
    names = [n for n, _, _ in given]
    node = helper.make_node("BlockSparseAttention", names, ["y", "lse"], domain="attncompile", scale=0.5, block=128)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(*g) for g in given],
        [helper.make_tensor_value_info("y", half, None), helper.make_tensor_value_info("lse", 1, None)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("attncompile", 1)]
    (found,) = calls.find(helper.make_model(graph, opset_imports=opsets), kernels())
    assert found.call is not None and found.symbols is not None
    assert found.call.outputs == ("output", "log_sum_exp") and found.call.attributes["masked_rows"] == "nan"
    program = kernels()[found.call.op].programs(build.general(kernels(), found.call), 90)[0]
    assert program.language == "gluon"
    sizes = {"query": (2, 300, 8, 64), "key": (2, 300, 2, 64), "value": (2, 300, 2, 64), "rows": (2, 8, 3, 3)}
    known = symbols.values(found.symbols, {**sizes, "columns": (9,), "kinds": (9,), "masks": (1, 128, 4)})
    assert (known["rows_stride_B"], known["rows_stride_H"], known["NQ"]) == (72, 9, 300)
