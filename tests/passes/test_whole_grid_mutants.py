"""Random changes of a layer of Swin: its windows stay, or what replaces it is right as shown by running."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from attncompile.core.errors import AttncompileError
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from attncompile.passes.whole_grid import whole_grid
from tests.passes.attention_graphs import save
from tests.passes.swin_graphs import Layer
from tests.passes.test_whole_grid import HIDDEN, distance, replaced, run

LAYERS = [
    Layer((6, 12), (3, 4), (1, 2)), Layer((6, 12), (3, 4), (1, 2), roll="gather", mask="merged"),
    Layer((6, 12), (3, 4), (0, 2), qkv="fused"), Layer((6, 9), (3, 3), (1, 1), fill=HIDDEN),
    Layer((6, 9), (3, 3), (0, 0), bias=False, batch=2), Layer((4, 6), (2, 3), (1, 1), late=True, cosine=True),
]  # fmt: skip


def mutant(proto: ModelProto, rng: np.random.Generator) -> str:
    """Changes one thing in place; says which."""
    graph = proto.graph
    while True:
        what = str(rng.choice(["integer", "swap", "perm", "float", "input"]))
        tensor = graph.initializer[int(rng.integers(len(graph.initializer)))]
        node = graph.node[int(rng.integers(len(graph.node)))]
        array = numpy_helper.to_array(tensor).copy()
        if what in ("integer", "swap") and array.dtype == np.int64 and array.size:
            flat = array.reshape(-1)
            a, b = (int(x) for x in rng.integers(flat.size, size=2))
            if what == "integer":
                flat[a] += int(rng.choice([-1, 1]))
            elif flat[a] == flat[b]:
                continue
            else:
                flat[[a, b]] = flat[[b, a]]
        elif what == "float" and array.dtype == np.float32 and array.ndim > 2:
            array.reshape(-1)[int(rng.integers(array.size))] += np.float32(rng.choice([-100.0, 0.5]))
        elif what == "perm" and node.op_type == "Transpose":
            perm = next(a for a in node.attribute if a.name == "perm")
            a, b = (int(x) for x in rng.choice(len(perm.ints), 2, replace=False))
            perm.ints[a], perm.ints[b] = perm.ints[b], perm.ints[a]
            return f"perm of {node.output[0]}"
        elif what == "input" and node.op_type in ("Slice", "Reshape", "MatMul", "Add", "Concat", "Transpose"):
            before = [n.output[0] for n in graph.node][: list(graph.node).index(node)]
            if not before:
                continue
            node.input[0] = str(rng.choice(before))
            return f"input of {node.output[0]}"
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return f"{what} in {tensor.name}"


def test_a_mutant_is_kept_or_right(tmp_path: Path) -> None:
    ran = lifted = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        layer = LAYERS[seed % len(LAYERS)]
        proto = layer.model()
        del proto.graph.value_info[:]
        said = mutant(proto, rng)
        try:
            proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
            want = run(proto, layer)
        except Exception:  # not a model any more: ONNX Runtime and the checker raise untyped errors
            continue
        if not np.isfinite(want).all():
            continue
        ran += 1
        try:
            model = load(save(proto, tmp_path))
            profile = profile_for(model, {})
            found, working = detect(model, profile), model
            if any(m.code in HELPED for m in found.near_misses):
                working = separate(model, profile)
                found = detect(working, profile)
            working, found = whole_grid(working, profile, found)
        except AttncompileError:
            continue
        assert distance(run(working.proto, layer), want) <= 1e-6, (seed, said)
        sites = [s for s in found.sites if s.form.startswith("windowed ")]
        if not sites:
            continue
        lifted += 1
        assert distance(run(replaced(model, working, sites), layer), want) <= 1e-5, (seed, said)
    assert ran >= 30 and lifted >= 8, (ran, lifted)
