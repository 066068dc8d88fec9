"""Sites whose heads get blocks of their own choice: an approximation, by the parameters ``edge`` and ``heads``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from onnx import NodeProto

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite
from attncompile.plugins.block_sparse import head_body
from attncompile.plugins.block_sparse.head_lists import HeadPlan, lists_of, plan_of
from attncompile.plugins.block_sparse.head_orders import Arrangement, arranged
from attncompile.plugins.block_sparse.head_orders import around as around_orders
from attncompile.plugins.block_sparse.op import BLOCKS, OP_TYPE, Form, node, register
from attncompile.plugins.block_sparse.plan import LAUNCH
from attncompile.plugins.block_sparse.rest import Rest, in_front, size_of
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.facts import check_bias, check_padding, check_plain
from attncompile.plugins.neighborhood.tiles import COPY
from attncompile.plugins.parameters import check_names
from attncompile.plugins.token_padding import around

LONG = 4096
"""Tokens from which blocks of 128 are taken: fewer of them, and one thread block of the GPU does one."""

OVERHEAD = 1.0
"""Time of a score element in blocks of a row, relative to one of dense attention: smaller products and masks, and
scores that stay in the cache. Fitted, and rounded up, to gains of windows as `tools/bench_chosen.py` prints them, with
ONNX Runtime 1.32 on idle cores at 1,024 and 4,096 tokens; it is more where others use the memory too."""

MOVE: Mapping[str, float] = {"BHND": 11.0, "BNHD": 5.0}
"""Cost of bringing one row of a head to its order or back, in score elements, by the operand's layout: what the body
would have turned anyway costs less. Of a pair of rows ``tools/bench_chosen.py`` gave 12 to 31, and 5 to 13, on 2 busy
cores.
"""

JOIN = 45.0
"""Cost of averaging, joining and cutting apart one key and value, in score elements: measured as ``OVERHEAD``."""

LARGEST = 1 << 24
"""Blocks of all heads beyond which a site is refused: its lists would not be small any more."""


def geometry_of(site: AttentionSite, edge: int = 0) -> BlockGeometry:
    """The blocks of a site whose heads may be pruned. ``edge`` 0: the usual one for its length.

    Raises:
        Unsupported: it is not softmax self-attention of a fixed length with no mask but causal and padding.
    """
    check_plain(site)
    if site.needs - {"body", "token-padding"}:
        raise Unsupported("needs", f"a choice for each head does not go with {', '.join(sorted(site.needs))}")
    tokens = site.query_length
    if not isinstance(tokens, int) or not isinstance(site.key_length, int):
        raise Unsupported(
            "lengths", "lists of blocks hold for one length only", "export with a fixed length: windows alone slide"
        )
    if tokens != site.key_length:
        raise Unsupported("lengths", f"{tokens} queries over {site.key_length} keys are not self-attention")
    foreign = [p.kind for p in site.mask.parts if p.kind not in ("causal", "padding")]
    if foreign or site.mask.ends is not None:
        raise Unsupported("mask", f"a mask of kind {', '.join(foreign) or 'key ends'} stays as it is")
    check_padding(site.mask)
    check_bias(site)
    edge = edge or (BLOCKS[1] if tokens >= LONG else BLOCKS[0])
    if edge not in BLOCKS:
        raise Unsupported("parameters", f"blocks of {edge}", f"edge is {' or '.join(map(str, BLOCKS))}")
    grid = site.grid if site.grid is not None and site.grid.tokens == tokens else None
    made = BlockGeometry(tokens, edge, site.mask.part("causal") is not None, grid)
    if made.count < 2:
        raise Unsupported("size", f"{tokens} tokens are one block")
    if site.heads * made.count**2 > LARGEST:
        raise Unsupported("size", f"{site.heads} heads of {made.count}x{made.count} blocks are too many to be listed")
    return made


def parameters(geometry: BlockGeometry, patterns: Sequence[BlockPattern]) -> Parameters:
    """What plan.toml holds. A query without a key gets the mean of all values where a head is ``mean``, and zero where
    one is ``skip``.
    """
    texts = [p.text for p in patterns]
    return {"masked_rows": _rule(texts), "edge": geometry.edge, "heads": texts}


NAMES = ("masked_rows", "edge", "heads")
"""Parameters of a site whose heads have patterns."""


def seen_of(site: AttentionSite, given: Parameters) -> tuple[BlockGeometry, np.ndarray]:
    """The site's geometry and bool [H, R, R], of each head in its order of the tokens. Raises ``Unsupported`` as
    ``geometry_of``, or for wrong parameters.
    """
    check_names(OP_TYPE, given, NAMES)
    edge, texts = given.get("edge", 0), given.get("heads", ())
    if not isinstance(edge, int) or not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise Unsupported("parameters", "edge is a number and heads a list of patterns")
    geometry = geometry_of(site, edge)
    if len(texts) != site.heads:
        raise Unsupported("parameters", f"{len(texts)} patterns for {site.heads} heads")
    if "mean" in texts and site.mask.part("padding") is not None:
        raise Unsupported("pattern", "a head that averages all values beside padding", "use another pattern than mean")
    if {"mean", "skip"} <= set(texts):
        raise Unsupported("pattern", "heads of one site that average all values, and heads that are skipped",
                          "use one of mean and skip")  # fmt: skip
    seen = _seen(tuple(texts), geometry)
    if site.mask.part("padding") is not None and any(BlockPattern(text).order for text in texts):
        raise Unsupported("pattern", "a head in another order beside padding, which is said for tokens as they stand",
                          "leave the order out")  # fmt: skip
    size_of(texts, geometry, site.mask.part("padding") is not None)
    rule, said = _rule(texts), given.get("masked_rows")
    if said not in (None, rule):
        raise Unsupported("parameters", f"masked_rows {said!r}, where it is {rule} by these heads", "delete that line")
    return geometry, seen


def _rule(texts: Sequence[str]) -> str:
    return "uniform" if "mean" in texts else "zero"


@lru_cache(maxsize=8)
def _arranged(texts: tuple[str, ...], group: int, geometry: BlockGeometry) -> Arrangement | None:
    return arranged(texts, group, geometry)


@lru_cache(maxsize=64)
def _seen(texts: tuple[str, ...], geometry: BlockGeometry) -> np.ndarray:
    known = {text: BlockPattern(text).blocks(geometry) for text in dict.fromkeys(texts)}
    return np.stack([known[text] for text in texts])


@lru_cache(maxsize=64)
def _averaged(texts: tuple[str, ...], geometry: BlockGeometry) -> np.ndarray | None:
    """Bool [H, R, R]; None where no head has means."""
    patterns = {text: BlockPattern(text) for text in texts}
    if not any(p.rest for p in patterns.values()):
        return None
    known = {text: p.averaged(geometry) for text, p in patterns.items()}
    return np.stack([known[text] for text in texts])


@lru_cache(maxsize=64)
def _plan(texts: tuple[str, ...], geometry: BlockGeometry) -> HeadPlan:
    size = size_of(texts, geometry, False)
    rest = Rest.of(size, geometry) if size else None
    return plan_of(_seen(texts, geometry), geometry, _averaged(texts, geometry), rest)


def cost(site: AttentionSite, given: Parameters, shape: Shape) -> Cost:
    """Touched keys with padding; copying keys, bringing heads to their orders and back, and starting groups are counted
    as flops.
    """
    geometry, _ = seen_of(site, given)
    texts = tuple(given["heads"])
    made = _plan(texts, geometry)
    moved = _arranged(texts, site.heads // site.kv_heads, geometry)
    of_element = 2.0 * (site.head_dim + site.value_dim)
    whole = len(made.whole) * geometry.count**2
    elements = float(shape.batch * (OVERHEAD * (made.blocks - whole) + whole) * geometry.edge**2)
    extra = OVERHEAD * COPY * shape.batch * made.copied + LAUNCH * len(made.groups)
    if moved is not None:
        sides = ((site.query, moved.queries), (site.key, moved.keys), (site.value, moved.keys),
                 (site.output, moved.queries))  # fmt: skip
        extra += shape.batch * sum(MOVE[operand.layout] * places.size for operand, places in sides) + LAUNCH
    if made.rest is not None:
        extra += JOIN * shape.batch * site.kv_heads * (made.rest.keys + geometry.tokens)
    keys = made.blocks * geometry.edge / (site.heads * geometry.count)
    return Cost(of_element * (elements + extra), keys, elements)


def lower(site: AttentionSite, given: Parameters, opset: int) -> Lowering:
    """The op with the lists of all heads, and the body for them; gathers around it where heads have orders of their
    own. Raises ``Unsupported`` as ``seen_of``.
    """
    register()
    geometry, _ = seen_of(site, given)
    texts = tuple(given["heads"])
    rule = _rule(texts)
    moved = _arranged(texts, site.heads // site.kv_heads, geometry)
    if moved is not None:
        return around_orders(site, moved, lambda inner: _attended(inner, geometry, moved.texts, rule, opset))
    return around(site, lambda inner: _attended(inner, geometry, texts, rule, opset))


def _attended(
    site: AttentionSite, geometry: BlockGeometry, texts: tuple[str, ...], rule: str, opset: int
) -> Lowering:  # fmt: skip
    """The op for operands that stand in the orders of its heads."""
    call = Call.of(site, opset, 0, 0)
    made = _plan(texts, geometry)
    said = lists_of(_seen(texts, geometry), geometry, _averaged(texts, geometry), made.rest)
    before: list[NodeProto] = []
    if made.rest is not None:
        before, site = in_front(site, made.rest, opset)
    more = ["counts"] if made.rest is not None else []
    form = Form(geometry.edge, rule, (*(["key_mask"] if call.key_mask else []), "order", *more))
    stored = said.initializers()
    values = {"query": site.query.value, "key": site.key.value, "value": site.value.value}
    values |= {"key_mask": check_padding(site.mask), **{x.name.rpartition("/")[2]: x.name for x in stored}}
    name = f"{OP_TYPE}/{site.id or site.output.value}"
    lists_said = f"heads {said.digest}" + (f" rest {made.rest.size}" if made.rest is not None else "")
    replaced = node(form, call, form.place(values), [site.output.value], name, lists_said)
    return Lowering((*before, replaced), (head_body.function(made, replaced, form, call),), tuple(stored))
