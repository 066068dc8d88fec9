"""The kernels of ``Attention`` (and of plain sliding windows): which calls they take, and what there is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import Argument, Constant, OpCall, Program, Tactic, Work
from attncompile.core.verdict import Verdict
from attncompile.plugins.attention.op import HIDING, OP_TYPE, OPTIONAL, register
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
from attncompile.plugins.tactics import HOPPER, HOPPER_ROWS, tactics

PACKAGE = "attncompile.plugins.attention"
ALIKE = "zero"
"""``masked_rows`` of all calls in which every query sees a key: they share their programs."""


class AttentionKernel:
    """Any lengths, static or dynamic. Of the attributes it reads ``left`` and ``right`` (-1: unlimited), ``clamp``
    (windows are moved inward at both ends; as many queries as keys), ``softcap`` (0: none) and ``masked_rows``.
    """

    op = OP_TYPE

    def register(self) -> None:
        register()

    def call(self, node: OpCall) -> OpCall:
        attributes = {name: node.attributes[name] for name in ("left", "right", "softcap", "masked_rows", "scale")}
        queries, keys = node.query_length, node.key_length
        inside = queries is not None and keys is not None and queries <= keys
        if not HIDING & set(node.inputs) and (inside or not bounded(attributes)):
            attributes["masked_rows"] = ALIKE
        return replace(node, attributes=attributes)

    def general(self, call: OpCall) -> OpCall:
        given = call.attributes
        # Without an input that hides keys, or a window that may end before the first of them, every query sees one.
        rule = given.get("masked_rows", ALIKE) if HIDING & set(call.inputs) or bounded(given) else ALIKE
        attributes = {
            "left": min(given.get("left", -1), 0), "right": min(given.get("right", -1), 0),
            "softcap": bool(given.get("softcap")), "masked_rows": rule, "clamp": bool(given.get("clamp")),
        }  # fmt: skip
        return replace(without_sizes(call), attributes=attributes)

    def standard(self, dtype: str) -> Sequence[OpCall]:
        kinds = ((-1, -1), (-1, 0), (0, 0))  # none, causal, window
        return [
            self.general(OpCall(self.op, dtype, 1, 1, dim, dim, attributes={"left": left, "right": right}))
            for dim in (64, 72, 80, 128, 256)
            for left, right in kinds
        ]

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        try:
            self._check(call)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("any lengths")

    def _check(self, call: OpCall) -> None:
        check_operands(call)
        unknown = set(call.inputs) - set(OPTIONAL)
        if unknown:
            raise Unsupported("inputs", f"there is no kernel with {', '.join(sorted(unknown))}")
        check_optional(call)
        softcap = call.attributes.get("softcap", 0.0)
        if softcap < 0:
            raise Unsupported("softcap", f"softcap {softcap}: the kernels need a positive one, or 0 for none")
        if call.attributes.get("clamp") and call.query_length != call.key_length:
            raise Unsupported("lengths", f"clamped windows of {call.query_length} queries on {call.key_length} keys")

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        self._check(call)
        hopper = architecture == 90 and not set(call.inputs) - {"sinks"} and not call.attributes.get("softcap")
        hopper = hopper and call.attributes.get("masked_rows", "zero") != "uniform"
        chosen = tactics(PACKAGE, call, architecture, kind(call), lambda _: hopper)
        return [self._program(call, tactic, rank) for rank, tactic in enumerate(chosen)]

    def _program(self, call: OpCall, tactic: Tactic, rank: int) -> Program:
        hopper = tactic.name.startswith(HOPPER)
        constants: dict[str, Constant] = {
            "HAS_LEFT": call.attributes.get("left", -1) >= 0, "HAS_RIGHT": call.attributes.get("right", -1) >= 0,
            "CLAMP": bool(call.attributes.get("clamp")),
            "RULE": RULES[call.attributes.get("masked_rows", "zero")], **widths(call), **tactic.constants,
        }  # fmt: skip
        if hopper:
            constants["STAGES"] = tactic.stages
        else:
            constants["SOFTCAP"] = bool(call.attributes.get("softcap"))
        tiles = f"cdiv(NQ, {queries(constants)})"
        # Tiles of one length are shared by as many blocks as the GPU runs at once; causal ones the GPU schedules.
        items = f"{tiles} * H * B" if kind(call) == "causal" else f"min({tiles} * H * B, SMS)"
        module = "kernel_hopper" if hopper else "kernel_triton"
        return Program(
            op=self.op, tactic=tactic.name, language="gluon" if hopper else "triton",
            function=f"{PACKAGE}.{module}:attention", arguments=tuple(arguments(call, hopper)), constants=constants,
            grid=(items, "1", "1") if hopper else (tiles, "H", "B"), warps=tactic.warps, stages=tactic.stages,
            registers=tactic.registers, ptxas=tactic.ptxas, dtype=call.dtype, head_dim=call.head_dim,
            value_dim=call.value_dim, rank=rank,
        )  # fmt: skip

    def work(self, call: OpCall, program: Program) -> Work:
        return work(call, program)


def bounded(attributes: Mapping[str, Any]) -> bool:
    """Whether a query sees the keys around its place only."""
    return int(attributes.get("left", -1)) >= 0 or int(attributes.get("right", -1)) >= 0


def kind(call: OpCall) -> str:
    """What the tactic tables tell apart: none, causal, window, and "per score" where each score has a bias or a mask of
    its own, which take registers.
    """
    if {"bias", "mask"} & set(call.inputs):
        return "per score"
    if call.attributes.get("left", -1) >= 0:
        return "window"
    return "causal" if call.attributes.get("right", -1) >= 0 else "none"


def queries(constants: dict[str, Constant]) -> int:
    """Queries of one block."""
    return int(constants["BM"] or 0) if "BM" in constants else HOPPER_ROWS * int(constants["CONSUMERS"] or 0)


def arguments(call: OpCall, hopper: bool) -> list[Argument]:
    extras = [int32("NQ", "NQ"), int32("NK", "NK")]
    extras += [int32("H", "H"), int32("B", "B")] if hopper else []
    extras += [int32("group", "H // HKV"), int32("scale", "scale_bits")]
    if call.attributes.get("softcap"):
        extras.append(int32("softcap", "softcap_bits"))
    for side in ("left", "right"):
        if call.attributes.get(side, -1) >= 0:
            extras.append(int32(side, side))
    outputs = [output(call)]
    if "log_sum_exp" in call.outputs:
        outputs.append(Argument("log_sum_exp", "output", "float32"))
    return [*inputs(call, OPTIONAL), *strides(call), *extras, *outputs]


def work(call: OpCall, program: Program) -> Work:
    """Touched tiles, counted tile by tile."""
    if call.batch is None or call.query_length is None or call.key_length is None:
        raise Unsupported("sizes", "the cost of a launch needs batch and lengths")
    nq, nk, bn = call.query_length, call.key_length, int(program.constants["BN"] or 0)
    bm = queries(dict(program.constants))
    left, right = call.attributes.get("left", -1), call.attributes.get("right", -1)
    first = np.arange(0, nq, bm) + (nk - nq)
    last = np.minimum(first + bm, nk) - 1
    start = np.clip(first - left, 0, nk) if left >= 0 else np.zeros_like(first)
    end = np.clip(last + right + 1, start, nk) if right >= 0 else np.full_like(first, nk)
    tiles = -(-(end - start) // bn)
    inner_from = np.clip(last - left, start, end) if left >= 0 else start
    inner_to = np.clip(first + right + 1, inner_from, end) if right >= 0 else end
    heads = call.batch * call.heads
    touched = float(tiles.sum()) * bm * bn * heads
    whole = float(((inner_to - inner_from) // bn).sum()) * bm * bn * heads
    if HIDING & set(call.inputs):
        whole = 0.0
    size = 2 * (call.batch * nq * call.heads * (call.head_dim + call.value_dim))
    size += 2 * (call.batch * nk * call.kv_heads * (call.head_dim + call.value_dim))
    dims = padded(call.head_dim) + padded(call.value_dim)
    peak = float(tiles.max() / max(tiles.mean(), 1e-9))
    return Work(2.0 * touched * dims, touched, touched - whole, float(size), ceil(nq / bm) * heads, peak, parted(call))
