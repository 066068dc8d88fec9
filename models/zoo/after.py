"""What is done to an exported file: the forms that other tools make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, compose, helper

from attncompile.models.export import export_built
from attncompile.models.recipe import Built, Options
from attncompile.models.zoo.entry import Call, Entry

Step = Callable[[Entry, Built, Path, list[Call]], list[Call]]
"""Changes the file and returns the calls that it holds now."""


def optimised(entry: Entry, built: Built, path: Path, calls: list[Call]) -> list[Call]:
    """ONNX Runtime's optimizer for transformers, which writes com.microsoft operators.

    ``entry.options["optimizer"]`` are its arguments. Raises ``ValueError`` where it wrote none: the entry would say
    nothing.
    """
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(path), opt_level=0, **entry.options["optimizer"])
    proto = model.model
    if not any(n.domain == "com.microsoft" and "Attention" in n.op_type for n in proto.graph.node):
        raise ValueError("ONNX Runtime's optimizer found no attention")
    onnx.save(proto, path)
    return calls


def quantised(entry: Entry, built: Built, path: Path, calls: list[Call]) -> list[Call]:
    """Static int8 quantisation of MatMul, Gemm and Softmax with QuantizeLinear and DequantizeLinear around them."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{name: tensor.numpy() for name, tensor in built.inputs.items()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    source = path.with_name("float.onnx")
    path.rename(source)
    quantize_static(
        source, path, Once(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Softmax"],
    )  # fmt: skip
    source.unlink()
    return calls


def in_function(entry: Entry, built: Built, path: Path, calls: list[Call]) -> list[Call]:
    """The whole graph as one model-local function, its weights passed in, called once."""
    proto = onnx.load(path)
    graph = proto.graph
    inputs = [i.name for i in graph.input]
    weights = [t.name for t in graph.initializer]
    outputs = [o.name for o in graph.output]
    imports = list(proto.opset_import)
    body = helper.make_function("zoo", "Block", [*inputs, *weights], outputs, list(graph.node), imports)
    del graph.node[:]
    del graph.value_info[:]
    graph.node.append(helper.make_node("Block", [*inputs, *weights], outputs, name="block", domain="zoo"))
    proto.functions.append(body)
    proto.opset_import.append(helper.make_opsetid("zoo", 1))
    proto.ir_version = max(proto.ir_version, 8)
    onnx.save(proto, path)
    return calls


def merged(entry: Entry, built: Built, path: Path, calls: list[Call]) -> list[Call]:
    """A merged decoder: ``If`` on the input ``use_cache_branch``, this export in one branch, the prefill in the other.

    ``entry.options["other"]`` replaces options of the entry for the second export.
    """
    from attncompile.models.zoo.check import make
    from attncompile.models.zoo.truth import calls_of

    other = replace(entry, options={**entry.options, **entry.options["other"]})
    second = make(other)
    more = calls_of(second, entry.modules, entry.linear, entry.sparse, entry.varied)
    beside = path.with_name("other.onnx")
    export_built(second, Options(exporter=entry.exporter, opset=entry.opset, dynamic=entry.dynamic), beside)
    onnx.save(_joined(onnx.load(path), onnx.load(beside)), path)
    beside.unlink()
    return [*more, *calls]  # a node's attributes are in the order of their names: else_branch comes first


def _joined(then: ModelProto, other: ModelProto) -> ModelProto:
    branches = [compose.add_prefix(m, prefix, rename_inputs=False) for m, prefix in ((then, "a/"), (other, "b/"))]
    inputs = {i.name: i for m in branches for i in reversed(m.graph.input)}
    weights = [t for m in branches for t in m.graph.initializer]
    outputs = [onnx.ValueInfoProto(name=o.name.removeprefix("a/"), type=o.type) for o in branches[0].graph.output]
    for m in branches:
        del m.graph.input[:]
        del m.graph.initializer[:]
        for o in m.graph.output:
            for dim in o.type.tensor_type.shape.dim:
                dim.ClearField("value")
    for o in outputs:
        for dim in o.type.tensor_type.shape.dim:
            dim.ClearField("value")
    chosen = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [])
    node = helper.make_node(
        "If", ["use_cache_branch"], [o.name for o in outputs], name="optimum::if",
        then_branch=branches[0].graph, else_branch=branches[1].graph,
    )  # fmt: skip
    graph = helper.make_graph([node], "merged", [*inputs.values(), chosen], outputs, weights)
    return helper.make_model(graph, opset_imports=list(then.opset_import), ir_version=then.ir_version)


STEPS: Mapping[str, Step] = {
    "ort-optimizer": optimised, "qdq": quantised, "function": in_function, "merged": merged,
}  # fmt: skip
