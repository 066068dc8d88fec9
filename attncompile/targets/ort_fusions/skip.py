"""A residual sum, and a bias before it, inside of the norm that follows; the sum stays to be had as an output."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from attncompile.targets.ort_fusions.norm import last_axis, one_row
from attncompile.targets.ort_fusions.view import CONTRIB, Dims, View, attribute

SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def skip_norm(view: View) -> int:
    """``norm(a + b)`` as ``SkipLayerNormalization`` or ``SkipSimplifiedLayerNormalization``; in bf16 it stays.

    In fp16 ONNX Runtime's CUDA kernels of these added up squares in fp16 before 1.27 (its pull request 28682), unless
    the provider's option ``enable_skip_layer_norm_strict_mode`` is set: rows of a few hundred are infinite there. A
    model with such norms says so, and the library of kernels refuses it there.
    """
    done, kinds = 0, (TensorProto.FLOAT, TensorProto.FLOAT16) if view.half_norms else (TensorProto.FLOAT,)
    for node in view.nodes("LayerNormalization", "SimplifiedLayerNormalization"):
        x = node.input[0]
        total, shape, kind = view.maker(x, "Add"), view.shape(x), view.kind(x)
        if total is None or not shape or len(shape) not in (2, 3) or kind not in kinds:
            continue
        if not last_axis(node, len(shape)) or any(view.shape(v) != shape for v in total.input):
            continue
        rows = [v for v in node.input[1:] if v]
        if any(view.shape(v) != (shape[-1],) or view.kind(v) != kind for v in rows):
            continue
        epsilon = attribute(node, "epsilon", 1e-5)
        if any(view.is_constant(v) for v in total.input) or total.input[0] == total.input[1]:
            continue
        _fuse(view, node, total, shape, epsilon)
        done += 1
    return done


def _fuse(view: View, node: NodeProto, total: NodeProto, shape: Dims, epsilon: float) -> None:
    x, y = total.output[0], node.output[0]
    residual, branch, bias = total.input[0], total.input[1], ""
    for a, b in view.sides(total):
        found = _biased(view, b, shape)
        if found is not None:
            residual, (branch, bias) = a, found
            break
    simple = node.op_type == "SimplifiedLayerNormalization"
    shift = node.input[2] if len(node.input) > 2 else ""
    inputs = [residual, branch, node.input[1], *([] if simple else [shift]), bias]
    while not inputs[-1]:
        inputs.pop()
    summed = view.is_output(x) or len(view.readers(x)) > 1
    outputs = [y, "", "", x] if summed else [y]
    op_type = SKIP_NORMS[simple]
    view.put(op_type, inputs, outputs, CONTRIB, epsilon=epsilon)


def _biased(view: View, value: str, shape: Dims) -> tuple[str, str] | None:
    """``(m, bias)`` where ``value`` is their sum, or ``(m * gate, bias * gate)`` where it is that times a gate."""
    kind, width = view.kind(value), shape[-1]
    if view.only(value) is None:
        return None
    node = view.maker(value, "Add", "Mul")
    if node is None:
        return None
    if node.op_type == "Add":
        return _sum(view, node, shape)
    for inner, gate in view.sides(node):
        total = view.maker(inner, "Add")
        if total is None or view.only(inner) is None or not one_row(view, gate, len(shape), width):
            continue
        found = _sum(view, total, shape)
        if found is None:
            continue
        m, bias = found
        gated = view.node("Mul", [m, gate], kind, shape)
        known, weight = view.constant(bias), view.constant(gate)
        if known is not None and weight is not None:
            exact = known.astype(np.float32) * weight.astype(np.float32).reshape(-1)
            return gated, view.tensor(f"{bias}/gated", exact.astype(known.dtype))
        return gated, view.node("Mul", [bias, view.flat(gate, width)], kind, (width,))
    return None


def _sum(view: View, node: NodeProto, shape: Dims) -> tuple[str, str] | None:
    for m, bias in view.sides(node):
        if view.row(bias, shape[-1], view.kind(m)) and view.shape(m) == shape:
            return m, bias
    return None
