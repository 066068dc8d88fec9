"""Device code of linear attention a token at a time: state in, state out, what each token's queries read between.

A state is read and written once and everything else is small beside it, so it is kept in float32 from end to end, lies
transposed in registers ([values, features]: a row of memory is a run of values), and nothing is multiplied by tensor
cores. ``DECAY`` is that of ``kernel_causal``; ``BETA`` 0: no delta rule; 1: ``beta`` [B, N, 1]; 2: [B, N, G].
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.linear_attention.kernel_triton import LOG2E, features
from attncompile.plugins.tile_softmax import moved


@triton.jit
def vector(base, b_step, h_step, b, h, cols, step, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """Where the channels ``cols`` of the first token of one head lie, and how far apart two tokens are."""
    at = base + b.to(tl.int64) * b_step * 8 + h.to(tl.int64) * h_step * 8
    if COLUMNS:
        at += cols.to(tl.int64) * (step.to(tl.int64) * UNIT)
        apart = 1
    else:
        at += cols
        apart = step.to(tl.int64) * UNIT
    return at, apart


@triton.jit
def step(
    query, key, value, log_decay, beta, initial_state, initial_total,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o, NK, group, scale, epsilon, floor,
    output, final_state, final_total,
    Q_MAP: tl.constexpr, K_MAP: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr, DECAY: tl.constexpr,
    BETA: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, O_COLUMNS: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: all tokens of one key head in order, ``BV`` channels of the values, the queries of all heads that share
    the key head. Grid (cdiv(DV, BV), HKV, B).
    """
    part, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    cols, out_cols = tl.arange(0, K1), part * BV + tl.arange(0, BV)
    there, out_there = cols < DK, out_cols < DV
    head = (b * groups + g).to(tl.int64)
    s = tl.zeros((BV, K1), tl.float32)
    z = tl.zeros((1, K1), tl.float32)
    lies = head * (DK * DV) + cols[None, :] * DV + out_cols[:, None]
    seen = there[None, :] & out_there[:, None]
    if initial_state is not None:
        s += tl.load(initial_state + lies, mask=seen, other=0.0)
    if initial_total is not None:
        z += tl.load(initial_total + head * DK + cols, mask=there, other=0.0)[None, :]
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    k_at, k_apart = vector(key, k_b, k_h, b, g, cols, k_n, K_COLUMNS, K_UNIT)
    v_at, v_apart = vector(value, v_b, v_h, b, g, out_cols, v_n, V_COLUMNS, V_UNIT)
    if DECAY == 1:
        kept = tl.exp2(tl.load(log_decay + g).to(tl.float32) * LOG2E)
    for n in range(NK):
        t = b.to(tl.int64) * NK + n
        f = features(tl.load(k_at, mask=there, other=0.0)[None, :], there[None, :], K_MAP)
        v = tl.load(v_at, mask=out_there, other=0.0).to(tl.float32)
        if DECAY == 1:
            s, z = s * kept, z * kept
        elif DECAY == 2:
            left = tl.exp2(tl.load(log_decay + t * groups + g).to(tl.float32) * LOG2E)
            s, z = s * left, z * left
        elif DECAY == 3:
            x = tl.load(log_decay + (t * groups + g) * DK + cols, mask=there, other=0.0).to(tl.float32)
            left = tl.exp2(x * LOG2E)[None, :]
            s, z = s * left, z * left
        if BETA != 0:
            rate = tl.load(beta + (t * groups + g if BETA == 2 else t)).to(tl.float32)
            v = rate * (v - tl.sum(s * f, 1))
        s += v[:, None] * f
        z += f
        for r in range(group):
            h = g * group + r
            q_at, q_apart = vector(query, q_b, q_h, b, h, cols, q_n, Q_COLUMNS, Q_UNIT)
            o_at, o_apart = vector(output, o_b, o_h, b, h, out_cols, o_n, O_COLUMNS, O_UNIT)
            q = tl.load(q_at + n * q_apart, mask=there, other=0.0)
            fq = features(q[None, :], there[None, :], Q_MAP)
            out = tl.sum(s * fq, 1) * scale.to(tl.float32, bitcast=True)
            if NORM != 0:
                below = tl.sum(tl.sum(fq * z, 1), 0) + epsilon.to(tl.float32, bitcast=True)
                if FLOOR:
                    below = tl.maximum(below, floor.to(tl.float32, bitcast=True))
                out = out / below
            tl.store(o_at + n * o_apart, out.to(output.dtype.element_ty), mask=out_there)
        k_at += k_apart
        v_at += v_apart
    if final_state is not None:
        tl.store(final_state + lies, s, mask=seen)
    if final_total is not None:
        if part == 0:
            tl.store(final_total + head * DK + cols[None, :], z, mask=there[None, :])
