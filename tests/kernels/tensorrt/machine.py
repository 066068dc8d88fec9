"""A double of TensorRT's parser, builder and runtime over ``walk.py``: its engine is a JSON text with the launches of
every plugin. It is what ``tensorrt`` is in the builder's process in tests; see ``as_package``.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx

from tests.kernels.tensorrt import native
from tests.kernels.tensorrt.walk import Refused, Sizes, check_entry, importer, walk

_PACKAGE = """from tests.kernels.tensorrt.native import *
from tests.kernels.tensorrt.native import nptype
from tests.kernels.tensorrt.machine import *
from tests.kernels.tensorrt.machine import _SHORT, _REGISTRY
globals().update(_SHORT)
__version__ = "{version}"
def get_plugin_registry():
    return _REGISTRY
"""
_REGISTRY = native.Registry()
_SHORT = native._SHORT


def as_package(folder: Path, plugin: Path, version: str) -> Path:
    """``folder`` as a place of an importable ``tensorrt`` of this version, with the real ``tensorrt.plugin``."""
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "tensorrt" / "__init__.py").write_text(_PACKAGE.format(version=version), encoding="utf-8")
    shutil.copytree(plugin, folder / "tensorrt" / "plugin")
    return folder


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0
    PREFER_JIT_PYTHON_PLUGINS = 1
    PREFER_AOT_PYTHON_PLUGINS = 2


class BuilderFlag(enum.IntEnum):
    REFIT = 2
    WEIGHT_STREAMING = 11


class ProfilingVerbosity(enum.IntEnum):
    DETAILED = 2


class LayerInformationFormat(enum.IntEnum):
    ONELINE = 0
    JSON = 1


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class Logger(ILogger):
    def __init__(self, severity: int = ILogger.WARNING) -> None:
        super().__init__()

    def log(self, severity: int, message: str) -> None:
        pass


class Network:
    def __init__(self, flags: int) -> None:
        self.flags, self.name, self.model = flags, "", onnx.ModelProto()


class ParserError:
    def __init__(self, message: str) -> None:
        self.message = message

    def node_name(self) -> str:
        return ""

    def node_operator(self) -> str:
        return ""

    def desc(self) -> str:
        return self.message


class OnnxParser:
    def __init__(self, network: Network, logger: Any) -> None:
        self.network, self.errors = network, []  # type: tuple[Network, list[ParserError]]

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse(self, data: bytes, path: str) -> bool:
        self.network.model = onnx.load_from_string(data)
        trt = sys.modules["tensorrt"]
        for node in self.network.model.graph.node:
            if node.domain and importer(trt, self.network.model, node) == "plugin":
                space = next((a.s.decode() for a in node.attribute if a.name == "plugin_namespace"), "")
                if trt.get_plugin_registry().get_creator(node.op_type, "1", space) is None:
                    self.errors.append(ParserError(f"Plugin not found: {node.op_type}"))
        return not self.errors


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        self.shapes[name] = (low, usual, high)


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.flags: list[int] = []

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: int) -> None:
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        pass


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        trt = sys.modules["tensorrt"]
        limit = int(os.environ.get("DOUBLE_SHARED_LIMIT", str(1 << 20)))
        found: dict[str, Any] = {}
        for number, profile in enumerate(config.profiles or [Profile()]):
            try:
                walked = walk(trt, network.model, _sizes(network.model, profile))
                for launches in walked.values():
                    for launch in launches:
                        check_entry(launch)
                        if launch.shared > limit:
                            raise Refused(f"{launch.node}: cuLaunchKernel: CUDA_ERROR_INVALID_VALUE")
            except Exception as error:  # TensorRT logs what a callback raises, and fails
                self.logger.log(ILogger.ERROR, f"{type(error).__name__}: {error}")
                return None
            for name, launches in walked.items():
                found.setdefault(name, []).append([number, [x.tactic for x in launches], [x.shared for x in launches]])
        layers = [{"Name": n, "LayerType": "PluginV3"} for n in found if not os.environ.get("DOUBLE_LOSES_PLUGINS")]
        return json.dumps({"Layers": layers, "walked": found, "name": network.name, "flags": network.flags}).encode()


def _sizes(model: onnx.ModelProto, profile: Profile) -> Sizes:
    found = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                low, usual, high = (shape[axis] for shape in profile.shapes[value.name])
                found[dim.dim_param] = (low, usual, high)
    return found


class Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        return Engine(data)


class Engine:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def create_engine_inspector(self) -> Any:
        return self

    def get_engine_information(self, form: int) -> str:
        assert form == LayerInformationFormat.JSON
        return self.data.decode()
