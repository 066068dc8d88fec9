"""One suite for all mechanisms: what they lower to, run by ONNX Runtime, against their references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from attncompile.core.errors import Unsupported
from attncompile.plugins import mechanism, mechanisms

NEWEST = 28  # the newest opset that both onnx 1.23 and ONNX Runtime 1.32 know


class StoredMask(dict[str, Any]):
    """No parameters: the op reads the site's own mask, which is of this kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


SLIDING = {"kernel_size": [9], "left": [8], "causal": [1], "block": 16}
PARAMETERS: dict[str, dict[str, dict[str, Any]]] = {
    "NeighborhoodAttention": {
        "causal": SLIDING,
        "causal, dense below": {**SLIDING, "dense_below": 24},
        "sinks": {**SLIDING, "prefix": 3},
        "sinks, dense below": {**SLIDING, "prefix": 3, "dense_below": 100},
        "two-sided": {"kernel_size": [9], "block": 16},
        "even": {"kernel_size": [8], "block": 16},
        "asymmetric": {"kernel_size": [8], "left": [2], "block": 16},
        "wider than the sequence": {"kernel_size": [200], "block": 16},
        "prefix and suffix": {"kernel_size": [9], "prefix": 2, "suffix": 3, "block": 16},
        "prefix and suffix, dense below": {"kernel_size": [9], "prefix": 2, "suffix": 3, "dense_below": 100},
    },
    "BlockSparseAttention": {
        kind: StoredMask(kind)
        for kind in ("documents", "prefix-LM", "global and local", "random blocks", "stripes", "dilated", "windows")
    },
    "Attention": {"none": {"causal": False}, "causal": {"causal": True}},
    "DenseAttention": {
        "none": {},
        "causal": {"right": 0},
        "causal, 3 chunks": {"right": 0, "chunks": 3},
        "causal, 8 chunks": {"right": 0, "chunks": 8},
    },
}
GRIDS: dict[str, dict[str, Any]] = {
    "2-D clamp": {"kernel_size": [3, 3], "grid": [7, 5], "border": "clamp", "block": 12},
    "2-D clamp, even, prefix, suffix": {
        "kernel_size": [4, 3], "grid": [7, 5], "border": "clamp", "prefix": 1, "suffix": 2, "block": 12,
    },
    "2-D truncate": {"kernel_size": [5, 3], "grid": [7, 6], "border": "truncate", "block": 12},
    "2-D left": {"kernel_size": [5, 3], "left": [1, 0], "grid": [7, 6], "border": "clamp", "block": 12},
    "2-D dilation": {"kernel_size": [3, 2], "grid": [11, 7], "border": "clamp", "dilation": [3, 2], "block": 12},
    "2-D stride": {"kernel_size": [4, 3], "grid": [9, 10], "border": "clamp", "stride": [2, 3], "block": 12},
    "2-D causal rows": {"kernel_size": [3, 3], "grid": [7, 5], "border": "clamp", "causal": [1, 0], "stride": [2, 1]},
    "blocked (Swin)": {"kernel_size": [4, 4], "grid": [8, 12], "stride": [4, 4]},
    "blocked, ragged": {"kernel_size": [4, 4], "grid": [9, 7], "stride": [4, 4], "block": 16},
    "ball (CLEAR)": {"kernel_size": [5, 5], "grid": [7, 6], "shape": "ball", "block": 12},
    "3-D clamp": {"kernel_size": [2, 3, 3], "grid": [4, 5, 3], "border": "clamp", "block": 16},
    "3-D causal frames": {"kernel_size": [2, 3, 2], "grid": [4, 5, 3], "border": "clamp", "causal": [1, 0, 0]},
    "1-D clamp, dilation": {"kernel_size": [5], "grid": [37], "border": "clamp", "dilation": [3], "prefix": 2},
}  # fmt: skip
ALL = [pytest.param(m, p, id=f"{m}: {label}") for m, some in PARAMETERS.items() for label, p in some.items()]
LAYOUTS = [
    ("BHND", "BHND", "BHND", "BHND"), ("BNHD", "BNHD", "BNHD", "BNHD"), ("BNHD", "BHND", "BNHD", "BHND"),
    ("BHND", "BNHD", "BHND", "BNHD"),
]  # fmt: skip


def first_opset(name: str) -> int:
    return 23 if name == "Attention" else 18


def stored_mask(label: str, queries: int, keys: int) -> np.ndarray:
    """Bool [queries, keys] of a kind that models have; every query sees a key. Queries are the last tokens."""
    i, j = np.arange(keys - queries, keys)[:, None], np.arange(keys)[None, :]
    rng = np.random.default_rng(3)
    if label == "documents":
        ends = np.array([5, 6, 19, 30])
        return (np.searchsorted(ends, i, "right") == np.searchsorted(ends, j, "right")) & (j <= i)
    if label == "prefix-LM":
        return (j <= i) | (j < 7)
    if label == "global and local":
        return (abs(i - j) <= 3) | np.isin(i, (0, 11)) | np.isin(j, (0, 11))
    if label == "random blocks":
        chosen = rng.random((queries // 4 + 1, keys // 4 + 1)) < 0.3
        return (abs(i - j) <= 1) | chosen[np.arange(queries)[:, None] // 4, j // 4]
    if label == "stripes":
        return ((i - j) % 9 < 2) | (j % 13 == 0)
    if label == "dilated":
        return ((i - j) % 3 == 0) & (abs(i - j) <= 12)
    assert label == "windows"  # Swin's, shifted by one, on rows of 6 tokens
    return ((i // 6 + 1) // 3 == (j // 6 + 1) // 3) & ((i % 6 + 1) // 3 == (j % 6 + 1) // 3)


def prepared(case: Any, name: str, parameters: dict[str, Any], **changes: Any) -> Any:
    """A case whose site has the mask that goes with the mechanism's parameters."""
    causal = name != "NeighborhoodAttention" and (bool(parameters.get("causal")) or parameters.get("right") == 0)
    at = replace(case(opset=first_opset(name), causal=causal), **changes)
    if not isinstance(parameters, StoredMask):
        return at
    return replace(at, static=True, visible=stored_mask(parameters.kind, at.queries, at.key_length))


_OWN = ("LinearAttention", "FittedLinearAttention")
OF_SOFTMAX = tuple(m for m in mechanisms() if m.name not in _OWN)
"""Linear attention has other parameters and suites of its own: ``test_linear_bodies.py``, ``test_fitted_linear.py``."""


def test_every_mechanism_is_covered() -> None:
    assert {m.name for m in OF_SOFTMAX} == set(PARAMETERS)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_layouts_and_lengths(name, parameters, layouts, case, error, tolerance) -> None:
    for static, queries in ((False, 37), (True, 37), (True, 48)):
        at = prepared(case, name, parameters, layouts=layouts, static=static, queries=queries, batch=2)
        assert error(at, mechanism(name), parameters) < tolerance["float32"]


@pytest.mark.parametrize("queries", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_short_sequences(name, parameters, queries, case, error, tolerance) -> None:
    if queries < parameters.get("prefix", 0) + parameters.get("suffix", 0):
        pytest.skip("fewer tokens than the prefix and the suffix hold")
    at = prepared(case, name, parameters, queries=queries)
    assert error(at, mechanism(name), parameters) < tolerance["float32"]


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 1), (6, 2)])
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_head_groups(name, parameters, heads, kv_heads, case, error, tolerance) -> None:
    at = prepared(case, name, parameters, heads=heads, kv_heads=kv_heads, batch=2)
    assert error(at, mechanism(name), parameters) < tolerance["float32"]


@pytest.mark.parametrize("softmax_dtype", ["float16", "float32"])
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_half(name, parameters, softmax_dtype, case, error, tolerance) -> None:
    at = prepared(case, name, parameters, dtype="float16", softmax_dtype=softmax_dtype, value_dim=8)
    assert error(at, mechanism(name), parameters) < tolerance["float16"]


@pytest.mark.parametrize("opset", range(18, NEWEST + 1))
@pytest.mark.parametrize("name", PARAMETERS)
def test_opsets(name, opset, case, error, tolerance) -> None:
    for parameters in PARAMETERS[name].values():
        at = prepared(case, name, parameters, opset=opset)
        if opset < first_opset(name):
            with pytest.raises(Unsupported, match="opset"):
                mechanism(name).lower(at.site(), parameters, opset)
        else:
            assert error(at, mechanism(name), parameters) < tolerance["float32"]


def test_opset_17_is_refused(case) -> None:
    for m in OF_SOFTMAX:
        with pytest.raises(Unsupported, match="opset"):
            parameters = next(iter(PARAMETERS[m.name].values()))
            m.lower(prepared(case, m.name, parameters).site(), parameters, 17)


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("parameters", GRIDS.values(), ids=GRIDS)
def test_grids(parameters, layouts, case, error, tolerance) -> None:
    tokens = int(np.prod(parameters["grid"])) + parameters.get("prefix", 0) + parameters.get("suffix", 0)
    at = case(queries=tokens, static=True, layouts=layouts, batch=2)
    assert error(at, mechanism("NeighborhoodAttention"), parameters) < tolerance["float32"]


def masks(batch: int, keys: int) -> dict[str, np.ndarray]:
    """Padding left, right and scattered; rows whose window is fully masked; a batch entry with no key at all."""
    rng = np.random.default_rng(5)
    scattered = rng.random((batch, 1, 1, keys)) > 0.5
    holes = np.ones((batch, 1, 1, keys), bool)
    holes[0, ..., keys // 4 : 3 * keys // 4] = False
    left = np.ones((batch, 1, 1, keys), bool)
    left[0, ..., : keys // 2] = False
    empty = scattered.copy()
    empty[-1] = False
    return {"scattered": scattered, "holes": holes, "left": left, "empty": empty, "rank 1": scattered[0, 0, 0]}


@pytest.mark.parametrize("kind", ["scattered", "holes", "left", "empty", "rank 1"])
@pytest.mark.parametrize("masked_rows", ["zero", "uniform", "nan"])
@pytest.mark.parametrize("parameters", [*list(PARAMETERS["NeighborhoodAttention"].values())[:5], GRIDS["2-D clamp"]])
def test_key_masks(parameters, masked_rows, kind, case, error, tolerance) -> None:
    keys = 35
    at = case(
        batch=2, queries=keys, static="grid" in parameters, key_mask=masks(2, keys)[kind], masked_rows=masked_rows,
        fills=(-3e38,),
    )  # fmt: skip
    given = {**parameters, "masked_rows": masked_rows}
    want = at.expected(mechanism("NeighborhoodAttention"), given)
    if kind == "empty":  # the test is about rows that see nothing: they must be there
        assert np.isnan(want).any() if masked_rows == "nan" else (want[-1] == 0).all() == (masked_rows == "zero")
    assert error(at, mechanism("NeighborhoodAttention"), given) < tolerance["float32"]


@pytest.mark.parametrize("kind", ["scattered", "left", "empty"])
@pytest.mark.parametrize(
    ("masked_rows", "causal", "chunks"),
    [
        ("zero", False, 1),
        ("uniform", False, 1),
        ("nan", False, 1),
        ("uniform", True, 1),
        ("uniform", True, 3),
        ("zero", True, 3),
        ("nan", True, 3),
    ],
)
@pytest.mark.parametrize("static", [True, False])
def test_key_masks_of_dense_attention(masked_rows, causal, chunks, static, kind, case, error, tolerance) -> None:
    keys = 300 if not static else 35  # a dynamic sequence is cut from 257 tokens on
    at = case(batch=2, queries=keys, heads=2, static=static, causal=causal, key_mask=masks(2, keys)[kind],
              masked_rows=masked_rows, fills=(-3e38,))  # fmt: skip
    given = {"right": 0 if causal else -1, "masked_rows": masked_rows, "chunks": chunks}
    assert error(at, mechanism("DenseAttention"), given) < tolerance["float32"]


@pytest.mark.parametrize("kind", ["scattered", "empty"])
def test_attention_with_padding(kind, case, error, tolerance) -> None:
    for opset in range(23, NEWEST + 1):
        at = case(opset=opset, batch=2, key_mask=masks(2, 37)[kind])
        assert error(at, mechanism("Attention"), {"causal": False}) < tolerance["float32"]


@pytest.mark.parametrize(("queries", "keys"), [(1, 37), (5, 37), (20, 37), (16, 64)])
def test_queries_are_the_last_tokens(queries, keys, case, error, tolerance) -> None:
    for parameters in ({}, {"prefix": 3}, {"dense_below": 100}, {"prefix": 3, "dense_below": 100}):
        for static in (False, True):
            at = case(queries=queries, keys=keys, static=static)
            assert error(at, mechanism("NeighborhoodAttention"), {**SLIDING, **parameters}) < tolerance["float32"]


def off_by_one(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The same configuration with one number wrong by one."""
    found = []
    for key, value in parameters.items():
        if key in ("block", "dense_below", "causal", "grid"):
            continue
        if isinstance(value, int):
            found.append({**parameters, key: value + 1})
        elif isinstance(value, list):
            found += [{**parameters, key: [v + (i == axis) for i, v in enumerate(value)]} for axis in range(len(value))]
    if parameters.get("causal") == [1]:  # the window's size and its reach to the left go together
        size = parameters["kernel_size"][0] + 1
        found = [{**parameters, "kernel_size": [size], "left": [size - 1]}, *[f for f in found if "prefix" in f][-1:]]
    return found


@pytest.mark.parametrize("label", ["causal", "sinks", "even", "asymmetric", "prefix and suffix"])
def test_an_off_by_one_in_a_window_is_noticed(label, case, error) -> None:
    parameters = PARAMETERS["NeighborhoodAttention"][label]
    wrong = off_by_one(parameters)
    assert wrong
    for given in wrong:
        at = case()
        got = at.run(mechanism("NeighborhoodAttention"), given)
        want = at.expected(mechanism("NeighborhoodAttention"), parameters)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) > 1e-3, given


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
def test_every_index_constant_of_the_body_matters(layouts, case) -> None:
    """Change one integer constant of the body by one: the result must differ, or the model must fail."""
    at = case(queries=45, layouts=layouts, value_dim=8)
    subject, parameters = mechanism("NeighborhoodAttention"), SLIDING
    want = at.expected(subject, parameters)
    model = at.model(subject, parameters)
    import onnxruntime as ort

    seeded = 0
    for node in model.functions[0].node:
        if node.op_type != "Constant":
            continue
        array = onnx.numpy_helper.to_array(node.attribute[0].t)
        if array.dtype != np.int64 or array.size < 9:
            continue  # the steps of the window and the rows of the block
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        twin = next(n for n in broken.functions[0].node if n.name == node.name)
        twin.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(array + 1))
        session = ort.InferenceSession(broken.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, at.feeds())[0]
        got = got if layouts[3] == "BNHD" else got.transpose(0, 2, 1, 3)
        assert not np.allclose(got, want, rtol=1e-3, atol=1e-3)
        seeded += 1
    assert seeded == 2


def test_nan_of_the_operands_stays_visible(case) -> None:
    """The guard for masked rows looks at the mask, not at the result."""
    at = case(batch=1, queries=45, key_mask=masks(1, 45)["scattered"])
    model, feeds = at.model(mechanism("NeighborhoodAttention"), SLIDING), at.feeds()
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds["q"][0, 0, 20] = np.nan
    out = session.run(None, feeds)[0]
    assert np.isnan(out[0, 0, 20]).all()
    assert not np.isnan(out[0, 1:]).any()


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_shapes_are_inferred(name, parameters, case) -> None:
    at = prepared(case, name, parameters, static=True, layouts=LAYOUTS[3])
    model = at.model(mechanism(name), parameters)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shape = [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim]
    assert shape == [1, 37, 4, 6]


def test_bodies_inline_to_standard_ops(case) -> None:
    import onnx.inliner

    at = case()
    for parameters in PARAMETERS["NeighborhoodAttention"].values():
        inlined = onnx.inliner.inline_local_functions(at.model(mechanism("NeighborhoodAttention"), parameters))
        assert not inlined.functions
        assert {n.domain for n in inlined.graph.node} == {""}


def test_equal_configurations_share_a_function(case) -> None:
    subject = mechanism("NeighborhoodAttention")
    one, same, other = (
        subject.lower(replace(case(), heads=h).site(), SLIDING, 18).functions[0].overload for h in (4, 4, 8)
    )
    assert one == same != other
