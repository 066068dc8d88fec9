"""Dense, causal and windowed attention in Triton for every architecture (FlashAttention, arXiv:2205.14135, 2307.08691).

One block takes BM queries of one head. Its keys are those that any of its queries may see, in three runs: keys that
only some see on the left, keys that all see (no mask code), keys that only some see on the right.
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


@triton.jit
def run(
    m, l, acc1, acc2, q1, q2, K, V, KeyMask, Bias, Mask,
    position, bias_rows, mask_rows, start, end, keys, k_row, v_row, key_mask_k, bias_k, mask_k, left, right,
    factor, softcap,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DK: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Keys ``start`` .. ``end`` for a tile of queries. ``position`` [BM] is where each query stands among the keys."""
    inside = tl.arange(0, BN)
    k = K + tl.cast(start, tl.int64) * k_row
    v = V + tl.cast(start, tl.int64) * v_row
    # Offsets inside a tile fit in 32 bits: addresses of 64 for each score would not leave registers for head dim 128.
    if Bias is not None:
        Bias += tl.cast(start, tl.int64) * bias_k
        bias_tile = bias_rows[:, None] + (inside * bias_k)[None, :]
    if Mask is not None:
        Mask += tl.cast(start, tl.int64) * mask_k
        mask_tile = mask_rows[:, None] + (inside * mask_k)[None, :]
    for first in tl.range(start, end, BN):
        n = first + inside
        keep = n < keys
        k1 = load_rows(k, inside, k_row, 0, K1, DK, keep, MASKED)
        k2 = k1
        if DK > K1:
            k2 = load_rows(k, inside, k_row, K1, K2, DK, keep, MASKED)
        s = products(q1, q2, k1, k2, DK > K1)
        unit = factor
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2 x))
            x = s * factor
            s = (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * x)))
            unit = 1.0
        if Bias is not None:
            added = tl.load(Bias + bias_tile, mask=keep[None, :], other=0.0)
            Bias += tl.cast(BN, tl.int64) * bias_k
            s = s * unit + added.to(tl.float32) * LOG2E
            unit = 1.0
        if MASKED:
            seen = keep[None, :]
            if HAS_LEFT:
                seen = seen & (n[None, :] >= position[:, None] - left)
            if HAS_RIGHT:
                seen = seen & (n[None, :] <= position[:, None] + right)
            s = tl.where(seen, s, -float("inf"))
        if KeyMask is not None:
            shown = tl.load(KeyMask + n.to(tl.int64) * key_mask_k, mask=keep, other=0)
            s = tl.where((shown != 0)[None, :], s, -float("inf"))
        if Mask is not None:
            shown = tl.load(Mask + mask_tile, mask=keep[None, :], other=0)
            Mask += tl.cast(BN, tl.int64) * mask_k
            s = tl.where(shown != 0, s, -float("inf"))
        v1 = load_rows(v, inside, v_row, 0, V1, DV, keep, MASKED)
        v2 = v1
        if DV > V1:
            v2 = load_rows(v, inside, v_row, V1, V2, DV, keep, MASKED)
        m, l, acc1, acc2 = step(s, unit, m, l, acc1, acc2, v1, v2, DV > V1)
        k += BN * k_row
        v += BN * v_row
    return m, l, acc1, acc2


@triton.jit
def attention(
    query, key, value, key_mask, bias, sinks, mask, key_lengths,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o,
    key_mask_b, key_mask_k, bias_b, bias_h, bias_q, bias_k, sinks_h, mask_b, mask_h, mask_q, mask_k,
    NQ, NK, group, scale, softcap, left, right,
    output, log_sum_exp,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CLAMP: tl.constexpr, SOFTCAP: tl.constexpr, RULE: tl.constexpr,
    DK: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """query [B, NQ, H, DK], key [B, NK, H / group, DK], value [B, NK, H / group, DV] by strides in 8 elements ->
    output [B, NQ, H, DV], log_sum_exp [B, H, NQ] float32. Optional tensors are None where absent. ``scale`` and
    ``softcap`` are the bits of a float32. CLAMP: windows are moved inward at both ends, as NATTEN's are.
    Grid: (ceil(NQ / BM), H, B).
    """
    tile = tl.program_id(0)
    if HAS_RIGHT:
        tile = tl.num_programs(0) - 1 - tile  # the longest rows first
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    g = h // group
    first = tile * BM
    rows = tl.arange(0, BM)
    i = first + rows
    real = i < NQ
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    q_base = query + (b * q_b + h * q_h + first.to(tl.int64) * q_n) * 8
    k_base = key + (b * k_b + g * k_h) * 8
    v_base = value + (b * v_b + g * v_h) * 8
    o_base = output + (b * o_b + h * o_h + first.to(tl.int64) * o_n) * 8
    q_row, k_row, v_row, o_row = q_n * 8, k_n * 8, v_n * 8, o_n * 8

    keys = NK
    if key_lengths is not None:
        keys = tl.minimum(tl.maximum(tl.load(key_lengths + b).to(tl.int32), 0), NK)
    factor = scale.to(tl.float32, bitcast=True)
    if SOFTCAP:
        cap = softcap.to(tl.float32, bitcast=True)
        factor = factor / cap * LOG2E
    else:
        cap = 0.0
        factor = factor * LOG2E

    key_mask_base = key_mask
    if key_mask is not None:
        key_mask_base = key_mask + b * key_mask_b
    bias_base, bias_rows = bias, i
    if bias is not None:
        bias_base = bias + b * bias_b + h.to(tl.int64) * bias_h + first.to(tl.int64) * bias_q
        bias_rows = tl.where(real, rows, 0) * bias_q
    mask_base, mask_rows = mask, i
    if mask is not None:
        mask_base = mask + b * mask_b + h.to(tl.int64) * mask_h + first.to(tl.int64) * mask_q
        mask_rows = tl.where(real, rows, 0) * mask_q

    q1 = load_rows(q_base, rows, q_row, 0, K1, DK, real, True)
    q2 = q1
    if DK > K1:
        q2 = load_rows(q_base, rows, q_row, K1, K2, DK, real, True)
    m = tl.full((BM,), NO_KEY, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc1 = tl.zeros((BM, V1), tl.float32)
    acc2 = tl.zeros((BM, V2), tl.float32)

    # Queries are the last tokens: query i stands at i + NK - NQ.
    position = i + (NK - NQ)
    low = first + (NK - NQ)
    high = tl.minimum(first + BM, NQ) - 1 + (NK - NQ)
    if CLAMP:
        position = tl.minimum(tl.maximum(position, left), NK - 1 - right)
        low = tl.minimum(tl.maximum(low, left), NK - 1 - right)
        high = tl.minimum(tl.maximum(high, left), NK - 1 - right)
    start, end = 0, keys
    if HAS_LEFT:
        start = tl.minimum(tl.maximum(low - left, 0), keys)
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(high + right + 1, keys), start)
    all_from, all_to = start, end
    if HAS_LEFT:
        partly = tl.maximum(high - left - start, 0)
        all_from = tl.minimum(start + tl.cdiv(partly, BN) * BN, end)
    if HAS_RIGHT:
        all_to = tl.maximum(tl.minimum(low + right + 1, keys), all_from)
    all_to = all_from + (all_to - all_from) // BN * BN
    if HAS_LEFT:
        m, l, acc1, acc2 = run(
            m, l, acc1, acc2, q1, q2, k_base, v_base, key_mask_base, bias_base, mask_base,
            position, bias_rows, mask_rows, start, all_from, end, k_row, v_row, key_mask_k, bias_k, mask_k, left, right,
            factor, cap, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, DK, K1, K2, DV, V1, V2, BN,
        )  # fmt: skip
    m, l, acc1, acc2 = run(
        m, l, acc1, acc2, q1, q2, k_base, v_base, key_mask_base, bias_base, mask_base,
        position, bias_rows, mask_rows, all_from, all_to, end, k_row, v_row, key_mask_k, bias_k, mask_k, left, right,
        factor, cap, False, HAS_LEFT, HAS_RIGHT, SOFTCAP, DK, K1, K2, DV, V1, V2, BN,
    )  # fmt: skip
    m, l, acc1, acc2 = run(
        m, l, acc1, acc2, q1, q2, k_base, v_base, key_mask_base, bias_base, mask_base,
        position, bias_rows, mask_rows, all_to, end, end, k_row, v_row, key_mask_k, bias_k, mask_k, left, right,
        factor, cap, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, DK, K1, K2, DV, V1, V2, BN,
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
    store_rows(o_base, rows, o_row, 0, V1, DV, real, out1)
    if DV > V1:
        store_rows(o_base, rows, o_row, V1, V2, DV, real, out2)
    if log_sum_exp is not None:
        tl.store(log_sum_exp + (b * tl.num_programs(1) + h) * NQ + i, lse, mask=real)
