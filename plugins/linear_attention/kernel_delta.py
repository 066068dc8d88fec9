"""Device code of the delta rule in chunks: what the tokens of a tile depend on one another, solved for all tiles at
once; then from tile to tile what is written, with the state in registers. ``DECAY`` as in ``kernel_causal``, of a head
or a token; ``BETA`` as in ``kernel_step``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.linear_attention.kernel_causal import CLOSED, gates, running
from attncompile.plugins.linear_attention.kernel_triton import LOG2E, low, places, read_state, scaled, write_state
from attncompile.plugins.tile_softmax import moved


@triton.jit
def elapsed(log_decay, rate, b, first, place, g, groups, tokens, DECAY: tl.constexpr, BT: tl.constexpr):
    """Logarithms, in units of log2, of what is left of a state before a tile after each of its tokens [BT], and after
    all of them.
    """
    if DECAY == 0:
        x, every = place.to(tl.float32) * 0.0, 0.0
    elif DECAY == 1:
        x = rate * (place + 1).to(tl.float32)
        every = rate * tl.minimum(tokens - first, BT).to(tl.float32)
    else:
        x, every = running(log_decay, b, first, g, groups, tokens, BT)
    return x, every


@triton.jit
def keys_of(
    k_base, rows, cols, k_n, NK, MAP: tl.constexpr, DK: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Features of keys at ``rows`` and ``cols``; 0 past the last."""
    seen = (rows < NK)[:, None] & (cols < DK)[None, :]
    return low(tl.load(k_base + places(rows, cols, k_n * UNIT, COLUMNS), mask=seen, other=0.0), seen, MAP)


@triton.jit
def passed(log_decay, rate, b, rows, place, g, groups, tokens, before, DECAY: tl.constexpr):
    """``elapsed`` of 16 tokens after ``before``, and that of the next ones."""
    if DECAY == 0:
        x, after = place.to(tl.float32) * 0.0, before
    elif DECAY == 1:
        x, after = before + rate * (place + 1).to(tl.float32), before + rate * 16.0
    else:
        gate = gates(log_decay, b, rows, g, groups, tokens, tokens)
        x, after = before + tl.cumsum(gate, 0), before + tl.sum(gate, 0)
    return x, after


@triton.jit
def rates_of(beta, b, rows, g, groups, NK, BETA: tl.constexpr):
    at = b.to(tl.int64) * NK + rows
    if BETA == 2:
        at = at * groups + g
    return tl.load(beta + at, mask=rows < NK, other=0.0).to(tl.float32)


@triton.jit
def apart(x_rows, x_cols, DECAY: tl.constexpr):
    """What is left of an earlier token at a later one: ``x`` as ``elapsed``."""
    if DECAY == 0:
        out = 1.0
    else:
        out = tl.exp2(tl.minimum(x_rows[:, None] - x_cols[None, :], 0.0))
    return out


@triton.jit
def below(p, x_rows, x_cols, rates, sound, DECAY: tl.constexpr):
    """-A of later tokens, in rows, and earlier ones, of their products ``p``; 0 for rows that are not ``sound``."""
    return tl.where(sound[:, None], p * apart(x_rows, x_cols, DECAY) * -rates[:, None], 0.0)


@triton.jit
def parts(x):
    """A float32 as two bfloat16s, which keep 16 bits of it."""
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def product(a, b, added):
    """a b^T of squares, and ``added``. A sum lies in registers as both factors of the next product have to: so nothing
    moves between threads, and squares are kept with their transposes.
    """
    a_high, a_low = parts(a)
    b_high, b_low = parts(tl.trans(b))
    return tl.dot(a_high, b_high, tl.dot(a_low, b_high, tl.dot(a_high, b_low, added)))


@triton.jit
def inverse(p, x, rates, sound, place, DECAY: tl.constexpr):
    """(I + A)^-1 of a square on the diagonal, of the products ``p`` of its tokens, and its transpose."""
    row, col = place[:, None], place[None, :]
    a = below(p, x, x, rates, sound, DECAY)
    # The products of keys are their own transposes.
    later = tl.exp2(tl.minimum(x[None, :] - x[:, None], 0.0)) if DECAY != 0 else 1.0
    turned = tl.where(sound[None, :], p * later * -rates[None, :], 0.0)
    pair = row // 2 == col // 2
    q = tl.where(row == col, 1.0, tl.where((row > col) & pair, a, 0.0))
    qt = tl.where(row == col, 1.0, tl.where((row < col) & pair, turned, 0.0))
    q, qt = doubled(q, qt, a, row, col, 2)
    q, qt = doubled(q, qt, a, row, col, 4)
    return doubled(q, qt, a, row, col, 8)


@triton.jit
def doubled(q, qt, a, row, col, SIZE: tl.constexpr):
    """Inverses of twice as many tokens: of [[P, 0], [R, Q]] it is [[P', 0], [-Q' R P', Q']]."""
    r = tl.where((row // SIZE == col // SIZE + 1) & (row // (2 * SIZE) == col // (2 * SIZE)), a, 0.0)
    mt = product(qt, r, tl.zeros_like(q))
    return product(q, mt, q), product(mt, q, qt)


@triton.jit
def write_square(out, x, rates, sound, place, I: tl.constexpr, J: tl.constexpr, BT: tl.constexpr):
    """``x`` [i, j] times the rate of the j-th token, into the square of those rows and columns."""
    at = out + (I * 16 + place)[:, None] * BT + (J * 16 + place)[None, :]
    tl.store(at, x * rates[None, :] + tl.where(sound, 0.0, float("nan"))[:, None])


@triton.jit
def write_nothing(out, place, I: tl.constexpr, J: tl.constexpr, BT: tl.constexpr):
    """Zeros into the square of those rows and columns."""
    tl.store(out + (I * 16 + place)[:, None] * BT + (J * 16 + place)[None, :], tl.zeros((16, 16), tl.float32))


@triton.jit
def first_bad(p, rates, place, I: tl.constexpr, BT: tl.constexpr):
    """Of every token its place in the tile if its key or rate is not finite, else ``BT``."""
    size = tl.sum(tl.where(place[:, None] == place[None, :], p, 0.0), 1)
    return tl.where((size < float("inf")) & (tl.abs(rates) < float("inf")), BT, I * 16 + place)


@triton.jit
def solve(
    key, log_decay, beta,
    k_b, k_n, k_h, k_o, NK,
    solved,
    MAP: tl.constexpr, DECAY: tl.constexpr, BETA: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, K_COLUMNS: tl.constexpr, K_UNIT: tl.constexpr,
):  # fmt: skip
    """A block: one tile of one key head, by squares of 16 tokens; ``BK`` features at a time. From the first token on
    that is not finite rows are NaNs: zeros times it would be some in rows before. Grid (cdiv(NK, BT), HKV, B).
    """
    tile, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, groups = tl.num_programs(0), tl.num_programs(1)
    place = tl.arange(0, 16)
    r0 = tile * BT + place
    r1, r2, r3 = r0 + 16, r0 + 32, r0 + 48
    k_base = moved(key, k_o) + b.to(tl.int64) * k_b * 8 + g.to(tl.int64) * k_h * 8
    out = solved + ((b * groups + g) * tiles + tile).to(tl.int64) * (BT * BT)
    none = tl.zeros((16, 16), tl.float32)
    p00, p10, p11, p20, p21 = none, none, none, none, none
    p22, p30, p31, p32, p33 = none, none, none, none, none
    for K in range(0, K1, BK):
        cols = K + tl.arange(0, BK)
        f0 = keys_of(k_base, r0, cols, k_n, NK, MAP, DK, K_COLUMNS, K_UNIT)
        p00 = tl.dot(f0, tl.trans(f0), p00)
        if BT >= 32:
            f1 = keys_of(k_base, r1, cols, k_n, NK, MAP, DK, K_COLUMNS, K_UNIT)
            p10 = tl.dot(f1, tl.trans(f0), p10)
            p11 = tl.dot(f1, tl.trans(f1), p11)
        if BT >= 64:
            f2 = keys_of(k_base, r2, cols, k_n, NK, MAP, DK, K_COLUMNS, K_UNIT)
            f3 = keys_of(k_base, r3, cols, k_n, NK, MAP, DK, K_COLUMNS, K_UNIT)
            p20 = tl.dot(f2, tl.trans(f0), p20)
            p21 = tl.dot(f2, tl.trans(f1), p21)
            p22 = tl.dot(f2, tl.trans(f2), p22)
            p30 = tl.dot(f3, tl.trans(f0), p30)
            p31 = tl.dot(f3, tl.trans(f1), p31)
            p32 = tl.dot(f3, tl.trans(f2), p32)
            p33 = tl.dot(f3, tl.trans(f3), p33)
    rate = 0.0
    if DECAY == 1:
        rate = tl.maximum(tl.load(log_decay + g).to(tl.float32) * LOG2E, CLOSED)
    b0 = rates_of(beta, b, r0, g, groups, NK, BETA)
    bad = first_bad(p00, b0, place, 0, BT)
    if BT >= 32:
        b1 = rates_of(beta, b, r1, g, groups, NK, BETA)
        bad = tl.minimum(bad, first_bad(p11, b1, place, 1, BT))
    if BT >= 64:
        b2 = rates_of(beta, b, r2, g, groups, NK, BETA)
        b3 = rates_of(beta, b, r3, g, groups, NK, BETA)
        bad = tl.minimum(bad, tl.minimum(first_bad(p22, b2, place, 2, BT), first_bad(p33, b3, place, 3, BT)))
    end = tl.min(bad, 0)
    # Of squares in row I and column J: A is what is below the diagonal, Q the inverse, T its transpose.
    s0 = place < end
    b0 = tl.where(s0, b0, 0.0)
    x0, before = passed(log_decay, rate, b, r0, place, g, groups, NK, 0.0, DECAY)
    q00, t00, q11, t11, q22, t22, q33, t33 = none, none, none, none, none, none, none, none
    if BT >= 32:
        s1 = place + 16 < end
        b1 = tl.where(s1, b1, 0.0)
        x1, before = passed(log_decay, rate, b, r1, place, g, groups, NK, before, DECAY)
    if BT >= 64:
        s2, s3 = place + 32 < end, place + 48 < end
        b2, b3 = tl.where(s2, b2, 0.0), tl.where(s3, b3, 0.0)
        x2, before = passed(log_decay, rate, b, r2, place, g, groups, NK, before, DECAY)
        x3, before = passed(log_decay, rate, b, r3, place, g, groups, NK, before, DECAY)
    if NK > 0:  # always: Triton looks through all that stands in one block for each of its products, here and below
        q00, t00 = inverse(p00, x0, b0, s0, place, DECAY)
        if BT >= 32:
            q11, t11 = inverse(p11, x1, b1, s1, place, DECAY)
    write_square(out, q00, b0, s0, place, 0, 0, BT)
    if BT >= 32:
        m10 = product(t00, below(p10, x1, x0, b1, s1, DECAY), none)
        write_nothing(out, place, 0, 1, BT)
        write_square(out, product(q11, m10, none), b0, s1, place, 1, 0, BT)
        write_square(out, q11, b1, s1, place, 1, 1, BT)
    if BT >= 64:
        t10 = product(m10, q11, none)
        if NK > 0:
            q22, t22 = inverse(p22, x2, b2, s2, place, DECAY)
            q33, t33 = inverse(p33, x3, b3, s3, place, DECAY)
        a20, a21 = below(p20, x2, x0, b2, s2, DECAY), below(p21, x2, x1, b2, s2, DECAY)
        m20 = product(t00, a20, product(t10, a21, none))
        m21 = product(t11, a21, none)
        t20, t21 = product(m20, q22, none), product(m21, q22, none)
        write_nothing(out, place, 0, 2, BT)
        write_nothing(out, place, 1, 2, BT)
        write_square(out, product(q22, m20, none), b0, s2, place, 2, 0, BT)
        write_square(out, product(q22, m21, none), b1, s2, place, 2, 1, BT)
        write_square(out, q22, b2, s2, place, 2, 2, BT)
        a30, a31 = below(p30, x3, x0, b3, s3, DECAY), below(p31, x3, x1, b3, s3, DECAY)
        a32 = below(p32, x3, x2, b3, s3, DECAY)
        m30 = product(t00, a30, product(t10, a31, product(t20, a32, none)))
        m31 = product(t11, a31, product(t21, a32, none))
        m32 = product(t22, a32, none)
        write_nothing(out, place, 0, 3, BT)
        write_nothing(out, place, 1, 3, BT)
        write_nothing(out, place, 2, 3, BT)
        write_square(out, product(q33, m30, none), b0, s3, place, 3, 0, BT)
        write_square(out, product(q33, m31, none), b1, s3, place, 3, 1, BT)
        write_square(out, product(q33, m32, none), b2, s3, place, 3, 2, BT)
        write_square(out, q33, b3, s3, place, 3, 3, BT)


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
        x, every = elapsed(log_decay, rate, b, first, place, g, groups, NK, DECAY, BT)
        if DECAY != 0:
            read *= tl.exp2(x)[:, None]
        new = tl.dot(t, v.to(tl.float32) - read, input_precision="tf32")
        low_new = new.to(half)
        to = (b.to(tl.int64) * NK + rows) * groups + g
        tl.store(written + to[:, None] * DV + out_cols[None, :], low_new, mask=v_seen)
        if DECAY != 0:
            s *= tl.exp2(every)
            low_new = (new * tl.exp2(tl.minimum(every - x, 0.0))[:, None]).to(half)
        s = tl.dot(tl.trans(f), low_new, s)
    if final_state is not None:
        write_state(final_state, s, head, 0, V, DK, K1, DV, BV)
