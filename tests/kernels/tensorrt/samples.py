"""Models of one node each, which together have every op with kernels, element type, optional input and layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from onnx import ModelProto, TensorProto, helper

HOUSE = "attncompile"
Dim = int | str
HALF, BRAIN, FLOAT, BOOL = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.BOOL


@dataclass(frozen=True)
class Sample:
    """One node of ours. ``inputs`` in the schema's order, "" for one that is left out; ``sizes``: smallest, usual and
    largest size of its dynamic axes.
    """

    name: str
    op: str
    inputs: Mapping[str, tuple[int, tuple[Dim, ...]]]
    order: tuple[str, ...]
    outputs: tuple[str, ...] = ("output",)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    slow: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> ModelProto:
        given = ["" if n not in self.inputs else n for n in self.order]
        while given and not given[-1]:
            given.pop()
        node = helper.make_node(self.op, given, list(self.outputs), "node", domain=HOUSE, **self.attributes)
        kinds = {"log_sum_exp": FLOAT}
        first = next(iter(self.inputs.values()))[0]
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info(n, k, d) for n, (k, d) in self.inputs.items()],
            [helper.make_tensor_value_info(n, kinds.get(n, first), None) for n in self.outputs],
        )  # fmt: skip
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(HOUSE, 1)], ir_version=10
        )


LONG = {"B": (1, 2, 3), "N": (1, 100, 333), "M": (1, 130, 401)}
DENSE = ("query", "key", "value", "key_mask", "bias", "sinks", "mask", "key_lengths")
HOOD = ("query", "key", "value", "key_mask", "bias", "sinks", "window_bias")


def operands(
    kind: int = HALF, dim: int = 32, layouts: str = "nnn", heads: int = 4, kv_heads: int = 2, batch: Dim = "B",
    queries: Dim = "N", keys: Dim = "M",
) -> dict[str, tuple[int, tuple[Dim, ...]]]:  # fmt: skip
    """query, key and value; a layout is ``n`` (BNHD) or ``h`` (BHND)."""
    found: dict[str, tuple[int, tuple[Dim, ...]]] = {}
    for name, layout, n, h in zip(("query", "key", "value"), layouts, (queries, keys, keys),
                                  (heads, kv_heads, kv_heads), strict=True):  # fmt: skip
        found[name] = (kind, (batch, n, h, dim) if layout == "n" else (batch, h, n, dim))
    return found


def dense(name: str, more: Any = None, outputs: tuple[str, ...] = ("output",), sizes: Any = None, kind: int = HALF,
          layouts: str = "nnnn", attributes: Any = None, **of: Any) -> Sample:  # fmt: skip
    spelled = {f"{x}_layout": "BHND" for x, c in zip("qkvo", layouts, strict=True) if c == "h"}
    return Sample(
        name, "Attention", {**operands(kind, layouts=layouts[:3], **of), **(more or {})}, DENSE, outputs,
        {"scale": 0.25, **spelled, **(attributes or {})}, LONG if sizes is None else sizes,
    )  # fmt: skip


def grid(name: str, more: Any = None, kind: int = HALF, attributes: Any = None, **of: Any) -> Sample:
    return Sample(
        name, "NeighborhoodAttention", {**operands(kind, queries=35, keys=35, **of), **(more or {})}, HOOD, ("output",),
        {"scale": 0.25, "kernel_size": [3, 3], "grid": [5, 7], **(attributes or {})}, {"B": (1, 2, 3)},
    )  # fmt: skip


QUICK = (
    dense("dense"),
    dense("causal, bfloat16, heads first", kind=BRAIN, layouts="hhhh", attributes={"right": 0}),
    dense("window, mixed layouts", layouts="nhnh", attributes={"left": 9, "right": 3}),
    dense("static", batch=2, queries=37, keys=50, sizes={}),
    dense("key mask", {"key_mask": (BOOL, ("B", 1, 1, "M"))}),
    grid("neighborhood"),
)  # fmt: skip
SLOW = (
    dense("log-sum-exp", outputs=("output", "log_sum_exp"), layouts="hhhn"),
    dense(
        "all inputs", {
            "key_mask": (BOOL, ("B", 1, 1, "M")), "bias": (FLOAT, (1, 4, "N", "M")), "sinks": (FLOAT, (4,)),
            "mask": (BOOL, ("B", 1, "N", "M")), "key_lengths": (TensorProto.INT64, ("B",)),
        }, ("output", "log_sum_exp"), attributes={"softcap": 5.0},
    ),
    dense("bias of one row, bfloat16", {"bias": (BRAIN, ("M",))}, kind=BRAIN),
    dense("key lengths in int32", {"key_lengths": (TensorProto.INT32, ("B",))}, attributes={"right": 0}),
    grid("neighborhood, bfloat16", kind=BRAIN, attributes={"border": "clamp"}),
    grid("neighborhood with inputs", {"key_mask": (BOOL, ("B", 1, 1, 35)), "bias": (HALF, (1, 4, 35, 35))}),
    Sample("sliding window", "NeighborhoodAttention", operands(keys="N"), HOOD, ("output",),
           {"scale": 0.25, "kernel_size": [9], "left": [8], "causal": [1]}, LONG),
)  # fmt: skip
SAMPLES = (*QUICK, *(replace(s, slow=True) for s in SLOW))
"""Head dims are small: kernels then compile in about a second. Every op that has kernels is here (tested)."""
