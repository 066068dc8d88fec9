"""Scales of each head, log-sum-exps beside the weights, NaN guards: rebuilt from the facts alone, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from tests.passes.rebuild import found_in, only_site, random_feeds, run_for
from tests.passes.test_lifter_forms import KV, B, D, Graph, H, N, W, model_of

F32 = np.float32
Form = Callable[[Graph], str]


def unit(b: Graph, x: str, axis: int) -> str:
    """x / max(|x|, 1e-6) along ``axis``, as SwinV2's cosine attention."""
    norm = b.op("Clip", b.op("ReduceL2", x, b.const([axis]), keepdims=1), b.number(1e-6))
    return b.op("Div", x, norm)


def cosine(b: Graph, shape: tuple[int, ...] = (H, 1, 1), masked: bool = False) -> str:
    """SwinV2: the logit scale is exp(min(parameter, log 100)), one a head."""
    s = b.op("MatMul", unit(b, b.heads(), 3), unit(b, b.heads(transposed=True), 2))
    scale = b.op("Exp", b.op("Min", b.const(b.rng.uniform(0, 5, shape).astype(F32)), b.number(np.log(100.0))))
    s = b.op("Mul", s, scale)
    s = b.op("Add", s, b.const(b.mask())) if masked else s
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def and_a_number(b: Graph) -> str:
    s = b.op("Mul", b.const(b.rng.uniform(0.5, 2, (1, H, 1, 1)).astype(F32)), b.scores())
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def from_the_input(b: Graph) -> str:
    """A scale that the model computes from its input, the same for all batch entries."""
    scale = b.op("ReduceMean", b.heads(), b.const([0, 2, 3]), keepdims=1)
    return b.merge(b.op("MatMul", b.op("Softmax", b.op("Mul", b.scores(), scale), axis=-1), b.heads()))


def before_a_softcap(b: Graph) -> str:
    s = b.op("Mul", b.scores(), b.const(b.rng.uniform(0.5, 2, (H, 1, 1)).astype(F32)))
    s = b.op("Mul", b.op("Tanh", b.op("Div", s, b.number(5.0))), b.number(5.0))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def five_axes(b: Graph) -> str:
    query = b.op("Reshape", b.heads(), b.const([B, KV, H // KV, N, D]))
    key, value = (b.op("Unsqueeze", b.heads(KV, transposed=t), b.const([2])) for t in (True, False))
    s = b.op("Mul", b.op("MatMul", query, key), b.const(b.rng.uniform(0.5, 2, (KV, H // KV, 1, 1)).astype(F32)))
    return b.merge(b.op("Reshape", b.op("MatMul", b.op("Softmax", s, axis=-1), value), b.const([B, H, N, D])))


SCALED: dict[str, Form] = {
    "cosine": cosine,
    "cosine-of-rank-4": lambda b: cosine(b, (1, H, 1, 1)),
    "cosine-masked": lambda b: cosine(b, masked=True),
    "and-a-number": and_a_number,
    "from-the-input": from_the_input,
    "before-a-softcap": before_a_softcap,
    "five-axes": five_axes,
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_of_each_head(name: str, tmp_path: Path) -> None:
    b = Graph()
    _, site = only_site(model_of(b, SCALED[name](b), 18, TensorProto.FLOAT), tmp_path, 5e-5)
    assert site.head_scale and site.needs == {"head-scale"}
    assert site.scale == pytest.approx(1.0 if "cosine" in name or name == "five-axes" else 0.4)
    assert site.mask.kind == ("causal" if "masked" in name else "none")
    assert site.head_scale not in site.interior


@pytest.mark.parametrize("operand", ["query", "key"])
def test_a_scale_of_each_head_on_an_operand_stays_before_it(operand: str, tmp_path: Path) -> None:
    b = Graph()
    scale = b.const(b.rng.uniform(0.5, 2, (H, 1, 1)).astype(F32))
    q, k = b.heads(), b.heads(transposed=True)
    q, k = (b.op("Mul", q, scale), k) if operand == "query" else (q, b.op("Mul", k, scale))
    out = b.merge(b.op("MatMul", b.op("Softmax", b.op("MatMul", q, k), axis=-1), b.heads()))
    _, site = only_site(model_of(b, out, 18, TensorProto.FLOAT), tmp_path)
    assert not site.head_scale and site.scale == 1.0 and not site.needs


def scaled_by(b: Graph, kind: str, shape: tuple[int, ...], times: int = 1, late: bool = False) -> str:
    """``kind`` by random tensors; ``late``: after a mask."""
    s = b.op("Add", b.scores(), b.const(b.mask())) if late else b.scores()
    for _ in range(times):
        s = b.op(kind, s, b.const(b.rng.uniform(0.5, 2, shape).astype(F32)))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def scaled_after_the_softcap(b: Graph) -> str:
    s = b.op("Mul", b.op("Tanh", b.op("Div", b.scores(), b.number(5.0))), b.number(5.0))
    s = b.op("Mul", s, b.const(b.rng.uniform(0.5, 2, (H, 1, 1)).astype(F32)))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


UNSCALED: dict[str, tuple[Form, str]] = {
    "one-a-query": (lambda b: scaled_by(b, "Mul", (N, 1)), "tensor-scale"),
    "one-a-key": (lambda b: scaled_by(b, "Mul", (1, N)), "tensor-scale"),
    "one-a-batch-entry": (lambda b: scaled_by(b, "Mul", (B, 1, 1, 1)), "tensor-scale"),
    "one-a-batch-entry-and-head": (lambda b: scaled_by(b, "Mul", (B, H, 1, 1)), "tensor-scale"),
    "one-a-score": (lambda b: scaled_by(b, "Mul", (H, N, N)), "tensor-scale"),
    "divided": (lambda b: scaled_by(b, "Div", (H, 1, 1)), "tensor-scale"),
    "twice": (lambda b: scaled_by(b, "Mul", (H, 1, 1), times=2), "tensor-scale"),
    "after-a-mask": (lambda b: scaled_by(b, "Mul", (H, 1, 1), late=True), "mask-scale"),
    "after-the-softcap": (scaled_after_the_softcap, "softcap"),
}


@pytest.mark.parametrize("name", UNSCALED)
def test_other_scales_are_refused(name: str, tmp_path: Path) -> None:
    form, code = UNSCALED[name]
    b = Graph()
    _, detection = found_in(model_of(b, form(b), 18, TensorProto.FLOAT), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == code and len(miss.reason) > 30


def reduced(b: Graph, keepdims: int, masked: bool = False) -> tuple[str, str]:
    s = b.scores()
    s = b.op("Add", s, b.const(b.mask())) if masked else s
    beside = b.op("ReduceLogSumExp", s, b.const([-1]), keepdims=keepdims)
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads())), beside


def maximum_and_logarithm(b: Graph, squeezed: bool) -> tuple[str, str]:
    """As flash attention: m + log(sum(exp(s - m)))."""
    s = b.scores()
    top = b.op("ReduceMax", s, b.const([-1]), keepdims=1)
    e = b.op("Exp", b.op("Sub", s, top))
    total = b.op("ReduceSum", e, b.const([-1]), keepdims=1)
    out = b.merge(b.op("MatMul", b.op("Div", e, total), b.heads()))
    if squeezed:
        top, total = (b.op("Squeeze", v, b.const([-1])) if v == top else v for v in (top, total))
        return out, b.op("Add", top, b.op("Squeeze", b.op("Log", total), b.const([-1])))
    return out, b.op("Add", b.op("Log", total), top)


def without_maximum(b: Graph) -> tuple[str, str]:
    e = b.op("Exp", b.scores())
    total = b.op("ReduceSum", e, b.const([-1]), keepdims=1)
    return b.merge(b.op("MatMul", b.op("Div", e, total), b.heads())), b.op("Log", total)


BESIDE: dict[str, Callable[[Graph], tuple[str, str]]] = {
    "reduced": lambda b: reduced(b, 0),
    "reduced-keeping-the-axis": lambda b: reduced(b, 1),
    "reduced-masked": lambda b: reduced(b, 0, masked=True),
    "maximum-and-logarithm": lambda b: maximum_and_logarithm(b, False),
    "maximum-and-logarithm-squeezed": lambda b: maximum_and_logarithm(b, True),
    "without-maximum": without_maximum,
}


@pytest.mark.parametrize("name", BESIDE)
def test_log_sum_exp_beside_the_weights(name: str, tmp_path: Path) -> None:
    b = Graph()
    out, beside = BESIDE[name](b)
    model, site = only_site(model_of(b, out, 18, TensorProto.FLOAT, (beside,)), tmp_path)
    assert site.log_sum_exp == beside and site.needs == {"log-sum-exp"}
    assert beside not in site.interior
    made = {o: n.name or f"{n.op_type}:{o}" for n in model.proto.graph.node for o in n.output}
    assert made[beside] in site.nodes


def log_sum_exp_of(b: Graph, what: str) -> tuple[str, ...]:
    """Values that look like it."""
    raw = b.op("MatMul", b.heads(), b.heads(transposed=True))
    s = b.op("Mul", raw, b.number(0.4))
    out = b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))
    if what == "unscaled":
        return out, b.op("ReduceLogSumExp", raw, b.const([-1]), keepdims=0)
    if what == "over-queries":
        return out, b.op("ReduceLogSumExp", s, b.const([2]), keepdims=0)
    if what == "twice":
        return out, *(b.op("ReduceLogSumExp", s, b.const([-1]), keepdims=k) for k in (0, 1))
    return out, b.op("ReduceSum", s, b.const([-1]), keepdims=0)


@pytest.mark.parametrize("what", ["unscaled", "over-queries", "twice", "sum"])
def test_other_values_beside_the_weights_are_refused(what: str, tmp_path: Path) -> None:
    b = Graph()
    out, *others = log_sum_exp_of(b, what)
    _, detection = found_in(model_of(b, out, 18, TensorProto.FLOAT, tuple(others)), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == ("log-sum-exp" if what == "twice" else "scores-used")


def masked_weights(b: Graph) -> str:
    """Some rows see nothing: NaN."""
    seen = np.tril(np.ones((N, N), bool))
    seen[3] = False
    return b.op("Softmax", b.op("Where", b.const(seen), b.scores(), b.number(-np.inf)), axis=-1)


def nan_to_num(b: Graph, p: str) -> str:
    """torch.nan_to_num through the dynamo exporter."""
    out = b.op("Where", b.op("IsNaN", p), b.number(0.0), p)
    infinite = b.op("IsInf", p)
    for op, number in (("Less", np.finfo(F32).min), ("Greater", np.finfo(F32).max)):
        out = b.op("Where", b.op("And", b.op(op, p, b.number(0.0)), infinite), b.number(number), out)
    return out


def nan_to_num_step_by_step(b: Graph, p: str) -> str:
    """torch.nan_to_num through the TorchScript exporter: each step reads the step before."""
    out = b.op("Where", b.op("IsNaN", p), b.const(np.zeros(1, F32)), p)
    for op, number in (("Greater", np.finfo(F32).max), ("Less", np.finfo(F32).min)):
        infinite = b.op("Cast", b.op("IsInf", b.op("Cast", out, to=TensorProto.FLOAT)), to=TensorProto.BOOL)
        test = b.op("And", infinite, b.op(op, out, b.const(np.zeros(1, F32))))
        out = b.op("Where", test, b.const(np.array([number], F32)), out)
    return out


def not_nan(b: Graph, p: str) -> str:
    return b.op("Where", b.op("Not", b.op("IsNaN", p)), p, b.number(0.0))


def not_equal_to_itself(b: Graph, p: str) -> str:
    return b.op("Where", b.op("Equal", p, p), p, b.number(0.0))


@pytest.mark.parametrize("guard", [nan_to_num, nan_to_num_step_by_step, not_nan, not_equal_to_itself])
def test_nan_guards(guard: Callable[[Graph, str], str], tmp_path: Path) -> None:
    b = Graph()
    out = b.merge(b.op("MatMul", guard(b, masked_weights(b)), b.heads()))
    model, site = only_site(model_of(b, out, 18, TensorProto.FLOAT), tmp_path)
    assert site.mask.guarded and site.mask.masked_rows == "zero"
    result = run_for(model.proto, random_feeds(model.proto), [site.output.value])[site.output.value]
    assert np.isfinite(result).all()


@pytest.mark.parametrize("masks", [1, 2])
def test_a_guard_that_asks_one_mask(masks: int, tmp_path: Path) -> None:
    """Rows without keys by the mask become zero; those that it hides together with another mask stay NaN."""
    b = Graph()
    seen = np.tril(np.ones((N, N), bool))
    seen[3] = False
    seen[0] = [False, *([True] * (N - 1))]
    s = b.scores()
    if masks == 2:
        s = b.op("Where", b.const(np.tril(np.ones((N, N), bool))), s, b.number(-np.inf))
    mask = b.const(np.where(seen, F32(0), F32(-np.inf))[None, None])
    p = b.op("Softmax", b.op("Add", s, mask), axis=-1)
    nothing = b.op("Equal", b.op("ReduceMax", mask, b.const([-1]), keepdims=1), b.number(-np.inf))
    p = b.op("Where", nothing, b.number(0.0), p)
    proto = model_of(b, b.merge(b.op("MatMul", p, b.heads())), 18, TensorProto.FLOAT)
    if masks == 1:
        _, site = only_site(proto, tmp_path)
        assert site.mask.masked_rows == "zero"
    else:
        model, detection = found_in(proto, tmp_path)
        (miss,) = detection.near_misses
        assert not detection.sites and miss.code == "guard"
        out = model.proto.graph.output[0].name
        assert np.isnan(run_for(model.proto, random_feeds(model.proto), [out])[out]).any()


def to_another_number(b: Graph, p: str) -> str:
    return b.op("Where", b.op("IsNaN", p), b.number(0.5), p)


def small_weights_dropped(b: Graph, p: str) -> str:
    return b.op("Where", b.op("Less", p, b.number(0.01)), b.number(0.0), p)


def ones_dropped(b: Graph, p: str) -> str:
    """Only a weight of exactly one number is changed: no random input finds it."""
    return b.op("Where", b.op("Equal", p, b.number(0.0625)), b.number(0.0), p)


def everything_but_nan(b: Graph, p: str) -> str:
    return b.op("Where", b.op("IsNaN", p), p, b.number(0.0))


@pytest.mark.parametrize("guard", [to_another_number, small_weights_dropped, ones_dropped, everything_but_nan])
def test_what_is_no_guard(guard: Callable[[Graph, str], str], tmp_path: Path) -> None:
    b = Graph()
    out = b.merge(b.op("MatMul", guard(b, masked_weights(b)), b.heads()))
    _, detection = found_in(model_of(b, out, 18, TensorProto.FLOAT), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == "guard"


def test_weights_read_behind_and_before_a_guard(tmp_path: Path) -> None:
    b = Graph()
    p = masked_weights(b)
    out = b.op("Add", b.op("MatMul", nan_to_num(b, p), b.heads()), b.op("ReduceMax", p, keepdims=0))
    _, detection = found_in(model_of(b, b.merge(out), 18, TensorProto.FLOAT), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == "weights-used"


def channels(b: Graph, conv: bool) -> str:
    """Cross-covariance attention: unit rows over the tokens, one temperature a head, softmax over channels."""
    if conv:
        x = b.op("Transpose", "x", perm=[0, 2, 1])
        kernels = (b.const((b.rng.standard_normal((W, W, 1)) / 5).astype(F32)) for _ in range(3))
        q, k, v = (b.op("Reshape", b.op("Conv", x, w), b.const([B, H, D, N])) for w in kernels)
    else:
        q, k, v = (b.op("Transpose", b.heads(), perm=[0, 1, 3, 2]) for _ in range(3))
    s = b.op("MatMul", unit(b, q, 3), b.op("Transpose", unit(b, k, 3), perm=[0, 1, 3, 2]))
    s = b.op("Mul", s, b.const(b.rng.uniform(0.5, 2, (H, 1, 1)).astype(F32)))
    out = b.op("MatMul", b.op("Softmax", s, axis=-1), v)
    return b.op("Reshape", b.op("Transpose", out, perm=[0, 3, 1, 2]), b.const([B, N, W]))


@pytest.mark.parametrize("conv", [False, True])
def test_attention_over_channels_is_refused(conv: bool, tmp_path: Path) -> None:
    b = Graph()
    _, detection = found_in(model_of(b, channels(b, conv), 18, TensorProto.FLOAT), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == "channel-attention" and "channels" in miss.reason
