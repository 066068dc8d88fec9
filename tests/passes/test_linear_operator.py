"""The opset-27 ``LinearAttention`` operator: ONNX's own node tests, rebuilt from the detected facts."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from attncompile.core.site import AttentionSite, Detection
from attncompile.verification.linear_reference import linear_output, linear_state
from tests.passes.linear_graphs import detected


@cache
def cases() -> dict[str, Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' tests overflow on purpose
        return {t.name: t for t in collect_testcases(None) if t.name.startswith("test_linear_attention")}


_PLAIN = [
    "linear", "gated", "gated_per_head_decay", "delta", "gated_delta", "gated_delta_beta_scalar", "gated_delta_gqa",
    "gated_delta_mqa", "decode_step", "prefill_with_past", "no_past_explicit_zeros", "explicit_scale", "fp16",
    "linear_t1_no_past",
]  # fmt: skip


def test_every_node_test_is_here() -> None:
    names = {n.removeprefix("test_linear_attention_") for n in cases()}
    assert names == {*_PLAIN, *(f"{n}_expanded" for n in _PLAIN)}


def _operands(proto: onnx.ModelProto, site: AttentionSite, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The site's operands, evaluated by the nodes before the operator."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    known = set(feed) | {t.name for t in proto.graph.initializer}
    kept = []
    for node in proto.graph.node:
        if node.op_type != "LinearAttention" and all(i in known for i in node.input if i):
            kept.append(node)
            known |= set(node.output)
    names = list(dict.fromkeys(o.value for o in (site.query, site.key, site.value)))
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(kept)
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    return {**feed, **dict(zip(names, ReferenceEvaluator(model).run(names, feed), strict=True))}


@pytest.mark.parametrize("name", _PLAIN)
def test_node_tests_rebuilt_from_their_facts(name: str, tmp_path: Path) -> None:
    case = cases()[f"test_linear_attention_{name}"]
    model, detection = detected(case.model, tmp_path)
    assert detection.near_misses == ()
    (site,) = detection.sites
    assert (site.kind, site.form, site.mask.kind) == ("linear", "linear-attention-op", "causal")
    assert site.linear is not None
    assert site.linear.present_state
    inputs, outputs = case.data_sets[0]
    feed = {i.name: np.asarray(a) for i, a in zip(case.model.graph.input, inputs, strict=True)}
    values = _operands(model.proto, site, feed)
    got, state = linear_output(site, values), linear_state(site, values)
    bound = 5e-3 if name == "fp16" else 2e-6
    want = np.asarray(outputs[0]).astype(np.float64)
    assert np.abs(got.reshape(want.shape) - want).max() < bound
    assert np.abs(state - np.asarray(outputs[1]).astype(np.float64)).max() < bound


@pytest.mark.parametrize("name", _PLAIN)
def test_what_the_expanded_node_tests_hold(name: str, tmp_path: Path) -> None:
    """Their text is a Scan over the tokens: no site, and the reason says so."""
    _, detection = detected(cases()[f"test_linear_attention_{name}_expanded"].model, tmp_path)
    assert detection.sites == ()
    assert [m.code for m in detection.near_misses] == ["recurrent"]


def _operator(inputs: dict[str, list[int]], **attributes: object) -> onnx.ModelProto:
    names = ["q", "k", "v", "s", "g", "b"]
    given = [n if n in inputs else "" for n in names]
    node = helper.make_node("LinearAttention", given, ["y", "state"], **attributes)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=13)


def _refused(proto: onnx.ModelProto, folder: Path) -> str:
    detection: Detection = detected(proto, folder)[1]
    assert detection.sites == ()
    (miss,) = detection.near_misses
    return miss.code


def test_attributes_and_inputs_that_contradict(tmp_path: Path) -> None:
    shapes = {"q": [2, 7, 12], "k": [2, 7, 12], "v": [2, 7, 15]}
    heads = {"q_num_heads": 3, "kv_num_heads": 3}
    assert _refused(_operator(shapes, update_rule="gated", **heads), tmp_path) == "update-rule"
    assert _refused(_operator(shapes, update_rule="delta", **heads), tmp_path) == "update-rule"
    assert _refused(_operator(shapes, update_rule="other", **heads), tmp_path) == "update-rule"
    assert "shape" in _refused(_operator({**shapes, "g": [2, 7, 5]}, update_rule="gated", **heads), tmp_path)


def test_a_state_that_nobody_reads(tmp_path: Path) -> None:
    proto = _operator(
        {"q": [2, 7, 12], "k": [2, 7, 12], "v": [2, 7, 15]}, update_rule="linear", q_num_heads=3, kv_num_heads=3
    )  # fmt: skip
    (site,) = detected(proto, tmp_path)[1].sites
    assert site.linear is not None
    assert (site.linear.past_state, site.linear.present_state) == ("", "")
    assert (site.head_dim, site.value_dim, site.scale) == (4, 5, 0.5)
