"""Tiny exports of real architectures, made once a run, whichever process asks first."""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attncompile.models import Options, export
from attncompile.models.export import Exported, build, quiet, resolve


@contextmanager
def alone(name: str) -> Iterator[Path]:
    """The run's folder, while no other process of the run is in here for ``name``."""
    folder = Path(os.environ["ATTNCOMPILE_TEST_SHARED"])
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The file ``name``, which ``make`` writes. Nobody may change it."""
    with alone(name) as folder:
        path, made = folder / name, folder / f"{name}.made"
        if not made.exists():
            make(path)
            made.touch()
    return path


@functools.cache
def exported(name: str, exporter: str = "dynamo", opset: int = 18, **options: object) -> Path:
    """The path of this recipe's tiny export."""
    words = "-".join([name, exporter, str(opset), *(f"{k}_{v}" for k, v in sorted(options.items()))])
    return once(
        f"{words}.onnx", lambda path: export(name, path, exporter=exporter, opset=opset, size="tiny", **options)
    )


def described(name: str, exporter: str = "dynamo", opset: int = 18, **options: object) -> Exported:
    """The same file with what it was made from. The module is built anew: seeds make it the one that was exported."""
    path = exported(name, exporter, opset, **options)
    chosen = resolve(name, Options(exporter=exporter, opset=opset, size="tiny", **options))
    with quiet():
        return Exported(path, chosen, build(name, chosen))
