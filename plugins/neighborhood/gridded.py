"""Body for a static grid (1-D, 2-D, 3-D): tiles of queries with a constant table of the keys that each tile meets."""

from __future__ import annotations

import numpy as np

from attncompile.plugins.body import Body
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood
from attncompile.plugins.neighborhood.tiles import Tiling, tiling


def gridded_body(body: Body, hood: Neighborhood, call: Call, query: str, key: str, value: str, key_mask: str) -> str:
    """Append the whole computation; returns the output's name. ``key_mask`` is empty when there is none."""
    plan = tiling(hood, call.block)
    tokens = hood.tokens
    assert tokens is not None
    axis, out_axis = parts.sequence_axis(call.layouts[0]), parts.sequence_axis(call.layouts[3])

    order = body.constant(plan.query_index.reshape(-1) + hood.prefix)
    rows = parts.scaled(body, call, body.op("Gather", query, order, axis=axis))
    tiles = parts.tiles_of_queries(body, call, rows, plan.queries, call.layouts[0])

    index = body.constant(_with_extra_keys(hood, tokens, plan.key_index + hood.prefix))  # [T, W]
    key, value = (parts.heads_first(body, x, y) for x, y in ((key, call.layouts[1]), (value, call.layouts[2])))
    visible = _visible(body, hood, call, plan)  # [T, R, W], [1, R, W] or None
    if call.key_mask:
        seen = body.op("Gather", parts.key_mask_4d(body, key_mask), index, axis=3)  # [b, 1, 1, T, W]
        seen = body.op("Transpose", seen, perm=[0, 1, 3, 2, 4])
        visible = seen if visible is None else body.op("And", seen, visible)
    mask = None if visible is None else parts.additive(body, call, visible)
    weights = parts.probabilities(
        body, call, tiles, body.op("Gather", key, index, axis=2), mask, [0, 1, 2, 4, 3]
    )  # [B, G, T, R, W]
    result = body.op("MatMul", weights, body.op("Gather", value, index, axis=2))
    result = parts.guarded(
        body, call, result, mask, hood.masked_rows,
        lambda: body.op("ReduceMean", body.op("Unsqueeze", value, body.ints(2)), body.ints(-2)),
    )  # fmt: skip
    result = parts.untile(body, call, result, plan.queries, call.layouts[3])
    result = body.op("Gather", result, body.constant(plan.slots), axis=out_axis)
    if not hood.prefix and not hood.suffix:
        return result
    return parts.with_extra_queries(body, hood, call, (query, key, value, key_mask), body.ints(tokens), result)


def _with_extra_keys(hood: Neighborhood, tokens: int, index: np.ndarray) -> np.ndarray:
    """Prefix and suffix tokens behind the keys of every tile."""
    extra = np.concatenate([np.arange(hood.prefix), np.arange(tokens - hood.suffix, tokens)])
    return np.concatenate([index, np.broadcast_to(extra, (len(index), len(extra)))], axis=1).astype(np.int64)


def _visible(body: Body, hood: Neighborhood, call: Call, plan: Tiling) -> str | None:
    """Which keys each row sees; None when it is all of them. Stored once per kind of tile, spread by the runtime."""
    kinds, queries, keys = plan.masks.shape
    masks = np.ones((kinds, queries, keys + hood.prefix + hood.suffix), bool)
    masks[:, :, :keys] = plan.masks
    if masks.all():
        return None
    visible = body.constant(masks)
    if call.group > 1:
        visible = body.op("Tile", visible, body.ints(1, call.group, 1))  # group-major rows, as the tiles are
    return visible if kinds == 1 else body.op("Gather", visible, body.constant(plan.kind.astype(np.int64)), axis=0)
