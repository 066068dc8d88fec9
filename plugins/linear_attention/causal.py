"""The bodies of ``LinearAttentionStates``, ``-Output`` and ``-Step`` in standard ops: products inside of chunks, and a
Scan from chunk to chunk, so that their work is linear in N.

Shapes in comments: B batch, G key heads, C chunks, L tokens of a chunk, F features, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import ValueInfoProto, helper

from attncompile.plugins.body import Body, float_type
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.linear_attention.pieces import column, divided, ended, laid, mapped, number, widened

CAUSAL_CHUNK = 64
CHANNEL_CHUNK = 16
"""Tokens whose scores a body writes out, and under gates of every channel, where they are products of channels. Longer
chunks, which kernels like, are gone through in such pieces.
"""


def chunk_of(keys: int | str, most: int = CAUSAL_CHUNK) -> int:
    """Tokens of a chunk that a body likes: kernels take powers of two, short sequences are one chunk."""
    return min(most, 1 << max(4, (keys - 1).bit_length())) if isinstance(keys, int) else most


def closed(wide: str) -> float:
    """The logarithm of a decay that leaves nothing in this type: of lower ones, minus infinity too, sums have no
    difference.
    """
    return -800.0 if wide == "double" else -128.0


def padded(body: Body, value: str, chunk: int, tokens: int | None, fill: float, kind: str, axis: int = 2) -> str:
    """``value`` with its tokens, on ``axis``, filled up to whole chunks."""
    if tokens is not None and tokens % chunk == 0:
        return value
    filling = body.constant(np.array(fill, float_type(kind)[1]))
    if tokens is not None:
        return body.op("Pad", value, body.ints(0, chunk - tokens % chunk), filling, body.ints(axis))
    length = body.op("Shape", value, start=axis, end=axis + 1)
    over = body.op("Mod", body.op("Sub", body.ints(0), length), body.ints(chunk))
    return body.op("Pad", value, body.op("Concat", body.ints(0), over, axis=0), filling, body.ints(axis))


@dataclass(frozen=True, slots=True)
class _Decays:
    """What decays inside of chunks. ``since``: of every token, from its chunk's beginning on (its own included), and
    ``until``: to the chunk's end (its own not), as factors of [.., L, F]; ``whole``: of a chunk, a factor of
    [B, G, F, E] when C is scanned; ``between``: of query and key [.., L, L], 0 above the diagonal. Empty names:
    nothing decays. ``sums``: the logarithms behind ``since`` [B, G, C, L, F].
    """

    since: str = ""
    until: str = ""
    whole: str = ""
    between: str = ""
    sums: str = ""


def decays_of(body: Body, form: Form, sizes: Sizes, by_token: bool = False, fill: int = 0) -> _Decays:
    """``by_token``: one number a head is said for each token, so that tokens which fill up a chunk have none. ``fill``:
    tokens of what is filled up, where that is not a chunk.
    """
    if form.decay == "none":
        return _Decays()
    wide, groups, chunk = sizes.state_type, sizes.kv_heads, form.chunk
    steps = body.op("Max", body.op("Cast", "log_decay", to=float_type(wide)[0]), number(body, sizes, closed(wide)))
    if form.decay == "head" and by_token:
        axis = sizes.layouts[1].index("N")
        ends = (body.op("Shape", "key", start=a, end=a + 1) for a in (0, axis))
        steps = body.op("Expand", steps, body.op("Concat", *ends, body.ints(groups), axis=0))
    elif form.decay == "head":
        # [G, 1, 1] by places in the chunk: nothing of it depends on the tokens.
        rate = body.op("Reshape", steps, body.ints(groups, 1, 1, 1))
        kind = float_type(wide)[1]
        place = np.arange(chunk, dtype=np.float64)
        apart = np.where(place[:, None] >= place[None], place[:, None] - place[None], np.inf)
        since = body.op("Exp", body.op("Mul", rate, body.constant((place[:, None] + 1).astype(kind))))
        until = body.op("Exp", body.op("Mul", rate, body.constant((chunk - 1 - place[:, None]).astype(kind))))
        whole = body.op("Exp", body.op("Mul", rate, number(body, sizes, float(chunk))))
        seen = body.constant(np.isfinite(apart)[None, None])
        power = body.op("Exp", body.op("Mul", rate, body.constant(np.where(np.isfinite(apart), apart, 0).astype(kind))))
        between = body.op("Where", seen, power, number(body, sizes, 0.0))
        return _Decays(since, until, body.op("Squeeze", whole, body.ints(1)), between)
    if form.decay != "channel":
        laid_out = column(body, body.op("Transpose", steps, perm=[0, 2, 1]))
        width = 1
    else:
        laid_out, width = body.op("Transpose", steps, perm=[0, 2, 1, 3]), sizes.head_dim
    laid_out = padded(body, laid_out, fill or chunk, sizes.keys, 0.0, wide)
    laid_out = body.op("Reshape", laid_out, body.ints(0, groups, -1, chunk, width))
    sums = body.op("CumSum", laid_out, body.scalar(3))
    last = body.op("Slice", sums, body.ints(chunk - 1), body.ints(chunk), body.ints(3))
    since, until = body.op("Exp", sums), body.op("Exp", body.op("Sub", last, sums))
    whole = body.op("Transpose", body.op("Exp", last), perm=[0, 1, 2, 4, 3])  # [B, G, C, F, 1]
    between = ""
    if width == 1:
        across = body.op("Sub", sums, body.op("Transpose", sums, perm=[0, 1, 2, 4, 3]))
        between = body.op("Exp", body.op("Add", across, _triangle(body, sizes, chunk)))
    return _Decays(since, until, whole, between, sums)


def _triangle(body: Body, sizes: Sizes, chunk: int) -> str:
    """0 at and below the diagonal, else -inf."""
    kind = float_type(sizes.state_type)[1]
    return body.constant(np.triu(np.full((chunk, chunk), -np.inf), 1).astype(kind))


def _chunks(body: Body, form: Form, sizes: Sizes, value: str, heads: int, width: int, fill: int = 0) -> str:
    """[B, heads, N, width] -> [B, heads, C, L, width]"""
    value = padded(body, value, fill or form.chunk, sizes.keys, 0.0, sizes.state_type)
    return body.op("Reshape", value, body.ints(0, heads, -1, form.chunk, width))


def keys_of(body: Body, form: Form, sizes: Sizes, fill: int = 0) -> str:
    """Features [B, G, C, L, F]; those of tokens beyond the last are 0."""
    key = laid(body, widened(body, "key", sizes.dtype, sizes.state_type), sizes.layouts[1], "BHND")
    return _chunks(body, form, sizes, mapped(body, sizes, key, form.key_map, -1), sizes.kv_heads, sizes.head_dim, fill)


def values_of(body: Body, form: Form, sizes: Sizes, fill: int = 0) -> str:
    value = laid(body, widened(body, "value", sizes.dtype, sizes.state_type), sizes.layouts[2], "BHND")
    return _chunks(body, form, sizes, value, sizes.kv_heads, sizes.value_dim, fill)


def _pieces(form: Form) -> int:
    """In how many pieces a body goes through a chunk: scores of pairs, and sums of logarithms, are of a piece."""
    most = CHANNEL_CHUNK if form.decay == "channel" else CAUSAL_CHUNK
    return form.chunk // most if form.chunk > most and form.chunk % most == 0 else 1


def states(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    pieces = _pieces(form)
    form = replace(form, chunk=form.chunk // pieces)
    over = sizes.keys is None or sizes.keys % form.chunk > 0
    by_token = form.decay == "head" and over and "final_state" in names
    decays = decays_of(body, form, sizes, by_token)
    keys, values = keys_of(body, form, sizes), values_of(body, form, sizes)
    if decays.until:
        keys = body.op("Mul", keys, decays.until)
    added = [body.op("MatMul", body.op("Transpose", keys, perm=[0, 1, 2, 4, 3]), values)]  # [B, G, C, F, E]
    if "total" in names:
        added.append(body.op("ReduceSum", keys, body.ints(3), keepdims=0))  # [B, G, C, F]
    batch = body.op("Shape", "key", start=0, end=1)
    tails = ((sizes.kv_heads, sizes.head_dim, sizes.value_dim), (sizes.kv_heads, sizes.head_dim))
    firsts = [
        first(body, sizes, batch, n if n in names else "", tail)
        for n, tail, _ in zip(("initial_state", "initial_total"), tails, added, strict=False)
    ]
    fixed = form.decay == "head" and not by_token
    before, after = _scanned(body, sizes, firsts, added, decays.whole, fixed, 2)
    if pieces > 1:
        end = body.ints(2**62)
        before = [body.op("Slice", x, body.ints(0), end, body.ints(2), body.ints(pieces)) for x in before]
    made = {"state": before[0], "final_state": after[0]}
    if "total" in names:
        made |= {"total": before[1], "final_total": after[1]}
    return made


def first(body: Body, sizes: Sizes, batch: str, given: str, tail: tuple[int, ...]) -> str:
    """The state before the first token."""
    if given:
        return given
    element, kind = float_type(sizes.state_type)
    shape = body.op("Concat", batch, body.ints(*tail), axis=0)
    return body.op("ConstantOfShape", shape, value=helper.make_tensor("zero", element, [1], np.zeros(1, kind).tobytes(),
                                                                      raw=True))  # fmt: skip


def _scanned(
    body: Body, sizes: Sizes, carried: list[str], added: list[str], whole: str, fixed: bool, axis: int
) -> tuple[list[str], list[str]]:  # fmt: skip
    """What stands before every chunk, and after the last one. ``carried`` stands before the first, ``added`` is what
    each adds on ``axis``, and ``whole`` what is left of a state after one; ``fixed``: all chunks decay alike.
    """
    element = float_type(sizes.state_type)[0]
    inner = body.branch()
    scanned = [*added, whole] if whole and not fixed else list(added)
    results, outputs = [], []
    for i in range(len(added)):
        kept, new = f"scan_state_{i}", f"scan_added_{i}"
        outputs.append(inner.op("Identity", kept))
        if whole:
            factor = whole if fixed else "scan_whole"
            if i:
                factor = inner.op("Squeeze", factor, body.ints(-1))
            kept = inner.op("Mul", kept, factor)
        results.append(inner.op("Add", kept, new))
    every = [f"scan_state_{i}" for i in range(len(added))]
    every += [f"scan_added_{i}" for i in range(len(added))] + (["scan_whole"] if len(scanned) > len(added) else [])

    def info(name: str) -> ValueInfoProto:
        made: ValueInfoProto = helper.make_tensor_value_info(name, element, None)
        return made

    graph = helper.make_graph(inner.nodes, "from_chunk_to_chunk", [info(n) for n in every],
                              [info(n) for n in (*results, *outputs)])  # fmt: skip
    made = body.ops(
        "Scan", [*carried, *scanned], 2 * len(added), body=graph, num_scan_inputs=len(scanned),
        scan_input_axes=[axis] * len(scanned), scan_output_axes=[axis] * len(added),
    )  # fmt: skip
    return made[len(added) :], made[: len(added)]


def _inside(
    body: Body, form: Form, sizes: Sizes, decays: _Decays, keys: str, values: str, pieces: int
) -> tuple[str, str]:  # fmt: skip
    """``state`` and ``total`` before every piece of a chunk. What else is given is of pieces, in one row."""
    left = body.op("Mul", keys, decays.until) if decays.until else keys
    added = [body.op("MatMul", body.op("Transpose", left, perm=[0, 1, 2, 4, 3]), values)]
    if form.sums:
        added.append(body.op("ReduceSum", left, body.ints(3), keepdims=0))
    shapes = ((sizes.head_dim, sizes.value_dim), (sizes.head_dim,))
    groups, whole, fixed = sizes.kv_heads, decays.whole, form.decay == "head"
    cut = [
        body.op("Reshape", x, body.ints(0, groups, -1, pieces, *shape)) for x, shape in zip(added, shapes, strict=False)
    ]
    if fixed:
        whole = body.op("Unsqueeze", whole, body.ints(-1))
    elif whole:
        width = sizes.head_dim if form.decay == "channel" else 1
        whole = body.op("Reshape", whole, body.ints(0, groups, -1, pieces, width, 1))
    before, _ = _scanned(body, sizes, ["state", "total"][: len(cut)], cut, whole, fixed, 3)
    made = [body.op("Reshape", x, body.ints(0, groups, -1, *n)) for x, n in zip(before, shapes, strict=False)]
    return made[0], made[-1]


def output(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    """Scores inside of chunks [.., L, L], and what queries read of the state before theirs. A long chunk is a row of
    shorter ones, whose states are made again.
    """
    fill, pieces = form.chunk, _pieces(form)
    form = replace(form, chunk=fill // pieces)
    decays = decays_of(body, form, sizes, fill=fill)
    keys, values = keys_of(body, form, sizes, fill), values_of(body, form, sizes, fill)
    query = laid(body, widened(body, "query", sizes.dtype, sizes.state_type), sizes.layouts[0], "BHND")
    query = mapped(body, sizes, query, form.query_map, -1)
    query = _chunks(body, form, sizes, query, sizes.heads, sizes.head_dim, fill)
    if form.scale != 1.0 and form.normaliser == "none":
        query = body.op("Mul", query, number(body, sizes, form.scale))
    group, state, total = sizes.group, "state", "total"
    if pieces > 1:
        state, total = _inside(body, form, sizes, decays, keys, values, pieces)
    since, between, sums = decays.since, decays.between, decays.sums
    rank = 5
    if group > 1:  # an axis for the query heads of a key head
        rank, axis = 6, body.ints(2)
        query = body.op("Reshape", query, body.ints(0, sizes.kv_heads, group, -1, form.chunk, sizes.head_dim))

        def spread(value: str, at: str = axis) -> str:
            return body.op("Unsqueeze", value, at) if value else ""

        keys, values, state = spread(keys), spread(values), spread(state)
        total = spread(total) if form.sums else total
        front = axis if form.decay != "head" else body.ints(1)
        since, between, sums = spread(since, front), spread(between, front), spread(sums, front)
    swap = [*range(rank - 2), rank - 1, rank - 2]
    if form.decay == "channel":
        apart = body.op("Sub", body.op("Unsqueeze", sums, body.ints(-2)), body.op("Unsqueeze", sums, body.ints(-3)))
        apart = body.op("Add", apart, column(body, _triangle(body, sizes, form.chunk)))
        pairs = body.op("Mul", body.op("Unsqueeze", query, body.ints(-2)), body.op("Unsqueeze", keys, body.ints(-3)))
        scores = body.op("ReduceSum", body.op("Mul", pairs, body.op("Exp", apart)), body.ints(-1), keepdims=0)
    else:
        scores = body.op("MatMul", query, body.op("Transpose", keys, perm=swap))
        scores = body.op("Mul", scores, between) if between else body.op("Trilu", scores, upper=0)
    reading = body.op("Mul", query, since) if since else query
    found = body.op("Add", body.op("MatMul", scores, values), body.op("MatMul", reading, state))
    if form.normaliser == "sum":
        below = body.op("Add", body.op("ReduceSum", scores, body.ints(-1), keepdims=1),
                        body.op("MatMul", reading, column(body, total)))  # fmt: skip
        found = divided(body, form, sizes, found, below)
        if form.scale != 1.0:
            found = body.op("Mul", found, number(body, sizes, form.scale))
    found = body.op("Reshape", found, body.ints(0, sizes.heads, -1, sizes.value_dim))
    if sizes.keys is None or sizes.keys % fill:
        axis_of = sizes.layouts[0].index("N")
        end = body.ints(sizes.keys) if sizes.keys is not None else body.op(
            "Shape", "query", start=axis_of, end=axis_of + 1
        )  # fmt: skip
        found = body.op("Slice", found, body.ints(0), end, body.ints(2))
    return {"output": ended(body, sizes, laid(body, found, "BHND", sizes.layouts[3]))}


def step(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    """One token after the other, in a Scan."""
    wide, groups, dim = sizes.state_type, sizes.kv_heads, sizes.head_dim
    element = float_type(wide)[0]
    query, key, value = (
        laid(body, widened(body, x, sizes.dtype, wide), layout, "BHND")
        for x, layout in zip(("query", "key", "value"), sizes.layouts, strict=False)
    )
    query, key = (mapped(body, sizes, x, m, -1) for x, m in ((query, form.query_map), (key, form.key_map)))
    query = body.op("Mul", query, number(body, sizes, form.scale)) if form.normaliser == "none" else query
    query = body.op("Reshape", query, body.ints(0, groups, sizes.group, -1, dim))
    scanned = {"q": (query, 3), "k": (key, 2), "v": (value, 2)}
    if form.decay != "none":
        decay = body.op("Cast", "log_decay", to=element)
        if form.decay == "head":
            token = body.op("Shape", "key", start=sizes.layouts[1].index("N"), end=sizes.layouts[1].index("N") + 1)
            shape = body.op("Concat", body.ints(1), token, body.ints(1), axis=0)
            decay = body.op("Expand", decay, shape)
        if form.decay != "channel":
            decay = column(body, decay)
        scanned["g"] = (body.op("Exp", decay), 1)
    if form.delta:
        scanned["b"] = (column(body, body.op("Cast", "beta", to=element)), 1)
    batch = body.op("Shape", "query", start=0, end=1)
    tails = {"state": (groups, dim, sizes.value_dim), "total": (groups, dim)}
    kept = [n for n in tails if n == "state" or form.sums]
    carried = [first(body, sizes, batch, f"initial_{n}" if f"initial_{n}" in names else "", tails[n]) for n in kept]
    at = body.branch()
    state, total = "step_state", "step_total"
    if "g" in scanned:
        state = at.op("Mul", state, column(at, "step_g"))
        total = at.op("Mul", total, "step_g") if form.sums else total
    written = "step_v"
    if form.delta:
        read = at.op("Squeeze", at.op("MatMul", at.op("Unsqueeze", "step_k", at.ints(2)), state), at.ints(2))
        written = at.op("Mul", "step_b", at.op("Sub", written, read))
    pair = at.op("Mul", column(at, "step_k"), at.op("Unsqueeze", written, at.ints(2)))
    ends = [at.op("Add", state, pair)]
    found = at.op("MatMul", "step_q", ends[0])  # [B, G, g, F] [B, G, F, E]
    if form.sums:
        ends.append(at.op("Add", total, "step_k"))
        found = divided(at, form, sizes, found, at.op("MatMul", "step_q", column(at, ends[1])))
        found = at.op("Mul", found, number(at, sizes, form.scale))

    def info(name: str) -> ValueInfoProto:
        made: ValueInfoProto = helper.make_tensor_value_info(name, element, None)
        return made

    graph = helper.make_graph(
        at.nodes, "from_token_to_token", [info(f"step_{n}") for n in (*kept, *scanned)],
        [info(n) for n in (*ends, found)],
    )  # fmt: skip
    made = body.ops(
        "Scan", [*carried, *(x for x, _ in scanned.values())], len(kept) + 1, body=graph,
        num_scan_inputs=len(scanned), scan_input_axes=[axis for _, axis in scanned.values()], scan_output_axes=[3],
    )  # fmt: skip
    out = body.op("Reshape", made[-1], body.ints(0, sizes.heads, -1, sizes.value_dim))
    out = ended(body, sizes, laid(body, out, "BHND", sizes.layouts[3]))
    return {"output": out, **{f"final_{n}": x for n, x in zip(kept, made, strict=False)}}
