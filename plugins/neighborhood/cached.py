"""Body for more keys than queries: the last queries of a sequence whose first keys come from a KV cache.

No query of a window sees more than ``left`` keys before the first of them, so keys, values and the key mask are cut to
the last Nq + left: a step of a decoder reads its window, however long the past. One graph serves the prefill (nothing
to cut, blocks of queries) and decoding (a few queries with all keys that are left). A cut is a copy in most runtimes:
where it would leave most of the keys, those that no query sees are hidden instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.plugins.body import Body
from attncompile.plugins.neighborhood import parts, sliding
from attncompile.plugins.neighborhood import sinks as with_sink
from attncompile.plugins.neighborhood.cached_rows import Operands, attend_rows, either, mean_of
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import Neighborhood

_END = np.iinfo(np.int64).max

_COPIED = (5, 2)
"""Below 5/2 of the keys that a cut leaves, copying those may cost more than hiding the others does (ONNX Runtime, one
query, 8 heads of 64: the two were even at 1.6 to 2.25 in different runs).
"""


def cuts(hood: Neighborhood, call: Call) -> bool:
    """Whether this body does it: there may be keys that none of the queries sees, at the start of the sequence."""
    if call.self_attention or call.bias or hood.prefix or hood.suffix or not hood.sliding:
        return False
    if call.query_length is None or call.key_length is None:
        return True
    return call.key_length > call.query_length + hood.left[0]


def met(hood: Neighborhood, call: Call, queries: int, keys: int) -> tuple[int, bool]:
    """(keys that are left, whether all queries meet all of them without blocks whatever their number) at one shape."""
    if not cuts(hood, call):
        return keys, False
    left = min(keys, queries + hood.left[0])
    return (left if _is_far(left, keys) else keys), _few(call)


def _is_far(left: int, keys: int) -> bool:
    return _COPIED[1] * keys > _COPIED[0] * left


def _few(call: Call) -> bool:
    """Whether all queries are one small block whatever happens, so that no branch is needed to tell."""
    return call.query_length is not None and call.query_length <= call.block


@dataclass(frozen=True, slots=True)
class _Given:
    """The op's inputs and lengths. ``all`` and ``recent``: the lengths with all keys, and with those after the cut;
    ``start`` is where the cut is, counted from the end, [1].
    """

    hood: Neighborhood
    call: Call
    operands: Operands
    sinks: str
    all: sliding.Lengths
    recent: sliding.Lengths
    start: str

    def taken(self, at: Body, cut: bool) -> tuple[Call, sliding.Lengths, Operands]:
        """What a branch works on: the call, the lengths and the operands, cut or not, with the sink if there is one."""
        call, lengths = self.call, self.recent if cut else self.all
        query, key, value, key_mask = self.operands
        if cut:
            key, value = (
                _cut(at, x, self.start, parts.sequence_axis(layout))
                for x, layout in ((key, call.layouts[1]), (value, call.layouts[2]))
            )
            key_mask = _cut(at, key_mask, self.start, -1) if call.key_mask else ""
        if call.sinks:
            call, (query, key, value) = with_sink.joined(at, call, query, key, value, self.sinks)
        return call, lengths, (query, key, value, key_mask)


def cached_body(
    body: Body, hood: Neighborhood, call: Call, query: str, key: str, value: str, key_mask: str, sinks: str
) -> str:
    """Append the whole computation; returns the output's name. ``key_mask`` and ``sinks`` are empty without one."""
    # The mean of all values, the forgotten ones among them, is put in below: what is inside knows the last alone.
    uniform = call.key_mask and hood.masked_rows == "uniform" and not call.sinks
    inner = replace(hood, masked_rows="nan") if uniform else hood
    lengths = sliding.lengths_of(body, call, query, key)
    given = _Given(inner, call, (query, key, value, key_mask), sinks, lengths, lengths, "")

    def first_step(at: Body) -> str:
        return attend_rows(at, inner, *given.taken(at, False), one=True)

    def later(at: Body) -> str:
        return _attend(at, _bounded(at, given))

    if call.dense_below and call.query_length in (None, 1):  # what has the least to do meets the fewest nodes
        alone = body.op("LessOrEqual", lengths.keys, body.scalar(hood.left[0] + 1))
        if call.query_length is None:
            alone = body.op("And", alone, body.op("Equal", lengths.queries, body.scalar(1)))
        result = either(body, call, alone, first_step, later)
    else:
        result = later(body)
    return _with_means(body, given, result) if uniform else result


def _bounded(body: Body, given: _Given) -> _Given:
    """With where the cut is."""
    lengths, left = given.all, given.hood.left[0]
    keys = body.op("Min", lengths.keys, body.op("Add", lengths.queries, body.scalar(left)))
    recent = sliding.Lengths(lengths.queries, keys, body.op("Sub", keys, lengths.queries), lengths.end)
    return replace(given, recent=recent, start=_start(body, given.hood, given.call, lengths.end))


def _attend(body: Body, given: _Given) -> str:
    """The branches. Without any every length is cut; blocks read no more than their windows either way, and are cut
    where keys are copied as a whole before that.
    """
    hood, call = given.hood, given.call
    left = given.recent.keys

    def one_far(at: Body) -> str:
        return attend_rows(at, hood, *given.taken(at, True), one=True)

    def near(at: Body) -> str:
        return attend_rows(at, hood, *given.taken(at, False))

    def far(at: Body) -> str:
        return attend_rows(at, hood, *given.taken(at, True))

    def blocks(at: Body) -> str:
        copied = call.sinks or call.layouts[1] != "BHND" or call.layouts[2] != "BHND"
        inside, lengths, (query, key, value, mask) = given.taken(at, bool(copied) or not call.dense_below)
        mask = _mask_of(at, lengths, mask) if call.key_mask else ""
        return sliding.blocked(at, hood, inside, lengths, (query, key, value, mask))

    def is_far(at: Body) -> str:
        most = at.op("Mul", left, at.scalar(_COPIED[0]))
        return at.op("Greater", at.op("Mul", given.all.keys, at.scalar(_COPIED[1])), most)

    def rows(at: Body) -> str:
        return either(at, call, is_far(at), far, near)

    def one(at: Body) -> str:
        return either(at, call, is_far(at), one_far, near)

    def many(at: Body) -> str:
        work = at.op("Mul", given.all.queries, left)
        return either(at, call, at.op("LessOrEqual", work, at.scalar(call.dense_below**2)), rows, blocks)

    if call.query_length is not None and call.key_length is not None and _few(call):
        distant = _is_far(call.query_length + hood.left[0], call.key_length)
        return far(body) if distant else near(body)
    if not call.dense_below:
        return (one_far if call.query_length == 1 else far if _few(call) else blocks)(body)
    if call.query_length is not None:
        return (one if call.query_length == 1 else rows if _few(call) else many)(body)
    return either(body, call, body.op("Equal", given.all.queries, body.scalar(1)), one, many)


def _start(body: Body, hood: Neighborhood, call: Call, count: str) -> str:
    """Nq + left keys before the end, as [1] below 0: Slice clamps it where there are fewer keys."""
    if call.query_length is not None:
        return body.ints(-call.query_length - hood.left[0])
    return body.op("Sub", body.ints(-hood.left[0]), count)


def _cut(body: Body, value: str, start: str, axis: int) -> str:
    return body.op("Slice", value, start, body.ints(_END), body.ints(axis))


def _mask_of(body: Body, lengths: sliding.Lengths, mask: str) -> str:
    """The mask as [b, 1, 1, K], whatever its rank, and whether or not it spreads over the keys."""
    keys = body.op("Unsqueeze", lengths.keys, body.ints(0))
    return body.op("Expand", mask, body.op("Concat", body.ints(1, 1, 1), keys, axis=0))


def _with_means(body: Body, given: _Given, result: str) -> str:
    """``result`` with the mean of all values in the rows of queries that see no key. That reads the whole cache, so it
    stands in a branch wherever the body may have one, taken where a query's own key is hidden: a decoder's new token
    hardly ever is.
    """
    hood, call, count = given.hood, given.call, given.all.end
    _, _, value, key_mask = given.operands

    def some(at: Body) -> str:
        cut = _bounded(at, given)
        shown = _mask_of(at, cut.recent, _cut(at, key_mask, cut.start, -1))
        hidden = _hidden_rows(at, hood, shown, count)  # [b, 1, 1, n]
        rows = at.op("Transpose", hidden, perm=[0, 1, 3, 2] if call.layouts[3] == "BHND" else [0, 3, 1, 2])
        return at.op("Where", rows, mean_of(at, call, value), result)

    def none(at: Body) -> str:
        return at.op("Identity", result)

    if not call.dense_below:
        return some(body)
    own = _cut(body, key_mask, body.op("Neg", count), -1)
    own = body.op("ReduceMin", body.op("Cast", own, to=TensorProto.INT32), keepdims=0)
    return either(body, call, body.op("Cast", own, to=TensorProto.BOOL), none, some)


def _hidden_rows(body: Body, hood: Neighborhood, key_mask: str, count: str) -> str:
    """Which queries see no key, [b, 1, 1, n]: ``key_mask`` [b, 1, 1, K] shows as many keys up to the window's last as
    before its first. No table of queries and keys is made.
    """
    keys = body.op("Shape", key_mask, start=3, end=4)
    shown = body.op("CumSum", body.op("Cast", key_mask, to=TensorProto.INT64), body.scalar(3))
    shown = body.op("Pad", shown, body.ints(0, 0, 0, 1, 0, 0, 0, 0))  # [b, 1, 1, K + 1]
    position = sliding.arange(body, body.op("Squeeze", count))
    position = body.op("Add", position, body.op("Sub", keys, count))  # [n]
    first = body.op("Max", body.op("Sub", position, body.scalar(hood.left[0])), body.scalar(0))
    last = body.op("Min", body.op("Add", position, body.scalar(hood.right[0] + 1)), keys)
    return body.op("Equal", body.op("Gather", shown, first, axis=3), body.op("Gather", shown, last, axis=3))


def kept(site: AttentionSite, found: Verdict) -> Verdict:
    """Why a site keeps all of its keys: ``found``, or where the cache says more than the mask does, that."""
    if site.cache is None or site.cache.form != "scatter" or site.mask.part("opaque") is None:
        return found
    return Verdict.no(
        "cache",
        "new keys are written into a cache of fixed length at positions that come from an input: where the window lies "
        "in it is not known from the sizes",
        "export with a cache that grows (past joined with the new keys)",
    )
