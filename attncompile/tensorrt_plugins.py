"""What the target ``tensorrt`` gets from the pipeline: plugins of a model's nodes, with kernels for one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from attncompile.core.errors import MissingDependency
from attncompile.core.kernel import ARCHITECTURES, SMALL_SHARED, Kernel
from attncompile.core.verdict import Verdict
from attncompile.kernels import build, bundle, calls, compiler
from attncompile.kernels.cache import Cache
from attncompile.kernels.driver import driver
from attncompile.kernels.entry import Compiled, digest
from attncompile.kernels.launcher import best_for
from attncompile.kernels.records import Built, NodeCall, key_of
from attncompile.kernels.tensorrt import generate, plugin
from attncompile.targets.base import Precision
from attncompile.targets.engine import PluginRequest

REGISTER = "attncompile.kernels.tensorrt.register:register_folder"
"""What the builder's process calls."""

DTYPES = {"fp16": "float16", "bf16": "bfloat16", None: "float32"}


@dataclass(slots=True)
class KernelPlugins:
    """Plugins for a GPU of this ``capability`` and number of ``multiprocessors``."""

    kernels: Mapping[str, Kernel]
    capability: int
    multiprocessors: int
    cache: Cache = field(default_factory=Cache.default)
    _built: Built = field(default_factory=lambda: Built({}, ()))
    _made: dict[str, plugin.Plugin] = field(default_factory=dict)

    @property
    def architecture(self) -> int:
        """For which kernels are compiled: the GPU's own, else the newest whose PTX its driver can translate."""
        older = [a for a in ARCHITECTURES if a < min(self.capability, 90)]
        return self.capability if self.capability in ARCHITECTURES else max(older, default=ARCHITECTURES[0])

    def chosen(self, proto: ModelProto, precision: Precision | None) -> Mapping[str, Verdict]:
        try:
            compiler.require_triton()
        except MissingDependency as error:
            missing = Verdict.no("no-compiler", error.message, error.hint)
            return {n.name: missing for n in proto.graph.node if n.domain == calls.DOMAIN}
        return {n.name: self._verdict(n) for n in calls.find(proto, self.kernels, DTYPES[precision]) if not n.scope}

    def _verdict(self, node: NodeCall) -> Verdict:
        if node.call is None:
            return node.verdict
        return self.kernels[node.call.op].supports(node.call, self.architecture)

    def replace(self, lowered: ModelProto) -> tuple[ModelProto, Mapping[str, Verdict]]:
        nodes = [n for n in calls.find(lowered, self.kernels, DTYPES[None]) if not n.scope]
        if not nodes:
            return lowered, {}
        self._built = build.build(nodes, [], self.kernels, (self.architecture,), self.cache)
        made = generate.generate(lowered, nodes, self._kernels)
        self._made |= made.plugins
        return generate.rewritten(lowered, made), made.others

    def _kernels(self, node: NodeCall) -> list[Compiled]:
        assert node.call is not None
        key = key_of(build.general(self.kernels, node.call))
        ids = [i for c in self._built.calls if c.key == key for i in c.kernels.get(self.architecture, ())]
        found = [self._built.compiled[i] for i in ids]
        runs = best_for([k.entry for k in found], self.capability)
        return [k for k in found if any(k.entry is e for e in runs)]

    def is_plugin(self, op_type: str) -> bool:
        return op_type in self._made

    def request(self, lowered: ModelProto, folder: Path) -> PluginRequest:
        nodes = {n.name: n.op_type for n in lowered.graph.node if n.op_type in self._made}
        bundle.write(folder, self._built, compiler.require_triton())
        used = [self._made[name] for name in sorted(set(nodes.values()))]
        plugin.write(folder, used)
        code = {p.name: [digest(self._built.compiled[e].ptx.encode()) for e in p.entries] for p in used}
        return PluginRequest(REGISTER, folder, self.multiprocessors, nodes, code)

    def large(self) -> bool:
        return any(k.entry.shared > SMALL_SHARED for k in self._built.compiled.values())


def for_this_gpu(kernels: Mapping[str, Kernel], device: int = 0) -> KernelPlugins:
    """Plugins for the GPU of this machine. Raises ``MissingDependency`` without a driver."""
    cuda = driver()
    handle = cuda.device(device)
    return KernelPlugins(kernels, cuda.capability(handle), cuda.multiprocessors(handle))
