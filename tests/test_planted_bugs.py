"""A mistake planted in a lowering turns the gate red, is rolled back, and the report says why and on which case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx import numpy_helper as nh

from attncompile import gate, pipeline, report
from attncompile.core.mechanism import Lowering, Parameters
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite
from attncompile.pipeline import Options
from attncompile.plugins.attention import dense
from attncompile.plugins.attention.dense_mechanism import DenseAttention
from attncompile.plugins.neighborhood.mechanism import NeighborhoodAttention
from tests.passes.attention_graphs import Spec, build, save

pytestmark = pytest.mark.usefixtures("brief")

WINDOW = Spec(batch=1, heads=4, kv_heads=2, length=700, head_dim=8, mask="window", left=15, right=0)
PADDED = dataclasses.replace(WINDOW, padding=True, guard=True, mask_form="where")
CAUSAL = Spec(batch=1, heads=2, kv_heads=2, length=700, head_dim=8, mask="causal")
OPTIONS: dict[str, Any] = {"target": "onnx", "keep_slower": True}

Lower = Callable[[Any, AttentionSite, Parameters, int], Lowering]
SLIDING, DENSE = NeighborhoodAttention.lower, DenseAttention.lower


def changed(good: Lower, /, **changes: Callable[[Any], Any]) -> Lower:
    """``good`` with other parameters than it was asked for."""
    return lambda self, site, parameters, opset: good(
        self, site, {**parameters, **{k: f(parameters[k]) for k, f in changes.items()}}, opset
    )


def other_site(right: Lower, change: Callable[[AttentionSite], AttentionSite]) -> Lower:
    return lambda self, site, parameters, opset: right(self, change(site), parameters, opset)


def rolled_operand(right: Lower, position: int, axis: Callable[[AttentionSite], int]) -> Lower:
    """Input ``position`` of the op is rolled by one along ``axis``."""

    def lower(self: Any, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        good = right(self, site, parameters, opset)
        node = next(n for n in good.nodes if n.domain == "attncompile")
        name, at = node.input[position], axis(site)
        consts = [nh.from_array(np.array([x]), f"planted_{n}") for n, x in
                  (("zero", 0), ("one", 1), ("end", 1 << 31), ("axis", at))]  # fmt: skip
        first = helper.make_node("Slice", [name, "planted_zero", "planted_one", "planted_axis"], ["planted_first"])
        rest = helper.make_node("Slice", [name, "planted_one", "planted_end", "planted_axis"], ["planted_rest"])
        rolled = helper.make_node("Concat", ["planted_rest", "planted_first"], ["planted"], axis=at)
        node.input[position] = "planted"
        return Lowering((first, rest, rolled, *good.nodes), good.functions, (*good.initializers, *consts))

    return lower


def heads_axis(site: AttentionSite) -> int:
    return site.key.layout.index("H")


def run(path: Path, folder: Path, **options: Any) -> report.Report:
    return pipeline.compile(path, Options(**{**OPTIONS, "out": folder / "out", **options}))


@pytest.mark.parametrize(("spec", "mechanism"), [(WINDOW, "NeighborhoodAttention"), (PADDED, "NeighborhoodAttention"),
                                                 (CAUSAL, "DenseAttention")])  # fmt: skip
def test_without_a_mistake_they_are_replaced(tmp_path: Path, spec: Spec, mechanism: str) -> None:
    found = run(save(build(spec), tmp_path), tmp_path)
    (site,) = found.sites
    assert site.replaced and site.decision.mechanism == mechanism, (site.decision, site.rolled_back)
    assert site.exactness is not None and all(c.passed or not c.judged for c in site.exactness.checks)
    names = {c.case for c in site.exactness.checks}
    assert {"random", "large logits", "uniform", "equal keys", "zeros", "one key dominates", "logits of 10,000",
            "denormals", "huge values"} <= names  # fmt: skip
    assert not spec.padding or {"left padding", "right padding", "middle padding", "fully masked"} <= names


MISTAKES = {
    "window one key short": (WINDOW, changed(SLIDING, left=lambda x: [x[0] - 1], kernel_size=lambda x: [x[0] - 1])),
    "window one key long": (WINDOW, changed(SLIDING, left=lambda x: [x[0] + 1], kernel_size=lambda x: [x[0] + 1])),
    "scale 1% off": (WINDOW, other_site(SLIDING, lambda s: dataclasses.replace(s, scale=s.scale * 1.01))),
    "heads on the wrong key heads": (WINDOW, rolled_operand(SLIDING, 1, heads_axis)),
    "values of the wrong heads": (WINDOW, rolled_operand(SLIDING, 2, heads_axis)),
    "keys one position off": (WINDOW, rolled_operand(SLIDING, 1, lambda s: s.key.layout.index("N"))),
    "padding mask one key off": (PADDED, rolled_operand(SLIDING, 3, lambda s: 3)),
    "masked rows give NaN": (PADDED, changed(SLIDING, masked_rows=lambda _: "nan")),
    "masked rows give the mean": (PADDED, changed(SLIDING, masked_rows=lambda _: "uniform")),
    "causal dropped": (CAUSAL, changed(DENSE, right=lambda _: -1, chunks=lambda _: 1)),
    "causal scale": (CAUSAL, other_site(DENSE, lambda s: dataclasses.replace(s, scale=-s.scale))),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec, wrong = MISTAKES[name]
    monkeypatch.setattr(DenseAttention if spec is CAUSAL else NeighborhoodAttention, "lower", wrong)
    path = save(build(spec), tmp_path)
    red_gate(run(path, tmp_path), path, tmp_path)


def red_gate(found: report.Report, path: Path, folder: Path) -> None:
    (site,) = found.sites
    assert found.outcome == "rolled_back" and site.rolled_back.startswith("not exact: at "), site.rolled_back
    assert site.exactness is not None and not site.exactness.passed
    failed = [c for c in site.exactness.checks if c.judged and not c.passed]
    assert failed and failed[0].reason and f"case '{failed[0].case}'" in site.rolled_back
    assert any(f"was rolled back: {site.rolled_back}" in w for w in found.warnings)
    assert (folder / "out" / "model.onnx").read_bytes() == path.read_bytes()


def test_a_causal_chunk_that_ends_one_key_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query of each chunk loses its own key: 5 rows of 700."""
    right = dense._seen

    def short(body: Any, form: Any, call: Any, values: Any, met: Any) -> str:
        visible = right(body, form, call, values, met)
        last = body.op("Less", body.op("Range", body.scalar(0), body.op("Squeeze", met.last), body.scalar(1)),
                       body.op("Sub", body.op("Squeeze", met.last), body.scalar(1)))  # fmt: skip
        return str(body.op("And", visible, body.op("Unsqueeze", last, body.ints(0, 1, 2))))

    monkeypatch.setattr(dense, "_seen", short)
    path = save(build(CAUSAL), tmp_path)
    red_gate(run(path, tmp_path), path, tmp_path)


def test_a_mistake_at_prime_lengths_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right wherever the length is a multiple of 10, as the profile's three are: only the edges tell."""

    def lower(self: Any, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        good = SLIDING(self, site, parameters, opset)
        name = site.output.value
        good.nodes[-1].output[0] = "planted_right"
        axis = site.query.layout.index("N")
        nodes = [
            helper.make_node("Shape", [site.query.value], ["planted_n"], start=axis, end=axis + 1),
            helper.make_node("Mod", ["planted_n", "planted_ten"], ["planted_rest"]),
            helper.make_node("Cast", ["planted_rest"], ["planted_error"], to=1),
            helper.make_node("Add", ["planted_right", "planted_error"], [name]),
        ]
        return Lowering(
            (*good.nodes, *nodes), good.functions, (*good.initializers, nh.from_array(np.array([10]), "planted_ten"))
        )

    monkeypatch.setattr(NeighborhoodAttention, "lower", lower)
    spec = dataclasses.replace(WINDOW, dynamic=True, kv_heads=4)
    path = save(build(spec), tmp_path)
    found = run(path, tmp_path, profile={"n": Range(10, 300, 400), "b": Range(1, 1, 1)})
    red_gate(found, path, tmp_path)
    assert "at prime lengths" in found.sites[0].rolled_back


def test_where_a_run_takes_long_the_extra_cases_are_left_out_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "EXTRA_CASES_BELOW", 1000)
    (site,) = run(save(build(WINDOW), tmp_path), tmp_path).sites
    assert site.replaced and site.exactness is not None
    assert [c.case for c in site.exactness.checks] == ["random", "large logits", "uniform"]
    assert "not tried there: equal keys, zeros" in site.exactness.label


def test_extra_cases_of_a_large_site_are_judged_on_sampled_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "EXTRA_MEMORY_CAP", 1 << 16)
    (site,) = run(save(build(WINDOW), tmp_path), tmp_path).sites
    assert site.replaced and site.exactness is not None
    assert "sampled query rows were compared" in site.exactness.label
    assert len(site.exactness.checks) == 9 and all(c.passed for c in site.exactness.checks)
