"""What the facts of a site say that it computes, naively in NumPy, beside what ONNX Runtime computes.

``rebuild`` reads a softmax site from values of the graph; ``rebuilt`` runs the model for those values. Shares no code
with the lifter, the mechanisms or their references.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, ValueInfoProto, numpy_helper

from attncompile.core.mask import MaskPart
from attncompile.core.model import Model
from attncompile.core.site import AttentionSite, Detection, Operand
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import save

UNIFORM = -1e30
"""What a hidden score is where the source's masked rows are uniform: finite, and below everything."""


class Unaligned(ValueError):
    """A part of the mask is applied to other axes than [batch, heads, query, key]: the facts do not say which."""


@dataclass(frozen=True)
class Rebuilt:
    """``actual`` and ``rebuilt`` outputs, in the site's layout; the log-sum-exps where the site has them."""

    actual: np.ndarray
    rebuilt: np.ndarray
    actual_log_sum_exp: np.ndarray | None = None
    rebuilt_log_sum_exp: np.ndarray | None = None

    def check(self, tolerance: float = 2e-5) -> None:
        """Asserts that they are the same, in shape, NaN and value."""
        assert self.actual.shape == self.rebuilt.shape
        np.testing.assert_allclose(self.rebuilt, self.actual, rtol=tolerance, atol=tolerance)
        if self.actual_log_sum_exp is not None:
            assert self.rebuilt_log_sum_exp is not None
            flat = self.actual_log_sum_exp.reshape(self.rebuilt_log_sum_exp.shape)
            np.testing.assert_allclose(self.rebuilt_log_sum_exp, flat, rtol=tolerance, atol=tolerance)


def names(site: AttentionSite) -> list[str]:
    """The values of the graph that ``rebuild`` needs."""
    wanted = [site.query.value, site.key.value, site.value.value, site.sinks, site.head_scale]
    wanted += [p.source or "" for p in site.mask.parts if p.kind in ("padding", "bias", "opaque")]
    return [v for v in dict.fromkeys(wanted) if v]


def heads_first(array: np.ndarray, operand: Operand) -> np.ndarray:
    """[batch, heads, sequence, dim] in float64."""
    return (array if operand.layout == "BHND" else array.transpose(0, 2, 1, 3)).astype(np.float64)


def rebuild(site: AttentionSite, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The output in the site's layout and the log-sum-exp [batch, heads, queries], both in float64.

    ``values`` holds ``names(site)``. Opaque parts are used as they are: where they are added or kept by a bool their
    source says everything.

    Raises:
        Unaligned: a part's source has the axes of another view of the scores.
    """
    q, k, v = (heads_first(values[o.value], o) for o in (site.query, site.key, site.value))
    assert q.shape[1] == site.heads and q.shape[3] == k.shape[3] == site.head_dim
    assert k.shape[1] == v.shape[1] == site.kv_heads and v.shape[3] == site.value_dim
    assert k.shape[0] == v.shape[0] == q.shape[0] and k.shape[2] == v.shape[2]
    group = site.heads // site.kv_heads
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = site.scale * (q @ k.swapaxes(2, 3))
    if site.head_scale:
        scores = scores * values[site.head_scale].astype(np.float64).reshape(1, site.heads, 1, 1)
    if site.softcap:
        scores = site.softcap * np.tanh(scores / site.softcap)
    hidden = UNIFORM if site.mask.masked_rows == "uniform" else -np.inf
    for part in site.mask.parts:
        scores = _masked(scores, part, values, hidden)
    columns = scores
    if site.sinks:
        sinks = values[site.sinks].astype(np.float64).reshape(1, -1, 1, 1)
        assert sinks.shape[1] in (1, site.heads)
        columns = np.concatenate([scores, np.broadcast_to(sinks, (*scores.shape[:2], scores.shape[2], 1))], axis=-1)
    top = columns.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(columns - top)
        total = exponentials.sum(-1, keepdims=True)
        weights = exponentials[..., : scores.shape[-1]] / total
    if site.mask.masked_rows == "zero" or site.mask.guarded:
        weights = np.nan_to_num(weights, nan=0.0)
    out = weights @ v
    if site.mask.zeroed:
        (hidden,) = [values[p.source or ""] == 0 for p in site.mask.parts if p.tokens]
        out = np.where(hidden[:, None, :, None], 0.0, out)
    return (out if site.output.layout == "BHND" else out.transpose(0, 2, 1, 3)), (top + np.log(total))[..., 0]


def _masked(scores: np.ndarray, part: MaskPart, values: Mapping[str, np.ndarray], hidden: float) -> np.ndarray:
    queries, keys = scores.shape[-2:]
    kind, source, pattern = part.kind, part.source, part.pattern
    if kind in ("causal", "window"):
        distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
        seen = np.ones(distance.shape, bool)
        if part.left >= 0:
            seen &= distance >= -part.left
        if part.right >= 0:
            seen &= distance <= part.right
        return np.where(seen, scores, hidden)
    if kind not in ("padding", "bias", "opaque"):
        assert pattern is not None
        return np.where(pattern.visible(queries, keys), scores, hidden)
    if part.counts is not None:
        with np.errstate(divide="ignore"):
            return scores + np.log(part.counts.times(queries, keys).astype(np.float64))
    assert source is not None
    other_axes = kind == "bias" and part.certificate.method == "structure"
    if other_axes or "not [batch" in part.certificate.detail:
        raise Unaligned(f"'{source}' is applied where the scores have other axes")
    data = values[source] if not part.tokens else values[source][:, None, None].astype(bool)
    if part.additive:
        return scores + data.astype(np.float64)
    # A stored mask of 0 and large negative numbers is a bool in the facts, one that adds nothing where a key is seen.
    return np.where(data if data.dtype == np.bool_ else data == 0, scores, hidden)


def run_for(proto: ModelProto, feeds: Mapping[str, np.ndarray], wanted: list[str]) -> dict[str, np.ndarray]:
    """The values ``wanted`` of any kind (inputs and constants too), from ONNX Runtime with nothing optimised."""
    stored = {t.name: t for t in proto.graph.initializer}
    copy = ModelProto()
    copy.CopyFrom(proto)
    made = {o for n in proto.graph.node for o in n.output}
    inner = [w for w in dict.fromkeys(wanted) if w in made]
    del copy.graph.output[:]
    copy.graph.output.extend(ValueInfoProto(name=w) for w in inner)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    asked = {i.name for i in session.get_inputs()}
    found = dict(zip(inner, session.run(None, {k: v for k, v in feeds.items() if k in asked}), strict=True))
    for name in wanted:
        if name in feeds:
            found[name] = feeds[name]
        elif name in stored and name not in found:
            found[name] = numpy_helper.to_array(stored[name])
    return found


def rebuilt(proto: ModelProto, site: AttentionSite, feeds: Mapping[str, np.ndarray]) -> Rebuilt:
    """Runs ``proto`` (external data not supported) and reads ``site`` from the values that it had."""
    extra = [site.log_sum_exp] if site.log_sum_exp else []
    values = run_for(proto, feeds, [*names(site), site.output.value, *extra])
    out, log_sum_exp = rebuild(site, values)
    if extra:
        return Rebuilt(values[site.output.value], out, values[site.log_sum_exp], log_sum_exp)
    return Rebuilt(values[site.output.value], out)


def random_feeds(
    proto: onnx.ModelProto, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Random inputs of the declared shapes, dynamic dimensions from ``sizes``: floats standard normal, bools mostly
    true with the first key kept, integers 0 or 1.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    stored = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in stored:
            continue
        shape = [d.dim_value or (sizes or {})[d.dim_param] for d in value.type.tensor_type.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if kind == np.bool_:
            feeds[value.name] = rng.random(shape) < 0.7
            feeds[value.name][..., 0] = True
        elif np.issubdtype(kind, np.integer):
            feeds[value.name] = rng.integers(0, 2, shape).astype(kind)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(kind)
    return feeds


def found_in(proto: onnx.ModelProto, folder: Path) -> tuple[Model, Detection]:
    """What is found, after operands and logits that need it were given values of their own."""
    model = load(save(proto, folder))
    profile = profile_for(model, {})
    detection = detect(model, profile)
    if any(m.code in HELPED for m in detection.near_misses):
        model = separate(model, profile)
        feeds = random_feeds(proto)
        outputs = [o.name for o in proto.graph.output]
        before, after = (run_for(p, feeds, outputs) for p in (proto, model.proto))
        for name in outputs:
            np.testing.assert_array_equal(before[name], after[name])
        detection = detect(model, profile)
    return model, detection


def only_site(proto: onnx.ModelProto, folder: Path, tolerance: float = 2e-5) -> tuple[Model, AttentionSite]:
    """The one site, rebuilt from its facts and equal to what ONNX Runtime gives."""
    model, detection = found_in(proto, folder)
    assert [m.reason for m in detection.near_misses] == []
    (site,) = detection.sites
    for seed in range(2):
        rebuilt(model.proto, site, random_feeds(model.proto, seed)).check(tolerance)
    return model, site
