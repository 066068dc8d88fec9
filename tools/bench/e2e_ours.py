"""Our side of the end-to-end benchmark: an export, its attention replaced, lowered over kernels that were compiled on a
machine without this GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from e2e_models import Model
from onnx import ModelProto

from attncompile import fusion_check, pipeline
from attncompile.console import SilentProgress
from attncompile.core.errors import TargetError
from attncompile.core.folder import copy_file
from attncompile.core.kernel import OpCall
from attncompile.core.model import Model as Loaded
from attncompile.core.plan import Decision
from attncompile.core.profile import Range
from attncompile.gate import Edit
from attncompile.kernel_kit import Kit
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.records import Built, CallKernels, key_of, signature
from attncompile.passes.replace import apply
from attncompile.pipeline import Options
from attncompile.plugins import kernels, mechanism
from attncompile.targets.onnxruntime_cuda import OnnxRuntimeCuda
from attncompile.targets.ort_fusions import BIASES

TARGET = "onnxruntime-cuda"


def export_onnx(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: int, tokens: str = ""
) -> Path:  # fmt: skip
    """torch's dynamo exporter, in the module's own type and on its device; sizes are static, but axis 1 of the inputs
    where it is given a name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {n: {1: torch.export.Dim(tokens, min=2, max=1 << 20)} for n in inputs} if tokens else None
    torch.onnx.export(
        module, kwargs=inputs, f=str(path), dynamo=True, opset_version=opset, external_data=True, optimize=True,
        input_names=list(inputs), output_names=["y"], verbose=False, dynamic_shapes=named,
    )  # fmt: skip
    return path


def replaced(path: Path, model: Model, tiny: bool) -> tuple[ModelProto, Loaded, list[str], Any]:
    """The export with ops of ours, the model it is of, what became of each site, and the profile."""
    lengths = Range(64, 128, 256) if tiny else Range(4096, 8192, 16384)
    sizes = {model.tokens: lengths} if model.tokens else {}
    found = pipeline.inspect(path, Options(profile=sizes))
    if not isinstance(found.normal, Loaded):
        raise TargetError(f"{path}: {found.normal.message}")
    # No tiny model gains anything on a GPU: all that is right is wanted of them.
    options = Options(policy="exact", target=TARGET, keep_slower=tiny, profile=sizes)
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
    """Kernels of a bundle that was compiled before; nothing is compiled here, and Triton is not needed."""

    def __init__(self, bundle: Path, architecture: int) -> None:
        super().__init__((architecture,), SilentProgress())
        self._bundle = Bundle.open(bundle)
        self._triton = str(self._bundle.index["triton"])

    def build(self, nodes: Any) -> Built:
        """Raises ``TargetError`` for a node whose kernels the bundle does not have, and what it asks that others do
        not.
        """
        known, compiled, found = kernels(), {}, {}
        keyed = []
        for node in nodes:
            general = known[node.call.op].general(node.call) if node.call is not None else None
            key = key_of(general) if general is not None else ""
            keyed.append((node, key))
            if general is None or key in found:
                continue
            if key not in {call["key"] for call in self._bundle.index["calls"]}:
                raise TargetError(f"{node.name}: {self._bundle.folder} has no such call: {self._differs(general)}",
                                  "its models were exported by other versions: prepare it again")  # fmt: skip
            made = self._bundle.kernels(key, self.architectures[0])
            if not made:
                raise TargetError(f"{self._bundle.folder} has no kernels for sm_{self.architectures[0]}")
            compiled |= {m.id: m for m in made}
            found[key] = CallKernels(general, {self.architectures[0]: tuple(m.id for m in made)})
        return Built(compiled, tuple(found.values()), tuple(keyed))

    def _differs(self, call: OpCall) -> str:
        """What ``call`` says otherwise than the call of the bundle that is most like it."""
        ours = _flat(signature(call))
        others = [_flat({k: c.get(k) for k in signature(call)}) for c in self._bundle.index["calls"]]
        unlike = [{k for k in ours.keys() | other.keys() if ours.get(k) != other.get(k)} for other in others]
        keys, other = min(zip(unlike, others, strict=True), key=lambda x: len(x[0]), default=(set(ours), {}))
        return ", ".join(f"{k} is {ours.get(k)}, there {other.get(k)}" for k in sorted(keys))


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


def write(
    proto: ModelProto, source: Loaded, kit: Kit, folder: Path, profile: Any, fusions: bool = True,
    half_norms: bool = True,
) -> Path:  # fmt: skip
    """``OUT/`` for ONNX Runtime's CUDA provider, weights beside the model."""
    folder.mkdir(parents=True, exist_ok=True)
    known = sum(prod(t.dims) for t in proto.graph.initializer) <= fusion_check.WIDENED
    target = OnnxRuntimeCuda(kit, fusions, half_norms, () if known else BIASES)  # as `compile` deploys it
    lowered = target.lower(proto, source, None)
    for file in source.external_files:
        copy_file(file.path, folder / file.location)  # ONNX and its runtime refuse links
    target.build(lowered, source, profile, folder)
    onnx.save(proto, folder / "model.onnx")
    return folder
