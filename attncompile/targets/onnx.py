"""The portable artefact: ``model.onnx`` with our ops and their bodies, and the original's external data beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from attncompile.core.errors import TargetError
from attncompile.core.folder import atomic_folder, check_replaceable, copy_file, write_file
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.targets import precision as conversion
from attncompile.targets.base import BuildResult, Precision

MODEL = "model.onnx"


def write(proto: ModelProto, model: Model, folder: Path) -> Path:
    """Write ``proto``, made from ``model``, as ``model.onnx`` into ``folder``, with the original's external data.

    If ``proto`` is ``model.proto`` itself the file is a copy of the input, byte for byte. External files keep their
    relative names; they are shared with the input where the file system can, else streamed, and never loaded. A file
    that an earlier call put there is not copied again.

    Raises:
        TargetError: ``folder`` cannot be written, an external file has the model's name, or the proto is too large.
    """
    target = folder / MODEL
    for external in model.external_files:
        place = folder / external.location
        if place == target:
            raise TargetError(
                f"the model's external data is itself called {MODEL}", "rename it: export again with another location"
            )
        if not _is_copy(external.path, place):
            copy_file(external.path, place)
    if proto is model.proto:
        copy_file(model.path, target)
        return target
    try:
        data = proto.SerializeToString()
    except ValueError:  # protobuf refuses messages above 2 GiB
        raise TargetError(
            "the rewritten model is larger than 2 GiB in one file", "export the model with external data"
        ) from None
    write_file(target, data)
    return target


def _is_copy(source: Path, place: Path) -> bool:
    """Size and modification time agree, which ``copy_file`` keeps."""
    if not place.is_file():
        return False
    ours, theirs = place.stat(), source.stat()
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


class Onnx:
    """The target ``onnx``: always available, takes everything, needs no build."""

    name = "onnx"
    fuses_dense = False
    takes_branches = True
    runs_kernels = False
    least_gain = 0.0
    barrier = 0.0

    def available(self) -> Verdict:
        return Verdict.yes("always written; needs nothing")

    def supports(self, proto: ModelProto) -> Verdict:
        return Verdict.yes("every op of ours carries a body in standard ops")

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        """``proto`` itself; with a ``precision`` its bodies are inlined and it is converted in the graph."""
        if precision is None:
            return proto
        return conversion.convert(proto, model.path.resolve().parent, precision)

    def build(
        self, lowered: ModelProto, model: Model, profile: ShapeProfile, folder: Path,
        sites: Sequence[AttentionSite] = (),
    ) -> BuildResult:  # fmt: skip
        start = time.perf_counter()
        path = write(lowered, model, folder)
        files = (path, *(folder / f.location for f in model.external_files))
        return BuildResult(self.name, files, time.perf_counter() - start, reason="runs in any ONNX runtime")

    def open(self, folder: Path) -> Any:
        """An ONNX Runtime session on the CPU."""
        import onnxruntime

        return onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])


TARGET = Onnx()

__all__ = ["MODEL", "TARGET", "Onnx", "atomic_folder", "check_replaceable", "write"]
