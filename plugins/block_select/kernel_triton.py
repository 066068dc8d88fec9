"""Device code of ``BlockScores`` and ``BlockSelect``, for every architecture.

Scores are one product: rows of BM tiles of queries with BN tiles of keys, over stride * D products that are loaded a
token of the tile at a time, queries in falling and keys in rising order. A row of blocks is selected by one thread
block: the least weight that is kept is found by halving the bits of a float, so nothing is sorted; by its distance from
the anchor a block is kept in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompile.plugins.tile_softmax import LN2, LOG2E, load_rows, moved

ABOVE = tl.constexpr(0x40000000)  # bits of 2.0, above every weight
HALVINGS = tl.constexpr(30)  # that tell all floats below it apart


@triton.jit
def scores(
    query, key, q_b, q_n, q_h, k_b, k_n, k_h, q_o, k_o, NQ, NK, group, scale, scores,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, DK: tl.constexpr, K1: tl.constexpr,
    K2: tl.constexpr, HIGHEST: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """query [B, NQ, H, DK], key [B, NK, H / group, DK] by strides in 8 elements -> scores [B, H, T, C] float32. BN
    tiles are whole blocks of keys; ``HIGHEST``: the highest of a block, not their sum. Grid: ceil(T / BM) *
    ceil(C / (BN * STRIDE / BLOCK)), H, B; columns go fastest, or where a query stands for SPAN > 1 keys rows do, so
    that keys are read once.
    """
    query, key = moved(query, q_o), moved(key, k_o)
    MEMBERS: tl.constexpr = BLOCK // STRIDE
    WIDE: tl.constexpr = BN // MEMBERS
    rows = tl.cdiv(NQ, STRIDE)
    blocks = tl.cdiv(NK, BLOCK)
    across = tl.cdiv(blocks, WIDE)
    if SPAN > 1:
        down = tl.cdiv(rows, BM)
        first_row = tl.program_id(0) % down * BM
        first_block = tl.program_id(0) // down * WIDE
    else:
        first_row = tl.program_id(0) // across * BM
        first_block = tl.program_id(0) % across * WIDE
    first_tile = first_block * MEMBERS
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    inside, beside = tl.arange(0, BM), tl.arange(0, BN)
    a, c = first_row + inside, first_tile + beside
    acc = tl.zeros((BM, BN), tl.float32)
    seen = True
    if CAUSAL:
        seen = first_tile < (first_row + BM) * SPAN
    if seen:
        q_base = query + (b * q_b + h * q_h + (first_row * STRIDE).to(tl.int64) * q_n) * 8
        k_base = key + (b * k_b + h // group * k_h + (first_tile * STRIDE).to(tl.int64) * k_n) * 8
        for i in range(STRIDE):
            at = STRIDE - 1 - i
            q_there = a * STRIDE + at < NQ
            k_there = c * STRIDE + i < NK
            q_rows, k_rows = (inside * STRIDE + at).to(tl.int64), (beside * STRIDE + i).to(tl.int64)
            q1 = load_rows(q_base, q_rows, q_n * 8, 0, K1, DK, q_there, True)
            k1 = load_rows(k_base, k_rows, k_n * 8, 0, K1, DK, k_there, True)
            acc = tl.dot(q1, tl.trans(k1), acc)
            if DK > K1:
                q2 = load_rows(q_base, q_rows, q_n * 8, K1, K2, DK, q_there, True)
                k2 = load_rows(k_base, k_rows, k_n * 8, K1, K2, DK, k_there, True)
                acc = tl.dot(q2, tl.trans(k2), acc)
    s = acc * (scale.to(tl.float32, bitcast=True) * LOG2E / STRIDE)
    there = (c * STRIDE < NK)[None, :]
    if CAUSAL:
        there = there & (c[None, :] // SPAN <= a[:, None])
    s = tl.where(there, s, -float("inf"))
    if MEMBERS > 1:
        parts = tl.reshape(s, (BM, WIDE, MEMBERS))
        top = tl.max(parts, 2)
        if HIGHEST:
            s = top
        else:
            safe = tl.where(top == -float("inf"), 0.0, top)
            total = tl.sum(tl.exp2(parts - safe[:, :, None]), 2)
            s = tl.where(top == -float("inf"), top, safe + tl.log2(tl.maximum(total, 1.0)))
    place = first_block + tl.arange(0, WIDE)
    out = scores + ((b * tl.num_programs(1) + h) * rows + a)[:, None].to(tl.int64) * blocks + place[None, :]
    tl.store(out, s * LN2, mask=(a < rows)[:, None] & (place < blocks)[None, :])


@triton.jit
def weighed(mass, start, columns, r, sinks, window, CAUSAL: tl.constexpr, COUNTED: tl.constexpr, WIDTH: tl.constexpr):
    """Of one piece of a row: weights, whether each may be kept, whether it always is, and what each counts."""
    c = start + tl.arange(0, WIDTH)
    m = tl.load(mass + c, mask=c < columns, other=0.0)
    visible = c < columns
    if CAUSAL:
        visible = visible & (c <= r)
    always = visible & ((c < sinks) | (tl.abs(c - r) <= window))
    counts = m
    if COUNTED:
        counts = tl.full((WIDTH,), 1.0, tl.float32)
    return c, m.to(tl.int32, bitcast=True), visible & (always == 0), always, counts


@triton.jit
def weigh(line, mass, members, C, WIDTH: tl.constexpr):
    """``mass`` [C]: the mean over ``members`` rows of scores from ``line`` on of their softmax over all columns."""
    inside = tl.arange(0, WIDTH)
    for t in range(members):
        top = -float("inf")
        total = 0.0
        for start in range(0, C, WIDTH):
            x = tl.load(line + start + inside, mask=start + inside < C, other=-float("inf"))
            new = tl.maximum(top, tl.max(x, 0))
            safe = tl.where(new == -float("inf"), 0.0, new)
            total = total * tl.exp2((top - safe) * LOG2E) + tl.sum(tl.exp2((x - safe) * LOG2E), 0)
            top = new
        share = 1.0 / (total * members)
        for start in range(0, C, WIDTH):
            c = start + inside
            x = tl.load(line + c, mask=c < C, other=-float("inf"))
            w = tl.exp2((x - top) * LOG2E) * share
            w += tl.load(mass + c, mask=(c < C) & (t > 0), other=0.0)
            tl.store(mass + c, w, mask=c < C)
        line += C
        tl.debug_barrier()


@triton.jit
def put(columns, first, c, kept, own, written):
    """Append what is ``kept`` of one piece to a row that begins at ``first``, where ``written`` entries stand behind
    its own block's -> how many then do, and whether its own is kept.
    """
    rest = (kept & (c != own)).to(tl.int32)
    place = 1 + written + tl.cumsum(rest, 0) - rest
    tl.store(columns + first + place, c, mask=rest != 0)
    return written + tl.sum(rest, 0), tl.sum((kept & (c == own)).to(tl.int32), 0)


@triton.jit
def close(rows, columns, kinds, number, first, own, written, partial):
    """The row's own block, and where its entries lie."""
    tl.store(columns + first, own)
    tl.store(kinds + first, 0)
    start = first.to(tl.int32)
    tl.store(rows + number * 3, start + 1 - partial)
    tl.store(rows + number * 3 + 1, start + 1)
    tl.store(rows + number * 3 + 2, start + 1 + written)


@triton.jit
def near(
    scores, amount, amount_h, TQ, C, sinks, window, rows, columns, kinds, mass, CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``select`` by rule anchor, a row of scores a row of blocks. Grid: TQ, H, B."""
    r = tl.program_id(0)
    number = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * TQ + r
    line = scores + number * C
    weigh(line, mass + number * C, 1, C, WIDTH)
    anchor = -float("inf")
    for start in range(0, C, WIDTH):
        c, x, visible, always = scored(line, start, C, r, sinks, window, CAUSAL, WIDTH)
        anchor = tl.maximum(anchor, tl.max(tl.where(always, x, -float("inf")), 0))
    least = anchor - tl.load(amount + tl.program_id(1) * amount_h)
    own = C - 1
    if CAUSAL:
        own = r
    first = number * C
    written = 0
    partial = 0
    for start in range(0, C, WIDTH):
        c, x, visible, always = scored(line, start, C, r, sinks, window, CAUSAL, WIDTH)
        written, found = put(columns, first, c, always | (visible & (x >= least)), own, written)
        partial += found
    close(rows, columns, kinds, number, first, own, written, partial)


@triton.jit
def scored(line, start, C, r, sinks, window, CAUSAL: tl.constexpr, WIDTH: tl.constexpr):
    """Of one piece of a row: scores, whether each may be kept, and whether it always is."""
    c = start + tl.arange(0, WIDTH)
    visible = c < C
    x = tl.load(line + c, mask=visible, other=-float("inf"))
    if CAUSAL:
        visible = visible & (c <= r)
    return c, x, visible, visible & ((c < sinks) | (tl.abs(c - r) <= window))


@triton.jit
def select(
    scores, amount, amount_h, TQ, C, sinks, window, rows, columns, kinds, mass,
    TILES: tl.constexpr, CAUSAL: tl.constexpr, COUNTED: tl.constexpr, SLACK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """scores [B, H, TQ, C] float32 -> the lists of ``op.py``. ``COUNTED``: the rule is share. Grid: ceil(TQ / TILES),
    H, B. A row is done WIDTH columns at a time; its weights lie in ``mass`` between the passes.
    """
    r = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    count = tl.cdiv(TQ, TILES)
    number = (b * tl.num_programs(1) + h).to(tl.int64) * count + r
    asked = tl.load(amount + h * amount_h)
    members = tl.minimum(TQ - r * TILES, TILES)
    mass = mass + number * C
    weigh(scores + ((b * tl.num_programs(1) + h).to(tl.int64) * TQ + r * TILES) * C, mass, members, C, WIDTH)
    held = 0.0
    for start in range(0, C, WIDTH):
        c, bits, free, always, counts = weighed(mass, start, C, r, sinks, window, CAUSAL, COUNTED, WIDTH)
        held += tl.sum(tl.where(always, counts, 0.0), 0)
    wanted = asked
    if COUNTED:
        visible = C
        if CAUSAL:
            visible = tl.minimum(r + 1, C)
        wanted = tl.ceil(asked * visible.to(tl.float32) - SLACK)
    # The largest weight such that what is at least as heavy is enough.
    low = 0
    high = ABOVE
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        enough = held
        for start in range(0, C, WIDTH):
            c, bits, free, always, counts = weighed(mass, start, C, r, sinks, window, CAUSAL, COUNTED, WIDTH)
            enough += tl.sum(tl.where(free & (bits >= middle), counts, 0.0), 0)
        low = tl.where(enough >= wanted, middle, low)
        high = tl.where(enough >= wanted, high, middle)
    heavier = held
    for start in range(0, C, WIDTH):
        c, bits, free, always, counts = weighed(mass, start, C, r, sinks, window, CAUSAL, COUNTED, WIDTH)
        heavier += tl.sum(tl.where(free & (bits > low), counts, 0.0), 0)
    own = C - 1
    if CAUSAL:
        own = r
    first = number * C
    written = 0
    equal = 0
    partial = 0
    for start in range(0, C, WIDTH):
        c, bits, free, always, counts = weighed(mass, start, C, r, sinks, window, CAUSAL, COUNTED, WIDTH)
        tie = (free & (bits == low)).to(tl.int32)
        before = equal + tl.cumsum(tie, 0) - tie
        equal += tl.sum(tie, 0)
        kept = always | (free & (bits > low))
        kept = kept | ((tie != 0) & (heavier + before.to(tl.float32) * counts < wanted))
        written, found = put(columns, first, c, kept, own, written)
        partial += found
    close(rows, columns, kinds, number, first, own, written, partial)
