"""The launcher on a GPU, against torch. ``ATTNCOMPILE_TEST_BUNDLE`` names a bundle of ``matrix()`` made elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attncompile.core.errors import AttncompileError, KernelError
from attncompile.core.kernel import OpCall
from attncompile.kernels import build, bundle, compiler, symbols
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.cache import Cache
from attncompile.kernels.driver import DriverError
from attncompile.kernels.entry import Compiled
from attncompile.kernels.launcher import Launcher, launcher_for, run_program
from attncompile.kernels.records import key_of
from attncompile.plugins import kernels

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = {"none": (-1, -1), "causal": (-1, 0), "window": (100, 30)}
GRID = {"grid": [9, 14], "kernel_size": [5, 5], "border": "clamp"}


def attention(dim: int, kind: str, **more: Any) -> OpCall:
    left, right = KINDS[kind]
    return OpCall("Attention", "float16", 6, 2, dim, dim, attributes={"left": left, "right": right}, **more)


def matrix() -> list[OpCall]:
    """The calls that these tests launch."""
    grid = OpCall("NeighborhoodAttention", "float16", 6, 2, 64, 64, attributes=GRID)
    masked = attention(64, "none", inputs={"key_mask": "bool", "bias": "float16", "sinks": "float32"})
    return [*(attention(dim, kind) for dim in (64, 72, 128) for kind in KINDS), masked, grid]


def make_bundle(out: Path, architectures: tuple[int, ...]) -> None:
    made = build.build([], matrix(), kernels(), architectures, Cache.default())
    bundle.write(out, made, compiler.require_triton())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    given = os.environ.get("ATTNCOMPILE_TEST_BUNDLE")
    if given is None:
        given = str(tmp_path_factory.mktemp("bundle") / "made")
        make_bundle(Path(given), tuple({80, launcher_for().capability}))
    return Bundle.open(Path(given))


def key(call: OpCall) -> str:
    return key_of(build.general(kernels(), call))


def operands(layout: str, dim: int, queries: int, keys: int) -> dict[str, Any]:
    """Seeded query, key, value and a poisoned output, each [B, N, H, D] as a view of ``layout``."""
    torch.manual_seed(0)
    found = {}
    for name, n, h in (("query", queries, 6), ("key", keys, 2), ("value", keys, 2), ("output", queries, 6)):
        shape = (2, n, h, dim) if layout == "BNHD" else (2, h, n, dim)
        data = torch.randn(shape, device="cuda", dtype=torch.float16)
        found[name] = data if layout == "BNHD" else data.transpose(1, 2)
    found["output"].fill_(float("nan"))
    return found


def reference(t: Mapping[str, Any], seen: Any = None, bias: Any = None, sinks: Any = None) -> Any:
    """In float64, [B, N, H, D]."""
    q, k, v = (t[n].double().transpose(1, 2) for n in ("query", "key", "value"))
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.double()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        extra = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return (torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def window(left: int, right: int, queries: int, keys: int) -> Any:
    place = torch.arange(queries, device="cuda")[:, None] + keys - queries
    other = torch.arange(keys, device="cuda")[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device="cuda")
    if left >= 0:
        seen &= other >= place - left
    if right >= 0:
        seen &= other <= place + right
    return seen


def launch(compiled: Compiled, tensors: Mapping[str, Any], call: OpCall, form: Any = None) -> None:
    strided = {n: symbols.Strided(tuple(x.shape), tuple(x.stride())) for n, x in tensors.items()}
    found = symbols.of_tensors(strided, call.attributes)
    pointers = {n: x.data_ptr() for n, x in tensors.items()}
    stream = torch.cuda.current_stream().cuda_stream
    launcher_for().prepare(compiled, form).launch(found, pointers, stream)
    torch.cuda.synchronize()


def error(ours: Any, theirs: Any) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_every_tactic(made: Bundle, dim: int, kind: str, layout: str) -> None:
    call = attention(dim, kind)
    tensors = operands(layout, dim, 333, 401)
    wanted = reference(tensors, window(*KINDS[kind], 333, 401))
    found = made.kernels(key(call), launcher_for().capability)
    assert found and any(c.entry.shared <= 48 << 10 for c in found)
    for compiled in found:
        tensors["output"].fill_(float("nan"))
        launch(compiled, tensors, call)
        assert error(tensors["output"], wanted) < 1e-3, compiled.entry.tactic


def test_ptx_of_an_older_architecture(made: Bundle) -> None:
    call = attention(64, "causal")
    tensors = operands("BNHD", 64, 200, 200)
    for compiled in made.kernels(key(call), 80):
        launch(compiled, tensors, call, "ptx")
        assert error(tensors["output"], reference(tensors, window(-1, 0, 200, 200))) < 1e-3


def test_broadcast_inputs(made: Bundle) -> None:
    call = matrix()[-2]
    tensors = operands("BNHD", 64, 150, 150)
    tensors["key_mask"] = torch.rand(2, 1, 1, 150, device="cuda") > 0.3
    tensors["bias"] = torch.randn(6, 1, 150, device="cuda", dtype=torch.float16)
    tensors["sinks"] = torch.randn(6, device="cuda")
    wanted = reference(tensors, tensors["key_mask"], tensors["bias"], tensors["sinks"])
    for compiled in made.kernels(key(call), launcher_for().capability):
        tensors["output"].fill_(float("nan"))
        launch(compiled, tensors, call)
        assert error(tensors["output"], wanted) < 1e-3, compiled.entry.tactic


def test_neighborhood(made: Bundle) -> None:
    call = matrix()[-1]
    tensors = operands("BNHD", 64, 126, 126)
    axis = [torch.arange(n).clamp(2, n - 3)[:, None] - torch.arange(n)[None, :] for n in (9, 14)]
    near = [a.abs() <= 2 for a in axis]
    seen = (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(126, 126).cuda()
    for compiled in made.kernels(key(call), launcher_for().capability):
        tensors["output"].fill_(float("nan"))
        launch(compiled, tensors, call)
        assert error(tensors["output"], reference(tensors, seen)) < 1e-3, compiled.entry.tactic


def test_errors_have_the_drivers_names(made: Bundle) -> None:
    compiled = made.kernels(key(attention(64, "none")), launcher_for().capability)[-1]
    with pytest.raises(KernelError, match="the cubin is damaged: it is cut off after 500 bytes"):
        Launcher().prepare(replace(compiled, cubin=compiled.cubin[:500]))
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_PTX"):
        Launcher().prepare(replace(compiled, ptx=compiled.ptx.replace("ret;", "rte;")), "ptx")
    with pytest.raises(DriverError, match="CUDA_ERROR_NOT_FOUND"):
        Launcher().prepare(replace(compiled, entry=replace(compiled.entry, name="other")))
    tensors = operands("BNHD", 64, 10, 10)
    found = symbols.of_tensors({n: symbols.Strided(tuple(x.shape), tuple(x.stride())) for n, x in tensors.items()}, {})
    with pytest.raises(KernelError, match="not a multiple of 16 bytes"):
        launcher_for().prepare(compiled).launch(found, {n: x.data_ptr() + 2 for n, x in tensors.items()})
    assert issubclass(DriverError, AttncompileError)


def test_run_program_checks_what_it_is_given(made: Bundle) -> None:
    call = attention(64, "none")
    capability = launcher_for().capability
    compiled = made.kernels(key(call), capability)[0]
    program = next(
        p for p in kernels()["Attention"].programs(build.general(kernels(), call), compiled.entry.architecture)
        if p.tactic == compiled.entry.tactic
    )  # fmt: skip
    tensors = operands("BNHD", 64, 100, 100)
    run_program(program, compiled, tensors, {})(0)
    torch.cuda.synchronize()
    assert error(tensors["output"], reference(tensors)) < 1e-3
    with pytest.raises(KernelError, match="query is bfloat16"):
        run_program(program, compiled, {**tensors, "query": tensors["query"].bfloat16()}, {})
    with pytest.raises(KernelError, match="needs a tensor output"):
        run_program(program, compiled, {n: x for n, x in tensors.items() if n != "output"}, {})
    with pytest.raises(KernelError, match="was not compiled from"):
        run_program(replace(program, tactic="another"), compiled, tensors, {})
