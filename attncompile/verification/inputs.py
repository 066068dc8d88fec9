"""Inputs of a whole model: made up from a seed, or read from the user's file."""

from __future__ import annotations

import importlib.util
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from attncompile.core.errors import BadArguments
from attncompile.core.model import Model
from attncompile.core.sums import size_of
from attncompile.passes.index import graphs_within

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.INT8, TensorProto.UINT8)
_PASS_THROUGH = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Expand"}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A declared graph input: ``shape`` holds numbers, symbols, or None for an unnamed dynamic axis."""

    name: str
    shape: tuple[int | str | None, ...] | None
    elem_type: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.elem_type))

    def __str__(self) -> str:
        dims = "any shape" if self.shape is None else str(["?" if d is None else d for d in self.shape])
        return f"{self.name}: {self.dtype}{dims}"


def input_specs(proto: ModelProto) -> tuple[InputSpec, ...]:
    """The inputs that a caller must feed: graph inputs without an initializer of the same name."""
    stored = {t.name for t in proto.graph.initializer}
    out = []
    for v in proto.graph.input:
        if v.name in stored:
            continue
        if not v.type.HasField("tensor_type"):
            raise BadArguments(
                f"input {v.name} is a {v.type.WhichOneof('value')}, not a tensor",
                "models with sequence, map or optional inputs cannot be run here",
            )
        tensor = v.type.tensor_type
        shape: tuple[int | str | None, ...] | None = None
        if tensor.HasField("shape"):
            shape = tuple(
                d.dim_value if d.dim_value > 0 else (d.dim_param or None) for d in tensor.shape.dim
            )  # fmt: skip
        out.append(InputSpec(v.name, shape, tensor.elem_type))
    return tuple(out)


def make_inputs(model: Model, binding: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Plausible seeded values for every input of ``model``, with its symbols bound by ``binding``.

    Normal floats; masks of ones; ids inside the embedding table that they index; positions counting up; timesteps in
    [0, 1000). The same seed gives the same values. Raises BadArguments for a symbol without a binding.
    """
    made = {s.name: _make(s, _concrete(s, binding), model.proto, seed) for s in input_specs(model.proto)}
    return {name: np.asarray(value) for name, value in made.items()}  # NumPy gives no array for a scalar


def padded_feeds(feed: Mapping[str, np.ndarray], masks: Iterable[str]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """``feed`` with a third of the keys hidden in its mask inputs (those of ``masks`` that hold nothing but ones or
    True, keys on their last axis): ``left padding``, ``right padding``, ``middle padding``. Every row of a mask keeps
    its first or its last key, and later rows hide fewer.
    """
    names = [n for n in masks if n in feed and feed[n].ndim and feed[n].shape[-1] > 2 and bool((feed[n] == 1).all())]
    if not names:
        return []
    found = []
    for side in ("left", "right", "middle"):
        changed = {}
        for name in names:
            mask = feed[name].copy()
            keys = mask.shape[-1]
            for row, values in enumerate(mask.reshape(-1, keys)):
                hidden = max(1, keys // (3 + row))
                start = {"left": 0, "right": keys - hidden, "middle": min(keys // 2, keys - 1 - hidden)}[side]
                values[start : start + hidden] = 0
            changed[name] = mask
        found.append((f"{side} padding", {**feed, **changed}))
    return found


def _concrete(spec: InputSpec, binding: Mapping[str, int]) -> tuple[int, ...]:
    if spec.shape is None:
        raise BadArguments(f"input {spec.name} declares no shape", "give its values with --inputs")
    dims = []
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            dims.append(dim)
        elif dim is not None and (size := size_of(dim, binding)) is not None:
            dims.append(size)
        elif f"{spec.name}:{axis}" in binding:  # how an unnamed axis can be bound
            dims.append(binding[f"{spec.name}:{axis}"])
        else:
            label = f"symbol {dim!r}" if dim else f"unnamed axis {axis}"
            raise BadArguments(f"input {spec.name}: {label} has no size", "give it a size in the shape profile")
    return tuple(dims)


def _make(spec: InputSpec, shape: tuple[int, ...], proto: ModelProto, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    name = spec.name.lower()
    if "mask" in name or spec.elem_type == TensorProto.BOOL:
        return np.ones(shape, spec.dtype)
    timestep = "timestep" in name or name in ("t", "sigma")
    if spec.elem_type in _FLOATS:
        if timestep:
            return np.floor(rng.uniform(0, 1000, shape)).astype(spec.dtype)
        if "ids" in name:  # FLUX and its like pass token positions as floats
            return rng.integers(0, 64, shape).astype(spec.dtype)
        return rng.standard_normal(shape).astype(spec.dtype)
    if spec.elem_type in _INTEGERS or spec.elem_type in (TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64):
        table = _table_size(proto.graph, spec.name)
        if "position" in name and shape:
            limit = table or shape[-1]
            return np.broadcast_to(np.arange(shape[-1]) % limit, shape).astype(spec.dtype)
        if "token_type" in name:
            return np.zeros(shape, spec.dtype)
        high = table or (1000 if timestep else 2)
        return rng.integers(0, min(high, int(np.iinfo(spec.dtype).max)), shape).astype(spec.dtype)
    raise BadArguments(f"input {spec.name} has type {spec.dtype}, for which no values are made up", "use --inputs")


def _table_size(graph: GraphProto, name: str) -> int | None:
    """The smallest table that is indexed (Gather axis 0) by ``name``, followed through casts and reshapes, also in the
    bodies of control flow.
    """
    every = list(graphs_within(graph))
    nodes = [n for g in every for n in g.node]
    tables = {t.name: list(t.dims) for g in every for t in g.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tables[node.output[0]] = list(attribute.t.dims)
    consumers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for value in node.input:
            consumers.setdefault(value, []).append(node)
    sizes: list[int] = []
    todo, seen = deque([name]), {name}
    while todo:
        value = todo.popleft()
        for node in consumers.get(value, []):
            if node.op_type == "Gather" and len(node.input) > 1 and node.input[1] == value:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                table = _through(nodes, node.input[0], tables)
                if table:
                    sizes.append(table[axis])
            elif node.op_type in _PASS_THROUGH and node.input[0] == value and node.output[0] not in seen:
                seen.add(node.output[0])
                todo.append(node.output[0])
    return min(sizes, default=None)


def _through(nodes: Sequence[NodeProto], name: str, tables: Mapping[str, list[int]]) -> list[int] | None:
    """The table's shape, also where it is stored in another type and cast (or is dequantised) first."""
    if name in tables:
        return tables[name]
    for node in nodes:
        if name in node.output and node.op_type in ("Cast", "Identity", "DequantizeLinear"):
            return tables.get(node.input[0])
    return None


def check_feed(proto: ModelProto, feed: Mapping[str, np.ndarray], source: str = "the inputs") -> dict[str, np.ndarray]:
    """``feed`` in the model's input order, once its names, types and shapes are shown to fit (symbols consistently).

    Raises BadArguments naming the input. Integers of another width are converted if no value changes; nothing else is.
    """
    specs = input_specs(proto)
    declared = "the model takes " + "; ".join(str(s) for s in specs)
    unknown = sorted(set(feed) - {s.name for s in specs})
    if unknown:
        raise BadArguments(f"{source}: the model has no input {unknown[0]!r}", declared)
    bound: dict[str, tuple[int, str]] = {}
    out = {}
    for spec in specs:
        if spec.name not in feed:
            raise BadArguments(f"{source}: input {spec.name!r} is missing", declared)
        value = _typed(spec, np.asarray(feed[spec.name]), source)
        if spec.shape is not None:
            if len(spec.shape) != value.ndim:
                raise BadArguments(f"{source}: input {spec.name!r} has shape {list(value.shape)}", f"expected {spec}")
            for axis, (dim, size) in enumerate(zip(spec.shape, value.shape, strict=True)):
                if isinstance(dim, int) and dim != size:
                    raise BadArguments(
                        f"{source}: input {spec.name!r} has {size} entries on axis {axis}", f"expected {spec}"
                    )
                if isinstance(dim, str):
                    first = bound.setdefault(dim, (size, spec.name))
                    if first[0] != size:
                        raise BadArguments(
                            f"{source}: input {spec.name!r} has {dim} = {size}, but {first[1]!r} has {first[0]}",
                            "sizes with one name must agree",
                        )
        out[spec.name] = value
    return out


def _typed(spec: InputSpec, value: np.ndarray, source: str) -> np.ndarray:
    if value.dtype == spec.dtype:
        return value
    if value.dtype.kind in "iu" and spec.dtype.kind in "iu" and np.array_equal(value.astype(spec.dtype), value):
        return value.astype(spec.dtype)
    raise BadArguments(f"{source}: input {spec.name!r} has type {value.dtype}", f"expected {spec}")


def load_inputs(path: Path, proto: ModelProto | None = None) -> list[dict[str, np.ndarray]]:
    """Feeds from ``path``: ``.npz`` (one feed), Polygraphy's ``.json`` (``--save-inputs``), or a ``.py`` script whose
    ``load_data()`` yields dicts. A script is executed: it is the user's own code. With ``proto`` every feed is checked.

    Raises BadArguments for a file that cannot be read, holds no feed, or does not fit the model.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise BadArguments(f"{path} {what}", "give an .npz, a Polygraphy .json or a .py with load_data()")
    readers = {".npz": _npz, ".json": _json, ".py": _script}
    if path.suffix not in readers:
        raise BadArguments(f"{path}: unknown kind of input file", "give an .npz, a Polygraphy .json or a .py script")
    try:
        feeds = [_as_feed(x, path) for x in readers[path.suffix](path)]
    except BadArguments:
        raise
    except (Exception, SystemExit) as error:  # the content is the user's: whatever is wrong with it is a bad argument
        text = str(error).strip().splitlines()
        raise BadArguments(
            f"{path}: cannot read inputs: {type(error).__name__}: {text[0][:200] if text else ''}", _HINTS[path.suffix]
        ) from error
    if not feeds:
        raise BadArguments(f"{path} holds no inputs", "give at least one set of inputs")
    if proto is not None:
        return [check_feed(proto, f, f"{path}, set {i}") for i, f in enumerate(feeds)]
    return feeds


_HINTS = {
    ".npz": "an .npz holds one array per input: np.savez(FILE, NAME=ARRAY, ...)",
    ".json": "such a file comes from `polygraphy run --save-inputs`, or polygraphy.json.save_json of a list of dicts",
    ".py": "load_data() in it returns or yields dicts of name -> array",
}


def _as_feed(item: Any, path: Path) -> dict[str, np.ndarray]:
    if not isinstance(item, Mapping) or not item or not all(isinstance(k, str) for k in item):
        raise BadArguments(f"{path}: every set of inputs is a dict of name -> array", _HINTS[path.suffix])
    return {k: np.asarray(v) for k, v in item.items()}


def _npz(path: Path) -> Sequence[Mapping[str, np.ndarray]]:
    with np.load(path, allow_pickle=False) as data:
        feed = {k: data[k] for k in data.files}
    return [feed] if feed else []


def _json(path: Path) -> Iterable[Any]:
    from polygraphy.json import load_json

    data = load_json(str(path))
    return [data] if isinstance(data, Mapping) else list(data)


def _script(path: Path) -> Iterable[Any]:
    spec = importlib.util.spec_from_file_location(f"_attncompile_inputs_{zlib.crc32(str(path).encode())}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "load_data"):
        raise BadArguments(f"{path} defines no load_data()", "define load_data() that yields dicts of name -> array")
    return list(module.load_data())
