"""Doubles of the native classes of ``tensorrt`` that the real ``tensorrt.plugin`` touches, as a plugin sees them.

They are strict where the originals are: an expression is made by the builder in force, an argument of the launch is an
int32 symbol, a field's data has the types that the bindings convert.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


def _enum(name: str, members: str) -> Any:
    return enum.IntEnum(name, members.split(), start=0)


DataType = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0")
TensorFormat = _enum(
    "TensorFormat", "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32 DHWC8 CDHW32 HWC DLA_LINEAR DLA_HWC4 HWC16 DHWC"
)
DimensionOperation = _enum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV")
PluginFieldType = _enum(
    "PluginFieldType", "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 CHAR DIMS UNKNOWN BF16 INT64 FP8 INT4 FP4"
)
PluginArgType = _enum("PluginArgType", "INT")
PluginArgDataType = _enum("PluginArgDataType", "INT8 INT16 INT32")
TensorRTPhase = _enum("TensorRTPhase", "BUILD RUNTIME")
QuickPluginCreationRequest = _enum("QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT")


def nptype(kind: Any) -> Any:
    found = {
        DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32, DataType.INT64: np.int64,
        DataType.INT8: np.int8, DataType.BOOL: np.bool_, DataType.UINT8: np.uint8, DataType.BF16: ml_dtypes.bfloat16,
    }  # fmt: skip
    return found[kind]


_APPLY = {
    DimensionOperation.SUM: lambda a, b: a + b, DimensionOperation.PROD: lambda a, b: a * b,
    DimensionOperation.MAX: max, DimensionOperation.MIN: min, DimensionOperation.SUB: lambda a, b: a - b,
    DimensionOperation.EQUAL: lambda a, b: int(a == b), DimensionOperation.LESS: lambda a, b: int(a < b),
    DimensionOperation.FLOOR_DIV: lambda a, b: a // b, DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}  # fmt: skip


class IDimensionExpr:
    """A number, the size of an axis (by a name), or an operation. It belongs to the builder that made it."""

    def __init__(self, builder: IExprBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    def is_constant(self) -> bool:
        return isinstance(self.value, int)

    def get_constant_value(self) -> int:
        assert self.is_constant()
        return int(self.value)

    def is_size_tensor(self) -> bool:
        return False

    def at(self, sizes: Mapping[str, int]) -> int:
        """The value for sizes of the axes."""
        if isinstance(self.value, int):
            return self.value
        if isinstance(self.value, str):
            return int(sizes[self.value])
        operation, a, b = self.value
        return int(_APPLY[operation](a.at(sizes), b.at(sizes)))


class IExprBuilder:
    """One for each call that TensorRT makes; using another's expressions, or it when its call is over, is a crash in
    the original and an error here.
    """

    def __init__(self) -> None:
        self.closed = False

    def _check(self, *given: Any) -> None:
        if self.closed:
            raise RuntimeError("this expression builder's call is over")
        for expression in given:
            if not isinstance(expression, IDimensionExpr):
                raise TypeError(f"operation(): incompatible function arguments: {type(expression).__name__}")

    def constant(self, value: int) -> IDimensionExpr:
        self._check()
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"constant(): incompatible function arguments: {value!r}")
        return IDimensionExpr(self, int(value))

    def size(self, name: str) -> IDimensionExpr:
        """The size of an axis; not of the original."""
        return IDimensionExpr(self, name)

    def operation(self, operation: Any, a: Any, b: Any) -> IDimensionExpr:
        self._check(a, b)
        if a.is_constant() and b.is_constant():
            return IDimensionExpr(self, int(_APPLY[operation](a.value, b.value)))
        return IDimensionExpr(self, (operation, a, b))


class DimsExprs(list[Any]):
    def __init__(self, given: Any = ()) -> None:
        super().__init__([None] * given if isinstance(given, int) else given)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, IDimensionExpr):
            raise TypeError(f"an axis is {type(value).__name__}, not IDimensionExpr")
        super().__setitem__(index, value)


class Dims(list[int]):
    MAX_DIMS = 8

    def __init__(self, given: Any = ()) -> None:
        super().__init__([0] * given if isinstance(given, int) else given)


class PluginTensorDesc:
    def __init__(self) -> None:
        self.dims, self.type, self.format, self.scale = Dims(), DataType.FLOAT, TensorFormat.LINEAR, 1.0


class DynamicPluginTensorDesc:
    def __init__(self) -> None:
        self.desc, self.min, self.opt, self.max = PluginTensorDesc(), Dims(), Dims(), Dims()


class PluginField:
    """``data`` is a view of the bytes, of the type that the bindings convert to; FLOAT16 has none."""

    _views: Mapping[int, str] = {
        PluginFieldType.INT8: "i1",
        PluginFieldType.INT16: "i2",
        PluginFieldType.INT32: "i4",
        PluginFieldType.INT64: "i8",
        PluginFieldType.FLOAT32: "f4",
        PluginFieldType.FLOAT64: "f8",
        PluginFieldType.CHAR: "S1",
        PluginFieldType.UNKNOWN: "i1",
    }

    def __init__(self, name: str = "", data: Any = b"", type: Any = PluginFieldType.UNKNOWN) -> None:
        self.name, self.type = name, type
        self._raw = bytes(data) if isinstance(data, bytes | bytearray) else np.ascontiguousarray(data).tobytes()

    @property
    def data(self) -> np.ndarray:
        if self.type not in self._views:
            raise AttributeError("No known conversion for returning data from PluginField")
        return np.frombuffer(self._raw, self._views[self.type])


class PluginFieldCollection(list[Any]):
    pass


class _Native:
    def __init__(self) -> None:
        pass


class IVersionedInterface(_Native):
    pass


class IPluginV3(IVersionedInterface):
    pass


class IPluginV3QuickCore(_Native):
    pass


class IPluginV3QuickBuild(_Native):
    pass


class IPluginV3QuickRuntime(_Native):
    pass


class IPluginV3QuickAOTBuild(IPluginV3QuickBuild):
    pass


class IPluginCreatorV3Quick(_Native):
    pass


class ISymExpr(_Native):
    """``type`` and ``dtype`` of the argument, and ``expr``."""


class Logger:
    """Keeps what it is told."""

    WARNING = 2

    def log(self, severity: int, message: str) -> None:
        pass


class ITensor:
    pass


class Registry:
    """By name, version and namespace, as ``IPluginRegistry``; a second creator of one name is refused."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        if key in self.creators:
            return False
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


_SHORT = {
    "float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16, "int32": DataType.INT32,
    "int64": DataType.INT64, "int8": DataType.INT8, "bool": DataType.BOOL, "uint8": DataType.UINT8,
}  # fmt: skip


@contextlib.contextmanager
def installed(plugin: Path, **more: Any) -> Iterator[tuple[Any, Any]]:
    """The doubles as ``tensorrt`` and the real package in the folder ``plugin`` as ``tensorrt.plugin``; (both)."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    trt = types.ModuleType("tensorrt")
    trt.__path__ = []
    ours = sys.modules[__name__]
    for name, value in vars(ours).items():
        if getattr(value, "__module__", "") == __name__ and not name.startswith("_"):
            setattr(trt, name, value)
    registry = Registry()
    trt.__dict__.update(_SHORT, get_plugin_registry=lambda: registry, nptype=nptype, **more)
    sys.modules["tensorrt"] = trt
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", plugin / "__init__.py", submodule_search_locations=[str(plugin)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = trt.plugin = package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in its doc strings
            spec.loader.exec_module(package)
        yield trt, package
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)
