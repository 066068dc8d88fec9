"""The kernels of ``BlockScores`` and ``BlockSelect``: which calls they take, and what there is to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import POINTER_ALIGN, Argument, Constant, OpCall, Program, Tactic, Work
from attncompile.core.verdict import Verdict
from attncompile.plugins.block_select.op import REDUCTIONS, RULES, SCORES, SELECT, SLACK, register
from attncompile.plugins.kernel_arguments import HALF, int32, offsets, padded, parted, split

PACKAGE = "attncompile.plugins.block_select"
TILE, WIDEST = 64, 128
"""Tiles of keys that every tactic holds at least, and whole blocks of them; the largest block in tiles."""

WIDTHS = (1024, 256)
"""Columns of a row of blocks that are looked at at once: of 131,072 tokens, and of what most models have."""

ROOM = (1 << 31) - 1
"""Entries that lists may have: they are counted in int32."""


READ = ("stride", "block", "causal", "reduce", "span")


class ScoresKernel:
    """Any lengths. Of the attributes it reads ``READ``; the scale is an argument."""

    op = SCORES

    def register(self) -> None:
        register()

    def call(self, node: OpCall) -> OpCall:
        if node.attributes.get("columns"):
            raise Unsupported("layout", "queries or keys whose tokens are the last axis: kernels read rows")
        return replace(node, attributes={n: node.attributes[n] for n in (*READ, "scale")})

    def general(self, call: OpCall) -> OpCall:
        said = {n: call.attributes[n] for n in READ}
        return replace(
            call, heads=1, kv_heads=1, batch=None, query_length=None, key_length=None, shapes={}, attributes=said,
            value_dim=call.head_dim,
        )  # fmt: skip

    def standard(self, dtype: str) -> Sequence[OpCall]:
        return [
            OpCall(self.op, dtype, 1, 1, dim, dim, dict(zip(READ, (s, b, c, reduce, span), strict=True)),
                   outputs=("scores",))
            for dim in (64, 128)
            for s, b, reduce, span in (
                (16, 64, "sum", 1), (16, 128, "sum", 1), (1, 1, "sum", 1), (1, 64, "max", 64), (1, 128, "max", 128),
            )
            for c in (0, 1)
        ]  # fmt: skip

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        return _verdict(self._check, call)

    def _check(self, call: OpCall) -> None:
        if call.dtype not in HALF:
            raise Unsupported("dtype", f"kernels take float16 and bfloat16, not {call.dtype}", "convert with --fp16")
        if not 16 <= call.head_dim <= 256 or call.head_dim % 8:
            raise Unsupported("head-dim", f"head dim {call.head_dim}: kernels take multiples of 8 from 16 to 256")
        stride, block = call.attributes["stride"], call.attributes["block"]
        members = block // stride if stride > 0 else 0
        if stride < 1 or block % stride or members > WIDEST or members & (members - 1):
            raise Unsupported(
                "stride", f"blocks of {block} in tiles of {stride}: kernels take 1 to {WIDEST} tiles, a power of two"
            )
        if call.attributes["reduce"] not in REDUCTIONS or call.attributes["span"] < 1:
            raise Unsupported(
                "reduce", f"reduce {call.attributes['reduce']}, span {call.attributes['span']}: there are "
                f"{', '.join(REDUCTIONS)}, and spans from 1 on",
            )  # fmt: skip
        if not call.attributes.get("scale", 1.0) > 0:
            raise Unsupported("scale", f"scale {call.attributes['scale']}: the kernels need a positive one")

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        self._check(call)
        return [self.program(call, tactic, rank) for rank, tactic in enumerate(_tactics(call))]

    def program(self, call: OpCall, tactic: Tactic, rank: int = 0) -> Program:
        stride, block = int(call.attributes["stride"]), int(call.attributes["block"])
        k1, k2 = split(call.head_dim)
        constants: dict[str, Constant] = {
            "STRIDE": stride, "BLOCK": block, "CAUSAL": bool(call.attributes.get("causal")), "DK": call.head_dim,
            "K1": k1, "K2": k2, "HIGHEST": call.attributes["reduce"] == "max", "SPAN": int(call.attributes["span"]),
            **tactic.constants,
        }  # fmt: skip
        wide = int(tactic.constants["BN"] or 1) * stride // block
        items = f"cdiv(cdiv(NQ, {stride}), {tactic.constants['BM']}) * cdiv(cdiv(NK, {block}), {wide})"
        operands = [Argument(n, "input", call.dtype, align=POINTER_ALIGN) for n in ("query", "key")]
        extras = [int32(f"{n[0]}_{a.lower()}", f"{n}_stride_{a}") for n in ("query", "key") for a in "BNH"]
        extras += offsets(call, ("query", "key"))
        extras += [int32("NQ", "NQ"), int32("NK", "NK"), int32("group", "H // HKV"), int32("scale", "scale_bits")]
        return Program(
            op=self.op, tactic=tactic.name, language="triton", function=f"{PACKAGE}.kernel_triton:scores",
            arguments=(*operands, *extras, Argument("scores", "output", "float32")), constants=constants,
            grid=(items, "H", "B"), warps=tactic.warps, stages=tactic.stages, dtype=call.dtype,
            head_dim=call.head_dim, value_dim=call.value_dim, rank=rank,
        )  # fmt: skip

    def work(self, call: OpCall, program: Program) -> Work:
        """Of the square of tiles, or half of it; what it reads and writes."""
        if call.batch is None or call.query_length is None or call.key_length is None:
            raise Unsupported("sizes", "the cost of a launch needs batch and lengths")
        stride, block = int(call.attributes["stride"]), int(call.attributes["block"])
        heads = call.batch * call.heads
        rows, across = ceil(call.query_length / stride), ceil(call.key_length / stride)
        part = 0.5 if call.attributes.get("causal") else 1.0
        elements = heads * rows * across * part
        size = 2.0 * call.batch * call.head_dim * (call.query_length * call.heads + call.key_length * call.kv_heads)
        size += 4.0 * heads * rows * ceil(call.key_length / block)
        bm, bn = (int(program.constants[n] or 1) for n in ("BM", "BN"))
        items = ceil(rows / bm) * ceil(across / bn) * heads
        return Work(2.0 * elements * stride * padded(call.head_dim), elements, 0.0, size, items, parted=parted(call))


def signed(number: int) -> str:
    """As an expression: there is no unary minus."""
    return str(number) if number >= 0 else f"0 - {-number}"


class SelectKernel:
    """Any sizes. Of the attributes it reads ``tiles``, ``causal`` and ``rule``; the others are arguments."""

    op = SELECT

    def register(self) -> None:
        register()

    def call(self, node: OpCall) -> OpCall:
        return node

    def general(self, call: OpCall) -> OpCall:
        said = {n: call.attributes[n] for n in ("tiles", "causal", "rule", "sinks", "window")}
        return replace(call, heads=1, kv_heads=1, batch=None, shapes={}, attributes=said)

    def standard(self, dtype: str) -> Sequence[OpCall]:
        given = {"scores": "float32", "amount": "float32"}
        said = {"sinks": 1, "window": 0}
        return [
            OpCall(self.op, "float32", 1, 1, 1, 1, {"tiles": t, "causal": c, "rule": rule, **said}, given,
                   outputs=("rows", "columns", "kinds", "mass"))
            for t, rule in ((4, "mass"), (8, "mass"), (1, "share"), (1, "anchor")) for c in (0, 1)
        ]  # fmt: skip

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        return _verdict(self._check, call)

    def _check(self, call: OpCall) -> None:
        for name in ("scores", "amount"):
            if call.inputs.get(name) != "float32":
                raise Unsupported("dtype", f"{name} is {call.inputs.get(name)}: the kernel takes float32")
        if call.attributes.get("rule") not in RULES:
            raise Unsupported("rule", f"rule {call.attributes.get('rule')}: there are {', '.join(RULES)}")
        if call.attributes["tiles"] < 1:
            raise Unsupported("tiles", f"{call.attributes['tiles']} rows of scores in a row of blocks")
        if call.attributes["rule"] == "anchor" and call.attributes["tiles"] != 1:
            raise Unsupported("tiles", f"rule anchor takes one row of scores, not {call.attributes['tiles']}")
        sizes = call.shapes.get("scores", ())
        if len(sizes) == 4 and None not in sizes:
            batch, heads, tiles, columns = (int(n or 0) for n in sizes)
            room = batch * heads * ceil(tiles / call.attributes["tiles"]) * columns
            if room > ROOM:
                raise Unsupported(
                    "size", f"lists with room for {room} entries are counted in int32", "use larger blocks"
                )

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        self._check(call)
        return [self.program(call, width, rank) for rank, width in enumerate(WIDTHS)]

    def program(self, call: OpCall, width: int, rank: int = 0) -> Program:
        said = call.attributes
        near = said["rule"] == "anchor"
        constants: dict[str, Constant] = {"CAUSAL": bool(said.get("causal")), "WIDTH": width}
        if not near:
            constants |= {"TILES": int(said["tiles"]), "COUNTED": said["rule"] == "share", "SLACK": SLACK}
        extras = [int32("amount_h", "amount_stride_H"), int32("TQ", "T"), int32("C", "C"),
                  int32("sinks", str(said["sinks"])), int32("window", signed(said["window"]))]  # fmt: skip
        outputs = [Argument(n, "output", "int32") for n in ("rows", "columns", "kinds")]
        return Program(
            op=self.op, tactic=f"triton-width{width}-w4", language="triton",
            function=f"{PACKAGE}.kernel_triton:{'near' if near else 'select'}",
            arguments=(Argument("scores", "input", "float32"), Argument("amount", "input", "float32"), *extras,
                       *outputs, Argument("mass", "output", "float32")),
            constants=constants, grid=(f"cdiv(T, {said['tiles']})", "H", "B"), warps=4, stages=1, dtype="float32",
            head_dim=call.head_dim, value_dim=call.value_dim, rank=rank,
        )  # fmt: skip

    def work(self, call: OpCall, program: Program) -> Work:
        """What goes through device memory. That it looks at each row thirty times is in the constants."""
        sizes = call.shapes.get("scores", ())
        if len(sizes) != 4 or None in sizes:
            raise Unsupported("sizes", "the cost of a launch needs the shape of its scores")
        batch, heads, tiles, columns = (int(n or 0) for n in sizes)
        rows = batch * heads * ceil(tiles / call.attributes["tiles"])
        return Work(0.0, 0.0, 0.0, 4.0 * columns * (batch * heads * tiles + 2 * rows), rows)


def _verdict(check: Callable[[OpCall], None], call: OpCall) -> Verdict:
    try:
        check(call)
    except Unsupported as error:
        return Verdict.of(error)
    return Verdict.yes("any lengths")


def _tactics(call: OpCall) -> list[Tactic]:
    """Best first, by rule; the last one is small."""
    dim = padded(call.head_dim)
    if (members := call.attributes["block"] // call.attributes["stride"]) > TILE or call.attributes["span"] > 1:
        # A tile is one token as a rule: nothing is loaded ahead, and there are few rows.
        wide = max(members, 128 if dim <= 128 else TILE)
        more = [_tactic(128, wide, 8, 1)] if dim <= 128 else []
        return [_tactic(64, wide, 4, 1), *more, _tactic(16, max(members, TILE), 4, 1)]
    small = _tactic(64 if dim <= 128 else 16, TILE, 4, 1)
    if dim > 128:
        return [_tactic(64, TILE, 4, 2), small]
    if dim != split(call.head_dim)[0]:  # in two parts: 128 rows spill on sm_80
        return [_tactic(64, 128, 4, 3), small]
    return [_tactic(128, 128, 8, 3), _tactic(64, 128, 4, 3), small]


def _tactic(rows: int, across: int, warps: int, stages: int) -> Tactic:
    return Tactic(f"triton-bm{rows}-bn{across}-w{warps}-s{stages}", {"BM": rows, "BN": across}, warps, stages)
