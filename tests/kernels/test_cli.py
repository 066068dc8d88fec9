"""``attncompile kernels`` from models to bundles, and every way to ask for what cannot be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import jsonschema
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile import pipeline
from attncompile.cli import main
from attncompile.core import plan_toml
from attncompile.core.kernel import ARCHITECTURES
from attncompile.kernels import bundle
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.records import Built
from attncompile.kernels.schema import schema
from tests.exports import exported
from tests.kernels.conftest import made_up
from tests.kernels.test_bundle import built

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


@pytest.fixture
def plain(folder: Path) -> Path:
    """A model without attention."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "plain.onnx"
    )
    return folder / "plain.onnx"


@needs_triton
def test_from_a_model_to_a_bundle(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Planned as ``compile`` does; the same from the folder that holds the replaced model; the same twice."""
    shutil.copy(exported("gpt2"), folder / "gpt2.onnx")
    assert main(["kernels", "build", "gpt2.onnx", "--arch", "90", "--arch", "sm_80", "-q"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.count("triton-bm") == 4 and "sm_90" in out and "float16" in out
    made = Bundle.open(folder / "gpt2.bundle")
    assert {e.architecture for e in made.entries.values()} == {80, 90}
    assert [n["name"] for n in made.index["nodes"]] == ["Attention/site0", "Attention/site1"]
    key = made.call_of("Attention/site0")
    assert made.kernels(key, 90) and key == made.call_of("Attention/site1")

    options = pipeline.Options()
    found = pipeline.inspect(folder / "gpt2.onnx", options)
    assert not isinstance(found.normal, Exception)
    from attncompile.passes import replace

    model = replace.apply(found.normal, [(e.site, e.lowering) for e in pipeline.edits(found, options)])
    (folder / "out").mkdir()
    onnx.save(model, folder / "out" / "model.onnx")
    arguments = ["kernels", "build", "out", "--arch", "90", "--arch", "80", "--format", "json"]
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert "compile kernels (4)" in err and "wrote out/bundle" in err
    jsonschema.validate(json.loads(out), schema())
    files = {p.relative_to(folder / "out/bundle"): p.read_bytes() for p in (folder / "out/bundle").rglob("*.*")}
    assert files == {p.relative_to(made.folder): p.read_bytes() for p in made.folder.rglob("*.*")}
    assert main(["kernels", "list", "out"]) == 0
    assert capfd.readouterr().out.count("triton-bm") == 4

    assert main([*arguments[:3], "--plan", "plan.toml"]) == 2
    (folder / "plan.toml").write_text(plan_toml.dumps(pipeline.plan(found, options)))
    capfd.readouterr()
    assert main([*arguments[:3], "--plan", "plan.toml"]) == 2
    assert "out/model.onnx was compiled already, so --plan does not apply" in capfd.readouterr().err
    assert main(["kernels", "build", "gpt2.onnx", "--plan", "plan.toml", "--arch", "80", "--dtype", "bfloat16"]) == 0
    assert {e.dtype for e in Bundle.open(folder / "gpt2.bundle").entries.values()} == {"bfloat16"}


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        ([], "neither a MODEL nor --all was given", "attncompile kernels build MODEL"),
        (["nowhere.onnx"], "nowhere.onnx does not exist", "check the path"),
        (["plain.onnx"], "no attention of plain.onnx is replaced by an op of ours", "attncompile plan plain.onnx"),
        (["empty"], "empty holds no model.onnx", "a folder that compile wrote"),
        (["text.onnx"], "text.onnx is not a readable ONNX file", "export the model again"),
        (["plain.onnx", "--arch", "91"], "--arch does not know '91'", "80, 86, 89, 90, 100, 120"),
        (["plain.onnx", "--dtype", "float32"], "--dtype does not know 'float32'", "float16"),
        (["plain.onnx", "--format", "yaml"], "--format does not know 'yaml'", "table"),
        (["plain.onnx", "--plan", "nowhere.toml"], "--plan: nowhere.toml does not exist", "check the path"),
        (["plain.onnx", "--out", "full"], "full exists, is not empty and was not written", "name another folder"),
        (["plain.onnx", "--policy", "fastest"], "fastest", ""),
    ],
)
def test_what_cannot_be_built(
    arguments: list[str], said: str, hint: str, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("text.onnx").write_text("this is no model\n" * 9)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(plain.parent.rglob("*"))
    assert main(["kernels", "build", "-q", *arguments]) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2 and said in lines[0] and hint in lines[1], err
    assert sorted(plain.parent.rglob("*")) == before


@needs_triton
def test_nodes_without_a_kernel(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Listed beside those with one; an error where there is no other."""

    def save(*ops: str) -> None:
        nodes = [
            helper.make_node(op, ["x", "x", "x"], [f"y{i}"], f"node{i}", domain="attncompile", scale=0.5)
            for i, op in enumerate(ops)
        ]
        shape = [1, 9, 2, 16]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape) for i in range(len(ops))],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("attncompile", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), "model.onnx")

    save("PooledAttention", "Attention")
    assert main(["kernels", "build", "model.onnx", "--arch", "80", "-q"]) == 0
    out, _ = capfd.readouterr()
    assert "node0" in out and "there is no GPU kernel for PooledAttention" in out
    nodes = Bundle.open(folder / "model.bundle").index["nodes"]
    assert [(n["name"], bool(n["call"])) for n in nodes] == [("node0", False), ("node1", True)]
    save("PooledAttention")
    assert main(["kernels", "build", "model.onnx", "--arch", "80", "-q"]) == 2
    assert "there is no kernel to compile: node0: there is no GPU kernel" in capfd.readouterr().err


def test_without_triton(plain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    assert main(["kernels", "build", "plain.onnx", "-q"]) == 2
    assert "hint: pip install 'attncompile[gpu]'" in capfd.readouterr().err
    bundle.write(Path("made"), built(), "3.9.0")
    assert main(["kernels", "list", "made"]) == 0, "bundles are read without it"


def test_all_asks_for_the_standard_matrix(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from attncompile.kernels import build, compiler

    asked = {}

    def pretend(nodes, further, kernels, architectures, *rest):
        asked["calls"], asked["architectures"] = further, architectures
        return Built({made_up().id: made_up()}, ())

    monkeypatch.setattr(compiler, "require_triton", lambda: "3.9.0")
    monkeypatch.setattr(build, "build", pretend)
    assert main(["kernels", "build", "--all", "-q"]) == 0
    assert len(asked["calls"]) == 176 and asked["architectures"] == ARCHITECTURES
    assert (folder / "standard.bundle" / "bundle.json").is_file()
    assert main(["kernels", "build", "--all", "-q", "--dtype", "bfloat16", "--arch", "90a"]) == 0
    assert len(asked["calls"]) == 88 and asked["architectures"] == (90,)
    capfd.readouterr()


def test_a_damaged_bundle(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle.write(Path("made"), built(), "3.9.0")
    next(Path("made/kernels").glob("*.cubin")).write_bytes(b"")
    assert main(["kernels", "list", "made"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and ".cubin: its contents are not those of the index (0 bytes)" in err
    assert main(["kernels", "list", "nowhere"]) == 2
    assert "nowhere is no bundle: it has no bundle.json" in capfd.readouterr().err
