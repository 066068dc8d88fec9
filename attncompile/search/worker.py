"""A process that does tasks one after the other: ``python -m attncompile.search.worker THREADS``.

Tasks come in on stdin and results go out on stdout, pickled; both ends are this package. Processes of its own rather
than ``multiprocessing``'s, which import the user's script again.
"""

from __future__ import annotations

import os
import pickle
import sys

from attncompile.core.errors import AttncompileError


def main(threads: int) -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the results
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, task(threads))
        except AttncompileError as error:
            answer = (False, (error.message, error.hint))
        pickle.dump(answer, results)
        results.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
