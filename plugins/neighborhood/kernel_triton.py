"""Neighborhood attention in Triton (arXiv:2204.07143, 2403.04690, 2504.16922), for every architecture.

One block takes a box of T0 x T1 x T2 queries of the grid, on one line of the dilation an axis. Its keys are the box of
E0 x E1 x E2 tokens that holds all their windows, addressed where they lie: no token is moved, none outside is touched.
Axes that a grid does not have are of size 1. Prefix and suffix tokens are a run of keys before and after the box, and
as queries they are tiles of their own that see all tokens.

Whether a query sees a key is one comparison for all axes: bounds and coordinates, counted from the box's corner, lie in
fields of a word, each with a guard bit which stays set exactly where the difference is not negative.
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
def window(
    q, length, K: tl.constexpr, LEFT: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, CLAMP: tl.constexpr
):
    """Of the query at place ``q`` of a line of ``length`` tokens: first and last key that it sees, and its centre."""
    group = q // STRIDE * STRIDE
    if CAUSAL:
        leader = tl.minimum(group + STRIDE - 1, length - 1)
        return tl.maximum(leader - K + 1, 0), tl.minimum(q, length - 1), leader
    centre = tl.minimum(group + STRIDE // 2, length - 1)
    if CLAMP:
        centre = tl.maximum(tl.minimum(centre, length - K + LEFT), LEFT)
    return tl.maximum(centre - LEFT, 0), tl.minimum(centre + K - 1 - LEFT, length - 1), centre


@triton.jit
def axis_tile(
    tile, G: tl.constexpr, T: tl.constexpr, E: tl.constexpr, K: tl.constexpr, LEFT: tl.constexpr,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Of a tile's number on an axis: its remainder of the dilation, the line's length, the first query's place and the
    first key's.
    """
    LONGEST: tl.constexpr = (G + DILATION - 1) // DILATION
    COUNT: tl.constexpr = (LONGEST + T - 1) // T
    rest = tile // COUNT
    first = tile % COUNT * T
    length = (G - rest + DILATION - 1) // DILATION
    low, _, _ = window(first, length, K, LEFT, STRIDE, CAUSAL, CLAMP)
    return rest, length, first, tl.maximum(tl.minimum(low, length - E), 0)


@triton.jit
def bounds(low, high, FIELD: tl.constexpr, PLACE: tl.constexpr):
    """The queries' side of one axis in fields of FIELD bits: guard - low, guard + high."""
    GUARD: tl.constexpr = 1 << (FIELD - 1)
    return ((GUARD - low).to(tl.uint32) << (PLACE * FIELD)) + ((GUARD + high).to(tl.uint32) << ((PLACE + 1) * FIELD))


@triton.jit
def coordinate(x, FIELD: tl.constexpr, PLACE: tl.constexpr):
    """The keys' side: + x in the first field, - x in the second."""
    return (x.to(tl.uint32) << (PLACE * FIELD)) - (x.to(tl.uint32) << ((PLACE + 1) * FIELD))


@triton.jit
def take(
    s, factor, m, l, acc1, acc2, tokens, keep, KeyMask, Bias, key_mask_k, bias_rows, bias_k, v_base, v_row,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Bias, key mask and values of a tile of keys at ``tokens``, and the step of the softmax."""
    unit = factor
    if Bias is not None:
        added = tl.load(Bias + bias_rows[:, None] + tokens[None, :] * bias_k, mask=keep[None, :], other=0.0)
        s = s * factor + added.to(tl.float32) * LOG2E
        unit = 1.0
    if KeyMask is not None:
        shown = tl.load(KeyMask + tokens * key_mask_k, mask=keep, other=0)
        s = tl.where((shown != 0)[None, :], s, -float("inf"))
    v1 = load_rows(v_base, tokens, v_row, 0, V1, DV, keep, MASKED)
    v2 = v1
    if DV > V1:
        v2 = load_rows(v_base, tokens, v_row, V1, V2, DV, keep, MASKED)
    return step(s, unit, m, l, acc1, acc2, v1, v2, DV > V1)


@triton.jit
def run(
    m, l, acc1, acc2, q1, q2, k_base, v_base, KeyMask, Bias, start, end, k_row, v_row, key_mask_k, bias_rows, bias_k,
    factor,
    DK: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Tokens ``start`` .. ``end``, which all queries of the tile see."""
    for first in tl.range(start, end, BN):
        n = first + tl.arange(0, BN)
        keep = n < end
        tokens = n.to(tl.int64)
        k1 = load_rows(k_base, tokens, k_row, 0, K1, DK, keep, True)
        k2 = k1
        if DK > K1:
            k2 = load_rows(k_base, tokens, k_row, K1, K2, DK, keep, True)
        s = tl.where(keep[None, :], products(q1, q2, k1, k2, DK > K1), -float("inf"))
        m, l, acc1, acc2 = take(
            s, factor, m, l, acc1, acc2, tokens, keep, KeyMask, Bias, key_mask_k, bias_rows, bias_k, v_base, v_row,
            DV, V1, V2, True,
        )  # fmt: skip
    return m, l, acc1, acc2


@triton.jit
def neighborhood(
    query, key, value, key_mask, bias,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o,
    key_mask_b, key_mask_k, bias_b, bias_h, bias_q, bias_k, group, scale,
    output,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    L0: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    CLAMP: tl.constexpr, BALL: tl.constexpr, ALL_SEEN: tl.constexpr, NARROW: tl.constexpr, CLIP: tl.constexpr,
    PREFIX: tl.constexpr, SUFFIX: tl.constexpr, RULE: tl.constexpr,
    DK: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """query [B, N, H, DK], key [B, N, H / group, DK], value [B, N, H / group, DV] by strides in 8 elements -> output
    [B, N, H, DV]; N = PREFIX + G0 G1 G2 + SUFFIX. W: kernel size, L: left, S: stride, D: dilation, C: causal an axis.
    NARROW: extents below 128, so that two axes share a word. ALL_SEEN: every query of a tile sees its whole box. CLIP:
    a box may be longer than a line. Grid: (tiles, H, B); tiles of prefix and suffix queries come last.
    """
    BM: tl.constexpr = T0 * T1 * T2
    GRID: tl.constexpr = G0 * G1 * G2
    TOKENS: tl.constexpr = PREFIX + GRID + SUFFIX
    BOX: tl.constexpr = E0 * E1 * E2
    N1: tl.constexpr = ((G1 + D1 - 1) // D1 + T1 - 1) // T1 * D1
    N2: tl.constexpr = ((G2 + D2 - 1) // D2 + T2 - 1) // T2 * D2
    N0: tl.constexpr = ((G0 + D0 - 1) // D0 + T0 - 1) // T0 * D0
    TILES: tl.constexpr = N0 * N1 * N2
    tile = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    g = h // group
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    q_base = query + (b * q_b + h * q_h) * 8
    k_base = key + (b * k_b + g * k_h) * 8
    v_base = value + (b * v_b + g * v_h) * 8
    o_base = output + (b * o_b + h * o_h) * 8
    q_row, k_row, v_row, o_row = q_n * 8, k_n * 8, v_n * 8, o_n * 8
    factor = scale.to(tl.float32, bitcast=True) * LOG2E

    r0, n0, f0, b0 = axis_tile(tile // (N1 * N2), G0, T0, E0, W0, L0, S0, D0, C0, CLAMP)
    r1, n1, f1, b1 = axis_tile(tile // N2 % N1, G1, T1, E1, W1, L1, S1, D1, C1, CLAMP)
    r2, n2, f2, b2 = axis_tile(tile % N2, G2, T2, E2, W2, L2, S2, D2, C2, CLAMP)
    row = tl.arange(0, BM)
    p0 = f0 + row // (T1 * T2)
    p1 = f1 + row // T2 % T1
    p2 = f2 + row % T2
    real = (p0 < n0) & (p1 < n1) & (p2 < n2)
    token = PREFIX + ((p0 * D0 + r0) * G1 + p1 * D1 + r1) * G2 + p2 * D2 + r2
    box_end = BOX
    if PREFIX + SUFFIX > 0:
        outside = tile >= TILES
        extra = (tile - TILES) * BM + row
        real = tl.where(outside, extra < PREFIX + SUFFIX, real)
        token = tl.where(outside, tl.where(extra < PREFIX, extra, extra + GRID), token)
        box_end = tl.where(outside, 0, BOX)
    token = tl.where(real, token, 0).to(tl.int64)

    q1 = load_rows(q_base, token, q_row, 0, K1, DK, real, True)
    q2 = q1
    if DK > K1:
        q2 = load_rows(q_base, token, q_row, K1, K2, DK, real, True)
    m = tl.full((BM,), NO_KEY, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc1 = tl.zeros((BM, V1), tl.float32)
    acc2 = tl.zeros((BM, V2), tl.float32)
    key_mask_base = key_mask
    if key_mask is not None:
        key_mask_base = key_mask + b * key_mask_b
    bias_base, bias_rows = bias, token
    if bias is not None:
        bias_base = bias + b * bias_b + h.to(tl.int64) * bias_h
        bias_rows = token * bias_q

    if PREFIX + SUFFIX > 0:
        m, l, acc1, acc2 = run(
            m, l, acc1, acc2, q1, q2, k_base, v_base, key_mask_base, bias_base, 0,
            tl.where(outside, TOKENS, PREFIX), k_row, v_row, key_mask_k, bias_rows, bias_k, factor,
            DK, K1, K2, DV, V1, V2, BN,
        )  # fmt: skip
        m, l, acc1, acc2 = run(
            m, l, acc1, acc2, q1, q2, k_base, v_base, key_mask_base, bias_base,
            tl.where(outside, TOKENS, PREFIX + GRID), TOKENS, k_row, v_row, key_mask_k, bias_rows, bias_k, factor,
            DK, K1, K2, DV, V1, V2, BN,
        )  # fmt: skip

    # Bounds of every query, counted from the corner of the box.
    low0, high0, c0 = window(p0, n0, W0, L0, S0, C0, CLAMP)
    low1, high1, c1 = window(p1, n1, W1, L1, S1, C1, CLAMP)
    low2, high2, c2 = window(p2, n2, W2, L2, S2, C2, CLAMP)
    FIELD: tl.constexpr = 8 if NARROW else 16
    GUARDS: tl.constexpr = 0x80808080 if NARROW else 0x80008000
    rows_a = bounds(low2 - b2, high2 - b2, FIELD, 0)
    if NARROW:
        rows_a += bounds(low1 - b1, high1 - b1, FIELD, 2)
        rows_b = bounds(low0 - b0, high0 - b0, FIELD, 0) + 0x80800000
    else:
        rows_b = bounds(low1 - b1, high1 - b1, FIELD, 0)
    rows_c = bounds(low0 - b0, high0 - b0, FIELD, 0)

    corner = PREFIX + ((b0 * D0 + r0) * G1 + b1 * D1 + r1) * G2 + b2 * D2 + r2
    for first in tl.range(0, box_end, BN):
        x = first + tl.arange(0, BN)
        keep = x < BOX
        x2 = x % E2
        x1 = x // E2 % E1
        x0 = x // (E2 * E1)
        if CLIP:
            keep = keep & (b0 + x0 < n0) & (b1 + x1 < n1) & (b2 + x2 < n2)
        tokens = (corner + x0 * (D0 * G1 * G2) + x1 * (D1 * G2) + x2 * D2).to(tl.int64)
        k1 = load_rows(k_base, tokens, k_row, 0, K1, DK, keep, BOX % BN != 0 or CLIP)
        k2 = k1
        if DK > K1:
            k2 = load_rows(k_base, tokens, k_row, K1, K2, DK, keep, BOX % BN != 0 or CLIP)
        s = products(q1, q2, k1, k2, DK > K1)
        if ALL_SEEN:
            if BOX % BN != 0:
                s = tl.where(keep[None, :], s, -float("inf"))
        else:
            seen = rows_a[:, None] + coordinate(x2, FIELD, 0)[None, :]
            if NARROW:
                keys_a = coordinate(x2, FIELD, 0) + coordinate(x1, FIELD, 2)
                seen = rows_a[:, None] + keys_a[None, :]
                if E0 > 1 or G0 > 1:
                    seen = seen & (rows_b[:, None] + coordinate(x0, FIELD, 0)[None, :])
            else:
                if G1 > 1:
                    seen = seen & (rows_b[:, None] + coordinate(x1, FIELD, 0)[None, :])
                if G0 > 1:
                    seen = seen & (rows_c[:, None] + coordinate(x0, FIELD, 0)[None, :])
            visible = (seen & GUARDS) == GUARDS
            if BALL:
                R0: tl.constexpr = (L0 if L0 > 0 else 1) * (L0 if L0 > 0 else 1)
                R1: tl.constexpr = (L1 if L1 > 0 else 1) * (L1 if L1 > 0 else 1)
                R2: tl.constexpr = (L2 if L2 > 0 else 1) * (L2 if L2 > 0 else 1)
                d0 = (b0 + x0)[None, :] - c0[:, None]
                d1 = (b1 + x1)[None, :] - c1[:, None]
                d2 = (b2 + x2)[None, :] - c2[:, None]
                visible = visible & (d0 * d0 * (R1 * R2) + d1 * d1 * (R0 * R2) + d2 * d2 * (R0 * R1) <= R0 * R1 * R2)
            if BOX % BN != 0 or CLIP:
                visible = visible & keep[None, :]
            s = tl.where(visible, s, -float("inf"))
        m, l, acc1, acc2 = take(
            s, factor, m, l, acc1, acc2, tokens, keep, key_mask_base, bias_base, key_mask_k, bias_rows, bias_k,
            v_base, v_row, DV, V1, V2, BOX % BN != 0 or CLIP,
        )  # fmt: skip

    mean1, mean2 = tl.zeros((V1,), tl.float32), tl.zeros((V2,), tl.float32)
    if RULE == 1:
        if tl.max(tl.where(real & (l == 0.0), 1, 0), 0) > 0:
            mean1, mean2 = mean_of_values(v_base, TOKENS, v_row, V1, V2, DV, BN)
    out1, out2, _ = row_end(m, l, acc1, acc2, mean1, mean2, RULE)
    store_rows(o_base, token, o_row, 0, V1, DV, real, out1)
    if DV > V1:
        store_rows(o_base, token, o_row, V1, V2, DV, real, out2)
