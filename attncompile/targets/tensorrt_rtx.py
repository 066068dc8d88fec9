"""Engines of TensorRT-RTX (``tensorrt_rtx``), built on any machine; they run on GeForce and RTX GPUs only.

It takes no plugins: function bodies are inlined into standard ops, and a model with any other op is refused before the
parser sees it, because the parser aborts the process. Networks are strongly typed: precision comes from the model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from onnx import ModelProto

from attncompile.core.errors import TargetError
from attncompile.core.model import Model
from attncompile.core.verdict import Verdict
from attncompile.targets import engine
from attncompile.targets import graph as g
from attncompile.targets import precision as conversion
from attncompile.targets.base import Precision
from attncompile.targets.engine import EngineTarget
from attncompile.targets.legalise import drop_unit_axes, dropped

ARCHITECTURES = (75, 80, 86, 89, 120, 121)
"""Compute capabilities, times ten, that TensorRT-RTX 1.7 has kernels for (its ``ComputeCapability``)."""


class TensorRTRTX(EngineTarget):
    """The target ``tensorrt-rtx``."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    label = "TensorRT-RTX"
    install = "pip install 'attncompile[rtx]'"

    def available(self) -> Verdict:
        """Judged without importing it."""
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return Verdict.no("not_installed", "tensorrt_rtx is not installed", self.install)
        return Verdict.yes("engines are built on the CPU and run on RTX GPUs")

    def supports(self, proto: ModelProto) -> Verdict:
        """Whether nothing but standard ops is left once the bodies are inlined."""
        inlined = g.inlined(proto)
        for node in (n for graph in g.graphs(inlined.graph) for n in graph.node):
            if dropped(node):
                return Verdict.no(
                    "dropped",
                    f"the parser of TensorRT-RTX reads Attention '{g.label(node)}' but drops {dropped(node)}: hidden "
                    "keys would be seen",
                    "export them as a boolean mask",
                )
        foreign = g.foreign_nodes(inlined)
        if not foreign:
            return Verdict.yes("standard ops only")
        node = foreign[0]
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        domain = node.domain or "ai.onnx"
        return Verdict.no(
            "foreign_op",
            f"TensorRT-RTX takes standard ONNX ops only: node '{g.label(node)}' is {domain}::{node.op_type}{more}",
            "leave this model to --target onnx, or export it without that op",
        )

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        """Bodies inlined, every node named; converted in the graph if ``precision`` is given.

        The external tensors of the result are still those of ``model`` unless it was converted.

        Raises:
            TargetError: an op is left that is not in the standard domain, or the conversion failed.
        """
        lowered = g.inlined(proto)
        g.name_nodes(lowered)
        verdict = self.supports(lowered)
        if not verdict.ok:
            raise TargetError(verdict.reason, verdict.hint)
        drop_unit_axes(lowered)
        if precision is not None:
            lowered = conversion.convert(lowered, model.path.resolve().parent, precision)
        return lowered

    def can_run(self) -> Verdict:
        """Whether engines of this target run on this machine."""
        capabilities = engine.capabilities()
        if not capabilities:
            return Verdict.no(
                "no_gpu", "this machine has no CUDA GPU; engines run on RTX GPUs", "copy model.engine there"
            )
        if not any(c in ARCHITECTURES for c in capabilities):
            here = ", ".join(f"{c // 10}.{c % 10}" for c in capabilities)
            return Verdict.no(
                "architecture", f"TensorRT-RTX has no kernels for compute capability {here}", "use an RTX GPU"
            )
        return Verdict.yes("a GPU that TensorRT-RTX has kernels for")

    def _notes(self, lowered: ModelProto, layers: Sequence[Any], found: Sequence[Any]) -> list[str]:
        if layers and any(a.fused is False for a in found) and not _is_half(lowered):
            return ["TensorRT-RTX fuses fp16 and bf16 attention only: build with --fp16"]
        return super()._notes(lowered, layers, found)


def _is_half(proto: ModelProto) -> bool:
    return any(t.data_type in (10, 16) for t in proto.graph.initializer)


TARGET = TensorRTRTX()
