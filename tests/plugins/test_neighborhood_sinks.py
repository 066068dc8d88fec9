"""Sliding windows with a sink: one logit a head that joins the softmax and has no value (gpt-oss)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, exact_candidates
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism

SUBJECT = mechanism("NeighborhoodAttention")
GENERAL = Certificate("structure", "given by the test", general=True)
CAUSAL = {"kernel_size": [9], "causal": [1], "block": 16}


def logits(heads: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(heads)).astype(np.float32)


def test_the_reference_by_its_definition() -> None:
    """A softmax over the scores and the sink, whose column is then dropped."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 7, 2, 4)) for _ in range(3))
    sinks = np.array([0.5, -2.0])
    scores = np.einsum("bihd,bjhd->bhij", q, k) / 2
    near = abs(np.arange(7)[:, None] - np.arange(7)) <= 1
    scores = np.where(near, scores, -np.inf)
    joined = np.concatenate([scores, np.broadcast_to(sinks[None, :, None, None], (1, 2, 7, 1))], axis=-1)
    weights = np.exp(joined) / np.exp(joined).sum(axis=-1, keepdims=True)
    want = np.einsum("bhij,bjhd->bihd", weights[..., :-1], v)
    got = SUBJECT.reference(q, k, v, {"kernel_size": [3]}, sinks=sinks)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("layouts", [("BHND",) * 4, ("BNHD",) * 4, ("BNHD", "BHND", "BNHD", "BHND")], ids="-".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("parameters", [CAUSAL, {"kernel_size": [9], "block": 16}, {**CAUSAL, "dense_below": 50}])
def test_bodies(parameters, heads, kv_heads, layouts, case, error, tolerance) -> None:
    for static, queries, keys in ((False, 37, 37), (True, 48, 48), (False, 70, 70), (False, 5, 37), (True, 1, 20)):
        for shape in ((heads,), (1, heads, 1, 1), (1,)):
            sinks = logits(int(np.prod(shape))).reshape(shape)
            at = case(batch=2, queries=queries, keys=keys, heads=heads, kv_heads=kv_heads, layouts=layouts,
                      static=static, sinks=sinks)  # fmt: skip
            assert error(at, SUBJECT, parameters) < tolerance["float32"]
    assert np.abs(at.expected(SUBJECT, parameters) - replace(at, sinks=None).expected(SUBJECT, parameters)).max() > 0.05


@pytest.mark.parametrize("dense_below", [0, 100])
def test_padding(dense_below, case, error, tolerance) -> None:
    """A row that sees no key has all its weight on the sink."""
    keep = np.ones((2, 1, 1, 45), bool)
    keep[0, ..., :20] = False
    keep[1] = False
    at = case(batch=2, queries=45, key_mask=keep, sinks=logits(4))
    given = {**CAUSAL, "dense_below": dense_below}
    assert (at.run(SUBJECT, given)[1] == 0).all()
    assert error(at, SUBJECT, given) < tolerance["float32"]


def test_half(case, error, tolerance) -> None:
    for kind in (np.float16, np.float32):
        at = case(queries=45, dtype="float16", sinks=logits(4).astype(kind), value_dim=8)
        assert error(at, SUBJECT, CAUSAL) < tolerance["float16"]


def test_a_large_sink_takes_everything_and_a_small_one_nothing(case) -> None:
    at = case(queries=45, sinks=np.full(4, 90, np.float32))
    assert np.abs(at.run(SUBJECT, CAUSAL)).max() < 1e-30
    at = case(queries=45, sinks=np.full(4, -1e30, np.float32))
    np.testing.assert_allclose(at.run(SUBJECT, CAUSAL), replace(at, sinks=None).run(SUBJECT, CAUSAL), atol=1e-6)


def test_it_is_taken_by_the_window_and_by_no_op_that_ignores_it(case) -> None:
    at = case(queries=4096, static=True, sinks=logits(4))
    site = at.site(mask=MaskFacts((MaskPart("window", GENERAL, 127, 0),), "zero", (-np.inf,)))
    (found,) = exact_candidates(SUBJECT, site)
    assert isinstance(found, Candidate)
    assert SUBJECT.lower(site, found.parameters, 18).nodes[0].input[-1] == "sinks"
    (dense,) = exact_candidates(mechanism("DenseAttention"), site)  # it reads them too, and skips nothing
    assert isinstance(dense, Candidate) and (dense.parameters["left"], dense.parameters["chunks"]) == (127, 1)
    for name in ("BlockSparseAttention", "Attention"):
        (refused,) = exact_candidates(mechanism(name), site)
        assert isinstance(refused, Verdict) and refused.code == "needs" and "sinks" in refused.reason


def test_refusals(case) -> None:
    at = case(queries=400, static=True, sinks=logits(4))
    part = MaskPart("window", GENERAL, 15, 0)
    padding = MaskPart("padding", GENERAL, source="m")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((part, padding), "uniform"),
        ((part, MaskPart("bias", Certificate("evaluated", ""), source="b", additive=True)), "zero"),
    ]
    for parts, rows in cases:
        (found,) = SUBJECT.exact_candidates(at.site(mask=MaskFacts(parts, rows, (-3e38,))))
        assert isinstance(found, Verdict) and found.code == "sinks"
    assert SUBJECT.supports(at.site(), {**CAUSAL, "prefix": 2}).code == "sinks"
    assert SUBJECT.supports(at.site(), {"kernel_size": [3, 3], "grid": [20, 20]}).code == "sinks"


def test_bodies_inline_to_standard_ops(case) -> None:
    at = case(queries=45, sinks=logits(4))
    for parameters in (CAUSAL, {**CAUSAL, "dense_below": 50}):
        inlined = onnx.inliner.inline_local_functions(at.model(SUBJECT, parameters))
        assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}
