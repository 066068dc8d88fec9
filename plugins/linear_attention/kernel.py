"""The kernels of the linear attention ops: which calls they take, and what there is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import POINTER_ALIGN, STRIDE_UNIT, Argument, Constant, OpCall, Program, Tactic, Work
from attncompile.core.verdict import Verdict
from attncompile.plugins.kernel_arguments import HALF, int32, offsets
from attncompile.plugins.linear_attention.op import (
    APPLY,
    COMBINE,
    DELTA,
    INPUTS,
    NORMALISERS,
    OUTPUT,
    OUTPUTS,
    SOLVE,
    STATE,
    STATES,
    STEP,
    register,
)
from attncompile.plugins.linear_attention.work import work

PACKAGE = "attncompile.plugins.linear_attention"
MAPS = {"none": 0, "relu": 1, "elu+1": 2, "exp": 3, "softmax": 4}
CHUNKS = tuple(1 << n for n in range(4, 13))
"""Tokens of a chunk under a triangle: whole tiles of them."""

CHANNEL_CHUNKS = (16, 32, 64)
"""Under gates of every channel, where a chunk is one tile."""

HEDGEHOG = "hedgehog"

DECAYS = {1: 1, 3: 2, 4: 3}
"""Axes of ``log_decay`` -> the kernels' constant."""

CAUSAL = (STATES, OUTPUT, STEP, SOLVE, DELTA)
CHUNKED = (STATES, OUTPUT, DELTA)
TILES = (16, 32, 64)
"""Tokens of a tile of the delta rule."""

OPERANDS = ("query", "key", "value", "output")
WIDE = ("state", "total", "mean", "top", "initial_state", "initial_total", "solved")
"""Inputs in float32."""


class _LinearKernel:
    """What the kernels of all ops share. Any lengths, static or dynamic; tokens as the last axis (BHDN) where the file
    fixes their number.
    """

    op: str
    module = "kernel_triton"
    function: str

    def register(self) -> None:
        register()

    def call(self, node: OpCall) -> OpCall:
        """``columns`` hold, for each operand whose last axis is that of the tokens, in what units that is stepped."""
        given = dict(node.attributes)
        columns = {}
        for name in given.pop("columns", ()):
            tokens = node.query_length if name in ("query", "output") else node.key_length
            columns[name] = STRIDE_UNIT if tokens is not None and tokens % STRIDE_UNIT == 0 else 1
        given["columns"] = columns
        given["decay"] = DECAYS.get(len(node.shapes.get("log_decay", ())), 0)
        if "beta" in node.shapes:  # one number a token, or one a token and head
            given["beta"] = 1 if node.shapes["beta"][-1] == 1 else 2
        if "feature_weight" in node.shapes:
            given["width"] = node.shapes["feature_weight"][-1]
        return replace(node, attributes=given)

    def general(self, call: OpCall) -> OpCall:
        given = {k: v for k, v in call.attributes.items() if k not in ("scale", "epsilon")}
        given["floor"] = _bounded(call)
        if self.op not in CHUNKED:
            given.pop("chunk", None)
        return replace(
            call, heads=1, kv_heads=1, batch=None, query_length=None, key_length=None, shapes={}, attributes=given,
            inputs=dict(sorted(call.inputs.items())),
        )  # fmt: skip

    def standard(self, dtype: str) -> Sequence[OpCall]:
        return [self.general(self.call(c)) for c in self._usual(dtype)]

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        raise NotImplementedError

    def supports(self, call: OpCall, architecture: int) -> Verdict:
        try:
            self._check(call)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("any lengths")

    def _check(self, call: OpCall) -> None:
        if self.op != COMBINE and call.dtype not in HALF:
            raise Unsupported("dtype", f"kernels take float16 and bfloat16, not {call.dtype}", "convert with --fp16")
        for name, dim in (("head", call.head_dim), ("value", call.value_dim)):
            if not 16 <= dim <= 256 or dim % 8:
                raise Unsupported("head-dim", f"{name} dim {dim}: kernels take multiples of 8 from 16 to 256")
        if is_hedgehog(call):
            self._check_hedgehog(call)
        for name in ("query_map", "key_map") if self.op != COMBINE else ():
            if call.attributes.get(name, "none") not in (*MAPS, *([HEDGEHOG] if self.op in (STATE, APPLY) else [])):
                raise Unsupported("feature-map", f"there is no kernel of the map {call.attributes[name]}")
        if self.op in CAUSAL and call.attributes.get("key_map") == "softmax":
            raise Unsupported("feature-map", "a softmax over all keys has no causal form", "map the keys before")
        if self.op in CAUSAL and call.attributes.get("normaliser", "none") not in ("none", "sum"):
            raise Unsupported("normaliser", f"{call.attributes['normaliser']} has no causal form")
        chunks = CHANNEL_CHUNKS if call.attributes.get("decay") == DECAYS[4] else CHUNKS
        if call.attributes.get("chunk", 0) not in chunks and self.op in CHUNKED:
            raise Unsupported(
                "chunk", f"chunk {call.attributes.get('chunk')}: kernels take {', '.join(map(str, chunks))}"
            )
        if self.op in (SOLVE, DELTA):
            self._check_delta(call)
        for name, kind in call.inputs.items():
            wide = name in WIDE
            if kind not in (("float32",) if wide else (*HALF, "float32")):
                raise Unsupported("dtype", f"{name} is {kind}: kernels take {'float32' if wide else 'halves, float32'}")

    def _check_hedgehog(self, call: OpCall) -> None:
        width = call.attributes.get("width")
        if "feature_weight" not in call.inputs or not isinstance(width, int) or not 8 <= width <= 128 or width % 8:
            raise Unsupported("feature-map", f"weights of width {width}: kernels of Hedgehog's map take multiples of 8 "
                              "from 8 to 128")  # fmt: skip
        if call.attributes.get("normaliser", "none") not in ("none", "sum") or {"mean", "top"} & set(call.outputs):
            raise Unsupported("normaliser", "Hedgehog's map has kernels without a normaliser, and with a sum")
        if "key_weight" in call.inputs:
            raise Unsupported("feature-map", "there is no kernel of weighted keys with Hedgehog's map")

    def _check_delta(self, call: OpCall) -> None:
        tile = call.attributes.get("tile", 0)
        if tile not in TILES or (self.op == DELTA and call.attributes["chunk"] % tile):
            raise Unsupported(
                "chunk", f"tile {tile}: kernels take {', '.join(map(str, TILES))}, and whole ones a chunk"
            )
        if call.attributes.get("decay") == DECAYS[4]:
            raise Unsupported("decay", "there is no kernel of the delta rule with gates for every channel")

    def programs(self, call: OpCall, architecture: int) -> Sequence[Program]:
        self._check(call)
        return [self._program(call, tactic, rank) for rank, tactic in enumerate(tactics(self.op, call))]

    def trial(self, call: OpCall, tactic: Tactic) -> Program:
        """The program of a tactic that is to be tried."""
        return self._program(call, tactic, 0)

    def _program(self, call: OpCall, tactic: Tactic, rank: int) -> Program:
        constants = {**self._constants(call), **widths(call), **tactic.constants}
        module = "kernel_hedgehog" if "W" in constants else self.module
        return Program(
            op=self.op, tactic=tactic.name, language="triton", function=f"{PACKAGE}.{module}:{self.function}",
            arguments=tuple(self._arguments(call)), constants=constants, grid=self._grid(constants),
            warps=tactic.warps, stages=tactic.stages, registers=tactic.registers, dtype=call.dtype,
            head_dim=call.head_dim, value_dim=call.value_dim, rank=rank,
        )  # fmt: skip

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        raise NotImplementedError

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        raise NotImplementedError

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        raise NotImplementedError

    def _arguments(self, call: OpCall) -> list[Argument]:
        columns = call.attributes.get("columns", {})
        found: list[Argument] = []
        for name in INPUTS[self.op]:
            if name in OPERANDS:
                found.append(Argument(name, "input", call.dtype, align=POINTER_ALIGN))
            elif name in call.inputs:
                found.append(Argument(name, "input", call.inputs[name], align=POINTER_ALIGN if name in WIDE else 1))
        for name in OPERANDS:
            if name not in (*INPUTS[self.op], *OUTPUTS[self.op]):
                continue
            step = f"{name}_stride_N"
            if name in columns:
                step = f"{name}_stride_D // {columns[name]}" if columns[name] > 1 else f"{name}_stride_D"
            short = name[0]
            found += [int32(f"{short}_b", f"{name}_stride_B"), int32(f"{short}_n", step),
                      int32(f"{short}_h", f"{name}_stride_H")]  # fmt: skip
        found += offsets(call, [name for name in OPERANDS if name in INPUTS[self.op]])
        found += [int32(name, expression) for name, expression in self._extras(call)]
        for name in OUTPUTS[self.op]:
            if name in ("output", "written"):
                found.append(Argument(name, "output", call.dtype, align=POINTER_ALIGN))
            elif name in call.outputs:
                found.append(Argument(name, "output", "float32", align=POINTER_ALIGN))
        return found

    def work(self, call: OpCall, program: Program) -> Work:
        """What goes through device memory, mostly: a launch is bound by it."""
        return work(call, program)


def widths(call: OpCall) -> dict[str, Constant]:
    found: dict[str, Constant] = {"DK": call.head_dim, "K1": power(call.head_dim), "DV": call.value_dim}
    if is_hedgehog(call):
        found |= {"W": call.attributes["width"], "W1": power(call.attributes["width"])}
    return found


def is_hedgehog(call: OpCall) -> bool:
    """Whether features are those of learned weights: the op's own kernel reads none."""
    return call.op in (STATE, APPLY) and HEDGEHOG in (call.attributes.get("query_map"), call.attributes.get("key_map"))


def power(dim: int) -> int:
    """The power of two that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def units(call: OpCall, letters: Mapping[str, str]) -> dict[str, Constant]:
    """Of each operand, by its letter: whether its tokens are the last axis, and in what units the other is stepped."""
    columns = call.attributes.get("columns", {})
    found: dict[str, Constant] = {}
    for name, letter in letters.items():
        found[f"{letter}_COLUMNS"] = name in columns
        found[f"{letter}_UNIT"] = columns.get(name, STRIDE_UNIT)
    return found


def tactic(warps: int, stages: int, registers: int | None = None, **constants: int) -> Tactic:
    """Named after what it says."""
    name = "-".join(["triton", *(f"{k.lower()}{v}" for k, v in constants.items())])
    limit = f"-r{registers}" if registers else ""
    return Tactic(f"{name}-w{warps}-s{stages}{limit}", constants, warps, stages, registers)


LONGEST = 1024
"""Tokens of a chunk: on an H200, 32 heads of 128 and 8,192 tokens took 0.180 ms in chunks of 1,024, 0.186 of 512, 0.200
of 256, 0.235 of 128, 0.284 of 64 (docs/bench/linear-h200.json, the best tactics of both ops)."""

FILLS = 264
"""Blocks that fill a large GPU twice."""


SHORTEST = 1024
"""Tokens of a chunk without a triangle, at least."""


def preferred_chunk(decay: str, heads: int, tokens: int, value_dim: int) -> int:
    """Tokens of a chunk under a triangle: the longest one that leaves as many blocks as fill a GPU; at least 64.
    ``heads`` of all batch entries; ``decay`` as forms have it.
    """
    blocks = heads * -(-value_dim // 64)
    chunk = CHANNEL_CHUNKS[-1] if decay == "channel" else LONGEST
    while chunk > 64 and (blocks * -(-tokens // chunk) < FILLS or chunk >= 2 * tokens):
        chunk //= 2
    return chunk


def whole_chunk(batch: int, heads: int, tokens: int, head_dim: int, value_dim: int) -> int:
    """Tokens of a chunk without a triangle, of which there are enough to fill a GPU, all alike: the longest that leaves
    three quarters of ``FILLS`` blocks, else the shortest; at least ``SHORTEST``; 0: one chunk, of all tokens.
    """
    short = head_dim == value_dim == power(head_dim) <= 64
    blocks = batch * (-(-heads // 2) if short else heads)
    found = tokens
    for count in range(2, tokens // SHORTEST + 1):
        if 4 * blocks * (tokens // found) >= 3 * FILLS:
            break
        if tokens % count == 0 and tokens // count % 64 == 0:
            found = tokens // count
    return found if found < tokens else 0


def side_by_side(call: OpCall) -> int:
    """Heads that may share a block, so that 128 channels are read together; 1 where a head's tile has other columns
    than its channels, or does not stand alone.
    """
    dim = max(call.head_dim, call.value_dim)
    alike = call.head_dim == call.value_dim == power(dim)
    plain = call.attributes.get("key_map") != "softmax" and not {"key_weight", "mean"} & {*call.inputs, *call.outputs}
    return max(1, 128 // dim) if alike and plain else 1


def tactics(op: str, call: OpCall) -> list[Tactic]:
    """Best first, by rule. The last one is small: narrow tiles, one stage."""
    k1, v1 = power(call.head_dim), power(call.value_dim)
    wide = max(k1, v1)
    if op == COMBINE:
        return [tactic(4, 1, BK=16, BV=32, AHEAD=8) if wide >= 128 else tactic(4, 1, BK=4, BV=v1, AHEAD=16)]
    if is_hedgehog(call):
        across = max(k1, power(call.attributes["width"]))
        few = 4 if across <= 64 else 8
        if op == STATE:
            warps = 4 if across <= 32 else 8
            best = tactic(warps, 2, BV=min(v1, 64), BN=128 if across <= 64 else 32, FAST=1)
            return [best, tactic(few, 1, BV=16, BN=32, FAST=0)]
        wide_first = [tactic(8, 2, BV=v1, BM=128, FAST=1, BLOCKS=1)] if across == 128 else []
        middle = tactic(4, 1, BV=min(v1, 64), BM=64, FAST=1, BLOCKS=4)
        return [*wide_first, middle, tactic(few, 1, BV=16, BM=32, FAST=0, BLOCKS=4)]
    if op == STATE:
        heads = min(side_by_side(call), 2)
        across = wide * heads
        values = min(v1, 128 if k1 <= 128 else 64)
        best = tactic(8 if across >= 128 else 4, 4, BV=values, BN=32 if across >= 128 else 64, HB=heads, FAST=1)
        small = tactic(4, 2, BV=min(v1, 64 if k1 <= 128 else 32), BN=32 if wide <= 128 else 16, HB=1, FAST=0)
        return [best, small]
    if op == APPLY:
        values = min(v1, 128 if k1 <= 128 else 64)
        best = tactic(8, 2, BV=values, BM=64, FAST=1, BLOCKS=4, SUMS=1)
        if wide <= 128:
            best = tactic(4, 2, BV=values, BM=64, FAST=1, BLOCKS=3, SUMS=1)
        if wide < 128:
            best = tactic(4, 3, BV=values, BM=64, FAST=1, BLOCKS=4 if wide == 64 else 5, SUMS=1)
        return [best, tactic(4, 1, BV=min(v1, 64 if k1 <= 128 else 32), BM=32, FAST=0, BLOCKS=4, SUMS=0)]
    if op == SOLVE:
        return [tactic(1, 1, BK=min(k1, 64))]
    if op == DELTA:
        values = min(v1, 32 if k1 <= 128 else 16)
        return [tactic(4, 3, BV=values), tactic(4, 1, BV=16)]
    if op == STEP:
        return [tactic(4, 1, BV=16), tactic(2, 1, BV=16)]
    chunk = int(call.attributes["chunk"])
    gated = call.attributes.get("decay") == DECAYS[4]
    if op == STATES:
        rows = min(chunk, 32 if wide > 128 else 64)
        best = tactic(4, 4, BK=min(k1, 64), BV=min(v1, 64), BT=rows)
        if gated:
            best = tactic(8, 3, BK=min(k1, 32), BV=min(v1, 128), BT=rows)
        elif call.attributes.get("decay") == DECAYS[3] and wide == 128 and chunk >= 128:  # gates are summed once a tile
            best = tactic(8, 3, BK=min(k1, 64), BV=min(v1, 64), BT=128)
        return [best, tactic(4, 1, BK=min(k1, 64), BV=min(v1, 32), BT=min(rows, 32))]
    if gated:
        # A softmax runs over all features.
        whole = call.attributes.get("query_map") == "softmax"
        best = tactic(8 if whole else 4, 1, BK=k1 if whole else min(k1, 32), BV=min(v1, 128))
        return [best, tactic(4, 1, BK=k1 if whole else min(k1, 32), BV=min(v1, 32))]
    best = tactic(4, 2, BV=min(v1, 64 if k1 <= 128 else 32), BT=min(chunk, 64 if k1 <= 128 else 32))
    return [best, tactic(4, 1, BV=min(v1, 32), BT=min(chunk, 32 if k1 <= 128 else 16))]


class StateKernel(_LinearKernel):
    op, function = STATE, "state"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        return [
            *(OpCall(STATE, dtype, 1, 1, d, d, {"key_map": "relu"}, outputs=("state", "total")) for d in (32, 64, 128)),
            *(OpCall(STATE, dtype, 1, 1, d, d, {"key_map": HEDGEHOG}, {"feature_weight": dtype},
                     {"feature_weight": (1, d, d)}, ("state", "total")) for d in (64, 128)),
        ]  # fmt: skip

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        read = units(call, {"key": "K", "value": "V"})
        return read if is_hedgehog(call) else {"MAP": MAPS[call.attributes["key_map"]], **read}

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NK", "NK"), ("chunk", "chunk"), ("C", "cdiv(NK, chunk)"), ("groups", "HKV"))

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        return _turned(f"cdiv(NK, chunk) * {_values(constants)}", "HKV", constants)


class CombineKernel(_LinearKernel):
    op, function = COMBINE, "combine"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        given = {"state": "float32", "total": "float32"}
        outputs = ("whole_state", "whole_total")
        return [OpCall(COMBINE, "float32", 1, 1, d, d, inputs=given, outputs=outputs) for d in (32, 64, 128)]

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        return {}

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("C", "C"),)

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        features = -(-int(constants["DK"] or 0) // int(constants["BK"] or 1))
        return (str(features * _values(constants)), "HKV", "B")


class ApplyKernel(_LinearKernel):
    op, function = APPLY, "apply"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        said = {"query_map": "relu", "normaliser": "sum", "floor": -inf}
        given = {"state": "float32", "total": "float32"}
        learned, weights = {**said, "query_map": HEDGEHOG}, {**given, "feature_weight": dtype}
        return [
            *(OpCall(APPLY, dtype, 1, 1, d, d, said, given, outputs=("output",)) for d in (32, 64, 128)),
            *(OpCall(APPLY, dtype, 1, 1, d, d, learned, weights, {"feature_weight": (1, d, d)}, ("output",))
              for d in (64, 128)),
        ]  # fmt: skip

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        read = {**_normaliser(call), **units(call, {"query": "Q", "output": "O"})}
        return read if is_hedgehog(call) else {"MAP": MAPS[call.attributes["query_map"]], **read}

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NQ", "NQ"), ("C", "C"), ("group", "H // HKV"), ("groups", "HKV"), *_numbers(call))

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        # Blocks for each multiprocessor; each reads the state once and then tile after tile.
        values = _values(constants)
        tiles = f"min(cdiv(NQ, {constants['BM']}), max(SMS * {constants['BLOCKS']} // (H * B), 1))"
        return _turned(f"{tiles} * {values}" if values > 1 else tiles, "H", constants)


class StatesKernel(_LinearKernel):
    op, function, module = STATES, "states", "kernel_causal"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        return [_causal(STATES, dtype, d, axes, ("state",)) for d in (64, 128) for axes in (1, 3, 4)]

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        return {"MAP": MAPS[call.attributes["key_map"]], "DECAY": call.attributes["decay"],
                "CHUNK": call.attributes["chunk"], **units(call, {"key": "K", "value": "V"})}  # fmt: skip

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NK", "NK"), ("C", "cdiv(NK, chunk)"))

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        features = -(-int(constants["DK"] or 0) // int(constants["BK"] or 1))
        return (str(features * _values(constants)), "HKV", "B")


class OutputKernel(_LinearKernel):
    op, function, module = OUTPUT, "output", "kernel_causal"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        return [_causal(OUTPUT, dtype, d, axes, ("output",)) for d in (64, 128) for axes in (1, 3, 4)]

    def _program(self, call: OpCall, tactic: Tactic, rank: int) -> Program:
        made = super()._program(call, tactic, rank)
        if call.attributes["decay"] != DECAYS[4]:
            return made
        constants = {k: v for k, v in made.constants.items() if k != "DECAY"}
        return replace(made, function=f"{PACKAGE}.{self.module}:gated_output", constants=constants)

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        said = call.attributes
        letters = {"query": "Q", "key": "K", "value": "V", "output": "O"}
        return {"Q_MAP": MAPS[said["query_map"]], "K_MAP": MAPS[said["key_map"]], "DECAY": said["decay"],
                "CHUNK": said["chunk"], **_normaliser(call), **units(call, letters)}  # fmt: skip

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NQ", "NQ"), ("C", "C"), ("group", "H // HKV"), *_numbers(call))

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        values = _values(constants)
        return (f"C * {values}" if values > 1 else "C", "H", "B")


class SolveKernel(_LinearKernel):
    op, function, module = SOLVE, "solve", "kernel_delta"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        return [_delta(SOLVE, dtype, d, axes) for d in (64, 128) for axes in (0, 3)]

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        said = call.attributes
        return {"MAP": MAPS[said["key_map"]], "DECAY": said["decay"], "BETA": said["beta"], "BT": said["tile"],
                **units(call, {"key": "K"})}  # fmt: skip

    def _program(self, call: OpCall, tactic: Tactic, rank: int) -> Program:
        made = super()._program(call, tactic, rank)
        return replace(made, constants={k: v for k, v in made.constants.items() if k != "DV"})

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NK", "NK"),)

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        return (f"cdiv(NK, {constants['BT']})", "HKV", "B")


class DeltaKernel(_LinearKernel):
    op, function, module = DELTA, "delta", "kernel_delta"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        return [_delta(DELTA, dtype, d, axes) for d in (64, 128) for axes in (0, 3)]

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        said = call.attributes
        return {"MAP": MAPS[said["key_map"]], "DECAY": said["decay"], "CHUNK": said["chunk"], "BT": said["tile"],
                **units(call, {"key": "K", "value": "V"})}  # fmt: skip

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NK", "NK"), ("C", "cdiv(NK, chunk)"))

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        return (str(_values(constants)), "HKV", "B")


def _delta(op: str, dtype: str, dim: int, axes: int) -> OpCall:
    """A call of the delta rule, gated where there are ``axes``, in tiles and chunks of 64."""
    said: dict[str, Any] = {"key_map": "none", "tile": 64}
    given, shapes = {"beta": dtype}, {"beta": (2, 2, 2)}
    if op == DELTA:
        said, given, shapes = said | {"chunk": 64}, {"solved": "float32"}, {}
    if axes:
        given, shapes = given | {"log_decay": "float32"}, shapes | {"log_decay": (2, 2, 2)}
    outputs = ("solved",) if op == SOLVE else ("written", "state")
    return OpCall(op, dtype, 1, 1, dim, dim, said, given, shapes, outputs)


class StepKernel(_LinearKernel):
    op, function, module = STEP, "step", "kernel_step"

    def _usual(self, dtype: str) -> Sequence[OpCall]:
        """Decoding with a state: Mamba-2 and Lightning attention, GLA, the gated delta rule."""
        said: dict[str, Any] = {"key_map": "none", "query_map": "none", "normaliser": "none", "floor": -inf}
        found = []
        for d in (64, 128):
            for axes, delta in ((1, False), (3, False), (4, False), (3, True)):
                given = {"log_decay": "float32", **({"beta": dtype} if delta else {}), "initial_state": "float32"}
                shapes = {"log_decay": (2,) * axes, **({"beta": (2,) * 3} if delta else {})}
                found.append(OpCall(STEP, dtype, 1, 1, d, d, said, given, shapes, ("output", "final_state")))
        return found

    def _program(self, call: OpCall, tactic: Tactic, rank: int) -> Program:
        # All threads of a warp write its sums to one place: the same ones.
        return replace(super()._program(call, tactic, rank), fused=False)

    def _constants(self, call: OpCall) -> dict[str, Constant]:
        said = call.attributes
        letters = {"query": "Q", "key": "K", "value": "V", "output": "O"}
        return {"Q_MAP": MAPS[said["query_map"]], "K_MAP": MAPS[said["key_map"]], "DECAY": said["decay"],
                "BETA": said.get("beta", 0), **_normaliser(call), **units(call, letters)}  # fmt: skip

    def _extras(self, call: OpCall) -> Sequence[tuple[str, str]]:
        return (("NK", "NK"), ("group", "H // HKV"), *_numbers(call))

    def _grid(self, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
        return (str(_values(constants)), "HKV", "B")


def _causal(op: str, dtype: str, dim: int, axes: int, outputs: tuple[str, ...]) -> OpCall:
    """A call with a decay of ``axes`` axes in chunks of 64."""
    said: dict[str, Any] = {"key_map": "none", "chunk": 64}
    given = {"log_decay": "float32"}
    if op == OUTPUT:
        said |= {"query_map": "none", "normaliser": "none", "floor": -inf}
        given |= {"state": "float32"}
    return OpCall(op, dtype, 1, 1, dim, dim, said, given, {"log_decay": (1,) * axes}, outputs)


def _turned(places: str, heads: str, constants: Mapping[str, Constant]) -> tuple[str, str, str]:
    """The grid of blocks by place and head; with ``FAST`` neighbours in memory, which are heads, run together."""
    heads = f"cdiv({heads}, {constants['HB']})" if constants.get("HB", 1) != 1 else heads
    return (heads, places, "B") if constants["FAST"] else (places, heads, "B")


def _values(constants: Mapping[str, Constant]) -> int:
    """Tiles of the values' channels."""
    return -(-int(constants["DV"] or 0) // int(constants["BV"] or 1))


def _normaliser(call: OpCall) -> dict[str, Constant]:
    return {"NORM": NORMALISERS.index(call.attributes["normaliser"]), "FLOOR": _bounded(call)}


def _bounded(call: OpCall) -> bool:
    """Whether the sum has a least value; of a general call, which says just that, the same."""
    floor = call.attributes.get("floor", False)
    return floor is True or (floor is not False and floor > -inf)


def _numbers(call: OpCall) -> Sequence[tuple[str, str]]:
    floor = _normaliser(call)["FLOOR"]
    return (("scale", "scale_bits"), ("epsilon", "epsilon_bits"), *([("floor", "floor_bits")] if floor else []))
