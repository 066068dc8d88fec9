"""GELU, by its error function or its tanh, as ``Gelu`` and ``FastGelu``, with the bias before it inside.

Exporters and precisions spell it in many ways; what is compared is therefore the function. A value ``y`` that depends
on one ``x`` through pointwise ops and constants alone is a GELU of ``x`` if it is one at samples that resolve its bend:
a coefficient that is 0.5 % off is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import erf, pi, sqrt

import numpy as np
from onnx import NodeProto

from attncompile.targets.ort_fusions.view import CONTRIB, KINDS, View

_TOLERANCE = 5e-5
"""fp16's nearest number to sqrt(2) costs 3e-5; 0.5 % of the cubic term's coefficient 1.1e-4."""
_SAMPLES = np.concatenate([np.linspace(-8, 8, 641), [-30.0, -20.0, 20.0, 30.0]])
_DEPTH = 8
_erf = np.vectorize(erf, otypes=[np.float64])
_OPS: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power, "Neg": np.negative,
    "Tanh": np.tanh, "Erf": _erf, "Cast": np.asarray,
}  # fmt: skip
_WANTED = {
    "Tanh": 0.5 * _SAMPLES * (1 + np.tanh(sqrt(2 / pi) * (_SAMPLES + 0.044715 * _SAMPLES**3))),
    "Erf": 0.5 * _SAMPLES * (1 + _erf(_SAMPLES / sqrt(2))),
}


def gelu(view: View) -> int:
    """How many were fused."""
    done = 0
    for node in view.nodes("Tanh", "Erf"):
        found = next(_found(view, node), None)
        if found is None:
            continue
        x, y, region = found
        fast = node.op_type == "Tanh"
        biased = _bias(view, x, region)
        if biased is None:
            view.put("FastGelu" if fast else "Gelu", [x], [y], CONTRIB)
        else:
            view.put("FastGelu" if fast else "BiasGelu", biased, [y], CONTRIB)
        done += 1
    return done


def _found(view: View, node: NodeProto) -> Iterator[tuple[str, str, set[int]]]:
    """``(x, y, nodes between them)``."""
    above = list(_above(view, node.input[0]))
    for y in _below(view, node):
        if view.kind(y) not in KINDS:
            continue
        for x in above:
            memo = {x: _SAMPLES}
            region: set[int] = set()
            with np.errstate(all="ignore"):
                got = _evaluate(view, y, memo, region, 2 * _DEPTH)
            if got is not None and id(node) in region and view.kind(x) == view.kind(y):
                error = np.abs(got - _WANTED[node.op_type])
                if np.isfinite(error).all() and error.max() <= _TOLERANCE and view.shape(x) == view.shape(y):
                    yield x, y, region


def _above(view: View, value: str) -> Iterator[str]:
    pending, seen = [(value, 0)], set()
    while pending:
        value, depth = pending.pop(0)
        if value in seen or depth > _DEPTH or view.is_constant(value):
            continue
        seen.add(value)
        yield value
        node = view.maker(value, *_OPS)
        if node is not None:
            pending.extend((v, depth + 1) for v in node.input)


def _below(view: View, node: NodeProto) -> Iterator[str]:
    for _ in range(_DEPTH):
        reader = view.only(node.output[0], *_OPS)
        if reader is None:
            return
        node = reader
        yield node.output[0]


def _evaluate(view: View, value: str, memo: dict[str, np.ndarray], region: set[int], left: int) -> np.ndarray | None:
    if value in memo:
        return memo[value]
    if view.is_constant(value):
        known = view.scalar(value)
        return None if known is None else np.full(1, known)
    node = view.maker(value, *_OPS)
    if node is None or left == 0 or view.kind(value) not in KINDS:
        return None
    inputs = [_evaluate(view, v, memo, region, left - 1) for v in node.input]
    if any(i is None for i in inputs):
        return None
    region.add(id(node))
    memo[value] = _OPS[node.op_type](*inputs)
    return memo[value]


def _bias(view: View, x: str, region: set[int]) -> list[str] | None:
    """``[m, bias]`` where ``x`` is their sum and nobody else reads it."""
    node, shape = view.maker(x, "Add"), view.shape(x)
    if node is None or not shape or len(shape) < 2 or view.is_output(x):
        return None
    if any(id(reader) not in region for reader in view.readers(x)):
        return None
    for m, bias in view.sides(node):
        if view.row(bias, shape[-1], view.kind(x)) and view.shape(m) == shape:
            return [m, bias]
    return None
