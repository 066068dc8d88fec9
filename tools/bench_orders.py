"""What heads in another order of the grid's axes cost on a CPU: `python tools/bench_orders.py` prints a table.

Each line is the attention of `HEADS` heads of 64 alone, in ONNX Runtime, float32, on one thread: against product, softmax,
product of all tokens, the body of `BlockSparseAttention` with a window of one block to each side in the order of the
tokens, and with the same blocks of another order, gathers included. `row` is what they add, in score elements of dense
attention for each row of a head that is moved (of query and output, of key and value): `MOVE` in
`plugins/block_sparse/per_head.py` is what is predicted. Times are those of the processor, medians of paired rounds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from attncompile.core.grid import TokenGrid
from attncompile.plugins import mechanism
from tests.plugins.conftest import Case
from tools.bench_chosen import dense, runner

HEADS, HEAD_DIM = 2, 64
SIZES = (((24, 43), 64), ((7, 16, 18), 64), ((13, 16, 20), 128))
"""The grid, and the edge of the blocks."""


@dataclass(frozen=True)
class Gridded(Case):
    """A case whose tokens are a grid."""

    grid: TokenGrid | None = None

    def site(self, **changes: Any) -> Any:
        return super().site(**{"grid": self.grid, **changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    lists = mechanism("BlockSparseAttention")
    table = Table("grid", "layout", "dense ms", "as they stand", "ordered", "gain", "row", box=SIMPLE)
    for shape, edge in SIZES:
        grid = TokenGrid(shape)
        tokens, order = grid.tokens, ",".join(map(str, reversed(range(len(shape)))))
        for layout in ("BHND", "BNHD"):
            case = Gridded(
                batch=1, queries=tokens, static=True, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM,
                value_dim=HEAD_DIM, layouts=(layout,) * 4, scale=HEAD_DIM**-0.5, grid=grid,
            )  # fmt: skip
            plain = Gridded(**{**vars(case), "layouts": ("BHND",) * 4})
            runs = [runner(dense(tokens, False), plain.feeds())]
            for said in ("", f"order {order} "):
                given = {"edge": edge, "masked_rows": "zero", "heads": [f"{said}sinks 0 window 1"] * HEADS}
                runs.append(runner(case.model(lists, given), case.feeds()))
            found = [[run() for run in runs] for _ in range(rounds)]
            took = [statistics.median(side) for side in zip(*found, strict=True)]
            gain = statistics.median(d / o for d, _, o in found)
            element = took[0] / (HEADS * tokens**2)
            row = statistics.median(o - s for _, s, o in found) / (2 * HEADS * tokens) / element
            table.add_row("x".join(map(str, shape)), layout, *(f"{t * 1e3:.1f}" for t in took), f"{gain:.2f}x",
                          f"{row:.1f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
