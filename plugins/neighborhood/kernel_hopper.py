"""Neighborhood attention for sm_90, in Gluon: boxes as in ``kernel_triton.py``, work as in ``hopper_pipeline.py``.

A box is met plane by plane. Where the keys of a plane lie, counted from its corner, and the words that say their
coordinates (see ``kernel_triton.py``) are the same for every plane of every tile: each block writes both down once. A
query that does not see a plane at all gets a row word that no key passes. Prefix and suffix tokens are a list before
the box; a tile of prefix and suffix queries meets all tokens as one list.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attncompile.plugins.hopper_pipeline import (
    LOG2E,
    ROWS,
    accumulator,
    consume_between,
    consume_first,
    consume_last,
    consume_run,
    copy,
    copy_layout,
    following,
    fresh,
    moved,
    no_keys_yet,
    opaque,
    per_row,
    reciprocal,
    rings_and_barriers,
    store,
)
from attncompile.plugins.neighborhood.kernel_triton import axis_tile, bounds, coordinate, window


@gluon.constexpr_function
def tiles_of(grid, size, dilation):
    """Tiles on an axis."""
    longest = (grid + dilation - 1) // dilation
    return (longest + size - 1) // size * dilation


@gluon.jit
def item(number, H, group, SHAPE: gl.constexpr):
    """Of a number: the tile of queries (see ``query_of``), its head, key head and batch, and where its box begins: the
    places on the axes, and the token of the corner.
    """
    G: gl.constexpr = SHAPE[0]
    T: gl.constexpr = SHAPE[1]
    E: gl.constexpr = SHAPE[2]
    W: gl.constexpr = SHAPE[3]
    L: gl.constexpr = SHAPE[4]
    S: gl.constexpr = SHAPE[5]
    D: gl.constexpr = SHAPE[6]
    C: gl.constexpr = SHAPE[7]
    PREFIX: gl.constexpr = SHAPE[8][0]
    SUFFIX: gl.constexpr = SHAPE[8][1]
    CLAMP: gl.constexpr = SHAPE[9]
    BM: gl.constexpr = T[0] * T[1] * T[2]
    N0: gl.constexpr = tiles_of(G[0], T[0], D[0])
    N1: gl.constexpr = tiles_of(G[1], T[1], D[1])
    N2: gl.constexpr = tiles_of(G[2], T[2], D[2])
    TILES: gl.constexpr = N0 * N1 * N2 + (PREFIX + SUFFIX + BM - 1) // BM
    tile = number % TILES
    h = number // TILES % H
    b = (number // TILES // H).to(gl.int64)
    r0, n0, f0, b0 = axis_tile(tile // (N1 * N2), G[0], T[0], E[0], W[0], L[0], S[0], D[0], C[0], CLAMP)
    r1, n1, f1, b1 = axis_tile(tile // N2 % N1, G[1], T[1], E[1], W[1], L[1], S[1], D[1], C[1], CLAMP)
    r2, n2, f2, b2 = axis_tile(tile % N2, G[2], T[2], E[2], W[2], L[2], S[2], D[2], C[2], CLAMP)
    origin = PREFIX + (r0 * G[1] + r1) * G[2] + r2
    corner = origin + (b0 * D[0] * G[1] + b1 * D[1]) * G[2] + b2 * D[2]
    queries = (f0, f1, f2, n0, n1, n2, origin, (tile - N0 * N1 * N2) * BM)
    return queries, h, h // group, b, (b0, b1, b2), corner


@gluon.jit
def query_of(row, queries, SHAPE: gl.constexpr):
    """Token of row ``row`` of a tile of queries, whether there is one, and its places on the axes."""
    f0, f1, f2, n0, n1, n2, origin, apart = queries
    G: gl.constexpr = SHAPE[0]
    T: gl.constexpr = SHAPE[1]
    D: gl.constexpr = SHAPE[6]
    PREFIX: gl.constexpr = SHAPE[8][0]
    SUFFIX: gl.constexpr = SHAPE[8][1]
    p0 = f0 + row // (T[1] * T[2])
    p1 = f1 + row // T[2] % T[1]
    p2 = f2 + row % T[2]
    real = (p0 < n0) & (p1 < n1) & (p2 < n2)
    token = origin + p0 * (D[0] * G[1] * G[2]) + p1 * (D[1] * G[2]) + p2 * D[2]
    if PREFIX + SUFFIX > 0:
        x = apart + row
        real = gl.where(apart >= 0, x < PREFIX + SUFFIX, real)
        token = gl.where(apart >= 0, gl.where(x < PREFIX, x, x + G[0] * G[1] * G[2]), token)
    return gl.where(real, token, 0), real, p0, p1, p2


@gluon.jit
def copy_queries(shared, base, first_row, queries, n8, first: gl.constexpr, dim: gl.constexpr, SHAPE: gl.constexpr):
    """Start copying 64 queries of the tile."""
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, copy_layout(shared.shape[1])))
    token, real, p0, p1, p2 = query_of(row, queries, SHAPE)
    copy(shared, base, token.to(gl.int64), real, n8 * 8, first, dim, True)


@gluon.jit
def copy_listed(shared, base, x, count, apart, n8, first: gl.constexpr, dim: gl.constexpr, SHAPE: gl.constexpr):
    """Start copying entries ``x`` .. of the list of tokens that all queries see."""
    G: gl.constexpr = SHAPE[0]
    PREFIX: gl.constexpr = SHAPE[8][0]
    entry = x + gl.arange(0, shared.shape[0], layout=gl.SliceLayout(1, copy_layout(shared.shape[1])))
    token = gl.where((apart >= 0) | (entry < PREFIX), entry, entry + G[0] * G[1] * G[2])
    copy(shared, base, gl.where(entry < count, token, 0).to(gl.int64), entry < count, n8 * 8, first, dim, True)


@gluon.jit
def copy_plane(shared, base, places, part, corner, n8, first: gl.constexpr, dim: gl.constexpr):
    """Start copying part ``part`` of a plane whose first token is ``corner``."""
    place = places.index(part).load(gl.SliceLayout(1, copy_layout(shared.shape[1])))
    copy(shared, base, (corner + place).to(gl.int64), place >= 0, n8 * 8, first, dim, False)


@gluon.jit
def produce(
    operands, SHAPE: gl.constexpr, PLANES: gl.constexpr, CONSUMERS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """For one item after the other its queries, then the list of tokens that all see, then the box."""
    rings, barriers, places, total, H, group, query, key, value, q_strides, k_strides, v_strides = operands
    q1, q2, k1, k2, v1, v2 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    q_b, q_n, q_h = q_strides
    k_b, k_n, k_h = k_strides
    v_b, v_n, v_h = v_strides
    K1: gl.constexpr = k1.shape[2]
    V1: gl.constexpr = v1.shape[2]
    G: gl.constexpr = SHAPE[0]
    D: gl.constexpr = SHAPE[6]
    OUTSIDE: gl.constexpr = SHAPE[8][0] + SHAPE[8][1]
    PARTS: gl.constexpr = places.shape[0]
    stage = 0
    phase = 1
    turn = 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        queries, h, g, b, begin, corner = item(number, H, group, SHAPE)
        q = query + (b * q_b + h * q_h) * 8
        k = key + (b * k_b + g * k_h) * 8
        v = value + (b * v_b + g * v_h) * 8
        mbarrier.wait(q_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
        for c in gl.static_range(CONSUMERS):
            copy_queries(q1.index((turn & 1) * CONSUMERS + c), q, c * ROWS, queries, fresh(q_n), 0, DK, SHAPE)
            if DK > K1:
                copy_queries(q2.index((turn & 1) * CONSUMERS + c), q, c * ROWS, queries, fresh(q_n), K1, DK, SHAPE)
        async_copy.mbarrier_arrive(q_full.index(turn & 1), increment_count=False)
        turn += 1
        parts = PLANES * PARTS
        if OUTSIDE > 0:
            apart = queries[7]
            count = gl.where(apart >= 0, OUTSIDE + G[0] * G[1] * G[2], OUTSIDE)
            parts = gl.where(apart >= 0, 0, parts)
            for x in range(0, count, BN):
                mbarrier.wait(k_empty.index(stage), phase)
                copy_listed(k1.index(stage), k, x, count, apart, fresh(k_n), 0, DK, SHAPE)
                if DK > K1:
                    copy_listed(k2.index(stage), k, x, count, apart, fresh(k_n), K1, DK, SHAPE)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), phase)
                copy_listed(v1.index(stage), v, x, count, apart, fresh(v_n), 0, DV, SHAPE)
                if DV > V1:
                    copy_listed(v2.index(stage), v, x, count, apart, fresh(v_n), V1, DV, SHAPE)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                stage, phase = following(stage, phase, STAGES)
        for t in range(0, parts):
            first = corner + t // PARTS * (D[0] * G[1] * G[2])
            mbarrier.wait(k_empty.index(stage), phase)
            copy_plane(k1.index(stage), k, places, t % PARTS, first, fresh(k_n), 0, DK)
            if DK > K1:
                copy_plane(k2.index(stage), k, places, t % PARTS, first, fresh(k_n), K1, DK)
            async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            mbarrier.wait(v_empty.index(stage), phase)
            copy_plane(v1.index(stage), v, places, t % PARTS, first, fresh(v_n), 0, DV)
            if DV > V1:
                copy_plane(v2.index(stage), v, places, t % PARTS, first, fresh(v_n), V1, DV)
            async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
            stage, phase = following(stage, phase, STAGES)


@gluon.jit
def guarded(s, rows, keys, GUARDS: gl.constexpr):
    """-inf where row word + key word lacks a guard bit: three instructions an element. Left to the compiler, LLVM packs
    the comparisons into bit vectors and takes them out again, which takes seven.
    """
    ASM: gl.constexpr = (
        "{ .reg .u32 t; .reg .pred hidden; add.u32 t, $2, $3; lop3.or.b32 t|hidden, t, "
        + GUARDS
        + ", 0, 0x0C, 0; selp.f32 $0, 0fFF800000, $1, hidden; }"
    )
    r, _ = gl.broadcast(rows[:, None], s)
    k, _ = gl.broadcast(keys[None, :], s)
    return gl.inline_asm_elementwise(ASM, "=f,f,r,r", [s, r, k], gl.float32, is_pure=True, pack=1)


@gluon.jit
def hide_list(s, tile, facts, FLAGS: gl.constexpr):
    """-inf past the end of the list of tokens."""
    row_words, low0, high0, words, count, before = facts
    BN: gl.constexpr = s.shape[1]
    entry = tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, accumulator(BN)))
    return gl.where((entry < count)[None, :], s, -float("inf"))


@gluon.jit
def hide_part(s, tile, facts, FLAGS: gl.constexpr):
    """-inf where a guard bit is gone. FLAGS: bits of a field, parts and keys of a plane, whether all are seen."""
    row_words, low0, high0, words, count, before = facts
    BN: gl.constexpr = s.shape[1]
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BN))
    t = tile - before
    if FLAGS[3]:
        entry = t * BN + gl.arange(0, BN, layout=COLUMN)
        s = gl.where((entry < FLAGS[2])[None, :], s, -float("inf"))
    else:
        plane = t // FLAGS[1]
        mine = gl.where((plane >= low0) & (plane <= high0), row_words, 0)
        theirs = words.index(t % FLAGS[1]).load(COLUMN)
        if FLAGS[0] == 8:
            s = guarded(s, mine, theirs, "0x80808080")
        else:
            s = guarded(s, mine, theirs, "0x80008000")
    return s


@gluon.jit
def consume(
    common, SHAPE: gl.constexpr, PLANES: gl.constexpr, PLANE: gl.constexpr, FIELD: gl.constexpr,
    ALL_SEEN: gl.constexpr, RULE: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """For one item after the other 64 of its queries. SPEC: see ``hopper_pipeline.consume_first``."""
    rings, barriers, words, total, H, group, output, o_strides, factor = common
    INDEX: gl.constexpr = SPEC[0]
    CONSUMERS: gl.constexpr = SPEC[1]
    DV: gl.constexpr = SPEC[3]
    BN: gl.constexpr = SPEC[4]
    G: gl.constexpr = SHAPE[0]
    OUTSIDE: gl.constexpr = SHAPE[8][0] + SHAPE[8][1]
    V1: gl.constexpr = rings[4].shape[2]
    V2: gl.constexpr = rings[5].shape[2]
    PARTS: gl.constexpr = words.shape[0]
    FLAGS: gl.constexpr = (FIELD, PARTS, PLANE, ALL_SEEN)
    row = INDEX * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(BN)))
    stage = 0
    phase = 0
    turn = 0
    go = 1 if INDEX == 0 else 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        row_words, low0, high0 = seen_by(row, number, H, group, SHAPE, FIELD)
        before = 0
        count = 0
        parts = PLANES * PARTS
        if OUTSIDE > 0:
            apart = item(number, H, group, SHAPE)[0][7]
            count = gl.where(apart >= 0, OUTSIDE + G[0] * G[1] * G[2], OUTSIDE)
            before = (count + BN - 1) // BN
            parts = gl.where(apart >= 0, 0, parts)
        facts = (row_words, low0, high0, words, count, before)
        work = (rings, barriers, (turn & 1) * CONSUMERS + INDEX, facts, factor)
        start = no_keys_yet(V1, V2, BN)
        slot = (stage, phase, turn, go)
        last = before + parts
        first = 1
        if OUTSIDE > 0:
            state = consume_first(slot, start, work, True, hide_list, FLAGS, SPEC)
            state = consume_run(state, work, 1, before, hide_list, FLAGS, True, SPEC)
            first = before
        elif ALL_SEEN and PLANE >= BN:
            state = consume_first(slot, start, work, False, hide_part, FLAGS, SPEC)
        else:
            state = consume_first(slot, start, work, True, hide_part, FLAGS, SPEC)
        # In two runs, of which one may be empty: see ``opaque``.
        middle = opaque(last, DV)
        if ALL_SEEN:
            middle = opaque(gl.maximum(gl.minimum(before + PLANE // BN, last), first), DV)
        state = consume_run(state, work, first, middle, hide_part, FLAGS, not ALL_SEEN, SPEC)
        if DV > 64 or ALL_SEEN:
            state = consume_run(state, work, middle, last, hide_part, FLAGS, not ALL_SEEN or PLANE % BN != 0, SPEC)
        m, l, acc1, acc2, stage, phase, go = consume_last(state, work, turn, SPEC)
        turn += 1
        put(number, l, acc1, acc2, output, o_strides, H, group, SHAPE, RULE, SPEC)


@gluon.jit
def seen_by(row, number, H, group, SHAPE: gl.constexpr, FIELD: gl.constexpr):
    """Row words of 64 queries of an item, and the planes that they see."""
    W: gl.constexpr = SHAPE[3]
    L: gl.constexpr = SHAPE[4]
    S: gl.constexpr = SHAPE[5]
    C: gl.constexpr = SHAPE[7]
    CLAMP: gl.constexpr = SHAPE[9]
    queries, h, g, b, begin, corner = item(number, H, group, SHAPE)
    token, real, p0, p1, p2 = query_of(row, queries, SHAPE)
    low0, high0, c0 = window(p0, queries[3], W[0], L[0], S[0], C[0], CLAMP)
    low1, high1, c1 = window(p1, queries[4], W[1], L[1], S[1], C[1], CLAMP)
    low2, high2, c2 = window(p2, queries[5], W[2], L[2], S[2], C[2], CLAMP)
    row_words = bounds(low2 - begin[2], high2 - begin[2], FIELD, 0)
    if FIELD == 8:
        row_words = row_words + bounds(low1 - begin[1], high1 - begin[1], FIELD, 2)
    return row_words, low0 - begin[0], high0 - begin[0]


@gluon.jit
def put(
    number, l, acc1, acc2, output, o_strides, H, group, SHAPE: gl.constexpr, RULE: gl.constexpr, SPEC: gl.constexpr
):  # fmt: skip
    """Divide and store the output of 64 queries of an item."""
    o_b, o_n, o_h = o_strides
    INDEX: gl.constexpr = SPEC[0]
    DV: gl.constexpr = SPEC[3]
    V1: gl.constexpr = acc1.shape[1]
    V2: gl.constexpr = acc2.shape[1]
    queries, h, g, b, begin, corner = item(number, H, group, SHAPE)
    inverse = reciprocal(l, RULE)
    out = output + (b * o_b + h * o_h) * 8
    row_1 = INDEX * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(V1)))
    token_1, real_1, p0, p1, p2 = query_of(row_1, queries, SHAPE)
    store(out, token_1.to(gl.int64), real_1, o_n * 8, acc1 * per_row(inverse, V1)[:, None], 0, DV)
    if DV > V1:
        row_2 = INDEX * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(V2)))
        token_2, real_2, p0, p1, p2 = query_of(row_2, queries, SHAPE)
        store(out, token_2.to(gl.int64), real_2, o_n * 8, acc2 * per_row(inverse, V2)[:, None], V1, DV)


@gluon.jit
def run_box(state, work, PARTS: gl.constexpr, PLANE: gl.constexpr, FLAGS: gl.constexpr, SPEC: gl.constexpr):
    """All tiles of a box but the first."""
    DV: gl.constexpr = SPEC[3]
    BN: gl.constexpr = SPEC[4]
    ALL_SEEN: gl.constexpr = FLAGS[3]
    # In two runs, of which one may be empty: see ``opaque``.
    middle = opaque(PARTS, DV)
    if ALL_SEEN:
        WHOLE: gl.constexpr = PLANE // BN if PLANE >= BN else 1
        middle = opaque(WHOLE, DV)
    state = consume_run(state, work, 1, middle, hide_part, FLAGS, not ALL_SEEN, SPEC)
    if DV > 64 or ALL_SEEN:
        state = consume_run(state, work, middle, PARTS, hide_part, FLAGS, not ALL_SEEN or PLANE % BN != 0, SPEC)
    return state


@gluon.jit
def consume_overlapping(
    common, SHAPE: gl.constexpr, PLANES: gl.constexpr, PLANE: gl.constexpr, FIELD: gl.constexpr,
    ALL_SEEN: gl.constexpr, RULE: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """As ``consume``, without prefix and suffix: the end of an item and the beginning of the next at the same time."""
    rings, barriers, words, total, H, group, output, o_strides, factor = common
    INDEX: gl.constexpr = SPEC[0]
    CONSUMERS: gl.constexpr = SPEC[1]
    BN: gl.constexpr = SPEC[4]
    V1: gl.constexpr = rings[4].shape[2]
    V2: gl.constexpr = rings[5].shape[2]
    PARTS: gl.constexpr = words.shape[0]
    FLAGS: gl.constexpr = (FIELD, PARTS, PLANE, ALL_SEEN)
    MASKED: gl.constexpr = not ALL_SEEN or PLANE < BN
    row = INDEX * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(BN)))
    begin = gl.program_id(0)
    step = gl.num_programs(0)
    go = 1 if INDEX == 0 else 0
    turn = 0
    mine, low, high = seen_by(row, begin, H, group, SHAPE, FIELD)
    work = (rings, barriers, INDEX, (mine, low, high, words, 0, 0), factor)
    state = consume_first((0, 0, 0, go), no_keys_yet(V1, V2, BN), work, MASKED, hide_part, FLAGS, SPEC)
    m, l, acc1, acc2, weights, stage, phase, go = state
    for number in range(begin, total - step, step):
        work = (rings, barriers, (turn & 1) * CONSUMERS + INDEX, (mine, low, high, words, 0, 0), factor)
        state = (m, l, acc1, acc2, weights, stage, phase, go)
        state = run_box(state, work, PLANES * PARTS, PLANE, FLAGS, SPEC)
        mine, low, high = seen_by(row, number + step, H, group, SHAPE, FIELD)
        work = (rings, barriers, ((turn + 1) & 1) * CONSUMERS + INDEX, (mine, low, high, words, 0, 0), factor)
        done, out1, out2, state = consume_between(state, work, turn, hide_part, FLAGS, MASKED, SPEC)
        m, l, acc1, acc2, weights, stage, phase, go = state
        put(number, done, out1, out2, output, o_strides, H, group, SHAPE, RULE, SPEC)
        turn += 1
    work = (rings, barriers, (turn & 1) * CONSUMERS + INDEX, (mine, low, high, words, 0, 0), factor)
    state = (m, l, acc1, acc2, weights, stage, phase, go)
    state = run_box(state, work, PLANES * PARTS, PLANE, FLAGS, SPEC)
    m, l, acc1, acc2, stage, phase, go = consume_last(state, work, turn, SPEC)
    put(begin + turn * step, l, acc1, acc2, output, o_strides, H, group, SHAPE, RULE, SPEC)


@gluon.jit
def write_tables(places, words, SHAPE: gl.constexpr, PLANE: gl.constexpr, FIELD: gl.constexpr, ALL_SEEN: gl.constexpr):
    """Of every key of a plane where it lies, counted in tokens from the corner, and its word. Past the plane's end
    there is the corner once more, with a word that no query's bounds pass.
    """
    G: gl.constexpr = SHAPE[0]
    E: gl.constexpr = SHAPE[2]
    D: gl.constexpr = SHAPE[6]
    BN: gl.constexpr = places.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for part in range(places.shape[0]):
        x = part * BN + gl.arange(0, BN, layout=LAYOUT)
        there = x < PLANE
        x2 = x % E[2]
        x1 = x // E[2] % E[1]
        x0 = x // (E[2] * E[1])
        place = x0 * (D[0] * G[1] * G[2]) + x1 * (D[1] * G[2]) + x2 * D[2]
        places.index(part).store(gl.where(there, place, 0))
        if not ALL_SEEN:
            word = coordinate(gl.where(there, x2, (1 << (FIELD - 1)) - 1), FIELD, 0)
            if FIELD == 8:
                word = word + coordinate(x1, FIELD, 2)
            words.index(part).store(word)


@gluon.jit
def neighborhood(
    query, key, value,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, q_o, k_o, v_o, H, B, group, scale,
    output,
    G0: gl.constexpr, G1: gl.constexpr, G2: gl.constexpr, T0: gl.constexpr, T1: gl.constexpr, T2: gl.constexpr,
    E0: gl.constexpr, E1: gl.constexpr, E2: gl.constexpr, W0: gl.constexpr, W1: gl.constexpr, W2: gl.constexpr,
    L0: gl.constexpr, L1: gl.constexpr, L2: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
    CLAMP: gl.constexpr, ALL_SEEN: gl.constexpr, NARROW: gl.constexpr, PREFIX: gl.constexpr, SUFFIX: gl.constexpr,
    RULE: gl.constexpr, DK: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, DV: gl.constexpr, V1: gl.constexpr,
    V2: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, TAKE: gl.constexpr,
    GIVE: gl.constexpr, TURNS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As ``kernel_triton.neighborhood``, without bias, key mask, balls, uniform rows, and boxes that are longer than a
    line of the dilation; a plane of more than one axis is NARROW. Any one-dimensional grid: the blocks share the tiles.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    BM: gl.constexpr = T0 * T1 * T2
    TILES: gl.constexpr = (
        tiles_of(G0, T0, D0) * tiles_of(G1, T1, D1) * tiles_of(G2, T2, D2) + (PREFIX + SUFFIX + BM - 1) // BM
    )
    SHAPE: gl.constexpr = (
        (G0, G1, G2), (T0, T1, T2), (E0, E1, E2), (W0, W1, W2), (L0, L1, L2), (S0, S1, S2), (D0, D1, D2),
        (C0, C1, C2), (PREFIX, SUFFIX), CLAMP,
    )  # fmt: skip
    FIELD: gl.constexpr = 8 if NARROW else 16
    # Without a mask the box is one plane, of which only the end is looked at.
    PLANES: gl.constexpr = 1 if ALL_SEEN else E0
    PLANE: gl.constexpr = E0 * E1 * E2 if ALL_SEEN else E1 * E2
    PARTS: gl.constexpr = (PLANE + BN - 1) // BN
    query, key, value = moved(query, q_o), moved(key, k_o), moved(value, v_o)
    factor = scale.to(gl.float32, bitcast=True) * LOG2E
    rings, barriers = rings_and_barriers(dtype, CONSUMERS, DK, K1, K2, DV, V1, V2, BN, STAGES)
    TABLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    places = gl.allocate_shared_memory(gl.int32, [PARTS, BN], TABLE)
    words = gl.allocate_shared_memory(gl.uint32, [PARTS, BN], TABLE)
    write_tables(places, words, SHAPE, PLANE, FIELD, ALL_SEEN)
    gl.barrier()
    total = TILES * H * B
    common = (rings, barriers, words, total, H, group, output, (o_b, o_n, o_h), factor)
    operands = (
        rings, barriers, places, total, H, group, query, key, value, (q_b, q_n, q_h), (k_b, k_n, k_h), (v_b, v_n, v_h),
    )  # fmt: skip
    if OVERLAP:
        gl.static_assert(CONSUMERS == 2 and PREFIX + SUFFIX == 0)
        gl.warp_specialize([
            (consume_overlapping,
             (common, SHAPE, PLANES, PLANE, FIELD, ALL_SEEN, RULE, (0, 2, DK, DV, BN, STAGES, TURNS))),
            (consume_overlapping,
             (common, SHAPE, PLANES, PLANE, FIELD, ALL_SEEN, RULE, (1, 2, DK, DV, BN, STAGES, TURNS))),
            (produce, (operands, SHAPE, PLANES, 2, DK, DV, BN, STAGES)),
        ], [4, 4], [TAKE, GIVE])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (common, SHAPE, PLANES, PLANE, FIELD, ALL_SEEN, RULE, (0, 2, DK, DV, BN, STAGES, TURNS))),
            (consume, (common, SHAPE, PLANES, PLANE, FIELD, ALL_SEEN, RULE, (1, 2, DK, DV, BN, STAGES, TURNS))),
            (produce, (operands, SHAPE, PLANES, 2, DK, DV, BN, STAGES)),
        ], [4, 4], [TAKE, GIVE])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (common, SHAPE, PLANES, PLANE, FIELD, ALL_SEEN, RULE, (0, 1, DK, DV, BN, STAGES, False))),
            (produce, (operands, SHAPE, PLANES, 1, DK, DV, BN, STAGES)),
        ], [4], [GIVE])  # fmt: skip
