"""For tests: a task."""

from __future__ import annotations

import os
from dataclasses import dataclass

from attncompile.core.errors import AttncompileError


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
