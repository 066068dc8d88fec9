"""Pieces that all bodies of linear attention share: layouts, element types, feature maps, normalisers."""

from __future__ import annotations

from math import isfinite

import numpy as np

from attncompile.core.site import Layout
from attncompile.plugins.body import Body, float_type
from attncompile.plugins.linear_attention.form import Form, Sizes

_PERMUTATION: dict[tuple[str, str], list[int]] = {
    (a, b): [a.index(x) for x in b] for a in ("BNHD", "BHND", "BHDN") for b in ("BNHD", "BHND", "BHDN")
}


def laid(body: Body, value: str, layout: str, wanted: Layout) -> str:
    """``value`` in another layout. A transpose of the last two axes before a product costs nothing in ONNX Runtime."""
    return value if layout == wanted else body.op("Transpose", value, perm=_PERMUTATION[layout, wanted])


def widened(body: Body, value: str, kind: str, wide: str) -> str:
    """``value`` of element type ``kind`` in the type ``wide``."""
    return value if float_type(kind)[0] == float_type(wide)[0] else body.op("Cast", value, to=float_type(wide)[0])


def number(body: Body, sizes: Sizes, value: float) -> str:
    """A constant in the states' type."""
    return body.constant(np.array(value, float_type(sizes.state_type)[1]))


def mapped(body: Body, sizes: Sizes, value: str, kind: str, axis: int, weight: str = "") -> str:
    """Features of ``value``, which is in the states' type; ``axis``: that of its channels. Hedgehog's map wants
    [B, H, N, D].
    """
    if kind == "relu":
        return body.op("Relu", value)
    if kind == "elu+1":
        # Elu(x) + 1 would lose the small features of very negative numbers.
        low = body.op("Exp", body.op("Min", value, number(body, sizes, 0.0)))
        return body.op("Add", body.op("Relu", value), low)
    if kind == "exp":
        return body.op("Exp", value)
    if kind == "softmax":
        return body.op("Softmax", value, axis=axis)
    if kind == "hedgehog":
        inner = body.op("MatMul", value, weight)
        return body.op("Concat", body.op("Exp", inner), body.op("Exp", body.op("Neg", inner)), axis=-1)
    return value


def divided(body: Body, form: Form, sizes: Sizes, found: str, total: str) -> str:
    """``found`` over what the sums ``total`` say; the scale is in ``found``."""
    if form.epsilon:
        total = body.op("Add", total, number(body, sizes, form.epsilon))
    if isfinite(form.floor):
        total = body.op("Max", total, number(body, sizes, form.floor))
    return body.op("Div", found, total)


def ended(body: Body, sizes: Sizes, value: str) -> str:
    """The result in the operands' type."""
    return widened(body, value, sizes.state_type, sizes.dtype)


def column(body: Body, value: str) -> str:
    return body.op("Unsqueeze", value, body.ints(-1))
