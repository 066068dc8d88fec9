"""Named arrays as one file, which is there whole or not at all. Any name will do (``np.savez`` has names of its
own).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attncompile.core.folder import cannot_write


def save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes ``path`` (.npz). Raises ``TargetError`` where that is not possible."""
    names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
    temporary = path.with_name(f".{path.name}.tmp.npz")
    try:
        np.savez(temporary, names, *(np.asarray(a) for a in arrays.values()))
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, wanted: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """What ``save`` wrote, or of it what is ``wanted``: others are not read."""
    with np.load(path) as stored:
        names = json.loads(stored["arr_0"].tobytes())
        return {name: stored[f"arr_{i + 1}"] for i, name in enumerate(names) if wanted is None or name in wanted}
