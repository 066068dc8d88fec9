"""Sizes that detection proved and ONNX's shape inference does not see, such as heads behind a Reshape to -1."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, NodeProto

from attncompile.core.site import AttentionSite
from attncompile.kernels.calls import DOMAIN, inferred
from attncompile.passes.load import graphs

_PLACES = (
    ("q_layout", "heads", "head_dim"),
    ("k_layout", "kv_heads", "head_dim"),
    ("v_layout", "kv_heads", "value_dim"),
)


def with_site_sizes(proto: ModelProto, sites: Sequence[AttentionSite]) -> ModelProto:
    """A copy whose values are described, numbers of heads and head dims of the nodes of ``sites`` included. A node is
    known by its name, ``<op>/<site's id>``. The ops' schemas must be known to onnx. Raises ``BadModel``.
    """
    known = {site.id: site for site in sites}
    result = inferred(proto)
    described = {
        value.name: value for graph in graphs(result) for value in (*graph.input, *graph.output, *graph.value_info)
    }
    for graph in graphs(result):
        for node in graph.node:
            site = known.get(node.name.rpartition("/")[2])
            if node.domain != DOMAIN or site is None:
                continue
            for value, (attribute, heads, dim) in zip(node.input, _PLACES, strict=False):
                layout = _layout(node, attribute)
                shape = described[value].type.tensor_type.shape if value in described else None
                if shape is None or len(shape.dim) != len(layout):
                    continue
                for axis, size in (("H", getattr(site, heads)), ("D", getattr(site, dim))):
                    if not shape.dim[layout.index(axis)].HasField("dim_value"):
                        shape.dim[layout.index(axis)].dim_value = size
    return result


def _layout(node: NodeProto, name: str) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == name and a.s), "BNHD")
