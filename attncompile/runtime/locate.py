"""Where the library of kernels for ONNX Runtime is. The wheel carries it where a compiler was there; a checkout, or a
wheel without it, compiles it once into the user's cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from attncompile.core.errors import MissingDependency
from attncompile.runtime import build


def library() -> Path:
    """The library, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        MissingDependency: it is not there and cannot be compiled, and why.
    """
    if not sys.platform.startswith("linux"):
        raise MissingDependency(f"there are no kernels for ONNX Runtime on {sys.platform}", "use Linux")
    wanted = build.source_hash()
    packaged = Path(__file__).parent / build.NAME
    stamp = packaged.with_name(packaged.name + build.STAMP)
    if packaged.is_file() and stamp.is_file() and stamp.read_text(encoding="ascii").strip() == wanted:
        return packaged
    cached = _cache() / wanted / build.NAME
    if cached.is_file():
        return cached
    print("attncompile: compiling the kernels' library for ONNX Runtime, once", file=sys.stderr)  # noqa: T201
    try:
        return build.compile_library(cached)
    except build.BuildError as error:
        raise MissingDependency(
            f"the library for ONNX Runtime cannot be compiled: {error}", "install g++; no CUDA toolkit is needed"
        ) from None
    except OSError as error:
        raise MissingDependency(
            f"the library for ONNX Runtime cannot be written to {cached.parent}: {error.strerror}",
            "name a folder that can be written in ATTNCOMPILE_CACHE",
        ) from None


def _cache() -> Path:
    given = os.environ.get("ATTNCOMPILE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    return (Path(given) if given else Path(home) / "attncompile") / "runtime"
