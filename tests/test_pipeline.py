"""The main job on every recipe, on the CPU: what is written is proved, not slower, and says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from attncompile import outputs, pipeline, report
from attncompile.core import plan_toml
from attncompile.core.errors import BadArguments
from attncompile.core.mechanism import Lowering
from attncompile.core.profile import Range
from attncompile.models import NAMES
from attncompile.pipeline import Options
from tests.exports import exported
from tests.passes.attention_graphs import Spec, build, save
from tests.passes.test_replace import feed_of

BRIEF = pytest.mark.usefixtures("brief")
"""Of tests whose outcome does not depend on what is faster."""

WINDOWED = Spec(batch=1, heads=2, kv_heads=2, length=700, head_dim=16, mask="window", left=15, right=0, scale=0.25)


def windowed(folder: Path, spec: Spec = WINDOWED) -> Path:
    return save(build(spec), folder, "windowed.onnx")


@BRIEF
@pytest.mark.parametrize("name", [n for n in NAMES if n != "minilm"])
def test_every_recipe(tmp_path: Path, name: str) -> None:
    """Where nothing is won (all but Mistral's window), the file is byte-identical and every site says why."""
    path = exported(name)
    out = tmp_path / "out"
    result = pipeline.compile(path, Options(policy="sparse", target="onnx", out=out))
    assert result.exit_code == 0 and result.sites
    jsonschema.validate(json.loads((out / "report.json").read_text()), report.schema())
    assert sorted(p.name for p in out.iterdir() if p.name != "polygraphy") == [
        "model.onnx",
        "plan.toml",
        "report.html",
        "report.json",
    ]
    if not result.replaced:
        assert (out / "model.onnx").read_bytes() == path.read_bytes()
        assert all(s.decision.reason or s.rolled_back for s in result.sites)
    assert any("no --inputs" in w for w in result.warnings)


def test_a_window_is_replaced_proved_and_faster(tmp_path: Path) -> None:
    path, out = windowed(tmp_path), tmp_path / "out"
    result = pipeline.compile(path, Options(target="onnx", out=out))
    (site,) = result.sites
    assert result.outcome == "replaced" and site.decision.mechanism == "NeighborhoodAttention"
    assert site.exactness is not None and site.exactness.passed and site.exactness.cases >= 3
    assert result.parity is not None and result.parity.passed and result.parity.evidence == "seeded"
    assert result.timings[0].timing.faster and not result.approximate
    made = onnx.load(out / "model.onnx")
    onnx.checker.check_model(made)
    assert [n.op_type for n in made.graph.node if n.domain == "attncompile"] == ["NeighborhoodAttention"]
    assert not any(n.op_type == "Softmax" for n in made.graph.node)
    assert (out / "polygraphy").is_dir() and not list(out.glob(".*"))
    original = onnx.load(path)
    assert made.graph.input == original.graph.input and made.graph.output == original.graph.output
    feed = feed_of(original, 5)
    ours, theirs = (ort.InferenceSession(p).run(None, feed)[0] for p in (out / "model.onnx", path))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@BRIEF
def test_dynamic_length_is_right_at_every_length(tmp_path: Path) -> None:
    spec = Spec(batch=1, heads=2, kv_heads=1, length=300, head_dim=16, mask="window", left=15, right=0, dynamic=True)
    path, out = windowed(tmp_path, spec), tmp_path / "out"
    options = Options(target="onnx", out=out, profile={"n": Range(1, 400, 900), "b": Range(1, 1, 2)}, keep_slower=True)
    result = pipeline.compile(path, options)
    assert result.outcome == "replaced", result.warnings
    sessions = [ort.InferenceSession(p) for p in (path, out / "model.onnx")]
    for length in (1, 2, 15, 16, 17, 63, 64, 65, 129, 257, 900):
        x = np.random.default_rng(length).standard_normal((2, length, 32)).astype(np.float32)
        before, after = (s.run(None, {"x": x})[0] for s in sessions)
        assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before), length


@BRIEF
def test_a_wrong_mechanism_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is off by one looks almost right: the site's check must find it and the file stay as it was."""
    from attncompile.plugins.neighborhood.mechanism import NeighborhoodAttention

    right = NeighborhoodAttention.lower

    def off_by_one(self, site, parameters, opset) -> Lowering:  # type: ignore[no-untyped-def]
        changed = {**parameters, "left": [parameters["left"][0] - 1], "kernel_size": [parameters["kernel_size"][0] - 1]}
        return right(self, site, changed, opset)

    monkeypatch.setattr(NeighborhoodAttention, "lower", off_by_one)
    path, out = windowed(tmp_path), tmp_path / "out"
    result = pipeline.compile(path, Options(target="onnx", out=out))
    assert result.outcome == "rolled_back" and "not exact" in result.sites[0].rolled_back
    assert result.exit_code == 0 and any("rolled back" in w for w in result.warnings)
    assert (out / "model.onnx").read_bytes() == path.read_bytes()
    strict = pipeline.compile(path, Options(target="onnx", out=out, strict=True))
    assert strict.exit_code == 1


def test_a_slower_mechanism_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan can ask for what does not pay; it is undone unless --keep-slower."""
    spec = Spec(batch=1, heads=2, kv_heads=2, length=40, head_dim=16, mask="window", left=30, right=0)
    path, out, plan_file = windowed(tmp_path, spec), tmp_path / "out", tmp_path / "plan.toml"
    plan = pipeline.plan(pipeline.inspect(path, Options()), Options())
    assert plan.decisions[0].kept
    forced = plan_toml.dumps(plan).replace('mechanism = "keep"', 'mechanism = "NeighborhoodAttention"')
    parameters = '[site.parameters]\nkernel_size = [31]\nleft = [30]\ncausal = [1]\nborder = "truncate"\ngrid = [-1]\n'
    plan_file.write_text(forced + "\n" + parameters + 'masked_rows = "zero"\nblock = 64\ndense_below = 0\n')
    result = pipeline.compile(path, Options(target="onnx", out=out, plan=plan_file))
    assert result.outcome == "rolled_back" and "not faster" in result.sites[0].rolled_back
    kept = pipeline.compile(path, Options(target="onnx", out=out, plan=plan_file, keep_slower=True))
    assert kept.outcome == "replaced" and kept.parity is not None and kept.parity.passed


def test_plan_round_trip_and_wrong_plans(tmp_path: Path) -> None:
    path, out = windowed(tmp_path), tmp_path / "out"
    plan = pipeline.plan(pipeline.inspect(path, Options()), Options())
    text = plan_toml.dumps(plan)
    plan_file = tmp_path / "plan.toml"

    def compiled(changed: str) -> report.Report:
        plan_file.write_text(changed)
        return pipeline.compile(path, Options(target="onnx", out=out, plan=plan_file))

    assert compiled(text).outcome == "replaced"
    assert compiled(text.replace('mechanism = "NeighborhoodAttention"', 'mechanism = "keep"', 1)).outcome == "unchanged"
    for wrong in (text.replace("sha256:", "sha256:0"), text.replace('"site0"', '"site9"'),
                  text.replace('mechanism = "NeighborhoodAttention"', 'mechanism = "Magic"', 1)):  # fmt: skip
        assert wrong != text
        with pytest.raises(BadArguments):
            compiled(wrong)


@BRIEF
def test_sparse_needs_real_inputs_and_keeps_the_budget(tmp_path: Path) -> None:
    """Full attention with near tokens dominating: a window fits a loose budget, nothing fits 0."""
    proto = build(Spec(batch=1, heads=2, kv_heads=2, length=900, head_dim=16, scale=0.02, merge_output=True))
    path = save(proto, tmp_path, "full.onnx")
    rng = np.random.default_rng(0)
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=rng.standard_normal((1, 900, 32)).astype(np.float32))
    out = tmp_path / "out"

    def compiled(max_error: float | None) -> report.Report:
        return pipeline.compile(
            path, Options(policy="sparse", target="onnx", out=out, inputs=inputs, max_error=max_error, keep_slower=True)
        )

    loose = compiled(10.0)
    assert loose.outcome == "replaced" and loose.approximate
    assert loose.parity is not None and loose.parity.evidence == "inputs" and loose.parity.value is not None
    assert 1e-4 < loose.parity.value <= 10.0
    metadata = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
    assert metadata["attncompile.approximate_sites"] == "site0"
    tight = compiled(None)
    assert tight.outcome == "unchanged" and "within 0.01" in " ".join(tight.warnings)
    assert compiled(0.0).outcome == "unchanged"
    assert (out / "model.onnx").read_bytes() == path.read_bytes()


def test_no_attention_is_no_error(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [2, 3]) for n in "xy"]
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:])), path)
    result = pipeline.compile(path, Options(target="onnx", out=tmp_path / "out"))
    assert result.exit_code == 0 and result.outcome == "unchanged" and not result.sites
    assert (tmp_path / "out" / "model.onnx").read_bytes() == path.read_bytes()
    assert pipeline.compile(path, Options(target="onnx", out=tmp_path / "out", require_sites=1)).exit_code == 1


def test_an_output_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = windowed(tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for out in (theirs, tmp_path, path):
        with pytest.raises(BadArguments):
            pipeline.compile(path, Options(target="onnx", out=out))
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_an_opset_that_cannot_be_converted_replaces_nothing(tmp_path: Path) -> None:
    proto = build(WINDOWED)
    proto.opset_import[0].version = 16
    proto.graph.node.append(onnx.helper.make_node("Upsample", ["x", "s"], ["u"]))  # gone since opset 10
    path = tmp_path / "old.onnx"
    path.write_bytes(proto.SerializeToString())
    found = pipeline.inspect(path, Options())
    assert not isinstance(found.normal, type(found.model)) and "conversion" in found.normal.message
    assert pipeline.plan(pipeline.inspect(path, Options()), Options()).decisions[0].kept


def test_target_errors_leave_the_portable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    from attncompile.core.errors import TargetError
    from attncompile.targets.tensorrt_rtx import TensorRTRTX

    def refuse(*_: object, **__: object) -> None:
        raise TargetError("no", "because")

    monkeypatch.setattr(TensorRTRTX, "build", refuse)
    path, out = windowed(tmp_path), tmp_path / "out"
    asked = pipeline.compile(path, Options(target="tensorrt-rtx", out=out))
    assert asked.exit_code == 1 and any("tensorrt-rtx" in f for f in asked.failures)
    assert (out / "model.onnx").is_file() and not list(out.glob("*.engine"))
    assert outputs.target("onnx", None).name == "onnx"


@BRIEF
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    """fp16 runs on the CPU; bf16 is checked on a float32 twin and the report says so."""
    path = exported("mistral", tokens=512, window=32, dtype=dtype)
    result = pipeline.compile(path, Options(target="onnx", out=tmp_path / "out", keep_slower=True))
    assert result.outcome == "replaced", result.warnings
    assert all(s.exactness is not None and s.exactness.passed for s in result.sites)
    assert result.parity is not None and result.parity.passed
    twin = [s.exactness.label for s in result.sites if s.exactness is not None]
    assert all(("twin" in label) == (dtype == "bf16") for label in twin)
    assert bool(result.timings) == (dtype == "fp16")


@BRIEF
def test_padding_and_window_keep_fully_masked_rows(tmp_path: Path) -> None:
    """Left-padded prompts, where the first rows see no key at all: the output must not change anywhere."""
    path = exported("mistral", tokens=512, window=32, dynamic=("sequence",), padding_mask=True)
    out = tmp_path / "out"
    options = Options(target="onnx", out=out, profile={"sequence": Range(1, 512, 700)}, keep_slower=True)
    result = pipeline.compile(path, options)
    assert result.outcome == "replaced", result.warnings
    model = onnx.load(path)
    hidden = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    sessions = [ort.InferenceSession(p) for p in (path, out / "model.onnx")]
    for left, right in ((0, 0), (100, 0), (0, 100), (300, 50)):
        mask = np.ones((1, 600), np.int64)
        mask[:, :left], mask[:, 600 - right :] = 0, 0
        x = np.random.default_rng(left).standard_normal((1, 600, hidden)).astype(np.float32)
        names = [i.name for i in model.graph.input]
        before, after = (s.run(None, dict(zip(names, (x, mask), strict=True)))[0] for s in sessions)
        assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before), (left, right)


def test_external_weights_travel(tmp_path: Path) -> None:
    """Weights in another file stay there, byte for byte, and the written folder is complete by itself."""
    proto = build(WINDOWED)
    source = tmp_path / "source"
    (source / "weights").mkdir(parents=True)
    path = source / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights/w.bin", size_threshold=1000)
    out = tmp_path / "out"
    result = pipeline.compile(path, Options(target="onnx", out=out))
    assert result.outcome == "replaced", result.warnings
    assert (out / "weights" / "w.bin").read_bytes() == (source / "weights" / "w.bin").read_bytes()
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    feed = feed_of(proto, 3)
    before = ort.InferenceSession(path).run(None, feed)[0]
    after = ort.InferenceSession(moved / "model.onnx").run(None, feed)[0]
    assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)


def test_compiling_twice_finds_nothing_more(tmp_path: Path) -> None:
    """Our own output is a model like any other: its ops pass through."""
    path, out = windowed(tmp_path), tmp_path / "out"
    pipeline.compile(path, Options(target="onnx", out=out))
    again = pipeline.compile(out / "model.onnx", Options(target="onnx", out=tmp_path / "again"))
    assert again.outcome == "unchanged" and again.exit_code == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


@BRIEF
def test_an_unchanged_file_is_not_said_to_be_converted(tmp_path: Path) -> None:
    path = exported("vit", "torchscript", 17)
    result = pipeline.compile(path, Options(target="onnx", out=tmp_path / "out"))
    assert result.outcome == "unchanged" and not any("converted" in w for w in result.warnings)
    wide = exported("mistral", "torchscript", 17, tokens=512, window=32)
    changed = pipeline.compile(wide, Options(target="onnx", out=tmp_path / "out", keep_slower=True))
    assert changed.outcome == "replaced" and any("converted from opset 17" in w for w in changed.warnings)


def test_a_metric_without_a_budget_is_refused(tmp_path: Path) -> None:
    """0.01 is a budget for relative L2; as a cosine it would let anything pass."""
    with pytest.raises(BadArguments, match="cosine has no default budget"):
        pipeline.compile(windowed(tmp_path), Options(policy="sparse", target="onnx", metric="cosine"))


@BRIEF
def test_a_planned_approximation_without_inputs_is_undone(tmp_path: Path) -> None:
    """A narrower window than the model's, asked for by hand: seeded noise is no evidence for it."""
    path, out, plan_file = windowed(tmp_path), tmp_path / "out", tmp_path / "plan.toml"
    plan = pipeline.plan(pipeline.inspect(path, Options()), Options())
    (decision,) = plan.decisions
    narrower = {**decision.parameters, "left": [7], "kernel_size": [8]}
    plan_file.write_text(plan_toml.dumps(replace(plan, decisions=(replace(decision, parameters=narrower),))))
    result = pipeline.compile(path, Options(target="onnx", out=out, plan=plan_file, keep_slower=True))
    assert result.outcome == "rolled_back" and "needs --inputs" in result.sites[0].rolled_back
    assert (out / "model.onnx").read_bytes() == path.read_bytes()
