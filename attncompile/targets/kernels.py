"""What a target that launches our kernels is given: targets import neither mechanisms nor the kernels' compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from onnx import ModelProto

from attncompile.targets.base import Target


@dataclass(frozen=True, slots=True)
class NodeKernel:
    """One node of ours, by its ``name``. Where ``reason`` is empty it can be launched as a node ``op_type`` with the
    attribute ``record``, which takes these of its ``inputs`` and ``outputs``, by position and in this order.
    """

    name: str
    reason: str = ""
    hint: str = ""
    op_type: str = ""
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    record: str = ""


class KernelKit(Protocol):
    """Kernels for the nodes of a model, for the architectures of one run."""

    def candidates(self, proto: ModelProto, dtype: str) -> Sequence[NodeKernel]:
        """Nodes of ours and why they have no kernel; nothing is compiled. Nodes in float32 are taken for ``dtype``."""
        ...

    def compile(self, proto: ModelProto) -> Sequence[NodeKernel]:
        """The same with everything compiled, for the element types that ``proto`` has."""
        ...

    def write(self, out: Path, strict_norms: bool = False) -> None:
        """What was compiled last, as a bundle; ``strict_norms``: of a model that has norms of sums in fp16."""
        ...

    @property
    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities, major * 10 + minor."""
        ...


@runtime_checkable
class Launching(Protocol):
    """A target that launches our kernels."""

    def equipped(self, kit: KernelKit) -> Target:
        """The target for one run."""
        ...


def by_name(kernels: Sequence[NodeKernel]) -> Mapping[str, NodeKernel]:
    return {kernel.name: kernel for kernel in kernels}
