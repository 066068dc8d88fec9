"""What a target is, what it returns, and the list of the targets there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from onnx import ModelProto

from attncompile.core.errors import BadArguments, MissingDependency
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict

Precision = Literal["fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer (kernel) of an engine, and the names of the ONNX nodes that it computes, as the builder's log says."""

    name: str
    kind: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """One attention of the lowered model. ``node`` is its softmax, or the ``Attention`` op.

    ``fused``: True if one layer of the engine computes both products and the softmax; None where the builder's log does
    not say. ``layer`` names the layer that holds the softmax; ``reason`` says what the answer was read from.
    """

    node: str
    fused: bool | None
    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a target wrote. ``seconds`` is the time of the build alone; ``engine_size`` in bytes.

    ``attention`` lists every attention of the lowered model and ``sites`` whether all of those that came from a site
    are fused (None: unknown). ``ran`` says whether the result was executed here, and ``reason`` why not.
    """

    target: str
    files: tuple[Path, ...]
    seconds: float
    engine: Path | None = None
    engine_size: int | None = None
    layers: tuple[EngineLayer, ...] = ()
    attention: tuple[FusedAttention, ...] = ()
    sites: Mapping[str, bool | None] = field(default_factory=dict)
    ran: bool = False
    reason: str = ""
    notes: tuple[str, ...] = ()
    launches: bool = False
    """Whether the model in ``files`` launches our kernels, and so does not run without a GPU."""

    @property
    def attention_layers(self) -> int | None:
        """How many attentions the model holds; None for a target that does not say."""
        return len(self.attention) if self.engine is not None else None

    @property
    def attention_fused(self) -> int | None:
        """How many of them are fused; None if that is unknown for any of them."""
        if self.engine is None or any(a.fused is None for a in self.attention):
            return None
        return sum(bool(a.fused) for a in self.attention)


class Target(Protocol):
    """Something that a model is deployed as."""

    name: str
    fuses_dense: bool
    """Whether it fuses dense attention itself, so that only replacements which skip keys may be faster there."""

    takes_branches: bool
    """Whether it takes a model with an If around its sites, each branch with ops of ours."""

    @property
    def runs_kernels(self) -> bool:
        """Whether it runs the GPU kernels of our ops. Then their cost model judges, not times on this CPU."""
        ...

    @property
    def least_gain(self) -> float:
        """Predicted gain of a site below which an op of ours is not worth what it breaks around it; 0 for none."""
        ...

    @property
    def barrier(self) -> float:
        """Seconds that an op of ours costs by the fusions that it breaks."""
        ...

    def available(self) -> Verdict:
        """Whether this target can be built here; the hint says what to install."""
        ...

    def supports(self, proto: ModelProto) -> Verdict:
        """Whether ``proto``, once lowered, holds nothing that this target cannot take."""
        ...

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        """The model in the form that this target takes. ``proto`` is not changed; its external tensors are those of
        ``model``. Raises ``TargetError`` if there is no such form.
        """
        ...

    def build(
        self, lowered: ModelProto, model: Model, profile: ShapeProfile, folder: Path,
        sites: Sequence[AttentionSite] = (),
    ) -> BuildResult:  # fmt: skip
        """Build ``lowered`` and write the result into ``folder``."""
        ...

    def open(self, folder: Path) -> Any:
        """What ``build`` wrote, loaded and ready to run. Raises ``TargetError`` where it cannot run."""
        ...


REGISTRY: tuple[tuple[str, str], ...] = (
    ("onnx", "attncompile.targets.onnx:TARGET"),
    ("onnxruntime-cuda", "attncompile.targets.onnxruntime_cuda:TARGET"),
    ("tensorrt-rtx", "attncompile.targets.tensorrt_rtx:TARGET"),
    ("tensorrt", "attncompile.targets.tensorrt:TARGET"),
)
"""Name and ``module:object`` of every target, imported only when it is asked for."""


def names() -> tuple[str, ...]:
    return tuple(name for name, _ in REGISTRY)


def get(name: str) -> Target:
    """The target of this name. Raises ``BadArguments`` for an unknown one."""
    for known, place in REGISTRY:
        if known == name:
            module, attribute = place.split(":")
            target: Target = getattr(importlib.import_module(module), attribute)
            return target
    raise BadArguments(f"there is no target '{name}'", f"targets: {', '.join(names())}")


def require(target: Target) -> None:
    """Raise ``MissingDependency`` if ``target`` cannot be built here."""
    verdict = target.available()
    if not verdict.ok:
        raise MissingDependency(f"target {target.name}: {verdict.reason}", verdict.hint)
