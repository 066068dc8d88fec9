"""A loaded model: the proto without its external weights, and where those lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """One external data file: ``location`` as written in the proto (relative, POSIX), the real ``path``, its size."""

    location: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Model:
    """``proto`` is the file as read: never changed in place, external tensors not loaded.

    ``hash`` is ``sha256:`` over the proto and the external references (location, offset, length, file size);
    ``opset`` the imported version of the standard domain; ``notes`` what loading had to say.
    """

    path: Path
    proto: ModelProto
    hash: str
    opset: int
    external_files: tuple[ExternalFile, ...] = ()
    notes: tuple[str, ...] = ()
