"""How long a launch takes whose blocks stream their operands, many to a multiprocessor: those of linear attention.

Few blocks take as long as the longest one waits for its tiles, one after the other; many share a multiprocessor, at no
cost up to ``slots`` of them; and all of them together take what the memory needs:

    ms = launch + moved * bytes
         + load * (block + steps * step + (flops * flop + scores * score + bytes * byte) / blocks),

where load is 1 up to ``slots`` blocks a multiprocessor and grows with their number from there. It is no less than the
bytes take at the rate of a copy. The constants are fitted by ``tools/bench fit`` to a sweep of ``tools/bench linear``.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.core.kernel import Work


@dataclass(frozen=True, slots=True)
class StreamCost:
    """Constants of one op's kernels on one architecture, in nanoseconds: of a launch, of a block, of a tile that it
    goes through, of 10^9 flops, 10^6 score elements and 10^6 bytes of one block, and of 10^6 bytes of all of them.
    ``slots``, ``multiprocessors`` and bytes a nanosecond of the GPU that they were measured on. ``withheld``: the
    largest relative error on configurations not fitted.
    """

    launch: float
    block: float
    step: float
    flop: float
    score: float
    byte: float
    moved: float
    slots: int
    multiprocessors: int
    bandwidth: float
    withheld: float
    measured_on: str

    def milliseconds(self, work: Work) -> float:
        constants = (self.launch, self.block, self.step, self.flop, self.score, self.byte, self.moved)
        terms = zip(constants, streamed(work, self.multiprocessors, self.slots), strict=True)
        return max(sum(c * f for c, f in terms), self.launch + work.bytes / self.bandwidth) * 1e-6


def streamed(work: Work, multiprocessors: int, slots: int) -> tuple[float, ...]:
    """What the constants of ``StreamCost`` are multiplied by, in their order."""
    load = max(1.0, work.blocks / (multiprocessors * slots))
    share = load / work.blocks
    own = (work.flops * share * 1e-9, work.scores * share * 1e-6, work.bytes * share * 1e-6)
    return (1.0, load, work.steps * load, *own, work.bytes * 1e-6)
