"""Files of an old opset with operators of other domains are converted, run, and give what they gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.core.model import Model
from attncompile.passes.detect import detect
from attncompile.passes.normalise import normalise
from attncompile.passes.symbols import profile_for
from tests.passes.test_lifter_forms import B, Graph, H, N, W


def optimised(imports: tuple[str, ...], domain: str = "com.microsoft", opset: int = 17) -> Model:
    """Attention and a Gelu of ONNX Runtime's, with the imports that its optimizer writes, or fewer."""
    b = Graph()
    out = b.merge(b.op("MatMul", b.op("Softmax", b.scores(), axis=-1), b.heads()))
    b.nodes.append(helper.make_node("Gelu", [out], ["y"], domain=domain))
    shape = [B, N, W]
    graph = helper.make_graph(b.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], b.stored)  # fmt: skip
    wanted = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in imports)]
    return Model(Path("model.onnx"), helper.make_model(graph, opset_imports=wanted, ir_version=8), "", opset)


def run(proto: onnx.ModelProto) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((B, N, W)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("imports", [(), ("com.microsoft",)])
def test_operators_of_a_domain_that_is_not_imported(imports: tuple[str, ...]) -> None:
    model = optimised(imports)
    normal = normalise(model)
    assert normal.opset == 18
    assert {o.domain: o.version for o in normal.proto.opset_import} == {"": 18, "com.microsoft": 1}
    assert any("converted from opset 17" in note for note in normal.notes)
    np.testing.assert_array_equal(run(normal.proto), run(optimised(("com.microsoft",)).proto))
    (site,) = detect(normal, profile_for(normal, {})).sites
    assert (site.heads, site.query_length) == (H, N)
    assert [o.domain for o in model.proto.opset_import] == ["", *imports], "the file itself was changed"


def test_a_domain_that_nobody_knows_is_kept() -> None:
    normal = normalise(optimised((), domain="somebody.else"))
    assert [n.domain for n in normal.proto.graph.node if n.domain] == ["somebody.else"]


def test_a_new_opset_needs_no_import() -> None:
    model = optimised((), opset=18)
    assert normalise(model) is model


def test_sites_are_found_where_the_conversion_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be replaced is still shown: detection reads the file as it is."""

    def fail(*_: object) -> None:
        raise RuntimeError("no adapter")

    model = optimised((), opset=17)
    monkeypatch.setattr("onnx.version_converter.convert_version", fail)
    with pytest.raises(Unsupported, match="the conversion from opset 17 to 18 failed: no adapter"):
        normalise(model)
    (site,) = detect(model, profile_for(model, {})).sites
    assert (site.heads, site.query_length) == (H, N)
