"""What bringing heads to another order of the grid's axes takes in ONNX Runtime's CUDA provider: one gather of all rows
of all heads, as ``plugins/block_sparse/head_orders.py`` writes it. A chain of them is timed, one after another.
``over_bytes`` is what one takes over what its bytes take by the cost model's bandwidth: ``MOVING`` in
``attncompile/gpu_cost.py``.
"""

from __future__ import annotations

import json
import statistics
import time
from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile import measure
from attncompile.core.grid import TokenGrid
from attncompile.kernels import cost
from attncompile.measure_device import OnDevice

CASES = (((32, 32), 16, 64), ((64, 64), 16, 72), ((13, 30, 45), 12, 64), ((21, 30, 52), 24, 128))
"""The grid, heads, head dim."""
CHAIN = 20


def chain(shape: tuple[int, ...], heads: int, dim: int, layout: str, length: int) -> ModelProto:
    """x [1, heads, N, dim], or BNHD, through ``length`` gathers, each of an operand in ``layout``."""
    grid = TokenGrid(shape)
    head, places = np.arange(heads)[:, None], grid.ordered(tuple(reversed(range(len(shape)))))[None]
    rows = head * grid.tokens + places if layout == "BHND" else (places * heads + head).T
    stored = [numpy_helper.from_array(rows.astype(np.int32), "rows"),
              numpy_helper.from_array(np.array([0, -1, dim], np.int64), "flat")]  # fmt: skip
    nodes, value = [], "x"
    for step in range(length):
        nodes.append(helper.make_node("Reshape", [value, "flat"], [f"flat{step}"]))
        nodes.append(helper.make_node("Gather", [f"flat{step}", "rows"], [f"y{step}"], axis=1))
        value = f"y{step}"
    nodes.append(helper.make_node("ReduceMax", [value], ["y"], keepdims=1))
    sizes = [1, heads, grid.tokens, dim] if layout == "BHND" else [1, grid.tokens, heads, dim]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, sizes)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 1, 1, 1])
    graph = helper.make_graph(nodes, "gathers", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(rounds: int, device: str = "cuda") -> list[dict[str, Any]]:
    """Microseconds of a gather, the median of ``rounds``: what a chain of twice the length takes more, divided."""
    bandwidth = cost.constants("gluon-90").bandwidth  # bytes a nanosecond
    found = []
    for shape, heads, dim in CASES:
        for layout in ("BHND", "BNHD"):
            models = [chain(shape, heads, dim, layout, length) for length in (CHAIN, 2 * CHAIN)]
            sizes = [d.dim_value for d in models[0].graph.input[0].type.tensor_type.shape.dim]
            feed = {"x": np.zeros(sizes, np.float16)}
            provider: Any = "cuda" if device == "cuda" else "cpu"
            sessions = [
                OnDevice(measure.open_session(m.SerializeToString(), 1, provider=provider), device) for m in models
            ]
            taken = [[_seconds(session, feed) for session in sessions] for _ in range(rounds + 2)][2:]
            micro = statistics.median(long - short for short, long in taken) / CHAIN * 1e6
            least = 4 * prod(sizes) / bandwidth * 1e-3
            found.append({
                "grid": "x".join(map(str, shape)), "heads": heads, "head_dim": dim, "layout": layout,
                "microseconds": micro, "over_bytes": micro / least,
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def _seconds(session: OnDevice, feed: dict[str, np.ndarray]) -> float:
    begin = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - begin
