"""The bodies of ``LinearAttentionSolve`` and ``-Delta`` in standard ops: the delta rule in chunks (arXiv:2406.06484,
with decays 2412.06464).

What the i-th key of a tile writes, w[i] = beta[i] (v[i] - c[i] phi(k[i]) S - sum_j a[i, j] w[j]) over the earlier j,
solves a triangular system, whose inverse does not depend on the state S before the tile; c[i] is what is left of S, and
a[i, j] the decayed product of two keys. Names of axes as in ``causal``; L here are the tokens of a tile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import ValueInfoProto, helper

from attncompile.plugins.body import Body, float_type
from attncompile.plugins.linear_attention.causal import decays_of, first, keys_of, padded, values_of
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.linear_attention.pieces import column, laid, widened


def solve(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    """The inverse by halves: of [[P, 0], [R, Q]] it is [[P', 0], [-Q' R P', Q']], from single tokens to the tile."""
    form = replace(form, chunk=form.tile)
    keys, kind = keys_of(body, form, sizes), float_type(sizes.state_type)[1]
    decays = decays_of(body, form, sizes)
    pairs = body.op("MatMul", keys, body.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    rates = _rates(body, form, sizes)
    system = body.op("Mul", body.op("Mul", pairs, decays.between) if decays.between else pairs, rates)
    place = np.arange(form.tile)
    inverse = body.constant(np.eye(form.tile, dtype=kind))
    size = 1
    while size < form.tile:
        below = (place[:, None] // size == place // size + 1) & (place[:, None] // (2 * size) == place // (2 * size))
        part = body.op("Where", body.constant(below), system, body.constant(np.zeros((), kind)))
        taken = part if size == 1 else body.op("MatMul", body.op("MatMul", inverse, part), inverse)
        inverse = body.op("Sub", inverse, taken)
        size *= 2
    return {"solved": body.op("Mul", inverse, body.op("Transpose", rates, perm=[0, 1, 2, 4, 3]))}


def _rates(body: Body, form: Form, sizes: Sizes) -> str:
    """``beta`` [B, G, C, L, 1]; tokens past the last write nothing."""
    rates = body.op("Expand", body.op("Cast", "beta", to=float_type(sizes.state_type)[0]),
                    body.ints(1, 1, sizes.kv_heads))  # fmt: skip
    rates = column(body, body.op("Transpose", rates, perm=[0, 2, 1]))
    rates = padded(body, rates, form.chunk, sizes.keys, 0.0, sizes.state_type)
    return body.op("Reshape", rates, body.ints(0, sizes.kv_heads, -1, form.chunk, 1))


def delta(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    """From tile to tile in a Scan."""
    pieces, form = form.chunk // form.tile, replace(form, chunk=form.tile)
    wide, groups = sizes.state_type, sizes.kv_heads
    over = sizes.keys is None or sizes.keys % form.chunk > 0
    by_token = form.decay == "head" and over and "final_state" in names
    decays = decays_of(body, form, sizes, by_token)
    scanned = {"k": keys_of(body, form, sizes), "v": values_of(body, form, sizes), "t": "solved"}
    fixed: dict[str, str] = {}
    if form.decay != "none":
        every = {"since": decays.since, "until": decays.until, "whole": decays.whole}
        if form.decay == "head" and not by_token:
            fixed = {n: x if n == "whole" else body.op("Squeeze", x, body.ints(1)) for n, x in every.items()}
        else:
            scanned |= every
    tail = (groups, sizes.head_dim, sizes.value_dim)
    given = "initial_state" if "initial_state" in names else ""
    carried = first(body, sizes, body.op("Shape", "key", start=0, end=1), given, tail)

    at, state = body.branch(), "tile_state"
    before = at.op("Identity", state)
    factors = fixed or {n: f"tile_{n}" for n in ("since", "until", "whole")}
    read, left = at.op("MatMul", "tile_k", state), "tile_k"
    if form.decay != "none":
        read, left = at.op("Mul", read, factors["since"]), at.op("Mul", left, factors["until"])
        state = at.op("Mul", state, factors["whole"])
    written = at.op("MatMul", "tile_t", at.op("Sub", "tile_v", read))
    after = at.op("Add", state, at.op("MatMul", at.op("Transpose", left, perm=[0, 1, 3, 2]), written))

    def info(name: str) -> ValueInfoProto:
        made: ValueInfoProto = helper.make_tensor_value_info(name, float_type(wide)[0], None)
        return made

    graph = helper.make_graph(at.nodes, "from_tile_to_tile", [info(f"tile_{n}") for n in ("state", *scanned)],
                              [info(n) for n in (after, before, written)])  # fmt: skip
    final, states, rows = body.ops(
        "Scan", [carried, *scanned.values()], 3, body=graph, num_scan_inputs=len(scanned),
        scan_input_axes=[2] * len(scanned), scan_output_axes=[2, 2],
    )  # fmt: skip
    if pieces > 1:
        states = body.op("Slice", states, body.ints(0), body.ints(2**62), body.ints(2), body.ints(pieces))
    rows = body.op("Reshape", rows, body.ints(0, groups, -1, sizes.value_dim))
    if over:
        axis = sizes.layouts[1].index("N")
        end = body.ints(sizes.keys) if sizes.keys is not None else body.op("Shape", "key", start=axis, end=axis + 1)
        rows = body.op("Slice", rows, body.ints(0), end, body.ints(2))
    rows = widened(body, laid(body, rows, "BHND", "BNHD"), wide, sizes.dtype)
    return {"written": rows, "state": states, "final_state": final}
