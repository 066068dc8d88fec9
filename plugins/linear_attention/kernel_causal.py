"""Device code of linear attention under a triangle: states between chunks, and what the queries of a chunk get.

``DECAY`` 0: none; 1: ``log_decay`` [G]; 2: [B, N, G]; 3: [B, N, G, D]. A chunk is a power of two of tokens. It is
walked through in tiles of ``BT`` tokens with the state in registers, so that long chunks cost no more products than
short ones, and fewer states go through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.linear_attention.kernel_triton import (
    LOG2E,
    features,
    low,
    places,
    read_state,
    scaled,
    write_state,
)
from attncompile.plugins.tile_softmax import moved

CLOSED = tl.constexpr(-185.0)
"""A gate in units of log2 of which a float32 keeps nothing: lower ones, minus infinity too, are taken for it, so that
no difference of their sums is a NaN.
"""
WIDEST = tl.constexpr(-160.0)
"""The furthest that a channel may close in a tile whose decays are split, in units of log2: 2^80 and 2^-80 times any
float16 are float32s.
"""
WIDE = tl.constexpr(-64.0)
"""Likewise of bfloat16 and of exponentials, where neither is above ``LARGEST``."""
LARGEST = tl.constexpr(2.0**90)


@triton.jit
def gates(log_decay, b, rows, g, groups, tokens, end):
    """Of [B, N, G] at ``rows``, in units of log2; 0 from ``end`` on."""
    at = log_decay + (b.to(tl.int64) * tokens + rows) * groups + g
    return tl.maximum(tl.load(at, mask=rows < end, other=0.0).to(tl.float32) * LOG2E, CLOSED)


@triton.jit
def running(log_decay, b, first, g, groups, tokens, BT: tl.constexpr):
    """Sums of the gates of tokens [first, first + BT) up to each [BT], and of all of them: 64 in two pieces that every
    warp holds whole, since warps that hold parts of a sum wait for one another.
    """
    if BT == 64:
        rows = first + tl.arange(0, 32)
        early = gates(log_decay, b, rows, g, groups, tokens, tokens)
        late = gates(log_decay, b, rows + 32, g, groups, tokens, tokens)
        half = tl.sum(early, 0)
        both = tl.join(tl.cumsum(early, 0), half + tl.cumsum(late, 0))
        x, every = tl.reshape(tl.permute(both, (1, 0)), (64,)), half + tl.sum(late, 0)
    else:
        each = gates(log_decay, b, first + tl.arange(0, BT), g, groups, tokens, tokens)
        x, every = tl.cumsum(each, 0), tl.sum(each, 0)
    return x, every


@triton.jit
def channel_gates(log_decay, b, rows, g, groups, tokens, end, cols, DK: tl.constexpr):
    """Of [B, N, G, D] at ``rows`` and ``cols``, in units of log2; 0 from ``end`` on and past ``DK``."""
    at = log_decay + ((b.to(tl.int64) * tokens + rows) * groups + g)[:, None] * DK + cols[None, :]
    x = tl.load(at, mask=(rows < end)[:, None] & (cols < DK)[None, :], other=0.0).to(tl.float32)
    return tl.maximum(x * LOG2E, CLOSED)


@triton.jit
def left_over(log_decay, rate, b, rows, g, first, end, groups, tokens, DECAY: tl.constexpr):
    """Of a tile of tokens [first, end): what is left at its end of what each token adds [rows], and of what was there
    before the first. Not for gates of every channel.
    """
    if DECAY == 1:
        until = tl.exp2(rate * tl.maximum(end - 1 - rows, 0).to(tl.float32))
        whole = tl.exp2(rate * (end - first).to(tl.float32))
    else:
        x, every = running(log_decay, b, first, g, groups, tokens, rows.shape[0])
        until, whole = tl.exp2(tl.minimum(every - x, 0.0)), tl.exp2(every)
    return until, whole


@triton.jit
def nearest(x):
    """float32 rounded to what a tf32 holds: a product cuts off the other bits, which is twice as far, to one side."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def gated_products(fq, fk, own, whole, place, BT: tl.constexpr, SMALL: tl.constexpr):
    """Of a tile [BT, K]: fq[i] . (fk[j] * 2^(own[i] - own[j])) for j <= i, ``own`` the sums of gates up to a token and
    ``whole`` of all. One product, the decay split halfway, so that neither factor leaves float32's range; where a
    channel closes further than that in one tile, a key at a time. ``SMALL``: features are float16s.
    """
    if SMALL:
        fits = tl.min(whole, 0) >= WIDEST
    else:
        size = tl.maximum(tl.max(tl.max(tl.abs(fq), 1), 0), tl.max(tl.max(tl.abs(fk), 1), 0))
        fits = (tl.min(whole, 0) >= WIDE) & (size <= LARGEST)
    if fits:
        halfway = (whole * 0.5)[None, :]
        p = tl.dot(nearest(fq * tl.exp2(own - halfway)), tl.trans(nearest(fk * tl.exp2(halfway - own))))
    else:
        p = tl.zeros((BT, BT), tl.float32)
        for j in range(0, BT):
            here = (place == j)[:, None]
            one, until = tl.sum(tl.where(here, fk, 0.0), 0), tl.sum(tl.where(here, own, 0.0), 0)
            column = tl.sum(fq * one[None, :] * tl.exp2(tl.minimum(own - until[None, :], 0.0)), 1)
            p = tl.where((place == j)[None, :], column[:, None], p)
    return p


@triton.jit
def states(
    key, value, log_decay, initial_state, initial_total,
    k_b, k_n, k_h, v_b, v_n, v_h, k_o, v_o, NK, C,
    state, total, final_state, final_total,
    MAP: tl.constexpr, DECAY: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: all chunks of one key head in order, ``BK`` features and ``BV`` channels of the values.
    Grid (cdiv(DK, BK) * cdiv(DV, BV), HKV, B).
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    STEPS: tl.constexpr = CHUNK // BT
    part, g, b = tl.program_id(0) % TILES, tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    head = b * groups + g
    K, V = tl.program_id(0) // TILES * BK, part * BV
    cols, out_cols, place = K + tl.arange(0, BK), V + tl.arange(0, BV), tl.arange(0, BT)
    key, value = moved(key, k_o), moved(value, v_o)
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    acc, sums = tl.zeros((BK, BV), tl.float32), tl.zeros((BK,), tl.float32)
    if initial_state is not None:
        acc += read_state(initial_state, head, K, V, DK, BK, DV, BV)
    if initial_total is not None:
        sums += tl.load(initial_total + head.to(tl.int64) * DK + cols, mask=cols < DK, other=0.0)
    rate = 0.0
    if DECAY == 1:
        rate = tl.maximum(tl.load(log_decay + g).to(tl.float32) * LOG2E, CLOSED)
    for step in range(0, tl.cdiv(NK, BT)):
        first = step * BT
        end = tl.minimum(first + BT, NK)
        rows = first + place
        seen = (rows < NK)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0)
        v_seen = (rows < NK)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        if step % STEPS == 0:
            index = head * C + step // STEPS
            write_state(state, acc, index, K, V, DK, BK, DV, BV)
            if total is not None:
                if part == 0:
                    tl.store(total + index.to(tl.int64) * DK + cols, sums, mask=cols < DK)
        if DECAY == 3:
            exact = features(k, seen, MAP)
            x = channel_gates(log_decay, b, rows, g, groups, NK, end, cols, DK)
            whole = tl.sum(x, 0)
            exact *= tl.exp2(tl.minimum(whole[None, :] - tl.cumsum(x, 0), 0.0))
            acc, sums = acc * tl.exp2(whole)[:, None], sums * tl.exp2(whole)
            f = exact.to(v.dtype)
            if total is not None:
                sums += tl.sum(exact, 0)
        elif DECAY == 0:
            f = low(k, seen, MAP)
            if total is not None:
                sums += tl.sum(f.to(tl.float32) if MAP <= 1 else features(k, seen, MAP), 0)
        else:
            f = low(k, seen, MAP)
            until, whole = left_over(log_decay, rate, b, rows, g, first, end, groups, NK, DECAY)
            acc = acc * whole
            if total is not None:
                exact = f.to(tl.float32) if MAP <= 1 else features(k, seen, MAP)
                sums = sums * whole + tl.sum(exact * until[:, None], 0)
            # The values are narrower than the features of a whole head, and features go to the product as they are.
            v = (v.to(tl.float32) * until[:, None]).to(v.dtype)
        acc = tl.dot(tl.trans(f), v, acc)
    if final_state is not None:
        write_state(final_state, acc, head, K, V, DK, BK, DV, BV)
    if final_total is not None:
        if part == 0:
            tl.store(final_total + head.to(tl.int64) * DK + cols, sums, mask=cols < DK)


@triton.jit
def output(
    query, key, value, state, total, log_decay,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o, NQ, C, group, scale, epsilon, floor,
    output,
    Q_MAP: tl.constexpr, K_MAP: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr, DECAY: tl.constexpr,
    DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: one chunk of one head, ``BV`` channels, ``BT`` tokens at a time: what they read of the state and of one
    another, then what they add to the state. Grid (C * cdiv(DV, BV), H, B).
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    part, c, h, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    g, groups = h // group, tl.num_programs(1) // group
    V = part * BV
    cols, out_cols, place = tl.arange(0, K1), V + tl.arange(0, BV), tl.arange(0, BT)
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    q_base = query + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    half = query.dtype.element_ty
    index = (b * groups + g) * C + c
    s = read_state(state, index, 0, V, DK, K1, DV, BV)
    z = tl.zeros((K1,), tl.float32)
    if NORM != 0:
        z += tl.load(total + index.to(tl.int64) * DK + cols, mask=cols < DK, other=0.0)
    rate = 0.0
    apart = place[:, None] - place[None, :]
    between = 1.0
    if DECAY == 1:
        rate = tl.maximum(tl.load(log_decay + g).to(tl.float32) * LOG2E, CLOSED)
        between = tl.exp2(rate * tl.maximum(apart, 0).to(tl.float32))
    begin = c * CHUNK
    for first in range(begin, tl.minimum(begin + CHUNK, NQ), BT):
        rows = first + place
        end = tl.minimum(first + BT, NQ)
        seen = (rows < NQ)[:, None] & (cols < DK)[None, :]
        q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0)
        v_seen = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        fq, fk = low(q, seen, Q_MAP), low(k, seen, K_MAP)
        p = tl.dot(fq, tl.trans(fk))
        held, largest = scaled(s)
        acc = tl.dot(fq, held.to(half))
        below = tl.zeros((BT,), tl.float32)
        if NORM != 0:
            below += tl.sum((fq.to(tl.float32) if Q_MAP <= 1 else features(q, seen, Q_MAP)) * z[None, :], 1)
        if DECAY == 0:
            acc *= largest
        elif DECAY == 1:
            since = tl.exp2(rate * (place + 1).to(tl.float32))
            p = p * between
            acc *= (since * largest)[:, None]
            below *= since
        else:
            x, every = running(log_decay, b, first, g, groups, NQ, BT)
            since = tl.exp2(x)
            p = p * tl.exp2(tl.minimum(x[:, None] - x[None, :], 0.0))
            acc *= (since * largest)[:, None]
            below *= since
        # Taken, not multiplied by 0: a later key may be infinite.
        p = tl.where(apart >= 0, p, 0.0)
        if NORM != 0:
            below += tl.sum(p, 1)
        acc = tl.dot(p.to(half), v, acc)
        out = acc * scale.to(tl.float32, bitcast=True)
        if NORM != 0:
            below += epsilon.to(tl.float32, bitcast=True)
            if FLOOR:
                below = tl.maximum(below, floor.to(tl.float32, bitcast=True))
            out = out * (1.0 / below)[:, None]
        keep = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
        tl.store(o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS), out.to(output.dtype.element_ty), mask=keep)
        if CHUNK > BT:
            exact = fk.to(tl.float32) if K_MAP <= 1 else features(k, seen, K_MAP)
            if DECAY == 0:
                s = tl.dot(tl.trans(fk), v, s)
                if NORM != 0:
                    z += tl.sum(exact, 0)
            else:
                if DECAY == 1:
                    until, whole = left_over(log_decay, rate, b, rows, g, first, end, groups, NQ, DECAY)
                else:
                    until, whole = tl.exp2(tl.minimum(every - x, 0.0)), tl.exp2(every)
                if NORM != 0:
                    z = z * whole + tl.sum(exact * until[:, None], 0)
                s = tl.dot(tl.trans(fk), (v.to(tl.float32) * until[:, None]).to(half), s * whole)


@triton.jit
def gated_output(
    query, key, value, state, total, log_decay,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o, NQ, C, group, scale, epsilon, floor,
    output,
    Q_MAP: tl.constexpr, K_MAP: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr,
    DK: tl.constexpr, K1: tl.constexpr, BK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """``output`` with a gate for every channel, of chunks that are one tile, ``BK`` features at a time: what tiles of
    float32 gates and features leave of the registers. Grid (C * cdiv(DV, BV), H, B).
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    part, c, h, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    g, groups = h // group, tl.num_programs(1) // group
    V = part * BV
    place, out_cols = tl.arange(0, CHUNK), V + tl.arange(0, BV)
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    q_base = query + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    half = query.dtype.element_ty
    SMALL: tl.constexpr = (half == tl.float16) and (Q_MAP != 3) and (K_MAP != 3)
    index = (b * groups + g) * C + c
    rows = c * CHUNK + place
    p = tl.zeros((CHUNK, CHUNK), tl.float32)
    acc = tl.zeros((CHUNK, BV), tl.float32)
    below = tl.zeros((CHUNK,), tl.float32)
    for K in range(0, K1, BK):
        cols = K + tl.arange(0, BK)
        seen = (rows < NQ)[:, None] & (cols < DK)[None, :]
        q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0)
        fq, fk = features(q, seen, Q_MAP), features(k, seen, K_MAP)
        x = channel_gates(log_decay, b, rows, g, groups, NQ, NQ, cols, DK)
        own = tl.cumsum(x, 0)
        p += gated_products(fq, fk, own, tl.sum(x, 0), place, CHUNK, SMALL)
        reading = fq * tl.exp2(own)
        s, largest = scaled(read_state(state, index, K, V, DK, BK, DV, BV))
        acc += tl.dot(reading.to(half), s.to(half)) * largest
        if NORM != 0:
            z = tl.load(total + index.to(tl.int64) * DK + cols, mask=cols < DK, other=0.0)
            below += tl.sum(reading * z[None, :], 1)
    v_seen = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
    v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
    # Taken, not multiplied by 0: a later key may be infinite.
    p = tl.where(place[:, None] >= place[None, :], p, 0.0)
    out = tl.dot(p.to(half), v, acc) * scale.to(tl.float32, bitcast=True)
    if NORM != 0:
        below += tl.sum(p, 1) + epsilon.to(tl.float32, bitcast=True)
        if FLOOR:
            below = tl.maximum(below, floor.to(tl.float32, bitcast=True))
        out = out * (1.0 / below)[:, None]
    tl.store(o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS), out.to(output.dtype.element_ty), mask=v_seen)
