"""Fitted maps as a file: one ``.npz`` for one model."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attncompile.core.errors import BadArguments
from attncompile.core.feature_map import ARRAYS, FeatureMaps
from attncompile.search import arrays

FILE = "fitted.npz"
"""Its name in a folder."""

_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """``maps``: site -> its maps, one of a kind. ``settings``: how they were fitted, for people."""

    model_hash: str
    maps: Mapping[str, tuple[FeatureMaps, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def only(self, digests: Mapping[str, str]) -> Fitted:
        """The maps with these digests (site -> digest)."""
        kept = {s: tuple(m for m in self.maps.get(s, ()) if m.digest == d) for s, d in digests.items()}
        return Fitted(self.model_hash, kept, self.settings)


def save(path: Path, fitted: Fitted) -> None:
    """Writes ``path``, whole or not at all."""
    index = {
        "version": _VERSION, "model": fitted.model_hash, "settings": dict(fitted.settings),
        "sites": {site: [m.kind for m in maps] for site, maps in fitted.maps.items()},
    }  # fmt: skip
    held = {"index": np.frombuffer(json.dumps(index).encode(), np.uint8)}
    for site, maps in fitted.maps.items():
        for m in maps:
            held |= {f"{site}/{m.kind}/{n}": np.asarray(m.arrays[n], np.float32) for n in ARRAYS[m.kind]}
    arrays.save(path, held)


def load(path: Path) -> Fitted:
    """What ``save`` wrote; ``path`` may be the folder that holds it.

    Raises:
        BadArguments: it is no such file.
    """
    path = path / FILE if path.is_dir() else path
    hint = "make one with attncompile fit MODEL --inputs FILE"
    try:
        held = arrays.load(path)
        index = json.loads(held["index"].tobytes())
        maps = {
            site: tuple(FeatureMaps(kind, {n: held[f"{site}/{kind}/{n}"] for n in ARRAYS[kind]}) for kind in kinds)
            for site, kinds in index["sites"].items()
        }
        found = Fitted(index["model"], maps, index["settings"])
    except OSError as error:
        raise BadArguments(f"cannot read {path}: {error.strerror or error}", hint) from None
    except (AttributeError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
        raise BadArguments(f"{path} holds no fitted maps", hint) from None
    if index["version"] != _VERSION:
        raise BadArguments(f"{path} is of version {index['version']}, not {_VERSION}", hint)
    return found
