"""The same walk on a GPU: it ends in ``cuLaunchKernel``, with exactly the arguments that TensorRT would pass, and the
results are those of float64. Untested stays, without TensorRT, that it makes the calls which ``walk`` makes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attncompile.kernels.tensorrt.register import register
from tests.conformance.budget import wrong
from tests.conformance.case import Case
from tests.kernels.tensorrt.conftest import Prepared, prepare
from tests.kernels.tensorrt.samples import SAMPLES, Sample
from tests.kernels.tensorrt.walk import Launch, check_entry, walk

torch = pytest.importorskip("torch")

TORCH = {1: "float32", 10: "float16", 16: "bfloat16", 9: "bool", 6: "int32", 7: "int64"}
LARGE = replace(SAMPLES[0], name="large", inputs={n: (k, (*d[:-1], 128)) for n, (k, d) in SAMPLES[0].inputs.items()})
"""Head dim 128: its best tactics need more than 48 KB of shared memory everywhere."""


def case_of(one: Prepared, sizes: Mapping[str, int]) -> Case:
    """The node's call with all its sizes."""
    call = one.node.call
    assert call is not None
    shapes = {n: tuple(sizes.get(d, d) for d in dims) for n, (_, dims) in one.sample.inputs.items()}  # type: ignore[call-overload]
    layouts = layouts_of(one.sample)
    q, k = (dict(zip(layouts[i], shapes[n], strict=True)) for i, n in enumerate(("query", "key")))
    optional = {n: s for n, s in shapes.items() if n not in ("query", "key", "value")}
    full = replace(call, batch=q["B"], query_length=q["N"], key_length=k["N"], shapes=optional)
    return Case(one.sample.name, full, layouts)


def layouts_of(sample: Sample) -> tuple[str, str, str, str]:
    q, k, v, o = (str(sample.attributes.get(f"{x}_layout", "BNHD")) for x in "qkvo")
    return q, k, v, o


def device_tensors(one: Prepared, case: Case, device: str) -> dict[str, Any]:
    """Inputs as the network has them (contiguous, in the node's layout and types) and poisoned outputs."""
    found = {}
    for name, array in case.inputs().items():
        x = torch.from_numpy(np.ascontiguousarray(array))
        if name in ("query", "key", "value"):
            layout = case.layouts[("query", "key", "value").index(name)]
            x = x if layout == "BNHD" else x.transpose(1, 2)
        kind = getattr(torch, TORCH[one.sample.inputs[name][0]])
        found[name] = x.to(kind).contiguous().to(device)
    return found


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
    yield machine, prepare([*SAMPLES, LARGE], machine.capability, tmp_path_factory.mktemp("gpu"))


COMPARED = ("Attention", "NeighborhoodAttention")
ELSEWHERE = (
    "results on a GPU through a plugin's launch are not compared: its numbers are checked by tests/conformance, its "
    "launch by test_walk.py"
)  # fmt: skip
POINTS = ({"B": 2, "N": 100, "M": 130}, {"B": 1, "N": 331, "M": 397}, {"B": 3, "N": 17, "M": 401})


@pytest.mark.gpu
@pytest.mark.parametrize("sample", [*SAMPLES, LARGE], ids=str)
def test_results_on_the_gpu(sample: Sample, newest: Any, on_gpu: tuple[Machine, dict[str, Prepared]]) -> None:
    """Every tactic of the ops in ``COMPARED`` at three shapes, against float64."""
    from tests.conformance.vectorised import expected

    if sample.op not in COMPARED:
        pytest.skip(f"{sample.op}: {ELSEWHERE}")
    machine, prepared = on_gpu
    one = prepared[sample.name]
    register(list(one.made.plugins.values()), one.bundle.load, machine.multiprocessors)
    (found,) = walk(newest[0], one.rewritten, sample.sizes).values()
    if sample is LARGE:
        assert max(launch.shared for launch in found) > 48 << 10
    for point in POINTS:
        sizes = {n: point[n] for n in sample.sizes}
        case = case_of(one, sizes)
        tensors = device_tensors(one, case, "cuda")
        want, sums = expected(case.call, case.inputs())
        low, low_sums = expected(case.call, case.inputs(), half=case.call.dtype)
        for launch in found:
            check_entry(launch)
            for name, shape, kind in zip(launch.outputs, launch.shapes(sizes), launch.output_types, strict=True):
                half = torch.float32 if kind == 0 else getattr(torch, case.call.dtype)
                tensors[name] = torch.full(shape, torch.nan, dtype=half, device="cuda")
            machine.launch(launch, sizes, {n: t.data_ptr() for n, t in tensors.items()})
            torch.cuda.synchronize()
            got = tensors["output"].float().cpu()
            got = got if case.layouts[3] == "BNHD" else got.transpose(1, 2)
            assert not wrong(got.numpy(), want, low, case.call.dtype), (sample.name, sizes, launch.tactic)
            if "log_sum_exp" in tensors:
                got_sums = tensors["log_sum_exp"].cpu().numpy()[..., None]
                said = wrong(got_sums, sums[..., None], low_sums[..., None], "float32")
                assert not said, (sample.name, sizes, launch.tactic, said)


def test_the_reference_fits_the_samples(prepared: dict[str, Prepared]) -> None:
    """Without a GPU: sizes, layouts and types that the test above takes for granted."""
    from tests.conformance.vectorised import expected

    for name in (s.name for s in SAMPLES if not s.slow and s.op in COMPARED):
        one = prepared[name]
        sizes = {n: {"B": 2, "N": 9, "M": 13}[n] for n in one.sample.sizes}
        case = case_of(one, sizes)
        tensors = device_tensors(one, case, "cpu")
        for given, (kind, dims) in one.sample.inputs.items():
            assert tuple(tensors[given].shape) == tuple(sizes.get(d, d) for d in dims)  # type: ignore[call-overload]
            assert str(tensors[given].dtype) == f"torch.{TORCH[kind]}"
        want, _ = expected(case.call, case.inputs())
        assert np.isfinite(want).all()
