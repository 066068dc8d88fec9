"""Turns a chain of products with known axes into a site: its normaliser, its operands' homes, its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.linear import LinearFacts
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.homes import ShapeRead, Stage
from attncompile.passes.detect.linear_chain import Chain, Context, Product, Step, chain_to, standard
from attncompile.passes.detect.linear_denominator import Denominator, denominator
from attncompile.passes.detect.linear_mask import Factor
from attncompile.passes.detect.linear_normaliser import Normalised, Search
from attncompile.passes.detect.linear_operands import Path, Placed, Roles, ones_channel, path_of, place
from attncompile.passes.detect.linear_sums import Sums
from attncompile.passes.detect.softmax import dtype_name
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis, forward
from attncompile.passes.detect.walks import dies, node_name, readers_of, walk_output


@dataclass(frozen=True, slots=True)
class Core:
    """The two products and what their axes are. ``labels`` are the axes of the last product's labels; ``factor`` what
    the scores are multiplied by element by element, ``before_rows`` (its scale included) and ``after_rows`` by numbers;
    ``weights`` hold the scores as they meet the values; ``rows`` divides them, with their axes there.
    """

    form: str
    atoms: Atoms
    chain: Chain
    outer: Product
    labels: dict[str, Axis]
    roles: Roles
    query: Path
    key: Path
    value: Path
    out_axes: Axes
    factor: Factor
    before_rows: float
    after_rows: float
    weights: dict[str, Axes]
    rows: tuple[Step, Axes] | None


@dataclass(frozen=True, slots=True)
class _Sum:
    """The normaliser in numbers (see ``Normalised``); ``scale`` is what the sum alone is multiplied by."""

    total: Denominator
    nodes: tuple[NodeProto, ...]
    factor: float
    common: float
    stages: tuple[int, int] | None
    scale: float
    how: str


def assemble(ctx: Context, core: Core) -> AttentionSite:
    """The site of ``core``; lengths are the world's numbers and the id is empty.

    Raises:
        Unsupported: its normaliser is not understood, its inner values are used elsewhere, or its numbers depend on a
            dynamic dimension.
        NotSeparate: an operand has no rank-4 value.
    """
    atoms, roles, value = core.atoms, core.roles, core.value
    pad: NodeProto | None = None
    ones: Axis | None = None
    padded = ones_channel(ctx, atoms, value, roles.value_dim)
    if padded is not None:
        source, axes, pad = padded
        inner = path_of(ctx, atoms, source, axes, None, pad.output[0])
        channel = next(a for a, b in zip(axes, value.stages[0].axes, strict=True) if a != b)
        steps, scales = (*inner.steps, (pad,), *value.steps), (*inner.scales, 1.0, *value.scales)
        value = Path(inner.stages + value.stages, steps, scales, value.reader)
        ones, roles = roles.value_dim, Roles(roles.batch, roles.heads, roles.queries, roles.keys, roles.dim, channel)
    with_ones = Roles(roles.batch, roles.heads, roles.queries, roles.keys, roles.dim, ones or roles.value_dim)
    causal = core.form == "cumulative" or core.factor.causal
    sums = Sums(ctx, atoms, with_ones, core.query, core.key, causal, core.weights)
    search = Search(ctx, atoms, sums, core.outer.output, core.out_axes, ones, roles.value_dim)
    found = search.find(core.outer, core.labels)
    rows = _rows(ctx, core, sums) if core.rows is not None else None
    if found is not None and rows is not None:
        raise Unsupported("normaliser", "the result is divided by a sum twice")
    out = (found.output, found.axes) if found is not None else (core.outer.output, core.out_axes)
    stages, after = walk_output(ctx.index, ctx.world, atoms, *out)
    _check_not_chunked(ctx, core, stages)
    placed = place(atoms, (core.query, core.key, value), stages, roles)
    normaliser = rows if found is None else _Sum(
        found.total, found.nodes, found.factor, found.common, found.stages, found.total_factor, found.how
    )  # fmt: skip
    return _site(ctx, core, value, placed, normaliser, stages, after, found)


def _rows(ctx: Context, core: Core, sums: Sums) -> _Sum:
    """The division of the scores' rows by their sum."""
    assert core.rows is not None
    step, axes = core.rows
    scores = step.node.input[0]
    total = denominator(ctx, step.value)
    node = ctx.index.producer.get(total.root)
    keys = core.atoms.leaves(core.roles.keys)
    if standard(node, "ReduceSum") and node is not None and node.input[0] == scores:
        sums.weights = {scores: axes}
        found = sums.row_sum(node)
        if found is not None:
            for after in total.nodes:
                found = forward(ctx.world, core.atoms, after, found) if after.op_type in VIEW_OPS else found
            wanted = [() if core.atoms.leaves(a) == keys else core.atoms.leaves(a) for a in axes]
            if [core.atoms.leaves(a) for a in found] == wanted:
                return _Sum(total, (node, *total.nodes), 1.0, 1.0, None, 1.0, "rows")
    raise Unsupported("normaliser", f"the scores are divided by '{step.value}', which is not their sum over the keys")


def _site(
    ctx: Context, core: Core, value: Path, placed: Placed, total: _Sum | None, stages: list[Stage],
    after: list[NodeProto], found: Normalised | None,
) -> AttentionSite:  # fmt: skip
    atoms, query, key = core.atoms, core.query, core.key
    query_at, key_at, value_at, output_at = placed.at
    operand_nodes = [
        *query.nodes_from(query_at), *key.nodes_from(key_at), *value.nodes_from(value_at), *after[:output_at],
    ]  # fmt: skip
    chain_nodes = [*core.chain.product.nodes, *(s.node for s in core.chain.steps), *core.outer.nodes]
    core_nodes = [*chain_nodes, *(total.nodes if total is not None else ())]
    nodes = list({id(n): n for n in (*operand_nodes, *core_nodes)}.values())
    end = found.output if found is not None else core.outer.output
    _check_private(ctx, core_nodes, nodes, end)
    _check_numbers(ctx, nodes)
    q_scale, k_scale, v_scale = query.scale_from(query_at), key.scale_from(key_at), value.scale_from(value_at)
    scale = q_scale * k_scale * v_scale * core.before_rows * core.after_rows * core.outer.contraction.factor
    epsilon, floor = 0.0, None
    if total is not None:
        if total.how == "rows":
            divisor = q_scale * k_scale * core.before_rows
        elif total.stages is None:  # from the product itself: whatever multiplies that multiplies the sum
            divisor = scale / v_scale * total.common
        else:
            at = total.stages
            divisor = q_scale / query.scale_from(at[0]) * k_scale / key.scale_from(at[1]) * total.scale
        divisor *= total.total.scale
        if not divisor > 0 or not isfinite(divisor):
            raise Unsupported("normaliser", f"the sum of the keys is multiplied by {divisor} in the normaliser")
        scale *= total.factor * total.common / divisor
        epsilon, floor = total.total.epsilon / divisor, total.total.floor
        floor = None if floor is None else floor / divisor
    sizes = {k: atoms.size(atoms.leaves(getattr(placed.roles, k))) for k in Roles.__slots__}
    causal = core.form == "cumulative" or core.factor.causal
    return AttentionSite(
        id="", form=_form(core, total, value, query.map_from(query_at), key.map_from(key_at)),
        query=placed.operands[0], key=placed.operands[1], value=placed.operands[2], output=placed.operands[3],
        batch=sizes["batch"], heads=sizes["heads"], kv_heads=atoms.size(placed.kv_heads), head_dim=sizes["dim"],
        value_dim=sizes["value_dim"], query_length=sizes["queries"], key_length=sizes["keys"],
        scale=1.0 if abs(scale - 1.0) < 1e-12 else scale, mask=_mask(core, causal), kind="linear",
        dtype=dtype_name(ctx.world, placed.operands[0].value),
        softmax_dtype=dtype_name(ctx.world, core.chain.product.output),
        nodes=tuple(node_name(n) for n in nodes),
        interior=tuple(o for n in nodes for o in n.output if o and o != placed.operands[3].value),
        linear=LinearFacts(
            query.map_from(query_at), key.map_from(key_at), "none" if total is None else "sum", epsilon, causal,
            _form_name(core.form), decay="head" if core.factor.rates else "none", decay_rates=core.factor.rates,
            floor=floor,
        ),
    )  # fmt: skip


def _form_name(form: str) -> Literal["state", "cumulative", "parallel"]:
    return "cumulative" if form == "cumulative" else "parallel" if form == "parallel" else "state"


def _mask(core: Core, causal: bool) -> MaskFacts:
    if not causal:
        return MaskFacts()
    certificate = core.factor.certificate or Certificate("structure", "a running sum over the keys", general=True)
    return MaskFacts((MaskPart("causal", certificate, -1, 0),), "zero")


def _form(core: Core, total: _Sum | None, value: Path, query_map: str, key_map: str) -> str:
    first, last = (p.nodes[-1].op_type.lower() for p in (core.chain.product, core.outer))
    words = [f"linear-{core.form} {first}-{last}", f"map:{query_map}/{key_map}"]
    words.append("normaliser:" + (total.how if total is not None else "none"))
    words += ["decay"] * bool(core.factor.rates)
    words += ["cast"] * any(n.op_type == "Cast" for n in (*core.query.nodes_from(0), *value.nodes_from(0)))
    return " ".join(words)


def _check_private(ctx: Context, core: list[NodeProto], allowed: list[NodeProto], end: str) -> None:
    """A state, scores or a normaliser that someone else reads cannot disappear."""
    ids = {id(n) for n in allowed}
    for node in core:
        for output in node.output:
            if output == end or not output:
                continue
            if output in ctx.index.outputs:
                raise Unsupported("state-used", f"the state, scores or normaliser '{output}' is an output of the model")
            outside = [n for n in ctx.index.consumers.get(output, []) if not dies(ctx.index, n, ids)]
            if outside and all(n.op_type == "Shape" for n in outside):
                reason = f"the shape of the state, scores or normaliser '{output}' is read by '{node_name(outside[0])}'"
                raise ShapeRead(reason, tuple(n.output[0] for n in outside))
            if outside:
                raise Unsupported("state-used", f"the state, scores or normaliser '{output}' is also read by "
                                  f"'{node_name(outside[0])}'")  # fmt: skip


def _check_numbers(ctx: Context, nodes: list[NodeProto]) -> None:
    """Numbers that multiply or are added are the same at every size."""
    for node in nodes:
        if node.op_type not in ("Mul", "Div", "Add", "Sub", "Clip", "Max", "Min"):
            continue
        for value in node.input:
            if not value or ctx.index.data_inputs(value):
                continue
            if not any(n.op_type in ("Shape", "Size") for n in ctx.index.slice_nodes(value)):
                continue
            number = ctx.world.scalar(value)
            if number is not None and any(w.scalar(value) != number for w in ctx.others()):
                raise Unsupported("dynamic-scale", f"the number '{value}' at '{node.output[0]}' changes with a dynamic "
                                  "dimension")  # fmt: skip


def _check_not_chunked(ctx: Context, core: Core, stages: list[Stage]) -> None:
    """A chunk of tokens is not the whole: what the same queries read from the state before it is added to its own
    part, and it is joined to the other chunks.
    """
    value, axes = stages[-1].value, stages[-1].axes
    for _ in range(3):
        readers = readers_of(ctx.index, value)
        if len(readers) != 1:
            return
        (node,) = readers
        others = [v for v in node.input if v != value]
        if standard(node, "Concat") and len(node.input) > 1 and core.form != "state":
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if core.atoms.leaves(axes[axis % len(axes)]) == core.atoms.leaves(core.roles.queries):
                raise Unsupported("chunked", f"'{node.output[0]}' joins the result to those of other tokens: one chunk "
                                  "of a longer attention")  # fmt: skip
        if not standard(node, "Add") or len(others) != 1:
            return
        if _sources(ctx, others[0], 2) & _sources(ctx, core.outer.output, 2):
            raise Unsupported("chunked", f"'{node.output[0]}' adds another product of the same activations to the "
                              "result: chunked linear attention, which is not taken yet")  # fmt: skip
        if ctx.world.shapes.get(node.output[0]) != ctx.world.shapes.get(value):
            return
        value = node.output[0]


def _sources(ctx: Context, value: str, depth: int) -> set[str]:
    """What the products that ``value`` comes from are made of, ``depth`` products deep."""
    chain = chain_to(ctx, value)
    if chain is None or not depth:
        return set()
    c = chain.product.contraction
    return {_source(ctx, v) for v in (c.left, c.right)} | {
        x for v in (c.left, c.right) for x in _sources(ctx, v, depth - 1)
    }  # fmt: skip


def _source(ctx: Context, value: str) -> str:
    """Where ``value`` comes from over views and factors that do not depend on the input."""
    for _ in range(16):
        node = ctx.index.producer.get(value)
        if node is None or not standard(node, *VIEW_OPS, "Mul", "Div", "Cast"):
            break
        data = [v for v in node.input if ctx.index.data_inputs(v)]
        if len(data) != 1 or (node.op_type in VIEW_OPS and data[0] != node.input[0]):
            break
        value = data[0]
    return value
