"""The tensors of one node as a runtime sees them: which there are, what sizes outputs get, what sizes inputs must have.

Output sizes come from the op's own shape inference: every size that is not known is given a name such as ``query[1]``,
and the inference carries it to the output. So a new op needs nothing here, unless its inputs' sizes are to be checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto, ValueInfoProto, defs, helper

from attncompile.core.errors import Unsupported
from attncompile.core.layout import part
from attncompile.kernels.expressions import BadExpression, parse, symbols_of
from attncompile.kernels.symbols import BROADCAST, OPERANDS, Layout, Sizes

_OF_OPERANDS: Mapping[str, Mapping[str, str]] = {
    "query": {"B": "B", "N": "NQ", "H": "H", "D": "D"}, "key": {"B": "B", "N": "NK", "H": "HKV", "D": "D"},
    "value": {"B": "B", "N": "NK", "H": "HKV", "D": "DV"},
}  # fmt: skip
_OF_BROADCAST = {"B": "B?", "H": "H?", "Q": "NQ?", "K": "NK?", "-": "1"}
_OF_OTHERS: Mapping[str, tuple[str, ...]] = {
    "state": ("B", "HKV", "C", "D", "DV"), "total": ("B", "HKV", "C", "D"), "top": ("B", "HKV", "C", "D"),
    "mean": ("B", "HKV", "C", "DV"), "initial_state": ("B", "HKV", "D", "DV"), "initial_total": ("B", "HKV", "D"),
    "key_weight": ("B", "NK", "HKV"), "beta": ("B", "NK", "HKV?"),
    "scores": ("B", "H", "T", "C"),
}  # fmt: skip
_LOG_DECAY = {1: ("HKV",), 3: ("B", "NK", "HKV"), 4: ("B", "NK", "HKV", "D")}
"""By the number of its axes."""
MAY_BE_ONE = "?"
"""Behind a size that may also be 1."""


@dataclass(frozen=True, slots=True)
class NodeTensors:
    """``inputs`` and ``outputs``: formal names by position, empty where the node has none. ``output_sizes`` are
    expressions over sizes of inputs, ``input_sizes`` over the node's symbols; inputs that are not in there are not
    checked.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_sizes: Mapping[str, tuple[str, ...]]
    input_sizes: Mapping[str, tuple[str, ...]]


def of_node(
    node: NodeProto, schema: defs.OpSchema, types: Mapping[str, int], shapes: Mapping[str, Sizes],
    layouts: Mapping[str, Layout], opset: int,
) -> NodeTensors:  # fmt: skip
    """``types`` (ONNX's numbers) and ``shapes`` of the inputs that are there, by formal name.

    Raises:
        Unsupported: the op's inference does not say the sizes of an output.
    """
    inputs = tuple(schema.inputs[i].name if value else "" for i, value in enumerate(node.input))
    outputs = tuple(schema.outputs[i].name if value else "" for i, value in enumerate(node.output))
    sizes = _inferred(node, inputs, outputs, types, shapes, opset)
    said = {a.name: a.i for a in node.attribute}
    expected = _expected(shapes, layouts, said.get("block", 0), said.get("tile", 64))
    return NodeTensors(inputs, outputs, sizes, expected)


def _inferred(
    node: NodeProto, inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, int],
    shapes: Mapping[str, Sizes], opset: int,
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    alone = NodeProto()
    alone.CopyFrom(node)
    alone.overload = ""
    del alone.input[:], alone.output[:]
    alone.input.extend(inputs)
    alone.output.extend(outputs)
    values = [
        helper.make_tensor_value_info(
            name, types[name], [f"{name}[{i}]" if size is None else size for i, size in enumerate(shapes[name])]
        )
        for name in inputs if name
    ]  # fmt: skip
    graph = helper.make_graph([alone], "node", values, [ValueInfoProto(name=name) for name in outputs if name])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(node.domain, 1)]
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports))
    known = {f"{name}[{i}]" for name in inputs if name for i in range(len(shapes[name]))}
    return {value.name: _sizes(value, known) for value in model.graph.output}


def _sizes(value: ValueInfoProto, known: set[str]) -> tuple[str, ...]:
    tensor = value.type.tensor_type
    found = []
    for dim in tensor.shape.dim if tensor.HasField("shape") else ():
        said = str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param
        try:
            fine = bool(said) and set(symbols_of(parse(said))) <= known
        except BadExpression:
            fine = False
        if not fine:
            break
        found.append(said)
    else:
        if tensor.HasField("shape"):
            return tuple(found)
    raise Unsupported("output-sizes", f"the sizes of {value.name} do not follow from those of the inputs")


def _parts(name: str, sizes: Sizes, chosen: tuple[int, int]) -> str:
    """How many parts a packed operand must have."""
    axis, number = chosen
    count = sizes[axis]
    if count is None or count <= number:
        raise Unsupported("parts", f"{name} is part {number} of {count or 'an unknown number'}")
    return str(count)


def _expected(
    shapes: Mapping[str, Sizes], layouts: Mapping[str, Layout], block: int, tile: int
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    """``block``: edge of the blocks that the input ``rows`` lists; ``tile``: tokens of one that ``solved`` holds."""
    found = {}
    for name in OPERANDS[:3]:
        axes, chosen = dict(_OF_OPERANDS[name]), part(layouts[name])
        if chosen is not None and name in shapes:
            axes[layouts[name][chosen[0]]] = _parts(name, shapes[name], chosen)
        if set(layouts[name]) <= set(axes):
            found[name] = tuple(axes[axis] for axis in layouts[name])
    for name, axes_of in BROADCAST.items():
        if name in shapes and "*" not in axes_of:
            found[name] = tuple(_OF_BROADCAST[axis] for axis in axes_of[len(axes_of) - len(shapes[name]) :])
    if "rows" in shapes:
        found["rows"] = ("B?", "H?", f"cdiv(NQ, {block})", "3")
    if "solved" in shapes:
        found["solved"] = ("B", "HKV", f"cdiv(NK, {tile})", str(tile), str(tile))
    found |= {name: sizes for name, sizes in _OF_OTHERS.items() if name in shapes}
    if "state" in shapes and "key" in shapes:
        found["state"] = ("B", "HKV", "cdiv(NK, chunk)", "D", "DV")
    width = shapes["feature_weight"][2] if "feature_weight" in shapes else None
    if width is not None:  # [heads, D, W]: twice as many features as it is wide
        found["feature_weight"] = ("H" if "query" in shapes else "HKV", "D", str(width))
        for name in {"state", "total"} & set(found):
            found[name] = tuple(str(2 * width) if x == "D" else x for x in found[name])
    if "log_decay" in shapes and len(shapes["log_decay"]) in _LOG_DECAY:
        found["log_decay"] = _LOG_DECAY[len(shapes["log_decay"])]
    return found
