"""Tiny exports of real architectures, made once a session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from attncompile.models import export

_FOLDER = tempfile.TemporaryDirectory(prefix="attncompile-exports-")


@functools.cache
def exported(name: str, exporter: str = "dynamo", opset: int = 18, **options: object) -> Path:
    """The path of this recipe's tiny export."""
    words = "-".join([name, exporter, str(opset), *(f"{k}_{v}" for k, v in sorted(options.items()))])
    path = Path(_FOLDER.name) / f"{words}.onnx"
    export(name, path, exporter=exporter, opset=opset, size="tiny", **options)
    return path
