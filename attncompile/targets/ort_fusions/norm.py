"""Norms: an RMS norm that was written out, what scales and shifts a layer norm, and casts around one.

What an export computes in float32 between casts from and to fp16 is given to one fp16 op, whose kernel computes in
float32 inside. Scales that are computed at run time are rounded to fp16 by that; constants must be fp16 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from attncompile.targets.ort_fusions.view import KINDS, Dims, View, attribute

_HALF = TensorProto.FLOAT16
_LARGEST_EPSILON = 1e-2


def rms_norm(view: View) -> int:
    """``x / sqrt(mean(x^2) + e) * w`` as ``SimplifiedLayerNormalization``."""
    done = 0
    for mean in view.nodes("ReduceMean"):
        x = _squared(view, mean.input[0])
        shape = view.shape(x) if x else None
        if x is None or not shape or not _over_last(view, mean, len(shape)):
            continue
        found = _normalised(view, mean.output[0], x)
        if found is None:
            continue
        y, epsilon = found
        if _weighted(view, x, y, shape, epsilon):
            done += 1
    return done


def _squared(view: View, value: str) -> str | None:
    node = view.maker(value, "Pow", "Mul")
    if node is None:
        return None
    square = view.scalar(node.input[1]) == 2.0 if node.op_type == "Pow" else node.input[0] == node.input[1]
    return str(node.input[0]) if square else None


def _over_last(view: View, node: NodeProto, rank: int) -> bool:
    axes: Sequence[int] | None = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1:
        known = view.constant(node.input[1])
        axes = None if known is None else known.reshape(-1).tolist()
    return axes is not None and list(axes) in ([-1], [rank - 1]) and attribute(node, "keepdims", 1) == 1


def _normalised(view: View, mean: str, x: str) -> tuple[str, float] | None:
    """``x / sqrt(mean + epsilon)`` and epsilon."""
    add = view.only(mean, "Add")
    if add is None:
        return None
    epsilon = next((e for a, b in view.sides(add) if a == mean and (e := view.scalar(b)) is not None), None)
    root = view.only(add.output[0], "Sqrt")
    if epsilon is None or not 0 < epsilon <= _LARGEST_EPSILON or root is None:
        return None
    factor, operands = _cast_back(view, root.output[0], x)
    last = view.only(factor, "Reciprocal", "Div")
    if last is not None and last.op_type == "Div" and last.input[0] in operands and last.input[1] == factor:
        return last.output[0], epsilon
    if last is None or factor != root.output[0] or (last.op_type == "Div" and view.scalar(last.input[0]) != 1.0):
        return None
    factor, operands = _cast_back(view, last.output[0], x)
    product = view.only(factor, "Mul")
    if product is None or not any(set(product.input) == {o, factor} for o in operands):
        return None
    return product.output[0], epsilon


def _cast_back(view: View, factor: str, x: str) -> tuple[str, tuple[str, ...]]:
    """``factor`` and what it may scale: ``x``, or, where it is cast to fp16, what ``x`` was cast from."""
    cast, half = view.only(factor, "Cast"), view.uncast(x)
    if cast is not None and half is not None and view.kind(cast.output[0]) == _HALF:
        return cast.output[0], (half,)
    return factor, (x,)


def _weighted(view: View, x: str, y: str, shape: Dims, epsilon: float) -> bool:
    """Replaces ``y`` times its weight, in fp16 if it goes from fp16 to fp16."""
    half, width = view.uncast(x), shape[-1]
    reader = view.only(y, "Cast", "Mul")
    if reader is None:
        return False
    if view.kind(y) == _HALF:  # what a conversion to fp16 leaves of one: only the factor is computed in float32
        weight = next((w for a, w in view.sides(reader) if a == y), "") if reader.op_type == "Mul" else ""
        half = x if view.kind(x) == _HALF else half  # all of it in fp16, where the op's own sum is in float32
        if half is None or view.shape(weight) != (width,) or view.kind(weight) != _HALF:
            return False
        return _simplified(view, half, weight, reader.output[0], epsilon)
    if reader.op_type == "Cast":  # to fp16, then weighted
        product = view.only(reader.output[0], "Mul")
        if product is None or half is None or view.kind(reader.output[0]) != _HALF:
            return False
        weight = next((w for a, w in view.sides(product) if a == reader.output[0]), "")
        if view.shape(weight) != (width,) or view.kind(weight) != _HALF:
            return False
        return _simplified(view, half, weight, product.output[0], epsilon)
    weight = next((w for a, w in view.sides(reader) if a == y), "")
    if view.shape(weight) != (width,):
        return False
    cast = view.only(reader.output[0], "Cast")
    if half is not None and cast is not None and view.kind(cast.output[0]) == _HALF:
        narrow = _narrow(view, weight, (width,))
        return narrow is not None and _simplified(view, half, narrow, cast.output[0], epsilon)
    if view.kind(x) != view.kind(weight) or view.kind(x) not in KINDS:
        return False
    return _simplified(view, x, weight, reader.output[0], epsilon)


def _simplified(view: View, x: str, weight: str, y: str, epsilon: float) -> bool:
    view.put("SimplifiedLayerNormalization", [x, weight], [y], axis=-1, epsilon=epsilon, stash_type=1)
    return True


def _narrow(view: View, value: str, shape: Dims) -> str | None:
    """``value`` of this shape in fp16; None for a constant that is none of its numbers, or one of another shape."""
    if view.shape(value) != shape:
        return None
    if view.kind(value) == _HALF:
        return value
    if not view.is_constant(value):
        return view.node("Cast", [value], _HALF, shape, to=_HALF)
    known = view.constant(value)
    if known is None:
        return None
    with np.errstate(over="ignore"):
        rounded = known.astype(np.float16)
    exact = bool((rounded.astype(known.dtype) == known).all())
    return view.tensor(f"{value}/fp16", rounded) if exact else None


def modulated(view: View) -> int:
    """``norm(x) * scale + shift``, both [1, 1, C], as the norm's own scale and shift."""
    done = 0
    for node in view.nodes("LayerNormalization"):
        shape = view.shape(node.input[0])
        if not shape or not last_axis(node, len(shape)) or not _plain(view, node):
            continue
        product = view.only(node.output[0], "Mul")
        total = view.only(product.output[0], "Add") if product is not None else None
        if product is None or total is None:
            continue
        kind, width = view.kind(node.input[0]), shape[-1]
        scale = next((b for a, b in view.sides(product) if a == node.output[0]), "")
        shift = next((b for a, b in view.sides(total) if a == product.output[0]), "")
        if all(one_row(view, v, len(shape), width) and view.kind(v) == kind for v in (scale, shift)):
            inputs = [node.input[0], view.flat(scale, width), view.flat(shift, width)]
            view.put("LayerNormalization", inputs, [total.output[0]], axis=-1, epsilon=attribute(node, "epsilon", 1e-5))
            done += 1
    return done


def last_axis(node: NodeProto, rank: int) -> bool:
    """Whether a ``LayerNormalization`` is over the last axis, in float32 inside, and has no output but the first."""
    ok = attribute(node, "axis", -1) in (-1, rank - 1) and attribute(node, "stash_type", 1) == 1
    return ok and not any(node.output[1:])


def _plain(view: View, node: NodeProto) -> bool:
    """Whether it neither scales nor shifts."""
    scale = view.constant(node.input[1])
    shift = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    return scale is not None and shift is not None and bool((scale == 1).all() and (shift == 0).all())


def one_row(view: View, value: str, rank: int, width: int | str) -> bool:
    """Whether ``value`` has one row of ``width``, and does not raise the rank of what it is multiplied with."""
    shape = view.shape(value)
    return bool(shape) and len(shape) <= rank and shape[-1] == width and all(d == 1 for d in shape[:-1])  # type: ignore[index, arg-type]


def narrow_norm(view: View) -> int:
    """A layer norm between a cast from fp16 and one back, as one in fp16."""
    done = 0
    for node in view.nodes("LayerNormalization"):
        half, shape = view.uncast(node.input[0]), view.shape(node.input[0])
        cast = view.only(node.output[0], "Cast")
        if half is None or not shape or cast is None or not last_axis(node, len(shape)):
            continue
        if view.kind(cast.output[0]) != _HALF:
            continue
        rows = [_narrow(view, v, (shape[-1],)) for v in node.input[1:] if v]
        if all(r is not None for r in rows):
            view.put("LayerNormalization", [half, *(r for r in rows if r)], [cast.output[0]], axis=-1,
                     epsilon=attribute(node, "epsilon", 1e-5))  # fmt: skip
            done += 1
    return done


def gated_residual(view: View) -> int:
    """``x + y * gate`` in float32 between casts from fp16 and back, the gate [1, 1, C], in fp16."""
    done = 0
    for total in view.nodes("Add"):
        cast = view.only(total.output[0], "Cast")
        if cast is None or view.kind(total.output[0]) != TensorProto.FLOAT or view.kind(cast.output[0]) != _HALF:
            continue
        for left, right in view.sides(total):
            x, product = view.uncast(left), view.maker(right, "Mul")
            if x is None or product is None or view.only(right) is not total:
                continue
            shape = view.shape(x)
            if shape and _gated(view, x, product, cast.output[0], shape):
                done += 1
                break
    return done


def _gated(view: View, x: str, product: NodeProto, out: str, shape: Dims) -> bool:
    for wide, gate in view.sides(product):
        y = view.uncast(wide)
        if y is None or view.shape(y) != shape or not one_row(view, gate, len(shape), shape[-1]):
            continue
        narrow = _narrow(view, gate, view.shape(gate) or ())
        if narrow is None:
            continue
        view.put("Add", [x, view.node("Mul", [y, narrow], _HALF, shape)], [out])
        return True
    return False
