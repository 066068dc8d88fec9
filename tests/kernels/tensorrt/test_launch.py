"""The same walk on a GPU: it ends in ``cuLaunchKernel``, with exactly the arguments that TensorRT would pass, and the
results are those of float64. Untested stays, without TensorRT, that it makes the calls which ``walk`` makes.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from attncompile.kernels.tensorrt.register import register
from attncompile.plugins import kernels
from attncompile.plugins.block_select.op import SCORES, SELECT
from attncompile.plugins.linear_attention.op import COMBINE, SOLVE, STEP
from tests.kernels.tensorrt.conftest import Prepared, prepare
from tests.kernels.tensorrt.interpreted_job import Job
from tests.kernels.tensorrt.results import LARGE, SMALL, inputs, points, poisoned, problems
from tests.kernels.tensorrt.samples import QUICK, SAMPLES, Sample
from tests.kernels.tensorrt.walk import Launch, check_entry, walk

ROOT = Path(__file__).parents[3]


class Machine:
    """Loads and launches as the driver does. ``driver`` may be a double that records."""

    def __init__(self, driver: Any, device: int = 0) -> None:
        self.driver = driver
        handle = driver.device(device)
        self.capability, self.multiprocessors = driver.capability(handle), driver.multiprocessors(handle)
        self.context = driver.primary_context(handle)

    def launch(self, launch: Launch, sizes: Mapping[str, int], pointers: Mapping[str, int]) -> None:
        """Inputs, int32 arguments, outputs: nothing else."""
        self.driver.make_current(self.context)
        module = self.driver.load(launch.ptx.encode() + b"\0")
        function = self.driver.function(module, launch.name)
        if launch.shared > 48 << 10:
            self.driver.allow_shared(function, launch.shared)  # whether TensorRT does this is open
        storage: list[Any] = [ctypes.c_void_p(pointers[n]) for n in launch.inputs]
        storage += [ctypes.c_int32(n) for n in launch.arguments(sizes)]
        storage += [ctypes.c_void_p(pointers[n]) for n in launch.outputs]
        values = (ctypes.c_void_p * len(storage))(*(ctypes.addressof(s) for s in storage))
        x, y, z = launch.block()
        assert (y, z) == (1, 1)
        self.driver.launch(function, launch.grid(sizes), x, launch.shared, 0, values)
        self.kept = storage


class Recorder:
    """A driver that launches nothing and keeps the parameters."""

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1

    def launch(self, function: int, grid: Any, threads: int, shared: int, stream: int, values: Any) -> None:
        self.launched.append(
            (grid, threads, shared, [ctypes.cast(v, ctypes.POINTER(ctypes.c_int32))[0] for v in values])
        )


def test_parameters_are_in_tensorrts_order(newest: Any, prepared: dict[str, Prepared]) -> None:
    """Without a GPU: what would be launched, from the addresses of the parameters."""
    one, recorder = prepared["key mask"], Recorder()
    register(list(one.made.plugins.values()), one.bundle.load, 108)
    (found,) = walk(newest[0], one.rewritten, one.sample.sizes).values()
    sizes = {"B": 2, "N": 7, "M": 11}
    pointers = {n: 100 + i for i, n in enumerate(("query", "key", "value", "key_mask", "output"))}
    for launch in found:
        Machine(recorder).launch(launch, sizes, pointers)
        grid, threads, shared, values = recorder.launched[-1]
        assert (grid, threads, shared) == (launch.grid(sizes), launch.block()[0], launch.shared)
        assert values[:4] == [100, 101, 102, 103] and values[-1] == 104
        assert values[4:-1] == launch.arguments(sizes)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, dict[str, Prepared]]]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("triton")
    from attncompile.kernels.driver import driver

    machine = Machine(driver())
    yield machine, prepare([*SAMPLES, *LARGE], machine.capability, tmp_path_factory.mktemp("gpu"))


def walked(trt: Any, one: Prepared, multiprocessors: int) -> list[Launch]:
    register(list(one.made.plugins.values()), one.bundle.load, multiprocessors)
    (found,) = walk(trt, one.rewritten, one.sample.sizes).values()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("sample", (*SAMPLES, *LARGE), ids=str)
def test_results_on_the_gpu(sample: Sample, newest: Any, on_gpu: tuple[Machine, dict[str, Prepared]]) -> None:
    """Every op, all outputs of every tactic at three shapes, against float64."""
    machine, prepared = on_gpu
    one = prepared[sample.name]
    call = one.node.call
    assert call is not None
    found = walked(newest[0], one, machine.multiprocessors)
    if sample in LARGE:
        assert max(launch.shared for launch in found) > 48 << 10
    said = []
    for sizes in points(sample):
        given = inputs(sample, call, sizes, "cuda")
        for launch in found:
            check_entry(launch)
            got = outputs_of(launch, sizes, "cuda")
            machine.launch(launch, sizes, {n: t.data_ptr() for n, t in (given | got).items()})
            torch.cuda.synchronize()
            tactic = one.bundle.entries[next(iter(one.made.plugins.values())).entries[launch.tactic - 1]].tactic
            said += [f"{tactic} at {sizes}: {x}" for x in problems(sample, call, sizes, given, got)]
    assert not said


def outputs_of(launch: Launch, sizes: Mapping[str, int], device: str) -> dict[str, Any]:
    """Poisoned, of the types and shapes that the plugin says."""
    kinds = zip(launch.outputs, launch.output_types, launch.shapes(sizes), strict=True)
    return {name: poisoned(int(kind), shape, device) for name, kind, shape in kinds}


def test_every_op_is_compared_at_three_shapes() -> None:
    for op in kernels():
        alike = [s for s in (*SAMPLES, *LARGE) if s.op == op]
        assert sum(len(points(s)) for s in alike) >= 3, op
        assert op in (COMBINE, STEP, SOLVE, SCORES, SELECT) or any(s in LARGE for s in alike), op


PLANTED = {
    "dense": "NK", "neighborhood": "k_n", "lists of a file": "NK", "states of chunks": "NK", "chunks combined": "C",
    "whole state applied": "NQ", "states before chunks": "NK", "output of chunks": "NQ",
    "scores of blocks": "NQ", "lists of what weighs enough": "TQ", "the highest scores of keys": "NQ",
    "lists around an anchor": "sinks",
    "a token at a time": "NK", "tiles of the delta rule solved": "NK", "what the delta rule writes": "NK",
}  # fmt: skip
"""Of a sample of each op, the int32 argument that is one less."""


def job(one: Prepared, launch: Launch, sizes: Mapping[str, int], planted: str = "") -> Job:
    """``planted``: the argument that is one less."""
    (made,) = one.made.plugins.values()
    entry = one.bundle.entries[made.entries[launch.tactic - 1]]
    numbers = list(launch.arguments(sizes))
    if planted:
        numbers[[a.name for a in entry.arguments if a.kind == "int32"].index(planted)] -= 1
    kinds = zip(launch.outputs, launch.output_types, launch.shapes(sizes), strict=True)
    return Job(
        one.sample.name, entry.tactic, sizes, launch.inputs, tuple(numbers),
        {n: (int(kind), shape) for n, kind, shape in kinds}, launch.grid(sizes), planted,
    )  # fmt: skip


def jobs(trt: Any, prepared: dict[str, Prepared], samples: Iterable[Sample]) -> list[Job]:
    """Of each sample the best tactic or, in turn, another; of those in ``PLANTED`` the best with the error too."""
    found = []
    for number, sample in enumerate(samples):
        one = prepared[sample.name]
        launches = walked(trt, one, 2)
        for sizes in points(sample, SMALL):
            found.append(job(one, launches[number % len(launches)], sizes))
            if sample.name in PLANTED:
                found.append(job(one, launches[0], sizes, PLANTED[sample.name]))
    return found


@pytest.mark.slow
def test_results_in_the_interpreter(newest: Any, prepared: dict[str, Prepared]) -> None:
    """Without a GPU: what would be launched, by the interpreter, with the same inputs and references, of every op."""
    found = jobs(newest[0], prepared, QUICK)
    assert {s.op for s in QUICK} == set(kernels())
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.tensorrt.interpreted"], input=json.dumps([j.to_json() for j in found]),
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(found)
    assert [(x["sample"], x["tactic"], x["wrong"]) for x in said if x["wrong"] and not x["planted"]] == []
    assert [x["sample"] for x in said if x["planted"] and not x["wrong"]] == []
    assert {x["sample"] for x in said if x["planted"]} == set(PLANTED)
    assert {x["sample"] for x in said} == {s.name for s in QUICK}
