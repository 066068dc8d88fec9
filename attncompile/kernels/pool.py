"""Compile many programs at once, in processes, with a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from attncompile.core.errors import KernelError, Unsupported
from attncompile.core.processes import ProcessDied, Processes
from attncompile.kernels.cache import Cache
from attncompile.kernels.compiler import require_triton
from attncompile.kernels.entry import Compiled
from attncompile.kernels.jobs import Failure, Job


def compile_all(
    jobs: Sequence[Job],
    cache: Cache | None,
    done: Callable[[], None] = lambda: None,
    workers: int | None = None,
) -> list[Compiled | Unsupported]:
    """One result a job, in order; ``Unsupported`` where the program was refused. ``done`` is called after each.

    ``workers``: processes, by default as many as cores may be used, at most one a job.

    Raises:
        MissingDependency: Triton is not there, or another version of it.
        KernelError: a program does not compile. The first one ends the others.
    """
    if not jobs:
        return []
    require_triton()
    count = max(1, min(len(jobs), workers or len(os.sched_getaffinity(0))))
    folder = cache.folder if cache is not None else None

    def each(result: Compiled | Failure) -> Compiled | Unsupported:
        made = result.error() if isinstance(result, Failure) else result
        if not isinstance(made, Compiled | Unsupported):
            raise made
        done()
        return made

    with Processes("attncompile.kernels.jobs:run", count) as processes:
        try:
            return processes.map([(job, folder) for job in jobs], each)
        except ProcessDied as died:
            job = died.request[0]
            what = f"{job.program.op} {job.program.tactic} for sm_{job.architecture}"
            text = f"the compiler ended with {died.code} on {what}: {died.said}"
            raise KernelError(text, "this is a bug: report it") from None
