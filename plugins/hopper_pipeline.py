"""Device functions of the Hopper kernels, in Gluon: a producer warpgroup that copies keys and values into rings of
shared memory, and consumer warpgroups of 64 queries each that multiply and take the softmax (FlashAttention-3,
arXiv:2407.08608).

The producer copies by pointers (cp.async), not by tensor maps: launches stay plain, and rows may lie anywhere. A
consumer starts the product with the next keys before it has multiplied the last values, so that the tensor cores work
while exponentials are taken; two consumers fill one another's gaps.

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
def moved(base, offset):
    """As ``tile_softmax.moved``."""
    if offset is not None:
        base += offset.to(gl.int64) * 8
    return base


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
def opaque(last, DV: gl.constexpr):
    """The end of all but an empty last run of tiles, which the compiler must not see to be empty: with a loop behind it
    ptxas keeps the weights that are multiplied apart from those that are made. 6% faster at head dim 128, measured.
    """
    if DV > 64:
        last = fresh(last)
    return last


@gluon.jit
def copy_run(shared, base, begin, end, stride, first: gl.constexpr, dim: gl.constexpr):
    """Start copying rows that follow one another; those before ``begin`` and from ``end`` on are 0."""
    rows = gl.arange(0, shared.shape[0], layout=gl.SliceLayout(1, copy_layout(shared.shape[1])))
    copy(shared, base, rows, (rows >= begin) & (rows < end), stride, first, dim, True)


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
def pass_by(slot, barriers, tiles, SPEC: gl.constexpr):
    """Let ``tiles`` tiles go by for queries that do not exist. Returns the slot of the next tile of keys."""
    INDEX: gl.constexpr = SPEC[0]
    CONSUMERS: gl.constexpr = SPEC[1]
    STAGES: gl.constexpr = SPEC[5]
    TURNS: gl.constexpr = SPEC[6]
    stage, phase, turn, go = slot
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)
    mbarrier.arrive(q_empty.index(turn & 1))
    for t in range(tiles):
        if TURNS and t > 0:
            mbarrier.wait(turns.index(INDEX), go)
            mbarrier.arrive(turns.index((INDEX + 1) % CONSUMERS))
            go ^= 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage))
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage))
        stage, phase = following(stage, phase, STAGES)
    return stage, phase, go


@gluon.jit
def store_run(base, count, stride, values, first: gl.constexpr, dim: gl.constexpr):
    """Rows that follow one another, the first ``count`` of them."""
    rows = gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, accumulator(values.shape[1])))
    store(base, rows, rows < count, stride, values, first, dim)


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
    """Shared memory of queries (of two items, so that the next one's are there in time), keys and values, first and
    second part each (the second is the first where a head dim has one part), and the barriers: queries full and empty,
    keys full and empty, values full and empty, and whose turn it is to start products.
    """
    q1 = ring(dtype, 2 * CONSUMERS, ROWS, K1)
    k1 = ring(dtype, STAGES, BN, K1)
    v1 = ring(dtype, STAGES, BN, V1)
    q2 = q1
    k2 = k1
    v2 = v1
    if DK > K1:
        q2 = ring(dtype, 2 * CONSUMERS, ROWS, K2)
        k2 = ring(dtype, STAGES, BN, K2)
    if DV > V1:
        v2 = ring(dtype, STAGES, BN, V2)
    q_full = mbarrier.allocate_mbarrier(batch=2)
    q_empty = mbarrier.allocate_mbarrier(batch=2)
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for s in gl.static_range(2):
        mbarrier.init(q_full.index(s), count=128)
        mbarrier.init(q_empty.index(s), count=CONSUMERS)
    turns = mbarrier.allocate_mbarrier(batch=CONSUMERS)
    for s in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=128)  # every thread of the producer arrives when its copies have
        mbarrier.init(k_empty.index(s), count=CONSUMERS)
        mbarrier.init(v_full.index(s), count=128)
        mbarrier.init(v_empty.index(s), count=CONSUMERS)
    gl.barrier()
    return (q1, q2, k1, k2, v1, v2), (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)


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
def start_scores(rings, queries, stage, SPEC: gl.constexpr):
    DK: gl.constexpr = SPEC[2]
    BN: gl.constexpr = SPEC[4]
    q1, q2, k1, k2, v1, v2 = rings
    zero = gl.zeros((ROWS, BN), gl.float32, accumulator(BN))
    s = warpgroup_mma(q1.index(queries), k1.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if k1.shape[2] < DK:
        s = warpgroup_mma(q2.index(queries), k2.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The slot of a ring after this one, and its phase."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def consume_first(slot, start, work, masked, hide: gl.constexpr, FLAGS: gl.constexpr, SPEC: gl.constexpr):
    """Tile 0 of an item, at ``slot`` (stage, phase, number of the item, turn): its scores and weights. ``start``:
    maximum, sum and output so far; ``work``: rings, barriers, where the queries are, the facts of ``hide`` and the
    factor of the scores. ``hide(s, tile, facts, FLAGS)`` puts -inf where a key is hidden; it is asked where ``masked``.
    SPEC: index of the consumer, their number, head dim, value dim, keys of a tile, stages, whether they take turns.

    Returned, and carried from tile to tile: maximum, sum, output, the weights whose values are not multiplied yet, the
    stage and phase of their tile, and the phase of this consumer's next turn.
    """
    stage, phase, turn, go = slot
    m, l, acc1, acc2 = start
    rings, barriers, queries, facts, factor = work
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    V1: gl.constexpr = rings[4].shape[2]
    arrived(q_full.index(turn & 1), (turn >> 1) & 1)
    arrived(k_full.index(stage), phase)
    s = warpgroup_mma_wait(0, deps=(start_scores(rings, queries, stage, SPEC),))
    mbarrier.arrive(k_empty.index(stage))
    if SPEC[3] > 64:
        s = hide(s, 0, facts, FLAGS)  # a branch here would take the registers that large value dims do not have
    elif masked:
        s = hide(s, 0, facts, FLAGS)
    p, alpha, m, l = soften(s, factor, m, l)
    return m, l, acc1, acc2, as_operand(p, rings[4].dtype, V1), stage, phase, go


@gluon.jit
def consume_run(
    state, work, tile, last, hide: gl.constexpr, FLAGS: gl.constexpr, MASKED: gl.constexpr, SPEC: gl.constexpr
):
    """Tiles ``tile`` .. ``last``: scores of this one while the values of the one before are multiplied.

    With TURNS consumers take turns at starting products: one has its softmax while another has the tensor cores.
    """
    rings, barriers, queries, facts, factor = work
    INDEX: gl.constexpr = SPEC[0]
    CONSUMERS: gl.constexpr = SPEC[1]
    DV: gl.constexpr = SPEC[3]
    STAGES: gl.constexpr = SPEC[5]
    TURNS: gl.constexpr = SPEC[6]
    m, l, acc1, acc2, weights, stage, phase, go = state
    q1, q2, k1, k2, v1, v2 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    V1: gl.constexpr = v1.shape[2]
    V2: gl.constexpr = v2.shape[2]
    for t in range(tile, last):
        before = stage
        phase_before = phase
        stage, phase = following(stage, phase, STAGES)
        if TURNS:
            mbarrier.wait(turns.index(INDEX), go)
            go ^= 1
        arrived(k_full.index(stage), phase)
        s_token = start_scores(rings, queries, stage, SPEC)
        arrived(v_full.index(before), phase_before)
        acc1_token = warpgroup_mma(weights, v1.index(before), acc1, is_async=True)
        if DV > V1:
            acc2_token = warpgroup_mma(weights, v2.index(before), acc2, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index((INDEX + 1) % CONSUMERS))
            s = warpgroup_mma_wait(2, deps=(s_token,))
        else:
            if TURNS:
                mbarrier.arrive(turns.index((INDEX + 1) % CONSUMERS))
            s = warpgroup_mma_wait(1, deps=(s_token,))
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            s = hide(s, t, facts, FLAGS)
        p, alpha, m, l = soften(s, factor, m, l)
        acc1 = warpgroup_mma_wait(0, deps=(acc1_token,))
        if DV > V1:
            acc2 = warpgroup_mma_wait(0, deps=(acc2_token,))
            acc2 = acc2 * per_row(alpha, V2)[:, None]
        mbarrier.arrive(v_empty.index(before))
        acc1 = acc1 * per_row(alpha, V1)[:, None]
        weights = as_operand(p, v1.dtype, V1)
    return m, l, acc1, acc2, weights, stage, phase, go


@gluon.jit
def consume_between(
    state, work, turn, hide: gl.constexpr, FLAGS: gl.constexpr, MASKED: gl.constexpr, SPEC: gl.constexpr
):
    """The last tile of item ``turn`` and the first of the next, ``work``, together: scores of the one while the values
    of the other are multiplied. Returns sum and output of the item, and the next one's state.
    """
    rings, barriers, queries, facts, factor = work
    DV: gl.constexpr = SPEC[3]
    BN: gl.constexpr = SPEC[4]
    STAGES: gl.constexpr = SPEC[5]
    m, l, acc1, acc2, weights, stage, phase, go = state
    q1, q2, k1, k2, v1, v2 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    V1: gl.constexpr = v1.shape[2]
    V2: gl.constexpr = v2.shape[2]
    mbarrier.arrive(q_empty.index(turn & 1))
    before = stage
    phase_before = phase
    stage, phase = following(stage, phase, STAGES)
    arrived(q_full.index((turn + 1) & 1), ((turn + 1) >> 1) & 1)
    arrived(k_full.index(stage), phase)
    s_token = start_scores(rings, queries, stage, SPEC)
    arrived(v_full.index(before), phase_before)
    acc1_token = warpgroup_mma(weights, v1.index(before), acc1, is_async=True)
    if DV > V1:
        acc2_token = warpgroup_mma(weights, v2.index(before), acc2, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s_token,))
    else:
        s = warpgroup_mma_wait(1, deps=(s_token,))
    mbarrier.arrive(k_empty.index(stage))
    if MASKED:
        s = hide(s, 0, facts, FLAGS)
    fresh_m, fresh_l, acc1_next, acc2_next = no_keys_yet(V1, V2, BN)
    p, alpha, m_next, l_next = soften(s, factor, fresh_m, fresh_l)
    acc1 = warpgroup_mma_wait(0, deps=(acc1_token,))
    if DV > V1:
        acc2 = warpgroup_mma_wait(0, deps=(acc2_token,))
    mbarrier.arrive(v_empty.index(before))
    weights = as_operand(p, v1.dtype, V1)
    return l, acc1, acc2, (m_next, l_next, acc1_next, acc2_next, weights, stage, phase, go)


@gluon.jit
def consume_last(state, work, turn, SPEC: gl.constexpr):
    """Multiply the values of the last tile. Returns maximum, sum, output, and the slot of the next tile of keys."""
    rings, barriers, queries, facts, factor = work
    DV: gl.constexpr = SPEC[3]
    STAGES: gl.constexpr = SPEC[5]
    m, l, acc1, acc2, weights, stage, phase, go = state
    q1, q2, k1, k2, v1, v2 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    mbarrier.arrive(q_empty.index(turn & 1))
    arrived(v_full.index(stage), phase)
    acc1 = warpgroup_mma(weights, v1.index(stage), acc1)
    if DV > v1.shape[2]:
        acc2 = warpgroup_mma(weights, v2.index(stage), acc2)
    mbarrier.arrive(v_empty.index(stage))
    stage, phase = following(stage, phase, STAGES)
    return m, l, acc1, acc2, stage, phase, go
