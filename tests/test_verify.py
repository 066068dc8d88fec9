"""Verification of sites and models: right replacements pass, every seeded mistake is caught, nothing is no pass."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx import numpy_helper as nh

from attncompile.core.errors import AttncompileError, BadArguments, BadModel
from attncompile.core.model import Model
from attncompile.core.site import Operand
from attncompile.measure import open_session, run_session
from attncompile.verification.reference import largest_intermediate
from attncompile.verification.retype import TO_DOUBLE, retype
from attncompile.verification.rows import choose_rows, sample_rows
from attncompile.verify import (
    Baseline,
    Case,
    SiteCheck,
    cases,
    check_feed,
    check_site,
    compare_models,
    compare_output,
    compare_patterns,
    exact_budget,
    load_inputs,
    make_inputs,
    padded_feeds,
)

F32, F16, BF16, BOOL, I64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.BOOL,
    TensorProto.INT64,
)
H, D = 2, 8
ROLES = {"query": "q", "key": "k", "value": "v"}
NEGATIVE: dict[int, float] = {F32: -3e38, F16: -6e4, BF16: -3e38}


COMMON = (
    "random", "large logits", "uniform", "equal keys", "zeros", "one key dominates", "logits of 10,000", "denormals",
    "huge values",
)  # fmt: skip
BEYOND = ("products beyond float16", "logits beyond float16")


def model_of(
    nodes: list[NodeProto], shapes: dict[str, tuple[list[Any], int]], out: tuple[list[Any], int], inits: dict[str, Any],
    functions: tuple[Any, ...] = (), opset: int = 18,
) -> ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "site",
        [helper.make_tensor_value_info(n, t, s) for n, (s, t) in shapes.items()],
        [helper.make_tensor_value_info("out", out[1], out[0])],
        [nh.from_array(np.asarray(v), n) for n, v in inits.items()],
    )
    opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid(d, 1) for d in {f.domain for f in functions}]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
    onnx.checker.check_model(model)
    return model


def visible(n: int, left: int, right: int) -> np.ndarray:
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    return (distance >= -left) & (distance <= right)


def operands(n: int, dtype: int, padding: bool) -> dict[str, tuple[list[Any], int]]:
    shapes: dict[str, tuple[list[Any], int]] = {x: ([1, H, n, D], dtype) for x in "qkv"}
    if padding:
        shapes["keep"] = ([1, 1, 1, n], BOOL)
    return shapes


def dense(
    n: int, left: int = 3, right: int = 2, dtype: int = F32, padding: bool = False, masked: float | None = None,
    swap: bool = False,
) -> ModelProto:  # fmt: skip
    """The original: MatMul, scale, additive window mask, softmax, MatMul. ``masked`` is the score of a hidden key."""
    np_type = helper.tensor_dtype_to_np_dtype(dtype)
    low = NEGATIVE[dtype] if masked is None else masked
    mask = np.where(visible(n, left, right), 0.0, low)[None, None].astype(np_type)
    key, value = ("v", "k") if swap else ("k", "v")
    nodes = [
        helper.make_node("Transpose", [key], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"]),
        helper.make_node("Mul", ["raw", "scale"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["windowed"]),
    ]
    inits: dict[str, Any] = {"scale": np.array(D**-0.5, np_type), "mask": mask}
    last = "windowed"
    if padding:
        nodes.append(helper.make_node("Where", ["keep", "windowed", "low"], ["padded"]))
        inits["low"] = np.array(low, np_type)
        last = "padded"
    nodes += [
        helper.make_node("Softmax", [last], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", value], ["out"]),
    ]
    return model_of(nodes, operands(n, dtype, padding), ([1, H, n, D], dtype), inits)


def blocked(
    n: int, left: int = 3, right: int = 2, dtype: int = F32, padding: bool = False, masked: float | None = None,
    block: int = 64, nan_guard: bool = False,
) -> ModelProto:  # fmt: skip
    """A replacement in our domain: blocks of queries against the keys that they can see, in a function body."""
    np_type = helper.tensor_dtype_to_np_dtype(dtype)
    low = NEGATIVE[dtype] if masked is None else masked
    see = visible(n, left, right)
    body: list[NodeProto] = []

    def const(name: str, value: Any) -> str:
        body.append(helper.make_node("Constant", [], [name], value=nh.from_array(np.asarray(value))))
        return name

    def cut(source: str, name: str, lo: int, hi: int, axis: int) -> str:
        args = [const(f"{name}_{i}", np.array([x], np.int64)) for i, x in enumerate((lo, hi, axis))]
        body.append(helper.make_node("Slice", [source, *args], [name]))
        return name

    const("scale", np.array(D**-0.5, np_type))
    const("low", np.array(low, np_type))
    const("zero", np.array(0, np_type))
    parts = []
    for b, start in enumerate(range(0, n, block)):
        stop = min(n, start + block)
        lo, hi = max(0, start - left), min(n, stop + right)
        q, k, v = cut("q", f"q{b}", start, stop, 2), cut("k", f"k{b}", lo, hi, 2), cut("v", f"v{b}", lo, hi, 2)
        mask = const(f"m{b}", np.where(see[start:stop, lo:hi], 0.0, low)[None, None].astype(np_type))
        body.append(helper.make_node("Transpose", [k], [f"kt{b}"], perm=[0, 1, 3, 2]))
        body.append(helper.make_node("MatMul", [q, f"kt{b}"], [f"r{b}"]))
        body.append(helper.make_node("Mul", [f"r{b}", "scale"], [f"s{b}"]))
        body.append(helper.make_node("Add", [f"s{b}", mask], [f"w{b}"]))
        last = f"w{b}"
        if padding:
            keep = cut("keep", f"keep{b}", lo, hi, 3)
            body.append(helper.make_node("Where", [keep, last, "low"], [f"x{b}"]))
            last = f"x{b}"
        body.append(helper.make_node("Softmax", [last], [f"p{b}"], axis=-1))
        last = f"p{b}"
        if nan_guard:
            body.append(helper.make_node("IsNaN", [last], [f"nan{b}"]))
            body.append(helper.make_node("Where", [f"nan{b}", "zero", last], [f"g{b}"]))
            last = f"g{b}"
        body.append(helper.make_node("MatMul", [last, v], [f"o{b}"]))
        parts.append(f"o{b}")
    body.append(helper.make_node("Concat", parts, ["out"], axis=2))
    shapes = operands(n, dtype, padding)
    opset = [helper.make_opsetid("", 18)]
    function = helper.make_function("attncompile", "Window", list(shapes), ["out"], body, opset)
    node = helper.make_node("Window", list(shapes), ["out"], domain="attncompile")
    return model_of([node], shapes, ([1, H, n, D], dtype), {}, (function,))


def site_cases(n: int, dtype: int = F32, padding: bool = False) -> tuple[Case, ...]:
    roles = {**ROLES, "padding": "keep"} if padding else ROLES
    return cases(operands(n, dtype, padding), {}, roles, seed=7, fill=NEGATIVE[dtype])


def failed(check: SiteCheck) -> set[str]:
    return {c.case for c in check.checks if not c.verdict.ok}


# --- one site ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16])
def test_right_replacement_passes(dtype: int) -> None:
    check = check_site(dense(130, dtype=dtype), blocked(130, dtype=dtype), site_cases(130, dtype))
    assert check.passed, check.verdict.reason
    assert {c.case for c in check.checks} == {*COMMON, *(BEYOND if dtype == F16 else ())}
    assert all(c.reference == "float64 (ONNX Runtime)" for c in check.checks)
    assert all(c.rows == 130 * H for c in check.checks if "float16" not in c.case)
    assert max(c.error for c in check.checks if c.case in COMMON[:3]) < (1e-6 if dtype == F32 else 1e-2)
    assert json.loads(json.dumps(check.to_json()))["passed"] is True


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("left", "right"), [(2, 2), (4, 2), (3, 1), (3, 3), (2, 3)])
def test_off_by_one_window_fails(dtype: int, left: int, right: int) -> None:
    check = check_site(dense(70, dtype=dtype), blocked(70, left, right, dtype=dtype), site_cases(70, dtype))
    assert not check.passed and check.verdict.code == "inexact"
    assert {"random", "uniform"} <= failed(check)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_wide_window_off_by_one_is_caught_by_the_uniform_case(dtype: int) -> None:
    """N = 257, window of 255 keys: only the border rows differ, each by one key of 255."""
    n, left = 257, 254
    check = check_site(dense(n, left, 0, dtype), blocked(n, left - 1, 0, dtype), site_cases(n, dtype))
    assert not check.passed and "uniform" in failed(check)
    good = check_site(dense(n, left, 0, dtype), blocked(n, left, 0, dtype), site_cases(n, dtype))
    assert good.passed, good.verdict.reason


def test_swapped_key_and_value_fail() -> None:
    check = check_site(dense(40), dense(40, swap=True), site_cases(40))
    assert not check.passed and check.verdict.code == "inexact"


def test_missing_scale_fails() -> None:
    wrong = dense(40)
    wrong.graph.initializer[0].CopyFrom(nh.from_array(np.array(1.0, np.float32), "scale"))
    assert failed(check_site(dense(40), wrong, site_cases(40))) >= {"random", "large logits"}


def test_missing_max_subtraction_fails_on_large_logits() -> None:
    """exp without the row maximum overflows in float32 where a score is above 88, and is right on small scores."""
    wrong = dense(40, 40, 40)
    index = next(i for i, n in enumerate(wrong.graph.node) if n.op_type == "Softmax")
    replacement = [
        helper.make_node("Exp", ["windowed"], ["e"]),
        helper.make_node("ReduceSum", ["e", "last"], ["sum"], keepdims=1),
        helper.make_node("Div", ["e", "sum"], ["p"]),
    ]
    nodes = list(wrong.graph.node)
    nodes[index : index + 1] = replacement
    del wrong.graph.node[:]
    wrong.graph.node.extend(nodes)
    wrong.graph.initializer.append(nh.from_array(np.array([-1], np.int64), "last"))
    normal, large, uniform = site_cases(40)[:3]
    assert check_site(dense(40, 40, 40), wrong, [normal, uniform]).passed
    hotter = {k: v * np.float32(1.2) if k in "qk" else v for k, v in large.feed.items()}
    check = check_site(dense(40, 40, 40), wrong, [Case("hot", hotter)])
    assert not check.passed and check.verdict.code == "nan_pattern"


def test_padding_cases() -> None:
    original, good = dense(70, padding=True), blocked(70, padding=True)
    all_cases = site_cases(70, padding=True)
    paddings = {f"{x} padding" for x in ("left", "right", "middle", "scattered")} | {"fully masked"}
    assert paddings <= {c.name for c in all_cases}
    # A finite mask makes fully masked rows uniform over *all* keys, which a window of keys cannot give.
    check = check_site(original, good, all_cases)
    assert failed(check) == paddings - {"scattered padding"}, "only there every window keeps a key"
    # With -inf such rows are NaN on both sides, which is the same.
    original, good = (f(70, padding=True, masked=-np.inf) for f in (dense, blocked))
    check = check_site(original, good, all_cases)
    assert check.passed, check.verdict.reason
    assert max(c.masked for c in check.checks) > 0
    assert any("'fully masked' not judged" in x for x in check.labels)  # nothing but NaN, on both sides


def test_nothing_but_nan_is_no_pass() -> None:
    full = [c for c in site_cases(70, padding=True) if c.name == "fully masked"]
    check = check_site(dense(70, padding=True, masked=-np.inf), blocked(70, padding=True, masked=-np.inf), full)
    assert not check.passed and check.verdict.code == "nothing_compared"


@pytest.mark.parametrize("guard_ours", [True, False])
def test_nan_on_one_side_only_fails(guard_ours: bool) -> None:
    left = [c for c in site_cases(70, padding=True) if c.name == "left padding"]
    guarded = blocked(70, padding=True, masked=-np.inf, nan_guard=True)
    bare = blocked(70, padding=True, masked=-np.inf)
    check = check_site(bare, guarded, left) if guard_ours else check_site(guarded, bare, left)
    assert not check.passed and check.verdict.code == "nan_pattern"
    assert ("original" if guard_ours else "replacement") in check.verdict.reason


def test_bfloat16_is_checked_on_a_twin() -> None:
    check = check_site(dense(70, dtype=BF16), blocked(70, dtype=BF16), site_cases(70, BF16))
    assert check.passed, check.verdict.reason
    assert any("float32 twin" in x for x in check.labels)
    assert not check_site(dense(70, dtype=BF16), blocked(70, 2, 2, dtype=BF16), site_cases(70, BF16)).passed


def test_no_cases_and_empty_outputs_are_no_pass() -> None:
    assert check_site(dense(40), blocked(40), []).verdict.code == "nothing_compared"
    empty = model_of([helper.make_node("Relu", ["q"], ["out"])], {"q": ([0, 4], F32)}, ([0, 4], F32), {})
    check = check_site(empty, empty, [{"q": np.zeros((0, 4), np.float32)}])
    assert not check.passed and check.verdict.code == "nothing_compared"


def test_replacement_that_does_not_load_or_run_is_a_verdict() -> None:
    wrong = blocked(40)
    del wrong.functions[:]
    assert check_site(dense(40), wrong, site_cases(40)).verdict.code == "replaced_failed"
    shapes = operands(40, F32, False)
    reshape = [helper.make_node("Reshape", ["q", "to"], ["out"])]
    broken = model_of(reshape, shapes, ([1, H, 40, D], F32), {"to": np.array([7, 7, 7, 7])})
    assert check_site(dense(40), broken, site_cases(40)).verdict.code == "replaced_failed"


def test_other_shape_fails() -> None:
    wrong = blocked(40)
    nodes = [*wrong.graph.node, helper.make_node("Transpose", ["raw"], ["out"], perm=[0, 2, 1, 3])]
    nodes[0].output[0] = "raw"
    del wrong.graph.node[:]
    wrong.graph.node.extend(nodes)
    for i, d in enumerate((1, 40, H, D)):
        wrong.graph.output[0].type.tensor_type.shape.dim[i].dim_value = d
    assert check_site(dense(40), wrong, site_cases(40)).verdict.code == "shape_differs"


def attention_op(n: int, causal: int, opset: int = 23) -> ModelProto:
    nodes = [helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=causal)]
    return model_of(nodes, operands(n, F32, False), ([1, H, n, D], F32), {}, opset=opset)


def test_standard_attention_op_has_a_float64_reference() -> None:
    n = 40
    check = check_site(dense(n, n, 0), attention_op(n, 1), site_cases(n))
    assert check.passed, check.verdict.reason
    check = check_site(attention_op(n, 1), blocked(n, n, 0), site_cases(n))
    assert check.passed and all(c.reference.startswith("float64") for c in check.checks), check.verdict.reason
    assert not check_site(attention_op(n, 1), blocked(n, n, 1), site_cases(n)).passed


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_budget_is_three_times_the_originals_error() -> None:
    truth = np.ones((4, 4))
    original = (truth + 1e-3).astype(np.float32)
    assert compare_output(original, (truth + 2.9e-3).astype(np.float32), truth).verdict.ok
    worse = compare_output(original, (truth + 3.1e-3).astype(np.float32), truth)
    assert worse.verdict.code == "inexact"
    assert worse.error == pytest.approx(3.1e-3, rel=1e-3) and worse.budget == pytest.approx(3e-3, rel=1e-3)


def test_floor_of_a_few_rounding_units() -> None:
    truth = np.full((4, 4), 100.0)
    original = truth.astype(np.float32)  # no error at all
    unit = 100 * np.finfo(np.float32).eps
    assert compare_output(original, (truth + 3 * unit).astype(np.float32), truth).verdict.ok
    assert not compare_output(original, (truth + 6 * unit).astype(np.float32), truth).verdict.ok


def test_patterns() -> None:
    a = np.array([[1.0, np.nan], [np.inf, 2.0]], np.float32)
    assert compare_patterns(a, a.copy()).ok
    for other in ([[1.0, 1.0], [np.inf, 2.0]], [[1.0, np.nan], [-np.inf, 2.0]], [[np.nan, np.nan], [np.inf, 2.0]]):
        assert compare_patterns(a, np.array(other, np.float32)).code == "nan_pattern"
    assert compare_patterns(a, a.astype(np.float16)).code == "shape_differs"


def test_reference_that_is_not_finite_is_no_pass() -> None:
    a = np.ones((2, 2), np.float32)
    truth = np.array([[1.0, np.nan], [1.0, 1.0]])
    assert compare_output(a, a, truth).verdict.code == "no_reference"


# --- sampled rows -----------------------------------------------------------------------------------------------------


def test_largest_intermediate_counts_scores() -> None:
    assert largest_intermediate(dense(40)) == H * 40 * 40
    assert largest_intermediate(attention_op(40, 0)) == H * 40 * 40


@pytest.mark.parametrize("padding", [False, True])
def test_above_the_memory_cap_query_rows_are_sampled(padding: bool) -> None:
    n, query = 700, Operand("q", "BHND")
    masked = -np.inf if padding else None
    original, good = dense(n, padding=padding, masked=masked), blocked(n, padding=padding, masked=masked)
    original.graph.output[0].type.tensor_type.ClearField("shape")  # as extracted sites come
    some = [c for c in site_cases(n, padding=padding) if c.name != "fully masked"]
    check = check_site(original, good, some, query=query, memory_cap=1 << 20)
    assert check.passed, check.verdict.reason
    assert any("sampled query rows" in x for x in check.labels)
    assert all("query rows" in c.reference and H * 256 <= c.rows + c.masked < H * n for c in check.checks)
    wrong = check_site(
        original, blocked(n, 2, 2, padding=padding, masked=masked), some, query=query, memory_cap=1 << 20
    )
    assert not wrong.passed and {"random", "uniform"} <= failed(wrong)


def test_sampled_reference_equals_the_whole_one() -> None:
    n, query = 700, Operand("q", "BHND")
    original, feed = dense(n), dict(site_cases(n)[0].feed)
    whole = run_session(open_session(original.SerializeToString(), 1), feed)[0]
    cut, rows = sample_rows(original, query, choose_rows(original, query, whole))
    assert rows.axis == 2 and {0, n - 1} <= set(rows.index.tolist()) and len(rows.index) >= 256
    part = run_session(open_session(cut.SerializeToString(), 1), feed)[0]
    np.testing.assert_allclose(part, rows.take(whole), rtol=0, atol=1e-6)


def test_the_mask_of_sampled_rows_is_computed_for_them_alone() -> None:
    """A causal mask made in the graph, as exporters do: in float64 a whole one of 8,192 tokens takes half a gigabyte,
    several times over.
    """
    n, query = 700, Operand("q", "BHND")
    shapes: dict[str, tuple[list[Any], int]] = {x: ([1, H, n, D], F32) for x in "qkv"}
    nodes = [
        helper.make_node("Expand", ["one", "square"], ["ones"]),
        helper.make_node("Trilu", ["ones"], ["lower"], upper=0),
        helper.make_node("Equal", ["lower", "zero"], ["hidden"]),
        helper.make_node("Where", ["hidden", "low", "zero"], ["mask"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"]),
        helper.make_node("Add", ["raw", "mask"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["out"]),
    ]
    inits = {
        "one": np.float32(1), "zero": np.float32(0), "low": np.float32(-np.inf), "square": np.array([n, n]),
    }  # fmt: skip
    original = model_of(nodes, shapes, ([1, H, n, D], F32), {k: np.asarray(v) for k, v in inits.items()})
    feed = dict(cases(shapes, {}, ROLES)[0].feed)
    whole = run_session(open_session(original.SerializeToString(), 1), feed)[0]
    cut, rows = sample_rows(original, query, choose_rows(original, query, whole))
    part = run_session(open_session(cut.SerializeToString(), 1), feed)[0]
    np.testing.assert_allclose(part, rows.take(whole), rtol=0, atol=1e-6)
    made = {o for x in cut.graph.node for o in x.output}
    assert "lower" in made and not made & {"hidden", "mask"}, "the triangle itself is made for all rows, and no more"


def test_rows_follow_reshapes_and_transposes() -> None:
    """[B, N, H, D] operands, folded to [B * H, N, D] and back to [B, N, H * D], with a bias over query and key."""
    n = 300
    shapes: dict[str, tuple[list[Any], int]] = {x: ([1, n, H, D], F32) for x in "qkv"}
    shapes["bias"] = ([1, 1, n, n], F32)
    nodes = []
    for x in "qkv":
        perm = [0, 2, 3, 1] if x == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [x], [f"{x}t"], perm=perm))
        nodes.append(helper.make_node("Reshape", [f"{x}t", f"{x}_fold"], [f"{x}f"]))
    nodes += [
        helper.make_node("MatMul", ["qf", "kf"], ["raw"]),
        helper.make_node("Reshape", ["raw", "scores_shape"], ["scores"]),
        helper.make_node("Add", ["scores", "bias"], ["biased"]),
        helper.make_node("Softmax", ["biased"], ["p"], axis=-1),
        helper.make_node("Reshape", ["p", "p_fold"], ["pf"]),
        helper.make_node("MatMul", ["pf", "vf"], ["of"]),
        helper.make_node("Reshape", ["of", "unfold"], ["oh"]),
        helper.make_node("Transpose", ["oh"], ["on"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["on", "merge"], ["out"]),
    ]
    inits = {
        "q_fold": np.array([-1, n, D]), "v_fold": np.array([-1, n, D]), "k_fold": np.array([-1, D, n]),
        "scores_shape": np.array([1, H, n, n]), "p_fold": np.array([H, n, n]), "unfold": np.array([1, H, n, D]),
        "merge": np.array([0, 0, -1]),
    }  # fmt: skip
    original = model_of(nodes, shapes, ([1, n, H * D], F32), inits)
    query = Operand("q", "BNHD")
    check = check_site(original, original, cases(shapes, {}, ROLES), query=query, memory_cap=1 << 18)
    assert check.passed and any("sampled query rows" in x for x in check.labels), (check.verdict, check.labels)


def test_what_cannot_be_cut_is_compared_in_its_own_precision_and_says_so() -> None:
    n, query = 400, Operand("q", "BHND")
    original = attention_op(n, 1)
    check = check_site(original, blocked(n, n, 0), site_cases(n), query=query, memory_cap=1 << 18)
    assert check.passed, check.verdict.reason
    assert any("own precision" in x for x in check.labels)
    assert any("'large logits' not judged" in x for x in check.labels)
    wrong = check_site(original, blocked(n, n, 1), site_cases(n), query=query, memory_cap=1 << 18)
    assert not wrong.passed
    only_large = [c for c in site_cases(n) if c.large]
    assert not check_site(original, blocked(n, n, 0), only_large, query=query, memory_cap=1 << 18).passed


# --- retype and cases -------------------------------------------------------------------------------------------------


def test_retype_reaches_constants_casts_and_functions() -> None:
    body = [
        helper.make_node("Constant", [], ["c"], value_float=1.5),
        helper.make_node("Cast", ["x"], ["y"], to=F32),
        helper.make_node("Add", ["y", "c"], ["z"]),
    ]
    function = helper.make_function("ours", "F", ["x"], ["z"], body, [helper.make_opsetid("", 18)])
    nodes = [
        helper.make_node("F", ["q"], ["f"], domain="ours"),
        helper.make_node("ConstantOfShape", ["s"], ["zeros"]),
        helper.make_node("Add", ["f", "zeros"], ["out"]),
    ]
    model = model_of(nodes, {"q": ([2], F32)}, ([2], F32), {"s": np.array([2])}, (function,))
    before = model.SerializeToString()
    double = retype(model, TO_DOUBLE)
    assert model.SerializeToString() == before
    out = run_session(open_session(double.SerializeToString(), 1), {"q": np.array([1e-9, 0.0])})[0]
    assert out.dtype == np.float64 and out[0] == 1.5 + 1e-9


def test_cases_are_seeded_and_keep_fixed_values() -> None:
    shapes = operands(20, F32, True)
    fixed = {"keep": np.ones((1, 1, 1, 20), bool)}
    a, b = (cases(shapes, fixed, {**ROLES, "padding": "keep"}, seed=3) for _ in range(2))
    assert [c.name for c in a] == list(COMMON)
    for x, y in zip(a, b, strict=True):
        assert all(np.array_equal(x.feed[k], y.feed[k]) for k in shapes)
        assert x.feed["keep"] is fixed["keep"]
    other = cases(shapes, fixed, ROLES, seed=4)
    assert not np.array_equal(other[0].feed["q"], a[0].feed["q"])


@pytest.mark.parametrize("scale", [None, 1.0, D**-0.5])
def test_large_logits_reach_about_eighty(scale: float | None) -> None:
    (large,) = [c for c in cases(operands(100, F32, False), {}, ROLES, scale=scale) if c.name == "large logits"]
    q, k = large.feed["q"], large.feed["k"]
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * (D**-0.5 if scale is None else scale)
    assert 50 < np.abs(scores).max() < 130


def test_cases_need_their_roles() -> None:
    with pytest.raises(BadArguments, match="'value'"):
        cases(operands(4, F32, False), {}, {"query": "q", "key": "k"})
    with pytest.raises(BadArguments, match="not an input"):
        cases(operands(4, F32, False), {}, {**ROLES, "padding": "nope"})


def test_additive_padding_uses_the_lowest_number() -> None:
    shapes = {**operands(9, F32, False), "pad": ([1, 1, 1, 9], F32)}
    by_name = {c.name: c.feed["pad"] for c in cases(shapes, {}, {**ROLES, "padding": "pad"})}
    assert (by_name["random"] == 0).all()
    assert (by_name["fully masked"] == np.finfo(np.float32).min).all()
    assert np.isneginf(by_name["fully masked, -inf"]).all()
    assert np.isneginf(by_name["left padding, -inf"][..., :3]).all()
    assert (by_name["left padding, -inf"][..., 3:] == 0).all()
    assert (by_name["left padding"][..., :3] == np.finfo(np.float32).min).all()
    assert (by_name["right padding"][..., :6] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 17])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_padding_hides_what_its_name_says(n: int, batch: int) -> None:
    shapes = {x: ([batch, H, n, D], F32) for x in "qkv"} | {"keep": ([batch, 1, 1, n], BOOL)}
    found = {c.name: c.feed["keep"][:, 0, 0] for c in cases(shapes, {}, {**ROLES, "padding": "keep"})}
    assert not found["fully masked"][0].any() and found["fully masked"][1:].all()
    assert found["scattered padding"].any(axis=1).all()
    if n > 2:
        assert not found["left padding"][:, 0].any() and found["left padding"][:, -1].all()
        assert not found["right padding"][:, -1].any() and found["right padding"][:, 0].all()
        middle = found["middle padding"]
        assert middle[:, [0, -1]].all() and not middle.all()
    if n == 17 and batch == 3:
        assert len(np.unique(found["scattered padding"], axis=0)) == 3


def test_extremes_are_what_their_names_say() -> None:
    shapes = operands(50, F16, False)
    scale = 0.5
    found = {c.name: c.feed for c in cases(shapes, {}, ROLES, scale=scale)}

    def logits(name: str) -> np.ndarray:
        q, k = (found[name][x].astype(np.float64) for x in "qk")
        return np.asarray(np.einsum("bhqd,bhkd->bhqk", q, k) * scale)

    assert np.ptp(logits("equal keys"), axis=-1).max() < 1e-9
    assert np.abs(logits("logits of 10,000")).max() == pytest.approx(1e4, rel=1e-2)
    assert np.abs(logits("logits beyond float16")).max() > 65504
    assert (
        np.abs(logits("products beyond float16")).max() / scale
        > 65504
        > np.abs(logits("products beyond float16")).max()
    )
    top = np.sort(logits("one key dominates"), axis=-1)
    assert np.unique(np.diff(np.unique(np.round(top))).round(-1)).tolist() == [40.0]
    tiny = found["denormals"]["v"]
    assert (np.abs(tiny[tiny != 0]) < np.finfo(np.float16).smallest_normal).all() and np.any(tiny != 0)
    assert np.abs(found["huge values"]["v"]).max() > 1e4
    assert not any(found["zeros"][x].any() for x in "qkv")
    assert np.abs(cases(operands(50, F32, False), {}, ROLES)[-1].feed["v"]).max() > 1e30


def test_added_inputs_get_infinities_and_very_large_values() -> None:
    """A bias from an input: what drops -inf, or adds a large one twice, is found; what adds it elsewhere is not."""
    shapes = {**operands(20, F32, False), "bias": ([1, 1, 20, 20], F32)}
    made = cases(shapes, {}, ROLES, biases=["bias", "other"])
    by_name = {c.name.removesuffix(" in bias"): c.feed["bias"] for c in made if "bias of" in c.name}
    assert set(by_name) == {"bias of -inf", "bias of the lowest number", "bias of 10,000s", "bias of -10,000s"}
    assert np.isneginf(by_name["bias of -inf"]).any() and by_name["bias of 10,000s"].max() == 1e4
    assert by_name["bias of the lowest number"].min() == np.finfo(np.float32).min

    def biased(*more: NodeProto) -> ModelProto:
        model = dense(20, 20, 20)
        nodes = list(model.graph.node)
        at = next(i for i, n in enumerate(nodes) if n.op_type == "Softmax")
        nodes[at].input[0] = "biased"
        last = more[-1].output[0] if more else "bias"
        nodes[at:at] = [*more, helper.make_node("Add", ["windowed", last], ["biased"])]
        inits = {t.name: nh.to_array(t) for t in model.graph.initializer} | {"least": np.array(-6, np.float32)}
        return model_of(nodes, shapes, ([1, H, 20, D], F32), inits)

    assert check_site(biased(), biased(), made).passed
    clipped = check_site(biased(), biased(helper.make_node("Max", ["bias", "least"], ["clipped"])), made)
    hiding = {"bias of -inf in bias", "bias of the lowest number in bias", "bias of -10,000s in bias"}
    assert failed(clipped) == hiding, "a bias of a few units is left as it is"
    twice = check_site(biased(), biased(helper.make_node("Add", ["bias", "bias"], ["twice"])), made)
    assert {"random", "huge values", "large logits"} <= failed(twice)


def test_the_head_dim_may_lie_on_any_axis() -> None:
    """[B, H, D, N], as some linear attention has it: the same products as of [B, H, N, D]."""
    (plain,), (turned,) = (
        [c for c in cases(dict.fromkeys("qkv", (s, F32)), {}, ROLES, dims=d) if c.name == "logits of 10,000"]
        for s, d in (([1, H, 50, D], (-1, -1, -1)), ([1, H, D, 50], (2, 2, 2)))
    )
    scores = np.einsum("bhdq,bhdk->bhqk", turned.feed["q"], turned.feed["k"])
    assert np.array_equal(scores, np.einsum("bhqd,bhkd->bhqk", plain.feed["q"], plain.feed["k"]))


def test_a_fill_within_reach_of_the_logits_gets_one_sign_only() -> None:
    """Scores filled with -1e4 do not hide a key from a query whose visible scores are all -1e4."""
    for fill, least in ((-1e4, 0.0), (-np.inf, -1e4)):
        (found,) = [c for c in cases(operands(50, F32, False), {}, ROLES, fill=fill) if c.name == "logits of 10,000"]
        scores = np.einsum("bhqd,bhkd->bhqk", found.feed["q"], found.feed["k"]) * D**-0.5
        assert scores.max() == pytest.approx(1e4, rel=1e-5) and scores.min() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_extreme_cases_follow_the_original(dtype: int) -> None:
    """Where the original overflows nothing is asked of the replacement; where it does not, everything is."""
    shapes = {"q": ([1, H, 8, D], dtype), "k": ([1, H, 8, D], dtype), "v": ([1, H, 8, D], dtype)}
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    square = [helper.make_node("Mul", ["q", "q"], ["out"])]
    original = model_of(square, shapes, ([1, H, 8, D], dtype), {})
    bound = [*square[:0], helper.make_node("Mul", ["q", "q"], ["s"]), helper.make_node("Min", ["s", "top"], ["out"])]
    guarded = model_of(bound, shapes, ([1, H, 8, D], dtype), {"top": np.array(1e4, kind)})
    q = np.ones((1, H, 8, D), kind)
    q[0, 0] = 1e3 if dtype == F16 else 1e30
    feed = {"q": q, "k": q, "v": q}
    assert check_site(original, guarded, [Case("hot", feed)]).verdict.code == "nan_pattern"
    check = check_site(original, guarded, [Case("hot", feed, extreme=True)])
    assert check.passed and any("finite in 50%" in x for x in check.labels)
    feed["q"] = np.where(q > 1, np.array(150, kind), q)  # finite in both: the bound is a mistake now
    assert not check_site(original, guarded, [Case("hot", feed, extreme=True)]).passed
    assert not check_site(guarded, original, [Case("hot", {**feed, "q": q}, extreme=True)]).passed  # ours overflows


# --- the whole model --------------------------------------------------------------------------------------------------


def save(model: ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def feed(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {x: rng.standard_normal((1, H, n, D), np.float32) for x in "qkv"}


def test_equal_models_pass_and_polygraphy_repeats_it(tmp_path: Path) -> None:
    a, b = save(dense(70), tmp_path / "in.onnx"), save(blocked(70), tmp_path / "model.onnx")
    folder = tmp_path / "polygraphy"
    result = compare_models(a, b, [feed(70), feed(70, 1)], folder=folder)
    assert result.passed, result.verdict.reason
    assert result.polygraphy.ok and result.iterations == 2 and len(result.outputs) == 2
    assert 0 < result.error < 1e-6
    assert {f.name for f in result.files} == {
        "inputs.json", "original.json", "rewritten.json", "data_loader.py", "README.txt",
    }  # fmt: skip
    assert json.loads(json.dumps(result.to_json()))["passed"] is True
    command = next(x for x in (folder / "README.txt").read_text().splitlines() if "polygraphy run" in x).split()
    run = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", *command[1:]]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 2/2 iterations" in done.stdout
    wrong = save(blocked(70, 2, 2), tmp_path / "model.onnx")
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert wrong.exists() and done.returncode != 0


def test_baseline_runs_the_original_once(tmp_path: Path) -> None:
    a, b = save(dense(40), tmp_path / "a.onnx"), save(blocked(40), tmp_path / "b.onnx")
    baseline = Baseline(a)
    assert compare_models(baseline, b, [feed(40)]).passed
    a.write_bytes(save(dense(40, 1, 1), tmp_path / "c.onnx").read_bytes())  # not run again: same inputs
    assert compare_models(baseline, b, [feed(40)]).passed
    assert not compare_models(baseline, b, [feed(40, 1)]).passed  # other inputs: run, and now it differs
    assert not compare_models(a, b, [feed(40)]).passed


def test_comparison_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = save(dense(40), tmp_path / "a.onnx"), save(blocked(40, 2, 2), tmp_path / "b.onnx")
    compare_models(a, b, [feed(40)], folder=tmp_path / "out")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_over_budget_and_looser_budget(tmp_path: Path) -> None:
    a, b = save(dense(70), tmp_path / "a.onnx"), save(blocked(70, 2, 2), tmp_path / "b.onnx")
    result = compare_models(a, b, [feed(70)])
    assert not result.passed and result.verdict.code == "over_budget" and not result.polygraphy.ok
    assert compare_models(a, b, [feed(70)], budget=2.0).passed
    assert compare_models(a, b, [feed(70)], budget=0.5, metric="cosine").passed
    assert not compare_models(a, b, [feed(70)], budget=0.999999, metric="cosine").passed


def test_nothing_to_run_is_no_pass(tmp_path: Path) -> None:
    a = save(dense(40), tmp_path / "a.onnx")
    result = compare_models(a, a, [])
    assert not result.passed and result.verdict.code == "nothing_compared" and np.isnan(result.error)


def one_op(
    op: str, out_shape: list[Any], elem_type: int = F32, out_type: int | None = None, **attrs: Any
) -> ModelProto:
    out_type = elem_type if out_type is None else out_type
    return model_of(
        [helper.make_node(op, ["x"], ["out"], **attrs)], {"x": (["n", 4], elem_type)}, (out_shape, out_type), {}
    )


def test_nan_empty_shapes_and_types_are_no_pass(tmp_path: Path) -> None:
    relu = save(one_op("Relu", ["n", 4]), tmp_path / "relu.onnx")
    sqrt = save(one_op("Sqrt", ["n", 4]), tmp_path / "sqrt.onnx")
    transposed = save(one_op("Transpose", [4, "n"]), tmp_path / "t.onnx")
    minus, empty = {"x": -np.ones((3, 4), np.float32)}, {"x": np.zeros((0, 4), np.float32)}
    for a, b in ((relu, sqrt), (sqrt, relu), (sqrt, sqrt)):
        assert compare_models(a, b, [minus]).verdict.code == "not_finite"
    assert compare_models(relu, relu, [empty]).verdict.code == "nothing_compared"
    assert compare_models(relu, transposed, [minus]).verdict.code == "shape_differs"


def test_integer_and_bool_outputs_must_be_equal(tmp_path: Path) -> None:
    x = {"x": np.array([[3, -1, 0, 2]], np.int64)}
    absolute = save(one_op("Abs", ["n", 4], I64), tmp_path / "abs.onnx")
    same = save(one_op("Identity", ["n", 4], I64), tmp_path / "id.onnx")
    assert compare_models(same, same, [x]).passed
    assert compare_models(same, absolute, [x]).verdict.code == "not_equal"
    positive = save(one_op("Cast", ["n", 4], I64, BOOL, to=BOOL), tmp_path / "bool.onnx")
    assert compare_models(positive, positive, [x]).passed


def test_renamed_output_is_no_pass(tmp_path: Path) -> None:
    a = save(one_op("Relu", ["n", 4]), tmp_path / "a.onnx")
    renamed = onnx.load(str(a))
    renamed.graph.node[0].output[0] = renamed.graph.output[0].name = "other"
    b = save(renamed, tmp_path / "b.onnx")
    assert not compare_models(a, b, [{"x": np.ones((1, 4), np.float32)}]).passed


def test_bfloat16_models_are_compared_as_twins(tmp_path: Path) -> None:
    a, b = save(dense(40, dtype=BF16), tmp_path / "a.onnx"), save(blocked(40, dtype=BF16), tmp_path / "b.onnx")
    x = {k: v.astype(ml_dtypes.bfloat16) for k, v in feed(40).items()}
    result = compare_models(a, b, [x], folder=tmp_path / "p")
    assert result.passed and any("twin" in n for n in result.notes)


def test_models_that_cannot_be_loaded_or_run(tmp_path: Path) -> None:
    good, bad = save(dense(40), tmp_path / "a.onnx"), tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(BadModel):
            compare_models(*pair, [feed(40)])
    with pytest.raises(BadArguments, match="'k' is missing"):
        compare_models(good, good, [{"q": feed(40)["q"]}])
    nodes = [helper.make_node("Reshape", ["x", "s"], ["out"])]
    split = model_of(nodes, {"x": (["n", 4], F32)}, (["m", 8], F32), {"s": np.array([-1, 8])})
    with pytest.raises(AttncompileError, match="fails to run"):
        path = save(split, tmp_path / "s.onnx")
        compare_models(path, path, [{"x": np.ones((1, 4), np.float32)}])


def test_large_results_are_not_saved_and_this_is_said(tmp_path: Path) -> None:
    a = save(dense(40), tmp_path / "a.onnx")
    result = compare_models(a, a, [feed(40)], folder=tmp_path / "p", save_limit=10)
    assert result.passed and not result.files and "not written" in result.notes[0]


def test_exact_budget_follows_the_coarsest_type() -> None:
    assert exact_budget(dense(8)) == 1e-5
    assert exact_budget(dense(8, dtype=F16)) == 5e-3
    assert exact_budget(dense(8, dtype=BF16)) == 4e-2
    assert exact_budget(retype(dense(8), TO_DOUBLE)) == 1e-10


# --- inputs -----------------------------------------------------------------------------------------------------------


def language_model() -> ModelProto:
    shapes: dict[str, tuple[list[Any], int]] = {
        "input_ids": (["batch", "length"], I64), "attention_mask": (["batch", "length"], I64),
        "position_ids": (["batch", "length"], I64), "token_type_ids": (["batch", "length"], I64),
        "timestep": (["batch"], F32), "pixels": (["batch", 3, 4, 4], F32), "flag": ([1], BOOL),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids32"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids32"], ["a"]),
        helper.make_node("Gather", ["positions", "position_ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["out"]),
    ]
    inits = {"table": np.zeros((11, 2), np.float32), "positions": np.zeros((16, 2), np.float32)}
    return model_of(nodes, shapes, (["batch", "length", 2], F32), inits)


def loaded(proto: ModelProto) -> Model:
    return Model(Path("m.onnx"), proto, "sha256:0", 18)


def test_padded_feeds_hide_keys_of_masks_alone() -> None:
    feed = {"mask": np.ones((2, 9), np.int64), "flag": np.ones(1, bool), "ids": np.ones((2, 9), np.int64),
            "other_mask": np.zeros((2, 9), np.int64)}  # fmt: skip
    found = dict(padded_feeds(feed, ("mask", "flag", "other_mask")))
    assert list(found) == ["left padding", "right padding", "middle padding"]
    assert found["left padding"]["mask"].tolist() == [[0] * 3 + [1] * 6, [0] * 2 + [1] * 7]
    assert found["right padding"]["mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 7 + [0] * 2]
    middle = found["middle padding"]["mask"]
    assert middle[:, [0, -1]].all() and (middle.sum(axis=1) == [6, 7]).all()
    for padded in found.values():
        assert all(padded[n] is feed[n] for n in ("flag", "ids", "other_mask"))
    assert feed["mask"].all() and padded_feeds(feed, ()) == [] and padded_feeds({"m": np.ones((1, 2))}, ("m",)) == []


def test_make_inputs_by_type_and_table() -> None:
    proto = language_model()
    x = make_inputs(loaded(proto), {"batch": 2, "length": 300 // 20}, seed=1)
    assert x["input_ids"].shape == (2, 15) and x["input_ids"].max() < 11 and len(np.unique(x["input_ids"])) > 3
    assert (x["attention_mask"] == 1).all() and (x["token_type_ids"] == 0).all() and x["flag"].all()
    assert x["position_ids"].tolist() == [list(range(15))] * 2
    assert ((x["timestep"] >= 0) & (x["timestep"] < 1000)).all() and x["pixels"].dtype == np.float32
    assert np.isfinite(run_session(open_session(proto.SerializeToString(), 1), x)[0]).all()
    again = make_inputs(loaded(proto), {"batch": 2, "length": 15}, seed=1)
    assert all(np.array_equal(x[k], again[k]) for k in x)
    assert not np.array_equal(x["pixels"], make_inputs(loaded(proto), {"batch": 2, "length": 15}, seed=2)["pixels"])


def test_make_inputs_names_the_unbound_symbol() -> None:
    with pytest.raises(BadArguments, match="'length'"):
        make_inputs(loaded(language_model()), {"batch": 1})


def test_load_inputs_in_every_format(tmp_path: Path) -> None:
    proto, x = dense(40), feed(40)
    np.savez(tmp_path / "x.npz", q=x["q"], k=x["k"], v=x["v"])
    from polygraphy.json import save_json

    save_json([x, feed(40, 1)], str(tmp_path / "x.json"))
    (tmp_path / "x.py").write_text(
        "import numpy as np\ndef load_data():\n    yield dict(np.load(__file__[:-2] + 'npz'))\n"
    )
    for name, count in (("x.npz", 1), ("x.json", 2), ("x.py", 1)):
        loaded_feeds = load_inputs(tmp_path / name, proto)
        assert len(loaded_feeds) == count
        assert all(np.array_equal(loaded_feeds[0][k], x[k]) for k in x)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"1", "unknown kind"),
        ("x.npz", b"nonsense", "cannot read"),
        ("x.json", b"{", "cannot read"),
        ("x.json", b"[]", "holds no inputs"),
        ("x.json", b"[1]", "dict of name"),
        ("x.py", b"a = 1", "no load_data"),
        ("x.py", b"def load_data():\n    raise RuntimeError('boom')", "boom"),
        ("x.py", b"def load_data():\n    return []", "holds no inputs"),
    ],
)
def test_bad_input_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadArguments, match=message) as error:
        load_inputs(tmp_path / name)
    assert error.value.hint


def test_missing_input_file(tmp_path: Path) -> None:
    with pytest.raises(BadArguments, match="does not exist"):
        load_inputs(tmp_path / "x.npz")


def test_check_feed_names_what_is_wrong() -> None:
    proto = language_model()
    good = make_inputs(loaded(proto), {"batch": 2, "length": 5})
    assert list(check_feed(proto, dict(reversed(good.items())))) == list(good)
    narrow = {**good, "input_ids": good["input_ids"].astype(np.int32)}
    assert check_feed(proto, narrow)["input_ids"].dtype == np.int64
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        ({**good, "extra": good["flag"]}, "no input 'extra'"),
        ({k: v for k, v in good.items() if k != "pixels"}, "'pixels' is missing"),
        ({**good, "pixels": good["pixels"][:, :2]}, "'pixels' has 2 entries on axis 1"),
        ({**good, "pixels": good["pixels"][0]}, "'pixels' has shape"),
        ({**good, "pixels": good["pixels"].astype(np.float64)}, "'pixels' has type float64"),
        ({**good, "input_ids": good["input_ids"] + 0.5}, "'input_ids' has type float64"),
        ({**good, "attention_mask": np.ones((2, 6), np.int64)}, "length = 6"),
    ]
    for bad, message in wrong:
        with pytest.raises(BadArguments, match=message) as error:
            check_feed(proto, bad)
        assert error.value.hint


def test_results_are_values() -> None:
    check = check_site(dense(20), blocked(20), site_cases(20))
    with pytest.raises(dataclasses.FrozenInstanceError):
        check.verdict = check.verdict  # type: ignore[misc]


def test_scalar_inputs_are_compared(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["out"])], {"x": ([], F32)}, ([], F32), {})
    path = save(model, tmp_path / "scalar.onnx")
    assert compare_models(path, path, [{"x": np.array(2.0, np.float32)}]).passed


def test_of_answers_the_share_counts(tmp_path: Path) -> None:
    """A classifier in batches of four: one answer of twelve changes, whichever input it is in."""

    def classifier(third: float, rank: int = 2) -> ModelProto:
        sizes = ["b", 3] if rank == 2 else [1, "b", 3]
        bias = nh.from_array(np.array([0, 0, third], np.float32), "bias")
        values = [helper.make_tensor_value_info(n, F32, sizes) for n in "xy"]
        graph = helper.make_graph([helper.make_node("Add", ["x", "bias"], ["y"])], "g", values[:1], values[1:], [bias])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    inputs = [{"x": np.eye(4, 3, dtype=np.float32) * 2 + np.float32([1, 0, 0])} for _ in range(3)]
    inputs[1]["x"][3] = [0.5, 0, 0.45]
    a, b = (save(classifier(third), tmp_path / f"{third}.onnx") for third in (0.0, 0.1))
    found = compare_models(a, b, inputs, metric="top1_agreement", budget=0.9)
    assert found.passed and found.worst == pytest.approx(11 / 12) and found.together
    assert [o.metrics.top1_agreement for o in found.outputs if o.metrics] == [1.0, 0.75, 1.0]
    strict = compare_models(a, b, inputs, metric="top1_agreement", budget=0.95)
    assert not strict.passed and "91.667% of all answers stay" in strict.verdict.reason
    # Of whole numbers nothing is averaged: they are equal or not.
    chosen = helper.make_graph(
        [helper.make_node("ArgMax", ["x"], ["y"], axis=1)],
        "g",
        [helper.make_tensor_value_info("x", F32, ["b", 3])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["b", 1])],
    )
    path = save(
        helper.make_model(chosen, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "i.onnx"
    )
    assert compare_models(path, path, inputs, metric="top1_agreement", budget=0.9).passed
    # Rows of one text are not independent: the worst input counts.
    a, b = (save(classifier(third, 3), tmp_path / f"{third}-3.onnx") for third in (0.0, 0.1))
    rows = [{"x": one["x"][None]} for one in inputs]
    found = compare_models(a, b, rows, metric="top1_agreement", budget=0.9)
    assert not found.passed and found.worst == 0.75 and not found.together
