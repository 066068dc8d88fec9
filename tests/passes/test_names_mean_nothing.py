"""Names, node order, Identity and Cast nodes and the opset say nothing: same sites, same facts."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, helper, shape_inference, version_converter

from attncompile.core.model import Model
from attncompile.core.profile import Range
from attncompile.passes.detect import detect
from attncompile.passes.index import graphs_within, local_names
from attncompile.passes.load import load, node_inputs
from attncompile.passes.normalise import normalise
from attncompile.passes.symbols import profile_for, symbols
from tests.exports import exported
from tests.passes.attention_graphs import Spec, build, save
from tests.passes.body_graphs import branched, decoder, looped, nested, scanned

BASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "window": lambda: build(Spec(mask="window", kv_heads=2, padding=True, guard=True, mask_form="where")),
    "causal": lambda: build(Spec(mask="causal", fused_batch=True, scale_at="scores")),
    "dynamic": lambda: build(Spec(mask="window", dynamic=True, key_first=True, scale_at="both")),
    "einsum": lambda: build(Spec(mask="window", einsum=True, mask_form="computed", right=0)),
    "mistral": lambda: onnx.load(exported("mistral")),
    "gpt2": lambda: onnx.load(exported("gpt2", "torchscript", 17)),
    "bert": lambda: onnx.load(exported("bert", "torchscript", 17)),
    "swin": lambda: onnx.load(exported("swin", "torchscript", 17)),
    "vit": lambda: onnx.load(exported("vit")),
    "dit": lambda: onnx.load(exported("dit")),
    "llama": lambda: onnx.load(exported("llama", dynamic=("sequence",))),
    "merged decoder": lambda: decoder(3, length=13, past=5, dynamic=False),
    "dynamic decoder": lambda: decoder(4, layers=1),
    "branches": lambda: branched(Spec(mask="window", kv_heads=2, padding=False), Spec(mask="causal", seed=1)),
    "loop": lambda: looped(Spec(mask="window", left=2, right=1, dynamic=True)),
    "scan": lambda: scanned(Spec(mask="causal", scale_at="both")),
    "if in loop": lambda: nested(Spec(mask="window", einsum=True), Spec(mask="window", left=1, seed=1)),
}


def facts(proto: onnx.ModelProto, folder: Path, normal: bool = False) -> list[dict[str, Any]]:
    """Every site without its names, in an order that names do not decide."""
    model: Model = load(save(proto, folder))
    if normal:
        model = normalise(model)
    found = detect(model, profile_for(model, {s: Range(1, 13, 29) for s in symbols(model)}))
    sites = []
    for site in found.sites:
        mask = [(p.kind, p.left, p.right, p.additive, p.certificate.general) for p in site.mask.parts]
        sites.append({
            "kind": site.kind, "scope": re.sub(r"'(\\.|[^'])*'", "", site.scope),
            "heads": site.heads, "kv_heads": site.kv_heads, "dims": (site.head_dim, site.value_dim),
            "lengths": (site.query_length, site.key_length), "batch": site.batch, "scale": round(site.scale, 6),
            "softcap": site.softcap, "dtype": site.dtype, "mask": sorted(mask), "rows": site.mask.masked_rows,
            "fills": sorted(site.mask.fills), "guarded": site.mask.guarded,
        })  # fmt: skip
    return sorted(sites, key=repr)


def renamed(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Every node and value that is no input or output gets a name that means nothing; some nodes get none at all.
    Bodies beside one another share names, as those of exporters do.
    """
    rename(proto.graph, {v.name: v.name for v in (*proto.graph.input, *proto.graph.output)} | {"": ""}, rng, "v")
    return proto


def rename(graph: onnx.GraphProto, outer: dict[str, str], rng: np.random.Generator, prefix: str) -> None:
    names = dict(outer)
    for name in sorted(local_names(graph) - set(outer)):
        names[name] = f"{prefix}{len(names) * 7919 % 10007}_{len(names)}"
    for at, node in enumerate(graph.node):
        node.name = "" if rng.random() < 0.5 else f"n{at * 7919 % 10007}"
        node.input[:], node.output[:] = (names[v] for v in node.input), (names[v] for v in node.output)
        node.doc_string = ""
        del node.metadata_props[:]
        for inner in bodies(node):
            rename(inner, names, rng, prefix + "v")
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name = names[item.name]
    for item in graph.value_info:
        item.name = names.get(item.name, item.name)


def bodies(node: NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def shuffled(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Another topological order, drawn at random, in every graph."""
    shuffle(proto.graph, {""}, rng)
    return proto


def shuffle(graph: onnx.GraphProto, outer: set[str], rng: np.random.Generator) -> None:
    waiting = list(graph.node)
    made = outer | {v.name for v in graph.input} | {t.name for t in graph.initializer}
    order: list[NodeProto] = []
    while waiting:
        ready = [i for i, n in enumerate(waiting) if made.issuperset((*n.input, *node_inputs(n)))]
        node = waiting.pop(ready[int(rng.integers(len(ready)))])
        made.update(node.output)
        order.append(node)
    for node in order:
        for inner in bodies(node):
            shuffle(inner, made, rng)
    with_nodes(graph, order)


def unsorted(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """No topological order at all, as some tools leave their files."""
    for graph in list(graphs_within(proto.graph))[::-1]:
        nodes = list(graph.node)
        with_nodes(graph, [nodes[i] for i in rng.permutation(len(nodes))])
    return proto


def with_identities(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Identity nodes behind a third of all values."""
    return with_inserted(proto, rng, lambda v, out: helper.make_node("Identity", [v], [out]), lambda v: True)


def with_casts(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Casts from float to float behind a third of all float values."""
    inferred = shape_inference.infer_shapes(proto, data_prop=True)
    types: dict[str, set[int]] = {}
    for graph in graphs_within(inferred.graph):
        for v in (*graph.value_info, *graph.input):
            types.setdefault(v.name, set()).add(v.type.tensor_type.elem_type)
    make = helper.make_node
    return with_inserted(proto, rng, lambda v, out: make("Cast", [v], [out], to=1), lambda v: types.get(v) == {1})


def with_inserted(
    proto: onnx.ModelProto, rng: np.random.Generator, make: Callable[[str, str], NodeProto], fits: Callable[[str], bool]
) -> onnx.ModelProto:
    insert(proto.graph, {}, rng, make, fits)
    return proto


def insert(
    graph: onnx.GraphProto, outer: dict[str, str], rng: np.random.Generator, make: Callable[[str, str], NodeProto],
    fits: Callable[[str], bool],
) -> None:  # fmt: skip
    """``outer``: values made outside, and by what name they are read; a body may read either."""
    outputs = {o.name for o in graph.output}
    nodes: list[NodeProto] = []
    names = {v: name for v, name in outer.items() if rng.random() < 0.5}
    for node in graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        for inner in bodies(node):
            insert(inner, names, rng, make, fits)
        nodes.append(node)
        for value in node.output:
            if value and value not in outputs and fits(value) and rng.random() < 0.34:
                made = make(value, "")
                names[value] = made.output[0] = f"{value}__{made.op_type}"
                nodes.append(made)
    with_nodes(graph, nodes)


def with_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


RUNS = 26
"""The newest opset that ONNX Runtime takes."""


@functools.cache
def unchanged(name: str, normal: bool = False) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return facts(BASES[name](), Path(folder), normal)


CHANGES = (renamed, shuffled, unsorted, with_identities, with_casts)


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
@pytest.mark.parametrize("name", BASES)
def test_same_sites_and_facts(name: str, change: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    before = unchanged(name)
    assert before
    assert facts(change(BASES[name](), np.random.default_rng(len(name))), tmp_path) == before


@pytest.mark.parametrize("name", BASES)
def test_all_changes_at_once(name: str, tmp_path: Path) -> None:
    rng, proto = np.random.default_rng(5), BASES[name]()
    before = unchanged(name)
    for change in (with_identities, with_casts, shuffled, renamed):
        proto = change(proto, rng)
    assert facts(proto, tmp_path) == before


OPSETS = [
    (name, opset)
    for at, name in enumerate(BASES)
    for opset in range(18, 28)
    if name in ("window", "einsum") or opset == 27 or opset % 4 == at % 4
]
"""All of two, whose conversion is quick; of each other the newest, which all conversions lead to, and every fourth."""


@pytest.mark.parametrize(("name", "opset"), OPSETS)
def test_converted_to_another_opset(name: str, opset: int, tmp_path: Path) -> None:
    converted = version_converter.convert_version(BASES[name](), opset)
    if opset <= RUNS:
        ort.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])  # it is a valid model
    assert facts(converted, tmp_path) == unchanged(name)


@pytest.mark.parametrize("name", ["gpt2", "bert", "swin"])
def test_normalising_changes_no_facts(name: str, tmp_path: Path) -> None:
    """Opset 17 is converted to 18 before anything is replaced: the sites shown are those that are replaced."""
    assert unchanged(name, normal=True) == unchanged(name)
