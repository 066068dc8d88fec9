"""A float32 model in fp16 or bf16, converted in the graph: its types say what every runtime computes in.

The tool is ``onnxruntime.transformers.float16`` (MIT, part of ONNX Runtime, a dependency anyway). Of 16 exports
of ViT, DiT, Mistral, GPT-2, BERT, Swin, FLUX and MiniLM, all ran in ONNX Runtime after it, and 7 after
``onnxconverter_common.float16`` 1.16, which Polygraphy's loader wraps: the others got ill-typed Casts, or it failed.
NVIDIA's AutoCast (``nvidia-modelopt`` 0.47) requires torch and onnx 1.21, older than what this project takes.

What the tool leaves to its caller is done here: which nodes stay in float32, a topological order, casts put into the
branch that they belong to, and no float32 -> fp16 -> float32 round trip between two nodes that both stay in float32.

bf16 uses the same placement of casts; its constants are rounded from the float32 originals, not from fp16.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import TargetError
from attncompile.targets import graph as g
from attncompile.targets.base import Precision

KEPT_FLOAT32: dict[str, str] = {
    "Range": "counts exactly to 2,048 only in fp16",
    "CumSum": "as Range",
    "Sin": "angles of a position grow with it; with all that computes the angle",
    "Cos": "as Sin",
    "Log": "distances and frequencies; with all that computes its argument",
    "Pow": "squares of a norm overflow above 255",
    "ReduceMean": "the sum behind it overflows, and loses small terms",
    "ReduceSum": "as ReduceMean",
    "ReduceSumSquare": "as Pow and ReduceMean",
    "ReduceL1": "as ReduceMean",
    "ReduceL2": "as Pow and ReduceMean",
    "ReduceLogSumExp": "as ReduceMean",
    "Sqrt": "a norm's variance plus 1e-6, which fp16 does not resolve; with the Add and division around it",
    "Reciprocal": "as Sqrt",
    "Min": "on the tool's list",
    "Max": "as Min",
    "TopK": "ties would change the selection",
    "NonMaxSuppression": "float32 by definition",
    "RoiAlign": "coordinates",
    "GridSample": "coordinates",
    "RandomUniformLike": "on the tool's list",
    "Upsample": "as RoiAlign",
}
"""Ops that stay in float32, and why. ``Resize`` keeps its scales in float32. LayerNormalization, RMSNormalization,
Softmax and Attention become fp16: their definitions or kernels accumulate in float32, and an attention whose softmax is
float32 is no longer one kernel in TensorRT-RTX."""

MASK_LIMIT = 32752.0
"""Finite constants are clipped to half of the largest fp16 number, so that the sum of two mask constants is finite
too. -inf stays -inf."""

_CONES = ("Sin", "Cos", "Log", "Range", "CumSum")
_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_WEIGHT_ELEMENTS = 8192
"""A product with a larger constant is a layer of the network and not the table of frequencies of a position code."""


def convert(proto: ModelProto, folder: Path, precision: Precision, *, keep_io_types: bool = True) -> ModelProto:
    """``proto`` in ``precision``. Its model-local functions are inlined first, so that bodies are converted as well.

    ``folder`` is where its external data lies; the result holds its weights itself. By default inputs and outputs keep
    their types, with casts inside, so that the result takes the same feeds as the original; without ``keep_io_types``
    they are converted too.

    Raises:
        TargetError: the model is too large for one file, or the converted graph is not correctly typed.
    """
    if precision == "fp16":
        return to_fp16(proto, folder, keep_io_types=keep_io_types)
    return to_bf16(proto, folder, keep_io_types=keep_io_types)


def to_fp16(proto: ModelProto, folder: Path, *, keep_io_types: bool = True) -> ModelProto:
    """See ``convert``."""
    result = _converted(_prepared(proto, folder), keep_io_types, "tensor(float16)")
    _check(result, "fp16")
    return result


def to_bf16(proto: ModelProto, folder: Path, *, keep_io_types: bool = True) -> ModelProto:
    """See ``convert``. ONNX Runtime's CPU provider cannot run the result."""
    prepared = _prepared(proto, folder)
    if any(t.data_type == TensorProto.FLOAT16 for t in _tensors(prepared)):
        raise TargetError("the model holds fp16 tensors already", "convert the float32 model, or leave --bf16 out")
    opset = next((o.version for o in prepared.opset_import if o.domain in g.STANDARD_DOMAINS), 0)
    if opset < 13:
        raise TargetError(
            f"the model imports opset {opset}, and bf16 came with 13", "export with opset 18, or use --fp16"
        )
    originals = {key: numpy_helper.to_array(t) for key, t in _float_tensors(prepared)}
    result = _converted(prepared, keep_io_types, "tensor(bfloat16)")
    _retype(result, originals)
    _check(result, "bf16")
    return result


def _prepared(proto: ModelProto, folder: Path) -> ModelProto:
    """A private copy: functions inlined, nodes named, types inferred, weights loaded, constants as tensors."""
    result = g.inlined(proto)
    g.name_nodes(result)
    for graph in g.graphs(result.graph):
        for node in graph.node:
            _constant_as_tensor(node)
    try:
        # Before the weights are loaded: inference needs none of them, and the message stays small.
        result = onnx.shape_inference.infer_shapes(result, check_type=True)
    except Exception as error:  # onnx raises its own InferenceError and RuntimeError alike
        raise TargetError(
            f"types cannot be inferred: {_first_line(error)}", "check the model with onnx.checker"
        ) from None
    size = result.ByteSize() + sum(_external_bytes(t) for t in _tensors(result))
    if size > g.PROTO_LIMIT:
        raise TargetError(
            f"conversion works in memory on up to 2 GiB of weights; this model has {size / 2**30:.1f} GiB",
            "export the model in fp16 or bf16, and build without --fp16 and --bf16",
        )
    for tensor in _tensors(result):
        if tensor.data_location == TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return result


def _converted(prepared: ModelProto, keep_io_types: bool, low: str) -> ModelProto:
    tool = _tool()
    kept = _kept_nodes(prepared) | _untyped_nodes(prepared, low)
    try:
        result: ModelProto = tool.convert_float_to_float16(
            prepared, max_finite_val=MASK_LIMIT, keep_io_types=keep_io_types, disable_shape_infer=True,
            op_block_list=sorted({*tool.DEFAULT_OP_BLOCK_LIST, *KEPT_FLOAT32}), node_block_list=sorted(kept),
        )  # fmt: skip
    except (AssertionError, ValueError) as error:
        raise TargetError(f"the conversion failed: {error}", "export the model in fp16 or bf16 instead") from None
    for graph in g.graphs(result.graph):
        del graph.value_info[:]
    _place_casts(result)
    _skip_round_trips(result)
    g.sort_nodes(result.graph)
    return result


def _tool() -> Any:  # a module without types
    """The converter. Its package appends its own folder to ``sys.path``, where ``import models`` would find things."""
    before = list(sys.path)
    try:
        from onnxruntime.transformers import float16
    finally:
        sys.path[:] = before
    return float16


def _kept_nodes(proto: ModelProto) -> set[str]:
    """Names of nodes that stay in float32 because of what they feed (see ``KEPT_FLOAT32``)."""
    nodes = [n for graph in g.graphs(proto.graph) for n in graph.node]
    maker = {o: n for n in nodes for o in n.output if o}
    floats = _float_values(proto)
    sizes = {t.name: prod(t.dims) for graph in g.graphs(proto.graph) for t in graph.initializer}
    sizes |= {
        n.output[0]: prod(a.t.dims) for n in nodes if n.op_type == "Constant" for a in n.attribute if a.HasField("t")
    }
    constants = set(sizes)

    def heavy(node: NodeProto) -> bool:
        weighted = node.op_type in _WEIGHTED and any(sizes.get(v, 0) > _WEIGHT_ELEMENTS for v in node.input)
        return weighted or any(True for _ in g.subgraphs(node))

    kept: set[str] = set()
    for root in nodes:
        if root.op_type not in _CONES:
            continue
        pending = [v for v in root.input if v in floats]
        while pending:
            node = maker.get(pending.pop())
            if node is None or node.name in kept or node.op_type == "Constant" or heavy(node):
                continue
            kept.add(node.name)
            pending.extend(v for v in node.input if v in floats)
    for root in nodes:  # the edge at which a branch is taken is not rounded
        pending = [root.input[0]] if root.op_type == "If" else []
        while pending:
            node = maker.get(pending.pop())
            if node is None or node.name in kept or node.op_type == "Constant" or heavy(node):
                continue
            kept.add(node.name)
            pending.extend(v for v in node.input if v)
    for node in nodes:
        if node.op_type == "Sqrt" and node.input[0] in maker and maker[node.input[0]].op_type in ("Add", "Max", "Clip"):
            kept.add(maker[node.input[0]].name)
        elif node.op_type == "Div" and node.input[0] in constants:
            below = maker.get(node.input[1])
            if below is not None and below.op_type == "Sqrt":
                kept.add(node.name)
    return kept


def _untyped_nodes(proto: ModelProto, low: str) -> set[str]:
    """Names of nodes whose op takes float32 but not ``low`` at the model's opset, such as Conv in bf16 below 22."""
    floats = _float_values(proto)
    opset = next((o.version for o in proto.opset_import if o.domain in g.STANDARD_DOMAINS), 0)
    found = set()
    for graph in g.graphs(proto.graph):
        for node in graph.node:
            if node.domain not in g.STANDARD_DOMAINS:
                if _reads_float32(node):
                    found.add(node.name)
                continue
            if not onnx.defs.has(node.op_type, opset, ""):
                continue
            schema = onnx.defs.get_schema(node.op_type, opset, "")
            for values, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
                for i, value in enumerate(values):
                    allowed = formals[min(i, len(formals) - 1)].types if formals else {low}
                    if value in floats and "tensor(float)" in allowed and low not in allowed:
                        found.add(node.name)
    return found


def _reads_float32(node: NodeProto) -> bool:
    """Whether an op of another domain has an input that is float32 by its schema, whatever the operands are."""
    if not onnx.defs.has(node.op_type, 1, node.domain):
        return False
    return any(
        formal.type_str == "tensor(float)" for formal in onnx.defs.get_schema(node.op_type, 1, node.domain).inputs
    )


def _float_values(proto: ModelProto) -> set[str]:
    """Names of all float32 values."""
    found = set()
    for graph in g.graphs(proto.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type == TensorProto.FLOAT:
                found.add(info.name)
        found.update(t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT)
    return found


def _is_tool_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast" and (
        node.name.endswith(("_cast_to_fp16_node", "_cast_to_fp32_node"))
        or node.name.startswith(("graph_input_cast", "graph_output_cast"))
    )


def _place_casts(proto: ModelProto) -> None:
    """The tool appends all casts to the main graph; move each into the branch that makes its input."""
    inner = list(g.graphs(proto.graph))[1:]
    home = {o: graph for graph in inner for n in graph.node for o in n.output if o}
    home |= {v.name: graph for graph in inner for v in (*graph.input, *graph.initializer)}
    moved = True
    while moved:
        moved = False
        for i in reversed(range(len(proto.graph.node))):
            node = proto.graph.node[i]
            if _is_tool_cast(node) and node.input[0] in home:
                target = home[node.input[0]]
                target.node.append(NodeProto.FromString(node.SerializeToString()))
                home[node.output[0]] = target
                del proto.graph.node[i]
                moved = True


def _skip_round_trips(proto: ModelProto) -> None:
    """float32 -> Cast -> fp16 -> Cast -> float32 becomes the float32 value itself; casts that nobody reads go."""
    everywhere = list(g.graphs(proto.graph))
    down = {n.output[0]: n for graph in everywhere for n in graph.node if _is_tool_cast(n)}
    source: dict[str, str] = {}
    for node in down.values():
        before = down.get(node.input[0])
        if before is not None and node.name.endswith("_cast_to_fp32_node") and _to(before) == TensorProto.FLOAT16:
            source[node.output[0]] = before.input[0]
    for graph in everywhere:
        for node in graph.node:
            for i, value in enumerate(node.input):
                if value in source:
                    node.input[i] = source[value]
    outputs = {o.name for graph in everywhere for o in graph.output}
    gone = True
    while gone:
        used = {v for n in proto.graph.node for v in g.reads(n)} | outputs
        used |= {v for graph in everywhere[1:] for n in graph.node for v in n.input}
        before_count = sum(len(graph.node) for graph in everywhere)
        for graph in everywhere:
            g.drop_nodes(graph, lambda n: _is_tool_cast(n) and n.output[0] not in used)  # noqa: B023
        gone = sum(len(graph.node) for graph in everywhere) < before_count


def _to(cast: NodeProto) -> int:
    return next(int(a.i) for a in cast.attribute if a.name == "to")


def _constant_as_tensor(node: NodeProto) -> None:
    """``Constant`` with value_float(s): the tool converts tensors only."""
    if node.op_type != "Constant":
        return
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats"):
            data = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.asarray(data, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", tensor))


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    for graph in g.graphs(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _float_tensors(proto: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """float32 and fp16 tensors with a key that conversion does not change: the value that they make."""
    wanted = (TensorProto.FLOAT, TensorProto.FLOAT16)
    for graph in g.graphs(proto.graph):
        yield from (("initializer:" + t.name, t) for t in graph.initializer if t.data_type in wanted)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t") and attribute.t.data_type in wanted:
                    yield f"attribute:{node.name}:{attribute.name}", attribute.t


def _retype(proto: ModelProto, originals: dict[str, np.ndarray]) -> None:
    """fp16 becomes bf16 everywhere, with constants rounded from ``originals``."""
    bfloat16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    largest = np.float32(np.finfo(np.float32).max) * np.float32(0.498)  # two of them still add up to a finite bf16
    for key, tensor in _float_tensors(proto):
        if tensor.data_type != TensorProto.FLOAT16:
            continue
        data = originals[key] if key in originals else numpy_helper.to_array(tensor).astype(np.float32)
        finite = np.where(np.isfinite(data), np.clip(data, -largest, largest), data).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(finite.astype(bfloat16), tensor.name))
    for graph in g.graphs(proto.graph):
        for info in (*graph.input, *graph.output):
            if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
                info.type.tensor_type.elem_type = TensorProto.BFLOAT16
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.BFLOAT16


def _check(proto: ModelProto, precision: str) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # checker and inference raise types of their own
        raise TargetError(
            f"the model converted to {precision} is not correctly typed: {_first_line(error)}",
            f"export the model in {precision}, and build without --{precision}",
        ) from None


def _external_bytes(tensor: TensorProto) -> int:
    if tensor.data_location != TensorProto.EXTERNAL:
        return 0
    return int(prod(tensor.dims)) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
