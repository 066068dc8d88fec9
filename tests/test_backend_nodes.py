"""ONNX's own attention tests: sites whose facts give the expected output, rewrites that do, and what is not taken."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, numpy_helper

from attncompile.core.site import AttentionSite
from attncompile.plugins import mechanisms
from tests.passes.operator_rebuild import in_layout, rebuild, wanted

TOOL = Path(__file__).parent.parent / "tools" / "backend_nodes.py"

SCORES_ARE_OUTPUTS = (
    "4d_with_qk_matmul", "4d_with_qk_matmul_bias", "4d_with_qk_matmul_softcap", "4d_with_qk_matmul_softmax",
    "4d_with_past_and_present_qk_matmul", "4d_with_past_and_present_qk_matmul_bias",
    "4d_with_past_and_present_qk_matmul_bias_3d_mask", "4d_with_past_and_present_qk_matmul_bias_4d_mask",
    "4d_with_past_and_present_qk_matmul_bias_3d_mask_causal", "4d_with_past_and_present_qk_matmul_bias_4d_mask_causal",
    "3d_with_past_and_present_qk_matmul", "3d_with_past_and_present_qk_matmul_bias",
    "3d_with_past_and_present_qk_matmul_softcap", "3d_with_past_and_present_qk_matmul_softmax",
    "23_fullymasked_qk_matmul_output_mode3_zero", "24_fullymasked_qk_matmul_output_mode3_zero",
    "24_qk_matmul_output_mode3_softmax_precision", "local_window_gqa_rank4_mask",
)  # fmt: skip
WEIGHTS_ARE_OUTPUTS = (
    "4d_with_qk_matmul_softmax", "3d_with_past_and_present_qk_matmul_softmax",
    "23_fullymasked_qk_matmul_output_mode3_zero", "24_fullymasked_qk_matmul_output_mode3_zero",
    "24_qk_matmul_output_mode3_softmax_precision", "local_window_gqa_rank4_mask",
)  # fmt: skip
NOT_TAKEN = {
    "no-value-product": {"test_flexattention_prob_mod", "test_flexattention_prob_mod_expanded_ver26"},
    "scores-used": {f"test_attention_{n}" for n in SCORES_ARE_OUTPUTS}
    | {f"test_attention_{n}_expanded" for n in set(SCORES_ARE_OUTPUTS) - set(WEIGHTS_ARE_OUTPUTS)},
    "weights-used": {f"test_attention_{n}_expanded" for n in WEIGHTS_ARE_OUTPUTS},
}
"""Reason -> all Attention and FlexAttention tests without a site: their scores are outputs, or FlexAttention changes
its weights after the softmax.
"""


@cache
def tool() -> Any:
    """tools/backend_nodes.py, which nothing imports."""
    spec = importlib.util.spec_from_file_location("backend_nodes", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["backend_nodes"] = module
    spec.loader.exec_module(module)
    return module


@cache
def outcomes() -> dict[str, Any]:
    found = {}
    for case in tool().cases():
        if case.operator != "LinearAttention":
            found[case.name] = tool().find(case)
            tool().rewrite(found[case.name], mechanisms())
    return found


@cache
def taken() -> tuple[str, ...]:
    """Not when tests are collected: the package draws all of its tests to name one."""
    others = set().union(*NOT_TAKEN.values())
    found = sorted(c.name for c in tool().cases() if c.operator != "LinearAttention" and c.name not in others)
    assert len(found) > 160
    return tuple(found)


def test_all_tests_of_the_package_are_here() -> None:
    names = [c.name for c in tool().cases()]
    for operator, number in (("Attention", 93), ("FlexAttention", 11), ("LinearAttention", 14)):
        for expanded in (False, True):
            assert sum(c.operator == operator and c.expanded == expanded for c in tool().cases()) == number
    assert len(set(names)) == len(names) == 2 * (93 + 11 + 14)


def test_what_is_not_taken_is_this_and_nothing_else() -> None:
    found = {reason: set(names) for reason, names in tool().not_taken(list(outcomes().values())).items()}
    assert found == NOT_TAKEN


def test_linear_attention_is_not_passed_over() -> None:
    """What it computes is compared where linear attention is tested; here it is counted."""
    cases = [c for c in tool().cases() if c.operator == "LinearAttention" and not c.expanded]
    assert len(cases) == 14
    for case in cases:
        detection = tool().find(case).detection
        assert len(detection.sites) + len(detection.near_misses) == 1, case.name
        assert all(s.kind == "linear" for s in detection.sites), case.name


def unlike(outcome: Any) -> str:
    """How what the facts of the one site give, computed naively, differs from the test's output."""
    if len(outcome.detection.sites) != 1:
        return f"{len(outcome.detection.sites)} sites"
    site: AttentionSite = outcome.site
    values = read(outcome.model.proto, outcome.case.inputs, wanted(site))
    found = in_layout(site, rebuild(site, values))
    expected = outcome.case.outputs[outcome.case.model.graph.output[0].name]
    if expected.ndim == 3:
        found = found.reshape(expected.shape)
    if not np.isfinite(found).all():
        return "not finite"
    far = tool().difference(found, expected)
    return "" if far <= tool().TOLERANCE[site.dtype] else f"{far} away"


def test_the_facts_give_the_expected_output() -> None:
    """One site a test; its facts alone are the test's output."""
    assert {name: said for name in taken() if (said := unlike(outcomes()[name]))} == {}


def test_what_is_rewritten_gives_the_expected_output() -> None:
    wrong = {name: outcomes()[name].wrong for name in taken() if outcomes()[name].wrong}
    assert wrong == {}
    refused = {name: w for name in taken() for w in outcomes()[name].rewritten.values() if isinstance(w, str)}
    assert refused == {}


def test_rewrites_are_not_none() -> None:
    """The comparison above means something: so many tests are rewritten."""
    rewritten = [n for n, o in outcomes().items() if o.rewritten]
    assert sum("_expanded" in n for n in rewritten) >= 20
    assert sum("_expanded" not in n for n in rewritten) >= 20


def read(proto: ModelProto, inputs: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of the graph: inputs, constants, and what nodes make."""
    made = {o for n in proto.graph.node for o in n.output}
    inner = [n for n in names if n in made]
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in names} | dict(inputs)
    if inner:
        copy = ModelProto()
        copy.CopyFrom(proto)
        del copy.graph.output[:]
        copy.graph.output.extend(ValueInfoProto(name=n) for n in inner)
        found |= tool().run(copy, inputs)
    return found
