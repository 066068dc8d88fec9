"""For tests: an executor that does one task after the other in this process, and a task."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attncompile.core.errors import AttncompileError
from attncompile.search.tasks import Task


class Inline:
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


@dataclass(frozen=True)
class Sample:
    """Gives its number and the threads; a negative one is refused, and 0 ends the process."""

    number: int

    def __call__(self, threads: int) -> tuple[int, int]:
        if self.number < 0:
            raise AttncompileError("it is negative", "give another")
        if not self.number:
            os._exit(9)
        return self.number, threads
