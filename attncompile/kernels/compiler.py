"""Compile programs ahead of time, with Triton and without a GPU.

Triton appends two parameters to every entry, pointers to scratch memory, whether it needs any or not. TensorRT passes
neither. So they are taken out of the PTX before it is assembled, and cubin and PTX have the same parameters: exactly
the program's arguments. A ``plain`` program that needs scratch memory is refused.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from attncompile.core.errors import KernelError, MissingDependency, Unsupported
from attncompile.core.kernel import Argument, Constant, Program
from attncompile.kernels import ptx as ptx_text
from attncompile.kernels.cache import Cache
from attncompile.kernels.entry import Compiled, Entry, canonical, digest

TRITON = "3.9"
"""The version whose Gluon the kernels are written for."""

PTX_VERSION = 87
"""PTX ISA 8.7, the oldest that knows all our architectures: drivers of CUDA 12.8 and later take it."""

SHARED_LIMIT: Mapping[int, int] = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10
}  # fmt: skip
"""Bytes of shared memory that one block can have."""

_HIDDEN = 2
_POINTERS = {
    "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "bool": "*i1", "uint8": "*u8", "int8": "*i8",
    "int32": "*i32", "int64": "*i64",
}  # fmt: skip


def require_triton() -> str:
    """The version of Triton. Raises ``MissingDependency`` where there is none, or another than kernels need."""
    if importlib.util.find_spec("triton") is None:
        raise MissingDependency(
            "kernels are compiled by Triton, which is not installed", "pip install 'attncompile[gpu]'"
        )
    version = importlib.metadata.version("triton")
    if version.split(".")[:2] != TRITON.split("."):
        raise MissingDependency(f"kernels need Triton {TRITON}, not {version}", "pip install 'attncompile[gpu]'")
    return version


def compile_program(
    program: Program, architecture: int, ptx_version: int = PTX_VERSION, cache: Cache | None = None
) -> Compiled:
    """Compile ``program`` for ``architecture`` (major * 10 + minor), or take it from ``cache``.

    Raises:
        MissingDependency: no Triton, or another version of it.
        Unsupported: the kernel needs scratch memory with abi ``plain``, or more shared memory than there is.
        KernelError: it does not compile, or its parameters are not the program's arguments.
    """
    version = require_triton()
    if architecture not in SHARED_LIMIT:
        raise KernelError(f"sm_{architecture} is not known", f"known are {', '.join(map(str, SHARED_LIMIT))}")
    source = _source(program)
    if cache is None:
        return _compile(program, source, architecture, ptx_version)
    key = _key(program, source, architecture, ptx_version, version)
    found = cache.read(key)
    if found is None:
        found = _compile(program, source, architecture, ptx_version)
        cache.write(key, found)
    return found


def _source(program: Program) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = _function(program)
    arguments = {a.name: a for a in program.arguments}
    order = [name for name in function.arg_names if name in arguments]
    if order != [a.name for a in program.arguments]:
        raise KernelError(f"{program.function} takes {', '.join(order)}, not the program's arguments in their order")
    unknown = set(program.constants) - set(function.arg_names)
    if unknown:
        raise KernelError(f"{program.function} has no constant {', '.join(sorted(unknown))}")
    signature: dict[str, str] = {}
    constants: dict[str, Constant] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(function.arg_names):
        if name not in arguments:
            signature[name] = "constexpr"
            constants[name] = program.constants.get(name)
            continue
        argument = arguments[name]
        signature[name] = "i32" if argument.kind == "int32" else _POINTERS[argument.type]
        if argument.align > 1:
            attributes[place,] = [["tt.divisibility", argument.align]]
    make = GluonASTSource if program.language == "gluon" else ASTSource
    return make(function, signature, constants, attributes)


def _function(program: Program) -> Any:
    module, _, attribute = program.function.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _options(program: Program, ptx_version: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_warps": program.warps, "num_stages": program.stages, "enable_fp_fusion": program.fused,
        "ptx_version": ptx_version,
    }  # fmt: skip
    if program.registers is not None:
        found["maxnreg"] = program.registers
    return found


def _key(program: Program, source: Any, architecture: int, ptx_version: int, version: str) -> str:
    """Names all that the result depends on: the function's text and that of all it calls, and what is made of it."""
    from triton import knobs

    # ``hash`` covers the source text, signature, constants and alignments.
    return digest(canonical({
        "source": source.hash(), "triton": version, "ptxas": _assembler(program.ptxas).version,
        "ours": _sources_of_ours(), "arch": architecture, "options": _options(program, ptx_version),
        "program": describe(program),
        "ptxas_options": knobs.nvidia.ptxas_options or "",
    }))  # fmt: skip


def describe(program: Program) -> dict[str, Any]:
    """All of ``program`` but its rank, as JSON values: programs that are described alike are compiled once."""
    return {f.name: _plain(getattr(program, f.name)) for f in fields(program) if f.name != "rank"}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Argument):
        return asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


def _sources_of_ours() -> str:
    """What this package makes of Triton's output is part of the key."""
    folder = Path(__file__).parent
    return digest(b"".join((folder / name).read_bytes() for name in ("compiler.py", "entry.py", "ptx.py")))


def _assembler(version: int) -> Any:
    """Path and version of the ptxas of major version 12 or 13, both of which Triton brings along."""
    from triton import knobs

    return knobs.nvidia.ptxas if version == 12 else knobs.nvidia.ptxas_blackwell


def _compile(program: Program, source: Any, architecture: int, ptx_version: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    log: list[str] = []

    def assemble(text: str, metadata: Mapping[str, Any]) -> bytes:
        scratch = metadata["global_scratch_size"] + metadata["profile_scratch_size"]
        if scratch and program.abi == "plain":
            raise Unsupported("scratch", f"{program.op} {program.tactic} needs {scratch} bytes of scratch memory")
        hidden = _HIDDEN if scratch else 0
        made = text if hidden else ptx_text.without_hidden(text, len(program.arguments))
        ptx_text.check_parameters(made, program.arguments, hidden)
        code, report = assemble_ptx(made, architecture, program.ptxas)
        log.extend((made, report, str(hidden)))
        return code

    with _quiet_triton(assemble):
        try:
            built = triton.compile(
                source, target=GPUTarget("cuda", architecture, 32), options=_options(program, ptx_version)
            )
        except (Unsupported, KernelError):
            raise
        except Exception as error:  # whatever a compiler raises: say which kernel it was
            text = " ".join(str(error).split())[:500]
            where = f"{program.function} ({program.tactic}) for sm_{architecture}"
            raise KernelError(f"{where} does not compile: {type(error).__name__}: {text}") from error
    made, report, hidden = log
    about = built.metadata
    if about.shared > SHARED_LIMIT[architecture]:
        limit = SHARED_LIMIT[architecture]
        raise Unsupported(
            "shared",
            f"{program.op} {program.tactic} needs {about.shared} bytes of shared memory, sm_{architecture} has {limit}",
        )
    used = ptx_text.resources(report)
    entry = Entry(
        op=program.op, dtype=program.dtype, head_dim=program.head_dim, value_dim=program.value_dim or program.head_dim,
        architecture=architecture, tactic=program.tactic, abi=program.abi, language=program.language,
        name=ptx_text.entry_name(made), arguments=program.arguments, grid=program.grid,
        constants=dict(program.constants), warps=about.num_warps, shared=about.shared, registers=used.registers,
        spills=used.spills, serialized=used.serialized, hidden=int(hidden), specific=architecture >= 90,
        ptx_version=ptx_version,
    )  # fmt: skip
    return Compiled(entry, made, built.asm["cubin"])


def assemble_ptx(text: str, architecture: int, ptxas: int = 12) -> tuple[bytes, str]:
    """The cubin of PTX ``text``, and what ptxas of that major version said. Raises ``KernelError``."""
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory(prefix="attncompile-") as folder:
        (Path(folder) / "kernel.ptx").write_text(text, encoding="utf-8")
        # What Triton itself gives, around a fault of ptxas 13. Relative names: a path may end up in the cubin.
        level = ["--regAllocOptLevel=2"] if ptxas == 13 else []
        done = subprocess.run(
            [_assembler(ptxas).path, "-v", *level, f"--gpu-name={name}", "kernel.ptx",
             "-o", "kernel.cubin"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        log = done.stdout + done.stderr
        if done.returncode:
            raise KernelError(f"ptxas refuses the code for {name}: {' '.join(log.split())[:500]}")
        return (Path(folder) / "kernel.cubin").read_bytes(), log


@contextmanager
def _quiet_triton(assemble: Any) -> Iterator[None]:
    """Triton with our last stage in place of its own, no cache of its own, and no line numbers: they hold paths of
    this machine.
    """
    from triton import knobs

    def stages(
        backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
    ) -> tuple[str, str]:
        if stages is not None:
            stages["cubin"] = assemble
        return "attncompile", "attncompile"

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="attncompile-"))
        for group in (knobs.cache, knobs.compilation, knobs.runtime):
            stack.enter_context(group.scope())
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True
        knobs.runtime.add_stages_inspection_hook = stages
        yield
