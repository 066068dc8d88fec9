"""Inlined bodies in TensorRT-RTX's builder, which works without a GPU: they parse, build, and attention is fused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.grid import TokenGrid
from attncompile.core.pattern import GridWindow
from attncompile.plugins import mechanism
from tests.plugins.test_block_sparse import documents, windows

trt = pytest.importorskip("tensorrt_rtx")

WINDOW = {"kernel_size": [256], "causal": [1], "left": [255]}
CASES = {
    "window, dynamic": ({**WINDOW}, {"queries": 1024}),
    "window, dynamic, dense branch": ({**WINDOW, "dense_below": 384}, {"queries": 1024}),
    "window, static": (WINDOW, {"queries": 1000, "static": True}),
    "window, BNHD, groups": (WINDOW, {"queries": 1024, "layouts": ("BNHD",) * 4, "kv_heads": 2}),
    "window, bfloat16": (WINDOW, {"queries": 1024, "dtype": "bfloat16"}),
    "window, softmax in half": (WINDOW, {"queries": 1024, "softmax_dtype": "float16"}),
    "sinks": ({**WINDOW, "prefix": 4}, {"queries": 1024}),
    "two-sided with a prefix": ({"kernel_size": [256], "prefix": 1}, {"queries": 1024}),
    "grid": ({"kernel_size": [13, 13], "grid": [32, 32], "border": "clamp"}, {"queries": 1024, "static": True}),
    "grid with a prefix": (
        {"kernel_size": [13, 13], "grid": [32, 32], "border": "clamp", "prefix": 1},
        {"queries": 1025, "static": True},
    ),
}


class _Log(trt.ILogger):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: object, message: str) -> None:
        self.lines.append(message)


def banded(length: int) -> np.ndarray:
    """Causal, near or among the first eight."""
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    return (j <= i) & ((i - j < 100) | (j < 8))


STORED = {
    "chunks": (documents(1024, 8), {}),
    "windows": (windows(28, 28, 7, 0), {}),
    "ragged documents": (np.tril(documents(1000, 3)), {}),
    "sinks and band": (banded(1024), {}),
    "sinks and band, groups": (banded(1024), {"kv_heads": 2, "layouts": ("BNHD",) * 4}),
}


@pytest.mark.parametrize("label", CASES)
def test_bodies_build_fused(label, case) -> None:
    parameters, sizes = CASES[label]
    at = case(**{"heads": 4, "kv_heads": 4, "head_dim": 64, "value_dim": 64, "dtype": "float16", **sizes})
    model = onnx.inliner.inline_local_functions(at.model(mechanism("NeighborhoodAttention"), parameters))
    fused, matmuls = built(at, model)
    dense_rows = 1 if parameters.get("prefix") and not parameters.get("causal") else 0
    assert len(fused) == 1 + dense_rows + bool(parameters.get("dense_below")), (fused, matmuls)
    assert not matmuls


@pytest.mark.parametrize("label", STORED)
def test_stored_masks_build_fused(label, case) -> None:
    """Each group of tiles is one fused layer."""
    mask, sizes = STORED[label]
    at = case(**{"heads": 4, "kv_heads": 4, "head_dim": 64, "value_dim": 64, "dtype": "float16", "static": True,
                 "queries": len(mask), "visible": mask, **sizes})  # fmt: skip
    model = onnx.inliner.inline_local_functions(at.model(mechanism("BlockSparseAttention"), {}))
    groups = sum(n.op_type == "Softmax" for n in model.graph.node)
    fused, matmuls = built(at, model)
    assert groups and len(fused) == groups, (groups, fused, matmuls)
    assert not matmuls


def test_a_neighborhood_with_a_bias_builds(case) -> None:
    """As a relative position bias is: stored, one value for each head, query and key."""
    bias = np.random.default_rng(0).standard_normal((1, 4, 576, 576)).astype(np.float16)
    at = case(heads=4, kv_heads=4, head_dim=64, value_dim=64, dtype="float16", static=True, queries=576, bias=bias)
    at = replace(at, pattern=GridWindow(TokenGrid((24, 24)), (7, 7), (1, 1), (1, 1), (False, False)))
    given = mechanism("NeighborhoodAttention").exact_candidates(at.site())[0].parameters
    model = onnx.inliner.inline_local_functions(at.model(mechanism("NeighborhoodAttention"), given))
    model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    del model.graph.input[3:]
    built(at, model)


@pytest.mark.parametrize("static", [True, False])
def test_a_window_with_sink_logits_builds(static, case) -> None:
    at = case(heads=4, kv_heads=4, head_dim=64, value_dim=64, dtype="float16", queries=1024, static=static,
              sinks=np.zeros(4, np.float16))  # fmt: skip
    model = onnx.inliner.inline_local_functions(at.model(mechanism("NeighborhoodAttention"), WINDOW))
    model.graph.initializer.append(onnx.numpy_helper.from_array(at.sinks, "sinks"))
    del model.graph.input[3:]
    fused, matmuls = built(at, model)
    assert not fused and len(matmuls) == 2  # not fused: the products and the softmax apart


def built(at, model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """The fused attention layers and the matrix products of the engine that the builder makes."""
    assert {n.domain for n in model.graph.node} == {""}
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for value in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        profile.set_shape(
            value.name, *([{"B": 1, "N": n}.get(d, d) for d in dims] for n in (1, at.queries, 4 * at.queries))
        )
    if not at.static:
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    dump = "\n".join(log.lines)
    dump = dump[dump.index("Layers:") :].split("I/O Tensors:")[0]
    fused = re.findall(r"(?m)^Name: \w*mha\w*", dump)
    matmuls = re.findall(r"(?m)^Name: matmul\w*", dump)
    return fused, matmuls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "static"),
    [*((t, static) for t in ("pooled 0.25", "xattention 0.8", "anchor 4") for static in (False, True)),
     ("pooled 0.25 rest 64", True), ("sinks 0 window 1 rest 16", True)],
)  # fmt: skip
def test_blocks_that_are_chosen_build(text, static, case) -> None:
    """Scores, sorting and lists of any length in standard ops, at a dynamic length too."""
    at = case(queries=512, static=static, heads=2, head_dim=64, value_dim=64, causal=True, dtype="float16")
    made = at.model(mechanism("BlockSparseAttention"), {"edge": 64, "heads": [text] * 2})
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    assert parser.parse(onnx.inliner.inline_local_functions(made).SerializeToString()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    if not static:
        profile = builder.create_optimization_profile()
        for name in "qkv":
            profile.set_shape(name, *((1, 2, n, 64) for n in (64, 512, 1024)))
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
