"""Device functions of the Hopper kernels, in Gluon: a producer warpgroup that copies keys and values into rings of
shared memory, and consumer warpgroups of 64 queries each that multiply and take the softmax (FlashAttention-3,
arXiv:2407.08608).

The producer copies by pointers (cp.async), not by tensor maps: launches stay plain, and rows may lie anywhere. A
consumer starts the product with the next keys before it has multiplied the last values, so that the tensor cores work
while exponentials are taken; two or three consumers fill one another's gaps.

Scores are in units of log2; see ``tile_softmax.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NO_KEY = gl.constexpr(-1.0e30)
ROWS = gl.constexpr(64)  # of one consumer


@gluon.constexpr_function
def copy_layout(width):
    """Threads of a warpgroup over rows of ``width`` elements, 16 bytes each."""
    lanes = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def accumulator(width):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.jit
def copy(shared, base, rows, keep, stride, first: gl.constexpr, dim: gl.constexpr, MASKED: gl.constexpr):
    """Start copying [rows, width] elements from ``first`` on, of rows of ``dim`` at ``base + rows * stride``; 0 where
    not ``keep``.
    """
    width: gl.constexpr = shared.shape[1]
    cols = first + gl.arange(0, width, layout=gl.SliceLayout(0, copy_layout(width)))
    pointers = base + (rows * stride)[:, None] + cols[None, :]
    if first + width > dim or MASKED:
        async_copy.async_load(shared, pointers, mask=keep[:, None] & (cols < dim)[None, :])
    else:
        async_copy.async_load(shared, pointers)


@gluon.jit
def fresh(x):
    """``x``, in a way that the compiler does not see through: what is computed from it is not kept from one turn of a
    loop to the next, in registers of which a producer has few.
    """
    return gl.inline_asm("mov.b32 $0, $1;", "=r,r", args=(x,), result_types=(gl.int32,), is_pure=False)[0]


@gluon.jit
def copy_run(shared, base, count, stride, first: gl.constexpr, dim: gl.constexpr):
    """Start copying rows that follow one another; those from ``count`` on are 0."""
    rows = gl.arange(0, shared.shape[0], layout=gl.SliceLayout(1, copy_layout(shared.shape[1])))
    copy(shared, base, rows, rows < count, stride, first, dim, True)


@gluon.jit
def arrived(barrier, phase):
    """Wait for copies and make them visible to the tensor cores."""
    mbarrier.wait(barrier, phase)
    fence_async_shared()


@gluon.jit
def soften(s, factor, m, l):
    """One tile of scores into the running maximum and sum: weights, how to scale what was, the new maximum and sum."""
    new = gl.maximum(m, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - new[:, None])
    alpha = gl.exp2(m - new)
    return p, alpha, new, l * alpha + gl.sum(p, 1)


@gluon.jit
def as_operand(p, dtype: gl.constexpr, V1: gl.constexpr):
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, accumulator(V1), 2))


@gluon.jit
def per_row(x, width: gl.constexpr):
    """A value a query, laid out for an accumulator of ``width`` columns."""
    return gl.convert_layout(x, gl.SliceLayout(1, accumulator(width)))


@gluon.jit
def store(base, rows, keep, stride, values, first: gl.constexpr, dim: gl.constexpr):
    width: gl.constexpr = values.shape[1]
    cols = first + gl.arange(0, width, layout=gl.SliceLayout(0, accumulator(width)))
    gl.store(
        base + (rows * stride)[:, None] + cols[None, :], values.to(base.dtype.element_ty),
        mask=keep[:, None] & (cols < dim)[None, :],
    )  # fmt: skip


@gluon.jit
def reciprocal(l, RULE: gl.constexpr):
    """What a row's sum divides by; a row without a key gives 0, or NaN where RULE is 2."""
    dead = l == 0.0
    inverse = 1.0 / gl.where(dead, 1.0, l)
    if RULE == 2:
        inverse = gl.where(dead, float("nan"), inverse)
    return inverse


@gluon.jit
def ring(dtype: gl.constexpr, count: gl.constexpr, rows: gl.constexpr, width: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, width], dtype)
    return gl.allocate_shared_memory(dtype, [count, rows, width], layout)


@gluon.jit
def rings_and_barriers(
    dtype: gl.constexpr, CONSUMERS: gl.constexpr, DK: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr,
    DV: gl.constexpr, V1: gl.constexpr, V2: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Shared memory of queries, keys and values, first and second part each (the second is the first where a head dim
    has one part), and the barriers: queries full, keys full and empty, values full and empty.
    """
    q1 = ring(dtype, CONSUMERS, ROWS, K1)
    k1 = ring(dtype, STAGES, BN, K1)
    v1 = ring(dtype, STAGES, BN, V1)
    q2 = q1
    k2 = k1
    v2 = v1
    if DK > K1:
        q2 = ring(dtype, CONSUMERS, ROWS, K2)
        k2 = ring(dtype, STAGES, BN, K2)
    if DV > V1:
        v2 = ring(dtype, STAGES, BN, V2)
    q_full = mbarrier.allocate_mbarrier()
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(q_full, count=128)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=128)  # every thread of the producer arrives when its copies have
        mbarrier.init(k_empty.index(s), count=CONSUMERS)
        mbarrier.init(v_full.index(s), count=128)
        mbarrier.init(v_empty.index(s), count=CONSUMERS)
    gl.barrier()
    return (q1, q2, k1, k2, v1, v2), (q_full, k_full, k_empty, v_full, v_empty)


@gluon.jit
def no_keys_yet(V1: gl.constexpr, V2: gl.constexpr, BN: gl.constexpr):
    """Maximum, sum, and both parts of the output of 64 queries that have seen no key."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    m = gl.full((ROWS,), NO_KEY, gl.float32, ROW)
    l = gl.zeros((ROWS,), gl.float32, ROW)
    acc1 = gl.zeros((ROWS, V1), gl.float32, accumulator(V1))
    acc2 = gl.zeros((ROWS, V2), gl.float32, accumulator(V2))
    return m, l, acc1, acc2


@gluon.jit
def start_scores(rings, stage, INDEX: gl.constexpr, DK: gl.constexpr, BN: gl.constexpr):
    q1, q2, k1, k2, v1, v2 = rings
    zero = gl.zeros((ROWS, BN), gl.float32, accumulator(BN))
    s = warpgroup_mma(q1.index(INDEX), k1.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if k1.shape[2] < DK:
        s = warpgroup_mma(q2.index(INDEX), k2.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def consume_first(
    m, l, acc1, acc2, rings, barriers, facts, factor, hide: gl.constexpr, FLAGS: gl.constexpr,
    INDEX: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Tile 0: its scores and weights. ``hide(s, tile, stage, phase, facts, FLAGS)`` puts -inf where a key is hidden.

    Returned, and carried from tile to tile: maximum, sum, output, the weights whose values are not multiplied yet, and
    the stage and phase of their tile.
    """
    q_full, k_full, k_empty, v_full, v_empty = barriers
    V1: gl.constexpr = rings[4].shape[2]
    arrived(q_full, 0)
    arrived(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(start_scores(rings, 0, INDEX, DK, BN),))
    mbarrier.arrive(k_empty.index(0))
    s = hide(s, 0, 0, 0, facts, FLAGS)
    p, alpha, m, l = soften(s, factor, m, l)
    return m, l, acc1, acc2, as_operand(p, rings[4].dtype, V1), 0, 0


@gluon.jit
def consume_run(
    state, rings, barriers, facts, factor, tile, last, hide: gl.constexpr, FLAGS: gl.constexpr, MASKED: gl.constexpr,
    INDEX: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles ``tile`` .. ``last``: scores of this one while the values of the one before are multiplied."""
    m, l, acc1, acc2, weights, stage, phase = state
    q1, q2, k1, k2, v1, v2 = rings
    q_full, k_full, k_empty, v_full, v_empty = barriers
    V1: gl.constexpr = v1.shape[2]
    V2: gl.constexpr = v2.shape[2]
    for t in range(tile, last):
        before = stage
        phase_before = phase
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        arrived(k_full.index(stage), phase)
        s_token = start_scores(rings, stage, INDEX, DK, BN)
        arrived(v_full.index(before), phase_before)
        acc1_token = warpgroup_mma(weights, v1.index(before), acc1, is_async=True)
        if DV > V1:
            acc2_token = warpgroup_mma(weights, v2.index(before), acc2, is_async=True)
            s = warpgroup_mma_wait(2, deps=(s_token,))
        else:
            s = warpgroup_mma_wait(1, deps=(s_token,))
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            s = hide(s, t, stage, phase, facts, FLAGS)
        p, alpha, m, l = soften(s, factor, m, l)
        acc1 = warpgroup_mma_wait(0, deps=(acc1_token,))
        if DV > V1:
            acc2 = warpgroup_mma_wait(0, deps=(acc2_token,))
            acc2 = acc2 * per_row(alpha, V2)[:, None]
        mbarrier.arrive(v_empty.index(before))
        acc1 = acc1 * per_row(alpha, V1)[:, None]
        weights = as_operand(p, v1.dtype, V1)
    return m, l, acc1, acc2, weights, stage, phase


@gluon.jit
def consume_last(state, rings, barriers, DV: gl.constexpr):
    """Multiply the values of the last tile."""
    m, l, acc1, acc2, weights, stage, phase = state
    q1, q2, k1, k2, v1, v2 = rings
    q_full, k_full, k_empty, v_full, v_empty = barriers
    arrived(v_full.index(stage), phase)
    acc1 = warpgroup_mma(weights, v1.index(stage), acc1)
    if v1.shape[2] < DV:
        acc2 = warpgroup_mma(weights, v2.index(stage), acc2)
    return m, l, acc1, acc2
