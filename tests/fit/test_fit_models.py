"""Whole models: what ``fit`` says of them, and what policy ``linear`` replaces and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from attncompile import fit, pipeline
from attncompile.cli import main
from attncompile.core.errors import BadArguments
from attncompile.fit import solve
from attncompile.fit.run import NAME
from attncompile.metrics import relative_l2
from attncompile.pipeline import Options
from attncompile.plugins.linear_attention.fitted import fitted_reference
from attncompile.report import Report
from tests.fit import constructed
from tests.passes import attention_graphs
from tests.search.constructed import write

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("brief")

FAST = ["--jobs", "1", "--threads", "1", "-q"]
ONLY = """
[exact]
mechanisms = ["LinearAttention"]
min_gain = 0.95

[approximate]
mechanisms = ["FittedLinearAttention"]
"""
"""Policy ``linear`` without the exact mechanisms of softmax attention, which ``keep_slower`` would keep."""


def written(folder: Path, kind: str = "words", count: int = 8, **changed: Any) -> tuple[Path, Path]:
    make = constructed.words if kind == "words" else constructed.normal
    feeds = make(count, changed.get("tokens", 96))
    return write(folder, constructed.build(**changed), feeds)


def fitted(folder: Path, model: Path, inputs: Path, capfd: Any, *more: str) -> tuple[fit.Fitted, dict[str, Any]]:
    capfd.readouterr()
    out = folder / "maps.npz"
    assert main(["fit", str(model), "--inputs", str(inputs), "-o", str(out), "--format", "json", *FAST, *more]) == 0
    return fit.load(out), json.loads(capfd.readouterr().out)


def compiled(model: Path, inputs: Path | None, out: Path, **changed: Any) -> Report:
    policy = out.parent / "only.toml"
    policy.write_text(ONLY, encoding="utf-8")
    options = Options(policy=str(policy), target="onnx", inputs=inputs, out=out, jobs=1, threads=1, keep_slower=True)
    return pipeline.compile(model, pipeline.replace(options, **changed))


def attention(model: onnx.ModelProto, feed: dict[str, np.ndarray], maps: Any) -> np.ndarray:
    """y of a one-layer model with the reference in the place of its attention, float64."""
    w = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    x = feed["x"].astype(np.float64)
    heads, dim = (int(n) for n in w["shape"][2:])
    q, k, v = ((x @ w[f"{n}0"]).reshape(*x.shape[:2], heads, dim) for n in "qkv")
    out = fitted_reference(q, k, v, maps, causal="mask" in w)
    return x + out.reshape(*x.shape[:2], -1) @ w["o0"]


@pytest.mark.parametrize("causal", [False, True])
def test_planted_maps_are_found_replace_the_site_and_are_what_they_say(
    causal: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = 200 if causal else 96
    model, inputs = written(tmp_path, causal=causal, count=10, tokens=tokens)
    maps, said = fitted(tmp_path, model, inputs, capfd, "--steps", "600", "--width", "12")
    (of_site,) = said["sites"]
    learned = [m for m in of_site["maps"] if m["map"] != "mala"]
    assert [m["map"] for m in of_site["maps"]] == ["hedgehog", "relu", *([] if causal else ["mala"])]
    for m in learned:
        assert m["kl"] < 0.02 and m["l1"] < 0.1 and m["output"] < 0.05 and m["model"] < 0.04
    assert said["together"] == pytest.approx(min(learned, key=lambda m: m["output_fitted_on"])["model"], rel=1e-3)
    assert said["inputs"] == said["held"] == 5

    maps_at = tmp_path / "maps.npz"
    report = compiled(model, inputs, tmp_path / "out", fitted=maps_at, max_error=0.5, policy="linear")
    (found,) = report.sites
    assert found.replaced and not found.decision.exact and found.decision.mechanism == NAME
    assert report.exit_code == 0 and report.approximate and report.fit is not None and report.search is not None
    assert report.parity is not None and report.parity.evidence == "inputs" and max(report.search.held) < 0.08

    chosen = next(m for m in maps.maps["site0"] if m.digest == found.decision.parameters["fit"])
    ours = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    for feed in constructed.words(3, tokens, seed=77):
        assert relative_l2(attention(onnx.load(model), feed, chosen), ours.run(["y"], feed)[0]) < 1e-5

    # The plan can be applied again, with what lies beside it; not without.
    plan = tmp_path / "out" / "plan.toml"
    again = compiled(model, inputs, tmp_path / "again", plan=plan, fitted=tmp_path / "out", max_error=0.5)
    assert again.sites[0].replaced
    first, second = ((tmp_path / n / "model.onnx").read_bytes() for n in ("out", "again"))
    assert first == second
    with pytest.raises(BadArguments, match="are not there") as caught:
        compiled(model, inputs, tmp_path / "third", plan=plan)
    assert "--fitted" in caught.value.hint


def test_what_is_not_linear_stays_and_the_numbers_say_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = written(tmp_path, "normal", count=6, size=1.0)
    report = compiled(model, inputs, tmp_path / "out")
    (found,) = report.sites
    assert not found.replaced and report.outcome == "unchanged" and report.fit is not None
    (of_site,) = report.fit.sites
    for m in of_site.maps:
        assert m.output > 0.1 and m.model is not None and m.model > 0.02
    best = of_site.best
    assert best is not None
    assert f"changes its output by {best.output:.2g} and the model's by" in found.decision.reason
    assert any("no approximation keeps" in w for w in report.warnings)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == model.read_bytes()
    assert not (tmp_path / "out" / fit.FILE).exists()
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["fit"]["sites"][0]["maps"][0]["output"] == pytest.approx(of_site.maps[0].output, rel=1e-4)
    assert "fitted feature maps" in (tmp_path / "out" / "report.html").read_text()


def test_without_inputs_nothing_is_fitted_and_that_is_said(tmp_path: Path) -> None:
    model, _ = written(tmp_path)
    report = compiled(model, None, tmp_path / "out", policy="linear", keep_slower=False)
    assert report.fit is None and not report.approximate
    assert any("exact replacements only, because no --inputs" in w for w in report.warnings)


def test_a_site_that_cannot_gain_or_leaves_keys_out_is_not_fitted(tmp_path: Path) -> None:
    model, inputs = written(tmp_path, masked=True, layers=1)
    report = compiled(model, inputs, tmp_path / "out")
    assert report.fit is not None and not report.replaced
    assert report.sites[0].decision.reason == report.fit.sites[0].refused
    assert "cannot leave some out" in report.fit.sites[0].refused
    short = constructed.words(2, tokens=4)
    model, inputs = write(tmp_path, constructed.build(tokens=4), short)
    report = compiled(model, inputs, tmp_path / "short")
    assert report.fit is not None and "predicted gain" in report.fit.sites[0].refused
    assert report.sites[0].decision.reason == report.fit.sites[0].refused


def test_what_cannot_be_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    model, inputs = written(tmp_path, count=2)

    def error(*arguments: str) -> list[str]:
        capfd.readouterr()
        assert main([*arguments, "-q"]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 2 and lines[1].startswith("hint: ")
        return lines

    at = ("fit", str(model), "--inputs", str(inputs))
    assert "needs --inputs" in error("fit", str(model))[0]
    assert "no site 'site9'" in error(*at, "--site", "site9")[0]
    assert "does not know 'mela'" in error(*at, "--map", "mela")[0]
    (tmp_path / "none.npz").write_bytes(b"PK no zip")
    linear = (str(model), "--policy", "linear", "--inputs", str(inputs), "--target", "onnx", "-o", str(tmp_path / "o"))
    assert "holds no fitted maps" in error(*linear, "--fitted", str(tmp_path / "none.npz"))[0]
    assert "--density counts blocks" in error(*linear, "--density", "0.5")[0]
    fit.save(tmp_path / "other.npz", fit.Fitted("sha256:other", {}))
    assert "another model" in error(*linear, "--fitted", str(tmp_path / "other.npz"))[0]
    with monkeypatch.context() as patch:
        patch.setattr(solve, "find_spec", lambda name: None)
        for arguments in (at, linear):
            message, hint = error(*arguments)
            assert "needs the package torch" in message and "pip install torch" in hint
        assert main([*at, "--map", "mala", "-o", str(tmp_path / "m.npz"), *FAST]) == 0  # in closed form


def test_a_folder_gets_both_files_and_the_same_inputs_the_same_maps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, inputs = written(tmp_path, "normal", count=3, layers=2)
    made = []
    for name, jobs in (("a", "1"), ("b", "2")):
        where = tmp_path / name
        arguments = ["fit", str(model), "--inputs", str(inputs), "-o", str(where), "--steps", "6", "--site", "site1"]
        assert main([*arguments, "--jobs", jobs, "-q"]) == 0
        made.append((fit.load(where), json.loads((where / "fit.json").read_text())))
    table = capfd.readouterr().out
    assert "hedgehog" in table and "1 of 1 softmax sites have fitted maps" in table
    (one, first), (two, second) = made
    assert list(one.maps) == ["site1"] and first["sites"] == second["sites"]
    assert [m.digest for m in one.maps["site1"]] == [m.digest for m in two.maps["site1"]]


def test_one_input_says_nothing_of_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = written(tmp_path, "normal", count=1)
    assert (
        main(["fit", str(model), "--inputs", str(inputs), "-o", str(tmp_path / "m.npz"), "--map", "mala", *FAST]) == 0
    )
    assert "one input: nothing is said of others" in capfd.readouterr().out


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_what_is_judged_is_what_the_model_then_does(
    mask: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Groups of heads, a batch: where the output is the site's, both numbers are of the same thing."""
    spec = attention_graphs.Spec(heads=4, kv_heads=2, length=37, head_dim=6, mask=mask, scale=0.4, scale_at="scores")
    model = attention_graphs.build(spec)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(4)
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(2)]
    path, inputs = write(tmp_path, model, feeds)
    maps, said = fitted(tmp_path, path, inputs, capfd, "--steps", "30")
    (of_site,) = said["sites"]
    assert len(of_site["maps"]) == (2 if mask == "causal" else 3)
    for m in of_site["maps"]:
        assert len(m["heads"]) == 4
        assert m["model"] == pytest.approx(m["output"], rel=1e-3)

    # Held-out inputs choose nothing: others in their place leave the maps as they are.
    feeds[1]["x"] = feeds[1]["x"] * 3
    path, inputs = write(tmp_path, model, feeds)
    again, other = fitted(tmp_path, path, inputs, capfd, "--steps", "30")
    assert [m.digest for m in again.maps["site0"]] == [m.digest for m in maps.maps["site0"]]
    assert other["sites"][0]["maps"][0]["output"] != of_site["maps"][0]["output"]
    assert other["sites"][0]["maps"][0]["output_fitted_on"] == of_site["maps"][0]["output_fitted_on"]
