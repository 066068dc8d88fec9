"""How long a launch takes, before it is made: from the work that it does and constants that were measured once.

A GPU runs one block of the Gluon kernel a multiprocessor, so that blocks come in rounds; a block costs something to
begin and end, then what its products, score elements and masked score elements cost:

    ms = launch + load * (block + (flops * flop + scores * score + masked * mask) / blocks),

where load is what the busiest multiprocessor does, in blocks of average length: the number of rounds where blocks are
alike; the longest are first. Products and scores cost ``parts`` times as much where a head dim is multiplied in two
parts; and it is no less than the bytes take. Where ``beside`` blocks share a multiprocessor a round is a part as long.
The constants are fitted by ``tools/bench fit`` to a sweep; the configurations of another say how far off it is
(``cost.toml``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import Program, Work
from attncompile.kernels.stream_cost import StreamCost

LINEAR = "LinearAttention"
STATES = "LinearAttentionStates"
WGMMA = 64
"""Rows of a product of one group of four warps."""
DECAYS = {2: "-token", 3: "-gated"}
"""The kernels' constant ``DECAY`` where it is a tensor: a number a token, or one a channel."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Constants of one language's kernels on one architecture, in nanoseconds: of a launch, of a block, of 10^9 flops
    of one block, of a million score elements and of a million masked ones, and the factor ``parts``;
    ``beside``; ``multiprocessors`` and bytes a nanosecond of the GPU that they were measured on. ``withheld``: the
    largest relative error on configurations not fitted.
    """

    launch: float
    block: float
    flop: float
    score: float
    mask: float
    parts: float
    beside: int
    multiprocessors: int
    bandwidth: float
    withheld: float
    measured_on: str

    def features(self, work: Work) -> tuple[float, float, float, float, float]:
        """What the constants are multiplied by, in their order."""
        return features(work, self.multiprocessors, self.parts, self.beside)

    def milliseconds(self, work: Work) -> float:
        constants = (self.launch, self.block, self.flop, self.score, self.mask)
        computed = sum(c * f for c, f in zip(constants, self.features(work), strict=True))
        return max(computed, self.launch + work.bytes / self.bandwidth) * 1e-6


def features(work: Work, multiprocessors: int, parts: float, beside: int) -> tuple[float, float, float, float, float]:
    """Launches, blocks, 10^9 flops, 10^6 scores and 10^6 masked scores that one multiprocessor has to do."""
    load = busiest(work.blocks / multiprocessors, work.peak, beside)
    share = load / work.blocks * (parts if work.parted else 1.0)
    return 1.0, load, work.flops * share * 1e-9, work.scores * share * 1e-6, work.masked * share * 1e-6


def busiest(rounds: float, peak: float, beside: int) -> float:
    """What the multiprocessor does that has the longest block of each of ``rounds`` (blocks over multiprocessors), in
    blocks of average length: their lengths are taken to fall evenly from ``peak`` to 2 - ``peak``, as they do under a
    triangle; from above 2 to 0, which all others are.
    """
    count = ceil(rounds * beside)
    fall = (2.0 * (peak - 1.0) if peak <= 2.0 else peak * peak / 2.0) / (rounds * beside)
    return max(sum(max(peak - fall * k, 0.0) for k in range(count)) / beside, peak)


@cache
def table() -> Mapping[str, CostModel | StreamCost]:
    """By ``model_name``."""
    text = (files("attncompile.kernels") / "cost.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text).items()
    return {name: (StreamCost if "slots" in values else CostModel)(**values) for name, values in known}


def model_name(program: Program, architecture: int) -> str:
    """Which constants hold: ``gluon-90``; ``-window`` for windows of a sequence, whose blocks are short; ``-lists`` for
    lists of blocks; ``-scores`` and ``-select`` for what makes them, around an anchor ``-highest`` and ``-near``;
    ``-bias`` where every score element has a value of its own to read; ``-softcap``; ``-pair`` where two blocks share a
    multiprocessor. Of linear attention ``-linear-state`` and so on by the op, with ``-hedgehog`` where features are
    learned, ``-token`` and ``-gated`` where each token, or each of its channels, has a decay of its own, and ``-short``
    where a state has fewer rows than the tensor cores' largest product.
    """
    pair = "-pair" if program.constants.get("CONSUMERS") == 1 else ""
    return f"{program.language}-{architecture}{_kind(program)}{pair}"


def _kind(program: Program) -> str:
    if program.op.startswith(LINEAR):
        decay = 3 if program.function.endswith(":gated_output") else int(program.constants.get("DECAY") or 0)
        kind = "-hedgehog" if "W" in program.constants else DECAYS.get(decay, "")
        if program.op == STATES and program.head_dim < WGMMA:
            kind += "-short"
        return f"-linear-{program.op.removeprefix(LINEAR).lower()}{kind}"
    if program.op == "BlockScores":
        return "-highest" if program.constants.get("HIGHEST") else "-scores"
    if program.op == "BlockSelect":
        return "-near" if program.function.endswith(":near") else "-select"
    if program.constants.get("BLOCK"):
        return "-lists"
    if {"bias", "mask"} & {a.name for a in program.arguments}:
        return "-bias"
    if program.constants.get("SOFTCAP"):
        return "-softcap"
    return "-window" if program.constants.get("HAS_LEFT") else ""


def milliseconds(work: Work, program: Program, architecture: int) -> float:
    """Predicted time of a launch. Raises ``Unsupported`` where nothing was measured."""
    return constants(model_name(program, architecture)).milliseconds(work)


def constants(name: str) -> CostModel | StreamCost:
    """Those of ``model_name``. Raises ``Unsupported`` where nothing was measured."""
    if name not in table():
        language, architecture = name.split("-")[:2]
        known = ", ".join(sorted(table()))
        what = f"{language} kernels on sm_{architecture} of this kind, {name}"
        raise Unsupported("cost", f"no cost was measured for {what} (only for {known})")
    return table()[name]
