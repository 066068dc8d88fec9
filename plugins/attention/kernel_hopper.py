"""Dense, causal and windowed attention for sm_90, in Gluon. See ``hopper_pipeline.py`` for how it is arranged."""

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
def stand(position, sizes, FLAGS: gl.constexpr):
    """Where the middle of a query's window is: at the query, or moved inward at both ends (FLAGS 4, NATTEN's)."""
    NQ, NK, H, group, left, right = sizes
    if FLAGS & 4:
        position = gl.minimum(gl.maximum(position, left), NK - 1 - right)
    return position


@gluon.jit
def item(number, sizes, BM: gl.constexpr, FLAGS: gl.constexpr):
    """Of a number: the first query of a tile, its head, key head and batch, and the keys from .. to that it meets."""
    NQ, NK, H, group, left, right = sizes
    tiles = (NQ + BM - 1) // BM
    tile = number % tiles
    if FLAGS & 2:
        tile = tiles - 1 - tile  # the longest rows first
    h = number // tiles % H
    b = (number // tiles // H).to(gl.int64)
    first = tile * BM
    low = stand(first + (NK - NQ), sizes, FLAGS)
    high = stand(gl.minimum(first + BM, NQ) - 1 + (NK - NQ), sizes, FLAGS)
    start = NK * 0
    end = NK
    if FLAGS & 1:
        start = gl.minimum(gl.maximum(low - left, 0), NK)
    if FLAGS & 2:
        end = gl.maximum(gl.minimum(high + right + 1, NK), start)
    return first, h, h // group, b, start, end


@gluon.jit
def produce(
    operands, CONSUMERS: gl.constexpr, FLAGS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """For one item after the other its queries, then its keys and values, BN at a time."""
    rings, barriers, sizes, total, query, key, value, q_strides, k_strides, v_strides = operands
    q1, q2, k1, k2, v1, v2 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    q_b, q_n, q_h = q_strides
    k_b, k_n, k_h = k_strides
    v_b, v_n, v_h = v_strides
    K1: gl.constexpr = k1.shape[2]
    V1: gl.constexpr = v1.shape[2]
    stage = 0
    phase = 1
    turn = 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        first, h, g, b, start, end = item(number, sizes, CONSUMERS * ROWS, FLAGS)
        if end > start:
            mbarrier.wait(q_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
            q = query + (b * q_b + h * q_h + first.to(gl.int64) * q_n) * 8
            for c in gl.static_range(CONSUMERS):
                there = sizes[0] - first - c * ROWS
                where = (turn & 1) * CONSUMERS + c
                copy_run(q1.index(where), q + c * ROWS * q_n * 8, 0, there, fresh(q_n) * 8, 0, DK)
                if DK > K1:
                    copy_run(q2.index(where), q + c * ROWS * q_n * 8, 0, there, fresh(q_n) * 8, K1, DK)
            async_copy.mbarrier_arrive(q_full.index(turn & 1), increment_count=False)
            turn += 1
            origin = end - (end - start + BN - 1) // BN * BN
            k = key + (b * k_b + g * k_h + origin.to(gl.int64) * k_n) * 8
            v = value + (b * v_b + g * v_h + origin.to(gl.int64) * v_n) * 8
            for n in range(origin, end, BN):
                mbarrier.wait(k_empty.index(stage), phase)
                copy_run(k1.index(stage), k, start - n, BN, fresh(k_n) * 8, 0, DK)
                if DK > K1:
                    copy_run(k2.index(stage), k, start - n, BN, fresh(k_n) * 8, K1, DK)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), phase)
                copy_run(v1.index(stage), v, start - n, BN, fresh(v_n) * 8, 0, DV)
                if DV > V1:
                    copy_run(v2.index(stage), v, start - n, BN, fresh(v_n) * 8, V1, DV)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                k += BN * k_n * 8
                v += BN * v_n * 8
                stage, phase = following(stage, phase, STAGES)


@gluon.jit
def hide(s, tile, facts, FLAGS: gl.constexpr):
    """-inf where a query does not see a key of tile ``tile``. FLAGS: 1 has a left bound, 2 a right one; see
    ``stand`` for 4.
    """
    origin, start, position, left, right = facts
    BN: gl.constexpr = s.shape[1]
    keys = origin + tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, accumulator(BN)))
    s = s + gl.where(keys >= start, 0.0, -float("inf"))[None, :]
    if FLAGS & 1:
        s = gl.where(keys[None, :] >= position[:, None] - left, s, -float("inf"))
    if FLAGS & 2:
        s = gl.where(keys[None, :] <= position[:, None] + right, s, -float("inf"))
    return s


@gluon.jit
def consume(
    common, FLAGS: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, RULE: gl.constexpr, SPEC: gl.constexpr
):
    """For one item after the other 64 of its queries. SPEC: see ``hopper_pipeline.consume_first``."""
    rings, barriers, sizes, total, sinks, sinks_h, output, log_sum_exp, o_strides, factor = common
    NQ, NK, H, group, left, right = sizes
    o_b, o_n, o_h = o_strides
    INDEX: gl.constexpr = SPEC[0]
    CONSUMERS: gl.constexpr = SPEC[1]
    DV: gl.constexpr = SPEC[3]
    BN: gl.constexpr = SPEC[4]
    V1: gl.constexpr = rings[4].shape[2]
    V2: gl.constexpr = rings[5].shape[2]
    stage = 0
    phase = 0
    turn = 0
    go = 1 if INDEX == 0 else 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        first, h, g, b, start, end = item(number, sizes, CONSUMERS * ROWS, FLAGS)
        mine = first + INDEX * ROWS
        i = mine + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(BN)))
        m, l, acc1, acc2 = no_keys_yet(V1, V2, BN)
        tiles = (end - start + BN - 1) // BN
        slot = (stage, phase, turn, go)
        if mine >= NQ:
            if tiles > 0:
                stage, phase, go = pass_by(slot, barriers, tiles, SPEC)
                turn += 1
        elif tiles > 0:
            # Tiles end where the keys end: only the first may begin before the first key.
            origin = end - tiles * BN
            facts = (origin, start, stand(i + (NK - NQ), sizes, FLAGS), left, right)
            work = (rings, barriers, (turn & 1) * CONSUMERS + INDEX, facts, factor)
            # Tiles from .. to that all of these queries see need no mask.
            low = stand(mine + (NK - NQ), sizes, FLAGS)
            high = stand(mine + (NK - NQ) + ROWS - 1, sizes, FLAGS)
            seen_from = start
            all_to = opaque(tiles, DV)
            if FLAGS & 1:
                seen_from = gl.maximum(start, high - left)
            if FLAGS & 2:
                all_to = gl.minimum((low + right + 1 - origin) // BN, tiles)
            all_from = gl.minimum((seen_from - origin + BN - 1) // BN, tiles)
            masked = (all_from > 0) | (all_to < 1)
            all_from = gl.maximum(all_from, 1)
            all_to = gl.maximum(all_to, all_from)
            state = consume_first(slot, (m, l, acc1, acc2), work, masked, hide, FLAGS, SPEC)
            if FLAGS & 1:
                state = consume_run(state, work, 1, all_from, hide, FLAGS, True, SPEC)
            state = consume_run(state, work, all_from, all_to, hide, FLAGS, False, SPEC)
            if FLAGS & 2:
                state = consume_run(state, work, all_to, tiles, hide, FLAGS, True, SPEC)
            elif DV > 64:
                state = consume_run(state, work, all_to, tiles, hide, FLAGS, False, SPEC)
            m, l, acc1, acc2, stage, phase, go = consume_last(state, work, turn, SPEC)
            turn += 1
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
            gl.store(log_sum_exp + (b * H + h) * NQ + i, lse, mask=i < NQ)


@gluon.jit
def attention(
    query, key, value, sinks,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o, sinks_h,
    NQ, NK, H, B, group, scale, left, right,
    output, log_sum_exp,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, CLAMP: gl.constexpr, RULE: gl.constexpr,
    DK: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, DV: gl.constexpr, V1: gl.constexpr, V2: gl.constexpr,
    CONSUMERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, TAKE: gl.constexpr, GIVE: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """As ``kernel_triton.attention``, without bias, masks and softcap. Any one-dimensional grid: the blocks share the
    ceil(NQ / (64 CONSUMERS)) H B tiles, so that what begins and ends one tile runs beside the products of another.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    FLAGS: gl.constexpr = (1 if HAS_LEFT else 0) + (2 if HAS_RIGHT else 0) + (4 if CLAMP else 0)
    HAS_SINKS: gl.constexpr = sinks is not None
    HAS_LSE: gl.constexpr = log_sum_exp is not None
    # A partition's arguments cannot be None: pointers that are not there are the output's, and not read.
    sinks_there = output
    if HAS_SINKS:
        sinks_there = sinks
    lse_there = output
    if HAS_LSE:
        lse_there = log_sum_exp
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    factor = scale.to(gl.float32, bitcast=True) * LOG2E
    rings, barriers = rings_and_barriers(dtype, CONSUMERS, DK, K1, K2, DV, V1, V2, BN, STAGES)
    sizes = (NQ, NK, H, group, left, right)
    total = (NQ + CONSUMERS * ROWS - 1) // (CONSUMERS * ROWS) * H * B
    common = (rings, barriers, sizes, total, sinks_there, sinks_h, output, lse_there, (o_b, o_n, o_h), factor)
    operands = (rings, barriers, sizes, total, query, key, value, (q_b, q_n, q_h), (k_b, k_n, k_h), (v_b, v_n, v_h))
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize([
        (consume, (common, FLAGS, HAS_SINKS, HAS_LSE, RULE, (0, CONSUMERS, DK, DV, BN, STAGES, TURNS))),
        (consume, (common, FLAGS, HAS_SINKS, HAS_LSE, RULE, (1, CONSUMERS, DK, DV, BN, STAGES, TURNS))),
        (produce, (operands, CONSUMERS, FLAGS, DK, DV, BN, STAGES)),
    ], [4, 4], [TAKE, GIVE])  # fmt: skip
