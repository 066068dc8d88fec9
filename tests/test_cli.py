"""The command line's contract: what goes to which stream, exit codes, and two lines for whatever is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
from onnx import TensorProto, helper

import attncompile
from attncompile.cli import VERBS, main
from attncompile.core.errors import BadModel, GateFailed, MissingDependency, TargetError
from attncompile.core.profile import Range
from attncompile.report import schema
from attncompile.targets.engine import EngineOptions

_spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("report_samples.py"))
assert _spec is not None and _spec.loader is not None
samples: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)

ROOT = Path(attncompile.__file__).parent.parent


@dataclasses.dataclass
class Fake:
    """Stands for ``attncompile.pipeline``: records the options, returns or raises what a test puts in."""

    result: Any = None
    error: BaseException | None = None
    calls: list[tuple[Path, Any]] = dataclasses.field(default_factory=list)

    def compile(self, path: Path, options: Any, progress: Any) -> Any:
        self.calls.append((path, options))
        progress.stage("detect", 2)
        progress.advance()
        progress.note("a note")
        print("a library's chatter")
        os.write(1, b"chatter from C++\n")
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def options(self) -> Any:
        assert len(self.calls) == 1
        return self.calls[0][1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    double = Fake(samples.report())
    module = types.ModuleType("attncompile.pipeline")
    fields = (
        ("policy", "exact"), ("target", None), ("out", None), ("inputs", None), ("profile", {}), ("max_error", None),
        ("metric", "relative_l2"), ("dry_run", False), ("plan", None), ("require_sites", None), ("strict", False),
        ("keep_slower", False), ("precision", None), ("grid", None), ("threads", None), ("hash_weights", False),
        ("seed", 0), ("sites", ()), ("architectures", ()), ("fusions", True), ("half_norms", True), ("density", None),
        ("keep_dense", None), ("jobs", None), ("executor", "local"), ("provider", "cpu"), ("fitted", None),
        ("engine", EngineOptions()),
    )  # fmt: skip
    made = [(name, Any, dataclasses.field(default_factory=lambda value=value: value)) for name, value in fields]
    module.Options = dataclasses.make_dataclass("Options", made, frozen=True)  # type: ignore[attr-defined]
    module.compile = double.compile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attncompile.pipeline", module)
    monkeypatch.setattr(attncompile, "pipeline", module, raising=False)
    return double


def test_the_fake_has_the_real_options(fake: Fake) -> None:
    main(["m.onnx"])
    given = {f.name: getattr(fake.options, f.name) for f in dataclasses.fields(fake.options)}
    spec = importlib.util.spec_from_file_location("real_pipeline", ROOT / "attncompile" / "pipeline.py")
    assert spec is not None and spec.loader is not None
    real = importlib.util.module_from_spec(spec)
    sys.modules["real_pipeline"] = real  # dataclasses look their module up
    try:
        spec.loader.exec_module(real)
    finally:
        del sys.modules["real_pipeline"]
    assert {f.name: getattr(real.Options(), f.name) for f in dataclasses.fields(real.Options)} == given


# -- compile -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["m.onnx"], ["compile", "m.onnx"], ["--policy", "exact", "m.onnx"]])
def test_a_model_alone_is_compiled(fake: Fake, arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert fake.calls[0][0] == Path("m.onnx")


def test_every_option_arrives(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "in.npz").touch()
    (tmp_path / "p.toml").touch()
    arguments = (
        f"m.onnx --policy sparse --target onnxruntime-cuda -o out --inputs {tmp_path}/in.npz --profile seq=1:512:4096 "
        f"--shapes batch=2,x=1:1:3 --max-error 0.02 --metric kl --plan {tmp_path}/p.toml --require-sites 3 --strict "
        "--keep-slower --bf16 --grid 14x14+1 --threads 4 --hash-weights --seed 7 --site a --site b --arch 90 --quiet "
        "--engine-profile seq=1 --engine-profile seq=2:4:8 --workspace 2G --timing-cache t --weight-streaming --refit "
        "--engine-level 4 --no-fusions --no-half-norms --jobs 3 --executor ray --provider cuda --keep-dense t>1"
    )
    assert main(arguments.split()) == 0
    assert {f.name: getattr(fake.options, f.name) for f in dataclasses.fields(fake.options)} == {
        "policy": "sparse", "target": "onnxruntime-cuda", "out": Path("out"), "inputs": tmp_path / "in.npz",
        "profile": {"seq": Range(1, 512, 4096), "batch": Range(2, 2, 2), "x": Range(1, 1, 3)}, "max_error": 0.02,
        "metric": "kl", "dry_run": False, "plan": tmp_path / "p.toml", "require_sites": 3, "strict": True,
        "keep_slower": True, "precision": "bf16", "grid": "14x14+1", "threads": 4, "hash_weights": True, "seed": 7,
        "sites": ("a", "b"), "architectures": (90,), "fusions": False, "half_norms": False,
        "density": None, "keep_dense": "t>1", "jobs": 3, "executor": "ray", "fitted": None,
        "provider": "cuda",
        "engine": EngineOptions(
            2 << 30, Path("t"), True, True, 4, ({"seq": Range(1, 1, 1)}, {"seq": Range(2, 4, 8)})
        ),
    }  # fmt: skip


def test_options_do_not_leak_between_calls(fake: Fake) -> None:
    main(["m.onnx", "--site", "a", "--profile", "seq=8"])
    main(["m.onnx"])
    assert fake.calls[1][1].sites == ()
    assert fake.calls[1][1].profile == {}


def test_stdout_is_json_and_nothing_else(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["m.onnx", "--format", "json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["outcome"] == "replaced"
    for words in (
        "a library's chatter",
        "chatter from C++",
        "detect (2)",
        "a note",
        "warning: the profile was assumed",
    ):
        assert words in err
    assert "wrote model.attncompile" in err


def test_table_on_stdout(fake: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # some test runners export a narrow terminal
    assert main(["m.onnx", "-q"]) == 0
    out, err = capfd.readouterr()
    assert "NeighborhoodAttention" in out
    assert "detect" not in err and "wrote" not in err
    assert "warning: the profile was assumed" in err, "--quiet hides progress, not warnings"


def test_failed_gates_exit_1(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    fake.result = samples.report(failures=("--strict: layers.0 was rolled back",), exit_code=1)
    assert main(["m.onnx"]) == 1
    out, err = capfd.readouterr()
    assert "error: --strict: layers.0 was rolled back" in err
    assert "layers.0" in out, "the table is printed all the same"


# -- errors ------------------------------------------------------------------------------------------------------------


def _error(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int) -> tuple[str, str]:
    """Run, demand the exit code, two lines at the end of stderr, an empty stdout; return message and hint."""
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    hint = ""
    if lines[-1].startswith("hint: "):
        hint = lines.pop().removeprefix("hint: ")
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: "), hint


@pytest.mark.parametrize(
    ("error", "code", "message", "hint"),
    [
        (BadModel("m.onnx is empty", "export it again"), 2, "m.onnx is empty", "export it again"),
        (BadModel("two\nlines", "three\nmore\nlines"), 2, "two lines", "three more lines"),
        (GateFailed("parity: 0.3 > 0.01", "raise --max-error"), 1, "parity: 0.3 > 0.01", "raise --max-error"),
        (MissingDependency("no tensorrt_rtx", "pip install it"), 2, "no tensorrt_rtx", "pip install it"),
        (TargetError("refused"), 2, "refused", ""),
        (PermissionError(13, "Permission denied", "/out"), 2, "/out: Permission denied", "check the path"),
        (OSError(28, "No space left on device"), 2, "No space left on device", "free space"),
        (MemoryError(), 2, "out of memory", "smaller shapes"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "'torch' is not installed", "pip install"),
    ],
)
def test_errors_are_two_lines(
    fake: Fake, capfd: pytest.CaptureFixture[str], error: Exception, code: int, message: str, hint: str
) -> None:
    fake.error = error
    got_message, got_hint = _error(capfd, ["m.onnx", "-q"], code)
    assert message in got_message
    assert hint in got_hint
    assert bool(hint) == bool(got_hint)


@pytest.mark.parametrize("error", [ValueError("odd\nthing"), KeyError("x"), OSError(5, "I/O error"), AssertionError()])
def test_a_bug_is_called_one(
    fake: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.delenv("ATTNCOMPILE_DEBUG", raising=False)
    fake.error = error
    message, hint = _error(capfd, ["m.onnx"], 2)
    assert type(error).__name__ in message
    assert "this is a bug in attncompile" in message
    assert "ATTNCOMPILE_DEBUG=1" in hint


@pytest.mark.parametrize("error", [ValueError("odd"), BadModel("bad")])
def test_debug_shows_the_traceback(fake: Fake, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setenv("ATTNCOMPILE_DEBUG", "1")
    fake.error = error
    with pytest.raises(type(error)):
        main(["m.onnx"])


def test_interrupt_exits_130(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    fake.error = KeyboardInterrupt()
    assert main(["m.onnx", "-q"]) == 130
    assert capfd.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["compile"], "Missing argument 'MODEL'", "see 'attncompile compile --help'"),
        (["m.onnx", "--polcy", "sparse"], "No such option: --polcy", "--policy"),
        (["inspct", "m.onnx"], "'inspct' is neither a verb nor a file", "did you mean 'attncompile inspect'?"),
        (["modelx"], "'modelx' is neither a verb nor a file", "the verbs are compile, inspect"),
        (["m.onnx", "other.onnx"], "unexpected extra argument", "see 'attncompile compile --help'"),
        (["explain"], "Missing argument 'MODEL'", "see 'attncompile explain --help'"),
        (["explain", "m.onnx", "one", "--node", "two"], "two nodes were given", "keep one"),
        (["m.onnx", "--threads", "0"], "Invalid value for '--threads'", "--help"),
        (["m.onnx", "--max-error", "much"], "Invalid value for '--max-error'", "--help"),
        (["m.onnx", "--max-error", "-1"], "--max-error -1.0", "0 or more"),
        (["m.onnx", "--max-error", "nan"], "--max-error nan", "0 or more"),
        (["m.onnx", "--max-error", "inf"], "--max-error inf", "finite"),
        (["m.onnx", "--max-error", "1.5", "--metric", "cosine"], "no model has a cosine above 1", "0 to 1"),
        (["m.onnx", "--require-sites", "-1"], "--require-sites", "must be found"),
        (["m.onnx", "--profile", "seq"], "--profile 'seq' has no '='", "seq=1:512:4096"),
        (["m.onnx", "--profile", "seq=1:2"], "'seq=1:2' is not one size, nor three", "seq=1:512:4096"),
        (["m.onnx", "--profile", "seq=a:b:c"], "'seq=a:b:c'", "seq=1:512:4096"),
        (["m.onnx", "--profile", "seq=4:2:8"], "4:2:8 is not increasing", "MIN:USUAL:MAX"),
        (["m.onnx", "--profile", "seq=0"], "0:0:0 is not increasing", "MIN:USUAL:MAX"),
        (["m.onnx", "--profile", "seq=1", "--shapes", "seq=2"], "gives 'seq' twice", "keep one"),
        (["m.onnx", "--grid", "14by14"], "--grid '14by14' is not a grid", "14x14+1"),
        (["m.onnx", "--fp16", "--bf16"], "--fp16 and --bf16 exclude each other", "choose"),
        (["m.onnx", "--target", "tensort"], "--target does not know 'tensort'", "did you mean 'tensorrt'?"),
        (["m.onnx", "--metric", "rmse"], "--metric does not know 'rmse'", "relative_l2"),
        (["m.onnx", "--format", "yaml"], "--format does not know 'yaml'", "table, json"),
        (["m.onnx", "--inputs", "nowhere.npz"], "nowhere.npz does not exist", "check the path"),
        (["m.onnx", "--plan", "nowhere.toml"], "nowhere.toml does not exist", "check the path"),
    ],
)
def test_bad_arguments(
    fake: Fake, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str, hint: str
) -> None:
    got_message, got_hint = _error(capfd, arguments, 2)
    assert message in got_message
    assert hint in got_hint
    assert fake.calls == []


def test_no_arguments_print_help_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Usage: attncompile" in err


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"attncompile {attncompile.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"Usage: attncompile {verb}")
    assert err == ""


# -- on real files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """softmax(q k^T / 4) v with q, k, v [batch, 2, seq, 16], causal by a stored mask of no length: none."""
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    return _write_model(path)


def _write_model(path: Path, scale: float = 0.25) -> Path:
    def tensor(name: str, dims: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    shape: list[int | str] = ["batch", 2, "seq", 16]
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["k"], ["kt"], "/attn/Transpose", perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "kt"], ["raw"], "/attn/MatMul"),
            helper.make_node("Mul", ["raw", "scale"], ["scores"], "/attn/Mul"),
            helper.make_node("Softmax", ["scores"], ["p"], "/attn/Softmax", axis=-1),
            helper.make_node("MatMul", ["p", "v"], ["o"], "/attn/MatMul_1"),
            helper.make_node("Softmax", ["o"], ["y"], "/head/Softmax", axis=-1),
        ],
        "tiny",
        [tensor(n, shape) for n in "qkv"],
        [tensor("y", shape)],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(path))
    return path


def test_inspect_json(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(s["heads"], s["head_dim"], s["mask"]["kind"], s["kind"]) for s in found["sites"]] == [
        (2, 16, "none", "softmax")
    ]
    assert found["sites"][0]["scale"] == pytest.approx(0.25)
    for key in ("id", "scope", "kind", "form", "kv_heads", "query_length", "key_length", "grid", "nodes", "output"):
        assert key in found["sites"][0]
    assert found["near_misses"], "the head's softmax is no attention, and that is said"
    assert {"node", "reason", "nearest_form"} <= set(found["near_misses"][0])
    assert found["model"]["opset"] == 18
    assert found["model"]["hash"].startswith("sha256:")
    assert found["profile"]["seq"]["assumed"] is True


def test_explain(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(model), "/attn/Softmax"]) == 0
    assert "belongs to site" in capfd.readouterr().out
    assert main(["explain", str(model), "/head/Softmax", "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["site"] is None
    assert found["near_miss"]["reason"]
    message, hint = _error(capfd, ["explain", str(model), "nothing"], 2)
    assert "nothing" in message
    assert "inspect" in hint


def test_plan_writes_a_plan(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from attncompile.core.plan_toml import loads

    path = tmp_path / "new" / "my.toml"
    assert main(["plan", str(model), "-o", str(path), "--format", "json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    written = loads(path.read_text(encoding="utf-8"))
    assert [d.site for d in written.decisions] == [s["id"] for s in shown["sites"]]
    assert written.model_hash == shown["model_hash"]
    assert [p.name for p in path.parent.iterdir()] == ["my.toml"]
    assert main(["compile", str(model), "--dry-run", "--out", str(tmp_path / "dry")]) == 0
    assert loads((tmp_path / "dry" / "plan.toml").read_text(encoding="utf-8")) == written
    assert [p.name for p in (tmp_path / "dry").iterdir()] == ["plan.toml"]


def test_compile_with_nothing_to_win(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "OUT"
    arguments = [str(model), "--target", "onnx", "-o", str(out), "--profile", "seq=4:8:16,batch=1", "--threads", "1"]
    assert main([*arguments, "--format", "json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    jsonschema.Draft202012Validator(schema()).validate(shown)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == shown
    assert shown["outcome"] == "unchanged"
    assert shown["sites"][0]["decision"]["reason"], "why the site was kept"
    assert (out / "model.onnx").read_bytes() == model.read_bytes()
    assert main([*arguments, "--require-sites", "2"]) == 1
    got = capfd.readouterr()
    assert got.out.splitlines()[-1].startswith("unchanged: nothing to win at 1 attention site")
    assert got.err.splitlines()[-1].startswith("error: 1 attention site")


def test_plan_gate(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(model), "-q", "-o", str(tmp_path), "--require-sites"]
    assert main([*arguments, "1"]) == 0
    capfd.readouterr()
    assert main([*arguments, "2"]) == 1
    assert "--require-sites" in capfd.readouterr().err


def test_verify(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model), str(model), "--profile", "seq=2:5:9,batch=1"]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("equal within relative_l2")
    assert all(f"seq={n}" in out for n in (2, 5, 9))
    other = _write_model(tmp_path / "other.onnx", scale=2.0)
    assert main(["verify", str(model), str(other), "--profile", "seq=2:5:9,batch=1", "--format", "json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] is False
    assert found["evidence"] == "seeded"
    assert len(found["shapes"]) == 3
    assert main(["verify", str(model), str(other), "--profile", "seq=5,batch=1", "--max-error", "10"]) == 0


def test_verify_needs_a_budget_for_other_metrics(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message, hint = _error(capfd, ["verify", str(model), str(model), "--metric", "cosine", "-q"], 2)
    assert "no default budget" in message
    assert "--max-error" in hint


def test_bench(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(model), str(model), "--profile", "seq=8:8:16,batch=1", "--rounds", "6", "--threads", "1"]
    assert main([*arguments, "--format", "json"]) == 0
    shapes = json.loads(capfd.readouterr().out)["shapes"]
    assert [(s["label"], s["bindings"]["seq"], s["rounds"]) for s in shapes] == [("usual", 8, 6), ("max", 16, 6)]
    assert all(s["original_seconds"] > 0 for s in shapes)


def test_profile(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", str(model), "--profile", "seq=4:32:64,batch=1", "--runs", "2", "--threads", "1"]
    assert main([*arguments, "--top", "3"]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("usual: batch=1, seq=32; 1 threads; ")
    assert "layer of tiny.onnx" in out
    assert main([*arguments, "--format", "json"]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert alone["other"] is None and alone["other_times"] is None
    assert len(alone["sites"]) == 1
    assert 0 < alone["sites"][0]["microseconds"] <= sum(x["microseconds"] for x in alone["times"]["layers"])
    assert {x["site"] for x in alone["times"]["layers"]} == {"", alone["sites"][0]["id"]}, "the head is outside"
    assert main([arguments[0], str(model), *arguments[1:], "--format", "json"]) == 0
    both = json.loads(capfd.readouterr().out)
    assert both["sites"][0]["gain"] > 0
    assert both["other_times"]["total_microseconds"] > 0


@pytest.mark.parametrize("verb", ["compile", "inspect", "plan", "explain", "verify", "bench", "profile"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"", "is empty"), (b"not a model" * 9, "ONNX"), ("cut", "ONNX")],
)
def test_bad_files(
    verb: str, content: bytes | str | None, message: str, model: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(model.read_bytes()[:-40] if isinstance(content, str) else content)
    more = {"explain": ["node"], "verify": [str(model)], "bench": [str(model)]}.get(verb, [])
    got_message, hint = _error(capfd, [verb, str(path), *more], 2)
    assert message in got_message
    assert hint
    assert [p.name for p in tmp_path.iterdir()] == (["m.onnx"] if content is not None else []), "nothing is written"


# -- processes ---------------------------------------------------------------------------------------------------------

_HEAVY = ("torch", "triton", "tensorrt", "tensorrt_rtx", "transformers")


def _modules_of(arguments: list[str], cwd: Path) -> set[str]:
    code = (
        "import sys\nfrom attncompile.cli import main\n"
        f"code = main({arguments!r})\n"
        "print('MODULES', *(m for m in sys.modules if '.' not in m), file=sys.stderr)\nsys.exit(code)\n"
    )
    done = _python(["-c", code], cwd)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("MODULES"))
    return set(line.split()[1:])


def _python(arguments: list[str], cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, timeout=120, **more
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compile", "--help"], ["--version"], ["env"], ["inspect", "MODEL"], ["plan", "MODEL"]]
)
def test_no_framework_is_imported(arguments: list[str], model: Path, tmp_path: Path) -> None:
    loaded = _modules_of([str(model) if a == "MODEL" else a for a in arguments], tmp_path)
    assert not loaded & set(_HEAVY)
    if "--help" in arguments or "--version" in arguments:
        assert not loaded & {"onnx", "numpy", "polygraphy", "onnxruntime"}


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "MODEL"], ["env"]])
def test_works_where_no_framework_is_installed(arguments: list[str], model: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"for name in {_HEAVY!r}: sys.modules[name] = None\n"
        "from attncompile.cli import main\n"
        f"sys.exit(main({[str(model) if a == 'MODEL' else a for a in arguments]!r}))\n"
    )
    done = _python(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr


def test_help_is_quick(tmp_path: Path) -> None:
    """In seconds of the processor: the clock would tell what else the machine does."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        start = spent()
        assert _python(["-m", "attncompile", "--help"], tmp_path).returncode == 0
        seconds.append(spent() - start)
    assert min(seconds) < 0.5


def test_a_closed_pipe_is_no_error(model: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m attncompile inspect {model} --format json | head -c 10; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] in ("0", "141"), "0 where the pipe's buffer took it all"


def test_stdout_closed_early(tmp_path: Path) -> None:
    # A reader that is gone before the first byte: the write itself fails.
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "attncompile", "env"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=write, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    finally:
        os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("sent", "code_of", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")],
)
def test_signals_end_cleanly(tmp_path: Path, sent: signal.Signals, code_of: int, said: str) -> None:
    """As an exception does: folders that were begun are removed on the way out."""
    code = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background ignores it
        "import attncompile\n"
        "fake = types.ModuleType('attncompile.pipeline')\n"
        "fake.Options = lambda **k: k\n"
        "def compile(path, options, progress):\n"
        "    progress.stage('long', 3)\n"
        "    try: print('ready', file=sys.stderr, flush=True); time.sleep(60)\n"
        "    finally: print('tidied', file=sys.stderr, flush=True)\n"
        "fake.compile = compile\n"
        "sys.modules['attncompile.pipeline'] = attncompile.pipeline = fake\n"
        "from attncompile.cli import main\n"
        "sys.exit(main(['m.onnx']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "ready" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code_of
    assert out == ""
    assert err.splitlines()[-2:] == ["tidied", said]
    assert "Traceback" not in err


@pytest.mark.parametrize("variable", [{}, {"NO_COLOR": "1"}])
def test_colours(
    fake: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich can tell
    monkeypatch.setenv("TERM", "xterm-256color")
    main(["m.onnx", "-q"])
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    out = capfd.readouterr().out
    assert "\x1b[1m" in out, "headings are bold on a terminal"
    if variable:
        assert not colour.search(out)


@pytest.mark.parametrize("verb", ["verify", "bench", "profile"])
def test_files_with_other_inputs_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    """Two models of different inputs cannot be run on the same feed: said in one line, before anything is run."""
    paths = []
    for name in ("x", "pixels"):
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in (name, "y")]
        graph = helper.make_graph([helper.make_node("Relu", [name], ["y"])], "g", info[:1], info[1:])
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), paths[-1])
    message, hint = _error(capfd, [verb, str(paths[0]), str(paths[1]), "--quiet"], 2)
    assert message == "pixels.onnx takes input 'pixels', which x.onnx does not have"
    assert hint == "give two files of the same model"


def test_equal_roll_backs_are_one_warning(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    warnings = ("a was rolled back: slow", "b was rolled back: wrong", "c was rolled back: slow", "something else")
    fake.result = samples.report(warnings=warnings)
    assert main(["m.onnx", "--quiet"]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert lines == [
        "warning: a, c were rolled back: slow", "warning: b was rolled back: wrong", "warning: something else",
    ]  # fmt: skip
