"""Our side of the end-to-end benchmark: an export, its attention replaced, lowered over kernels that were compiled on a
machine without this GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from e2e_models import Model
from onnx import ModelProto

from attncompile import pipeline
from attncompile.console import SilentProgress
from attncompile.core.errors import TargetError
from attncompile.core.model import Model as Loaded
from attncompile.core.plan import Decision
from attncompile.gate import Edit
from attncompile.kernel_kit import Kit
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.records import Built, CallKernels, key_of
from attncompile.passes.replace import apply
from attncompile.pipeline import Options
from attncompile.plugins import kernels, mechanism
from attncompile.targets.onnxruntime_cuda import OnnxRuntimeCuda

TARGET = "onnxruntime-cuda"


def export(module: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: int) -> Path:
    """torch's dynamo exporter, static sizes, in the module's own type and on its device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        module, kwargs=inputs, f=str(path), dynamo=True, opset_version=opset, external_data=True, optimize=True,
        input_names=list(inputs), output_names=["y"], verbose=False,
    )  # fmt: skip
    return path


def replaced(path: Path, model: Model, tiny: bool) -> tuple[ModelProto, Loaded, list[str], Any]:
    """The export with ops of ours, the model it is of, what became of each site, and the profile."""
    found = pipeline.inspect(path, Options())
    if not isinstance(found.normal, Loaded):
        raise TargetError(f"{path}: {found.normal.message}")
    # No tiny model gains anything on a GPU: all that is right is wanted of them.
    options = Options(policy="exact", target=TARGET, keep_slower=tiny)
    if model.neighborhood is None:
        edits = pipeline.edits(found, options)
    else:
        edits = _forced(found, model.neighborhood(tiny), options)
    done = {e.site.id: e.decision.mechanism for e in edits}
    said = [f"{s.id}: {s.mask.kind}, {done.get(s.id, 'kept')}" for s in found.detection.sites]
    proto = apply(found.index.model, [(e.site, e.lowering) for e in edits]) if edits else found.model.proto
    return proto, found.index.model, said, found.profile


def _forced(found: pipeline.Inspection, parameters: dict[str, Any], options: Options) -> list[Edit]:
    """Every site whose tokens are the grid gets the neighborhood; the others what the exact policy says."""
    chosen = mechanism("NeighborhoodAttention")
    tokens = int(torch.tensor(parameters["grid"]).prod())
    edits = {e.site.id: e for e in pipeline.edits(found, options)}
    for site in found.detection.sites:
        if site.query_length == site.key_length == tokens:
            verdict = chosen.supports(site, parameters)
            if not verdict.ok:
                raise TargetError(f"{site.id}: {verdict.reason}", verdict.hint)
            decision = Decision(site.id, chosen.name, "asked for", False, parameters)
            edits[site.id] = Edit.of(site, decision, chosen, found.index.model.opset)
    return list(edits.values())


class BundleKit(Kit):
    """Kernels of a bundle that was compiled before; nothing is compiled here."""

    def __init__(self, bundle: Path, architecture: int) -> None:
        super().__init__((architecture,), SilentProgress())
        self._bundle = Bundle.open(bundle)

    def build(self, nodes: Any) -> Built:
        known, compiled, found = kernels(), {}, {}
        keyed = []
        for node in nodes:
            general = known[node.call.op].general(node.call) if node.call is not None else None
            key = key_of(general) if general is not None else ""
            keyed.append((node, key))
            if general is None or key in found:
                continue
            made = self._bundle.kernels(key, self.architectures[0])
            compiled |= {m.id: m for m in made}
            found[key] = CallKernels(general, {self.architectures[0]: tuple(m.id for m in made)})
        return Built(compiled, tuple(found.values()), tuple(keyed))


def write(proto: ModelProto, source: Loaded, kit: Kit, folder: Path, profile: Any) -> Path:
    """``OUT/`` for ONNX Runtime's CUDA provider, weights beside the model."""
    folder.mkdir(parents=True, exist_ok=True)
    target = OnnxRuntimeCuda().equipped(kit)
    lowered = target.lower(proto, source, None)
    for file in source.external_files:
        place = folder / file.location
        if not place.exists():
            place.symlink_to(file.path.resolve())
    target.build(lowered, source, profile, folder)
    onnx.save(proto, folder / "model.onnx")
    return folder
