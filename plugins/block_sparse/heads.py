"""Heads with a mask of their own, as one sequence through all heads, in which no token sees one of another head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from attncompile.core.site import Layout
from attncompile.plugins.block_sparse.plan import Plan
from attncompile.plugins.body import Body
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.tiled import Operands, Tiles


def through_heads(
    body: Body, plan: Plan, call: Call, given: Operands, attended: Callable[[Plan, Call, Operands], str]
) -> str:
    """The output of ``call`` where ``plan`` counts tokens through all heads. ``attended`` writes what the plan of one
    head gives for operands [B, 1, tokens of all heads, D].

    A query [B, N, H, D] is such a sequence as it is, token by token: nothing is transposed.
    """
    assert call.query_length is not None and call.key_length is not None
    layouts = call.layouts
    one = replace(
        call, heads=1, kv_heads=1, query_length=call.query_length * call.heads,
        key_length=call.key_length * call.kv_heads, layouts=("BHND",) * 4,
    )  # fmt: skip

    def flat(value: str, tokens: int, dim: int) -> str:
        return body.op("Reshape", value, body.ints(0, 1, tokens, dim))

    assert one.query_length is not None and one.key_length is not None
    key_mask = body.op("Tile", given.key_mask, body.ints(1, 1, 1, call.kv_heads)) if given.key_mask else ""
    operands = Operands(
        flat(given.query, one.query_length, call.head_dim), flat(given.key, one.key_length, call.head_dim),
        flat(given.value, one.key_length, call.value_dim), key_mask,
    )  # fmt: skip
    groups = tuple(
        Tiles(_placed(t.query_index, call.heads, call.query_length, layouts[0]), t.key_index, t.kind, t.masks)
        for t in plan.groups
    )
    order = _placed(np.arange(one.query_length), call.heads, call.query_length, layouts[3])
    slots = np.empty_like(plan.slots)
    slots[order] = plan.slots
    out = attended(replace(plan, groups=groups, slots=slots), one, operands)
    sizes = {"B": 0, "N": call.query_length, "H": call.heads, "D": call.value_dim}
    return body.op("Reshape", out, body.ints(*(sizes[axis] for axis in layouts[3])))


def _placed(tokens: np.ndarray, heads: int, length: int, layout: Layout) -> np.ndarray:
    """Where tokens counted head by head stand in an operand of this layout whose heads and tokens are one axis."""
    return tokens if layout == "BHND" else tokens % length * heads + tokens // length
