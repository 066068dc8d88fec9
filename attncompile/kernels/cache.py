"""Compiled kernels kept between runs: one file a kernel, named by what it was made from."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from attncompile.core.errors import KernelError
from attncompile.kernels.entry import Compiled, Entry, canonical, digest


def default_folder() -> Path:
    """``$ATTNCOMPILE_CACHE``, else ``attncompile`` in the user's cache folder."""
    named = os.environ.get("ATTNCOMPILE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attncompile"


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder that may be shared by processes, and deleted at any time. A file that is not whole is as none."""

    folder: Path

    @staticmethod
    def default() -> Cache:
        return Cache(default_folder())

    def _path(self, key: str) -> Path:
        return self.folder / "kernels" / key[:2] / f"{key}.json"

    def read(self, key: str) -> Compiled | None:
        try:
            text = self._path(key).read_bytes()
        except OSError:
            return None
        checksum, _, body = text.partition(b"\n")
        if checksum.decode(errors="replace") != digest(body):
            return None
        try:
            value = json.loads(body)
            return Compiled(
                Entry.of_json(value["entry"]), value["ptx"], base64.b64decode(value["cubin"], validate=True)
            )
        except (ValueError, KeyError, TypeError, binascii.Error):  # written by another version
            return None

    def write(self, key: str, made: Compiled) -> None:
        """Raises ``KernelError`` where the folder cannot be written."""
        cubin = base64.b64encode(made.cubin).decode()
        body = canonical({"entry": made.entry.to_json(), "ptx": made.ptx, "cubin": cubin})
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(digest(body).encode() + b"\n" + body)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            hint = "set ATTNCOMPILE_CACHE to a folder that can be written"
            raise KernelError(f"cannot write the kernel cache {self.folder}: {error.strerror or error}", hint) from None
