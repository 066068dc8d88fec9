"""A few queries with all keys that are left of a KV cache: what the branches of ``cached`` hold."""

from __future__ import annotations

from collections.abc import Callable

from attncompile.plugins.body import Body, float_type
from attncompile.plugins.neighborhood import parts, sliding
from attncompile.plugins.neighborhood import sinks as with_sink
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood

Operands = tuple[str, str, str, str]
"""query, key, value and key_mask (empty without one)."""


def attend_rows(
    body: Body, hood: Neighborhood, call: Call, lengths: sliding.Lengths, operands: Operands, *, one: bool = False
) -> str:  # fmt: skip
    """All queries with all keys that are left, under the window's mask. The query heads that share a key head are rows
    of one product, so that no key is copied. ``one``: there is one query, which sees every key that is left.
    """
    query, key, value = (
        parts.heads_first(body, x, layout) for x, layout in zip(operands[:3], call.layouts, strict=False)
    )
    visible = _visible(body, hood, call, lengths, operands[3], one)
    mask = None if visible is None else parts.additive(body, call, visible)
    if call.sinks and mask is not None:
        mask = with_sink.seen(body, mask, 4 if call.key_mask else 2)
    query = parts.scaled(body, call, query)
    if call.group > 1:
        query = body.op("Reshape", query, body.ints(0, call.kv_heads, -1, call.head_dim))  # [B, G, g * n, D]
    apart = call.group > 1 and not one
    weights = _weights(body, call, query, key, mask, lengths if apart else None)
    result = body.op("MatMul", weights, value)  # [B, G, g * n, Dv]
    if call.group > 1:
        shape = body.ints(0, call.heads, 1, call.value_dim)
        if not one:
            shape = body.op("Concat", body.ints(0, call.heads), lengths.end, body.ints(call.value_dim), axis=0)
        result = body.op("Reshape", result, shape)
    result = parts.guarded(body, call, result, mask, hood.masked_rows, lambda: mean_of(body, call, value))
    return parts.heads_first(body, result, call.layouts[3])  # the same swap the other way round


def _visible(
    body: Body, hood: Neighborhood, call: Call, lengths: sliding.Lengths, key_mask: str, one: bool
) -> str | None:  # fmt: skip
    """[n, K], or with a key mask [b, 1, n, K]; None where every key that is left is seen."""
    shown = parts.key_mask_4d(body, key_mask) if call.key_mask else None
    if one:
        return shown
    rows = body.op("Add", sliding.arange(body, lengths.queries), lengths.offset or body.scalar(0))
    rows = body.op("Unsqueeze", rows, body.ints(1))  # [n, 1]
    visible = sliding.in_window(body, hood, body.op("Sub", sliding.arange(body, lengths.keys), rows))
    return visible if shown is None else body.op("And", shown, visible)


def _weights(
    body: Body, call: Call, query: str, key: str, mask: str | None, apart: sliding.Lengths | None
) -> str:  # fmt: skip
    """softmax(query key^T + mask), [B, G, g * n, K (+ 1 with a sink)]; the mask [.., n, K] is added in [B, G, g, n, K]
    where ``apart`` says how many queries are folded into the rows.
    """
    scores = body.op("MatMul", query, body.op("Transpose", key, perm=[0, 1, 3, 2]))
    softmax = parts.softmax_type(call)
    if softmax != call.dtype:
        scores = body.op("Cast", scores, to=float_type(softmax)[0])
    together = None
    if mask is not None and apart is not None:
        keys = body.op("Shape", key, start=2, end=3)
        together = body.op("Concat", body.ints(0, 0, -1), keys, axis=0)
        sizes = body.op("Concat", body.ints(0, 0, call.group), apart.end, keys, axis=0)
        scores = body.op("Reshape", scores, sizes)
        if call.key_mask:
            mask = body.op("Unsqueeze", mask, body.ints(1))  # [b, 1, 1, n, K]
    if mask is not None:
        scores = body.op("Add", scores, mask)
    weights = body.op("Softmax", scores, axis=-1)
    if together is not None:
        weights = body.op("Reshape", weights, together)
    return body.op("Cast", weights, to=float_type(call.dtype)[0]) if softmax != call.dtype else weights


def mean_of(body: Body, call: Call, value: str) -> str:
    """The mean over all keys of ``value`` for every query head, [B, H, 1, Dv] in the output's layout; as a product with
    equal weights, like the source's, which is nearer to the truth than a running sum.
    """
    value = parts.heads_first(body, value, call.layouts[2])
    keys = body.op("Shape", value, start=2, end=3)
    weight = body.op("Reciprocal", body.op("Cast", keys, to=float_type(call.dtype)[0]))
    weights = body.op("Expand", weight, body.op("Concat", body.ints(1, 1, 1), keys, axis=0))
    mean = body.op("MatMul", weights, value)  # [B, G, 1, Dv]
    if call.group > 1:
        mean = body.op("Expand", mean, body.ints(1, 1, call.group, 1))
        mean = body.op("Reshape", mean, body.ints(0, call.heads, 1, call.value_dim))
    return parts.heads_first(body, mean, call.layouts[3])


def either(body: Body, call: Call, condition: str, yes: Callable[[Body], str], no: Callable[[Body], str]) -> str:
    branches = []
    for build in (yes, no):
        branch = body.branch()
        out = build(branch)
        branches.append(branch.graph(build.__name__, out, float_type(call.dtype)[0]))
    return body.op("If", condition, then_branch=branches[0], else_branch=branches[1])
