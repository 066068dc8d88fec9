"""Processes that answer requests, for work that is many pieces.

They are of their own (``worker.py``) rather than ``multiprocessing``'s: those import the user's script again, and what
libraries print at the end of such a process would be seen.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class ProcessDied(Exception):
    """A process ended without an answer to ``request``: its exit ``code``, and the end of what it ``said``."""

    def __init__(self, request: Any, code: int, said: str) -> None:
        super().__init__(f"a process ended with {code}: {said}")
        self.request, self.code, self.said = request, code, said


class Processes:
    """At most ``count`` processes that call ``function`` (``module:name``, of one argument), started as they are needed
    and kept until ``close``. What can be imported here can be imported there. ``environment`` is added to this one's.
    """

    def __init__(self, function: str, count: int, environment: Mapping[str, str] | None = None) -> None:
        self._function, self._count, self._environment = function, count, dict(environment or {})
        self._running: list[_Process] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, requests: Sequence[Any], each: Callable[[Any], Any] = lambda answer: answer) -> list[Any]:
        """One result a request, in order: what ``each`` makes of its answer, called here as the answers come.

        Raises:
            ProcessDied: a process ended without an answer.
            BaseException: what ``each`` raises. Either ends the call, when what is being done elsewhere has ended.
        """
        while len(self._running) < min(self._count, len(requests)):
            self._running.append(_Process(self._function, self._environment))
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(requests)):
            waiting.put(number)
        finished: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        stop = threading.Event()

        def work(process: _Process) -> None:
            while not stop.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    finished.put((number, process.answer(requests[number])))
                except BaseException as error:
                    finished.put((number, error))
                    return

        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in self._running[: len(requests)]]
        for thread in threads:
            thread.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < len(requests):
                number, answer = finished.get()
                if isinstance(answer, BaseException):
                    raise answer
                found[number] = each(answer)
        except KeyboardInterrupt:  # who asked this process to end does not wait for what the others are doing
            for process in self._running:
                process.kill()
            raise
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        return [found[number] for number in range(len(requests))]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._running:
            process.close()
        self._running = []


class _Process:
    """One of them."""

    def __init__(self, function: str, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        paths = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attncompile.core.worker", function], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, env={**os.environ, "PYTHONPATH": paths, **environment},
        )  # fmt: skip

    def answer(self, request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            self._log.seek(0)
            said = " ".join(self._log.read().decode(errors="replace").split())[-500:]
            raise ProcessDied(request, code, said) from None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may have died meanwhile
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()
