"""From a node to the arguments of its launch, through ONNX Runtime and the library, against what Python computes."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from attncompile.kernels import symbols
from attncompile.kernels.launcher import Function
from attncompile.plugins import kernels
from attncompile.plugins.attention.op import OPTIONAL
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, INPUTS, OUTPUT, SOLVE, STATE, STATES, STEP
from attncompile.runtime import layout
from tests.runtime.conftest import TYPES, Double, Launch, Made, Maker, needs_compiler, node_model

pytestmark = needs_compiler

SMS = 108
ATTENTION = ("query", "key", "value", *OPTIONAL)
NEIGHBORHOOD = ("query", "key", "value", "key_mask", "bias", "sinks")
SPARSE = ("query", "key", "value", "rows", "columns", "kinds", "masks", *NEIGHBORHOOD[3:], "order", "counts")
ORDERS = {
    "Attention": ATTENTION, "NeighborhoodAttention": NEIGHBORHOOD, "BlockSparseAttention": SPARSE,
    "BlockScores": ("query", "key"), "BlockSelect": ("scores", "amount"), **INPUTS,
}  # fmt: skip
AXES = {
    "log_sum_exp": "BHN", "state": "BGCFE", "total": "BGCF", "mean": "BGCE", "top": "BGCF", "final_state": "BGFE",
    "written": "BMGE", "solved": "BGTLL",
    "final_total": "BGF", "whole_state": "BG1FE", "whole_total": "BG1F",
    "scores": "BHtc", "rows": "BHr3", "columns": "e", "kinds": "e", "mass": "BHrc",
}  # fmt: skip
"""Of inputs and outputs beside the operands, from the definitions of the ops."""
OF_OPERANDS = {"query": "BNHD", "key": "BMGF", "value": "BMGE"}
GRID = {"grid": [5, 7], "kernel_size": [3, 3], "border": "clamp", "scale": 0.25}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One node: names of dynamic sizes stand in ``shapes``, the sizes of its runs in ``runs``."""

    op: str
    dtype: str
    shapes: Mapping[str, Sequence[int | str]]
    runs: Sequence[Mapping[str, int]]
    attributes: Mapping[str, Any] = field(default_factory=lambda: {"scale": 0.125})
    types: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("output",)

    def model(self) -> Any:
        return node_model(self.op, self.shapes, self.all_types(), self.outputs, ORDERS[self.op], **self.attributes)

    def all_types(self) -> dict[str, str]:
        found = {name: self.types.get(name, self.dtype) for name in self.shapes}
        return found | {
            o: self.types.get(o, self.dtype if o in ("output", "written") else "float32") for o in self.outputs
        }


def operands(layouts: str, n: Any = "n", m: Any = "m", heads: int = 6, kv: int = 2, dim: int = 64, vdim: int = 64,
             batch: Any = "b") -> dict[str, Sequence[int | str]]:  # fmt: skip
    """Shapes of query, key and value, whose layouts the three words of ``layouts`` say."""
    sizes = (
        {"B": batch, "N": n, "H": heads, "D": dim}, {"B": batch, "N": m, "H": kv, "D": dim},
        {"B": batch, "N": m, "H": kv, "D": vdim},
    )  # fmt: skip
    words = zip(("query", "key", "value"), sizes, layouts.split(), strict=True)
    return {name: [size.get(axis, 3) for axis in word] for name, size, word in words}


RUNS = ({"b": 1, "n": 1, "m": 1}, {"b": 2, "n": 37, "m": 53}, {"b": 3, "n": 256, "m": 384})
SAME = ({"b": 1, "n": 35}, {"b": 2, "n": 35})


def layouts(words: str) -> dict[str, str]:
    return {f"{x}_layout": w for x, w in zip("qkvo", words.split(), strict=True)}


def lists(batch: int | str, heads: int) -> dict[str, Sequence[int | str]]:
    """Shapes of the lists for blocks of 64."""
    return {"rows": [batch, heads, "r", 3], "columns": ["e"], "kinds": ["e"], "masks": ["u", 64, 2]}


LISTED = (
    {"b": 1, "n": 1, "m": 1, "r": 1, "e": 1, "u": 1, "o": 6},
    {"b": 2, "n": 130, "m": 53, "r": 3, "e": 9, "u": 2, "o": 36},
)  # fmt: skip
LIST_TYPES = {
    **dict.fromkeys(("rows", "columns", "kinds", "masks", "order", "counts"), "int32"), "key_mask": "bool",
    "sinks": "float32",
}  # fmt: skip
CHUNKED = ({"b": 1, "n": 1, "c": 1}, {"b": 2, "n": 37, "c": 2}, {"b": 3, "n": 256, "c": 8})
"""``c`` is the number of chunks of 32 tokens."""
SCORED = ({"b": 1, "t": 1, "c": 1}, {"b": 2, "t": 37, "c": 10})
CHOSEN = ("rows", "columns", "kinds", "mass")
CHOSEN_TYPES = dict.fromkeys(CHOSEN[:3], "int32")
SCORES_TYPE = {"scores": "float32"}
WIDE = dict.fromkeys(("state", "total", "log_decay", "initial_state"), "float32")


def linear(names: str, words: str, n: Any = "n") -> dict[str, Sequence[int | str]]:
    """Shapes of the operands ``names`` in these layouts: 4 heads, 2 key heads, 64 features, 48 values."""
    heads, dims = {"query": 4, "key": 2, "value": 2}, {"query": 64, "key": 64, "value": 48}
    return {
        name: [{"B": "b", "N": n, "H": heads[name], "D": dims[name]}.get(axis, 3) for axis in word]
        for name, word in zip(names.split(), words.split(), strict=True)
    }


CASES = [
    *(
        Case("Attention", dtype, operands(" ".join(words[:3])), RUNS, {"scale": 0.1, **layouts(" ".join(words))})
        for dtype in ("float16", "bfloat16")
        for words in itertools.product(("BNHD", "BHND"), repeat=4)
    ),
    *(
        Case("Attention", "float16", operands("BNHD BNHD BNHD", dim=dim, vdim=vdim), RUNS[1:], {"scale": 0.5, **more})
        for dim, vdim in ((72, 72), (128, 64), (256, 256))
        for more in ({"right": 0}, {"left": 99, "right": 0}, {"left": 40, "right": 30, "softcap": 20.0})
    ),
    Case("Attention", "float16", operands("BNHD BNHD BNHD", n=64, m=96, batch=2), ({},)),
    *(
        Case("Attention", "float16", operands(words), RUNS, {"scale": 0.5, "right": 0, **layouts(f"{words} BHND")})
        for words in ("BN0HD BN1HD BN2HD", "BHND B0HND BNH2D", "2NBHD NB0HD 1BHND")
    ),
    *(
        Case("Attention", "bfloat16", {**operands("BNHD BHND BNHD"), "bias": bias, "key_mask": seen, "sinks": sinks},
             RUNS[1:], {"scale": 0.125, "masked_rows": "zero", **layouts("BNHD BHND BNHD BHND")},
             {"bias": kind, "key_mask": "bool", "sinks": "float32"})
        for bias, seen, sinks, kind in (
            (["b", 6, "n", "m"], ["b", 1, 1, "m"], [6], "float32"), ([6, "n", "m"], ["m"], [1], "bfloat16"),
            ([1, 1, "n", "m"], [1, 1, 1, "m"], [6], "bfloat16"), (["x", 6, "y", "m"], ["b", 1, 1, 1], [6], "float32"),
            ([1], [1, "m"], [6], "bfloat16"),
        )
    ),
    Case("Attention", "float16", {**operands("BHND BHND BHND"), "mask": ["b", 1, "n", "m"], "key_lengths": ["b"]}, RUNS,
         {"scale": 0.125, "masked_rows": "uniform", **layouts("BHND BHND BHND BNHD")},
         {"mask": "bool", "key_lengths": "int64"}),
    Case("Attention", "float16", operands("BNHD BNHD BNHD"), RUNS, {"scale": 0.125, "right": 0, "masked_rows": "zero"},
         {"log_sum_exp": "float32"}, ("output", "log_sum_exp")),
    *(
        Case("NeighborhoodAttention", dtype, operands(f"{word} {word} {word}", n=35, m=35), SAME, {**GRID, **more})
        for dtype in ("float16", "bfloat16")
        for word, more in (("BNHD", {}), ("BHND", layouts("BHND BHND BHND BHND")), ("BNHD", {"stride": [3, 3]}))
    ),
    Case("NeighborhoodAttention", "float16", {**operands("BNHD BNHD BNHD", n=35, m=35), "bias": ["x", 6, 35, 35]},
         SAME, GRID, {"bias": "float16"}),
    Case("NeighborhoodAttention", "float16", operands("BN0HD BN1HD B2HND", n=35, m=35), SAME,
         {**GRID, **layouts("BN0HD BN1HD B2HND BNHD")}),
    Case("BlockSparseAttention", "float16", {**operands("BN0HD BN1HD BN2HD"), **lists(1, 6)}, LISTED,
         {"scale": 0.125, "block": 64, **layouts("BN0HD BN1HD BN2HD BNHD")}, LIST_TYPES),
    Case(STATE, "float16", linear("key value", "BN1HD B2HDN", n=40), ({"b": 1}, {"b": 3}),
         {"key_map": "relu", "chunk": 48, "k_layout": "BN1HD", "v_layout": "B2HDN"}, {}, ("state", "total")),
    Case(APPLY, "float16", {**linear("query", "BNH0D"), "state": ["b", 2, 1, 64, 48],
         "total": ["b", 2, 1, 64]}, CHUNKED, {"query_map": "relu", "normaliser": "sum", "q_layout": "BNH0D"}, WIDE),
    Case("NeighborhoodAttention", "float16", operands("BNHD BNHD BNHD", m="n"), ({"b": 2, "n": 70}, {"b": 1, "n": 9}),
         {"kernel_size": [33], "grid": [-1], "causal": [1], "scale": 0.5}),
    *(
        Case("BlockScores", dtype, {n: x for n, x in operands(words, m="n").items() if n != "value"}, RUNS,
             {"scale": 0.125, "stride": stride, "block": block, "causal": causal, **more,
              **{f"{n}_layout": w for n, w in zip("qk", words.split(), strict=False)}}, SCORES_TYPE, ("scores",))
        for dtype, words, stride, block, causal, more in (
            ("float16", "BNHD BNHD BNHD", 16, 64, 1, {}), ("bfloat16", "BHND BNHD BNHD", 1, 1, 0, {}),
            ("float16", "BN0HD BN1HD BN2HD", 8, 64, 1, {}),
            ("float16", "BNHD BN1HD BN2HD", 1, 64, 1, {"reduce": "max", "span": 64}),
        )
    ),
    *(
        Case("BlockSelect", "float32", {"scores": ["b", 6, "t", "c"], "amount": [heads]}, SCORED,
             {"tiles": 1 if rule == "anchor" else 4, "rule": rule, "causal": causal, "sinks": 2, "window": 1},
             CHOSEN_TYPES, CHOSEN)
        for heads, rule, causal in ((6, "mass", 1), (1, "share", 0), (6, "anchor", 1))
    ),
    *(
        Case("BlockSparseAttention", dtype, {**operands("BNHD BHND BNHD"), **lists(batch, heads), **more}, LISTED,
             {"scale": 0.125, "block": 64, **layouts("BNHD BHND BNHD BHND")}, LIST_TYPES, outputs)
        for dtype, batch, heads, more, outputs in (
            ("float16", 1, 6, {}, ("output",)), ("bfloat16", "b", 1, {}, ("output", "log_sum_exp")),
            ("float16", "b", 6, {"key_mask": ["b", 1, 1, "m"], "sinks": [6], "order": ["o"], "counts": ["e"]},
             ("output", "log_sum_exp")),
        )
    ),
    Case(STATE, "float16", linear("key value", "BNHD BNHD"), CHUNKED, {"key_map": "relu", "chunk": 48},
         {}, ("state", "total")),
    Case(STATE, "bfloat16", {**linear("key value", "BHND BHDN", n=40), "key_weight": ["b", 40, 2]},
         ({"b": 1}, {"b": 3}), {"key_map": "softmax", "k_layout": "BHND", "v_layout": "BHDN"},
         {"key_weight": "float32"}, ("state", "total", "mean", "top")),
    Case(COMBINE, "float32", {"state": ["b", 2, "c", 64, 48], "total": ["b", 2, "c", 64]}, CHUNKED, {},
         {}, ("whole_state", "whole_total")),
    Case(APPLY, "float16", {**linear("query", "BHND"), "state": ["b", 2, 1, 64, 48],
         "total": ["b", 2, 1, 64]}, CHUNKED, {"query_map": "elu+1", "normaliser": "sum", "epsilon": 1e-6,
         "q_layout": "BHND"}, WIDE),
    Case(STATES, "bfloat16", {**linear("key value", "BNHD BNHD"), "log_decay": ["b", "n", 2],
         "initial_state": ["b", 2, 64, 48]}, CHUNKED, {"chunk": 32}, WIDE, ("state", "total", "final_state")),
    Case(OUTPUT, "float16", {**linear("query key value", "BNHD BHND BNHD"), "log_decay": [2],
         "state": ["b", 2, "c", 64, 48]}, CHUNKED, {"chunk": 32, "scale": 0.5, **layouts("BNHD BHND BNHD BHND")}, WIDE),
    Case(OUTPUT, "bfloat16", {**linear("query key value", "BNHD BNHD BNHD"), "state":
         ["b", 2, "c", 64, 48], "log_decay": ["b", "n", 2, 64]}, CHUNKED, {"chunk": 32}, WIDE),
    Case(STATE, "float16", {**linear("key value", "BNHD BNHD"), "feature_weight": [2, 64, 32]}, CHUNKED,
         {"key_map": "hedgehog", "chunk": 48}, {"feature_weight": "float32"}, ("state", "total")),
    Case(APPLY, "bfloat16", {**linear("query", "BNHD"), "state": ["b", 2, 1, 64, 48], "total": ["b", 2, 1, 64],
         "feature_weight": [4, 64, 32]}, CHUNKED, {"query_map": "hedgehog", "normaliser": "sum"}, WIDE),
    Case(SOLVE, "float16", {**linear("key", "BHND"), "log_decay": ["b", "n", 2], "beta": ["b", "n", 1]}, CHUNKED,
         {"tile": 32, "k_layout": "BHND"}, WIDE, ("solved",)),
    Case(DELTA, "bfloat16", {**linear("key value", "BNHD BNHD"), "solved": ["b", 2, "c", 32, 32],
         "log_decay": ["b", "n", 2]}, CHUNKED, {"tile": 32, "chunk": 32}, {**WIDE, "solved": "float32"},
         ("written", "state", "final_state")),
    Case(STEP, "float16", {**linear("query key value", "BNHD BHND BNHD"), "log_decay": ["b", "n", 2],
         "initial_state": ["b", 2, 64, 48]}, CHUNKED, {"scale": 0.5, **layouts("BNHD BHND BNHD BHND")}, WIDE,
         ("output", "final_state")),
    *(Case(STEP, "bfloat16", {**linear("query key value", "BNHD BNHD BNHD"), "beta": ["b", "n", rates],
           "initial_state": ["b", 2, 64, 48]}, CHUNKED, {}, {**WIDE, "beta": "bfloat16"}, ("output", "final_state"))
      for rates in (1, 2)),
]  # fmt: skip
DEVICES = (80, 86, 89, 90, 100, 120, 87, 121, 103)


def sizes_of(shape: Sequence[int | str], run: Mapping[str, int]) -> Shape:
    known = {"x": 1, "y": 1, **run}
    return tuple(known[s] if isinstance(s, str) else s for s in shape)


def value(shape: Shape, kind: str) -> Any:
    """An ``OrtValue`` of ONNX Runtime's own memory."""
    import onnxruntime

    numpy_type = {"bfloat16": ml_dtypes.bfloat16}.get(kind, kind)
    data = np.ones(shape, numpy_type)
    if kind != "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy(data)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(data.view(np.uint16), TYPES[kind])


def wanted(made: Made, case: Case, shapes: Mapping[str, Shape], pointers: Mapping[str, int], capability: int) -> Any:
    """(entry, grid, values) of the launch, by the launcher in Python."""
    compiled = made.bundle.kernels(made.bundle.call_of("site"), capability)[0]
    numbers = symbols.values(made.bundle.symbols_of("site"), shapes)
    function = Function(compiled.entry, "", None, 0, 0, {"SMS": SMS})  # type: ignore[arg-type]
    bound = function.bind(numbers, pointers, "site")
    return compiled.entry, bound.grid, [s.value or 0 for s in bound._storage]


def noted(launch: Launch) -> list[int]:
    return [ctypes.c_int64(v).value for v in launch.values[: launch.count]]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_launch_is_what_python_computes(number: int, make: Maker, double: Double) -> None:
    case = CASES[number]
    made = make(case.model())
    session_devices = DEVICES if number % 8 == 0 else DEVICES[number % len(DEVICES) :][:1]
    double.expect(list(made.bundle.entries.values()))
    for capability in session_devices:
        double.device(capability, sms=SMS)
        session = made.session()
        for run in case.runs:
            shapes = {name: sizes_of(shape, run) for name, shape in case.shapes.items()}
            feeds = {name: value(shape, case.all_types()[name]) for name, shape in shapes.items()}
            before = double.count("launched")
            results = session.run_with_ort_values(list(case.outputs), feeds)
            assert double.count("launched") == before + 1
            pointers = {name: v.data_ptr() for name, v in feeds.items()}
            pointers |= {name: v.data_ptr() for name, v in zip(case.outputs, results, strict=True)}
            entry, grid, values = wanted(made, case, shapes, pointers, capability)
            launch = double.last()
            assert launch.name.decode() == entry.name
            assert (*launch.grid,) == grid
            assert (*launch.block, launch.shared) == (entry.threads, 1, 1, entry.shared)
            assert noted(launch) == values
            check_results(case, shapes, results)
        del session
    assert double.count("unloaded") == double.count("loaded") == len(session_devices)


def of_blocks(attributes: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of what chooses blocks: t tiles of queries, c blocks of keys, r rows of blocks, e entries of lists."""
    found = dict(sizes)
    if isinstance(attributes.get("stride"), int):  # of tiles; a neighborhood has one for every axis
        found |= {"t": -(-found["N"] // attributes["stride"]), "c": -(-found["M"] // attributes["block"])}
    if "tiles" in attributes:
        found |= {"r": -(-found["t"] // attributes["tiles"]), "3": 3}
        found["e"] = found["B"] * found["H"] * found["r"] * found["c"]
    return found


def check_results(case: Case, shapes: Mapping[str, Shape], results: Sequence[Any]) -> None:
    """Sizes and types of the outputs, from the definitions."""
    sizes = {"1": 1}
    for name, shape in shapes.items():
        axes = "" if case.op == "BlockSparseAttention" else AXES.get(name, "")
        if name in OF_OPERANDS:
            layout_of = str(case.attributes.get(f"{name[0]}_layout", "BNHD"))
            axes = layout_of.translate(str.maketrans("BNHD", OF_OPERANDS[name]))
        sizes |= dict(zip(axes, shape, strict=True)) if axes else {}
    if "feature_weight" in shapes:
        sizes["F"] = 2 * shapes["feature_weight"][2]
    if "M" in sizes:
        chunk = int(case.attributes.get("chunk", 0)) or sizes["M"]
        sizes.setdefault("C", (sizes["M"] + chunk - 1) // chunk)
        tile = int(case.attributes.get("tile", 64))
        sizes |= {"L": tile, "T": -(-sizes["M"] // tile)}
    sizes = of_blocks(case.attributes, sizes)
    written = str(case.attributes.get("o_layout", "BNHD")).replace("D", "E")
    for name, result in zip(case.outputs, results, strict=True):
        assert result.shape() == [sizes[a] for a in AXES.get(name, written)], name
        assert result.element_type() == TYPES[case.dtype if name == "written" else case.all_types()[name]]


def test_one_tensor_is_all_three_operands(make: Maker, double: Double) -> None:
    """A product of width 3 C, as a view: three pointers to it, and where each part begins."""
    from onnx import TensorProto, helper, numpy_helper

    said = layouts("BN0HD BN1HD BN2HD BNHD")
    nodes = [
        helper.make_node("Reshape", ["x", "sizes"], ["five"]),
        helper.make_node("Attention", ["five"] * 3, ["output"], "site", domain="attncompile", scale=0.125, **said),
    ]
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes, "packed", [helper.make_tensor_value_info("x", half, ["b", "n", 3 * 4 * 64])],
        [helper.make_tensor_value_info("output", half, None)],
        [numpy_helper.from_array(np.array([0, 0, 3, 4, 64]), "sizes")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("attncompile", 1)]
    made = make(helper.make_model(graph, opset_imports=imports, ir_version=10))
    double.expect(list(made.bundle.entries.values()))
    session = made.session()
    for b, n in ((1, 1), (2, 37)):
        (found,) = session.run(None, {"x": np.zeros((b, n, 768), np.float16)})
        assert found.shape == (b, n, 4, 64)
        entry = made.bundle.kernels(made.bundle.call_of("site"), 90)[0].entry
        values = dict(zip((a.name for a in entry.arguments), noted(double.last()), strict=False))
        assert values["query"] == values["key"] == values["value"] != values["output"]
        assert (values["q_o"], values["k_o"], values["v_o"]) == (0, 4 * 64 // 8, 2 * 4 * 64 // 8)
        assert (values["k_b"], values["k_n"], values["k_h"]) == (n * 768 // 8, 768 // 8, 64 // 8)


@pytest.mark.parametrize("parts", [2, 4])
def test_another_number_of_parts_is_refused(make: Maker, double: Double, parts: int) -> None:
    """A run's sizes are checked against those that the model was compiled for."""
    shapes = operands("BN0HD BN1HD BN1HD")
    made = make(node_model("Attention", shapes, dict.fromkeys(shapes, "float16"), scale=0.125,
                           **layouts("BN0HD BN1HD BN1HD BNHD")))  # fmt: skip
    for value_ in made.model.graph.input:  # what the file says is not what is given
        value_.type.tensor_type.shape.dim[2].ClearField("dim_value")
    double.expect(list(made.bundle.entries.values()))
    session = made.session()
    feeds = {n: np.zeros([2, 5, parts, *s[3:]], np.float16) for n, s in shapes.items()}
    with pytest.raises(Exception, match="site"):
        session.run(None, feeds)


def test_every_op_with_kernels_has_a_case() -> None:
    missing = set(kernels()) - {case.op for case in CASES}
    assert not missing, f"add a node of {', '.join(sorted(missing))}"


def test_several_nodes_in_one_model_and_an_if(make: Maker, double: Double) -> None:
    """A node in a branch, and two of one call: the bundle's op serves both."""
    from onnx import TensorProto, helper

    shapes = operands("BNHD BNHD BNHD")
    first, second = (node_model("Attention", shapes, dict.fromkeys(shapes, "float16"), scale=s) for s in (0.125, 0.25))
    inner = second.graph.node[0]
    inner.name, inner.output[0] = "inside", "z"
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT16, None)
    branches = {
        "then_branch": helper.make_graph([inner], "then", [], [result]),
        "else_branch": helper.make_graph([helper.make_node("Identity", ["value"], ["z"])], "else", [], [result]),
    }
    model = first
    model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], "choice", **branches))
    model.graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT16, None))
    made = make(model)
    assert {n.op_type for n in made.model.graph.node if n.domain == layout.DOMAIN} == {
        next(a.g for a in made.model.graph.node[1].attribute if a.name == "then_branch").node[0].op_type
    }
    double.expect(list(made.bundle.entries.values()))
    session = made.session()
    feeds = {name: np.zeros(sizes_of(shape, RUNS[1]), np.float16) for name, shape in shapes.items()}
    for yes, launches in ((True, 2), (False, 1)):
        before = double.count("launched")
        session.run(None, {**feeds, "yes": np.array(yes)})
        assert double.count("launched") - before == launches
    assert double.count("loaded") == 1
