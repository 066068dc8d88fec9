"""The way of a plugin's node through TensorRT, from ONNX to the launch: what its parser and builder call, in order.

It refuses what TensorRT refuses, with ``Refused``. The order of a launch's parameters is TensorRT's: inputs, int32s,
outputs, and nothing else.
"""

from __future__ import annotations

import copy
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, shape_inference

from tests.kernels.tensorrt import native

BUILT_IN = frozenset(
    onnx.defs.get_schema(name).name for name in ("MatMul", "Softmax", "Attention", "Transpose", "Cast")
)
"""Ops that the parser has importers of its own for, by their type alone: their domain does not count."""

_TYPES = {
    TensorProto.FLOAT: native.DataType.FLOAT, TensorProto.FLOAT16: native.DataType.HALF,
    TensorProto.BFLOAT16: native.DataType.BF16, TensorProto.INT32: native.DataType.INT32,
    TensorProto.INT64: native.DataType.INT64, TensorProto.BOOL: native.DataType.BOOL,
    TensorProto.UINT8: native.DataType.UINT8, TensorProto.INT8: native.DataType.INT8,
}  # fmt: skip


_ONNX = {kind: element for element, kind in _TYPES.items()}


class Refused(Exception):
    """TensorRT would fail here."""


Size = int | str
Input = tuple[Any, Sequence[Size]]
"""Type and axes of an input of a node."""
Sizes = Mapping[str, tuple[int, int, int]]
"""Smallest, usual and largest size of each dynamic axis, by its name."""


@dataclass(frozen=True)
class Launch:
    """One tactic of one node. ``parameters`` as the bindings hand them over; sizes are names of dynamic axes."""

    node: str
    tactic: int
    name: str
    ptx: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_shapes: tuple[Any, ...]
    output_types: tuple[Any, ...]
    parameters: Mapping[str, Any]
    extras: tuple[Any, ...]

    def grid(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        x, y, z = (self.parameters[f"grid_{axis}"].at(sizes) for axis in "xyz")
        return x, y, z

    def block(self) -> tuple[int, int, int]:
        x, y, z = (self.parameters[f"block_{axis}"].at({}) for axis in "xyz")
        return x, y, z

    @property
    def shared(self) -> int:
        return int(self.parameters["shared_mem"].at({}))

    def arguments(self, sizes: Mapping[str, int]) -> list[int]:
        """The int32 arguments as the GPU gets them: wrapped."""
        return [int(np.array(e.at(sizes), np.int64).astype(np.int32)) for e in self.extras]

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Of the outputs."""
        return [tuple(axis.at(sizes) for axis in shape) for shape in self.output_shapes]


def importer(trt: Any, model: ModelProto, node: NodeProto) -> str:
    """What the parser makes of a node: ``built-in``, ``function`` or ``plugin``."""
    if node.op_type in BUILT_IN:
        return "built-in"
    functions = {(f.domain, f.name, f.overload) for f in model.functions}
    named = any(a.name == "plugin_namespace" for a in node.attribute)
    if (node.domain, node.op_type, node.overload) in functions and not (named and _creator(trt, node)[0] is not None):
        return "function"
    return "plugin"


def _creator(trt: Any, node: NodeProto, by_domain: bool = True) -> tuple[Any, str]:
    attributes = {a.name: a for a in node.attribute}
    version = attributes["plugin_version"].s.decode() if "plugin_version" in attributes else "1"
    namespace = attributes["plugin_namespace"].s.decode() if "plugin_namespace" in attributes else ""
    creator = trt.get_plugin_registry().get_creator(node.op_type, version, namespace)
    if creator is None and by_domain:
        namespace = node.domain
        creator = trt.get_plugin_registry().get_creator(node.op_type, version, namespace)
    return creator, namespace


def created(trt: Any, node: NodeProto, preferred: Any = None, by_domain: bool = True) -> Any:
    """The plugin of a node, as the parser asks its creator for it. ``by_domain``: from 10.10 on the parser looks for a
    namespace in the node's domain too. ``preferred``: the network's flag.
    """
    creator, namespace = _creator(trt, node, by_domain)
    if creator is None:
        raise Refused(f"{node.name}: Plugin not found, are the plugin name, version, and namespace correct?")
    attributes = {a.name: a for a in node.attribute}
    if any(not name for name in node.input):
        raise Refused(f"{node.name}: an input is left out")
    request = native.QuickPluginCreationRequest
    asked = preferred if preferred is not None else request.UNKNOWN
    if "aot" in attributes:
        asked = request.STRICT_AOT if attributes["aot"].i else request.STRICT_JIT
    fields = [_field(attributes[f.name]) for f in creator.field_names if f.name in attributes]
    return creator.create_plugin(
        node.op_type, namespace, native.PluginFieldCollection(fields), native.TensorRTPhase.BUILD, asked
    )


def _field(a: AttributeProto) -> native.PluginField:
    """An attribute as a field: INT is cut to int32, a text ends in a zero byte."""
    kinds = native.PluginFieldType
    if a.type == AttributeProto.FLOAT:
        return native.PluginField(a.name, np.array([a.f], np.float32), kinds.FLOAT32)
    if a.type == AttributeProto.INT:
        return native.PluginField(a.name, np.array([a.i], np.int64).astype(np.int32), kinds.INT32)
    if a.type == AttributeProto.STRING:
        return native.PluginField(a.name, a.s + b"\0", kinds.CHAR)
    if a.type == AttributeProto.FLOATS:
        return native.PluginField(a.name, np.array(a.floats, np.float32), kinds.FLOAT32)
    if a.type == AttributeProto.INTS:
        return native.PluginField(a.name, np.array(a.ints, np.int64).astype(np.int32), kinds.INT32)
    if a.type == AttributeProto.TENSOR:
        half = a.t.data_type == TensorProto.FLOAT16
        data = onnx.numpy_helper.to_array(a.t)
        return native.PluginField(a.name, data, kinds.FLOAT16 if half else kinds.FLOAT32)
    raise Refused(f"attribute {a.name} of type {a.type}")


def walk(trt: Any, model: ModelProto, sizes: Sizes, preferred: Any = None) -> dict[str, list[Launch]]:
    """All launches of every plugin of ``model``, by its node's name. Other nodes are not looked at."""
    points = [_at_sizes(model, {n: r[i] for n, r in sizes.items()}) for i in range(3)]
    named = ModelProto()
    named.CopyFrom(model)
    found: dict[str, list[Launch]] = {}
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") or importer(trt, model, node) != "plugin":
            continue
        known, known_at = _values(named), [_values(p) for p in points]
        inner = dict(sizes)
        inputs = []
        for value in node.input:
            dims = [_dims(v[value]) for v in known_at]
            symbols = _dims(known[value])
            inputs.append((_TYPES[known[value].tensor_type.elem_type], _merged(value, symbols, dims, inner)))
        found[node.name] = launches(created(trt, node, preferred), node, inputs, inner)
        first = found[node.name][0]
        # What comes after it needs the sizes that the plugin gives.
        kinds = [_ONNX[k] for k in first.output_types]
        for i, point in enumerate(points):
            shapes = first.shapes({n: r[i] for n, r in inner.items()})
            point.graph.value_info.extend(
                helper.make_tensor_value_info(v, k, s) for v, k, s in zip(node.output, kinds, shapes, strict=True)
            )
        named.graph.value_info.extend(
            helper.make_tensor_value_info(v, k, [f"{v}:{i}" for i in range(len(s))])
            for v, k, s in zip(node.output, kinds, first.output_shapes, strict=True)
        )
    return found


def _at_sizes(model: ModelProto, sizes: Mapping[str, int]) -> ModelProto:
    """A copy with these sizes of its inputs."""
    copy_ = ModelProto()
    copy_.CopyFrom(model)
    del copy_.graph.value_info[:]
    for value in copy_.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    return copy_


def _values(model: ModelProto) -> dict[str, Any]:
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    stored = {t.name: helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in graph.initializer}
    return stored | {v.name: v.type for v in (*graph.output, *graph.value_info, *graph.input)}


def _merged(value: str, symbols: list[Size], at: Sequence[list[Size]], sizes: dict[str, Any]) -> list[Size]:
    """A number where it is the same at all sizes, else a name, whose range is added to ``sizes``."""
    found: list[Size] = []
    for axis, triple in enumerate(zip(*at, strict=True)):
        assert all(isinstance(n, int) for n in triple), f"{value}: {triple}"
        symbol = symbols[axis]
        if isinstance(symbol, int) or symbol in sizes:
            found.append(symbol)
        else:
            name = f"{value}:{axis}"
            sizes[name] = triple
            found.append(name)
    return found


def _dims(value: Any) -> list[Size]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.tensor_type.shape.dim]


class _Call:
    """One call of TensorRT's into a plugin: its own expression builder, closed when it is over."""

    def __enter__(self) -> native.IExprBuilder:
        self.builder = native.IExprBuilder()
        return self.builder

    def __exit__(self, *_: object) -> None:
        self.builder.closed = True


def _expressions(builder: native.IExprBuilder, dims: Sequence[Size]) -> native.DimsExprs:
    return native.DimsExprs([builder.size(d) if isinstance(d, str) else builder.constant(d) for d in dims])


def launches(plugin: Any, node: NodeProto, inputs: Sequence[Input], sizes: Sizes) -> list[Launch]:
    """Every tactic of the plugin for the types that the network has. ``plugin`` is cloned, as the network does."""
    plugin = plugin.clone()
    types = [kind for kind, _ in inputs]
    count = plugin.get_num_outputs()
    if count != len(node.output):
        raise Refused(f"{node.name} has {len(node.output)} outputs, its plugin {count}")
    output_types = list(plugin.get_output_data_types(types, [len(dims) for _, dims in inputs]))
    with _Call() as builder:
        output_shapes = plugin.get_output_shapes([_expressions(builder, d) for _, d in inputs], [], builder)
    tensors = [_desc(kind, _at(dims, sizes)) for kind, dims in inputs]
    tensors += [_desc(kind, _evaluated(shape, sizes)) for kind, shape in zip(output_types, output_shapes, strict=True)]
    number = len(tensors)
    offered = plugin.get_supported_format_combinations(tensors, len(inputs))
    wanted = [*types, *output_types]
    found: list[Launch] = []
    for first in range(0, len(offered), number):
        combination = offered[first : first + number]
        if [c.type for c in combination] != wanted:
            continue  # strongly typed: the network's types are fixed
        for tensor, choice in zip(tensors, combination, strict=True):
            tensor.desc.type, tensor.desc.format = choice.type, choice.format
        chosen = plugin.clone()
        chosen.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
        tactics = chosen.get_valid_tactics() or [0]
        if len(tactics) > 1 and min(tactics) < 1:
            raise Refused(f"{node.name}: tactics are {sorted(tactics)}; each must be a positive integer")
        for tactic in sorted(tactics):
            found.append(_launch(copy.copy(chosen), node, inputs, tensors, output_shapes, tactic))
    if not found:
        raise Refused(f"{node.name}: no combination of the plugin has the network's types {wanted}")
    return found


class _Parameters:
    pass


class _Extras(dict[int, Any]):
    nbSymExprs = 0  # noqa: N815 - the binding's own name


def _launch(
    plugin: Any, node: NodeProto, inputs: Sequence[Input], tensors: Sequence[Any],
    output_shapes: Sequence[Any], tactic: int,
) -> Launch:  # fmt: skip
    plugin.set_tactic(tactic)
    parameters, extras = _Parameters(), _Extras()
    with _Call() as builder:
        shapes = [_expressions(builder, dims) for _, dims in inputs]
        # TensorRT hands in the same expressions as before; here they are of this call, so that stale ones are noticed.
        for desc, shape in zip(plugin.input_descs, shapes, strict=True):
            for axis, expression in enumerate(shape):
                desc.shape_expr[axis]._int_expr = expression
        plugin.get_launch_params(shapes, list(tensors), len(inputs), parameters, extras, builder)
    descs = [t.desc for t in tensors]
    name, code = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])
    if not isinstance(code, bytes):
        raise Refused(f"{node.name}: the code is {type(code).__name__}, not bytes")
    symbols = [extras[i] for i in range(extras.nbSymExprs)]
    for symbol in (*vars(parameters).values(), *symbols):
        if not isinstance(symbol, native.ISymExpr) or symbol.dtype != native.PluginArgDataType.INT32:  # type: ignore[attr-defined]
            raise Refused(f"{node.name}: a launch argument is no int32 expression")
        if not isinstance(symbol.expr, native.IDimensionExpr):  # type: ignore[attr-defined]
            raise Refused(f"{node.name}: a launch argument has no value")
    return Launch(
        node.name, tactic, name.decode() if isinstance(name, bytes) else name, code.decode(), tuple(node.input),
        tuple(node.output), tuple(output_shapes),
        tuple(d.type for d in descs[len(inputs) :]), {k: v.expr for k, v in vars(parameters).items()},
        tuple(s.expr for s in symbols),  # type: ignore[attr-defined]
    )  # fmt: skip


Bounds = tuple[list[int], list[int], list[int]]


def _at(dims: Sequence[Size], sizes: Sizes) -> Bounds:
    low, usual, high = ([sizes[d][i] if isinstance(d, str) else d for d in dims] for i in range(3))
    return low, usual, high


def _evaluated(shape: Any, sizes: Sizes) -> Bounds:
    low, usual, high = ([a.at({n: r[i] for n, r in sizes.items()}) for a in shape] for i in range(3))
    return low, usual, high


def _desc(kind: Any, bounds: Bounds) -> native.DynamicPluginTensorDesc:
    made = native.DynamicPluginTensorDesc()
    low, usual, high = bounds
    made.min, made.opt, made.max = native.Dims(low), native.Dims(usual), native.Dims(high)
    made.desc.dims = native.Dims([a if a == b == c else -1 for a, b, c in zip(low, usual, high, strict=True)])
    made.desc.type = kind
    return made


_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)")


def check_entry(launch: Launch) -> None:
    """The code must have one entry, of that name, whose parameters are exactly what TensorRT passes."""
    entries = _ENTRY.findall(launch.ptx)
    if [name for name, _ in entries] != [launch.name]:
        raise Refused(f"{launch.node}: the code has {[n for n, _ in entries]}, the plugin says {launch.name}")
    given = re.findall(r"\.param\s+\.(\w+)", entries[0][1])
    wanted = ["u64"] * len(launch.inputs) + ["u32"] * len(launch.extras) + ["u64"] * len(launch.outputs)
    if given != wanted:
        raise Refused(f"{launch.node}: the entry takes {' '.join(given)}, TensorRT passes {' '.join(wanted)}")


def assemble(launch: Launch, architecture: int, ptxas: str) -> bytes:
    """The launch's PTX in ptxas. Raises ``Refused``."""
    target = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(launch.ptx, encoding="utf-8")
        done = subprocess.run(
            [ptxas, f"--gpu-name={target}", "-o", str(out), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Refused(f"{launch.node}: ptxas for {target}: {done.stderr.strip()[:300]}")
        return out.read_bytes()
