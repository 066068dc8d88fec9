"""Why a region is not attention that a mask can say: padding among its inputs, keys that count more than once."""

from __future__ import annotations

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.visible import Run, Sizes, zeros
from attncompile.passes.evaluate import GraphIndex

TELLING = frozenset({"padding-enters", "key-multiplicity"})
"""Codes of reasons that were read off the region, and say more than the first look at its softmax."""

_ACTIVATIONS = frozenset({"MatMul", "Gemm", "Conv", "Einsum", "Softmax", "LayerNormalization"})

_FARTHEST = 64
"""Nodes between an input and the bias that is made of it."""

_MOST_RUNS = 64
"""Keys are read one by one where that takes no more runs than these."""


def check_entries(index: GraphIndex, entries: list[str]) -> None:
    """A mask that comes from an input is made of it without a layer between.

    Raises:
        Unsupported: one of ``entries`` is such a mask.
    """
    for entry in entries:
        source = _mask_input(index, entry)
        if source is not None:
            raise Unsupported(
                "padding-enters",
                f"padding from the input '{source}' enters the pieces as '{entry}', beside queries, keys and values: "
                "export without it where no token is padded",
            )


def _mask_input(index: GraphIndex, value: str) -> str | None:
    """The input that ``value`` alone is made of, by comparisons, casts and arithmetic; None for an activation."""
    sources = index.data_inputs(value)
    if len(sources) != 1 or value in sources:
        return None
    compared = False
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        if name in seen or not index.data_inputs(name) or name in sources:
            continue
        seen.add(name)
        node = index.producer.get(name)
        looked_up = node is not None and node.op_type == "Gather" and bool(index.data_inputs(node.input[1]))
        if node is None or looked_up or node.op_type in _ACTIVATIONS or len(seen) > _FARTHEST:
            return None
        compared |= node.op_type in ("Equal", "Less", "Greater", "Not", "Cast", "Where", "And", "Or")
        stack += [v for v in node.input if v]
    return next(iter(sources)) if compared else None


def unequal(run: Run, s: Sizes, otherwise: Unsupported) -> Unsupported:
    """What to say where keys that a query sees have different weights for equal scores: that some count twice, if every
    weight is a whole multiple of the smallest one; else ``otherwise``.
    """
    if s.keys > s.value_dim * _MOST_RUNS:
        return otherwise
    weights = np.zeros((s.heads, s.queries, s.keys))
    q, k, v = zeros(s)
    for start in range(0, s.keys, s.value_dim):
        token = np.arange(start, min(start + s.value_dim, s.keys))
        v[:] = 0.0
        v[:, :, token, token - start] = 1.0
        weights[..., token] = run(q, k, v)[0, ..., : len(token)]
    # e ** -11 is no weight of a key that is seen, and none that a mask hides in float32.
    smallest = np.where(weights > 1.0 / (4 * s.keys), weights, np.inf).min(axis=-1, keepdims=True)
    times = weights / smallest
    counts = np.rint(times)
    twice = counts > 1
    if not np.isfinite(times).all() or not twice.any() or np.abs(times - counts).max() > 1e-2:
        return otherwise
    head, query, key = (int(i) for i in np.argwhere(twice)[0])
    heads = "" if np.array_equal(counts, np.broadcast_to(counts[:1], counts.shape)) else ", and heads differ in it"
    return Unsupported(
        "key-multiplicity",
        f"some keys count more than once in a softmax, which no mask says: key {key} counts "
        f"{int(counts[head, query, key])} times for query {query} in head {head}{heads}",
    )  # fmt: skip
