"""Models that a search writes by the dozen: their weights lie in one file beside them, which is written once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.external_data_helper import save_external_data, set_external_data

from attncompile.core.errors import TargetError
from attncompile.core.folder import copy_file, write_file
from attncompile.core.model import Model
from attncompile.gate import Edit
from attncompile.passes.load import graphs
from attncompile.passes.replace import apply

WEIGHTS = "attncompile-weights.bin"
LEAST = 1024
"""Bytes from which a tensor goes to the file."""

_ALIGN = 4096


class SlimModel:
    """``model`` in ``folder``, with any edits."""

    def __init__(self, model: Model, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        proto = ModelProto()
        proto.CopyFrom(model.proto)
        self._model = Model(model.path, proto, model.hash, model.opset, model.external_files, model.notes)
        for external in model.external_files:
            copy_file(external.path, folder / external.location)
        weights = folder / WEIGHTS
        try:
            weights.unlink(missing_ok=True)
            size = 0
            for graph in graphs(proto):
                for tensor in graph.initializer:
                    if len(tensor.raw_data) >= LEAST and tensor.data_location == TensorProto.DEFAULT:
                        set_external_data(tensor, WEIGHTS, size + -size % _ALIGN)
                        save_external_data(tensor, str(folder))
                        tensor.ClearField("raw_data")
                        size = weights.stat().st_size
        except OSError as error:
            raise TargetError(
                f"cannot write {weights}: {error.strerror}", "free disk space, or use --out elsewhere"
            ) from None

    def write(self, edits: Sequence[Edit], name: str = "model.onnx") -> Path:
        """The model with these edits; one that was written under this name is replaced."""
        return self._put(apply(self._model, [(e.site, e.lowering) for e in edits]), name)

    def with_outputs(self, values: Sequence[str], name: str, edits: Sequence[Edit] = ()) -> Path:
        """The model as it is, or with these edits, with these values as outputs too."""
        proto = ModelProto()
        proto.CopyFrom(apply(self._model, [(e.site, e.lowering) for e in edits]) if edits else self._model.proto)
        present = {o.name for o in proto.graph.output} | {i.name for i in proto.graph.input}
        proto.graph.output.extend(ValueInfoProto(name=n) for n in values if n not in present)
        return self._put(proto, name)

    def _put(self, proto: ModelProto, name: str) -> Path:
        path = self._folder / name
        write_file(path, proto.SerializeToString())
        return path
