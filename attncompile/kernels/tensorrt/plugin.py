"""What one plugin is, as plain values and as JSON beside a bundle. Needs neither TensorRT nor Triton.

A plugin belongs to one *signature*: an op, which of its inputs and outputs a node has, their types, the node's symbols
(layouts, sizes that are fixed, scale, reach of the window) and its kernels. All of it is in the plugin's name. So its
nodes carry no attribute that a plugin would read, and nodes that differ in any of this have different plugins: a plugin
has a fixed list of inputs, and attributes are not serialized into an engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attncompile.core.errors import KernelError
from attncompile.core.folder import write_file
from attncompile.kernels.entry import canonical, digest

NAMESPACE = "attncompile"
"""Of all plugins of ours. TensorRT refuses an empty one, ``trt``, ``tensorrt`` and ``std``."""
VERSION = "1"
"""Every quickly deployable plugin has this one."""
INDEX = "plugins.json"
"""Beside the bundle's own index."""
FORMAT = 1


@dataclass(frozen=True, slots=True)
class PluginTensor:
    """One input or output: its formal name, element type, and an expression an axis over the sizes of inputs."""

    name: str
    type: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plugin:
    """``inputs`` and ``outputs`` in the order of the launch. ``entries`` of the bundle, best first: tactic t, counted
    from 1 (0 is TensorRT's own default), is entry t - 1. ``symbols`` as in the bundle's index.
    """

    op: str
    inputs: tuple[PluginTensor, ...]
    outputs: tuple[PluginTensor, ...]
    symbols: Mapping[str, str]
    entries: tuple[str, ...]

    @property
    def name(self) -> str:
        """Type of the plugin's nodes. It has no dot, which TensorRT refuses."""
        return f"{self.op}_{digest(canonical(asdict(self)))[:12]}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}

    @staticmethod
    def of_json(value: Mapping[str, Any]) -> Plugin:
        """The inverse of ``to_json``. Raises ``KernelError`` if the name is not that of the rest."""
        inputs, outputs = (
            tuple(PluginTensor(t["name"], t["type"], tuple(t["axes"])) for t in value[side])
            for side in ("inputs", "outputs")
        )
        made = Plugin(value["op"], inputs, outputs, dict(value["symbols"]), tuple(value["entries"]))
        if made.name != value["name"]:
            raise KernelError(f"plugin {value['name']} was changed: it is {made.name} now", "build the engine again")
        return made


def write(folder: Path, plugins: Sequence[Plugin]) -> Path:
    """Write ``plugins.json`` into the bundle ``folder``."""
    text = json.dumps({"format": FORMAT, "plugins": [p.to_json() for p in plugins]}, indent=1, sort_keys=True)
    write_file(folder / INDEX, text.encode() + b"\n")
    return folder / INDEX


def read(folder: Path) -> tuple[Plugin, ...]:
    """The plugins of a bundle. Raises ``KernelError``."""
    path = folder / INDEX
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise KernelError(f"{path}: its format is {value['format']!r}, this version reads {FORMAT}")
        return tuple(Plugin.of_json(p) for p in value["plugins"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelError(f"{path} cannot be read: {error}", "build the engine again") from None
