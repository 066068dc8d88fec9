"""The bodies of ``LinearAttentionState``, ``-Combine`` and ``-Apply`` in standard ops: two products, linear in N."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, helper

from attncompile.core.site import Layout
from attncompile.plugins.body import DOMAIN, Body, attribute_names, float_type, overload_of
from attncompile.plugins.linear_attention import causal, delta, op
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.linear_attention.op import (
    APPLY,
    COMBINE,
    DELTA,
    INPUTS,
    OUTPUT,
    OUTPUTS,
    SOLVE,
    STATE,
    STATES,
    STEP,
)
from attncompile.plugins.linear_attention.pieces import column, divided, ended, laid, mapped, number, widened

Given = Mapping[str, str]
"""Formal name -> value, of the inputs or outputs that a node has."""


def node(op_type: str, form: Form, sizes: Sizes, inputs: Given, outputs: Given, name: str) -> NodeProto:
    """The op; its attributes say all that a kernel needs."""
    made = helper.make_node(
        op_type, _ordered(INPUTS[op_type], inputs), _ordered(OUTPUTS[op_type], outputs), name=name, domain=DOMAIN,
        **attributes(op_type, form, sizes),
    )  # fmt: skip
    made.overload = overload_of({
        "op": op_type, "inputs": sorted(inputs), "outputs": sorted(outputs), "decay": form.decay,
        **attributes(op_type, form, sizes), **sizes.configuration(),
    })  # fmt: skip
    return made


def _ordered(names: tuple[str, ...], given: Given) -> list[str]:
    found = [given.get(n, "") for n in names]
    while found and not found[-1]:
        found.pop()
    return found


def attributes(op_type: str, form: Form, sizes: Sizes) -> dict[str, Any]:
    said: dict[str, Any] = {}
    layouts = dict(zip(("query", "key", "value", "output"), sizes.layouts, strict=True))
    formal = (*INPUTS[op_type], *OUTPUTS[op_type])
    if "key" in formal:
        said["key_map"] = form.key_map
    if "query" in formal:
        said |= {"query_map": form.query_map, "normaliser": form.normaliser, "epsilon": form.epsilon,
                 "floor": form.floor, "scale": form.scale}  # fmt: skip
    if op_type in op.CHUNKED:
        said["chunk"] = form.chunk
    if op_type in op.TILED:
        said["tile"] = form.tile
    return said | {f"{n[0]}_layout": layout for n, layout in layouts.items() if n in formal}


def function(op_type: str, form: Form, sizes: Sizes, inputs: Given, outputs: Given) -> FunctionProto:
    """The body of the node that ``node`` makes for the same arguments. Raises ``Unsupported`` where there is none."""
    body = Body(sizes.opset)
    made = _BODIES[op_type](body, form, sizes, frozenset(inputs) | frozenset(outputs))
    template = node(op_type, form, sizes, {n: n for n in inputs}, {n: n for n in outputs}, "")
    names = [n or f"no_{i}" for i, n in enumerate(template.input)]
    results = [made[n] for n in OUTPUTS[op_type][: len(template.output)]]
    doc = f"{op_type} in standard ops, for {sizes.dtype} and {sizes.heads}/{sizes.kv_heads} heads"
    return body.function(op_type, template.overload, names, results, attribute_names(template), doc)


def _state(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    layouts, wide = sizes.layouts, sizes.state_type
    key, value = (widened(body, x, sizes.dtype, wide) for x in ("key", "value"))
    whole = form.chunk == 0 or (sizes.keys is not None and sizes.keys <= form.chunk)
    # Channels first where the keys lie so, or their transposition would be a copy; the product wants them so.
    rows = form.key_map == "hedgehog" or layouts[1] == "BHND" or (layouts[1] == "BNHD" and not whole)
    key = laid(body, key, layouts[1], "BHND" if rows else "BHDN")
    value = laid(body, value, layouts[2], "BHND")
    tokens, channels = (-2, -1) if rows else (-1, -2)
    if form.tops and not whole:
        key = _chunked(body, form, sizes, key, sizes.head_dim, -np.inf, rows)
    made: dict[str, str] = {}
    if "top" in names:
        made["top"] = body.op("ReduceMax", key, body.ints(tokens), keepdims=1)
        features = body.op("Exp", body.op("Sub", key, made["top"]))
        made["top"] = body.op("Squeeze", made["top"], body.ints(tokens))
    else:
        weight = ""
        if "feature_weight" in names:
            weight = body.op("Cast", "feature_weight", to=float_type(wide)[0])
        features = mapped(body, sizes, key, form.key_map, channels, weight)
        if not whole:
            width = -1 if form.key_map == "hedgehog" else sizes.head_dim
            features = _chunked(body, form, sizes, features, width, 0.0, rows)
    values = value if whole else _chunked(body, form, sizes, value, sizes.value_dim, 0.0)
    if "total" in names:
        made["total"] = body.op("ReduceSum", features, body.ints(tokens), keepdims=0)
    if "mean" in names:
        length = sizes.layouts[1].index("N")
        count = body.op("Cast", body.op("Shape", "key", start=length, end=length + 1), to=float_type(wide)[0])
        made["mean"] = body.op("Div", body.op("ReduceSum", values, body.ints(-2), keepdims=0), count)
    if "key_weight" in names:
        weight = body.op("Cast", body.op("Transpose", "key_weight", perm=[0, 2, 1]), to=float_type(wide)[0])
        weight = column(body, weight)
        weight = weight if whole else _chunked(body, form, sizes, weight, 1, 0.0)
        values = body.op("Mul", values, weight)
    rank = 4 if whole else 5
    first = body.op("Transpose", features, perm=[*range(rank - 2), rank - 1, rank - 2]) if rows else features
    made["state"] = body.op("MatMul", first, values)
    if whole:
        made = {name: body.op("Unsqueeze", x, body.ints(2)) for name, x in made.items()}
    return made


def _chunked(
    body: Body, form: Form, sizes: Sizes, value: str, width: int, fill: float, rows: bool = True
) -> str:  # fmt: skip
    """[B, G, N, width] -> [B, G, C, chunk, width], without ``rows`` [B, G, width, N] -> [B, G, C, width, chunk]; tokens
    beyond the last are ``fill``.
    """
    value = causal.padded(body, value, form.chunk, sizes.keys, fill, sizes.state_type, 2 if rows else 3)
    if not rows:
        cut = body.op("Reshape", value, body.ints(0, sizes.kv_heads, width, -1, form.chunk))
        return body.op("Transpose", cut, perm=[0, 1, 3, 2, 4])
    shape = body.ints(0, sizes.kv_heads, -1, form.chunk, width)
    if width < 0:  # as many features as Hedgehog's weights give
        shape = body.op(
            "Concat", body.ints(0, sizes.kv_heads, -1, form.chunk), body.op("Shape", value, start=3), axis=0
        )
    return body.op("Reshape", value, shape)


def _combine(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    axis = body.ints(2)
    state, total = "state", "total"
    if "top" in names:
        lifted = body.op("Sub", "top", body.op("ReduceMax", "top", axis, keepdims=1))
        share = body.op("Exp", lifted)
        share = body.op("Div", share, body.op("ReduceSum", body.op("Mul", "total", share), axis, keepdims=1))
        state = body.op("Mul", "state", column(body, share))
        total = body.op("Mul", "total", share)
    made = {"whole_state": body.op("ReduceSum", state, axis, keepdims=1)}
    if "total" in names:
        made["whole_total"] = body.op("ReduceSum", total, axis, keepdims=1)
    if "mean" in names:
        made["whole_mean"] = body.op("ReduceSum", "mean", axis, keepdims=1)
    return made


def _apply(body: Body, form: Form, sizes: Sizes, names: frozenset[str]) -> dict[str, str]:
    wide = sizes.state_type
    layouts = sizes.layouts
    # [.., E, F] times [.., F, N] where the result lies so.
    across = layouts[3] == "BHDN" and form.query_map != "hedgehog" and sizes.group == 1
    query = widened(body, "query", sizes.dtype, wide)
    wanted: Layout = "BHDN" if across else "BHND"
    map_first = form.query_map in ("softmax", "hedgehog") or layouts[0] == "BNHD"
    if map_first:
        query = laid(body, query, layouts[0], wanted)
    weight = body.op("Cast", "feature_weight", to=float_type(wide)[0]) if "feature_weight" in names else ""
    at = wanted if map_first else layouts[0]
    query = mapped(body, sizes, query, form.query_map, at.index("D") - 4, weight)
    query = query if map_first else laid(body, query, layouts[0], wanted)
    if sizes.group > 1:
        query = body.op("Reshape", query, body.ints(0, sizes.kv_heads, -1, 0))
    axis = body.ints(2)
    state = body.op("ReduceSum", "state", axis, keepdims=0)
    if form.scale != 1.0:
        state = body.op("Mul", state, number(body, sizes, form.scale))
    total = body.op("ReduceSum", "total", axis, keepdims=0) if "total" in names else ""
    mean = body.op("ReduceSum", "mean", axis, keepdims=0) if "mean" in names else ""
    if form.normaliser == "inline":
        outer = body.op("Mul", column(body, total), body.op("Unsqueeze", mean, body.ints(-2)))
        state = body.op("Sub", state, outer)
    flat = [body.ints(-2) if across else body.ints(-1), body.ints(-1) if across else body.ints(-2)]

    def product(matrix: str) -> str:
        if across:
            return body.op("MatMul", body.op("Transpose", matrix, perm=[0, 1, 3, 2]), query)
        return body.op("MatMul", query, matrix)

    found = product(state)
    if form.normaliser == "inline":
        found = body.op("Add", found, body.op("Unsqueeze", mean, flat[1]))
    elif form.normaliser in ("sum", "mala"):
        if across:
            sums = body.op("MatMul", body.op("Unsqueeze", total, body.ints(-2)), query)
        else:
            sums = body.op("MatMul", query, column(body, total))
        if form.normaliser == "sum":
            found = divided(body, form, sizes, found, sums)
        else:
            factor = body.op("Add", body.op("Reciprocal", sums), number(body, sizes, 1.0))
            off = body.op("Mul", sums, body.op("Unsqueeze", mean, flat[1]))
            found = body.op("Sub", body.op("Mul", found, factor), off)
    if sizes.group > 1:
        found = body.op("Reshape", found, body.ints(0, sizes.heads, -1, sizes.value_dim))
    found = laid(body, found, wanted, layouts[3])
    return {"output": ended(body, sizes, found)}


_BODIES: Mapping[str, Callable[[Body, Form, Sizes, frozenset[str]], dict[str, str]]] = {
    STATE: _state, COMBINE: _combine, APPLY: _apply, STATES: causal.states, OUTPUT: causal.output, STEP: causal.step,
    SOLVE: delta.solve, DELTA: delta.delta,
}  # fmt: skip

register = op.register
