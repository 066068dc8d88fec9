"""Replacing keeps everything that it does not replace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from attncompile.core.mechanism import Lowering
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.normalise import NEWEST, normalise
from attncompile.passes.replace import apply
from attncompile.passes.symbols import profile_for
from tests.exports import exported
from tests.passes.attention_graphs import Spec, build, save


def standard_attention(site: AttentionSite) -> Lowering:
    """An independent lowering for tests: the products and the softmax written out from the site's facts, dense."""
    nodes, stored = [], []

    def op(kind: str, inputs: list[str], out: str | None = None, **attributes: object) -> str:
        name = out or f"{site.id}/{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def const(value: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(value, f"{site.id}/c{len(stored)}"))
        return str(stored[-1].name)

    def bhnd(value: str, layout: str) -> str:
        return value if layout == "BHND" else op("Transpose", [value], perm=[0, 2, 1, 3])

    q, k, v = (bhnd(o.value, o.layout) for o in (site.query, site.key, site.value))
    if site.kv_heads != site.heads:
        index = const(np.arange(site.heads) // (site.heads // site.kv_heads))
        k, v = op("Gather", [k, index], axis=1), op("Gather", [v, index], axis=1)
    k = op("Transpose", [k], perm=[0, 1, 3, 2])
    s = op("Mul", [op("MatMul", [q, k]), const(np.array(site.scale, np.float32))])
    window = site.mask.part("window", "causal")
    if window is not None:
        n = int(site.query_length)
        distance = np.arange(n)[None] - np.arange(n)[:, None]
        seen = (distance >= (-window.left if window.left >= 0 else -n)) & (distance <= window.right)
        s = op("Where", [const(seen), s, const(np.array(-np.inf, np.float32))])
    for part in site.mask.parts:
        if part.source:
            if part.additive:
                s = op("Add", [s, part.source])
            else:
                s = op("Where", [part.source, s, const(np.array(-np.inf, np.float32))])
    out = op("MatMul", [op("Softmax", [s], axis=-1), v])
    if site.output.layout == "BNHD":
        op("Transpose", [out], site.output.value, perm=[0, 2, 1, 3])
    else:
        op("Identity", [out], site.output.value)
    return Lowering(tuple(nodes), (), tuple(stored))


def feed_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kinds = {1: np.float32, 7: np.int64, 6: np.int32, 9: bool}
    feed = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        kind = kinds[value.type.tensor_type.elem_type]
        feed[value.name] = rng.standard_normal(shape).astype(kind) if kind is np.float32 else np.ones(shape, kind)
    return feed


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed))


@pytest.mark.parametrize("name", ["vit", "mistral", "gpt2", "bert", "flux", "dit", "swin"])
@pytest.mark.parametrize("exporter, opset", [("dynamo", 18), ("torchscript", 17)])
def test_every_site_replaced_gives_the_same_outputs(name: str, exporter: str, opset: int) -> None:
    """Facts of all sites written out again by an independent lowering: the whole model must not change."""
    model = normalise(load(exported(name, exporter, opset)))
    sites = [s for s in detect(model, profile_for(model, {})).sites if all(p.kind != "opaque" for p in s.mask.parts)]
    aligned = [s for s in sites if "not [batch" not in "".join(p.certificate.detail for p in s.mask.parts)]
    assert aligned
    result = apply(model, [(s, standard_attention(s)) for s in aligned])
    onnx.checker.check_model(result)
    feed = feed_of(model.proto)
    for before, after in zip(run(model.proto, feed), run(result, feed), strict=True):
        assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)
    softmaxes = {n.output[0] for n in model.proto.graph.node if n.op_type == "Softmax"}
    left = softmaxes & {o for n in result.graph.node for o in n.output}
    assert len(softmaxes) - len(left) == len(aligned)


def test_untouched_parts_are_byte_equal(tmp_path: Path) -> None:
    proto = build(Spec(mask="window", mask_form="where"))
    proto.metadata_props.add(key="k", value="v")
    proto.doc_string, proto.model_version, proto.domain = "doc", 7, "d.e"
    proto.graph.node[0].metadata_props.add(key="scope", value="layer")
    proto.graph.value_info.append(helper.make_tensor_value_info(proto.graph.node[0].output[0], 1, [2, 13, 24]))
    model = load(save(proto, tmp_path))
    (site,) = detect(model, profile_for(model, {})).sites
    before = model.proto.SerializeToString()
    result = apply(model, [(site, standard_attention(site))])
    assert model.proto.SerializeToString() == before, "the input proto was changed"
    kept = {n.output[0]: n.SerializeToString() for n in result.graph.node}
    same = [n for n in proto.graph.node if kept.get(n.output[0]) == n.SerializeToString()]
    assert len(same) >= 6  # the projections, their reshapes and the transposes that the site does not own
    stored = {t.name: t.SerializeToString() for t in proto.graph.initializer}
    for tensor in result.graph.initializer:
        if tensor.name in stored:
            assert tensor.SerializeToString() == stored[tensor.name]
    for name in ("doc_string", "model_version", "domain", "metadata_props"):
        assert getattr(result, name) == getattr(proto, name)
    assert result.graph.input == proto.graph.input and result.graph.output == proto.graph.output
    assert result.graph.value_info == proto.graph.value_info


def test_a_mask_that_only_the_site_used_is_removed(tmp_path: Path) -> None:
    model = load(save(build(Spec(mask="window", mask_form="constant", length=40)), tmp_path))
    (site,) = detect(model, profile_for(model, {})).sites
    result = apply(model, [(site, standard_attention(site))])
    assert sum(t.dims[:] == [1, 1, 40, 40] for t in model.proto.graph.initializer if t.data_type == 1) == 1
    assert not [t for t in result.graph.initializer if list(t.dims) == [1, 1, 40, 40] and t.data_type == 1]


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, NEWEST])
def test_every_opset(tmp_path: Path, opset: int) -> None:
    """A model of every opset from 11 on is detected and, normalised, keeps its outputs."""
    # These operators mean the same from opset 11 on (Softmax over the last axis, no axes inputs).
    proto = build(Spec(mask="window", mask_form="where", length=11))
    proto.opset_import[0].version = opset
    onnx.checker.check_model(proto)
    model = load(save(proto, tmp_path))
    assert model.opset == opset
    assert len(detect(model, profile_for(model, {})).sites) == 1
    normal = normalise(model)
    assert normal.opset == max(opset, 18) and bool(normal.notes) == (opset < 18)
    (site,) = detect(normal, profile_for(normal, {})).sites
    assert site.mask.kind == "window" and site.scale == pytest.approx(0.5)
    if opset <= 26:  # ONNX Runtime 1.32 guarantees no newer operator set
        result = apply(normal, [(site, standard_attention(site))])
        feed = feed_of(proto)
        np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)
