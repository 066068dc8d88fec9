"""A site alone carries no values that are larger than what computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from attncompile.core.mechanism import Lowering
from attncompile.passes import extract
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import save
from tests.passes.test_probed_reasons import BATCH, DIM, FIRST, HEADS, TOKENS, joined


def _through_indices() -> onnx.ModelProto:
    """The output gathered by indices of every element, which the graph writes out from a range."""
    proto = joined(start=FIRST)
    nodes = proto.graph.node
    (last,) = [n for n in nodes if n.op_type == "Transpose" and nodes[-1].input[0] in _readers(proto, n.output[0])]
    shape = np.array([BATCH, HEADS, TOKENS, DIM])
    constants = {"from": np.array(0), "to": np.array(TOKENS), "by": np.array(1), "column": np.array([TOKENS, 1]),
                 "shape": shape}  # fmt: skip
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    made = [
        helper.make_node("Range", ["from", "to", "by"], ["tokens"]),
        helper.make_node("Reshape", ["tokens", "column"], ["rows"]),
        helper.make_node("Expand", ["rows", "shape"], ["indices"]),
        helper.make_node("GatherElements", [last.input[0], "indices"], ["gathered"], axis=2),
    ]
    at = list(nodes).index(last)
    last.input[0] = "gathered"
    for node in reversed(made):
        nodes.insert(at, node)
    return proto


def _readers(proto: onnx.ModelProto, value: str) -> set[str]:
    return {o for n in proto.graph.node if value in n.input for o in n.output}


@pytest.mark.parametrize("limit", [64, 1 << 22])
def test_large_indices_are_computed_not_carried(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "_MAX_FIXED", limit)
    proto = _through_indices()
    model = load(save(proto, tmp_path))
    profile = profile_for(model, {})
    index = GraphIndex(model)
    (site,) = detect(model, profile, index=index).sites
    alone = extract.extract_site(World(index, {}), site, Lowering(()))
    assert ("indices" in alone.fixed) == (limit > 64)
    assert ("Expand" in {n.op_type for n in alone.original.graph.node}) == (limit == 64)

    proto.graph.output.extend(onnx.ValueInfoProto(name=v) for v in (*alone.roles.values(), site.output.value))
    names = [*alone.roles.values(), site.output.value]
    x = np.random.default_rng(1).standard_normal((BATCH, TOKENS, HEADS * DIM)).astype(np.float32)
    *operands, want = ort.InferenceSession(proto.SerializeToString()).run(names, {"x": x})
    feed = {**dict(zip(alone.roles.values(), operands, strict=True)), **alone.fixed}
    (got,) = ort.InferenceSession(alone.original.SerializeToString()).run(None, feed)
    np.testing.assert_array_equal(got, want)
