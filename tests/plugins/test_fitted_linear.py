"""``FittedLinearAttention``: what stands in the place of a softmax site, against the naive reference and against torch;
and what it refuses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.core.feature_map import FeatureMaps, Kind
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Shape, understood
from attncompile.core.site import AttentionSite, Cache, Operand
from attncompile.gpu_cost import GpuCost
from attncompile.plugins import mechanism
from attncompile.plugins.linear_attention.fitted import FittedLinearAttention, fitted_reference
from attncompile.plugins.linear_attention.op import APPLY, OUTPUT, STATE, STATES

CAUSAL = MaskFacts((MaskPart("causal", Certificate("compared", "every element", general=True), -1, 0),), "zero")
PLAIN: Kind = "hedgehog"
MAPS: tuple[Kind, ...] = ("hedgehog", "relu", "mala")


def site(**changed: Any) -> AttentionSite:
    layouts = changed.pop("layouts", ("BNHD", "BHND", "BNHD", "BNHD"))
    query, key, value, output = (Operand(n, x) for n, x in zip("qkvo", layouts, strict=True))
    made = AttentionSite(
        id="site0", form="f", query=query, key=key, value=value, output=output, batch=2, heads=4, kv_heads=2,
        head_dim=10, value_dim=7, query_length=37, key_length=37, scale=0.3, mask=MaskFacts(), dtype="float32",
        softmax_dtype="float32", nodes=(), interior=(),
    )  # fmt: skip
    return replace(made, **changed)


def maps(kind: Kind, at: AttentionSite, width: int = 5, seed: int = 0) -> FeatureMaps:
    rng = np.random.default_rng(seed)
    shapes = {
        "query_weight": (at.heads, at.head_dim, width), "key_weight": (at.kv_heads, at.head_dim, width),
        "query_bias": (at.heads, width), "key_bias": (at.kv_heads, width),
    }  # fmt: skip
    names = {"hedgehog": ("query_weight", "key_weight"), "relu": tuple(shapes), "mala": ()}[kind]
    arrays = {n: (rng.standard_normal(shapes[n]) * 0.4).astype(np.float32) for n in names}
    if kind == "mala":
        arrays["magnitude"] = np.array([0.01, -0.003, 2e-4, 0.02][: at.heads], np.float32)
    return FeatureMaps(kind, arrays)


def operands(at: AttentionSite, seed: int = 1) -> list[np.ndarray]:
    """BNHD."""
    rng = np.random.default_rng(seed)
    queries, keys = (n if isinstance(n, int) else 45 for n in (at.query_length, at.key_length))
    sizes = ((queries, at.heads, at.head_dim), (keys, at.kv_heads, at.head_dim), (keys, at.kv_heads, at.value_dim))
    return [rng.standard_normal((2, *s)) for s in sizes]


def run(at: AttentionSite, held: FeatureMaps, given: list[np.ndarray]) -> np.ndarray:
    """What the written nodes give, BNHD."""
    ours = FittedLinearAttention({at.id: [held]})
    (candidate,) = ours.approximate_candidates(at)
    assert ours.supports(at, candidate.parameters).ok
    lowering = ours.lower(at, candidate.parameters, 18)
    kind = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "double": TensorProto.DOUBLE}[at.dtype]
    infos, feed = [], {}
    for operand, array in zip((at.query, at.key, at.value), given, strict=True):
        array = array.transpose(0, 2, 1, 3) if operand.layout == "BHND" else array
        feed[operand.value] = np.ascontiguousarray(array, helper.tensor_dtype_to_np_dtype(kind))
        infos.append(helper.make_tensor_value_info(operand.value, kind, [None, None, None, None]))
    out = helper.make_tensor_value_info("o", kind, [None] * 4)
    graph = helper.make_graph(list(lowering.nodes), "g", infos, [out], list(lowering.initializers))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("attncompile", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(lowering.functions))
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(["o"], feed)[0], np.float64)
    return found.transpose(0, 2, 1, 3) if at.output.layout == "BHND" else found


def far(ours: np.ndarray, want: np.ndarray) -> float:
    assert ours.shape == want.shape
    return float(np.linalg.norm(ours - want) / np.linalg.norm(want))


SITES = {
    "plain": {}, "all BHND": {"layouts": ("BHND",) * 4}, "all BNHD": {"layouts": ("BNHD",) * 4},
    "more queries": {"query_length": 50}, "no groups": {"kv_heads": 4}, "causal": {"mask": CAUSAL},
    "dynamic": {"query_length": "n", "key_length": "n", "batch": "b"},
    "causal, long": {"mask": CAUSAL, "query_length": 150, "key_length": 150, "layouts": ("BHND",) * 4},
    "causal, dynamic": {"mask": CAUSAL, "query_length": "n", "key_length": "n"}, "float16": {"dtype": "float16"},
    "double": {"dtype": "double"}, "causal, float16": {"mask": CAUSAL, "dtype": "float16"},
}  # fmt: skip


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("changed", SITES.values(), ids=SITES)
def test_what_is_written_is_the_reference(kind: Kind, changed: dict[str, Any]) -> None:
    at = site(**changed)
    causal = bool(at.mask.parts)
    if not FittedLinearAttention().fits(at, kind).ok:
        assert causal and (kind == "mala" or at.dtype == "float16")
        return
    held, given = maps(kind, at), operands(at)
    if at.dtype == "float16":
        given = [x.astype(np.float16).astype(np.float64) for x in given]
    want = fitted_reference(*given, held, causal)
    limit = {"float16": 2e-3, "float32": 3e-6, "double": 3e-7}[at.dtype]  # weights are float32
    if kind == "mala" and at.kv_heads < at.heads:  # roots of float32
        limit = max(limit, 3e-6)
    assert far(run(at, held, given), want) < limit


@pytest.mark.parametrize(("kind", "causal"), [(k, c) for k in MAPS for c in (False, True) if not c or k != "mala"])
def test_the_reference_is_what_torch_says(kind: Kind, causal: bool) -> None:
    """The papers' formulas, written with torch from the whole matrix of weights."""
    torch = pytest.importorskip("torch")
    at = site(kv_heads=4)
    held, given = maps(kind, at), operands(at)
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in given)
    w = {n: torch.tensor(a, dtype=torch.float64) for n, a in held.arrays.items()}
    if kind == "mala":
        q = (torch.nn.functional.elu(q) + 1) * w["magnitude"][None, :, None, None]
        k = torch.nn.functional.elu(k) + 1
    else:
        q, k = q @ w["query_weight"], k @ w["key_weight"]
        if kind == "relu":
            q, k = (torch.relu(x + w[f"{n}_bias"][:, None]) for x, n in ((q, "query"), (k, "key")))
        else:
            q, k = (torch.exp(torch.cat([x, -x], dim=-1)) for x in (q, k))
    scores = q @ k.transpose(-1, -2)
    scores = scores.tril() if causal else scores
    total = scores.sum(-1, keepdim=True)
    if kind == "mala":
        weights = (1 + 1 / total) * scores - total / at.key_length
    else:
        weights = scores / (total + (1e-6 if kind == "relu" else 0))
    want = (weights @ v).transpose(1, 2).numpy()
    assert far(fitted_reference(*given, held, causal), want) < 1e-12


def test_hedgehog_is_carried_by_the_ops_and_else_in_front_of_them() -> None:
    def types(kind: Kind, **changed: Any) -> list[str]:
        at = site(**changed)
        held = maps(kind, at)
        lowering = FittedLinearAttention({at.id: [held]}).lower(at, {"map": kind, "fit": held.digest}, 18)
        return [n.op_type for n in lowering.nodes]

    assert types("hedgehog") == [STATE, APPLY]
    assert types("relu")[-2:] == types("mala")[-2:] == [STATE, APPLY]
    assert types("relu", mask=CAUSAL)[-2:] == types("hedgehog", mask=CAUSAL)[-2:] == [STATES, OUTPUT]
    assert types("hedgehog", mask=CAUSAL).count("Exp") == 4


@pytest.mark.parametrize("kind", ["relu", "mala"])
def test_what_stands_in_front_of_the_ops_has_no_predicted_time_on_a_gpu(kind: Kind) -> None:
    at, held = site(), maps(kind, site())
    lowering = FittedLinearAttention({at.id: [held]}).lower(at, {"map": kind, "fit": held.digest}, 18)
    cost = GpuCost(lambda binding: pytest.fail("not needed"), {}, 90, "float16", False)
    with pytest.raises(Unsupported, match="in front of the ops"):
        cost.milliseconds(at, lowering, {})


REFUSED = {
    "mask": {"mask": MaskFacts((replace(CAUSAL.parts[0], kind="window", left=9),), "zero")},
    "lengths": {"mask": CAUSAL, "query_length": 20}, "kind": {"kind": "linear"}, "heads": {"softcap": 30.0},
    "cache": {"cache": Cache("concat", "a", "b", "c", "d")}, "dtype": {"dtype": "float16", "mask": CAUSAL},
    "layout": {"layouts": ("BHDN", "BHDN", "BHDN", "BHDN")},
}  # fmt: skip


@pytest.mark.parametrize(("code", "changed"), REFUSED.items(), ids=REFUSED)
def test_what_is_no_sum_over_all_keys_is_refused(code: str, changed: dict[str, Any]) -> None:
    at = site(**changed)
    held = maps(PLAIN, site())
    ours = FittedLinearAttention({at.id: [held]})
    verdict = ours.fits(at, PLAIN)
    assert not verdict.ok and verdict.code == code and verdict.reason
    assert not ours.approximate_candidates(at)
    with pytest.raises(Unsupported):
        ours.lower(at, {"map": PLAIN, "fit": held.digest}, 18)


def test_mala_has_no_causal_form() -> None:
    assert FittedLinearAttention().fits(site(mask=CAUSAL), "mala").code == "causal"
    assert not understood(mechanism("FittedLinearAttention"), site(sinks="s")).ok
    assert not understood(mechanism("FittedLinearAttention"), site(scope="If_1/then_branch")).ok


def test_nothing_is_offered_without_maps_and_nothing_is_exact() -> None:
    registered = mechanism("FittedLinearAttention")
    at, held = site(), maps(PLAIN, site())
    said = {"map": PLAIN, "fit": held.digest}
    assert not registered.approximate_candidates(at) and not registered.exact_candidates(at)
    assert not registered.is_exact_for(at, said).ok
    missing = registered.supports(at, said)
    assert not missing.ok and "--fitted" in missing.hint
    ours = FittedLinearAttention({at.id: [held]})
    assert ours.supports(at, said).ok
    assert not ours.supports(at, {**said, "map": "relu"}).ok
    assert not ours.supports(at, {**said, "chunk": 3}).ok
    assert not ours.supports(replace(at, head_dim=12), said).ok
    assert not ours.supports(replace(at, id="site1"), said).ok


def test_a_digest_is_of_kind_and_numbers() -> None:
    at = site()
    one, same, other = maps(PLAIN, at), maps(PLAIN, at), maps(PLAIN, at, seed=1)
    assert one.digest == same.digest != other.digest
    with pytest.raises(ValueError, match="hedgehog has"):
        FeatureMaps(PLAIN, {"magnitude": np.ones(4)})


@pytest.mark.parametrize("kind", MAPS)
def test_cost_is_linear_in_the_length(kind: Kind) -> None:
    def work(tokens: int) -> float:
        cost = FittedLinearAttention().cost(site(), {"map": kind}, Shape(2, tokens, tokens))
        return cost.flops + cost.elements

    assert math.isclose(work(4000), 4 * work(1000))
