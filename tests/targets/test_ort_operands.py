"""Operands of our ops are read where they lie, outputs written where they are wanted: every spelling of a part of a
packed tensor, what is nearly one, and the same numbers through function bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from attncompile.core.layout import part, unpacked
from attncompile.plugins import kernels
from attncompile.targets.ort_fusions import fuse
from tests.targets.test_ort_fusions import Graph, run

B, N, H, D = 2, 7, 3, 16
C = H * D
COPIES = {"Transpose", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Concat"}
Makes = Callable[[Graph, str], list[Any]]
"""query, key and value of a tensor [B, N, 3 C]."""


@pytest.fixture(autouse=True)
def registered() -> None:
    for kernel in kernels().values():
        kernel.register()


def five(g: Graph, x: str, *dims: Any) -> Any:
    return g.op("Reshape", x, np.array(dims or (B, N, 3, H, D)))


def heads_first(g: Graph, x: str) -> Any:
    return g.op("Transpose", five(g, x), perm=[2, 0, 3, 1, 4])


def by_gather(g: Graph, x: str) -> list[Any]:
    turned = heads_first(g, x)
    return [g.op("Gather", turned, np.array(i), axis=0) for i in (0, 1, -1)]


def by_split(g: Graph, x: str) -> list[Any]:
    parts = g.op("Split", heads_first(g, x), np.array([1, 1, 1]), outputs=3, axis=0)
    return [g.op("Squeeze", p, np.array([0])) for p in parts]


def by_slice(g: Graph, x: str) -> list[Any]:
    turned = heads_first(g, x)
    ends = ((0, 1), (-2, -1), (2, 1 << 60))
    cut = [g.op("Slice", turned, np.array([a]), np.array([b]), np.array([0]), np.array([1])) for a, b in ends]
    return [g.op("Squeeze", c, np.array([0])) for c in cut]


def in_chunks(g: Graph, x: str) -> list[Any]:
    """torch's chunk on the last axis, then heads."""
    parts = g.op("Split", x, np.array([C, C, C]), outputs=3, axis=-1)
    return [g.op("Transpose", g.op("Reshape", p, np.array([B, N, H, D])), perm=[0, 2, 1, 3]) for p in parts]


def head_by_head(g: Graph, x: str) -> list[Any]:
    """Each head's q, k and v beside one another, as GPT-NeoX and BLOOM have them."""
    five_ = five(g, x, B, N, H, 3, D)
    parts = [g.op("Slice", five_, np.array([i]), np.array([i + 1]), np.array([3])) for i in range(3)]
    return [g.op("Transpose", g.op("Squeeze", p, np.array([3])), perm=[0, 2, 1, 3]) for p in parts]


def of_torch(g: Graph, x: str) -> list[Any]:
    """torch.nn.MultiheadAttention with the batch first: tokens come first inside of it."""
    first = g.op("Transpose", x, perm=[1, 0, 2])
    rows = g.op("Unsqueeze", g.op("Reshape", first, np.array([N, B, 3, C])), np.array([0]))
    turned = g.op("Squeeze", g.op("Transpose", rows, perm=[3, 1, 2, 0, 4]), np.array([3]))
    parts = [g.op("Reshape", g.op("Gather", turned, np.array(i), axis=0), np.array([N, B * H, D])) for i in range(3)]
    return [g.op("Reshape", g.op("Transpose", p, perm=[1, 0, 2]), np.array([B, H, N, D])) for p in parts]


FORMS: dict[str, tuple[Makes, tuple[str, str, str]]] = {
    "gather": (by_gather, ("BN0HD", "BN1HD", "BN2HD")), "split": (by_split, ("BN0HD", "BN1HD", "BN2HD")),
    "slice": (by_slice, ("BN0HD", "BN1HD", "BN2HD")), "chunks": (in_chunks, ("BN0HD", "BN1HD", "BN2HD")),
    "head by head": (head_by_head, ("BNH0D", "BNH1D", "BNH2D")), "torch": (of_torch, ("BN0HD", "BN1HD", "BN2HD")),
}  # fmt: skip


def model(form: Makes, layout: str = "BHND", kind: int = TensorProto.FLOAT, batch: Any = B, n: Any = N) -> ModelProto:
    g = Graph(kind, x=(batch, n, 3 * C))
    y = g.op("Attention", *form(g, "x"), domain="attncompile", scale=0.25,
             **{f"{x}_layout": layout for x in "qkvo"})  # fmt: skip
    return g.model(y)


def layouts(node: NodeProto) -> tuple[str, ...]:
    said = {a.name: a.s.decode() for a in node.attribute if a.name.endswith("_layout")}
    return tuple(said[f"{x}_layout"] for x in "qkvo")


def ours(proto: ModelProto) -> NodeProto:
    (node,) = [n for n in proto.graph.node if n.domain == "attncompile"]
    return node


def written_out(proto: ModelProto) -> ModelProto:
    """Our node in standard ops, by what its layouts say."""
    made = ModelProto()
    made.CopyFrom(proto)
    node = ours(made)
    nodes: list[NodeProto] = []

    def op(op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def constant(name: str, value: Any) -> str:
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
        return name

    operands = []
    for value, layout, name in zip(node.input, layouts(node), "qkv", strict=False):
        chosen = part(layout)
        if chosen is not None:
            value = op("Gather", [value, constant(f"w{name}", chosen[1])], f"w/{name}", axis=chosen[0])
        order = [unpacked(layout).index(x) for x in ("BHDN" if name == "k" else "BHND")]
        operands.append(op("Transpose", [value], f"w/{name}/turned", perm=order))
    scores = op("Mul", [op("MatMul", operands[:2], "w/s"), constant("w/scale", np.float32(0.25))], "w/scaled")
    out = op("MatMul", [op("Softmax", [scores], "w/p", axis=-1), operands[2]], "w/out")
    op("Transpose", [out], node.output[0], perm=["BHND".index(x) for x in layouts(node)[3]])
    place = list(made.graph.node).index(node)
    for new in nodes[::-1]:
        made.graph.node.insert(place, new)
    made.graph.node.remove(node)
    return made


def same(proto: ModelProto, fused: ModelProto, **sizes: int) -> bool:
    one, two = (run(written_out(p), 3, sizes)[0] for p in (proto, fused))
    return one.shape == two.shape and bool(np.allclose(one, two, rtol=1e-5, atol=1e-6))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_parts_of_one_product(form: str, kind: int) -> None:
    make, wanted = FORMS[form]
    proto = model(make, kind=kind)
    result = fuse(proto, Path())
    node = ours(result.proto)
    assert layouts(node)[:3] == wanted and result.counts["operands"] == 3
    assert len(set(node.input)) == 1 and not COPIES & {n.op_type for n in result.proto.graph.node}
    onnx.checker.check_model(result.proto)
    if kind == TensorProto.FLOAT:
        assert same(proto, result.proto)


def test_batch_and_tokens_of_any_number() -> None:
    def form(g: Graph, x: str) -> list[Any]:
        turned = g.op("Transpose", g.op("Reshape", x, np.array([0, 0, 3, H, D])), perm=[2, 0, 3, 1, 4])
        return [g.op("Gather", turned, np.array(i), axis=0) for i in range(3)]

    proto = model(form, batch="b", n="n")
    result = fuse(proto, Path())
    assert layouts(ours(result.proto))[:3] == ("BN0HD", "BN1HD", "BN2HD")
    assert same(proto, result.proto, b=3, n=5) and same(proto, result.proto, b=1, n=1)

    def chunks(g: Graph, x: str) -> list[Any]:
        parts = g.op("Split", x, np.array([C, C, C]), outputs=3, axis=-1)
        return [g.op("Reshape", p, np.array([0, 0, H, D])) for p in parts]

    proto = model(chunks, "BNHD", batch="b", n="n")
    result = fuse(proto, Path())
    assert layouts(ours(result.proto)) == ("BN0HD", "BN1HD", "BN2HD", "BNHD")
    assert same(proto, result.proto, b=3, n=5)


def test_keys_and_values_of_another_tensor() -> None:
    g = Graph(q=(B, N, C), kv=(B, N + 4, 2 * C))
    query = g.op("Transpose", g.op("Reshape", "q", np.array([B, N, H, D])), perm=[0, 2, 1, 3])
    both = g.op("Transpose", g.op("Reshape", "kv", np.array([B, N + 4, 2, H, D])), perm=[2, 0, 3, 1, 4])
    key, value = (g.op("Gather", both, np.array(i), axis=0) for i in range(2))
    said = {f"{x}_layout": "BHND" for x in "qkvo"}
    proto = g.model(g.op("Attention", query, key, value, domain="attncompile", scale=0.25, **said))
    result = fuse(proto, Path())
    assert layouts(ours(result.proto))[:3] == ("BNHD", "BN0HD", "BN1HD") and same(proto, result.proto)


def test_heads_of_unequal_number() -> None:
    """Four heads of queries on two of keys and values, in one product."""
    g = Graph(x=(B, N, 8 * D))
    cut = [(0, 4), (4, 6), (6, 8)]
    parts = [g.op("Slice", "x", np.array([a * D]), np.array([b * D]), np.array([2])) for a, b in cut]
    rows = [g.op("Reshape", p, np.array([B, N, b - a, D])) for p, (a, b) in zip(parts, cut, strict=True)]
    proto = g.model(g.op("Attention", *rows, domain="attncompile", scale=0.25,
                         **{f"{x}_layout": "BNHD" for x in "qkvo"}))  # fmt: skip
    result = fuse(proto, Path())
    assert layouts(ours(result.proto))[:3] == ("BN0HD", "BN2HD", "BN3HD")
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in result.proto.graph.value_info}
    assert [shapes[v] for v in ours(result.proto).input] == [[B, N, 2, 4, D], [B, N, 4, 2, D], [B, N, 4, 2, D]]


def test_others_that_read_a_part_keep_it() -> None:
    def form(g: Graph, x: str) -> list[Any]:
        found = by_gather(g, x)
        g.also = g.op("Neg", found[1])  # type: ignore[attr-defined]
        return found

    g = Graph(x=(B, N, 3 * C))
    y = g.op("Attention", *form(g, "x"), domain="attncompile", scale=0.25,
             **{f"{x}_layout": "BHND" for x in "qkvo"})  # fmt: skip
    proto = g.model(y, g.also)  # type: ignore[attr-defined]
    result = fuse(proto, Path())
    assert layouts(ours(result.proto))[:3] == ("BN0HD", "BN1HD", "BN2HD") and same(proto, result.proto)
    assert [n.op_type for n in result.proto.graph.node if n.op_type in COPIES] == ["Transpose", "Gather"]


def changed(**options: Any) -> Makes:
    """``by_slice`` with another end, step or perm, or something in between, for the key."""

    def form(g: Graph, x: str) -> list[Any]:
        found = by_gather(g, x)
        source = x if "between" not in options else g.op(options["between"], x)
        turned = g.op("Transpose", five(g, source), perm=options.get("perm", [2, 0, 3, 1, 4]))
        if "both" in options:  # two of three parts: no one place
            two = g.op("Slice", turned, np.array([1]), np.array([3]), np.array([0]))
            found[1] = g.op("ReduceMean", two, np.array([0]), keepdims=0)
        elif "reverse" in options:
            back = g.op("Slice", turned, np.array([1]), np.array([0]), np.array([0]), np.array([-1]))
            found[1] = g.op("Squeeze", back, np.array([0]))
        elif "tokens" in options:
            found[1] = g.op("Slice", found[1], np.array([1]), np.array([N]), np.array([2]))
        elif "chosen" in options:
            found[1] = g.op("Gather", turned, g.op("ArgMin", g.op("Shape", turned), keepdims=0), axis=0)
        elif "rows" in options:
            found[1] = g.op("Reshape", g.op("Reshape", found[1], np.array([B, H, D, N])), np.array([B, H, N, D]))
            found[1] = g.op("Transpose", g.op("Reshape", found[1], np.array([B, H, D, N])), perm=[0, 1, 3, 2])
        else:
            found[1] = g.op("Gather", turned, np.array(1), axis=0)
        return found

    return form


@pytest.mark.parametrize(
    "nearly", [{"both": True}, {"reverse": True}, {"tokens": True}, {"chosen": True}, {"rows": True}], ids=str
)
def test_what_is_no_part(nearly: dict[str, Any]) -> None:
    """Of the key, that is: query and value are parts as before."""
    proto = model(changed(**nearly))
    result = fuse(proto, Path())
    found = layouts(ours(result.proto))
    assert (found[0], found[2]) == ("BN0HD", "BN2HD") and part(found[1]) is None
    if "tokens" not in nearly:
        assert same(proto, result.proto)


def test_another_tensor_between() -> None:
    """What a norm or rotary codes gave is read where that lies, not where they read."""
    proto = model(changed(between="Abs"))
    result = fuse(proto, Path())
    node = ours(result.proto)
    assert layouts(node)[:3] == ("BN0HD", "BN1HD", "BN2HD") and node.input[0] != node.input[1]
    assert same(proto, result.proto)


@pytest.mark.parametrize("batch", [1, B])
def test_an_output_is_written_where_it_is_wanted(batch: int) -> None:
    """As torch.nn.MultiheadAttention gives it: tokens first, heads beside one another."""
    said = {f"{x}_layout": "BHND" for x in "qkvo"}
    g = Graph(**dict.fromkeys("qkv", (batch, H, N, D)))
    y = g.op("Attention", "q", "k", "v", domain="attncompile", scale=0.25, **said)
    rows = g.op("Transpose", g.op("Reshape", y, np.array([batch * H, N, D])), perm=[1, 0, 2])
    proto = g.model(g.op("Neg", g.op("Reshape", rows, np.array([N, batch, C]))))
    result = fuse(proto, Path())
    assert result.counts == {"outputs": 1}
    assert layouts(ours(result.proto))[3] in (["BNHD", "NBHD"] if batch == 1 else ["NBHD"])
    assert not COPIES & {n.op_type for n in result.proto.graph.node} and same(proto, result.proto)


def test_an_output_of_any_batch_and_length() -> None:
    g = Graph(**dict.fromkeys("qkv", ("b", H, "n", D)))
    y = g.op("Attention", "q", "k", "v", domain="attncompile", scale=0.25, **{f"{x}_layout": "BHND" for x in "qkvo"})
    proto = g.model(g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, C])))
    result = fuse(proto, Path())
    assert result.counts == {"outputs": 1} and same(proto, result.proto, b=3, n=5)


def test_an_output_that_is_read_as_it_is() -> None:
    said = {f"{x}_layout": "BHND" for x in "qkvo"}
    for columns, twice in ((True, False), (False, True)):
        g = Graph(**dict.fromkeys("qkv", (B, H, N, D)))
        y = g.op("Attention", "q", "k", "v", domain="attncompile", scale=0.25, **said)
        turned = g.op("Transpose", y, perm=[0, 1, 3, 2] if columns else [0, 2, 1, 3])
        proto = g.model(turned, g.op("Neg", y)) if twice else g.model(turned)
        result = fuse(proto, Path())
        assert "outputs" not in result.counts and layouts(ours(result.proto))[3] == "BHND"


@pytest.mark.parametrize("way", ["gather", "slice", "split"])
def test_one_place_of_an_output_is_cut_as_before(way: str) -> None:
    """The class token: the output must not become a tensor of that token alone."""
    g = Graph(**dict.fromkeys("qkv", (B, H, 2, D)))
    y = g.op("Attention", "q", "k", "v", domain="attncompile", scale=0.25, **{f"{x}_layout": "BHND" for x in "qkvo"})
    turned = g.op("Transpose", y, perm=[0, 2, 1, 3])
    if way == "gather":
        ends = [g.op("Gather", turned, np.array(0), axis=1)]
    elif way == "slice":
        ends = [g.op("Slice", turned, np.array([0]), np.array([1]), np.array([1]))]
    else:
        ends = g.op("Split", turned, np.array([1, 1]), outputs=2, axis=1)
    proto = g.model(*(g.op("Neg", e) for e in ends))
    result = fuse(proto, Path())
    sizes = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in result.proto.graph.output]
    assert sizes == [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in proto.graph.output]
    for one, two in zip(run(written_out(proto), 3, {}), run(written_out(result.proto), 3, {}), strict=True):
        assert one.shape == two.shape and np.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_tokens_in_the_last_axis_stay_outside() -> None:
    """Attention on channels first, as in convolutional models: kernels of linear attention alone read such columns."""
    g = Graph(x=(B, 3 * C, N))
    turned = g.op("Transpose", g.op("Reshape", "x", np.array([B, 3, H, D, N])), perm=[1, 0, 2, 4, 3])
    parts = [g.op("Gather", turned, np.array(i), axis=0) for i in range(3)]
    proto = g.model(g.op("Attention", *parts, domain="attncompile", scale=0.25,
                         **{f"{x}_layout": "BHND" for x in "qkvo"}))  # fmt: skip
    result = fuse(proto, Path())
    assert not any(unpacked(x).endswith("N") for x in layouts(ours(result.proto))) and same(proto, result.proto)
