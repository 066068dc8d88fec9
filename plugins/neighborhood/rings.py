"""Body for rings cut into whole windows (Swin): every window is one tile, whose keys are its queries.

The tokens are brought into windows by one Gather an operand and back by one. What meets across a ring's end is told
apart by a table for each kind of window, as Swin's own mask does, so that no window is cut in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf, prod

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.site import Layout
from attncompile.plugins.body import Body, float_type
from attncompile.plugins.neighborhood import parts, tiled
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood

LARGEST_TABLE = 1 << 26
"""Elements of the table of seams beyond which a configuration is refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Rings:
    """``index`` [T, W]: the tokens of each window in the order of their places; ``slots`` [tokens] says where in T * W
    each token stands; ``kind`` [T] chooses the window's table among ``apart`` [U, W, W], True where two tokens meet
    across a seam.
    """

    index: np.ndarray
    slots: np.ndarray
    kind: np.ndarray
    apart: np.ndarray

    def visible(self, hood: Neighborhood) -> np.ndarray:
        """Bool [tokens, tokens]: which keys the body lets each query meet."""
        tokens = self.index.size
        seen = np.zeros((tokens, tokens), bool)
        for row, kind in zip(self.index, self.kind, strict=True):
            seen[np.ix_(row, row)] = ~self.apart[kind] if isinf(hood.seam) else True
        return seen


def rings(hood: Neighborhood) -> Rings:
    """The windows of ``hood``, whose border is circular. Raises ``Unsupported`` where the tables get too large."""
    tokens, size = prod(hood.grid), prod(hood.kernel_size)
    index = np.zeros((1, 1), np.int64)
    side = np.zeros((1, 1), np.int64)  # of the seams, a bit an axis
    for length, window, shift in zip(hood.grid, hood.kernel_size, hood.shift, strict=True):
        unrolled = (np.arange(length) + shift).reshape(-1, window)
        where, beyond = unrolled % length, (unrolled >= length).astype(np.int64)
        index = _outer(index * length, where)
        side = _outer(side * 2, beyond)
    kinds, kind = np.unique(side, axis=0, return_inverse=True)
    if len(kinds) * size * size > LARGEST_TABLE:
        raise Unsupported("size", f"the table of seams has {len(kinds) * size * size} elements", "smaller windows")
    slots = np.empty(tokens, np.int64)
    slots[index.reshape(-1)] = np.arange(tokens)
    return Rings(index, slots, kind.reshape(-1), kinds[:, :, None] != kinds[:, None, :])


def _outer(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """[T, W] of the axes so far and [t, w] of one more: sums over all pairs, [T * t, W * w], row-major."""
    both = outer[:, None, :, None] + inner[None, :, None, :]
    return np.asarray(both.reshape(both.shape[0] * both.shape[1], -1))


def ring_body(body: Body, hood: Neighborhood, call: Call, query: str, key: str, value: str, window_bias: str) -> str:
    """Append the whole computation; returns the output's name. ``window_bias`` is empty without one.

    Windows come before heads, [B, T, G, R, D]: what is added is one table over the last axes of the scores.
    """
    plan = rings(hood)
    size = plan.index.shape[1]
    rows = _windows(body, parts.scaled(body, call, query), plan, call.layouts[0], call.heads, call.head_dim)
    if call.group > 1:  # the query heads of a group are rows
        rows = body.op("Reshape", rows, body.ints(0, 0, call.kv_heads, call.group * size, call.head_dim))
    keys = _windows(body, key, plan, call.layouts[1], call.kv_heads, call.head_dim)
    values = _windows(body, value, plan, call.layouts[2], call.kv_heads, call.value_dim)
    added = _added(body, hood, call, plan, window_bias)
    weights = parts.probabilities(body, call, rows, keys, added, [0, 1, 2, 4, 3])  # [B, T, G, R, W]
    return _grid(body, call, plan, body.op("MatMul", weights, values))


def _windows(body: Body, value: str, plan: Rings, layout: Layout, heads: int, dim: int) -> str:
    """An operand in ``layout`` -> [B, T, heads, W, dim]."""
    count, size = plan.index.shape
    taken = tiled.take(body, value, plan.index.reshape(-1), plan.index.size, parts.sequence_axis(layout))
    if layout == "BHND":
        wide = body.op("Reshape", taken, body.ints(0, heads, count, size, dim))
        return body.op("Transpose", wide, perm=[0, 2, 1, 3, 4])
    wide = body.op("Reshape", taken, body.ints(0, count, size, heads, dim))
    return body.op("Transpose", wide, perm=[0, 1, 3, 2, 4])


def _grid(body: Body, call: Call, plan: Rings, value: str) -> str:
    """[B, T, G, R, Dv] -> the output in its layout."""
    count, size = plan.index.shape
    layout, heads, dim = call.layouts[3], call.heads, call.value_dim
    if call.group > 1:
        value = body.op("Reshape", value, body.ints(0, count, heads, size, dim))
    if layout == "BHND":
        moved = body.op("Transpose", value, perm=[0, 2, 1, 3, 4])
        flat = body.op("Reshape", moved, body.ints(0, heads, count * size, dim))
    else:
        moved = body.op("Transpose", value, perm=[0, 1, 3, 2, 4])
        flat = body.op("Reshape", moved, body.ints(0, count * size, heads, dim))
    return tiled.take(body, flat, plan.slots, plan.slots.size, parts.sequence_axis(layout))


def _added(body: Body, hood: Neighborhood, call: Call, plan: Rings, window_bias: str) -> str | None:
    """Bias and seams, [G, R, W] or [T, G, R, W]; None without any. A stored bias makes all of it a constant.

    The sum is rounded to the bias' own type, as exports round theirs: in float16, bias - 100 keeps few of its digits.
    """
    kind, numpy_type = float_type(parts.softmax_type(call))
    size = plan.index.shape[1]
    bias = _bias(body, call, window_bias, size) if window_bias else None
    seams = bool(hood.seam) and bool(plan.apart.any())
    if seams:
        table = np.where(plan.apart, hood.seam, 0.0).astype(numpy_type)
        added = body.constant(np.tile(table, (1, call.group, 1))[:, None])  # [U, 1, R, W]
        if bias is not None:
            added = body.op("Add", bias, body.op("CastLike", added, bias))
        bias = body.op("Gather", added, body.constant(plan.kind.astype(np.int64)), axis=0)
    return body.op("Cast", bias, to=kind) if bias is not None and window_bias else bias


def _bias(body: Body, call: Call, bias: str, size: int) -> str:
    """What broadcasts to [H, W, W] -> [1 or G, R, W]: the query heads of a group are rows, as in the windows."""
    bias = body.op("Reshape", bias, body.ints(-1, size, size))
    if call.group == 1:
        return bias
    wide = body.op("Expand", bias, body.ints(call.heads, size, size))
    return body.op("Reshape", wide, body.ints(call.kv_heads, call.group * size, size))
