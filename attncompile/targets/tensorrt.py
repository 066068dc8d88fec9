"""Engines of TensorRT with our kernels inside: nodes of ours become ahead-of-time plugins, the rest standard ops.

This package knows nothing of kernels: the pipeline hands over what makes plugins (``Plugins``). Without it, and for
nodes that get none, function bodies are inlined, as for TensorRT-RTX.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from onnx import ModelProto

from attncompile.core.errors import TargetError
from attncompile.core.kernel import SMALL_SHARED
from attncompile.core.model import Model
from attncompile.core.verdict import Verdict
from attncompile.targets import engine
from attncompile.targets import graph as g
from attncompile.targets import precision as conversion
from attncompile.targets.base import Precision
from attncompile.targets.engine import EngineTarget, PluginRequest, Shapes, run_worker
from attncompile.targets.legalise import dropped

DOMAIN = "attncompile"
BUNDLE = "tensorrt.bundle"
"""Folder in ``OUT/``: the kernels in the engine, and what their plugins are."""

LEAST_GAIN = 1.3
"""A plugin breaks the fusions around it: nothing is gained by one that is predicted to be less than this times as fast
as the dense attention that TensorRT fuses, its barrier (``TensorRT.barrier``) counted in."""


class Plugins(Protocol):
    """What makes plugins of nodes of ours. One object serves one run, and remembers what it made."""

    def chosen(self, proto: ModelProto, precision: Precision | None) -> Mapping[str, Verdict]:
        """For every node of ours in the main graph, by name, whether it is to become a plugin."""
        ...

    def replace(self, lowered: ModelProto) -> tuple[ModelProto, Mapping[str, Verdict]]:
        """``lowered`` with plugins in place of the nodes of ours that are left in it, and why others are still there.
        Compiles their kernels.
        """
        ...

    def is_plugin(self, op_type: str) -> bool:
        """Whether ``replace`` made nodes of this type."""
        ...

    def request(self, lowered: ModelProto, folder: Path) -> PluginRequest:
        """Write the kernels of ``lowered`` into ``folder``, for the builder's process."""
        ...

    def large(self) -> bool:
        """Whether a kernel needs more shared memory than every launch may have."""
        ...


@dataclass(frozen=True)
class TensorRT(EngineTarget):
    """The target ``tensorrt``. ``barrier``: seconds that a plugin costs by the fusions that it breaks; for whoever
    decides what becomes one, together with ``least_gain``.
    """

    plugins: Plugins | None = None
    barrier: float = 0.0
    least_gain: float = LEAST_GAIN

    name = "tensorrt"
    runs_kernels = True
    module = "tensorrt"
    label = "TensorRT"
    install = "pip install 'attncompile[tensorrt]'"
    portable_without = True

    def available(self) -> Verdict:
        """It is imported: the packages on the public index are stubs that lack the libraries."""
        if importlib.util.find_spec("tensorrt") is None:
            return Verdict.no("not_installed", "tensorrt is not installed", self.install)
        try:
            version = str(importlib.import_module("tensorrt").__version__)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Verdict.no("broken", f"tensorrt is installed and does not load: {said}", "install its libraries")
        known = supported(version)
        if not known.ok:
            return known
        return self.can_run()

    def can_run(self) -> Verdict:
        if not engine.capabilities():
            return Verdict.no(
                "no_gpu", "this machine has no CUDA GPU", "build on the machine that is to run the engine"
            )
        return Verdict.yes("installed, and there is a CUDA GPU")

    def supports(self, proto: ModelProto) -> Verdict:
        """Whether nothing but standard ops and plugins is left once the bodies are inlined."""
        inlined = g.inlined(proto)
        for node in (n for graph in g.graphs(inlined.graph) for n in graph.node):
            if dropped(node):
                return Verdict.no(
                    "dropped", f"Attention '{g.label(node)}' has {dropped(node)}, which parsers of TensorRT drop",
                    "export it as a boolean mask",
                )  # fmt: skip
        foreign = [n for n in g.foreign_nodes(inlined) if self.plugins is None or not self.plugins.is_plugin(n.op_type)]
        if not foreign:
            return Verdict.yes("standard ops and plugins only")
        node = foreign[0]
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        return Verdict.no(
            "foreign_op", f"node '{g.label(node)}' is {node.domain or 'ai.onnx'}::{node.op_type}{more}, and no plugin",
            "leave this model to --target onnx, or export it without that op",
        )  # fmt: skip

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        """Nodes of ours as plugins where they have kernels, bodies of others inlined, every node named; converted in
        the graph if ``precision`` is given.

        Raises:
            TargetError: an op is left that is neither standard nor a plugin, or the conversion failed.
        """
        named = ModelProto()
        named.CopyFrom(proto)
        g.name_nodes(named)
        without: set[str] = set()
        while True:
            lowered = self._lowered(named, model, precision, without)
            if self.plugins is None:
                break
            lowered, refused = self.plugins.replace(lowered)
            if not refused:
                break
            without |= set(refused)  # their bodies, then
        verdict = self.supports(lowered)
        if not verdict.ok:
            raise TargetError(verdict.reason, verdict.hint)
        return lowered

    def _lowered(self, named: ModelProto, model: Model, precision: Precision | None, without: set[str]) -> ModelProto:
        copy = ModelProto()
        copy.CopyFrom(named)
        verdicts = self.plugins.chosen(copy, precision) if self.plugins is not None else {}
        for node in copy.graph.node:
            if node.domain == DOMAIN and node.name not in without and node.name in verdicts and verdicts[node.name].ok:
                node.overload = ""  # calls no body any more: inlining leaves it
        lowered = g.inlined(copy)
        g.name_nodes(lowered)
        if precision is not None:
            lowered = conversion.convert(lowered, model.path.resolve().parent, precision)
        return lowered

    def _plugins(self, lowered: ModelProto, folder: Path) -> PluginRequest | None:
        if self.plugins is None or not any(self.plugins.is_plugin(n.op_type) for n in lowered.graph.node):
            return None
        return self.plugins.request(lowered, folder / BUNDLE)

    def _run(
        self, source: Path, engine: Path, profiles: Sequence[Shapes], plugins: PluginRequest | None, timeout: float
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        try:
            return run_worker(self, source, engine, profiles, timeout, plugins), self._told(plugins)
        except TargetError as error:
            if plugins is None or self.plugins is None or not self.plugins.large():
                raise
            # Whether TensorRT raises the limit of shared memory for a plugin is not known: every plugin can do without.
            small = replace(plugins, shared_limit=SMALL_SHARED)
            note = f"built with kernels of at most 48 KB of shared memory, since larger ones failed: {error.message}"
            return run_worker(self, source, engine, profiles, timeout, small), (*self._told(plugins), note)

    def _told(self, plugins: PluginRequest | None) -> tuple[str, ...]:
        if plugins is None:
            return ("no plugins: every op of ours runs through its body",) if self.plugins is not None else ()
        return (f"{len(plugins.nodes)} nodes are plugins, {len(set(plugins.nodes.values()))} different ones",)


def supported(version: str) -> Verdict:
    """10.15 and 10.16, and 11.2.1 and later: others have plugins that do not work, or leak."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if (10, 15) <= numbers < (11,) or numbers >= (11, 2, 1):
        return Verdict.yes(f"TensorRT {version}")
    return Verdict.no("version", f"TensorRT {version} is not supported", "install 10.15, 10.16, or 11.2.1 or later")


TARGET = TensorRT()
