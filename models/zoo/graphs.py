"""Graphs without weights, and the truth about them, as they are committed: small, and read without torch."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto

from attncompile.core.model import Model
from attncompile.models.zoo.entry import Call, Entry
from attncompile.passes.load import graphs

HERE = Path(__file__).resolve().parent
KEPT = 1024
"""Tensors of at most this many elements keep their data: scales, axes, small bias tables."""
_SHRINKS = 4
"""Larger ones keep it where it compresses by this factor: masks and index tables do, random weights do not."""
_TABLE = 1 << 14
"""And tables of numbers for every pair of tokens, up to this size: whether they hide keys is looked at."""

ABSENT = "weights-left-out"
"""The file that left-out tensors are said to lie in. It does not exist: whoever reads a weight fails."""


def graph_path(entry: Entry) -> Path:
    return HERE / "graphs" / f"{entry.slug}.onnx.gz"


def truth_path(entry: Entry) -> Path:
    return HERE / "truth" / f"{entry.slug}.json"


def without_weights(proto: ModelProto, kept: frozenset[str] = frozenset()) -> ModelProto:
    """A copy without the data of large tensors (those named in ``kept`` aside), documentation strings and metadata."""
    small = ModelProto()
    small.CopyFrom(proto)
    small.ClearField("doc_string")
    del small.metadata_props[:]
    for graph in graphs(small):
        graph.ClearField("doc_string")
        del graph.metadata_props[:]
        for tensor in _tensors(graph):
            if tensor.name not in kept:
                _leave_out(tensor)
        for holder in (*graph.node, *graph.value_info, *graph.input, *graph.output):
            holder.ClearField("doc_string")
            del holder.metadata_props[:]
    for function in small.functions:
        function.ClearField("doc_string")
        del function.metadata_props[:]
        for node in function.node:
            node.ClearField("doc_string")
            del node.metadata_props[:]
    return small


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from (a.t for a in node.attribute if a.HasField("t"))


def _leave_out(tensor: TensorProto) -> None:
    count = 1
    for dim in tensor.dims:
        count *= dim
    data = tensor.SerializeToString()
    if count <= KEPT or (count <= _TABLE and _is_table(tensor)) or len(zlib.compress(data)) * _SHRINKS < len(data):
        return
    name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, kind
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=ABSENT)


def _is_table(tensor: TensorProto) -> bool:
    """[.., n, n] with n above the side of any convolution's kernel here."""
    return len(tensor.dims) > 2 and tensor.dims[-1] == tensor.dims[-2] > 8


def write(entry: Entry, proto: ModelProto, calls: Sequence[Call], kept: frozenset[str] = frozenset()) -> int:
    """Writes graph and truth of ``entry``; the size of the two files in bytes."""
    data = gzip.compress(without_weights(proto, kept).SerializeToString(deterministic=True), 9, mtime=0)
    packages = ("torch", "transformers", "diffusers", "onnxscript", *entry.needs)
    truth = {
        "title": entry.title,
        "graph": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "nodes": len(proto.graph.node),
        "versions": {name: metadata.version(name) for name in packages},
        "calls": [asdict(c) for c in calls],
    }
    graph_path(entry).parent.mkdir(exist_ok=True)
    truth_path(entry).parent.mkdir(exist_ok=True)
    graph_path(entry).write_bytes(data)
    text = json.dumps(truth, indent=1) + "\n"
    truth_path(entry).write_text(text)
    return len(data) + len(text)


def read_truth(entry: Entry) -> dict[str, Any]:
    """The committed truth; ``calls`` as ``Call`` values."""
    truth: dict[str, Any] = json.loads(truth_path(entry).read_text())
    truth["calls"] = [Call(**c) for c in truth["calls"]]
    return truth


def read_graph(entry: Entry) -> Model:
    """The committed graph. Its large tensors have a shape and no data.

    Raises:
        ValueError: the file is not the one that the truth was written with.
    """
    path = graph_path(entry)
    data = path.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if digest != json.loads(truth_path(entry).read_text())["graph"]:
        raise ValueError(f"{path.name} is not the file that {truth_path(entry).name} was written with")
    proto = ModelProto.FromString(gzip.decompress(data))
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return Model(path.with_suffix(""), proto, digest, opset)
