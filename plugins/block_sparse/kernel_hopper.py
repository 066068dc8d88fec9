"""Attention to listed blocks of keys for sm_90, in Gluon. See ``hopper_pipeline.py`` for how it is arranged.

Work is a row of blocks of one head: 128 queries for two consumers, or 64 for one, which leaves room for a second thread
block on its multiprocessor. The lists drive the producer; consumers read them for the masks of partial blocks, which
come first. What one needs to know of a row is asked for while the row before it is done, the next column a tile ahead:
nothing waits for device memory but the first row of all.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attncompile.plugins.hopper_pipeline import (
    LN2,
    LOG2E,
    ROWS,
    accumulator,
    consume_first,
    consume_last,
    consume_run,
    copy_run,
    following,
    fresh,
    moved,
    no_keys_yet,
    opaque,
    pass_by,
    per_row,
    reciprocal,
    rings_and_barriers,
    store_run,
)


@gluon.jit
def row_at(number, lists, HAS_ORDER: gl.constexpr):
    """The row of blocks, counted through all sets of lists, which piece ``number`` of the work is; any will do."""
    rows, order, sizes = lists
    listed = sizes[3]
    n = number % listed
    if HAS_ORDER:
        n = gl.load(order + n)
    else:
        n = listed - 1 - n
    return n


@gluon.jit
def span_of(n, lists):
    """Where the entries of row ``n`` begin, where the full ones do, and where they end."""
    at = lists[0] + n * 3
    return gl.load(at), gl.load(at + 1), gl.load(at + 2)


@gluon.jit
def place(number, n, lists, BLOCK: gl.constexpr):
    """Of piece ``number``, which is row ``n``: the first query, head, key head and batch entry."""
    NQ, NK, H, listed, sets_h, group = lists[2]
    count = (NQ + BLOCK - 1) // BLOCK
    alike = H // sets_h  # heads that share their lists
    copy = number // listed
    h = n // count % sets_h + copy % alike
    b = (n // count // sets_h + copy // alike).to(gl.int64)
    return n % count * BLOCK, h, h // group, b


@gluon.jit
def produce(
    operands, CONSUMERS: gl.constexpr, HAS_ORDER: gl.constexpr, BLOCK: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """For one row of blocks after the other its queries, then its keys and values, BN at a time."""
    rings, barriers, lists, total, columns, query, key, value, q_strides, k_strides, v_strides = operands
    q1, q2, k1, k2, v1, v2 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    q_b, q_n, q_h = q_strides
    k_b, k_n, k_h = k_strides
    v_b, v_n, v_h = v_strides
    NQ, NK, H, listed, sets_h, group = lists[2]
    K1: gl.constexpr = k1.shape[2]
    V1: gl.constexpr = v1.shape[2]
    PARTS: gl.constexpr = BLOCK // BN
    stage = 0
    phase = 1
    turn = 0
    step = gl.num_programs(0)
    n = row_at(gl.program_id(0), lists, HAS_ORDER)
    after = row_at(gl.program_id(0) + step, lists, HAS_ORDER)
    start, _, end = span_of(n, lists)
    for number in range(gl.program_id(0), total, step):
        next_start, _, next_end = span_of(after, lists)
        next_after = row_at(number + 2 * step, lists, HAS_ORDER)
        if end > start:
            first, h, g, b = place(number, n, lists, BLOCK)
            column = gl.load(columns + start)
            mbarrier.wait(q_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
            q = query + (b * q_b + h * q_h + first.to(gl.int64) * q_n) * 8
            for c in gl.static_range(CONSUMERS):
                there = NQ - first - c * ROWS
                where = (turn & 1) * CONSUMERS + c
                copy_run(q1.index(where), q + c * ROWS * q_n * 8, 0, there, fresh(q_n) * 8, 0, DK)
                if DK > K1:
                    copy_run(q2.index(where), q + c * ROWS * q_n * 8, 0, there, fresh(q_n) * 8, K1, DK)
            async_copy.mbarrier_arrive(q_full.index(turn & 1), increment_count=False)
            turn += 1
            k = key + (b * k_b + g * k_h) * 8
            v = value + (b * v_b + g * v_h) * 8
            for t in range(start * PARTS, end * PARTS):
                origin = column * BLOCK + t % PARTS * BN
                column = gl.load(columns + gl.minimum((t + 1) // PARTS, end - 1))
                there = NK - origin
                mbarrier.wait(k_empty.index(stage), phase)
                of_keys = k + origin.to(gl.int64) * k_n * 8
                copy_run(k1.index(stage), of_keys, 0, there, fresh(k_n) * 8, 0, DK)
                if DK > K1:
                    copy_run(k2.index(stage), of_keys, 0, there, fresh(k_n) * 8, K1, DK)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), phase)
                of_values = v + origin.to(gl.int64) * v_n * 8
                copy_run(v1.index(stage), of_values, 0, there, fresh(v_n) * 8, 0, DV)
                if DV > V1:
                    copy_run(v2.index(stage), of_values, 0, there, fresh(v_n) * 8, V1, DV)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                stage, phase = following(stage, phase, STAGES)
        n = after
        after = next_after
        start = next_start
        end = next_end


@gluon.jit
def bits_of(words, hidden, BN: gl.constexpr):
    """Four numbers a query, of which the first BN / 32 hold its bits; all set where not ``hidden``."""
    w0 = gl.load(words, mask=hidden, other=-1)
    w1 = gl.load(words + min(1, BN // 32 - 1), mask=hidden, other=-1)
    w2 = gl.load(words + min(2, BN // 32 - 1), mask=hidden, other=-1)
    w3 = gl.load(words + min(3, BN // 32 - 1), mask=hidden, other=-1)
    return w0, w1, w2, w3


@gluon.jit
def shown_only(s, bits, first, NK):
    """-inf where a bit is not set, or the key ``first`` + column does not exist."""
    BN: gl.constexpr = s.shape[1]
    inside = gl.arange(0, BN, layout=gl.SliceLayout(0, accumulator(BN)))
    mine = bits[0][:, None]
    for w in gl.static_range(1, BN // 32):
        mine = gl.where((inside >= w * 32)[None, :], bits[w][:, None], mine)
    shown = ((mine >> (inside % 32)[None, :]) & 1) != 0
    return gl.where(shown & (first + inside < NK)[None, :], s, -float("inf"))


@gluon.jit
def hide(s, tile, facts, BLOCK: gl.constexpr):
    """-inf where a bit of a partial block is not set, or a key does not exist. Tiles from ``partial`` on are of full
    blocks, whose bits are not read.
    """
    columns, kinds, masks, offsets, start, partial, NK, _, _ = facts
    BN: gl.constexpr = s.shape[1]
    PARTS: gl.constexpr = BLOCK // BN
    entry = start + tile // PARTS
    part = tile % PARTS
    hidden = tile < partial
    first = gl.load(columns + entry) * BLOCK + part * BN
    mask = gl.load(kinds + entry, mask=hidden, other=0).to(gl.int64)
    words = masks + (mask * (BLOCK * BLOCK // 32) + part * (BN // 32)) + offsets
    return shown_only(s, bits_of(words, hidden, BN), first, NK)


@gluon.jit
def hide_first(s, tile, facts, BLOCK: gl.constexpr):
    """``hide`` for tile 0, whose bits are there already."""
    _, _, _, _, _, _, NK, first, bits = facts
    return shown_only(s, bits, first, NK)


@gluon.jit
def consume(
    common, HAS_ORDER: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, RULE: gl.constexpr,
    BLOCK: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """For one row of blocks after the other 64 of its queries. SPEC: see ``hopper_pipeline.consume_first``."""
    rings, barriers, lists, total, entries, sinks, sinks_h, output, log_sum_exp, o_strides, factor = common
    columns, kinds, masks = entries
    NQ, NK, H, listed, sets_h, group = lists[2]
    o_b, o_n, o_h = o_strides
    INDEX: gl.constexpr = SPEC[0]
    CONSUMERS: gl.constexpr = SPEC[1]
    DV: gl.constexpr = SPEC[3]
    BN: gl.constexpr = SPEC[4]
    V1: gl.constexpr = rings[4].shape[2]
    V2: gl.constexpr = rings[5].shape[2]
    PARTS: gl.constexpr = BLOCK // BN
    inside = gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(BN)))
    offsets = (INDEX * ROWS + inside) * (BLOCK // 32)
    stage = 0
    phase = 0
    turn = 0
    go = 1 if INDEX == 0 else 0
    step = gl.num_programs(0)
    n = row_at(gl.program_id(0), lists, HAS_ORDER)
    after = row_at(gl.program_id(0) + step, lists, HAS_ORDER)
    start, all_from, end = span_of(n, lists)
    column = gl.load(columns + start, mask=start < end, other=0)
    kind = gl.load(kinds + start, mask=start < all_from, other=0)
    for number in range(gl.program_id(0), total, step):
        next_start, next_from, next_end = span_of(after, lists)
        next_after = row_at(number + 2 * step, lists, HAS_ORDER)
        first, h, g, b = place(number, n, lists, BLOCK)
        mine = first + INDEX * ROWS
        m, l, acc1, acc2 = no_keys_yet(V1, V2, BN)
        tiles = (end - start) * PARTS
        slot = (stage, phase, turn, go)
        if mine >= NQ:
            if tiles > 0:
                stage, phase, go = pass_by(slot, barriers, tiles, SPEC)
                turn += 1
        elif tiles > 0:
            partial = (all_from - start) * PARTS
            bits = bits_of(masks + kind.to(gl.int64) * (BLOCK * BLOCK // 32) + offsets, start < all_from, BN)
            facts = (columns, kinds, masks, offsets, start, partial, NK, column * BLOCK, bits)
            work = (rings, barriers, (turn & 1) * CONSUMERS + INDEX, facts, factor)
            plain = gl.maximum(partial, 1)
            middle = opaque(tiles, DV)
            state = consume_first(slot, (m, l, acc1, acc2), work, partial > 0, hide_first, BLOCK, SPEC)
            state = consume_run(state, work, 1, plain, hide, BLOCK, True, SPEC)
            state = consume_run(state, work, plain, middle, hide, BLOCK, False, SPEC)
            if DV > 64:
                state = consume_run(state, work, middle, tiles, hide, BLOCK, False, SPEC)
            m, l, acc1, acc2, stage, phase, go = consume_last(state, work, turn, SPEC)
            turn += 1
        column = gl.load(columns + next_start, mask=next_start < next_end, other=0)
        kind = gl.load(kinds + next_start, mask=next_start < next_from, other=0)
        if HAS_SINKS:
            # It may be far above all scores, and is all that a row without a key has.
            sink = gl.load(sinks + h * sinks_h).to(gl.float32) * LOG2E
            top = gl.maximum(m, sink)
            alpha = gl.exp2(m - top)
            l = l * alpha + gl.exp2(sink - top)
            m = top
            inverse = reciprocal(l, RULE) * alpha
        else:
            inverse = reciprocal(l, RULE)
        out = output + (b * o_b + h * o_h + mine.to(gl.int64) * o_n) * 8
        store_run(out, NQ - mine, o_n * 8, acc1 * per_row(inverse, V1)[:, None], 0, DV)
        if DV > V1:
            store_run(out, NQ - mine, o_n * 8, acc2 * per_row(inverse, V2)[:, None], V1, DV)
        if HAS_LSE:
            dead = l == 0.0
            lse = gl.where(dead, -float("inf"), (m + gl.log2(gl.where(dead, 1.0, l))) * LN2)
            gl.store(log_sum_exp + (b * H + h) * NQ + mine + inside, lse, mask=mine + inside < NQ)
        n = after
        after = next_after
        start = next_start
        all_from = next_from
        end = next_end


@gluon.jit
def attention(
    query, key, value, rows, columns, kinds, masks, sinks, order,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o, rows_b, rows_h, sinks_h,
    NQ, NK, H, B, group, scale,
    output, log_sum_exp,
    RULE: gl.constexpr, DK: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, DV: gl.constexpr, V1: gl.constexpr,
    V2: gl.constexpr, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    TAKE: gl.constexpr, GIVE: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """As ``kernel_triton.attention``, without bias, key mask and counts, for blocks of 64 CONSUMERS queries. Any
    one-dimensional grid: the thread blocks share the ceil(NQ / BLOCK) H B rows of blocks.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    HAS_ORDER: gl.constexpr = order is not None
    HAS_SINKS: gl.constexpr = sinks is not None
    HAS_LSE: gl.constexpr = log_sum_exp is not None
    gl.static_assert(BLOCK == CONSUMERS * ROWS)
    # A partition's arguments cannot be None: pointers that are not there are others, and not read.
    order_there = rows
    if HAS_ORDER:
        order_there = order
    sinks_there = output
    if HAS_SINKS:
        sinks_there = sinks
    lse_there = output
    if HAS_LSE:
        lse_there = log_sum_exp
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    factor = scale.to(gl.float32, bitcast=True) * LOG2E
    rings, barriers = rings_and_barriers(dtype, CONSUMERS, DK, K1, K2, DV, V1, V2, BN, STAGES)
    count = (NQ + BLOCK - 1) // BLOCK
    sets_h = gl.where(rows_h > 0, H, 1)
    listed = gl.where(rows_b > 0, B, 1) * sets_h * count
    total = count * H * B
    lists = (rows, order_there, (NQ, NK, H, listed, sets_h, group))
    entries = (columns, kinds, masks)
    common = (rings, barriers, lists, total, entries, sinks_there, sinks_h, output, lse_there, (o_b, o_n, o_h), factor)
    operands = (
        rings, barriers, lists, total, columns, query, key, value, (q_b, q_n, q_h), (k_b, k_n, k_h), (v_b, v_n, v_h)
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (common, HAS_ORDER, HAS_SINKS, HAS_LSE, RULE, BLOCK, (0, 2, DK, DV, BN, STAGES, TURNS))),
            (consume, (common, HAS_ORDER, HAS_SINKS, HAS_LSE, RULE, BLOCK, (1, 2, DK, DV, BN, STAGES, TURNS))),
            (produce, (operands, 2, HAS_ORDER, BLOCK, DK, DV, BN, STAGES)),
        ], [4, 4], [TAKE, GIVE])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (common, HAS_ORDER, HAS_SINKS, HAS_LSE, RULE, BLOCK, (0, 1, DK, DV, BN, STAGES, False))),
            (produce, (operands, 1, HAS_ORDER, BLOCK, DK, DV, BN, STAGES)),
        ], [4], [GIVE])  # fmt: skip
