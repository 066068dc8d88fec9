"""A scale for each head (cosine attention, SwinV2): it goes into the query, in a node of its own before the op."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.site import AttentionSite
from attncompile.plugins.body import float_type


def scaled_query(site: AttentionSite) -> tuple[tuple[NodeProto, ...], str, tuple[TensorProto, ...]]:
    """(nodes, the name of the query that the op reads, initializers). Without a scale: no node, the site's query.

    ``site.head_scale`` holds one number a head in some shape; scores are products of the query, so that it may be
    multiplied by it as well. It is rounded to the query's type.
    """
    if not site.head_scale:
        return (), site.query.value, ()
    name = f"head_scale/{site.id or site.output.value}"
    spread = [site.heads, 1] if site.query.layout == "BNHD" else [site.heads, 1, 1]
    shape = numpy_helper.from_array(np.array(spread, np.int64), f"{name}/shape")
    nodes = (
        helper.make_node("Reshape", [site.head_scale, shape.name], [f"{name}/spread"]),
        helper.make_node("Cast", [f"{name}/spread"], [f"{name}/cast"], to=float_type(site.dtype)[0]),
        helper.make_node("Mul", [site.query.value, f"{name}/cast"], [f"{name}/query"]),
    )
    return nodes, f"{name}/query", (shape,)
