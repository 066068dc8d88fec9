"""Device code of linear attention without a triangle: the state of a chunk, the sum of chunks, what queries read.

Tiles are rows of tokens whatever the layout is: an operand whose tokens are its last axis (``COLUMNS``) is addressed by
another stride, and the compiler loads along the tokens. Head dims are filled up to a power of two with zero features.
Features are multiplied in the operands' type (``low``); sums are float32. ``HB`` heads that lie side by side may share
a block of ``state``, so that rows of short heads are read in longer pieces: of the product of all their channels, what
is between two heads is left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.tile_softmax import moved

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
def low(x, seen, MAP: tl.constexpr):
    """``features`` in the type of ``x``, which is 0 where not ``seen``; what needs no wider type is made without."""
    if MAP == 0:
        f = x
    elif MAP == 1 and x.dtype == tl.float16:
        f = tl.maximum(x, 0.0)
    else:
        f = features(x, seen, MAP).to(x.dtype)
    return f


@triton.jit
def scaled(state):
    """A state [K, V] in float32 as numbers of at most 1, which every type holds, and what to multiply them by."""
    largest = tl.max(tl.max(tl.abs(state), 1), 0)
    return state * tl.where(largest > 0.0, 1.0 / largest, 0.0), largest


@triton.jit
def write_state(base, acc, index, K, V, DK: tl.constexpr, BK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """[BK, BV] float32 into the ``index``-th [DK, DV] matrix, rows from ``K`` and columns from ``V`` on."""
    rows, cols = K + tl.arange(0, BK), V + tl.arange(0, BV)
    at = base + index.to(tl.int64) * (DK * DV) + rows[:, None] * DV + cols[None, :]
    tl.store(at, acc, mask=(rows < DK)[:, None] & (cols < DV)[None, :])


@triton.jit
def read_state(base, index, K, V, DK: tl.constexpr, BK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """[BK, BV] float32 of the ``index``-th [DK, DV] matrix, rows from ``K`` and columns from ``V`` on; 0 past its
    edges.
    """
    rows, cols = K + tl.arange(0, BK), V + tl.arange(0, BV)
    at = base + index.to(tl.int64) * (DK * DV) + rows[:, None] * DV + cols[None, :]
    return tl.load(at, mask=(rows < DK)[:, None] & (cols < DV)[None, :], other=0.0)


@triton.jit
def spread(cols, step, D: tl.constexpr, HB: tl.constexpr):
    """The channel of a column, and how far its head is from the block's first, with heads ``step`` apart."""
    if HB == 1:
        channel, more = cols, tl.zeros_like(cols).to(tl.int64)
    else:
        channel, more = cols % D, (cols // D) * step
    return channel, more


@triton.jit
def state(
    key, value, key_weight,
    k_b, k_n, k_h, v_b, v_n, v_h, k_o, v_o, NK, chunk, C, groups,
    state, total, mean, top,
    MAP: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    HB: tl.constexpr, FAST: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: one chunk of ``HB`` key heads, ``BV`` channels of the values of each.
    Grid (C * cdiv(DV, BV), cdiv(HKV, HB), B), with ``FAST`` heads the first axis.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    WK: tl.constexpr = K1 * HB
    WV: tl.constexpr = BV * HB
    if FAST:
        place, g, b = tl.program_id(1), tl.program_id(0) * HB, tl.program_id(2)
    else:
        place, g, b = tl.program_id(0), tl.program_id(1) * HB, tl.program_id(2)
    c, part = place // TILES, place % TILES
    first = c * chunk
    end = tl.minimum(first + chunk, NK)
    V = part * BV
    wide, wide_v = tl.arange(0, WK), V + tl.arange(0, WV)
    cols, k_more = spread(wide, k_h.to(tl.int64) * 8, DK, HB)
    out_cols, v_more = spread(wide_v, v_h.to(tl.int64) * 8, DV, HB)
    k_there, v_there = cols < DK, out_cols < DV
    if HB > 1:
        k_there, v_there = k_there & (g + wide // DK < groups), v_there & (g + wide_v // DV < groups)
    key, value = moved(key, k_o), moved(value, v_o)
    k_base = key + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = value + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    acc = tl.zeros((WK, WV), tl.float32)
    # A product with ones would give the sums too, but two products in a loop wait for one another.
    by_row = tl.zeros((BN, WK), tl.float32)
    values_of = tl.zeros((BN, WV), tl.float32)
    m = tl.full((WK,), NO_KEY, tl.float32)
    for n in range(first, end, BN):
        rows = n + tl.arange(0, BN)
        seen = (rows < end)[:, None] & k_there[None, :]
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS) + k_more[None, :], mask=seen, other=0.0)
        v_seen = (rows < end)[:, None] & v_there[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS) + v_more[None, :], mask=v_seen, other=0.0)
        if MAP == 4:
            x = tl.where(seen, k.to(tl.float32), NO_KEY)
            new = tl.maximum(m, tl.max(x, 0))
            kept = tl.exp2((m - new) * LOG2E)
            exact = tl.where(seen, tl.exp2((x - new[None, :]) * LOG2E), 0.0)
            acc, by_row, m = acc * kept[:, None], by_row * kept[None, :], new
            f = exact.to(k.dtype)
        elif MAP >= 2:
            exact = features(k, seen, MAP)
            f = exact.to(k.dtype)
        else:
            f = low(k, seen, MAP)
        if total is not None:
            if MAP >= 2:
                by_row += exact
            else:
                by_row += f.to(tl.float32)
        if mean is not None:
            values_of += v.to(tl.float32)
        if key_weight is not None:
            w = tl.load(key_weight + (b.to(tl.int64) * NK + rows) * groups + g, mask=rows < end, other=0.0)
            if MAP >= 2:
                f = (exact * w.to(tl.float32)[:, None]).to(k.dtype)
            else:
                f = (f.to(tl.float32) * w.to(tl.float32)[:, None]).to(k.dtype)
        acc = tl.dot(tl.trans(f), v, acc)
    if HB == 1:
        write_state(state, acc, (b * groups + g) * C + c, 0, V, DK, K1, DV, BV)
    else:
        head, head_v = wide // DK, wide_v // DV
        index = ((b * groups + g + head) * C + c).to(tl.int64)
        at = state + (index * (DK * DV) + cols * DV)[:, None] + out_cols[None, :]
        tl.store(at, acc, mask=(k_there & (g + head < groups))[:, None] & (head[:, None] == head_v[None, :]))
    if part == 0:
        at_k = ((b * groups + g + (wide // DK if HB > 1 else 0)) * C + c).to(tl.int64) * DK + cols
        if total is not None:
            tl.store(total + at_k, tl.sum(by_row, 0), mask=k_there)
        if top is not None:
            tl.store(top + at_k, m, mask=k_there)
    if mean is not None:
        at_v = ((b * groups + g + (wide_v // DV if HB > 1 else 0)) * C + c).to(tl.int64) * DV + out_cols
        tl.store(mean + at_v, tl.sum(values_of, 0) / NK, mask=v_there)


@triton.jit
def combine(
    state, total, mean, top,
    C,
    whole_state, whole_total, whole_mean,
    DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A block: ``BK`` features of one head, summed over its chunks in order, ``AHEAD`` of them read at a time.
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
    for many in range(0, C, AHEAD):
        for more in tl.static_range(AHEAD):
            c = many + more
            there, there_v = rows * 0 + c < C, cols * 0 + c < C
            index = head * C + c
            at = state + index * (DK * DV) + rows[:, None] * DV + cols[None, :]
            x = tl.load(at, mask=seen & there[:, None], other=0.0)
            if total is not None:
                s = tl.load(total + index * DK + rows, mask=(rows < DK) & there, other=0.0)
                if top is not None:
                    t = tl.load(top + index * DK + rows, mask=(rows < DK) & there, other=NO_KEY)
                    new = tl.maximum(m, t)
                    kept, share = tl.exp2((m - new) * LOG2E), tl.exp2((t - new) * LOG2E)
                    acc, sums, m = acc * kept[:, None], sums * kept, new
                    x, s = x * share[:, None], s * share
                sums += s
            acc += x
            if mean is not None:
                means += tl.load(mean + index * DV + cols, mask=(cols < DV) & there_v, other=0.0)
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
    q_b, q_n, q_h, o_b, o_n, o_h, q_o, NQ, C, group, groups, scale, epsilon, floor,
    output,
    MAP: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr,
    BV: tl.constexpr, BM: tl.constexpr, FAST: tl.constexpr, BLOCKS: tl.constexpr, SUMS: tl.constexpr,
    Q_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr, Q_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: every so many-th tile of ``BM`` queries of one head, ``BV`` channels. Grid (tiles * cdiv(DV, BV), H, B),
    with ``FAST`` heads the first axis; ``BLOCKS`` blocks a multiprocessor at most: all run at once. With ``SUMS`` what
    outputs are divided by comes of a product too, of ``total`` in two columns: the second is what rounding took from
    the first.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    if FAST:
        place, h, b, places_of = tl.program_id(1), tl.program_id(0), tl.program_id(2), tl.num_programs(1)
    else:
        place, h, b, places_of = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    part = place % TILES
    step = places_of // TILES
    V = part * BV
    cols, out_cols = tl.arange(0, K1), V + tl.arange(0, BV)
    k_there, v_there = cols < DK, out_cols < DV
    head = (b * groups + h // group) * C
    s = tl.zeros((K1, BV), tl.float32)
    z, means = tl.zeros((K1,), tl.float32), tl.zeros((BV,), tl.float32)
    for c in range(0, C):
        s += read_state(state, head + c, 0, V, DK, K1, DV, BV)
        at = (head + c).to(tl.int64)
        if NORM != 0:
            z += tl.load(total + at * DK + cols, mask=k_there, other=0.0)
        if NORM >= 2:
            means += tl.load(mean + at * DV + out_cols, mask=v_there, other=0.0)
    s, largest = scaled(s)
    s = s.to(query.dtype.element_ty)
    if NORM != 0 and SUMS:
        most = tl.max(tl.abs(z), 0)
        z = z * tl.where(most > 0.0, 1.0 / most, 0.0)
        first = z.to(query.dtype.element_ty)
        rest = (z - first.to(tl.float32)).to(query.dtype.element_ty)
        column = tl.arange(0, 16)[None, :]
        columns = tl.where(column == 0, first[:, None], tl.where(column == 1, rest[:, None], 0.0))
        columns = columns.to(query.dtype.element_ty)
    query = moved(query, q_o)
    q_base = query + b.to(tl.int64) * q_b * 8 + h.to(tl.int64) * q_h * 8
    o_base = output + b.to(tl.int64) * o_b * 8 + h.to(tl.int64) * o_h * 8
    factor = largest
    if NORM <= 1:
        factor = largest * scale.to(tl.float32, bitcast=True)
    for tile in range(place // TILES, tl.cdiv(NQ, BM), step):
        rows = tile * BM + tl.arange(0, BM)
        seen = (rows < NQ)[:, None] & k_there[None, :]
        q = tl.load(q_base + places(rows, cols, q_n * Q_UNIT, Q_COLUMNS), mask=seen, other=0.0)
        f = low(q, seen, MAP)
        out = tl.dot(f, s)
        if NORM == 0:
            out = out * factor
        else:
            if SUMS:
                below = tl.sum(tl.dot(f, columns), 1) * most
            else:
                exact = f.to(tl.float32) if MAP <= 1 else features(q, seen, MAP)
                below = tl.sum(exact * z[None, :], 1)
            if NORM == 1:
                below += epsilon.to(tl.float32, bitcast=True)
                if FLOOR:
                    below = tl.maximum(below, floor.to(tl.float32, bitcast=True))
                out = out * (factor / below)[:, None]
            elif NORM == 2:
                out = out * (factor * (1.0 + 1.0 / below))[:, None] - below[:, None] * means[None, :]
            else:
                out = out * factor + (1.0 - below)[:, None] * means[None, :]
        keep = (rows < NQ)[:, None] & v_there[None, :]
        at = o_base + places(rows, out_cols, o_n * O_UNIT, O_COLUMNS)
        tl.store(at, out.to(output.dtype.element_ty), mask=keep)
