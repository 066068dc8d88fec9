"""One program to be compiled, and what comes of it, in a form that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attncompile.core.errors import AttncompileError, KernelError, MissingDependency, Unsupported
from attncompile.core.kernel import Program
from attncompile.kernels.cache import Cache
from attncompile.kernels.compiler import PTX_VERSION, compile_program
from attncompile.kernels.entry import Compiled


@dataclass(frozen=True, slots=True)
class Job:
    """One program for one architecture."""

    program: Program
    architecture: int
    ptx_version: int = PTX_VERSION


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no result, in a form that crosses processes."""

    kind: str
    code: str
    message: str
    hint: str

    @staticmethod
    def of(error: AttncompileError) -> Failure:
        code = error.code if isinstance(error, Unsupported) else ""
        return Failure(type(error).__name__, code, error.message, error.hint)

    def error(self) -> AttncompileError:
        if self.kind == Unsupported.__name__:
            return Unsupported(self.code, self.message, self.hint)
        kinds = {MissingDependency.__name__: MissingDependency}
        return kinds.get(self.kind, KernelError)(self.message, self.hint)


Result = Compiled | Failure


def run(request: tuple[Job, Path | None]) -> Result:
    """Compile, or take from the cache in the folder."""
    job, folder = request
    try:
        cache = Cache(folder) if folder is not None else None
        return compile_program(job.program, job.architecture, job.ptx_version, cache)
    except AttncompileError as error:
        return Failure.of(error)
