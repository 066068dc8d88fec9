"""Sessions of ONNX Runtime over ``OUT/``, which ``attncompile MODEL --target onnxruntime-cuda`` wrote."""

from __future__ import annotations

import ctypes
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from attncompile.core.errors import MissingDependency, TargetError
from attncompile.runtime.layout import (
    BUNDLE,
    BUNDLE_KEY,
    INDEX,
    LIBRARY,
    MODEL,
    PORTABLE,
    STRICT_KEY,
    STRICT_OPTION,
)

PROVIDER = "CUDAExecutionProvider"
_GRAPH = "enable_cuda_graph"
_PACKAGES = "pip uninstall onnxruntime, then pip install 'attncompile[cuda]'"


class InferenceSession(onnxruntime.InferenceSession):  # type: ignore[misc]  # a class without types
    """``onnxruntime.InferenceSession`` with our kernels, on the CUDA device ``device``.

    ``provider_options`` go to the CUDA provider (``{"enable_cuda_graph": "1"}``); ``sess_options`` are changed: the
    kernels' library is registered there. Where the kernels cannot run ``allow_cpu`` makes a session of ``model.onnx``
    on the CPU instead, through the bodies of our ops and in the model's own types, with a ``RuntimeWarning``.

    Raises:
        TargetError: ``path`` holds no such model, or it and its bundle do not fit; or a CUDA graph is asked for of a
            model with control flow, of which ONNX Runtime captures none.
        MissingDependency: no CUDA provider, no driver or no GPU.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, device: int = 0, allow_cpu: bool = False,
        provider_options: Mapping[str, str] | None = None, sess_options: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        folder = Path(path)
        check_folder(folder)
        options = sess_options or onnxruntime.SessionOptions()
        reason = missing(device)
        if reason is not None:
            if not allow_cpu:
                raise reason
            warnings.warn(
                f"{reason.message}: {PORTABLE} runs on the CPU, through function bodies", RuntimeWarning, stacklevel=2
            )
            super().__init__(str(folder / PORTABLE), options, providers=["CPUExecutionProvider"], **more)
            return
        given = {"device_id": str(device), **exact_norms(onnxruntime.__version__), **(provider_options or {})}
        if str(given.get(_GRAPH, "0")).lower() in ("1", "true"):
            check_capture(folder / MODEL)
        register(options, folder, given.get(STRICT_OPTION) == "1")
        try:
            super().__init__(str(folder / MODEL), options, providers=[(PROVIDER, given)], **more)
        except Exception as error:  # ONNX Runtime has a class for each of its codes, and no common one
            raise TargetError(
                f"ONNX Runtime cannot load {folder / MODEL}: {_first_line(error)}",
                "see what its CUDA provider said above: its libraries may be missing (pip install 'attncompile[cuda]')",
            ) from None
        if PROVIDER not in self.get_providers():
            raise MissingDependency("ONNX Runtime did not start its CUDA provider, and said why above", _PACKAGES)


def exact_norms(version: str) -> dict[str, str]:
    """Provider options without which ONNX Runtime before 1.27 adds up squares of fp16 in fp16, in norms of sums: those
    that the model has, and those that its own optimizer makes.
    """
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    return {} if (major, minor) >= (1, 27) else {STRICT_OPTION: "1"}


def register(options: Any, folder: Path, strict: bool = False) -> None:
    """Register the library of ``folder`` and its kernels with ``options``; ``strict``: the provider will have
    ``STRICT_OPTION``. Raises ``TargetError`` for a bad bundle, and where norms would add up squares in fp16.
    """
    entries = {BUNDLE_KEY: str((folder / BUNDLE).resolve()), **({STRICT_KEY: "1"} if strict else {})}
    for key, value in entries.items():
        if not options_has(options, key):
            options.add_session_config_entry(key, value)
    try:
        options.register_custom_ops_library(str((folder / LIBRARY).resolve()))
    except Exception as error:  # as above
        raise TargetError(f"the kernels cannot be registered: {_first_line(error)}") from None


def options_has(options: Any, key: str) -> bool:
    """Whether ``options`` have an entry ``key``."""
    try:
        options.get_session_config_entry(key)
    except RuntimeError:
        return False
    return True


def check_folder(folder: Path) -> None:
    """Raise ``TargetError`` unless ``folder`` holds a model for this runtime whose kernels are in its bundle."""
    hint = "attncompile MODEL --target onnxruntime-cuda writes one"
    for name in (MODEL, LIBRARY, f"{BUNDLE}/{INDEX}"):
        if not (folder / name).is_file():
            raise TargetError(f"{folder} holds no {name}", hint)
    try:
        known = {call["key"] for call in json.loads((folder / BUNDLE / INDEX).read_text(encoding="utf-8"))["calls"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{folder / BUNDLE / INDEX} cannot be read: {_first_line(error)}", hint) from None
    for node, key in calls_of(folder / MODEL):
        if key not in known:
            raise TargetError(
                f"node '{node}' of {folder / MODEL} needs kernels that {folder / BUNDLE} does not have",
                "the bundle is of another model: compile again",
            )


def calls_of(path: Path) -> Sequence[tuple[str, str]]:
    """(name, key of its call) of the nodes in a model file that are launched as kernels; weights are not read."""
    from attncompile.runtime.layout import DOMAIN

    found: list[tuple[str, str]] = []
    pending = [_graph(path)]
    while pending:
        for node in pending.pop().node:
            if node.domain == DOMAIN:
                found.append((node.name, node.op_type.rpartition("_")[2]))
            pending += _bodies(node)
    return found


def check_capture(path: Path) -> None:
    """Raise ``TargetError`` if the model has control flow, which no CUDA graph can hold."""
    inside = next((node for node in _graph(path).node if _bodies(node)), None)
    if inside is not None:
        raise TargetError(
            f"node '{inside.name}' of {path} is control flow ({inside.op_type}), of which no CUDA graph is captured",
            f"leave {_GRAPH} out; or, where --keep-dense made it, compile without that and call the original in the "
            "steps that stay dense",
        )


def _graph(path: Path) -> Any:
    """The main graph of a model file, without its weights."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError, OSError
        raise TargetError(f"{path} cannot be read: {_first_line(error)}", "compile the model again") from None


def _bodies(node: Any) -> list[Any]:
    """Graphs that ``node`` runs."""
    return [body for a in node.attribute if a.type in (5, 10) for body in ((a.g,) if a.type == 5 else a.graphs)]


def missing(device: int = 0) -> MissingDependency | None:
    """Why no kernel can run here, or None."""
    if PROVIDER not in onnxruntime.get_available_providers():
        return MissingDependency("this onnxruntime has no CUDA provider", _PACKAGES)
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return MissingDependency("there is no NVIDIA driver (libcuda.so.1)", "run on a machine with an NVIDIA GPU")
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code != 0 or count.value == 0:
        return MissingDependency(f"the NVIDIA driver sees no GPU (error {code})", "see nvidia-smi")
    if device >= count.value:
        return MissingDependency(f"there is no CUDA device {device}, only {count.value}", "device=0 is the first")
    return None


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__
