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
    fresh,
    no_keys_yet,
    per_row,
    reciprocal,
    rings_and_barriers,
    store,
)


@gluon.jit
def produce(
    operands, CONSUMERS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Queries once, then keys and values ``start`` .. ``end``, BN at a time."""
    rings, barriers, query, key, value, q_n, k_n, v_n, first, NQ, start, end = operands
    q1, q2, k1, k2, v1, v2 = rings
    q_full, k_full, k_empty, v_full, v_empty = barriers
    K1: gl.constexpr = k1.shape[2]
    V1: gl.constexpr = v1.shape[2]
    for c in gl.static_range(CONSUMERS):
        mine = query + c * ROWS * q_n * 8
        copy_run(q1.index(c), mine, NQ - first - c * ROWS, q_n * 8, 0, DK)
        if DK > K1:
            copy_run(q2.index(c), mine, NQ - first - c * ROWS, q_n * 8, K1, DK)
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    stage = 0
    phase = 1
    k = key + start.to(gl.int64) * k_n * 8
    v = value + start.to(gl.int64) * v_n * 8
    for n in range(start, end, BN):
        mbarrier.wait(k_empty.index(stage), phase)
        copy_run(k1.index(stage), k, end - n, fresh(k_n) * 8, 0, DK)
        if DK > K1:
            copy_run(k2.index(stage), k, end - n, fresh(k_n) * 8, K1, DK)
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        mbarrier.wait(v_empty.index(stage), phase)
        copy_run(v1.index(stage), v, end - n, fresh(v_n) * 8, 0, DV)
        if DV > V1:
            copy_run(v2.index(stage), v, end - n, fresh(v_n) * 8, V1, DV)
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
        k += BN * k_n * 8
        v += BN * v_n * 8
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def hide(s, tile, stage, phase, facts, FLAGS: gl.constexpr):
    """-inf where a query does not see a key of tile ``tile``. FLAGS: 1 has a left bound, 2 a right one."""
    start, end, position, left, right = facts
    BN: gl.constexpr = s.shape[1]
    keys = start + tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, accumulator(BN)))
    seen = keys[None, :] < end
    if FLAGS & 1:
        seen = seen & (keys[None, :] >= position[:, None] - left)
    if FLAGS & 2:
        seen = seen & (keys[None, :] <= position[:, None] + right)
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def consume(
    common,
    INDEX: gl.constexpr, FLAGS: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, RULE: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 queries from ``first`` + 64 INDEX on against keys ``start`` .. ``end``."""
    rings, barriers, sink, output, log_sum_exp, o_row, first, NQ, NK, start, end, left, right, factor = common
    V1: gl.constexpr = rings[4].shape[2]
    V2: gl.constexpr = rings[5].shape[2]
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    mine = first + INDEX * ROWS
    i = mine + gl.arange(0, ROWS, layout=ROW)
    m, l, acc1, acc2 = no_keys_yet(V1, V2, BN)
    tiles = (end - start + BN - 1) // BN
    if tiles > 0:
        facts = (start, end, i + (NK - NQ), left, right)
        state = consume_first(m, l, acc1, acc2, rings, barriers, facts, factor, hide, FLAGS, INDEX, DK, DV, BN)
        # Tiles that all of these queries see need no mask.
        low = mine + (NK - NQ)
        high = low + ROWS - 1
        all_from = 1
        all_to = (end - start) // BN
        if FLAGS & 1:
            all_from = gl.minimum(gl.maximum((high - left - start + BN - 1) // BN, 1), tiles)
        if FLAGS & 2:
            all_to = gl.minimum((low + right + 1 - start) // BN, all_to)
        all_to = gl.maximum(all_to, all_from)
        if FLAGS & 1:
            state = consume_run(
                state, rings, barriers, facts, factor, 1, all_from, hide, FLAGS, True, INDEX, DK, DV, BN, STAGES
            )
        state = consume_run(
            state, rings, barriers, facts, factor, all_from, all_to, hide, FLAGS, False, INDEX, DK, DV, BN, STAGES
        )
        state = consume_run(
            state, rings, barriers, facts, factor, all_to, tiles, hide, FLAGS, True, INDEX, DK, DV, BN, STAGES
        )
        m, l, acc1, acc2 = consume_last(state, rings, barriers, DV)
    if HAS_SINKS:
        l += gl.exp2(gl.load(sink).to(gl.float32) * LOG2E - m)
    dead = l == 0.0
    inverse = reciprocal(l, RULE)
    rows = INDEX * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(V1)))
    store(output, rows, first + rows < NQ, o_row, acc1 * per_row(inverse, V1)[:, None], 0, DV)
    if DV > V1:
        rows = INDEX * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(V2)))
        store(output, rows, first + rows < NQ, o_row, acc2 * per_row(inverse, V2)[:, None], V1, DV)
    if HAS_LSE:
        lse = gl.where(dead, -float("inf"), (m + gl.log2(gl.where(dead, 1.0, l))) * LN2)
        gl.store(log_sum_exp + i, lse, mask=i < NQ)


@gluon.jit
def attention(
    query, key, value, sinks,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, sinks_h,
    NQ, NK, group, scale, left, right,
    output, log_sum_exp,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, RULE: gl.constexpr,
    DK: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, DV: gl.constexpr, V1: gl.constexpr, V2: gl.constexpr,
    CONSUMERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As ``kernel_triton.attention``, without bias, masks and softcap. Grid: (ceil(NQ / (64 CONSUMERS)), H, B)."""
    dtype: gl.constexpr = query.dtype.element_ty
    tile = gl.program_id(0)
    if HAS_RIGHT:
        tile = gl.num_programs(0) - 1 - tile  # the longest rows first
    h = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    g = h // group
    first = tile * (CONSUMERS * ROWS)
    q_base = query + (b * q_b + h * q_h + first.to(gl.int64) * q_n) * 8
    k_base = key + (b * k_b + g * k_h) * 8
    v_base = value + (b * v_b + g * v_h) * 8
    o_base = output + (b * o_b + h * o_h + first.to(gl.int64) * o_n) * 8
    factor = scale.to(gl.float32, bitcast=True) * LOG2E
    low = first + (NK - NQ)
    high = gl.minimum(first + CONSUMERS * ROWS, NQ) - 1 + (NK - NQ)
    start = NK * 0
    end = NK
    if HAS_LEFT:
        start = gl.minimum(gl.maximum(low - left, 0), NK)
    if HAS_RIGHT:
        end = gl.maximum(gl.minimum(high + right + 1, NK), start)
    FLAGS: gl.constexpr = (1 if HAS_LEFT else 0) + (2 if HAS_RIGHT else 0)
    HAS_SINKS: gl.constexpr = sinks is not None
    HAS_LSE: gl.constexpr = log_sum_exp is not None
    # A partition's arguments cannot be None: pointers that are not there are the output's, and not read.
    sink = o_base
    if HAS_SINKS:
        sink = sinks + h * sinks_h
    lse_base = o_base
    if HAS_LSE:
        lse_base = log_sum_exp + (b * gl.num_programs(1) + h) * NQ

    rings, barriers = rings_and_barriers(dtype, CONSUMERS, DK, K1, K2, DV, V1, V2, BN, STAGES)
    common = (rings, barriers, sink, o_base, lse_base, o_n * 8, first, NQ, NK, start, end, left, right, factor)
    operands = (rings, barriers, q_base, k_base, v_base, q_n, k_n, v_n, first, NQ, start, end)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (common, 0, FLAGS, HAS_SINKS, HAS_LSE, RULE, DK, DV, BN, STAGES)),
                (consume, (common, 1, FLAGS, HAS_SINKS, HAS_LSE, RULE, DK, DV, BN, STAGES)),
                (produce, (operands, CONSUMERS, DK, DV, BN, STAGES)),
            ],
            [4, 4],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (common, 0, FLAGS, HAS_SINKS, HAS_LSE, RULE, DK, DV, BN, STAGES)),
                (consume, (common, 1, FLAGS, HAS_SINKS, HAS_LSE, RULE, DK, DV, BN, STAGES)),
                (consume, (common, 2, FLAGS, HAS_SINKS, HAS_LSE, RULE, DK, DV, BN, STAGES)),
                (produce, (operands, CONSUMERS, DK, DV, BN, STAGES)),
            ],
            [4, 4, 4],
            [160, 160, 32],
        )
