"""From ONNX nodes through the real ``tensorrt.plugin`` to launches, which are those that our own launcher makes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from attncompile.kernels import symbols
from attncompile.kernels.arguments import grid, int32
from attncompile.kernels.tensorrt.register import register
from attncompile.plugins import kernels
from tests.kernels.tensorrt.conftest import SMS, Prepared
from tests.kernels.tensorrt.samples import SAMPLES
from tests.kernels.tensorrt.walk import Launch, check_entry, walk


def test_every_op_with_kernels_has_a_sample() -> None:
    missing = set(kernels()) - {s.op for s in SAMPLES}
    assert not missing, f"add a node of {', '.join(sorted(missing))} to SAMPLES in {SAMPLES.__class__.__module__}"


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
    named = {"B": values["B"], "N": values["NQ"], "H": values["H"], "D": values["DV"]}
    layout = one.sample.attributes.get("o_layout", "BNHD")
    outputs = {"output": tuple(named[a] for a in layout), "log_sum_exp": (named["B"], named["H"], named["N"])}
    return entry, grid(entry, values, ""), numbers, [outputs[n] for n in one.sample.outputs]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
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
