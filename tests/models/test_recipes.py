"""Every recipe, through both exporters and at opsets 17, 18 and 23: the file gives what the torch module gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import BadArguments
from attncompile.models import NAMES, Options, export, recipe
from attncompile.models.export import ExportFailed, build, quiet, resolve
from tests.exports import described

TWINS = ("dinov2", "minilm")
"""Of layers that vit and bert have too: their newest opset and dynamo's dynamic axes are seen there."""
OF_BOTH = ("vit", "llama", "flux", "minilm")
"""Exported by TorchScript at opset 17 and 18: an encoder and a decoder, where both give the same operators, and two of
the four where axes become inputs of ReduceMean or ReduceL2 at 18."""
COMBINATIONS = [
    (name, exporter, opset)
    for name in NAMES
    for exporter, opset in (("torchscript", 17), ("torchscript", 18), ("dynamo", 18), ("dynamo", 23))
    if (exporter, opset) != ("torchscript", 18) or name in OF_BOTH
    if opset != 23 or name not in TWINS
]
BUDGET = 1e-5  # relative L2 in fp32


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


def outputs_of_torch(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        result = module(*inputs.values())
    return [value.numpy() for value in (result if isinstance(result, tuple) else (result,))]


def outputs_of_file(path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize(("name", "exporter", "opset"), COMBINATIONS)
def test_file_equals_torch(name: str, exporter: str, opset: int) -> None:
    exported = described(name, exporter, opset)
    inputs = dict(exported.built.inputs)
    graph = onnx.load(exported.path).graph
    assert [value.name for value in graph.input] == list(inputs)
    assert [value.name for value in graph.output] == list(exported.built.outputs)
    domains = {entry.domain: entry.version for entry in onnx.load(exported.path).opset_import}
    assert domains[""] == opset
    want = outputs_of_torch(exported.built.module, inputs)
    if (name, exporter, opset) == ("pixart", "dynamo", 23):
        # ONNX Runtime 1.32 refuses the file's mask [batch, heads, 1, keys], though ONNX lets it broadcast over queries.
        evaluator = ReferenceEvaluator(str(exported.path))
        got = evaluator.run(None, {key: value.numpy() for key, value in inputs.items()})
    else:
        got = outputs_of_file(exported.path, inputs)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(b).all()
        assert b.std() > 1e-3
        assert relative_l2(a, b) <= BUDGET


# The dynamo exporter takes seconds a model: its opset 23 is tried where the operators differ from those of 18.
DYNAMIC = [
    (name, exporter, opset)
    for name in NAMES
    for exporter, opset in [("torchscript", 17), ("dynamo", 18), ("dynamo", 23)]
    if (name, exporter) not in {("flux", "torchscript"), ("pixart", "dynamo")}  # refused, see below
    and (opset != 23 or name in ("llama", "bert"))
    and (exporter, name) not in {("dynamo", twin) for twin in TWINS}
]


@pytest.mark.parametrize(("name", "exporter", "opset"), DYNAMIC)
def test_dynamic_axes_hold_at_other_sizes(name: str, exporter: str, opset: int) -> None:
    axes = recipe(name).dynamic_axes
    if name == "llama" and opset == 23:
        axes = ("sequence",)  # a batch is refused there
    exported = described(name, exporter, opset, dynamic=axes)
    tokens = [19, 77] if "sequence" in axes else [None]
    for batch, length in [(1, tokens[0]), (3 if "batch" in axes else 1, tokens[-1])]:
        chosen = replace(exported.options, batch=batch, tokens=length, dynamic=())
        with quiet():
            inputs = dict(build(name, chosen).inputs)
        want = outputs_of_torch(exported.built.module, inputs)
        for a, b in zip(outputs_of_file(exported.path, inputs), want, strict=True):
            assert relative_l2(a, b) <= BUDGET, (batch, length)


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("name", [name for name in NAMES if "eager" in recipe(name).uses])
def test_eager_attention_equals_sdpa(name: str, opset: int, tmp_path: Path) -> None:
    exported = export(name, tmp_path / "model.onnx", exporter="torchscript", opset=opset, attention="eager")
    with quiet():
        sdpa = build(name, replace(exported.options, attention="sdpa"))
    inputs = dict(sdpa.inputs)
    for a, b in zip(outputs_of_file(exported.path, inputs), outputs_of_torch(sdpa.module, inputs), strict=True):
        assert relative_l2(a, b) <= BUDGET


def test_mistral_window_is_active() -> None:
    """The far past does not reach a token that the near past does: 2 layers of window 16 see 31 tokens."""
    exported = described("mistral")
    embeds = exported.built.inputs["inputs_embeds"]
    assert embeds.shape == (1, 64, 128)
    reference = outputs_of_file(exported.path, {"inputs_embeds": embeds})[0]
    far, near = embeds.clone(), embeds.clone()
    far[:, 32] += 1.0  # 31 before the last token: just out of sight
    near[:, 33] += 1.0
    assert np.array_equal(outputs_of_file(exported.path, {"inputs_embeds": far})[0][:, 63], reference[:, 63])
    moved = outputs_of_file(exported.path, {"inputs_embeds": near})[0][:, 63]
    assert relative_l2(moved, reference[:, 63]) > 1e-4


@pytest.mark.parametrize("name", ["vit", "dit"])
def test_export_twice_is_the_same_file(name: str, tmp_path: Path) -> None:
    first = export(name, tmp_path / "a.onnx", exporter="torchscript").path.read_bytes()
    assert export(name, tmp_path / "b.onnx", exporter="torchscript").path.read_bytes() == first
    assert export(name, tmp_path / "c.onnx", exporter="torchscript", seed=1).path.read_bytes() != first


@pytest.mark.parametrize(("exporter", "dtype"), [("torchscript", "fp16"), ("dynamo", "fp16"), ("dynamo", "bf16")])
def test_low_precision_files_hold_that_type(exporter: str, dtype: str, tmp_path: Path) -> None:
    graph = onnx.load(export("vit", tmp_path / "m.onnx", exporter=exporter, dtype=dtype).path).graph
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == [wanted] * 2
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    assert len(matrices) >= 12
    assert {tensor.data_type for tensor in matrices} == {wanted}


def test_padding_mask_becomes_an_input(tmp_path: Path) -> None:
    masked = onnx.load(export("llama", tmp_path / "m.onnx", padding_mask=True).path)
    plain = onnx.load(described("llama").path)
    assert [value.name for value in masked.graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in plain.graph.input] == ["input_ids"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit", {"exporter": "dynamo", "opset": 17}, "18 to"),
        ("vit", {"exporter": "torchscript", "opset": 23}, "9 to 20"),
        ("vit", {"exporter": "torchscript", "opset": 13}, "scaled_dot_product_attention"),
        ("vit", {"size": "huge"}, "no size"),
        ("vit", {"window": 5}, "takes no --window"),
        ("vit", {"tokens": 50}, "not a square"),
        ("vit", {"dynamic": ("sequence",)}, "no dynamic axis"),
        ("flux", {"attention": "eager"}, "no eager attention"),
        ("mistral", {"tokens": 0}, "--tokens is 0"),
        ("mistral", {"kv_heads": 3}, "does not divide"),
        ("mistral", {"exporter": "torchscript", "padding_mask": False}, "aten::diff"),
        ("minilm", {"tokens": 513}, "512 positions"),
        ("mistral", {"opset": 23, "dynamic": ("batch",)}, "caches of batch 1"),
        ("llama", {"opset": 23, "batch": 2}, "caches of batch 1"),
        ("flux", {"exporter": "torchscript", "dynamic": ("batch",)}, "any other batch size"),
        ("pixart", {"exporter": "dynamo", "dynamic": ("batch",)}, "batch dynamic"),
        ("nosuch", {}, "no recipe"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(name: str, options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadArguments, match=words) as caught:
        export(name, tmp_path / "m.onnx", **options)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_exporter_failure_is_one_line_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportFailed, match=r"opset 11.*einsum") as caught:
        export("dit", tmp_path / "m.onnx", exporter="torchscript", opset=11, attention="eager")
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert not list(tmp_path.iterdir())
    streams = capfd.readouterr()
    assert streams.out == ""
    assert streams.err == ""


def test_bench_recipe_has_the_published_shape() -> None:
    from attncompile.models.llm import _MISTRAL

    bench = _MISTRAL["bench"]
    assert (bench.hidden, bench.heads, bench.kv_heads, bench.ffn) == (768, 12, 12, 2688)
    assert (bench.layers, bench.tokens, bench.window) == (2, 4096, 512)
    assert resolve("mistral", Options(size="bench")).opset == 18
