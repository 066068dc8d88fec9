"""Compiling ahead of time: what comes out, what is refused, and what is kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attncompile.core.errors import KernelError, MissingDependency, Unsupported
from attncompile.core.kernel import Argument, OpCall, Program
from attncompile.kernels import compiler, cubin, pool, ptx
from attncompile.kernels.build import build
from attncompile.kernels.cache import Cache, default_folder
from attncompile.kernels.entry import Compiled
from attncompile.kernels.jobs import Failure, Job
from attncompile.plugins import kernels
from tests.kernels.conftest import made_up

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

SOURCE = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(3)

@triton.jit
def scaled(x):
    return x * FACTOR

@triton.jit
def copy(source, count, target, ROWS: tl.constexpr, MORE):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = scaled(tl.load(source + at, mask=at < count))
    if MORE is not None:
        x += tl.load(MORE + at)
    tl.store(target + at, x, mask=at < count)

@triton.jit
def described(source, count, target, ROWS: tl.constexpr, MORE):
    rows = tl.make_tensor_descriptor(source, [count, ROWS], [ROWS, 1], [16, ROWS])
    tl.make_tensor_descriptor(target, [count, ROWS], [ROWS, 1], [16, ROWS]).store([0, 0], rows.load([0, 0]))

@triton.jit
def wrong(source, count, target, ROWS: tl.constexpr, MORE):
    tl.store(target, tl.arange(0, ROWS + 1))
'''  # fmt: skip


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A module with small kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "small_kernels.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    return "small_kernels"


def program(function: str, **more: Any) -> Program:
    arguments = (
        Argument("source", "input", "float16", align=16), Argument("count", "int32", expression="NQ"),
        Argument("target", "output", "float16", align=16),
    )  # fmt: skip
    facts: dict[str, Any] = {
        "op": "Copy", "tactic": "small", "language": "triton", "function": function, "arguments": arguments,
        "constants": {"ROWS": 64}, "grid": ("cdiv(NQ, 64)", "1", "1"), "warps": 4, "dtype": "float16", "head_dim": 64,
    }  # fmt: skip
    return Program(**{**facts, **more})


@needs_triton
def test_a_small_kernel(module: str) -> None:
    made = compiler.compile_program(program(f"{module}:copy"), 80)
    assert [p.type for p in ptx.parameters(made.ptx)] == ["u64", "u32", "u64"], "no hidden parameters"
    assert made.entry.name == "copy" and made.entry.hidden == 0 and made.entry.value_dim == 64
    assert (made.entry.warps, made.entry.spills, made.entry.specific) == (4, 0, False)
    assert made.entry.registers > 0 and ".version 8.7" in made.ptx and ".target sm_80" in made.ptx
    cubin.check(made.cubin)
    again, report = compiler.assemble_ptx(made.ptx, 80)
    assert again == made.cubin and "copy" in report
    assert str(Path.cwd()).encode() not in made.cubin and "small_kernels.py" not in made.ptx, "no path of this machine"
    assert compiler.compile_program(program(f"{module}:copy"), 80) == made


@needs_triton
def test_an_optional_argument(module: str) -> None:
    """A parameter that is in neither arguments nor constants is None."""
    arguments = program("").arguments
    more = (*arguments, Argument("MORE", "input", "float16"))
    newest = replace(program(f"{module}:copy", arguments=more), ptxas=13)  # the older one knows no PTX of version 9.0
    made = compiler.compile_program(newest, 90, ptx_version=90)
    assert len(ptx.parameters(made.ptx)) == 4 and ".version 9.0" in made.ptx and made.entry.specific
    with pytest.raises(KernelError, match="not the program's arguments in their order"):
        compiler.compile_program(program(f"{module}:copy", arguments=arguments[::-1]), 90)
    with pytest.raises(KernelError, match="has no constant OTHER"):
        compiler.compile_program(program(f"{module}:copy", constants={"ROWS": 64, "OTHER": 1}), 90)


@needs_triton
def test_scratch_memory_is_refused(module: str) -> None:
    """Tensor maps that the device makes lie in scratch memory, for which TensorRT passes no pointer."""
    described = program(f"{module}:described")
    with pytest.raises(Unsupported, match=r"needs [0-9]+ bytes of scratch memory") as caught:
        compiler.compile_program(described, 90)
    assert caught.value.code == "scratch"
    made = compiler.compile_program(replace(described, abi="tma"), 90)
    assert made.entry.hidden == 2 and len(ptx.parameters(made.ptx)) == 5


@needs_triton
def test_what_does_not_compile(module: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KernelError, match=r"small_kernels:wrong \(small\) for sm_80 does not compile"):
        compiler.compile_program(program(f"{module}:wrong"), 80)
    with pytest.raises(KernelError, match="sm_75 is not known"):
        compiler.compile_program(program(f"{module}:copy"), 75)
    assert capfd.readouterr() == ("", "")


@needs_triton
def test_too_much_shared_memory() -> None:
    call = OpCall("Attention", "float16", 1, 1, 128, 128)
    huge = replace(
        kernels()["Attention"].programs(call, 80)[-1],
        constants={**kernels()["Attention"].programs(call, 80)[-1].constants, "BM": 64, "BN": 128},
        stages=3, warps=8,
    )  # fmt: skip
    with pytest.raises(Unsupported, match="bytes of shared memory, sm_86 has 101376") as caught:
        compiler.compile_program(huge, 86)
    assert caught.value.code == "shared"


@needs_triton
def test_the_cache(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    copy = program(f"{module}:copy")
    made = compiler.compile_program(copy, 80, cache=cache)
    (kept,) = tmp_path.rglob("*.json")
    compiled: list[str] = []
    real = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda p, *rest: compiled.append(p.tactic) or real(p, *rest))
    assert compiler.compile_program(copy, 80, cache=cache) == made and not compiled

    whole = kept.read_bytes()
    for damaged in (b"", whole[:-10], whole[:100], b"\xff" * 100, whole.replace(b"Copy", b"Cope")):
        kept.write_bytes(damaged)
        assert compiler.compile_program(copy, 80, cache=cache) == made
        assert kept.read_bytes() == whole, "what is damaged is made again"
    assert len(compiled) == 5
    # Whatever the code depends on is another entry.
    compiler.compile_program(copy, 86, cache=cache)
    compiler.compile_program(copy, 80, ptx_version=88, cache=cache)
    compiler.compile_program(replace(copy, constants={"ROWS": 128}), 80, cache=cache)
    compiler.compile_program(replace(copy, warps=8), 80, cache=cache)
    assert len(list(tmp_path.rglob("*.json"))) == 5 and len(compiled) == 9


@needs_triton
def test_the_cache_knows_what_a_kernel_calls(tmp_path: Path) -> None:
    """A change in a function that the kernel calls, or in a constant that it reads, is another kernel."""
    script = textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from tests.kernels.test_compiler import program
        from attncompile.kernels import compiler
        from attncompile.kernels.cache import Cache
        compiler.compile_program(program("small_kernels:copy"), 80, cache=Cache(Path(sys.argv[2])))
    """)
    for text in (
        SOURCE,
        SOURCE.replace("x * FACTOR", "x + FACTOR"),
        SOURCE.replace("constexpr(3)", "constexpr(4)"),
        SOURCE,
    ):
        (tmp_path / "small_kernels.py").write_text(text)
        subprocess.run(
            [sys.executable, "-B", "-c", script, str(tmp_path), str(tmp_path / "cache")],
            check=True,
            capture_output=True,
        )
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 3


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="cannot write the kernel cache") as caught:
        Cache(tmp_path / "file").write("ab" * 32, made_up())
    assert "ATTNCOMPILE_CACHE" in caught.value.hint
    assert Cache(tmp_path / "file").read("ab" * 32) is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("ATTNCOMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "attncompile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "attncompile"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="Triton, which is not installed") as caught:
        compiler.compile_program(program("x:y"), 80)
    assert caught.value.hint == "pip install 'attncompile[gpu]'"


def test_with_another_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.1")
    with pytest.raises(MissingDependency, match=r"kernels need Triton 3\.9, not 3\.10\.1"):
        pool.compile_all([Job(program("x:y"), 80)], None)
    assert pool.compile_all([], None) == [], "nothing to compile needs no Triton"


@needs_triton
def test_processes(module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In order, refusals among them, with nothing printed by Triton or its bindings."""
    jobs = [Job(program(f"{module}:{f}"), a) for f, a in (("copy", 80), ("described", 90), ("copy", 120))]
    seen: list[int] = []
    found = pool.compile_all(jobs, Cache(tmp_path), lambda: seen.append(1), workers=2)
    assert len(seen) == 3 and isinstance(found[1], Unsupported) and found[1].code == "scratch"
    first, last = found[0], found[2]
    assert isinstance(first, Compiled) and isinstance(last, Compiled)
    assert (first.entry.architecture, last.entry.architecture) == (80, 120)
    assert first == compiler.compile_program(jobs[0].program, 80), "as in this process"
    with pytest.raises(KernelError, match="does not compile"):
        pool.compile_all([Job(program(f"{module}:wrong"), 80)], None)
    assert capfd.readouterr() == ("", "")


@needs_triton
def test_a_compiler_that_dies(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, sys\nsys.stderr.write('out of luck')\nsys.stderr.flush()\nos._exit(7)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(KernelError, match="the compiler ended with 7 on Copy small for sm_80: out of luck"):
            pool.compile_all([Job(program("dies:kernel"), 80)], None)
    finally:
        sys.path.remove(str(tmp_path))


def test_failures_cross_processes() -> None:
    for error in (Unsupported("scratch", "why", "what"), MissingDependency("why", "what"), KernelError("why", "what")):
        back = pickle.loads(pickle.dumps(Failure.of(error))).error()
        assert (type(back), back.message, back.hint) == (type(error), "why", "what")
        assert getattr(back, "code", "") == getattr(error, "code", "")


@needs_triton
def test_building_twice_gives_the_same(tmp_path: Path) -> None:
    """Without a cache: the compiler itself is deterministic, across processes."""
    calls = [OpCall("Attention", "float16", 1, 1, 16, 16)]
    first, second = (build([], calls, kernels(), (80,), None) for _ in range(2))
    assert first == second and len(first.compiled) == 2
    twice = build([], [*calls, replace(calls[0], heads=8, batch=3)], kernels(), (80,), None)
    assert twice == first, "heads and lengths are arguments"
