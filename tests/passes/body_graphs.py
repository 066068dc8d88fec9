"""Models whose attention lies in the bodies of If, Loop and Scan nodes, and in local functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tests.passes.attention_graphs import Spec, build

Graph = tuple[GraphProto, list[TensorProto]]


def copied(nodes: object) -> list[NodeProto]:
    return [NodeProto.FromString(n.SerializeToString()) for n in nodes]  # type: ignore[attr-defined]


def layer(
    spec: Spec, source: str, prefix: str, residual: bool = False
) -> tuple[list[NodeProto], str, list[TensorProto]]:
    """Attention over ``source``, whose stored values are called ``prefix`` and something; values have plain names, the
    same in every layer.
    """
    proto = build(spec)
    stored = list(proto.graph.initializer)
    names = {t.name: prefix + t.name for t in stored} | {"x": source}
    for node in proto.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
    for tensor in stored:
        tensor.name = names[tensor.name]
    nodes, out = copied(proto.graph.node), proto.graph.output[0].name
    if residual:
        nodes.append(helper.make_node("Add", [source, out], ["sum"]))
        nodes.append(helper.make_node("Tanh", ["sum"], ["next"]))
        out = "next"
    return nodes, out, stored


def value(name: str, kind: int = TensorProto.FLOAT, shape: Sequence[int | str | None] | None = None) -> ValueInfoProto:
    """Of rank 3 and unknown sizes where no shape is given."""
    return helper.make_tensor_value_info(name, kind, [None] * 3 if shape is None else shape)


def x_of(spec: Spec) -> ValueInfoProto:
    sizes = ["b", "n"] if spec.dynamic else [spec.batch, spec.length]
    return value("x", shape=[*sizes, spec.heads * spec.head_dim])


def model(
    nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[str], stored: list[TensorProto]
) -> ModelProto:
    graph = helper.make_graph(nodes, "main", inputs, [value(o) for o in outputs], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def branched(then: Spec, other: Spec, *, hoisted: bool = True, condition: str = "input") -> ModelProto:
    """An Optimum-style merged decoder: If(use_cache) over two attentions of ``x``, their values of the same names.

    ``hoisted``: weights lie outside, as Optimum puts them. ``condition``: ``input``, ``negated`` (Not(Squeeze(input))),
    ``data`` (computed from x), ``true``.
    """
    bodies, outside = [], []
    for at, spec in enumerate((then, other)):
        nodes, out, stored = layer(spec, "x", f"w{at}_")
        outside += stored if hoisted else []
        bodies.append(helper.make_graph(nodes, f"g{at}", [], [value(out)], [] if hoisted else stored))
    before: list[NodeProto] = []
    inputs, flag = [x_of(then)], "use_cache"
    if condition == "data":
        before = [
            helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            helper.make_node("Cast", ["top"], ["yes"], to=9),
        ]
        flag = "yes"
    elif condition == "true":
        outside.append(helper.make_tensor("always", TensorProto.BOOL, [], [True]))
        flag = "always"
    else:
        inputs.append(value("use_cache", TensorProto.BOOL, [1]))
    if condition == "negated":
        before = [helper.make_node("Squeeze", ["use_cache"], ["one"]), helper.make_node("Not", ["one"], ["no"])]
        flag = "no"
    node = helper.make_node("If", [flag], ["made"], "merged", then_branch=bodies[0], else_branch=bodies[1])
    return model([*before, node, helper.make_node("Tanh", ["made"], ["y"])], inputs, ["y"], outside)


def looped(spec: Spec, *, rounds: int | None = 3, grows: bool = False) -> ModelProto:
    """A Loop whose body is a layer over the carried value. ``rounds`` None: an input. ``grows``: each round doubles the
    sequence.
    """
    nodes, out, stored = layer(spec, "carried", "w_", residual=True)
    if grows:
        nodes.append(helper.make_node("Concat", [out, out], ["longer"], axis=1))
        out = "longer"
    nodes.append(helper.make_node("Identity", ["going"], ["on"]))
    inputs = [value("round", TensorProto.INT64, []), value("going", TensorProto.BOOL, []), value("carried")]
    body = helper.make_graph(nodes, "body", inputs, [value("on", TensorProto.BOOL, []), value(out)], stored)
    outside, given = [], [x_of(spec)]
    if rounds is None:
        given.append(value("rounds", TensorProto.INT64, []))
    else:
        outside.append(numpy_helper.from_array(np.array(rounds), "rounds"))
    first = helper.make_node("Tanh", ["x"], ["first"])
    node = helper.make_node("Loop", ["rounds", "", "first"], ["y"], "layers", body=body)
    return model([first, node], given, ["y"], outside)


def scanned(spec: Spec, steps: int = 4) -> ModelProto:
    """A Scan over ``steps`` sequences: attention over each of them plus the state."""
    nodes, out, stored = layer(spec, "both", "w_", residual=True)
    before = helper.make_node("Add", ["state", "slice"], ["both"])
    after = [helper.make_node("Identity", [out], ["given"])]
    info = [value("state"), value("slice")]
    body = helper.make_graph([before, *nodes, *after], "body", info, [value(out), value("given")], stored)
    x = x_of(spec)
    many = value("many", shape=[spec.batch, steps, spec.length, spec.heads * spec.head_dim])
    node = helper.make_node("Scan", ["x", "many"], ["last", "y"], "scan", body=body, num_scan_inputs=1)
    node.attribute.extend(helper.make_attribute(f"scan_{side}_axes", [1]) for side in ("input", "output"))
    made = model([node], [x, many], ["last", "y"], [])
    made.graph.output[1].CopyFrom(value("y", shape=[None] * 4))
    return made


def nested(then: Spec, other: Spec) -> ModelProto:
    """A Loop whose body holds an If over attention; weights lie outside of both, the condition is the model's input."""
    inner = branched(then, other)
    node = copied([inner.graph.node[0]])[0]
    for attribute in node.attribute:
        for n in attribute.g.node:
            n.input[:] = ["carried" if i == "x" else i for i in n.input]
    nodes = [node, helper.make_node("Tanh", ["made"], ["next"]), helper.make_node("Identity", ["going"], ["on"])]
    inputs = [value("round", TensorProto.INT64, []), value("going", TensorProto.BOOL, []), value("carried")]
    body = helper.make_graph(nodes, "body", inputs, [value("on", TensorProto.BOOL, []), value("next")])
    stored = [*inner.graph.initializer, numpy_helper.from_array(np.array(2), "rounds")]
    loop = helper.make_node("Loop", ["rounds", "", "x"], ["y"], "it's /all/", body=body)
    return model([loop], list(inner.graph.input), ["y"], stored)


def called(spec: Spec, times: int) -> ModelProto:
    """A local function of another exporter, which is one layer, called ``times`` times with weights of its own."""
    nodes, out, stored = layer(spec, "x", "w_", residual=True)
    nodes.append(helper.make_node("Identity", [out], ["result"]))
    opsets = [helper.make_opsetid("", 18)]
    weights = [t.name for t in stored]
    function = helper.make_function("pkg.model", "Layer", ["x", *weights], ["result"], nodes, opsets)
    calls, kept, last = [], [], "x"
    for i in range(times):
        for tensor in stored:
            copy = TensorProto.FromString(tensor.SerializeToString())
            copy.name = f"l{i}_{tensor.name}"
            kept.append(copy)
        inputs = [last, *(f"l{i}_{w}" for w in weights)]
        calls.append(helper.make_node("Layer", inputs, [f"h{i}"], f"layer{i}", domain="pkg.model"))
        last = f"h{i}"
    made = model(calls, [x_of(spec)], [last], kept)
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("pkg.model", 1))
    return made


def decoder(left: int, *, heads: int = 2, dim: int = 16, layers: int = 2, dynamic: bool = True, length: int = 300,
            past: int = 200) -> ModelProto:  # fmt: skip
    """A merged decoder with a KV cache as Optimum writes it: then_branch joins the past, else_branch ignores it. Every
    layer sees ``left`` keys before the query (-1: all of them) and none after; the mask is computed from shapes.
    """
    rng = np.random.default_rng(5)
    width = heads * dim
    stored: list[TensorProto] = []

    def const(array: np.ndarray, name: str = "") -> str:
        stored.append(numpy_helper.from_array(array, name or f"k{len(stored)}"))
        return str(stored[-1].name)

    weights = [
        [const((rng.standard_normal((width, width)) / 6).astype(np.float32)) for _ in range(4)] for _ in range(layers)
    ]
    shape, merged = const(np.array([0, 0, heads, dim])), const(np.array([0, 0, width]))
    zero, one, scale = const(np.array(0)), const(np.array(1)), const(np.array(0.25, np.float32))
    low, none = const(np.array(-np.inf, np.float32)), const(np.array(0, np.float32))
    first, second, reach = const(np.array([0])), const(np.array([1])), const(np.array(left + 1))

    def branch(cached: bool) -> GraphProto:
        nodes: list[NodeProto] = []

        def op(kind: str, *inputs: str, out: str = "", **attributes: object) -> str:
            name = out or f"t{len(nodes)}"
            node = helper.make_node(kind, list(inputs), [name])
            node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
            nodes.append(node)
            return name

        new = op("Squeeze", op("Shape", "x", start=1, end=2))
        old = op("Squeeze", op("Shape", "past_key_0", start=2, end=3)) if cached else zero
        total = op("Add", old, new)
        rows = op("Unsqueeze", op("Add", op("Range", zero, new, one), old), second)
        columns = op("Unsqueeze", op("Range", zero, total, one), first)
        seen = op("LessOrEqual", columns, rows)
        if left >= 0:
            seen = op("And", seen, op("Less", op("Sub", rows, columns), reach))
        mask, hidden, made = op("Where", seen, none, low), "x", []
        for at, (wq, wk, wv, wo) in enumerate(weights):
            parts = [
                op("Transpose", op("Reshape", op("MatMul", hidden, w), shape), perm=[0, 2, 1, 3]) for w in (wq, wk, wv)
            ]
            for i, kind in ((1, "key"), (2, "value")):
                joined = [f"past_{kind}_{at}", parts[i]] if cached else [parts[i]]
                parts[i] = op("Concat", *joined, axis=2)
                made.append(parts[i])
            scores = op("MatMul", op("Mul", parts[0], scale), op("Transpose", parts[1], perm=[0, 1, 3, 2]))
            p = op("Softmax", op("Add", scores, mask), axis=-1)
            y = op("Reshape", op("Transpose", op("MatMul", p, parts[2]), perm=[0, 2, 1, 3]), merged)
            hidden = op("Tanh", op("Add", hidden, op("MatMul", y, wo)))
        outs = [value(hidden), *(value(m, shape=[None] * 4) for m in made)]
        return helper.make_graph(nodes, "with_past" if cached else "without", [], outs)

    names = ["y", *(f"present_{kind}_{i}" for i in range(layers) for kind in ("key", "value"))]
    node = helper.make_node(
        "If", ["use_cache_branch"], names, "optimum::if", then_branch=branch(True), else_branch=branch(False)
    )
    sizes: list[int | str] = ["batch", "sequence", "past"] if dynamic else [1, length, past]
    inputs = [value("x", shape=[sizes[0], sizes[1], width])]
    inputs += [
        value(f"past_{kind}_{i}", shape=[sizes[0], heads, sizes[2], dim])
        for i in range(layers)
        for kind in ("key", "value")
    ]
    inputs.append(value("use_cache_branch", TensorProto.BOOL, [1]))
    result = model([node], inputs, names, stored)
    for output in result.graph.output[1:]:
        output.CopyFrom(value(output.name, shape=[None] * 4))
    return result
