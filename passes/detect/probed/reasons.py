"""Why a region is not attention that a mask can say: padding among its inputs."""

from __future__ import annotations

from attncompile.core.errors import Unsupported
from attncompile.passes.evaluate import GraphIndex

TELLING = frozenset({"padding-enters"})
"""Codes of reasons that were read off the region, and say more than the first look at its softmax."""

_ACTIVATIONS = frozenset({"MatMul", "Gemm", "Conv", "Einsum", "Softmax", "LayerNormalization"})

_FARTHEST = 64
"""Nodes between an input and the bias that is made of it."""


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
