"""The kernels of ``BlockSparseAttention``: which calls they take, and what there is to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, prod

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import Argument, Constant, OpCall, Program, Tactic, Work
from attncompile.core.verdict import Verdict
from attncompile.plugins.block_sparse.op import BLOCKS, LISTS, OP_TYPE, OPTIONAL, register
from attncompile.plugins.kernel_arguments import (
    RULES,
    check_operands,
    check_optional,
    inputs,
    int32,
    output,
    padded,
    parted,
    strides,
    widths,
    without_sizes,
)
from attncompile.plugins.tactics import HOPPER, HOPPER_ROWS, HOPPER_SHARED, hopper_shared, tactics

PACKAGE = "attncompile.plugins.block_sparse"
HOPPER_INPUTS = frozenset({*LISTS, "order", "sinks"})
"""Inputs beside the operands that the Gluon kernel takes."""


class BlockSparseKernel:
    """Any lengths, batches and lists, static or made on the GPU. Of the attributes it reads ``block`` and
    ``masked_rows``.
    """

    op = OP_TYPE

    def register(self) -> None:
        register()

    def call(self, node: OpCall) -> OpCall:
        attributes = {name: node.attributes[name] for name in ("block", "masked_rows", "scale")}
        if "sinks" in node.inputs:
            attributes["masked_rows"] = "zero"  # what a query without a key gives then, whatever the node says
        return replace(node, attributes=attributes)

    def general(self, call: OpCall) -> OpCall:
        rule = "zero" if "sinks" in call.inputs else call.attributes.get("masked_rows", "nan")
        return replace(without_sizes(call), attributes={"block": call.attributes["block"], "masked_rows": rule})

    def standard(self, dtype: str) -> Sequence[OpCall]:
        lists = dict.fromkeys((*LISTS, "order"), "int32")
        return [
            self.general(OpCall(self.op, dtype, 1, 1, dim, dim, {"block": block, "masked_rows": "zero"}, lists))
            for dim in (64, 128)
            for block in BLOCKS
        ]

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        try:
            self._check(call)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("any lists and lengths")

    def _check(self, call: OpCall) -> None:
        check_operands(call)
        unknown = set(call.inputs) - {*LISTS, *OPTIONAL}
        if unknown:
            raise Unsupported("inputs", f"there is no kernel with {', '.join(sorted(unknown))}")
        missing = [name for name in LISTS if name not in call.inputs]
        if missing:
            raise Unsupported("inputs", f"there are no {', '.join(missing)}")
        check_optional(call)
        if call.attributes.get("block") not in BLOCKS:
            known = " and ".join(map(str, BLOCKS))
            raise Unsupported("block", f"blocks of {call.attributes.get('block')}: the kernels take {known}")

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        self._check(call)
        chosen = tactics(
            PACKAGE, call, architecture, kind(call),
            lambda tactic: architecture == 90 and on_hopper(call, tactic),
        )  # fmt: skip
        fitting: dict[str, Tactic] = {}
        for tactic in chosen:
            found = tactic if tactic.name.startswith(HOPPER) else fitted(tactic, int(call.attributes["block"]))
            fitting.setdefault(found.name, found)
        return [self._program(call, tactic, rank) for rank, tactic in enumerate(fitting.values())]

    def _program(self, call: OpCall, tactic: Tactic, rank: int) -> Program:
        hopper = tactic.name.startswith(HOPPER)
        block = int(call.attributes["block"])
        constants: dict[str, Constant] = {
            "BLOCK": block, "RULE": RULES[call.attributes.get("masked_rows", "nan")], **widths(call), **tactic.constants
        }  # fmt: skip
        if hopper:
            constants["STAGES"] = tactic.stages
        pieces = block // queries(constants)
        items = f"cdiv(NQ, {block}) * {pieces} * H * B" if pieces > 1 else f"cdiv(NQ, {block}) * H * B"
        if hopper:
            # As many blocks as the GPU runs at once: one consumer leaves room for another block beside it.
            items = f"min({items}, SMS)" if constants["CONSUMERS"] == 2 else f"min({items}, SMS * 2)"
        return Program(
            op=self.op, tactic=tactic.name, language="gluon" if hopper else "triton",
            function=f"{PACKAGE}.{'kernel_hopper' if hopper else 'kernel_triton'}:attention",
            arguments=tuple(arguments(call)), constants=constants, grid=(items, "1", "1"), warps=tactic.warps,
            stages=tactic.stages, registers=tactic.registers, ptxas=tactic.ptxas, dtype=call.dtype,
            head_dim=call.head_dim, value_dim=call.value_dim, rank=rank,
        )  # fmt: skip

    def work(self, call: OpCall, program: Program) -> Work:
        return work(call, program)


def kind(call: OpCall) -> str:
    """What the tactic table tells apart: the edge of the blocks, and whether there is a bias, which takes registers."""
    return f"{call.attributes['block']}{' bias' if 'bias' in call.inputs else ''}"


def queries(constants: dict[str, Constant]) -> int:
    """Queries of one piece of work."""
    return int(constants["BM"] or 0) if "BM" in constants else HOPPER_ROWS * int(constants["CONSUMERS"] or 0)


def on_hopper(call: OpCall, tactic: Tactic) -> bool:
    """Whether ``kernel_hopper.py`` takes the call with this tactic, which begins a block of queries at once."""
    if set(call.inputs) - HOPPER_INPUTS or call.attributes.get("masked_rows") == "uniform":
        return False
    consumers = int(tactic.constants["CONSUMERS"] or 0)
    shared = hopper_shared(call, tactic)
    return HOPPER_ROWS * consumers == call.attributes["block"] and shared * (3 - consumers) <= HOPPER_SHARED


def fitted(tactic: Tactic, block: int) -> Tactic:
    """``tactic`` with tiles that divide a block."""
    bm, bn = (min(int(tactic.constants[name] or 0), block) for name in ("BM", "BN"))
    if (bm, bn) == (tactic.constants["BM"], tactic.constants["BN"]):
        return tactic
    warps = max(4, tactic.warps * bm // int(tactic.constants["BM"] or 1))
    name = f"triton-bm{bm}-bn{bn}-w{warps}-s{tactic.stages}"
    return replace(tactic, name=name, constants={**tactic.constants, "BM": bm, "BN": bn}, warps=warps)


def arguments(call: OpCall) -> list[Argument]:
    extras = [int32(name, name) for name in ("NQ", "NK", "H", "B")]
    extras += [int32("group", "H // HKV"), int32("scale", "scale_bits")]
    outputs = [output(call)]
    if "log_sum_exp" in call.outputs:
        outputs.append(Argument("log_sum_exp", "output", "float32"))
    return [*inputs(call, (*LISTS, *OPTIONAL)), *strides(call), *extras, *outputs]


def work(call: OpCall, program: Program) -> Work:
    """From the shapes of the lists: all entries of ``columns`` are taken for blocks that some row lists, and one in
    each row for a partial one, which is what causal lists of a model have. ``of_blocks`` takes exact numbers.
    """
    rows, columns = call.shapes.get("rows"), call.shapes.get("columns")
    if rows is None or columns is None or None in rows or None in columns:
        raise Unsupported("sizes", "the cost of a launch needs the shapes of its lists")
    listed, entries = prod(n for n in rows[:-1] if n is not None), prod(n for n in columns if n is not None)
    return of_blocks(call, program, entries - min(entries, listed), min(entries, listed))


def of_blocks(call: OpCall, program: Program, full: int, partial: int) -> Work:
    """A launch whose lists have ``full`` and ``partial`` blocks in all."""
    rows = call.shapes.get("rows")
    if call.batch is None or call.query_length is None or call.key_length is None or rows is None or None in rows:
        raise Unsupported("sizes", "the cost of a launch needs batch, lengths and the shape of its lists")
    heads, block = call.batch * call.heads, int(call.attributes["block"])
    sets = prod(n for n in rows[:-2] if n is not None)
    blocks = block * block * (heads // sets)
    size = 2 * call.batch * call.query_length * call.heads * (call.head_dim + call.value_dim)
    size += 2 * call.batch * call.key_length * call.kv_heads * (call.head_dim + call.value_dim)
    dims = padded(call.head_dim) + padded(call.value_dim)
    scores = float((full + partial) * blocks)
    items = ceil(call.query_length / block) * (block // queries(dict(program.constants))) * heads
    return Work(2.0 * scores * dims, scores, float(partial * blocks), float(size), items, parted=parted(call))
