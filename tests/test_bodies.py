"""The main job on models whose attention lies in bodies: a body with a replacement is run, or keeps its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from attncompile import pipeline, verify
from attncompile.core.mechanism import Lowering
from attncompile.gate import Edit, SiteGate, SiteResult
from attncompile.passes.load import load
from attncompile.pipeline import Options
from attncompile.report import Report
from tests.passes.attention_graphs import Spec, save
from tests.passes.body_graphs import branched, decoder, looped, nested, scanned

pytestmark = pytest.mark.usefixtures("brief")

LONG = Spec(batch=1, heads=2, kv_heads=2, length=700, head_dim=16, mask="window", left=15, right=0, scale=0.25)
WIDER = replace(LONG, left=31, seed=3)
GUARDED = replace(LONG, mask="causal", guard=True, mask_form="where", seed=1)


def blocks() -> ModelProto:
    """Another random pattern of blocks of 64 in each branch."""
    rng = np.random.default_rng(8)
    proto = branched(replace(LONG, length=768, mask_form="where"), replace(LONG, length=768, mask_form="where", seed=2))
    for tensor in proto.graph.initializer:
        if list(tensor.dims) == [1, 1, 768, 768]:
            seen = (rng.random((12, 12)) < 0.15) | np.eye(12, dtype=bool)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(np.kron(seen, np.ones((64, 64), bool))[None, None], tensor.name)
            )
    return proto


PROVED: dict[str, tuple[Callable[[], ModelProto], int, set[str]]] = {
    "windows in both branches": (lambda: branched(LONG, WIDER), 2, {"static", "static, use_cache=0"}),
    "window and causal": (lambda: branched(LONG, GUARDED), 2, {"static", "static, use_cache=0"}),
    "negated": (lambda: branched(LONG, WIDER, condition="negated"), 2, {"static", "static, use_cache=0"}),
    "loop": (lambda: looped(LONG), 1, {"static"}),
    "loop over an input": (lambda: looped(LONG, rounds=None), 1, {"static", "static, rounds=3"}),
    "scan": (lambda: scanned(LONG), 1, {"static"}),
    "if in loop": (lambda: nested(LONG, WIDER), 2, {"static", "static, use_cache=0"}),
    "patterns of blocks": (blocks, 2, {"static", "static, use_cache=0"}),
    "merged decoder": (lambda: decoder(15, dynamic=False), 4, {"static", "static, use_cache_branch=0"}),
}


def compiled(proto: ModelProto, folder: Path, **options: object) -> tuple[Report, Path]:
    path = save(proto, folder)
    out = folder / "out"
    given = Options(target="onnx", out=out, threads=1, keep_slower=True, **options)  # type: ignore[arg-type]
    return pipeline.compile(path, given), out / "model.onnx"


def feeds_of(proto: ModelProto) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    feed = {}
    for info in proto.graph.input:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        feed[info.name] = rng.standard_normal(shape).astype(kind) if kind == np.float32 else np.ones(shape, kind)
    flags = [n for n, v in feed.items() if v.dtype != np.float32]
    return [feed, *({**feed, n: np.full_like(feed[n], 0 if feed[n].dtype == bool else 4)} for n in flags)]


@pytest.mark.parametrize("name", PROVED)
def test_every_body_is_replaced_run_and_compared(name: str, tmp_path: Path) -> None:
    make, count, labels = PROVED[name]
    proto = make()
    report, path = compiled(proto, tmp_path)
    assert report.exit_code == 0 and report.outcome == "replaced"
    assert [s.replaced for s in report.sites] == [True] * count
    assert all(s.site.scope and s.exactness is not None and s.exactness.passed for s in report.sites)
    assert report.parity is not None and report.parity.passed
    assert {c.label for c in report.parity.comparisons} == {t.label for t in report.timings} == labels
    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert not [n for n in written.graph.node if n.domain == "attncompile"], "the calls stand in the bodies"
    sessions = [
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]) for p in (proto, written)
    ]
    for feed in feeds_of(proto):
        for before, after in zip(*(s.run(None, feed) for s in sessions), strict=True):
            assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)


@pytest.mark.parametrize("condition", ["data", "true"])
def test_a_body_that_cannot_be_run_keeps_its_attention(condition: str, tmp_path: Path) -> None:
    report, _ = compiled(branched(LONG, WIDER, condition=condition), tmp_path)
    assert report.exit_code == 0
    other, then = report.sites
    assert not other.replaced and "else_branch' " in other.rolled_back
    assert then.replaced == (condition == "true")


@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_a_wrong_replacement_in_one_branch_is_found(
    branch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Whichever branch is wrong, the run through it shows it, the culprit goes and the other stays."""
    right = Edit.of

    def wrong(site, decision, mechanism, opset):  # type: ignore[no-untyped-def]
        edit = right(site, decision, mechanism, opset)
        if not site.scope.endswith(branch):
            return edit
        *first, last = edit.lowering.nodes
        inner = onnx.NodeProto.FromString(last.SerializeToString())
        inner.output[0] = f"{site.id}_before"
        twice = onnx.helper.make_node("Add", [inner.output[0]] * 2, [last.output[0]])
        return replace(
            edit, lowering=Lowering((*first, inner, twice), edit.lowering.functions, edit.lowering.initializers)
        )

    monkeypatch.setattr(Edit, "of", staticmethod(wrong))
    monkeypatch.setattr(SiteGate, "check", lambda self, edit: SiteResult())  # the site alone would show it first
    report, _ = compiled(branched(LONG, WIDER), tmp_path)
    assert {s.site.scope.rpartition("/")[2]: s.replaced for s in report.sites} == {
        "then_branch": branch != "then_branch", "else_branch": branch != "else_branch"
    }  # fmt: skip


def test_nothing_in_a_body_is_approximated(tmp_path: Path) -> None:
    proto = branched(replace(LONG, mask="none"), replace(LONG, mask="none", seed=4))
    np.savez(tmp_path / "inputs.npz", **feeds_of(proto)[0])
    report, _ = compiled(proto, tmp_path, policy="sparse", inputs=tmp_path / "inputs.npz", max_error=0.9)
    assert report.exit_code == 0 and not any(s.replaced for s in report.sites)


def test_ids_that_only_bodies_look_up_are_inside_the_table(tmp_path: Path) -> None:
    """Optimum's merged decoders look the ids up in each branch."""
    make = onnx.helper.make_node
    sides = []
    for name in ("then", "else"):
        rows = onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, [1, 40, 3])
        sides.append(onnx.helper.make_graph([make("Gather", ["table", "input_ids"], ["rows"])], name, [], [rows]))
    ids = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, 40])
    flag = onnx.helper.make_tensor_value_info("use_cache", onnx.TensorProto.BOOL, [])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 40, 3])
    table = onnx.numpy_helper.from_array(np.zeros((97, 3), np.float32), "table")
    node = make("If", ["use_cache"], ["y"], then_branch=sides[0], else_branch=sides[1])
    graph = onnx.helper.make_graph([node], "g", [ids, flag], [out], [table])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    made = verify.make_inputs(load(save(proto, tmp_path)), {})["input_ids"]
    assert 2 < made.max() < 97
