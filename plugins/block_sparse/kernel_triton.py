"""Attention to listed blocks of keys, in Triton for every architecture.

A thread block takes BM queries of one row of blocks of one head. It meets the row's partial blocks first, with their
masks, then its full ones, without any; a block of keys is met BN keys at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.tile_softmax import (
    LOG2E,
    NO_KEY,
    load_rows,
    mean_of_values,
    moved,
    products,
    row_end,
    step,
    store_rows,
)

WORD = tl.constexpr(32)  # bits of a mask that lie in one number


@triton.jit
def counted_step(s, factor, times, m, l, acc1, acc2, v1, v2, SPLIT: tl.constexpr):
    """``tile_softmax.step`` for keys that count ``times`` times."""
    new = tl.maximum(m, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None]) * times
    alpha = tl.exp2(m - new)
    l = l * alpha + tl.sum(p, 1)
    weights = p.to(v1.dtype)
    acc1 = tl.dot(weights, v1, acc1 * alpha[:, None])
    if SPLIT:
        acc2 = tl.dot(weights, v2, acc2 * alpha[:, None])
    return new, l, acc1, acc2


@triton.jit
def shown(words, part, BN: tl.constexpr):
    """Bits [BM, BN] of keys part * BN .. of a block; ``words`` [BM]: where the bits of each query begin."""
    inside = tl.arange(0, BN)
    first = words + part * BN // WORD
    bits = tl.load(first)[:, None]
    for w in tl.static_range(1, BN // WORD):
        bits = tl.where((inside >= w * WORD)[None, :], tl.load(first + w)[:, None], bits)
    return (bits >> ((part * BN + inside) % WORD)[None, :]) & 1


@triton.jit
def run(
    m, l, acc1, acc2, q1, q2, K, V, Columns, Kinds, Words, Counts, KeyMask, Bias,
    start, end, bias_rows, keys, k_row, v_row, key_mask_k, bias_k, factor,
    MASKED: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Entries ``start`` .. ``end`` of the lists for a tile of queries. ``Words`` [BM]: each query's bits in mask 0."""
    PARTS: tl.constexpr = BLOCK // BN
    inside = tl.arange(0, BN)
    # The column of the next tile is asked for a tile ahead.
    column = tl.load(Columns + start, mask=start < end, other=0)
    for t in tl.range(start * PARTS, end * PARTS):
        entry = t // PARTS
        part = t % PARTS
        first = column * BLOCK + part * BN
        column = tl.load(Columns + tl.minimum((t + 1) // PARTS, end - 1))
        n = first + inside
        keep = n < keys
        k = K + tl.cast(first, tl.int64) * k_row
        v = V + tl.cast(first, tl.int64) * v_row
        k1 = load_rows(k, inside, k_row, 0, K1, DK, keep, MASKED)
        k2 = k1
        if DK > K1:
            k2 = load_rows(k, inside, k_row, K1, K2, DK, keep, MASKED)
        s = products(q1, q2, k1, k2, DK > K1)
        unit = factor
        if Bias is not None:
            added = tl.load(Bias + bias_rows[:, None] + n.to(tl.int64)[None, :] * bias_k, mask=keep[None, :], other=0.0)
            s = s * unit + added.to(tl.float32) * LOG2E
            unit = 1.0
        if MASKED:
            mask = tl.load(Kinds + entry).to(tl.int64)
            bits = shown(Words + mask * (BLOCK * BLOCK // WORD), part, BN)
            s = tl.where((bits != 0) & keep[None, :], s, -float("inf"))
        if KeyMask is not None:
            there = tl.load(KeyMask + n.to(tl.int64) * key_mask_k, mask=keep, other=0)
            s = tl.where((there != 0)[None, :], s, -float("inf"))
        v1 = load_rows(v, inside, v_row, 0, V1, DV, keep, MASKED)
        v2 = v1
        if DV > V1:
            v2 = load_rows(v, inside, v_row, V1, V2, DV, keep, MASKED)
        if Counts is not None:
            times = tl.load(Counts + entry).to(tl.float32)
            m, l, acc1, acc2 = counted_step(s, unit, times, m, l, acc1, acc2, v1, v2, DV > V1)
        else:
            m, l, acc1, acc2 = step(s, unit, m, l, acc1, acc2, v1, v2, DV > V1)
    return m, l, acc1, acc2


@triton.jit
def attention(
    query, key, value, rows, columns, kinds, masks, key_mask, bias, sinks, order, counts,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o,
    rows_b, rows_h, key_mask_b, key_mask_k, bias_b, bias_h, bias_q, bias_k, sinks_h,
    NQ, NK, H, B, group, scale,
    output, log_sum_exp,
    RULE: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """query [B, NQ, H, DK], key [B, NK, H / group, DK], value [B, NK, H / group, DV] by strides in 8 elements, and the
    lists of ``op.py``, which have no gaps -> output [B, NQ, H, DV], log_sum_exp [B, H, NQ] float32. Optional tensors
    are None where absent; ``rows_b`` and ``rows_h`` are 0 where all batch entries or heads share their lists. ``scale``
    holds the bits of a float32. Grid: ceil(NQ / BLOCK) * (BLOCK / BM) * H * B, in the order of ``order``, or the last
    rows first.
    """
    SPLIT: tl.constexpr = BLOCK // BM
    number = tl.program_id(0) // SPLIT
    count = tl.cdiv(NQ, BLOCK)
    sets_h = tl.where(rows_h > 0, H, 1)
    listed = tl.where(rows_b > 0, B, 1) * sets_h * count
    copy = number // listed
    n = number % listed
    if order is not None:
        n = tl.load(order + n)
    else:
        n = listed - 1 - n
    r = n % count
    set_h = n // count % sets_h
    set_b = n // count // sets_h
    alike = H // sets_h  # heads that share their lists
    h = set_h + copy % alike
    b = (set_b + copy // alike).to(tl.int64)
    g = h // group
    first = r * BLOCK + tl.program_id(0) % SPLIT * BM
    inside = tl.arange(0, BM)
    i = first + inside
    real = i < NQ
    span = rows + n * 3
    start = tl.load(span)
    all_from = tl.load(span + 1)
    end = tl.load(span + 2)
    if SPLIT > 1:
        there = first < NQ
        all_from = tl.where(there, all_from, start)
        end = tl.where(there, end, start)
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    q_base = query + (b * q_b + h * q_h + first.to(tl.int64) * q_n) * 8
    k_base = key + (b * k_b + g * k_h) * 8
    v_base = value + (b * v_b + g * v_h) * 8
    o_base = output + (b * o_b + h * o_h + first.to(tl.int64) * o_n) * 8
    q_row, k_row, v_row, o_row = q_n * 8, k_n * 8, v_n * 8, o_n * 8
    factor = scale.to(tl.float32, bitcast=True) * LOG2E
    words = masks + (i % BLOCK) * (BLOCK // WORD)

    key_mask_base = key_mask
    if key_mask is not None:
        key_mask_base = key_mask + b * key_mask_b
    bias_base, bias_rows = bias, i
    if bias is not None:
        bias_base = bias + b * bias_b + h.to(tl.int64) * bias_h
        bias_rows = tl.where(real, i, 0).to(tl.int64) * bias_q

    q1 = load_rows(q_base, inside, q_row, 0, K1, DK, real, True)
    q2 = q1
    if DK > K1:
        q2 = load_rows(q_base, inside, q_row, K1, K2, DK, real, True)
    m = tl.full((BM,), NO_KEY, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc1 = tl.zeros((BM, V1), tl.float32)
    acc2 = tl.zeros((BM, V2), tl.float32)
    m, l, acc1, acc2 = run(
        m, l, acc1, acc2, q1, q2, k_base, v_base, columns, kinds, words, counts, key_mask_base, bias_base,
        start, all_from, bias_rows, NK, k_row, v_row, key_mask_k, bias_k, factor,
        True, DK, K1, K2, DV, V1, V2, BLOCK, BN,
    )  # fmt: skip
    m, l, acc1, acc2 = run(
        m, l, acc1, acc2, q1, q2, k_base, v_base, columns, kinds, words, counts, key_mask_base, bias_base,
        all_from, end, bias_rows, NK, k_row, v_row, key_mask_k, bias_k, factor,
        False, DK, K1, K2, DV, V1, V2, BLOCK, BN,
    )  # fmt: skip

    if sinks is not None:
        # It may be far above all scores, and is all that a row without a key has.
        sink = tl.load(sinks + h * sinks_h).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        alpha = tl.exp2(m - top)
        l = l * alpha + tl.exp2(sink - top)
        acc1, acc2, m = acc1 * alpha[:, None], acc2 * alpha[:, None], top
    mean1, mean2 = tl.zeros((V1,), tl.float32), tl.zeros((V2,), tl.float32)
    if RULE == 1:
        if tl.max(tl.where(real & (l == 0.0), 1, 0), 0) > 0:
            mean1, mean2 = mean_of_values(v_base, NK, v_row, V1, V2, DV, BN)
    out1, out2, lse = row_end(m, l, acc1, acc2, mean1, mean2, RULE)
    store_rows(o_base, inside, o_row, 0, V1, DV, real, out1)
    if DV > V1:
        store_rows(o_base, inside, o_row, V1, V2, DV, real, out2)
    if log_sum_exp is not None:
        tl.store(log_sum_exp + (b * H + h) * NQ + i, lse, mask=real)
