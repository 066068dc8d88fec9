"""Compile many programs at once, in processes, with a cache."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attncompile.core.errors import KernelError, Unsupported
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
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    found: dict[int, Any] = {}
    finished: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        with _Worker() as worker:
            while not stop.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    result = worker.run(jobs[number], cache)
                except BaseException as error:
                    finished.put((number, error))
                    return
                finished.put((number, result))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        while len(found) < len(jobs):
            number, result = finished.get()
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, Failure):
                error = result.error()
                if not isinstance(error, Unsupported):
                    raise error
                result = error
            found[number] = result
            done()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return [found[number] for number in range(len(jobs))]


class _Worker:
    """One process of ``worker.py``."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        # What can be imported here can be imported there, kernels of extensions too.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attncompile.kernels.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, env=environment,
        )  # fmt: skip

    def __enter__(self) -> _Worker:
        return self

    def run(self, job: Job, cache: Cache | None) -> Compiled | Failure:
        assert self._process.stdin is not None and self._process.stdout is not None
        folder: Path | None = cache.folder if cache is not None else None
        try:
            pickle.dump((job, folder), self._process.stdin)
            self._process.stdin.flush()
            result: Compiled | Failure = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._process.wait()
            self._log.seek(0)
            said = " ".join(self._log.read().decode(errors="replace").split())[-500:]
            what = f"{job.program.op} {job.program.tactic} for sm_{job.architecture}"
            raise KernelError(
                f"the compiler ended with {self._process.returncode} on {what}: {said}", "this is a bug: report it"
            ) from None
        return result

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()
