"""What blocks that are chosen when the model runs, and heads in other orders of their tokens, cost on a CPU:
`python tools/bench_chosen.py` prints two tables.

Each line is the attention of two heads of 64 alone, in ONNX Runtime, float32, on one thread: the body of
`BlockSparseAttention` with the choice of its blocks, against product, mask, softmax, product. Times are those of the
processor, medians of paired rounds. Random operands say nothing of accuracy: `xattention` keeps as few as it may, and
`anchor` what is above its first and own blocks by chance, a third. Below them stand windows that are fixed, and what
means of the rest add.

In the second table heads have a window of one block to each side, of tokens as they stand, and of tokens in another
order of the grid's axes, gathers included. `row` is what they add, in score elements of dense attention for two rows
of a head that are moved (of query and output, of key and value): twice `MOVE` in `plugins/block_sparse/per_head.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from attncompile.core.grid import TokenGrid
from attncompile.core.site import AttentionSite
from attncompile.plugins import mechanism
from tests.plugins.conftest import Case

HEADS, HEAD_DIM = 2, 64
SIZES = ((1024, 64, False), (2048, 64, True), (4096, 128, True))
"""Tokens, edge of the blocks, whether causal."""
GRIDS = (((24, 43), 64), ((7, 16, 18), 64), ((13, 16, 20), 128))
"""Of the second table: the grid, and the edge of the blocks."""
CHOICES = (
    "pooled 0.1",
    "pooled 0.25",
    "pooled 0.5",
    "xattention 0.01",
    "anchor 0",
    "pooled 0.25 rest 64",
    "sinks 0 window 1",
    "sinks 0 window 4",
    "sinks 0 window 1 rest 16",
)


def dense(tokens: int, causal: bool) -> ModelProto:
    """Attention as exporters write it."""
    nodes = [
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scores"]),
    ]
    constants, scores = [numpy_helper.from_array(np.array(HEAD_DIM**-0.5, np.float32), "scale")], "scores"
    if causal:
        hidden = np.where(np.tri(tokens, dtype=bool), 0, -np.inf).astype(np.float32)
        constants.append(numpy_helper.from_array(hidden[None, None], "mask"))
        nodes.append(helper.make_node("Add", ["scores", "mask"], ["masked"]))
        scores = "masked"
    nodes += [
        helper.make_node("Softmax", [scores], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["o"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, HEADS, tokens, HEAD_DIM]) for n in "qkvo"]
    graph = helper.make_graph(nodes, "dense", values[:3], values[3:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def runner(model: ModelProto, feeds: Mapping[str, Any]) -> Callable[[], float]:
    """Processor seconds of one run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run() -> float:
        begin = time.process_time()
        session.run(None, feeds)
        return time.process_time() - begin

    run()
    return run


@dataclass(frozen=True)
class Gridded(Case):
    """A case whose tokens are a grid."""

    grid: TokenGrid | None = None

    def site(self, **changes: Any) -> AttentionSite:
        return super().site(**{"grid": self.grid, **changes})


def case_of(tokens: int, causal: bool = False, layout: str = "BHND", shape: tuple[int, ...] = ()) -> Gridded:
    grid = TokenGrid(shape) if shape else None
    return Gridded(
        batch=1, queries=tokens, static=True, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, value_dim=HEAD_DIM,
        layouts=(layout,) * 4, causal=causal, scale=HEAD_DIM**-0.5, grid=grid,
    )  # fmt: skip


def orders(rounds: int) -> Table:
    """What bringing heads to another order and back takes."""
    lists = mechanism("BlockSparseAttention")
    table = Table("grid", "layout", "dense ms", "as they stand", "ordered", "gain", "row", box=SIMPLE)
    for shape, edge in GRIDS:
        tokens, order = TokenGrid(shape).tokens, ",".join(map(str, reversed(range(len(shape)))))
        for layout in ("BHND", "BNHD"):
            case = case_of(tokens, layout=layout, shape=shape)
            runs = [runner(dense(tokens, False), case_of(tokens).feeds())]
            for said in ("", f"order {order} "):
                given = {"edge": edge, "masked_rows": "zero", "heads": [f"{said}sinks 0 window 1"] * HEADS}
                runs.append(runner(case.model(lists, given), case.feeds()))
            found = [[run() for run in runs] for _ in range(rounds)]
            took = [statistics.median(side) for side in zip(*found, strict=True)]
            gain = statistics.median(d / o for d, _, o in found)
            row = statistics.median(o - s for _, s, o in found) / (2 * HEADS * tokens) / (took[0] / HEADS / tokens**2)
            name = "x".join(map(str, shape))
            table.add_row(name, layout, *(f"{t * 1e3:.1f}" for t in took), f"{gain:.2f}x", f"{row:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    lists = mechanism("BlockSparseAttention")
    table = Table("tokens", "blocks of", "", "heads", "dense ms", "ours ms", "gain", box=SIMPLE)
    for tokens, edge, causal in SIZES:
        case = case_of(tokens, causal)
        feeds = case.feeds()
        base = runner(dense(tokens, causal), feeds)
        for text in CHOICES:
            ours = runner(case.model(lists, {"edge": edge, "heads": [text] * HEADS}), feeds)
            pairs = [(base(), ours()) for _ in range(rounds)]
            gain = statistics.median(b / o for b, o in pairs)
            took = [f"{statistics.median(side) * 1e3:.1f}" for side in zip(*pairs, strict=True)]
            table.add_row(str(tokens), str(edge), "causal" if causal else "", text, *took, f"{gain:.2f}x")
    Console().print(table)
    Console().print(orders(rounds))


if __name__ == "__main__":
    main()
