"""Body for a static grid (1-D, 2-D, 3-D): tiles of queries with a constant table of the keys that each tile meets."""

from __future__ import annotations

import numpy as np

from attncompile.plugins.body import Body
from attncompile.plugins.neighborhood import parts, tiled
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood
from attncompile.plugins.neighborhood.tiles import tiling


def gridded_body(
    body: Body, hood: Neighborhood, call: Call, query: str, key: str, value: str, key_mask: str, bias: str
) -> str:
    """Append the whole computation; returns the output's name. ``key_mask`` and ``bias`` are empty without one."""
    plan = tiling(hood, call.block)
    assert hood.tokens is not None
    out_axis = parts.sequence_axis(call.layouts[3])
    given = tiled.operands(body, call, query, key, value, key_mask, bias)
    result = tiled.attend(body, call, tiles_of(hood, call.block), given, hood.masked_rows)
    result = tiled.take(body, result, plan.slots, plan.query_index.size, out_axis)
    if not hood.prefix and not hood.suffix:
        return result
    return parts.with_extra_queries(
        body, hood, call, (query, given.key, given.value, key_mask), body.ints(hood.tokens), result
    )


def tiles_of(hood: Neighborhood, block: int) -> tiled.Tiles:
    """The tiles of the grid by token number, with prefix and suffix tokens behind the keys of every tile."""
    plan, tokens = tiling(hood, block), hood.tokens
    assert tokens is not None
    extra = np.concatenate([np.arange(hood.prefix), np.arange(tokens - hood.suffix, tokens)])
    keys = np.concatenate([plan.key_index + hood.prefix, np.broadcast_to(extra, (plan.tiles, len(extra)))], axis=1)
    kinds, queries, _ = plan.masks.shape
    masks = np.concatenate([plan.masks, np.ones((kinds, queries, len(extra)), bool)], axis=2)
    return tiled.Tiles(plan.query_index + hood.prefix, keys.astype(np.int64), plan.kind, masks)
