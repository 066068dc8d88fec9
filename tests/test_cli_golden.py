"""What the command prints, word for word, against ``tests/golden/``. ``ATTNCOMPILE_UPDATE_GOLDEN=1 pytest`` rewrites
the files; read the diff before you commit it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import attncompile
from attncompile.cli import main
from attncompile.kernels import bundle
from tests.kernels.test_bundle import built

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("report_samples", HERE / "report_samples.py")
assert _spec is not None and _spec.loader is not None
samples: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)

TYPER = "0.29"
"""Typer lays help texts out a little differently in each of its versions; these are of this one."""
needs_typer = pytest.mark.skipif(
    not importlib.metadata.version("typer").startswith(TYPER + "."), reason=f"help texts are laid out by Typer {TYPER}"
)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "ATTNCOMPILE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with two-layer.onnx in it, whose layers look the same and whose head is no attention."""
    monkeypatch.chdir(tmp_path)
    dims: list[int | str] = ["batch", 4, "seq", 16]
    nodes = []
    value = "x"
    for layer in range(2):
        at = f"/layers.{layer}/attn/"
        nodes += [
            helper.make_node("Transpose", [value], [at + "kt"], at + "Transpose", perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [value, at + "kt"], [at + "raw"], at + "MatMul"),
            helper.make_node("Mul", [at + "raw", "scale"], [at + "scores"], at + "Mul"),
            helper.make_node("Softmax", [at + "scores"], [at + "p"], at + "Softmax", axis=-1),
            helper.make_node("MatMul", [at + "p", value], [at + "out"], at + "MatMul_1"),
        ]
        value = at + "out"
    nodes.append(helper.make_node("Softmax", [value], ["y"], "/head/Softmax", axis=-1))
    graph = helper.make_graph(
        nodes,
        "two-layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, dims)],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.25])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="golden")
    onnx.save(model, "two-layer.onnx")
    return tmp_path


def _normal(text: str) -> str:
    """Without what differs from run to run and machine to machine."""
    text = text.replace(str(Path.cwd()), "<DIR>").replace(attncompile.__version__, "<VERSION>")
    text = re.sub(r"sha256:[0-9a-f]{64}", "sha256:<HASH>", text)
    text = re.sub(r"\b\d+\.\d+ s\b", "<SECONDS> s", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _check(name: str, arguments: list[str], code: int, capfd: pytest.CaptureFixture[str]) -> None:
    got = main(arguments)
    out, err = capfd.readouterr()
    parts = [f"$ attncompile {' '.join(arguments)}"]
    parts += [_normal(out).rstrip("\n")] if out else []
    parts += ["--- stderr", _normal(err).rstrip("\n")] if err else []
    text = "\n".join([*parts, f"--- exit {got}"]) + "\n"
    path = HERE / "golden" / f"{name}.txt"
    if os.environ.get("ATTNCOMPILE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), "no golden file: run with ATTNCOMPILE_UPDATE_GOLDEN=1 and read what it wrote"
    assert text == path.read_text(encoding="utf-8")
    assert got == code


@needs_typer
@pytest.mark.parametrize(
    "verb",
    [
        "",
        "compile",
        "inspect",
        "explain",
        "plan",
        "verify",
        "profile",
        "fit",
        "kernels",
        "kernels build",
        "kernels list",
    ],  # fmt: skip,
)
def test_help(verb: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _check("-".join(["help", *verb.split()]), [*verb.split(), "--help"], 0, capfd)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("inspect", ["inspect", "two-layer.onnx"], 0),
        ("inspect-json", ["inspect", "two-layer.onnx", "--format", "json", "-q"], 0),
        ("explain", ["explain", "two-layer.onnx"], 0),
        ("explain-json", ["explain", "two-layer.onnx", "--node", "/head/Softmax", "--format", "json"], 0),
        ("explain-value", ["explain", "two-layer.onnx", "--node", "scale"], 0),
        ("explain-site", ["explain", "two-layer.onnx", "/layers.0/attn/Softmax"], 0),
        ("explain-near-miss", ["explain", "two-layer.onnx", "/head/Softmax"], 0),
        ("kernels-list", ["kernels", "list", "made.bundle"], 0),
        ("error-no-bundle", ["kernels", "list", "."], 2),
        ("error-kernels-verb", ["kernels", "biuld", "two-layer.onnx"], 2),
        ("plan", ["plan", "two-layer.onnx", "--profile", "seq=1:64:128,batch=1"], 0),
        ("verify", ["verify", "two-layer.onnx", "two-layer.onnx", "--profile", "seq=7,batch=1"], 0),
        ("error-missing-file", ["nowhere.onnx"], 2),
        ("error-not-onnx", ["inspect", "text.onnx"], 2),
        ("error-no-such-symbol", ["inspect", "two-layer.onnx", "--profile", "length=4"], 2),
        ("error-no-such-node", ["explain", "two-layer.onnx", "/layers.7/attn/Softmax"], 2),
        ("error-option", ["two-layer.onnx", "--polcy", "sparse"], 2),
        ("error-verb", ["inspct", "two-layer.onnx"], 2),
        ("error-policy", ["two-layer.onnx", "--policy", "fastest"], 2),
        ("error-plan-line", ["two-layer.onnx", "--plan", "bad.toml"], 2),
        ("error-plan-hash", ["two-layer.onnx", "--plan", "other.toml"], 2),
    ],
)
def test_output(name: str, arguments: list[str], code: int, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("text.onnx").write_text("this is no model\n" * 9, encoding="utf-8")
    head = 'schema_version = 1\nmodel_hash = "sha256:0"\npolicy = "exact"\n\n[[site]]\nid = "s"\n'
    Path("bad.toml").write_text(head + 'mecanism = "keep"\n', encoding="utf-8")
    bundle.write(Path("made.bundle"), built(), "3.9.0")
    Path("other.toml").write_text(head + 'mechanism = "keep"\n', encoding="utf-8")
    before = sorted(p.name for p in folder.iterdir())
    _check(name, arguments, code, capfd)
    after = sorted(p.name for p in folder.iterdir())
    assert after == sorted([*before, "two-layer.plan.toml"] if name == "plan" else before)


def test_explain_tells_all_that_was_understood(tmp_path: Path) -> None:
    """Made-up sites with everything that a site can have, word for word."""
    from attncompile.core.assumption import Assumption
    from attncompile.core.linear import LinearFacts
    from attncompile.core.mask import Certificate, MaskFacts, MaskPart
    from attncompile.core.plan import Decision
    from attncompile.core.site import Cache, NearMiss
    from attncompile.core.verdict import Verdict
    from attncompile.report_explain import Explanation, Explanations

    how = Certificate("evaluated", "every element compared at 12 lengths", tuple((n, n) for n in range(1, 13)), True)
    mask = MaskFacts(
        (MaskPart("window", how, left=255, right=0),
         MaskPart("padding", Certificate("structure", "from input mask"), source="mask"),
         MaskPart("bias", Certificate("evaluated", "12 values"), source="slopes", additive=True)), "zero", guarded=True,
    )  # fmt: skip
    full = dataclasses.replace(
        samples.site("decoder", mask), softcap=50.0, sinks="sink_logits", scope="If_7/then_branch", value_dim=128,
        cache=Cache("concat", "past.key", "past.value", "present.key", "present.value"), dtype="float16",
    )  # fmt: skip
    linear = dataclasses.replace(
        samples.site("efficient", MaskFacts()), kind="linear", quantised="int8, per tensor",
        linear=LinearFacts("relu", "relu", "sum", 1e-6, True, "chunked", "head"),
    )  # fmt: skip
    assumed = (Assumption("sizes", "seq is 1 to 4096", "checked at 1, 512, 4096"),)
    decision = Decision("decoder", "NeighborhoodAttention", "a window of 256", assumptions=assumed)
    verdicts = (("NeighborhoodAttention", Verdict.yes("a window")), ("Other", Verdict.no("mask", "no bias", "drop it")))
    candidates = (
        Explanation("decoder", full, None, verdicts, decision), Explanation("efficient", linear),
        Explanation("/gate/Softmax", near_miss=NearMiss("/gate/Softmax", "no values", "matmul-softmax-matmul", "v")),
    )  # fmt: skip
    text = "\n".join(Explanations("m.onnx", candidates).lines) + "\n"
    path = HERE / "golden" / "explain-all-facts.txt"
    if os.environ.get("ATTNCOMPILE_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["replaced", "unchanged", "rolled-back", "approximate"])
def test_compile_table(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """How a report is shown; the reports are made up, so that their times do not change."""
    from attncompile import pipeline
    from attncompile.report import Parity

    reports = {
        "replaced": samples.report(),
        "unchanged": samples.report(
            sites=(samples.kept("layers.0"), samples.kept("layers.1")), outcome="unchanged", parity=None, timings=()
        ),
        "rolled-back": samples.report(
            sites=(samples.site_report(rolled_back="not faster: ours / original 1.30 at usual"), samples.kept("head")),
            outcome="rolled_back", timings=(), failures=("1 replacements were rolled back (--strict)",), exit_code=1,
        ),
        "approximate": samples.report(
            sites=(samples.approximate("blocks.0"), samples.approximate("blocks.1"), samples.kept("blocks.2")),
            parity=Parity(True, "relative_l2", 0.01, 0.004, "inputs"),
        ),
    }  # fmt: skip
    monkeypatch.setattr(pipeline, "compile", lambda path, options, progress: reports[name])
    _check(f"compile-{name}", ["two-layer.onnx"], reports[name].exit_code, capfd)
