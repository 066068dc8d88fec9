"""Function bodies in ONNX Runtime on the CPU, against float64 within the budget of their type; bfloat16 cannot run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.errors import Unsupported
from attncompile.plugins.attention import dense
from attncompile.plugins.block_sparse import listed
from tests.conformance import bodies, vectorised
from tests.conformance.budget import wrong, wrong_sums
from tests.conformance.case import Case
from tests.conformance.cases import CASES, named
from tests.conformance.random_cases import random_cases

NEWEST = 28
WAYS = {
    "Attention": ((1, False), (3, False), (1, True), (3, True)), "NeighborhoodAttention": ((1, False),),
    "BlockSparseAttention": ((1, True),),
}  # fmt: skip
"""(chunks, dynamic lengths)."""
COUNTS = {"Attention": 30, "NeighborhoodAttention": 30, "BlockSparseAttention": 8}
"""Random cases of each op."""


def verdict(case: Case, dtype: str, made: onnx.ModelProto) -> str:
    """What is wrong with the outputs; empty if nothing is."""
    got, inputs = bodies.run(made, case, dtype), case.inputs()
    want, lse = vectorised.expected(case.call, inputs)
    low, low_lse = vectorised.expected(case.call, inputs, half=dtype, scores=True)
    said = wrong(got["output"], want, low, dtype)
    if "log_sum_exp" in got and not said:
        said = wrong_sums(got["log_sum_exp"], lse, low_lse, case.call.attributes.get("softcap", 0.0))
    return said


def check(case: Case, **options: Any) -> None:
    given = case.call.attributes
    if "bias" in case.call.inputs and (given.get("prefix") or given.get("suffix")):
        with pytest.raises(Unsupported, match="prefix and suffix"):
            bodies.model(case, "float32")
        return
    for dtype in ("float32", "float16"):
        if dtype == "float16" and case.call.dtype != "float16":
            continue  # its numbers may not be exact in float16
        for chunks, dynamic in WAYS[case.call.op]:
            bounded = case.call.op != "Attention" or max(case.call.attributes[s] for s in ("left", "right")) >= 0
            if chunks == 1 or bounded:
                said = verdict(case, dtype, bodies.model(case, dtype, chunks=chunks, dynamic=dynamic, **options))
                assert not said, (dtype, chunks, dynamic, said)


RANDOM = [c for op, count in COUNTS.items() for c in random_cases(op, 11, count, 300_000)]


@pytest.mark.parametrize("case", [c for cases in CASES.values() for c in cases], ids=str)
def test_named(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("opset", range(18, NEWEST + 1))
def test_opsets(opset: int) -> None:
    for name in ("all inputs", "rows without a key: uniform, causal", "softcap", "one sink for all heads"):
        case = named("Attention", name)
        for chunks in (1, 3) if max(case.call.attributes[s] for s in ("left", "right")) >= 0 else (1,):
            assert not verdict(case, "float32", bodies.model(case, "float32", opset, chunks, dynamic=chunks > 1))


def test_bodies_are_standard_ops_without_idle_constants() -> None:
    for case in CASES["Attention"]:
        proto = bodies.model(case, "float16", chunks=3 if case.call.attributes["right"] >= 0 else 1, dynamic=True)
        inlined = onnx.inliner.inline_local_functions(proto)
        assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}
        read = {i for n in inlined.graph.node for i in (*n.input, *_inner(n))}
        idle = [n.output[0] for n in inlined.graph.node if n.op_type == "Constant" and n.output[0] not in read]
        assert not idle, (case.name, idle)


def _inner(node: onnx.NodeProto) -> list[str]:
    graphs = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [i for g in graphs for n in g.node for i in (*n.input, *_inner(n))] + [
        o.name for g in graphs for o in g.output
    ]


def test_shapes_are_inferred() -> None:
    case = replace(named("Attention", "all inputs"), layouts=("BHND", "BNHD", "BHND", "BNHD"))
    proto = bodies.model(case, "float32")
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    del proto.functions[:]  # what the schema says, not what the body gives
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    shapes = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in inferred.graph.output]
    assert shapes == [[2, 41, 4, 32], [2, 4, 41]]


PLANTED: list[tuple[str, str, dict[str, Any]]] = [
    ("Attention", "17 queries, 50 keys, window", {"left": 10}),
    ("Attention", "17 queries, 50 keys, window", {"right": 2}),
    ("Attention", "MQA, mixed layouts", {"right": 1}),
    ("Attention", "all inputs", {"left": 29}),
    ("Attention", "softcap and bias", {"softcap": 2.6}),
    ("Attention", "rows without a key: zero, dense", {"masked_rows": "nan"}),
    ("Attention", "rows without a key: uniform, causal", {"masked_rows": "zero"}),
    ("NeighborhoodAttention", "1-D", {"kernel_size": [8]}),
    ("NeighborhoodAttention", "2-D, left", {"left": [1, 1]}),
    ("NeighborhoodAttention", "2-D, groups", {"stride": [2, 2]}),
    ("NeighborhoodAttention", "3-D, clamp", {"kernel_size": [2, 3, 2]}),
    ("NeighborhoodAttention", "2-D, ball", {"shape": "box"}),
    ("BlockSparseAttention", "rows without a key: uniform", {"masked_rows": "zero"}),
    ("BlockSparseAttention", "rows without a key: zero", {"masked_rows": "nan"}),
]


@pytest.mark.parametrize(("op", "name", "planted"), PLANTED, ids=str)
def test_an_off_by_one_is_noticed(op: str, name: str, planted: dict[str, Any]) -> None:
    case = named(op, name)
    for dtype in ("float32", "float16"):
        assert verdict(case, dtype, bodies.model(case, dtype, **planted))


def test_a_wrong_scale_and_wrong_key_heads_are_noticed() -> None:
    case = named("Attention", "GQA, batch 2, heads first")
    call = bodies.call_of(case, "float16", 18, False)
    assert verdict(case, "float16", bodies.model(case, "float16", call=replace(call, scale=call.scale * 1.02)))
    inputs = case.inputs()
    inputs["key"], inputs["value"] = (np.roll(inputs[n], 1, axis=2) for n in ("key", "value"))
    want, _ = vectorised.expected(case.call, inputs)
    got = bodies.run(bodies.model(case, "float16"), case, "float16")["output"]
    low, _ = vectorised.expected(case.call, inputs, half="float16", scores=True)
    assert wrong(got, want, low, "float16")


PLANTED_IN_BODIES = {
    "a chunk ends one key early": ("_reach", lambda right: lambda *a: _short(right, a), "MQA, mixed layouts"),
    "rows are not mended": ("_mended", lambda right: lambda form, call: False, "rows without a key: zero, causal"),
}  # fmt: skip


def _short(right: Any, arguments: Any) -> tuple[str, str]:
    body = arguments[0]
    first, last = right(*arguments)
    return first, body.op("Max", body.op("Sub", last, body.ints(1)), body.op("Add", first, body.ints(1)))


@pytest.mark.parametrize("planted", PLANTED_IN_BODIES)
def test_an_error_planted_in_the_body_is_noticed(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, of = PLANTED_IN_BODIES[planted]
    case = named("Attention", of)
    assert not verdict(case, "float16", bodies.model(case, "float16", chunks=3))
    monkeypatch.setattr(dense, name, change(getattr(dense, name)))
    assert verdict(case, "float16", bodies.model(case, "float16", chunks=3))


def _all_full(right: Any) -> Any:
    return lambda self, entry, there, partial, *a: right(self, entry, there, self.op("Less", entry, self.ints(0)), *a)


PLANTED_IN_LISTED = {
    "the first block": ("_numbered", lambda right: lambda self, *a: self.op("Mul", right(self, *a), self.ints(0))),
    "keys beyond the end": ("_visible", lambda right: lambda self, *a: right(self, *a[:-1], self.ints(1 << 20))),
    "partial blocks taken for full ones": ("_visible", _all_full),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED_IN_LISTED)
def test_an_error_planted_in_the_body_of_any_lists_is_noticed(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = PLANTED_IN_LISTED[planted]
    case = named("BlockSparseAttention", "128, lists of heads and batch entries")
    assert not verdict(case, "float16", bodies.model(case, "float16", dynamic=True))
    monkeypatch.setattr(listed._Writer, name, change(getattr(listed._Writer, name)))
    assert verdict(case, "float16", bodies.model(case, "float16", dynamic=True))


@pytest.mark.parametrize("opset", [18, 20, 23, NEWEST])
def test_opsets_of_the_body_of_any_lists(opset: int) -> None:
    for name in ("all inputs", "rows without a key: uniform"):
        case = named("BlockSparseAttention", name)
        assert not verdict(case, "float32", bodies.model(case, "float32", opset, dynamic=True))
