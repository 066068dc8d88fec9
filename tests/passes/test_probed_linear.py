"""Linear attention in chunks, known by running it: one site rebuilt from its facts, or a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.linear_reading import read_linear
from tests.passes.attention_graphs import Builder
from tests.passes.linear_graphs import detected, error_of, feed_of

BATCH, HEADS, DIM, VALUE, TOKENS = 2, 3, 5, 4, 11
CUTS = [(0, 4), (4, 8), (8, 11)]


def chunks(
    *, rates: tuple[float, ...] = (), total: bool = False, fault: str = "", batch: int | str = BATCH
) -> onnx.ModelProto:
    """x [batch, 11, 16] -> y [batch, 11, HEADS * VALUE]: chunks of 4, 4 and 3 tokens with a state between them."""
    b = Builder()
    rng = np.random.default_rng(0)
    rate = np.array(rates or (1.0,) * HEADS)[:, None, None]

    def const(array: np.ndarray | float) -> str:
        return b.const(np.asarray(array, np.float32))

    def project(width: int) -> str:
        y = b.op("MatMul", "x", const(rng.standard_normal((16, HEADS * width)) / 4))
        return b.op("Transpose", b.op("Reshape", y, b.const([-1, TOKENS, HEADS, width])), perm=[0, 2, 1, 3])

    def cut(value: str, start: int, end: int) -> str:
        return b.op("Slice", value, b.const([start]), b.const([end]), b.const([2]))

    q, k, v = project(DIM), project(DIM), project(VALUE)
    if total:
        q, k = b.op("Exp", q), b.op("Exp", k)
        v = b.op("Concat", v, const(np.ones((BATCH, HEADS, TOKENS, 1))), axis=3)
    q = b.op("Mul", q, const(0.5))
    state, parts = "", []
    for at, (start, end) in enumerate(CUTS):
        n = end - start
        age = np.arange(n)
        now, key, value = (cut(x, start, end) for x in (q, k, v))
        inner = np.tril(rate ** np.maximum(age[:, None] - age[None], 0), -1 if fault == "strict" else 0)
        if fault == "far" and at == 1:
            inner = inner * np.where(age[:, None] - age[None] == 3, 1.002, 1.0)
        own = b.op("MatMul", now, b.op("Transpose", key, perm=[0, 1, 3, 2]))
        own = b.op("MatMul", b.op("Mul", own, const(inner)), value)
        if state:
            since = rate ** (age[:, None] + (2 if fault == "late" else 1)) * (0.5 if fault == "scale" else 1.0)
            if fault == "heads":
                since = since * np.array([1.0, 1.0, 2.0])[:, None, None]
            before = b.op("MatMul", b.op("Mul", now, const(since)), state)
            own = b.op("Add", own, b.op("Tanh", before) if fault == "tanh" else before)
        parts.append(own)
        if at == len(CUTS) - 1 and fault != "state-out":
            break
        left = b.op("Mul", key, const(rate ** (n - 1 - age[:, None])))
        new = b.op("MatMul", b.op("Transpose", left, perm=[0, 1, 3, 2]), key if fault == "values" else value)
        if fault == "gate" and state:
            state = b.op("Mul", state, b.op("Sigmoid", cut(value, 0, 1)))
        kept = b.op("Mul", state, const(rate ** (n + (fault == "forgets")))) if state else ""
        state = b.op("Add", kept, new) if kept and fault != "drops" else new
    y = b.op("Concat", *(parts[::-1] if fault == "order" else parts), axis=2)
    if total:
        top = b.op("Slice", y, b.const([0]), b.const([VALUE]), b.const([3]))
        y = b.op("Div", top, b.op("Add", b.op("Slice", y, b.const([VALUE]), b.const([99]), b.const([3])), const(1e-3)))
    if fault == "bias":
        y = b.op("Add", y, const(0.01))
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.const([-1, TOKENS, HEADS * VALUE]))
    y = b.op("MatMul", y, const(rng.standard_normal((HEADS * VALUE, 8))))
    outputs = [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)]
    if fault == "state-out":
        outputs.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [batch, TOKENS, 16])]
    for node in b.nodes:
        node.input[:] = ["x0" if i == "x" else i for i in node.input]
    graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("rates", [(), (0.5, 0.9, 0.99)], ids=["kept", "decay"])
@pytest.mark.parametrize("total", [False, True], ids=["plain", "normalised"])
def test_chunks_are_one_site(rates: tuple[float, ...], total: bool, tmp_path: Path) -> None:
    model, detection = detected(chunks(rates=rates, total=total), tmp_path)
    assert not detection.near_misses
    (site,) = detection.sites
    facts = site.linear
    assert facts is not None
    assert (site.heads, site.head_dim, site.value_dim, site.query_length) == (HEADS, DIM, VALUE, TOKENS)
    assert (facts.form, facts.causal, facts.normaliser) == ("chunked", True, "sum" if total else "none")
    assert facts.decay_rates == pytest.approx(rates, rel=1e-6)
    assert site.mask.kind == "causal"
    assert not site.mask.parts[0].certificate.general
    if total:  # 0.5 of the queries goes into what is added to the sum, or stays on them
        assert facts.epsilon * 0.5 == pytest.approx(5e-4, rel=1e-3) or facts.epsilon == pytest.approx(2e-3, rel=1e-3)
    assert error_of(model, site, feed_of(model)) < 3e-6


@pytest.mark.parametrize(
    "fault",
    ["strict", "far", "late", "scale", "heads", "tanh", "values", "gate", "forgets", "drops", "order", "bias",
     "state-out"],
)  # fmt: skip
def test_what_is_not_linear_attention_is_refused(fault: str, tmp_path: Path) -> None:
    _, detection = detected(chunks(rates=(0.5, 0.9, 0.99), fault=fault), tmp_path)
    assert detection.sites == ()
    assert "chunked" in {m.code for m in detection.near_misses}


def test_chunks_of_a_dynamic_batch_are_refused(tmp_path: Path) -> None:
    _, detection = detected(chunks(batch="batch"), tmp_path)
    assert detection.sites == ()
    assert any("dynamic" in m.reason for m in detection.near_misses), detection.near_misses


def _attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, weights: np.ndarray, epsilon: float | None
) -> np.ndarray:  # fmt: skip
    scores = (q.astype(np.float64) @ k.swapaxes(2, 3)) * weights
    if epsilon is not None:
        scores = scores / (scores.sum(axis=-1, keepdims=True) + epsilon)
    return np.asarray(0.25 * (scores @ v)).astype(np.float32)


def _weights(rates: tuple[float, ...], causal: bool, tokens: int) -> np.ndarray:
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    powers = np.array(rates)[:, None, None] ** np.maximum(distance, 0)
    return np.where(distance >= 0, powers, 0.0 if causal else 1.0)


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-6, 0.02])
@pytest.mark.parametrize("causal, rates", [(True, (0.2, 0.97)), (True, (1.0, 1.0)), (False, (1.0, 1.0))])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_linear_attention_is_read(
    epsilon: float | None, causal: bool, rates: tuple[float, ...], order: tuple[int, int, int]
) -> None:
    weights = _weights(rates, causal, 37)

    def run(*entries: np.ndarray) -> np.ndarray:
        return _attention(*(entries[i] for i in order), weights, epsilon)  # type: ignore[arg-type,misc]

    widths = [0, 0, 0]
    for place, width in zip(order, (6, 6, 5), strict=True):
        widths[place] = width
    found = read_linear(run, 2, 2, 37, (widths[0], widths[1], widths[2]))
    assert (found.order, found.causal, found.normalised) == (order, causal, epsilon is not None)
    assert found.rates == (() if rates == (1.0, 1.0) else pytest.approx(rates, rel=1e-6))
    assert (found.scale, found.epsilon) == pytest.approx((0.25, epsilon or 0.0), rel=1e-4)


def test_a_weight_that_a_sum_does_not_show() -> None:
    """Keys 30 tokens away weigh 0.2 ** 30: cut off there, outputs of random inputs do not change."""
    weights = _weights((0.2,), True, 41)
    cut = np.where(np.arange(41)[:, None] - np.arange(41) < 30, weights, 0.0)

    def run(w: np.ndarray) -> object:
        return read_linear(lambda q, k, v: _attention(q, k, v, w, None), 1, 1, 41, (4, 4, 4))

    run(weights)
    with pytest.raises(Unsupported, match="power of its distance"):
        run(cut)
