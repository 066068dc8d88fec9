"""Hands kernels to the targets that launch them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto

from attncompile.core.errors import TargetError, Unsupported
from attncompile.core.kernel import ARCHITECTURES
from attncompile.core.site import AttentionSite
from attncompile.env import cuda
from attncompile.kernels import build, bundle, calls, compiler, launch_record
from attncompile.kernels.cache import Cache
from attncompile.kernels.records import Built, NodeCall
from attncompile.plugins import kernels
from attncompile.site_sizes import with_site_sizes
from attncompile.targets.kernels import NodeKernel

if TYPE_CHECKING:
    from attncompile.console import Progress


class Kit:
    """A ``KernelKit`` for ``architectures``; a node has a kernel if it has one on each of them. What is known of
    ``sites`` helps where the file does not say a size.
    """

    def __init__(self, architectures: Sequence[int], progress: Progress, sites: Sequence[AttentionSite] = ()) -> None:
        self._architectures = tuple(architectures)
        self._sites = sites
        self._progress = progress
        self._built: Built | None = None
        self._triton = ""

    @property
    def architectures(self) -> tuple[int, ...]:
        return self._architectures

    def _calls(self, proto: ModelProto, dtype: str) -> list[NodeCall]:
        for kernel in kernels().values():
            kernel.register()
        return calls.find(with_site_sizes(proto, self._sites) if self._sites else proto, kernels(), dtype)

    def candidates(self, proto: ModelProto, dtype: str) -> list[NodeKernel]:
        found = []
        for node in self._calls(proto, dtype):
            verdict = node.verdict
            if node.call is not None:
                verdicts = [kernels()[node.call.op].supports(node.call, a) for a in self._architectures]
                verdict = next((v for v in verdicts if not v.ok), verdict)
            refused = not verdict.ok
            found.append(NodeKernel(node.name, verdict.reason if refused else "", verdict.hint if refused else ""))
        return found

    def compile(self, proto: ModelProto) -> list[NodeKernel]:
        """Raises ``MissingDependency`` without Triton."""
        self._built = built = self.build(self._calls(proto, calls.DTYPES[0]))
        found = []
        for node, key in built.nodes:
            try:
                if node.call is None:
                    raise Unsupported(node.verdict.code, node.verdict.reason, node.verdict.hint)
                self._complete(built, key)
                made = launch_record.record(node, built, key)
            except Unsupported as error:
                found.append(NodeKernel(node.name, error.message, error.hint))
                continue
            found.append(NodeKernel(node.name, "", "", made.op_type, made.inputs, made.outputs, made.text))
        return found

    def build(self, nodes: Sequence[NodeCall]) -> Built:
        """The kernels of ``nodes``. Raises ``MissingDependency`` without Triton."""
        self._triton = compiler.require_triton()
        return build.build(
            nodes, (), kernels(), self._architectures, Cache.default(),
            lambda total: self._progress.stage("compile kernels", total), self._progress.advance,
        )  # fmt: skip

    def _complete(self, built: Built, key: str) -> None:
        call = next(c for c in built.calls if c.key == key)
        for architecture in self._architectures:
            if not call.kernels.get(architecture):
                said = next((r.reason for r in call.refused if r.architecture == architecture), "none was compiled")
                raise Unsupported("kernel", f"{call.call.op} has no kernel on sm_{architecture}: {said}")

    def write(self, out: Path, strict_norms: bool = False) -> None:
        """Raises ``TargetError`` where nothing was compiled."""
        if self._built is None:
            raise TargetError("no kernel was compiled")
        bundle.write(out, self._built, self._triton, strict_norms)


def default_architectures() -> tuple[int, ...]:
    """That of the GPUs in this machine, or all that kernels are compiled for where there is none."""
    here = set()
    for gpu in cuda()[1]:
        capability = gpu.capability[0] * 10 + gpu.capability[1]
        # Code for an earlier minor of the same major runs too, else PTX for anything earlier.
        alike = [a for a in ARCHITECTURES if a <= capability and a // 10 == capability // 10]
        here.add(max(alike or [a for a in ARCHITECTURES if a <= capability], default=ARCHITECTURES[0]))
    return tuple(sorted(here)) or ARCHITECTURES
