"""Reads an ONNX file and refuses, with a reason, what cannot be compiled. External weights are checked, not read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from attncompile.core.errors import BadModel
from attncompile.core.model import ExternalFile, Model

MAX_TENSOR_BYTES = 1 << 40
"""A declared tensor above 1 TiB is taken for a corrupt or hostile file."""

_PROTOBUF_LIMIT = (1 << 31) - 1


def load(path: Path, *, hash_weights: bool = False) -> Model:
    """Load ``path`` without its external data.

    Raises:
        BadModel: not a file, not ONNX, truncated, cyclic, absurd dimensions, or external data that is missing, too
            short, outside the model's folder or behind a symbolic link.
    """
    data = _read(path)
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise BadModel(
            f"{path} is not a readable ONNX file (damaged, truncated or another format)",
            "export the model again, or check the file with onnx.checker.check_model",
        ) from None
    _check_is_model(proto, path)
    external = _check_external(proto, path)
    for graph in graphs(proto):
        _check_dimensions(graph, path)
        _check_nodes(proto, graph, path)
        _check_acyclic(graph, path)
    digest = hashlib.sha256(data)
    for tensor in external_tensors(proto):
        info = {e.key: e.value for e in tensor.external_data}
        size = next(f.size for f in external if f.location == info["location"])
        digest.update(repr((info["location"], info.get("offset"), info.get("length"), size)).encode())
    if hash_weights:
        for file in external:
            with file.path.open("rb") as handle:
                while chunk := handle.read(1 << 24):
                    digest.update(chunk)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return Model(path=path, proto=proto, hash=f"sha256:{digest.hexdigest()}", opset=opset, external_files=external)


def graphs(proto: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every graph inside its nodes' attributes."""
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def external_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor whose data lies in another file: initializers and tensor attributes, subgraphs included."""
    for graph in graphs(proto):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                yield tensor
        for node in graph.node:
            for attribute in node.attribute:
                for tensor in (attribute.t, *attribute.tensors) if attribute.type in (4, 9) else ():
                    if tensor.data_location == TensorProto.EXTERNAL:
                        yield tensor


def tensor_value(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The tensor as an array; reads its slice of the external file if it has one."""
    if tensor.data_location == TensorProto.EXTERNAL:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
        tensor = copy
    return numpy_helper.to_array(tensor)


def element_bytes(elem_type: int) -> float:
    """Bytes of one element of an ONNX element type; strings count as one byte."""
    if elem_type == TensorProto.STRING:
        return 1
    try:
        return float(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)
    except KeyError:
        return 1


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise BadModel(f"{path} is a folder, not an ONNX file", "name the .onnx file inside it")
    try:
        size = path.stat().st_size
        if size == 0:
            raise BadModel(f"{path} is empty", "export the model again")
        if size > _PROTOBUF_LIMIT:
            raise BadModel(
                f"{path} is {size / 2**30:.1f} GiB; protobuf cannot read more than 2 GiB in one file",
                "save the model with external data: onnx.save(model, path, save_as_external_data=True)",
            )
        return path.read_bytes()
    except OSError as error:
        raise BadModel(f"cannot read {path}: {error.strerror or error}", "check the path and its permissions") from None


def _check_is_model(proto: ModelProto, path: Path) -> None:
    # Any short byte string can parse as a protobuf; these fields every model has.
    if proto.ir_version <= 0 or not proto.opset_import or not (proto.graph.node or proto.graph.output):
        raise BadModel(
            f"{path} is not an ONNX model: no IR version, operator set or graph in it",
            "pass a file written by an ONNX exporter",
        )


def _check_external(proto: ModelProto, path: Path) -> tuple[ExternalFile, ...]:
    folder = path.resolve().parent
    files: dict[str, ExternalFile] = {}
    for tensor in external_tensors(proto):
        info = {e.key: e.value for e in tensor.external_data}
        location = info.get("location", "")
        if location not in files:
            files[location] = _external_file(location, tensor.name, folder)
        try:
            offset, length = int(info.get("offset", 0)), int(info.get("length", 0))
        except ValueError:
            raise BadModel(f"tensor '{tensor.name}' has an unreadable external offset or length",
                           "write plain byte numbers, or export the model again") from None  # fmt: skip
        need = length or int(np.prod(tensor.dims, dtype=object) * element_bytes(tensor.data_type))
        if offset < 0 or length < 0 or offset + need > files[location].size:
            raise BadModel(
                f"external data of tensor '{tensor.name}' ends at byte {offset + need}, but {location} has only "
                f"{files[location].size} bytes",
                "the file is truncated or belongs to another export: copy or export it again",
            )
    return tuple(files.values())


def _external_file(location: str, tensor: str, folder: Path) -> ExternalFile:
    hint = "keep the external data beside the model, under a relative name without '..' or links"
    pure = PurePosixPath(location)
    if not location or pure.is_absolute() or PureWindowsPath(location).is_absolute() or ".." in pure.parts:
        raise BadModel(f"external data '{location}' of tensor '{tensor}' is outside the model's folder", hint)
    target = folder / location
    if any(p.is_symlink() for p in (target, *target.parents) if folder in p.parents):
        raise BadModel(f"external data '{location}' of tensor '{tensor}' is behind a symbolic link", hint)
    if not target.is_file():
        raise BadModel(
            f"external data '{location}' of tensor '{tensor}' is missing beside the model",
            "copy the data file into the model's folder",
        )
    return ExternalFile(location, target, target.stat().st_size)


def _check_dimensions(graph: GraphProto, path: Path) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if not value.type.HasField("tensor_type"):
            continue
        tensor = value.type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim if d.HasField("dim_value")]
        _check_size(value.name, dims, tensor.elem_type, path)
    for initializer in graph.initializer:
        _check_size(initializer.name, list(initializer.dims), initializer.data_type, path)
        if initializer.HasField("raw_data") and initializer.data_location != TensorProto.EXTERNAL:
            want = np.prod(initializer.dims, dtype=object) * element_bytes(initializer.data_type)
            # Packed 4-bit types store two elements a byte, so only a size that is too large is certain to be wrong.
            if want > len(initializer.raw_data) and want >= 8 and want / max(len(initializer.raw_data), 1) > 2:
                raise BadModel(
                    f"initializer '{initializer.name}' declares {want:.0f} bytes and holds {len(initializer.raw_data)}",
                    "the file is damaged: export the model again",
                )


def _check_size(name: str, dims: list[int], elem_type: int, path: Path) -> None:
    if any(d < 0 for d in dims) or np.prod(dims, dtype=object) * element_bytes(elem_type) > MAX_TENSOR_BYTES:
        raise BadModel(
            f"tensor '{name}' of {path.name} declares the impossible shape {dims}",
            "the file is damaged, or a dimension should be symbolic: export the model again",
        )


def node_inputs(node: NodeProto) -> Iterator[str]:
    """The values a node reads, those read inside its subgraphs included."""
    yield from (i for i in node.input if i)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            inner = {o for n in graph.node for o in n.output} | {i.name for i in graph.input}
            inner |= {i.name for i in graph.initializer}
            yield from (v for n in graph.node for v in node_inputs(n) if v not in inner)
            yield from (o.name for o in graph.output if o.name not in inner)


def _check_nodes(proto: ModelProto, graph: GraphProto, path: Path) -> None:
    """What everything after this takes for granted: nodes have an output, each value is made once, and standard
    operators have the number of inputs and outputs and the types of attributes that they are defined with.
    """
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in proto.opset_import}
    made: set[str] = set()
    for node in graph.node:
        name = node.name or f"{node.op_type}:{node.output[0] if node.output else ''}"
        twice = next((o for o in node.output if o and o in made), None)
        wrong = f"makes '{twice}', which another node makes too" if twice else ""
        made.update(node.output)
        if not any(node.output):
            wrong = "has no output"
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not wrong and opsets.get(domain, 0) > 0 and onnx.defs.has(node.op_type, opsets[domain], domain):
            wrong = _misuse(onnx.defs.get_schema(node.op_type, opsets[domain], domain), node)
        if wrong:
            raise BadModel(f"node '{name}' of {path.name} {wrong}",
                           "the file is damaged or its exporter is wrong: see onnx.checker.check_model")  # fmt: skip


def _misuse(schema: onnx.defs.OpSchema, node: NodeProto) -> str:
    """How ``node`` differs from its operator's definition, or nothing."""
    for what, count, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            return f"has {count} {what}, but {schema.name} takes {least}" + (f" to {most}" if most > least else "")
    given = {a.name: a for a in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.required:
            return f"lacks attribute '{name}', which {schema.name} needs"
        kind = onnx.AttributeProto.AttributeType.Name(given[name].type) if name in given else "UNDEFINED"
        if kind not in ("UNDEFINED", str(attribute.type).rpartition(".")[2]):
            return f"has attribute '{name}' of another type than {schema.name} takes"
    return ""


def _check_acyclic(graph: GraphProto, path: Path) -> None:
    producer = {o: i for i, n in enumerate(graph.node) for o in n.output if o}
    waiting = [len({producer[v] for v in node_inputs(n) if v in producer}) for n in graph.node]
    readers: list[set[int]] = [set() for _ in graph.node]
    for i, node in enumerate(graph.node):
        for value in node_inputs(node):
            if value in producer:
                readers[producer[value]].add(i)
    ready = [i for i, w in enumerate(waiting) if w == 0]
    done = 0
    while ready:
        i = ready.pop()
        done += 1
        for reader in readers[i]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    if done < len(graph.node):
        stuck = next(n for i, n in enumerate(graph.node) if waiting[i] > 0)
        name = stuck.name or f"{stuck.op_type}:{stuck.output[0]}"
        raise BadModel(
            f"the graph of {path.name} has a cycle through node '{name}'",
            "an ONNX graph must be acyclic: export the model again",
        )
