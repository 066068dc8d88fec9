"""Padding that an input says for tokens [batch, keys]: brought to what an op takes, and rows that are set to zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.mechanism import Lowering
from attncompile.core.site import AttentionSite, Operand
from attncompile.plugins.body import float_type


def around(site: AttentionSite, lower: Callable[[AttentionSite], Lowering]) -> Lowering:
    """``lower`` of a site whose padding is a bool [batch, 1, 1, keys], with a Cast and a Reshape before it; and where
    the source gives zero for queries that are hidden themselves, a Where behind it. Any other site as it is.
    """
    part = next((p for p in site.mask.parts if p.tokens), None)
    if part is None or part.source is None:
        return lower(site)
    # By the site's id: constants lie in the main graph, and sites in bodies beside one another may call values alike.
    name = f"tokens/{site.id or site.output.value}"
    visible = f"{name}/keys"
    parts = tuple(replace(p, source=visible, tokens=False) if p is part else p for p in site.mask.parts)
    output = Operand(f"{name}/attended", site.output.layout) if site.mask.zeroed else site.output
    made = lower(replace(site, mask=replace(site.mask, parts=parts, zeroed=False), output=output))
    stored = [numpy_helper.from_array(np.array([0, 1, 1, -1]), f"{name}/keys_shape")]
    before = [
        helper.make_node("Cast", [part.source], [name], name=name, to=TensorProto.BOOL),
        _node("Reshape", [name, f"{name}/keys_shape"], visible),
    ]
    after: list[NodeProto] = []
    if site.mask.zeroed:
        rows = [0, -1, 1, 1] if site.output.layout == "BNHD" else [0, 1, -1, 1]
        stored += [numpy_helper.from_array(np.array(rows), f"{name}/rows_shape"),
                   numpy_helper.from_array(np.array(0, float_type(site.dtype)[1]), f"{name}/zero")]  # fmt: skip
        after = [
            _node("Reshape", [name, f"{name}/rows_shape"], f"{name}/rows"),
            _node("Where", [f"{name}/rows", output.value, f"{name}/zero"], site.output.value),
        ]
    return Lowering((*before, *made.nodes, *after), made.functions, (*made.initializers, *stored))


def _node(kind: str, inputs: list[str], output: str) -> NodeProto:
    return helper.make_node(kind, inputs, [output], name=output)
