"""Bodies of the linear attention ops in ONNX Runtime, chained as the mechanism does it, against the naive reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.plugins.linear_attention import causal, delta, function
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.linear_attention.op import (
    APPLY,
    COMBINE,
    DELTA,
    INPUTS,
    OUTPUT,
    SOLVE,
    STATE,
    STATES,
    STEP,
    register,
)
from attncompile.plugins.linear_attention.reference import with_state

NEWEST = 28
TYPES = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16),
         "double": (TensorProto.DOUBLE, np.float64)}  # fmt: skip
BHND: tuple[Any, ...] = ("BHND",) * 4
BNHD: tuple[Any, ...] = ("BNHD",) * 4
BHDN: tuple[Any, ...] = ("BHDN",) * 4
MIXED: tuple[Any, ...] = ("BNHD", "BHDN", "BHND", "BHDN")
OTHER: tuple[Any, ...] = ("BHDN", "BNHD", "BHDN", "BNHD")


def sizes(layouts: tuple[Any, ...] = BHND, **changed: Any) -> Sizes:
    return replace(Sizes(4, 2, 6, 5, "float32", layouts, 23, 23, 18), **changed)


def values(form: Form, at: Sizes, seed: int = 1, batch: int = 2) -> dict[str, np.ndarray]:
    """Operands [B, N, H, D] and what else the form reads, in float64 and exact in float16."""
    rng = np.random.default_rng(seed)
    queries, keys = at.queries or 23, at.keys or 23

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16).astype(np.float64)

    found = {"query": normal(batch, queries, at.heads, at.head_dim),
             "key": normal(batch, keys, at.kv_heads, at.head_dim),
             "value": normal(batch, keys, at.kv_heads, at.value_dim)}  # fmt: skip
    if form.delta:
        found["key"] /= np.linalg.norm(found["key"], axis=-1, keepdims=True)
        found["beta"] = rng.random((batch, keys, at.kv_heads)).astype(np.float16).astype(np.float64)
    shape = {"head": (at.kv_heads,), "token": (batch, keys, at.kv_heads),
             "channel": (batch, keys, at.kv_heads, at.head_dim)}.get(form.decay)  # fmt: skip
    if shape is not None:
        found["log_decay"] = -np.abs(normal(*shape))
    if form.key_weight:
        found["key_weight"] = np.abs(normal(batch, keys, at.kv_heads))
    if form.key_map == "hedgehog":
        found["feature_weight"] = normal(at.kv_heads, at.head_dim, 4) / 2
        found["query_weight"] = normal(at.heads, at.head_dim, 4) / 2
    if form.initial:
        found["initial_state"] = normal(batch, at.kv_heads, at.head_dim, at.value_dim)
        found["initial_total"] = np.abs(normal(batch, at.kv_heads, at.head_dim)) + 1
    return found


def expected(form: Form, given: Mapping[str, np.ndarray], **changed: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    said = {"query_map": form.query_map, "key_map": form.key_map, "normaliser": form.normaliser,
            "epsilon": form.epsilon, "floor": form.floor, "scale": form.scale, "causal": form.causal}  # fmt: skip
    more = {n: x for n, x in given.items() if n not in ("query", "key", "value")}
    return with_state(given["query"], given["key"], given["value"], {**said, **changed}, **more)


def chain(form: Form, at: Sizes, step: bool = False) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """The ops with their values by formal names; states and sums that are outputs are named ``final_...``."""
    sums = ["total"] if form.sums else []
    if form.causal:
        first = {f"initial_{n}": f"initial_{n}" for n in ("state", *sums)} if form.initial else {}
        decay = {"log_decay": "log_decay"} if form.decay != "none" else {}
        last = {f"final_{n}": f"final_{n}" for n in ("state", *sums)}
        operands = {n: n for n in ("query", "key", "value")}
        if step:
            beta = {"beta": "beta"} if form.delta else {}
            return [(STEP, {**operands, **decay, **beta, **first}, {"output": "output", **last})]
        if form.delta:
            made = {"written": "written", "state": "state", "final_state": "final_state"}
            return [(SOLVE, {"key": "key", "beta": "beta", **decay}, {"solved": "solved"}),
                    (DELTA, {"key": "key", "value": "value", "solved": "solved", **decay, **first}, made),
                    (OUTPUT, {**operands, "value": "written", "state": "state", **decay},
                     {"output": "output"})]  # fmt: skip
        made = {n: n for n in ("state", "total")}
        read = {n: n for n in ("state", *sums)}
        return [(STATES, {"key": "key", "value": "value", **decay, **first}, {**made, **last}),
                (OUTPUT, {**operands, **read, **decay}, {"output": "output"})]  # fmt: skip
    tops = form.tops
    made = {n: n for n in ("state", "total", "mean", *(["top"] if tops else []))}
    weights = {"key_weight": "key_weight"} if form.key_weight else {}
    maps = {"feature_weight": "feature_weight"} if form.key_map == "hedgehog" else {}
    ops: list[tuple[str, dict[str, str], dict[str, str]]] = [
        (STATE, {"key": "key", "value": "value", **weights, **maps}, made)
    ]
    if form.combined:
        whole = {n: f"whole_{n}" for n in ("state", "total", "mean")}
        ops.append((COMBINE, made, {f"whole_{n}": x for n, x in whole.items()}))
        made = whole
    read = {n: made[n] for n in ("state", *sums, *(["mean"] if form.means else []))}
    maps = {"feature_weight": "query_weight"} if maps else {}
    return [*ops, (APPLY, {"query": "query", **read, **maps}, {"output": "output"})]


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(["BNHD".index(a) for a in layout]))


def model(form: Form, at: Sizes, given: Mapping[str, np.ndarray], step: bool = False) -> onnx.ModelProto:
    register()
    ops = chain(form, at, step)
    q, k, _, o_layout = at.layouts
    own = replace(at, layouts=(q, k, "BNHD", o_layout))  # what the delta rule writes has a layout of its own
    placed = [(op, own if i.get("value") == "written" else at, i, o) for op, i, o in ops]
    nodes = [function.node(op, form, where, i, o, f"{op}/0") for op, where, i, o in placed]
    functions = [function.function(op, form, where, i, o) for op, where, i, o in placed]
    element, wide = TYPES[at.dtype][0], TYPES[at.state_type][0]
    layouts = dict(zip(("query", "key", "value", "output"), at.layouts, strict=True))
    inputs = []
    for name, array in given.items():
        kind = wide if name.startswith("initial") else element
        shape: list[Any] = list(laid(array, layouts[name]).shape if name in layouts else array.shape)
        if at.keys is None and name in layouts:
            shape[layouts[name].index("N")] = "tokens"
            shape[0] = "batch"
        elif at.keys is None and name in ("log_decay", "beta", "key_weight") and len(shape) > 1:
            shape[1] = "tokens"
        inputs.append(helper.make_tensor_value_info(name, kind, shape))
    names = ["output", *[n for _, _, o in ops for n in o if n.startswith("final")]]
    outputs = [
        helper.make_tensor_value_info(n, element if n == "output" else wide, [None] * (4 - (n == "final_total")))
        for n in names
    ]
    graph = helper.make_graph(nodes, "case", inputs, outputs)
    imports = [helper.make_opsetid("", at.opset), helper.make_opsetid("attncompile", 1)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def run(made: onnx.ModelProto, at: Sizes, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnx.checker.check_model(made, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    layouts = dict(zip(("query", "key", "value"), at.layouts, strict=False))
    feeds = {}
    for name, array in given.items():
        kind = TYPES[at.state_type][1] if name.startswith("initial") else TYPES[at.dtype][1]
        feeds[name] = (laid(array, layouts[name]) if name in layouts else array).astype(kind)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    found["output"] = found["output"].transpose([at.layouts[3].index(a) for a in "BNHD"])
    return found


def far(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape and got.size and np.isfinite(want).all()
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def check(form: Form, at: Sizes, step: bool = False, seed: int = 1) -> None:
    given = values(form, at, seed)
    output, state, total = expected(form, given)
    got = run(model(form, at, given, step), at, given)
    limit = {"float32": 3e-6, "float16": 2e-3, "double": 1e-13}[at.dtype]
    assert far(got["output"], output) < limit
    # What the delta rule writes in chunks is of the operands' type, between two ops; other sums are wide throughout.
    wide = limit if form.delta and form.chunk > 1 else min(limit, 3e-6)
    if "final_state" in got:
        assert far(got["final_state"], state) < wide
    if "final_total" in got:
        assert far(got["final_total"], total) < min(limit, 3e-6)


PLAIN = {
    "relu": Form("relu", "relu", "sum", 1e-2),
    "relu, floor": Form("relu", "relu", "sum", 0.0, 3.0),
    "elu": Form("elu+1", "elu+1", "sum", 1e-6),
    "exp": Form("exp", "exp", "sum"),
    "none": Form(scale=0.31),
    "softmax": Form("softmax", "softmax", scale=0.4),
    "hedgehog": Form("hedgehog", "hedgehog", "sum"),
    "mala": Form("elu+1", "elu+1", "mala"),
    "inline": Form("exp", "exp", "inline"),
    "rala": Form("elu+1", "elu+1", "sum", key_weight=True),
}
CAUSAL = {
    "sums": Form("elu+1", "elu+1", "sum", 1e-3, causal=True, chunk=7),
    "none": Form("relu", "relu", causal=True, chunk=7, scale=0.7),
    "retention": Form(causal=True, chunk=7, decay="head", scale=0.4),
    "retention, sums": Form("exp", "exp", "sum", 1e-3, causal=True, chunk=7, decay="head", scale=0.3),
    "simple GLA": Form(causal=True, chunk=7, decay="token", scale=0.4),
    "GLA": Form(causal=True, chunk=7, decay="channel"),
    "GLA, first state": Form(causal=True, chunk=7, decay="channel", initial=True),
    "sums, first state": Form("exp", "exp", "sum", causal=True, chunk=7, decay="token", initial=True),
    "delta": Form(causal=True, chunk=7, delta=True, scale=0.5),
    "gated delta": Form(causal=True, chunk=7, delta=True, decay="token", initial=True),
    "delta, retention": Form(causal=True, chunk=7, delta=True, decay="head"),
}


@pytest.mark.parametrize("layouts", [BHND, BNHD, BHDN, MIXED, OTHER], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str, layouts: tuple[Any, ...]) -> None:
    for chunk in (0, 7, 64):
        check(replace(PLAIN[name], chunk=chunk), sizes(layouts, queries=17))
    check(replace(PLAIN[name], chunk=7), sizes(layouts, kv_heads=4, keys=21))


@pytest.mark.parametrize("layouts", [BHND, MIXED], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str, layouts: tuple[Any, ...]) -> None:
    for chunk in (7, 23, 64):
        check(replace(CAUSAL[name], chunk=chunk), sizes(layouts))
    check(replace(CAUSAL[name], chunk=7), sizes(layouts, kv_heads=4, queries=21, keys=21))


@pytest.mark.parametrize("name", CAUSAL)
def test_long_chunks_are_gone_through_in_pieces(name: str) -> None:
    """Of 64 tokens, or 16; the last chunk is not a whole one."""
    chunk = 64 if CAUSAL[name].decay == "channel" else 256
    form = replace(CAUSAL[name], chunk=chunk)
    check(form, sizes(MIXED, queries=300, keys=300))
    check(form, sizes(queries=None, keys=None, kv_heads=4))
    at = sizes(queries=300, keys=300)
    assert far_apart(form, at, replace(form, chunk=7)) < 3e-6


def far_apart(form: Form, at: Sizes, other: Form) -> float:
    """How far the last states of two forms are from one another."""
    given = values(form, at)
    one, two = (run(model(f, at, given), at, given)["final_state"] for f in (form, other))
    return far(one, two.astype(np.float64))


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_closed_gates(decay: Any, chunk: int) -> None:
    """A gate of minus infinity, or one that a float32 keeps nothing of, leaves nothing of the state, and no NaN. Sums
    of logarithms in a chunk reach thousands here, where a float32 has steps of 1e-4.
    """
    form, at = Form(causal=True, chunk=chunk, decay=decay, initial=True), sizes(queries=200, keys=200)
    given = values(form, at)
    logs = given["log_decay"]
    if decay == "head":
        logs[0], logs[1] = -np.inf, -1000.0
    else:
        logs[:, 50], logs[:, 130:160, 1] = -np.inf, -90.0
    output, state, _ = expected(form, given)
    got = run(model(form, at, given), at, given)
    assert far(got["output"], output) < 3e-5 and far(got["final_state"], state) < 3e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_step(name: str) -> None:
    form = replace(CAUSAL[name], chunk=1)
    check(form, sizes(OTHER), step=True)
    check(replace(form, initial=True), sizes(queries=1, keys=1), step=True)


@pytest.mark.parametrize("name", ["relu", "softmax", "rala", "mala"])
def test_dynamic_lengths(name: str) -> None:
    for chunk in (0, 7):
        check(replace(PLAIN[name], chunk=chunk), sizes(MIXED, queries=None, keys=None))


@pytest.mark.parametrize("name", CAUSAL)
def test_dynamic_lengths_under_a_triangle(name: str) -> None:
    for chunk in (7, 32):
        check(replace(CAUSAL[name], chunk=chunk), sizes(queries=None, keys=None))


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_types(dtype: str) -> None:
    for form in (PLAIN["relu"], replace(PLAIN["elu"], chunk=7), *(replace(f, chunk=7) for f in CAUSAL.values())):
        check(form, sizes(dtype=dtype))


@pytest.mark.parametrize("opset", range(18, NEWEST + 1))
def test_opsets(opset: int) -> None:
    for form in (replace(PLAIN["softmax"], chunk=7), PLAIN["relu"], replace(CAUSAL["sums, first state"], chunk=7)):
        check(form, sizes(opset=opset))


def test_bodies_are_standard_ops_without_idle_constants() -> None:
    for form in [*PLAIN.values(), *(replace(f, chunk=7) for f in CAUSAL.values())]:
        at = sizes(MIXED)
        inlined = onnx.inliner.inline_local_functions(model(form, at, values(form, at)))
        assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}
        inner = [a.g for n in inlined.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
        read = {i for n in (*inlined.graph.node, *(m for g in inner for m in g.node)) for i in n.input}
        idle = [n.output[0] for n in inlined.graph.node if n.op_type == "Constant" and n.output[0] not in read]
        assert not idle


def test_no_body_grows_with_the_square_of_the_length() -> None:
    """No value of the bodies has two axes of tokens."""
    for form in [*PLAIN.values(), *(replace(f, chunk=8) for f in CAUSAL.values())]:
        at = sizes(keys=96, queries=96)
        inlined = onnx.inliner.inline_local_functions(model(form, at, values(form, at)))
        inferred = onnx.shape_inference.infer_shapes(inlined, data_prop=True)
        for value in inferred.graph.value_info:
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            assert dims.count(96) <= 1, (value.name, dims)


def test_shapes_are_inferred() -> None:
    at = sizes(MIXED)
    for form in (replace(PLAIN["softmax"], chunk=7), replace(CAUSAL["sums, first state"], chunk=7), PLAIN["hedgehog"]):
        given = values(form, at)
        made = model(form, at, given)
        shapes = {n: x.shape for n, x in run(made, at, given).items()}
        del made.functions[:]
        inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True)
        for out in inferred.graph.output:
            dims = tuple(d.dim_value for d in out.type.tensor_type.shape.dim)
            want = shapes[out.name]
            assert dims == (tuple(want["BNHD".index(a)] for a in at.layouts[3]) if out.name == "output" else want)
        kept = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
        assert kept["state"] == [2, 2, 4 if form.chunk else 1, 8 if "hedgehog" in form.key_map else 6, 5]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("relu", {"epsilon": 2e-2}), ("relu, floor", {"floor": 3.2}), ("elu", {"key_map": "exp"}),
    ("none", {"scale": 0.32}),
    ("mala", {"normaliser": "none"}), ("softmax", {"query_map": "none"}), ("inline", {"query_map": "elu+1"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed"), WRONG, ids=str)
def test_a_wrong_reference_is_noticed(name: str, changed: dict[str, Any]) -> None:
    form, at = PLAIN[name], sizes()
    given = values(form, at)
    got = run(model(form, at, given), at, given)["output"]
    assert far(got, expected(form, given)[0]) < 3e-6
    assert far(got, expected(form, given, **changed)[0]) > 1e-4


PLANTED = {
    "a triangle one wide": (causal, "_triangle", lambda right: lambda b, s, c: b.constant(
        np.triu(np.full((c, c), -np.inf), 2).astype(np.float32)), CAUSAL["simple GLA"]),
    "epsilon left out": (causal, "divided", lambda right: lambda b, f, s, x, t: b.op("Div", x, t),
                         CAUSAL["retention, sums"]),
    "keys not mapped": (causal, "mapped", lambda right: lambda b, s, v, k, a: v, CAUSAL["sums"]),
    "filled with ones": (causal, "padded", lambda right: lambda b, v, c, t, f, k, *a: right(b, v, c, t, 1.0, k, *a),
                         replace(PLAIN["relu"], chunk=7)),
    "rates not read": (delta, "_rates", lambda right: lambda b, f, s: b.op("Mul", right(b, f, s), b.constant(
        np.float32(0.99))), CAUSAL["gated delta"]),
    "the sum by queries": (function, "divided", lambda right: lambda b, f, s, x, t: b.op("Div", x, b.op("Abs", x)),
                           PLAIN["elu"]),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_an_error_planted_in_a_body_is_noticed(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, change, form = PLANTED[planted]
    form, at = replace(form, chunk=7), sizes()
    check(form, at)
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    with pytest.raises(AssertionError):
        check(form, at)


@pytest.mark.parametrize("given", [
    {"query_map": "sigmoid"}, {"normaliser": "mean"}, {"causal": True}, {"decay": "head"}, {"chunk": -1},
    {"causal": True, "chunk": 8, "key_map": "softmax"}, {"causal": True, "chunk": 8, "normaliser": "mala"},
    {"key_map": "softmax", "normaliser": "sum"}, {"causal": True, "chunk": 8, "delta": True, "decay": "channel"},
    {"causal": True, "chunk": 8, "delta": True, "normaliser": "sum"},
])  # fmt: skip
def test_what_the_ops_cannot_say(given: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        Form(**given)
    assert INPUTS
