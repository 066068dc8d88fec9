"""Gates on the whole model: padding is used where the model has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper as nh

from attncompile import gate, pipeline, whole
from attncompile.core.mechanism import Lowering, Parameters
from attncompile.core.site import AttentionSite
from attncompile.pipeline import Options
from attncompile.plugins.neighborhood.mechanism import NeighborhoodAttention
from tests.passes.attention_graphs import Spec, build, save

pytestmark = pytest.mark.usefixtures("brief")

PADDED = Spec(
    batch=2, heads=2, kv_heads=2, length=300, head_dim=8, mask="window", left=15, right=0, padding=True, guard=True,
    mask_form="where",
)  # fmt: skip
RIGHT = NeighborhoodAttention.lower


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.2)


def options(folder: Path, **more: Any) -> Options:
    return Options(**{"target": "onnx", "out": folder / "out", "keep_slower": True, **more})


def test_the_model_is_compared_under_padding(tmp_path: Path) -> None:
    found = pipeline.compile(save(build(PADDED), tmp_path), options(tmp_path))
    assert found.outcome == "replaced" and found.parity is not None and found.parity.passed, found.warnings
    labels = [c.label for c in found.parity.comparisons]
    assert labels == ["static", "static, left padding", "static, right padding", "static, middle padding"]
    assert [t.label for t in found.timings] == ["static"]


def test_a_mask_that_is_dropped_is_seen_in_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all-one masks this replacement is right."""

    def lower(self: Any, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        good = RIGHT(self, site, parameters, opset)
        node = next(n for n in good.nodes if n.domain == "attncompile")
        all_seen = nh.from_array(np.ones((1, 1, 1, 300), bool), "planted_mask")
        node.input[3] = "planted_mask"
        return Lowering(good.nodes, good.functions, (*good.initializers, all_seen))

    monkeypatch.setattr(NeighborhoodAttention, "lower", lower)
    monkeypatch.setattr(gate.SiteGate, "check", lambda self, edit: gate.SiteResult())
    found = pipeline.compile(save(build(PADDED), tmp_path), options(tmp_path))
    assert found.outcome == "rolled_back" and "the outputs change" in found.sites[0].rolled_back
    assert found.bisection is not None and found.bisection.groups == (("site0",),) and found.bisection.runs == 0


def test_padding_that_gives_nan_in_the_original_is_not_asked_for(tmp_path: Path) -> None:
    """Without the NaN guard, -inf everywhere in a row is NaN in the source: nothing to compare there."""
    proto = build(dataclasses.replace(PADDED, guard=False))
    for tensor in proto.graph.initializer:
        if nh.to_array(tensor).size == 1 and nh.to_array(tensor) == np.finfo(np.float32).min:
            tensor.CopyFrom(nh.from_array(np.array(-np.inf, np.float32), tensor.name))
    found = pipeline.compile(save(proto, tmp_path), options(tmp_path))
    assert found.outcome == "replaced" and found.parity is not None, found.warnings
    labels = [c.label for c in found.parity.comparisons]
    assert "static, left padding" not in labels and found.parity.passed
    (site,) = found.sites
    assert any(a.statement == "queries that see no key give nan" for a in site.decision.assumptions)
    assert site.exactness is not None
    assert any(c.case == "left padding" and c.passed for c in site.exactness.checks)
