"""``DenseAttention`` on sites as detection finds them: what it takes is right as run, what it refuses has a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, KeyEnds, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, Shape, exact_candidates
from attncompile.core.site import AttentionSite
from attncompile.cost import predicted_gain
from attncompile.passes.replace import apply
from attncompile.plugins import mechanism
from attncompile.verification.retype import retype
from tests.passes.attention_graphs import Spec, build
from tests.passes.operator_graphs import one_node, only_site, run

RNG = np.random.default_rng(5)
SUBJECT = mechanism("DenseAttention")
SHOWN = Certificate("structure", "given by the test", general=True)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def operands(queries: int = 300, keys: int = 300) -> list[Any]:
    return [("q", floats(2, 4, queries, 8)), ("k", floats(2, 2, keys, 8)), ("v", floats(2, 2, keys, 16))]


BOOLS = RNG.random((2, 4, 300, 300)) < 0.6
BOOLS[0, :, 7] = False
KEYS = np.ones((2, 1, 300, 300), bool)  # ONNX Runtime wants the query axis whole
KEYS[0, ..., :40] = False
HIDDEN = np.where(BOOLS, 0, -np.inf).astype(np.float32)
OPERATORS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "plain": (operands(), {}),
    "scale": (operands(40, 300), {"scale": 0.3}),
    "softcap": (operands(), {"softcap": 1.5}),
    "softcap, causal": (operands(), {"softcap": 1.5, "is_causal": 1}),
    "bool mask": ([*operands(), ("m", BOOLS)], {}),
    "bool mask by heads, causal": ([*operands(), ("m", BOOLS[:1])], {"is_causal": 1}),
    "numbers that are added": ([*operands(), ("m", floats(4, 300, 300))], {"softcap": 2.0, "is_causal": 1}),
    "-inf that is added": ([*operands(), ("m", HIDDEN)], {}),
    "-inf that is added, causal": ([*operands(), ("m", HIDDEN)], {"is_causal": 1}),
    "padding, causal": ([*operands(), ("m", KEYS)], {"is_causal": 1}),
    "padding that is added": ([*operands(), ("m", np.where(KEYS, 0, -np.inf).astype(np.float32))], {"is_causal": 1}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    inputs, attributes = OPERATORS[name]
    found, site = only_site(one_node("Attention", inputs, ("y",), opset=24, **attributes))
    (answer,) = exact_candidates(SUBJECT, site)
    assert isinstance(answer, Candidate), answer
    assert (answer.parameters["chunks"] > 1) == bool(attributes.get("is_causal"))
    replaced = apply(found, [(site, SUBJECT.lower(site, answer.parameters, 24))])
    assert [n.op_type for n in replaced.graph.node if n.domain == "attncompile"] == ["Attention"]
    values = {n: a for n, a in inputs if a is not None}
    want, got = (run(proto, values, ["y"])["y"] for proto in (found.proto, replaced))
    assert not np.isnan(want).any()
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def gain(site: AttentionSite) -> float:
    (found,) = exact_candidates(SUBJECT, site)
    assert isinstance(found, Candidate)
    shape = Shape(1, 1024, 1024)
    return predicted_gain(site, SUBJECT.cost(site, found.parameters, shape), shape)


def test_a_gain_is_predicted_where_there_is_one(case) -> None:
    causal, at = MaskPart("causal", SHOWN, -1, 0), case(queries=1024, static=True)
    window = MaskPart("window", SHOWN, 15, 0)
    bias = MaskPart("bias", Certificate("evaluated", ""), source="b", additive=True)
    assert gain(at.site(mask=MaskFacts())) == gain(at.site(softcap=30.0)) == pytest.approx(1.0)
    assert gain(at.site(mask=MaskFacts((bias,)))) == gain(at.site(mask=MaskFacts((window,)))) == pytest.approx(1.0)
    half = gain(at.site(mask=MaskFacts((causal,))))
    assert half > 1.7
    assert gain(at.site(mask=MaskFacts((causal, bias)), softcap=30.0)) == pytest.approx(half)


def test_what_the_lowering_reads(case) -> None:
    """Everything at once, in the op's order; sinks, lengths and a scale a head are brought to what the op takes."""
    bias = MaskPart("bias", Certificate("evaluated", ""), source="b", additive=True)
    parts = (
        MaskPart("causal", SHOWN, -1, 0), bias, MaskPart("opaque", SHOWN, source="m", as_input=True),
        MaskPart("padding", SHOWN, source="p"),
    )  # fmt: skip
    mask = MaskFacts(parts, "zero", ends=KeyEnds("n", 1, "sequence"))
    with pytest.raises(Unsupported, match="aligned at each batch entry's last key"):
        SUBJECT.lower(case().site(mask=replace(mask, ends=KeyEnds("n", 1, "ends"))), {"right": 0}, 18)
    site = case().site(mask=mask, sinks="s", head_scale="h", softcap=30.0)
    (found,) = exact_candidates(SUBJECT, site)
    assert isinstance(found, Candidate)
    lowered = SUBJECT.lower(site, found.parameters, 18)
    node = lowered.nodes[-1]
    assert node.input[1:6] == ["k", "v", "p", "b", "dense/test/sinks"] and node.input[6] == "m"
    assert node.input[0] == "head_scale/test/query" and node.input[7] == "dense/test/lengths"
    assert [n.op_type for n in lowered.nodes] == [
        "Reshape",
        "Cast",
        "Mul",
        "Reshape",
        "Reshape",
        "Cast",
        "Add",
        "Attention",
    ]
    attributes = {a.name: a for a in node.attribute}
    assert (attributes["right"].i, attributes["softcap"].f, attributes["masked_rows"].s) == (0, 30.0, b"zero")


@pytest.mark.parametrize(
    ("parts", "changes", "code"),
    [
        ([("bias", {"source": "a", "additive": True}), ("bias", {"source": "b", "additive": True})], {}, "bias"),
        ([("bias", {"additive": True, "number": -100.0})], {}, "bias"),
        ([("bias", {"source": "a", "additive": True, "places": True})], {}, "bias"),
        ([("opaque", {"source": "a"})], {}, "mask"),
        ([("block_sparse", {})], {}, "mask"),
        ([("opaque", {"source": "a", "as_input": True}), ("opaque", {"source": "b", "as_input": True})], {}, "mask"),
        ([("padding", {"source": "a", "tokens": True})], {}, "needs"),
        ([("padding", {"source": "a", "additive": True})], {}, "mask"),
        ([("padding", {"source": "a"})], {"sinks": "s"}, "sinks"),
        ([("padding", {"source": "a"})], {}, "masked-rows"),
        ([], {"log_sum_exp": "l"}, "needs"),
        ([], {"quantised": "int8"}, "needs"),
        ([], {"heads": 5}, "heads"),
    ],
)
def test_refusals(case, parts: list[Any], changes: dict[str, Any], code: str) -> None:
    evaluated = Certificate("evaluated", "given by the test")
    mask = MaskFacts(tuple(MaskPart(kind, evaluated, **more) for kind, more in parts), "uniform", (-1e4,))
    (answer,) = exact_candidates(SUBJECT, case(static=True).site(mask=mask, **changes))
    assert not isinstance(answer, Candidate) and answer.code == code and answer.reason, answer


def test_parameters_of_another_site_are_not_exact(case) -> None:
    causal = MaskPart("causal", SHOWN, -1, 0)
    site = case().site(mask=MaskFacts((causal,)), softcap=30.0)
    right = {"left": -1, "right": 0, "softcap": 30.0, "masked_rows": "zero", "chunks": 1}
    assert SUBJECT.is_exact_for(site, right).ok
    wrong = {"left": 3, "right": 1, "softcap": 29.0, "masked_rows": "nan"}
    for name, value in wrong.items():
        assert not SUBJECT.is_exact_for(site, {**right, name: value}).ok, name
    old = SUBJECT.supports(site, {"causal": True, "chunks": 1})
    assert not old.ok and old.code == "parameters" and "right = 0" in old.hint


def strict(proto: ModelProto, values: dict[str, np.ndarray]) -> np.ndarray:
    """Every value in its own type, as on a GPU; ONNX Runtime's CPU provider keeps scores in float32."""
    with np.errstate(all="ignore"):
        (got,) = ReferenceEvaluator(proto).run(None, values)
    return np.asarray(got)


def test_half_precision_keeps_its_guard() -> None:
    """Scores that overflow float16 are NaN and then 0 in the source, and so they are in the body; without the guard
    the replacement is not exact. On a CPU nothing is gained with it.
    """
    spec = Spec(batch=1, heads=2, kv_heads=2, length=70, head_dim=16, mask="none", guard=True, scale_at="query")
    proto = retype(build(spec), {TensorProto.FLOAT: TensorProto.FLOAT16})
    found, site = only_site(proto)
    assert site.dtype == "float16" and site.mask.guarded
    (answer,) = exact_candidates(SUBJECT, site)
    assert isinstance(answer, Candidate) and answer.parameters["guard"] is True
    bare = {n: v for n, v in answer.parameters.items() if n != "guard"}
    assert SUBJECT.is_exact_for(site, bare).code == "guard"
    shape = Shape(1, 70, 70)
    assert predicted_gain(site, SUBJECT.cost(site, answer.parameters, shape), shape) == pytest.approx(1.0)
    assert "float16" in SUBJECT.assumptions(site, answer.parameters)[0].statement  # type: ignore[attr-defined]
    width = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    for size, zeros in ((1.0, False), (3000.0, True)):
        values = {"x": (RNG.standard_normal((1, 70, width)) * size).astype(np.float16)}
        want = strict(found.proto, values)
        assert bool((want == 0).any()) == zeros and not np.isnan(want).any()
        for parameters, same in ((answer.parameters, True), (bare, not zeros)):
            replaced = apply(found, [(site, SUBJECT.lower(site, parameters, 18))])
            assert np.allclose(strict(replaced, values), want, rtol=2e-2, atol=2e-2 * size) == same
