"""A process that compiles programs one after the other: ``python -m attncompile.kernels.worker``.

Jobs come in on stdin and results go out on stdout, pickled; both ends are this package. Processes of its own rather
than ``multiprocessing``'s: those import the user's script again, and Triton's bindings complain at every exit.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


def run(job: Job, folder: Path | None) -> Result:
    """Compile, or take from the cache in ``folder``."""
    try:
        cache = Cache(folder) if folder is not None else None
        return compile_program(job.program, job.architecture, job.ptx_version, cache)
    except AttncompileError as error:
        return Failure.of(error)


def main() -> None:
    # What Triton, ptxas and their libraries print must not get between the results.
    results: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs = sys.stdin.buffer
    while True:
        try:
            job, folder = pickle.load(jobs)
        except EOFError:
            break
        pickle.dump(run(job, folder), results)
        results.flush()
    # Not sys.exit(): Triton's bindings print what they leak when the interpreter is taken down.
    os._exit(0)


if __name__ == "__main__":
    main()
