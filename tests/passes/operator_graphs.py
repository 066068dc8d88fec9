"""Graphs of one attention operator, what detection says of them, and the facts computed beside the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.site import AttentionSite, Detection
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex
from attncompile.passes.normalise import normalise
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from tests.passes.operator_rebuild import in_layout, rebuild, wanted

Inputs = Sequence[tuple[str, np.ndarray | None]]


def one_node(
    op: str, inputs: Inputs, outputs: Sequence[str], domain: str = "", opset: int = 24,
    shapes: Mapping[str, Sequence[int | str]] | None = None, **attributes: Any,
) -> ModelProto:  # fmt: skip
    """A model of one node; ("", None) is an omitted input. ``shapes`` gives declared shapes with symbols."""
    infos = [
        helper.make_tensor_value_info(
            n, helper.np_dtype_to_tensor_dtype(a.dtype), list((shapes or {}).get(n, a.shape))
        )
        for n, a in inputs if a is not None
    ]  # fmt: skip
    node = helper.make_node(op, [n for n, _ in inputs], list(outputs), domain=domain, name="it", **attributes)
    graph = helper.make_graph([node], "g", infos, [onnx.ValueInfoProto(name=o) for o in outputs if o])
    return model(graph, opset, *([domain] if domain else []))


def model(graph: onnx.GraphProto, opset: int, *domains: str) -> ModelProto:
    """A model of this graph; outputs without a type get what shape inference says, else float."""
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    for output in made.graph.output:
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return made


def find(proto: ModelProto, ranges: Mapping[str, Range] | None = None) -> tuple[Model, Detection]:
    """What the pipeline's first stages make of ``proto``."""
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    found = normalise(Model(Path("model.onnx"), proto, "", opset))
    profile: ShapeProfile = profile_for(found, ranges or {})
    detection = detect(found, profile, index=GraphIndex(found))
    if any(m.code in HELPED for m in detection.near_misses):
        found = separate(found, profile)
        detection = detect(found, profile, index=GraphIndex(found))
    return found, detection


def only_site(proto: ModelProto, ranges: Mapping[str, Range] | None = None) -> tuple[Model, AttentionSite]:
    found, detection = find(proto, ranges)
    assert [m.reason for m in detection.near_misses] == []
    (site,) = detection.sites
    return found, site


def only_miss(proto: ModelProto, ranges: Mapping[str, Range] | None = None) -> tuple[str, str]:
    """(code, reason)."""
    _, detection = find(proto, ranges)
    assert not detection.sites
    (miss,) = detection.near_misses
    return miss.code, miss.reason


def run(proto: ModelProto, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of the graph in ONNX Runtime, nothing optimised: inputs, constants, and what nodes make."""
    made = {o for n in proto.graph.node for o in n.output}
    inner = [n for n in dict.fromkeys(names) if n in made]
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in names}
    found |= {n: feeds[n] for n in names if n in feeds}
    copy = ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {i.name: feeds[i.name] for i in session.get_inputs()}
    return found | dict(zip(inner, session.run(inner, feed), strict=True))


def check_facts(found: Model, site: AttentionSite, feeds: Mapping[str, np.ndarray], tolerance: float = 2e-5) -> None:
    """The facts, computed naively, are what ONNX Runtime gives in every row that they speak of."""
    values = run(found.proto, feeds, [*wanted(site), site.output.value])
    expected, got = values[site.output.value].astype(np.float64), in_layout(site, rebuild(site, values))
    said = ~np.isnan(got) if site.mask.ends is not None else np.ones(got.shape, bool)
    assert said.mean() > 0.3
    np.testing.assert_allclose(got[said], expected[said], rtol=tolerance, atol=tolerance)
