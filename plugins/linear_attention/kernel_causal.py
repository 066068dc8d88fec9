"""Device code of linear attention under a triangle: states between chunks, and what the queries of a chunk get.

``DECAY`` 0: none; 1: ``log_decay`` [G]; 2: [B, N, G]; 3: [B, N, G, D]. A chunk is a power of two of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.linear_attention.kernel_triton import (
    LOG2E,
    features,
    places,
    read_state,
    scaled,
    write_state,
)


@triton.jit
def gates(log_decay, b, rows, g, groups, tokens, end):
    """Of [B, N, G] at ``rows``, in units of log2; 0 from ``end`` on."""
    at = log_decay + (b.to(tl.int64) * tokens + rows) * groups + g
    return tl.load(at, mask=rows < end, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def channel_gates(log_decay, b, rows, g, groups, tokens, end, DK: tl.constexpr, K1: tl.constexpr):
    """Of [B, N, G, D] at ``rows`` [rows, K1], in units of log2; 0 from ``end`` on and past ``DK``."""
    cols = tl.arange(0, K1)
    at = log_decay + ((b.to(tl.int64) * tokens + rows) * groups + g)[:, None] * DK + cols[None, :]
    return tl.load(at, mask=(rows < end)[:, None] & (cols < DK)[None, :], other=0.0).to(tl.float32) * LOG2E


@triton.jit
def states(
    key, value, log_decay, initial_state, initial_total,
    k_b, k_n, k_h, v_b, v_n, v_h, NK, C,
    state, total, final_state, final_total,
    MAP: tl.constexpr, DECAY: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    CHUNK: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: all chunks of one key head in order, ``BV`` channels of the values. Grid (cdiv(DV, BV), HKV, B)."""
    part, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    head = b * groups + g
    V = part * BV
    cols, out_cols = tl.arange(0, K1), V + tl.arange(0, BV)
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    acc, sums = tl.zeros((K1, BV), tl.float32), tl.zeros((K1,), tl.float32)
    if initial_state is not None:
        acc += read_state(initial_state, head, V, DK, K1, DV, BV)
    if initial_total is not None:
        sums += tl.load(initial_total + head.to(tl.int64) * DK + cols, mask=cols < DK, other=0.0)
    rate = 0.0
    if DECAY == 1:
        rate = tl.load(log_decay + g).to(tl.float32) * LOG2E
    for c in range(0, C):
        index = head * C + c
        write_state(state, acc, index, V, DK, K1, DV, BV)
        if total is not None:
            if part == 0:
                tl.store(total + index.to(tl.int64) * DK + cols, sums, mask=cols < DK)
        first = c * CHUNK
        end = tl.minimum(first + CHUNK, NK)
        rows = first + tl.arange(0, CHUNK)
        seen = (rows < end)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0)
        v_seen = (rows < end)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        f = features(k, seen, MAP)
        if DECAY == 1:
            f *= tl.exp2(rate * tl.maximum(end - 1 - rows, 0).to(tl.float32))[:, None]
            kept = tl.exp2(rate * (end - first).to(tl.float32))
            acc, sums = acc * kept, sums * kept
        elif DECAY == 2:
            x = gates(log_decay, b, rows, g, groups, NK, end)
            whole = tl.sum(x, 0)
            f *= tl.exp2(whole - tl.cumsum(x, 0))[:, None]
            acc, sums = acc * tl.exp2(whole), sums * tl.exp2(whole)
        elif DECAY == 3:
            x = channel_gates(log_decay, b, rows, g, groups, NK, end, DK, K1)
            whole = tl.sum(x, 0)
            f *= tl.exp2(whole[None, :] - tl.cumsum(x, 0))
            acc, sums = acc * tl.exp2(whole)[:, None], sums * tl.exp2(whole)
        sums += tl.sum(f, 0)
        acc = tl.dot(tl.trans(f.to(v.dtype)), v, acc)
    if final_state is not None:
        write_state(final_state, acc, head, V, DK, K1, DV, BV)
    if final_total is not None:
        if part == 0:
            tl.store(final_total + head.to(tl.int64) * DK + cols, sums, mask=cols < DK)


@triton.jit
def since(log_decay, b, rows, first, g, groups, tokens, CHUNK: tl.constexpr):
    """Sums of the gates from the chunk's ``first`` token to each of ``rows``, which are in the chunk."""
    every = first + tl.arange(0, CHUNK)
    x = gates(log_decay, b, every, g, groups, tokens, tokens)
    return tl.sum(tl.where(every[None, :] <= rows[:, None], x[None, :], 0.0), 1)


@triton.jit
def output(
    query, key, value, state, total, log_decay,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, NQ, C, group, scale, epsilon, floor,
    output,
    Q_MAP: tl.constexpr, K_MAP: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr, DECAY: tl.constexpr,
    DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: ``BM`` queries of one head, all in one chunk, ``BV`` channels.
    Grid (cdiv(NQ, BM) * cdiv(DV, BV), H, B).
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    part, tile, h, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    g, groups = h // group, tl.num_programs(1) // group
    low = tile * BM
    c = low // CHUNK
    first = c * CHUNK
    V = part * BV
    cols, out_cols = tl.arange(0, K1), V + tl.arange(0, BV)
    q_base = query + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    rows = low + tl.arange(0, BM)
    seen = (rows < NQ)[:, None] & (cols < DK)[None, :]
    q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
    f = features(q, seen, Q_MAP)
    half = q.dtype
    rate, reach = 0.0, tl.zeros((BM,), tl.float32)
    reading = f
    if DECAY == 1:
        rate = tl.load(log_decay + g).to(tl.float32) * LOG2E
        reading = f * tl.exp2(rate * (rows - first + 1).to(tl.float32))[:, None]
    elif DECAY == 2:
        reach = since(log_decay, b, rows, first, g, groups, NQ, CHUNK)
        reading = f * tl.exp2(reach)[:, None]
    index = (b * groups + g) * C + c
    s, largest = scaled(read_state(state, index, V, DK, K1, DV, BV))
    acc = tl.dot(reading.to(half), s.to(half)) * largest
    below = tl.zeros((BM,), tl.float32)
    if NORM != 0:
        z = tl.load(total + index.to(tl.int64) * DK + cols, mask=cols < DK, other=0.0)
        below += tl.sum(reading * z[None, :], 1)
    f = f.to(half)
    for start in range(first, low + BM, BM):
        keys = start + tl.arange(0, BM)
        k_seen = (keys < NQ)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(keys, cols, k_n * K_UNIT, K_COLUMNS), mask=k_seen, other=0.0)
        v_seen = (keys < NQ)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(keys, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        p = tl.dot(f, tl.trans(features(k, k_seen, K_MAP).to(half)))
        apart = rows[:, None] - keys[None, :]
        if DECAY == 1:
            p *= tl.exp2(rate * tl.maximum(apart, 0).to(tl.float32))
        elif DECAY == 2:
            there = since(log_decay, b, keys, first, g, groups, NQ, CHUNK)
            p *= tl.exp2(tl.minimum(reach[:, None] - there[None, :], 0.0))
        p = tl.where(apart >= 0, p, 0.0)
        if NORM != 0:
            below += tl.sum(p, 1)
        acc = tl.dot(p.to(half), v, acc)
    out = acc * scale.to(tl.float32, bitcast=True)
    if NORM != 0:
        below += epsilon.to(tl.float32, bitcast=True)
        if FLOOR:
            below = tl.maximum(below, floor.to(tl.float32, bitcast=True))
        out = out / below[:, None]
    keep = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
    tl.store(o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS), out.to(output.dtype.element_ty), mask=keep)


@triton.jit
def gated_output(
    query, key, value, state, log_decay,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, NQ, C, group, scale, epsilon,
    output,
    Q_MAP: tl.constexpr, K_MAP: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, CHUNK: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """``output`` with a gate for every channel. Between a query and an earlier tile of keys the decays are split where
    the query's tile begins, so that both factors are at most 1; inside of a tile each pair has its own. No normaliser.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    part, tile, h, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    g, groups = h // group, tl.num_programs(1) // group
    low = tile * BM
    c = low // CHUNK
    first = c * CHUNK
    V = part * BV
    place, cols, out_cols = tl.arange(0, BM), tl.arange(0, K1), V + tl.arange(0, BV)
    q_base = query + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    rows = low + place
    seen = (rows < NQ)[:, None] & (cols < DK)[None, :]
    q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
    f = features(q, seen, Q_MAP)
    half = q.dtype
    x = channel_gates(log_decay, b, rows, g, groups, NQ, NQ, DK, K1)
    own = tl.cumsum(x, 0)
    # Pairs inside of the tile, a key at a time.
    p = tl.zeros((BM, BM), tl.float32)
    for j in range(0, BM):
        at = low + j
        there = cols < tl.where(at < NQ, DK, 0)
        k_at = cols.to(tl.int64) * (k_n * K_UNIT) + at if K_COLUMNS else at.to(tl.int64) * (k_n * K_UNIT) + cols
        one = features(tl.load(k_base + k_at, mask=there, other=0.0)[None, :], there[None, :], K_MAP)
        until = tl.sum(tl.where((place <= j)[:, None], x, 0.0), 0)
        column = tl.sum(f * one * tl.exp2(tl.minimum(own - until[None, :], 0.0)), 1)
        p = tl.where((place == j)[None, :] & (place >= j)[:, None], column[:, None], p)
    v_seen = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
    v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
    acc = tl.dot(p.to(half), v)
    reading = (f * tl.exp2(own)).to(half)
    between = tl.zeros((K1,), tl.float32)
    for back in range(1, (low - first) // BM + 1):
        keys = low - back * BM + place
        k_seen = (keys < NQ)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(keys, cols, k_n * K_UNIT, K_COLUMNS), mask=k_seen, other=0.0)
        v_seen = (keys < NQ)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(keys, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        y = channel_gates(log_decay, b, keys, g, groups, NQ, NQ, DK, K1)
        whole = tl.sum(y, 0)
        near = features(k, k_seen, K_MAP) * tl.exp2(between[None, :] + whole[None, :] - tl.cumsum(y, 0))
        acc = tl.dot(tl.dot(reading, tl.trans(near.to(half))).to(half), v, acc)
        between += whole
    index = (b * groups + g) * C + c
    s, largest = scaled(read_state(state, index, V, DK, K1, DV, BV))
    reading = (f * tl.exp2(own + between[None, :])).to(half)
    acc += tl.dot(reading, s.to(half)) * largest
    keep = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
    out = acc * scale.to(tl.float32, bitcast=True)
    tl.store(o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS), out.to(output.dtype.element_ty), mask=keep)
