"""Operands whose axes come in another order, or whose floats are narrower than the output: found after a pair of nodes
that change nothing, run, and equal.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from attncompile.core.model import Model
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.separate import separate
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import save
from tests.passes.rebuild import found_in, random_feeds, rebuilt
from tests.passes.test_lifter_forms import B, D, Graph, H, N, W, model_of

HALF, FLOAT = int(TensorProto.FLOAT16), int(TensorProto.FLOAT)


def held(b: Graph, order: str) -> str:
    """A projection whose axes are ``order`` of b, n, h, d, and that nothing but views leads on from."""
    x = b.op("Reshape", b.linear("x", W), b.const([B, N, H, D]))
    return b.op("Tanh", b.op("Transpose", x, perm=["bnhd".index(c) for c in order]))


def ordered(q: str, k: str, v: str, out: str, axis: int = 3) -> onnx.ModelProto:
    """Einsum attention; operands and output with their axes in these orders."""
    b = Graph()
    left, right, value = held(b, q), held(b, k), held(b, v)
    i, j = str.maketrans("n", "i"), str.maketrans("n", "j")
    scores = b.op("Einsum", left, right, equation=f"{q.translate(i)},{k.translate(j)}->bhij")
    weights = b.op("Softmax", b.op("Mul", scores, b.number(0.4)), axis=axis)
    made = b.op("Einsum", weights, value, equation=f"bhij,{v.translate(j)}->{out.translate(i)}")
    made = b.op("Transpose", b.op("Tanh", made), perm=[out.index(c) for c in "bnhd"])
    return model_of(b, b.op("Reshape", made, b.const([B, N, W])), 18, FLOAT)


def only(proto: onnx.ModelProto, folder: Path) -> tuple[Model, AttentionSite]:
    found, detection = found_in(proto, folder)
    assert [m.reason for m in detection.near_misses] == []
    (site,) = detection.sites
    rebuilt(found.proto, site, random_feeds(proto)).check()
    return found, site


@pytest.mark.parametrize(
    "orders",
    [("nbhd", "nbhd", "nbhd", "nbhd"), ("bnhd", "nbhd", "hbnd", "nhbd"), ("hnbd", "dbhn", "nbhd", "bhnd"),
     ("bhnd", "bhnd", "bhnd", "nbhd"), ("bhnd", "hbnd", "bnhd", "bhnd")],
)  # fmt: skip
def test_axes_in_another_order(orders: tuple[str, str, str, str], tmp_path: Path) -> None:
    _, site = only(ordered(*orders), tmp_path)
    assert (site.batch, site.heads, site.query_length, site.key_length, site.head_dim) == (B, H, N, N, D)


def test_a_softmax_over_queries_is_refused_in_any_order(tmp_path: Path) -> None:
    _, detection = found_in(ordered("nbhd", "nbhd", "nbhd", "nbhd", axis=2), tmp_path)
    assert not detection.sites
    assert detection.near_misses[0].code in ("softmax-axis", "value-axis")


def only_half(proto: onnx.ModelProto, folder: Path, tolerance: float) -> tuple[Model, AttentionSite]:
    """As ``only``, but ONNX Runtime's CPU computes float16 in float32 and leaves out a rounding where casts meet."""
    found = load(save(proto, folder))
    profile = profile_for(found, {})
    assert {m.code for m in detect(found, profile).near_misses} <= {"layout"}
    found = separate(found, profile)
    (site,) = detect(found, profile).sites
    rebuilt(found.proto, site, random_feeds(proto)).check(tolerance)
    return found, site


def wide(narrowed: bool = False, round_trip: bool = False) -> onnx.ModelProto:
    """Scores in float16, softmax and product with the values in float32; the output stays float32. ``narrowed``: query
    and key come from float32 and lose digits; ``round_trip``: they pass through float32 and back.
    """
    b = Graph()
    x = b.op("Cast", "x", to=HALF)

    def operand(transposed: bool) -> str:
        if narrowed:
            value = b.op("Cast", b.op("Mul", b.heads(), b.number(3.0)), to=HALF)
            return b.op("Transpose", value, perm=[0, 1, 3, 2]) if transposed else value
        value = b.heads(x=x, transposed=transposed, kind=np.float16)
        return b.op("Cast", b.op("Cast", value, to=FLOAT), to=HALF) if round_trip else value

    scores = b.op("Mul", b.op("MatMul", operand(False), operand(True)), b.number(0.4, np.float16))
    weights = b.op("Softmax", b.op("Cast", scores, to=FLOAT), axis=-1)
    value = b.op("Cast", b.heads(x=x, kind=np.float16), to=FLOAT)
    return model_of(b, b.merge(b.op("MatMul", weights, value)), 18, FLOAT)


@pytest.mark.parametrize("round_trip", [False, True])
def test_narrow_queries_and_keys_with_a_wide_output(round_trip: bool, tmp_path: Path) -> None:
    _, site = only_half(wide(round_trip=round_trip), tmp_path, tolerance=1e-2)
    assert (site.dtype, site.softmax_dtype, site.heads, site.query_length) == ("float32", "float32", H, N)


def test_digits_that_were_lost_stay_lost(tmp_path: Path) -> None:
    """The operand is what the cast to float16 gave, not what it was before."""
    found, site = only_half(wide(narrowed=True), tmp_path, tolerance=4e-2)
    producer = {o: n for n in found.proto.graph.node for o in n.output}
    for operand in (site.query, site.key):
        after = producer[operand.value]
        while after.op_type in ("Transpose", "Reshape"):
            after = producer[after.input[0]]
        assert (after.op_type, after.attribute[0].i) == ("Cast", FLOAT)
        assert producer[after.input[0]].attribute[0].i == HALF


def test_the_pairs_of_nodes_are_in_the_notes(tmp_path: Path) -> None:
    found, _ = only(ordered("nbhd", "nbhd", "nbhd", "nbhd"), tmp_path)
    assert any(note.startswith("4 attention operands") for note in found.notes)
    onnx.checker.check_model(found.proto)
    assert sum(n.op_type == "Transpose" for n in found.proto.graph.node) >= 8


def test_a_wide_query_and_a_narrow_output_are_not_made_one_type(tmp_path: Path) -> None:
    """The product is float32 and only the weights are narrow: widening the output would change what it is."""
    b = Graph()
    scores = b.op("Mul", b.op("MatMul", b.heads(), b.heads(transposed=True)), b.number(0.4))
    weights = b.op("Cast", b.op("Softmax", scores, axis=-1), to=HALF)
    value = b.heads(x=b.op("Cast", "x", to=HALF), kind=np.float16)
    out = b.op("Cast", b.op("Tanh", b.merge(b.op("MatMul", weights, value))), to=FLOAT)
    _, detection = found_in(model_of(b, out, 18, FLOAT), tmp_path)
    assert not detection.sites
    assert [m.code for m in detection.near_misses] == ["layout"]
