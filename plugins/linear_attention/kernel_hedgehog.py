"""Device code of Hedgehog's map without a triangle: features [exp(x W), exp(-x W)], W learned.

Features differ by many orders of magnitude. So those of keys are kept over their largest of the tokens so far, as a
softmax does it, and queries are read with every feature's state scaled to at most 1 and its size in the exponent, which
is taken above the row's largest: what is multiplied in float16 is at most 1, and the row's factor cancels in the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.linear_attention.kernel_triton import LOG2E, NO_KEY, places, read_state
from attncompile.plugins.tile_softmax import moved

NO_SIZE = tl.constexpr(-1.0e4)
"""The logarithm of the size of a feature that no key has, and of none at all."""


@triton.jit
def projection(feature_weight, head, DK: tl.constexpr, K1: tl.constexpr, W: tl.constexpr, W1: tl.constexpr, half):
    """W of one head [K1, W1], 0 past its edges, in the operands' type."""
    rows, cols = tl.arange(0, K1), tl.arange(0, W1)
    at = feature_weight + head.to(tl.int64) * (DK * W) + rows[:, None] * W + cols[None, :]
    return tl.load(at, mask=(rows < DK)[:, None] & (cols < W)[None, :], other=0.0).to(half)


@triton.jit
def added(acc, sums, m, x, v, seen):
    """What a tile adds to a state [W1, BV] whose features are kept over exp(m): the state, the sum, and m after it."""
    x = tl.where(seen, x, NO_KEY)
    new = tl.maximum(m, tl.max(x, 0))
    kept = tl.exp2((m - new) * LOG2E)
    f = tl.where(seen, tl.exp2((x - new[None, :]) * LOG2E), 0.0)
    return tl.dot(tl.trans(f.to(v.dtype)), v, acc * kept[:, None]), sums * kept + tl.sum(f, 0), new


@triton.jit
def by_feature(acc, sums, NORM: tl.constexpr):
    """A state [W1, BV] and its sums over the size of each feature, and the sizes in units of log2."""
    size = tl.max(tl.abs(acc), 1)
    if NORM != 0:
        size = tl.maximum(size, sums)
    less = tl.where(size > 0.0, 1.0 / size, 0.0)
    return acc * less[:, None], sums * less, tl.where(size > 0.0, tl.log2(size), 2.0 * NO_SIZE)


@triton.jit
def state(
    key, value, feature_weight,
    k_b, k_n, k_h, v_b, v_n, v_h, k_o, v_o, NK, chunk, C, groups,
    state, total,
    DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
    W1: tl.constexpr, FAST: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: one chunk of one key head, ``BV`` channels of the values. Grid (C * cdiv(DV, BV), HKV, B), with ``FAST``
    heads the first axis.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    if FAST:
        place, g, b = tl.program_id(1), tl.program_id(0), tl.program_id(2)
    else:
        place, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, part = place // TILES, place % TILES
    first = c * chunk
    end = tl.minimum(first + chunk, NK)
    V = part * BV
    cols, wide, out_cols = tl.arange(0, K1), tl.arange(0, W1), V + tl.arange(0, BV)
    k_base = moved(key, k_o) + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = moved(value, v_o) + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    w = projection(feature_weight, g, DK, K1, W, W1, key.dtype.element_ty)
    up, down = tl.zeros((W1, BV), tl.float32), tl.zeros((W1, BV), tl.float32)
    up_sum, down_sum = tl.zeros((W1,), tl.float32), tl.zeros((W1,), tl.float32)
    up_m, down_m = tl.full((W1,), NO_KEY, tl.float32), tl.full((W1,), NO_KEY, tl.float32)
    for n in range(first, end, BN):
        rows = n + tl.arange(0, BN)
        k_seen = (rows < end)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=k_seen, other=0.0)
        v_seen = (rows < end)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        x = tl.dot(k, w)
        seen = (rows < end)[:, None] & (wide < W)[None, :]
        up, up_sum, up_m = added(up, up_sum, up_m, x, v, seen)
        down, down_sum, down_m = added(down, down_sum, down_m, -x, v, seen)
    up_m, down_m = tl.exp2(up_m * LOG2E), tl.exp2(down_m * LOG2E)
    index = ((b * groups + g) * C + c).to(tl.int64)
    at = state + index * (2 * W * DV) + wide[:, None] * DV + out_cols[None, :]
    keep = (wide < W)[:, None] & (out_cols < DV)[None, :]
    tl.store(at, up * up_m[:, None], mask=keep)
    tl.store(at + W * DV, down * down_m[:, None], mask=keep)
    if total is not None:
        if part == 0:
            to = total + index * (2 * W) + wide
            tl.store(to, up_sum * up_m, mask=wide < W)
            tl.store(to + W, down_sum * down_m, mask=wide < W)


@triton.jit
def apply(
    query, state, total, feature_weight,
    q_b, q_n, q_h, o_b, o_n, o_h, q_o, NQ, C, group, groups, scale, epsilon, floor,
    output,
    NORM: tl.constexpr, FLOOR: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, W: tl.constexpr, W1: tl.constexpr, FAST: tl.constexpr, BLOCKS: tl.constexpr,
    Q_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr, Q_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: every so many-th tile of ``BM`` queries of one head, ``BV`` channels. Grid as that of
    ``kernel_triton.apply``. ``NORM``: at most 1.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    if FAST:
        place, h, b, places_of = tl.program_id(1), tl.program_id(0), tl.program_id(2), tl.num_programs(1)
    else:
        place, h, b, places_of = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    part, step = place % TILES, places_of // TILES
    V = part * BV
    cols, wide, out_cols = tl.arange(0, K1), tl.arange(0, W1), V + tl.arange(0, BV)
    half = query.dtype.element_ty
    w = projection(feature_weight, h, DK, K1, W, W1, half)
    up, down = tl.zeros((W1, BV), tl.float32), tl.zeros((W1, BV), tl.float32)
    up_z, down_z = tl.zeros((W1,), tl.float32), tl.zeros((W1,), tl.float32)
    head = (b * groups + h // group) * C
    for c in range(C):
        up += read_state(state, (head + c) * 2, 0, V, W, W1, DV, BV)
        down += read_state(state, (head + c) * 2 + 1, 0, V, W, W1, DV, BV)
        if NORM != 0:
            at = total + (head + c).to(tl.int64) * (2 * W) + wide
            up_z += tl.load(at, mask=wide < W, other=0.0)
            down_z += tl.load(at + W, mask=wide < W, other=0.0)
    up, up_z, up_size = by_feature(up, up_z, NORM)
    down, down_z, down_size = by_feature(down, down_z, NORM)
    up, down = up.to(half), down.to(half)
    q_base = moved(query, q_o) + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    for tile in range(place // TILES, tl.cdiv(NQ, BM), step):
        rows = tile * BM + tl.arange(0, BM)
        seen = (rows < NQ)[:, None] & (cols < DK)[None, :]
        q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
        x = tl.dot(q, w) * LOG2E
        to_up, to_down = x + up_size[None, :], down_size[None, :] - x
        largest = tl.maximum(tl.max(tl.maximum(to_up, to_down), 1), NO_SIZE)
        of_up, of_down = tl.exp2(to_up - largest[:, None]), tl.exp2(to_down - largest[:, None])
        out = tl.dot(of_down.to(half), down, tl.dot(of_up.to(half), up))
        out = out * scale.to(tl.float32, bitcast=True)
        if NORM == 0:
            out = out * tl.exp2(largest)[:, None]
        else:
            below = tl.sum(of_up * up_z[None, :] + of_down * down_z[None, :], 1)
            less = tl.exp2(-largest)
            below += epsilon.to(tl.float32, bitcast=True) * less
            if FLOOR:
                below = tl.maximum(below, floor.to(tl.float32, bitcast=True) * less)
            out = out * (1.0 / below)[:, None]
        keep = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
        at = o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS)
        tl.store(at, out.to(output.dtype.element_ty), mask=keep)
