"""The row guard of the standard operators' bodies is understood, and nothing that only looks like it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from tests.passes.operator_graphs import check_facts, find, model, only_site

B, H, N, D = 2, 3, 5, 4
RNG = np.random.default_rng(5)
OTHER = {"mask": "m2", "fill": "one", "low": "lowest", "axes": "first", "keep": 0}


def guarded(change: str = "") -> ModelProto:
    """softmax(q k^T + m) v with Where(ReduceMax(m) == -inf, 0, p); ``change`` names the part that is another."""
    pick = {"mask": "m", "fill": "zero", "low": "low", "axes": "last", "keep": 1}
    if change in OTHER:
        pick[change] = OTHER[change]
    op = helper.make_node
    nodes: list[NodeProto] = [op("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), op("MatMul", ["q", "kt"], ["s"])]
    nodes.append(op("Add", ["s", "m"], ["s1"]))
    nodes.append(op("Softmax", ["s1"], ["p"], axis=-1))
    nodes.append(op("ReduceMax", [str(pick["mask"]), str(pick["axes"])], ["top"], keepdims=int(str(pick["keep"]))))
    nodes.append(op("Equal", ["top", str(pick["low"])], ["dead"]))
    typed = "fill"
    nodes.append(op("CastLike", [str(pick["fill"]), "p"], [typed]))
    branches = [typed, "p"] if change != "swapped" else ["p", typed]
    nodes.append(op("Where", ["dead", *branches], ["safe"]))
    nodes.append(op("MatMul", ["safe", "v"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", 1, [B, H, N, D])]
    if change == "reader":
        nodes.append(op("Neg", ["p"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", 1, [B, H, N, N]))
    numbers: dict[str, Any] = {
        "zero": np.float32(0), "one": np.float32(1), "low": np.float32(-np.inf), "lowest": np.float32(-1e4),
        "last": np.array([-1]), "first": np.array([-2]),
    }  # fmt: skip
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in numbers.items()]
    infos = [helper.make_tensor_value_info(x, 1, [B, H, N, D]) for x in "qkv"]
    infos += [helper.make_tensor_value_info(x, 1, [B, H, N, N]) for x in ("m", "m2")]
    return model(helper.make_graph(nodes, "g", infos, outputs, stored), 18)


def test_rows_that_see_nothing_are_zero() -> None:
    masks = np.where(RNG.random((B, H, N, N)) < 0.5, 0, -np.inf).astype(np.float32)
    masks[0, :, 2] = -np.inf
    feeds = {x: RNG.standard_normal((B, H, N, D)).astype(np.float32) for x in "qkv"} | {"m": masks, "m2": masks}
    found, site = only_site(guarded())
    assert site.mask.guarded
    assert not any("m2" in n for n in site.interior)
    check_facts(found, site, feeds)


@pytest.mark.parametrize("change", [*OTHER, "swapped", "reader"])
def test_one_thing_changed_is_refused(change: str) -> None:
    """Another mask, another number in its place or to compare with, another axis, the branches swapped, a reader."""
    _, detection = find(guarded(change))
    assert not detection.sites
    assert detection.near_misses
