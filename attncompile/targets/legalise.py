"""Forms that TensorRT-RTX 1.7.1 fails to build, written in an equivalent form that it builds."""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from attncompile.targets import graph as g


def drop_unit_axes(proto: ModelProto) -> int:
    """Reshape -> Transpose -> Reshape through axes of size 1: leave those axes out, in place. Returns how many.

    After a fused attention the builder stops at such a transpose with ``Inconsistent strides`` (tactic.cpp:4034), as in
    [B, H, T, 1, n, D] -> [B, T, n, H, 1, D] -> [B, T * n, H, D]; without the axis it fuses as usual.
    """
    constants = _constants(proto)
    changed = 0
    for graph in g.graphs(proto.graph):
        uses: Counter[str] = Counter(v for n in graph.node for v in g.reads(n))
        uses.update(o.name for o in graph.output)
        maker = {o: n for n in graph.node for o in n.output if o}
        readers = {v: n for n in graph.node for v in n.input}
        for transpose in [n for n in graph.node if n.op_type == "Transpose"]:
            first, last = maker.get(transpose.input[0]), readers.get(transpose.output[0])
            if first is None or last is None or uses[transpose.input[0]] != 1 or uses[transpose.output[0]] != 1:
                continue
            changed += _drop(graph, first, transpose, last, constants)
    return changed


def dropped(node: NodeProto) -> str:
    """What hides keys in a standard Attention and is not in the network that TensorRT-RTX 1.7.1 makes of it."""
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
        return ""
    if any(a.name in ("left_window_size", "right_window_size") and a.i >= 0 for a in node.attribute):
        return "its window (opset 25)"
    return "nonpad_kv_seqlen" if len(node.input) > 6 and node.input[6] else ""


def allow_split_attention(proto: ModelProto) -> bool:
    """Let TensorRT-RTX split an ``Attention`` that it has no fused kernel for (fp32, head size 8, 257 ...), in place.

    Without ``TRT_decomposable`` the build fails there; with it the others are fused as before (seen in the log).
    onnx.checker and ONNX Runtime refuse the attribute, so it is set on what the parser reads, not in a file.
    """
    changed = False
    for graph in g.graphs(proto.graph):
        for node in graph.node:
            if node.op_type == "Attention" and not any(a.name == "TRT_decomposable" for a in node.attribute):
                node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
                changed = True
    return changed


def _drop(
    graph: GraphProto, first: NodeProto, transpose: NodeProto, last: NodeProto, constants: dict[str, np.ndarray]
) -> int:
    perm = next((list(a.ints) for a in transpose.attribute if a.name == "perm"), None)
    if perm is None or not all(_is_plain_reshape(n) and n.input[1] in constants for n in (first, last)):
        return 0
    shape = [int(d) for d in constants[first.input[1]]]
    # 0 copies the input's dimension at the same place, so no axis in front of a 0 may go.
    fixed, fixed_after = _last_zero(shape), _last_zero([int(d) for d in constants[last.input[1]]])
    unit = [a for a, size in enumerate(shape) if size == 1 and a > fixed and a in perm[fixed_after + 1 :]]
    if not unit or len(unit) == len(shape) or len(shape) != len(perm):
        return 0
    kept = [axis for axis in range(len(shape)) if axis not in unit]
    name = f"{first.output[0]}_without_unit_axes"
    graph.initializer.append(numpy_helper.from_array(np.array([shape[a] for a in kept], np.int64), name))
    first.input[1] = name
    for attribute in transpose.attribute:
        if attribute.name == "perm":
            attribute.ints[:] = [kept.index(a) for a in perm if a in kept]
    return 1


def _last_zero(shape: list[int]) -> int:
    return max((i for i, size in enumerate(shape) if size == 0), default=-1)


def _is_plain_reshape(node: NodeProto) -> bool:
    return node.op_type == "Reshape" and not any(a.name == "allowzero" and a.i for a in node.attribute)


def _constants(proto: ModelProto) -> dict[str, np.ndarray]:
    """Small inline integer constants by value name."""
    found = {}
    for graph in g.graphs(proto.graph):
        tensors = [(t.name, t) for t in graph.initializer]
        tensors += [
            (n.output[0], a.t) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
        ]
        for name, tensor in tensors:
            if tensor.data_type == tensor.INT64 and tensor.data_location != tensor.EXTERNAL and len(tensor.dims) == 1:
                found[name] = numpy_helper.to_array(tensor)
    return found
