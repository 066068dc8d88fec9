"""Device code of the delta rule in chunks: what the tokens of a tile depend on one another, solved for all tiles at
once; then from tile to tile what is written, with the state in registers. ``DECAY`` as in ``kernel_causal``, of a head
or a token; ``BETA`` as in ``kernel_step``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.linear_attention.kernel_causal import CLOSED, gates, left_over
from attncompile.plugins.linear_attention.kernel_triton import LOG2E, low, places, read_state, scaled, write_state
from attncompile.plugins.tile_softmax import moved


@triton.jit
def elapsed(log_decay, rate, b, rows, place, g, groups, tokens, DECAY: tl.constexpr):
    """Logarithms of what is left of a state before a tile after each of its tokens, in units of log2."""
    if DECAY == 0:
        x = place.to(tl.float32) * 0.0
    elif DECAY == 1:
        x = rate * (place + 1).to(tl.float32)
    else:
        x = tl.cumsum(gates(log_decay, b, rows, g, groups, tokens, tokens), 0)
    return x


@triton.jit
def solve(
    key, log_decay, beta,
    k_b, k_n, k_h, k_o, NK,
    solved,
    MAP: tl.constexpr, DECAY: tl.constexpr, BETA: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, BT: tl.constexpr,
    K_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: one tile of one key head, whose inverse is made row by row in float32. Grid (cdiv(NK, BT), HKV, B)."""
    tile, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, groups = tl.num_programs(0), tl.num_programs(1)
    place, cols = tl.arange(0, BT), tl.arange(0, K1)
    rows = tile * BT + place
    k_base = moved(key, k_o) + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    seen = (rows < NK)[:, None] & (cols < DK)[None, :]
    f = low(tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0), seen, MAP)
    rate = 0.0
    if DECAY == 1:
        rate = tl.maximum(tl.load(log_decay + g).to(tl.float32) * LOG2E, CLOSED)
    x = elapsed(log_decay, rate, b, rows, place, g, groups, NK, DECAY)
    at = b.to(tl.int64) * NK + rows
    if BETA == 2:
        at = at * groups + g
    rates = tl.load(beta + at, mask=rows < NK, other=0.0).to(tl.float32)
    # Transposed: [j, i] is what the i-th token takes of the earlier j-th.
    p = tl.dot(f, tl.trans(f)) * tl.exp2(tl.minimum(x[None, :] - x[:, None], 0.0)) * rates[None, :]
    # Taken, not multiplied by 0: a later key may be infinite.
    p = tl.where(place[None, :] > place[:, None], p, 0.0)
    inverse = tl.where(place[:, None] == place[None, :], 1.0, 0.0)
    for i in range(1, BT):
        of = tl.sum(tl.where((place == i)[None, :], p, 0.0), 1)
        made = tl.sum(of[:, None] * inverse, 0)
        inverse = tl.where((place == i)[:, None], inverse - made[None, :], inverse)
    out = solved + ((b * groups + g) * tiles + tile).to(tl.int64) * (BT * BT)
    tl.store(out + place[:, None] * BT + place[None, :], inverse * rates[None, :])


@triton.jit
def delta(
    key, value, solved, log_decay, initial_state,
    k_b, k_n, k_h, v_b, v_n, v_h, k_o, v_o, NK, C,
    written, state, final_state,
    MAP: tl.constexpr, DECAY: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr, CHUNK: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: all tiles of one key head in order, ``BV`` channels of the values. Grid (cdiv(DV, BV), HKV, B)."""
    STEPS: tl.constexpr = CHUNK // BT
    part, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    head, V = b * groups + g, part * BV
    cols, out_cols, place = tl.arange(0, K1), V + tl.arange(0, BV), tl.arange(0, BT)
    k_base = moved(key, k_o) + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    v_base = moved(value, v_o) + b.to(tl.int64) * v_b * 8 + g.to(tl.int64) * v_h * 8
    half = key.dtype.element_ty
    s = tl.zeros((K1, BV), tl.float32)
    if initial_state is not None:
        s += read_state(initial_state, head, 0, V, DK, K1, DV, BV)
    rate = 0.0
    if DECAY == 1:
        rate = tl.maximum(tl.load(log_decay + g).to(tl.float32) * LOG2E, CLOSED)
    tiles = tl.cdiv(NK, BT)
    for step in range(0, tiles):
        first = step * BT
        end = tl.minimum(first + BT, NK)
        rows = first + place
        seen = (rows < NK)[:, None] & (cols < DK)[None, :]
        k = tl.load(k_base + places(rows, cols, k_n * K_UNIT, K_COLUMNS), mask=seen, other=0.0)
        v_seen = (rows < NK)[:, None] & (out_cols < DV)[None, :]
        v = tl.load(v_base + places(rows, out_cols, v_n * V_UNIT, V_COLUMNS), mask=v_seen, other=0.0)
        at = solved + (head * tiles + step).to(tl.int64) * (BT * BT)
        t = tl.load(at + place[:, None] * BT + place[None, :])
        if state is not None:
            if step % STEPS == 0:
                write_state(state, s, head * C + step // STEPS, 0, V, DK, K1, DV, BV)
        f = low(k, seen, MAP)
        held, largest = scaled(s)
        read = tl.dot(f, held.to(half)) * largest
        if DECAY != 0:
            read *= tl.exp2(elapsed(log_decay, rate, b, rows, place, g, groups, NK, DECAY))[:, None]
        new = tl.dot(t, v.to(tl.float32) - read, input_precision="tf32")
        low_new = new.to(half)
        to = (b.to(tl.int64) * NK + rows) * groups + g
        tl.store(written + to[:, None] * DV + out_cols[None, :], low_new, mask=v_seen)
        if DECAY != 0:
            until, whole = left_over(log_decay, rate, b, rows, g, first, end, groups, NK, DECAY)
            s *= whole
            low_new = (new * until[:, None]).to(half)
        s = tl.dot(tl.trans(f), low_new, s)
    if final_state is not None:
        write_state(final_state, s, head, 0, V, DK, K1, DV, BV)
