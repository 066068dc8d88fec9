"""Device code of linear attention without a triangle: the state of a chunk, the sum of chunks, what queries read.

Tiles are rows of tokens whatever the layout is: an operand whose tokens are its last axis (``COLUMNS``) is addressed by
another stride, and the compiler loads along the tokens. Head dims are filled up to a power of two with zero features.
Features are in float32, and in the operands' type where they are multiplied; sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NO_KEY = tl.constexpr(-1.0e30)


@triton.jit
def places(rows, cols, stride, COLUMNS: tl.constexpr):
    """Offsets [rows, cols] in elements; ``stride`` is that of a row, with ``COLUMNS`` that of a column."""
    if COLUMNS:
        return rows[:, None] + cols[None, :].to(tl.int64) * stride
    return rows[:, None].to(tl.int64) * stride + cols[None, :]


@triton.jit
def features(x, seen, MAP: tl.constexpr):
    """phi of a tile [rows, cols] in float32; 0 where not ``seen`` [rows, cols]. A softmax runs over the columns."""
    x = x.to(tl.float32)
    if MAP == 1:
        x = tl.maximum(x, 0.0)
    elif MAP == 2:
        x = tl.where(x > 0.0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    elif MAP == 3:
        x = tl.exp2(x * LOG2E)
    elif MAP == 4:
        x = tl.where(seen, x, NO_KEY)
        x = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        x = tl.where(seen, x, 0.0)
        x = x / tl.maximum(tl.sum(x, 1), 1.0)[:, None]
    return tl.where(seen, x, 0.0)


@triton.jit
def scaled(state):
    """A state [K, V] in float32 as numbers of at most 1, which every type holds, and what to multiply them by."""
    largest = tl.max(tl.max(tl.abs(state), 1), 0)
    return state * tl.where(largest > 0.0, 1.0 / largest, 0.0), largest


@triton.jit
def write_state(base, acc, index, V: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr,
                BV: tl.constexpr):  # fmt: skip
    """[K1, BV] float32 into the ``index``-th [DK, DV] matrix, columns from ``V`` on."""
    rows, cols = tl.arange(0, K1), V + tl.arange(0, BV)
    at = base + index.to(tl.int64) * (DK * DV) + rows[:, None] * DV + cols[None, :]
    tl.store(at, acc, mask=(rows < DK)[:, None] & (cols < DV)[None, :])


@triton.jit
def read_state(base, index, V, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """[K1, BV] float32 of the ``index``-th [DK, DV] matrix, columns from ``V`` on; 0 past its edges."""
    rows, cols = tl.arange(0, K1), V + tl.arange(0, BV)
    at = base + index.to(tl.int64) * (DK * DV) + rows[:, None] * DV + cols[None, :]
    return tl.load(at, mask=(rows < DK)[:, None] & (cols < DV)[None, :], other=0.0)


@triton.jit
def state(
    key, value, key_weight,
    k_b, k_n, k_h, v_b, v_n, v_h, NK, chunk, C,
    state, total, mean, top,
    MAP: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: one chunk of one key head, ``BV`` channels of the values. Grid (C * cdiv(DV, BV), HKV, B)."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    c, part, g, b = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    first = c * chunk
    end = tl.minimum(first + chunk, NK)
    V = part * BV
    cols, out_cols = tl.arange(0, K1), V + tl.arange(0, BV)
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    acc = tl.zeros((K1, BV), tl.float32)
    features_of = tl.zeros((K1,), tl.float32)
    values_of = tl.zeros((BV,), tl.float32)
    m = tl.full((K1,), NO_KEY, tl.float32)
    for n in range(first, end, BN):
        rows = n + tl.arange(0, BN)
        seen = (rows < end)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0)
        v_seen = (rows < end)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        if MAP == 4:
            x = tl.where(seen, k.to(tl.float32), NO_KEY)
            new = tl.maximum(m, tl.max(x, 0))
            kept = tl.exp2((m - new) * LOG2E)
            f = tl.where(seen, tl.exp2((x - new[None, :]) * LOG2E), 0.0)
            acc, features_of, m = acc * kept[:, None], features_of * kept, new
        else:
            f = features(k, seen, MAP)
        features_of += tl.sum(f, 0)
        if mean is not None:
            values_of += tl.sum(v.to(tl.float32), 0)
        if key_weight is not None:
            w = tl.load(key_weight + (b.to(tl.int64) * NK + rows) * groups + g, mask=rows < end, other=0.0)
            f = f * w.to(tl.float32)[:, None]
        acc = tl.dot(tl.trans(f.to(v.dtype)), v, acc)
    index = (b * groups + g) * C + c
    write_state(state, acc, index, V, DK, K1, DV, BV)
    if part == 0:
        at = index.to(tl.int64) * DK + cols
        if total is not None:
            tl.store(total + at, features_of, mask=cols < DK)
        if top is not None:
            tl.store(top + at, m, mask=cols < DK)
    if mean is not None:
        tl.store(mean + index.to(tl.int64) * DV + out_cols, values_of / NK, mask=out_cols < DV)


@triton.jit
def combine(
    state, total, mean, top,
    C,
    whole_state, whole_total, whole_mean,
    DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A block: ``BK`` features of one head, summed over its chunks in order.
    Grid (cdiv(DK, BK) * cdiv(DV, BV), HKV, B).
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    part, at_k, g, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    head = (b * tl.num_programs(1) + g).to(tl.int64)
    rows, cols = at_k * BK + tl.arange(0, BK), part * BV + tl.arange(0, BV)
    seen = (rows < DK)[:, None] & (cols < DV)[None, :]
    acc = tl.zeros((BK, BV), tl.float32)
    sums = tl.zeros((BK,), tl.float32)
    means = tl.zeros((BV,), tl.float32)
    m = tl.full((BK,), NO_KEY, tl.float32)
    for c in range(0, C):
        index = head * C + c
        x = tl.load(state + index * (DK * DV) + rows[:, None] * DV + cols[None, :], mask=seen, other=0.0)
        if total is not None:
            s = tl.load(total + index * DK + rows, mask=rows < DK, other=0.0)
            if top is not None:
                t = tl.load(top + index * DK + rows, mask=rows < DK, other=0.0)
                new = tl.maximum(m, t)
                kept, share = tl.exp2((m - new) * LOG2E), tl.exp2((t - new) * LOG2E)
                acc, sums, m = acc * kept[:, None], sums * kept, new
                x, s = x * share[:, None], s * share
            sums += s
        acc += x
        if mean is not None:
            means += tl.load(mean + index * DV + cols, mask=cols < DV, other=0.0)
    if top is not None:
        acc = acc / sums[:, None]
        sums = sums * 0.0 + 1.0
    tl.store(whole_state + head * (DK * DV) + rows[:, None] * DV + cols[None, :], acc, mask=seen)
    if whole_total is not None:
        if part == 0:
            tl.store(whole_total + head * DK + rows, sums, mask=rows < DK)
    if whole_mean is not None:
        if at_k == 0:
            tl.store(whole_mean + head * DV + cols, means, mask=cols < DV)


@triton.jit
def apply(
    query, state, total, mean,
    q_b, q_n, q_h, o_b, o_n, o_h, NQ, C, group, scale, epsilon, floor,
    output,
    MAP: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr,
    BV: tl.constexpr, BM: tl.constexpr,
    Q_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr, Q_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: every ``num_programs(0) / cdiv(DV, BV)``-th tile of ``BM`` queries of one head, ``BV`` channels; the
    state is read once. Grid (tiles * cdiv(DV, BV), H, B).
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    part, h, b = tl.program_id(0) % TILES, tl.program_id(1), tl.program_id(2)
    step = tl.num_programs(0) // TILES
    groups = tl.num_programs(1) // group
    head = (b * groups + h // group) * C
    V = part * BV
    cols, out_cols = tl.arange(0, K1), V + tl.arange(0, BV)
    s = read_state(state, head, V, DK, K1, DV, BV)
    for c in range(1, C):
        s += read_state(state, head + c, V, DK, K1, DV, BV)
    z, means = tl.zeros((K1,), tl.float32), tl.zeros((BV,), tl.float32)
    if NORM != 0:
        for c in range(0, C):
            z += tl.load(total + (head + c).to(tl.int64) * DK + cols, mask=cols < DK, other=0.0)
    if NORM >= 2:
        for c in range(0, C):
            means += tl.load(mean + (head + c).to(tl.int64) * DV + out_cols, mask=out_cols < DV, other=0.0)
    s, largest = scaled(s)
    s = s.to(query.dtype.element_ty)
    q_base = query + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    factor = largest
    if NORM <= 1:
        factor = largest * scale.to(tl.float32, bitcast=True)
    for tile in range(tl.program_id(0) // TILES, tl.cdiv(NQ, BM), step):
        rows = tile * BM + tl.arange(0, BM)
        seen = (rows < NQ)[:, None] & (cols < DK)[None, :]
        q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
        f = features(q, seen, MAP)
        out = tl.dot(f.to(q.dtype), s) * factor
        if NORM != 0:
            below = tl.sum(f * z[None, :], 1)
            if NORM == 1:
                below += epsilon.to(tl.float32, bitcast=True)
                if FLOOR:
                    below = tl.maximum(below, floor.to(tl.float32, bitcast=True))
                out = out / below[:, None]
            elif NORM == 2:
                out = out * (1.0 + 1.0 / below)[:, None] - below[:, None] * means[None, :]
            else:
                out = out + (1.0 - below)[:, None] * means[None, :]
        keep = (rows < NQ)[:, None] & (out_cols < DV)[None, :]
        tl.store(o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS), out.to(output.dtype.element_ty), mask=keep)
