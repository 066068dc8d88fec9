"""Small models that several target tests build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.core.model import ExternalFile, Model


def _attention(
    dtype: type = np.float32, dim: int = 64, length: int | str = 128, mask: float | None = None
) -> ModelProto:
    """x [1, N, 4 * dim] -> MatMul-Softmax-MatMul attention -> y; node names q, k, v, qk, softmax, pv."""
    rng = np.random.default_rng(0)
    heads, width = 4, 4 * dim
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stored = [
        numpy_helper.from_array((rng.standard_normal((width, width)) * width**-0.5).astype(dtype), f"w{x}")
        for x in "qkvo"
    ]
    stored.append(numpy_helper.from_array(np.array([0, 0, heads, dim], np.int64), "split"))
    stored.append(numpy_helper.from_array(np.array([0, 0, width], np.int64), "join"))
    stored.append(numpy_helper.from_array(np.array(dim**-0.5, dtype), "scale"))
    nodes = []
    for x in "qkv":
        nodes.append(helper.make_node("MatMul", ["x", f"w{x}"], [f"{x}0"], name=f"project_{x}"))
        nodes.append(helper.make_node("Reshape", [f"{x}0", "split"], [f"{x}1"], name=f"split_{x}"))
        perm = [0, 2, 3, 1] if x == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [f"{x}1"], [x], perm=perm, name=x))
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["s0"], name="qk"))
    nodes.append(helper.make_node("Mul", ["s0", "scale"], ["s1"], name="scaled"))
    scores = "s1"
    if mask is not None:
        assert isinstance(length, int)
        upper = np.triu(np.ones((length, length), bool), 1)
        stored.append(numpy_helper.from_array(np.where(upper, mask, 0).astype(dtype), "mask"))
        nodes.append(helper.make_node("Add", ["s1", "mask"], ["s2"], name="masked"))
        scores = "s2"
    nodes.append(helper.make_node("Softmax", [scores], ["p"], axis=-1, name="softmax"))
    nodes.append(helper.make_node("MatMul", ["p", "v"], ["o0"], name="pv"))
    nodes.append(helper.make_node("Transpose", ["o0"], ["o1"], perm=[0, 2, 1, 3], name="merge"))
    nodes.append(helper.make_node("Reshape", ["o1", "join"], ["o2"], name="join_heads"))
    nodes.append(helper.make_node("MatMul", ["o2", "wo"], ["y"], name="project_o"))
    graph = helper.make_graph(
        nodes, "attention", [helper.make_tensor_value_info("x", kind, [1, length, width])],
        [helper.make_tensor_value_info("y", kind, [1, length, width])], stored,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def attention() -> Callable[..., ModelProto]:
    return _attention


@pytest.fixture
def as_model(tmp_path: Path) -> Callable[[ModelProto], Model]:
    """Write a proto and give the ``Model`` that loading it would give."""

    def make(proto: ModelProto, external: tuple[str, ...] = ()) -> Model:
        folder = tmp_path / "input"
        folder.mkdir(exist_ok=True)
        path = folder / "in.onnx"
        path.write_bytes(proto.SerializeToString())
        files = tuple(ExternalFile(e, folder / e, (folder / e).stat().st_size) for e in external)
        opset = next(o.version for o in proto.opset_import if o.domain == "")
        return Model(path=path, proto=proto, hash="sha256:test", opset=opset, external_files=files)

    return make


def _external(name: str, dims: list[int], location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    size = 4 * int(np.prod(dims))
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def external_tensor() -> Callable[[str, list[int], str, int], TensorProto]:
    return _external


@pytest.fixture
def exported() -> Callable[[str], Path]:
    """The recipe's tiny model, exported once a run with dynamo at opset 18."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests import exports

    return exports.exported
