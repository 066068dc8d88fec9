"""What a search has found so far, on disk: an interrupted one goes on where it was.

A folder beside the output's holds a file for every piece of work, each written whole or not at all. It belongs to one
key, a hash of the model, the inputs, the options and the code that gives candidates their meaning; another key empties
it. What depends on the candidates has a hash of them in its name: a search that offers others does not find it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attncompile.core.errors import BadArguments
from attncompile.core.folder import hold, write_file
from attncompile.search.arrays import load, save

_KEY = "key.txt"

MEANING = (
    "attncompile.core.block_pattern", "attncompile.core.block_selection", "attncompile.core.grid",
    "attncompile.core.grid_pattern", "attncompile.core.pattern", "attncompile.search.maps", "attncompile.search.tasks",
    *(f"attncompile.plugins.block_sparse.{name}" for name in (
        "chosen", "chosen_body", "head_body", "head_lists", "head_orders", "per_head", "rest")),
    "attncompile.plugins.block_select.function",
)  # fmt: skip
"""Modules that say what the text of a candidate means, how maps are read, how candidates are scored, and what models
with them compute.
"""


def key_of(model_hash: str, feeds: Sequence[Mapping[str, np.ndarray]], options: Mapping[str, Any]) -> str:
    """Of all that decides what a search finds."""
    digest = hashlib.sha256(model_hash.encode())
    for name in MEANING:
        digest.update(source_of(name).encode())
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    for feed in feeds:
        for name, value in sorted(feed.items()):
            digest.update(repr((name, value.dtype.str, value.shape)).encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def source_of(module: str) -> str:
    """Its text, or nothing where it is installed without; then the version alone tells code apart."""
    try:
        return inspect.getsource(importlib.import_module(module))
    except OSError:
        return ""


def stamp_of(value: Any) -> str:
    """16 hexadecimal digits that name ``value``, of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class State:
    """``folder`` is made when it is needed, and this search's alone until ``release``. ``resumed`` counts the pieces
    that were there already. Raises ``BadArguments`` where the folder holds something else, or another search is using
    it.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.resumed = 0
        known = folder / _KEY
        if folder.is_dir() and any(folder.iterdir()) and not known.is_file():
            raise BadArguments(f"{folder} is not a search's: it holds other files", "move them, or name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._held = hold(folder)
        except BlockingIOError:
            raise BadArguments(
                f"{folder} is in use: another search for the same output is running",
                "wait until it has ended, or name another folder with --out",
            ) from None
        if not known.is_file() or known.read_text(encoding="utf-8", errors="replace") != key:
            # Not the folder, which is what is held; the key last: a folder without one is taken for somebody else's.
            for path in sorted(folder.iterdir(), key=lambda p: p == known):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_file(known, key.encode("ascii"))

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """What was stored under ``name``, or None."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        self.resumed += 1
        return load(path)

    def store(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        save(self.folder / f"{name}.npz", arrays)

    def release(self) -> None:
        """Others may use the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def remove(self) -> None:
        """The search is over; what another one has begun there since ``release`` stays."""
        with contextlib.suppress(OSError):
            held = hold(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
            if held is not None:
                os.close(held)
