"""Attention sinks: a logit for each head that joins the softmax's denominator (gpt-oss, arXiv:2508.10925).

A sink is one more key that every query sees, with the value 0. Its logit rides in one more channel: queries carry it
there, the sink's key is 1 there and 0 elsewhere, other keys are 0 there. So it costs one key and one channel, and the
scores, by far the largest values, are not copied.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attncompile.core.site import Layout
from attncompile.plugins.body import Body, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call


def joined(body: Body, call: Call, query: str, key: str, value: str, sinks: str) -> tuple[Call, tuple[str, str, str]]:
    """Operands with a sink behind the last key, and the call that they are for: query scaled, in its layout and with
    D + 1 channels; key [B, G, Nk + 1, D + 1] and value [B, G, Nk + 1, Dv].
    """
    element, numpy_type = float_type(call.dtype)
    layout, wide = call.layouts[0], call.head_dim + 1
    shape = [-1 if axis == "H" else 1 for axis in layout]
    logits = body.op("Reshape", body.op("Cast", sinks, to=element), body.ints(*shape))
    scaled = parts.scaled(body, call, query)
    sizes = body.op("Concat", body.op("Shape", query, start=0, end=3), body.ints(1), axis=0)
    query = body.op("Concat", scaled, body.op("Expand", logits, sizes), axis=3)

    key, value = (parts.heads_first(body, x, y) for x, y in ((key, call.layouts[1]), (value, call.layouts[2])))
    last = np.zeros((1, 1, 1, wide), numpy_type)
    last[..., -1] = 1
    sizes = body.op("Concat", body.op("Shape", key, start=0, end=1), body.ints(call.kv_heads, 1, wide), axis=0)
    row = body.op("Expand", body.constant(last), sizes)
    key = body.op("Concat", body.op("Pad", key, body.ints(0, 0, 0, 0, 0, 0, 0, 1)), row, axis=2)
    value = body.op("Pad", value, body.ints(0, 0, 0, 0, 0, 0, 1, 0))
    layouts: tuple[Layout, Layout, Layout, Layout] = (layout, "BHND", "BHND", call.layouts[3])
    return replace(call, scale=1.0, head_dim=wide, layouts=layouts), (query, key, value)


def seen(body: Body, mask: str, rank: int) -> str:
    """An additive mask [.., keys] with the sink, which nothing hides, behind its keys."""
    return body.op("Pad", mask, body.ints(*[0] * (2 * rank - 1), 1))
