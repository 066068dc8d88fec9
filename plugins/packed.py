"""Ops that read their operands in place from packed tensors: the node, and a body that takes the parts out first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import FunctionProto, NodeProto, helper, numpy_helper

from attncompile.core.layout import part, unpacked
from attncompile.plugins.body import overload_of


def packed(node: NodeProto, body: FunctionProto, layouts: Mapping[str, str]) -> tuple[NodeProto, FunctionProto]:
    """``node`` and its ``body`` with other layouts of ``output`` and of some operands, by formal names; operands may be
    packed. Of each the body takes what the given one does: a Gather of the part, a Transpose where its axes lie
    otherwise. The node's inputs stay as they are: whoever calls this puts the packed tensors there.
    """
    changed, made = NodeProto(), FunctionProto()
    changed.CopyFrom(node)
    made.CopyFrom(body)
    del made.node[:]
    last: list[NodeProto] = []
    for name, layout in layouts.items():
        attribute = next(a for a in changed.attribute if a.name == f"{name[0]}_layout")
        nodes = _taken(name, layout, attribute.s.decode())
        if name == "output" and nodes:
            inner, made.output[0] = made.output[0], f"{name}/laid"
            order = [attribute.s.decode().index(axis) for axis in layout]
            last.append(helper.make_node("Transpose", [inner], [made.output[0]], perm=order))
            nodes = []
        elif nodes:
            made.input[list(made.input).index(name)] = f"{name}/packed"
        made.node.extend(nodes)
        attribute.s = layout.encode()
    made.node.extend([*body.node, *last])
    changed.overload = made.overload = overload_of({"body": node.overload, **layouts})
    return changed, made


def _taken(name: str, layout: str, wanted: str) -> list[NodeProto]:
    """Nodes that make the value ``NAME`` in the layout ``wanted`` of ``NAME/packed``, which is in ``layout``."""
    value, found, chosen = f"{name}/packed", [], part(layout)
    if chosen is not None:
        axis, number = chosen
        index = numpy_helper.from_array(np.array(number, np.int64), f"{name}/number")
        found.append(helper.make_node("Constant", [], [index.name], name=index.name, value=index))
        found.append(helper.make_node("Gather", [value, index.name], [f"{name}/taken"], axis=axis))
        value = f"{name}/taken"
    if unpacked(layout) != wanted:
        order = [unpacked(layout).index(axis) for axis in wanted]
        found.append(helper.make_node("Transpose", [value], [f"{name}/turned"], perm=order))
    for made in found[-1:]:
        made.output[:] = [name]
    return found
