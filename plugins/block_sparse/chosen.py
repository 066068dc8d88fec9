"""Sites whose heads choose their blocks when the model runs (``core/block_selection.py``): scores, selection, and
attention to what was selected, by the parameters ``edge`` and ``heads``. Any length, static or dynamic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, numpy_helper

from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.block_selection import SINKS, WINDOW, Chooser, Cut, Family, is_selection
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite
from attncompile.plugins.block_select import function as select
from attncompile.plugins.block_select.op import LISTS, SCORES, SELECT, masks
from attncompile.plugins.block_select.op import register as register_selection
from attncompile.plugins.block_sparse import chosen_body
from attncompile.plugins.block_sparse.head_lists import LARGEST_MASKS
from attncompile.plugins.block_sparse.op import BLOCKS, OP_TYPE, Form, node, register
from attncompile.plugins.block_sparse.per_head import JOIN, LONG, NAMES
from attncompile.plugins.block_sparse.rest import Rest, in_front, listed
from attncompile.plugins.body import Body, in_graph
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.facts import check_bias, check_plain
from attncompile.plugins.neighborhood.tiles import COPY
from attncompile.plugins.parameters import check_names

OVERHEAD = 1.1
"""Time of a score element in listed blocks, relative to one of dense attention, by the body: see ``START``."""

LISTED = 1e5
"""Of what lists the means beside chosen blocks, some fifty small nodes: an estimate, as ``START`` is."""

PADDING = 1.1
"""What rows are filled up by in the body's pieces: its length over the mean, of lengths that rise evenly."""


def chooses(texts: Sequence[object]) -> bool:
    """Whether some head chooses its blocks when the model runs."""
    return any(isinstance(t, str) and is_selection(t) for t in texts)


def causal(site: AttentionSite) -> bool:
    return site.mask.part("causal") is not None


def edge_of(site: AttentionSite) -> int:
    """The usual edge for the site's length; of one that is not known the larger."""
    tokens = site.query_length
    return BLOCKS[0] if isinstance(tokens, int) and tokens < LONG else BLOCKS[1]


def check(site: AttentionSite, given: Parameters) -> tuple[int, Chooser]:
    """The edge of blocks, and how heads choose.

    Raises:
        Unsupported: it is not softmax self-attention without a mask beyond causal, or the parameters are wrong.
    """
    check_site(site)
    check_names(OP_TYPE, given, NAMES)
    edge, texts = given.get("edge", 0) or edge_of(site), given.get("heads", ())
    named = isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts)
    if not isinstance(edge, int) or edge not in BLOCKS or not named:
        raise Unsupported("parameters", f"edge is {' or '.join(map(str, BLOCKS))} and heads a list of patterns")
    if len(texts) != site.heads:
        raise Unsupported("parameters", f"{len(texts)} patterns for {site.heads} heads")
    if given.get("masked_rows", "zero") != "zero":
        said = f"masked_rows {given['masked_rows']!r}, though every query sees its own block"
        raise Unsupported("parameters", said, "delete that line")
    chooser = Chooser.of([str(t) for t in texts])
    if chooser.rest:
        if _length(site) < edge:
            raise Unsupported("size", f"{_length(site)} tokens are no whole block, which alone has means",
                              "leave the rest out")  # fmt: skip
        _check_size(site, edge, chooser.rest)
    return edge, chooser


def _check_size(site: AttentionSite, edge: int, rest: int) -> None:
    """Raises ``Unsupported`` where the masks of the means, which are made when the model runs, would be large."""
    known = Rest.of(rest, BlockGeometry(_length(site), edge, causal(site)))
    batch = site.batch if isinstance(site.batch, int) else 1
    rows = batch * site.heads * -(-_length(site) // edge)
    if rows * known.tiles * edge * edge // 8 > LARGEST_MASKS:
        raise Unsupported("size", f"masks of the means of {_length(site)} tokens in {site.heads} heads take too much",
                          "leave the rest out, or use means of more keys")  # fmt: skip


def _length(site: AttentionSite) -> int:
    """Tokens, for means of what is not chosen; ``Unsupported`` where they are not fixed."""
    if not isinstance(site.query_length, int):
        raise Unsupported("lengths", "means of blocks that are not chosen hold for one length only",
                          "export with a fixed length, or leave the rest out")  # fmt: skip
    return site.query_length


def check_site(site: AttentionSite) -> None:
    """Raises ``Unsupported`` for a site whose heads cannot choose."""
    check_plain(site)
    if site.needs - {"body"}:
        raise Unsupported("needs", f"a choice of blocks does not go with {', '.join(sorted(site.needs))}")
    if site.query_length != site.key_length:
        raise Unsupported("lengths", f"{site.query_length} queries over {site.key_length} keys are not self-attention")
    foreign = [p.kind for p in site.mask.parts if p.kind != "causal"]
    if foreign or site.mask.ends is not None:
        raise Unsupported("mask", f"a mask of kind {', '.join(foreign) or 'key ends'}: estimates do not know of it")
    check_bias(site)


def fixed_elements(site: AttentionSite, shape: Shape, edge: int, family: Family) -> float:
    """What scores and selection of all heads take in the body, in score elements of dense attention."""
    heads, tokens = shape.batch * site.heads, shape.query_length
    cut, rows = Cut.of(family, edge), -(-tokens // edge)
    high, wide = (-(-(rows if n in cut.pooled else tokens) // cut.stride) for n in ("query", "key"))
    # One product of stride * D for each pair of tiles; pooling reads queries and keys once.
    products = high * wide * cut.stride * site.head_dim / (site.head_dim + site.value_dim)
    return START + float(heads * (products + SOFTMAX * high * wide + SORTED * rows**2 + tokens))


START = 3e5
"""Some two hundred small nodes. As ``OVERHEAD`` an estimate, held against ``tools/bench_chosen.py``."""

SOFTMAX = 1.0
"""Of a score of tiles, beside its products: exponentials and sums."""

SORTED = 12.0
"""Of a block that is ranked: two sorted orders and what is gathered by them."""


def cost(site: AttentionSite, given: Parameters, shape: Shape) -> Cost:
    """Touched keys with padding; copies, scores and selection are counted as flops. Of a way by weight or
    distance, which keeps as much as it must, half of the blocks are assumed: the search knows better.
    """
    edge, chooser = check(site, given)
    count = -(-shape.query_length // edge)
    all_blocks = count * (count + 1) / 2 if causal(site) else count**2
    shares = [a if chooser.rule == "share" else 1.0 if a >= chooser.everything else 0.5 for a in chooser.amounts]
    blocks = sum(min(s, 1.0) for s in shares) * all_blocks * shape.batch
    if chooser.rest:
        blocks += shape.batch * site.heads * count * (shape.query_length // edge) / chooser.rest
    return cost_of(site, shape, edge, chooser.family, blocks, chooser.rest)


def cost_of(site: AttentionSite, shape: Shape, edge: int, family: Family, blocks: float, rest: int = 0) -> Cost:
    """``blocks`` of all heads and batch entries, those that means of ``rest`` keys amount to included."""
    of_element = 2.0 * (site.head_dim + site.value_dim)
    elements = PADDING * OVERHEAD * blocks * edge**2
    extra = OVERHEAD * COPY * PADDING * blocks * edge + fixed_elements(site, shape, edge, family)
    if rest:
        _check_size(site, edge, rest)
        extra += JOIN * shape.batch * site.kv_heads * shape.query_length * (1 + 1 / rest) + LISTED
    keys = blocks * edge / (shape.batch * site.heads * -(-shape.query_length // edge))
    return Cost(of_element * (elements + extra), keys, elements)


def lower(site: AttentionSite, given: Parameters, opset: int) -> Lowering:
    """The three ops with their bodies, before them means of blocks where heads choose by those. Raises ``Unsupported``
    as ``check``.
    """
    register()
    register_selection()
    edge, chooser = check(site, given)
    call, late = Call.of(site, opset, 0, 0), causal(site)
    base = f"{site.output.value}/chosen"
    operands = (site.query, site.key)
    sizes = select.Sizes(
        site.heads, site.kv_heads, site.head_dim, site.dtype, (site.query.layout, site.key.layout), opset
    )
    names, before = {"query": site.query.value, "key": site.key.value}, list[NodeProto]()
    cut = Cut.of(chooser.family, edge)
    if cut.pooled:
        body, made = Body(opset), dict[str, str]()
        for name, operand, heads in zip(names, operands, (site.heads, site.kv_heads), strict=True):
            if name in cut.pooled:
                made[name] = select.pool(body, name[0], operand.layout, edge, sizes, heads)
        before = in_graph(body, f"{base}/pooled", {n[0]: value for n, value in names.items()})
        names |= {n: f"{base}/pooled/{m}" for n, m in made.items()}
    said = {"scale": site.scale, **cut.attributes, "causal": int(late)}
    picked = {"tiles": cut.tiles, "rule": chooser.rule, "causal": int(late), "sinks": SINKS, "window": WINDOW}
    amount = np.array(chooser.amounts if len(set(chooser.amounts)) > 1 else chooser.amounts[:1], np.float32)
    shape = masks(edge, late)
    stored = [
        numpy_helper.from_array(x, f"{SELECT}/{what}/{hashlib.sha256(x.tobytes()).hexdigest()[:16]}")
        for what, x in (("amount", amount), ("masks", shape))
    ]
    lists = [f"{base}/{name}" for name in LISTS]
    scores = select.node(SCORES, said, sizes, tuple(names.values()), (f"{base}/scores",), f"{SCORES}/{site.id or base}")
    chosen = select.node(
        SELECT, picked, sizes, (f"{base}/scores", stored[0].name), (*lists, f"{base}/mass"),
        f"{SELECT}/{site.id or base}",
    )  # fmt: skip
    said_lists = dict(zip(LISTS, lists, strict=True)) | {"masks": stored[1].name}
    rest, between = None, list[NodeProto]()
    if chooser.rest:
        blocks = BlockGeometry(_length(site), edge, late)
        rest = Rest.of(chooser.rest, blocks)
        between, site = in_front(site, rest, opset)
        body = Body(opset)
        made = listed(body, rest, blocks)
        between += in_graph(body, f"{base}/rest", said_lists)
        said_lists = {name: f"{base}/rest/{value}" for name, value in made.items()}
    form = Form(edge, "zero", ("counts",) if rest is not None else ())
    values = {"query": site.query.value, "key": site.key.value, "value": site.value.value, **said_lists}
    how = f"chosen, causal {late}" + (f", rest {rest.size} of {rest.blocks}" if rest is not None else "")
    attended = node(
        form, call, form.place(values), [site.output.value], f"{OP_TYPE}/{site.id or site.output.value}", how
    )
    functions = (
        select.function(SCORES, said, sizes), select.function(SELECT, picked, sizes),
        chosen_body.function(attended, form, call, late, rest),
    )  # fmt: skip
    return Lowering((*before, scores, chosen, *between, attended), functions, tuple(stored))


def geometry(site: AttentionSite, tokens: int) -> BlockGeometry:
    """The blocks of a site at one length."""
    return BlockGeometry(tokens, edge_of(site), causal(site))
