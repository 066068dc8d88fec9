"""Where tasks are done: in this process, in processes of this machine, or on a Ray cluster.

Results come in the order of the tasks, whatever ends first, so a search gives the same with any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from attncompile.core.errors import AttncompileError, MissingDependency
from attncompile.core.processes import ProcessDied, Processes
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


class Local:
    """``jobs`` processes of this machine, which share the threads."""

    def __init__(self, jobs: int, threads: int) -> None:
        self._threads = max(threads // jobs, 1)
        environment = dict.fromkeys(_THREADS, str(self._threads))
        self._processes = Processes("attncompile.search.executors:answer", jobs, environment)

    def map(self, tasks: Sequence[Task], done: Callable[[], None] = lambda: None) -> list[Any]:
        def each(answered: tuple[bool, Any]) -> Any:
            result = _result(answered)
            done()
            return result

        try:
            return self._processes.map([(task, self._threads) for task in tasks], each)
        except ProcessDied as died:
            raise AttncompileError(
                f"a worker of the search ended with {died.code}: {died.said}",
                "if memory ran out, use fewer --jobs; run again: what was done is kept",
            ) from None

    def close(self) -> None:
        self._processes.close()


class Ray:
    """A Ray cluster: the one that RAY_ADDRESS names, else one on this machine. Its machines must see the output
    folder's file system, and have this package.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise MissingDependency(
                "--executor ray needs the package ray, which is not installed",
                "pip install ray, or leave --executor out to use this machine's cores",
            ) from None
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)

    def map(self, tasks: Sequence[Task], done: Callable[[], None] = lambda: None) -> list[Any]:
        remote = self._ray.remote(answer)
        references = [remote.remote((task, 1)) for task in tasks]
        waiting = list(references)
        while waiting:
            ready, waiting = self._ray.wait(waiting, num_returns=1)
            for _ in ready:
                done()
        return [_result(answered) for answered in self._ray.get(references)]

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def answer(request: tuple[Task, int]) -> tuple[bool, Any]:
    """The task's result with these threads; or, after False, what its error says."""
    task, threads = request
    try:
        return True, task(threads)
    except AttncompileError as error:
        return False, (error.message, error.hint)


def _result(answered: tuple[bool, Any]) -> Any:
    fine, result = answered
    if not fine:
        raise AttncompileError(*result)
    return result


def make(name: str, jobs: int, threads: int) -> Executor:
    """The executor called ``name``. Raises ``MissingDependency``."""
    return Ray() if name == "ray" else Local(jobs, threads)
