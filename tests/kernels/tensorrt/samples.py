"""Models of one node each, which together have every op with kernels, element type, optional input and layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from onnx import ModelProto, TensorProto, helper

from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, INPUTS, OUTPUT, SOLVE, STATE, STATES, STEP

HOUSE = "attncompile"
Dim = int | str
HALF, BRAIN, FLOAT, BOOL = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.BOOL
INT32 = TensorProto.INT32


_OTHERS = {"rows": INT32, "columns": INT32, "kinds": INT32}


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
        kinds = dict.fromkeys(("output", "written"), next(iter(self.inputs.values()))[0])
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info(n, k, d) for n, (k, d) in self.inputs.items()],
            [helper.make_tensor_value_info(n, {**kinds, **_OTHERS}.get(n, FLOAT), None) for n in self.outputs],
        )  # fmt: skip
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(HOUSE, 1)], ir_version=10
        )


LONG = {"B": (1, 2, 3), "N": (1, 100, 333), "M": (1, 130, 401)}
DENSE = ("query", "key", "value", "key_mask", "bias", "sinks", "mask", "key_lengths")
HOOD = ("query", "key", "value", "key_mask", "bias", "sinks", "window_bias")
SPARSE = (
    "query", "key", "value", "rows", "columns", "kinds", "masks", "key_mask", "bias", "sinks", "order", "counts"
)  # fmt: skip


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


def sparse(
    name: str, sets: tuple[Dim, Dim], rows: Dim, entries: Dim, more: Any = None, kind: int = HALF,
    outputs: tuple[str, ...] = ("output",), sizes: Any = None, attributes: Any = None, **of: Any,
) -> Sample:  # fmt: skip
    """``sets``: batch entries and heads that have lists of their own. Blocks of 64, three masks."""
    lists = {"rows": (INT32, (*sets, rows, 3)), "columns": (INT32, (entries,)), "kinds": (INT32, (entries,)),
             "masks": (INT32, (3, 64, 2))}  # fmt: skip
    return Sample(
        name, "BlockSparseAttention", {**operands(kind, **of), **lists, **(more or {})}, SPARSE, outputs,
        {"scale": 0.25, "block": 64, **(attributes or {})}, sizes or {},
    )  # fmt: skip


def linear(name: str, op: str, inputs: Any, outputs: tuple[str, ...] = ("output",), sizes: Any = None,
           **attributes: Any) -> Sample:  # fmt: skip
    return Sample(name, op, inputs, INPUTS[op], outputs, attributes, LINEAR if sizes is None else sizes)


def parts(name: str, op: str, order: tuple[str, ...], sizes: Any, tokens: Dim = "N", **attributes: Any) -> Sample:
    """Of three beside one another, beside each head, and such as a transpose has put before the tokens."""
    keys = tokens if tokens != "N" else "M"
    given = {"query": (HALF, ("B", tokens, 3, 4, 32)), "key": (HALF, ("B", keys, 4, 3, 32)),
             "value": (HALF, ("B", 3, 4, keys, 32))}  # fmt: skip
    said = {"q_layout": "BN1HD", "k_layout": "BNH1D", "v_layout": "B2HND"}
    return Sample(name, op, given, order, ("output",), {"scale": 0.25, **said, **attributes}, sizes)


LINEAR = {"B": (1, 2, 3), "N": (1, 100, 333)}
CHUNKED = {**LINEAR, "C": (1, 3, 7)}
KEY, VALUE = (HALF, ("B", "N", 2, 32)), (HALF, ("B", "N", 2, 48))
QUERY, DECAY = (HALF, ("B", "N", 4, 32)), (FLOAT, ("B", "N", 2))
CHUNKS, SUMS = (FLOAT, ("B", 2, "C", 32, 48)), (FLOAT, ("B", 2, "C", 32))
WHOLE, WHOLE_SUM = (FLOAT, ("B", 2, 1, 32, 48)), (FLOAT, ("B", 2, 1, 32))
LAST, LAST_SUM = (FLOAT, ("B", 2, 32, 48)), (FLOAT, ("B", 2, 32))

SELECT = ("rows", "columns", "kinds", "mass")


def scored(name: str, kind: int = HALF, layouts: str = "nnn", sizes: Any = None, **attributes: Any) -> Sample:
    """Scores of blocks for 4 heads on 2."""
    spelled = {f"{x}_layout": "BHND" for x, c in zip("qk", layouts, strict=False) if c == "h"}
    given = {n: x for n, x in operands(kind, layouts=layouts, keys="N").items() if n != "value"}
    return Sample(name, "BlockScores", given, ("query", "key"), ("scores",),
                  {"scale": 0.25, "stride": 16, "block": 64, **spelled, **attributes}, sizes or LONG)  # fmt: skip


def selected(name: str, heads: int = 4, **attributes: Any) -> Sample:
    """Lists for 4 heads."""
    given = {"scores": (FLOAT, ("B", 4, "T", "C")), "amount": (FLOAT, (heads,))}
    return Sample(name, "BlockSelect", given, ("scores", "amount"), SELECT, {"tiles": 4, **attributes},
                  {"B": (1, 2, 3), "T": (1, 30, 81), "C": (1, 8, 21)})  # fmt: skip


QUICK = (
    scored("scores of blocks", causal=1),
    selected("lists of what weighs enough", causal=1),
    Sample("the highest scores of keys", "BlockScores",
           {"query": (HALF, ("B", "R", 4, 32)), "key": (HALF, ("B", 2, "N", 32))}, ("query", "key"), ("scores",),
           {"scale": 0.25, "stride": 1, "block": 64, "span": 64, "reduce": "max", "causal": 1, "k_layout": "BHND"},
           {**LONG, "R": (1, 2, 6)}),
    Sample("lists around an anchor", "BlockSelect", {"scores": (FLOAT, ("B", 4, "C", "C")), "amount": (FLOAT, (4,))},
           ("scores", "amount"), SELECT, {"tiles": 1, "rule": "anchor", "causal": 1, "window": -1},
           {"B": (1, 2, 3), "C": (1, 8, 21)}),
    dense("dense"),
    dense("causal, bfloat16, heads first", kind=BRAIN, layouts="hhhh", attributes={"right": 0}),
    dense("window, mixed layouts", layouts="nhnh", attributes={"left": 9, "right": 3}),
    dense("static", batch=2, queries=37, keys=50, sizes={}),
    dense("key mask", {"key_mask": (BOOL, ("B", 1, 1, "M"))}),
    parts("parts of packed tensors", "Attention", DENSE, LONG),
    parts("parts of packed tensors, neighborhood", "NeighborhoodAttention", HOOD, {"B": (1, 2, 3)}, 35,
          kernel_size=[3, 3], grid=[5, 7]),
    grid("neighborhood"),
    sparse("lists of a file", (1, 4), 2, 5, queries=100, keys=90, sizes={"B": (1, 2, 3)}),
    linear("states of chunks", STATE, {"key": KEY, "value": VALUE}, ("state", "total"), key_map="relu", chunk=48),
    linear("chunks combined", COMBINE, {"state": CHUNKS, "total": SUMS}, ("whole_state", "whole_total"),
           {"B": (1, 2, 3), "C": (1, 5, 9)}),
    linear("whole state applied", APPLY, {"query": QUERY, "state": WHOLE, "total": WHOLE_SUM}, query_map="relu",
           normaliser="sum", epsilon=1e-6),
    linear("states before chunks", STATES, {"key": KEY, "value": VALUE, "log_decay": DECAY}, ("state",), chunk=32),
    linear("output of chunks", OUTPUT, {"query": QUERY, "key": KEY, "value": VALUE, "state": CHUNKS,
                                        "log_decay": DECAY}, sizes=CHUNKED, chunk=32, scale=0.5),
    linear("tiles of the delta rule solved", SOLVE, {"key": KEY, "log_decay": DECAY, "beta": (HALF, ("B", "N", 2))},
           ("solved",), tile=32),
    linear("what the delta rule writes", DELTA, {"key": KEY, "value": VALUE, "solved": (FLOAT, ("B", 2, "C", 32, 32)),
           "log_decay": DECAY}, ("written", "state", "final_state"), CHUNKED, chunk=32, tile=32),
    linear("a token at a time", STEP, {"query": QUERY, "key": KEY, "value": VALUE, "log_decay": DECAY,
           "initial_state": LAST}, ("output", "final_state"), scale=0.5),
)  # fmt: skip
SLOW = (
    scored("scores of pooled tokens, bfloat16", BRAIN, "hnn", stride=1, block=1),
    selected("lists of a share", 1, rule="share", sinks=0, window=2),
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
    sparse(
        "lists of a GPU, bfloat16", ("B", 4), "R", "E", {
            "key_mask": (BOOL, ("B", 1, 1, "M")), "bias": (BRAIN, (1, 4, "N", "M")), "sinks": (FLOAT, (4,)),
            "order": (INT32, ("R4",)), "counts": (INT32, ("E",)),
        }, BRAIN, ("output", "log_sum_exp"), {**LONG, "R": (1, 2, 6), "R4": (4, 16, 72), "E": (1, 9, 40)},
        {"o_layout": "BHND", "masked_rows": "zero"},
    ),
    linear(
        "state of a softmax, tokens last, bfloat16", STATE, {
            "key": (BRAIN, ("B", 2, 32, 40)), "value": (BRAIN, ("B", 2, 40, 48)), "key_weight": (FLOAT, ("B", 40, 2)),
        }, ("state", "total", "mean", "top"), {"B": (1, 2, 3)}, key_map="softmax", k_layout="BHDN", v_layout="BHND",
    ),
    linear("chunks of a softmax combined", COMBINE, {"state": CHUNKS, "total": SUMS, "mean": (FLOAT, ("B", 2, "C", 48)),
           "top": SUMS}, ("whole_state", "whole_total", "whole_mean"), {"B": (1, 2, 3), "C": (1, 5, 9)}),
    linear("MALA applied, heads first", APPLY, {"query": (HALF, ("B", 4, "N", 32)), "state": WHOLE, "total": WHOLE_SUM,
           "mean": (FLOAT, ("B", 2, 1, 48))}, query_map="elu+1", normaliser="mala", q_layout="BHND"),
    linear("states and the last ones", STATES, {
        "key": KEY, "value": VALUE, "log_decay": (HALF, (2,)), "initial_state": (FLOAT, ("B", 2, 32, 48)),
        "initial_total": (FLOAT, ("B", 2, 32)),
    }, ("state", "total", "final_state", "final_total"), key_map="exp", chunk=16),
    linear("state of learned features", STATE, {"key": KEY, "value": VALUE, "feature_weight": (HALF, (2, 32, 24))},
           ("state", "total"), key_map="hedgehog", chunk=48),
    linear("learned features applied, bfloat16", APPLY, {
        "query": (BRAIN, ("B", 4, "N", 32)), "state": (FLOAT, ("B", 2, 1, 48, 48)), "total": (FLOAT, ("B", 2, 1, 48)),
        "feature_weight": (FLOAT, (4, 32, 24)),
    }, query_map="hedgehog", normaliser="sum", epsilon=1e-6, q_layout="BHND"),
    linear("decoding by the delta rule, bfloat16", STEP, {
        "query": (BRAIN, ("B", 4, 1, 32)), "key": (BRAIN, ("B", 1, 2, 32)), "value": (BRAIN, ("B", 1, 2, 48)),
        "log_decay": (FLOAT, ("B", 1, 2)), "beta": (BRAIN, ("B", 1, 1)), "initial_state": LAST,
    }, ("output", "final_state"), {"B": (1, 2, 3)}, q_layout="BHND", o_layout="BHND"),
    linear("decoding with sums", STEP, {
        "query": (HALF, (2, 1, 4, 32)), "key": (HALF, (2, 1, 2, 32)), "value": (HALF, (2, 1, 2, 48)),
        "log_decay": (HALF, (2, 1, 2, 32)), "initial_state": (FLOAT, (2, 2, 32, 48)),
        "initial_total": (FLOAT, (2, 2, 32)),
    }, ("output", "final_state", "final_total"), {}, query_map="exp", key_map="exp", normaliser="sum", epsilon=1e-6),
    linear("tiles of the delta rule, tokens last, bfloat16", SOLVE, {
        "key": (BRAIN, ("B", 2, 32, 200)), "beta": (FLOAT, ("B", 200, 1))}, ("solved",), {"B": (1, 2, 3)}, tile=64,
        k_layout="BHDN"),
    linear("chunks of the delta rule, bfloat16", DELTA, {
        "key": (BRAIN, ("B", 200, 2, 32)), "value": (BRAIN, ("B", 2, 200, 48)), "solved": (FLOAT, ("B", 2, 4, 64, 64)),
        "initial_state": LAST, "log_decay": (FLOAT, (2,))}, ("written", "state"), {"B": (1, 2, 3)}, tile=64, chunk=128,
        v_layout="BHND"),
    linear("gates of every channel, static", OUTPUT, {
        "query": (HALF, (2, 37, 4, 32)), "key": (HALF, (2, 37, 2, 32)), "value": (HALF, (2, 37, 2, 48)),
        "state": (FLOAT, (2, 2, 3, 32, 48)), "log_decay": (FLOAT, (2, 37, 2, 32)),
    }, sizes={}, chunk=16, o_layout="BHND"),
)  # fmt: skip
SAMPLES = (*QUICK, *(replace(s, slow=True) for s in SLOW))
"""Head dims are small: kernels then compile in about a second. Every op that has kernels is here (tested)."""
