"""A process that answers requests one after the other: ``python -m attncompile.core.worker MODULE:FUNCTION``.

Requests come in on stdin and answers go out on stdout, pickled; both ends are this package. What the function raises
ends the process.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from typing import BinaryIO


def main(function: str) -> None:
    # What libraries and compilers print must not get between the answers.
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(call(request), answers)
        answers.flush()
    # Not sys.exit(): Triton's bindings print what they leak when the interpreter is taken down.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
