"""A process that compiles programs one after the other: ``python -m attncompile.kernels.worker``.

Jobs come in on stdin and results go out on stdout, pickled; both ends are this package. Processes of its own rather
than ``multiprocessing``'s: those import the user's script again, and Triton's bindings complain at every exit.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import BinaryIO

from attncompile.kernels.jobs import run


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
