"""What replacements rely on: listed with each decision, and inputs that break it fail the run by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx import numpy_helper as nh

from attncompile import pipeline, report
from attncompile.cli import main
from attncompile.core import plan_toml
from attncompile.core.assumption import Assumes, Assumption, of_mechanism
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.plan import Decision
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.gate import SiteGate, SiteResult
from attncompile.ledger_check import LedgerCheck, _alive
from attncompile.pipeline import Inspection, Options
from attncompile.plugins import mechanism, mechanisms
from tests.passes.attention_graphs import Spec, build, save
from tests.report_samples import site as sample_site

pytestmark = pytest.mark.usefixtures("brief")

DYNAMIC = Spec(batch=1, heads=2, kv_heads=2, length=300, head_dim=8, mask="window", left=15, right=0, dynamic=True)


def dynamic(folder: Path) -> Path:
    return save(build(DYNAMIC), folder, "dynamic.onnx")


def compiled(path: Path, folder: Path, x: np.ndarray, **options: object) -> report.Report:
    np.savez(folder / "cal.npz", x=x)
    given = Options(target="onnx", out=folder / "out", inputs=folder / "cal.npz", keep_slower=True, **options)  # type: ignore[arg-type]
    found = pipeline.compile(path, given)
    jsonschema.validate(json.loads((folder / "out" / "report.json").read_text()), report.schema())
    return found


def values(length: int = 300) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, length, 16)).astype(np.float32)


PROFILE = {"n": Range(1, 300, 400), "b": Range(1, 1, 2)}


def test_every_replacement_has_its_assumptions_everywhere(tmp_path: Path) -> None:
    path = dynamic(tmp_path)
    found = compiled(path, tmp_path, values(), profile=PROFILE)
    assert found.outcome == "replaced" and found.exit_code == 0, found.warnings
    (site,) = found.sites
    kinds = {a.kind for a in site.decision.assumptions}
    assert {"sizes", "heads", "symbols", "mask", "finite", "constants", "opset", "dtype"} <= kinds
    text = " | ".join(a.text for a in site.decision.assumptions)
    assert "n is 1 to 400 (checked at 1, 300, 400 and at prime lengths)" in text
    assert "the mask is window (left 15, right 0)" in text and "2 query heads on 2 key heads, head dim 8" in text
    written = json.loads((tmp_path / "out" / "report.json").read_text())["sites"][0]["decision"]["assumptions"]
    assert written == [a.to_json() for a in site.decision.assumptions]
    again = plan_toml.loads((tmp_path / "out" / "plan.toml").read_text())
    assert again.decisions[0].assumptions == site.decision.assumptions
    page = (tmp_path / "out" / "report.html").read_text()
    assert "n is 1 to 400" in page
    assert site.exactness is not None
    assert {c.shapes for c in site.exactness.checks} >= {"usual shapes", "max shapes", "prime lengths"}


def test_a_site_that_is_kept_assumes_nothing(tmp_path: Path) -> None:
    found = pipeline.inspect(save(build(Spec()), tmp_path), Options())
    assert all(d.kept and not d.assumptions for d in pipeline.plan(found, Options()).decisions)


def broken_run(found: report.Report, path: Path, folder: Path, *words: str) -> None:
    assert found.exit_code == 1 and found.outcome == "rolled_back"
    (failure,) = found.failures
    assert all(w in failure for w in words), failure
    assert (folder / "out" / "model.onnx").read_bytes() == path.read_bytes()


def test_a_length_outside_the_given_profile_fails_the_run(tmp_path: Path) -> None:
    path = dynamic(tmp_path)
    found = compiled(path, tmp_path, values(500), profile=PROFILE)
    broken_run(found, path, tmp_path, "site0", "input 'x' of cal.npz, set 0", "n is 500", "assumed 1 to 400")


def test_an_assumed_profile_is_widened_to_the_inputs(tmp_path: Path) -> None:
    path = dynamic(tmp_path)
    found = compiled(path, tmp_path, values(600))
    assert found.exit_code == 0 and found.profile["n"].maximum == 600 and found.profile["n"].assumed
    assert found.profile["b"].maximum == 4


def test_an_empty_cache_is_neither_a_size_nor_an_error(tmp_path: Path) -> None:
    found = pipeline.inspect(dynamic(tmp_path), Options())
    feed = {"x": np.zeros((1, 0, 16), np.float32)}
    assert pipeline.widened(found.profile, found.model, [feed]) == found.profile
    (site,) = found.detection.sites
    assumed = found.ledger.of(site, mechanism("NeighborhoodAttention"), {}, True)
    worlds = pipeline.Worlds(found.index)
    decided = [(site, Decision(site.id, "NeighborhoodAttention", "", assumptions=assumed))]
    for profile, count in ((found.profile, 0), (ShapeProfile(PROFILE), 1)):
        ledger = replace(found.ledger, profile=profile)
        made = LedgerCheck(ledger, [feed], lambda feed: worlds(found.profile.usual()), Path("cal.npz"))
        assert len(made.broken(decided)) == count


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_values_that_are_not_finite_fail_the_run(tmp_path: Path, bad: float, word: str) -> None:
    path, x = dynamic(tmp_path), values()
    x[0, 7, 3] = bad
    found = compiled(path, tmp_path, x, profile=PROFILE)
    broken_run(
        found, path, tmp_path, "input 'x' of cal.npz, set 0", f"1 of {x.size} values are {word}", "assumed finite"
    )


def test_the_command_exits_with_1_and_names_the_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, x = dynamic(tmp_path), values()
    x[0, 0, 0] = np.nan
    np.savez(tmp_path / "cal.npz", x=x)
    monkeypatch.setattr(SiteGate, "check", lambda self, edit: SiteResult())
    arguments = [str(path), "--target", "onnx", "--out", str(tmp_path / "out"), "--inputs", str(tmp_path / "cal.npz"),
                 "--keep-slower", "--profile", "n=1:300:400,b=1"]  # fmt: skip
    assert main(arguments) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error == [
        "error: assumption of site0: input 'x' of cal.npz, set 0: 1 of 4800 values are NaN; assumed finite values"
    ]


def test_inputs_that_break_nothing_of_a_model_left_as_it_is(tmp_path: Path) -> None:
    """Nothing is replaced, so nothing is assumed."""
    path = save(build(Spec(batch=1, length=20)), tmp_path)
    np.savez(tmp_path / "cal.npz", x=np.full((1, 20, 24), np.nan, np.float32))
    found = pipeline.compile(path, Options(target="onnx", out=tmp_path / "out", inputs=tmp_path / "cal.npz"))
    assert found.outcome == "unchanged" and found.exit_code == 0


# --- padding: the check alone, on models whose masks come from an input -----------------------------------------------


def padded_model(folder: Path, form: str, causal: bool = False) -> Path:
    """q, k, v [2, 2, 9, 4] and attention_mask [2, 9]; ``form``: cast (float mask cast to bool, where), added."""
    nodes = [helper.make_node("Unsqueeze", ["attention_mask", "axes"], ["wide"])]
    stored = [nh.from_array(np.array([1, 2]), "axes"), nh.from_array(np.array(-np.inf, np.float32), "low")]
    nodes += [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"]),
    ]
    if form == "cast":
        nodes.append(helper.make_node("Cast", ["wide"], ["keep"], to=TensorProto.BOOL))
        nodes.append(helper.make_node("Where", ["keep", "raw", "low"], ["scores"]))
    else:
        stored += [nh.from_array(np.array(x, np.float32), n) for n, x in (("one", 1.0), ("huge", -1e9))]
        nodes.append(helper.make_node("Sub", ["one", "wide"], ["hide"]))
        nodes.append(helper.make_node("Mul", ["hide", "huge"], ["bias"]))
        nodes.append(helper.make_node("Add", ["raw", "bias"], ["scores"]))
    last = "scores"
    if causal:
        stored.append(nh.from_array(np.triu(np.full((9, 9), -np.inf, np.float32), 1)[None, None], "triangle"))
        nodes.append(helper.make_node("Add", [last, "triangle"], ["both"]))
        last = "both"
    nodes += [helper.make_node("Softmax", [last], ["p"], axis=-1), helper.make_node("MatMul", ["p", "v"], ["out"])]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2, 9, 4]) for n in "qkv"]
    infos.append(helper.make_tensor_value_info("attention_mask", TensorProto.FLOAT, [2, 9]))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 2, 9, 4])
    graph = helper.make_graph(nodes, "padded", infos, [out], stored)
    return save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder)


def check(path: Path, mask: np.ndarray, rows: str = "") -> tuple[str, ...]:
    """What ``mask``, in the second of two sets of inputs, breaks where fully masked rows are replaced by ``rows``."""
    found: Inspection = pipeline.inspect(path, Options())
    (site,) = found.detection.sites
    parameters = {"causal": False, "masked_rows": rows or site.mask.masked_rows, "chunks": 1}
    assumed = found.ledger.of(site, mechanism("DenseAttention"), parameters, True)
    rng = np.random.default_rng(0)
    good = {n: rng.standard_normal((2, 2, 9, 4)).astype(np.float32) for n in "qkv"}
    feeds = [{**good, "attention_mask": np.ones((2, 9), np.float32)}, {**good, "attention_mask": mask}]
    worlds = pipeline.Worlds(found.index)
    made = LedgerCheck(found.ledger, feeds, lambda feed: worlds(found.profile.usual()), Path("/data/cal.npz"))
    return tuple(b.text for b in made.broken([(site, Decision(site.id, "DenseAttention", "", assumptions=assumed))]))


def ones() -> np.ndarray:
    return np.ones((2, 9), np.float32)


@pytest.mark.parametrize("form", ["cast", "added"])
def test_left_right_and_middle_padding_break_nothing(tmp_path: Path, form: str) -> None:
    mask = ones()
    mask[0, :3], mask[1, 6:], mask[1, 2] = 0, 0, 0
    assert check(padded_model(tmp_path, form), mask) == ()


@pytest.mark.parametrize("form", ["cast", "added"])
def test_values_between_0_and_1_are_named(tmp_path: Path, form: str) -> None:
    mask = ones()
    if form == "cast":
        mask[1, 4] = 0.5
        (text,) = check(padded_model(tmp_path, form), mask)
        assert text == "input 'attention_mask' of cal.npz, set 1: values 0.5; assumed 0 or 1"
        return
    mask[1, 4] = 1 - 1e-6  # adds about -1000: neither visible nor hidden
    (text,) = check(padded_model(tmp_path, form), mask)
    assert text.startswith("input 'attention_mask' of cal.npz, set 1: it adds -") and "assumed 0, or -9000" in text


def test_a_fully_masked_row_is_named_where_it_is_assumed_away(tmp_path: Path) -> None:
    mask = ones()
    mask[1] = 0
    (text,) = check(padded_model(tmp_path, "cast"), mask, "zero")
    assert (
        "'attention_mask' of cal.npz, set 1" in text and "query 0 of batch entry 1 sees no key (9 such queries)" in text
    )
    mask = ones()
    mask[0, :2] = 0  # left padding under a causal mask: the first two queries see nothing
    (text,) = check(padded_model(tmp_path, "cast", causal=True), mask, "zero")
    assert "query 0 of batch entry 0 sees no key (2 such queries)" in text
    mask = ones()
    mask[0, 1:] = 0
    assert check(padded_model(tmp_path, "cast", causal=True), mask, "zero") == ()


def test_masked_rows_that_are_kept_are_no_assumption(tmp_path: Path) -> None:
    """Added -1e9 makes such rows uniform, -inf makes them NaN: a replacement that does the same may meet them."""
    mask = ones()
    mask[1] = 0
    for form in ("added", "cast"):
        assert check(padded_model(tmp_path, form), mask) == ()
    assert len(check(padded_model(tmp_path, "added"), mask, "zero")) == 1


@pytest.mark.parametrize("seed", range(20))
def test_rows_without_a_key_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, keys = int(rng.integers(1, 12)), int(rng.integers(1, 12))
    left, right = int(rng.integers(-1, 5)), int(rng.integers(-1, 5))
    seen = rng.random((3, keys)) < 0.4
    how = Certificate("attribute", "made up")
    site: AttentionSite = sample_site(mask=MaskFacts((MaskPart("window", how, left=left, right=right),)))
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    window = np.ones((queries, keys), bool)
    if left >= 0:
        window &= distance >= -left
    if right >= 0:
        window &= distance <= right
    expected = (window[None] & seen[:, None]).any(axis=2)
    assert np.array_equal(_alive(site, seen, queries), expected)


# --- mechanisms that add their own ------------------------------------------------------------------------------------


def test_dense_attention_says_that_it_drops_the_guard(tmp_path: Path) -> None:
    path = save(build(Spec(batch=1, length=700, mask="causal", guard=True)), tmp_path)
    found = pipeline.inspect(path, Options())
    (decision,) = pipeline.plan(found, Options()).decisions
    assert decision.mechanism == "DenseAttention", decision
    assert any("NaN guard" in a.statement for a in decision.assumptions)


def test_a_mechanism_need_not_say_anything() -> None:
    class Silent:
        name = "silent"

    site = sample_site()
    assert of_mechanism(Silent(), site, {}) == ()
    assert isinstance(mechanism("DenseAttention"), Assumes)
    for m in mechanisms():
        assert all(isinstance(a, Assumption) for a in of_mechanism(m, site, {}))
