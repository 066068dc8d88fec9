"""From ONNX nodes through the real ``tensorrt.plugin`` to launches, which are those that our own launcher makes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attncompile.core.kernel import ARCHITECTURES
from attncompile.kernels import symbols
from attncompile.kernels.arguments import grid, int32
from attncompile.kernels.tensorrt.register import register
from attncompile.plugins import kernels
from tests.kernels.tensorrt.conftest import SMS, Prepared, prepare
from tests.kernels.tensorrt.samples import SAMPLES, Sample
from tests.kernels.tensorrt.walk import Launch, assemble, check_entry, walk


def test_every_op_with_kernels_has_a_sample() -> None:
    missing = set(kernels()) - {s.op for s in SAMPLES}
    assert not missing, f"add a node of {', '.join(sorted(missing))} to tests/kernels/tensorrt/samples.py"


def walked(trt: Any, one: Prepared, multiprocessors: int = SMS) -> list[Launch]:
    register(list(one.made.plugins.values()), one.bundle.load, multiprocessors)
    (found,) = walk(trt, one.rewritten, one.sample.sizes).values()
    return found


def sizes_of(one: Prepared, number: int) -> list[dict[str, int]]:
    """The bounds of the profile, and ``number`` seeded points inside of it."""
    ranges, rng = one.sample.sizes, random.Random(0)
    found = [{n: r[i] for n, r in ranges.items()} for i in range(3)]
    return found + [{n: rng.randint(r[0], r[2]) for n, r in ranges.items()} for _ in range(number)]


def expected(one: Prepared, launch: Launch, sizes: dict[str, int], multiprocessors: int = SMS) -> Any:
    """Entry, grid, int32 arguments and shapes of the outputs by the bundle and NumPy, for the launch's tactic."""
    (made,) = one.made.plugins.values()
    entry = one.bundle.entries[made.entries[launch.tactic - 1]]
    shapes = {n: tuple(sizes.get(d, d) for d in dims) for n, (_, dims) in one.sample.inputs.items()}  # type: ignore[call-overload]
    assert one.node.symbols is not None
    values = {**symbols.values(one.node.symbols, shapes), "SMS": multiprocessors}
    numbers = [int32(a, values, "") for a in entry.arguments if a.kind == "int32"]
    return entry, grid(entry, values, ""), numbers, output_shapes(one.sample, shapes)


AXES = {
    "log_sum_exp": "BHN", "state": "BGCFE", "total": "BGCF", "mean": "BGCE", "top": "BGCF", "final_state": "BGFE",
    "written": "BMGE", "solved": "BGTLL",
    "final_total": "BGF", "whole_state": "BG1FE", "whole_total": "BG1F", "whole_mean": "BG1E",
    "scores": "BHtc", "rows": "BHr3", "columns": "e", "kinds": "e", "mass": "BHrc",
}  # fmt: skip
"""Of inputs and outputs beside the operands, from the definitions of the ops."""
OF_OPERANDS = {"query": "BNHD", "key": "BMGF", "value": "BMGE"}


def of_blocks(attributes: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of what chooses blocks: t tiles of queries, c blocks of keys, r rows of blocks, e entries of lists."""
    found = dict(sizes)
    if "stride" in attributes:
        found |= {"t": -(-found["N"] // attributes["stride"]), "c": -(-found["M"] // attributes["block"])}
    if "tiles" in attributes:
        found |= {"r": -(-found["t"] // attributes["tiles"]), "3": 3}
        found["e"] = found["B"] * found["H"] * found["r"] * found["c"]
    return found


def output_shapes(sample: Sample, shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """From the definitions of the ops. Without feature maps there are as many features as the head dim."""
    sizes = {"1": 1}
    for name, shape in shapes.items():
        axes = "" if sample.op == "BlockSparseAttention" else AXES.get(name, "")
        if name in OF_OPERANDS:
            layout = str(sample.attributes.get(f"{name[0]}_layout", "BNHD"))
            axes = layout.translate(str.maketrans("BNHD", OF_OPERANDS[name]))
        sizes |= dict(zip(axes, shape, strict=True)) if axes else {}
    if "feature_weight" in shapes:
        sizes["F"] = 2 * shapes["feature_weight"][2]
    if "M" in sizes:
        chunk = int(sample.attributes.get("chunk", 0)) or sizes["M"]
        sizes.setdefault("C", (sizes["M"] + chunk - 1) // chunk)
        tile = int(sample.attributes.get("tile", 64))
        sizes |= {"L": tile, "T": -(-sizes["M"] // tile)}
    sizes = of_blocks(sample.attributes, sizes)
    layout = str(sample.attributes.get("o_layout", "BNHD")).replace("D", "E")
    return [tuple(sizes[a] for a in AXES.get(name, layout)) for name in sample.outputs]


SLOW = pytest.mark.slow
ALL = [pytest.param(s, marks=SLOW) if s.slow else s for s in SAMPLES]


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_launches_are_those_of_the_bundle(sample: Any, tensorrt: Any, prepared: dict[str, Prepared]) -> None:
    """Grid, block, shared memory, every int32 argument and the outputs' shapes, at the bounds and inside of them."""
    one = prepared[sample.name]
    found = walked(tensorrt[0], one)
    assert len(found) == len(next(iter(one.made.plugins.values())).entries) >= 1
    assert any(launch.shared <= 48 << 10 for launch in found)
    for launch in found:
        check_entry(launch)
        for sizes in sizes_of(one, 20):
            entry, blocks, numbers, outputs = expected(one, launch, sizes)
            assert launch.grid(sizes) == blocks
            assert launch.arguments(sizes) == numbers
            assert launch.shapes(sizes) == outputs
        assert launch.block() == (entry.threads, 1, 1)
        assert launch.shared == entry.shared


def test_a_kernel_that_wants_the_number_of_multiprocessors_gets_it(newest: Any, prepared: dict[str, Prepared]) -> None:
    """``SMS`` is no symbol of TensorRT's: the GPU that the engine is built for is part of the engine."""
    one = prepared["dense"]
    bundle = one.bundle
    (made,) = one.made.plugins.values()
    persistent = {
        i: replace(bundle.load(i), entry=replace(bundle.entries[i], grid=("min(cdiv(NQ, 64) * H * B, SMS)", "1", "1")))
        for i in made.entries
    }
    register([made], persistent.__getitem__, 7)
    (found,) = walk(newest[0], one.rewritten, one.sample.sizes).values()
    for launch in found:
        assert launch.grid({"B": 1, "N": 40, "M": 50}) == (4, 1, 1)
        assert launch.grid({"B": 1, "N": 333, "M": 50}) == (7, 1, 1)


@pytest.mark.parametrize("architecture", [a if a == 80 else pytest.param(a, marks=SLOW) for a in ARCHITECTURES])
def test_ptxas_takes_what_tensorrt_is_given(
    architecture: int, newest: Any, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    """One op with a mask, for each architecture."""
    from triton import knobs

    sample = next(s for s in SAMPLES if s.name == "key mask")
    one = prepared[sample.name] if architecture == 80 else prepare([sample], architecture, tmp_path / "b")[sample.name]
    for launch in walked(newest[0], one):
        check_entry(launch)
        assert len(assemble(launch, architecture, knobs.nvidia.ptxas.path)) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "neighborhood"])
def test_hopper_tactics(name: str, newest: Any, tmp_path: Path) -> None:
    """sm_90 has Gluon kernels, which are persistent and need much shared memory; a small tactic stays beside them."""
    from triton import knobs

    sample = next(s for s in SAMPLES if s.name == name)
    widened = {n: (k, (*d[:-1], 64)) for n, (k, d) in sample.inputs.items()}
    one = prepare([replace(sample, inputs=widened)], 90, tmp_path / "b")[name]
    found = walked(newest[0], one, 132)
    languages = {one.bundle.entries[e].language for p in one.made.plugins.values() for e in p.entries}
    assert languages == {"triton", "gluon"}
    assert min(launch.shared for launch in found) <= 48 << 10 < max(launch.shared for launch in found)
    for launch in found:
        check_entry(launch)
        assemble(launch, 90, knobs.nvidia.ptxas.path)
        for sizes in sizes_of(one, 20):
            _, blocks, numbers, outputs = expected(one, launch, sizes, 132)
            assert (launch.grid(sizes), launch.arguments(sizes)) == (blocks, numbers)
            assert launch.shapes(sizes) == outputs
