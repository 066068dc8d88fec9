"""Exports of ViTs, whose weights are made up: nothing is copied between the product that gives q, k and v and our op,
nor between our op and the product behind it, and outputs stay what they were.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile import fusion_check, pipeline
from attncompile.core.mechanism import Candidate
from attncompile.core.plan import Decision
from attncompile.gate import Edit
from attncompile.passes.replace import apply
from attncompile.pipeline import Options
from attncompile.plugins import mechanism
from attncompile.targets.onnxruntime_cuda import _inlined_but, set_aside
from attncompile.targets.ort_fusions import fuse
from attncompile.targets.ort_fusions.view import OURS

GRAPHS = Path(__file__).parents[2] / "models/zoo/graphs"
FREE = ("Reshape", "Squeeze", "Unsqueeze", "Identity")
PARTS = ("BN0HD", "BN1HD", "BN2HD")
EXPORTS = {
    "timm-vit_tiny_patch16_224-dynamo-18-sdpa": [PARTS] * 2,
    "timm-vit_tiny_patch16_224-torchscript-17-sdpa": [PARTS] * 2,
    "timm-vit_base_patch14_reg4_dinov2-dynamo-18-sdpa": [PARTS] * 2,
    "timm-beitv2_base_patch16_224-torchscript-17-sdpa": [PARTS] * 2,
    "timm-pvt_v2_b0-torchscript-17-sdpa": [],
    "dinov2-torchscript-17-sdpa": [("BNHD",) * 3] * 2,  # separate products
    "siglip-dynamo-18-sdpa": [("BNHD",) * 3] * 2 + [("BHND", "NB0HD", "NB1HD")],  # torch's own module pools
}  # fmt: skip
"""Layouts of query, key and value at each site; empty: not compared."""
BIASES = {"dinov2-torchscript-17-sdpa": 2, "siglip-dynamo-18-sdpa": 2}
"""Sites whose keys and values have a product, and a bias, of their own."""


def filled(name: str, folder: Path) -> Path:
    """The committed graph with seeded weights in place of those that were left out, and of biases that are zero."""
    proto, rng = (
        ModelProto.FromString(gzip.decompress((GRAPHS / f"{name}.onnx.gz").read_bytes())),
        np.random.default_rng(0),
    )
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            drawn = rng.standard_normal(list(tensor.dims), dtype=np.float32) * np.float32(0.05)
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(drawn.astype(kind), tensor.name))
        elif (
            len(tensor.dims) == 1 and tensor.data_type == TensorProto.FLOAT and not numpy_helper.to_array(tensor).any()
        ):
            drawn = rng.standard_normal(list(tensor.dims), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def source(proto: ModelProto, value: str) -> str:
    """The op that makes ``value``, those that copy nothing passed by."""
    makers = {o: n for n in proto.graph.node for o in n.output}
    while value in makers and makers[value].op_type in FREE:
        value = makers[value].input[0]
    return makers[value].op_type if value in makers else ""


def behind(proto: ModelProto, node: NodeProto) -> set[str]:
    """The ops that read the output of ``node``, those that copy nothing passed by."""
    found, pending = set(), [node.output[0]]
    while pending:
        value = pending.pop()
        for reader in (n for n in proto.graph.node if value in n.input):
            if reader.op_type in FREE:
                pending.append(reader.output[0])
            else:
                found.add(reader.op_type)
    return found


@pytest.mark.parametrize("name", EXPORTS)
def test_nothing_is_copied_around_a_site(name: str, tmp_path: Path) -> None:
    found = pipeline.inspect(filled(name, tmp_path), Options())
    dense = mechanism("DenseAttention")
    edits = []
    for site in found.detection.sites:
        chosen = [c for c in dense.exact_candidates(site) if isinstance(c, Candidate)]
        decision = Decision(site.id, dense.name, "asked for", True, chosen[0].parameters)
        edits.append(Edit.of(site, decision, dense, found.index.model.opset))
    proto = apply(found.index.model, [(e.site, e.lowering) for e in edits])
    lowered = _inlined_but(set_aside(proto), proto, set())
    fused = fuse(lowered, tmp_path)
    ours = [n for n in fused.proto.graph.node if n.domain == OURS]
    assert len(ours) == len(found.detection.sites) > 1
    layouts = []
    for node in ours:
        said = {a.name[0]: a.s.decode() for a in node.attribute if a.name.endswith("_layout")}
        layouts.append((said["q"], said["k"], said["v"]))
        assert {source(fused.proto, v) for v in node.input[:3]} <= {"Add", "MatMul", "Gemm"}
        assert behind(fused.proto, node) <= {"MatMul", "Gemm"}
    moved = [fused.counts.get(f"biases of {x}", 0) for x in ("keys", "values")]
    assert moved == [BIASES.get(name, 0)] * 2
    if EXPORTS[name]:
        assert sorted(layouts) == sorted(EXPORTS[name])
    feeds = [_feed(found.index.model.proto)]
    verdict = fusion_check.check(proto, found.index.model, None, feeds, fused.counts, lowered, fused.proto)
    assert verdict.ok, verdict.reason
    if BIASES.get(name):  # what nothing compares is not dropped
        assert fusion_check.check(proto, found.index.model, None, feeds, fused.counts, lowered).code == "unseen"


def _feed(proto: ModelProto) -> dict[str, Any]:
    stored, rng = {t.name for t in proto.graph.initializer}, np.random.default_rng(1)
    return {
        i.name: rng.standard_normal([d.dim_value or 2 for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in proto.graph.input
        if i.name not in stored
    }
