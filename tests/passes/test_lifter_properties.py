"""The lifter on random graphs: facts equal to what was generated, and the site read in NumPy equal to the run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from attncompile.core.mechanism import Lowering
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite, Detection
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.extract import extract_site
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import Builder, Spec, build, read_site, save, visible


def detect_in(spec: Spec) -> tuple[Detection, GraphIndex]:
    with tempfile.TemporaryDirectory() as folder:
        model = load(save(build(spec), Path(folder)))
        given = {"n": Range(1, spec.length, 29), "b": Range(1, 2, 3)} if spec.dynamic else {}
        index = GraphIndex(model)
        return detect(model, profile_for(model, given), index=index), index


def run_site(site: AttentionSite, world: World, seed: int, pad: bool) -> tuple[np.ndarray, np.ndarray]:
    """(what ONNX Runtime gives for the extracted subgraph, what the facts say)."""
    alone = extract_site(world, site, Lowering(()))
    rng = np.random.default_rng(seed)
    feed = dict(alone.fixed)
    for name, (shape, kind) in alone.inputs.items():
        if name in feed:
            continue
        if kind == 9:
            mask = rng.random(shape) < 0.7 if pad else np.ones(shape, bool)
            feed[name] = mask
        else:
            feed[name] = rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind))
    session = ort.InferenceSession(alone.original.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0], read_site(site, feed, world)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    heads = draw(st.sampled_from([2, 3, 4, 6]))
    mask = draw(st.sampled_from(["none", "causal", "window"]))
    dynamic = draw(st.booleans())
    return Spec(
        batch=2 if dynamic else draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 3, heads) if heads % k == 0])),
        length=draw(st.integers(9, 21)),
        head_dim=draw(st.sampled_from([3, 5, 8])),
        scale=draw(st.sampled_from([0.25, 0.5, 0.35355339])),
        scale_at=draw(st.sampled_from(["query", "key", "both", "scores", "none"])),
        mask=mask,
        left=draw(st.integers(1, 5)),
        right=draw(st.integers(0, 4)),
        mask_form=draw(st.sampled_from(["constant", "where", "computed"])),
        padding=draw(st.booleans()) and not dynamic,
        guard=draw(st.booleans()),
        key_first=draw(st.booleans()),
        einsum=draw(st.booleans()),
        fused_batch=draw(st.booleans()) and not dynamic,
        merge_output=draw(st.booleans()),
        dynamic=dynamic,
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_facts_and_meaning(spec: Spec) -> None:
    detection, index = detect_in(spec)
    assert [m.reason for m in detection.near_misses] == []
    (site,) = detection.sites
    assert (site.heads, site.kv_heads, site.head_dim) == (spec.heads, spec.kv_heads, spec.head_dim)
    assert site.query_length == site.key_length == ("n" if spec.dynamic else spec.length)
    assert site.scale == pytest.approx(1.0 if spec.scale_at == "none" else spec.scale, rel=1e-5)
    kinds = {p.kind for p in site.mask.parts}
    assert ("padding" in kinds) == spec.padding
    structure = site.mask.part("causal", "window")
    if spec.mask == "none":
        assert structure is None
    elif spec.mask == "causal":
        assert structure is not None and structure.kind == "causal"
    else:
        assert structure is not None and (structure.left, structure.right) == (spec.left, spec.right)
    for length in (spec.length, 1, 7, 29) if spec.dynamic else (spec.length,):
        ours, truth = run_site(site, World(index, {"n": length, "b": 2}), spec.seed, spec.padding)
        np.testing.assert_allclose(ours, truth, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["constant", "where"])
@pytest.mark.parametrize("row, column", [(0, 0), (12, 3), (5, 9), (7, 7)])
def test_one_flipped_element_is_no_window(form: str, row: int, column: int) -> None:
    """A mask that is a window but for one element must not be called a window."""
    model = build(Spec(mask="window", mask_form=form, left=3, right=0))
    flipped = 0
    for tensor in model.graph.initializer:
        mask = numpy_helper.to_array(tensor).copy()
        if mask.shape == (1, 1, 13, 13):
            seen, unseen = mask[0, 0, 1, 1], mask[0, 0, 1, 2]
            mask[0, 0, row, column] = unseen if mask[0, 0, row, column] == seen else seen
            tensor.CopyFrom(numpy_helper.from_array(mask, tensor.name))
            flipped += 1
    assert flipped
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        onnx.save(model, path)
        loaded = load(path)
        (site,) = detect(loaded, profile_for(loaded, {})).sites
    assert site.mask.kind == "block_sparse"


def test_a_table_cut_to_a_dynamic_length_is_never_general() -> None:
    """A stored triangle of 40 tokens, sliced: a window at every length seen, and nobody knows what comes after."""
    b = Builder()
    size = b.op("Shape", "x", start=1, end=2)
    table = b.const(visible(Spec(mask="window", left=3, right=0), 40, 40)[None, None])
    ends = b.op("Concat", size, size, axis=0)
    seen = b.op("Slice", table, b.const([0, 0]), ends, b.const([2, 3]))
    heads = b.op("Transpose", b.op("Reshape", "x", b.const([0, -1, 2, 4])), perm=[0, 2, 1, 3])
    other = b.op("Transpose", b.op("Reshape", "x", b.const([0, -1, 2, 4])), perm=[0, 2, 3, 1])
    scores = b.op("Where", seen, b.op("MatMul", heads, other), b.const(np.array(-np.inf, np.float32)))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), heads)
    graph = onnx.helper.make_graph(
        b.nodes, "g", [onnx.helper.make_tensor_value_info("x", 1, ["b", "n", 8])],
        [onnx.helper.make_tensor_value_info(out, 1, None)], b.stored,
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(save(model, Path(folder)))
        (site,) = detect(loaded, profile_for(loaded, {"n": Range(1, 20, 40)})).sites
    part = site.mask.part("window")
    assert part is not None and (part.left, part.right) == (3, 0) and not part.certificate.general
