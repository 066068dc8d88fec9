"""Shapes after operators of ONNX Runtime's own domain, whose schemas the onnx package does not have.

Without them nothing behind the first fused operator of an optimised model would have a shape.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto, TensorProto, TypeProto, helper

DOMAIN = "com.microsoft"

Known = Mapping[str, TypeProto]

_LIKE_FIRST = frozenset({
    "BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "LayerNormalization", "GroupNorm", "RotaryEmbedding",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "BiasSoftmax",
    "BiasDropout", "SkipGroupNorm",
})  # fmt: skip
"""The first output has the shape and the type of the first input."""

_SUM_OUTPUT = {"SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3, "SkipGroupNorm": 1}
"""Which output of the Skip normalisations is the sum of input and skip."""


_IN_STANDARD_DOMAIN = frozenset({"SimplifiedLayerNormalization"})
"""ONNX Runtime's own too, though it writes them without a domain."""


def is_contrib(domain: str, op_type: str) -> bool:
    """Whether ``infer`` is asked about this operator; ``domain`` is empty for the standard one."""
    return domain == DOMAIN or (not domain and op_type in _IN_STANDARD_DOMAIN)


def infer(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    """Types and shapes of the outputs of a node for which ``is_contrib`` holds, empty where they are not known."""
    if not node.input:
        return {}
    first = types.get(node.input[0])
    if node.op_type in _LIKE_FIRST and first is not None:
        found = {node.output[0]: first}
        at = _SUM_OUTPUT.get(node.op_type, len(node.output))
        if at < len(node.output) and node.output[at]:
            found[node.output[at]] = first
        return found
    rule = {
        "EmbedLayerNormalization": _embed, "MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped,
        "Attention": _attention, "QAttention": _attention, "FusedMatMul": _matmul, "BiasSplitGelu": _half,
        "DynamicQuantizeMatMul": _quantised_matmul, "MatMulIntegerToFloat": _quantised_matmul, "MatMulNBits": _nbits,
        "DequantizeLinear": _dequantised,
        "QuantizeLinear": _quantised, "NhwcConv": _nhwc_conv,
    }.get(node.op_type)  # fmt: skip
    return rule(node, types) if rule is not None else {}


def _sizes(types: Known, name: str) -> list[int] | None:
    kind = types.get(name)
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return [d.dim_value for d in dims] if all(d.HasField("dim_value") for d in dims) else None


def _tensor(like: TypeProto, shape: list[int]) -> TypeProto:
    made: TypeProto = helper.make_tensor_type_proto(like.tensor_type.elem_type, shape)
    return made


def _number(node: NodeProto, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _input(node: NodeProto, at: int) -> str:
    return node.input[at] if at < len(node.input) else ""


def _embed(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    ids, table = _sizes(types, node.input[0]), _sizes(types, _input(node, 2))
    if ids is None or table is None:
        return {}
    made = _tensor(types[node.input[2]], [*ids, table[1]])
    found = {node.output[0]: made}
    if len(node.output) > 1 and node.output[1]:
        found[node.output[1]] = helper.make_tensor_type_proto(TensorProto.INT32, [ids[0]])
    if len(node.output) > 2 and node.output[2]:
        found[node.output[2]] = made
    return found


def _multi_head(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    query, key, value = (_sizes(types, _input(node, i)) for i in range(3))
    heads = _number(node, "num_heads")
    if query is None or not heads:
        return {}
    like = types[node.input[0]]
    if len(query) == 5:
        batch, length, _, _, dim = query
        new, value_dim = length, dim
    elif key is None or len(query) != 3:
        return {}
    elif len(key) == 5:
        batch, length, new, dim, value_dim = query[0], query[1], key[1], key[4], key[4]
    elif value is None:
        return {}
    else:
        batch, length, dim = query[0], query[1], query[2] // heads
        new = key[2] if len(key) == 4 else key[1]
        value_dim = value[3] if len(value) == 4 else value[2] // heads
    past = _sizes(types, _input(node, 6))
    keys = new + (past[2] if past is not None else 0)
    found = {node.output[0]: _tensor(like, [batch, length, heads * value_dim])}
    if past is not None or not _input(node, 6):
        for at, width in ((1, dim), (2, value_dim)):
            if len(node.output) > at and node.output[at]:
                found[node.output[at]] = _tensor(like, [batch, heads, keys, width])
    return found


def _grouped(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    query = _sizes(types, node.input[0])
    heads, shared = _number(node, "num_heads"), _number(node, "kv_num_heads")
    if query is None or not heads or not shared:
        return {}
    width = query[2] if _input(node, 1) else query[2] * heads // (heads + 2 * shared)
    return {node.output[0]: _tensor(types[node.input[0]], [*query[:2], width])}


def _attention(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    data, weight = _sizes(types, node.input[0]), _sizes(types, node.input[1])
    if data is None or weight is None:
        return {}
    sizes = next((list(a.ints) for a in node.attribute if a.name == "qkv_hidden_sizes"), [])
    like = types[node.input[3]] if node.op_type == "QAttention" and _input(node, 3) in types else types[node.input[0]]
    return {node.output[0]: _tensor(like, [*data[:2], sizes[2] if sizes else weight[1] // 3])}


def _matmul(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    left, right = _sizes(types, node.input[0]), _sizes(types, _input(node, 1))
    turned = any(_number(node, f"trans{x}") for x in ("BatchA", "BatchB"))
    if left is None or right is None or turned or min(len(left), len(right)) < 2:
        return {}
    left = [*left[:-2], *(left[:-3:-1] if _number(node, "transA") else left[-2:])]
    right = [*right[:-2], *(right[:-3:-1] if _number(node, "transB") else right[-2:])]
    rank = max(len(left), len(right))
    one, two = ([1] * (rank - len(x)) + x[:-2] for x in (left, right))
    batch = [max(a, b) for a, b in zip(one, two, strict=False)]
    return {node.output[0]: _tensor(types[node.input[0]], [*batch, left[-2], right[-1]])}


def _nhwc_conv(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    """Data [batch, height, width, channels], weights [output channels, height, width, channels of a group]."""
    data, weight = _sizes(types, node.input[0]), _sizes(types, _input(node, 1))
    ints = {a.name: list(a.ints) for a in node.attribute if a.ints}
    if data is None or weight is None or len(data) != 4 or len(weight) != 4:
        return {}
    if any(a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for a in node.attribute):
        return {}
    pads, strides, dilations = ints.get("pads", [0] * 4), ints.get("strides", [1, 1]), ints.get("dilations", [1, 1])
    sides = [
        (data[1 + i] + pads[i] + pads[2 + i] - dilations[i] * (weight[1 + i] - 1) - 1) // strides[i] + 1
        for i in range(2)
    ]  # fmt: skip
    return {node.output[0]: _tensor(types[node.input[0]], [data[0], *sides, weight[0]])}


def _half(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    shape = _sizes(types, node.input[0])
    return {node.output[0]: _tensor(types[node.input[0]], [*shape[:-1], shape[-1] // 2])} if shape else {}


def _quantised_matmul(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    left, right = _sizes(types, node.input[0]), _sizes(types, _input(node, 1))
    if left is None or right is None or len(right) != 2:
        return {}
    return {node.output[0]: helper.make_tensor_type_proto(TensorProto.FLOAT, [*left[:-1], right[-1]])}


def _nbits(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    left, width = _sizes(types, node.input[0]), _number(node, "N")
    return {node.output[0]: _tensor(types[node.input[0]], [*left[:-1], width])} if left and width else {}


def _dequantised(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    shape, scale = _sizes(types, node.input[0]), types.get(_input(node, 1))
    return {node.output[0]: _tensor(scale, shape)} if shape is not None and scale is not None else {}


def _quantised(node: NodeProto, types: Known) -> dict[str, TypeProto]:
    shape, zero = _sizes(types, node.input[0]), types.get(_input(node, 2))
    if shape is None:
        return {}
    kind = zero.tensor_type.elem_type if zero is not None else TensorProto.UINT8
    return {node.output[0]: helper.make_tensor_type_proto(kind, shape)}
