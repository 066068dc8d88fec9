"""Where tasks are done: in this process, in processes of this machine, or on a Ray cluster.

Results come in the order of the tasks, whatever ends first, so a search gives the same with any number of workers.
"""

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
from typing import Any, Protocol

from attncompile.core.errors import AttncompileError, MissingDependency
from attncompile.search.tasks import Task

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""NumPy's libraries get as many threads as the worker: more of them would wait for one another."""


class Executor(Protocol):
    """Does tasks."""

    def map(self, tasks: Sequence[Task], done: Callable[[], None] = lambda: None) -> list[Any]:
        """One result a task, in order; ``done`` is called after each. The first task that raises ends the call."""
        ...

    def close(self) -> None:
        """Ends what was started; the executor is not used again."""
        ...


class Inline:
    """In this process, one after the other."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def map(self, tasks: Sequence[Task], done: Callable[[], None] = lambda: None) -> list[Any]:
        results = []
        for task in tasks:
            results.append(task(self._threads))
            done()
        return results

    def close(self) -> None:
        """Nothing was started."""


class Processes:
    """``jobs`` processes of ``worker.py``, which share the threads."""

    def __init__(self, jobs: int, threads: int) -> None:
        self._workers: list[_Worker] = []
        self._jobs = jobs
        self._threads = max(threads // jobs, 1)

    def map(self, tasks: Sequence[Task], done: Callable[[], None] = lambda: None) -> list[Any]:
        while len(self._workers) < min(self._jobs, len(tasks)):
            self._workers.append(_Worker(self._threads))
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(tasks)):
            waiting.put(number)
        finished: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        stop = threading.Event()

        def work(worker: _Worker) -> None:
            while not stop.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    finished.put((number, worker.run(tasks[number])))
                except BaseException as error:
                    finished.put((number, error))
                    return

        threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in self._workers[: len(tasks)]]
        for thread in threads:
            thread.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < len(tasks):
                number, result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                found[number] = result
                done()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        return [found[number] for number in range(len(tasks))]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process."""

    def __init__(self, threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        paths = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths, **dict.fromkeys(_THREADS, str(threads))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attncompile.search.worker", str(threads)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, env=environment,
        )  # fmt: skip

    def run(self, task: Task) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            fine, result = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            self._log.seek(0)
            said = " ".join(self._log.read().decode(errors="replace").split())[-500:]
            raise AttncompileError(
                f"a worker of the search ended with {code}: {said}",
                "if memory ran out, use fewer --jobs; run again: what was done is kept",
            ) from None
        if not fine:
            raise AttncompileError(*result)
        return result

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


class Ray:
    """A Ray cluster: the one that RAY_ADDRESS names, else one on this machine. Its machines must see the output
    folder's file system, and have this package.
    """

    def __init__(self, threads: int) -> None:
        try:
            import ray
        except ImportError:
            raise MissingDependency(
                "--executor ray needs the package ray, which is not installed",
                "pip install ray, or leave --executor out to use this machine's cores",
            ) from None
        self._ray = ray
        self._threads = threads
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)

    def map(self, tasks: Sequence[Task], done: Callable[[], None] = lambda: None) -> list[Any]:
        remote = self._ray.remote(_call)
        references = [remote.remote(task, 1) for task in tasks]
        waiting = list(references)
        while waiting:
            ready, waiting = self._ray.wait(waiting, num_returns=1)
            for _ in ready:
                done()
        results = []
        for fine, result in self._ray.get(references):
            if not fine:
                raise AttncompileError(*result)
            results.append(result)
        return results

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def _call(task: Task, threads: int) -> tuple[bool, Any]:
    try:
        return True, task(threads)
    except AttncompileError as error:
        return False, (error.message, error.hint)


def make(name: str, jobs: int, threads: int) -> Executor:
    """The executor called ``name``. Raises ``MissingDependency``."""
    if name == "ray":
        return Ray(threads)
    return Processes(jobs, threads)
