"""The body of ``attncompile::Attention`` in standard ops.

It saves what exporters leave in. A causal site is done in chunks of queries, each of which meets the keys in its reach
only, so that half of the scores are never computed. All that is added to the scores (bias, masks, sinks) is added at
once, in the smallest shape that they have together. Rows without a visible key are mended in the output, not by a guard
over all weights. A sink is the score of one more key, whose key and value are 0, so the scores are not copied for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import ml_dtypes
import numpy as np
from onnx import FunctionProto, TensorProto

from attncompile.plugins.attention.op import HIDING, OP_TYPE, Dense, node
from attncompile.plugins.body import Body, attribute_names, float_type
from attncompile.plugins.neighborhood import parts
from attncompile.plugins.neighborhood.call import Call


def function(form: Dense, call: Call) -> FunctionProto:
    """The body of the node that ``node`` makes. Raises ``Unsupported`` where there is none."""
    body = Body(call.opset)
    outputs = _body(body, form, call)
    names = tuple(name or f"no_{i}" for i, name in enumerate(form.given))
    template = node(form, call, names, outputs, "")
    doc = f"dense attention in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads"
    return body.function(OP_TYPE, template.overload, names, outputs, attribute_names(template), doc)


@dataclass(frozen=True, slots=True)
class _Values:
    """Values of the body: query scaled [B, H, Nq, D], key and value [B, H, Nk, D], lengths as [1], and what is there of
    the optional inputs, with four axes (sinks [1, H or 1, 1, 1], lengths [B, 1, 1, 1]). ``mean``: of all values.
    """

    query: str
    key: str
    value: str
    queries: str
    keys: str
    optional: dict[str, str]
    mean: str


def _body(body: Body, form: Dense, call: Call) -> tuple[str, ...]:
    """Names of output and, where asked for, log-sum-exp."""
    if form.chunks == 1 or call.query_length is not None or form.log_sum_exp:
        return _attend(body, form, call)
    axis = parts.sequence_axis(call.layouts[0])
    length = body.op("Squeeze", body.op("Shape", "query", start=axis, end=axis + 1))
    short = body.op("LessOrEqual", length, body.scalar(call.dense_below))
    branches = []
    for name, chunks in (("whole", 1), ("chunked", form.chunks)):
        branch = body.branch()
        (output,) = _attend(branch, replace(form, chunks=chunks), call)
        branches.append(branch.graph(name, output, float_type(call.dtype)[0]))
    return (body.op("If", short, then_branch=branches[0], else_branch=branches[1]),)


def _attend(body: Body, form: Dense, call: Call) -> tuple[str, ...]:
    values = _values(body, form, call)
    made = [_rows(body, form, call, values, start, end) for start, end in _bounds(body, form, call, values.queries)]
    joined = []
    for pieces in zip(*made, strict=True):
        joined.append(pieces[0] if len(pieces) == 1 else body.op("Concat", *pieces, axis=2))
    joined[0] = parts.heads_first(body, joined[0], call.layouts[3])
    return tuple(joined)


def _values(body: Body, form: Dense, call: Call) -> _Values:
    query, key, value = (
        parts.heads_first(body, x, layout) for x, layout in zip(("query", "key", "value"), call.layouts, strict=False)
    )
    # The bound of a softcap goes into the scale, so that the scores are multiplied once.
    query = parts.scaled(body, replace(call, scale=call.scale / (form.softcap or 1.0)), query)
    lengths = [
        body.ints(known) if known is not None
        else body.op("Shape", name, start=parts.sequence_axis(layout), end=parts.sequence_axis(layout) + 1)
        for name, layout, known in (
            ("query", call.layouts[0], call.query_length), ("key", call.layouts[1], call.key_length)
        )
    ]  # fmt: skip
    optional = {}
    for name in form.inputs:
        if name in ("key_mask", "mask"):
            optional[name] = parts.key_mask_4d(body, name)
        elif name == "key_lengths":
            wide = body.op("Cast", name, to=TensorProto.INT64)
            optional[name] = body.op("Reshape", wide, body.ints(-1, 1, 1, 1))
        else:
            element, numpy_type = float_type(parts.softmax_type(call))
            cast = body.op("Cast", name, to=element)
            if name == "sinks":
                optional[name] = body.op("Reshape", cast, body.ints(1, -1, 1, 1))
            else:
                optional[name] = body.op("Add", cast, body.constant(np.zeros((1, 1, 1, 1), numpy_type)))
    mean = body.op("ReduceMean", value, body.ints(-2)) if _mended(form, call) and form.masked_rows == "uniform" else ""
    if call.group > 1:  # a product that broadcasts heads is not fused by TensorRT-RTX; copied keys are
        key = parts.repeat_heads(body, call, key, call.head_dim)
        value = parts.repeat_heads(body, call, value, call.value_dim)
        mean = parts.repeat_heads(body, call, mean, call.value_dim) if mean else ""
    return _Values(query, key, value, lengths[0], lengths[1], optional, mean)


def _mended(form: Dense, call: Call) -> bool:
    """Whether rows without a key have to be looked for."""
    if form.masked_rows == "nan" or "sinks" in form.inputs:
        return False
    bounded = form.left >= 0 or form.right >= 0
    past = bounded and not never_past(call.query_length, call.key_length, call.self_attention)
    return past or bool(HIDING & set(form.inputs))


def never_past(queries: int | None, keys: int | None, equal: bool) -> bool:
    """Whether no query can stand before the first key."""
    return equal or (queries is not None and keys is not None and queries <= keys)


def _bounds(body: Body, form: Dense, call: Call, length: str) -> list[tuple[str, str]]:
    """First query and end of every chunk, each as [1]; empty names: all."""
    if form.chunks == 1:
        return [("", "")]
    if call.query_length is not None:
        edges = [call.query_length * t // form.chunks for t in range(form.chunks + 1)]
        return [(body.ints(a), body.ints(b)) for a, b in pairwise(edges) if a < b]
    step = body.op("Div", body.op("Add", length, body.ints(form.chunks - 1)), body.ints(form.chunks))
    edges_of = [body.op("Min", body.op("Mul", step, body.ints(t)), length) for t in range(form.chunks + 1)]
    return list(pairwise(edges_of))


def _rows(body: Body, form: Dense, call: Call, values: _Values, start: str, end: str) -> tuple[str, ...]:
    """Rows [B, H, n, Dv] (and [B, H, n] log-sum-exp) of the queries ``start`` .. ``end``."""
    query, key, value = values.query, values.key, values.value
    met = _Met("", "", body.ints(0), values.keys)
    if start:
        met = _Met(start, end, *_reach(body, form, call, values, start, end))
        query = body.op("Slice", query, start, end, body.ints(2))
        if (met.first, met.last) != (body.ints(0), values.keys):
            key, value = (body.op("Slice", x, met.first, met.last, body.ints(2)) for x in (key, value))
    if "sinks" in form.inputs:  # the sink's key and value
        key, value = (body.op("Pad", x, body.ints(0, 0, 0, 0, 0, 0, 1, 0)) for x in (key, value))
    element, numpy_type = float_type(parts.softmax_type(call))
    own_element, own_type = float_type(call.dtype)
    scores = body.op("MatMul", query, body.op("Transpose", key, perm=[0, 1, 3, 2]))
    if element != own_element:
        scores = body.op("Cast", scores, to=element)
    if form.softcap:
        scores = body.op("Mul", body.op("Tanh", scores), body.constant(np.array(form.softcap, numpy_type)))
    added = _added(body, form, call, values, met)
    if added:
        scores = body.op("Add", scores, added)
    weights = body.op("Softmax", scores, axis=-1)
    if form.guard:
        weights = body.op("Where", body.op("IsNaN", weights), body.constant(np.array(0.0, numpy_type)), weights)
    if element != own_element:
        weights = body.op("Cast", weights, to=own_element)
    rows = body.op("MatMul", weights, value)
    if _mended(form, call):
        # Only -inf is below the lowest number, which some exporters add to hide a key: those rows are no blind ones.
        limits = ml_dtypes.finfo(numpy_type)  # type: ignore[no-untyped-call]
        lowest = body.constant(np.array(limits.min, numpy_type))
        blind = body.op("Less", body.op("ReduceMax", added, body.ints(-1), keepdims=1), lowest)
        rows = body.op("Where", blind, values.mean or body.constant(np.array(0.0, own_type)), rows)
    if not form.log_sum_exp:
        return (rows,)
    total = body.op("ReduceLogSumExp", scores, body.ints(-1), keepdims=0)
    return rows, body.op("Cast", total, to=float_type("float32")[0])


@dataclass(frozen=True, slots=True)
class _Met:
    """A chunk: its queries ``start`` .. ``end`` (empty: all), which meet the keys ``first`` .. ``last``, all as [1]."""

    start: str
    end: str
    first: str
    last: str


def _reach(body: Body, form: Dense, call: Call, values: _Values, start: str, end: str) -> tuple[str, str]:
    """First key that any of these queries sees, and the end of them; at least one key."""
    first, last = body.ints(0), values.keys
    fits = never_past(call.query_length, call.key_length, call.self_attention)
    if form.left >= 0:
        first = body.op("Max", _moved(body, call, values, start, -form.left), body.ints(0))
        if not fits:
            first = body.op("Min", first, body.op("Sub", values.keys, body.ints(1)))
    if form.right >= 0:
        last = _moved(body, call, values, end, form.right)
        if form.right > 0 or not fits:
            last = body.op("Min", last, values.keys)
        if not fits:
            last = body.op("Max", last, body.op("Add", first, body.ints(1)))
    return first, last


def _moved(body: Body, call: Call, values: _Values, place: str, by: int) -> str:
    """Where a query stands among the keys, plus ``by``."""
    if not call.self_attention:
        if call.query_length is not None and call.key_length is not None:
            by += call.key_length - call.query_length
        else:
            place = body.op("Add", place, body.op("Sub", values.keys, values.queries))
    return body.op("Add", place, body.ints(by)) if by else place


def _added(body: Body, form: Dense, call: Call, values: _Values, met: _Met) -> str:
    """What is added to the scores, broadcastable to them; an empty name if nothing is."""
    _, numpy_type = float_type(parts.softmax_type(call))
    zero, hidden = (body.constant(np.array(x, numpy_type)) for x in (0.0, -np.inf))
    seen = _seen(body, form, call, values, met)
    added = _part(body, values.optional.get("bias", ""), met)
    if seen:
        added = body.op("Where", seen, added or zero, hidden)
    if "sinks" not in values.optional:
        return added
    count = body.op("Sub", met.last, met.first)
    before = body.op("Concat", body.ints(0, 0, 0), count, body.ints(0, 0, 0, 0), axis=0)
    sink = body.op("Pad", values.optional["sinks"], before)
    if not added:
        return sink
    whole = body.op("Expand", added, body.op("Concat", body.ints(1, 1, 1), count, axis=0))
    return body.op("Add", body.op("Pad", whole, body.ints(0, 0, 0, 0, 0, 0, 0, 1)), sink)


def _seen(body: Body, form: Dense, call: Call, values: _Values, met: _Met) -> str:
    """Bool with four axes: which keys are seen; an empty name: all. The smallest masks are joined first."""
    found = [_part(body, values.optional[name], met) for name in ("key_mask",) if name in values.optional]
    if "key_lengths" in values.optional:
        found.append(body.op("Less", _range(body, met.first, met.last, 3), values.optional["key_lengths"]))
    if form.left >= 0 or form.right >= 0:
        columns = _range(body, met.first, met.last, 3)
        places = _range(body, met.start or body.ints(0), met.end or values.queries, 2)
        if form.right >= 0:
            found.append(body.op("LessOrEqual", columns, _moved(body, call, values, places, form.right)))
        if form.left >= 0:
            found.append(body.op("GreaterOrEqual", columns, _moved(body, call, values, places, -form.left)))
    if "mask" in values.optional:
        found.append(_part(body, values.optional["mask"], met))
    seen = ""
    for one in found:
        seen = body.op("And", seen, one) if seen else one
    return seen


def _range(body: Body, first: str, last: str, axis: int) -> str:
    """The numbers ``first`` .. ``last`` along one of four axes."""
    numbers = body.op("Range", body.op("Squeeze", first), body.op("Squeeze", last), body.scalar(1))
    return body.op("Unsqueeze", numbers, body.ints(*(a for a in range(4) if a != axis)))


def _part(body: Body, value: str, met: _Met) -> str:
    """A chunk's part of something broadcastable to [B, H, Nq, Nk]: an axis of size 1 stays whole."""
    if not value or not met.start:
        return value
    sizes = [body.op("Shape", value, start=a, end=a + 1) for a in (2, 3)]
    ends = [body.op("Min", x, size) for x, size in zip((met.end, met.last), sizes, strict=True)]
    starts = [
        body.op("Min", x, body.op("Sub", size, body.ints(1)))
        for x, size in zip((met.start, met.first), sizes, strict=True)
    ]
    ends, starts = ([body.op("Concat", *x, axis=0)] for x in (ends, starts))
    return body.op("Slice", value, *starts, *ends, body.ints(2, 3))
