"""``--target onnxruntime-cuda``: what is written, what it says, and that ONNX Runtime launches it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from attncompile import env, kernel_kit, outputs, pipeline
from attncompile.console import SilentProgress
from attncompile.core.errors import BadArguments, MissingDependency, TargetError
from attncompile.core.kernel import ARCHITECTURES
from attncompile.core.model import Model
from attncompile.kernels.bundle import Bundle
from attncompile.pipeline import Options
from attncompile.runtime import layout
from attncompile.targets import base
from attncompile.targets.onnxruntime_cuda import TARGET, OnnxRuntimeCuda
from tests.passes.attention_graphs import Spec, build, save
from tests.runtime.conftest import Double, needs_compiler, node_model

pytestmark = pytest.mark.usefixtures("brief")

WINDOWED = Spec(batch=1, heads=2, kv_heads=2, length=700, head_dim=16, mask="window", left=15, right=0, scale=0.25)


def kit(*architectures: int) -> kernel_kit.Kit:
    return kernel_kit.Kit(architectures or (80,), SilentProgress())


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelProto, Model]:
    """A float32 model whose window is an op of ours with a body, and the model that it was made from."""
    folder = tmp_path_factory.mktemp("rewritten")
    path = save(build(WINDOWED), folder, "windowed.onnx")
    result = pipeline.compile(path, Options(target="onnx", out=folder / "out", keep_slower=True))
    assert result.outcome == "replaced"
    return onnx.load(folder / "out" / "model.onnx"), pipeline.load(path)


def twice(proto: ModelProto, **attributes: Any) -> ModelProto:
    """``proto`` with a second node of ours, which has other attributes, behind the first."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    (first,) = [n for n in copy.graph.node if n.domain == "attncompile"]
    second = copy.graph.node.add()
    second.CopyFrom(first)
    second.name, second.output[0] = "another", "another_output"
    for name, value in attributes.items():
        found = [a for a in second.attribute if a.name == name]
        for a in found:
            second.attribute.remove(a)
        second.attribute.append(helper.make_attribute(name, value))
    copy.graph.output.append(helper.make_tensor_value_info("another_output", TensorProto.FLOAT, None))
    return copy


def launches(proto: ModelProto) -> list[Any]:
    return [n for n in proto.graph.node if n.domain == layout.DOMAIN]


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_lowered(rewritten: Any, no_triton: None, precision: Any, dtype: int) -> None:
    proto, model = rewritten
    before = proto.SerializeToString()
    lowered = TARGET.equipped(kit()).lower(proto, model, precision)
    assert proto.SerializeToString() == before
    (node,) = launches(lowered)
    assert not lowered.functions
    assert {n.domain for n in lowered.graph.node} <= {"", layout.DOMAIN}
    described = {v.name: v.type.tensor_type for v in lowered.graph.value_info}
    assert described[node.output[0]].elem_type == dtype
    assert len(described[node.output[0]].shape.dim) == 4
    assert [v.type.tensor_type.elem_type for v in lowered.graph.input] == [
        v.type.tensor_type.elem_type for v in model.proto.graph.input
    ]
    onnx.checker.check_model(lowered)


def test_what_stays_float32_is_refused(rewritten: Any, no_triton: None) -> None:
    with pytest.raises(TargetError, match=r"is in float32: kernels take float16 and bfloat16") as caught:
        TARGET.equipped(kit()).lower(*rewritten)
    assert caught.value.hint == "add --fp16 or --bf16"


def test_a_node_without_a_kernel_is_written_out(rewritten: Any, no_triton: None) -> None:
    """One of two nodes of one op and one body has no kernel: the other one is launched all the same."""
    proto, model = rewritten
    target = TARGET.equipped(kit())
    lowered = target.lower(twice(proto, scale=-1.0), model, "fp16")
    assert len(launches(lowered)) == 1 and len(lowered.graph.node) > 10
    assert not lowered.functions
    assert any("another run in standard ops: scale -1.0" in note for note in target._notes)


def test_a_kernel_that_does_not_compile(rewritten: Any, no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one architecture of two: then the node is written out, and the model says so."""
    from attncompile.core.errors import Unsupported
    from attncompile.kernels import build as build_kernels
    from tests.runtime.conftest import uncompiled

    proto, model = rewritten

    def partly(jobs: Any, *_: Any) -> list[Any]:
        bad = Unsupported("shared", "it does not fit")
        return [bad if j.architecture == 90 and j.program.dtype == "float16" else uncompiled(j) for j in jobs]

    monkeypatch.setattr(build_kernels, "compile_all", partly)
    with pytest.raises(TargetError, match=r"no node has a kernel: .* has no kernel on sm_90: it does not fit"):
        TARGET.equipped(kit(80, 90)).lower(proto, model, "fp16")
    assert len(launches(TARGET.equipped(kit(80, 90)).lower(proto, model, "bf16"))) == 1
    assert len(launches(TARGET.equipped(kit(80)).lower(proto, model, "fp16"))) == 1


def test_nothing_to_launch(rewritten: Any, no_triton: None) -> None:
    _, model = rewritten
    with pytest.raises(TargetError, match=r"nothing was replaced by an op of ours"):
        TARGET.equipped(kit()).lower(model.proto, model, "fp16")
    with pytest.raises(TargetError, match=r"was given no kernels"):
        TARGET.lower(*rewritten, "fp16")


def test_a_node_inside_of_a_users_function(rewritten: Any, no_triton: None) -> None:
    proto, model = rewritten
    copy = ModelProto()
    copy.CopyFrom(proto)
    (node,) = [n for n in copy.graph.node if n.domain == "attncompile"]
    function = helper.make_function(
        "user", "Wrapped", ["q", "k", "v"], ["o"], [], [helper.make_opsetid("attncompile", 1)]
    )
    inner = function.node.add()
    inner.CopyFrom(node)
    inner.input[:], inner.output[:] = ["q", "k", "v"], ["o"]
    copy.functions.append(function)
    outer = helper.make_node("Wrapped", list(node.input), list(node.output), "outer", domain="user")
    node.CopyFrom(outer)
    copy.opset_import.append(helper.make_opsetid("user", 1))
    assert len(launches(TARGET.equipped(kit()).lower(copy, model, "fp16"))) == 1


@needs_compiler
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_out(tmp_path: Path, no_triton: None, double: Double, precision: str) -> None:
    """The whole way; then ONNX Runtime loads what lies in OUT/, in a folder that was moved, and launches it."""
    import onnxruntime

    path, out = save(build(WINDOWED), tmp_path, "windowed.onnx"), tmp_path / "out"
    result = pipeline.compile(
        path, Options(target="onnxruntime-cuda", out=out, precision=precision, architectures=(80, 90), keep_slower=True)
    )
    assert result.exit_code == 0, result.failures
    portable, ours = result.targets
    written = {f.path for f in ours.files}
    assert {layout.MODEL, layout.LIBRARY, "bundle/bundle.json"} <= written
    assert all((out / name).is_file() for name in written)
    assert any("launched as kernels: 1 node, compiled for sm_80, sm_90" in note for note in ours.notes)
    parity = "fp16 against the original in ONNX Runtime: relative L2" if precision == "fp16" else "bf16 parity not"
    assert any(note.startswith(parity) for note in ours.notes)
    assert {f.path for f in portable.files} == {"model.onnx"}
    bundle = Bundle.open(out / "bundle")
    assert {e.architecture for e in bundle.entries.values()} == {80, 90}

    moved = tmp_path / "moved"
    out.rename(moved)
    double.expect(list(bundle.entries.values()))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(moved / layout.LIBRARY))
    if precision == "bf16":  # the CPU has no bf16 products: what lies around the node cannot run here
        return
    session = onnxruntime.InferenceSession(str(moved / layout.MODEL), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
    session.run(None, feeds)
    assert double.count("launched") == 1


def retention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A model with decays of the scores, 200 tokens, and a policy that takes its site whatever is predicted."""
    from tests.passes import test_linear_causal as graphs

    for name, value in (("_LENGTH", 200), ("_DIM", 16)):
        monkeypatch.setattr(graphs, name, value)
    g = graphs.Graph()
    weights = g.op("Mul", g.scores(), g.array(graphs.decay(n=200)[None]))
    path = save(g.model(g.op("MatMul", weights, g.v)), folder, "retention.onnx")
    policy = folder / "always.toml"
    policy.write_text('[exact]\nmechanisms = ["LinearAttention"]\nmin_gain = 0.0\n')
    return path, str(policy)


def chunks_of(path: Path) -> int:
    """How many states there are between chunks in a file that ``retention`` was compiled to."""
    described = onnx.shape_inference.infer_shapes(onnx.load(path)).graph.value_info
    return next(v.type.tensor_type.shape.dim[2].dim_value for v in described if v.name.endswith("/state"))


def test_kernels_get_longer_chunks(tmp_path: Path, no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the portable model, and the plan says those of the portable one."""
    from attncompile.plugins.linear_attention import causal, kernel

    monkeypatch.setattr(kernel, "FILLS", 1)
    path, policy = retention(tmp_path, monkeypatch)
    options = Options(target="onnxruntime-cuda", out=tmp_path / "out", precision="fp16", architectures=(80,),
                      keep_slower=True, policy=policy)  # fmt: skip
    result = pipeline.compile(path, options)
    assert result.exit_code == 0, result.failures
    assert not any("kernels run with" in w for w in result.warnings)
    assert chunks_of(tmp_path / "out" / "model.onnx") == 4 and chunks_of(tmp_path / "out" / layout.MODEL) == 1
    assert result.sites[0].decision.parameters == {"chunk": 64}

    # What is wrong in long chunks alone leaves the kernels the short ones, and is said.
    right = causal._scanned
    monkeypatch.setattr(
        causal, "_scanned", lambda b, s, c, a, w, f, axis: right(b, s, c, a, "" if axis == 3 else w, f, axis)
    )
    result = pipeline.compile(path, replace(options, out=tmp_path / "wrong"))
    assert any("kernels run with the parameters of model.onnx: not exact" in w for w in result.warnings)
    assert chunks_of(tmp_path / "wrong" / layout.MODEL) == 4


def test_what_fails_leaves_the_portable_model(tmp_path: Path, no_triton: None) -> None:
    path, out = save(build(WINDOWED), tmp_path, "windowed.onnx"), tmp_path / "out"
    result = pipeline.compile(path, Options(target="onnxruntime-cuda", out=out, keep_slower=True))
    assert result.exit_code == 1
    assert any("onnxruntime-cuda: node" in f and "--fp16 or --bf16" in f for f in result.failures)
    assert (out / "model.onnx").is_file() and not list(out.glob("*onnxruntime*")) and not (out / "bundle").exists()


def test_sizes_that_only_detection_knows(no_triton: None) -> None:
    """Heads that no shape inference sees: the runtime still checks them, since they are part of the shapes."""
    shapes = {"query": ["b", "n", "h", 64], "key": ["b", "m", "h", "d"], "value": ["b", "m", "h", "e"]}
    model = node_model("Attention", shapes, dict.fromkeys(shapes, "float16"), scale=0.125)
    model.graph.node[0].name = "Attention/site7"
    site = SimpleNamespace(id="site7", heads=4, kv_heads=2, head_dim=64, value_dim=32)
    (refused,) = kit().candidates(model, "float16")
    assert refused.reason == "the number of heads of query is not known"
    knowing = kernel_kit.Kit((80,), SilentProgress(), [site])  # type: ignore[list-item]
    assert [k.reason for k in knowing.candidates(model, "float16")] == [""]
    (made,) = knowing.compile(model)
    said = json.loads(made.record)
    assert {n: said["symbols"][n] for n in ("H", "HKV", "D", "DV")} == {"H": "4", "HKV": "2", "D": "64", "DV": "32"}
    assert said["shapes"]["value"] == ["B", "NK", "HKV", "DV"]
    assert said["outputs"]["output"] == ["query[0]", "query[1]", "4", "32"]


def test_the_default_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*capabilities: tuple[int, int]) -> tuple[int, ...]:
        gpus = tuple(env.Gpu("", c, 0) for c in capabilities)
        monkeypatch.setattr(kernel_kit, "cuda", lambda: ("13.0", gpus))
        return kernel_kit.default_architectures()

    assert here() == ARCHITECTURES
    assert here((9, 0)) == (90,)
    assert here((8, 7), (9, 0)) == (86, 90)
    assert here((10, 3)) == (100,)
    assert here((12, 1)) == (120,)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"triton, which compiles the kernels, is not installed") as caught:
        outputs.target("onnxruntime-cuda", "fp16")
    assert caught.value.hint == "pip install 'attncompile[gpu]'"


def test_the_registry() -> None:
    assert "onnxruntime-cuda" in base.names()
    assert isinstance(base.get("onnxruntime-cuda"), OnnxRuntimeCuda)


def test_the_command_line(tmp_path: Path) -> None:
    from attncompile.cli import _options

    assert _options(target="onnxruntime-cuda", arch=["sm_90a", "80"]).architectures == (80, 90)
    with pytest.raises(BadArguments, match=r"--arch is for targets with kernels"):
        _options(target="onnx", arch=["90"])
    with pytest.raises(BadArguments, match=r"--arch does not know '91'"):
        _options(target="onnxruntime-cuda", arch=["91"])
    assert replace(Options(), architectures=(80,)).architectures == (80,)
