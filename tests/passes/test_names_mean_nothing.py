"""Names, node order, Identity and Cast nodes and the opset say nothing: same sites, same facts."""

from __future__ import annotations

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
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.symbols import profile_for, symbols
from tests.exports import exported
from tests.passes.attention_graphs import Spec, build, save

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
            "kind": site.kind, "heads": site.heads, "kv_heads": site.kv_heads, "dims": (site.head_dim, site.value_dim),
            "lengths": (site.query_length, site.key_length), "batch": site.batch, "scale": round(site.scale, 6),
            "softcap": site.softcap, "dtype": site.dtype, "mask": sorted(mask), "rows": site.mask.masked_rows,
            "fills": sorted(site.mask.fills), "guarded": site.mask.guarded,
        })  # fmt: skip
    return sorted(sites, key=repr)


def renamed(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Every node and value that is no input or output gets a name that means nothing; some nodes get none at all."""
    kept = {v.name for v in (*proto.graph.input, *proto.graph.output)} | {""}
    names: dict[str, str] = {}

    def other(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"v{len(names) * 7919 % 10007}_{len(names)}")

    for at, node in enumerate(proto.graph.node):
        node.name = "" if rng.random() < 0.5 else f"n{at * 7919 % 10007}"
        node.input[:], node.output[:] = map(other, node.input), map(other, node.output)
        node.doc_string = ""
        del node.metadata_props[:]
    for item in (*proto.graph.initializer, *proto.graph.value_info):
        item.name = other(item.name)
    return proto


def shuffled(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Another topological order, drawn at random."""
    waiting = list(proto.graph.node)
    made = {v.name for v in proto.graph.input} | {t.name for t in proto.graph.initializer} | {""}
    order: list[NodeProto] = []
    while waiting:
        ready = [i for i, n in enumerate(waiting) if all(v in made for v in n.input)]
        node = waiting.pop(ready[int(rng.integers(len(ready)))])
        made.update(node.output)
        order.append(node)
    return with_nodes(proto, order)


def unsorted(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """No topological order at all, as some tools leave their files."""
    nodes = list(proto.graph.node)
    return with_nodes(proto, [nodes[i] for i in rng.permutation(len(nodes))])


def with_identities(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Identity nodes behind a third of all values."""
    return with_inserted(proto, rng, lambda v, out: helper.make_node("Identity", [v], [out]), frozenset())


def with_casts(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Casts from float to float behind a third of all float values."""
    inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
    others = frozenset(o for n in proto.graph.node for o in n.output if types.get(o) != 1)
    return with_inserted(proto, rng, lambda v, out: helper.make_node("Cast", [v], [out], to=1), others)


def with_inserted(
    proto: onnx.ModelProto, rng: np.random.Generator, make: Callable[[str, str], NodeProto], skip: frozenset[str]
) -> onnx.ModelProto:
    outputs = {o.name for o in proto.graph.output}
    nodes: list[NodeProto] = []
    names: dict[str, str] = {}
    for node in proto.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        nodes.append(node)
        for value in node.output:
            if value and value not in outputs | skip and rng.random() < 0.34:
                made = make(value, "")
                names[value] = made.output[0] = f"{value}__{made.op_type}"
                nodes.append(made)
    return with_nodes(proto, nodes)


def with_nodes(proto: onnx.ModelProto, nodes: list[NodeProto]) -> onnx.ModelProto:
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return proto


CHANGES = (renamed, shuffled, unsorted, with_identities, with_casts)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_same_sites_and_facts(name: str, change: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    before = facts(BASES[name](), tmp_path)
    assert before
    for seed in range(2):
        assert facts(change(BASES[name](), np.random.default_rng(seed)), tmp_path) == before


@pytest.mark.parametrize("name", BASES)
def test_all_changes_at_once(name: str, tmp_path: Path) -> None:
    rng, proto = np.random.default_rng(5), BASES[name]()
    before = facts(proto, tmp_path)
    for change in (with_identities, with_casts, shuffled, renamed):
        proto = change(proto, rng)
    assert facts(proto, tmp_path) == before


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("opset", range(19, 26))
def test_converted_to_a_newer_opset(name: str, opset: int, tmp_path: Path) -> None:
    proto = BASES[name]()
    before = facts(proto, tmp_path)
    converted = version_converter.convert_version(proto, opset)
    ort.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])  # it is a valid model
    assert facts(converted, tmp_path) == before


@pytest.mark.parametrize("name", ["gpt2", "bert", "swin"])
def test_normalising_changes_no_facts(name: str, tmp_path: Path) -> None:
    """Opset 17 is converted to 18 before anything is replaced: the sites shown are those that are replaced."""
    assert facts(BASES[name](), tmp_path, normal=True) == facts(BASES[name](), tmp_path)
