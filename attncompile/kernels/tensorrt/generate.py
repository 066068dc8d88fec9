"""From the nodes of a model and their kernels to plugins, and to the model in which those plugins are nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnx import ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, defs, helper, shape_inference

from attncompile.core.errors import AttncompileError, KernelError, Unsupported
from attncompile.core.verdict import Verdict
from attncompile.kernels.calls import DOMAIN
from attncompile.kernels.entry import Compiled, Entry
from attncompile.kernels.expressions import parse, symbols_of
from attncompile.kernels.records import NodeCall
from attncompile.kernels.symbols import OF_THE_DEVICE
from attncompile.kernels.tensorrt.plugin import NAMESPACE, VERSION, Plugin, PluginTensor

ELEMENTS = {
    "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT,
    "bool": TensorProto.BOOL, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}  # fmt: skip
"""Element types of kernels' arguments, as ONNX numbers them."""


@dataclass(frozen=True, slots=True)
class Generated:
    """``plugins`` by name, ``nodes`` (by name) that become one of them, and why ``others`` do not."""

    plugins: Mapping[str, Plugin]
    nodes: Mapping[str, Plugin]
    others: Mapping[str, Verdict] = field(default_factory=dict)


def generate(
    model: ModelProto, nodes: Sequence[NodeCall], kernels_of: Callable[[NodeCall], Sequence[Compiled]]
) -> Generated:
    """A plugin for each node of ``nodes`` (of ``calls.find``) that ``kernels_of`` has kernels for, best first.

    Nodes of ``model`` have names of their own. Kernels with tensor maps, or with hidden parameters, are left out:
    TensorRT passes neither. Nodes inside of branches and loops stay: plugins are made in the main graph only.
    """
    inferred = shape_inference.infer_shapes(model)
    by_name = {n.name: n for n in inferred.graph.node}
    values = _values(inferred)
    plugins: dict[str, Plugin] = {}
    found: dict[str, Plugin] = {}
    others: dict[str, Verdict] = {}
    for node in nodes:
        try:
            if node.call is None or node.symbols is None:
                others[node.name] = node.verdict
                continue
            if node.scope:
                raise Unsupported("scope", f"it is inside of {node.scope}", "plugins are made in the main graph only")
            made = _plugin(by_name[node.name], node, values, kernels_of(node), model)
        except Unsupported as error:
            others[node.name] = Verdict.of(error)
            continue
        plugins[made.name] = found[node.name] = made
    return Generated(plugins, found, others)


def _values(model: ModelProto) -> dict[str, TypeProto]:
    found = {t.name: helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in model.graph.initializer}
    infos: list[ValueInfoProto] = [*model.graph.value_info, *model.graph.output, *model.graph.input]
    return found | {v.name: v.type for v in infos}


def _plugin(
    node: NodeProto, asked: NodeCall, values: Mapping[str, TypeProto], kernels: Sequence[Compiled], model: ModelProto
) -> Plugin:
    suitable = [k for k in kernels if k.entry.abi == "plain" and not k.entry.hidden]
    if not suitable:
        raise Unsupported("no-kernel", f"no kernel of {asked.op} suits TensorRT on this GPU")
    schema = defs.get_schema(node.op_type, 1, DOMAIN)
    given = {schema.inputs[i].name: values[v] for i, v in enumerate(node.input) if v}
    inputs = tuple(_named(a.name, a.type, given) for a in _tensors(suitable, "input"))
    sizes = {f"{t.name}[{i}]" for t in inputs for i in range(len(t.axes))}
    assert asked.symbols is not None
    _check_symbols(asked.symbols, sizes, suitable)
    outputs = _outputs(node, schema, given, _tensors(suitable, "output"), model, sizes)
    used = _used(suitable)
    table = {name: text for name, text in sorted(asked.symbols.items()) if name in used}
    return Plugin(asked.op, inputs, outputs, table, tuple(k.id for k in suitable))


def _tensors(kernels: Sequence[Compiled], kind: str) -> list[PluginTensor]:
    """Inputs or outputs as all of the kernels take them, without axes. Raises ``KernelError`` if they differ."""
    lists = [[PluginTensor(a.name, a.type, ()) for a in k.entry.arguments if a.kind == kind] for k in kernels]
    for kernel, found in zip(kernels, lists, strict=True):
        if found != lists[0]:
            raise KernelError(
                f"{kernel.entry.op} {kernel.entry.tactic} takes other {kind}s than the call's best tactic"
            )
        _check_order(kernel.entry)
    return lists[0]


def _check_order(entry: Entry) -> None:
    """TensorRT passes inputs, then int32s, then outputs."""
    order = ["input", "int32", "output"]
    kinds = [order.index(a.kind) for a in entry.arguments]
    if kinds != sorted(kinds):
        raise KernelError(f"{entry.op} {entry.tactic}: its arguments are not inputs, int32s, outputs in this order")


def _named(name: str, kind: str, given: Mapping[str, TypeProto]) -> PluginTensor:
    if name not in given:
        raise Unsupported("inputs", f"the kernel reads {name}, which the node does not have")
    _check_type(name, kind, given[name].tensor_type.elem_type)
    return PluginTensor(name, kind, _axes(name, given[name]))


def _check_type(name: str, kind: str, found: int) -> None:
    if found != ELEMENTS[kind]:
        element = TensorProto.DataType.Name(found).lower()
        raise Unsupported("dtype", f"the kernel has {name} in {kind}, the node in {element}")


def _axes(name: str, given: TypeProto) -> tuple[str, ...]:
    """The size of every axis: a number, or the input's own symbol."""
    if not given.tensor_type.HasField("shape"):
        raise Unsupported("shapes", f"the number of axes of {name} is not known")
    dims = given.tensor_type.shape.dim
    return tuple(str(d.dim_value) if d.HasField("dim_value") else f"{name}[{i}]" for i, d in enumerate(dims))


def _outputs(
    node: NodeProto, schema: defs.OpSchema, given: Mapping[str, TypeProto], wanted: Sequence[PluginTensor],
    model: ModelProto, sizes: set[str],
) -> tuple[PluginTensor, ...]:  # fmt: skip
    """Types and axes as the op's own inference gives them for inputs whose sizes are symbols. An axis that is no copy
    of one has a ``dim_param`` that is an expression over them.
    """
    symbolic = {}
    for i, value in enumerate(node.input):
        if value:
            name = schema.inputs[i].name
            axes = [int(a) if a.isdecimal() else a for a in _axes(name, given[name])]
            symbolic[value] = helper.make_tensor_type_proto(given[name].tensor_type.elem_type, axes)
    types = shape_inference.infer_node_outputs(schema, node, symbolic, opset_imports=list(model.opset_import))
    names = {schema.outputs[i].name: v for i, v in enumerate(node.output) if v}
    if set(names) != {t.name for t in wanted}:
        raise Unsupported("outputs", f"the kernel writes {', '.join(t.name for t in wanted)}, not {', '.join(names)}")
    return tuple(_output(t, types[names[t.name]], sizes) for t in wanted)


def _output(wanted: PluginTensor, given: TypeProto, sizes: set[str]) -> PluginTensor:
    tensor = given.tensor_type
    _check_type(wanted.name, wanted.type, tensor.elem_type)
    axes = []
    for i, dim in enumerate(tensor.shape.dim):
        text = str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param
        try:
            known = bool(text) and set(symbols_of(parse(text))) <= sizes
        except AttncompileError:
            known = False
        if not known:
            raise Unsupported("shapes", f"axis {i} of {wanted.name} is not known from the sizes of the inputs")
        axes.append(text)
    return replace(wanted, axes=tuple(axes))


def _used(kernels: Sequence[Compiled]) -> set[str]:
    """Symbols that the launches of ``kernels`` need."""
    texts = [t for k in kernels for t in (*k.entry.grid, *(a.expression for a in k.entry.arguments if a.expression))]
    return {s for text in texts for s in symbols_of(parse(text))}


def _check_symbols(table: Mapping[str, str], sizes: set[str], kernels: Sequence[Compiled]) -> None:
    for name in sorted(_used(kernels)):
        if name in OF_THE_DEVICE:
            continue
        if name not in table:
            raise KernelError(f"the kernel's symbol {name} is not in the node's table", "this is a bug: report it")
        unknown = set(symbols_of(parse(table[name]))) - sizes
        if unknown:
            raise Unsupported("shapes", f"{name} needs {', '.join(sorted(unknown))}, an input that the kernel ignores")


def rewritten(model: ModelProto, made: Generated) -> ModelProto:
    """A copy of ``model`` with the plugins' nodes in place of ours, and without function bodies that nobody calls.

    ``plugin_namespace`` is written although the domain says the same: the parser looks for a plugin before it looks at
    functions only where it is there. ``aot`` asks for the ahead-of-time form or an error.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        plugin = made.nodes.get(node.name)
        if plugin is None or node.domain != DOMAIN:
            continue
        schema = defs.get_schema(node.op_type, 1, DOMAIN)
        inputs = {schema.inputs[i].name: v for i, v in enumerate(node.input) if v}
        outputs = {schema.outputs[i].name: v for i, v in enumerate(node.output) if v}
        replacement = helper.make_node(
            plugin.name, [inputs[t.name] for t in plugin.inputs], [outputs[t.name] for t in plugin.outputs],
            name=node.name, domain=NAMESPACE, plugin_namespace=NAMESPACE, plugin_version=VERSION, aot=1,
        )  # fmt: skip
        node.CopyFrom(replacement)
    without_uncalled(copy)
    return copy


def without_uncalled(model: ModelProto) -> None:
    """Remove functions that neither the graph nor another function calls, in place."""
    while True:
        called = {(n.domain, n.op_type, n.overload) for n in _nodes(model)}
        kept = [f for f in model.functions if (f.domain, f.name, f.overload) in called]
        if len(kept) == len(model.functions):
            return
        functions = [type(f).FromString(f.SerializeToString()) for f in kept]
        del model.functions[:]
        model.functions.extend(functions)


def _nodes(model: ModelProto) -> list[NodeProto]:
    found: list[NodeProto] = []
    pending = [list(model.graph.node), *(list(f.node) for f in model.functions)]
    while pending:
        for node in pending.pop():
            found.append(node)
            pending += [list(a.g.node) for a in node.attribute if a.HasField("g")]
            pending += [list(inner.node) for a in node.attribute for inner in a.graphs]
    return found
