"""No wrong rewrite: mutants of attention graphs are refused, or what the facts say gives their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskPart
from attncompile.core.mechanism import Candidate, Lowering, exact_candidates
from attncompile.core.model import Model
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite
from attncompile.cost import shape_of
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.replace import apply
from attncompile.passes.symbols import profile_for, symbols
from attncompile.plugins import mechanisms
from tests.exports import exported
from tests.passes.attention_graphs import Builder, Spec, build, save
from tests.passes.mutations import MUTATIONS, Graph, softmaxes

SPECS = (
    Spec(),
    Spec(mask="causal", scale_at="scores", mask_form="where", guard=True, key_first=True),
    Spec(mask="window", scale_at="both", padding=True, mask_form="where"),
    Spec(mask="window", right=0, mask_form="computed", kv_heads=2),
    Spec(kv_heads=1, padding=True, guard=True, merge_output=False),
    Spec(einsum=True, mask="window", scale_at="key"),
    Spec(einsum=True, kv_heads=2, mask="causal", padding=True, mask_form="computed", guard=True),
    Spec(fused_batch=True, mask="causal", scale_at="scores"),
    Spec(fused_batch=True, kv_heads=2, mask="window", mask_form="where"),
    Spec(length=6, head_dim=6, mask="window", left=2, right=1, mask_form="constant"),
    Spec(length=4, heads=4, head_dim=4, batch=4, scale_at="scores", padding=True, mask="causal"),
    Spec(batch=1, heads=2, kv_heads=2, length=9, mask="window", left=2, right=0, guard=True, mask_form="where"),
    Spec(batch=1, heads=1, kv_heads=1, length=5, scale_at="none", mask="causal", padding=True),
    Spec(length=1, mask="causal", padding=True, guard=True, mask_form="where"),
)  # fmt: skip
DYNAMIC = (
    Spec(dynamic=True, mask="window", right=0),
    Spec(dynamic=True, mask="window", kv_heads=2, mask_form="where", guard=True),
    Spec(dynamic=True, mask="causal", scale_at="scores", mask_form="where"),
    Spec(dynamic=True, mask="window", einsum=True, kv_heads=1),
    Spec(dynamic=True, mask="window", heads=2, kv_heads=2, head_dim=13, scale_at="scores"),
)
RANGES = {"n": Range(1, 13, 29), "b": Range(1, 2, 3)}
SIZES = ({"n": 1, "b": 2}, {"n": 2, "b": 3}, {"n": 6, "b": 2}, {"n": 17, "b": 3}, {"n": 13, "b": 2})
EXPORTS = (
    ("vit", "torchscript", 17), ("gpt2", "torchscript", 17), ("bert", "torchscript", 17), ("mistral", "dynamo", 18),
    ("llama", "torchscript", 17),
)  # fmt: skip


def lowered(site: AttentionSite) -> Lowering:
    """The site written out from its facts, dense and naive, sharing nothing with the mechanisms.

    Raises:
        Unsupported: the facts do not say what the site computes (an opaque mask): no mechanism may touch it either.
    """
    if site.kind != "softmax" or site.needs & {"cache", "quantised", "body", "key-ends"}:
        raise Unsupported("other", "not softmax attention of operands alone")
    for part in site.mask.parts:
        if part.kind == "opaque" or (part.kind == "bias" and part.certificate.method == "structure"):
            raise Unsupported("opaque", "not expressible")
    structure = [p for p in site.mask.parts if p.kind not in ("padding", "bias")]
    if site.mask.masked_rows == "uniform" and len(set(site.mask.fills)) > 1 and structure:
        # With two different fills a row without keys is no average over all of them: nothing is said of such rows.
        seen = [visible_of(p, int(site.query_length), int(site.key_length)) for p in structure]
        if not np.logical_and.reduce(seen).any(axis=-1).all():
            raise Unsupported("rows", "rows that see no key are not said")
    nodes, stored = [], []

    def op(kind: str, inputs: list[str], out: str | None = None, **attributes: object) -> str:
        name = out or f"ours/{site.id}/{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def const(value: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(value, f"ours/{site.id}/c{len(stored)}"))
        return str(stored[-1].name)

    def shaped(value: str, *shape: int) -> str:
        return op("Reshape", [value, const(np.array(shape, np.int64))])

    def bhnd(value: str, layout: str) -> str:
        return value if layout == "BHND" else op("Transpose", [value], perm=[0, 2, 1, 3])

    q, k, v = (bhnd(o.value, o.layout) for o in (site.query, site.key, site.value))
    # A claim about sizes is part of the facts: a value of another shape must not slip through by broadcasting.
    queries, keys = int(site.query_length), int(site.key_length)
    q = shaped(q, int(site.batch), site.heads, queries, site.head_dim)
    k = shaped(k, int(site.batch), site.kv_heads, keys, site.head_dim)
    v = shaped(v, int(site.batch), site.kv_heads, keys, site.value_dim)
    if site.kv_heads != site.heads:
        index = const(np.arange(site.heads) // (site.heads // site.kv_heads))
        k, v = op("Gather", [k, index], axis=1), op("Gather", [v, index], axis=1)
    k = op("Transpose", [k], perm=[0, 1, 3, 2])
    s = op("Mul", [op("MatMul", [q, k]), const(np.array(site.scale, np.float32))])
    if site.head_scale:
        s = op("Mul", [s, shaped(site.head_scale, 1, site.heads, 1, 1)])
    if site.softcap:
        cap = const(np.array(site.softcap, np.float32))
        s = op("Mul", [op("Tanh", [op("Div", [s, cap])]), cap])
    low = const(np.array(-1e30 if site.mask.masked_rows == "uniform" else -np.inf, np.float32))
    for part in site.mask.parts:
        if part.kind in ("padding", "bias"):
            source = str(part.source)
            s = op("Add", [s, source]) if part.additive else op("Where", [source, s, low])
        else:
            s = op("Where", [const(visible_of(part, queries, keys)), s, low])
    if site.sinks:
        column = shaped(site.sinks, 1, -1, 1, 1)
        column = op("Expand", [column, const(np.array([int(site.batch), site.heads, queries, 1]))])
        p = op("Softmax", [op("Concat", [s, column], axis=-1)], axis=-1)
        p = op("Slice", [p, *(const(np.array([n])) for n in (0, keys, 3))])
    else:
        p = op("Softmax", [s], axis=-1)
    if site.mask.masked_rows == "zero" or site.mask.guarded:
        p = op("Where", [op("IsNaN", [p]), const(np.array(0, np.float32)), p])
    out = op("MatMul", [p, v])
    if site.output.layout == "BNHD":
        op("Transpose", [out], site.output.value, perm=[0, 2, 1, 3])
    else:
        op("Identity", [out], site.output.value)
    return Lowering(tuple(nodes), (), tuple(stored))


def visible_of(part: MaskPart, queries: int, keys: int) -> np.ndarray:
    """[queries, keys] of a structural part."""
    if part.pattern is not None:
        return part.pattern.visible(queries, keys)
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    seen = np.ones(distance.shape, bool)
    if part.left >= 0:
        seen &= distance >= -part.left
    if part.right >= 0:
        seen &= distance <= part.right
    return seen


def feeds(proto: onnx.ModelProto, gentle: bool) -> Iterator[dict[str, np.ndarray]]:
    """Random inputs; ``gentle`` leaves something to see in every row, for a first key is never padded."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        feed: dict[str, np.ndarray] = {}
        for value in proto.graph.input:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            kind = value.type.tensor_type.elem_type
            if kind == 9:
                seen = np.ones(shape, bool)
                if gentle and shape[-1] > 3:
                    seen[..., 2 + seed] = False
                elif not gentle:
                    seen = rng.random(shape) < 0.6
                feed[value.name] = seen
            elif kind == 7:
                feed[value.name] = rng.integers(0, 2, shape) if "mask" in value.name else rng.integers(0, 4, shape)
                if "mask" in value.name:
                    feed[value.name][..., :3] = 1
            else:
                feed[value.name] = rng.standard_normal(shape).astype(np.float32)
        yield feed


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def distance(before: np.ndarray, after: np.ndarray) -> float:
    """Relative L2; infinite where shapes, NaN or infinities differ."""
    if before.shape != after.shape or not np.array_equal(np.isnan(before), np.isnan(after)):
        return float("inf")
    finite = np.isfinite(before)
    if not np.array_equal(before[~finite], after[~finite], equal_nan=True):
        return float("inf")
    before, after = before[finite].astype(np.float64), after[finite].astype(np.float64)
    return float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-9))


def worst(before: onnx.ModelProto, after: onnx.ModelProto, gentle: bool) -> float:
    """The largest distance of any output on any feed."""
    original, ours = session(before), session(after)
    return max(
        distance(a, b) for feed in feeds(before, gentle)
        for a, b in zip(original.run(None, feed), ours.run(None, feed), strict=True)
    )  # fmt: skip


def runs(proto: onnx.ModelProto) -> bool:
    try:
        session(proto).run(None, next(feeds(proto, True)))
    except Exception:
        return False
    return True


def judge(proto: onnx.ModelProto, folder: Path) -> str:
    """``invalid``, ``refused``, ``opaque`` or ``rewritten``; ``+window`` where a mechanism took one; fails on a bug."""
    if not runs(proto):
        return "invalid"
    model = normalise(load(save(proto, folder)))
    sites = detect(model, profile_for(model, {})).sites
    edits = expressible(sites)
    verdict = "rewritten" if edits else "opaque" if sites else "refused"
    if edits:
        error = worst(proto, apply(model, edits), gentle(sites))
        assert error <= 1e-4, f"the facts are wrong: relative L2 {error:.3g}; {sites}"
    taken = exact(model, sites)
    if taken:
        error = worst(proto, apply(model, taken), gentle(sites))
        assert error <= 1e-4, f"a mechanism is wrong: relative L2 {error:.3g}; {sites}"
        verdict += "+window"
    return verdict


def judge_dynamic(proto: onnx.ModelProto, folder: Path) -> str:
    """As ``judge``, at several sizes: what the facts say of a symbolic length must hold at all of them."""
    if not runs(bound(proto, SIZES[-1])):
        return "invalid"
    model = normalise(load(save(proto, folder)))
    sites = detect(model, profile_for(model, {s: RANGES[s] for s in symbols(model)})).sites
    verdict = "opaque" if sites else "refused"
    taken = exact(model, sites)
    result = apply(model, taken)
    for sizes in SIZES:
        original = bound(model.proto, sizes)
        if not sites or not runs(original):
            continue
        edits = expressible([at_sizes(s, sizes) for s in sites if holds(s, sizes["n"])])
        if edits:
            error = worst(original, apply(replace(model, proto=original), edits), gentle(sites))
            assert error <= 1e-4, f"the facts are wrong at {sizes}: relative L2 {error:.3g}; {sites}"
            verdict = "rewritten"
        if taken:
            error = worst(original, bound(result, sizes), gentle(sites))
            assert error <= 1e-4, f"a mechanism is wrong at {sizes}: relative L2 {error:.3g}; {sites}"
    return verdict + "+window" * bool(taken)


def bound(proto: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A copy with numbers for its dynamic dimensions."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in copy.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    return copy


def at_sizes(site: AttentionSite, sizes: Mapping[str, int]) -> AttentionSite:
    shape = shape_of(site, sizes)
    return replace(site, batch=shape.batch, query_length=shape.query_length, key_length=shape.key_length)


def holds(site: AttentionSite, length: int) -> bool:
    """Whether the certificates speak of this length."""
    windows = [p.certificate for p in site.mask.parts if p.kind not in ("padding", "bias", "opaque")]
    return all(c.general or (length, length) in c.lengths for c in windows)


def expressible(sites: Iterable[AttentionSite]) -> list[tuple[AttentionSite, Lowering]]:
    edits = []
    for site in sites:
        try:
            edits.append((site, lowered(site)))
        except Unsupported:
            continue
    return edits


def gentle(sites: tuple[AttentionSite, ...]) -> bool:
    """Rows that see nothing are compared where the facts say what they give."""
    return any(
        s.mask.masked_rows == "uniform" and (len(s.mask.fills) != 1 or any(p.additive for p in s.mask.parts))
        for s in sites
    )


def exact(model: Model, sites: tuple[AttentionSite, ...]) -> list[tuple[AttentionSite, Lowering]]:
    edits = []
    for site in sites:
        for mechanism in mechanisms():
            offered = next((c for c in exact_candidates(mechanism, site) if isinstance(c, Candidate)), None)
            if offered is None:
                continue
            try:
                edits.append((site, mechanism.lower(site, offered.parameters, model.opset)))
            except Unsupported:
                continue
            break
    return edits


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows on 13 tokens are never worth it: here every one that is possible is taken, in blocks of 4."""
    monkeypatch.setattr("attncompile.plugins.neighborhood.mechanism.MINIMUM_GAIN", 0.0)
    monkeypatch.setattr("attncompile.plugins.neighborhood.mechanism.BLOCK", 4)


def mutants(
    base: onnx.ModelProto, count: int, seed: int, sized: onnx.ModelProto | None = None
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """``count`` mutants of ``base``, one mutation in most, two in some."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    made = tried = 0
    while made < count and tried < 4 * count:
        tried += 1
        if not order:
            order = list(rng.permutation(len(MUTATIONS)))
        graph = Graph(base, sized)
        names = []
        for _ in range(1 + int(rng.random() < 0.25)):
            sites = softmaxes(graph)
            if not sites:
                break
            mutation = MUTATIONS[order.pop() if order else int(rng.integers(len(MUTATIONS)))]
            if mutation(graph, sites[int(rng.integers(len(sites)))], rng):
                names.append(mutation.__name__)
        if names:
            made += 1
            yield " + ".join(names), graph.model()


COUNTS: Counter[str] = Counter()


@pytest.mark.parametrize("at", range(len(SPECS)))
def test_mutants_of_generated_graphs(at: int, tmp_path: Path) -> None:
    for number, (name, proto) in enumerate(mutants(build(SPECS[at]), 22, seed=at)):
        try:
            COUNTS[judge(proto, tmp_path)] += 1
        except AssertionError as error:
            pytest.fail(f"mutant {number} of {SPECS[at]}: {name}: {error}")


@pytest.mark.parametrize("at", range(len(DYNAMIC)))
def test_mutants_of_dynamic_graphs(at: int, tmp_path: Path) -> None:
    base = build(DYNAMIC[at])
    for number, (name, proto) in enumerate(mutants(base, 12, seed=at, sized=bound(base, SIZES[-1]))):
        try:
            COUNTS[judge_dynamic(proto, tmp_path)] += 1
        except AssertionError as error:
            pytest.fail(f"mutant {number} of {DYNAMIC[at]}: {name}: {error}")


@pytest.mark.parametrize("name, exporter, opset", EXPORTS)
def test_mutants_of_exports(name: str, exporter: str, opset: int, tmp_path: Path) -> None:
    base = onnx.load(exported(name, exporter, opset))
    for number, (mutation, proto) in enumerate(mutants(base, 8, seed=number_of(name))):
        try:
            COUNTS[judge(proto, tmp_path)] += 1
        except AssertionError as error:
            pytest.fail(f"mutant {number} of {name}: {mutation}: {error}")


def number_of(name: str) -> int:
    return sum(map(ord, name))


def test_enough_of_each() -> None:
    """Runs last in this file: the counts say that the mutants were neither all refused nor all broken."""
    if sum(COUNTS.values()) < 300:
        pytest.skip("only part of this file ran")
    assert COUNTS["refused"] >= 60 and COUNTS["invalid"] <= 120
    assert sum(n for k, n in COUNTS.items() if k.startswith("rewritten")) >= 60
    assert sum(n for k, n in COUNTS.items() if k.endswith("+window")) >= 15


def info(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, 1, shape)


def finished(b: Builder, out: str, inputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    graph = helper.make_graph(b.nodes, "g", inputs, [info(out, [None] * 4)], b.stored)  # type: ignore[list-item]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_window_as_wide_as_another_input(tmp_path: Path) -> None:
    """The lengths are fixed, but the window follows the size of an input that the site does not read: no fact."""
    b, n, h, d = Builder(), 16, 2, 4
    split = b.const([1, n, h, d])
    query = b.op("Transpose", b.op("Reshape", "x", split), perm=[0, 2, 1, 3])
    key = b.op("Transpose", b.op("Reshape", "x", split), perm=[0, 2, 3, 1])
    index = b.op("Range", b.const(np.array(0)), b.const(np.array(n)), b.const(np.array(1)))
    away = b.op("Sub", b.op("Unsqueeze", index, b.const([1])), b.op("Unsqueeze", index, b.const([0])))
    width = b.op("Squeeze", b.op("Shape", "other"))
    seen = b.op("And", b.op("LessOrEqual", away, width), b.op("GreaterOrEqual", away, b.const(np.array(0))))
    scores = b.op("Where", seen, b.op("MatMul", query, key), b.const(np.array(-np.inf, np.float32)))
    value = b.op("Transpose", b.op("Reshape", "x", split), perm=[0, 2, 1, 3])
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), value)
    model = load(save(finished(b, out, [info("x", [1, n, h * d]), info("other", ["m"])]), tmp_path))
    (site,) = detect(model, profile_for(model, {"m": Range(1, 3, 8)})).sites
    assert site.mask.kind == "opaque" and "'m'" in site.mask.parts[0].certificate.detail


@pytest.mark.parametrize("pooled", [True, False])
def test_lengths_that_are_not_linear_are_not_numbers(pooled: bool, tmp_path: Path) -> None:
    """n // 2 at n = 128 and n + 1 = 129 is the same number, and yet not a fixed length."""
    b, h, d = Builder(), 2, 4
    x = "x"
    if pooled:
        x = b.op("MaxPool", b.op("Transpose", "x", perm=[0, 2, 1]), kernel_shape=[2], strides=[2])
        x = b.op("Transpose", x, perm=[0, 2, 1])
    parts = [b.op("Reshape", x, b.const([0, -1, h, d])) for _ in range(3)]
    query, value = (b.op("Transpose", p, perm=[0, 2, 1, 3]) for p in parts[:2])
    key = b.op("Transpose", parts[2], perm=[0, 2, 3, 1])
    out = b.op("MatMul", b.op("Softmax", b.op("MatMul", query, key), axis=-1), value)
    model = load(save(finished(b, out, [info("x", ["b", "n", h * d])]), tmp_path))
    (site,) = detect(model, profile_for(model, {"n": Range(1, 128, 512)})).sites
    assert site.query_length == ("f(b,n)=64..256" if pooled else "n") and site.batch == "b"
    assert shape_of(site, {"b": 1, "n": 128}).query_length == (64 if pooled else 128)
