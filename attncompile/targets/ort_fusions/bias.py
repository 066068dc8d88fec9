"""Biases that a softmax does not see. ONNX Runtime writes a product's bias over the whole output before its ``Gemm``
reads it again: each that goes is a pass less.

A bias of the keys adds q . b to all scores of a row alike, and the softmax of a row is the same for scores that are all
moved alike: masks, windows and biases of scores change nothing about that, a softcap, a sink and a log-sum-exp do. A
bias of the values comes out of each row whose weights sum to one as it went in, so that the product which follows can
have it in its own bias, which is rounded anew by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from onnx import NodeProto, defs

from attncompile.targets.ort_fusions.operands import FREE
from attncompile.targets.ort_fusions.view import OURS, View, attribute

_SOFTMAX = ("Attention", "NeighborhoodAttention", "BlockSparseAttention")
_LARGEST = 1 << 27
"""Elements of a weight that is read."""


def key_biases(view: View) -> int:
    """How many constant biases of keys went, where nobody else reads the biased keys."""
    done = 0
    for node in view.nodes(*_SOFTMAX, domain=OURS):
        given = _given(node)
        if "sinks" in given or attribute(node, "softcap", 0.0) != 0.0 or any(node.output[1:]):
            continue
        found = _biased(view, node, given["key"], _layout(node, "k"))
        if found is not None:
            _unbiased(view, *found)
            done += 1
    return done


def value_biases(view: View) -> int:
    """How many constant biases of values became part of the bias of the product behind the attention."""
    done = 0
    for node in view.nodes("Attention", "NeighborhoodAttention", domain=OURS):
        found = _biased(view, node, _given(node)["value"], _layout(node, "v"))
        if found is None or not _weights_sum_to_one(view, node):
            continue
        if _moved(view, node, found[1]):
            _unbiased(view, *found)
            done += 1
    return done


def _given(node: NodeProto) -> Mapping[str, str]:
    """Inputs by their formal names."""
    names = [i.name for i in defs.get_schema(node.op_type, 1, OURS).inputs]
    return {n: v for n, v in zip(names, node.input, strict=False) if v}


def _layout(node: NodeProto, letter: str) -> str:
    said: bytes = attribute(node, f"{letter}_layout", b"BNHD")
    return said.decode()


def _biased(view: View, node: NodeProto, operand: str, layout: str) -> tuple[NodeProto, str] | None:
    """What adds a bias of its heads' elements to ``operand`` of ``node``, in ``layout``, for ``node`` alone; and it."""
    sizes = view.shape(operand)
    if sizes is None or len(sizes) != len(layout):
        return None
    value, reader = operand, node
    while _alone(view, value, reader):
        maker = view.maker(value, "Add", "Gemm", *FREE)
        if maker is None:
            return None
        if maker.op_type in FREE:
            value, reader = maker.input[0], maker
            continue
        width = (view.shape(value) or ("",))[-1]
        ends = [sizes[-n:] for n in (1, 2) if set(layout[-n:]) <= {"H", "D"}]
        if width not in [
            prod(n for n in e if isinstance(n, int)) for e in ends if not any(isinstance(n, str) for n in e)
        ]:
            return None  # it is not the same for all tokens
        bias = _bias(view, maker, int(width))
        return None if bias is None else (maker, bias)
    return None


def _alone(view: View, value: str, reader: NodeProto) -> bool:
    """Whether ``reader`` alone reads ``value``, once."""
    readers = view.readers(value)
    once = list(reader.input).count(value) == 1
    return once and not view.is_output(value) and len(readers) == 1 and readers[0] is reader


def _bias(view: View, maker: NodeProto, width: int) -> str | None:
    """The constant of ``width`` elements that an ``Add`` or a ``Gemm`` adds."""
    kind = view.kind(maker.output[0])
    if maker.op_type == "Gemm":
        plain = attribute(maker, "alpha", 1.0) == attribute(maker, "beta", 1.0) == 1.0
        return maker.input[2] if plain and len(maker.input) > 2 and view.row(maker.input[2], width, kind) else None
    same = (b for x, b in view.sides(maker) if view.shape(x) == view.shape(maker.output[0]))
    return next((b for b in same if view.row(b, width, kind)), None)


def _unbiased(view: View, maker: NodeProto, bias: str) -> None:
    if maker.op_type == "Gemm":
        view.set_inputs(maker, maker.input[:2])
    else:
        view.pass_by(maker.output[0], next(x for x, b in view.sides(maker) if b == bias))


def _weights_sum_to_one(view: View, node: NodeProto) -> bool:
    """Whether each query sees a key, and nothing takes a share of the weights."""
    given = _given(node)
    if given.keys() != {"query", "key", "value"}:
        return False
    lengths = []
    for name in ("query", "key"):
        layout, sizes = _layout(node, name[0]), view.shape(given[name])
        if sizes is None or len(sizes) != len(layout):
            return False
        lengths.append(sizes[layout.index("N")])
    queries, keys = lengths
    if node.op_type == "Attention" and attribute(node, "left", -1) == attribute(node, "right", -1) == -1:
        return queries == keys or (isinstance(keys, int) and keys > 0)
    # Windows hold the place of the query itself, or of the middle of its group, which may lie ahead of it.
    return queries == keys and not (any(attribute(node, "causal", [])) and max(attribute(node, "stride", [1])) > 1)


def _moved(view: View, node: NodeProto, bias: str) -> bool:
    """Whether what follows ``node`` adds what ``bias`` of its values comes to now."""
    output, layout = node.output[0], _layout(node, "o")
    sizes = view.shape(output)
    if sizes is None or not layout.endswith("HD") or any(node.output[1:]):
        return False
    heads, width = sizes[-2:]
    value, reader = output, view.only(output, "MatMul", "Gemm", *FREE)
    while reader is not None and reader.op_type in FREE:
        value = reader.output[0]
        reader = view.only(value, "MatMul", "Gemm", *FREE)
    if reader is None or reader.input[0] != value or not isinstance(heads, int) or not isinstance(width, int):
        return False
    adds = reader if reader.op_type == "Gemm" else view.only(reader.output[0], "Add")
    weight = view.constant(reader.input[1], _LARGEST)
    if adds is None or weight is None or weight.ndim != 2 or attribute(reader, "transA", 0):
        return False
    weight = weight.T if attribute(reader, "transB", 0) else weight
    old = _bias(view, adds, weight.shape[1])
    known, before = view.constant(bias), view.constant(old) if old is not None else None
    if old is None or known is None or before is None or len(weight) != heads * width or known.size % width:
        return False
    if (view.shape(value) or ("",))[-1] != len(weight):
        return False
    groups = known.astype(np.float64).reshape(-1, width)  # of heads that share a value
    each = np.repeat(groups, heads // len(groups), axis=0).reshape(-1)
    with np.errstate(over="ignore"):
        total = (before.astype(np.float64) + each @ weight.astype(np.float64)).astype(before.dtype)
    if not np.isfinite(total.astype(np.float64)).all():
        return False
    new = view.tensor(f"{old}/with values", total)
    view.set_inputs(adds, [new if v == old else v for v in adds.input])
    return True
