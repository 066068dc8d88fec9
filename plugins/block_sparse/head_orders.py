"""Heads whose blocks are of tokens in another order (``order 2,0,1 PATTERN``): their queries, keys and values are
gathered into it, all heads are one node of the op, and its output is put back. A gather moves each row of a head once,
whatever the orders, and brings the operands to BHND.

Query heads that share a key head and want it in different orders get copies of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.block_pattern import ORDERLESS, BlockGeometry, BlockPattern
from attncompile.core.mechanism import Lowering
from attncompile.core.site import AttentionSite, Layout, Operand
from attncompile.plugins.block_sparse.op import OP_TYPE


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """The heads of the op: ``heads`` [H] are the site's at their places, ``texts`` [H] their patterns, ``key_heads``
    [G] the site's key heads. ``queries`` int64 [H, N], ``keys`` [G, N]: the token at each place of a head's order.
    """

    heads: tuple[int, ...]
    texts: tuple[str, ...]
    key_heads: tuple[int, ...]
    queries: np.ndarray
    keys: np.ndarray


def arranged(texts: Sequence[str], group: int, geometry: BlockGeometry) -> Arrangement | None:
    """How heads with these patterns, ``group`` of them on a key head, become heads of one op: those of a key head that
    share an order stand together. None where no head has an order of its own.

    Raises:
        Unsupported: a pattern has no meaning for these blocks.
    """
    patterns = [BlockPattern(text) for text in texts]
    if not any(p.order for p in patterns):
        return None
    runs: list[tuple[int, tuple[int, ...], list[int]]] = []  # key head, order, heads
    for key_head in range(len(texts) // group):
        of = range(key_head * group, (key_head + 1) * group)
        bound = [patterns[h].order for h in of if patterns[h].kind not in ORDERLESS]
        anything = bound[0] if bound else ()  # what is the same in every order costs no copy of its own
        by_order: dict[tuple[int, ...], list[int]] = {}
        for h in of:
            free = patterns[h].kind in ORDERLESS
            by_order.setdefault(anything if free else patterns[h].order, []).append(h)
        runs += [(key_head, order, heads) for order, heads in by_order.items()]
    shared = gcd(*(len(heads) for _, _, heads in runs))
    places = {p.order: p.places(geometry) for p in patterns} | {(): np.arange(geometry.tokens)}
    heads = tuple(h for _, _, of_run in runs for h in of_run)
    keys = [(key_head, order) for key_head, order, of_run in runs for _ in range(len(of_run) // shared)]
    return Arrangement(
        heads, tuple(texts[h] for h in heads), tuple(key_head for key_head, _ in keys),
        np.stack([places[order] for _, order, of_run in runs for _ in of_run]),
        np.stack([places[order] for _, order in keys]),
    )  # fmt: skip


def around(site: AttentionSite, made: Arrangement, lower: Callable[[AttentionSite], Lowering]) -> Lowering:
    """``lower`` of the site whose operands stand as ``made`` says, with a gather before each and one behind it."""
    name = f"{site.output.value}/ordered"
    tables: dict[str, TensorProto] = {}
    before: list[NodeProto] = []

    def stored(values: np.ndarray) -> str:
        """Named by its contents: layers share tables."""
        said = hashlib.sha256(f"{values.dtype}{values.shape}".encode() + values.tobytes()).hexdigest()[:16]
        tables[said] = numpy_helper.from_array(values, f"{OP_TYPE}/order/{said}")
        return tables[said].name

    def gathered(value: str, dim: int, table: np.ndarray, output: str, what: str) -> list[NodeProto]:
        """[B, ., ., dim] as rows of all heads and tokens, then those of ``table``."""
        flat = f"{name}/{what}_rows"
        shape, index = stored(np.array([0, -1, dim], np.int64)), stored(table.astype(np.int32))
        return [
            helper.make_node("Reshape", [value, shape], [flat], name=flat),
            helper.make_node("Gather", [flat, index], [output], name=f"{name}/{what}", axis=1),
        ]

    inner: dict[str, Operand] = {}
    for what, operand, of, places, heads, dim in (
        ("query", site.query, made.heads, made.queries, site.heads, site.head_dim),
        ("key", site.key, made.key_heads, made.keys, site.kv_heads, site.head_dim),
        ("value", site.value, made.key_heads, made.keys, site.kv_heads, site.value_dim),
    ):
        table = _row(np.array(of)[:, None], places, heads, operand.layout)
        inner[what] = Operand(f"{name}/{what}", "BHND")
        before += gathered(operand.value, dim, table, inner[what].value, what)
    output = Operand(f"{name}/attended", "BHND")
    attended = lower(replace(
        site, query=inner["query"], key=inner["key"], value=inner["value"], output=output,
        kv_heads=len(made.key_heads),
    ))  # fmt: skip
    back = np.empty_like(made.queries)
    place = np.arange(made.queries.shape[1])
    for at, head in enumerate(made.heads):
        back[head, made.queries[at]] = at * len(place) + place
    if site.output.layout == "BNHD":
        back = back.T
    after = gathered(output.value, site.value_dim, back, site.output.value, "output")
    return Lowering((*before, *attended.nodes, *after), attended.functions, (*attended.initializers, *tables.values()))


def _row(head: np.ndarray, token: np.ndarray, heads: int, layout: Layout) -> np.ndarray:
    """Which row of an operand's ``heads`` times N a token of a head is."""
    return np.asarray(head * token.shape[1] + token if layout == "BHND" else token * heads + head)
