"""Random changes of linear attention graphs: whatever is still taken is what its facts say, as shown by running it.

Sizes are chosen equal, so that a wrong axis gives no shape error. Names, order and idle nodes change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from tests.passes.linear_graphs import Spec, build, detected, error_of, feed_of
from tests.passes.test_linear_causal import Graph, decay
from tests.passes.test_names_mean_nothing import CHANGES

_EQUAL: dict[str, Any] = {"batch": 4, "heads": 4, "kv_heads": 4, "length": 4, "dim": 4, "value_dim": 4}


def _retention() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("MatMul", g.op("Mul", g.scores(), g.array(decay()[None])), g.v))


def _rows() -> onnx.ModelProto:
    g = Graph()
    g.q, g.k = g.op("Exp", g.q), g.op("Exp", g.k)
    scores = g.op("Trilu", g.scores(), upper=0)
    total = g.op("ReduceSum", scores, g.b.const([3]), keepdims=1)
    return g.model(g.op("MatMul", g.op("Div", scores, g.op("Add", total, g.array(0.25))), g.v))


def _running() -> onnx.ModelProto:
    g = Graph()
    k = g.op("Relu", g.k)
    states = g.op("CumSum", g.op("Einsum", k, g.v, equation="bhnd,bhne->bhnde"), g.b.const(np.array(2)))
    top = g.op("Einsum", g.q, states, equation="bhnd,bhnde->bhne")
    total = g.op("ReduceSum", g.op("Mul", g.op("CumSum", k, g.b.const(np.array(2))), g.q), g.b.const([3]), keepdims=1)
    return g.model(g.op("Div", top, g.op("Add", total, g.array(9.0))))


BASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "pad": lambda: build(Spec(**_EQUAL, normaliser="pad", epsilon=0.5)),
    "channels": lambda: build(Spec(**_EQUAL, order="vk", normaliser="split", epsilon=0.5)),
    "sum": lambda: build(Spec(**_EQUAL, normaliser="sum", floor=0.5, query_map="elu+1", key_map="elu+1 where")),
    "reciprocal": lambda: build(Spec(**_EQUAL, order="einsum", normaliser="reciprocal", epsilon=0.5, key_map="exp")),
    "softmax": lambda: build(Spec(**_EQUAL, query_map="softmax", key_map="softmax", scale=0.5)),
    "retention": _retention,
    "rows": _rows,
    "running": _running,
}


class Mutant:
    """One random change of a copy of ``proto``; ``made`` says which, empty where the change did not apply."""

    def __init__(self, proto: onnx.ModelProto, rng: np.random.Generator) -> None:
        self.proto, self.rng = onnx.ModelProto(), rng
        self.proto.CopyFrom(proto)
        self.graph = self.proto.graph
        inferred = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
        self.shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        changes = (self.perm, self.axis, self.constant, self.swap, self.extra, self.operator, self.insert, self.rewire)
        change = changes[int(rng.integers(len(changes)))]
        self.made = change.__name__ if change() else ""

    def node(self, *kinds: str) -> onnx.NodeProto | None:
        found = [n for n in self.graph.node if n.op_type in kinds]
        return found[int(self.rng.integers(len(found)))] if found else None

    def store(self, array: np.ndarray) -> str:
        name = f"mutant{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def stored(self, name: str) -> np.ndarray | None:
        return next((numpy_helper.to_array(t) for t in self.graph.initializer if t.name == name), None)

    def perm(self) -> bool:
        node = self.node("Transpose")
        if node is None:
            return False
        node.attribute[0].ints[:] = [int(i) for i in self.rng.permutation(len(node.attribute[0].ints))]
        return True

    def axis(self) -> bool:
        node = self.node("ReduceSum", "Slice", "Softmax", "Split", "CumSum", "Unsqueeze", "Gather", "Trilu")
        if node is None:
            return False
        attribute = next((a for a in node.attribute if a.name in ("axis", "upper")), None)
        if attribute is not None:
            attribute.i = int(self.rng.integers(2 if attribute.name == "upper" else 4))
            return True
        at = {"Slice": 3, "Trilu": 9}.get(node.op_type, 1)
        before = self.stored(node.input[at]) if at < len(node.input) else None
        if before is None:
            return False
        node.input[at] = self.store(np.full(before.shape, int(self.rng.integers(4)), np.int64))
        return True

    def constant(self) -> bool:
        """Another number, or one element of a mask or a range."""
        fixed = ("Reshape", "Transpose", "ReduceSum", "Unsqueeze")
        found = [(n, i) for n in self.graph.node for i, v in enumerate(n.input)
                 if n.op_type not in fixed and self.stored(v) is not None]  # fmt: skip
        node, i = found[int(self.rng.integers(len(found)))]
        array = np.array(self.stored(node.input[i]))
        flat = array.reshape(-1)
        at = int(self.rng.integers(flat.size))
        flat[at] = not flat[at] if array.dtype == bool else flat[at] + self.rng.choice([-1, 1, 2])
        node.input[i] = self.store(flat.reshape(array.shape))
        return True

    def swap(self) -> bool:
        node = self.node("MatMul", "Div", "Einsum", "Mul", "Where")
        if node is None:
            return False
        node.input[-2], node.input[-1] = node.input[-1], node.input[-2]
        return True

    def extra(self) -> bool:
        node = self.graph.node[int(self.rng.integers(len(self.graph.node)))]
        self.graph.output.append(helper.make_tensor_value_info(node.output[0], 1, None))
        return True

    def operator(self) -> bool:
        node = self.node("Relu", "Exp", "Elu", "Add", "Clip", "ReduceSum", "Mul", "Div", "Reciprocal")
        if node is None:
            return False
        other = {"Relu": "Abs", "Exp": "Softplus", "Elu": "Celu", "Add": "Sub", "Clip": "Min",
                 "ReduceSum": "ReduceMean", "Mul": "Add", "Div": "Mul", "Reciprocal": "Neg"}  # fmt: skip
        node.op_type = other[node.op_type]
        return True

    def insert(self) -> bool:
        """An operator on one edge."""
        found = [(n, i) for n in self.graph.node for i, v in enumerate(n.input) if len(self.shapes.get(v, ())) == 4]
        node, i = found[int(self.rng.integers(len(found)))]
        value = node.input[i]
        shape = list(self.shapes[value])
        keep = self.rng.random(4) < 0.3
        factor = self.rng.standard_normal([n if k else 1 for n, k in zip(shape, keep, strict=True)]).astype(np.float32)
        choice = int(self.rng.integers(5))
        made = [
            ("Mul", [value, self.store(factor)], {}), ("Add", [value, self.store(factor)], {}), ("Neg", [value], {}),
            ("CumSum", [value, self.store(np.array(int(self.rng.integers(4))))], {}),
            ("Gather", [value, self.store(np.arange(shape[axis := int(self.rng.integers(4))])[::-1].copy())],
             {"axis": axis}),
        ][choice]  # fmt: skip
        new = helper.make_node(made[0], made[1], [f"inserted{i}"], **made[2])
        at = next(k for k, n in enumerate(self.graph.node) if n is node or n.output[0] == node.output[0])
        node.input[i] = new.output[0]
        self.graph.node.insert(at, new)
        return True

    def rewire(self) -> bool:
        """Another value of the same shape, made before."""
        at = int(self.rng.integers(1, len(self.graph.node)))
        node = self.graph.node[at]
        i = int(self.rng.integers(len(node.input)))
        shape = self.shapes.get(node.input[i])
        made = [n.output[0] for n in self.graph.node[:at] if self.shapes.get(n.output[0]) == shape != ()]
        others = [v for v in made if v != node.input[i]]
        if shape is None or not others:
            return False
        node.input[i] = others[int(self.rng.integers(len(others)))]
        return True


def _runs(proto: onnx.ModelProto) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        session.run(None, {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()})
    except Exception:  # a mutant that is no model any more
        return False
    return True


@pytest.mark.parametrize("name", BASES)
def test_mutants_are_refused_or_right(name: str, tmp_path: Path) -> None:
    base, counts = BASES[name](), Counter[str]()
    rng = np.random.default_rng(sorted(BASES).index(name))
    model, detection = detected(base, tmp_path)
    (site,) = detection.sites
    assert error_of(model, site, feed_of(model)) < 3e-6
    while counts["ran"] < 45:
        mutant = Mutant(base, rng)
        counts["tried"] += 1
        assert counts["tried"] < 1000
        if not mutant.made or not _runs(mutant.proto):
            continue
        counts["ran"] += 1
        model, detection = detected(mutant.proto, tmp_path)
        for site in [s for s in detection.sites if s.kind == "linear"]:
            counts["taken"] += 1
            feed = feed_of(model, seed=counts["ran"])
            assert error_of(model, site, feed) < 2e-5, (mutant.made, site)
    assert 0 < counts["taken"] < 45


def _facts(proto: onnx.ModelProto, folder: Path) -> list[dict[str, Any]]:
    """Every site without names of values and nodes."""
    named = ("query", "key", "value", "output", "nodes", "id", "form", "layouts")
    return [{k: v for k, v in s.to_json().items() if k not in named} for s in detected(proto, folder)[1].sites]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_names_order_and_idle_nodes_mean_nothing(name: str, change: Callable[..., Any], tmp_path: Path) -> None:
    base = BASES[name]()
    want = _facts(base, tmp_path)
    assert len(want) == 1
    proto = onnx.ModelProto()
    proto.CopyFrom(base)
    assert _facts(change(proto, np.random.default_rng(4)), tmp_path) == want
