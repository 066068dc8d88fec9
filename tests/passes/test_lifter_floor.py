"""Scores that are raised to the lowest number of their type after the mask (XGLM, OPT): run, and equal to the facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.passes.rebuild import found_in, rebuilt
from tests.passes.test_lifter_forms import F32, B, Graph, H, N, W

LOWEST = float(np.finfo(F32).min)


def floored(
    *, number: float = LOWEST, op: str = "Max", first: bool = False, hides: float = -np.inf, after: str = "",
    guard: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    """x [B, N, W], seen: bool [B, 1, 1, N] -> y; keys that are not seen get ``hides``, then the scores are bounded."""
    b = Graph()
    scores = b.scores()
    mask = b.op("Where", "seen", b.number(0.0), b.number(hides))
    if after != "mask":
        scores = b.op("Add", scores, mask)
    sides = [scores, b.number(number)]
    scores = b.op(op, *(sides[::-1] if first else sides))
    if after == "mask":
        scores = b.op("Add", scores, mask)
    if after == "scale":
        scores = b.op("Mul", scores, b.number(2.0))
    if after == "half":
        scores = b.op("Cast", b.op("Cast", scores, to=10), to=1)
    weights = b.op("Softmax", scores, axis=-1)
    if guard:
        weights = b.op("Where", b.op("IsNaN", weights), b.number(0.0), weights)
    out = b.op("Identity", b.merge(b.op("MatMul", weights, b.heads())))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, N, W]),
              helper.make_tensor_value_info("seen", TensorProto.BOOL, [B, 1, 1, N])]  # fmt: skip
    outputs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, [B, N, W])]
    graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def feeds(hidden: bool) -> dict[str, np.ndarray]:
    """``hidden``: the second batch entry sees no key at all."""
    rng = np.random.default_rng(3)
    seen = rng.random((B, 1, 1, N)) < 0.6
    seen[0, ..., 2], seen[1] = True, seen[1] & (not hidden)
    seen[1, ..., 0] |= not hidden
    return {"x": rng.standard_normal((B, N, W)).astype(F32), "seen": seen}


@pytest.mark.parametrize("hides", [-np.inf, LOWEST])
@pytest.mark.parametrize(("op", "first"), [("Max", False), ("Max", True), ("Clip", False)])
def test_a_row_without_keys_is_the_average(op: str, first: bool, hides: float, tmp_path: Path) -> None:
    proto = floored(op=op, first=first, hides=hides)
    found, detection = found_in(proto, tmp_path)
    (site,) = detection.sites
    assert (site.heads, site.mask.masked_rows, site.mask.fills) == (H, "uniform", (LOWEST,))
    assert [p.kind for p in site.mask.parts] == ["padding"]
    for hidden in (False, True):
        given = feeds(hidden)
        rebuilt(found.proto, site, given).check()


def test_a_guard_after_it_has_nothing_to_do(tmp_path: Path) -> None:
    found, detection = found_in(floored(guard=True), tmp_path)
    (site,) = detection.sites
    assert (site.mask.masked_rows, site.mask.guarded) == ("uniform", True)
    rebuilt(found.proto, site, feeds(True)).check()


def test_minus_infinity_bounds_nothing(tmp_path: Path) -> None:
    _, detection = found_in(floored(number=-np.inf), tmp_path)
    (site,) = detection.sites
    assert (site.mask.masked_rows, site.mask.fills) == ("nan", (-np.inf,))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"number": -9000.0}, "unknown-op"),
        ({"number": -3e38}, "unknown-op"),
        ({"number": 0.0}, "unknown-op"),
        ({"op": "Min"}, "unknown-op"),
        ({"after": "mask"}, "floor"),
        ({"after": "scale"}, "floor"),
        ({"after": "half"}, "floor"),
    ],
)
def test_what_may_change_more_is_refused(changes: dict[str, object], code: str, tmp_path: Path) -> None:
    _, detection = found_in(floored(**changes), tmp_path)  # type: ignore[arg-type]
    assert not detection.sites
    assert [m.code for m in detection.near_misses] == [code]
